"""torch's kernels and ours behind one interface: against the formula, F.scaled_dot_product_attention and torch's schemas."""

import math
import re
import runpy
import sys

import pytest
import torch
import torch.nn.functional as F

import attention_kernels
from attention_kernels import (KERNELS, fastest, formula_backward, formula_forward, kernel_backward, kernel_forward,
                               largest_error, merge, why_not, works)

CPU = torch.device("cpu")


def problem(T, S, H=4, Hkv=2, Dh=8, B=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, heads, length, Dh, generator=generator, dtype=torch.float64).to(dtype)
            for heads, length in ((H, T), (Hkv, S), (Hkv, S), (H, T))]


def torch_attention(q, k, v, is_causal, scale):
    """out and lse by torch, all that autograd can differentiate; queries that see nothing left out."""
    T, S = q.size(2), k.size(2)
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T) if is_causal else torch.ones(T, S, dtype=torch.bool)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    logits = (q @ k.repeat_interleave(2, 1).mT * (scale or q.size(3) ** -0.5)).masked_fill(~seen, -math.inf)
    return out, logits.logsumexp(-1)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("T, S", [(20, 20), (1, 20), (6, 20), (20, 6), (1, 1), (2, 1)])
@pytest.mark.parametrize("which", ["formula", "cpu"])
def test_formula_and_torchs_cpu_kernel_match_torch(which, T, S, is_causal, scale):
    q, k, v, grad_out = problem(T, S)
    if which == "formula":
        out, lse = formula_forward(q, k, v, is_causal, scale)
        grads = formula_backward(grad_out, q, k, v, out, lse, is_causal, scale)
    else:
        out, lse, rest = kernel_forward("cpu", q, k, v, is_causal, scale)
        grads = kernel_backward("cpu", grad_out, q, k, v, out, lse, rest, is_causal, scale)
    blind = T - S if is_causal and T > S else 0  # so many queries see nothing
    leaves = [q[:, :, blind:].requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    expected, expected_lse = torch_attention(*leaves, is_causal, scale)
    expected_grads = torch.autograd.grad(expected, leaves, grad_out[:, :, blind:])
    found = out[:, :, blind:], lse[:, :, blind:], grads[0][:, :, blind:], *grads[1:]
    for a, b in zip(found, (expected, expected_lse, *expected_grads), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)  # float64: both round, in another order
    for x in (out, grads[0]):
        assert (x[:, :, :blind] == 0).all()
    assert (lse[:, :, :blind] == -math.inf).all()


def test_merged_halves_match_the_whole():
    q, k, v, _ = problem(3, 9)
    halves = [kernel_forward("cpu", q, k[:, :, part], v[:, :, part], False)[:2] for part in (slice(5), slice(5, 9))]
    for a, b in zip(merge(*halves[0], *halves[1]), formula_forward(q, k, v, False)):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="merge needs two outputs"):
        merge(*halves[0], halves[1][0][:1], halves[1][1])


def test_strides_of_any_kind_are_welcome():
    """Transposed, and expanded along heads, rows and width: torch's CPU kernel would read beside them."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 8, 6, generator=generator, dtype=torch.float64).mT  # (2, 4, 6, 8)
    for k in (torch.randn(2, 2, 8, 6, generator=generator, dtype=torch.float64).mT,
              torch.randn(2, 1, 6, 1, generator=generator, dtype=torch.float64).expand(2, 2, 6, 8),
              torch.randn(1, 2, 1, 8, generator=generator, dtype=torch.float64).expand(2, 2, 6, 8)):
        grad_out = torch.ones((), dtype=torch.float64).expand(q.shape)
        results = []
        for x, y in ((q, k), (q.contiguous(), k.contiguous())):
            out, lse, rest = kernel_forward("cpu", x, y, y)
            results.append((out, lse, *kernel_backward("cpu", grad_out, x, y, y, out, lse, rest)))
        expected = formula_forward(q, k, k)
        expected = *expected, *formula_backward(grad_out, q, k, k, *expected)
        for result in results:
            for a, b in zip(result, expected, strict=True):
                torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient", "cpu"])
def test_kernels_take_and_return_what_torchs_schemas_say(name):
    """On the meta device: shapes alone, by torch's own description of its CUDA kernels."""
    _, forward, backward = KERNELS[name]
    q, k, v, grad_out = (torch.empty(2, 4, 40, 64, device="meta", dtype=torch.bfloat16) for _ in range(4))
    out, lse, rest = forward(q, k, v, True, None)
    assert out.shape == q.shape and lse.shape == (2, 4, 40)
    assert [x.shape for x in backward(grad_out, q, k, v, out, lse, rest, True, None)] == [q.shape] * 3


def test_kernels_are_eligible_by_running_and_being_right(monkeypatch):
    assert why_not("flash", CPU, torch.float32, 16) == "it runs on cuda" and not works("flash", CPU, torch.float32, 16)
    assert works("cpu", CPU, torch.bfloat16, 16, 2, True)
    _, forward, backward = KERNELS["cpu"]
    monkeypatch.setitem(KERNELS, "deaf", ("cpu", lambda q, k, v, causal, scale: forward(q, k, v, False, scale), backward))
    monkeypatch.setitem(KERNELS, "broken", ("cpu", lambda *x: torch.ones(2) @ torch.ones(3), backward))
    monkeypatch.setitem(KERNELS, "nan", ("cpu", forward, lambda *x: tuple(g * math.nan for g in backward(*x))))
    assert [works(name, CPU, torch.float32, 16) for name in ("deaf", "broken", "nan")] == [False] * 3
    assert "RuntimeError" in why_not("broken", CPU, torch.float32, 16)
    assert works("deaf", CPU, torch.float32, 16, 1, False)


@pytest.mark.parametrize("state", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_whether_a_kernel_works_is_independent_of_who_asks(state):
    with state():
        assert largest_error("cpu", CPU, torch.float32, 16) < 1e-5


def test_fastest_is_the_one_that_works(monkeypatch):
    sizes = (CPU, torch.float64, 1, 4, 2, 64, 64, 16, True, True)
    fastest.cache_clear()
    assert fastest(*sizes) == "cpu"
    monkeypatch.setattr(attention_kernels, "KERNELS", {name: KERNELS[name] for name in ("flash", "own")})
    fastest.cache_clear()
    assert fastest(*sizes) is None
    fastest.cache_clear()


# --- the program ----------------------------------------------------------------------------

def run_demo(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["attention_kernels.py", "--length", "24", *arguments])
    runpy.run_path(attention_kernels.__file__, run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [(), ("--dtype", "float64", "--d_head", "20"), ("--dtype", "bfloat16")])
def test_demo_holds_every_kernel_beside_the_formula(monkeypatch, capsys, arguments):
    out = run_demo(monkeypatch, capsys, *arguments)
    assert "flash      not here: it runs on cuda" in out
    assert re.search(r"max \|kernel - formula\| of 1 kernels \(cpu\) = \S+ of the largest: OK, below", out.splitlines()[-1])


@pytest.mark.parametrize("arguments, message", [(["--length", "0"], "--length and --d_head must be at least 1, got 0 and 64"),
                                                (["--dtype", "x"], "invalid choice"),
                                                (["--device", "cuda"], "torch finds no CUDA device")])
def test_demo_refuses_in_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run_demo(monkeypatch, capsys, *arguments)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and message in errors and errors.count("\n") == 1
