"""Fine-tuning: a pre-trained encoder and one new layer learn a task from few labels.   Devlin et al. 2019, section 4

Idea      Every task becomes a row of tokens: one text, or two with a [SEP] between. The whole encoder is trained on for
          a few passes, together with a layer that reads a label from [CLS], a label from each token, or an answer's
          start and end. What the encoder learned without labels makes up for the labels that there are not.
Formula   classify  argmax W x_[CLS];   tag  argmax W x_i at the first piece of word i
          answer    max over i <= j of S x_i + E x_j, if that is more than S x_[CLS] + E x_[CLS] + tau, else none
Shapes    rows of ids -> tokens, segments, real (B, T) -> logits (B, n), spans (B, T, 2), tags (B, T, n)
Omits     sliding windows over long passages; ranking the answers of several passages; multiple choice.
Run       python finetune.py                      four tasks from Python's documentation, without pre-training: a minute
          python finetune.py --init out/bert     from what `python bert.py --out out/bert` saved
          Ends with "transfer: ..." or "from scratch: ..."
Test      pytest tests/test_finetune.py
"""

import argparse
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Row = tuple[list[int], list[int], object]  # tokens, segments, target: a label, a span, or a tag for each token

IGNORE = -100  # a target that no loss counts; cross_entropy's own default
TRIES = 100_000  # rows drawn at random for a task before its maker ends: not all of them fit


# --- 1. inputs --------------------------------------------------------------------------------

class Special(Protocol):
    """The ids of the special tokens; a tokenizer that has these attributes will do."""
    pad: int
    cls: int
    sep: int
    mask: int


def join_pair(special: Special, room: int, a: Sequence[int], b: Sequence[int] | None = None
              ) -> tuple[list[int], list[int]]:
    """[CLS] A [SEP] or [CLS] A [SEP] B [SEP], and its segments, at most ``room`` ids: the longer of A and B loses its
    end until they fit. ValueError for a room without a place for one id of each."""
    a, b = list(a), None if b is None else list(b)
    free = room - (2 if b is None else 3)
    if free < (1 if b is None else 2):
        raise ValueError(f"a room of {room} tokens cannot hold [CLS], [SEP] and text")
    if b is None:
        a = a[:free]
    elif len(a) + len(b) > free:
        kept = max(free - len(b), free // 2) if len(a) > len(b) else min(len(a), free // 2)
        a, b = a[:kept], b[:free - kept]
    tail = [] if b is None else [*b, special.sep]
    return [special.cls, *a, special.sep, *tail], [0] * (len(a) + 2) + [1] * len(tail)


def pad_rows(special: Special, rows: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of (tokens, segments), padded behind to the longest: tokens, segments (B, T) int64, real (B, T) bool."""
    T = max(len(tokens) for tokens, _ in rows)
    tokens = torch.tensor([tokens + [special.pad] * (T - len(tokens)) for tokens, _ in rows])
    segments = torch.tensor([segments + [0] * (T - len(segments)) for _, segments in rows])
    lengths = torch.tensor([len(tokens) for tokens, _ in rows])
    return tokens, segments, torch.arange(T) < lengths[:, None]  # (B, T)


def encode_question(special: Special, room: int, question: Sequence[int], passage: Sequence[Sequence[int]],
                    answer: tuple[int, int] | None) -> tuple[list[int], list[int], tuple[int, int]]:
    """[CLS] question [SEP] passage [SEP]: tokens, segments, and where the answer starts and ends in them.

    Args:
        passage: the ids of each word; what does not fit into ``room`` is cut off.
        answer: its first and its last word; None: the passage holds none, and both positions are 0, [CLS].

    Raises:
        ValueError: for an answer outside the passage, or cut off with its end; for a question that fills the room.
    """
    begin = len(question) + 2
    if begin + 2 > room:
        raise ValueError(f"a question of {len(question)} tokens leaves no room for a passage in {room}")
    starts = [begin]  # of each word, and of what follows
    for word in passage:
        starts.append(starts[-1] + len(word))
    tokens = [special.cls, *question, special.sep, *(i for word in passage for i in word)][:room - 1] + [special.sep]
    segments = [0] * begin + [1] * (len(tokens) - begin)
    if answer is None:
        return tokens, segments, (0, 0)
    first, last = answer
    if not 0 <= first <= last < len(passage):
        raise ValueError(f"answer words {first} .. {last} are not in a passage of {len(passage)} words")
    if starts[last + 1] > room - 1:
        raise ValueError(f"the answer, words {first} .. {last}, ends at token {starts[last + 1]}, but {room} tokens "
                         f"hold only {room - 1} before [SEP]: cut the passage nearer to the answer, or use a larger "
                         "context")
    return tokens, segments, (starts[first], starts[last + 1] - 1)


def encode_tags(special: Special, room: int, words: Sequence[Sequence[int]],
                tags: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """[CLS] words [SEP]: tokens, segments, and targets: a word's tag at its first piece, IGNORE elsewhere.

    ValueError for unequal numbers, a word without pieces, or more pieces than fit: a tag would be lost.
    """
    if len(words) != len(tags) or not all(words):
        raise ValueError(f"every word must have a piece and a tag, got {len(words)} words, "
                         f"{sum(not word for word in words)} of them without pieces, and {len(tags)} tags")
    targets = [IGNORE]
    for word, tag in zip(words, tags):
        targets += [tag] + [IGNORE] * (len(word) - 1)
    targets.append(IGNORE)
    if len(targets) > room:
        raise ValueError(f"a sequence of {len(targets)} tokens does not fit a context of {room}")
    return [special.cls, *(i for word in words for i in word), special.sep], [0] * len(targets), targets


# --- 2. losses and answers --------------------------------------------------------------------

def span_loss(scores: Tensor, spans: Tensor) -> Tensor:
    """Mean NLL of the true start and end: scores (B, T, 2), spans (B, 2), in nats.   section 4.2"""
    return F.cross_entropy(scores, spans)  # the positions are the classes: (B, T) against (B,) twice


def best_spans(scores: Tensor, allowed: Tensor, threshold: float = 0.0, longest: int = 30) -> tuple[Tensor, Tensor]:
    """The likeliest answers: spans (B, 2), (0, 0) for none, and by how much each beats no answer (B,).   section 4.3

    Args:
        scores: (B, T, 2) of ``BERTSpans``.
        allowed: (B, T) bool, the tokens of the passage; position 0, [CLS], stands for no answer.
        threshold: tau; an answer must beat no answer by more.
        longest: the most tokens of an answer.
    """
    B, T = allowed.shape
    start, end = scores.masked_fill(~allowed[..., None], float("-inf")).unbind(-1)  # each (B, T)
    both = start[:, :, None] + end[:, None]  # (B, T, T)
    possible = torch.ones(T, T, dtype=torch.bool, device=scores.device).triu().tril(longest - 1)
    best, place = both.masked_fill(~possible, float("-inf")).flatten(1).max(1)  # each (B,)
    margin = best - scores[:, 0].sum(-1)
    spans = torch.stack((place // T, place % T), 1)
    return spans * (margin > threshold)[:, None], margin


def tagging_loss(logits: Tensor, tags: Tensor) -> Tensor:
    """Mean NLL of the tags that are not IGNORE: logits (B, T, n), tags (B, T), in nats."""
    return F.cross_entropy(logits.flatten(0, 1), tags.flatten(), ignore_index=IGNORE)


# --- 3. training and scoring ------------------------------------------------------------------

def collate(special: Special, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows as a batch: tokens, segments, real (B, T), and targets (B,), (B, 2), or (B, T) with IGNORE on padding."""
    tokens, segments, real = pad_rows(special, [row[:2] for row in rows])
    targets = [row[2] for row in rows]
    if isinstance(targets[0], list):
        targets = [tags + [IGNORE] * (tokens.size(1) - len(tags)) for tags in targets]
    return tokens, segments, real, torch.tensor(targets)


def fine_tune(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], rows: Sequence[Row], special: Special,
              epochs: int = 4, batch: int = 16, lr: float = 5e-4, seed: int = 0) -> None:
    """AdamW over ``epochs`` passes, the learning rate up over a tenth of the steps, then down to 0.   appendix A.3

    ``model(tokens, segments, real)`` -> what ``loss`` compares with the targets. The rows at the end of a pass that
    fill no batch are left out: others in each pass.
    """
    if not rows:
        raise ValueError("no rows to learn from: give at least one")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    order, batch = list(rows), min(batch, len(rows))
    shuffler, steps = random.Random(seed), epochs * (len(rows) // batch)
    model.train()
    for step in range(steps):
        i = step % (len(rows) // batch)
        if i == 0:
            shuffler.shuffle(order)
        tokens, segments, real, targets = collate(special, order[i * batch:(i + 1) * batch])
        optimizer.zero_grad()
        loss(model(tokens, segments, real), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / max(1.0, 0.1 * steps), 1 - step / steps)
        optimizer.step()
    model.eval()


@torch.no_grad()
def held_out_score(model: nn.Module, rows: Sequence[Row], special: Special) -> float:
    """The share of right labels, of right tags, or of answers with both ends right (exact match)."""
    if not rows:
        raise ValueError("no rows to score: give at least one")
    right = total = 0
    for i in range(0, len(rows), 64):
        tokens, segments, real, targets = collate(special, rows[i:i + 64])
        found, counted = model(tokens, segments, real), targets != IGNORE
        if targets.dim() == 2 and targets.size(1) == 2 < found.size(1):  # spans
            passage = (segments == 1) & real & (tokens != special.sep)
            found, counted = best_spans(found, passage)[0] == targets, counted.all(1)
            right += int((found.all(1) & counted).sum())
        else:
            right += int(((found.argmax(-1) == targets) & counted).sum())
        total += int(counted.sum())
    return right / total


# --- 4. four tasks that Python's documentation makes ------------------------------------------

@dataclass
class Task:
    """Labelled rows, and a score that takes no understanding."""
    name: str
    head: str  # the model's class in bert.py
    n_labels: int
    loss: Callable[[Tensor, Tensor], Tensor]
    train: list[Row]
    test: list[Row]
    baseline: float
    epochs: int  # chosen for each, as are the paper's
    lr: float


def hold_out(texts: Sequence[str], share: float = 0.15) -> tuple[list[str], list[str]]:
    """Each text's first paragraphs, and its last, ``share`` of them (none if it has few): two aligned lists."""
    cut = [(parts := text.split("\n\n"), round((1 - share) * len(parts))) for text in texts]
    return ["\n\n".join(parts[:n]) for parts, n in cut], ["\n\n".join(parts[n:]) for parts, n in cut]


def passages(text: str) -> list[str]:
    """A text's paragraphs of at least 8 words, each on one line."""
    return [" ".join(words) for part in text.split("\n\n") if len(words := part.split()) >= 8]


def word_sentences(texts: Sequence[str]) -> list[list[str]]:
    """Sentences of 6 to 25 words, most of them of letters, that begin with a capital and end on a stop: as words."""
    found = {}
    for text in texts:
        for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
            words = part.split()
            if 6 <= len(words) <= 25 and part[0].isupper() and words[-1][-1] in ".!?":
                if sum(word.isalpha() for word in words) >= 0.6 * len(words):
                    found[" ".join(words)] = words
    return list(found.values())


def origin_rows(texts: Sequence[str], tokenizer, room: int, rng: random.Random,
                longest: Sequence[int]) -> Iterator[Row]:
    """One text: from which of the documents ``longest`` is this paragraph?"""
    found = [(label, passage) for label, d in enumerate(longest) for passage in passages(texts[d])]
    for label, passage in rng.sample(found, len(found)):
        yield *join_pair(tokenizer, room, tokenizer.encode(passage)), label


def pair_rows(texts: Sequence[str], tokenizer, room: int, rng: random.Random,
              longest: Sequence[int]) -> Iterator[Row]:
    """A pair: are two paragraphs of one of the documents ``longest`` (0), or of two (1)?"""
    documents = [part for d in longest if len(part := passages(texts[d])) > 1]
    half = (room - 3) // 2  # of each, the beginning
    for k in range(TRIES) if len(documents) > 1 else ():
        one, other = rng.sample(documents, 2)
        a, b = rng.sample(one, 2)
        b = rng.choice(other) if k % 2 else b
        yield *join_pair(tokenizer, room, tokenizer.encode(a)[:half], tokenizer.encode(b)[:half]), k % 2


def question_rows(texts: Sequence[str], tokenizer, room: int, rng: random.Random) -> Iterator[Row]:
    """The question is a paragraph's beginning, the passage two sentences, the answer the one of the same document.
    Who can tell where a sentence ends, and no more, is right half of the time."""
    documents = [(whole, found) for text in texts if len(whole := passages(text)) > 1
                 and (found := [words for words in word_sentences([text]) if len(words) <= 15])]
    for k in range(TRIES) if len(documents) > 1 else ():
        (whole, own), (_, foreign) = rng.sample(documents, 2)
        words, others, question = rng.choice(own), rng.choice(foreign), rng.choice(whole)
        start = 0 if k % 2 else len(others)
        passage = tokenizer.encode_words([*words, *others] if k % 2 else [*others, *words])
        left = room - 3 - sum(map(len, passage))
        if left >= 8 and " ".join(words) not in question:  # else the answer might be cut off, or be told
            yield encode_question(tokenizer, room, tokenizer.encode(question)[:left], passage,
                                  (start, start + len(words) - 1))


def origin_tag_rows(texts: Sequence[str], tokenizer, room: int, rng: random.Random,
                    longest: Sequence[int]) -> Iterator[Row]:
    """Tags: of two sentences in a row, from which of the documents ``longest`` is each word?"""
    found = [(label, part) for label, d in enumerate(longest) if (part := word_sentences([texts[d]]))]
    for _ in range(TRIES) if len(found) > 1 else ():
        (i, a), (j, b) = ((label, rng.choice(part)) for label, part in rng.sample(found, 2))
        pieces = tokenizer.encode_words([*a, *b])
        if sum(map(len, pieces)) + 2 <= room:
            yield encode_tags(tokenizer, room, pieces, [i] * len(a) + [j] * len(b))


def make_tasks(train: Sequence[str], test: Sequence[str], tokenizer, room: int, n: int, seed: int) -> list[Task]:
    """The paper's four sorts of task, each of n labelled rows from ``train`` and up to 1000 from ``test``, two
    aligned lists of texts as ``hold_out`` makes them.

    The baseline is the most frequent answer; for tags, the most frequent one of each word's first piece in training.
    """
    longest = sorted(range(len(train)), key=lambda d: -len(passages(train[d])))[:20]
    tasks = []
    for name, head, n_labels, loss, make, epochs, lr in (
            ("text: which document", "BERTClassifier", len(longest), F.cross_entropy,
             partial(origin_rows, longest=longest), 8, 7e-4),
            ("pair: same document", "BERTClassifier", 2, F.cross_entropy,
             partial(pair_rows, longest=longest[:6]), 5, 3e-4),
            ("question: what belongs here", "BERTSpans", 2, span_loss, question_rows, 6, 7e-4),
            ("tags: which document", "BERTTagger", len(longest[:6]), tagging_loss,
             partial(origin_tag_rows, longest=longest[:6]), 6, 7e-4)):
        known, new = ([*islice(make(texts, tokenizer, room, random.Random(seed + i)), size)]
                      for i, (texts, size) in enumerate(((train, n), (test, min(1000, 5 * n)))))
        if not known or not new:
            raise ValueError(f"the texts hold no rows for the task {name!r}: give longer ones, or more")
        if head == "BERTTagger":
            seen: dict[int, Counter] = {}
            for tokens, _, tags in known:
                for token, tag in zip(tokens, tags):
                    if tag != IGNORE:
                        seen.setdefault(token, Counter())[tag] += 1
            right = [seen.get(token, Counter([0])).most_common(1)[0][0] == tag
                     for tokens, _, tags in new for token, tag in zip(tokens, tags) if tag != IGNORE]
        else:
            usual = Counter(target for *_, target in known).most_common(1)[0][0]
            right = [target == usual for *_, target in new]
        tasks.append(Task(name, head, n_labels, loss, known, new, sum(right) / len(right), epochs, lr))
    return tasks


def compare(tasks: Sequence[Task], build: Callable[[Task, nn.Module | None], nn.Module], encoder: nn.Module | None,
            special: Special, seed: int) -> list[tuple[float, ...]]:
    """Fine-tune each task from scratch and, if there is one, from the encoder; print and return held-out scores:
    (baseline, from scratch[, pre-trained]) of each task. ``build(task, encoder or None)`` -> a new model."""
    print(f"{'task':28}{'labelled':>10}{'held out':>10}{'baseline':>10}{'scratch':>10}",
          f"{'pre-trained':>12}" * (encoder is not None))
    scores = []
    for task in tasks:
        print(f"{task.name:28}{len(task.train):10}{len(task.test):10}{task.baseline:10.3f}", end="", flush=True)
        scores.append((task.baseline,))
        for start, width in ((None, 10), (encoder, 13))[:2 if encoder is not None else 1]:
            model = build(task, start)
            fine_tune(model, task.loss, task.train, special, task.epochs, lr=task.lr, seed=seed)
            scores[-1] += (held_out_score(model, task.test, special),)
            print(f"{scores[-1][-1]:{width}.3f}", end="", flush=True)
        print()
    return scores


# --- 5. demo ----------------------------------------------------------------------------------

def main(init: str | None, examples: int, seed: int) -> None:
    if examples < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"--examples must be at least 1 and --seed in 0 .. 2^32 - 1, got {examples} and {seed}")
    import bert
    from data import default_documents
    from wordpiece import WordPiece, train_wordpiece
    train, test = hold_out(default_documents())
    if init is None:
        tokenizer, start = WordPiece(train_wordpiece(train, 2048)), None
        config = bert.BERTConfig(len(tokenizer), context=64, n_layers=2, n_heads=4, d_model=128, attention_dropout=0.0,
                                 initializer_range=0.04)
    else:
        tokenizer = WordPiece.load(f"{init}/vocab.txt")
        start = bert.BERTForPretraining.from_pretrained(init).bert
        config = replace(start.config, dropout=0.1)
    tasks = make_tasks(train, test, tokenizer, config.context, examples, seed)
    for task in tasks:
        tokens, _, target = task.train[0]
        print(f"{task.name}: {tokenizer.decode(tokens)} -> {target}")
    torch.manual_seed(seed)  # of dropout

    def build(task: Task, start: nn.Module | None) -> nn.Module:
        model = getattr(bert, task.head)
        return model(replace(config, n_labels=task.n_labels), start, torch.Generator().manual_seed(seed))

    scores = compare(tasks, build, start, tokenizer, seed)
    if start is None:
        print(f"from scratch: above the baseline on {sum(b > a for a, b in scores)} of {len(scores)} tasks; now "
              "pre-train: python bert.py")
    else:
        won = sum(row[2] > max(row[:2]) for row in scores)
        print("transfer: pre-training is ahead of the baseline and of training from scratch on "
              f"{won} of {len(scores)} tasks (expected 4)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--init", metavar="DIR",
                        help="BERT to start from, with its vocab.txt (default: weights drawn at random)")
    parser.add_argument("--examples", type=int, default=500,
                        help="labelled rows of each task (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of examples, weights and order (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
