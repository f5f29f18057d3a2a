"""The Transformer: an encoder-decoder made of attention alone.   Vaswani et al. 2017 (1706.03762)

Idea      A recurrent network reads a sentence word after word. Attention lets every position look at every other
          in one step, so all positions are computed at once, and no path between two words is longer than a layer.
Formula   Attention(Q, K, V) = softmax(Q K^T / sqrt(Dh) + mask) V                                   (eq. 1)
          MultiHead(X, Y) = Concat(head_1 .. head_H) W^O,  head_h = Attention(X W^Q_h, Y W^K_h, Y W^V_h)
          FFN(x) = max(0, x W_1 + b_1) W_2 + b_2                                                    (eq. 2)
          PE(t, 2i) = sin(t / 10000^(2i/D)),  PE(t, 2i+1) = cos(t / 10000^(2i/D))                (section 3.5)
          post-norm  x = LayerNorm(x + Sublayer(x))    the paper's
          pre-norm   x = x + Sublayer(LayerNorm(x))    bears higher learning rates (2002.04745); a LayerNorm on top
          encoder layer: self-attention, FFN;   decoder layer: causal self-attention, attention to the encoder, FFN
Shapes    source (B, S), targets (B, T) -> memory (B, S, D) -> logits (B, T, V); right-padded with id ``pad``
Omits     beam search (decode.py has one); T5's way with the same parts (t5.py has it).
Run       python transformer.py    translates numbers and dates, beside rnn_nmt.py's translators: 1 to 2 minutes
          Ends with "better than both in both: ..."
          python transformer.py --data fra.tsv    sentence pairs of your own, Tatoeba's say
Test      pytest tests/test_transformer.py
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# --- 1. config ------------------------------------------------------------------------------

@dataclass
class TransformerConfig:
    """The sizes of a Transformer; the defaults are the base model's. A size that cannot be raises ValueError."""
    vocab_size: int = 37000  # of the targets; of both sides if they share one vocabulary, as in the paper
    source_vocab_size: int | None = None  # None: shared, and then one matrix embeds both sides (section 3.4)
    context: int = 512  # longest sentence on either side
    n_layers: int = 6  # of the encoder, and again of the decoder
    n_heads: int = 8
    d_model: int = 512
    d_ff: int = 2048
    dropout: float = 0.1  # on every sub-layer's output and on the embeddings (section 5.4)
    norm_first: bool = False  # False: post-norm, True: pre-norm
    pad: int = 0  # the id that fills up short sentences

    def __post_init__(self):
        for name in ("vocab_size", "source_vocab_size", "context", "n_layers", "n_heads", "d_model", "d_ff"):
            size = getattr(self, name)
            if (name, size) != ("source_vocab_size", None) and (not isinstance(size, int) or size < 1):
                raise ValueError(f"{name} must be a whole number and at least 1, got {size!r}")
        if self.d_model % self.n_heads or self.d_model % 2:
            raise ValueError("n_heads must divide d_model, and d_model be even (a sine and a cosine each), "
                             f"got {self.n_heads} heads and width {self.d_model}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 <= self.pad < (V := min(self.vocab_size, self.source_vocab_size or self.vocab_size)):
            raise ValueError(f"pad must be an id of the vocabulary, in 0 .. {V - 1}, got {self.pad}")


BASE = TransformerConfig()  # table 3 of the paper
BIG = TransformerConfig(d_model=1024, d_ff=4096, n_heads=16, dropout=0.3)


# --- 2. positions ---------------------------------------------------------------------------

def naive_positions(length: int, d_model: int) -> Tensor:
    """PE as section 3.5 writes it, number by number: (length, D) in float64."""
    table = torch.zeros(length, d_model, dtype=torch.float64)
    for t in range(length):
        for i in range(d_model // 2):
            angle = t / 10000 ** (2 * i / d_model)
            table[t, 2 * i], table[t, 2 * i + 1] = math.sin(angle), math.cos(angle)
    return table


def sinusoidal_positions(length: int, d_model: int) -> Tensor:
    """``naive_positions`` at once. PE(t + s) is a fixed rotation of PE(t): distances are easy to learn."""
    exponents = torch.arange(0, d_model, 2, dtype=torch.float64) / d_model  # (D/2,)
    angles = torch.arange(length, dtype=torch.float64)[:, None] / 10000 ** exponents  # (length, D/2)
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)  # (length, D)


# --- 3. attention ---------------------------------------------------------------------------

def naive_masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
                           scale: float | None = None) -> Tensor:
    """softmax(scale Q K^T + mask) V, with every matrix of the formula in sight.   eq. 1

    q (B, H, T, Dh), k and v (B, H, S, Dh) -> (B, H, T, Dh). mask, broadcast to (B, H, T, S): bool, True where
    a query may look, and every query at something; or numbers that are added. scale: None is 1 / sqrt(Dh).
    """
    scores = q @ k.mT * (q.size(-1) ** -0.5 if scale is None else scale)  # (B, H, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1) @ v


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


# --- 4. the layers --------------------------------------------------------------------------

class FeedForward(nn.Module):
    """The same two-layer network at every position, (B, T, D) -> (B, T, D).   eq. 2"""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff)
        self.down = nn.Linear(config.d_ff, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class Residual(nn.Module):
    """A sub-layer's surroundings: dropout, the way around it, and LayerNorm after (post) or before (pre)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model)
        self.dropout, self.norm_first = config.dropout, config.norm_first

    def forward(self, x: Tensor, sublayer: Callable) -> Tensor:
        """``sublayer`` maps (B, T, D) to (B, T, D), and so does this."""
        if self.norm_first:
            return x + F.dropout(sublayer(self.norm(x)), self.dropout, self.training)
        return self.norm(x + F.dropout(sublayer(x), self.dropout, self.training))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, x (B, S, D) -> (B, S, D)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        d_head = config.d_model // config.n_heads
        self.self_attention = MultiHeadAttention(config.d_model, config.n_heads, d_head)
        self.feed_forward = FeedForward(config)
        self.residuals = nn.ModuleList(Residual(config) for _ in range(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.residuals[0](x, lambda y: self.self_attention(y, y, mask))
        return self.residuals[1](x, self.feed_forward)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the memory, feed-forward, x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        d_head = config.d_model // config.n_heads
        self.self_attention = MultiHeadAttention(config.d_model, config.n_heads, d_head)
        self.cross_attention = MultiHeadAttention(config.d_model, config.n_heads, d_head)
        self.feed_forward = FeedForward(config)
        self.residuals = nn.ModuleList(Residual(config) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, memory_mask: Tensor | None = None,
                cache: tuple[list, list] = (None, None)) -> Tensor:
        x = self.residuals[0](x, lambda y: self.self_attention(y, y, mask, cache[0]))
        x = self.residuals[1](x, lambda y: self.cross_attention(y, memory, memory_mask, cache[1]))
        return self.residuals[2](x, self.feed_forward)


# --- 5. the model ---------------------------------------------------------------------------

class Transformer(nn.Module):
    """The encoder-decoder; ``generator`` draws the weights."""

    def __init__(self, config: TransformerConfig, generator: torch.Generator | None = None):
        super().__init__()
        self.config = config
        self.target_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.source_embedding = self.target_embedding  # one matrix under two names, unless there are two vocabularies
        if config.source_vocab_size is not None:
            self.source_embedding = nn.Embedding(config.source_vocab_size, config.d_model)
        positions = sinusoidal_positions(config.context, config.d_model).to(torch.get_default_dtype())  # (context, D)
        self.register_buffer("positions", positions, persistent=False)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.n_layers))
        # Pre-norm layers leave their sum unnormalised; the top of a post-norm stack is a LayerNorm already.
        self.encoder_norm = nn.LayerNorm(config.d_model) if config.norm_first else nn.Identity()
        self.decoder_norm = nn.LayerNorm(config.d_model) if config.norm_first else nn.Identity()
        self.initialise(generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Matrices by Glorot & Bengio 2010, eq. 16; embeddings N(0, 1/D), so that the logits start with variance 1
        and, times sqrt(D), the embeddings too; LayerNorms (1, 0), biases 0. (The paper leaves this to its code.)"""
        for name, p in self.named_parameters():
            if "embedding" in name:
                p.normal_(0.0, self.config.d_model ** -0.5, generator=generator)
            elif p.dim() == 2:
                nn.init.xavier_uniform_(p, generator=generator)
            else:
                p.fill_(1.0 if name.endswith("norm.weight") else 0.0)

    def embed(self, tokens: Tensor, embedding: nn.Embedding, start: int = 0) -> Tensor:
        """sqrt(D) * E[token] + PE: tokens (B, T), the first at position ``start`` -> (B, T, D).   section 3.4"""
        if tokens.dim() != 2 or not tokens.numel():
            raise ValueError(f"tokens must be (B, T) and not empty, got shape {tuple(tokens.shape)}")
        end = start + tokens.size(1)
        if end > self.config.context:
            raise ValueError(f"a sequence of {end} tokens does not fit a context of {self.config.context}")
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= embedding.num_embeddings:
            raise ValueError(f"token ids {low} .. {high} are not all in the vocabulary, "
                             f"0 .. {embedding.num_embeddings - 1}")
        x = embedding(tokens) * math.sqrt(self.config.d_model) + self.positions[start:end]
        return F.dropout(x, self.config.dropout, self.training)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """source (B, S) -> the memory (B, S, D), and its mask (B, 1, 1, S), False on padding."""
        mask = (source != self.config.pad)[:, None, None]  # (B, 1, 1, S)
        x = self.embed(source, self.source_embedding)
        if not (filled := mask.any(-1).flatten()).all():
            raise ValueError(f"row {filled.tolist().index(False)} of the source is nothing but padding")
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x), mask

    def decode(self, targets: Tensor, memory: Tensor, memory_mask: Tensor, cache: list | None = None) -> Tensor:
        """targets (B, T) -> logits (B, T, V) of the token after each, by the matrix that embeds them too.

        With a cache, ``targets`` are the tokens that it does not hold yet. Padding behind a sentence needs no
        mask: nothing before it looks there.
        """
        if targets.size(0) != memory.size(0):  # one row would be taken for all
            raise ValueError("source and targets must have as many rows, "
                             f"got {memory.size(0)} and {targets.size(0)}")
        start = cache[0][0][0].size(2) if cache and cache[0][0] else 0
        x = self.embed(targets, self.target_embedding, start)
        T = targets.size(1)
        mask = causal_mask(T, start + T, targets.device)
        for i, layer in enumerate(self.decoder):
            x = layer(x, mask, memory, memory_mask, (None, None) if cache is None else cache[i])
        return F.linear(self.decoder_norm(x), self.target_embedding.weight)

    def forward(self, source: Tensor, targets: Tensor) -> Tensor:
        """source (B, S), targets (B, T), both right-padded -> logits (B, T, V) of the token after each target."""
        return self.decode(targets, *self.encode(source))

    def new_cache(self) -> list[tuple[list, list]]:
        """For ``decode``: per layer, the keys and values of the targets so far and of the memory."""
        return [([], []) for _ in self.decoder]


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


# --- 6. the loss and the schedule -----------------------------------------------------------

def naive_label_smoothing_loss(logits: Tensor, targets: Tensor, smoothing: float, pad: int) -> Tensor:
    """-sum_v p(v) log q(v), p being 1 - smoothing on the target plus smoothing / V on every word.   section 5.4

    logits (B, T, V), targets (B, T) -> mean in nats over the targets that are not ``pad``.
    """
    V, total, count = logits.size(-1), logits.new_zeros(()), 0
    for row, target in zip(logits.flatten(0, -2), targets.flatten().tolist()):
        if target != pad:
            p = torch.full((V,), smoothing / V, dtype=logits.dtype, device=logits.device)
            p[target] += 1 - smoothing
            total, count = total - (p * row.log_softmax(-1)).sum(), count + 1
    return total / count


def label_smoothing_loss(logits: Tensor, targets: Tensor, smoothing: float = 0.1, pad: int = 0) -> Tensor:
    """``naive_label_smoothing_loss`` without the distributions p; in fp32 or finer. Smoothing 0: cross-entropy.

    Raises ValueError for a smoothing outside [0, 1], shapes that do not fit, targets that are all padding.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be in [0, 1], got {smoothing}")
    if not (real := targets != pad).any():
        raise ValueError(f"all {targets.numel()} targets are padding: nothing to learn")
    logits = logits[real].to(torch.promote_types(logits.dtype, torch.float32))  # (N, V)
    # log q(v) = logit(v) - log sum exp: the target's logit and the mean logit are all that p weighs.
    target = logits.gather(-1, targets[real, None])[:, 0]  # (N,)
    expected = (1 - smoothing) * target + smoothing * logits.mean(-1)
    return (logits.logsumexp(-1) - expected).mean()


def warmup_learning_rate(step: int, d_model: int, warmup_steps: int = 4000) -> float:
    """The learning rate of step 1, 2, ...: up in a straight line, then down as 1 / sqrt(step).   eq. 3"""
    if step < 1 or warmup_steps < 1:
        raise ValueError(f"step and warmup_steps must be at least 1, got {step} and {warmup_steps}")
    return d_model ** -0.5 * min(step ** -0.5, step * warmup_steps ** -1.5)


# --- 7. training and demo -------------------------------------------------------------------

def train(model: Transformer, batches: Iterable[tuple[Tensor, ...]], steps: int, warmup_steps: int = 200,
          smoothing: float = 0.1) -> list[float]:
    """Section 5.3's Adam and schedule; what stays is the mean of the weights over the last seventh of the steps, in
    place of the paper's mean of five checkpoints (section 6.1).

    batches: endless, of source (B, S), its lengths, inputs (B, T) and targets (B, T), as of pairs.endless_batches.
    Returns the loss of every step, in nats per word.
    """
    parameters, losses, began = list(model.parameters()), [], time.perf_counter()
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.98), eps=1e-9, fused=True)
    mean, n_averaged = [torch.zeros_like(p) for p in parameters], 0
    model.train()
    for step, batch in zip(range(1, steps + 1), batches):
        source, _, inputs, targets = (x.to(parameters[0].device) for x in batch)
        loss = label_smoothing_loss(model(source, inputs), targets, smoothing, model.config.pad)
        optimizer.zero_grad()
        loss.backward()
        # 0.3: the demo's batches have 500 words, the paper's 25,000.
        optimizer.param_groups[0]["lr"] = 0.3 * warmup_learning_rate(step, model.config.d_model, warmup_steps)
        optimizer.step()
        losses.append(loss.item())
        if step > steps - max(1, steps // 7):
            n_averaged += 1
            torch._foreach_lerp_(mean, [p.detach() for p in parameters], 1 / n_averaged)
        if step % 100 == 0:
            print(f"step {step:>6}/{steps}  loss {sum(losses[-100:]) / 100:.3f}  "
                  f"{time.perf_counter() - began:4.0f} s", flush=True)
    with torch.no_grad():
        for p, m in zip(parameters, mean):
            p.copy_(m)
    return losses


def main(data: str | None, language: str | None, post_norm: bool, steps: int, warmup_steps: int, smoothing: float,
         text: str | None, seed: int) -> None:
    if steps < 2 or warmup_steps < 1 or not 0 <= smoothing <= 1 or not 0 <= seed < 2**32:
        raise ValueError("--steps must be at least 2, --warmup_steps at least 1, --label_smoothing in [0, 1] and "
                         f"--seed in 0 .. 2^32 - 1, got {steps}, {warmup_steps}, {smoothing} and {seed}")
    if data and language:
        raise ValueError("--language chooses the generated corpus and --data brings another: give one of them")
    import rnn_nmt
    from bleu import bleu, exact_match
    from pairs import (END, PAD, START, build_vocabulary, endless_batches, read_corpus, to_ids, to_text, to_words,
                       translate)
    from rnn import Recurrent

    training, test = read_corpus(data, language, steps // 2, seed)
    vocabularies = tuple(build_vocabulary(side) for side in zip(*((pair.source, pair.target) for pair in training)))
    if text is not None:
        to_ids([to_words(text)], vocabularies[0])  # refuses what cannot be translated
    for name, config, published in (("base", BASE, 65), ("big", BIG, 213)):
        with torch.device("meta"):
            n_parameters = sum(p.numel() for p in Transformer(config).parameters())
        print(f"{name:5} {n_parameters:>12,} parameters (table 3: {published} million)")
    longest = max(max(len(pair.source), len(pair.target)) for pair in training + test)
    config = TransformerConfig(len(vocabularies[1]), len(vocabularies[0]), context=3 * longest + 64, n_layers=2,
                               n_heads=4, d_model=128, d_ff=256, dropout=0.0, norm_first=not post_norm, pad=PAD)
    model = Transformer(config, torch.Generator().manual_seed(seed))
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"\n{len(training)} pairs to train on, {len(test)} held out; {len(vocabularies[0])} and "
          f"{config.vocab_size} words; {n_parameters:,} parameters\n"
          f"{to_text(test[0].source)}\n= {to_text(test[0].target)}\n")

    sources, references = [to_text(pair.source) for pair in test], [to_text(pair.target) for pair in test]
    scores = {}  # name of a translator -> % translated without a mistake, BLEU

    def score(name: str, search: Callable[[Tensor, Tensor], list[list[int]]]) -> None:
        ours = translate(search, sources, *vocabularies)
        scores[name] = exact_match(ours, references), bleu(ours, references)

    def greedy(source: Tensor, lengths: Tensor) -> list[list[int]]:
        return greedy_decode(model, source, START, END, min(2 * source.size(1) + 10, config.context))

    losses = train(model, endless_batches(training, *vocabularies, 32, seed), steps, warmup_steps, smoothing)
    # Variance 1 of the logits adds one half. With pre-norm the word that was read is still in x, and the tied head
    # takes it for the next one.
    expected = f"about ln V + 1/2 = {math.log(config.vocab_size) + 0.5:.2f}" + ", and 1 to 2 more" * (not post_norm)
    print(f"loss {losses[0]:.2f} (expected {expected}) -> {losses[-1]:.4f}", flush=True)
    score(f"Transformer, {'post' if post_norm else 'pre'}-norm", greedy)
    if text is not None:
        print(f"\n{text}\n-> {translate(greedy, [text], *vocabularies)[0]}\n")

    print(f"now the recurrent translators of rnn_nmt.py, on as many sentences ({steps // 2} batches of 64) ...")
    torch.set_num_threads(1)  # of their small products a second thread takes more time than it saves
    for attention in (None, "dot"):
        sizes = rnn_nmt.TranslatorConfig(*map(len, vocabularies), attention=attention)
        rival = rnn_nmt.Translator(sizes, Recurrent, torch.Generator().manual_seed(seed))
        rnn_nmt.train(rival, endless_batches(training, *vocabularies, 64, seed), steps // 2, seed=seed)
        score(f"LSTM, {attention or 'no'} attention", lambda *source: rnn_nmt.greedy_translations(rival, *source)[0])
    print(f"{'% right':>32}    BLEU")
    for name, (right, points) in scores.items():
        print(f"{name:24} {right:7.1f} {points:7.1f}")
    (right, points), *others = scores.values()
    print(f"better than both in both: {all(right > r and points > p for r, p in others)} (expected True)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", help="file of lines: sentence, tab, translation (default: generated ones)")
    parser.add_argument("--language", choices=["french", "german"], help="of the generated pairs (default french)")
    parser.add_argument("--post_norm", action="store_true",
                        help="the paper's, needs more steps (default: pre-norm)")
    parser.add_argument("--steps", type=int, default=600, help="of training, batches of 32 (default %(default)s)")
    parser.add_argument("--warmup_steps", type=int, default=200,
                        help="of the learning rate (default %(default)s; paper 4000)")
    parser.add_argument("--label_smoothing", dest="smoothing", type=float, default=0.1,
                        help="share of a target that goes to all words (default %(default)s)")
    parser.add_argument("--translate", dest="text", help="a sentence to translate after training")
    parser.add_argument("--seed", type=int, default=0,
                        help="of the corpus, initial weights and batches (default %(default)s)")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ? for it
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
