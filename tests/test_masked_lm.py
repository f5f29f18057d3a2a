"""Masked language modelling: which tokens are hidden, how pairs are made, and the loss against transformers'."""

import re
import runpy
import sys
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import masked_lm
from masked_lm import (IGNORE, join_pair, mask_tokens, next_sentence_pairs, pad_rows, pretrain, pretraining_accuracy,
                       pretraining_batches, pretraining_loss, split_sentences)

SPECIAL = SimpleNamespace(pad=0, cls=2, sep=3, mask=4)
V = 1000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of(lengths, seed=0):
    """[CLS] A [SEP] B [SEP] rows of random ordinary ids, padded."""
    g = seeded(seed)
    rows = [join_pair(SPECIAL, 10_000, *(torch.randint(5, V, (n,), generator=g).tolist() for n in pair)) for pair in lengths]
    return pad_rows(SPECIAL, rows)


# --- rows -----------------------------------------------------------------------------------

def test_rows_match_transformers_layout_and_truncation():
    transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))])}
    bert = transformers.BertTokenizer(vocab=vocab)
    for n_a, n_b, room in ((3, 4, 20), (12, 4, 11), (4, 12, 11), (9, 9, 12), (9, 9, 13), (12, 10, 9), (7, None, 20), (7, None, 6), (1, 1, 5)):
        a, b = list(range(5, 5 + n_a)), None if n_b is None else list(range(20, 20 + n_b))
        theirs = bert(*(" ".join(bert.convert_ids_to_tokens(ids)) for ids in (a, b) if ids), truncation="longest_first", max_length=room)
        tokens, segments = join_pair(SPECIAL, room, a, b)
        assert len(tokens) == len(theirs["input_ids"]) <= room
        assert segments.count(1) == theirs["token_type_ids"].count(1) and sorted(segments) == segments
        if (n_a + (n_b or 0)) % 2 == room % 2 or n_b is None or n_a != n_b:  # who loses the odd token of a tie is a matter of taste
            assert (tokens, segments) == (theirs["input_ids"], theirs["token_type_ids"]), (n_a, n_b, room)


def test_a_room_without_space_is_refused():
    for room, texts in ((2, ([7],)), (4, ([7], [8]))):
        with pytest.raises(ValueError, match=rf"a room of {room} tokens cannot hold"):
            join_pair(SPECIAL, room, *texts)


def test_padding_is_behind_and_marked():
    tokens, segments, real = pad_rows(SPECIAL, [join_pair(SPECIAL, 9, [7, 8], [9]), join_pair(SPECIAL, 9, [7])])
    assert tokens.tolist() == [[2, 7, 8, 3, 9, 3], [2, 7, 3, 0, 0, 0]]
    assert segments.tolist() == [[0, 0, 0, 0, 1, 1], [0] * 6]
    assert real.tolist() == [[True] * 6, [True] * 3 + [False] * 3]


# --- masking --------------------------------------------------------------------------------

def test_exactly_15_percent_of_each_row_are_chosen_never_special_or_padding():
    tokens, _, real = rows_of([(40, 50), (3, 4), (1, 1), (100, 7)] * 50)
    seen, targets = mask_tokens(tokens, SPECIAL, V, seeded())
    chosen = targets != IGNORE
    special = (tokens == 2) | (tokens == 3) | ~real
    assert not (chosen & special).any() and torch.equal(seen[~chosen], tokens[~chosen])
    assert torch.equal(targets[chosen], tokens[chosen])
    assert chosen.sum(1).tolist() == [14, 1, 1, 16] * 50  # round(0.15 * 90), max(1, round(0.15 * 7)), ..., round(0.15 * 107)
    assert mask_tokens(tokens, SPECIAL, V, seeded(), rate=0.5)[1].ne(IGNORE).sum(1)[:4].tolist() == [45, 4, 1, 54]


def test_of_the_chosen_80_percent_are_masked_10_random_10_kept():
    tokens, _, _ = rows_of([(60, 60)] * 2000)
    seen, targets = mask_tokens(tokens, SPECIAL, V, seeded(1))
    chosen = targets != IGNORE
    n = int(chosen.sum())
    assert n == 36000
    masked, kept = int((seen[chosen] == 4).sum()) / n, int((seen[chosen] == tokens[chosen]).sum()) / n
    assert masked == pytest.approx(0.8, abs=0.01) and kept == pytest.approx(0.1, abs=0.008)  # sd 0.002: 5 of them
    others = seen[chosen & (seen != 4) & (seen != tokens)]
    assert len(others) / n == pytest.approx(0.1, abs=0.008)
    counts = torch.bincount(others, minlength=V).double()  # any token, evenly
    assert (counts - counts.mean()).square().sum() / counts.mean() == pytest.approx(V, abs=5 * (2 * V) ** 0.5)


def test_every_ordinary_token_is_chosen_equally_often():
    tokens, _, _ = rows_of([(10, 10)])
    counts = sum((mask_tokens(tokens, SPECIAL, V, seeded(i))[1] != IGNORE).long() for i in range(2000))[0]
    ordinary = (tokens[0] > 4).nonzero().flatten()
    assert counts.sum() == counts[ordinary].sum() == 6000
    assert counts[ordinary].min() > 220 and counts[ordinary].max() < 380  # mean 300, sd 16


def test_whole_words_are_hidden_whole():
    continues = torch.arange(V) % 3 == 0  # a third of the tokens continue a word
    tokens, _, real = rows_of([(40, 50), (6, 5), (1, 1)] * 100, seed=2)
    chosen = mask_tokens(tokens, SPECIAL, V, seeded(), continues)[1] != IGNORE
    ordinary = real & (tokens > 4)
    for row in range(len(tokens)):
        for t in range(1, int(real[row].sum())):
            if continues[tokens[row, t]] and ordinary[row, t] and ordinary[row, t - 1]:
                assert chosen[row, t] == chosen[row, t - 1]
    n = (0.15 * ordinary.sum(1)).round().clamp(min=1)
    longest = 12  # pieces of the longest word here
    assert ((chosen.sum(1) >= n) & (chosen.sum(1) < n + longest)).all() and not (chosen & ~ordinary).any()
    assert chosen.sum() > n.sum()
    alone = mask_tokens(tokens, SPECIAL, V, seeded())[1] != IGNORE
    assert torch.equal(alone.sum(1), n.long())


def test_masks_follow_the_generator_and_rows_of_nothing_ordinary_stay():
    tokens, _, _ = rows_of([(30, 30)] * 3)
    first, again, other = (mask_tokens(tokens, SPECIAL, V, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], other[0])
    bare = torch.tensor([[2, 3, 3, 0], [2, 9, 3, 0]])
    seen, targets = mask_tokens(bare, SPECIAL, V, seeded())
    assert (targets[0] == IGNORE).all() and torch.equal(seen[0], bare[0]) and targets[1].tolist() == [IGNORE, 9, IGNORE, IGNORE]
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\], got 0"):
        mask_tokens(bare, SPECIAL, V, seeded(), rate=0)


# --- pairs ----------------------------------------------------------------------------------

def documents(n=20, seed=0):
    """Sentence s of document d is [1000 d + 10 s, ... + 1, ...]: every id says where it is from."""
    g = seeded(seed)
    return [[[1000 * d + 10 * s + i for i in range(int(torch.randint(1, 9, (), generator=g)))] for s in range(30)] for d in range(n)]


def test_half_of_the_pairs_follow_and_half_are_from_another_document():
    docs = documents(200)
    pairs = list(next_sentence_pairs(docs, 40, seed=0))
    flat = [[i for sentence in document for i in sentence] for document in docs]
    for a, b, label in pairs:
        d, e = a[0] // 1000, b[0] // 1000
        assert all(i // 1000 == d for i in a) and all(i // 1000 == e for i in b) and (d != e) == bool(label)
        at = flat[d].index(a[0])
        assert flat[d][at:at + len(a)] == a
        if label == 0:
            assert flat[d][at + len(a):at + len(a) + len(b)] == b
    labels = Counter(label for *_, label in pairs)
    assert labels[1] / len(pairs) == pytest.approx(0.55, abs=0.07)  # a document's last sentence has nothing that follows
    assert 25 < sum(len(a) + len(b) for a, b, _ in pairs) / len(pairs) < 45


def test_every_sentence_is_used_once_as_text_that_goes_on():
    docs = documents(30)
    used = Counter()
    for a, b, label in next_sentence_pairs(docs, 40, seed=1):
        used.update(a if label else a + b)
    everything = {i for document in docs for sentence in document for i in sentence}
    assert max(used.values()) == 1 and len(used) > 0.97 * len(everything)  # what is cut off of a long B is lost


def test_pairs_follow_the_seed_and_empty_sentences_are_left_out():
    docs = documents(5)
    pairs = [list(next_sentence_pairs(docs, 30, seed)) for seed in (0, 0, 1)]
    assert pairs[0] == pairs[1] != pairs[2]
    assert all(a and b for a, b, _ in next_sentence_pairs([[[], [1]], [[]], [[2], []]], 30, 0))
    for few in ([], [[[1], [2]]], [[[1]], [[]]]):
        with pytest.raises(ValueError, match="pairs need at least 2 documents with text, got"):
            list(next_sentence_pairs(few, 30, 0))


def test_batches_fit_the_context_and_go_on_over_passes():
    batches = list(islice(pretraining_batches(documents(6), SPECIAL, 7000, 32, 8, seed=0), 30))
    for tokens, segments, real, targets, labels in batches:
        assert tokens.shape == segments.shape == real.shape == targets.shape and tokens.size(1) <= 32 and len(labels) == 8
        assert ((targets != IGNORE).sum(1) >= 1).all() and not (targets != IGNORE)[~real].any() and set(labels.tolist()) <= {0, 1}
    again = next(pretraining_batches(documents(6), SPECIAL, 7000, 32, 8, seed=0))
    assert all(torch.equal(a, b) for a, b in zip(again, batches[0]))
    assert not torch.equal(batches[0][0], next(pretraining_batches(documents(6), SPECIAL, 7000, 32, 8, seed=1))[0])
    small = next(pretraining_batches([[[1]], [[2]]], SPECIAL, 7000, 32, 8, seed=0))
    assert 1 <= len(small[4]) < 8  # fewer pairs than a batch


# --- loss and training ----------------------------------------------------------------------

def test_loss_matches_brute_force_and_both_forms_agree():
    g = seeded()
    masked, following = torch.randn(2, 5, 7, generator=g, dtype=torch.float64), torch.randn(2, 2, generator=g, dtype=torch.float64)
    targets, labels = torch.tensor([[IGNORE, 3, IGNORE, 0, IGNORE], [6, IGNORE, IGNORE, IGNORE, 2]]), torch.tensor([1, 0])
    nll = [-masked[b, t].log_softmax(-1)[targets[b, t]] for b, t in ((0, 1), (0, 3), (1, 0), (1, 4))]
    expected = sum(nll) / 4 - (following[0].log_softmax(-1)[1] + following[1].log_softmax(-1)[0]) / 2
    torch.testing.assert_close(pretraining_loss(masked, targets, following, labels), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(pretraining_loss(masked[targets != IGNORE], targets, following, labels), expected, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match=r"logits \(3, 7\) and targets \(4,\) do not fit"):
        pretraining_loss(masked[0, :3], targets, following, labels)


class Guess(nn.Module):
    """The same guess for every gap: learns the frequencies of tokens, and of labels."""

    def __init__(self):
        super().__init__()
        self.token, self.label = nn.Parameter(torch.zeros(9)), nn.Parameter(torch.zeros(2))

    def forward(self, tokens, segments, real, hidden):
        return self.token.expand(int(hidden.sum()), 9), self.label.expand(len(tokens), 2)


def test_pretraining_learns_what_there_is_to_learn():
    docs = [[[5, 5, 5, 6] * 2] * 5 for _ in range(6)]
    model, losses = Guess(), []
    before = model.token.detach().clone()
    pretrain(model, pretraining_batches(docs, SPECIAL, 9, 24, 8, 0), 60, lr=0.3, report=lambda step, loss: losses.append(loss))
    assert len(losses) == 60 and losses[0] == pytest.approx(torch.log(torch.tensor(18.0)).item(), abs=1e-4)
    assert losses[-1] < 1.5 and model.token.argmax() == 5 and not torch.equal(before, model.token) and not model.training
    share, _ = pretraining_accuracy(model, pretraining_batches(docs, SPECIAL, 9, 24, 8, 1), 20)
    assert share == pytest.approx(0.75, abs=0.06)


def test_sentences_are_cut_at_stops_and_empty_lines():
    text = "One two. Three: four?\nFive e.g. this\n\nSix\n  \n  seven"
    assert [part.strip() for part in split_sentences(text)] == ["One two.", "Three:", "four?", "Five e.g.", "this", "Six", "seven"]
    assert split_sentences(" \n\n ") == []


# --- demo -----------------------------------------------------------------------------------

def demo(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["masked_lm.py", *map(str, flags)])
    runpy.run_path(masked_lm.__file__, run_name="__main__")
    return capsys.readouterr().out


def test_demo_ends_on_its_verdict_and_every_flag_changes_something(tmp_path, monkeypatch, capsys):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"The quick {name} fox jumps over lazy dogs. They sleep, tokenised and unaware.\n\nA new day. " * 9)
    base = ("--data", tmp_path / "*.txt", "--vocab_size", 70)
    runs = [demo(monkeypatch, capsys, *base, *more) for more in ((), ("--seed", 1), ("--whole_words",), ("--vocab_size", 60))]
    assert len(set(runs)) == 4
    for run in runs:
        assert re.search(r"chosen 1[3-9]\.\d+%: \[MASK\] (79|80|81)\.\d%", run)


@pytest.mark.parametrize("flags, message", [(("--data", "missing.txt"), "missing.txt")])
def test_bad_flags_are_one_line(flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        demo(monkeypatch, capsys, *flags)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1


def test_tokens_of_one_dimension_are_refused():
    with pytest.raises(ValueError, match=r"tokens must be \(B, T\), got shape \(4,\)"):
        mask_tokens(torch.arange(4), SPECIAL, 20, torch.Generator())
