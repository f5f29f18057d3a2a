"""Data parallelism: every rank holds the whole model and works on its own part of the batch.

Idea      The gradient of a mean over the batch is the mean of the gradients of its parts. So P ranks start
          from equal parameters, each runs backward on B/P of the samples, an all-reduce averages the
          gradients, and all take the same optimizer step: the parameters never part.
Formula   g = (1/P) sum_r g_r,  g_r the gradient of the mean loss over rank r's samples
          ring all-reduce of n bytes: each rank sends 2 (P-1)/P n bytes       (Patarasuk & Yuan 2009)
Shapes    n numbers -> P chunks of C = ceil(n/P); buckets are flat
Read      1, a ring's collectives, and 2, average_gradients, for the idea; 3, DataParallel, is what trains. 4 groups
          ranks for the other kinds of parallelism, in tensor_parallel.py, pipeline.py, moe.py, ring_attention.py.
Omits     trees (log P rounds, better for short messages), sparse gradients, buffers kept in step after the
          start (batch norm), compression.
Run       python parallel.py                                       2 processes on the CPU, 10 s
          torchrun --standalone --nproc_per_node=2 parallel.py     the same on processes that torchrun starts
          python parallel.py --communication                       what data, tensor, pipeline ... parallelism send
          Ends with "max |DP - one process| = ..."
Test      pytest tests/test_parallel.py
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import itertools
import math
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
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


# --- 1. the collectives, from send and receive ------------------------------------------------------
#
# The ranks form a ring; in a round every rank sends one chunk to rank r+1 and receives one from r-1.
#
#   reduce-scatter  round s = 0 .. P-2:  r sends its partial sum of chunk r-s-1, receives one of chunk r-s-2
#                   and adds its own part. Chunk c starts at rank c+1 and comes home to rank c complete.
#   all-gather      round s = 0 .. P-2:  r sends chunk r-s, which came the round before, and receives r-s-1.
#   all-reduce      the one, then the other.                                       (chunk numbers modulo P)
#
# Reduce-scatter with P = 3 and chunks a b c:
#   round 0   0 sends c_0     1 sends a_1     2 sends b_2
#   round 1   0 sends b_02    1 sends c_01    2 sends a_12     then 0 holds a_012, 1 b_012, 2 c_012

def _shift(outgoing: Tensor, incoming: Tensor, group: dist.ProcessGroup | None) -> None:
    """One round: send ``outgoing`` to rank r+1 while ``incoming`` is filled by rank r-1."""
    rank, P = rank_and_size(group)
    # Both directions at once: if every rank finished sending before it received, the ring would lock up.
    for work in dist.batch_isend_irecv([
            dist.P2POp(dist.isend, outgoing, global_rank(group, (rank + 1) % P), group),
            dist.P2POp(dist.irecv, incoming, global_rank(group, (rank - 1) % P), group)]):
        work.wait()


@torch.no_grad()
def ring_reduce_scatter(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Rank r's chunk of the sum over ranks. Each rank sends (P-1) C elements.

    tensor: n elements, the same shape on every rank; not changed. Returns (C,), C = ceil(n/P): elements
    r C .. (r+1) C - 1 of the flattened sum, zeros where that runs past n.
    """
    rank, P = rank_and_size(group)
    chunks = tensor.new_zeros(P, math.ceil(tensor.numel() / P))  # (P, C)
    chunks.view(-1)[:tensor.numel()] = tensor.reshape(-1)
    arriving = torch.empty_like(chunks[0])
    for s in range(P - 1):
        _shift(chunks[(rank - s - 1) % P], arriving, group)
        chunks[(rank - s - 2) % P] += arriving
    return chunks[rank].clone()  # (C,)


@torch.no_grad()
def ring_all_gather(shard: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """All shards, stacked: (...), of one shape on every rank -> (P, ...). Each rank sends P-1 shards."""
    rank, P = rank_and_size(group)
    shards = shard.new_empty(P, *shard.shape)  # (P, ...)
    shards[rank] = shard
    for s in range(P - 1):
        _shift(shards[(rank - s) % P], shards[(rank - s - 1) % P], group)
    return shards


def ring_all_reduce(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over ranks, bit for bit the same on each: (...) -> (...). Sends 2 (P-1) C elements."""
    total = ring_all_gather(ring_reduce_scatter(tensor, group), group)  # (P, C)
    return total.view(-1)[:tensor.numel()].view(tensor.shape)


# --- 2. data parallelism, as the formula reads -------------------------------------------------------

@torch.no_grad()
def average_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """After backward: p.grad <- (1/P) sum_r p.grad_r, one parameter after the other.

    A parameter unused on this rank contributes zeros; one that no rank used gets zeros, not None.
    """
    _, P = rank_and_size(group)
    for p in (p for p in model.parameters() if p.requires_grad):  # a tied parameter comes once
        total = torch.zeros_like(p, memory_format=torch.contiguous_format)
        if p.grad is not None:
            total.copy_(p.grad)  # gloo reads a strided tensor wrongly, and says nothing
        if P > 1:
            dist.all_reduce(total, group=group)
        p.grad = total.div_(P)


# --- 3. data parallelism, in buckets, while backward runs --------------------------------------------
#
# Many small all-reduces pay the latency many times, and leave the network idle during backward. So gradients
# are copied into flat buckets, filled from the last layer to the first as backward delivers them, and a full
# bucket travels while backward computes the next (Li et al. 2020, 2006.15704, section 3.2):
#
#   backward      layer 5 | layer 4 | layer 3 | layer 2 | layer 1 |
#   all-reduce            [ 5 ]               [ 4 and 3        ]  [ 2 and 1    ] finish() returns
#
# Collectives have no names: the k-th call on one rank meets the k-th on the others. So buckets start in one
# fixed order on every rank, and a full bucket waits for those before it.

class _Bucket:
    """A flat buffer: the gradients of some parameters, and behind them one flag for each, used or not."""

    def __init__(self, parameters: list[nn.Parameter], dtype: torch.dtype):
        sizes = [p.numel() for p in parameters]
        self.flat = torch.ones(sum(sizes) + len(sizes), dtype=dtype, device=parameters[0].device)
        *views, self.used = self.flat.split([*sizes, len(sizes)])
        self.parameters, self.views = parameters, [view.view(p.shape) for p, view in zip(parameters, views)]
        self.start_step()

    def start_step(self) -> None:
        """Nothing is packed or on its way, and every parameter counts as used until finish() misses it."""
        self.missing = set(range(len(self.parameters)))  # whose gradient of this step is not ready to be sent yet
        self.held: set[int] = set()  # with grad_dtype: those whose view has some of this step's gradient
        self.work: dist.Work | None = None
        self.used.fill_(1)


class DataParallel:
    """Keeps P copies of a model equal: ``loss.backward()``, ``dp.finish()``, ``optimizer.step()``, ``zero_grad()``.

    The model is not wrapped. At construction its parameters and buffers are copied from the group's first
    rank, and hooks are put on the parameters that require a gradient. After ``finish()``, p.grad is the reduced
    gradient, a view of its bucket, which the next step overwrites, or None if no rank used p. Before, it is on
    its way: neither read nor change it. A group of one sends nothing. Two instances on one group would take each
    other's messages: put several models into one nn.ModuleList. Accumulation:

        with dp.no_sync():
            for x, y in microbatches[:-1]:             # all but the last backward
                loss(model(x), y).backward()
        loss(model(x_last), y_last).backward()         # sends the accumulated gradients
        dp.finish()                                    # once per step on EVERY rank, one without samples too

    After an exception in backward that you survive (out of memory), call ``finish()`` all the same: the others
    wait for it. Every rank then has the same gradient, which lacks a part: all take the step, or all drop it.

    Args:
        model: the same on every rank.
        group: the ranks that see different data; None for all.
        bucket_mb: a bucket is full once it has so many times 2^20 bytes, or 0.7 of the model's if that is less,
            the first once it has 2^20. A parameter that is as large alone has a bucket of its own.
        reduction: "mean" over ranks, for losses that are means over equally many samples, or "sum", for
            losses already divided by the samples (tokens) of the whole batch: right for uneven parts.
        grad_dtype: accumulate and reduce in this dtype, e.g. fp32 for bf16 parameters. p.grad, which is of p's
            dtype, is None after backward, and ``gradient(p)`` has the result until the next backward.

    Raises:
        ValueError: on every rank, if models or settings differ between ranks; if no parameter requires a
            gradient, bucket_mb is not positive or reduction unknown.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None = None, bucket_mb: float = 25.0,
                 reduction: str = "mean", grad_dtype: torch.dtype | None = None):
        if reduction not in ("mean", "sum") or not bucket_mb > 0:
            raise ValueError('DataParallel needs reduction "mean" or "sum" and bucket_mb > 0, '
                             f"got {reduction!r} and {bucket_mb}")
        self.group, self.grad_dtype, (_, self.P) = group, grad_dtype, rank_and_size(group)
        self.scale = 1 / self.P if reduction == "mean" else 1.0
        trained = [p for p in model.parameters() if p.requires_grad]
        if self.P > 1:
            self._start_equal(model, f"{bucket_mb=} {reduction=} {grad_dtype=}")
        if not trained:
            raise ValueError(f"no parameter of {type(model).__name__} requires a gradient: nothing to train")
        self._sync, self._next, self._buckets = True, 0, []  # _next: the bucket whose turn it is
        self._reduced: dict[nn.Parameter, Tensor] = {}  # with grad_dtype: the results of the last step
        if self.P > 1 or grad_dtype is not None:
            self._make_buckets(trained, bucket_mb * 2**20)
        me = weakref.ref(self)  # hooks live as long as parameters do, and would keep all this alive with them

        def on_gradient(b: int, i: int, p: nn.Parameter) -> None:
            if (dp := me()) is not None:
                dp._on_gradient(dp._buckets[b], i)
        for b, bucket in enumerate(self._buckets):
            for i, p in enumerate(bucket.parameters):
                p.register_post_accumulate_grad_hook(functools.partial(on_gradient, b, i))

    @torch.no_grad()
    def _start_equal(self, model: nn.Module, settings: str) -> None:
        """Refuse models that would send different things (and hang), then copy the first rank's."""
        tensors = [*model.named_parameters(), *model.named_buffers()]
        lines = [settings] + [f"{name} {tuple(t.shape)} {t.dtype} {t.requires_grad=}" for name, t in tensors]
        digests, everyone = [None] * self.P, [None] * self.P
        dist.all_gather_object(digests, hashlib.sha256(repr(lines).encode()).hexdigest(), group=self.group)
        if len(set(digests)) > 1:
            dist.all_gather_object(everyone, lines, group=self.group)
            rank = next(r for r in range(self.P) if everyone[r] != everyone[0])
            pairs = itertools.zip_longest(everyone[0], everyone[rank], fillvalue="nothing")
            first, other = next((a, b) for a, b in pairs if a != b)
            raise ValueError(f"ranks differ: rank 0 of the group has [{first}], rank {rank} has [{other}]")
        for _, t in tensors:
            whole = t.detach().contiguous()
            dist.broadcast(whole, global_rank(self.group, 0), group=self.group)
            t.copy_(whole)

    def _make_buckets(self, parameters: list[nn.Parameter], limit: float) -> None:
        """Buckets of one dtype and device each, from the last parameter to the first; full at ``limit`` bytes."""
        def size(p: nn.Parameter) -> int:
            return p.numel() * (self.grad_dtype or p.dtype).itemsize
        # A few large messages hinder backward least. But nothing is left to compute while the last one travels: so
        # in a small model, too, that is not all of it. The first is small, as until then the network has no work.
        limit = min(limit, max(2**20, 0.7 * sum(map(size, parameters))))
        filling = {}  # (dtype, device) -> parameters

        def close(key: tuple) -> None:
            self._buckets.append(_Bucket(filling.pop(key), key[0]))
        for p in reversed(parameters):
            key = (self.grad_dtype or p.dtype, p.device)
            if key in filling and size(p) >= limit:
                close(key)  # what is ready does not wait for the gradient of a large embedding
            filling.setdefault(key, []).append(p)
            if sum(map(size, filling[key])) >= (limit if self._buckets else min(limit, 2**20)):
                close(key)
        for key in list(filling):
            close(key)

    def _on_gradient(self, bucket: _Bucket, i: int) -> None:
        """Called by autograd as soon as the gradient of the bucket's i-th is complete for this backward."""
        if i not in bucket.missing:
            raise RuntimeError("this step's gradient was already sent: call finish() after the last "
                               "backward() of a step, and run those before it under no_sync()")
        if self.grad_dtype is not None:
            p, view = bucket.parameters[i], bucket.views[i]
            view.add_(p.grad.detach()) if i in bucket.held else view.copy_(p.grad.detach())
            bucket.held.add(i)
            p.grad = None
        if self._sync:
            self._pack(bucket, i)
            if not bucket.missing:
                self._start_full_buckets()

    def _pack(self, bucket: _Bucket, i: int) -> None:
        """Put its i-th's gradient, scaled, into the bucket, whose sum over ranks then is the result."""
        p, view = bucket.parameters[i], bucket.views[i]
        grad = p.grad
        if i in bucket.held or grad is view:  # accumulated there; autograd does so if zero_grad left the last result
            view.mul_(self.scale)
        elif grad is not None:
            torch.mul(grad.detach(), self.scale, out=view)  # copied and scaled in one pass
            p.grad = view
        else:
            view.zero_()
            bucket.used[i] = 0
        bucket.missing.remove(i)

    def _start_full_buckets(self) -> None:
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            if self.P > 1:
                bucket = self._buckets[self._next]
                bucket.work = dist.all_reduce(bucket.flat, group=self.group, async_op=True)
            self._next += 1

    @torch.no_grad()
    def finish(self) -> None:
        """After the step's last backward: send what that has not, wait, and leave the reduced gradients.

        Raises:
            RuntimeError: from torch.distributed, if another rank died or is later than the group's time-out.
        """
        absent = []  # of each bucket, those that this rank did not use
        for bucket in self._buckets:
            absent.append({i for i in bucket.missing - bucket.held if bucket.parameters[i].grad is None})
            for i in list(bucket.missing):
                self._pack(bucket, i)
        self._start_full_buckets()
        self._reduced = {}
        for bucket, mine in zip(self._buckets, absent):
            if bucket.work is not None:
                bucket.work.wait()
            for i, (p, view) in enumerate(zip(bucket.parameters, bucket.views)):
                # Flags add up to the number of ranks that used p. One that did need not look: the CPU waits for a GPU.
                if i in mine and not bucket.used[i].item():
                    continue
                if self.grad_dtype is not None:
                    self._reduced[p] = view
                else:
                    p.grad = view
            bucket.start_step()
        self._next = 0

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of the backward() calls inside are accumulated on this rank and not sent."""
        before, self._sync = self._sync, False
        try:
            yield
        finally:
            self._sync = before

    def gradient(self, p: nn.Parameter) -> Tensor | None:
        """p's reduced gradient after ``finish()``, in grad_dtype if that was given; None if no rank used p."""
        return p.grad if self.grad_dtype is None else self._reduced.get(p)


# --- 4. meshes: several kinds of parallelism at once ------------------------------------------------
#
# World = pp x dp x ep x cp x tp ranks, numbered with tp fastest: neighbours, on the fastest links, talk most.
# A rank belongs to one group along each axis. dp, ep and cp all see different tokens: the gradients of what
# every one of them holds are summed over the three together ("data"); an expert lives on one ep rank, and its
# gradient is summed over dp and cp alone ("replicas").
#
#   mesh(dp=2, tp=2, pp=2):   rank 0 1 2 3 | 4 5 6 7     tp {01} {23} {45} {67}   dp {02} {13} {46} {57}
#                             stage 0      | stage 1     pp {04} {15} {26} {37}

AXES = ("pp", "dp", "ep", "cp", "tp")


@dataclass
class Mesh:
    """This process's group along each axis, as ``mesh`` makes them; a group of one where an axis is not used."""
    pp: dist.ProcessGroup
    dp: dist.ProcessGroup
    ep: dist.ProcessGroup
    cp: dist.ProcessGroup
    tp: dist.ProcessGroup
    data: dist.ProcessGroup  # dp, ep and cp together
    replicas: dist.ProcessGroup  # dp and cp together
    back: dist.ProcessGroup  # the ranks of pp once more, for a pipeline's gradients


def mesh(dp: int | None = None, tp: int = 1, pp: int = 1, cp: int = 1, ep: int = 1,
         timeout: timedelta | None = None) -> Mesh:
    """Every group of a layout, from the world size; every process calls it. ``dp`` None: what the others leave.

    ``timeout``: after which a silent process counts as lost; None: torch's own, 10 to 30 minutes.

    Raises ValueError if the product is not the number of processes, saying it.
    """
    _, world = rank_and_size()
    rest = tp * pp * cp * ep
    if min(rest, tp, pp, cp, ep, 1 if dp is None else dp) < 1 or (world % rest if dp is None else dp * rest != world):
        raise ValueError(f"dp * tp * pp * cp * ep = {'dp' if dp is None else dp} * {tp} * {pp} * {cp} * {ep} = "
                         f"{f'a multiple of {rest}' if dp is None else dp * rest} does not fit {world} processes: "
                         "make the product their number")
    sizes = dict(zip(AXES, (pp, world // rest if dp is None else dp, ep, cp, tp)))
    ranks = torch.arange(world).view(*sizes.values())  # (pp, dp, ep, cp, tp)
    groups: dict[tuple, dist.ProcessGroup] = {}

    def along(*axes: str, again: bool = False) -> dist.ProcessGroup:
        last = [AXES.index(axis) for axis in axes]
        lines = ranks.permute(*(i for i in range(5) if i not in last), *last).flatten(5 - len(last))
        mine = None
        for line in lines.reshape(-1, lines.size(-1)).tolist():
            if again or tuple(line) not in groups:  # every process makes every group, in the same order
                groups[(*line, "again") if again else tuple(line)] = dist.new_group(line, timeout=timeout)
            if dist.get_rank() in line:
                mine = groups[(*line, "again") if again else tuple(line)]
        return mine

    return Mesh(*(along(axis) for axis in AXES), along("dp", "ep", "cp"), along("dp", "cp"), along("pp", again=True))


# --- 5. demo ----------------------------------------------------------------------------------------

def _train(model: nn.Module, options: argparse.Namespace, part: slice, reduce=lambda: None) -> Tensor:
    """Train the model on this rank's part of every batch; returns the losses (steps,)."""
    teacher = torch.randn(options.d_model, 10, generator=torch.Generator().manual_seed(options.seed)).double()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in range(options.steps):
        generator = torch.Generator().manual_seed(options.seed + 1 + step)
        x = torch.randn(options.batch, options.d_model, generator=generator).double()[part]  # (B/P, D)
        loss = F.cross_entropy(model(x), (x @ teacher).argmax(-1))
        loss.backward()
        reduce()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def _demo(rank: int, P: int, options: argparse.Namespace, rendezvous: str) -> None:
    """What every rank runs; rank 0 prints."""
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=P)
    say = print if rank == 0 else lambda *words: None
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    one = nn.Sequential(nn.Linear(options.d_model, options.d_model), nn.GELU(), nn.Linear(options.d_model, 10))
    one.double()
    naive, bucketed = copy.deepcopy(one), copy.deepcopy(one)
    with torch.no_grad():
        bucketed[0].weight += rank  # DataParallel has to bring the ranks together
    dp = DataParallel(bucketed, bucket_mb=options.bucket_mb)
    n = sum(p.numel() for p in one.parameters())
    say(f"{P} ranks, {n:,} parameters in float64, batch {options.batch} = {P} x {options.batch // P}")

    part = slice(rank * options.batch // P, (rank + 1) * options.batch // P)
    losses_one = _train(one, options, slice(None))
    losses_naive = ring_all_reduce(_train(naive, options, part, lambda: average_gradients(naive))) / P
    losses_bucketed = ring_all_reduce(_train(bucketed, options, part, dp.finish)) / P
    say("step   one process   average_gradients   DataParallel   (expected first: about ln 10 = 2.303)")
    for step in sorted({0, options.steps // 2, options.steps - 1}):
        say(f"{step:4d} {losses_one[step]:13.6f} {losses_naive[step]:19.6f} {losses_bucketed[step]:14.6f}")

    sent, exchange = [], dist.batch_isend_irecv
    dist.batch_isend_irecv = lambda pair: sent.append(pair[0].tensor.nbytes) or exchange(pair)
    ring_all_reduce(torch.zeros(n, dtype=torch.float64))
    dist.batch_isend_irecv = exchange
    say(f"ring all-reduce of {8 * n:,} bytes: each rank sent {sum(sent):,} (expected 2 (P-1)/P n = "
        f"{2 * (P - 1) / P * 8 * n:,.0f}, rounded up to equal chunks)")
    error = max((a - b).abs().max().item() for model in (naive, bucketed)
                for a, b in zip(one.parameters(), model.parameters()))
    say(f"max |DP - one process| = {error:.1e} over all parameters after {options.steps} steps: "
        + ("OK, below 1e-10" if error < 1e-10 else "WRONG, expected below 1e-10"))
    dist.destroy_process_group()


def main(options: argparse.Namespace) -> None:
    if options.communication:
        import communication
        return communication.table(options.ranks, options.seed)
    started_by_torchrun = "RANK" in os.environ
    P = int(os.environ["WORLD_SIZE"]) if started_by_torchrun else options.ranks
    if min(P, options.steps, options.batch, options.d_model) < 1 or not options.bucket_mb > 0:
        raise ValueError("--ranks, --steps, --batch and --d_model must be at least 1 and --bucket_mb above 0, got "
                         f"{P}, {options.steps}, {options.batch}, {options.d_model} and {options.bucket_mb}")
    if options.batch % P:
        raise ValueError(f"--batch must be a multiple of the {P} ranks, got {options.batch}")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be in 0 .. 2^32 - 1, got {options.seed}")
    if started_by_torchrun:
        return _demo(int(os.environ["RANK"]), P, options, "env://")
    from processes import start_ranks
    with tempfile.TemporaryDirectory() as folder:  # the ranks meet through a file: no port to be taken
        start_ranks(_demo, (P, options, (Path(folder) / "ranks").as_uri()), P)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n"  # one line of all ranks, without usage
                                               if os.environ.get("RANK", "0") == "0" else None)
    parser.add_argument("--ranks", type=int, default=2,
                        help="processes to start, if not under torchrun (default %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64,
                        help="samples per step over all ranks (default %(default)s)")
    parser.add_argument("--d_model", type=int, default=256, help="width of the network (default %(default)s)")
    parser.add_argument("--bucket_mb", type=float, default=0.25,
                        help="bucket size in 2^20 bytes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and data (default %(default)s)")
    parser.add_argument("--communication", action="store_true", help="print what each kind sends, instead")
    try:
        main(parser.parse_args())
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
