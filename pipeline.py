"""Pipeline parallelism: every rank holds some layers; microbatches follow one another through them.

Idea      Cut the blocks into stages, one after the other on the ranks, and the batch into M microbatches. A rank works
          on microbatch m while the next one works on m-1, in the order of a schedule (pipeline_schedules.py). Each rank
          sends activations to the next stage and gradients to the one before; beside them go only the targets, the
          loss and the gradient of an embedding that both ends have.
Formula   stage s computes x_s = f_s(x_{s-1}), sends x_s forward; gets dx_s, computes dx_{s-1} and dW_s, sends dx_{s-1}
          back. dW_s = dx_s^T x_{s-1} can wait (zero-bubble, Qi et al. 2023); dx_{s-1} = dx_s W_s cannot.
Shapes    a microbatch: tokens (B/M, T) -> x (B/M, T, D) from stage to stage -> logits on the last rank
Omits     dropout as on one process (every stage draws masks of its own), recomputation, caches.
Run       python pipeline.py                                                a GPT on 2 processes beside one, 10 s
          python pipeline.py --schedule zb --stages 4 --microbatches 8      its timeline, planned and measured
          python pipeline.py --simulate --ranks 4096                        a 175B model: the best layouts
          Ends with "max |pipeline - one process| = ...", or the best layout
Test      pytest tests/test_pipeline.py
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import math
import os
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


# --- 1. a model in stages -------------------------------------------------------------------------------

def split(costs: Sequence[float], stages: int) -> list[int]:
    """Boundaries 0 = b_0 < b_1 ... < b_stages = n between stages of consecutive layers, the dearest as cheap as can be.

    Raises ValueError if there are fewer layers than stages.
    """
    n = len(costs)
    if not 1 <= stages <= n:
        raise ValueError(f"{n} layers cannot make {stages} stages: want 1 to {n}")
    total = [0.0, *itertools.accumulate(costs)]
    best = [[(total[n] - total[i], [i, n]) for i in range(n + 1)]]  # best[k - 1][i]: layers i .. n in k stages
    for k in range(2, stages + 1):
        best.append([min(((max(total[j] - total[i], best[-1][j][0]), [i, *best[-1][j][1]])
                          for j in range(i + 1, n - k + 2)), default=(math.inf, [])) for i in range(n + 1)])
    return best[-1][0][1]


def block_costs(model: nn.Module) -> list[float]:
    """What each block costs, in weights of its matrices; the head's V D are added to the last block's."""
    costs = [float(sum(p.numel() for p in block.parameters() if p.dim() >= 2)) for block in model.blocks]
    costs[-1] += model.config.vocab_size * model.config.d_model
    return costs


def _parameters_of(y: Tensor, model: nn.Module) -> set[str]:
    """Names of the parameters that y was computed from: the leaves of its graph."""
    names, leaves, nodes, seen = {p: name for name, p in model.named_parameters()}, set(), [y.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves.add(names.get(getattr(node, "variable", None)))
            nodes += [after for after, _ in node.next_functions]
    return leaves - {None}


class _DeferWeights(TorchFunctionMode):
    """Inside, F.linear's backward computes the gradient of its input alone, and puts the rest on a list."""

    def __init__(self, later: list[Callable[[], None]]):
        super().__init__()
        self.later = later

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and args[1].requires_grad and isinstance(args[1], nn.Parameter):
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            y = _InputGradient.apply(x, weight, self.later)
            return y if bias is None else y + bias
        return function(*args, **(kwargs or {}))


class _InputGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, later):
        ctx.save_for_backward(x)
        ctx.weight, ctx.later = weight, later  # the parameter itself: hooks may give back a copy of what is saved
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy):
        (x,), weight = ctx.saved_tensors, ctx.weight
        x = x.detach()  # or the list would hold the graph, which holds the list

        def add_weight_gradient() -> None:
            gradient = dy.flatten(0, -2).t() @ x.flatten(0, -2)
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

        ctx.later.append(torch.no_grad()(add_weight_gradient))
        return dy @ weight if ctx.needs_input_grad[0] else None, None, None


# --- 2. the engine --------------------------------------------------------------------------------------

class Pipeline:
    """Runs a schedule on this rank's stages of a model of the contract: ``step``, ``clip_grad_norm``, any optimizer.

    The model is the same on every rank; it is cut in place: what this rank does not need is dropped, parameters
    keep their full names. An embedding tied to the head lives on the first and on the last rank, and its gradients are
    summed. Results go to the neighbours without waiting; what comes is asked for in the order in which it is sent, one
    message ahead.

    Args:
        ranks: for every rank its operations in order, each with ``kind`` (F, B, I or W), ``microbatch`` and ``stage``
            (``pipeline_schedules.schedule``); stage s is on rank s mod P.
        group: the ranks of the pipeline; None for all.
        back: the same ranks in the same order once more, for the gradients; None for ``group``. NCCL needs it: there a
            pair's messages of one group wait for each other, and two ranks that both send first would wait for ever.
        costs: of each block, measured or estimated; None for ``block_costs``.
        slices: ranks that share T between the blocks, as ``tensor_parallel(..., sequence=True)`` makes them.

    Raises:
        ValueError: if there are fewer blocks than stages, the schedule is for another number of ranks, or costs are of
            another number of blocks.
    """

    def __init__(self, model: nn.Module, ranks: Sequence[Sequence], group: dist.ProcessGroup | None = None,
                 back: dist.ProcessGroup | None = None, costs: Sequence[float] | None = None, slices: int = 1):
        running = dist.is_available() and dist.is_initialized()
        self.group, self.back, self.slices = group, back or group, slices
        self.model, self.ranks = model, ranks
        self.rank, self.P = (dist.get_rank(group), dist.get_world_size(group)) if running else (0, 1)
        if len(ranks) != self.P:
            raise ValueError(f"a schedule for {len(ranks)} ranks cannot run on {self.P}: make one for {self.P}")
        self.M = 1 + max(op.microbatch for ops in ranks for op in ops)
        self.last = max(op.stage for ops in ranks for op in ops)
        costs = block_costs(model) if costs is None else costs
        if len(costs) != len(model.blocks):
            raise ValueError(f"want a cost of each of the {len(model.blocks)} blocks, got {len(costs)}")
        self.boundaries = split(costs, self.last + 1)
        self.times: list[tuple] = []  # of the last step, measured: (start, end, operation), in seconds
        self.most_held = 0  # microbatches of a stage whose activations were held at once
        self._cut()
        self.outgoing = defaultdict(list)  # (from, to) -> messages, in the order in which they are sent
        for r, ops in enumerate(self.ranks):
            for op in ops:
                if op.kind != "W" and 0 <= op.stage + (1 if op.kind == "F" else -1) <= self.last:
                    self.outgoing[r, self._destination(op)].append(op)
        self.world = [dist.get_global_rank(group or dist.group.WORLD, r) for r in range(self.P)] if running else [0]

    def _destination(self, op) -> int:
        return (op.stage + (1 if op.kind == "F" else -1)) % self.P

    def _cut(self) -> None:
        model = self.model
        x = model.embed(torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))  # (1, 1, D)
        embed, head = _parameters_of(x, model), _parameters_of(model.head(x.detach()), model)
        self.tied = sorted(embed & head)  # parameters of both ends
        keep = (embed if self.rank == 0 else set()) | (head if self.rank == self.P - 1 else set())
        for name, _ in list(model.named_children()):
            if name != "blocks" and not any(kept.startswith(f"{name}.") for kept in keep):
                setattr(model, name, None)
        for i in range(len(model.blocks)):
            mine = map(self._blocks, range(self.rank, self.last + 1, self.P))
            if not any(first <= i < behind for first, behind in mine):
                model.blocks[i] = nn.Identity()

    def _blocks(self, stage: int) -> tuple[int, int]:
        return self.boundaries[stage], self.boundaries[stage + 1]

    def step(self, tokens: Tensor, targets: Tensor | None, loss: Callable[[Tensor, Tensor], Tensor],
             backward: bool = True) -> Tensor:
        """Forward and backward of the whole batch; gradients are added to ``p.grad``. Every rank calls it.

        Args:
            tokens: (B, T), M divides B; read on the first rank, the others look at its shape alone.
            targets: (B, T), of tokens' dtype; read on the first rank, which sends them to the last; others may give
                None.
            loss: (logits (B/M, T, V), targets (B/M, T)) -> scalar, this microbatch's term of the step's loss.
            backward: False for the loss alone.

        Returns:
            the sum of the M terms, the same on every rank.
        Raises:
            ValueError: if M does not divide B. RuntimeError: naming the rank and message that did not come.
        """
        if len(tokens) % self.M:
            raise ValueError(f"{self.M} microbatches do not divide a batch of {len(tokens)}: want a multiple of "
                             f"{self.M}")
        if self.P > 1 and self.rank in (0, self.P - 1):
            targets = self._to_last(targets if self.rank == 0 else
                                    torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device))
        self.tokens = tokens.chunk(self.M)
        self.targets, self.loss = targets.chunk(self.M) if targets is not None else None, loss
        first = next(self.model.parameters())
        shape = (len(self.tokens[0]), tokens.size(1) // self.slices, self.model.config.d_model)
        self.empty = lambda: torch.empty(shape, dtype=first.dtype, device=first.device)  # (B/M, T, D)
        self.inputs, self.outputs, self.inbox, self.weights = {}, {}, {}, {}
        self.sent = []
        self.expected = {pair: deque(op for op in ops if backward or op.kind == "F")
                         for pair, ops in self.outgoing.items() if pair[1] == self.rank}
        self.posted, self.times = {pair: deque() for pair in self.expected}, []
        self.total, self.most_held = torch.zeros((), dtype=torch.float64, device=first.device), 0
        began = time.perf_counter()
        with torch.set_grad_enabled(backward):
            for op in self.ranks[self.rank]:
                if backward or op.kind == "F":
                    self._run(op, began)
        for work, _, message in self.sent:
            with self._naming(message):
                work.wait()
        if self.P > 1:
            with self._naming(f"the loss, from rank {self.P - 1},"):
                dist.broadcast(self.total, self.world[-1], group=self.group)
        for name in self.tied if backward and self.P > 1 and self.rank in (0, self.P - 1) else ():
            self._add_other_end(self.model.get_parameter(name).grad)
        return self.total

    def _add_other_end(self, gradient: Tensor) -> None:
        other, theirs = self.world[-1 if self.rank == 0 else 0], torch.empty_like(gradient)
        mine = gradient.clone()  # must live until it is sent
        with self._naming(f"the gradient of a tied parameter, from rank {0 if self.rank else self.P - 1},"):
            for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, other, self.group),
                                                dist.P2POp(dist.irecv, theirs, other, self.group)]):
                work.wait()
        gradient.add_(theirs)

    def _to_last(self, targets: Tensor) -> Tensor:
        with self._naming(f"the targets, from rank 0 to rank {self.P - 1},"):
            if self.rank == 0:
                dist.send(targets.contiguous(), self.world[-1], group=self.group)
            else:
                dist.recv(targets, self.world[0], group=self.group)
        return targets

    def _run(self, op, began: float) -> None:
        key = (op.microbatch, op.stage)
        result = incoming = None
        if op.kind == "F" and op.stage > 0:
            incoming = self._receive(dataclasses.replace(op, stage=op.stage - 1))
        elif op.kind in "BI" and op.stage < self.last:
            incoming = self._receive(dataclasses.replace(op, stage=op.stage + 1))
        start = time.perf_counter() - began
        if op.kind == "F":
            result = self._forward(op, incoming)
        elif op.kind in "BI":
            output = self.outputs.pop(key)
            output.backward(incoming)
            x = self.inputs.pop(key)
            result = None if x is None else x.grad
        else:
            later = self.weights.pop(key)
            while later:
                later.pop(0)()  # and with it go its activations
        self.most_held = max(self.most_held, len(self.outputs.keys() | self.weights.keys()))
        self.times.append((start, time.perf_counter() - began, op))
        if op.kind != "W" and 0 <= op.stage + (1 if op.kind == "F" else -1) <= self.last:
            self._send(op, result)

    def _forward(self, op, x: Tensor | None) -> Tensor:
        """Through this stage's blocks; the last stage's result is the loss."""
        model, key = self.model, (op.microbatch, op.stage)
        defer = any(other.kind == "W" for other in self.ranks[self.rank])
        if defer:
            self.weights[key] = []
        x = None if x is None else x.requires_grad_(torch.is_grad_enabled())
        self.inputs[key] = x
        with _DeferWeights(self.weights[key]) if defer else contextlib.nullcontext():
            y = model.embed(self.tokens[op.microbatch]) if op.stage == 0 else x
            for block in model.blocks[slice(*self._blocks(op.stage))]:
                y = block(y)
            if op.stage == self.last:
                y = self.loss(model.head(y), self.targets[op.microbatch])
                self.total += y.detach()
        self.outputs[key] = y
        return y.detach()

    def _send(self, op, result: Tensor) -> None:
        to = self._destination(op)
        if to == self.rank:
            self.inbox[op] = result
            return
        result = result.contiguous()
        message = f"{self._name(op)} to rank {to}"
        with self._naming(message):
            work = dist.isend(result, self.world[to], group=self.group if op.kind == "F" else self.back)
        self.sent.append((work, result, message))  # the tensor must live until it is sent

    def _receive(self, op) -> Tensor:
        """What ``op`` gave, from the rank that ran it."""
        pair = (op.stage % self.P, self.rank)
        while op not in self.inbox:
            while self.expected[pair] and len(self.posted[pair]) < 2:
                message, buffer = self.expected[pair].popleft(), self.empty()
                with self._naming(f"{self._name(message)} from rank {pair[0]}"):
                    work = dist.irecv(buffer, self.world[pair[0]],
                                      group=self.group if message.kind == "F" else self.back)
                self.posted[pair].append((message, work, buffer))
            message, work, buffer = self.posted[pair].popleft()
            with self._naming(f"{self._name(message)} from rank {pair[0]}"):
                work.wait()
            self.inbox[message] = buffer
        return self.inbox.pop(op)

    def _name(self, op) -> str:
        return f"the {'activations' if op.kind == 'F' else 'gradient'} of microbatch {op.microbatch}, stage {op.stage},"

    @contextlib.contextmanager
    def _naming(self, message: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(f"pipeline, rank {self.rank} of {self.P}: {message} did not get through, another rank "
                               f"died or hangs: {error}") from None

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float, square: Callable[[list[nn.Parameter]], Tensor] | None = None) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_`` over all stages, a tied parameter counted once; returns the norm before,
        the same on every rank.

        ``square(parameters)``: the sum of squares of their gradients, if they are slices of something (tensor
        parallelism: ``tensor_parallel.squared_norm``).
        """
        twice = set(self.tied) if self.P > 1 and self.rank == self.P - 1 else set()
        mine = [p for name, p in self.model.named_parameters() if p.grad is not None and name not in twice]
        device = next(self.model.parameters()).device
        total = square(mine) if square else sum((p.grad.double().square().sum() for p in mine),
                                                torch.zeros((), dtype=torch.float64, device=device))
        if self.P > 1:
            with self._naming("the sum of all gradients' squares"):
                dist.all_reduce(total, group=self.group)
        norm = total.sqrt()
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0).to(p.grad.dtype))
        return norm


# --- 3. demo --------------------------------------------------------------------------------------------

def _train(model: nn.Module, batches: Sequence[Tensor], run: Callable, clip: Callable) -> list[float]:
    """AdamW with clipping; ``run(tokens, targets)`` does forward and backward and gives the loss."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for batch in batches:
        losses.append(run(batch[:, :-1], batch[:, 1:]).item())
        clip(1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _demo(rank: int, options: argparse.Namespace, ranks: list, rendezvous: str) -> None:
    """What every rank runs; rank 0 prints."""
    from gpt import GPT, GPTConfig, next_token_loss
    from pipeline_schedules import Timed, bubble, bubble_formula, draw, draw_text, peak_held

    P, M = options.stages, options.microbatches
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=P)
    torch.set_num_threads(1)
    say = print if rank == 0 else lambda *words: None
    config = GPTConfig(vocab_size=64, context=128, n_layers=P * options.chunks * 2, n_heads=4, d_model=64)
    one = GPT(config, generator=torch.Generator().manual_seed(options.seed)).double()
    pipe = Pipeline(copy.deepcopy(one), ranks)
    generator = torch.Generator().manual_seed(options.seed)
    batches = [torch.randint(64, (2 * M, 129), generator=generator) for _ in range(4)]

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return next_token_loss(logits, targets) / M

    def alone(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = next_token_loss(one(tokens), targets)
        loss.backward()
        return loss.detach()

    losses = _train(one, batches, alone, lambda norm: nn.utils.clip_grad_norm_(one.parameters(), norm))
    piped = _train(pipe.model, batches, lambda x, y: pipe.step(x, y if rank == 0 else None, loss_of),
                   pipe.clip_grad_norm)
    gathered = [None] * P
    dist.all_gather_object(gathered, (pipe.times, pipe.most_held, dict(pipe.model.named_parameters())))
    measured = [Timed(r, *t) for r, (times, _, _) in enumerate(gathered) for t in times]
    say(f"measured: {P} ranks on {os.cpu_count()} cores; bubble {bubble(measured):.2f} (plan "
        f"{bubble_formula(options.schedule, P, M, options.chunks):.2f}, with a core a rank and equal stages); "
        f"microbatches held {[held for _, held, _ in gathered]} (plan {[peak_held(ops) for ops in ranks]})")
    say(draw_text(measured))
    if options.plot and rank == 0:
        draw(options.plot, {f"{options.schedule}, measured": measured})
        print(f"drawn: {options.plot}")
    say("step   one process   pipeline   (expected first: about ln 64 = 4.159)")
    for step in (0, len(batches) - 1):
        say(f"{step:4d} {losses[step]:13.6f} {piped[step]:10.6f}")
    mine = dict(one.named_parameters())
    error = max((mine[name] - p).abs().max().item() for _, _, part in gathered for name, p in part.items())
    say(f"max |pipeline - one process| = {error:.1e} over all parameters after {len(batches)} steps: "
        + ("OK, below 1e-10" if error < 1e-10 else "WRONG, expected below 1e-10"))
    dist.destroy_process_group()


def main(options: argparse.Namespace) -> None:
    import pipeline_schedules as schedules

    if options.simulate:
        print(schedules.simulate(4096 if options.ranks is None else options.ranks))
        return
    if options.ranks is not None:
        raise ValueError("--ranks means nothing without --simulate")
    P, M, v = options.stages, options.microbatches, options.chunks
    if not (1 <= P <= 16 and 1 <= M <= 64 and 1 <= v <= 4 and 0 <= options.seed < 2**32):
        raise ValueError("--stages must be in 1 .. 16, --microbatches in 1 .. 64, --chunks in 1 .. 4 and --seed in "
                         f"0 .. 2^32 - 1, got {P}, {M}, {v} and {options.seed}")
    ranks = schedules.schedule(options.schedule, P, M, v)
    schedules.new_figure(options.plot, 1, 1)  # what cannot be drawn is known before the work
    times = schedules.timeline(ranks)
    print(f"planned: {options.schedule}, P = {P}, M = {M}, v = {v}; bubble {schedules.bubble(times):.4f}, formula "
          f"{schedules.bubble_formula(options.schedule, P, M, v):.4f}")
    print(schedules.draw_text(times))
    from processes import start_ranks
    with tempfile.TemporaryDirectory() as folder:  # the ranks meet through a file: no port to be taken
        start_ranks(_demo, (options, ranks, (Path(folder) / "ranks").as_uri()), P)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--schedule", choices=("gpipe", "1f1b", "interleaved", "zb"), default="1f1b",
                        help="order of the operations (default %(default)s)")
    parser.add_argument("--stages", type=int, default=2, help="ranks of the pipeline (default %(default)s)")
    parser.add_argument("--microbatches", type=int, default=4, help="of a step (default %(default)s)")
    parser.add_argument("--chunks", type=int, default=1,
                        help="stages a rank, v, for interleaved (default %(default)s)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the measured timeline (needs matplotlib)")
    parser.add_argument("--simulate", action="store_true",
                        help="run nothing: predict a 175B model on --ranks GPUs")
    parser.add_argument("--ranks", type=int, help="GPUs to simulate (default 4096)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and data (default %(default)s)")
    try:
        main(parser.parse_args())
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
