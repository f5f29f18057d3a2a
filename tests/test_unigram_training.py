"""Training Unigram: arrays against the naive form, expected counts against all cuts and autograd, EM's promise."""

import math
import random
import re
import runpy
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from pydoc_data.topics import topics

import unigram
import unigram_training
from unigram import cuts_naive
from unigram_training import (WORDS, Lattice, count_pretokens, expected_counts_naive, m_step, seed_pieces, seed_pieces_naive,
                              train_unigram)

CORPUS = ["\n\n".join(topics.values())[:20_000]]
ALPHABETS = ["a", "ab", "abc", "aé😀\ud800 ", "".join(map(chr, range(32, 0x250)))]


def random_words(seed, alphabet, n=30, longest=12):
    rng = random.Random(seed)
    return {"".join(rng.choices(alphabet, k=rng.randrange(1, longest))): rng.randrange(1, 9) for _ in range(n)}


def lattice_of(words, pieces, **options):
    return Lattice(list(words), {piece: i for i, piece in enumerate(pieces)}, **options)


# --- seeds --------------------------------------------------------------------------------------

@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_seed_pieces_match_naive(alphabet):
    for seed in range(10):
        words = random_words(seed, alphabet)
        for size, longest in ((1000, 16), (10, 3), (1, 1), (50, 5)):
            assert list(seed_pieces(words, size, longest).items()) == list(seed_pieces_naive(words, size, longest).items())


def test_seed_pieces_by_hand():
    # b, c and d follow one a only: of "a", "ab", "abc", "abcd", the longest stands for those that occur as often.
    assert seed_pieces({"abcd": 2, "abce": 1}, 100, 16) == {"a": 3, "b": 3, "c": 3, "d": 2, "e": 1, "abc": 3, "bc": 3,
                                                          "abcd": 2, "bcd": 2, "cd": 2}
    assert list(seed_pieces({"abcd": 2, "abce": 1}, 7, 16))[5:] == ["abc", "abcd"]


# --- expected counts ----------------------------------------------------------------------------

@pytest.mark.parametrize("alphabet", ALPHABETS[:4])
def test_expected_counts_match_enumeration_and_naive(alphabet):
    for seed in range(5):
        words = random_words(seed, alphabet, longest=9)
        pieces = list(seed_pieces(words, 40, 4))
        rng = np.random.RandomState(seed)
        log_p = m_step(rng.random_sample(len(pieces)))
        scores = dict(zip(pieces, log_p.tolist()))
        likelihood, expected = 0.0, Counter()
        for word, n in words.items():
            cuts = cuts_naive(word, scores)
            total = math.fsum(math.exp(score) for _, score in cuts)
            likelihood += n * math.log(total)
            for cut, score in cuts:
                for piece in cut:
                    expected[piece] += n * math.exp(score) / total
        fast = lattice_of(words, pieces).expected_counts(log_p, np.array(list(words.values()), dtype=float))
        naive = expected_counts_naive(words, scores)
        for found, counts in (fast, (naive[0], list(naive[1].values()))):
            assert found == pytest.approx(likelihood, rel=1e-12)
            np.testing.assert_allclose(counts, [expected[piece] for piece in pieces], rtol=1e-10, atol=1e-12)


def test_expected_counts_match_autograd():
    """c(s) = dL / d log p(s), as torch's autograd has it of the forward recursion."""
    words = random_words(1, "abc")
    pieces = list(seed_pieces(words, 60, 6))
    log_p = m_step(np.random.RandomState(0).random_sample(len(pieces)))
    weights = torch.tensor(log_p, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for word, n in words.items():
        alphas = [torch.zeros((), dtype=torch.float64)]
        for j in range(1, len(word) + 1):
            alphas.append(torch.logsumexp(torch.stack([alphas[i] + weights[pieces.index(word[i:j])] for i in range(j)
                                                       if word[i:j] in pieces]), 0))
        total = total + n * alphas[-1]
    likelihood, expected = lattice_of(words, pieces).expected_counts(log_p, np.array(list(words.values()), dtype=float))
    assert likelihood == pytest.approx(total.item(), rel=1e-12)
    np.testing.assert_allclose(expected, torch.autograd.grad(total, weights)[0].numpy(), rtol=1e-10)


def test_long_words_do_not_underflow():
    words = {"ab" * 1000: 3, "b": 1}
    likelihood, expected = lattice_of(words, ["a", "b", "ab"]).expected_counts(np.log([1e-3, 1e-3, 1e-3]), np.array([3.0, 1.0]))
    assert likelihood == pytest.approx(3 * 1000 * math.log(1e-3 + 1e-6) + math.log(1e-3), rel=1e-12)
    assert expected[2] == pytest.approx(3000 / (1 + 1e-3))


def test_lattice_that_lost_pieces_matches_one_built_without_them():
    words = random_words(2, "abc", n=60)
    pieces, counts = list(seed_pieces(words, 80, 6)), np.array(list(words.values()), dtype=float)
    kept = [i for i, piece in enumerate(pieces) if len(piece) == 1 or i % 3]
    new_id = np.full(len(pieces), -1)
    new_id[kept] = np.arange(len(kept))
    lattice, rest = lattice_of(words, pieces), [pieces[i] for i in kept]
    lattice.keep(new_id)
    log_p = m_step(np.arange(1.0, len(rest) + 1))
    ours, theirs = (x.expected_counts(log_p, counts) for x in (lattice, lattice_of(words, rest)))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-14)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-12)


def test_best_matches_enumeration_without_the_piece_itself():
    pieces = list(seed_pieces(random_words(3, "ab"), 60, 6))
    log_p = m_step(np.arange(1.0, len(pieces) + 1))
    lattice = lattice_of(pieces, pieces, own=False)
    found = lattice.best(log_p[lattice.piece])
    for piece, best in zip(pieces, found.tolist()):
        cuts = [score for cut, score in cuts_naive(piece, dict(zip(pieces, log_p.tolist()))) if len(cut) > 1]
        assert best == pytest.approx(max(cuts, default=-math.inf), rel=1e-12)


# --- training -----------------------------------------------------------------------------------

def test_em_never_lowers_the_likelihood():
    words = count_pretokens(CORPUS)
    pieces = list(seed_pieces(words, 3000, 12))
    lattice, counts = lattice_of(words, pieces), np.array(list(words.values()), dtype=float)
    expected, last = np.array([1.0 + i % 7 for i in range(len(pieces))]), -math.inf
    for _ in range(15):
        likelihood, expected = lattice.expected_counts(m_step(expected), counts)
        assert likelihood > last - 1e-12 * abs(likelihood)
        last = likelihood
        # Whatever the probabilities, the pieces of all cuts together have all the characters.
        assert expected @ [len(piece) for piece in pieces] == pytest.approx(sum(n * len(w) for w, n in words.items()))


def test_training_ends_with_a_distribution_of_the_size_wanted():
    history = []
    pieces = train_unigram(CORPUS, 500, history=history, coverage=1.0)
    scores = dict(pieces)
    assert len(scores) == len(pieces) == 500 and set(CORPUS[0]) <= set(scores)
    assert [score for _, score in pieces] == sorted(scores.values(), reverse=True)
    # Each p is off by at most 2^-13 of itself by rounding to 2^-12; sums of multiples are exact.
    assert sum(map(math.exp, scores.values())) == pytest.approx(1, abs=2**-13)
    assert all(score * 4096 == int(score * 4096) for score in scores.values())
    assert all(b >= a - 1e-12 * abs(a) for (n, a), (m, b) in zip(history, history[1:]) if n == m)
    sizes = [n for n, _ in history]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1500 and sizes[-1] == 500
    assert pieces == train_unigram(CORPUS, 500, coverage=1.0)


def test_options_change_the_vocabulary():
    texts = [CORPUS[0][:6000]]
    base = train_unigram(texts, 150)
    for options in (dict(coverage=0.98), dict(longest=4), dict(seed_size=200), dict(shrink=0.5), dict(em_steps=1),
                    dict(pattern=r"\w+|\W")):
        assert train_unigram(texts, 150, **options) != base, options
    assert max(len(piece) for piece, _ in train_unigram(texts, 150, longest=4)) == 4
    rare = {c for c, n in Counter(texts[0]).items() if n == 1}
    assert rare and not rare & set(dict(train_unigram(texts, 150, coverage=0.99)))


def test_texts_that_run_out_of_substrings_give_fewer_pieces(monkeypatch):
    assert {piece for piece, _ in train_unigram(["ab ab"], 100, coverage=1.0)} == {"a", "b", " ", "ab"}
    assert "".join(sorted(dict(train_unigram(["abc"], 100)))) == "abc"
    # U+2581 stands for the blank in files: never in a piece. Words are cut at it and at LONGEST_WORD characters.
    for apart in ("\u2581", "\ud800", "\udfff"):  # and half a surrogate pair would make a file that nobody reads
        assert {*dict(train_unigram([f"a{apart}b a{apart}b"], 100, coverage=1.0))} == {"a", "b", " "}
    monkeypatch.setattr(unigram_training, "LONGEST_WORD", 32)
    assert max(map(len, dict(train_unigram(["a" * 1000], 50, longest=100)))) == 32


@pytest.mark.parametrize("arguments, message", [
    (("text", 100), "iterable of str, got one str"), (([""], 100), "hold no characters"), (([], 100), "hold no characters"),
    ((["abc"], 2), "3 characters cannot all be among 2 pieces"), ((["a"], 0), "n_pieces at least 1"),
    ((["a"], 9, "("), "not a regular expression"), ((["a"], 9, "(a)"), "captures 1 group"),
    ((["ab"], 9, "a"), "covers 1 of 2 characters"), ((["a"], 9, WORDS, 0.0), r"coverage must be in \(0, 1\]"),
    ((["a"], 9, WORDS, 1.0, 0), "longest, .* at least 1"), ((["a"], 9, WORDS, 1.0, 4, None, 1.0), r"shrink in \(0, 1\)"),
    ((["a"], 9, WORDS, 1.0, 4, None, 0.5, 0), "em_steps and .* at least 1")])
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        train_unigram(*arguments)


def test_words_are_cut_as_the_vocabulary_in_use_cuts_them():
    assert WORDS == unigram.WORDS
    assert list(count_pretokens(["a b  c\n  d \n", " "])) == ["a", " b", " ", " c", "\n ", " d", " \n"]


def test_flags_change_what_is_trained(tmp_path, monkeypatch, capsys):
    def run(*flags):
        monkeypatch.setattr("sys.argv", ["unigram_training.py", "--data", f"{tmp_path}/a.txt", *map(str, flags)])
        try:
            runpy.run_path(str(ROOT / "unigram_training.py"), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    (tmp_path / "a.txt").write_text(CORPUS[0][:10_000])
    status, out, error = run("--pieces", 200, "--em_steps", 3, "--coverage", 0.99)
    assert status == 0 and "200 pieces learned" in out and "EM never fell: True (expected True)\n" in out, error
    assert "seeds, naive = fast: True" in out and out.split("200 pieces")[-1].count("->") == 2
    for flags, message in ((("--pieces", 3), "cannot all be among 3 pieces: give more pieces"), (("--em_steps", 0), "em_steps and .* at least 1")):
        status, out, error = run(*flags)
        assert (status, out) == (2, "") and re.fullmatch(rf"unigram_training\.py: .*{message}.*\n", error)
