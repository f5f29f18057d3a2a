"""Translation by recurrent networks and attention.   Bahdanau et al. 2015 (1409.0473); Luong et al. 2015 (1508.04025)

Idea      To translate, one recurrent network reads the source into its last state; another, begun with that state,
          writes the target word by word. The state is a bottleneck: however long the source, it is all that is
          handed over. Attention hands over every state of the encoder, and the decoder chooses, word by word, which
          of them to look at.
Formula   attention   a(t, s) = softmax over s of score(h_t, e_s),   context_t = sum_s a(t, s) e_s
          score       dot  h e      general  h W e      concat  v tanh(W h + U e)        (Luong, section 3.1)
          word t + 1  softmax(W_o tanh(W_c [context_t; h_t])),  of the words before it and of the source
Shapes    source (B, S), inputs (B, T), padded on the right -> logits (B, T, V), attention (B, T, S)
Omits     stacked layers, dropout, subwords, Luong's local attention, coverage. The recurrent layer is handed in:
          rnn.py has it; the demo's sentences and batches are pairs.py's, its scores bleu.py's.
Run       python rnn_nmt.py                      two translators of numbers and dates: under a minute;
                                                 ends with "the longest fifth: ..."
          python rnn_nmt.py --language german --translate "ninety-seven"        or --plot nmt.png
          python rnn_nmt.py --data fra.tsv       sentence pairs of your own, Tatoeba's say
Test      pytest tests/test_rnn_nmt.py
"""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]  # (h,) of an RNN or GRU, (h, c) of an LSTM; each (B, D)
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # source (B, S), lengths (B,), inputs (B, T), targets (B, T)
PAD, START, END = range(3)  # the first ids of both vocabularies


# --- 1. the translator ------------------------------------------------------------------------

@dataclass
class TranslatorConfig:
    """The sizes and the kind of a translator. ValueError for a size that cannot be."""
    source_vocab_size: int
    target_vocab_size: int
    d_embedding: int = 64
    d_model: int = 128  # D of the decoder; each direction of the encoder has half of it
    cell: str = "lstm"  # what ``layer`` is asked for: rnn, gru or lstm
    attention: str | None = "dot"  # dot, general, concat; None: the encoder's last state is all there is
    input_feeding: bool = False  # the decoder reads its last attention vector beside each word: Luong, section 3.3

    def __post_init__(self):
        for name in ("source_vocab_size", "target_vocab_size", "d_embedding", "d_model"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.d_model % 2:
            raise ValueError(f"d_model must be even, half for each direction of the encoder, got {self.d_model}")


class SourceAttention(nn.Module):
    """Which encoder states a decoder state looks at, by one of three scores.   Luong et al. 2015, eq. 7 and 8"""

    def __init__(self, kind: str, d_model: int):
        super().__init__()
        if kind not in ("dot", "general", "concat"):
            raise ValueError(f"attention must be 'dot', 'general', 'concat' or None, got {kind!r}")
        self.kind = kind
        if kind != "dot":
            self.key = nn.Linear(d_model, d_model, bias=False)
        if kind == "concat":
            self.query, self.v = nn.Linear(d_model, d_model, bias=False), nn.Linear(d_model, 1, bias=False)

    def keys(self, states: Tensor) -> Tensor:
        """What of a score depends on the source alone, and is computed once: (B, S, D) -> (B, S, D)."""
        return states if self.kind == "dot" else self.key(states)

    def forward(self, h: Tensor, keys: Tensor, states: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """h (B, T, D); keys, states (B, S, D); inside (B, S), False on padding -> context (B, T, D), a (B, T, S)."""
        if self.kind == "concat":
            scores = self.v(torch.tanh(self.query(h)[:, :, None] + keys[:, None]))[..., 0]  # (B, T, S)
        else:
            scores = h @ keys.mT  # (B, T, S)
        a = scores.masked_fill(~inside[:, None], float("-inf")).softmax(-1)
        return a @ states, a


class Memory(NamedTuple):
    """What the decoder is given. Without attention it uses the first part alone."""
    state: State  # the encoder's last, both directions side by side
    states: Tensor  # (B, S, D)
    keys: Tensor  # (B, S, D)
    inside: Tensor  # (B, S), False on padding

    def rows(self, index: Tensor) -> "Memory":
        """The same for some rows of the batch, or for one of them several times."""
        return Memory(tuple(part[index] for part in self.state), *(part[index] for part in self[1:]))


class Translator(nn.Module):
    """A bidirectional encoder and a decoder, with attention or without.

    Args:
        config: sizes, cell and attention.
        layer: rnn.Recurrent or its like. layer(d_input, d_model, cell, reverse, generator, forget_bias) makes a
            module that takes (x, state or None, lengths or None) to the outputs (B, S, d_model) and the last state.
        generator: draws the weights.
    """

    def __init__(self, config: TranslatorConfig, layer: Callable[..., nn.Module],
                 generator: torch.Generator | None = None):
        super().__init__()
        self.config, D, E = config, config.d_model, config.d_embedding
        self.source_embedding = nn.Embedding(config.source_vocab_size, E)
        self.target_embedding = nn.Embedding(config.target_vocab_size, E)
        self.forwards = layer(E, D // 2, config.cell, False, generator, forget_bias=1.0)
        self.backwards = layer(E, D // 2, config.cell, True, generator, forget_bias=1.0)
        self.decoder = layer(E + D * config.input_feeding, D, config.cell, False, generator, forget_bias=1.0)
        self.attention = SourceAttention(config.attention, D) if config.attention is not None else None
        self.combine = nn.Linear(2 * D if self.attention else D, D, bias=False)  # W_c
        self.head = nn.Linear(D, config.target_vocab_size)
        for name, p in self.named_parameters():
            if "_embedding" in name:
                nn.init.normal_(p, 0.0, 1.0, generator=generator)
            elif not name.startswith(("forwards", "backwards", "decoder")):
                nn.init.uniform_(p, -D ** -0.5, D ** -0.5, generator=generator)

    def encode(self, source: Tensor, lengths: Tensor) -> Memory:
        """source (B, S), lengths (B,) -> what the decoder is given. ValueError for shapes that do not fit."""
        if source.dim() != 2 or lengths.shape != source.shape[:1]:
            raise ValueError(f"source must be (B, S) and lengths (B,), got shapes {tuple(source.shape)} and "
                             f"{tuple(lengths.shape)}")
        x = self.source_embedding(source)  # (B, S, E)
        left, left_state = self.forwards(x, None, lengths)
        right, right_state = self.backwards(x, None, lengths)
        states = torch.cat((left, right), -1)  # (B, S, D)
        return Memory(tuple(torch.cat(both, -1) for both in zip(left_state, right_state)), states,
                      self.attention.keys(states) if self.attention else states,
                      torch.arange(source.size(1), device=source.device) < lengths[:, None])

    def start(self, memory: Memory) -> tuple[State, Tensor]:
        """The decoder's first state, and the attention vector that input feeding begins with."""
        return memory.state, torch.zeros_like(memory.state[0])

    def decode(self, tokens: Tensor, memory: Memory,
               state: tuple[State, Tensor]) -> tuple[Tensor, Tensor | None, tuple[State, Tensor]]:
        """Given words, from START on: tokens (B, T) -> logits (B, T, V) of the words after them, the attention
        (B, T, S) or None, and the state after them. Only input feeding needs to go step by step here."""
        if self.config.input_feeding and tokens.size(1) > 1:
            steps = []
            for token in tokens.split(1, 1):
                steps.append(self.decode(token, memory, state))
                state = steps[-1][2]
            logits, attention, _ = zip(*steps)
            return torch.cat(logits, 1), torch.cat(attention, 1) if self.attention else None, state
        x, (hidden, vector), a = self.target_embedding(tokens), state, None
        if self.config.input_feeding:
            x = torch.cat((x, vector[:, None]), -1)  # (B, 1, E + D)
        h, hidden = self.decoder(x, hidden)  # (B, T, D)
        if self.attention:
            context, a = self.attention(h, memory.keys, memory.states, memory.inside)  # (B, T, D), (B, T, S)
            h = torch.cat((context, h), -1)  # (B, T, 2 D)
        vectors = torch.tanh(self.combine(h))  # (B, T, D)
        return self.head(vectors), a, (hidden, vectors[:, -1])

    def forward(self, source: Tensor, lengths: Tensor, inputs: Tensor, sampling: float = 0.0,
                generator: torch.Generator | None = None) -> Tensor:
        """source (B, S), lengths (B,), inputs (B, T): START and the target -> logits (B, T, V) of the next words.

        Sampling 0 is teacher forcing: the decoder reads the true words. Scheduled sampling: each word after START
        is with probability ``sampling`` drawn from the decoder's own prediction.   Bengio et al. 2015 (1506.03099)
        """
        if not 0 <= sampling <= 1:
            raise ValueError(f"sampling must be in [0, 1], got {sampling}")
        memory = self.encode(source, lengths)
        state = self.start(memory)
        if not sampling:
            return self.decode(inputs, memory, state)[0]
        token, written = inputs[:, :1], []
        for t in range(inputs.size(1)):
            if t:
                own = torch.multinomial(written[-1][:, 0].detach().softmax(-1), 1, generator=generator)  # (B, 1)
                coins = torch.rand(own.shape, generator=generator, device=own.device)
                token = torch.where(coins < sampling, own, inputs[:, t:t + 1])
            logits, _, state = self.decode(token, memory, state)
            written.append(logits)
        return torch.cat(written, 1)


def translation_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log p(word) in nats over the words and ENDs that are not padding: (B, T, V), (B, T) -> scalar."""
    if logits.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit")
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)


# --- 2. translating ---------------------------------------------------------------------------

@torch.inference_mode()
def greedy_translations(model: Translator, source: Tensor, lengths: Tensor,
                        max_words: int | None = None) -> tuple[list[list[int]], list[Tensor] | None]:
    """The likeliest next word again and again, all rows at once: source (B, S), lengths (B,) -> B lists of ids, and
    B attention matrices (words, S) or None. A row ends before END, or with max_words (None: 2 S + 10) ids."""
    max_words = 2 * source.size(1) + 10 if max_words is None else max_words
    if max_words < 1:
        raise ValueError(f"max_words must be at least 1, got {max_words}")
    memory, written, looked = model.encode(source, lengths), [], []
    state, token = model.start(memory), torch.full_like(source[:, :1], START)
    ended = torch.zeros_like(token, dtype=torch.bool)  # (B, 1)
    while len(written) < max_words and not ended.all():
        logits, a, state = model.decode(token, memory, state)
        token = logits.argmax(-1)  # (B, 1)
        ended |= token == END
        written.append(token)
        looked.append(a)
    rows = torch.cat(written, 1).tolist()
    rows = [row[:row.index(END)] if END in row else row for row in rows]
    return rows, [a[:len(row)] for a, row in zip(torch.cat(looked, 1), rows)] if model.attention else None


@torch.inference_mode()
def beam_translation(model: Translator, source: Tensor, beams: int, max_words: int | None = None,
                     length_penalty: float = 1.0) -> tuple[list[int], float]:
    """The translation found with the highest log p / words^length_penalty, END counted as a word, and this score.

    source (S,). Every step keeps the ``beams`` likeliest beginnings; those that end leave the beam. A length penalty
    of 0 compares sums of log p, which favours short ones, 1 compares means.   Wu et al. 2016 (1609.08144), section 7
    """
    max_words = 2 * len(source) + 10 if max_words is None else max_words
    if beams < 1 or max_words < 1 or source.dim() != 1:
        raise ValueError(f"beams and max_words must be at least 1 and source (S,), got {beams}, {max_words} and "
                         f"shape {tuple(source.shape)}")
    memory = model.encode(source[None], torch.tensor([len(source)], device=source.device))
    state, texts, log_p = model.start(memory), [[]], memory.states.new_zeros(1, 1)
    found = (-math.inf, [])
    for n in range(1, max_words + 1):
        tokens = torch.tensor([[text[-1] if text else START] for text in texts], device=source.device)  # (beams, 1)
        logits, _, state = model.decode(tokens, memory.rows(torch.zeros_like(tokens[:, 0])), state)
        totals = (log_p + logits[:, 0].log_softmax(-1)).flatten()  # (beams V,)
        best, alive = totals.topk(min(2 * beams, totals.numel())), []  # a beam has one way to end: enough go on
        for total, index in zip(best.values.tolist(), best.indices.tolist()):
            beam, token = divmod(index, logits.size(-1))
            if token == END or n == max_words:
                found = max(found, (total / n ** length_penalty, texts[beam] + [token] * (token != END)))
            elif len(alive) < beams:
                alive.append((beam, token, total))
        # log p only falls, and no sentence gets longer than max_words: nothing alive can do better than this.
        if not alive or max(alive[0][2] / length ** length_penalty for length in (n, max_words)) <= found[0]:
            break
        index = torch.tensor([beam for beam, _, _ in alive], device=source.device)
        state = (tuple(part[index] for part in state[0]), state[1][index])
        texts = [texts[beam] + [token] for beam, token, _ in alive]
        log_p = log_p.new_tensor([[total] for _, _, total in alive])
    return found[1], found[0]


# --- 3. training and demo ---------------------------------------------------------------------

def train(model: Translator, batches: Iterable[Batch], steps: int, sampling: float = 0.0, seed: int = 0) -> list[float]:
    """Adam, the learning rate warmed up over 50 steps, then falling to zero; the probability of scheduled sampling
    rises from 0 to ``sampling``.

    batches: endless, as of pairs.endless_batches. Returns the loss of every step, in nats per word.
    """
    device = model.head.weight.device
    optimizer, losses = torch.optim.Adam(model.parameters(), fused=True), []
    generator = torch.Generator(device).manual_seed(seed)
    for step, batch in zip(range(steps), batches):
        source, lengths, inputs, targets = (x.to(device) for x in batch)
        loss = translation_loss(model(source, lengths, inputs, sampling * step / steps, generator), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # against exploding gradients: Pascanu et al. 2013
        optimizer.param_groups[0]["lr"] = 4e-3 * min((step + 1) / 50, 1 - step / steps)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.inference_mode()
def attention_to(model: Translator, batch: Batch) -> list[Tensor]:
    """Where the decoder looks while it is given the references: (target words, source words) for each of B pairs."""
    source, lengths, inputs, targets = batch
    memory = model.encode(source, lengths)
    a = model.decode(inputs, memory, model.start(memory))[1]  # (B, T, S)
    words = (targets != PAD).sum(1) - 1  # (B,), without END
    return [rows[:t, :s] for rows, t, s in zip(a, words.tolist(), lengths.tolist())]


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


def _draw(figure, by_length: dict[str, dict[str, float]], a: Tensor, source: list[str], target: list[str],
          links: Iterable[tuple[int, int]]) -> None:
    bottleneck, looking = figure.subplots(1, 2, width_ratios=(1, 1.4))
    for name, shares in by_length.items():
        bottleneck.plot(list(shares), list(shares.values()), "o-", label=name)
    bottleneck.set(title="the bottleneck", xlabel="words of the source", ylabel="BLEU", ylim=(-3, 103))
    bottleneck.legend()
    looking.imshow(a.numpy(), cmap="Greys", aspect="auto")
    looking.set_xticks(range(len(source)), source, rotation=90)
    looking.set_yticks(range(len(target)), target)
    looking.set(title="where the decoder looks")
    if links:
        looking.plot([s for s, _ in links], [t for _, t in links], "o", mfc="none", label="known alignment")
        looking.legend()


def main(data: str | None, language: str | None, attention: str, steps: int, sampling: float, text: str | None,
         seed: int, plot: str | None) -> None:
    if steps < 1 or not 0 <= seed < 2**32 or not 0 <= sampling <= 1:
        raise ValueError("--steps must be at least 1, --seed in 0 .. 2^32 - 1 and --sampling in [0, 1], "
                         f"got {steps}, {seed} and {sampling}")
    if data and language:
        raise ValueError("--language chooses the generated corpus and --data brings another: give one of them")
    from bleu import alignment_error_rate, attention_links, bleu, chrf, exact_match
    from pairs import (build_vocabulary, endless_batches, read_corpus, to_batch, to_ids, to_text, to_words,
                       translate)
    from rnn import Recurrent

    torch.set_num_threads(1)  # of such small products a second thread takes more time than it saves
    training, test = read_corpus(data, language, steps, seed)
    vocabularies = (build_vocabulary(pair.source for pair in training),
                    build_vocabulary(pair.target for pair in training))
    if text is not None:
        words = to_words(text)
        to_ids([words], vocabularies[0])  # refuses what cannot be translated
        if len(words) > (longest := max(len(pair.source) for pair in training)):
            print(f"note: {len(words)} words, and no sentence trained on has more than {longest}: expect mistakes")
    figure = new_figure(plot, 11, 5)
    print(f"\n{len(training)} pairs to train on, {len(test)} held out; vocabularies of {len(vocabularies[0])} and "
          f"{len(vocabularies[1])} words; such as\n{to_text(test[0].source)}\n= {to_text(test[0].target)}\n")
    sources, references = [to_text(pair.source) for pair in test], [to_text(pair.target) for pair in test]
    buckets = {}  # source words -> indices of the held-out sentences with about as many
    for i, pair in sorted(enumerate(test), key=lambda item: len(item[1].source)):
        buckets.setdefault(f"{(n := (len(pair.source) - 1) // 5 * 5) + 1}-{n + 5}", []).append(i)
    print(f"{'words of the source':26}" + "".join(f"{name:>7}" for name in buckets) + "    all   BLEU   chrF")
    print(f"{'sentences':26}" + "".join(f"{len(indices):7}" for indices in buckets.values()) + f"{len(test):7}")
    right, by_length = {}, {}  # name of a translator -> whether it is right, per sentence; BLEU, per bucket
    for kind in (None, attention):
        config = TranslatorConfig(*map(len, vocabularies), attention=kind)
        model = Translator(config, Recurrent, torch.Generator().manual_seed(seed))
        losses = train(model, endless_batches(training, *vocabularies, 64, seed), steps, sampling, seed)
        ours = translate(lambda *source: greedy_translations(model, *source)[0], sources, *vocabularies)
        name = f"{kind} attention" if kind else "no attention"
        right[name] = [a == b for a, b in zip(ours, references)]
        by_length[name] = {bucket: bleu([ours[i] for i in indices], [references[i] for i in indices])
                           for bucket, indices in buckets.items()}
        shares = [100 * sum(right[name][i] for i in indices) / len(indices) for indices in buckets.values()]
        print(f"{name + ', % right':26}" + "".join(f"{share:7.0f}" for share in shares)
              + "".join(f"{score(ours, references):7.1f}" for score in (exact_match, bleu, chrf)))
        print(f"    loss {losses[0]:.2f} (expected about ln V = {math.log(len(vocabularies[1])):.2f}) -> "
              f"{losses[-1]:.2f} nats per word", flush=True)
    if text is not None:
        searches = {"greedy": lambda *source: greedy_translations(model, *source)[0],
                    "beam 4": lambda source, _: [beam_translation(model, source[0], 4)[0]]}
        print(f"\n{text}")
        for name, search in searches.items():
            print(f"{name}  {translate(search, [text], *vocabularies)[0]}")
    attentions = attention_to(model, to_batch(test, *vocabularies))
    if figure is not None:
        i = min(range(len(test)), key=lambda i: abs(len(test[i].source) - 15))
        _draw(figure, by_length, attentions[i], *test[i][:3])
        figure.savefig(plot, dpi=120)
        print(f"\ndrawn: {plot}")
    if any(pair.sure for pair in test):
        looked = [attention_links(a) for a in attentions]
        diagonal = [{(t * len(p.source) // len(p.target), t) for t in range(len(p.target))} for p in test]
        errors = (alignment_error_rate(links, test) for links in (looked, diagonal))
        print("\nalignment error rate of the attention {:.2f} (expected below the diagonal's, {:.2f})".format(*errors))
    longest = [i for indices in buckets.values() for i in indices][-max(len(test) // 5, 1):]
    shares = (sum(rows[i] for i in longest) / len(longest) for rows in right.values())
    print("the longest fifth: {:.0%} right without attention, {:.0%} with it (expected more)".format(*shares))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", help="file of lines: sentence, tab, translation (default: generated ones)")
    parser.add_argument("--language", choices=["french", "german"], help="of the generated pairs (default french)")
    parser.add_argument("--attention", choices=["dot", "general", "concat"], default="dot",
                        help="the score of the translator that has attention (default %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of training, batches of 64 (default %(default)s)")
    parser.add_argument("--sampling", type=float, default=0.0, help="how likely the decoder reads its own words "
                        "by the end of training (default %(default)s: teacher forcing)")
    parser.add_argument("--translate", dest="text", help="a sentence to translate after training")
    parser.add_argument("--seed", type=int, default=0,
                        help="of the corpus, initial weights and batches (default %(default)s)")
    parser.add_argument("--plot", metavar="FILE.png",
                        help="draw BLEU by length and an attention matrix (needs matplotlib)")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ? for it
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
