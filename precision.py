"""Mixed precision by hand: half the bits, the same training.   Micikevicius et al. 2018 (1710.03740)

Idea      Products in 16 bits are faster and smaller. Three things break, and each has its remedy. An update that is
          small beside its weight is rounded away: fp32 master weights take the updates, the model computes on a
          copy of them in 16 bits (or the rounding is random, and right on average). Gradients below fp16's
          smallest number become 0: the loss is multiplied by a scale, which the gradients are divided by in fp32.
          Sums, squares and exponentials overflow or stall: they stay in fp32. bf16 has fp32's range and needs no
          scale; fp8 has so little that every tensor has a scale of its own.
Formula   backward of scale * loss;  g = float32(g16) / scale;  clip g;  step(master, g);  weight16 = round(master)
          dynamic: an inf or NaN in any rank's g -> no step, scale * backoff;  interval good steps -> scale * growth
          stochastic rounding: up with probability (x - down) / (up - down), so E[round(x)] = x
          fp8: s = max|x| / max(format),  x8 = round(x / s);  y = s_x s_w (x8 w8^T), summed in fp32
Shapes    model of any shapes; x (..., in) -> y (..., out) for FP8Linear; losses and scale are scalars
Omits     autocast's choice per operation (here: matrices in 16 bits, what ``stays_fp32`` lists in fp32);
          fp8 scales from earlier steps (delayed scaling); blocks with scales of their own (MX formats).
Run       python precision.py                    CPU, 20 s; ends with "fp16 diverges without the scale: True; ..."
          python precision.py --plot lost.png    gradients that underflow, as a histogram
Test      pytest tests/test_precision.py
"""

import argparse
import functools
import math
import os
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
           "float8_e5m2": torch.float8_e5m2, "float8_e4m3fn": torch.float8_e4m3fn}


# --- 1. what 16 bits lose -----------------------------------------------------------------------

def smallest(dtype: torch.dtype) -> float:
    """The smallest positive number of a format, subnormal ones included: 2^-24 of fp16, 2^-133 of bf16."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps


def lost(values: Tensor, dtype: torch.dtype, scale: float = 1.0) -> float:
    """The share of the numbers that are not 0 and become 0 in ``dtype`` when multiplied by ``scale``."""
    values = values[values != 0].float()
    return ((values * scale).to(dtype) == 0).float().mean().item() if values.numel() else 0.0


def exponents(values: Tensor, low: int = -60, high: int = 20) -> Tensor:
    """How many of the values are in [2^e, 2^(e+1)) for e = low ... high - 1, the ends taking what is beyond:
    (high - low,). Zeros are not counted."""
    found = torch.frexp(values[values != 0].abs().float())[1] - 1  # |x| = m 2^e with 1/2 <= m < 1
    return torch.bincount(found.clamp(low, high - 1).long() - low, minlength=high - low)


def stays_fp32(generator: torch.Generator) -> list[tuple[str, float, float]]:
    """(operation, relative error if done in fp16, in fp32 on fp16 inputs): of a softmax, the square in a norm, a
    sum of many, a loss over a vocabulary. inf: it overflows."""
    def error(found: Tensor, exact: Tensor) -> float:
        found = (found.double() - exact).abs().max() / exact.abs().max()
        return math.inf if found.isnan() else found.item()

    x = (8 * torch.randn(64, 256, generator=generator)).half()  # activations in fp16, the inputs of all four
    cases = [("softmax", x, lambda v: v.exp() / v.exp().sum(-1, keepdim=True)),
             ("root mean square", 50 * x, lambda v: v.square().mean(-1).sqrt()),
             ("sum of 1,024", x.abs(), lambda v: functools.reduce(torch.add, v.flatten().split(16))),
             ("-log p", x, lambda v: v.exp().sum(-1).log() - v[:, 0])]
    return [(name, error(f(v), f(v.double())), error(f(v.float()), f(v.double()))) for name, v, f in cases]


# --- 2. the scale of the loss -------------------------------------------------------------------

class LossScale:
    """What the loss is multiplied by. ``dynamic``: it is multiplied by ``backoff`` after a step with an inf or NaN, and
    by ``growth`` after ``interval`` steps in a row without, unless that is beyond fp32. A power of two changes no
    gradient's digits. ValueError for a scale or growth that cannot be.   Micikevicius et al., section 3.2
    """

    def __init__(self, scale: float = 2.0**16, dynamic: bool = True, growth: float = 2.0, backoff: float = 0.5,
                 interval: int = 2000):
        if not (0 < scale < math.inf and growth > 1 and 0 < backoff < 1 and interval >= 1):
            raise ValueError("want a finite scale > 0, growth > 1, 0 < backoff < 1, interval >= 1, got "
                             f"{scale}, {growth}, {backoff}, {interval}")
        self.scale, self.dynamic, self.growth, self.backoff, self.interval = scale, dynamic, growth, backoff, interval
        self.good_steps = 0

    def update(self, overflow: bool) -> None:
        """After each step: whether it met an inf or NaN, on any rank."""
        if not self.dynamic:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:  # not to 0, which nothing can be divided by
            self.scale = max(self.scale * self.backoff, torch.finfo(torch.float32).tiny)
        elif self.good_steps == self.interval:
            self.good_steps = 0
            if self.scale * self.growth <= torch.finfo(torch.float32).max:
                self.scale *= self.growth

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale, self.good_steps = state["scale"], state["good_steps"]


# --- 3. master weights --------------------------------------------------------------------------

class MixedPrecision:
    """Trains ``model`` in 16 bits by fp32 master weights: 2 + 4 bytes a parameter, beside the optimizer's.

        trainer = MixedPrecision(model, lambda masters: torch.optim.AdamW(masters, lr=1e-3))
        for each microbatch: trainer.backward(loss / microbatches)
        norm = trainer.step(max_norm=1.0)       None: an overflow, no step was taken

    The model's parameters become ``dtype``; gradients leave 16 bits after each backward and are summed in fp32.

    Args:
        model: its loss should come from ``logits.float()``.
        make_optimizer: fp32 masters, in the order of the trainable parameters -> optimizer.
        dtype: torch.float16, torch.bfloat16 (or torch.float32).
        scale: None: dynamic for fp16, 1 for others.
        group: the ranks that skip a step together. Averaging gradients over ranks is not done here: hand a
            data-parallel model the 16-bit parameters, or all-reduce ``masters``' gradients before step().
    """

    def __init__(self, model: nn.Module, make_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
                 dtype: torch.dtype = torch.float16, scale: LossScale | None = None,
                 group: dist.ProcessGroup | None = None):
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"dtype must be torch.float16, bfloat16 or float32, got {dtype}")
        self.model, self.group = model, group
        self.masters = [p.detach().float().clone() for p in model.parameters() if p.requires_grad]
        if not self.masters:
            raise ValueError("the model has no trainable parameters")
        model.to(dtype)
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.masters)
        self.scale = scale or LossScale(*((2.0**16, True) if dtype == torch.float16 else (1.0, False)))

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of scale * loss to the masters'."""
        (loss.float() * self.scale.scale).backward()
        for weight, master in zip(self.weights, self.masters):
            if weight.grad is not None:
                gradient, weight.grad = weight.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    @torch.no_grad()
    def step(self, max_norm: float | None = None) -> Tensor | None:
        """Unscale, look for inf and NaN on all ranks, clip, step, copy the masters to the model. Returns the norm of
        the unscaled gradients before clipping; None if the step was skipped. Gradients are None afterwards.
        RuntimeError if no backward came before."""
        gradients = [master.grad for master in self.masters if master.grad is not None]
        if not gradients:
            raise RuntimeError("step() without a gradient: call backward(loss) first")
        # The reciprocal in double: 1 / scale of a huge scale is no normal number of fp32.
        torch._foreach_mul_(gradients, 1.0 / self.scale.scale)
        overflow = torch.stack([~gradient.isfinite().all() for gradient in gradients]).any().float()
        if dist.is_initialized() and dist.get_world_size(self.group) > 1:
            dist.all_reduce(overflow, dist.ReduceOp.MAX, group=self.group)
        norm = None
        if not overflow.item():
            # Unscaled before clipping: max_norm means the gradients, not 65,536 times them.
            norm = nn.utils.clip_grad_norm_(self.masters, math.inf if max_norm is None else max_norm)
            self.optimizer.step()
            for weight, master in zip(self.weights, self.masters):
                weight.copy_(master)
        self.scale.update(bool(overflow.item()))
        for master in self.masters:
            master.grad = None
        return norm

    def state_dict(self) -> dict:
        """Masters, optimizer and scale: what a run resumes from; the model's weights follow from the masters."""
        return {"masters": self.masters, "optimizer": self.optimizer.state_dict(), "scale": self.scale.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """ValueError, before anything changes, if the masters are of other shapes."""
        shapes = [[tuple(m.shape) for m in masters] for masters in (state["masters"], self.masters)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the saved masters have shapes {shapes[0]}, the model's {shapes[1]}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.scale.load_state_dict(state["scale"])
        for weight, master, saved in zip(self.weights, self.masters, state["masters"]):
            weight.copy_(master.copy_(saved))


# --- 4. no master weights: stochastic rounding ----------------------------------------------------

def stochastic_round(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """fp32 -> bf16, to one of its two neighbours, the nearer the likelier, so that E[result] = x; inf and NaN stay.

    bf16 is fp32 without its lower 16 bits: a random number of 16 bits added to them carries with just that
    probability. ValueError for another dtype than fp32."""
    if x.dtype != torch.float32:
        raise ValueError(f"stochastic_round is from float32 to bfloat16, got {x.dtype}")
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(0, 2**16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    rounded = ((bits + noise) & -2**16).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW on bf16 weights without masters: weights and moments are bf16, a step is computed in fp32 and rounded at
    random: 2 + 2 + 2 bytes a parameter in place of 2 + 4 + 4 + 4. fp32 parameters are not rounded: torch's AdamW.

    ``stochastic`` False rounds to nearest, to see what that costs: a weight w stands still once updates are below
    w / 512. ``generator`` is of the parameters' device."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.01, stochastic: bool = True,
                 generator: torch.Generator | None = None):
        if not (lr >= 0 and 0 <= min(betas) and max(betas) < 1 and eps >= 0 and weight_decay >= 0):
            raise ValueError("want lr, eps, weight_decay >= 0 and betas in [0, 1), got "
                             f"{lr}, {eps}, {weight_decay}, {betas}")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.stochastic, self.generator = stochastic, generator

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of Loshchilov & Hutter 2019, algorithm 2, with torch's order of operations."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                x, m, v, g = (t.float() for t in (p, state["exp_avg"], state["exp_avg_sq"], p.grad))
                x = x * (1 - group["lr"] * group["weight_decay"])
                m, v = m + (g - m) * (1 - beta1), v * beta2 + g * g * (1 - beta2)
                root = v.sqrt() / math.sqrt(1 - beta2 ** state["step"]) + group["eps"]
                x = x - group["lr"] / (1 - beta1 ** state["step"]) * m / root
                for kept, new in ((p, x), (state["exp_avg"], m), (state["exp_avg_sq"], v)):
                    rounds = self.stochastic and kept.dtype == torch.bfloat16
                    kept.copy_(stochastic_round(new, self.generator) if rounds else new)
        return loss


# --- 5. fp8 ---------------------------------------------------------------------------------------

def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x8, s) with x ~ s x8: the largest |x| becomes the format's largest number, 448 of e4m3, 57344 of e5m2. s is a
    scalar in fp32, 1 for a tensor of zeros or of nothing. inf or NaN in x makes the product inf or NaN."""
    largest = x.detach().abs().max().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    top, least = torch.finfo(dtype).max, torch.finfo(torch.float32).tiny  # a scale of 0 would make NaN of a 0
    scale = torch.where(largest > 0, (largest / top).clamp(min=least), 1.0)
    return (x.float() / scale).clamp(-top, top).to(dtype), scale


def fp8_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """a_scale b_scale a b^T of fp8 a (n, k), b (m, k), summed in fp32: (n, m). Products of two fp8 numbers are exact in
    fp32. On GPUs that have it, one instruction of the tensor cores (k and m multiples of 16, not two e5m2)."""
    if a.is_cuda and torch.cuda.get_device_capability(a.device) >= (8, 9) and not (a.size(1) % 16 or b.size(0) % 16):
        return torch._scaled_mm(a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=torch.float32)
    return a.float() @ b.float().t() * (a_scale * b_scale)


class _FP8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (n, in)
        x8, x_scale = quantise(rows, torch.float8_e4m3fn)
        w8, w_scale = quantise(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype)
        return fp8_product(x8, x_scale, w8, w_scale).to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        # Gradients spread over more powers of two than weights and need range more than digits: e5m2.
        g8, g_scale = quantise(grad.flatten(0, -2), torch.float8_e5m2)  # (n, out)
        grad_x = fp8_product(g8, g_scale, w8.t().contiguous(), w_scale)  # (n, in)
        grad_w = fp8_product(g8.t().contiguous(), g_scale, x8.t().contiguous(), x_scale)  # (out, in)
        return grad_x.to(ctx.dtypes[0]).view(ctx.shape), grad_w.to(ctx.dtypes[1])


class FP8Linear(nn.Linear):
    """nn.Linear whose three products are in fp8, one scale per tensor and call: x and W in e4m3, gradients of y in
    e5m2.   Micikevicius et al. 2022 (2209.05433). The weight itself, the bias and all sums stay as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype. ValueError for another width."""
        if x.size(-1) != self.in_features:
            raise ValueError(f"FP8Linear of width {self.in_features} got x of shape {tuple(x.shape)}")
        y = _FP8Linear.apply(x if x.dim() > 1 else x[None], self.weight)
        y = y if x.dim() > 1 else y[0]
        return y if self.bias is None else y + self.bias.to(y.dtype)


# --- 6. demo --------------------------------------------------------------------------------------

BATCH_TOKENS = 2**22  # as large runs have: the loss is a mean over all, so each gradient is divided by it


def _train(trainer: MixedPrecision | None, model: nn.Module, steps: int, seed: int) -> tuple[list[float], list[Tensor]]:
    """Learn a noisy map from 32 numbers to 64 classes; (losses, last gradients of all activations if fp32)."""
    generator = torch.Generator().manual_seed(seed)
    truth, losses, kept = 0.5 * torch.randn(64, 32, generator=generator), [], []
    for step in range(steps):
        x = torch.randn(256, 32, generator=generator)
        y = torch.multinomial((x @ truth.t()).softmax(-1), 1, generator=generator)[:, 0]
        hidden = torch.tanh(model[0](x.to(model[0].weight.dtype)))
        logits = model[1](hidden)
        loss = F.cross_entropy(logits.float(), y)
        losses.append(loss.item())
        share = loss * (len(x) / BATCH_TOKENS)  # this process's 256 of the tokens of a batch
        if trainer is None:
            kept = list(torch.autograd.grad(share, (hidden, logits)))
            break
        trainer.backward(share)
        trainer.step(max_norm=1.0)
    return losses, kept


def main(steps: int, scale: float, seed: int, plot: str | None) -> None:
    if steps < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"--steps must be at least 1 and --seed in 0 .. 2^32 - 1, got {steps} and {seed}")
    static = LossScale(scale, dynamic=False)

    def make() -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 64))

    gradients = torch.cat([g.flatten() for g in _train(None, make(), 1, seed)[1]])
    if plot is not None:
        _plot(gradients, scale, plot)
        print(f"drawn: {plot}")
    print(f"{'format':15}{'largest':>12}{'smallest':>12}{'1 + this > 1':>14}")
    for name, dtype in FORMATS.items():
        print(f"  {name:13}{torch.finfo(dtype).max:12.3g}{smallest(dtype):12.3g}{torch.finfo(dtype).eps:14.3g}")
    print("what stays in fp32: relative error if computed in fp16, and in fp32 from the same fp16 inputs")
    for name, half, full in stays_fp32(torch.Generator().manual_seed(seed)):
        print(f"  {name:18}{half:10.1e}{full:10.1e}")
    print(f"gradients of activations that are 0 in fp16: {lost(gradients, torch.float16):.1%} without a scale, "
          f"{lost(gradients, torch.float16, scale):.2%} with {scale:g}; in bf16 {lost(gradients, torch.bfloat16):.2%}")
    runs = {"fp32": (torch.float32, LossScale(1.0, False)), "bf16": (torch.bfloat16, None),
            "fp16, no scale": (torch.float16, LossScale(1.0, False)),
            "fp16, static": (torch.float16, static),
            "fp16, dynamic": (torch.float16, LossScale(2.0**40, interval=50))}
    last = {}
    for name, (dtype, chosen) in runs.items():
        model = make()
        # eps far below 1e-8: gradients of a mean over millions are as small as that.
        trainer = MixedPrecision(model, lambda masters: torch.optim.AdamW(masters, lr=1e-2, eps=1e-20), dtype, chosen)
        losses, _ = _train(trainer, model, steps, seed)
        tenth = max(1, steps // 10)
        last[name] = sum(losses[-tenth:]) / tenth
        print(f"  {name:15} loss {losses[0]:.4f} -> {last[name]:.4f}   scale at the end {trainer.scale.scale:g}")

    weight = nn.Parameter(torch.full((1000,), 1.0, dtype=torch.bfloat16))
    print("bf16 weights at 1 with 1000 updates of 0.001 towards 0 (expected 0):", end="")
    for stochastic in (False, True):
        generator = torch.Generator().manual_seed(seed)
        weight.data.fill_(1.0)
        for _ in range(1000):
            moved = weight.data.float() - 0.001
            weight.data = stochastic_round(moved, generator) if stochastic else moved.bfloat16()
        print(f"   rounded {'at random' if stochastic else 'to nearest'} {weight.float().mean():.3f}", end="")

    linear = FP8Linear(256, 256, bias=False)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))
    exact = F.linear(x, linear.weight)
    print(f"\nfp8 linear: relative error {((linear(x) - exact).norm() / exact.norm()).item():.1%} (expected about 4%: "
          "3 bits of mantissa in two factors)")
    failed = not last["fp16, no scale"] < last["fp32"] + 1  # NaN is a failure too
    good = all(abs(last[name] - last["fp32"]) < 0.05 for name in ("bf16", "fp16, static", "fp16, dynamic"))
    print(f"fp16 diverges without the scale: {failed}; trains as fp32 does (within 0.05 nats) with it: {good} "
          "(expected True, True)")


def new_figure(path: str | None, width: float, height: float):
    """A matplotlib figure to be saved under ``path``, None without one. ValueError without matplotlib, and for what
    cannot be drawn there: now, not after the work."""
    if path is None:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    try:
        if str(path).rpartition(".")[2].lower() not in figure.canvas.get_supported_filetypes():
            raise OSError(None, "no format of pictures has that name")
        is_new = not os.path.exists(path)
        open(path, "ab").close()  # keeps a picture that is there
        if is_new:
            os.remove(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be drawn ({error.strerror}): name a picture in a folder that is "
                         "there") from None
    return figure


def _plot(gradients: Tensor, scale: float, path: str) -> None:
    figure = new_figure(path, 8, 4)
    axes = figure.subplots()
    for name, factor in (("without a scale", 1.0), (f"times {scale:g}", scale)):
        axes.bar(range(-60, 20), exponents(gradients * factor).tolist(), 1.0, align="edge", alpha=0.6, label=name)
    axes.axvspan(-60, -25, color="grey", alpha=0.2, label="0 in fp16")
    axes.set(xlabel="log2 |gradient|", ylabel="gradients of activations")
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--steps", type=int, default=200, help="of each training (default %(default)s)")
    parser.add_argument("--scale", type=float, default=2.0**20, help="of the static one (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (default %(default)s)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the histogram of gradients (needs matplotlib)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
