"""Tiled attention against brute force in float64 and torch's own; merging, memory, kernels, and all that can be asked."""

import functools
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import flash_attn
from attention_kernels import works
from attention_traffic import peak_extra_bytes
from flash_attn import (Options, dropout_factor, flash_attention, flash_attention_with_lse, merge, naive_attention_with_lse,
                        online_softmax, softmax_of_concatenation, split_kv_attention, textbook_backward, textbook_forward,
                        tiled_backward, tiled_forward)


def problem(T, S, H=4, Hkv=2, Dh=8, B=2, dtype=torch.float64, seed=0, spread=1.0):
    """q, k, v and gradients for out and lse."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, T, Dh), (B, Hkv, S, Dh), (B, Hkv, S, Dh), (B, H, T, Dh), (B, H, T)
    q, k, v, grad_out, grad_lse = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return (q * spread).to(dtype), k.to(dtype), v.to(dtype), grad_out.to(dtype), grad_lse


def extras(kind, B, H, T, S):
    generator = torch.Generator().manual_seed(1)
    if kind == "ids":
        return {"ids": torch.randint(3, (B, S), generator=generator).sort(1)[0]}
    if kind == "bias":
        return {"bias": torch.randn(1, H, T, S, generator=generator, dtype=torch.float64)}
    if kind == "row bias":  # as for padded keys
        return {"bias": torch.randn(B, 1, 1, S, generator=generator, dtype=torch.float64)}
    return {"dropout": {"dropout": 0.3, "seed": 5}, "soft cap": {"soft_cap": 0.7}, "scale": {"scale": 0.9},
            "window": {"window": 3}, "two-sided window": {"window": 4, "is_causal": False},
            "not causal": {"is_causal": False}, "causal": {}}[kind]


def brute_force(q, k, v, is_causal=True, window=None, ids=None, bias=None, soft_cap=None, dropout=0.0, seed=0, scale=None):
    """One query at a time, over the list of keys that it sees."""
    (B, H, T, Dh), S, G = q.shape, k.size(2), q.size(1) // k.size(1)
    heads = torch.arange(B * H)
    kept = dropout_factor(Options(dropout=dropout, seed=seed), heads, T, S, range(T), range(S)).view(B, H, T, S)
    out, lse = torch.zeros_like(q), torch.full((B, H, T), -math.inf, dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                at = S - T + t
                seen = [s for s in range(S) if (not is_causal or s <= at) and (not window or abs(s - at) < window)
                        and (ids is None or ids[b, s] == ids[b, at])]
                if not seen:
                    continue
                x = k[b, h // G, seen] @ q[b, h, t] * (scale or 1 / math.sqrt(Dh))
                x = soft_cap * torch.tanh(x / soft_cap) if soft_cap else x
                x = x if bias is None else x + bias.expand(B, H, T, S)[b, h, t, seen]
                lse[b, h, t] = x.logsumexp(0)
                weights = x.softmax(0) * (kept[b, h, t, seen] if dropout else 1)
                out[b, h, t] = weights.to(v.dtype) @ v[b, h // G, seen]
    return out, lse


def with_gradients(attention, q, k, v, grad_out, grad_lse, bias=None, **options):
    """out, lse, dq, dk, dv and, if there is one, dbias."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v) + (() if bias is None else (bias,))]
    out, lse = attention(*leaves[:3], **options, **({} if bias is None else {"bias": leaves[3]}))
    finite = lse.masked_fill(lse == -math.inf, 0)  # its gradient would be NaN in any implementation
    loss = (out * grad_out).sum() + (finite * grad_lse).sum() + sum(0 * x.sum() for x in leaves)  # what is unused: 0
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)


def in_tiles(tile):
    """tiled_forward and tiled_backward with tiles of this size, as one differentiable function."""
    class Tiled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, bias, options):
            ctx.options = options
            out, lse = tiled_forward(q, k, v, options, tile)
            ctx.save_for_backward(q, k, v, out, lse)
            return out, lse

        @staticmethod
        def backward(ctx, grad_out, grad_lse):
            return *tiled_backward(grad_out, *ctx.saved_tensors, ctx.options, grad_lse, tile), None

    def attention(q, k, v, is_causal=True, bias=None, **options):
        return Tiled.apply(q, k, v, bias, Options(is_causal, bias=bias, **options))
    return attention


def assert_all_close(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def size(x):
    """Root mean square; of two maxima over few numbers, which is larger would be luck."""
    return x.double().square().mean().sqrt().item()


KINDS = ["causal", "not causal", "window", "two-sided window", "ids", "bias", "row bias", "soft cap", "dropout", "scale"]
LENGTHS = [(5, 5), (1, 7), (3, 8), (7, 3), (3, 1), (2, 0)]


# --- the formula ----------------------------------------------------------------------------

@pytest.mark.parametrize("T, S, kind", [(T, S, kind) for T, S in LENGTHS for kind in KINDS if T <= S or kind != "ids"])
@pytest.mark.parametrize("moderate", [False, True])
def test_tiles_match_brute_force_in_output_lse_and_all_gradients(T, S, kind, moderate, monkeypatch):
    monkeypatch.setattr(flash_attn, "_are_moderate", lambda *_: moderate)  # logits are small enough for both
    for H, Hkv in ((4, 2), (3, 1)) if kind in ("causal", "bias") else ((4, 2),):
        inputs, options = problem(T, S, H, Hkv), extras(kind, 2, H, T, S)
        expected = with_gradients(brute_force, *inputs, **options)
        # float64: both round, in another order, at 1e-16
        for attention in (in_tiles((3, 2)), naive_attention_with_lse, flash_attention_with_lse):
            assert_all_close(with_gradients(attention, *inputs, **options), expected, atol=1e-12, rtol=1e-12)


if torch.cuda.is_available():
    @pytest.mark.parametrize("T, S, kind", [(T, S, kind) for T, S in [*LENGTHS, (300, 300), (70, 600)] for kind in KINDS
                                            if T <= S or kind != "ids"])
    def test_tiles_on_the_gpu_match_the_formula_on_the_cpu(T, S, kind):
        inputs, options = problem(T, S), extras(kind, 2, 4, T, S)
        expected = with_gradients(naive_attention_with_lse, *inputs, **options)
        moved = {name: x.cuda() if torch.is_tensor(x) else x for name, x in options.items()}
        found = with_gradients(flash_attention_with_lse, *(x.cuda() for x in inputs), backend="tiled", **moved)
        assert_all_close([x.cpu() for x in found], expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("T, S", [(300, 300), (40, 600), (600, 40), (1100, 300)])
def test_full_size_tiles_match_torch(T, S, is_causal):
    inputs = problem(T, S)

    def torch_attention(q, k, v):
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T) if is_causal else torch.ones(T, S, dtype=torch.bool)
        logits = (q @ k.repeat_interleave(2, 1).mT / math.sqrt(8)).masked_fill(~mask, -math.inf)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out.masked_fill(~mask.any(1)[:, None], 0), logits.logsumexp(-1)

    rows = slice(max(0, T - S) if is_causal else 0, T)  # torch's gradients are NaN where nothing is seen
    q, k, v, grad_out, grad_lse = inputs
    found = with_gradients(lambda *x: flash_attention_with_lse(*x, is_causal, backend="tiled"), *inputs)
    torch.testing.assert_close(found[0], torch_attention(q, k, v)[0], atol=1e-12, rtol=1e-12)
    T = rows.stop - rows.start
    expected = with_gradients(torch_attention, q[:, :, rows], k, v, grad_out[:, :, rows], grad_lse[:, :, rows])
    found = (*(x[:, :, rows] for x in found[:3]), *found[3:])
    assert_all_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["causal", "not causal", "window", "ids", "dropout", "soft cap"])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("moderate", [False, True])
def test_error_is_at_most_twice_that_of_the_naive_formula_in_the_same_type(dtype, kind, native, moderate, monkeypatch):
    """Whether halves are multiplied as halves, as by tensor cores, or as fp32; with a maximum and without."""
    monkeypatch.setattr(flash_attn, "_multiplies", lambda device, dtype: native)
    monkeypatch.setattr(flash_attn, "_are_moderate", lambda *_: moderate)
    for T, S, Dh in ((70, 70, 64), (33, 80, 16)):
        inputs = problem(T, S, 2, 1, Dh, B=1, dtype=dtype)
        options = extras(kind, 1, 2, T, S)
        exact = with_gradients(naive_attention_with_lse, *(x.double() for x in inputs), **options)
        naive = with_gradients(naive_attention_with_lse, *inputs, **options)
        found = with_gradients(in_tiles((32, 32)), *inputs, **options)
        rounding = torch.finfo(dtype).eps / 2
        for a, b, c in zip(found, naive, exact):
            assert a.dtype == b.dtype or a.dtype == torch.float32  # lse is fp32
            # one rounding of the result is nobody's fault
            assert size(a - c) <= 2 * size(b - c) + rounding * size(c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", [False, True])
def test_logits_and_values_at_the_bounds_need_no_maximum(dtype, native, monkeypatch):
    """Logits of -32 and 32 and any between, values and gradients of 1e8 and 1e-8, rows that see one key or none."""
    monkeypatch.setattr(flash_attn, "_multiplies", lambda device, dtype: native)
    T, S, Dh = 40, 37, 4
    *inputs, grad_lse = problem(T, S, 2, 1, Dh, dtype=torch.float64)
    q, k, v, grad_out = (x / x.norm(dim=-1, keepdim=True) for x in inputs)
    k[:, :, ::5] = q[:, :1, :S:5]
    q[:, :, 6::5] = -q[:, :, 5:-1:5]
    for size_of_v, size_of_gradient in ((0.99e8, 0.99e8), (1.01e-8, 1.01e-8), (0.99e8, 1.01e-8), (1.01e-8, 0.99e8)):
        now = [(x * factor).to(dtype) for x, factor in ((q, 7.99), (k, 7.99), (v, size_of_v), (grad_out, size_of_gradient))]
        assert flash_attn._are_moderate(*now[:2], now[2:], Dh ** -0.5)
        now.append(grad_lse * size_of_v * size_of_gradient)
        naive, exact = with_gradients(naive_attention_with_lse, *now), with_gradients(naive_attention_with_lse, *(x.double() for x in now))
        assert exact[1][exact[1].isfinite()].abs().max() > 31
        for a, b, c in zip(with_gradients(in_tiles((16, 16)), *now), naive, exact):
            finite = c.isfinite()
            assert torch.equal(a.isfinite(), finite)
            assert size((a - c)[finite]) <= 2 * size((b - c)[finite]) + 4 * torch.finfo(dtype).eps * size(c[finite])


def test_what_is_not_moderate_takes_the_maximum():
    q, k, v, *_ = problem(32, 9)
    assert flash_attn._are_moderate(q, k, [v], 0.1)
    for at in range(3):
        for value in (1e9, -1e9, math.inf, -math.inf, math.nan):
            changed = [q.clone(), k.clone(), v.clone()]
            changed[at][1, 1, 5, 3] = value
            assert not flash_attn._are_moderate(*changed[:2], changed[2:], 0.1)
    longest = q.norm(dim=-1).max() * k.norm(dim=-1).max()
    for sign in (1, -1):
        assert flash_attn._are_moderate(q, k, [v], sign * 31.9 / longest)
        assert not flash_attn._are_moderate(q, k, [v], sign * 32.1 / longest)
    assert flash_attn._are_moderate(q, k, [v * 0], 0.1) and not flash_attn._are_moderate(q, k, [v * 1e-10], 0.1)
    assert not flash_attn._are_moderate(*(x.float() for x in (q, k)), [v.float() * 1e-30], 0.1)  # a norm of 0, but not all 0
    q, k, v, *_ = problem(64, 640)
    assert flash_attn._are_moderate(q, k, [v], 0.1) and flash_attn._are_moderate(q, k, [v], 0.1, 256)
    assert not flash_attn._are_moderate(q, k, [v], 0.1, 64)  # most keys are seen by none
    q, k, v, *_ = problem(32, 9)
    assert not flash_attn._are_moderate(q[:, :, :31], k, [v], 0.1)  # too few queries for a look at all keys
    assert not flash_attn._are_moderate(q, k[:, :, :0], [v[:, :, :0]], 0.1)


@pytest.mark.parametrize("S", [257, 512, 1000])
def test_sums_of_weights_in_bf16_are_not_rounded_to_bf16(S, monkeypatch):
    """As a whole: then the sum of 257 ones would be 256, and log-sum-exps wrong by up to 1/256, 1e-3 on average."""
    monkeypatch.setattr(flash_attn, "_multiplies", lambda device, dtype: True)
    q, k, v, *_ = problem(64, S, Dh=16, dtype=torch.bfloat16)
    for spread, bound in ((0.0, 1e-6), (0.1, 6e-4)):
        _, lse = tiled_forward(q * spread, k, v, Options(False))
        _, exact = naive_attention_with_lse((q * spread).double(), k.double(), v.double(), False)
        assert size(lse - exact) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [-60, -95, -200])
def test_backward_of_a_part_that_rows_with_a_tiny_lse_do_not_see(level, dtype):
    """Of the first 32 queries the last 32 keys are hidden, and so small are the logits with the rest that e^-lse overflows."""
    q, k, v, grad_out, _ = problem(64, 64, 1, 1, 4, B=1, dtype=dtype)
    q[..., 0], k[:, :, :32, 0], k[:, :, 32:] = 20, level / 10, k[:, :, 32:] * 0.01  # logits: 20 level / 10 / sqrt(4), and near 0
    out, lse = tiled_forward(q, k, v, Options())
    part = k[:, :, 32:], v[:, :, 32:]
    assert flash_attn._are_moderate(q, part[0], [part[1]], 0.5) and lse.min() < level + 20
    found = tiled_backward(grad_out, q, *part, out, lse, Options())[:3]
    whole = tiled_backward(*(x.double() for x in (grad_out, q, k, v, out)), lse.double(), Options())
    exact = tiled_backward(*(x.double() for x in (grad_out, q, *part, out)), lse.double(), Options())[:3]
    torch.testing.assert_close(exact[1], whole[1][:, :, 32:])
    for a, b in zip(found, exact):
        assert a.isfinite().all() and size(a - b) <= 0.05 * size(b) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_no_keys_at_all_have_gradients_of_no_size(dtype, backend):
    q, k, v, *_ = (x.requires_grad_() for x in problem(40, 0, dtype=dtype))
    flash_attention(q, k, v, backend=backend).sum().backward()
    assert not q.grad.any() and k.grad.shape == v.grad.shape == k.shape


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
def test_tensors_without_numbers_and_traces_are_welcome():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    for mode in (FakeTensorMode(), FakeTensorMode(shape_env=ShapeEnv())):
        with mode:
            q = torch.randn(2, 4, 64, 16)
            assert flash_attention(q, q, q, backend="tiled").shape == q.shape
    q, k, v, *_ = problem(64, 64, Dh=4)

    def attend(q, k, v):
        return tiled_forward(q, k, v, Options())[0]

    for traced in (*(make_fx(attend, tracing_mode=mode)(q, k, v) for mode in ("real", "fake", "symbolic")),
                   torch.jit.trace(attend, (q, k, v), check_trace=False)):
        for factor in (1, 100):  # what was moderate in the trace need not be so later
            torch.testing.assert_close(traced(factor * q, k, v), attend(factor * q, k, v))


def test_gradcheck_of_output_and_lse():
    q, k, v, *_ = (x.requires_grad_() for x in problem(3, 4, 2, 1, 2, B=1))
    bias = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(in_tiles((2, 3)), (q, k, v))
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: flash_attention_with_lse(q, k, v, bias=b, soft_cap=2.0, window=3, dropout=0.3), (q, k, v, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hostile_values_stay_finite_and_right(dtype):
    q, k, v, grad_out, grad_lse = problem(40, 40, 2, 2, 16, dtype=dtype)
    cases = {"logits of 1e4": (q * 100, k * 100, v), "identical keys": (q, k[:, :, :1].expand_as(k), v),
             "growing": (q * 0 + 1, torch.arange(40).to(dtype)[:, None].expand_as(k) * 50, v),
             "falling": (q * 0 + 1, torch.arange(40).to(dtype).flip(0)[:, None].expand_as(k) * 50, v)}
    for name, (q, k, v) in cases.items():
        exact = with_gradients(naive_attention_with_lse, *(x.double() for x in (q, k, v, grad_out, grad_lse)))
        naive = with_gradients(naive_attention_with_lse, q, k, v, grad_out, grad_lse)
        for attention in (in_tiles((8, 8)), flash_attention_with_lse):
            found = with_gradients(attention, q, k, v, grad_out, grad_lse)
            for a, b, c in zip(found, naive, exact):
                assert a.isfinite().all(), name
                assert size(a - c) <= 2 * size(b - c) + 4 * torch.finfo(dtype).eps * size(c), name


def test_queries_that_see_nothing_give_zeros_and_pass_no_gradient():
    q, k, v, grad_out, _ = problem(9, 4)
    q.requires_grad_()
    for backend in ("tiled", "auto"):
        out, lse = flash_attention_with_lse(q, k, v, backend=backend)
        assert (out[:, :, :5] == 0).all() and (lse[:, :, :5] == -math.inf).all() and lse[:, :, 5:].isfinite().all()
        grad, = torch.autograd.grad((out * grad_out).sum(), q)
        assert (grad[:, :, :5] == 0).all() and grad.isfinite().all()
    bias = torch.zeros(1, 1, 9, 4, dtype=torch.float64)
    bias[:, :, 7] = -math.inf  # all keys masked by a bias
    out, lse = flash_attention_with_lse(q, k, v, False, bias=bias)
    assert (out[:, :, 7] == 0).all() and (lse[:, :, 7] == -math.inf).all() and out.isfinite().all()


def test_a_query_is_independent_of_what_comes_after_it():
    q, k, v, *_ = problem(12, 12)

    def attend(key, value):
        later_k, later_v = k.clone(), v.clone()
        later_k[:, :, 8:], later_v[:, :, 8:] = key, value
        return flash_attention(q, later_k, later_v, backend="tiled")[:, :, :8]

    few, many = attend(0.1, -0.1), attend(1e3, -1e3)
    assert torch.equal(few, attend(0.2, 0.3)) and torch.equal(many, attend(-2e3, 1e3))
    torch.testing.assert_close(few, many, atol=1e-14, rtol=1e-14)  # with a maximum and without: rounded in another order


@pytest.mark.parametrize("rounded", (False, True))
def test_an_infinite_logit_that_is_hidden_stays_hidden(rounded, monkeypatch):
    monkeypatch.setattr(flash_attn, "_multiplies", lambda device, dtype: rounded)
    q, k, v, *_ = problem(12, 12, dtype=torch.bfloat16)
    q = q.abs()
    k[:, :, 8:] = 1e3  # large enough for the same code as infinity
    before = flash_attention(q, k, v, backend="tiled")
    k[:, :, 8:] = math.inf
    assert torch.equal(before[:, :, :8], flash_attention(q, k, v, backend="tiled")[:, :, :8])


def test_dropout_drops_its_share_by_seed_and_place_alone():
    heads = torch.arange(6)
    whole = dropout_factor(Options(dropout=0.2, seed=3), heads, 50, 60, range(50), range(60))
    assert set(whole.unique().tolist()) == {0.0, 1.25}
    # 18,000 weights: the share's standard deviation is 0.003
    assert abs((whole == 0).double().mean() - 0.2) < 0.012
    part = dropout_factor(Options(dropout=0.2, seed=3), heads[2:4], 50, 60, range(7, 30), range(11, 60))
    assert torch.equal(part, whole[2:4, 7:30, 11:60])
    other = dropout_factor(Options(dropout=0.2, seed=4), heads, 50, 60, range(50), range(60))
    both = ((whole == 0) & (other == 0)).double().mean()
    assert abs(both - 0.04) < 0.006  # independent of another seed
    assert abs(((whole[0] == 0) & (whole[1] == 0)).double().mean() - 0.04) < 0.015  # and of another head


# --- the softmax in blocks ------------------------------------------------------------------

@pytest.mark.parametrize("block", [1, 4, 100])
def test_online_softmax_matches_torch(block):
    row = torch.randn(23, dtype=torch.float64) * 100
    torch.testing.assert_close(online_softmax(row, block), row.softmax(0), atol=1e-14, rtol=1e-12)


def test_softmax_of_a_concatenation_is_a_rescaled_concatenation():
    x, y = torch.randn(3, 5, dtype=torch.float64) * 50, torch.randn(3, 4, dtype=torch.float64) * 50
    torch.testing.assert_close(softmax_of_concatenation(x, y), torch.cat((x, y), -1).softmax(-1), atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("T, S, tile", [(7, 7, (2, 3)), (8, 8, (4, 4)), (3, 9, (2, 4)), (1, 5, (64, 64)), (6, 6, (1, 1))])
def test_the_textbook_matches_brute_force(T, S, tile, is_causal):
    q, k, v, grad_out, _ = problem(T, S, 1, 1, B=1)
    out, lse, *grads = with_gradients(brute_force, q, k, v, grad_out, torch.zeros(T), is_causal=is_causal)
    one_head = [x[0, 0] for x in (q, k, v)]
    found = textbook_forward(*one_head, is_causal, *tile)
    assert_all_close(found, [out[0, 0], lse[0, 0]], atol=1e-12, rtol=1e-12)
    found = textbook_backward(grad_out[0, 0], *one_head, *found, is_causal, *tile)
    assert_all_close(found, [x[0, 0] for x in grads], atol=1e-12, rtol=1e-12)


def test_the_textbook_computes_nothing_after_the_last_query_of_a_tile(monkeypatch):
    computed, logits = [], flash_attn.textbook_logits
    monkeypatch.setattr(flash_attn, "textbook_logits", lambda *x: computed.append(logits(*x).numel()) or logits(*x))
    q = torch.randn(128, 4)
    out, lse = textbook_forward(q, q, q, True, 16, 64)
    assert sum(computed) == sum(16 * (i + 16) for i in range(0, 128, 16))
    computed.clear()
    textbook_backward(out, q, q, q, out, lse, True, 16, 64)
    assert sum(computed) == (128 + 64) * 64  # the second tile of keys meets the second half of the queries


@pytest.mark.parametrize("q, k, v, tile", [
    ((3, 4), (2, 4), (2, 4), 2), ((2, 4), (2, 5), (2, 5), 2), ((2, 4), (2, 4), (3, 4), 2), ((1, 2, 4),) * 3 + (2,), ((),) * 3 + (2,),
    ((2, 0),) * 3 + (2,), ((2, 4),) * 3 + (0,)])
def test_the_textbook_refuses_what_is_not_one_head(q, k, v, tile):
    with pytest.raises(ValueError, match="needs one head"):
        textbook_forward(*(torch.zeros(shape) for shape in (q, k, v)), True, tile, tile)


@pytest.mark.parametrize("cut", [0, 1, 5, 9])
def test_merged_halves_match_the_whole_with_gradients(cut):
    inputs = problem(3, 9)

    def halves(q, k, v):
        one = flash_attention_with_lse(q, k[:, :, :cut], v[:, :, :cut], False)
        return merge(*one, *flash_attention_with_lse(q, k[:, :, cut:], v[:, :, cut:], False))

    expected = with_gradients(brute_force, *inputs, is_causal=False)
    assert_all_close(with_gradients(halves, *inputs), expected, atol=1e-12, rtol=1e-12)


def test_merge_of_nothing_and_nothing_is_nothing_with_gradient_zero():
    o, lse = torch.zeros(2, 3, requires_grad=True), torch.full((2,), -math.inf, requires_grad=True)
    out, total = merge(o, lse, o, lse)
    assert (out == 0).all() and (total == -math.inf).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), (o, lse)))


def test_backward_of_a_part_with_the_lse_of_the_whole_is_its_share():
    """What ring attention does: every part's keys, the output and lse of all."""
    q, k, v, grad_out, _ = problem(4, 12)
    options = Options(is_causal=False)
    out, lse = tiled_forward(q, k, v, options)
    whole = tiled_backward(grad_out, q, k, v, out, lse, options)
    parts = [tiled_backward(grad_out, q, k[:, :, a:b], v[:, :, a:b], out, lse, options) for a, b in ((0, 5), (5, 12))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    for i in (1, 2):
        torch.testing.assert_close(torch.cat((parts[0][i], parts[1][i]), 2), whole[i])


@pytest.mark.parametrize("splits", [1, 2, 5, 40])
@pytest.mark.parametrize("T, S", [(1, 17), (4, 17), (6, 6), (1, 0)])
def test_split_kv_decoding_matches_one_piece(T, S, splits):
    q, k, v, *_ = problem(T, S)
    expected, _ = brute_force(q, k, v)
    torch.testing.assert_close(split_kv_attention(q, k, v, splits), expected, atol=1e-12, rtol=1e-12)


# --- what is computed, what is kept ---------------------------------------------------------

@pytest.mark.parametrize("moderate", [False, True])
def test_hidden_tiles_are_never_computed(moderate, monkeypatch):
    monkeypatch.setattr(flash_attn, "_are_moderate", lambda *_: moderate)
    shapes, product = [], torch.baddbmm

    def counting(sums, a, b, **factors):
        shapes.append((a.size(1), b.size(2)))
        return product(sums, a, b, **factors)

    monkeypatch.setattr(torch, "baddbmm", counting)
    q, k, v, *_ = problem(64, 64, 1, 1, B=1)
    for options, tiles in ((Options(False), 64), (Options(), 36), (Options(window=8), 15), (Options(False, window=8), 22),
                           (Options(False, ids=torch.arange(64)[None] // 16), 16)):
        shapes.clear()
        tiled_forward(q, k, v, options, (8, 8))
        assert len(shapes) == tiles, options
    q, k, v, *_ = problem(2048, 2048, 1, 1, B=1, dtype=torch.float32)
    for options, share in ((Options(False), 1), (Options(), 0.5625), (Options(False, window=256), 0.34375)):
        shapes.clear()
        tiled_forward(q, k, v, options)  # by its own choice of tiles, which are small where much is hidden
        assert sum(rows * columns for rows, columns in shapes) <= share * 2048**2, options


def test_what_is_saved_is_the_inputs_the_output_and_one_lse():
    q, k, v, *_ = (x.float().requires_grad_() for x in problem(6, 6))
    for backend in ("tiled", "auto"):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            out, lse = flash_attention_with_lse(q, k, v, backend=backend)
        assert sorted(x.data_ptr() for x in saved) == sorted(x.data_ptr() for x in (q, k, v, out, lse))
        assert lse.dtype == torch.float32 and lse.shape == (2, 4, 6)


def test_extra_memory_grows_linearly():
    def peak(T, method):
        q, k, v, *_ = (x.requires_grad_() for x in problem(T, T, 2, 2, 16, B=1, dtype=torch.float32))
        return peak_extra_bytes(lambda: method(q, k, v).sum().backward(), "cpu")

    tiled = [peak(T, lambda *x: flash_attention(*x, backend="tiled")) for T in (1024, 2048)]
    naive = [peak(T, lambda *x: naive_attention_with_lse(*x)[0]) for T in (512, 1024)]
    assert tiled[1] < 2.1 * tiled[0] and naive[1] > 3.5 * naive[0]


# --- torch's kernels ------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("T, S", [(20, 20), (1, 20), (6, 20), (20, 6)])
def test_torchs_cpu_kernel_matches_the_tiles(T, S, is_causal, dtype):
    inputs = problem(T, S, Dh=16, dtype=dtype)
    zero = torch.zeros_like(inputs[4])
    found = with_gradients(lambda *x: flash_attention_with_lse(*x, is_causal, backend="cpu"), *inputs[:4], zero)
    expected = with_gradients(lambda *x: flash_attention_with_lse(*x, is_causal, backend="tiled"), *inputs[:4], zero)
    # bf16: each is rounded at 2^-8, to values of up to 4
    assert_all_close(found, expected, atol=1e-5 if dtype == torch.float32 else 0.06, rtol=0.02)


def test_auto_takes_torchs_kernel_where_it_can_and_tiles_where_it_must(monkeypatch):
    chosen = []
    monkeypatch.setattr(flash_attn._FlashAttention, "apply", lambda *x: chosen.append(x[-2]) or (x[0], x[0]))
    q, k, v, *_ = problem(4, 4)
    for options in ({}, {"is_causal": False}, {"window": 2}, {"soft_cap": 1.0}, {"dropout": 0.1}, {"scale": 0.3},
                    {"scale": -0.3}, {"scale": 0.0}):
        flash_attention(q, k, v, **options)
    flash_attention(q[:, :, :0], k, v)
    assert chosen == ["cpu", "cpu", "tiled", "tiled", "tiled", "cpu", "tiled", "tiled", "tiled"]


def test_our_cuda_kernel_asked_for_without_a_gpu_falls_back():
    q, k, v, *_ = problem(5, 5, dtype=torch.float32)
    works.cache_clear()
    with pytest.warns(UserWarning, match="our CUDA kernel is not used on cpu .* it runs on cuda") as warned:
        found = [flash_attention(q, k, v, backend="own") for _ in range(2)]
    assert len(warned) == 1
    torch.testing.assert_close(found[1], flash_attention(q, k, v, backend="tiled"))


def test_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    works.cache_clear()
    flash_attention(*problem(5, 5)[:3])
    flash_attention(*problem(5, 5)[:3], dropout=0.5)
    assert torch.equal(before, torch.get_rng_state())


def test_without_attention_kernels_it_computes_in_tiles_and_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "attention_kernels", None)  # as if the file were not there
    flash_attn._warn_once.cache_clear()
    q, k, v, grad_out, _ = problem(5, 5)
    q.requires_grad_()
    expected = flash_attention(q, k, v, backend="tiled")
    with pytest.warns(UserWarning, match="attention_kernels.py is not beside flash_attn.py") as warned:
        found = [flash_attention(q, k, v) for _ in range(3)]
    assert len(warned) == 1 and torch.equal(found[2], expected)
    assert torch.equal(*(torch.autograd.grad(x, q, grad_out)[0] for x in (found[0], expected)))
    with pytest.raises(ValueError, match="'flash' needs attention_kernels.py beside flash_attn.py"):
        flash_attention(q, k, v, backend="flash")


# --- in use ---------------------------------------------------------------------------------

@pytest.mark.parametrize("backend", ["auto", "tiled"])
def test_gpt_trains_to_the_same_losses(backend):
    from gpt import GPT, GPTConfig, attention, next_token_loss
    config = GPTConfig(vocab_size=31, context=16, n_layers=2, n_heads=2, d_model=16)

    def losses(attention):
        generator = torch.Generator().manual_seed(0)
        model = GPT(config, attention=attention, generator=generator)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(6):
            tokens = torch.randint(31, (4, 17), generator=generator)
            loss = next_token_loss(model(tokens[:, :-1]), tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    ours = lambda q, k, v, is_causal: flash_attention(q, k, v, is_causal, backend=backend)
    assert list(losses(ours)) == pytest.approx(list(losses(attention)), abs=1e-5)  # fp32, 6 steps of growing apart


def test_gpt_decodes_with_a_cache():
    from gpt import GPT, GPTConfig
    model = GPT(GPTConfig(vocab_size=31, context=16, n_layers=2, n_heads=2, d_model=16), flash_attention).eval()
    tokens = torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2, 12)
    with torch.no_grad():
        cached = torch.cat([model(tokens[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 9), (9, 12))], 1)
        torch.testing.assert_close(cached, model(tokens), atol=1e-5, rtol=1e-5)


def test_strided_inputs_and_expanded_gradients_are_welcome():
    qkv = torch.randn(2, 6, 3, 3, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.permute(3, 0, 2, 1, 4)  # as GPT cuts them
    expected = torch.autograd.grad(brute_force(*(x.contiguous() for x in (q, k, v)))[0].sum(), qkv)
    for backend in ("tiled", "cpu"):
        found = torch.autograd.grad(flash_attention(q, k, v, backend=backend).sum(), qkv)
        assert_all_close(found, expected, atol=1e-12, rtol=1e-12)


def test_autocast_does_not_round_the_sums():
    q, k, v, *_ = problem(8, 8, dtype=torch.float32)
    expected = flash_attention(q, k, v, backend="tiled")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flash_attention(q, k, v, backend="tiled"), expected)


def test_a_bias_of_the_smallest_float_on_all_keys_matches_torch():
    """How some models hide padding: no key of a row that is all padding stands out, so it averages them."""
    q, k, v, *_ = problem(4, 6, dtype=torch.float32)
    bias = torch.full((1, 1, 4, 6), torch.finfo(torch.float32).min)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    for found in (flash_attention(q, k, v, False, bias=bias), naive_attention_with_lse(q, k, v, False, bias=bias)[0]):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", [-1, 2**30, 2**64 + 1])
def test_any_integer_is_a_seed(seed):
    heads = torch.arange(4)
    found, other = (dropout_factor(Options(dropout=0.5, seed=x), heads, 40, 40, range(40), range(40)) for x in (seed, 7))
    assert abs((found == 0).double().mean() - 0.5) < 0.03 and not torch.equal(found, other)  # 6 deviations


@pytest.mark.parametrize("T, dtype, options", (
    (6, torch.float32, {}), (6, torch.bfloat16, {}), (6, torch.bfloat16, {"window": 3}), (300, torch.float32, {"window": 100})), ids=str)
def test_compiled_is_the_same(T, dtype, options):
    q, k, v, *_ = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in problem(T, T, dtype=dtype))  # strided as a model's
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: flash_attention(q, k, v, **options) * 2, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), flash_attention(q, k, v, **options) * 2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves).sum(), leaves),
                               torch.autograd.grad(flash_attention(*leaves, **options).sum() * 2, leaves))


@pytest.mark.parametrize("rounded", (False, True))
@pytest.mark.parametrize("changes", ({}, {"scale": 0.0}, {"scale": -0.3}, {"soft_cap": 3.0}, {"scale": 0.0, "soft_cap": 3.0}), ids=str)
def test_memory_that_held_nan_does_not_show(changes, rounded, monkeypatch):
    """Tiles are written into memory as it comes; with rounded products, as AMX and tensor cores have them, too."""
    monkeypatch.setattr(flash_attn, "_multiplies", lambda device, dtype: rounded)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **kind: empty(*sizes, **kind).fill_(math.nan))
    *qkv, grad_out, grad_lse = problem(70, 70, Dh=16, dtype=torch.bfloat16)
    exact = with_gradients(naive_attention_with_lse, *(x.double() for x in (*qkv, grad_out, grad_lse)), **changes)
    found = with_gradients(functools.partial(flash_attention_with_lse, backend="tiled"), *qkv, grad_out, grad_lse, **changes)
    for a, b in zip(found, exact):
        assert size(a - b) <= 0.03 * size(b) + 1e-6  # a few roundings of bf16


@pytest.mark.parametrize("changes, message", [
    ({"q": torch.zeros(2, 4, 3)}, r"needs q \(B, H, T, Dh\).* got q \(2, 4, 3\)"),
    ({"v": torch.zeros(2, 2, 5, 8)}, r"v \(2, 2, 5, 8\)"),
    ({"q": torch.zeros(1, 4, 3, 8)}, r"q \(1, 4, 3, 8\), k \(2, 2, 6, 8\)"),
    ({"q": torch.zeros(2, 3, 3, 8)}, r"Hkv must divide H.* q \(2, 3, 3, 8\)"),
    ({"q": torch.zeros(2, 0, 3, 8)}, r"Hkv must divide H, and H, Hkv and Dh .* q \(2, 0, 3, 8\)"),
    ({"q": torch.zeros(2, 4, 3, 8).double()}, "float64, torch.float32"),
    ({name: torch.zeros(2, 2, 6, 8).long() for name in "qkv"}, "fp32, bf16, fp16 or float64, got torch.int64"),
    ({"k": torch.zeros(2, 2, 6, 8, device="meta")}, "q is on cpu, k on meta"),
    ({"backend": "fast"}, "backend must be one of auto, tiled, .* got 'fast'"),
    ({"backend": "flash"}, "'flash' does not work here for torch.float32, Dh = 8 on cpu"),
    ({"backend": "cpu", "window": 3}, "'cpu' knows no window"), ({"backend": "cpu", "scale": -1.0}, "no scale of 0 or below"),
    ({"window": 0}, "window must be a whole number and at least 1, got 0"), ({"window": 2.5}, "whole number .* got 2.5"),
    ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
    ({"ids": torch.zeros(2, 3)}, r"\(2, 6\) positions .* got \(2, 3\)"),
    ({"bias": torch.zeros(6, 6)}, r"\(2, 4, 3, 6\), got \(6, 6\)"),
    ({"bias": torch.zeros(1, 2, 3, 6)}, r"got \(1, 2, 3, 6\)"),
    ({"bias": torch.ones(1, 1, 3, 6, dtype=torch.bool)}, "must be a float .* got torch.bool"),
    ({"soft_cap": 0.0}, "soft_cap must be positive and finite, got 0.0"), ({"soft_cap": math.inf}, "got inf"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0")])
def test_bad_input_is_refused(changes, message):
    inputs = {"q": torch.zeros(2, 4, 3, 8), "k": torch.zeros(2, 2, 6, 8), "v": torch.zeros(2, 2, 6, 8)}
    with pytest.raises(ValueError, match=message):
        flash_attention(**(inputs | changes))


def test_merge_and_splits_refuse_what_cannot_be():
    o, lse = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match=r"\(2, 3\), \(2,\) and \(3, 3\), \(2,\)"):
        merge(o, lse, torch.zeros(3, 3), lse)
    with pytest.raises(ValueError, match="splits must be at least 1, got 0"):
        split_kv_attention(*problem(1, 5)[:3], splits=0)
    with pytest.raises(ValueError, match="takes soft_cap, scale and backend, got dropout, window"):
        split_kv_attention(*problem(1, 5)[:3], splits=2, window=3, dropout=0.1)
