"""ZeRO: data parallelism in which no rank holds what another one holds already.   Rajbhandari et al. 2020 (1910.02054)

Idea      P data-parallel ranks hold everything P times. But a parameter's optimizer state is used once a step, by
          whoever updates it; its gradient, once summed, by the same; and the parameter itself only while its layer
          computes. So all are laid end to end, cut into P chunks, and each rank owns one:
          stage 1 cuts the optimizer's states, stage 2 the gradients too, stage 3 the parameters too (FSDP).
Formula   bytes a parameter, 2 (bf16) + 2 (its gradient) + 12 (fp32 copy and Adam's two moments) = 16 on one rank:
          stage 1   4 + 12/P        reduce-scatter gradients, update the own chunk, all-gather parameters
          stage 2   2 + 14/P        the same, each gradient reduced and freed as soon as backward has made it
          stage 3   16/P            and parameters all-gathered before a layer's forward and again before its backward
          in fp32 the chunk is its own fp32 copy: 4 + 4 + 8 bytes: 8 + 8/P, 4 + 12/P, 16/P
          sent a step, for n bytes of parameters: 2 (P-1)/P n in stages 0, 1, 2, as an all-reduce; 3 (P-1)/P n in 3
Shapes    n numbers of a unit -> (P, C), C = ceil(n/P): row r is rank r's, whatever the parameters' shapes
Omits     optimizers that look at a whole matrix (Adafactor, Muon, LAMB: a rank has a piece of it); NVMe
          (ZeRO-Infinity); quantised messages (ZeRO++); a stream of its own for the offload's copies. How stage 3's
          parameters come and go is in gathering.py, the demo in zero_memory.py.
Run       python zero.py                                2 processes: every stage's bytes and equality, half a minute
          python zero.py --offload --plot zero.png      optimizer in the host's memory (ZeRO-Offload); bars
          torchrun --nproc_per_node 2 zero.py           the same on ranks that torchrun starts
          ends with "max |bytes measured / formula - 1| = ..."
Test      pytest tests/test_zero.py
"""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.autograd import Variable


def rank_and_size(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """(rank r of this process in the group, number of ranks P); (0, 1) without torch.distributed.

    Raises ValueError if this process is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank, P = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"global rank {dist.get_rank()} is not in the group that it was given")
    return rank, P


def global_rank(group: dist.ProcessGroup | None, rank: int) -> int:
    """What send, recv and broadcast call the group's rank: they count over all processes."""
    return dist.get_global_rank(dist.group.WORLD if group is None else group, rank)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.empty``, on a CPU in huge pages, for which numpy asks the system: touching fresh memory for the first
    time costs a fault a page, together more than sending it."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.empty(size + 64, dtype=np.uint8))
    begin = -raw.data_ptr() % 64  # where torch's own tensors would begin
    return raw[begin:begin + size].view(dtype).view(shape)


# --- 1. the two collectives, from send and receive ---------------------------------------------------
#
# Rows of a (P, C) matrix, of which rank r owns row r. Every pair of ranks exchanges directly, everything is posted at
# once, and the backend moves it while Python goes on:
#
#   all-gather       r sends its row to everyone, and receives everyone's
#   reduce-scatter   r sends row s to rank s, receives P terms of its own row and adds them, in the order of the ranks
#
# Each rank sends P-1 rows, as in a ring. On a CPU this is faster than gloo's own; NCCL's own are the fastest there.

def start_all_gather(rows: Tensor, group: dist.ProcessGroup | None = None, tag: int = 0) -> Callable[[], None]:
    """Fill rows (P, C), of which row r is this rank's, with those of the others; returns what waits for them."""
    rank, P = rank_and_size(group)
    if P > 1 and rows.is_cuda:
        return dist.all_gather_into_tensor(rows.view(-1), rows[rank], group=group, async_op=True).wait
    works = []
    for k in range(1, P):
        to, source = (rank + k) % P, (rank - k) % P
        works += [dist.isend(rows[rank], global_rank(group, to), group, tag),
                  dist.irecv(rows[source], global_rank(group, source), group, tag)]
    return lambda: [work.wait() for work in works] and None


def start_reduce_scatter(rows: Tensor, group: dist.ProcessGroup | None = None, tag: int = 0,
                         scale: float = 1.0) -> Callable[[], Tensor]:
    """Sum rows (P, C) over ranks; returns what waits and gives row r of the sum times ``scale``, (C,), a view of rows.

    On a CPU half precision is summed and scaled in fp32.
    """
    rank, P = rank_and_size(group)
    if P > 1 and rows.is_cuda:
        # its name from torch 2.13 on, and before
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        work = reduce_scatter(rows[rank], rows.view(-1), group=group, async_op=True)
        return lambda: (work.wait(), rows[rank].mul_(scale))[1]
    terms, works = [rows[rank]] * P, []
    for k in range(1, P):
        to, source = (rank + k) % P, (rank - k) % P
        terms[source] = empty(rows[0].shape, rows.dtype, rows.device)
        works += [dist.isend(rows[to], global_rank(group, to), group, tag),
                  dist.irecv(terms[source], global_rank(group, source), group, tag)]

    def wait() -> Tensor:
        for work in works:
            work.wait()
        # in pieces that stay in the cache
        for total, *pieces in zip(rows[rank].split(2**15), *(term.split(2**15) for term in terms)):
            wide = pieces[0].to(torch.promote_types(rows.dtype, torch.float32), copy=True)
            for piece in pieces[1:]:
                wide += piece
            torch.mul(wide, scale, out=total)
            del wide
        return rows[rank]  # (C,)
    return wait


# --- 2. parameters, laid end to end and cut -----------------------------------------------------------
#
#   flat:  | embedding ............ | norm | W ............. | b | 0 |       n numbers and padding, P chunks of C
#   chunk: | rank 0 ...... | rank 1 ...... | rank 2 ...... |            by position: a parameter may have several owners

@dataclass
class Shard:
    """A rank's part of a parameter: elements start .. stop - 1 of the flattened parameter, itself perhaps a slice of
    tensor parallelism. Tensors are (stop - start,), views of what is used: written to in place, then ``refresh()``."""
    name: str
    start: int
    stop: int
    master: Tensor  # the values, as the optimizer has them
    grad: Tensor | None  # reduced; None if no rank used the parameter, or before ``finish()``
    state: dict  # the optimizer's: (stop - start,) tensors or scalars


class _Flat:
    """Parameters of one dtype and device. Attributes come and go with the stage: see ``ZeRO``."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], parts: int, own: int, dtype: torch.dtype,
                 device: torch.device):
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        ends = list(itertools.accumulate(p.numel() for p in self.parameters))
        self.C, self.parts, self.own, self.dtype, self.device = -(-ends[-1] // parts), parts, own, dtype, device
        self.first = {p: end - p.numel() for p, end in zip(self.parameters, ends)}  # where in the flat it begins
        self.trained = self.parameters[0].requires_grad
        self.whole: Tensor | None = None  # (parts, C), the parameters
        self.whole_gradient: Tensor | None = None  # (parts, C), this rank's
        self.arriving: Callable | None = None  # waits for ``whole``
        self.missing: set[nn.Parameter] = set()  # whose gradient is not in ``whole_gradient`` yet
        self.held: set[nn.Parameter] = set()  # whose gradient is
        self.filled = False  # whether ``gradient`` (C,), the own chunk of the sum, has anything of this step

    def owned(self, p: nn.Parameter) -> tuple[int, int, slice]:
        """Elements start, stop of p that are in the own chunk, and where in the chunk."""
        begin = self.first[p] - self.own * self.C  # of p, counted from the chunk's begin
        start, stop = (min(max(edge - begin, 0), p.numel()) for edge in (0, self.C))
        return start, stop, slice(begin + start, begin + stop) if start < stop else slice(0, 0)

    def view(self, p: nn.Parameter, whole: Tensor) -> Tensor:
        """p's part of a (parts, C) tensor, in its shape."""
        return whole.view(-1)[self.first[p]:self.first[p] + p.numel()].view(p.shape)

    def empty(self, dtype: torch.dtype) -> Tensor:
        """(parts, C), a place for the parameters or their gradients."""
        return empty((self.parts, self.C), dtype, self.device)

    def keep(self, p: nn.Parameter, values: Tensor) -> None:
        """Of p's values, what this rank keeps."""
        start, stop, place = self.owned(p)
        if self.master is not self.chunk:
            self.master[place] = values.reshape(-1)[start:stop]
        self.chunk[place] = values.reshape(-1)[start:stop]
        if self.whole is not None:
            self.view(p, self.whole).copy_(values)


# --- 3. ZeRO -------------------------------------------------------------------------------------------

class ZeRO:
    """Trains one model on P ranks: `loss.backward()`, `finish()`, `clip_grad_norm(1.0)`, `step()`, `zero_grad()`.

    The model is not wrapped: its parameters' ``.data`` become views of flat buffers, and hooks are put on parameters
    and, in stage 3, on modules. Between uses a stage-3 parameter has its shape and reads as NaN: look at it inside
    ``with zero.gathered()``. A group of one sends nothing. Gradients are in ``shards()``, ``p.grad`` stays None.

    Args:
        model: the same architecture on every rank; values are taken from the group's first rank. On the "meta" device
            it has none yet: see ``initialise``.
        optimizer: makes the optimizer from a list of {"params": this rank's 1-D shards, **settings}, for example
            ``lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True)``; any that treats elements alike.
        group: the ranks that see different data, None for all. On top of tensor parallelism: the data axis.
        stage: 0 (nothing is cut), 1, 2 or 3.
        groups: name, parameter -> the settings of its parameter group, {} by default.
        units: modules that stage 3 gathers one at a time, in the order of forward: ``model.blocks`` by default. What
            they do not have alone is one more unit, used before the first and after the last.
        reduction: "mean" over ranks or "sum" (losses already divided by the samples of the whole batch).
        dtype: of the parameters in use, such as bfloat16; None leaves it. Optimized are copies in ``state_dtype``, at
            least, with the model's own values.
        grad_dtype: accumulates and sends gradients in this dtype; None: in the parameters'.
        offload: masters, states and reduced gradients in the host's memory, the optimizer runs there. Where the
            device is the CPU the same code runs, and the memory is the same memory.
        delayed: step() updates with the gradients of the step before, in the background, while forward and backward
            go on.                                                            Ren et al. 2021 (2101.06840), section 5.2
        bucket_mb: size of the pieces that travel in stages 0, 1 and 2, in 2^20 bytes.
        initialise: draws a meta model's values, one parameter at a time in the order of ``model.named_parameters()``,
            such as ``lambda model: model.initialise(generator)``, with a generator of equal seed on every rank: those
            of one process, and never more than one whole parameter in memory. None: zeros, until ``shards()`` are
            written.
        device: where a meta model goes.

    Raises:
        ValueError: for an argument that cannot be; if models or settings differ between ranks (on all of them).
    """

    def __init__(self, model: nn.Module, optimizer: Callable, group: dist.ProcessGroup | None = None, stage: int = 1, *,
                 groups: Callable[[str, nn.Parameter], dict] | None = None, units: Iterable[nn.Module] | None = None,
                 reduction: str = "mean", dtype: torch.dtype | None = None, grad_dtype: torch.dtype | None = None,
                 state_dtype: torch.dtype = torch.float32, offload: bool = False, delayed: bool = False,
                 bucket_mb: float = 25.0, initialise: Callable[[nn.Module], None] | None = None,
                 device: torch.device | str = "cpu"):
        if stage not in (0, 1, 2, 3) or reduction not in ("mean", "sum") or not bucket_mb > 0 or delayed > offload:
            raise ValueError('ZeRO needs a stage of 0, 1, 2, 3, reduction "mean" or "sum", bucket_mb > 0, and offload '
                             f"to be delayed, got {stage}, {reduction!r}, {bucket_mb}, {offload=} {delayed=}")
        named = list(model.named_parameters())  # a tied parameter comes once
        if not any(p.requires_grad for _, p in named):
            raise ValueError(f"no parameter of {type(model).__name__} requires a gradient: nothing to train")
        is_meta = {p.is_meta for _, p in named}
        if len(is_meta) > 1 or any(b.is_meta for b in model.buffers()) or initialise is not None and is_meta == {False}:
            raise ValueError("either all parameters, and no buffers, are on the meta device, or none are, and there is "
                             "nothing to initialise")
        self.model, self.group, self.stage, self.offload, self.delayed = model, group, stage, offload, delayed
        self.rank, self.P = rank_and_size(group)
        self._cut = next((p.cut for _, p in named if hasattr(p, "cut")), None)
        self.scale, self.dtype, self.grad_dtype = 1 / self.P if reduction == "mean" else 1.0, dtype, grad_dtype
        is_meta, settings = is_meta == {True}, f"{stage=} {reduction=} {dtype=} {grad_dtype=} {bucket_mb=}"
        if self.P > 1:
            self._start_equal(model, settings, not is_meta)
        dtypes = [p.dtype for _, p in named]
        if is_meta:
            import gathering
            for _, p in named:
                gathering.materialise(p, torch.device(device))
        self._hold(self._make_units(named, units, bucket_mb * 2**20), state_dtype)
        if initialise is not None:
            drawn = gathering.draw_values(model, dtypes, lambda p, values: self._flat_of[p].keep(p, values), initialise)
            if self.P > 1:
                self._agree("ranks drew different values, from generators of different seeds", drawn)
        self._make_optimizer(optimizer, groups or (lambda name, p: {}), named)
        self._sync, self._pending, self._in_backward, self._finished, self._next = True, True, False, False, 0
        self._travelling: list[tuple[_Flat, Callable]] = []
        self._used: set[nn.Parameter] = set()  # in this step, on any rank, once ``finish`` is through
        self._update: threading.Thread | None = None
        self._failure: list[BaseException] = []
        me = weakref.ref(self)  # the collector of garbage does not see a cycle through these hooks
        for p in (p for flat in self._trained for p in flat.parameters):
            p.register_post_accumulate_grad_hook(lambda p: me() and me()._on_gradient(p))

    # --- at the start ---

    @torch.no_grad()
    def _start_equal(self, model: nn.Module, settings: str, copy: bool) -> None:
        """Refuse models that would send different things (and hang), then copy the first rank's."""
        tensors = [*model.named_parameters(), *model.named_buffers()]
        lines = [settings] + [f"{name} {tuple(t.shape)} {t.dtype} {t.requires_grad=}" for name, t in tensors]
        self._agree("ranks differ", lines)
        for _, t in tensors if copy else ():
            whole = t.detach().contiguous()
            dist.broadcast(whole, global_rank(self.group, 0), group=self.group)
            t.copy_(whole)

    def _agree(self, what: str, lines: list[str]) -> None:
        digests, everyone = [None] * self.P, [None] * self.P
        dist.all_gather_object(digests, hashlib.sha256(repr(lines).encode()).hexdigest(), group=self.group)
        if len(set(digests)) > 1:
            dist.all_gather_object(everyone, lines, group=self.group)
            rank = next(r for r in range(self.P) if everyone[r] != everyone[0])
            pairs = itertools.zip_longest(everyone[0], everyone[rank], fillvalue="nothing")
            first, other = next((a, b) for a, b in pairs if a != b)
            raise ValueError(f"{what}: rank 0 of the group has [{first}], rank {rank} has [{other}]")

    def _make_units(self, named: list, modules: Iterable[nn.Module] | None, limit: float) -> list[list[_Flat]]:
        """Stage 3: the rest, then the modules, cut by dtype. Else pieces of up to ``limit`` bytes, from the last
        parameter to the first, as backward makes their gradients."""
        modules = getattr(self.model, "blocks", ()) if modules is None else modules
        self._modules = list(modules) if self.stage == 3 else []
        if not set(self._modules) <= set(self.model.modules()):
            raise ValueError("units must be modules of the model")
        users = {p: set() for _, p in named}  # the units that it is in, 0 for the rest
        inside = {module: i for i, unit in enumerate(self._modules, 1) for module in unit.modules()}
        for module in self.model.modules():
            for p in module._parameters.values():
                if p is not None:
                    users[p].add(inside.get(module, 0))
        members: dict = {}  # (unit, dtype, device, trained) -> named parameters
        units = [[] for _ in range(len(self._modules) + 1)]

        def close(key) -> None:
            (i, dtype, device, _), part = key, members.pop(key)
            parts, own = (1, 0) if self.stage == 0 else (self.P, self.rank)
            units[i].append(_Flat(part, parts, own, dtype, device))
        for name, p in named if self.stage == 3 else reversed(named):
            i = next(iter(users[p])) if len(users[p]) == 1 else 0
            key = i, self.dtype or p.dtype, p.device, p.requires_grad
            size = sum(q.numel() for _, q in [*members.get(key, ()), (name, p)]) * key[1].itemsize
            if self.stage < 3 and key in members and size > limit:
                close(key)
            members.setdefault(key, []).append((name, p))
        for key in list(members):
            close(key)
        if self.stage < 3:
            units = [[flat] for flat in units[0]]
        return units

    @torch.no_grad()
    def _hold(self, units: list[list[_Flat]], state_dtype: torch.dtype) -> None:
        """Make the flat buffers, each with the parameters' values, one after the other."""
        # Backward ends with the rest: the embedding.
        self._flats = sum([*units[1:][::-1], units[0]] if self.stage == 3 else units, [])
        self._trained = [flat for flat in self._flats if flat.trained]
        self._flat_of = {p: flat for flat in self._flats for p in flat.parameters}
        if self.stage == 3:
            import gathering
        for tag, flat in enumerate(self._flats):
            flat.tag = 2 * tag
            size, dtype, device = (flat.parts, flat.C), flat.dtype, flat.device
            if self.stage < 3:
                flat.whole = torch.zeros(size, dtype=dtype, device=device)
                flat.chunk = flat.whole[flat.own]
            else:
                flat.chunk = torch.zeros(flat.C, dtype=dtype, device=device)
            flat.master, pinned = flat.chunk, self.offload and device.type == "cuda"
            wide = max((torch.promote_types(p.dtype, state_dtype) for p in flat.parameters), key=lambda d: d.itemsize)
            if flat.trained and (self.offload or wide != dtype):
                host = "cpu" if self.offload else device
                flat.master = torch.zeros(flat.C, dtype=wide, device=host, pin_memory=pinned)
            if flat.trained:
                kind = self.grad_dtype or dtype
                if self.stage < 2:
                    flat.whole_gradient = torch.zeros(size, dtype=kind, device=device)
                if self.stage < 2 and not self.offload:
                    flat.gradient = flat.whole_gradient[flat.own]
                else:
                    flat.gradient = torch.zeros(flat.C, dtype=kind, device=flat.master.device, pin_memory=pinned)
                flat.spare = torch.zeros_like(flat.gradient) if self.delayed else None
            for p in flat.parameters:
                flat.keep(p, p.detach())
                if self.stage < 3:
                    p.data = flat.view(p, flat.whole)
            flat.missing = set(flat.parameters)
            if self.stage == 3:
                gathering.absent(flat)  # now, not when all have a copy
        if self.stage == 3:
            self._gathering = gathering.Gathering(self.model, self._modules, units, lambda flat: start_all_gather(
                flat.whole, self.group, flat.tag))

    def _make_optimizer(self, optimizer: Callable, groups: Callable, named: list) -> None:
        self._masters, made = {}, {}
        for name, p in named:
            flat = self._flat_of[p]
            start, stop, place = flat.owned(p)
            self._masters[p] = flat.master[place].detach()
            if flat.trained:
                settings = groups(name, p)
                # a group that has nothing here has to be one on every rank all the same
                made.setdefault(repr(sorted(settings.items())), {"params": [], **settings})
                if stop > start:
                    made[repr(sorted(settings.items()))]["params"].append(self._masters[p])
        self.optimizer: torch.optim.Optimizer = optimizer(list(made.values()))
        self._names = {p: name for name, p in named}

    def _free(self) -> None:
        if self.stage == 3:
            self._gathering.free_all()

    def gathered(self) -> AbstractContextManager:
        """``with zero.gathered():`` every parameter is whole on every rank, to be read: for evaluation, decoding,
        saving. All ranks call it."""
        return self._gathering.gathered() if self.stage == 3 else nullcontext()

    # --- gradients ---

    @torch.no_grad()
    def _on_gradient(self, p: nn.Parameter) -> None:
        """Called by autograd as soon as p.grad is complete for this backward."""
        flat, sends = self._flat_of[p], self._sync or self.stage == 3
        self._pending = True
        if sends and self.stage < 2 and p not in flat.missing:
            raise RuntimeError("this step's gradient was already sent: call finish() after the last "
                               "backward() of a step, and run those before it under no_sync()")
        if sends and self.stage >= 2 and not self._in_backward:
            self._in_backward = True  # at its end also units leave of which a parameter was not used
            Variable._execution_engine.queue_callback(self._flush)
        if sends or p.grad.dtype != (self.grad_dtype or p.dtype):
            self._pack(flat, p)
        if sends:
            flat.missing.discard(p)
            self._send_full()

    def _pack(self, flat: _Flat, p: nn.Parameter) -> None:
        """Move p.grad to the flat gradient."""
        if flat.whole_gradient is None:
            flat.whole_gradient = flat.empty(flat.gradient.dtype)
        view = flat.view(p, flat.whole_gradient)
        view.add_(p.grad) if p in flat.held else view.copy_(p.grad)
        flat.held.add(p)
        p.grad = None

    def _send_full(self) -> None:
        """Collectives have no names: flats leave in one order on every rank, a full one waits for those before it."""
        while self._next < len(self._trained) and not self._trained[self._next].missing:
            flat = self._trained[self._next]
            self._next += 1
            # stages 2, 3: no more than two whole gradients, this and one on its way
            while len(self._travelling) >= (1 if self.stage >= 2 else 2):
                self._arrive()
            self._used |= flat.held
            if self.stage == 0:
                work = dist.all_reduce(flat.whole_gradient, group=self.group, async_op=True) if self.P > 1 else None
                wait = lambda flat=flat, work=work: (work and work.wait(),  # noqa: E731
                                                     flat.whole_gradient[0].mul_(self.scale))[1]
            else:
                wait = start_reduce_scatter(flat.whole_gradient, self.group, flat.tag + 1, self.scale)
            self._travelling.append((flat, wait))
            flat.held = set()
            if self.stage >= 2:
                flat.missing, flat.whole_gradient = set(flat.parameters), None

    def _arrive(self) -> None:
        flat, wait = self._travelling.pop(0)
        total = wait()
        # to the host where it is offloaded: the first part of a step streams, later ones are added there
        if flat.filled:
            flat.gradient += total.to(flat.gradient.device)
        else:
            flat.gradient.copy_(total, non_blocking=True)
        flat.filled = True

    @torch.no_grad()
    def _flush(self) -> None:
        """Send what was not used, or not given to a hook, too: every rank sends the same."""
        for flat in self._trained[self._next:]:
            for p in list(flat.missing):
                if p.grad is not None:
                    self._pack(flat, p)
                elif p not in flat.held:
                    if flat.whole_gradient is None:
                        flat.whole_gradient = flat.empty(flat.gradient.dtype)
                    flat.view(p, flat.whole_gradient).zero_()
            flat.missing.clear()
            self._send_full()
        self._in_backward = self._pending = False
        if self.stage >= 2:
            self._next = 0

    @torch.no_grad()
    def finish(self) -> None:
        """After the step's last backward: the shards' gradients are complete. Once a step, on every rank.

        Raises:
            RuntimeError: from torch.distributed, if another rank died or is later than the group's time-out.
        """
        if self._pending:
            self._flush()
        while self._travelling:
            self._arrive()
        if self.P > 1:  # an optimizer leaves alone what no rank used
            parameters = [p for flat in self._trained for p in flat.parameters]
            used = torch.tensor([float(p in self._used) for p in parameters], device=self._trained[0].device)
            dist.all_reduce(used, group=self.group)
            self._used = {p for p, count in zip(parameters, used.tolist()) if count}
        for flat in self._trained:
            flat.missing = set(flat.parameters)
        self._next, self._pending, self._in_backward, self._finished = 0, True, False, True
        self._free()
        if self.offload and self._trained[0].device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of the backward() calls inside are accumulated, in stages 0, 1 and 2 whole on this rank and not
        sent; stage 3 has no place for them and reduces them every time."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def _gradient(self, p: nn.Parameter) -> Tensor | None:
        flat = self._flat_of[p]
        return flat.gradient[flat.owned(p)[2]] if self._finished and p in self._used else None

    def _gradients(self, flat: _Flat) -> dict[nn.Parameter, Tensor | None]:
        return {p: self._gradient(p) for p in flat.parameters}

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """|g|^2 in float64 over the whole model: every rank's shards, slices of tensor parallelism summed over their
        ranks, what all of those have counted once. A scalar, the same on every rank; all of them call it."""
        device = self._trained[0].device
        squares = torch.zeros(2, dtype=torch.float64, device=device)  # of what is whole, of slices
        for flat in self._trained:
            for p in flat.parameters:
                grad, cut = self._gradient(p), getattr(p, "cut", None)
                if grad is not None and grad.numel():
                    norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
                    squares[int(cut is not None)] += (norm.double().square() / (cut.copies if cut else 1)).to(device)
        if self.P > 1 and self.stage > 0:
            dist.all_reduce(squares, group=self.group)
        if self._cut is not None and rank_and_size(self._cut.group)[1] > 1:
            slices = squares[1:].clone()
            dist.all_reduce(slices, group=self._cut.group)
            squares[1:] = slices
        return squares.sum()

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float, square: Tensor | None = None) -> Tensor:
        """Scale the gradient down to ``max_norm``; returns its norm before, a scalar. ``square``: |g|^2 if more than
        this model counts (other stages of a pipeline)."""
        norm = (self.squared_norm() if square is None else square).sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for flat in self._trained:
            flat.gradient.mul_(factor.to(flat.gradient.device, flat.gradient.dtype))
        return norm

    # --- the step ---

    @torch.no_grad()
    def step(self) -> None:
        """Update the own chunk of every flat and bring the parameters to it. All ranks call it."""
        if not self.delayed:
            self._optimize([(flat, self._gradients(flat)) for flat in self._trained], self._publish)
            return self._arrive_whole()
        self._join()
        for flat in self._trained:  # of the step before
            self._publish(flat)
        work = []
        for flat in self._trained:
            work.append((flat, self._gradients(flat)))
            flat.gradient, flat.spare = flat.spare, flat.gradient
        self._update = threading.Thread(target=self._in_background, args=(work,))
        self._update.start()
        self._arrive_whole()

    def _optimize(self, work: list, done: Callable[[_Flat], None]) -> None:
        """One flat after the other: in half precision only one has its gradient in fp32, too, and a chunk travels while
        the next is updated."""
        for flat, gradients in work:
            for p, gradient in gradients.items():
                if gradient is not None and gradient.numel():
                    self._masters[p].grad = gradient.to(flat.master.dtype)
            self.optimizer.step()
            for p in gradients:
                self._masters[p].grad = None
            done(flat)

    def _in_background(self, work: list) -> None:
        try:
            with torch.no_grad():
                self._optimize(work, lambda flat: None)
        except BaseException as error:  # raised again where somebody can see it
            self._failure.append(error)

    def _join(self) -> None:
        if self._update is not None:
            self._update.join()
            self._update = None
        if self._failure:
            raise self._failure.pop()

    def _publish(self, flat: _Flat) -> None:
        if flat.master is not flat.chunk:
            flat.chunk.copy_(flat.master, non_blocking=True)
        if flat.parts > 1 and self.stage < 3:
            flat.arriving = start_all_gather(flat.whole, self.group, flat.tag)

    def _arrive_whole(self) -> None:
        self._free()
        for flat in self._flats:
            if self.stage < 3 and flat.arriving is not None:
                flat.arriving()
                flat.arriving = None

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self._used, self._finished = set(), False
        for flat in self._trained:
            flat.filled, flat.held = False, set()
            for p in flat.parameters:
                p.grad = None

    @property
    def param_groups(self) -> list[dict]:
        """The optimizer's, for the learning rate."""
        self._join()  # an update in the background goes by the settings with which it began
        return self.optimizer.param_groups

    # --- what the ranks hold ---

    def shards(self) -> dict[str, Shard]:
        """This rank's part of every parameter by name, empty where it has none; what is frozen is there, too."""
        self._join()
        shards = {}
        for p, name in self._names.items():
            start, stop, _ = self._flat_of[p].owned(p)
            state = self.optimizer.state[self._masters[p]] if p.requires_grad and stop > start else {}
            gradient = self._gradient(p) if p.requires_grad else None
            shards[name] = Shard(name, start, stop, self._masters[p], gradient, state)
        return shards

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the model's parameters to the shards' values after someone wrote to those. All ranks call it."""
        self._join()
        for flat in self._flats:
            self._publish(flat)
        self._arrive_whole()

    def bytes_held(self) -> dict[str, int]:
        """Bytes of every tensor held, each storage counted once: "parameters", "gradients", "states" (masters too) and,
        of all these together, "host": how much is offloaded."""
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        kinds = {"parameters": [*self.model.parameters(), *self.model.buffers(), *(f.chunk for f in self._flats),
                                *(f.whole for f in self._flats)],
                 "gradients": [t for f in self._trained for t in (f.gradient, f.whole_gradient, f.spare)]
                 + [p.grad for p in self.model.parameters()],
                 "states": [*(f.master for f in self._flats), *states]}
        seen, held, host = set(), {}, 0
        for kind, tensors in kinds.items():
            storages = {t.untyped_storage().data_ptr(): t for t in tensors if t is not None and t.numel()}
            fresh = {key: t.untyped_storage().nbytes() for key, t in storages.items() if key not in seen}
            held[kind] = sum(fresh.values())
            seen |= set(fresh)
        for flat in self._trained if self.offload else ():
            host += flat.master.nbytes + flat.gradient.nbytes + (0 if flat.spare is None else flat.spare.nbytes)
        held["host"] = host + (sum(t.nbytes for t in states) if self.offload else 0)
        return held


# --- 4. demo: zero_memory.py, beside this file ---------------------------------------------------------

if __name__ == "__main__":
    import zero_memory
    try:
        zero_memory.main("zero.py")
    except KeyboardInterrupt:
        sys.exit(130)
