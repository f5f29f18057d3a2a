"""Span corruption and text-to-text: how T5 is trained.   Raffel et al. 2019 (1910.10683), sections 3.1.4, 3.3.4

Idea      Cut spans out of a text, put a marker where each was, and have the model write the spans: what was cut
          out is predicted from BOTH sides, and the targets are short, so a step is cheap. The same model with the
          same loss does any other task whose inputs and targets are written as text, the name of the task in front.
Formula   text      Thank you for inviting me to your party last week .
          inputs    Thank you <X> me to your party <Y> week . <eos>
          targets   <X> for inviting <Y> last <Z> <eos>                                               (figure 2)
          loss = mean of -log p(target_t | targets before t, inputs);   15% of the text in spans of 3 on average
Shapes    tokens (N,) -> inputs (S,), targets (T,): with n spans, S + T = N + 2 n + 3
Omits     packing several examples into one row; the paper's other objectives (prefix, masked, deshuffling).
Run       python span_corruption.py     one small T5 learns to fill gaps and two tasks at once: a minute;
                                        ends with "... every task above 90%: True ..."
Test      pytest tests/test_span_corruption.py
"""

import argparse
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


# --- 1. the objective -----------------------------------------------------------------------

def noise_spans(length: int, density: float = 0.15, mean_span: float = 3.0,
                generator: torch.Generator | None = None) -> list[tuple[int, int]]:
    """Which parts of a text to cut out: [(begin, end), ...] in order, never two side by side.   Section 3.3.4

    round(length * density) tokens, at least one and not all, in spans of mean_span tokens on the average; every
    way to do so is equally likely.
    """
    if length < 2 or not 0 < density < 1 or mean_span < 1:
        raise ValueError("length must be at least 2, density in (0, 1) and mean_span at least 1, "
                         f"got {length}, {density} and {mean_span}")
    n_noise = min(max(round(length * density), 1), length - 1)
    n_kept = length - n_noise
    n_spans = min(max(round(n_noise / mean_span), 1), n_kept + 1, n_noise)

    def parts(total: int, n: int) -> list[int]:
        """total = a sum of n positive numbers: every such sum is n - 1 cuts between total things in a row."""
        cuts = sorted((torch.randperm(total - 1, generator=generator)[:n - 1] + 1).tolist())
        return [b - a for a, b in zip([0, *cuts], [*cuts, total])]

    gaps, spans, end = parts(n_kept + 2, n_spans + 1), [], -1  # the two outer gaps may be empty, hence + 2 and - 1
    for gap, size in zip(gaps, parts(n_noise, n_spans)):
        spans.append((end + gap, end + gap + size))
        end += gap + size
    return spans


def corrupt_spans(tokens: Tensor, spans: list[tuple[int, int]], first_sentinel: int,
                  eos: int = 1) -> tuple[Tensor, Tensor]:
    """tokens (N,) -> (inputs, targets): each span gives way to a sentinel, and follows it in the targets.

    The sentinels <X>, <Y>, ... are the ids first_sentinel, first_sentinel - 1, ... (in T5's vocabulary from 32099
    down); the last one closes the targets. ValueError if they run out, or stand in the text.
    """
    last = first_sentinel - len(spans)
    if last <= eos:
        raise ValueError(f"{len(spans)} spans need {len(spans) + 1} sentinels, from {first_sentinel} down and "
                         f"above {eos}")
    if ((tokens >= last) & (tokens <= first_sentinel)).any():
        raise ValueError(f"the text contains ids in {last} .. {first_sentinel}, which are to be sentinels")
    inputs, targets, end, row = [], [], 0, tokens.tolist()
    for i, (begin, next_end) in enumerate(spans):
        inputs += [*row[end:begin], first_sentinel - i]
        targets += [first_sentinel - i, *row[begin:next_end]]
        end = next_end
    return tokens.new_tensor([*inputs, *row[end:], eos]), tokens.new_tensor([*targets, last, eos])


def fill_spans(inputs: list[int], targets: list[int], first_sentinel: int, eos: int = 1) -> list[int]:
    """The text again, from what ``corrupt_spans`` made or, as far as it goes, from what a model wrote."""
    last = first_sentinel
    while last in inputs:
        last -= 1
    spans, current = {}, []
    for token in targets:
        if last <= token <= first_sentinel:
            current = spans.setdefault(token, [])
        elif token != eos:
            current.append(token)
    return [token for place in inputs if place != eos for token in spans.get(place, [place])]


# --- 2. tasks as text -----------------------------------------------------------------------

def pad_pairs(pairs: list[tuple[Tensor, Tensor]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """B pairs of inputs and targets of any lengths -> (B, S), (B, T), short ones padded on the right."""
    inputs, targets = zip(*pairs)
    return (pad_sequence(inputs, batch_first=True, padding_value=pad),
            pad_sequence(targets, batch_first=True, padding_value=pad))


class Words:
    """A vocabulary of whole words: 0 padding, 1 the end, 2 any other word, the words, the sentinels on top."""

    def __init__(self, words: Iterable[str], n_sentinels: int = 10):
        sentinels = [f"<{n}>" for n in range(n_sentinels, 0, -1)]
        self.words = ["<pad>", "<eos>", "<other>", *words, *sentinels]
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.first_sentinel = len(self.words) - 1

    def encode(self, words: Iterable[str]) -> Tensor:
        """(N,) ids, without an end."""
        return torch.tensor([self.ids.get(word, 2) for word in words], dtype=torch.long)

    def decode(self, ids: Iterable[int]) -> str:
        """The words of the ids, a blank between them."""
        return " ".join(self.words[i] for i in ids)

    def pair(self, question: str, answer: str) -> tuple[Tensor, Tensor]:
        """A task of text to text as inputs and targets, each with its end."""
        return tuple(self.encode([*text.split(), "<eos>"]) for text in (question, answer))


# --- 3. demo --------------------------------------------------------------------------------

NUMBERS = "zero one two three four five six".split()
TASKS = {"count": lambda words: NUMBERS[len(words)], "article": lambda words: "yes" if "the" in words else "no"}


def main(steps: int, words: int, seed: int) -> None:
    if steps < 2 or words < 100 or not 0 <= seed < 2**32:
        raise ValueError("--steps must be at least 2, --words at least 100 and --seed in 0 .. 2^32 - 1, "
                         f"got {steps}, {words} and {seed}")
    from data import default_documents, split_documents
    from t5 import T5, T5Config, greedy_decode, shift_right, target_loss

    train, held_out = ([word for document in documents for word in re.findall(r"[a-z]+|[^a-z\s]", document.lower())]
                       for documents in split_documents(default_documents()))
    frequent = {word for word, _ in Counter(train).most_common(words)}
    vocabulary = Words(sorted(frequent | {*NUMBERS, *TASKS, "yes", "no", "the", ":"}))
    train, held_out, V = vocabulary.encode(train), vocabulary.encode(held_out), len(vocabulary.words)
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    print(f"{len(train):,} words to train on, {len(held_out):,} held out, a vocabulary of {V}")

    def window(text: Tensor, length: int) -> Tensor:
        start = draw.randrange(len(text) - length)
        return text[start:start + length]

    def gaps(text: Tensor, count: int) -> tuple[Tensor, Tensor]:
        spans = [noise_spans(32, generator=generator) for _ in range(count)]
        return pad_pairs([corrupt_spans(window(text, 32), s, vocabulary.first_sentinel) for s in spans])

    def tasks(text: Tensor, names: Iterable[str], count: int) -> tuple[Tensor, Tensor]:
        pairs = []
        for name in names:
            for _ in range(count):
                some = vocabulary.decode(window(text, draw.randint(2, 6)).tolist())
                pairs.append(vocabulary.pair(f"{name} : {some}", TASKS[name](some.split())))
        return pad_pairs(pairs)

    model = T5(T5Config(V, n_layers=2, n_heads=4, d_model=128, d_head=32, d_ff=512, dropout=0.0), generator)
    # Adafactor's steps are in proportion to a parameter's size; that of the embedding is 1, of others about 0.1.
    optimizer = torch.optim.Adam([{"params": [p], "times": 10.0 if name == "embedding.weight" else 1.0}
                                  for name, p in model.named_parameters()], betas=(0.9, 0.98))
    print(f"a T5 of {sum(p.numel() for p in model.parameters()):,} parameters; "
          f"expect a first loss of about ln V + 1/2 = {math.log(V) + 0.5:.2f}")  # + 1/2: the logits' variance of 1
    began = time.perf_counter()
    for step in range(1, steps + 1):
        inputs, targets = gaps(train, 24) if step % 2 else tasks(train, TASKS, 48)  # a mixture, section 3.5.2
        loss = target_loss(model(inputs, shift_right(targets)), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["times"] * 5e-4 * min(step / 50, 1, 2 * (1 - (step - 1) / steps))
        optimizer.step()
        if step % 100 == 1:
            seconds = time.perf_counter() - began
            print(f"step {step:>6}/{steps}  loss of gaps {loss.item():.3f}  {seconds:4.0f} s", flush=True)

    model.eval()
    inputs, targets = gaps(held_out, 200)
    with torch.no_grad():
        log_p = model(inputs, shift_right(targets)).log_softmax(-1).gather(-1, targets[..., None])[..., 0]  # (B, T)
    cut_out = (targets > 1) & (targets <= vocabulary.first_sentinel - 10)  # words, not sentinels or ends
    counts = torch.bincount(train, minlength=V) + 1
    ours = -log_p[cut_out].mean().item()
    theirs = -(counts[targets[cut_out]] / counts.sum()).log().mean().item()
    for source, answer in zip(inputs[:2].tolist(), greedy_decode(model, inputs[:2], 0, 1, 12)):
        source = [i for i in source if i > 1]
        print(f"  {vocabulary.decode(source)}\n    -> {vocabulary.decode(answer)}")
    right = {}
    for name in TASKS:
        inputs, targets = tasks(held_out, [name], 200)
        answers = greedy_decode(model, inputs, 0, 1, 3)
        right[name] = sum(a == t[t > 1].tolist() for a, t in zip(answers, targets)) / 200
        print(f"  {vocabulary.decode(i for i in inputs[0].tolist() if i > 1)} -> {vocabulary.decode(answers[0])}")
    print(f"words cut out of held-out text: {ours:.2f} nats each, by their frequency {theirs:.2f};   right answers: "
          + ", ".join(f"{name} {share:.0%}" for name, share in right.items()))
    good = ours < theirs and min(right.values()) > 0.9
    print(f"better than frequency, and every task above 90%: {good} (expected True)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--steps", type=int, default=700, help="training steps (default %(default)s)")
    parser.add_argument("--words", type=int, default=500,
                        help="most frequent words that are known (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="of the weights and of what is cut out (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
