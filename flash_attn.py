"""FlashAttention: exact attention without the T x S matrix.   Dao et al. 2022 (2205.14135); Dao 2023

Idea      Attention's time goes into moving its T x S matrix to memory (HBM) and back. A softmax can be
          computed block by block, if what was summed before is rescaled when a larger logit turns up. So
          a tile of queries meets one tile of keys at a time, in fast memory (SRAM), and only the output
          and one number per row are written; the backward pass computes the tiles again.
Formula   s_ij = scale q_i . k_j, the logits; for one query i:
          online:    m' = max(m, max_j s_j);   a = e^(m - m');   p_j = e^(s_j - m')
                     l' = a l + sum_j p_j;     o' = a o + sum_j p_j v_j     for one tile of keys after another
                     (m = 0 and a = 1 throughout, where no |s_ij| can be large: see _are_moderate)
          then       out = o / l,   lse = m + log l  (log-sum-exp),   p_j = e^(s_j - lse)
          backward:  dv_j = sum_i p_ij do_i;        ds_ij = p_ij (do_i . v_j - do_i . out_i)
                     dq_i = scale sum_j ds_ij k_j;  dk_j = scale sum_i ds_ij q_i
Shapes    q (B, H, T, Dh), k and v (B, Hkv, S, Dh), Hkv | H -> out (B, H, T, Dh), lse (B, H, T). The queries are
          the LAST T of the S positions.
Read      sections 1 to 3 beside Dao 2023: the matrices, the online softmax, the algorithm for one head. Section 4
          is the algorithm that runs: all heads, all options, every type, and what makes it fast; 5 is its front.
Also      torch's own fused kernels, if attention_kernels.py is in the same folder, and through it the CUDA kernel
          of flash_attn_cuda.py. Without it this file computes everything itself, in tiles. attention_traffic.py
          counts what the tiles save, and is the demo.
Omits     sequences of different lengths in one flat tensor (give `ids`), block-sparse patterns, fp8.
Run       python flash_attn.py                         memory and time against length, half a minute
          python flash_attn.py --plot attention.png    the same as a picture
          Ends with "counted = formula: True; ..."
Test      pytest tests/test_flash_attn.py
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


# --- 1. what attention computes -------------------------------------------------------------

@dataclass
class Options:
    """All that changes attention, applied in this order: scale, soft cap, bias, mask, softmax, dropout."""
    is_causal: bool = True  # query t, at position S - T + t, sees no key after its position
    window: int | None = None  # and only keys less than this far from its position (on both sides, if not causal)
    ids: Tensor | None = None  # (B, S) number of the document of each position: nobody looks into another one
    bias: Tensor | None = None  # broadcastable to (B, H, T, S), added to the logits; -inf hides; differentiable
    soft_cap: float | None = None  # logits x become cap * tanh(x / cap), as in Gemma 2
    dropout: float = 0.0  # share of attention weights set to zero
    seed: int = 0  # of dropout: the same seed drops the same weights, so give another one in every call
    scale: float | None = None  # None: 1 / sqrt(Dh)

    @property
    def plain(self) -> bool:
        """Whether fused kernels know all that is asked for."""
        nothing = self.window is self.ids is self.bias is self.soft_cap is None and not self.dropout
        return nothing and (self.scale is None or self.scale > 0)


def visible(options: Options, T: int, S: int, rows: range, columns: range, device) -> Tensor | None:
    """Which of these queries see which of these keys, (B or 1, len(rows), len(columns)); None: all see all."""
    first, last, window = S - T + rows.start, S - T + rows.stop - 1, options.window or S + T
    after = 1 if options.is_causal else window  # keys so far after a query, or farther, are hidden
    inside = columns.stop - 1 < first + after and columns.start > last - window
    if inside and options.ids is None:
        return None
    position = torch.arange(first, last + 1, device=device)[:, None]  # (rows, 1)
    key = torch.arange(columns.start, columns.stop, device=device)  # (columns,)
    mask = (key < position + after)[None]  # (1, rows, columns)
    if options.window is not None:
        mask = mask & (key > position - window)
    if options.ids is not None:
        mask = mask & (options.ids[:, first:last + 1, None] == options.ids[:, None, columns.start:columns.stop])
    return mask


def dropout_factor(options: Options, heads: Tensor, T: int, S: int, rows: range, columns: range) -> Tensor:
    """0 where a weight is dropped, else 1 / (1 - dropout); heads (n,), numbered b H + h -> (n, rows, columns).

    A weight's fate is a hash of its place (splitmix64, Steele et al. 2014), so any tile of the mask can be made
    again, in any order, without being kept.
    """
    t, s = (torch.arange(r.start, r.stop, device=heads.device) for r in (rows, columns))
    start = (options.seed * 0xd1342543de82ef95 + 2**63) % 2**64 - 2**63  # any integer, spread over all of int64
    z = (heads[:, None, None] * T + t[:, None]) * S + s + start  # (n, rows, columns)
    # The published factors, as signed integers.
    for shift, factor in ((0, -0x61c8864680b583eb), (30, -0x40a7b892e31b1a47), (27, -0x6b2fb644ecceee15)):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1 if shift else 0)) * factor  # >> copies the sign: cut it off
    uniform = (z >> 40 & 0xffffff).float() / 2**24  # [0, 1)
    return (uniform >= options.dropout) / (1 - options.dropout)


def naive_attention_with_lse(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True, **options
                             ) -> tuple[Tensor, Tensor]:
    """out (B, H, T, Dh) and lse (B, H, T), with every matrix of the formula in sight. ``options``: see Options."""
    options = Options(is_causal, **options)
    (B, H, T, Dh), S, G = q.shape, k.size(2), q.size(1) // k.size(1)
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)  # (B, H, S, Dh)
    s = q @ k.mT * (Dh ** -0.5 if options.scale is None else options.scale)  # (B, H, T, S)
    if options.soft_cap:
        s = options.soft_cap * torch.tanh(s / options.soft_cap)
    if options.bias is not None:
        s = s + options.bias
    mask = visible(options, T, S, range(T), range(S), q.device)
    if mask is not None:
        s = s.masked_fill(~mask[:, None], float("-inf"))
    lse = torch.logsumexp(s, -1)  # (B, H, T)
    nothing = (lse == -math.inf)[..., None]  # queries that see nothing: zeros, without computing inf - inf
    p = torch.softmax(s.masked_fill(nothing, 0), -1).masked_fill(nothing, 0)
    if options.dropout:
        heads = torch.arange(B * H, device=q.device)
        p = p * dropout_factor(options, heads, T, S, range(T), range(S)).view_as(p).type_as(p)
    return p @ v, lse


# --- 2. the softmax, block by block ---------------------------------------------------------

def softmax_of_concatenation(x: Tensor, y: Tensor) -> Tensor:
    """softmax([x, y]) = [a softmax(x), (1 - a) softmax(y)], a = e^lse(x) / (e^lse(x) + e^lse(y)), on the last axis."""
    a = torch.sigmoid(torch.logsumexp(x, -1, keepdim=True) - torch.logsumexp(y, -1, keepdim=True))
    return torch.cat((a * torch.softmax(x, -1), (1 - a) * torch.softmax(y, -1)), -1)


def online_softmax(row: Tensor, block: int = 1) -> Tensor:
    """softmax of row (S,); its maximum and sum are found in one pass.   Milakov & Gimelshein 2018, algorithm 3"""
    m, l = row.new_tensor(-math.inf), row.new_zeros(())
    for x in row.split(block):
        larger = torch.maximum(m, x.max())
        l = l * torch.exp(m - larger) + torch.exp(x - larger).sum()
        m = larger
    return torch.exp(row - m) / l


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


# --- 3. the algorithm, for one head -----------------------------------------------------------
#
# What section 4 does for all heads at once, with all options and fast.   Dao 2023 (2307.08691), algorithms 1 and 2,
# which leave out the scale and the mask, and call delta D, lse L, and shrink e^(m_old - m_new)

def textbook_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True, Br: int = 64, Bc: int = 64
                     ) -> tuple[Tensor, Tensor]:
    """out (T, Dh) and lse (T,) of q (T, Dh), k and v (S, Dh), T <= S, in tiles of Br queries and Bc keys."""
    if (not q.dim() == k.dim() == 2 or k.shape != v.shape or q.size(1) != k.size(1) or len(q) > len(k)
            or min(q.size(1), Br, Bc) < 1):
        raise ValueError("needs one head, q (T, Dh), k and v (S, Dh), T at most S, and tiles of at least 1, got "
                         f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} and {Br} x {Bc}")
    T, S, out, lse = len(q), len(k), torch.empty_like(q), q.new_empty(len(q))
    for i in range(0, T, Br):
        rows = slice(i, i + Br)  # this tile of queries and its results stay in fast memory ...
        o, l = torch.zeros_like(q[rows]), torch.zeros_like(q[rows, :1])
        m = torch.full_like(l, -math.inf)
        end = S - T + min(i + Br, T) if is_causal else S  # no query of this tile sees a later key
        for j in range(0, end, Bc):
            columns = slice(j, min(j + Bc, end))  # ... while the keys and values come by, a tile at a time
            s = textbook_logits(q, k, is_causal, rows, columns)  # (Br, Bc)
            larger = torch.maximum(m, s.amax(-1, keepdim=True))
            p, shrink = torch.exp(s - larger), torch.exp(m - larger)
            o = shrink * o + p @ v[columns]
            l = shrink * l + p.sum(-1, keepdim=True)
            m = larger
        out[rows], lse[rows] = o / l, (m + torch.log(l))[:, 0]  # all that is written
    return out, lse


def textbook_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                      is_causal: bool = True, Br: int = 64, Bc: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """dq (T, Dh), dk and dv (S, Dh) from grad_out (T, Dh) and what the forward pass took and gave: each tile of p is
    computed again, from lse, and not kept."""
    T, S, scale = len(q), len(k), q.size(1) ** -0.5
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (grad_out * out).sum(-1, keepdim=True)  # (T, 1): do_i . out_i = sum_j p_ij (do_i . v_j)
    for j in range(0, S, Bc):
        columns = slice(j, j + Bc)  # this tile of keys and values, and its dk and dv, stay in fast memory ...
        begin = max(0, j - (S - T)) // Br * Br if is_causal else 0  # no tile of queries before sees its keys
        for i in range(begin, T, Br):
            rows = slice(i, i + Br)  # ... while the queries come by
            p = torch.exp(textbook_logits(q, k, is_causal, rows, columns) - lse[rows, None])  # (Br, Bc)
            ds = p * (grad_out[rows] @ v[columns].T - delta[rows])
            dv[columns] += p.T @ grad_out[rows]
            dq[rows] += scale * ds @ k[columns]
            dk[columns] += scale * ds.T @ q[rows]
    return dq, dk, dv


def textbook_logits(q: Tensor, k: Tensor, is_causal: bool, rows: slice, columns: slice) -> Tensor:
    """A tile (Br, Bc) of scale q k^T, -inf where a key comes after its query: query t is at position S - T + t."""
    T, S = len(q), len(k)
    s = q[rows] @ k[columns].T * q.size(1) ** -0.5
    position = torch.arange(S - T, S, device=q.device)[rows, None]
    key = torch.arange(S, device=q.device)[columns]
    return s.masked_fill(key > position, -math.inf) if is_causal else s


# --- 4. the same for all heads, with all options, fast ----------------------------------------

@dataclass
class _Tile:
    """Some samples of the batch, some key heads with their groups of query heads, some queries."""
    b: slice
    h: slice
    rows: range


class _Tiling:
    """How one attention is cut, and the logits of each tile; the same in forward and backward."""

    def __init__(self, q: Tensor, k: Tensor, others: list[Tensor], options: Options, tile: tuple[int, int] | None,
                 exact: bool = False):
        (B, H, T, Dh), (_, Hkv, S, _) = q.shape, k.shape
        self.shape, self.device = (B, H, Hkv, H // Hkv, T, S), q.device
        self.options, self.scale, self.masks = options, Dh ** -0.5 if options.scale is None else options.scale, {}
        # Statistics and sums over tiles in fp32 (or finer). Tensor cores and AMX multiply fp16 and bf16 themselves, but
        # torch rounds each product back to that type; where nothing does, a tile is converted to fp32 beforehand.
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.products = q.dtype if _multiplies(q.device.type, q.dtype) and not exact else self.dtype
        is_simple = options.bias is None and not options.soft_cap and not options.dropout
        self.needs_maximum = (not is_simple or self.products == torch.float16  # whose range is small
                              or not _are_moderate(q, k, others, self.scale, options.window))
        # The G query heads that share a key head are rows of one product, and no key is copied. Fastest on a CPU, in
        # rows of all G heads x keys: 512 x 512 where products are of bf16; else 1024 x 256, or 256 x 256 where keys
        # are hidden, so that fewer of those are computed.
        sees_all = not options.is_causal and options.window is options.ids is None
        rows, columns = 256, 512  # on a GPU
        if q.device.type == "cpu":
            rows, columns = (1024 if sees_all else 256, 256) if self.products == self.dtype else (512, 512)
        self.Br, self.Bc = tile or (max(16, rows // (H // Hkv)), columns)

    def tiles(self, matrices: int) -> Iterator[_Tile]:
        """All query tiles, those of one group of heads before the next group's. A group has as many heads as fit in
        cache: ``matrices`` tiles of logits for each of them, about 4 MB in all."""
        B, _, Hkv, G, T, S = self.shape
        matrices *= (self.dtype if self.needs_maximum else self.products).itemsize
        heads = max(1, 2**22 // max(1, matrices * G * min(self.Br, T) * min(self.Bc, S)))
        if self.device.type != "cpu":  # a GPU wants them all
            heads = B * Hkv
        for b in range(0, B, step := max(1, heads // Hkv)):
            for h in range(0, Hkv, heads):
                for r in range(0, T, self.Br):
                    yield _Tile(slice(b, b + step), slice(h, min(h + heads, Hkv)), range(r, min(r + self.Br, T)))

    def columns(self, at: _Tile) -> Iterator[range]:
        """The key tiles that some of these queries see. No key after the last of these queries is computed; above the
        diagonal within a tile it is computed and hidden."""
        *_, T, S = self.shape
        first, last = S - T + at.rows.start, S - T + at.rows.stop - 1
        begin = 0 if self.options.window is None else max(0, first - self.options.window + 1)
        end = min(S, last + (1 if self.options.is_causal else self.options.window or S + T))
        # Without window and ids the diagonal's tiles alone need a mask.
        diagonal = max(begin, min(first, end)) if self.options.is_causal else end
        for start, stop in ((begin, diagonal), (diagonal, end)):
            for c in range(start, stop, self.Bc):
                columns = range(c, min(c + self.Bc, stop))
                if self.options.ids is None or (self.mask(at, columns) > 0).any():  # else another document
                    yield columns

    def mask(self, at: _Tile, columns: range) -> Tensor | None:
        """With a maximum: inf where seen, -inf where hidden, the upper limit of each logit (masked_fill would take
        three times as long). Without: 1 and 0, factors of e^logit. (b | 1, 1, 1, rows, columns); None: all see all."""
        place = at.b.start, at.rows.start, columns.start
        if self.options.ids is None:  # then a mask fits all tiles that lie the same to the diagonal
            place = at.rows.start - columns.start, len(at.rows), len(columns)
        if place not in self.masks:
            if self.options.ids is not None:
                self.masks.clear()
            mask = visible(self.options, *self.shape[-2:], at.rows, columns, self.device)
            if mask is not None:
                mask = (mask[at.b] if mask.size(0) > 1 else mask)[:, None, None]
                if self.needs_maximum:
                    mask = torch.where(mask, math.inf, -math.inf)
                mask = mask.to(self.dtype if self.needs_maximum else self.products)
            self.masks[place] = mask
        return self.masks[place]

    def queries(self, x: Tensor, at: _Tile) -> Tensor:
        """(B, H, T, ...) -> (b, h, G, rows, ...), a view."""
        return x.unflatten(1, self.shape[2:4])[at.b, at.h, :, at.rows.start:at.rows.stop]

    def query_rows(self, x: Tensor, at: _Tile) -> Tensor:
        """(B, H, T, ...) -> (n, G rows, ...), n = b h."""
        return self.queries(x, at).flatten(2, 3).flatten(0, 1)

    def keys(self, x: Tensor, columns: range) -> Tensor:
        """(n, S, Dh) -> (n, columns, Dh) in the type of products."""
        x = x[:, columns.start:columns.stop].to(self.products)
        return x if self.products == self.dtype else x.contiguous()  # oneDNN would copy it itself, transposed: slower

    def of_heads(self, x: Tensor, at: _Tile, columns: range) -> Tensor:
        """(n, G rows, columns) -> (b, h, G, rows, columns), a view."""
        return x.view(-1, at.h.stop - at.h.start, self.shape[3], len(at.rows), len(columns))

    def logits(self, q: Tensor, k: Tensor, at: _Tile, columns: range, space: _Space) -> tuple[Tensor, Tensor | None]:
        """q (n, G rows, Dh), k (n, columns, Dh) -> logits (n, G rows, columns) in ``space``, -inf where hidden, and the
        slope of their soft cap, None without one."""
        o, slope, mask = self.options, None, self.mask(at, columns)
        s = space.product(q, k.mT, 0, self.scale)
        if o.soft_cap:
            bent = torch.tanh(s / o.soft_cap)
            s, slope = bent * o.soft_cap, 1 - bent.square()
        if o.bias is not None:
            self.of_heads(s, at, columns).add_(self.bias_of(o.bias, at, columns))
        if mask is not None:
            full = self.of_heads(s, at, columns)
            torch.minimum(full, mask, out=full)  # (NaN stays: one in a hidden key spoils the tile that it is in)
        return s, slope

    def exponentials(self, q: Tensor, k: Tensor, at: _Tile, columns: range, space: _Space) -> Tensor:
        """e^logit (n, G rows, columns) for the arguments of ``logits``, 0 where hidden; of moderate logits alone, from
        which no maximum need be taken, so of none with a bias, a soft cap or dropout."""
        *_, T, S = self.shape
        p = space.product(q, k.mT, 0, self.scale).exp_()
        if self.options.is_causal and self.options.window is None and self.options.ids is None:
            if columns.stop - 1 > S - T + at.rows.start:  # to erase a triangle is faster than to multiply by a mask
                self.of_heads(p, at, columns).tril_(S - T + at.rows.start - columns.start)
        elif (mask := self.mask(at, columns)) is not None:
            self.of_heads(p, at, columns).mul_(mask)
        return p

    def bias_of(self, bias: Tensor, at: _Tile, columns: range) -> Tensor:
        """What of a bias (B, H, T, S) meets this tile, (b, h, G, rows, columns); any size may be 1 instead."""
        bias = bias.unflatten(1, self.shape[2:4]) if bias.size(1) > 1 else bias[:, :, None]  # (B, Hkv, G, T, S)
        places = (at.b, at.h, slice(None), slice(at.rows.start, at.rows.stop), slice(columns.start, columns.stop))
        return bias[tuple(slice(None) if size == 1 else place for size, place in zip(bias.shape, places))]

    def dropout(self, at: _Tile, columns: range) -> Tensor:
        B, H, Hkv, G, T, S = self.shape
        heads = torch.arange(B * H, device=self.device).view(B, Hkv, G)[at.b, at.h].flatten()  # (n G,)
        factor = dropout_factor(self.options, heads, T, S, at.rows, columns).to(self.dtype)  # (n G, rows, columns)
        return factor.view(-1, G * len(at.rows), len(columns))


def _are_moderate(q: Tensor, k: Tensor, others: list[Tensor], scale: float, window: int | None = None) -> bool:
    """Whether no e^logit can overflow or vanish. Then m = 0 serves every row as well as its maximum, whose only use is
    to prevent that: to find it, subtract it and rescale for it are passes over each tile that can be left out.

    By Cauchy and Schwarz |s_ij| <= |scale| |q_i| |k_j|. Up to 32, e^s is 1e-14 to 1e14; the longest row (along the last
    axis) of each of ``others``, which it multiplies, must leave room for that in fp32's range, above and below. One
    answer for the whole call: so any row or key, even one hidden from this row, may change how this row is rounded.
    """
    if q.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # a GPU would have to wait for the answer, a trace would keep it for other numbers
    (T, Dh), S = q.shape[2:], k.size(2)
    if 0 in (q.numel(), k.numel()) or T * min(S, T + (window or S)) < 4 * Dh * S:
        return False  # with few logits, a look at all keys takes longer than it saves
    try:
        longest = [torch.linalg.vector_norm(x, dim=-1).amax().item() for x in (q, k, *others)]
        return abs(scale) * longest[0] * longest[1] <= 32 and all(
            1e-8 <= norm <= 1e8 or norm == 0 and not x.any() for norm, x in zip(longest[2:], others))
    except RuntimeError:  # tensors without numbers: fake ones, or those of a symbolic trace
        return False


@torch.compiler.assume_constant_result  # torch.compile cannot trace the question
def _multiplies(device: str, dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices of fp16 or bf16, summing in fp32, faster than it converts them."""
    return device != "cpu" or dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def tiled_forward(q: Tensor, k: Tensor, v: Tensor, options: Options, tile: tuple[int, int] | None = None,
                  traffic: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """out (B, H, T, Dh), lse (B, H, T) of q (B, H, T, Dh), k and v (B, Hkv, S, Dh).

    ``tile``: queries and keys of each; ``traffic`` receives the bytes of every tile read or written.
    """
    cut = _Tiling(q, k, [v], options, tile)
    B, H, *_, T, S = cut.shape
    out, lse = torch.empty_like(q), q.new_empty(B, H, T, dtype=cut.dtype)
    space, traffic = None, [] if traffic is None else traffic
    for at in cut.tiles(1):
        if at.rows.start == 0:  # the first of these heads
            k_at, v_at = (x[at.b, at.h].flatten(0, 1) for x in (k, v))  # (n, S, Dh)
        q_i = cut.query_rows(q, at).to(cut.products).contiguous()  # (n, G rows, Dh)
        n, R, Dh = q_i.shape
        space = _Space(1, n * R * min(cut.Bc, S), cut) if space is None else space
        o = q.new_zeros(n, R, Dh, dtype=cut.dtype)
        l = q.new_zeros(n, R, 1, dtype=cut.dtype)
        # Not -inf: a row that sees nothing must not compute inf - inf.
        m = torch.full_like(l, torch.finfo(cut.dtype).min if cut.needs_maximum else 0)
        for columns in cut.columns(at):
            k_j, v_j = cut.keys(k_at, columns), cut.keys(v_at, columns)  # (n, columns, Dh)
            traffic.append(2 * len(columns) * n * Dh * k.element_size())
            if cut.needs_maximum:
                s, _ = cut.logits(q_i, k_j, at, columns, space)  # (n, G rows, columns)
                larger = torch.maximum(m, s.amax(-1, keepdim=True))
                p, shrink = _exp_(s.sub_(larger)), torch.exp(m - larger)
                o, l, m = o.mul_(shrink), l.mul_(shrink), larger
            else:  # m stays 0, so nothing is rescaled
                p = cut.exponentials(q_i, k_j, at, columns, space)
            l.add_(_row_sums(p, cut.dtype))
            if options.dropout:
                p.mul_(cut.dropout(at, columns))
            _add_product(o, space.rounded(p), v_j)
        nothing = l == 0
        target = cut.queries(out, at)  # (b, h, G, rows, Dh)
        target.copy_((o / l.masked_fill(nothing, 1)).view(target.shape))
        lse_i = (m + torch.log(l)).masked_fill_(nothing, -math.inf)  # (n, G rows, 1)
        cut.queries(lse, at).copy_(lse_i.view(target.shape[:-1]))
        traffic.append(n * R * (2 * Dh * q.element_size() + lse.element_size()))
    return out, lse


def tiled_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options,
                   grad_lse: Tensor | None = None, tile: tuple[int, int] | None = None, exact: bool = False
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and the bias (None if none is wanted), in their shapes; ``grad_lse`` (B, H, T).

    The tiles are computed again: p = e^(s - lse) needs no second pass.
    out and lse may be those of attention to more keys than k: then these are the gradients through k's share.
    ``exact``: multiply in fp32, which an lse of other code than tiled_forward needs: p = e^(s - lse), the small
    difference of large numbers, is right only if both saw logits of the same rounding.
    """
    others = [v, out, grad_out] + ([] if grad_lse is None else [grad_lse])
    cut = _Tiling(q, k, others, options, tile, exact)
    *_, G, T, S = cut.shape
    dq, bias = torch.empty_like(q), options.bias
    dk, dv = (k.new_zeros(k.shape) for _ in range(2))
    dbias = None if bias is None or not bias.requires_grad else torch.zeros_like(bias, dtype=cut.dtype)
    space = None
    for at in cut.tiles(2):
        q_i = cut.query_rows(q, at).to(cut.products).contiguous()  # (n, G rows, Dh)
        if at.rows.start == 0:  # the first of these heads
            k_at, v_at, dk_at, dv_at = (x[at.b, at.h].flatten(0, 1) for x in (k, v, dk, dv))  # (n, S, Dh)
            dk_at, dv_at = dk_at.to(cut.dtype), dv_at.to(cut.dtype)  # views of dk and dv, or copies if those are halves
        n, R, Dh = q_i.shape
        # matrix 0: logits, then p; matrix 1: dp, then ds
        space = _Space(2, n * R * min(cut.Bc, S), cut) if space is None else space
        do_i, out_i = (cut.query_rows(x, at) for x in (grad_out, out))
        lse_i, weight = cut.query_rows(lse, at)[..., None], 1.0  # (n, G rows, 1)
        if cut.needs_maximum:
            lse_i = lse_i.masked_fill(lse_i == -math.inf, math.inf)  # p = 0 in rows that see nothing
        else:
            # p = e^s e^-lse. The second factor is one number a row, so the row's do and delta are multiplied by it, and
            # not the tile. A row that sees any of these keys has lse >= -32 (-33 allows for rounding); one below sees
            # none: its factor is 0, since e^-lse might overflow.
            weight = torch.exp(-lse_i).masked_fill(lse_i < -33, 0)
            do_i = do_i * weight
        do_i, dq_i = do_i.to(cut.products).contiguous(), torch.zeros(q_i.shape, dtype=cut.dtype, device=q.device)
        delta = (do_i.to(cut.dtype) * out_i).sum(-1, keepdim=True)  # (n, G rows, 1)
        if grad_lse is not None:  # d lse_i / d s_ij = p_ij
            delta -= cut.query_rows(grad_lse, at)[..., None] * weight
        if not cut.needs_maximum:
            # do . v - delta = [do, -high, high - delta] . [v, 1, 1] is one product. One bf16 number would lose 16 bits
            # of delta, so it enters as the sum of two; in fp32 the second is 0.
            high = delta.to(cut.products)
            do_delta = torch.cat((do_i, -high, (high - delta).to(cut.products)), -1)
        for columns in cut.columns(at):
            k_j, v_j = cut.keys(k_at, columns), cut.keys(v_at, columns)  # (n, columns, Dh)
            slope, here = None, slice(columns.start, columns.stop)
            if cut.needs_maximum:
                s, slope = cut.logits(q_i, k_j, at, columns, space)  # (n, G rows, columns)
                kept = p = _exp_(s.sub_(lse_i))
                dp = space.product(do_i, v_j.mT, 1)  # (n, G rows, columns)
                if options.dropout:
                    factor = cut.dropout(at, columns)
                    dp, kept = dp.mul_(factor), p * factor
                ds = dp.sub_(delta).mul_(p)
            else:
                kept = p = cut.exponentials(q_i, k_j, at, columns, space)
                ds = space.product(do_delta, F.pad(v_j, (0, 2), value=1.0).mT, 1).mul_(p)
            _add_product(dv_at[:, here], space.rounded(kept).mT, do_i)
            if dbias is not None:
                part = cut.bias_of(dbias, at, columns)  # (b | 1, h | 1, G | 1, rows | 1, columns | 1)
                part += cut.of_heads(ds, at, columns).sum_to_size(part.shape)
            if slope is not None:
                ds.mul_(slope)
            ds = space.rounded(ds)
            _add_product(dq_i, ds, k_j)
            _add_product(dk_at[:, here], ds.mT, q_i)
        target = cut.queries(dq, at)  # (b, h, G, rows, Dh)
        target.copy_(dq_i.mul_(cut.scale).view(target.shape))
        if at.rows.stop == T:  # the last
            dk_at.mul_(cut.scale)
            if k.dtype != cut.dtype:
                dk[at.b, at.h] = dk_at.view(dk[at.b, at.h].shape)
                dv[at.b, at.h] = dv_at.view(dv[at.b, at.h].shape)
    return dq, dk, dv, None if dbias is None else dbias.to(bias.dtype)


class _Space:
    """Memory for the (n, R, C) matrices of a tile, used again by the next one: fresh pages would cost time."""

    def __init__(self, count: int, size: int, cut: _Tiling):
        # Where products are rounded to bf16, a maximum's differences of logits need fp32: so each product is converted,
        # and p is rounded for the next one. Without a maximum there are no differences, and a tile stays in bf16.
        self.is_mixed = cut.products != cut.dtype and cut.needs_maximum
        self.matrices = torch.empty(count, size, dtype=cut.dtype if self.is_mixed else cut.products, device=cut.device)
        self.low = torch.empty(size if self.is_mixed else 0, dtype=cut.products, device=cut.device)

    def product(self, a: Tensor, b: Tensor, index: int, scale: float = 1.0) -> Tensor:
        """scale times a (n, R, K) b (n, K, C) -> (n, R, C) in the matrix of this index."""
        n, R, C = a.size(0), a.size(1), b.size(2)
        out = self.matrices[index, :n * R * C].view(n, R, C)
        if scale == 0:  # oneDNN would write nothing
            return out.zero_()
        low = self.low[:out.numel()].view(n, R, C) if self.is_mixed else out
        torch.baddbmm(low, a, b, beta=0, alpha=scale, out=low)
        return out.copy_(low) if self.is_mixed else out

    def rounded(self, x: Tensor) -> Tensor:
        """x (n, R, C) in the type of products: x itself, or a copy that is good until the next product or rounding."""
        return self.low[:x.numel()].view(x.shape).copy_(x) if self.is_mixed else x


def _exp_(x: Tensor) -> Tensor:
    """e^x in place, by 2^x: torch's e^x takes many times as long on a CPU where the result is 0 or nearly so, as it is
    for all that is hidden."""
    return x.mul_(1 / math.log(2)).exp2_()


def _row_sums(p: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, R, C) -> (n, R, 1). A sum of bf16 is itself rounded to bf16, and to convert p first takes four times as long.
    So where 16 divides C, 16 partial sums (of every 16th column) are rounded, and added up in ``dtype``."""
    if p.dtype != dtype and p.size(-1) % 16 == 0:
        p = p.unflatten(-1, (-1, 16)).sum(-2)
    return p.sum(-1, keepdim=True, dtype=dtype)


def _add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """sums += a b, which are of one type."""
    if b.dtype == sums.dtype and sums.is_contiguous():  # else a CPU would add to it at half the speed
        sums.baddbmm_(a, b)
    else:
        sums.add_(torch.bmm(a, b))


# --- 5. what models call --------------------------------------------------------------------

@torch.compiler.assume_constant_result  # torch.compile asks once and keeps the answer
def _kernel_for(backend: str, *sizes) -> str:
    """The name of a kernel in attention_kernels.py for these sizes (see its ``chosen_kernel``), or "tiled"."""
    try:
        from attention_kernels import chosen_kernel
    except ModuleNotFoundError:
        if backend != "auto":
            raise ValueError(f"backend {backend!r} needs attention_kernels.py beside flash_attn.py: 'tiled' and "
                             "'auto' do not") from None
        _warn_once("attention_kernels.py is not beside flash_attn.py: attention is computed in tiles, without "
                   "torch's own kernels")
        return "tiled"
    return chosen_kernel(backend, *sizes) or "tiled"


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message)


def _choose(backend: str, q: Tensor, k: Tensor, options: Options, with_backward: bool) -> str:
    """The name of what computes this: a kernel, or "tiled"."""
    if backend == "tiled":
        return backend
    if not options.plain:
        if backend != "auto":
            raise ValueError(f"backend {backend!r} knows no window, ids, bias, soft_cap, dropout, and no scale "
                             "of 0 or below: use 'tiled' or 'auto'")
        return "tiled"
    if 0 in (*q.shape, k.size(2)):
        return "tiled"
    (B, H, T, Dh), (Hkv, S) = q.shape, k.shape[1:3]
    return _kernel_for(backend, q.device, q.dtype, B, H, Hkv, T, S, Dh, options.is_causal, with_backward)


class _FlashAttention(torch.autograd.Function):
    """All kernels save the same, q, k, v, out and lse, from which the tiles, too, can make the gradients; ``rest`` is
    what little else a kernel wants back."""

    @staticmethod
    def forward(ctx, q, k, v, bias, options, name, with_lse):
        ctx.set_materialize_grads(False)
        with torch.autocast(q.device.type, enabled=False):
            if name == "tiled":
                (out, lse), ctx.rest = tiled_forward(q, k, v, options), ()
            else:
                from attention_kernels import kernel_forward
                out, lse, ctx.rest = kernel_forward(name, q, k, v, options.is_causal, options.scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options, ctx.name, ctx.with_lse = options, name, with_lse
        if not with_lse:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):
        q, k, v, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        with torch.autocast(q.device.type, enabled=False):
            grad_lse = grad_lse if ctx.with_lse else None  # torch.compile gives zeros for an lse that nobody used
            if ctx.name == "tiled" or grad_lse is not None:  # torch's kernels have no gradient of lse
                grads = tiled_backward(grad_out, q, k, v, out, lse, ctx.options, grad_lse, exact=ctx.name != "tiled")
            else:
                from attention_kernels import kernel_backward
                o = ctx.options
                grads = *kernel_backward(ctx.name, grad_out, q, k, v, out, lse, ctx.rest, o.is_causal, o.scale), None
        return *grads, None, None, None


def flash_attention_with_lse(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True, *, backend: str = "auto",
                             **options) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T / sqrt(Dh)) V and the log-sum-exp of its logits, without the T x S matrix; both differentiable.

    Args:
        q: (B, H, T, Dh), the last T of S positions; k, v: (B, Hkv, S, Dh), Hkv divides H: query head h reads
            key head h // (H / Hkv). fp32, bf16, fp16 or float64; any T and S, 0 too.
        is_causal: query t sees keys 0 .. S - T + t; if T > S the first T - S see none.
        backend: "tiled" is the plain PyTorch above, which knows all options; "auto" the fastest of torch's kernels
            that work here, or "tiled" where none does; a name in attention_kernels.KERNELS is that one, "own"
            being flash_attn_cuda.py, for which, where it does not work, "auto" stands in with a warning.
        options: window, ids, bias, soft_cap, dropout, seed, scale: see Options.

    Returns:
        out (B, H, T, Dh) in q's type, lse (B, H, T) in fp32 (float64 if q is); a query that sees no key has
        zeros and -inf.

    Raises:
        ValueError: shapes, types or devices that do not fit each other, or that the backend lacks.
    """
    return _attend(q, k, v, Options(is_causal, **options), backend, True)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True, *, backend: str = "auto", **options
                    ) -> Tensor:
    """``flash_attention_with_lse`` without the log-sum-exp: fits GPT(config, attention=flash_attention)."""
    return _attend(q, k, v, Options(is_causal, **options), backend, False)[0]


def _attend(q: Tensor, k: Tensor, v: Tensor, options: Options, backend: str, with_lse: bool) -> tuple[Tensor, Tensor]:
    """out and lse; without ``with_lse`` no gradient goes through lse."""
    _check(q, k, v, options)
    with_backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    name = _choose(backend, q, k, options, with_backward)
    return _FlashAttention.apply(q, k, v, options.bias, options, name, with_lse)


def split_kv_attention(q: Tensor, k: Tensor, v: Tensor, splits: int, is_causal: bool = True, **options) -> Tensor:
    """``flash_attention`` from ``splits`` pieces of the keys, computed on their own and merged: what decoding does.

    One query has no other work to share out among a GPU's processors, or among machines that each hold a piece
    of a long cache. The last piece holds at least the T positions of the queries. Of the options, soft_cap,
    scale and backend: the others depend on places, which a piece does not know.   "Flash-Decoding", Dao 2023
    """
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    if unknown := set(options) - {"soft_cap", "scale", "backend"}:
        raise ValueError(f"split_kv_attention takes soft_cap, scale and backend, got {', '.join(sorted(unknown))}")
    T, S = q.size(2), k.size(2)
    cuts = sorted({min(S * i // splits, max(S - T, 0)) for i in range(splits)} | {S})
    parts = [flash_attention_with_lse(q, k[:, :, a:b], v[:, :, a:b], is_causal and b == S, **options)
             for a, b in zip(cuts, cuts[1:])] or [flash_attention_with_lse(q, k, v, is_causal, **options)]
    return functools.reduce(lambda one, other: merge(*one, *other), parts)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:
        raise ValueError(f"needs q (B, H, T, Dh), k and v (B, Hkv, S, Dh), got {shapes}")
    B, H, T, Dh, Hkv, S = *q.shape, *k.shape[1:3]
    if 0 in (H, Hkv, Dh) or H % Hkv:
        raise ValueError(f"Hkv must divide H, and H, Hkv and Dh be at least 1, got {shapes}")
    types = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if not q.dtype == k.dtype == v.dtype or q.dtype not in types:
        raise ValueError("q, k and v must all be fp32, bf16, fp16 or float64, "
                         f"got {q.dtype}, {k.dtype}, {v.dtype}")
    bias, ids = options.bias, options.ids
    for name, x in (("k", k), ("v", v), ("bias", bias), ("ids", ids)):
        if x is not None and x.device != q.device:
            raise ValueError(f"q is on {q.device}, {name} on {x.device}")
    if options.window is not None and (type(options.window) is not int or options.window < 1):
        raise ValueError(f"window must be a whole number and at least 1, got {options.window}")
    if type(options.seed) is not int:
        raise ValueError(f"seed must be a whole number, got {options.seed}")
    if ids is not None and (ids.shape != (B, S) or T > S):
        raise ValueError(f"ids must number all of (B, S) = {(B, S)} positions and T = {T} be at most S, "
                         f"got {tuple(ids.shape)}")
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"bias is added to the logits, and must be a float (-inf hides a key), got {bias.dtype}")
    if bias is not None and (bias.dim() != 4 or any(a not in (1, b) for a, b in zip(bias.shape, (B, H, T, S)))):
        raise ValueError(f"bias must be broadcastable to (B, H, T, S) = {(B, H, T, S)}, got {tuple(bias.shape)}")
    if options.soft_cap is not None and not 0 < options.soft_cap < math.inf:
        raise ValueError(f"soft_cap must be positive and finite, got {options.soft_cap}")
    if not 0 <= options.dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {options.dropout}")


if __name__ == "__main__":
    try:
        from attention_traffic import main  # what it saves: bytes by formula and counted, memory and time measured
    except ImportError as error:
        print(f"flash_attn.py: {error}: copy that file beside this one, or install that package", file=sys.stderr)
        sys.exit(2)
    main("flash_attn.py")
