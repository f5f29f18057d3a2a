"""GPT: a decoder-only transformer language model.   Radford et al. 2019 (GPT-2), Brown et al. 2020 (GPT-3)

Idea      p(x_1 ... x_T) = prod_t p(x_t | x_<t). One stack of identical blocks maps every prefix to a
          distribution over the next token; training maximises the log-probability of real text.
Formula   x   = W_e[token] + W_p[position]
          x   = x + Attention(LayerNorm(x));   x = x + MLP(LayerNorm(x))             L times (pre-norm)
          Attention(Q, K, V) = softmax(Q K^T / sqrt(Dh) + causal mask) V             H heads of width Dh = D/H
          MLP(x) = W_2 gelu(W_1 x + b_1) + b_2,   logits = LayerNorm(x) W_e^T        the head is tied to W_e
Shapes    tokens (B, T) -> x (B, T, D) -> logits (B, T, V)
Omits     dropout on attention weights; GPT-3's locally banded sparse layers (its sizes are here).
Run       python gpt.py    published sizes; then a tiny GPT learns the Zen of Python by heart: half a minute;
          Ends with "max |cached - uncached logits| = ..."
Test      pytest tests/test_gpt.py
"""

import argparse
import json
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
class GPTConfig:
    """The sizes of a GPT; the defaults are GPT-2 small's. A size that cannot be raises ValueError."""
    vocab_size: int = 50257
    context: int = 1024
    n_layers: int = 12
    n_heads: int = 12
    d_model: int = 768
    d_ff: int | None = None  # None: 4 * d_model
    dropout: float = 0.0  # on the embeddings and on both residual branches

    def __post_init__(self):
        self.d_ff = 4 * self.d_model if self.d_ff is None else self.d_ff
        for name in ("vocab_size", "context", "n_layers", "n_heads", "d_model", "d_ff"):
            if not isinstance(size := getattr(self, name), int) or size < 1:
                raise ValueError(f"{name} must be a whole number and at least 1, got {size!r}")
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads must divide d_model, got {self.n_heads} heads and width {self.d_model}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    @property
    def n_kv_heads(self) -> int:
        """Every query head has its own key and value head."""
        return self.n_heads


PRESETS = {  # GPT-2: Radford et al. 2019, table 2; GPT-3: Brown et al. 2020, table 2.1
    "gpt2": GPTConfig(n_layers=12, n_heads=12, d_model=768),
    "gpt2-medium": GPTConfig(n_layers=24, n_heads=16, d_model=1024),
    "gpt2-large": GPTConfig(n_layers=36, n_heads=20, d_model=1280),
    "gpt2-xl": GPTConfig(n_layers=48, n_heads=25, d_model=1600),
    "gpt3-175b": GPTConfig(context=2048, n_layers=96, n_heads=96, d_model=12288),
}


def count_parameters(config: GPTConfig) -> int:
    """Parameters of the model, the tied head counted once; with Dff = 4 D a layer has 12 D^2 + 13 D."""
    D, Dff = config.d_model, config.d_ff
    layer = 4 * D * D + 2 * D * Dff + 9 * D + Dff  # Q K V O and two MLP matrices; biases; two LayerNorms
    return (config.vocab_size + config.context) * D + config.n_layers * layer + 2 * D


def flops_per_token(config: GPTConfig, context: int | None = None) -> int:
    """FLOPs of one training step per token of a text of length ``context``; 6 N if V and T are small."""
    T, D, Dff, L = context or config.context, config.d_model, config.d_ff, config.n_layers
    weights = L * (4 * D * D + 2 * D * Dff) + config.vocab_size * D
    # 2 per multiply-add. Last: Q K^T and its product with V over all T keys; a causal kernel may do half.
    forward = 2 * weights + 4 * L * T * D
    return 3 * forward  # backward costs twice forward


# --- 2. attention ---------------------------------------------------------------------------

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


def unfused_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True) -> Tensor:
    """``attention`` by two products and a softmax, scale and mask inside the first product: fewer passes over the
    T x S matrix than the formula takes. In bf16 on a CPU, where the fused kernel's backward is slow, it is the fastest
    for training on short T; as in the formula, logits are rounded to bf16. All must be finite, hidden ones, too."""
    (B, H, T, Dh), (Hkv, S) = q.shape, k.shape[1:3]
    if is_causal and T > S:
        raise ValueError(f"{T} queries cannot be the last of {S} positions")
    k, v = k.reshape(B * Hkv, S, Dh), v.reshape(B * Hkv, S, Dh)
    mask = q.new_zeros(1, 1)
    if is_causal and T > 1:
        mask = torch.full((T, S), float("-inf"), dtype=q.dtype, device=q.device).triu(S - T + 1)
        mask = mask.repeat(H // Hkv, 1)  # (G T, S): queries of the heads that share keys are rows of one product
    scores = torch.baddbmm(mask, q.reshape(B * Hkv, H // Hkv * T, Dh), k.mT, alpha=Dh ** -0.5)  # (B Hkv, G T, S)
    return (torch.softmax(scores, -1) @ v).view(B, H, T, Dh)


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


# --- 3. the model ---------------------------------------------------------------------------

class SelfAttention(nn.Module):
    """Multi-head causal self-attention, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: GPTConfig, attention: Callable):
        super().__init__()
        self.d_head = config.d_model // config.n_heads
        # Rows ordered head by head (q, k, v of head 0, then of head 1, ...): cut between any two heads it is
        # two smaller layers of the same form. The number of heads is recovered from the width that is there.
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)
        self.attention = attention

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (-1, 3, self.d_head))  # (B, T, H, 3, Dh)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each (B, H, T, Dh)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, Dh)
        if cache is not None and cache.mask is not None:  # padded or packed rows: ``attention`` takes no mask
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask)
        else:
            y = self.attention(q, k, v, is_causal=True)  # (B, H, T, Dh)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    """(B, T, D) -> (B, T, D); the GELU by GPT-2's tanh formula."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """One layer, (B, T, D) -> (B, T, D)."""

    def __init__(self, config: GPTConfig, attention: Callable):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model)
        self.attention = SelfAttention(config, attention)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, start: int | Tensor = 0, cache: LayerCache | None = None) -> Tensor:
        """``start``, the first token's position, is unused: GPT's positions are all in the embedding."""
        x = x + self.drop(self.attention(self.norm1(x), cache))
        return x + self.drop(self.mlp(self.norm2(x)))

    def drop(self, y: Tensor) -> Tensor:  # while decoding a token even an F.dropout that does nothing takes time
        return F.dropout(y, self.dropout) if self.training and self.dropout else y


class GPT(nn.Module):
    """GPT-2 / GPT-3, with any exact implementation of attention; ``generator`` draws the weights.

    ``attention(q, k, v, is_causal=True)`` is not asked where rows are padded or packed: those need a mask.
    """

    # How tensor parallelism cuts each parameter: by output columns, by input rows, by vocabulary.
    tp_plan = {"token_embedding.weight": "vocab",
               "attention.qkv.weight": "column", "attention.qkv.bias": "column",
               "mlp.up.weight": "column", "mlp.up.bias": "column",
               "attention.out.weight": "row", "mlp.down.weight": "row"}

    def __init__(self, config: GPTConfig, attention: Callable = attention,
                 generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.context, config.d_model)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.initialise(generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Weights from N(0, 0.02^2), biases 0, LayerNorms (1, 0): Radford et al. 2018, section 4.1.

        The 2 L projections into the residual stream get 0.02 / sqrt(2 L), so that its variance at the top
        does not grow with depth: Radford et al. 2019, section 2.3.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif "norm" in name:
                p.fill_(1.0)
            else:
                into_residual = name.endswith(("out.weight", "down.weight"))
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
        if isinstance(start, Tensor):
            start = start.view(len(start), -1)  # (B, 1) or (B, T)
        # (T,), or (B, T) if rows are padded; slots of padding have no position of their own
        positions = (start + torch.arange(T, device=tokens.device)).clamp(min=0)
        try:
            x = self.token_embedding(tokens) + self.position_embedding(positions)
        except IndexError:  # on a CPU; to look at every batch on a GPU would make the CPU wait for it
            raise ValueError(f"token ids {int(tokens.min())} .. {int(tokens.max())} are not all in the vocabulary, "
                             f"0 .. {self.config.vocab_size - 1}") from None
        return F.dropout(x, self.config.dropout, self.training)

    def head(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> logits (B, T, V), by the same matrix that embeds the tokens."""
        return F.linear(self.norm(x), self.token_embedding.weight)

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
        weight, d_head = self.blocks[0].attention.qkv.weight, self.blocks[0].attention.d_head
        n_heads = weight.size(0) // (3 * d_head)  # a tensor-parallel shard has fewer than the config says
        return KVCache(len(self.blocks), batch, n_heads, max_len, d_head, weight.device, weight.dtype)

    # --- Hugging Face's format, both ways ---

    @classmethod
    def from_pretrained(cls, directory: str | Path, attention: Callable = attention) -> "GPT":
        """Read ``config.json`` and ``model.safetensors`` or its shards: a GPT in fp32, in evaluation mode.

        Raises ValueError for another model or a damaged file.
        """
        directory, state = Path(directory), {}
        config, theirs = _read_config(directory), _read_tensors(directory)
        with torch.device("meta"):  # nothing is drawn at random only to be overwritten
            model = cls(config, attention)
        for name, p in model.named_parameters():
            their_name = _hugging_face_name(name)
            if their_name not in theirs:
                raise ValueError(f"{directory}: tensor {their_name} is missing: is this a GPT-2 model?")
            w = theirs.pop(their_name).float()
            if p.dim() == 2 and "embedding" not in name:
                w = w.t()  # Hugging Face's Conv1D keeps (in, out)
            if w.shape != p.shape:
                raise ValueError(f"{directory}: {their_name} has shape {tuple(w.shape)}, "
                                 f"config.json says {tuple(p.shape)}")
            if ".qkv." in name:
                w = w.unflatten(0, (3, config.n_heads, -1)).transpose(0, 1).flatten(0, 2)  # by head
            state[name] = w.contiguous()
        for their_name in theirs:  # a layer that config.json does not know, or a part of one
            if their_name.startswith("h.") and not their_name.endswith((".attn.bias", ".attn.masked_bias")):
                raise ValueError(f"{directory}: {their_name} is in no GPT-2 of {config.n_layers} layers")
        model.load_state_dict(state, assign=True)
        return model.eval()

    def save_pretrained(self, directory: str | Path, eot: int | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` as transformers' ``GPT2LMHeadModel`` reads them.

        ``eot``: id of the end-of-text token, at which transformers stops generation.
        """
        directory, tensors, save_file = Path(directory), {}, _safetensors().torch.save_file
        for name, p in self.named_parameters():
            w = p.detach().cpu()
            if ".qkv." in name:
                w = w.unflatten(0, (self.config.n_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            if p.dim() == 2 and "embedding" not in name:
                w = w.t()
            tensors["transformer." + _hugging_face_name(name)] = w.contiguous()
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        sizes = {theirs: getattr(self.config, ours) for theirs, ours in _HUGGING_FACE_SIZES.items()}
        ours = {"architectures": ["GPT2LMHeadModel"], "embd_pdrop": self.config.dropout, "attn_pdrop": 0.0,
                "bos_token_id": eot, "eos_token_id": eot}
        (directory / "config.json").write_text(json.dumps(_HUGGING_FACE_FORM | sizes | ours, indent=2) + "\n")


_HUGGING_FACE_SIZES = {"vocab_size": "vocab_size", "n_positions": "context", "n_layer": "n_layers",
                       "n_head": "n_heads", "n_embd": "d_model", "n_inner": "d_ff", "resid_pdrop": "dropout"}
_HUGGING_FACE_FORM = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                      "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
                      "tie_word_embeddings": True}  # what is computed here, and nothing else


def _hugging_face_name(name: str) -> str:
    for ours, theirs in (("token_embedding", "wte"), ("position_embedding", "wpe"), ("blocks", "h"),
                         ("norm1", "ln_1"), ("norm2", "ln_2"), ("norm.", "ln_f."), ("attention.", "attn."),
                         (".qkv", ".c_attn"), (".out", ".c_proj"), (".up", ".c_fc"), (".down", ".c_proj")):
        name = name.replace(ours, theirs)
    return name


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("this needs the safetensors package: pip install safetensors") from None
    return safetensors


def _read_config(directory: Path) -> GPTConfig:
    try:
        theirs = {"resid_pdrop": 0.1} | json.loads((directory / "config.json").read_text())
        sizes = {ours: theirs[key] for key, ours in _HUGGING_FACE_SIZES.items() if key in theirs}
        config = GPTConfig(**sizes)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{directory} is no Hugging Face GPT-2: config.json: {error}") from None
    for key, value in _HUGGING_FACE_FORM.items():
        if theirs.get(key, value) != value:
            raise ValueError(f"{directory}: config.json has {key} = {theirs[key]!r}, GPT computes {value!r}")
    return config


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    safetensors, tensors, whole = _safetensors(), {}, directory / "model.safetensors"
    for file in [whole] if whole.exists() else sorted(directory.glob("model-*.safetensors")):
        try:
            tensors |= safetensors.torch.load_file(file)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file}: {error}: damaged or cut short, copy it again") from None
    if not tensors:
        raise ValueError(f"{directory}: no model*.safetensors is there: copy it beside config.json")
    return {name.removeprefix("transformer."): w for name, w in tensors.items()}


# --- 4. loss --------------------------------------------------------------------------------

def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log p(target) in nats, in fp32 or finer: logits (B, T, V), targets (B, T) -> scalar."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


# --- 5. demo --------------------------------------------------------------------------------

def main(steps: int, seed: int) -> None:
    if steps < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"--steps must be at least 1 and --seed in 0 .. 2^32 - 1, got {steps} and {seed}")
    for name, config in PRESETS.items():
        print(f"{name:12} {count_parameters(config):>15,} parameters, "
              f"{flops_per_token(config):.2e} FLOPs per training token")

    text = torch.tensor(list(subprocess.check_output([sys.executable, "-m", "this"])))  # (857,) bytes
    generator = torch.Generator().manual_seed(seed)
    config = GPTConfig(vocab_size=128, context=64, n_layers=2, n_heads=4, d_model=128)
    model = GPT(config, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    print(f"\nlearning {len(text)} bytes by heart with {count_parameters(config):,} parameters")
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
    parser.add_argument("--steps", type=int, default=500, help="training steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and batches (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
