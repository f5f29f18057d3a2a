"""Parameters laid end to end and cut into equal chunks: what ZeRO divides among ranks, and the two collectives for it.

Idea      Parameters have all shapes, ranks want equal parts, and few long messages are faster than many short ones. So
          parameters lie end to end in one flat buffer, padded to P equal chunks; each remains a view of it. Chunk r
          belongs to rank r: all-gather brings every chunk to everyone, reduce-scatter brings chunk r's sum to r.
Formula   flat:   | embedding ............ | norm | W ............. | b | 0 |    n numbers and padding, P chunks of C
          chunks: | rank 0 ...... | rank 1 ...... | rank 2 ...... |         by position: a parameter may have several
                                                                            owners       Rajbhandari et al. 2020
Shapes    n numbers -> (P, C), C = ceil(n/P): row r is rank r's, whatever the parameters' shapes
Omits     rings and trees (every pair of ranks exchanges directly); cutting along dimensions, as FSDP2 does.
Run       python flattening.py   a GPT's flats on 3 ranks; ends with "every number has one owner: OK"
Test      pytest tests/test_zero.py
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor


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
                         scale: float = 1.0, out: Tensor | None = None) -> Callable[[], Tensor]:
    """Sum rows (P, C) over ranks; returns what waits and gives row r of the sum times ``scale``, (C,): in ``out``, or,
    without, in row r of rows.

    On a CPU half precision is summed and scaled in fp32.
    """
    rank, P = rank_and_size(group)
    total = rows[rank] if out is None else out
    if P > 1 and rows.is_cuda:
        # its name from torch 2.13 on, and before
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        work = reduce_scatter(total, rows.view(-1), group=group, async_op=True)
        return lambda: (work.wait(), total.mul_(scale))[1]
    terms, works = [rows[rank]] * P, []
    for k in range(1, P):
        to, source = (rank + k) % P, (rank - k) % P
        # one arrives where the sum will be, the others need memory
        terms[source] = out if k == 1 and out is not None else empty(rows[0].shape, rows.dtype, rows.device)
        works += [dist.isend(rows[to], global_rank(group, to), group, tag),
                  dist.irecv(terms[source], global_rank(group, source), group, tag)]

    def wait() -> Tensor:
        for work in works:
            work.wait()
        # in pieces that stay in the cache
        for piece_of_total, *pieces in zip(total.split(2**15), *(term.split(2**15) for term in terms)):
            wide = pieces[0].to(torch.promote_types(rows.dtype, torch.float32), copy=True)
            for piece in pieces[1:]:
                wide += piece
            torch.mul(wide, scale, out=piece_of_total)
            del wide
        return total  # (C,)

    return wait


# --- 2. a flat ------------------------------------------------------------------------------------------

class Flat:
    """Parameters of one dtype and device, end to end.

    Args:
        parts, own: P chunks, of which this is the rank's; 1, 0: not cut, everyone has all of it.
        group, tag: of its messages. scale: of the gradients' sum over ranks.
        rooms: memory for ``whole_gradient`` that nobody uses now, shared by the flats of a model: fresh memory costs.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], parts: int, own: int, dtype: torch.dtype,
                 device: torch.device, group: dist.ProcessGroup | None = None, scale: float = 1.0,
                 rooms: list[Tensor] | None = None):
        self.names, self.parameters = [name for name, _ in named], [p for _, p in named]
        ends = list(itertools.accumulate(p.numel() for p in self.parameters))
        self.C, self.parts, self.own, self.dtype, self.device = -(-ends[-1] // parts), parts, own, dtype, device
        self.group, self.tag, self.scale, self.rooms = group, 0, scale, [] if rooms is None else rooms
        self.first = {p: end - p.numel() for p, end in zip(self.parameters, ends)}  # where in the flat it begins
        self.trained = self.parameters[0].requires_grad
        # What ZeRO gives it: chunk (C,), the own part of the parameters; master (C,), the same as the optimizer has it;
        # gradient (C,), the own part of the sum. These come and go:
        self.whole: Tensor | None = None  # (parts, C), the parameters
        self.whole_gradient: Tensor | None = None  # (parts, C), this rank's, the head of
        self.room: Tensor | None = None
        self.room_size = 0  # of a new one, in numbers, at least: so that the other flats fit in, too
        self.arriving: Callable | None = None  # waits for ``whole``
        self.missing: set[nn.Parameter] = set()  # whose gradient is not in ``whole_gradient`` yet
        self.held: set[nn.Parameter] = set()  # whose gradient is
        self.filled = False  # whether ``gradient`` has anything of this step

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

    def start_all_gather(self) -> Callable[[], None]:
        """Send for the other rows of ``whole``; returns what waits for them."""
        return start_all_gather(self.whole, self.group, self.tag)

    def take_gradient(self, p: nn.Parameter) -> None:
        """Move p.grad, zeros where there is none, into ``whole_gradient``."""
        if self.whole_gradient is None:
            size, kind, self.room = self.parts * self.C, self.gradient.dtype, self.rooms.pop() if self.rooms else None
            if self.room is None or (self.room.dtype, self.room.device) != (kind, self.device) or len(self.room) < size:
                self.room = empty((max(size, self.room_size),), kind, self.device)
            self.whole_gradient = self.room[:size].view(self.parts, self.C)
        view = self.view(p, self.whole_gradient)
        if p.grad is not None:
            gradient = p.grad.to(view.dtype)
            scale = self.scale if self.parts == 1 else 1.0  # in the same pass; chunks are scaled as they are summed
            view.add_(gradient, alpha=scale) if p in self.held else torch.mul(gradient, scale, out=view)
            self.held.add(p)
            p.grad = None
        elif p not in self.held:
            view.zero_()

    def start_reduce(self, out: Tensor | None = None) -> Callable[[], Tensor]:
        """Sum ``whole_gradient`` over ranks; returns what waits and gives the own chunk, (C,): in ``out`` if that is
        given and the flat is cut, else in its own memory."""
        whole = self.whole_gradient
        if self.parts > 1:
            return start_reduce_scatter(whole, self.group, self.tag + 1, self.scale, out)
        work = dist.all_reduce(whole, group=self.group, async_op=True) if rank_and_size(self.group)[1] > 1 else None
        return lambda: (work and work.wait(), whole[0])[1]


def make_flats(model: nn.Module, named: list[tuple[str, nn.Parameter]], modules: Iterable[nn.Module],
               limit: float | None, dtype: torch.dtype | None, make: Callable) -> list[list[Flat]]:
    """Which parameters lie in which flat: one dtype and device, trained or frozen, in each.

    Without ``limit``: units, the first what no module has alone, then one of each module, of a flat for each kind. With
    it: pieces of up to ``limit`` bytes, from the last parameter to the first, as backward makes their gradients.
    ``dtype``: that of the parameters in use, None for their own. ``make(named, dtype, device)`` makes a flat.
    """
    modules = list(modules)
    if not set(modules) <= set(model.modules()):
        raise ValueError("units must be modules of the model")
    users = {p: set() for _, p in named}  # the units that it is in, 0 for the rest
    inside = {module: i for i, unit in enumerate(modules, 1) for module in unit.modules()}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                users[p].add(inside.get(module, 0))
    members: dict = {}  # (unit, dtype, device, trained) -> named parameters
    units = [[] for _ in range(len(modules) + 1)]

    def close(key) -> None:
        units[key[0]].append(make(members.pop(key), key[1], key[2]))
    for name, p in named if limit is None else reversed(named):
        key = next(iter(users[p])) if len(users[p]) == 1 else 0, dtype or p.dtype, p.device, p.requires_grad
        size = sum(q.numel() for _, q in [*members.get(key, ()), (name, p)]) * key[1].itemsize
        if limit is not None and key in members and size > limit:
            close(key)
        members.setdefault(key, []).append((name, p))
    for key in list(members):
        close(key)
    return units if limit is None else [[flat] for flat in units[0]]


# --- 3. the same on every rank -----------------------------------------------------------------------

def agree(what: str, lines: list[str], group: dist.ProcessGroup | None = None) -> None:
    """Raises ValueError on all ranks, with the first lines that differ, unless all have the same."""
    P = rank_and_size(group)[1]
    digests, everyone = [None] * P, [None] * P
    dist.all_gather_object(digests, hashlib.sha256(repr(lines).encode()).hexdigest(), group=group)
    if len(set(digests)) > 1:
        dist.all_gather_object(everyone, lines, group=group)
        rank = next(r for r in range(P) if everyone[r] != everyone[0])
        pairs = itertools.zip_longest(everyone[0], everyone[rank], fillvalue="nothing")
        first, other = next((a, b) for a, b in pairs if a != b)
        raise ValueError(f"{what}: rank 0 of the group has [{first}], rank {rank} has [{other}]")


@torch.no_grad()
def start_equal(model: nn.Module, settings: str, copy: bool, group: dist.ProcessGroup | None = None) -> None:
    """Refuse models that would send different things (and hang), then copy the first rank's values."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    agree("ranks differ", [settings] + [f"{name} {tuple(t.shape)} {t.dtype} {t.requires_grad=}" for name, t in tensors],
          group)
    for _, t in tensors if copy else ():
        whole = t.detach().contiguous()
        dist.broadcast(whole, global_rank(group, 0), group=group)
        t.copy_(whole)


# --- 4. demo ----------------------------------------------------------------------------------------

def main() -> None:
    from gpt import GPT, GPTConfig
    P, model = 3, GPT(GPTConfig(vocab_size=32, context=8, n_layers=2, n_heads=2, d_model=10))
    named, count = list(model.named_parameters()), {}
    print(f"{sum(p.numel() for _, p in named):,} parameters on {P} ranks, in pieces of up to 4 KiB\n"
          "piece         n       C   padding   rank 0 owns, elements of")
    ranks = [make_flats(model, named, (), 2**12, None, lambda part, dtype, device, r=r: Flat(part, P, r, dtype, device))
             for r in range(P)]
    for i, [flat] in enumerate(ranks[0]):
        n, parts = sum(p.numel() for p in flat.parameters), []
        for name, p in zip(flat.names, flat.parameters):
            start, stop, _ = flat.owned(p)
            parts += [f"{name} {start}:{stop}"] if stop > start else []
        print(f"{i:5} {n:9} {flat.C:7} {P * flat.C - n:9}   {parts[0]}" + (" ... " + parts[-1] if parts[1:] else ""))
    for units in ranks:
        for [flat] in units:
            for name, p in zip(flat.names, flat.parameters):
                start, stop, _ = flat.owned(p)
                count.setdefault(name, torch.zeros(p.numel(), dtype=torch.long))[start:stop] += 1
    once = len(count) == len(named) and all((owners == 1).all() for owners in count.values())
    print(f"every number has one owner: {'OK' if once else 'WRONG, expected just one'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.parse_args()
    try:
        main()
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
