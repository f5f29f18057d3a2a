"""T5: every task as text in, text out, by one encoder-decoder.   Raffel et al. 2019 (1910.10683)

Idea      Translate, classify, answer: whatever the task, its name is put in front of the input as words, the
          answer is text, and model, loss and decoding stay the same. The model is the Transformer with three
          changes: no positions in the embedding, but a learned bias on each attention score by the distance of
          the two words; RMSNorm (no mean, no bias) before each sub-layer; no other biases, and no 1 / sqrt(Dh).
Formula   softmax(Q K^T + b[bucket(s - t)] + mask) V        one b (buckets, H) per stack, shared by its layers
          bucket(d) = |d| itself for small |d|, then steps of equal ratio up to max_distance; in the encoder
          keys to the right have buckets of their own, the decoder looks to the left alone
          x = x + Sublayer(RMSNorm(x)),   FFN(x) = max(0, x W_1) W_2;   1.1: (gelu(x W_g) * x W_1) W_2
Shapes    source (B, S), inputs (B, T) -> memory (B, S, D) -> logits (B, T, V); right-padded with id ``pad``
Omits     pre-training's objective, which is in span_corruption.py; SentencePiece (any encoder of text will do: see
          tokenizer.py); Adafactor; dropout inside the attention and the feed-forward.
Run       python t5.py     published sizes; then a tiny T5 learns the four tasks of figure 1 by heart: 20 s
          Ends with "... of 4 answers right (expected all)"
Test      pytest tests/test_t5.py
"""

import argparse
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


# --- 1. config ------------------------------------------------------------------------------

@dataclass
class T5Config:
    """The sizes of a T5; the defaults are T5-small's. A size that cannot be raises ValueError."""
    vocab_size: int = 32128
    n_layers: int = 6  # of the encoder
    n_decoder_layers: int | None = None  # None: as many
    n_heads: int = 8
    d_model: int = 512
    d_head: int = 64  # free: n_heads * d_head need not be d_model
    d_ff: int = 2048
    n_buckets: int = 32
    max_distance: int = 128  # beyond it all distances share the last bucket
    dropout: float = 0.1  # on the embeddings and on every sub-layer's output
    gated: bool = False  # True: version 1.1's feed-forward
    tied: bool = True  # the head is the embedding, divided by sqrt(D); False, as in 1.1: a matrix of its own
    eps: float = 1e-6
    pad: int = 0  # also the decoder's first input
    eos: int = 1

    def __post_init__(self):
        self.n_decoder_layers = self.n_layers if self.n_decoder_layers is None else self.n_decoder_layers
        for name in ("vocab_size", "n_layers", "n_decoder_layers", "n_heads", "d_model", "d_head", "d_ff",
                     "n_buckets", "max_distance"):
            if not isinstance(size := getattr(self, name), int) or size < 1:
                raise ValueError(f"{name} must be a whole number and at least 1, got {size!r}")
        if self.n_buckets % 4 or self.max_distance <= self.n_buckets // 2:
            raise ValueError("n_buckets must be a multiple of 4 and less than twice max_distance, "
                             f"got {self.n_buckets} buckets and distance {self.max_distance}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name in ("pad", "eos"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name} must be an id of the vocabulary, in 0 .. {self.vocab_size - 1}, "
                                 f"got {getattr(self, name)}")


PRESETS = {  # sections 2.1 and 3.7; their real names are t5-small ... t5-11b
    "small": T5Config(),
    "base": T5Config(n_layers=12, n_heads=12, d_model=768, d_ff=3072),
    "large": T5Config(n_layers=24, n_heads=16, d_model=1024, d_ff=4096),
    "3b": T5Config(n_layers=24, n_heads=32, d_model=1024, d_head=128, d_ff=16384),
    "11b": T5Config(n_layers=24, n_heads=128, d_model=1024, d_head=128, d_ff=65536),
}


# --- 2. positions: buckets of distances -----------------------------------------------------

def naive_bucket(distance: int, bidirectional: bool, n_buckets: int = 32, max_distance: int = 128) -> int:
    """The bucket of one distance, key's position minus query's.   section 2.1; the constants from T5's code

    One half of the buckets (of each direction's) is one distance each, the other grows by equal ratios.
    """
    offset = 0
    if bidirectional:
        n_buckets //= 2
        offset, distance = n_buckets if distance > 0 else 0, abs(distance)
    else:
        distance = max(-distance, 0)  # the future is masked anyway
    exact = n_buckets // 2
    if distance < exact:
        return offset + distance
    # Whole powers by comparison, not by a logarithm, whose rounding would decide.
    ratio, steps = max_distance / exact, n_buckets - exact
    return offset + max(exact + i for i in range(steps) if distance >= exact * ratio ** (i / steps) * (1 - 1e-9))


def relative_position_bucket(distance: Tensor, bidirectional: bool, n_buckets: int = 32,
                             max_distance: int = 128) -> Tensor:
    """``naive_bucket`` of a whole tensor of distances (int64), by the logarithm; same shape."""
    offset = 0
    if bidirectional:
        n_buckets //= 2
        offset = (distance > 0) * n_buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = n_buckets // 2
    # In fp32, as the published models were trained: for other sizes than theirs rounding may move an edge by one.
    steps = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact) * (n_buckets - exact)
    far = (exact + steps.long()).clamp(max=n_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)


class PositionBias(nn.Module):
    """What is added to the attention scores of all layers of a stack: learned, by head and bucket of distance."""

    def __init__(self, config: T5Config, bidirectional: bool):
        super().__init__()
        self.bias = nn.Embedding(config.n_buckets, config.n_heads)
        self.bidirectional, self.max_distance = bidirectional, config.max_distance

    def forward(self, T: int, S: int) -> Tensor:
        """(1, H, T, S) for queries that are the last T of S positions."""
        positions = torch.arange(S, device=self.bias.weight.device)
        distance = positions - positions[S - T:, None]  # (T, S)
        buckets = relative_position_bucket(distance, self.bidirectional, self.bias.num_embeddings, self.max_distance)
        return self.bias(buckets).permute(2, 0, 1)[None]  # (1, H, T, S)


# --- 3. the parts that the Transformer has too, but for RMSNorm -----------------------------

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


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
                     scale: float | None = None) -> Tensor:
    """softmax(scale Q K^T + mask) V by torch's fused kernels; scale: None is 1 / sqrt(Dh).

    q (B, H, T, Dh), k and v (B, H, S, Dh) -> (B, H, T, Dh); mask, broadcast to (B, H, T, S): bool, True where a query
    may look, and every query at something; or numbers that are added.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def causal_mask(T: int, S: int, device: torch.device | None = None) -> Tensor:
    """(T, S), True where a query may look: the queries are the LAST T of S positions, and none sees the future."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


class MultiHeadAttention(nn.Module):
    """H attentions side by side, each in its own Dh dimensions, mixed by W^O.   1706.03762, section 3.2.2

    Args:
        d_head: Dh, the width of one head.
        scale: factor on Q K^T; None: 1 / sqrt(Dh).
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int, scale: float | None = None):
        super().__init__()
        self.d_head, self.scale = d_head, scale
        self.q = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.k = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.v = nn.Linear(d_model, n_heads * d_head, bias=False)
        self.out = nn.Linear(n_heads * d_head, d_model, bias=False)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None,
                cache: list[Tensor] | None = None) -> Tensor:
        """x (B, T, D) asks, source (B, S, D) answers, which in self-attention is x itself -> (B, T, D).

        cache: a list, empty at first, in which the keys and values stay from call to call. In self-attention
        those of x are put behind them; those of another source are computed in the first call alone.
        """
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.d_head)).transpose(1, 2)  # (B, H, T or S, Dh)

        if cache and source is not x:
            k, v = cache
        else:
            k, v = heads(self.k(source)), heads(self.v(source))
            if cache:
                k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)  # (B, H, all so far, Dh)
            if cache is not None:
                cache[:] = k, v
        y = masked_attention(heads(self.q(x)), k, v, mask, self.scale)  # (B, H, T, Dh)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)


class FeedForwardT5(nn.Module):
    """(B, T, D) -> (B, T, D), without biases; GELU by its tanh formula where it is gated."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=False) if config.gated else None
        self.up = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(F.relu(self.up(x)))
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))


class T5Block(nn.Module):
    """A layer of the encoder, or with ``cross`` of the decoder: x (B, T, D) -> (B, T, D). Q K^T is not scaled."""

    def __init__(self, config: T5Config, cross: bool):
        super().__init__()
        width, heads = (config.d_model, config.eps), (config.d_model, config.n_heads, config.d_head, 1.0)
        self.self_norm, self.self_attention = RMSNorm(*width), MultiHeadAttention(*heads)
        if cross:
            self.cross_norm, self.cross_attention = RMSNorm(*width), MultiHeadAttention(*heads)
        self.feed_forward_norm, self.feed_forward = RMSNorm(*width), FeedForwardT5(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None = None, memory_mask: Tensor | None = None,
                cache: tuple[list, list] = (None, None)) -> Tensor:
        y = self.self_norm(x)
        x = x + F.dropout(self.self_attention(y, y, bias, cache[0]), self.dropout, self.training)
        if memory is not None:
            y = self.cross_attention(self.cross_norm(x), memory, memory_mask, cache[1])
            x = x + F.dropout(y, self.dropout, self.training)
        return x + F.dropout(self.feed_forward(self.feed_forward_norm(x)), self.dropout, self.training)


# --- 4. the model ---------------------------------------------------------------------------

class T5Stack(nn.Module):
    """Encoder, or with ``cross`` decoder: the blocks, the bias that they share, the norm on top."""

    def __init__(self, config: T5Config, n_layers: int, cross: bool):
        super().__init__()
        self.position_bias = PositionBias(config, bidirectional=not cross)
        self.blocks = nn.ModuleList(T5Block(config, cross) for _ in range(n_layers))
        self.norm = RMSNorm(config.d_model, config.eps)
        self.dropout = config.dropout

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor | None = None, memory_mask: Tensor | None = None,
                cache: list | None = None) -> Tensor:
        """x (B, T, D), mask (B or 1, 1, T or 1, S) -> (B, T, D)."""
        x = F.dropout(x, self.dropout, self.training)
        bias = self.position_bias(x.size(1), mask.size(-1)).type_as(x).masked_fill(~mask, float("-inf"))
        for i, block in enumerate(self.blocks):
            x = block(x, bias, memory, memory_mask, (None, None) if cache is None else cache[i])
        return F.dropout(self.norm(x), self.dropout, self.training)


class T5(nn.Module):
    """The encoder-decoder; ``generator`` draws the weights. Any length: there is no table of positions."""

    def __init__(self, config: T5Config, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config, config.n_layers, cross=False)
        self.decoder = T5Stack(config, config.n_decoder_layers, cross=True)
        self.head = None if config.tied else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.initialise(generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Every matrix N(0, 1 / its inputs), which keeps variances at 1; W^Q divided by sqrt(Dh), because the
        scores are not; the embedding N(0, 1); gains 1. (The paper does not say; its code does.)"""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(1.0)
            elif name == "embedding.weight":
                p.normal_(0.0, 1.0, generator=generator)
            else:
                inputs = self.config.d_model if "bias" in name else p.size(1)
                std = inputs ** -0.5 * (self.config.d_head ** -0.5 if name.endswith(".q.weight") else 1.0)
                p.normal_(0.0, std, generator=generator)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T, D)."""
        if tokens.dim() != 2 or not tokens.numel():
            raise ValueError(f"tokens must be (B, T) and not empty, got shape {tuple(tokens.shape)}")
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(f"token ids {low} .. {high} are not all in the vocabulary, "
                             f"0 .. {self.config.vocab_size - 1}")
        return self.embedding(tokens)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source (B, S) -> the memory (B, S, D), and its mask (B, 1, 1, S), False on padding."""
        x, mask = self.embed(source), (source != self.config.pad)[:, None, None]  # (B, S, D), (B, 1, 1, S)
        if not (filled := mask.any(-1).flatten()).all():
            raise ValueError(f"row {filled.tolist().index(False)} of the source is nothing but padding")
        return self.encoder(x, mask), mask

    def decode(self, inputs: Tensor, memory: Tensor, memory_mask: Tensor, cache: list | None = None) -> Tensor:
        """inputs (B, T) -> logits (B, T, V) of the token after each.

        With a cache, ``inputs`` are the tokens that it does not hold yet.
        """
        if inputs.size(0) != memory.size(0):  # one row would be taken for all
            raise ValueError(f"source and inputs must have as many rows, got {memory.size(0)} and {inputs.size(0)}")
        start = cache[0][0][0].size(2) if cache and cache[0][0] else 0
        T = inputs.size(1)
        mask = causal_mask(T, start + T, inputs.device)
        x = self.decoder(self.embed(inputs), mask[None, None], memory, memory_mask, cache)
        if self.head is not None:
            return self.head(x)
        return F.linear(x * self.config.d_model ** -0.5, self.embedding.weight)

    def forward(self, source: Tensor, inputs: Tensor) -> Tensor:
        """source (B, S), inputs (B, T), both right-padded -> logits (B, T, V). ``shift_right`` makes the inputs."""
        return self.decode(inputs, *self.encode(source))

    def new_cache(self) -> list[tuple[list, list]]:
        """For ``decode``: per layer, the keys and values of the inputs so far and of the memory."""
        return [([], []) for _ in self.decoder.blocks]

    # --- Hugging Face's format, both ways ---

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "T5":
        """Read ``config.json`` and ``model.safetensors`` or its shards: a T5 in fp32, in evaluation mode.

        Raises:
            ValueError: for another model or a damaged file; names every tensor that is missing, misshapen or
                not T5's. One tensor that no T5 uses but the first published ones contain is a warning.
        """
        directory = Path(directory)
        config, theirs = _read_config(directory), _read_tensors(directory)
        copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"] + ["lm_head.weight"] * config.tied
        for name in [name for name in copies if name in theirs]:
            if not torch.equal(theirs.setdefault("shared.weight", theirs[name]), theirs.pop(name)):
                raise ValueError(f"{directory}: {name} is not the same as shared.weight, of which it must be a copy")
        if not config.tied and "shared.weight" in theirs:  # a file that keeps one copy of two equal matrices
            theirs.setdefault("lm_head.weight", theirs["shared.weight"].clone())
        unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        if theirs.pop(unused, None) is not None:
            warnings.warn(f"{directory}: {unused} is left out: cross-attention has no position bias")
        with torch.device("meta"):  # nothing is drawn at random only to be overwritten
            model = cls(config)
        wanted = {_hugging_face_name(name, config): (name, p) for name, p in model.named_parameters()}
        problems = [f"{name} is missing" for name in wanted if name not in theirs]
        problems += [f"{name} is in no T5 of this config.json" for name in theirs if name not in wanted]
        problems += [f"{name} has shape {tuple(theirs[name].shape)}, config.json says {tuple(p.shape)}"
                     for name, (_, p) in wanted.items() if name in theirs and theirs[name].shape != p.shape]
        if problems:
            raise ValueError(f"{directory}: {'; '.join(problems)}")
        state = {name: theirs[their_name].float() for their_name, (name, _) in wanted.items()}
        model.load_state_dict(state, assign=True)
        return model.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` as ``T5ForConditionalGeneration`` reads them."""
        directory, save_file = Path(directory), _safetensors().torch.save_file
        tensors = {_hugging_face_name(name, self.config): p.detach().cpu().contiguous()
                   for name, p in self.named_parameters()}
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        sizes = {theirs: getattr(self.config, ours) for theirs, ours in _HUGGING_FACE_SIZES.items()}
        form = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "is_encoder_decoder": True,
                "feed_forward_proj": "gated-gelu" if self.config.gated else "relu",
                "tie_word_embeddings": self.config.tied, "decoder_start_token_id": self.config.pad}
        (directory / "config.json").write_text(json.dumps(form | sizes, indent=2) + "\n")


_HUGGING_FACE_SIZES = {  # their names of what T5Config has
    "vocab_size": "vocab_size", "num_layers": "n_layers", "num_decoder_layers": "n_decoder_layers",
    "num_heads": "n_heads", "d_model": "d_model", "d_kv": "d_head", "d_ff": "d_ff",
    "relative_attention_num_buckets": "n_buckets", "relative_attention_max_distance": "max_distance",
    "dropout_rate": "dropout", "layer_norm_epsilon": "eps", "pad_token_id": "pad", "eos_token_id": "eos"}


def _hugging_face_name(name: str, config: T5Config) -> str:
    feed_forward = "layer.2." if name.startswith("decoder") else "layer.1."
    for ours, theirs in (("position_bias.bias", "block.0.layer.0.SelfAttention.relative_attention_bias"),
                         ("blocks", "block"), (".out.", ".o."), ("coder.norm.gain", "coder.final_layer_norm.weight"),
                         ("self_norm.gain", "layer.0.layer_norm.weight"),
                         ("cross_norm.gain", "layer.1.layer_norm.weight"),
                         ("feed_forward_norm.gain", feed_forward + "layer_norm.weight"),
                         ("self_attention", "layer.0.SelfAttention"), ("cross_attention", "layer.1.EncDecAttention"),
                         ("feed_forward.gate", feed_forward + "DenseReluDense.wi_0"),
                         ("feed_forward.up", feed_forward + "DenseReluDense.wi" + "_1" * config.gated),
                         ("feed_forward.down", feed_forward + "DenseReluDense.wo"),
                         ("embedding.weight", "shared.weight"), ("head.weight", "lm_head.weight")):
        name = name.replace(ours, theirs)
    return name


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("this needs the safetensors package: pip install safetensors") from None
    return safetensors


def _read_config(directory: Path) -> T5Config:
    try:
        theirs = json.loads((directory / "config.json").read_text())
        if theirs.get("model_type") not in ("t5", "mt5"):
            raise ValueError(f"model_type is {theirs.get('model_type')!r}, not 't5'")
        form = theirs.get("feed_forward_proj", "relu")
        if form not in ("relu", "gated-gelu"):
            raise ValueError(f"feed_forward_proj is {form!r}, T5 computes 'relu' or 'gated-gelu'")
        # Where the head is not scaled it is version 1.1's, also in a file that keeps one copy of two equal ones.
        scaled = theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings") is not False)
        sizes = {ours: theirs[key] for key, ours in _HUGGING_FACE_SIZES.items() if key in theirs}
        return T5Config(**sizes, gated=form == "gated-gelu", tied=scaled)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{directory} is no Hugging Face T5: config.json: {error}") from None


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    safetensors, tensors, whole = _safetensors(), {}, directory / "model.safetensors"
    for file in [whole] if whole.exists() else sorted(directory.glob("model-*.safetensors")):
        try:
            tensors |= safetensors.torch.load_file(file)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file}: {error}: damaged or cut short, copy it again") from None
    if not tensors:
        raise ValueError(f"{directory}: no model*.safetensors is there: copy it beside config.json")
    return tensors


@torch.inference_mode()
def greedy_decode(model: nn.Module, source: Tensor, start: int, stop: int, max_new_tokens: int) -> list[list[int]]:
    """The likeliest next token, again and again, all rows at once: source (B, S) -> B lists of ids.

    ``start`` is the decoder's first input; a row ends before its first ``stop``, or with ``max_new_tokens`` ids.
    """
    was_training = model.training
    model.eval()
    try:
        memory, cache = model.encode(source), model.new_cache()
        tokens = [source.new_full((source.size(0), 1), start)]
        stopped = torch.zeros_like(tokens[0], dtype=torch.bool)  # (B, 1)
        while len(tokens) <= max_new_tokens and not stopped.all():
            tokens.append(model.decode(tokens[-1], *memory, cache)[:, -1].argmax(-1, keepdim=True))  # (B, 1)
            stopped |= tokens[-1] == stop
    finally:
        model.train(was_training)
    rows = torch.cat(tokens, 1)[:, 1:].tolist()
    return [row[:row.index(stop)] if stop in row else row for row in rows]


# --- 5. training: every task has the same loss ----------------------------------------------

def shift_right(targets: Tensor, start: int = 0) -> Tensor:
    """The decoder's inputs for targets (B, T): each token is to be foretold from those before it, (B, T)."""
    return F.pad(targets[:, :-1], (1, 0), value=start)


def target_loss(logits: Tensor, targets: Tensor, pad: int = 0) -> Tensor:
    """Mean of -log p(target) in nats over the targets that are not ``pad``: (B, T, V), (B, T) -> scalar."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit")
    if not (targets != pad).any():
        raise ValueError(f"all {targets.numel()} targets are padding: nothing to learn")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=pad)


# --- 6. demo --------------------------------------------------------------------------------

EXAMPLES = {  # figure 1 of the paper
    "translate English to German: That is good.": "Das ist gut.",
    "cola sentence: The course is jumping well.": "not acceptable",
    "stsb sentence1: The rhino grazed on the grass. sentence2: A rhino is grazing in a field.": "3.8",
    "summarize: state authorities dispatched emergency crews tuesday to survey the damage after an onslaught of "
    "severe weather in mississippi": "six people hospitalized after a storm in attala county.",
}


def main(steps: int, version: str, seed: int) -> None:
    if steps < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"--steps must be at least 1 and --seed in 0 .. 2^32 - 1, got {steps} and {seed}")
    published_sizes = {"small": "60 million", "base": "220 million", "3b": "2.8 billion", "11b": "11 billion"}
    for name, published in published_sizes.items():
        with torch.device("meta"):
            n_parameters = sum(p.numel() for p in T5(PRESETS[name]).parameters())
        print(f"T5-{name:6}{n_parameters:>15,} parameters (published: {published})")
    distances = torch.tensor([-200, -100, -50, -20, -8, -7, -2, -1, 0, 1, 2, 7, 8, 20, 50, 100, 200])
    print("distance        ", *(f"{d:4}" for d in distances.tolist()))
    for stack, bidirectional in (("encoder", True), ("decoder", False)):
        print(f"{stack}'s bucket", *(f"{b:4}" for b in relative_position_bucket(distances, bidirectional).tolist()))

    def rows(texts) -> Tensor:
        """Bytes, 2 added because 0 is padding and 1 the end: (B, longest)."""
        return pad_sequence([torch.tensor([*(byte + 2 for byte in text.encode()), 1]) for text in texts], True)

    source, targets = rows(EXAMPLES), rows(EXAMPLES.values())
    config = T5Config(258, n_layers=2, n_heads=4, d_model=64, d_head=16, d_ff=256, dropout=0.0,
                      gated=version == "1.1", tied=version == "1.0")
    model = T5(config, torch.Generator().manual_seed(seed))
    # Adafactor's steps are in proportion to a parameter's size; that of the embedding is 1, of others about 0.1.
    optimizer = torch.optim.Adam([{"params": [p], "lr": 3e-2 if name == "embedding.weight" else 3e-3}
                                  for name, p in model.named_parameters()])
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"\nlearning figure 1's four tasks by heart, byte by byte, with {n_parameters:,} parameters")
    for step in range(1, steps + 1):
        loss = target_loss(model(source, shift_right(targets)), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in (1, steps) or step % 50 == 0:
            expected = f"  (expected ln V + 1/2 = {math.log(258) + 0.5:.2f})" if step == 1 else ""
            print(f"step {step:>6}/{steps}  loss {loss.item():.3f}{expected}")

    answers = greedy_decode(model, source, 0, 1, 80)
    answers = [bytes(max(i - 2, 0) for i in row).decode(errors="replace") for row in answers]
    for question, answer in zip(EXAMPLES, answers):
        print(f"  {question[:60]}{'...' * (len(question) > 60)}\n    -> {answer}")
    print(f"{sum(a == b for a, b in zip(answers, EXAMPLES.values()))} of 4 answers right (expected all)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--steps", type=int, default=200, help="training steps (default %(default)s)")
    parser.add_argument("--version", default="1.0", choices=("1.0", "1.1"),
                        help="1.1 is gated, untied (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
