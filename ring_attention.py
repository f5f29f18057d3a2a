"""Ring attention: a sequence longer than one rank can hold, cut over the ranks (context parallelism).

Idea      Every rank keeps the queries, keys and values of its part of the text. Keys and values go round the ring: in
          each of P rounds a rank attends to the part that is with it, while that part already travels on. Partial
          results are merged exactly by their log-sum-exps, so no rank ever sees all keys at once.
Formula   o = sum_i w_i o_i,  w_i = exp(lse_i - lse),  lse = log sum_i exp(lse_i)          over the P parts of the keys
          backward: with the lse and o of ALL keys, p = exp(s - lse) is right in every part by itself, so the gradients
          of a part of the keys are sums over the queries of the ranks it visits, and travel with it.
                                                                                    Liu et al. 2023 (2310.01889)
Shapes    q (B, H, T/P, Dh), k and v (B, Hkv, T/P, Dh) on each rank -> (B, H, T/P, Dh)
          a rank sends (P-1) 2 B Hkv T/P Dh numbers forward, about twice that backward
Omits     attention between texts of different length (q and k of one sequence here), windows, dropout of attention.
Run       python ring_attention.py                                                 2 processes on the CPU, 10 s
          torchrun --standalone --nproc_per_node=2 ring_attention.py --length 512    on processes that torchrun starts
          Ends with "max |ring - one process| = ..."
Test      pytest tests/test_ring_attention.py
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

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


# --- 1. who has which part ----------------------------------------------------------------------------
#
# Causal attention is a triangle: if rank r had the r-th part of the text, the last rank would have most of the work. So
# the text is cut into 2P chunks, and rank r has an early and a late one: r and 2P-1-r (zigzag). P = 3: 0 5 | 1 4 | 2 3.
# Then each round costs every rank the same. With the keys of rank s there are three cases:
#
#   s = r     both have the same positions: plain causal attention                     half of a square
#   s < r     all queries are later than s's early chunk, earlier than its late one:    all queries x half of the keys
#   s > r     only the late queries are later than both chunks of s:                    half of the queries x all keys

def zigzag(x: Tensor, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's part of x, which every rank has: (..., T, ...) -> (..., T/P, ...), chunks r and 2P-1-r of 2P.

    Raises ValueError if 2P does not divide T.
    """
    rank, P = rank_and_size(group)
    if x.size(dim) % (2 * P):
        raise ValueError(f"{P} ranks cut a text into {2 * P} chunks, which do not divide its length {x.size(dim)}: "
                         f"want a multiple of {2 * P}")
    chunks = x.chunk(2 * P, dim)
    return torch.cat((chunks[rank], chunks[2 * P - 1 - rank]), dim)


@torch.no_grad()
def gather_zigzag(x: Tensor, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """The inverse, from every rank's part: (..., T/P, ...) -> (..., T, ...), on every rank; no gradient."""
    _, P = rank_and_size(group)
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(P)]
    dist.all_gather(parts, x.contiguous(), group=group)
    early, late = zip(*(part.chunk(2, dim) for part in parts))
    return torch.cat((*early, *reversed(late)), dim)


# --- 2. attention to one part of the keys ---------------------------------------------------------------

def block_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """(o, lse) of these queries on these keys, as the formula reads; lse (B, H, T) in fp32 or finer.

    A faster one with the same result, such as flash_attn's, is handed to ``ring_attention``.
    """
    s = _scores(q, k, is_causal)  # (B, Hkv, G, T, S)
    lse = torch.logsumexp(s, -1)  # (B, Hkv, G, T)
    o = torch.exp(s - lse[..., None]) @ v[:, :, None].to(s.dtype)  # (B, Hkv, G, T, Dh)
    return o.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def block_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, is_causal: bool
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v through these keys; out and lse are those of the queries on ALL keys.

    p = exp(s - lse), dv = p^T do, ds = p (do v^T - sum(do o)), dq = ds k, dk = ds^T q.   Dao et al. 2022, appendix B
    """
    s = _scores(q, k, is_causal)  # (B, Hkv, G, T, S)
    grad, out, lse, q = (x.unflatten(1, (k.size(1), -1)).to(s.dtype) for x in (grad, out, lse, q))  # (B, Hkv, G, T, ..)
    k, v = k[:, :, None].to(s.dtype), v[:, :, None].to(s.dtype)  # (B, Hkv, 1, S, Dh)
    p = torch.exp(s - lse[..., None])
    dv = (p.mT @ grad).sum(2)  # (B, Hkv, S, Dh)
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) / math.sqrt(q.size(-1))
    return (ds @ k).flatten(1, 2), (ds.mT @ q).sum(2), dv


def _scores(q: Tensor, k: Tensor, is_causal: bool) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = q.unflatten(1, (k.size(1), -1)).to(dtype)  # (B, Hkv, G, T, Dh)
    s = q @ k[:, :, None].to(dtype).mT / math.sqrt(q.size(-1))  # (B, Hkv, G, T, S)
    if is_causal:
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).triu(1), -math.inf)
    return s


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys, from the results on each: (o, lse) twice -> (o, lse) on both together. Exact.

    o (..., Dh), lse (...). This is all that ring attention and split-KV decoding need to know.
    """
    if o1.shape != o2.shape or lse1.shape != lse2.shape or o1.shape[:-1] != lse1.shape:
        raise ValueError("merge needs two outputs (..., Dh) and two log-sum-exps (...), got "
                         f"{tuple(o1.shape)}, {tuple(lse1.shape)} and {tuple(o2.shape)}, {tuple(lse2.shape)}")
    m = torch.maximum(lse1, lse2).detach()
    m = m.masked_fill(m == -math.inf, 0)  # both saw nothing: weights 0, not e^(inf - inf)
    w1, w2 = torch.exp(lse1 - m), torch.exp(lse2 - m)
    nothing = (w1 + w2) == 0
    total = (w1 + w2).masked_fill(nothing, 1)
    o = (o1 * (w1 / total)[..., None] + o2 * (w2 / total)[..., None]).to(o1.dtype)
    return o, (m + torch.log(total)).masked_fill(nothing, -math.inf)


# --- 3. the ring ----------------------------------------------------------------------------------------

class _Travel:
    """A tensor on its way to rank r+1, and what comes from rank r-1 in its place."""

    def __init__(self, x: Tensor, group: dist.ProcessGroup | None, what: str):
        rank, P = rank_and_size(group)
        self.name = (f"ring attention, rank {rank} of {P}: {what} to rank {(rank + 1) % P} "
                     f"and from rank {(rank - 1) % P}")
        self.outgoing, self.incoming = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        with self._naming():
            self.works = dist.batch_isend_irecv([
                dist.P2POp(dist.isend, self.outgoing, global_rank(group, (rank + 1) % P), group),
                dist.P2POp(dist.irecv, self.incoming, global_rank(group, (rank - 1) % P), group)])

    def wait(self) -> Tensor:
        with self._naming():
            for work in self.works:
                work.wait()
        return self.incoming

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(f"{self.name} did not get through, another rank died or hangs: {error}") from None


def _parts(rank: int, source: int, T: int, is_causal: bool) -> tuple[slice, slice, bool]:
    """Which of this rank's queries see which of the source's keys, and whether up to the diagonal only."""
    everything = slice(None)
    if not is_causal or source == rank:
        return everything, everything, is_causal
    return (everything, slice(0, T // 2), False) if source < rank else (slice(T // 2, None), everything, False)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, is_causal, group, forward, backward):
        rank, P = rank_and_size(group)
        T, here = q.size(2), torch.stack((k, v))  # (2, B, Hkv, T, Dh)
        for i in range(P):
            travel = _Travel(here, group, "keys and values") if i < P - 1 else None  # while this part is attended to
            queries, keys, causal = _parts(rank, (rank - i) % P, T, is_causal)
            o, lse = forward(q[:, :, queries], *here[..., keys, :], causal)
            if i == 0:  # in fp32 or finer: it is merged P - 1 times
                out, total = o.to(lse.dtype), lse
            elif queries == slice(None):
                out, total = merge(out, total, o.to(lse.dtype), lse)
            else:
                late, lse = merge(out[:, :, queries], total[:, :, queries], o.to(lse.dtype), lse)
                out, total = torch.cat((out[:, :, :T // 2], late), 2), torch.cat((total[:, :, :T // 2], lse), 2)
            if travel:
                here = travel.wait()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, total)
        ctx.rest = is_causal, group, backward
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        is_causal, group, backward = ctx.rest
        rank, P = rank_and_size(group)
        T, here, back = q.size(2), torch.stack((k, v)), None  # back: the gradients that travel with ``here``
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        for i in range(P):
            travel = _Travel(here, group, "keys and values") if i < P - 1 else None
            queries, keys, causal = _parts(rank, (rank - i) % P, T, is_causal)
            rows = (x[:, :, queries] for x in (grad, q, out, lse))
            do, mine, o, total = (x.contiguous() for x in rows)
            dq_part, *dkv_part = backward(do, mine, *here[..., keys, :], o, total, causal)
            dq[:, :, queries] += dq_part
            dkv = torch.zeros(here.shape, dtype=lse.dtype, device=q.device) if back is None else back.wait()
            dkv[..., keys, :] += torch.stack(dkv_part)
            # Also after the last round: the gradients of a part end where the part began.
            back = _Travel(dkv, group, "gradients of keys and values") if P > 1 else None
            if travel:
                here = travel.wait()
        dk, dv = back.wait() if P > 1 else dkv
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def ring_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True, group: dist.ProcessGroup | None = None,
                   forward: Callable = block_forward, backward: Callable = block_backward) -> Tensor:
    """Attention of a sequence whose parts are on the ranks of a group; exact, with gradients; every rank calls it.

    Args:
        q: (B, H, T/P, Dh), this rank's queries; k, v: (B, Hkv, T/P, Dh). Causal: the parts are those of ``zigzag``.
        forward, backward: attention to a part of the keys, as ``block_forward`` and ``block_backward``.

    Returns:
        (B, H, T/P, Dh), for this rank's queries.
    Raises:
        ValueError: for shapes that do not fit each other.
    """
    fits = q.dim() == k.dim() == 4 and q.size(0) == k.size(0) and q.shape[2:] == k.shape[2:] and k.shape == v.shape
    if not fits or q.size(1) % k.size(1):
        raise ValueError("ring attention needs q (B, H, T, Dh) and k, v (B, Hkv, T, Dh), Hkv dividing H, got "
                         f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}")
    if is_causal and q.size(2) % 2:
        raise ValueError("a rank's part has an early and a late half (zigzag): want an even number of positions, got "
                         f"{q.size(2)}")
    return _RingAttention.apply(q, k, v, is_causal, group, forward, backward)


def context_parallel(model: nn.Module, group: dist.ProcessGroup | None = None, forward: Callable = block_forward,
                     backward: Callable = block_backward) -> nn.Module:
    """Make a model of the contract work on this rank's part of every text, in place; returns it.

    ``model(tokens)`` still gets whole texts (B, T); it gives the logits of ``zigzag(tokens, 1, group)``, (B, T/P, V):
    take the same part of the targets. A rank's gradients are those of its part's losses: sum them over the group, as
    over data-parallel ranks (``DataParallel(model, group, reduction="sum")``). No caches: decoding is another matter.
    """
    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True) -> Tensor:
        return ring_attention(q, k, v, is_causal, group, forward, backward)

    model.blocks[0].register_forward_pre_hook(lambda block, inputs: (zigzag(inputs[0], 1, group), *inputs[1:]))
    for block in model.blocks:
        block.attention.attention = attend
        if hasattr(block.attention, "rotations"):  # RoPE: the positions of this rank's part
            block.attention.rotations = _ZigzagRotations(block.attention.rotations, group)
    return model


class _ZigzagRotations:
    """Rotations of a rank's positions, out of those of the whole text."""

    def __init__(self, rotations: Callable, group: dist.ProcessGroup | None):
        self.rotations, self.group = rotations, group

    def __call__(self, start: int, T: int, device: torch.device) -> Tensor:
        return zigzag(self.rotations(start, T * rank_and_size(self.group)[1], device), 0, self.group)


# --- 4. demo --------------------------------------------------------------------------------------------

def _demo(rank: int, P: int, options: argparse.Namespace, rendezvous: str) -> None:
    """What every rank runs; rank 0 prints."""
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=P)
    torch.set_num_threads(1)
    say = print if rank == 0 else lambda *words: None
    generator = torch.Generator().manual_seed(options.seed)
    T = options.length
    q, grad = (torch.randn(1, 4, T, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(1, 2, T, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    error, sent, exchange = torch.zeros((), dtype=torch.float64), [], dist.batch_isend_irecv
    for is_causal in (True, False):
        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=is_causal, enable_gqa=True)
        expected.backward(grad)
        mine = [zigzag(x, 2).requires_grad_() for x in (q, k, v)]
        dist.batch_isend_irecv = lambda pair: sent.append(pair[0].tensor.nbytes) or exchange(pair)
        found = ring_attention(*mine, is_causal)
        forward = sum(sent)
        found.backward(zigzag(grad, 2))
        dist.batch_isend_irecv = exchange
        kv = 8 * 2 * k.numel() // P
        say(f"{'causal' if is_causal else 'not causal':10}  {P} ranks, {T} positions, {T // P} on each; bytes sent "
            f"forward {forward:,}, formula {(P - 1) * kv:,}; backward {sum(sent) - forward:,}, formula "
            f"{(2 * P - 1) * kv:,}")
        sent.clear()
        for ours, theirs in zip((found, *(x.grad for x in mine)), (expected, *(x.grad for x in whole))):
            error = torch.maximum(error, (ours - zigzag(theirs, 2)).abs().max())  # keeps NaN
    dist.all_reduce(error, dist.ReduceOp.MAX)
    say(f"max |ring - one process| = {error:.1e} over outputs and gradients: "
        + ("OK, below 1e-12" if error < 1e-12 else "WRONG, expected below 1e-12"))
    dist.destroy_process_group()


def main(options: argparse.Namespace) -> None:
    started_by_torchrun = "RANK" in os.environ
    P = int(os.environ["WORLD_SIZE"]) if started_by_torchrun else options.ranks
    if P < 1 or options.length < 1 or options.length % (2 * P) or not 0 <= options.seed < 2**32:
        raise ValueError("--ranks must be at least 1, --length a multiple of twice their number and --seed in "
                         f"0 .. 2^32 - 1, got {P}, {options.length} and {options.seed}")
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
    parser.add_argument("--length", type=int, default=768,
                        help="of the text, a multiple of 2 * ranks (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the data (default %(default)s)")
    try:
        main(parser.parse_args())
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
