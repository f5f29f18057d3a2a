"""Masked language modelling: hide some tokens, learn to guess them.   Devlin et al. 2019 (1810.04805)

Idea      Text labels itself: a hidden token is its own target, and two runs of sentences either follow each other or
          do not. From documents come pairs, from pairs rows, from rows what the model sees and what it shall say.
Formula   of a row's n ordinary tokens max(1, round(0.15 n)) are chosen; each becomes [MASK] with probability 0.8,
          any token with 0.1, and stays with 0.1
          loss = mean over chosen t of -log p(token_t | what is seen)  +  mean of -log p(B follows A, or not)
Shapes    documents of sentences of ids -> pairs (A, B, label) -> tokens, segments, real, targets (B, T), labels (B,)
Omits     the paper's curriculum (90% of steps at length 128) and its 10% of short pairs.
Run       python masked_lm.py     what is hidden of Python's documentation: 10 s; ends with "chosen ... %: [MASK] ..."
Test      pytest tests/test_masked_lm.py
"""

import argparse
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that no loss counts; cross_entropy's own default


# --- 1. rows and batches ----------------------------------------------------------------------

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


# --- 2. hidden tokens -------------------------------------------------------------------------

def mask_tokens(tokens: Tensor, special: Special, vocab_size: int, generator: torch.Generator,
                continues: Tensor | None = None, rate: float = 0.15) -> tuple[Tensor, Tensor]:
    """Hide tokens for the model to guess.   section 3.1, appendix A.1

    Of each row's n tokens that are neither special nor padding, max(1, round(rate n)) are chosen at random. A chosen
    one becomes [MASK] (80%), any token (10%) or stays (10%): fine-tuning has no [MASK], so none can be trusted.

    Args:
        tokens: (B, T).
        continues: (V,) bool, True for tokens such as "##ing" that continue a word: whole words are chosen, in random
            order until that number is reached (the last one may exceed it). None: tokens are chosen one by one.

    Returns:
        what the model sees (B, T), and the targets (B, T): the token where one was chosen, elsewhere IGNORE.
    """
    if tokens.dim() != 2:
        raise ValueError(f"tokens must be (B, T), got shape {tuple(tokens.shape)}")
    if not 0 < rate <= 1:
        raise ValueError(f"rate must be in (0, 1], got {rate}")
    B, T = tokens.shape
    ids = torch.tensor([special.pad, special.cls, special.sep, special.mask], device=tokens.device)
    maskable = ~torch.isin(tokens, ids)  # (B, T)
    order = torch.rand(B, T, generator=generator, device=tokens.device)
    if continues is not None:  # all pieces of a word share the number drawn for its first
        starts = ~(continues[tokens] & maskable & maskable.roll(1, 1))
        starts[:, 0] = True
        positions = torch.arange(T, device=tokens.device)
        first = torch.where(starts, positions, 0).cummax(1).values  # (B, T), where the word of each token begins
        order = order.gather(1, first)
    order = order.masked_fill(~maskable, 2.0)  # behind all others
    n = (rate * maskable.sum(1, keepdim=True)).round().clamp(min=1).long()  # (B, 1)
    limit = order.sort(1).values.gather(1, n - 1)  # (B, 1), the n-th smallest number
    chosen = maskable & (order <= limit)
    targets = tokens.masked_fill(~chosen, IGNORE)
    fate = torch.rand(B, T, generator=generator, device=tokens.device)
    anything = torch.randint(vocab_size, (B, T), generator=generator, device=tokens.device)
    seen = torch.where(chosen & (fate < 0.8), special.mask, tokens)
    return torch.where(chosen & (fate >= 0.9), anything, seen), targets


# --- 3. pairs of texts ------------------------------------------------------------------------

def next_sentence_pairs(documents: Sequence[Sequence[Sequence[int]]], room: int,
                        seed: int) -> Iterator[tuple[list[int], list[int], int]]:
    """(A, B, label) from documents, each a list of sentences, each a list of ids; one pass.   section 3.1, appendix A.2

    A and B are runs of sentences, about ``room`` ids together. Label 0: B follows A in the text. Label 1, half of
    the time: B is from another document, and what would have followed begins a later pair.
    """
    documents = [[sentence for sentence in document if sentence] for document in documents]
    documents = [document for document in documents if document]
    if len(documents) < 2:
        raise ValueError(f"pairs need at least 2 documents with text, got {len(documents)}")
    generator = random.Random(seed)
    for d in generator.sample(range(len(documents)), len(documents)):
        document, start = documents[d], 0
        while start < len(document):
            end, length = start, 0
            while end < len(document) and length < room:
                length, end = length + len(document[end]), end + 1
            cut = start + 1 if end - start < 3 else generator.randrange(start + 1, end)
            a = [i for sentence in document[start:cut] for i in sentence]
            label = int(cut == end or generator.random() < 0.5)
            if label:
                other = documents[(d + generator.randrange(1, len(documents))) % len(documents)]
                first = generator.randrange(len(other))
                b = [i for sentence in other[first:first + end - cut + 1] for i in sentence]
            else:
                b = [i for sentence in document[cut:end] for i in sentence]
            start = cut if label else end
            yield a, b[:max(room - len(a), room // 2)], label


# --- 4. loss and training ---------------------------------------------------------------------

def pretraining_loss(masked: Tensor, targets: Tensor, following: Tensor, labels: Tensor) -> Tensor:
    """Mean NLL of the hidden tokens + mean NLL of "does B follow A", in nats.   appendix A.2

    masked (N, V) for the N targets that are not IGNORE, or (B, T, V); targets (B, T); following (B, 2); labels (B,).
    """
    if masked.dim() == 2:
        targets = targets[targets != IGNORE]  # (N,)
    if masked.shape[:-1] != targets.shape:
        raise ValueError(f"logits {tuple(masked.shape)} and targets {tuple(targets.shape)} do not fit")
    return (F.cross_entropy(masked.flatten(0, -2), targets.flatten(), ignore_index=IGNORE)
            + F.cross_entropy(following, labels))


def pretraining_batches(documents: Sequence[Sequence[Sequence[int]]], special: Special, vocab_size: int, context: int,
                        batch: int, seed: int, continues: Tensor | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Without end: tokens, segments, real, targets (B, T), labels (B,). Every pass draws its pairs and masks anew.

    documents: sentences of ids, as for ``next_sentence_pairs``; continues: as for ``mask_tokens``.
    """
    generator = torch.Generator().manual_seed(seed)
    for epoch in count():
        pairs = list(next_sentence_pairs(documents, context - 3, seed + epoch))
        random.Random(seed + epoch).shuffle(pairs)  # else a batch would be of one document
        for i in range(0, max(1, len(pairs) - batch + 1), batch):
            chosen = pairs[i:i + batch]
            tokens, segments, real = pad_rows(special, [join_pair(special, context, a, b) for a, b, _ in chosen])
            seen, targets = mask_tokens(tokens, special, vocab_size, generator, continues)
            yield seen, segments, real, targets, torch.tensor([label for _, _, label in chosen])


def pretrain(model: nn.Module, batches: Iterator[tuple[Tensor, ...]], steps: int, lr: float = 1e-3,
             report: Callable[[int, float], None] = lambda step, loss: None) -> None:
    """AdamW, the learning rate up over a tenth of the steps and down to 0 in straight lines.   appendix A.2

    ``model(tokens, segments, real, hidden)`` -> masked (N, V), next (B, 2), such as bert.BERTForPretraining.
    """
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.01},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    model.train()
    for step, (tokens, segments, real, targets, labels) in enumerate(islice(batches, steps)):
        masked, following = model(tokens, segments, real, targets != IGNORE)
        loss = pretraining_loss(masked, targets, following, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / max(1.0, 0.1 * steps), 1 - step / steps)
        optimizer.step()
        report(step + 1, loss.item())
    model.eval()


@torch.no_grad()
def pretraining_accuracy(model: nn.Module, batches: Iterator[tuple[Tensor, ...]], n: int) -> tuple[float, float]:
    """The shares of hidden tokens, and of "does B follow A", that are guessed right, over n batches."""
    right = torch.zeros(2, 2)  # (task, (right, all))
    for tokens, segments, real, targets, labels in islice(batches, n):
        masked, following = model(tokens, segments, real, targets != IGNORE)
        for i, (logits, truth) in enumerate(((masked, targets[targets != IGNORE]), (following, labels))):
            right[i] += torch.tensor([(logits.argmax(-1) == truth).sum(), len(truth)])
    return tuple((right[:, 0] / right[:, 1]).tolist())


def split_sentences(document: str) -> list[str]:
    """A document's sentences and paragraphs: cut behind . ! ? : ; and a blank, and at empty lines."""
    return [part for part in re.split(r"(?<=[.!?:;])\s+|\n\s*\n", document) if part.strip()]


# --- 5. demo ----------------------------------------------------------------------------------

def main(data: str | None, vocab_size: int, whole_words: bool, seed: int) -> None:
    from data import default_documents, read_documents
    from wordpiece import WordPiece, train_wordpiece
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be in 0 .. 2^32 - 1, got {seed}")
    texts = default_documents() if data is None else list(read_documents(data))
    tokenizer = WordPiece(train_wordpiece(texts, vocab_size))
    documents = [[tokenizer.encode(sentence) for sentence in split_sentences(text)] for text in texts]
    continues = torch.tensor([token.startswith("##") for token in tokenizer.tokens]) if whole_words else None
    batches = pretraining_batches(documents, tokenizer, len(tokenizer), 64, 32, seed, continues)
    chosen = masked = ordinary = following = rows = 0
    for i, (tokens, segments, real, targets, labels) in enumerate(islice(batches, 100)):
        if i == 0:
            for row, target in zip(tokens[:2], targets[:2]):
                print("seen:  ", tokenizer.decode(row[row != tokenizer.pad].tolist()))
                print("hidden:", " | ".join(tokenizer.tokens[t] for t in target[target != IGNORE].tolist()))
        chosen += int((targets != IGNORE).sum())
        masked += int(((targets != IGNORE) & (tokens == tokenizer.mask)).sum())
        ordinary += int(real.sum()) - 3 * len(labels)
        following, rows = following + int((labels == 0).sum()), rows + len(labels)
    print(f"B follows A in {following / rows:.1%} of {rows} pairs (expected 50%, less where documents are short)")
    print(f"chosen {chosen / ordinary:.2%}: [MASK] {masked / chosen:.1%} of them (expected 15% and 80%; whole words "
          "may exceed 15% a little)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", help="files, such as 'my/*.txt' or a.jsonl,b.txt (default: Python's own)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="V (default %(default)s)")
    parser.add_argument("--whole_words", action="store_true", help="hide all pieces of a word together")
    parser.add_argument("--seed", type=int, default=0, help="of pairs and masks (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
