"""Scaling: what a model costs in parameters, FLOPs, memory, time and money.   Kaplan et al. 2020 (2001.08361)

Idea      A transformer is so regular that its cost is arithmetic: count the matrices of one layer, multiply by the
          layers, the tokens and the bytes, and divide by what a chip can do.
Formula   weights of a layer      4 D^2 (Q K V O) + 8 D^2 (feed-forward) = 12 D^2
          multiplications         12 T D^2 + 2 T^2 D per layer and sequence; 14 D^3 at T = D, attention : FFN = 6 : 8
          FLOPs                   2 per multiplication, 3 x that for training (backward = 2 forward): 6 N per token
          training state          weight + gradient + two moments = 4 + 4 + 8 (fp32) or 2 + 2 + 12 (mixed) = 16 bytes
          MFU                     FLOPs the formula asks for / (seconds * peak);  HFU counts recomputed FLOPs too
Shapes    no tensors here: numbers, with their units in the docstrings. T tokens of a sequence, D width, N parameters
Omits     laws of the loss (scaling_laws.py, ladder.py) and layouts on a cluster (planner.py), to which this file's
          flags lead; serial shares (speedup.py).
Run       python scaling.py                                 the tables, and every number of the lectures
          python scaling.py --gpu v100 --gpus 64            does it fit, with which ZeRO stage?
          python scaling.py --fit runs.csv                  the three methods of Chinchilla on columns N, D, loss
          python scaling.py --measure                       our own law: 2 to 5 minutes on two cores
          python scaling.py --plan llama3_405b --gpus 16384 --gpu h100 --tokens 15e12
          python scaling.py --validate                      the planner beside published runs
          Ends with "parameters within 0.5% of the published: ..."; a flag, with what its neighbour ends with
Test      pytest tests/test_scaling.py
"""

import argparse
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value}")


# --- 1. counting: the lecture's convention ----------------------------------------------------

def layer_weights(width: int) -> tuple[int, int, int]:
    """(4 D^2 of attention, 8 D^2 of the feed-forward layer, 12 D^2 in all): matrices only."""
    _positive(width=width)
    return 4 * width**2, 8 * width**2, 12 * width**2


def layer_multiplications(length: int, width: int) -> tuple[int, int]:
    """Multiplications (an N x K by K x M product has N K M) of one layer on ``length`` tokens.

    Returns (attention, feed-forward) = (4 T D^2 + 2 T^2 D, 8 T D^2); their sum is 12 T D^2 + 2 T^2 D.
    """
    _positive(length=length, width=width)
    return 4 * length * width**2 + 2 * length**2 * width, 8 * length * width**2


# --- 2. counting: exactly, for any decoder ----------------------------------------------------

@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder-only transformer, dense or mixture of experts. ValueError for sizes that cannot be."""
    n_layers: int
    d_model: int
    n_heads: int
    vocab_size: int
    context: int  # tokens
    n_kv_heads: int | None = None  # None: one per query head
    d_head: int | None = None  # None: d_model / n_heads
    d_ff: int | None = None  # None: 4 d_model
    gated: bool = False  # SwiGLU: three matrices, not two
    biases: bool = True  # of linear layers and norms
    learned_positions: bool = True
    relative_positions: bool = False  # Transformer-XL's: one more D x D per layer (Gopher, Chinchilla)
    tied: bool = True  # the head is the embedding
    parallel: bool = False  # attention and feed-forward side by side behind one norm (PaLM)
    experts: int = 1
    experts_per_token: int = 1
    qk_norm: bool = False  # RMSNorm of all queries and all keys (OLMoE)
    batch_tokens: int = 2**22  # of the published training run
    published: float = 0.0  # parameters as published; 0: none

    def __post_init__(self):
        for name in ("n_layers", "d_model", "n_heads", "vocab_size", "context", "experts", "experts_per_token"):
            if not isinstance(size := getattr(self, name), int) or size < 1:
                raise ValueError(f"{name} must be a whole number and at least 1, got {size!r}")
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(f"n_heads must divide d_model, got {self.n_heads} heads and width {self.d_model}")
        for name, derived in (("n_kv_heads", self.n_heads), ("d_head", self.d_model // self.n_heads),
                              ("d_ff", 4 * self.d_model)):
            value = derived if getattr(self, name) is None else getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number and at least 1, got {value!r}")
            object.__setattr__(self, name, value)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads, got {self.n_kv_heads} and {self.n_heads}")
        if self.experts_per_token > self.experts:
            raise ValueError("experts_per_token must be at most experts, got "
                             f"{self.experts_per_token} and {self.experts}")

    @property
    def attention_weights(self) -> int:
        """Weights of Q, K, V, O (and of relative positions) in one layer."""
        inner, keys = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        return 2 * self.d_model * (inner + keys) + self.relative_positions * self.d_model**2

    @property
    def expert_weights(self) -> int:
        """Weights of one feed-forward network."""
        return (3 if self.gated else 2) * self.d_model * self.d_ff

    def layer_parameters(self, experts: int) -> int:
        """Parameters of one layer with ``experts`` of its experts: matrices, router, biases, norms."""
        D, norms = self.d_model, 1 if self.parallel else 2
        bias = (self.n_heads + 2 * self.n_kv_heads) * self.d_head + D + experts * (self.d_ff * (1 + self.gated) + D)
        router = D * self.experts if self.experts > 1 else 0
        qk_norms = self.qk_norm * (self.n_heads + self.n_kv_heads) * self.d_head
        return (self.attention_weights + experts * self.expert_weights + router + norms * D + qk_norms
                + self.biases * (bias + norms * D))

    def count(self, experts: int) -> int:
        """Parameters with ``experts`` experts per layer: embeddings, layers, final norm, head."""
        D = self.d_model
        embeddings = (self.vocab_size * (1 if self.tied else 2) + self.context * self.learned_positions) * D
        return embeddings + self.n_layers * self.layer_parameters(experts) + D * (1 + self.biases)

    @property
    def parameters(self) -> int:
        """N, all parameters."""
        return self.count(self.experts)

    @property
    def active_parameters(self) -> int:
        """The parameters that one token meets."""
        return self.count(self.experts_per_token)

    def forward_flops(self, length: int | None = None, causal: bool = False) -> float:
        """FLOPs per token of a text of ``length`` tokens (None: the context): layers, attention and head.

        ``causal`` counts only the half of Q K^T and its product with V that a causal kernel computes. Norms,
        softmax and activation functions are left out, as in torch's FlopCounterMode and in published MFUs.
        """
        length = self.context if length is None else length
        _positive(length=length)
        router = self.d_model * self.experts if self.experts > 1 else 0
        layer = self.attention_weights + self.experts_per_token * self.expert_weights + router
        scores = 4 * length * self.n_heads * self.d_head / (2 if causal else 1)
        return 2 * (self.n_layers * layer + self.vocab_size * self.d_model) + self.n_layers * scores

    def training_flops(self, length: int | None = None, causal: bool = False) -> float:
        """FLOPs per token, forward and backward (twice forward): 6 per weight, the head's too, and attention."""
        return 3 * self.forward_flops(length, causal)

    def activation_values(self, length: int, recompute: str = "none", flash: bool = True,
                          dropout: bool = False) -> tuple[float, float]:
        """Values that ONE layer keeps for backward, per token: (of the residual stream's width, all others).

        Tensor parallelism divides the others only, sequence parallelism both. Times 2 bytes in 16 bits, D = H Dh and
        Dff = 4 D this is s b h (34 + 5 a s / h) of Korthikanti et al. 2022 (2205.05198), eq. 2, with ``dropout``.

        Args:
            recompute: "none"; "selective" (Korthikanti's, which recompute.py omits): everything but the results of
                matrix products is computed again in backward; "block": everything but the layer's input.
            flash: the (T, T) scores are never stored.
        """
        _positive(length=length)
        if recompute not in ("none", "selective", "block"):
            raise ValueError(f"recompute must be none, selective or block, got {recompute!r}")
        D, inner, keys = self.d_model, self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        stream = (1 if self.parallel else 2) * D  # what enters each norm
        others = 2 * inner + 2 * keys  # q, k, v and the heads' outputs
        hidden = 2 * self.d_ff if self.gated else self.d_ff  # what enters the activation function
        if recompute == "block":
            return float(D), 0.0
        if recompute == "none":
            stream *= 2 if self.biases else 3  # what leaves each norm; RMSNorm as PyTorch runs it, x / rms(x) too
            hidden += (2 if self.gated else 1) * self.d_ff  # silu(gate) and the product, or gelu(up)
            others += 0 if flash else self.n_heads * length * (2.5 if dropout else 1)
            stream += D if dropout else 0  # two masks of one byte
        return float(stream), float(others + self.experts_per_token * hidden)

    def kv_cache_bytes(self, batch: int, length: int, bytes_per_value: float = 2) -> float:
        """Keys and values of every layer for ``batch`` sequences of ``length`` tokens."""
        _positive(batch=batch, length=length, bytes_per_value=bytes_per_value)
        return 2 * self.n_layers * self.n_kv_heads * self.d_head * batch * length * bytes_per_value


def gpt_shape(layers, width, heads, context=1024, vocab_size=50257, **rest) -> ModelShape:
    """GPT-2's form: LayerNorm, biases, learned positions, GELU, tied head."""
    return ModelShape(layers, width, heads, vocab_size, context, **rest)


def llama_shape(layers, width, heads, kv_heads, d_ff, context, vocab_size, **rest) -> ModelShape:
    """Llama's form: RMSNorm, no biases, rotary positions, SwiGLU, grouped queries, a head of its own."""
    form = dict(n_kv_heads=kv_heads, d_ff=d_ff, gated=True, biases=False, learned_positions=False, tied=False)
    return ModelShape(layers, width, heads, vocab_size, context, **(form | rest))


# Published sizes of Llama and Mistral are those of the released weights. All figures of papers in this file are quoted
# from memory, with the place where to look them up.
_GOPHER = dict(vocab_size=32000, biases=False, learned_positions=False, relative_positions=True)
MODELS = {
    # Radford et al. 2019, table 2 (parameters as corrected in the code's README); Brown et al. 2020, table 2.1
    "gpt2": gpt_shape(12, 768, 12, published=124e6, batch_tokens=2**19),
    "gpt2_medium": gpt_shape(24, 1024, 16, published=355e6, batch_tokens=2**19),
    "gpt2_large": gpt_shape(36, 1280, 20, published=774e6, batch_tokens=2**19),
    "gpt2_xl": gpt_shape(48, 1600, 25, published=1558e6, batch_tokens=2**19),
    "gpt3_175b": gpt_shape(96, 12288, 96, 2048, published=175e9, batch_tokens=1536 * 2048),
    # Chowdhery et al. 2022 (2204.02311), table 1; Hoffmann et al. 2022 (2203.15556), table 4
    "palm_540b": ModelShape(118, 18432, 48, 256000, 2048, n_kv_heads=1, d_head=256, gated=True, biases=False,
                            learned_positions=False, parallel=True, published=540.35e9, batch_tokens=2048 * 2048),
    "gopher_280b": gpt_shape(80, 16384, 128, 2048, **_GOPHER, published=280e9, batch_tokens=6 * 10**6),
    "chinchilla_70b": gpt_shape(80, 8192, 64, 2048, **_GOPHER, published=70e9, batch_tokens=3 * 10**6),
    # Touvron et al. 2023 (2302.13971, 2307.09288); Grattafiori et al. 2024 (2407.21783), table 3; Jiang et al. 2023,
    # 2024 (2310.06825, 2401.04088)
    "llama1_7b": llama_shape(32, 4096, 32, 32, 11008, 2048, 32000, published=6.738e9),
    "llama2_70b": llama_shape(80, 8192, 64, 8, 28672, 4096, 32000, published=68.98e9),
    "llama3_8b": llama_shape(32, 4096, 32, 8, 14336, 8192, 128256, published=8.03e9, batch_tokens=2**24),
    "llama3_70b": llama_shape(80, 8192, 64, 8, 28672, 8192, 128256, published=70.6e9, batch_tokens=2**24),
    "llama3_405b": llama_shape(126, 16384, 128, 8, 53248, 8192, 128256, published=405e9, batch_tokens=2**24),
    "mistral_7b": llama_shape(32, 4096, 32, 8, 14336, 8192, 32000, published=7.24e9),
    "mixtral_8x7b": llama_shape(32, 4096, 32, 8, 14336, 8192, 32000, experts=8, experts_per_token=2, published=46.7e9),
    # Narayanan et al. 2021 (2104.04473), table 1; the lecture's 298 layers (its 17480 is 17408 at the source)
    "megatron_1t": gpt_shape(128, 25600, 160, 2048, 51200, published=1008e9, batch_tokens=3072 * 2048),
    "lecture_1t": gpt_shape(298, 17480, 152, 2048, 51200, published=1.09e12, batch_tokens=2048 * 2048),
}


def shape_of(config) -> ModelShape:
    """The shape that a config of gpt.py or llama.py describes."""
    if hasattr(config, "rope_base"):
        return llama_shape(config.n_layers, config.d_model, config.n_heads, config.n_kv_heads, config.d_ff,
                           config.context, config.vocab_size, d_head=config.d_head, tied=config.tied,
                           qk_norm=config.qk_norm)
    return gpt_shape(config.n_layers, config.d_model, config.n_heads, config.context, config.vocab_size,
                     d_ff=config.d_ff)


def meta_parameters(build: Callable[[], torch.nn.Module]) -> int:
    """Parameters of the module that ``build()`` makes, counted on the meta device: no memory, any size."""
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


def _undrawn(model: type[torch.nn.Module]) -> type[torch.nn.Module]:
    return type(model.__name__, (model,), {"initialise": lambda self, generator: None})


# --- 3. memory -------------------------------------------------------------------------------

PRECISIONS = {  # bytes per parameter: weight, gradient, optimizer (fp32 master copy and Adam's two moments)
    "fp32": (4, 4, 8),
    "mixed": (2, 2, 12),  # Rajbhandari et al. 2020, section 3.1
    "mixed_fp32_gradient": (2, 4, 12),
    "bf16": (2, 2, 4),  # no fp32 anywhere: small updates are lost
}


def state_bytes(precision: str = "mixed", zero: int = 0, ranks: int = 1, offload: bool = False,
                gradients: bool = True) -> float:
    """Bytes per parameter that one GPU keeps for training, without activations: 16 for "mixed" on one GPU.

    Args:
        zero: 1 divides the optimizer by ``ranks``, 2 the gradients too, 3 the weights too (Rajbhandari et al. 2020).
        offload: optimizer and gradients live in the CPU's memory (ZeRO-Offload, 2101.06840): weights remain.
        gradients: False leaves them out: the lecture's 12 bytes (fp32 weight and two moments).
    """
    if precision not in PRECISIONS or zero not in (0, 1, 2, 3):
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)} and zero in 0 .. 3, "
                         f"got {precision!r} and {zero}")
    _positive(ranks=ranks)
    weight, gradient, optimizer = PRECISIONS[precision]
    parts = (weight / (ranks if zero == 3 else 1), gradients * gradient / (ranks if zero >= 2 else 1),
             optimizer / (ranks if zero >= 1 else 1))
    return parts[0] if offload else sum(parts)


def largest_model(memory: float, **state) -> float:
    """Parameters whose training state fills ``memory`` bytes per GPU; ``state`` as in ``state_bytes``."""
    _positive(memory=memory)
    return memory / state_bytes(**state)


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward while ``forward()`` runs: each storage once, parameters left out."""
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # alive to the end of the count
    del result
    return sum(storage.nbytes() for storage in storages.values())


# --- 4. machines -----------------------------------------------------------------------------

@dataclass(frozen=True)
class Accelerator:
    """One chip, by its maker's data sheet; links per chip and direction."""
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes/s
    peak: dict[str, float]  # dtype -> dense FLOP/s
    link: float  # bytes/s to the chips of its node
    network: float  # bytes/s to other nodes
    node: int  # chips that ``link`` joins
    dollars: float  # per hour: a round rental price, for orders of magnitude
    matmul: float = 0.85  # share of the best peak that a large 16-bit product reaches, as measured
    attention: float = 0.4  # share that FlashAttention reaches, forward and backward, causal, as measured

    @property
    def best(self) -> float:
        """FLOP/s in the 16-bit format that models are trained in."""
        return self.peak.get("bf16") or self.peak["fp16"]


def _chip(memory, bandwidth, peak, link, network, node, dollars, **measured):
    return Accelerator(memory * 1e9, bandwidth * 1e9, {name: value * 1e12 for name, value in peak.items()}, link * 1e9,
                       network * 1e9, node, dollars, **measured)


# Measured shares: products, S. Bekman's mamf-finder (271 of 312, 793 of 989); attention, Dao 2023 (187 of 312) and
# Shah et al. 2024 (328 of 989), FlashAttention-2 at width 128 and 16k tokens. The other chips' are guesses, TPU v4's
# too. Shares per chip came in after one pair for all chips had left Llama 3's runs too fast: see planner.py.
ACCELERATORS = {  # GB, GB/s, TFLOP/s without sparsity, GB/s, GB/s, chips, dollars
    "p100": _chip(16, 732, {"fp32": 10.6, "fp16": 21.2}, 80, 12.5 / 2, 8, 0.5),
    "v100": _chip(32, 900, {"fp32": 15.7, "fp16": 125}, 150, 12.5, 8, 1.0),
    "a100": _chip(80, 2039, {"fp32": 19.5, "bf16": 312}, 300, 25, 8, 1.5, matmul=0.87, attention=0.6),
    "h100": _chip(80, 3350, {"fp32": 67, "bf16": 989, "fp8": 1979}, 450, 50, 8, 2.5, matmul=0.80, attention=0.33),
    "h200": _chip(141, 4800, {"fp32": 67, "bf16": 989, "fp8": 1979}, 450, 50, 8, 3.0, matmul=0.80, attention=0.33),
    "b200": _chip(192, 8000, {"fp32": 80, "bf16": 2250, "fp8": 4500}, 900, 50, 8, 5.0),
    "rtx4090": _chip(24, 1008, {"fp32": 83, "bf16": 165}, 32, 3, 8, 0.4),
    "tpu_v4": _chip(32, 1200, {"bf16": 275}, 150, 1.65, 4096, 1.5),  # 3 torus axes of 50; 81 Tbit/s of 6144 chips
}


# --- 5. units --------------------------------------------------------------------------------

PETAFLOP_S_DAY = 1e15 * 86400  # FLOPs


def training_seconds(flops: float, chips: int, peak: float, mfu: float) -> float:
    """Seconds that ``flops`` (a quantity) take on ``chips`` of ``peak`` FLOP/s (a rate) at utilisation ``mfu``."""
    _positive(flops=flops, chips=chips, peak=peak, mfu=mfu)
    return flops / (chips * peak * mfu)


def training_cost(seconds: float, chips: int, dollars_per_hour: float) -> tuple[float, float]:
    """(GPU-days, dollars) of so many chips for so many seconds."""
    _positive(seconds=seconds, chips=chips, dollars_per_hour=dollars_per_hour)
    return chips * seconds / 86400, chips * seconds / 3600 * dollars_per_hour


def throughput(flops_per_token: float, chips: int, peak: float, mfu: float) -> float:
    """Tokens per second of ``chips`` of ``peak`` FLOP/s at utilisation ``mfu``."""
    _positive(flops_per_token=flops_per_token, chips=chips, peak=peak, mfu=mfu)
    return chips * peak * mfu / flops_per_token


def utilisation(flops_per_token: float, tokens_per_second: float, chips: int, peak: float) -> float:
    """Share of the peak: MFU if ``flops_per_token`` is what the model's formula asks for (6 N), HFU if it is what
    the hardware does (8 N with full recomputation). Chowdhery et al. 2022, appendix B."""
    _positive(flops_per_token=flops_per_token, tokens_per_second=tokens_per_second, chips=chips, peak=peak)
    return flops_per_token * tokens_per_second / (chips * peak)


# --- 6. the lectures' numbers ----------------------------------------------------------------

def lecture_numbers() -> list[tuple[str, float, float, float]]:
    """[(what, ours, the lecture's, relative tolerance: how far the lecture rounds)]."""
    big = MODELS["lecture_1t"]
    rate = 2048 * 4096 / 12.7  # tokens/s
    attention, feed_forward = layer_multiplications(4096, 4096)
    return [
        ("A6 attention over feed-forward weights", layer_weights(768)[0] / layer_weights(768)[1], 1 / 2, 0),
        ("A6 multiplications at T = D, in D^3", (attention + feed_forward) / 4096**3, 14, 0),
        ("A6 attention over feed-forward at T = D", attention / feed_forward, 6 / 8, 0),
        ("A7 298 layers of width 17480: 12 L D^2", big.n_layers * layer_weights(big.d_model)[2], 1.09e12, 0.005),
        ("A7 activations D T B per layer", big.d_model * 2048 * 2048, 7.3e10, 0.01),
        ("A8 GPUs of 8 x 64 x 8", 8 * 64 * 8, 4096, 0),
        ("B4 tokens for 175B at 20 per parameter", 20 * 175e9, 3.5e12, 0),
        ("B5 7B in fp32 with two moments, GB", 7 * state_bytes("fp32", gradients=False), 84, 0),
        ("C3 a petaflop/s-day in FLOPs", PETAFLOP_S_DAY, 8.64e19, 0),
        ("C4 1T tokens at 100M per hour, years", 1e12 / 1e8 / 24 / 365, 1.1, 0.05),
        ("C5 GPT-3's weights in fp32, GB", 175 * PRECISIONS["fp32"][0], 700, 0),
        ("D5 6 N D of 400M and 8.0B tokens", 6 * 400e6 * 8.0e9, 1.92e19, 0.001),
        ("D6 7B on 256 A100: tokens/s", rate, 0.66e6, 0.005),
        ("D6 tokens/s per GPU", rate / 256, 2580, 0.001),
        ("D6 MFU", utilisation(6 * 7e9, rate, 256, ACCELERATORS["a100"].best), 0.35, 0.015),
        ("D6 hours for 150B tokens", 150e9 / rate / 3600, 63, 0.005),
        ("D6 serial share for 500 x on 1000", (1 / 500 - 1 / 1000) / (1 - 1 / 1000), 0.001, 0.002),
        ("ZeRO paper, fig. 1: 7.5B on 64, stage 0, GB", 7.5 * state_bytes(), 120, 0.001),
        ("... stage 1", 7.5 * state_bytes(zero=1, ranks=64), 31.4, 0.002),
        ("... stage 2", 7.5 * state_bytes(zero=2, ranks=64), 16.6, 0.005),
        ("... stage 3", 7.5 * state_bytes(zero=3, ranks=64), 1.9, 0.02)]


# --- 7. demo ---------------------------------------------------------------------------------

def pick(table: dict, name: str, what: str):
    """table[name]; ValueError that names what there is."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}: choose from {', '.join(table)}")
    return table[name]


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


def save_figure(drawn, path: str) -> None:
    """Write a figure that ``new_figure`` made, and say so."""
    drawn.savefig(path)
    print(f"drawn: {path}")


def show_what_fits(gpu: str = "h100", gpus: int = 8) -> None:
    """Print which model fits on ``gpus`` of a kind, with which ZeRO stage."""
    chip = pick(ACCELERATORS, gpu, "GPU")
    _positive(gpus=gpus)
    peaks = ", ".join(f"{name} {value / 1e12:g}" for name, value in chip.peak.items())
    print(f"{gpu}: {chip.memory / 1e9:g} GB at {chip.bandwidth / 1e9:g} GB/s; TFLOP/s {peaks}; "
          f"link {chip.link / 1e9:g} GB/s, network {chip.network / 1e9:g} GB/s\n")
    stages = [(f"ZeRO-{zero}", dict(zero=zero, ranks=gpus)) for zero in range(4)] + [("offload", dict(offload=True))]
    print(f"largest model by training state alone, on {gpus} GPUs:   " + "   ".join(
        f"{name} {largest_model(chip.memory, **state) / 1e9:.1f}B" for name, state in stages) + "\n")
    print(f"{'GB per GPU: state + one sequence, recomputed':46}"
          + "".join(f"{name:>9}" for name, _ in stages) + "   fits with")
    count = 0
    for name, model in MODELS.items():
        whole = sum(model.activation_values(model.context))  # the one layer that is being computed again
        layers = model.n_layers * sum(model.activation_values(model.context, "block"))
        kept = 2 * model.context * (layers + whole) + 8 * model.context * model.vocab_size  # logits twice in fp32
        totals = [model.parameters * state_bytes(**state) + kept for _, state in stages]
        fits = [stage for (stage, _), total in zip(stages, totals) if total <= chip.memory]
        count += bool(fits)
        print(f"{name:46}" + "".join(f"{total / 1e9:9,.1f}" for total in totals)
              + f"   {fits[0] if fits else 'nothing'}")
    print(f"\n{count} of {len(MODELS)} models can be trained on {gpus} {gpu} by data parallelism and ZeRO or offload")


def show_tables() -> None:
    """Print counts and the lectures' numbers; ends with what agrees."""
    import gpt
    import llama

    print(f"{'model':16}{'parameters':>20}{'published':>11}{'off by':>8}{'active':>9}{'FLOPs/token':>13}{'over 6 N':>9}"
          f"{'fp32 GB':>9}{'KV cache GB':>12}")
    close = 0
    for name, model in MODELS.items():
        N, flops = model.parameters, model.training_flops()
        close += abs(N / model.published - 1) < 0.005
        print(f"{name:16}{N:>20,}{model.published / 1e9:>10,.2f}B{N / model.published - 1:>+8.2%}"
              f"{model.active_parameters / 1e9:>8.1f}B{flops:>13.3g}{flops / 6 / model.active_parameters:>9.3f}"
              f"{N * 4 / 1e9:>9,.0f}{model.kv_cache_bytes(1, model.context) / 1e9:>12.2f}")
    presets = [(gpt.GPT, config) for config in gpt.PRESETS.values()]
    presets += [(llama.Llama, config) for config in llama.PRESETS.values()]
    # Numbers drawn at random for no memory take their time all the same.
    exact = sum(shape_of(config).parameters == meta_parameters(lambda: _undrawn(model)(config))
                for model, config in presets)
    print(f"presets of gpt.py and llama.py, counted by formula and on the meta device: {exact} of {len(presets)} equal")
    print("\nthe lectures' numbers")
    right = 0
    for what, ours, theirs, tolerance in lecture_numbers():
        right += abs(ours / theirs - 1) <= tolerance + 1e-9
        print(f"  {what:46} {ours:>12.5g}   expected {theirs:.5g}")
    print(f"\nparameters within 0.5% of the published: {close} of {len(MODELS)};   the lectures' numbers: "
          f"{right} of {len(lecture_numbers())} (expected all)")


def main(**flags: str | float | bool | None) -> None:
    useful = {"plan": {"gpu", "gpus", "tokens", "plot"}, "validate": {"plot"}, "measure": {"tokens", "plot"},
              "fit": {"plot"}}
    given = {name: value for name, value in flags.items() if value is not None and value is not False}
    tasks = [name for name in useful if name in given]
    if len(tasks) > 1:
        raise ValueError(f"--{' and --'.join(tasks)} are different things: give one of them")
    task = tasks[0] if tasks else "gpu" if {"gpu", "gpus"} & set(given) else None
    if idle := set(given) - {task} - useful.get(task, {"gpu", "gpus"} if task else set()):
        raise ValueError(f"--{min(idle)} means nothing {'beside --' + task if task else 'alone'}")
    rest = {name: value for name, value in given.items() if name != task}
    if task in ("plan", "validate"):
        import planner
        planner.show_plan(flags["plan"], **rest) if task == "plan" else planner.show_validation(**rest)
    elif task == "measure":
        import ladder
        ladder.show_measure(**rest)
    elif task == "fit":
        import scaling_laws
        scaling_laws.show_fit(flags["fit"], **rest)
    elif task == "gpu":
        show_what_fits(**given)
    else:
        show_tables()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--gpu", help=f"one of {', '.join(ACCELERATORS)} (default h100)")
    parser.add_argument("--gpus", type=int, help="how many (default 8; 1024 with --plan)")
    parser.add_argument("--tokens", type=float, help="to train on (default 1e12 with --plan, 1e6 with --measure)")
    parser.add_argument("--plan", metavar="MODEL", help="rank the layouts of a model, such as llama3_405b")
    parser.add_argument("--validate", action="store_true", help="the planner's MFU beside that of published runs")
    parser.add_argument("--measure", action="store_true", help="train a ladder of GPTs, fit, predict a larger one")
    parser.add_argument("--fit", metavar="FILE.csv",
                        help="fit laws to columns N, D, loss ('chinchilla': to points of its law)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it (needs matplotlib)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
