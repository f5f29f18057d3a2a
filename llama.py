"""Llama 3: a decoder-only transformer with RMSNorm, rotary positions, grouped-query attention and SwiGLU.

Idea      GPT, with four parts exchanged: positions enter as rotations of queries and keys, so that scores depend on
          distances only; norms rescale without centring; the feed-forward layer gates itself; several query heads
          share one key and value head, which shrinks the cache.   Touvron et al. 2023, Dubey et al. 2024 (2407.21783)
Formula   x = x + W_o Attention(rope(W_q n), rope(W_k n), W_v n),   n = RMSNorm(x)         L times (pre-norm)
          x = x + W_down (silu(W_gate n) * W_up n),                 n = RMSNorm(x)         (SwiGLU)
          rope: (x_2j, x_2j+1) turned by the angle t theta_j at position t,  theta_j = base^(-2j/Dh)
          query head h uses key head floor(h / (H/Hkv)):  Hkv = H is multi-head, Hkv = 1 multi-query attention
          RMSNorm(x)_i = g_i x_i / sqrt(mean_j(x_j^2) + eps),   logits = W_head RMSNorm(x)
Shapes    tokens (B, T) -> x (B, T, D) -> logits (B, T, V);   cache (B, Hkv, S, Dh) per layer, twice
Omits     rope scalings other than Llama 3.1's, biases, a cache that forgets what is behind the sliding window;
          how the published weights are stored: weights.py; how a conversation is written: llama_chat.py.
Run       python llama.py    published sizes, RoPE's property; then a tiny Llama learns by heart: half a minute;
          Ends with "max |cached - uncached logits| = ..."
Test      pytest tests/test_llama.py
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# --- 1. config ------------------------------------------------------------------------------

@dataclass
class LlamaConfig:
    """The sizes of a Llama; the defaults are Llama 3 8B's. A size that cannot be raises ValueError."""
    vocab_size: int = 128256
    context: int = 8192
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = 8  # None: n_heads (multi-head); 1: multi-query
    d_model: int = 4096
    d_ff: int | None = 14336  # None: swiglu_width(d_model)
    d_head: int | None = None  # None: d_model / n_heads
    rope_base: float = 500000.0  # theta_j = rope_base^(-2j/Dh)
    rope_factor: float | None = None  # Llama 3.1's scaling: how many times longer texts may be
    rope_original_context: int = 8192  # ... than the ones of this length it was trained on
    rope_low_frequency: float = 1.0  # turns within those texts below which theta_j is divided by the factor
    rope_high_frequency: float = 4.0  # ... and from which on it stays
    norm_eps: float = 1e-5
    tied: bool = False  # the head is the embedding's matrix
    window: int | None = None  # sliding window (Mistral): a query sees this many keys, its own included
    qk_norm: bool = False  # RMSNorm of all queries and all keys (OLMoE)

    def __post_init__(self):
        optional = ("n_kv_heads", "d_ff", "d_head", "window")
        for name in ("vocab_size", "context", "n_layers", "n_heads", "d_model", *optional):
            size = getattr(self, name)
            if not (isinstance(size, int) and size >= 1 or size is None and name in optional):
                raise ValueError(f"{name} must be a whole number and at least 1, got {size!r}")
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(f"n_heads must divide d_model, got {self.n_heads} heads and width {self.d_model}: "
                             "or give d_head")
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        self.d_head = self.d_model // self.n_heads if self.d_head is None else self.d_head
        self.d_ff = swiglu_width(self.d_model) if self.d_ff is None else self.d_ff
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads, got {self.n_kv_heads} and {self.n_heads}")
        if self.d_head % 2:
            raise ValueError(f"d_head must be even (rope turns pairs), got {self.d_head}")
        if self.rope_factor is not None and not (
                self.rope_factor >= 1 and 0 < self.rope_low_frequency < self.rope_high_frequency):
            raise ValueError("rope scaling needs a factor of at least 1 and low < high frequency, got factor "
                             f"{self.rope_factor}, {self.rope_low_frequency} and {self.rope_high_frequency}")
        if not (self.rope_base > 0 and self.norm_eps > 0 and self.rope_original_context > 0):
            raise ValueError("rope_base, norm_eps and rope_original_context must be positive, got "
                             f"{self.rope_base}, {self.norm_eps} and {self.rope_original_context}")

    def count_parameters(self) -> int:
        """Parameters of the model, a tied head counted once."""
        D, queries, keys = self.d_model, self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        layer = 2 * D * (queries + keys) + 3 * D * self.d_ff + 2 * D + self.qk_norm * (queries + keys)
        return (1 if self.tied else 2) * self.vocab_size * D + self.n_layers * layer + D

    def flops_per_token(self, context: int | None = None) -> int:
        """FLOPs of one training step per token of a text of length ``context``; 6 N if V and T are small."""
        T, D, queries = context or self.context, self.d_model, self.n_heads * self.d_head
        layer = 2 * D * (queries + self.n_kv_heads * self.d_head) + 3 * D * self.d_ff
        # 2 per multiply-add. Last: Q K^T and its product with V over all T keys; a causal kernel may do half.
        forward = 2 * (self.n_layers * layer + self.vocab_size * D) + 4 * self.n_layers * T * queries
        return 3 * forward  # backward costs twice forward


def swiglu_width(d_model: int, multiple_of: int = 256, multiplier: float = 1.0) -> int:
    """Llama's rule for Dff: three matrices of 2/3 4D are as large as two of 4D; rounded up to a multiple."""
    return -(-int(multiplier * int(8 * d_model / 3)) // multiple_of) * multiple_of


_LONG = {"context": 131072, "rope_factor": 8.0}  # Llama 3.1: Dubey et al. 2024, section 3.4
_TINY = {"vocab_size": 2048, "context": 128, "d_model": 128, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2}
PRESETS = {  # Touvron et al. 2023 a, table 2, and b, table 1; Dubey et al. 2024, table 3; Jiang et al. 2023, table 1
    "llama1_7b": LlamaConfig(32000, 2048, n_kv_heads=None, d_ff=11008, rope_base=1e4, norm_eps=1e-6),
    "llama2_7b": LlamaConfig(32000, 4096, n_kv_heads=None, d_ff=11008, rope_base=1e4),
    "llama2_70b": LlamaConfig(32000, 4096, 80, 64, 8, 8192, 28672, rope_base=1e4),
    "llama3_8b": LlamaConfig(),
    "llama3_70b": LlamaConfig(n_layers=80, n_heads=64, d_model=8192, d_ff=28672),
    "llama31_8b": LlamaConfig(**_LONG),
    "llama31_70b": LlamaConfig(n_layers=80, n_heads=64, d_model=8192, d_ff=28672, **_LONG),  # and 3.3
    "llama3_405b": LlamaConfig(n_layers=126, n_heads=128, d_model=16384, d_ff=53248, **_LONG),
    "llama32_1b": LlamaConfig(n_layers=16, d_model=2048, d_ff=8192, tied=True, **_LONG | {"rope_factor": 32.0}),
    "llama32_3b": LlamaConfig(n_layers=28, n_heads=24, d_model=3072, d_ff=8192, tied=True,
                              **_LONG | {"rope_factor": 32.0}),
    "mistral_7b": LlamaConfig(32000, 32768, rope_base=1e4, window=4096),
    "llama_tiny": LlamaConfig(**_TINY, d_ff=None, rope_base=1e4),
    "mistral_tiny": LlamaConfig(**_TINY, d_ff=None, rope_base=1e4, window=32),
}


# --- 2. rotary position embedding -----------------------------------------------------------

def rope_frequencies(config: LlamaConfig) -> Tensor:
    """theta_j in radians per position, (Dh/2,) in fp32.   Su et al. 2021 (2104.09864), section 3.2.2

    Llama 3.1's scaling: a pair that makes fewer than ``rope_low_frequency`` turns within the original context turns
    ``rope_factor`` times slower, so that no angle is new at ``rope_factor`` times the length; from
    ``rope_high_frequency`` turns on it stays, as it tells neighbours apart; between, linearly from one to the other.
    """
    exponents = torch.arange(0, config.d_head, 2, dtype=torch.float32) / config.d_head
    theta = 1.0 / config.rope_base ** exponents
    if config.rope_factor is None:
        return theta
    turns = config.rope_original_context / (2 * math.pi / theta)
    low, high = config.rope_low_frequency, config.rope_high_frequency
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * theta / config.rope_factor + keep * theta


def naive_rope(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs (x_2j, x_2j+1), each by its own angle: the paper's convention, and Meta's.

    x (B, H, T, Dh); rotation e^(i t theta_j), complex (T, Dh/2) or (B, 1, T, Dh/2) -> (B, H, T, Dh)
    """
    y = torch.empty_like(x)
    for j in range(x.size(-1) // 2):
        a, b, cos, sin = x[..., 2 * j], x[..., 2 * j + 1], rotation[..., j].real, rotation[..., j].imag
        y[..., 2 * j] = a * cos - b * sin
        y[..., 2 * j + 1] = a * sin + b * cos
    return y


def rope(x: Tensor, rotation: Tensor) -> Tensor:
    """``naive_rope`` as one product of complex numbers, in fp32 or finer."""
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    x32 = x32 if x32.stride(-1) == 1 else x32.contiguous()  # else a pair is no complex number
    pairs = x32.unflatten(-1, (-1, 2))  # (B, H, T, Dh/2, 2)
    turned = torch.view_as_complex(pairs) * rotation  # (B, H, T, Dh/2)
    return torch.view_as_real(turned).flatten(-2).type_as(x)  # (B, H, T, Dh)


class Rotations:
    """e^(i t theta_j) by position, computed once for all layers, for as many positions as were needed so far.

    No buffer of a module: .bfloat16() would drop the imaginary part, and a 128K context's table is large.
    """

    def __init__(self, config: LlamaConfig):
        self.config, self.tables = config, {}

    def __call__(self, start: int | Tensor, T: int, device: torch.device) -> Tensor:
        """Positions start + 0 ... T - 1: complex (T, Dh/2); if start is (B,) or (B, T): (B, 1, T, Dh/2)."""
        # To read a tensor's greatest start would make the CPU wait for the GPU, in every layer.
        end = start + T if isinstance(start, int) else max(self.config.context, T)
        if device not in self.tables or len(self.tables[device]) < end:
            with torch.inference_mode(False):  # else what generation made could not be used in training
                positions = torch.arange(1 << (end - 1).bit_length(), dtype=torch.float32, device=device)
                angles = torch.outer(positions, rope_frequencies(self.config).to(device))  # (S, Dh/2)
                self.tables[device] = torch.complex(angles.cos(), angles.sin())
        table = self.tables[device]
        if isinstance(start, int):
            return table[start:end]
        # slots of padding have no position of their own
        return table[(start.view(len(start), 1, -1) + torch.arange(T, device=device)).clamp(min=0)]


# --- 3. attention ---------------------------------------------------------------------------

def naive_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True) -> Tensor:
    """softmax(Q K^T / sqrt(Dh)) V, with every matrix of the formula in sight.   Vaswani et al. 2017, eq. 1

    q (B, H, T, Dh), k and v (B, H, S, Dh) -> (B, H, T, Dh). The queries are the LAST T of the S positions:
    query t sees keys 0 .. S - T + t.
    """
    T, S = q.size(-2), k.size(-2)
    scores = (q / math.sqrt(q.size(-1))) @ k.mT  # (B, H, T, S)
    if is_causal and T > 1:
        future = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        scores = scores.masked_fill(future, float("-inf"))
    return torch.softmax(scores, -1) @ v


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True) -> Tensor:
    """``naive_attention`` by torch's fused kernels; k and v may have fewer heads than q, if Hkv divides H."""
    T, S = q.size(-2), k.size(-2)
    if is_causal and T > S:
        raise ValueError(f"{T} queries cannot be the last of {S} positions")
    mask = None
    if is_causal and 1 < T < S:  # torch aligns its causal mask to the first key, not to the last
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal and T == S > 1,
                                          enable_gqa=q.size(1) != k.size(1))


class LayerCache:
    """The keys and values that one layer has computed, each (B, H, max_len, Dh), and how many are in use."""

    def __init__(self, k: Tensor, v: Tensor):
        self.k, self.v, self.length = k, v, 0
        self.mask: Tensor | None = None  # (B, 1, T, S), True where a query may look; None: causal is enough

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, H, T, Dh) behind what is there; returns all of it, two views (B, H, S, Dh)."""
        if k.size(0) != self.k.size(0):  # assigning one row would fill all of them with it
            raise ValueError(f"a cache of {self.k.size(0)} rows cannot take a batch of {k.size(0)}")
        T = k.size(2)
        self.k.narrow(2, self.length, T).copy_(k)
        self.v.narrow(2, self.length, T).copy_(v)
        self.length += T
        return self.k.narrow(2, 0, self.length), self.v.narrow(2, 0, self.length)


class KVCache:
    """Keys and values of every layer, allocated once, so that a decoding step computes one position only.

    To be used without gradients. Prompts of different lengths share a batch by padding on the LEFT: all rows
    then end at the same slot. Set ``padding`` (B,), the number of such slots per row, before the first call:
    positions are counted from the first real token and no query looks at a padded key.
    """

    def __init__(self, n_layers: int, batch: int, n_kv_heads: int, max_len: int, d_head: int, device, dtype):
        def empty() -> Tensor:
            return torch.empty(batch, n_kv_heads, max_len, d_head, device=device, dtype=dtype)
        self.layers = [LayerCache(empty(), empty()) for _ in range(n_layers)]
        self.max_len, self.padding = max_len, None

    @property
    def length(self) -> int:
        """Slots in use, padding included."""
        return self.layers[0].length

    def begin(self, T: int) -> int | Tensor:
        """Make ready for T more tokens; returns the first one's position, (B,) of them if rows are padded."""
        S = self.length + T
        if S > self.max_len:
            raise ValueError(f"a cache of {self.max_len} slots holds {self.length}: no room for {T} more")
        if self.padding is None:
            return self.length
        slots = torch.arange(S, device=self.padding.device)
        queries = slots[self.length:, None]  # (T, 1)
        real = slots >= self.padding[:, None, None]  # (B, 1, S)
        # A padded query looks at itself: with nothing to look at its softmax would be NaN, and NaN spreads.
        mask = ((slots <= queries) & real | (slots == queries))[:, None]  # (B, 1, T, S)
        for layer in self.layers:
            layer.mask = mask
        return self.length - self.padding

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` slots (what speculative decoding rejects)."""
        for layer in self.layers:
            layer.length = min(layer.length, length)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, as often as they are named: finished rows leave, beams are copied."""
        for layer in self.layers:
            layer.k, layer.v = layer.k[rows], layer.v[rows]
        if self.padding is not None:
            self.padding = self.padding[rows]


# --- 4. the model ---------------------------------------------------------------------------

class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension.

    Args:
        d_model: width D of the vectors; positive.
        eps: keeps the square root away from zero. 1e-5 as in Llama 3: in bf16 the smallest
            mean square that survives rounding is far above it.

    Raises:
        ValueError: if the input's last dimension is not ``d_model``.
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.size(-1) != self.gain.numel():
            raise ValueError(f"RMSNorm of width {self.gain.numel()} got x of shape {tuple(x.shape)}")
        # Statistics in fp32: squares of bf16 activations lose 16 of their 24 mantissa bits.
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * scale).type_as(x) * self.gain


class GroupedQueryAttention(nn.Module):
    """Causal self-attention of H query heads that share Hkv key and value heads, (B, T, D) -> (B, T, D).

    Ainslie et al. 2023 (2305.13245): query head h reads key head floor(h / (H/Hkv)). The number of heads is
    recovered from the width that is there: a tensor-parallel shard is the same module with narrower linears.
    """

    def __init__(self, config: LlamaConfig, attention: Callable, rotations: Rotations):
        super().__init__()
        D, Dh = config.d_model, config.d_head
        self.q = nn.Linear(D, config.n_heads * Dh, bias=False)
        self.k = nn.Linear(D, config.n_kv_heads * Dh, bias=False)
        self.v = nn.Linear(D, config.n_kv_heads * Dh, bias=False)
        self.out = nn.Linear(config.n_heads * Dh, D, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.n_heads * Dh, config.norm_eps)
            self.k_norm = RMSNorm(config.n_kv_heads * Dh, config.norm_eps)
        self.config, self.attention, self.rotations = config, attention, rotations

    def forward(self, x: Tensor, start: int | Tensor = 0, cache: LayerCache | None = None) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)  # (B, T, H Dh), twice (B, T, Hkv Dh)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (-1, self.config.d_head)).transpose(1, 2) for y in (q, k, v))  # (B, H, T, Dh)
        rotation = self.rotations(start, q.size(2), x.device)
        q, k = rope(q, rotation), rope(k, rotation)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, Hkv, S, Dh)
        mask = None if cache is None else cache.mask
        (T, S), window = (q.size(2), k.size(2)), self.config.window
        if window is not None and S > window:
            first = max(0, S - T - window + 1)  # the oldest key that a query sees
            k, v, S = k[:, :, first:], v[:, :, first:], S - first  # (B, Hkv, S, Dh)
            if T > 1 or mask is not None:
                band = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T).triu(S - T - window + 1)
                mask = band if mask is None else mask[..., first:] & band
        if mask is not None:  # padded or packed rows, or a window: ``attention`` takes no mask
            if torch.is_grad_enabled():  # under a mask torch's fused CUDA kernels take no groups: it would keep T x S
                k, v = (y.repeat_interleave(q.size(1) // k.size(1), 1) for y in (k, v))  # (B, H, S, Dh)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.size(1) != k.size(1))
        else:
            y = self.attention(q, k, v, is_causal=True)  # (B, H, T, Dh)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x), (..., D) -> (..., D).   Shazeer 2020 (2002.05202), equation 6"""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def hugging_face_tensors(self) -> dict[str, Tensor]:
        """Name in a file, within the layer -> where it goes."""
        return {f"mlp.{name}_proj.weight": getattr(self, name).weight for name in ("gate", "up", "down")}


class LlamaBlock(nn.Module):
    """One layer, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig, attention: Callable, mlp: Callable, rotations: Rotations):
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, config.norm_eps)
        self.attention = GroupedQueryAttention(config, attention, rotations)
        self.norm2 = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = mlp(config)

    def forward(self, x: Tensor, start: int | Tensor = 0, cache: LayerCache | None = None) -> Tensor:
        """``start``: the first token's position, (B,) of them if rows are padded; (B, T): packing.PackedRows."""
        x = x + self.attention(self.norm1(x), start, cache)
        return x + self.mlp(self.norm2(x))


class Llama(nn.Module):
    """Llama and Mistral, with any exact attention and any feed-forward part; ``generator`` draws the weights.

    ``attention(q, k, v, is_causal=True)`` gets k and v with Hkv heads. It is not asked where rows are padded or
    packed, or the keys are more than the window: those need a mask. ``mlp(config)`` makes the module (B, T, D) ->
    (B, T, D) of each layer, such as ``lambda c: MoE(c.d_model, c.d_ff, 8, 2)``; to be loaded and saved it has SwiGLU's
    ``hugging_face_tensors`` and, if transformers calls the model otherwise, ``hugging_face_config``.
    """

    # How tensor parallelism cuts each parameter: by output columns, by input rows, by vocabulary.
    tp_plan = {"token_embedding.weight": "vocab", "output.weight": "vocab",
               "attention.q.weight": "column", "attention.k.weight": "column", "attention.v.weight": "column",
               "mlp.gate.weight": "column", "mlp.up.weight": "column",
               "attention.out.weight": "row", "mlp.down.weight": "row"}

    def __init__(self, config: LlamaConfig, attention: Callable = attention, mlp: Callable = SwiGLU,
                 generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        rotations = Rotations(config)
        self.blocks = nn.ModuleList(LlamaBlock(config, attention, mlp, rotations) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        if not config.tied:
            self.output = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.initialise(generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Weights from N(0, 0.02^2), gains 1, biases (of a router) 0; the 2 L projections into the residual stream
        from N(0, 0.02^2 / 2L), as GPT-2's: Meta has not published Llama's."""
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif name.endswith("gain"):
                p.fill_(1.0)
            else:
                into_residual = name.removesuffix(".weight").endswith((".out", ".down"))
                std = 0.02 / math.sqrt(2 * self.config.n_layers) if into_residual else 0.02
                p.normal_(0.0, std, generator=generator)

    def embed(self, tokens: Tensor, start: int | Tensor = 0) -> Tensor:
        """tokens (B, T) -> x (B, T, D). Token t of row b is at position t + ``start``, or start[b], or start[b, t]."""
        if tokens.dim() != 2:
            raise ValueError(f"tokens must be (B, T), got shape {tuple(tokens.shape)}")
        if isinstance(start, Tensor) and len(start) != len(tokens):
            raise ValueError(f"{len(tokens)} rows of tokens have positions or document_ids for {len(start)}")
        T, first = tokens.size(1), start if isinstance(start, int) else int(start.max())
        if first + T > (context := self.config.context):
            raise ValueError(f"{T} tokens from position {first} do not fit a context of {context}")
        try:
            return self.token_embedding(tokens)
        except IndexError:  # on a CPU; to look at every batch on a GPU would make the CPU wait for it
            raise ValueError(f"token ids {int(tokens.min())} .. {int(tokens.max())} are not all in the vocabulary, "
                             f"0 .. {self.config.vocab_size - 1}") from None

    def head(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> logits (B, T, V)."""
        return F.linear(self.norm(x), (self.token_embedding if self.config.tied else self.output).weight)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V). With a cache, tokens are the ones that it does not hold yet.

        ``cache`` may also be a packing.PackedRows: several texts in a row, none of which sees another.
        """
        start = 0 if cache is None else cache.begin(tokens.size(-1))
        x = self.embed(tokens, start)
        for i, block in enumerate(self.blocks):
            x = block(x, start, None if cache is None else cache.layers[i])
        return self.head(x)

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache for ``batch`` rows of up to ``max_len`` slots, where and in what the weights are."""
        weight, d_head = self.blocks[0].attention.k.weight, self.config.d_head
        n_heads = weight.size(0) // d_head  # a tensor-parallel shard has fewer than the config says
        return KVCache(len(self.blocks), batch, n_heads, max_len, d_head, weight.device, weight.dtype)

    # --- files: weights.py, beside this file ---

    @classmethod
    def from_pretrained(cls, directory: str | Path, attention: Callable = attention, mlp: Callable = SwiGLU,
                        dtype: torch.dtype | None = None) -> "Llama":
        """Read a directory of Hugging Face (``config.json``, ``model*.safetensors``) or of Meta (``params.json``,
        ``consolidated.*.pth``): a Llama in evaluation mode, in ``dtype``, or in that of the stored embedding.

        Raises ValueError if the directory is not of a model computed here, if a file is cut short, or, all by name,
        for tensors that are missing, of another shape, or too many.
        """
        import weights
        return weights.load(directory, lambda sizes: cls(LlamaConfig(**sizes), attention, mlp), dtype)

    def save_pretrained(self, directory: str | Path, eot: int | None = None, bos: int | None = None,
                        shard_bytes: int = 5 * 10**9) -> None:
        """Write ``config.json`` and safetensors files as transformers' ``LlamaForCausalLM`` (with a window,
        ``MistralForCausalLM``) reads them; more than ``shard_bytes`` in several files and an index.

        ``eot``, ``bos``: ids of the end-of-text and the first token. Replaces the model that is there.
        """
        import weights
        weights.save(self, directory, eot, bos, shard_bytes)


# --- 5. loss --------------------------------------------------------------------------------

def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log p(target) in nats, in fp32 or finer: logits (B, T, V), targets (B, T) -> scalar."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


# --- 6. demo --------------------------------------------------------------------------------

def main(steps: int, seed: int) -> None:
    if steps < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"--steps must be at least 1 and --seed in 0 .. 2^32 - 1, got {steps} and {seed}")
    for name, config in PRESETS.items():
        cache = 2 * config.n_layers * config.n_kv_heads * config.d_head * 2  # bytes in bf16
        print(f"{name:12} {config.count_parameters():>15,} parameters, {config.flops_per_token():.2e} FLOPs per "
              f"training token, cache {cache / 1024:4.0f} KiB per token, 1/{config.n_heads // config.n_kv_heads} of "
              "multi-head attention's")

    generator = torch.Generator().manual_seed(seed)
    config = LlamaConfig(128, 64, 2, 4, 2, 128, None, rope_base=1e4)
    rotations = Rotations(config)
    q, k = torch.randn(2, 1, 1, 1, config.d_head, generator=generator)

    def score(t: int, s: int) -> float:
        q_t, k_s = (rope(x, rotations(position, 1, x.device)) for x, position in ((q, t), (k, s)))
        return (q_t * k_s).sum().item()

    print(f"\nq at 9, k at 4: score {score(9, 4):.5f}; at 1009 and 1004: {score(1009, 1004):.5f}   "
          "(expected: the same, for the distance is)")

    text = torch.tensor(list(subprocess.check_output([sys.executable, "-m", "this"])))  # (857,) bytes
    model = Llama(config, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    print(f"learning {len(text)} bytes by heart with {config.count_parameters():,} parameters")
    for step in range(steps):
        starts = torch.randint(len(text) - config.context, (12, 1), generator=generator)
        batch = text[starts + torch.arange(config.context + 1)]  # (12, T + 1)
        loss = next_token_loss(model(batch[:, :-1]), batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        # A warm-up, then down to 0.
        optimizer.param_groups[0]["lr"] = 2e-3 * min((step + 1) / 40, 1 - step / steps)
        optimizer.step()
        if step == 0 or (step + 1) % 50 == 0 or step == steps - 1:
            expected = f"  (expected ln V = {math.log(128):.3f})" if step == 0 else ""
            print(f"step {step + 1:>6}/{steps}  loss {loss:.3f}{expected}")

    model.eval()
    tokens, cache = text[None, :16], model.new_cache(1, config.context)
    with torch.no_grad():
        logits = model(tokens, cache)  # (1, 16, V)
        while tokens.size(1) < config.context:
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)  # (1, T + 1)
            logits = torch.cat((logits, model(tokens[:, -1:], cache)), 1)  # (1, T + 1, V)
        error = (logits - model(tokens)).abs().max()
    right = (tokens[0] == text[:config.context]).sum()
    print(f"recited: {bytes(tokens[0].tolist()).decode(errors='replace')!r}")
    print(f"max |cached - uncached logits| = {error:.1e} (expected below 1e-4);   "
          f"{right} of {config.context} bytes right (expected all)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--steps", type=int, default=400, help="training steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and batches (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
