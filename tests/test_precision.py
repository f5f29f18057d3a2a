"""Mixed precision against torch's GradScaler step by step, AdamW, float8 products, and a training that needs the scale."""

import copy
import math
import runpy
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import run_ranks

import precision
from gpt import GPT, GPTConfig, next_token_loss
from precision import (FP8Linear, LossScale, MixedPrecision, StochasticAdamW, exponents, fp8_product, lost, quantise, smallest,
                       stays_fp32, stochastic_round)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 6, generator=generator), torch.randint(3, (16,), generator=generator)) for _ in range(n)]


def adamw(masters):
    return torch.optim.AdamW(masters, lr=0.01)


# --- what is lost -------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, power", [(torch.float32, -149), (torch.bfloat16, -133), (torch.float16, -24), (E5M2, -16), (E4M3, -9)])
def test_smallest_is_the_last_number_above_zero(dtype, power):
    assert smallest(dtype) == 2.0**power
    numbers = torch.tensor([2.0**power, 2.0 ** (power - 2)], dtype=torch.float64)
    assert (numbers.to(dtype) != 0).tolist() == [True, False]


def test_lost_and_exponents_by_hand():
    values = torch.tensor([0.0, 1.0, -1.5, 2.0**-30, 2.0**-24, 3.0])
    assert lost(values, torch.float16) == pytest.approx(1 / 5)
    assert lost(values, torch.float16, scale=2.0**10) == lost(values, torch.bfloat16) == lost(torch.zeros(3), E4M3) == 0
    counts = exponents(values, -30, 2)
    assert counts[0] == counts[6] == 1 and counts[30] == 2 and counts[31] == 1 and counts.sum() == 5
    assert exponents(values, -10, 1).tolist() == [2] + [0] * 9 + [3]


def test_what_stays_fp32_is_wrong_in_fp16_and_right_in_fp32():
    for name, half, full in stays_fp32(torch.Generator().manual_seed(0)):
        assert half > 1e-3 and full < 1e-6, name


# --- the scale ----------------------------------------------------------------------------------

@pytest.mark.parametrize("interval", [1, 2, 5])
def test_scale_matches_grad_scaler_step_by_step(interval):
    """The same losses, with overflows put in: scale, counter and parameters are torch's after every step, exactly."""
    ours, theirs = network(), network()
    trainer = MixedPrecision(ours, adamw, torch.float32, LossScale(2.0**16, True, 2.0, 0.5, interval))
    optimizer = adamw(theirs.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=interval)
    for step, (x, y) in enumerate(batches(40)):
        factor = math.inf if step in (3, 4, 11, 12, 13, 30) else math.nan if step == 20 else 1.0
        trainer.backward(F.cross_entropy(ours(x), y) * factor)
        norm = trainer.step(max_norm=0.5)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(theirs(x), y) * factor).backward()
        scaler.unscale_(optimizer)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        assert (norm is None) == (factor != 1.0) and (norm is None or torch.equal(norm, expected))
        assert trainer.scale.scale == scaler.get_scale() and trainer.scale.good_steps == scaler._get_growth_tracker()
        for a, b, master in zip(ours.parameters(), theirs.parameters(), trainer.masters):
            assert torch.equal(a, b) and torch.equal(a, master)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masters_match_grad_scaler_on_gradients_of_the_half_model(dtype):
    """torch's GradScaler refuses fp16 gradients; it is given masters of our own and the gradients of a 16-bit copy."""
    ours = network()
    masters, half = [p.detach().clone().requires_grad_() for p in ours.parameters()], copy.deepcopy(ours).to(dtype)
    trainer = MixedPrecision(ours, adamw, dtype, LossScale(2.0**24, interval=4))
    optimizer, scaler = adamw(masters), torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4)
    skipped = 0
    for x, y in batches(40):
        x = x.to(dtype)
        trainer.backward(F.cross_entropy(ours(x).float(), y))
        skipped += trainer.step(max_norm=0.5) is None
        scaler.scale(F.cross_entropy(half(x).float(), y)).backward()
        for master, p in zip(masters, half.parameters()):
            master.grad, p.grad = p.grad.float(), None
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(masters, 0.5)
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for master, p in zip(masters, half.parameters()):
                p.copy_(master)
        assert trainer.scale.scale == scaler.get_scale()
        for a, b, c, d in zip(trainer.masters, masters, ours.parameters(), half.parameters()):
            assert torch.equal(a, b) and torch.equal(c, d) and c.dtype == dtype
    assert skipped >= 5 if dtype == torch.float16 else skipped == 0


def test_scale_stops_below_infinity_and_a_static_one_stays():
    scale = LossScale(2.0**126, interval=1)
    for expected in (127, 127, 127):
        scale.update(False)
        assert scale.scale == 2.0**expected
    sinking = LossScale(1.0)
    for _ in range(2000):
        sinking.update(True)
    assert sinking.scale == torch.finfo(torch.float32).tiny
    static = LossScale(8.0, dynamic=False, interval=1)
    static.update(True)
    static.update(False)
    assert static.scale == 8.0


@pytest.mark.parametrize("arguments", [dict(scale=0), dict(scale=math.inf), dict(growth=1), dict(backoff=1), dict(interval=0)])
def test_bad_scale_is_refused(arguments):
    with pytest.raises(ValueError, match="want a finite scale > 0, growth > 1"):
        LossScale(**arguments)


# --- training -----------------------------------------------------------------------------------

@pytest.mark.parametrize("P", [2, 3])
def test_overflow_on_one_rank_skips_the_step_on_all(P):
    def run(rank):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        with torch.no_grad():
            model.weight.fill_(0.1)
        trainer = MixedPrecision(model, adamw, torch.float16, LossScale(2.0**10, interval=3))
        taken = []
        for step, (x, y) in enumerate(batches(8, seed=rank)):  # different data per rank
            loss = F.cross_entropy(model(x.half()).float(), y)
            trainer.backward(loss * (math.inf if (step, rank) in ((2, 0), (5, P - 1)) else 1.0))
            taken.append(trainer.step() is not None)
        return taken, trainer.scale.state_dict()

    results = run_ranks(P, run)
    assert all(result == results[0] for result in results)
    assert results[0] == ([step not in (2, 5) for step in range(8)], {"scale": 2.0**8, "good_steps": 2})


def test_gradients_of_microbatches_are_summed_in_fp32():
    x = torch.tensor([[1.0]], dtype=torch.float16)
    model = nn.Linear(1, 1, bias=False)
    trainer = MixedPrecision(model, lambda masters: torch.optim.SGD(masters, lr=1.0), torch.float16, LossScale(1.0, False))
    before = trainer.masters[0].clone()
    for factor in (2048.0, *[1.0] * 8):  # in fp16, 2048 + 1 = 2048
        trainer.backward(model(x).sum() * factor)
    norm = trainer.step()
    assert norm == 2056 and (before - trainer.masters[0]).item() == pytest.approx(2056, rel=1e-6)
    assert trainer.masters[0].grad is None and model.weight.grad is None


def test_small_updates_reach_the_masters_only():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    trainer = MixedPrecision(model, lambda masters: torch.optim.SGD(masters, lr=2.0**-14), torch.float16, LossScale(1.0, False))
    for step in range(1, 9):  # fp16's next number below 1 is 1 - 2^-11
        trainer.backward(model(torch.ones(1, 1).half()).sum())
        trainer.step()
        assert trainer.masters[0].item() == 1 - step * 2.0**-14
    assert model.weight.item() == 1 - 2.0**-11


def test_training_diverges_without_the_scale_and_not_with_it():
    runs = {}
    for name, dtype, scale in (("fp32", torch.float32, 1.0), ("none", torch.float16, 1.0), ("scaled", torch.float16, 2.0**20)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64))
        trainer = MixedPrecision(model, lambda masters: torch.optim.AdamW(masters, lr=0.02, eps=1e-20), dtype, LossScale(scale, False))
        runs[name] = precision._train(trainer, model, 120, 0)[0]
    # What pushes wrong classes down is lost, what pushes right ones up is not: logits grow without end.
    assert runs["none"][-1] > runs["none"][0] + 0.5 > runs["fp32"][-1] + 2
    # fp16 has 11 bits: losses differ by a few thousandths.
    assert abs(runs["scaled"][-1] - runs["fp32"][-1]) < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gpt_trains_as_in_fp32(dtype):
    tokens = torch.randint(17, (4, 13), generator=torch.Generator().manual_seed(0))
    losses = {}
    for kind in (torch.float32, dtype):
        model = GPT(GPTConfig(17, 12, 1, 2, 16), generator=torch.Generator().manual_seed(0))
        trainer = MixedPrecision(model, adamw, kind)
        assert trainer.scale.scale == (2.0**16 if kind == torch.float16 else 1.0)
        losses[kind] = []
        for _ in range(30):
            loss = next_token_loss(model(tokens[:, :-1]).float(), tokens[:, 1:])
            trainer.backward(loss)
            trainer.step(max_norm=1.0)
            losses[kind].append(loss.item())
    assert losses[torch.float32][-1] < 2.0 < losses[torch.float32][0]
    # 8 bits of mantissa in bf16, 11 in fp16: after 30 steps within a few hundredths.
    torch.testing.assert_close(torch.tensor(losses[dtype]), torch.tensor(losses[torch.float32]), atol=0.05, rtol=0)


def test_frozen_and_tied_parameters():
    model = network()
    model[0].weight.requires_grad_(False)
    model.tied = model[2].weight
    trainer = MixedPrecision(model, adamw)
    assert len(trainer.masters) == 3 and model[0].weight.dtype == torch.float16 and model.tied is model[2].weight
    frozen = model[0].weight.clone()
    x, y = batches(1)[0]
    trainer.backward(F.cross_entropy(model(x.half()).float(), y))
    assert trainer.step() > 0 and torch.equal(model[0].weight, frozen)


def test_resumed_run_is_the_same_run():
    data = batches(12)

    def steps(trainer, part):
        for x, y in part:
            trainer.backward(F.cross_entropy(trainer.model(x.half()).float(), y))
            trainer.step()

    def make(seed):
        return MixedPrecision(network(seed), adamw, scale=LossScale(2.0**30, interval=3))

    whole, first, resumed = make(0), make(0), make(1)
    steps(whole, data)
    steps(first, data[:5])
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(resumed, data[5:])
    assert resumed.scale.state_dict() == whole.scale.state_dict()
    for a, b in zip([*resumed.masters, *resumed.model.parameters()], [*whole.masters, *whole.model.parameters()]):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"masters have shapes \[\(3, 6\), \(3,\)\], the model's"):
        whole.load_state_dict(MixedPrecision(nn.Linear(6, 3), adamw).state_dict())


def test_bad_trainer_is_refused():
    with pytest.raises(ValueError, match="dtype must be torch.float16, bfloat16 or float32, got torch.float64"):
        MixedPrecision(network(), adamw, torch.float64)
    with pytest.raises(ValueError, match="no trainable parameters"):
        MixedPrecision(nn.Tanh(), adamw)
    with pytest.raises(RuntimeError, match="call backward"):
        MixedPrecision(network(), adamw).step()


# --- stochastic rounding ------------------------------------------------------------------------

def test_stochastic_rounding_is_to_a_neighbour_and_right_on_average():
    generator = torch.Generator().manual_seed(0)
    for value in (1.001, -1.001, 3e-3, 1e30, 1e-40, 2.0**-130):
        x = torch.full((20_000,), value)
        rounded = stochastic_round(x, generator)
        down = (x[:1].view(torch.int32) & -2**16).view(torch.float32).item()
        up = ((x[:1].view(torch.int32) & -2**16) + 2**16).view(torch.float32).item()
        assert rounded.dtype == torch.bfloat16 and set(rounded.double().tolist()) <= {down, up}
        exact = x[0].double().item()
        share = (exact - down) / (up - down)
        # 5 standard deviations: wrong once in two million.
        assert abs(rounded.double().mean().item() - exact) <= 5 * abs(up - down) * math.sqrt(share * (1 - share) / 20_000)


def test_stochastic_rounding_keeps_what_bf16_has():
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, math.inf, -math.inf, 2.0**-133, torch.finfo(torch.bfloat16).max])
    for _ in range(20):
        assert torch.equal(stochastic_round(exact), exact.bfloat16())
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert nan.isnan().all() and stochastic_round(nan).isnan().all()
    assert stochastic_round(torch.randn(4, 6).t()).shape == (6, 4)
    with pytest.raises(ValueError, match="from float32 to bfloat16, got torch.float64"):
        stochastic_round(torch.zeros(2, dtype=torch.float64))


def test_stochastic_adamw_matches_torch_in_fp32():
    ours, theirs = network(), network()
    options = dict(lr=0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    mine, torchs = StochasticAdamW(ours.parameters(), **options), torch.optim.AdamW(theirs.parameters(), **options)
    for x, y in batches(30):
        for model, optimizer in ((ours, mine), (theirs, torchs)):
            optimizer.zero_grad()
            optimizer.step(lambda: (loss := F.cross_entropy(model(x), y), loss.backward())[0])
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)  # rounding of fp32 over 30 steps


def test_bf16_weights_learn_by_stochastic_rounding_and_stall_to_nearest():
    """A weight of 1 that is to become 2 by updates of 0.001: a quarter of what rounding to nearest notices."""
    found = {}
    for stochastic in (True, False):
        weight = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
        optimizer = StochasticAdamW([weight], lr=1e-3, weight_decay=0.0, stochastic=stochastic,
                                    generator=torch.Generator().manual_seed(0))
        for _ in range(500):
            weight.grad = torch.full_like(weight, -1.0)
            optimizer.step()
        assert all(state["exp_avg"].dtype == torch.bfloat16 for state in optimizer.state.values())
        found[stochastic] = weight.float().mean().item()
    assert found[False] == 1.0 and found[True] == pytest.approx(1.5, abs=0.02)
    with pytest.raises(ValueError, match="betas in"):
        StochasticAdamW([weight], betas=(1.0, 0.9))


# --- fp8 ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype, bits", [(E4M3, 3), (E5M2, 2)])
def test_quantised_numbers_are_near_and_fill_the_format(dtype, bits):
    for factor in (1e-20, 1.0, 1e20):
        x = factor * torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
        x8, scale = quantise(x, dtype)
        assert x8.dtype == dtype and x8.float().abs().max() == torch.finfo(dtype).max
        error, floor = (x8.float() * scale - x).abs(), smallest(dtype) * scale / 2
        assert (error <= torch.maximum(2.0 ** -(bits + 1) * x.abs(), floor) * (1 + 1e-5)).all()
    zeros, one = quantise(torch.zeros(3), dtype)
    assert not zeros.float().any() and one == 1
    for value in (math.inf, math.nan):
        bad, scale = quantise(torch.tensor([1.0, value]), dtype)
        assert not (bad.float() * scale).isfinite().all()
    tiny, scale = quantise(torch.tensor([1e-44, 0.0]), dtype)  # 1e-44 / 448 is 0 in fp32
    assert scale > 0 and tiny.float().isfinite().all() and tiny[1].float() == 0


def test_fp8_product_matches_torchs_scaled_mm_and_float64():
    a, b = (torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in (16, 48))
    for dtype in (E4M3, E5M2):
        (a8, a_scale), (b8, b_scale) = quantise(a, dtype), quantise(b, E4M3)
        ours = fp8_product(a8, a_scale, b8, b_scale)
        exact = (a8.double() * a_scale.double()) @ (b8.double() * b_scale.double()).t()
        theirs = torch._scaled_mm(a8, b8.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=torch.float32)
        # The products are exact: what is left is fp32's rounding of sums of 32 of them.
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (1, 6), (5, 6), (2, 3, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_linear_matches_the_product_of_what_fp8_holds(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, linear = torch.randn(shape, generator=generator).to(dtype).requires_grad_(), FP8Linear(6, 4).to(dtype)
    y = linear(x)
    grad = torch.randn(y.shape, generator=generator).to(dtype)
    found = torch.autograd.grad(y, (x, linear.weight, linear.bias), grad)

    def held(t, dtype):
        q, scale = quantise(t.detach(), dtype)
        return q.double() * scale.double()

    x8, w8, g8 = held(x, E4M3), held(linear.weight, E4M3), held(grad, E5M2)
    rows, grads = x8.reshape(-1, 6), g8.reshape(-1, 4)
    expected = (x8 @ w8.t() + linear.bias.double(), g8 @ w8, grads.t() @ rows, grad.reshape(-1, 4).double().sum(0))
    # What remains is the rounding of the result to x's dtype: 2^-24 or 2^-9 of it, twice where the bias is added.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip((y, *found), expected):
        assert a.dtype == dtype and a.shape == b.shape
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance)


def test_fp8_linear_learns_like_fp32():
    losses = {}
    for kind in (nn.Linear, FP8Linear):
        torch.manual_seed(0)
        model = nn.Sequential(kind(6, 32), nn.Tanh(), kind(32, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        x, y = batches(1)[0]
        for _ in range(60):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        losses[kind] = loss.item()
    assert losses[nn.Linear] < 0.1 and losses[FP8Linear] < losses[nn.Linear] + 0.05
    with pytest.raises(ValueError, match=r"width 6 got x of shape \(2, 5\)"):
        FP8Linear(6, 3)(torch.zeros(2, 5))


# --- the program --------------------------------------------------------------------------------

def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["precision.py", *map(str, flags)])
    runpy.run_path(precision.__file__, run_name="__main__")


def test_flags_change_what_is_printed_and_drawn(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--steps", 5, "--scale", 1024, "--seed", 1, "--plot", tmp_path / "lost.png")
    output = capsys.readouterr().out
    assert "with 1024" in output and "with it: " in output
    assert (tmp_path / "lost.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("flags, message", ((("--scale", -1), "want a finite scale"), (("--steps", 0), "--steps must be"),
                                            (("--seed", -1), "--seed in 0"), (("--scale", "x"), "--scale"),
                                            (("--plot", "nowhere/lost.png"), "nowhere")))
def test_bad_flags_are_one_line(flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--steps", 1, *flags)
    output, error = capsys.readouterr()
    assert output == "" and stop.value.code == 2 and error.startswith("precision.py: ") and message in error and error.count("\n") == 1
