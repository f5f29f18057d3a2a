"""A language model on a layout of processes: data, tensor, pipeline, context, expert parallelism and ZeRO at once.

Idea      Each kind of parallelism is a file of its own and knows nothing of the others. Here they are put together, in
          the one order in which they fit: experts and the sequence are dealt out, matrices are cut, blocks become
          stages, and what remains on a process is kept equal with its replicas, or divided among them (ZeRO). From
          outside it is a model with an optimizer: batches in, a loss out, a step; its numbers are those of one process.
Formula   processes = pp * dp * ep * cp * tp; the batch is divided over dp * ep of them.
          |g|^2 = sum over all processes and elements of g_i^2 / (number of processes that hold element i)
Shapes    a batch: tokens, targets (B, T), the same for all processes that share an example
Omits     experts beside context or pipeline parallelism: their balance is a mean over whole texts.
Run       python layout.py                                                     layouts of 8 processes that fit
          torchrun --standalone --nproc_per_node=2 train.py --tp 2 --steps 20   a training run on one
          Ends with "... layouts of 8 processes fit, ..."
Test      pytest tests/test_layout.py
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Grid:
    """How many processes share what: their product is the number of processes."""
    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    zero: int = 0  # stage, over the data-parallel processes
    offload: bool = False  # ZeRO's shards and optimizer on the CPU
    sequence: bool = False  # norms and residuals divided over tp, too
    schedule: str = "1f1b"  # of the pipeline

    @property
    def parts(self) -> int:
        """How many parts a batch is divided into."""
        return self.dp * self.ep

    @property
    def plain(self) -> bool:
        """Whether every process has the whole model."""
        return self.tp * self.pp * self.cp * self.ep == 1 and not self.zero


# --- 1. what fits -------------------------------------------------------------------------------------

def check(sizes: Grid, kind: str, model: dict, T: int) -> None:
    """Refuse a layout that a model cannot have, before any work. The vocabulary need not divide: it is padded.

    Args:
        kind, model: as ``models.build`` takes them. T: tokens of a sequence.
    Raises:
        ValueError: naming the numbers, and what would fit.
    """
    H, Hkv, L = model["n_heads"], model.get("n_kv_heads") or model["n_heads"], model["n_layers"]
    width = model.get("d_ff") or (4 * model["d_model"] if kind == "gpt" else None)
    fitting = [P for P in range(1, H + 1) if H % P == 0 and (width or P) % P == 0 and (Hkv % P == 0 or P % Hkv == 0)]
    if sizes.tp not in fitting:
        raise ValueError(f"--tp={sizes.tp} cannot share {H} heads, {Hkv} key and value heads and {width} hidden units: "
                         f"{', '.join(map(str, fitting))} can")
    if sizes.pp > L:
        raise ValueError(f"--pp={sizes.pp} stages need as many blocks, the model has {L}: --pp={L} at most")
    if sizes.cp > 1 and T % (2 * sizes.cp):
        raise ValueError(f"--cp={sizes.cp} needs a --context that 2 * {sizes.cp} divides, got {T}: "
                         f"{T // (2 * sizes.cp) * 2 * sizes.cp or 2 * sizes.cp} is one")
    if sizes.sequence and (sizes.tp == 1 or T // sizes.cp % sizes.tp):
        raise ValueError(f"--sequence divides {T // sizes.cp} positions over --tp={sizes.tp}: --tp must be at least 2 "
                         f"and divide them")
    E = model.get("experts", {}).get("n_experts", 0)
    if sizes.ep > 1 and (not E or E % sizes.ep):
        fitting = [P for P in range(1, E + 1) if E % P == 0]
        raise ValueError(f"--ep={sizes.ep} does not divide {E} experts: "
                         + (f"{', '.join(map(str, fitting))} do" if E else "only --model=moe has any"))
    if E and (sizes.cp > 1 or sizes.pp > 1 or sizes.sequence):
        raise ValueError("experts are balanced over whole texts: a moe takes --dp, --tp, and --ep or --zero alone")
    if sizes.zero and sizes.ep > 1:
        raise ValueError(f"--zero={sizes.zero} divides what --ep={sizes.ep} has divided already: take one of them")
    if sizes.zero == 3 and sizes.pp > 1:
        raise ValueError("--zero=3 would gather each parameter for each microbatch: --zero=1 or 2 with --pp")
    if sizes.offload and not sizes.zero:
        raise ValueError("--offload moves ZeRO's shards: it needs --zero=1, 2 or 3")


def expert_parameters(model: dict) -> int:
    """How many of a model's parameters are its experts': three matrices each; 0 without experts."""
    if "experts" not in model:
        return 0
    return 3 * model["d_model"] * model["d_ff"] * model["n_layers"] * model["experts"]["n_experts"]


def bytes_needed(N: int, sizes: Grid, of_experts: int = 0) -> float:
    """About how many bytes of fp32 weights, gradients and AdamW's moments one process has: 16 N if nothing is divided.
    With ``offload``, without the moments, which are then not on its device.

    ``of_experts``: how many of the N are experts', which ep divides and tp does not."""
    P = sizes.dp * sizes.cp  # ZeRO's processes; weights are not cut by cp
    here = (N - of_experts) / (sizes.tp * sizes.pp) + of_experts / (sizes.ep * sizes.pp)
    divided = {0: 0, 1: 8, 2: 12, 3: 16}[sizes.zero]  # of 16 bytes per parameter
    return here * (16 - divided + (divided - 8 * sizes.offload) / P)


# --- 2. the model ---------------------------------------------------------------------------------------

@dataclass
class _Place:
    """Where a local parameter lies in the whole one, and on how many processes of the model's it is."""
    shape: tuple[int, ...]  # of the whole
    local: tuple[int, ...]
    dim: int = 0
    first: int = 0
    holders: int = 1


class ParallelModel:
    """A model of the contract on a layout: ``gradient``, ``clip``, ``step``, ``evaluate``, ``tensors``.

    Args:
        model: the whole model in fp32 or finer, the same on every process; it is cut in place.
        optimizer: makes the optimizer of a list of {"params": tensors, **settings}; one that treats elements alike, if
            ZeRO gives it parts of them.
        settings: name, parameter -> the settings of its parameter group, such as {"weight_decay": 0.1}.
        sizes: the layout; every process calls this with the same.
        microbatches: in which a step is worked through.
        half: run forward and backward on bf16 copies of the fp32 weights (gradients are summed in fp32).
        autocast: a context in which the forward runs.
        timeout: seconds after which a silent process counts as lost.
        initialise: for a model on the meta device, with ZeRO's stage 3 and no other cut: draws its values, of which no
            process ever has more than one parameter whole.
        device: where a model on the meta device goes.

    Attributes:
        model: what this process runs.
        part: which part of the batch this process works on, of ``sizes.parts``.
        seed_part: the same for processes that work on the same positions: what dropout is to be drawn from.
        counts: 1.0 if this process's losses count, 0.0 if another one reports the same.
    """

    def __init__(self, model: nn.Module, optimizer: Callable, settings: Callable, sizes: Grid, microbatches: int = 1,
                 half: bool = False, autocast: contextlib.AbstractContextManager | None = None, timeout: int = 600,
                 initialise: Callable[[nn.Module], None] | None = None, device: torch.device | str = "cpu"):
        from parallel import mesh

        self.sizes, self.autocast = sizes, autocast or contextlib.nullcontext()
        self.V, self.microbatches = model.config.vocab_size, microbatches
        self.mesh = mesh(sizes.dp, sizes.tp, sizes.pp, sizes.cp, sizes.ep, timedelta(seconds=timeout)) \
            if dist.is_available() and dist.is_initialized() else None
        self.part = self._rank("dp") * sizes.ep + self._rank("ep")
        # Dropout: processes that work on the same positions draw the same.
        self.seed_part = self.part * sizes.cp + self._rank("cp")
        self.counts = float(self._rank("tp") == 0 and self._rank("pp") == 0)
        whole = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.model, self.pipe = model, None
        self._cut()
        self.places = {name: self._place(name, p, whole[name]) for name, p in model.named_parameters()}
        # fp32 weights are optimised and saved; forward and backward run on them, or on copies in bf16.
        self.zero, self.half = None, half
        if sizes.zero:
            self._divide(optimizer, settings, initialise, device)
        else:
            self._keep_equal(optimizer, settings)

    def _rank(self, axis: str) -> int:
        return dist.get_rank(getattr(self.mesh, axis)) if self.mesh else 0

    def _cut(self) -> None:
        s, model = self.sizes, self.model
        self.experts: set[str] = set()
        if s.ep > 1:
            from moe import shard_experts
            shard_experts(model, self.mesh.ep)
            ends = (".mlp.gate_up", ".mlp.down")
            self.experts = {name for name, _ in model.named_parameters() if name.endswith(ends)}
        if s.cp > 1:  # the sequence is dealt out over cp first, each part then over tp
            from ring_attention import context_parallel
            context_parallel(model, self.mesh.cp)
        if s.tp > 1:
            from tensor_parallel import tensor_parallel
            tensor_parallel(model, self.mesh.tp, s.sequence)
        if s.pp > 1:
            from pipeline import Pipeline
            from pipeline_schedules import schedule
            slices = s.cp * (s.tp if s.sequence else 1)
            self.pipe = Pipeline(model, schedule(s.schedule, s.pp, self.microbatches), self.mesh.pp, self.mesh.back,
                                 slices=slices)

    def _place(self, name: str, p: nn.Parameter, whole: tuple[int, ...]) -> _Place:
        """Holders are counted among processes of the same data: tensor-parallel copies, and both ends of a pipeline."""
        cut = getattr(p, "cut", None)
        ends = 2 if self.pipe and name in self.pipe.tied else 1
        holders = ends * (self.sizes.tp if cut is None else cut.copies)
        dim, first = 0, self._rank("ep") * p.size(0) if name in self.experts else 0
        if cut is not None:
            dim, first = cut.dim, self._rank("tp") // cut.copies * p.size(cut.dim)
        return _Place(whole, tuple(p.shape), dim, first, holders)

    def _divide(self, optimizer: Callable, settings: Callable, initialise: Callable | None, device) -> None:
        """ZeRO: what every data-parallel process would have is divided among them."""
        from zero import ZeRO

        data, bf16 = self.mesh.data if self.mesh else None, torch.bfloat16 if self.half else None
        self.zero = ZeRO(self.model, optimizer, data, self.sizes.zero, groups=settings, reduction="sum", dtype=bf16,
                         grad_dtype=torch.float32 if self.half else None, offload=self.sizes.offload,
                         initialise=initialise, device=device)
        self.dp, self.optimizer = [self.zero], self.zero.optimizer

    def _keep_equal(self, optimizer: Callable, settings: Callable) -> None:
        """Data parallelism: the gradients of all are summed. Those of an expert, over those who have it."""
        from parallel import DataParallel

        self.masters = dict(self.model.named_parameters())
        if self.half:
            self.masters = {name: nn.Parameter(p.detach().clone()) for name, p in self.masters.items()}
            self.model.bfloat16()
        self.copies = dict(self.model.named_parameters())
        data, replicas = (self.mesh.data, self.mesh.replicas) if self.mesh else (None, None)
        dense = _Part({name: p for name, p in self.copies.items() if name not in self.experts}, self.model)
        experts = _Part({name: p for name, p in self.copies.items() if name in self.experts})
        self.dp = [DataParallel(part, group, reduction="sum", grad_dtype=torch.float32 if self.half else None)
                   for part, group in ((dense, data), (experts, replicas)) if part.parameters()]
        groups = {}
        for name, p in self.masters.items():
            its = settings(name, p)
            groups.setdefault(repr(its), {"params": [], **its})["params"].append(p)
        self.optimizer = optimizer(list(groups.values()))

    # --- a step ---

    def _quiet(self, quiet: bool = True) -> contextlib.ExitStack:
        """A context in which gradients stay on their process."""
        stack = contextlib.ExitStack()
        for dp in self.dp if quiet else ():
            stack.enter_context(dp.no_sync())
        return stack

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """-log p(target) in nats, in fp32, summed over this process's positions; targets below zero do not count."""
        if self.sizes.cp > 1:
            from ring_attention import zigzag
            targets = zigzag(targets, 1, self.mesh.cp)  # (B, T/cp)
        if self.sizes.tp > 1:
            from tensor_parallel import vocabulary_cross_entropy
            losses = vocabulary_cross_entropy(logits, targets.clamp(min=0), self.V, self.mesh.tp)
            return (losses * (targets >= 0)).sum()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = targets.flatten().clamp(min=-1)
        return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=-1, reduction="sum")

    def gradient(self, batches: Iterable[tuple[Tensor, Tensor]], tokens: int,
                 auxiliary: Callable[[nn.Module], Tensor | float] = lambda model: 0.0) -> list[Tensor]:
        """Forward and backward of this process's microbatches; then every process has its part of the whole gradient.

        Args:
            batches: ``microbatches`` times (inputs, targets), each (B, T).
            tokens: of the whole step, by which every loss is divided.
            auxiliary: what the model's layers add, a mean over a microbatch.

        Returns:
            each microbatch's part of the mean loss; of a pipeline, the sum alone.
        """
        if self.pipe:
            inputs, targets = (torch.cat(parts) for parts in zip(*batches))
            with self._quiet(), self.autocast:  # tied and deferred weights get gradients outside of backward
                losses = [self.pipe.step(inputs, targets, lambda y, t: self.losses(y, t) / tokens)]
        else:
            losses = []
            for i, (inputs, targets) in enumerate(batches):
                with self._quiet(i + 1 < self.microbatches):
                    with self.autocast:
                        logits = self.model(inputs)  # (B, T, V)
                    loss = self.losses(logits, targets) / tokens
                    losses.append(loss.detach())
                    (loss + auxiliary(self.model) * (targets.numel() / tokens)).backward()
        for dp in self.dp:
            dp.finish()
        if self.half and not self.zero:
            for name, p in self.masters.items():
                p.grad = self.dp[name in self.experts].gradient(self.copies[name])
        return losses

    def _gradients(self) -> dict[str, Tensor | None]:
        """What this process holds of the reduced gradient."""
        if self.zero:
            return {name: shard.grad for name, shard in self.zero.shards().items()}
        return {name: p.grad for name, p in self.masters.items()}

    @torch.no_grad()
    def scale_gradient(self, factor: float) -> None:
        """Multiply the gradient: what a scaled loss needs before clipping."""
        for grad in self._gradients().values():
            if grad is not None:
                grad.mul_(factor)

    @torch.no_grad()
    def clip(self, most: float) -> float:
        """Scale the gradient to a norm of at most this; returns the norm before, the same on every process."""
        if self.sizes.plain:
            return nn.utils.clip_grad_norm_(self.masters.values(), most).item()
        from zero import exact_dtype
        grads = self._gradients()
        device = next((grad.device for grad in grads.values() if grad is not None), torch.device("cpu"))
        total = torch.zeros((), dtype=exact_dtype(device), device=device)
        for name, grad in grads.items():
            if grad is not None:
                total += grad.to(total.dtype).square().sum() / self._holders(name)
        if self.mesh:
            dist.all_reduce(total)
        if self.zero:
            return self.zero.clip_grad_norm(most, total).item()
        norm = total.sqrt()
        for grad in grads.values():
            if grad is not None:
                grad.mul_((most / (norm + 1e-6)).clamp(max=1.0).to(grad.dtype))
        return norm.item()

    def _holders(self, name: str) -> int:
        """How many of all processes have the same elements of this gradient."""
        s = self.sizes
        replicas = 1 if self.zero else s.dp * s.cp * (1 if name in self.experts else s.ep)
        return self.places[name].holders * replicas

    def step(self, lr: float) -> None:
        """The optimizer's step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        (self.zero or self.optimizer).step()
        if not self.zero:
            self.refresh()

    def refresh(self) -> None:
        """Bring what forward and backward run on to the values of the weights that are optimised."""
        if self.zero:
            self.zero.refresh()
        elif self.half:
            with torch.no_grad():
                torch._foreach_copy_(list(self.copies.values()), list(self.masters.values()))

    def zero_grad(self) -> None:
        """Forget the gradient."""
        if self.zero:
            return self.zero.zero_grad()
        for p in (*self.masters.values(), *self.copies.values()):
            p.grad = None

    @torch.no_grad()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> float:
        """The loss of a batch, summed over this process's positions: add up ``counts`` times it over all processes.

        Every process calls it equally often; targets of -1 do not count. A pipeline needs ``microbatches`` to divide B.
        """
        self.model.eval()
        with self.autocast:
            if self.pipe:
                loss = self.pipe.step(inputs, targets, self.losses, backward=False)
            else:
                loss = self.losses(self.model(inputs), targets)
        self.model.train()
        return loss.item()

    # --- checkpoints ---

    def tensors(self, states: dict[str, tuple[int, ...]] | None = None) -> dict[str, dict]:
        """What this process holds, as ``checkpoint.save`` and ``load_into`` take it: parameters and optimizer states.

        ``states``: ``checkpoint.shapes`` of what will be loaded: room for the states in it is made. None, to save: then
        the last stage of a pipeline leaves a tied parameter to the first.
        """
        from pieces import pieces_of

        if self.zero:
            mine = {name: (shard.master, shard.start, shard.state) for name, shard in self.zero.shards().items()}
        else:
            mine = {name: (p.detach().view(-1), 0, self.optimizer.state[p]) for name, p in self.masters.items()}
        if states is None and self.pipe and self._rank("pp") > 0:
            mine = {name: held for name, held in mine.items() if name not in self.pipe.tied}
        for key, shape in (states or {}).items():
            part, name, *state = key.split("/")
            if part == "optimizer" and name in mine and mine[name][0].numel():
                flat, _, room = mine[name]
                if shape != self.places[name].shape:  # a number, which fused optimizers want beside the parameters
                    fused = any(group.get("fused") for group in self.optimizer.param_groups)
                    room[state[0]] = torch.zeros(shape, device=flat.device if fused else "cpu")
                else:
                    room[state[0]] = torch.zeros_like(flat if self.zero else self.masters[name])

        def pieces(name: str, tensor: Tensor):
            if tensor.dim() == 0:  # a step
                return tensor
            place, start = self.places[name], mine[name][1]
            return pieces_of(tensor.detach().view(-1), start, place.local, place.shape, place.dim, place.first)

        return {"model": {name: pieces(name, flat) for name, (flat, _, _) in mine.items()},
                "optimizer": {name: {key: pieces(name, value) for key, value in state.items()}
                              for name, (_, _, state) in mine.items()}}


class _Part:
    """Some parameters of a model, for DataParallel; and the model's buffers, if they go with them."""

    def __init__(self, parameters: dict[str, nn.Parameter], model: nn.Module | None = None):
        self.named_parameters, self.parameters = parameters.items, parameters.values
        self.named_buffers = model.named_buffers if model is not None else list


# --- 3. demo ----------------------------------------------------------------------------------------

def main(preset: str, processes: int) -> None:
    import itertools

    from config import PRESETS, TrainConfig
    from models import describe, parameters_and_flops

    settings = TrainConfig(**PRESETS[preset])
    model = describe(settings, {"train": settings.vocab_size, "gpt2": 50257}.get(settings.tokenizer, 100277))
    N = parameters_and_flops(settings.model, model)[0]
    of_experts = expert_parameters(model)
    divisors = [n for n in range(1, processes + 1) if processes % n == 0]
    fitting, refused = [], 0
    for tp, pp, cp, ep, zero in itertools.product(divisors, divisors, divisors, divisors, range(4)):
        dp, rest = divmod(processes, tp * pp * cp * ep)
        if rest or zero and dp * cp == 1:  # nobody to divide it with
            continue
        sizes = Grid(dp, tp, pp, cp, ep, zero)
        try:
            check(sizes, settings.model, model, settings.context)
            fitting.append(sizes)
        except ValueError:
            refused += 1
    print(f"{preset}: {N:,} parameters on {processes} processes; memory without that of activations, about:")
    print("  dp  tp  pp  cp  ep  zero   GB a process   flags of train.py")
    for s in sorted(fitting, key=lambda s: (bytes_needed(N, s, of_experts), s.tp * s.pp * s.cp))[:12]:
        flags = " ".join(f"--{name} {getattr(s, name)}" for name in ("tp", "pp", "cp", "ep", "zero")
                         if getattr(s, name) != getattr(Grid, name))
        needed = bytes_needed(N, s, of_experts) / 1e9
        print(f"{s.dp:4} {s.tp:3} {s.pp:3} {s.cp:3} {s.ep:3} {s.zero:5} {needed:14.4f}   {flags}")
    least, most = (f(bytes_needed(N, s, of_experts) / N for s in fitting) for f in (min, max))
    print(f"{len(fitting)} layouts of {processes} processes fit, {refused} do not: {least:.2f} to {most:.2f} bytes per "
          f"parameter (expected at most 16, at least 16 / {processes} = {16 / processes:.2f})")


if __name__ == "__main__":
    try:
        from config import PRESETS
    except ImportError as error:
        print(f"layout.py: {error}: copy that file beside this one, or install that package", file=sys.stderr)
        sys.exit(2)
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--preset", choices=PRESETS, default="tiny_cpu", help="whose model (default %(default)s)")
    parser.add_argument("--processes", type=int, default=8, help="to lay out (default %(default)s)")
    options = parser.parse_args()
    if not 1 <= options.processes <= 4096:
        parser.error(f"--processes must be in 1 .. 4096, got {options.processes}")
    try:
        main(**vars(options))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
