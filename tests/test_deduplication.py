"""Exact copies, MinHash, bands, clusters and decontamination, each against brute force over all pairs."""

import itertools
import math
import random
import re
import runpy
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import run_ranks

import deduplication
from deduplication import (HeldOut, MinHash, band_hashes, choose_bands, clusters, hash64, jaccard, later_copies, link, meeting_pairs,
                           near_duplicates, ngram_hashes, planted, s_curve, sentences, units, without_units, word_hashes)

VOCABULARY = [f"w{i}" for i in range(3000)]


def document(n: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=n))


# --- exact ------------------------------------------------------------------------------------

def test_hashes_are_fixed_for_all_time():
    """A run that is resumed by a newer version must find the same copies."""
    assert hash64("Grüße").to_bytes(8, "little").hex() == "06ab58b78490a392"  # coreutils: b2sum -l 64
    assert word_hashes("one Two").tolist() == [17187386470384278111, 3404767644241738529]
    assert MinHash(2).signature("one two three four five six").tolist() == [338654684, 669718900]


def brute_units(text: str) -> list:
    lines = text.split("\n")
    pieces = [p for line in lines for p in sentences(line)]
    return [("line", line) for line in lines] + [("span", *pieces[i:i + 3]) for i in range(len(pieces) - 2)]


def test_units_are_equal_exactly_where_lines_and_spans_are():
    random_ = random.Random(0)
    texts = ["\n".join(" ".join(f"{random_.choice('ABCD')}." for _ in range(random_.randrange(1, 5)))
                       for _ in range(random_.randrange(1, 5))) for _ in range(60)] + ["", "\n", "One."]
    seen = {}
    for text in texts:
        found, expected = units(text).tolist(), brute_units(text)
        assert len(found) == len(expected) and found[0] == hash64(text.split("\n")[0])
        for value, key in zip(found, expected):
            assert seen.setdefault(key, value) == value
    assert len(set(seen.values())) == len(seen)


def test_later_copies_match_a_dictionary():
    random_ = np.random.RandomState(0)
    for n in (0, 1, 2, 500):
        hashes = random_.randint(0, 100, n).astype(np.uint64) * np.uint64(2**56)
        places = random_.permutation(n).astype(np.uint64) + np.uint64(2**40)
        first, expected = {}, []
        for place, value in sorted(zip(places.tolist(), hashes.tolist())):
            if first.setdefault(value, place) != place:
                expected.append(place)
        assert later_copies(hashes, places).tolist() == expected


def test_without_units_removes_lines_and_spans_and_nothing_else():
    text = "One. Two.  Three. Four.\nA whole line.\nFive. Six. Seven."
    assert without_units(text, []) == (text, {})
    assert without_units(text, [1]) == ("One. Two.  Three. Four.\nFive. Six. Seven.", {"line": "A whole line."})
    assert without_units(text, [3]) == ("Four.\nA whole line.\nFive. Six. Seven.", {"three sentences": "One.\nTwo.\nThree."})
    assert without_units(text, [5]) == ("One. Two.\nFive. Six. Seven.", {"three sentences": "Three.\nFour.\nA whole line."})
    assert without_units(text, [3, 4])[0] == "A whole line.\nFive. Six. Seven."  # spans that overlap
    assert without_units(text, [0, 1, 2]) == ("", {"line": text})
    assert without_units(text, [1, 8]) == ("One. Two.  Three. Four.", {"line": "A whole line.", "three sentences": "Five.\nSix.\nSeven."})


def test_every_line_and_span_occurs_once_in_what_is_left():
    """The whole of exact deduplication on a corpus of few sentences, against C4's sentence in a few lines."""
    random_ = random.Random(1)
    corpus = ["\n".join(" ".join(f"S{random_.randrange(12)}." for _ in range(random_.randrange(1, 6)))
                        for _ in range(3)) for _ in range(30)]
    hashes = [units(text) for text in corpus]
    starts = np.cumsum([0] + [len(h) for h in hashes])
    copies = later_copies(np.concatenate(hashes), np.arange(starts[-1], dtype=np.uint64)).astype(int)
    seen, gone = set(), 0
    for i, text in enumerate(corpus):
        mine = copies[(copies >= starts[i]) & (copies < starts[i + 1])] - starts[i]
        expected = [j for j, unit in enumerate(brute_units(text)) if unit in seen or seen.add(unit)]
        assert mine.tolist() == expected
        gone += len(without_units(text, expected)[0]) < len(text)
    assert gone > 10


# --- words and n-grams ------------------------------------------------------------------------

def test_word_hashes_are_equal_exactly_where_words_are():
    texts = ["The cat, THE CAT; don't 3.14", "ÉCOLE école École straße 漢字 x", "", "!?", "a" * 3000 + " b", "a" * 1024 + "b" + "a" * 1024,
             " ".join(VOCABULARY * 60), "x" * 600_000, "é" * 300_000]
    seen = {}
    for text in texts:
        words = [w for i in range(0, max(1, len(text)), 2**16) for w in re.findall(r"[0-9a-z\x80-\U0010ffff]+", text[i:i + 2**16].lower())] \
            if " " not in text else re.findall(r"[0-9a-z\x80-\U0010ffff]+", text.lower())
        found = word_hashes(text).tolist()
        assert len(found) == len(words)
        for word, value in zip(words, found):
            assert seen.setdefault(word, value) == value
    assert len(set(seen.values())) == len(seen)


def test_ngram_hashes_depend_on_every_word_and_the_order():
    words = word_hashes("a b c d a b c e b a")
    assert len(ngram_hashes(words, 3)) == 8 and len(ngram_hashes(words, 11)) == 0 and len(ngram_hashes(words, 10)) == 1
    grams = ngram_hashes(words, 3).tolist()
    assert grams[0] == grams[4] and len(set(grams)) == 7
    assert ngram_hashes(words[:1], 1)[0] != words[0]  # a word is no 1-gram


def test_jaccard_matches_sets_by_hand():
    assert jaccard("a b c d e f", "A, b c d e f!") == 1 and jaccard("a b c d e f", "b c d e f g") == 1 / 3
    assert jaccard("a b", "a b") == 1 and jaccard("a b", "a c") == 0 and jaccard("", "") == 0


# --- MinHash ----------------------------------------------------------------------------------

def test_signature_matches_the_formula():
    minhash = MinHash(40, seed=3)
    for text in ("", "!!", "one", "one two three", document(5, 0), document(600, 1), document(1500, 2)):
        signature = minhash.signature(text)
        assert signature.shape == (40,) and signature.dtype == np.uint32
        assert np.array_equal(signature, minhash.signature_naive(text))
    assert not np.array_equal(minhash.signature("!!"), minhash.signature("??"))
    assert np.array_equal(minhash.signature("One two"), minhash.signature("one, TWO"))
    assert not np.array_equal(MinHash(40, seed=4).signature("one"), minhash.signature("one"))
    assert not np.array_equal(MinHash(40, n=2).signature(document(9, 0)), MinHash(40).signature(document(9, 0)))
    for wrong in ({"k": 0}, {"n": 0}, {"seed": -1}, {"seed": 2**32}):
        with pytest.raises(ValueError, match="got"):
            MinHash(**wrong)


def test_share_of_equal_minima_is_the_similarity():
    minhash, errors = MinHash(512), []
    for seed in range(40):
        words = document(300, seed).split()
        other = words.copy()
        for place in random.Random(seed).sample(range(300), seed):
            other[place] = "other"
        a, b = " ".join(words), " ".join(other)
        expected = jaccard(a, b)
        errors.append(((minhash.signature(a) == minhash.signature(b)).mean() - expected)
                      / max(1e-9, math.sqrt(expected * (1 - expected) / 512)) if 0 < expected < 1 else 0.0)
    # Standard scores of a binomial: mean 0 and deviation 1, both within 4 standard errors of 40 of them.
    assert abs(np.mean(errors)) < 4 / 40**0.5 and np.std(errors) < 1 + 4 / 80**0.5


# --- bands ------------------------------------------------------------------------------------

def test_s_curve_matches_signatures_that_agree_by_chance():
    random_ = np.random.RandomState(0)
    a = random_.randint(0, 2**32, (4000, 24), dtype=np.uint32)
    for similarity in (0.5, 0.8):
        b = np.where(random_.rand(4000, 24) < similarity, a, a + np.uint32(1))
        met = (band_hashes(a, 6, 4) == band_hashes(b, 6, 4)).any(1).mean()
        expected = s_curve(similarity, 6, 4)
        assert abs(met - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5  # 4 standard deviations


def test_bands_are_the_steepest_that_find_the_threshold():
    for k, threshold in ((128, 0.8), (128, 0.5), (20, 0.9), (1, 1.0)):
        bands, rows = choose_bands(k, threshold)
        assert bands * rows <= k and s_curve(threshold, bands, rows) >= 0.98
        assert all(s_curve(threshold, k // more, more) < 0.98 for more in range(rows + 1, k + 1))
    for wrong in ((0, 0.5), (10, 0), (10, 1.1)):
        with pytest.raises(ValueError, match="k must be at least 1"):
            choose_bands(*wrong)
    with pytest.raises(ValueError, match="take more"):
        choose_bands(2, 0.1)


def test_equal_rows_meet_in_the_same_band_only():
    same = np.array([[1, 2, 1, 2], [1, 2, 3, 4], [3, 4, 1, 2]], dtype=np.uint32)
    hashes = band_hashes(same, 2, 2)
    assert hashes[0, 0] == hashes[1, 0] and hashes[0, 1] == hashes[2, 1] and len(np.unique(hashes)) == 4


def test_meeting_pairs_link_all_that_meet():
    random_ = np.random.RandomState(0)
    hashes, documents = random_.randint(0, 200, 500), random_.randint(0, 300, 500)
    pairs = meeting_pairs(hashes, documents)
    assert (pairs[:, 0] < pairs[:, 1]).all() and len(np.unique(pairs, axis=0)) == len(pairs) <= 1000
    all_pairs = {tuple(sorted((a, b))) for h in set(hashes.tolist()) for a, b in
                 itertools.combinations(set(documents[hashes == h].tolist()), 2)}
    assert {tuple(pair) for pair in pairs.tolist()} <= all_pairs
    assert clusters(pairs.tolist()) == clusters(all_pairs)
    assert meeting_pairs(np.empty(0, np.uint64), np.empty(0, np.int64)).shape == (0, 2)


def test_clusters_match_a_flood_fill():
    random_ = random.Random(0)
    for n_pairs in (0, 5, 100, 300):
        pairs = [(random_.randrange(300), random_.randrange(300)) for _ in range(n_pairs)]
        near = {i: {i} for i in range(300)}
        for a, b in pairs:
            near[a].add(b)
            near[b].add(a)
        expected = {}
        for i in range(300):
            reached, todo = {i}, [i]
            while todo:
                new = near[todo.pop()] - reached
                reached |= new
                todo += new
            if min(reached) != i:
                expected[i] = min(reached)
        assert clusters(pairs) == expected
        for n_pieces in (1, 3, 50):
            first = link(np.array_split(np.array(pairs, dtype=np.int64).reshape(-1, 2), n_pieces), 300)
            assert first.tolist() == [expected.get(i, i) for i in range(300)]
    path = np.stack([np.arange(9999), np.arange(1, 10000)], 1)
    assert link([path], 10000).max() == link([path[::-1]], 10000).max() == link(path[::-1, None], 10000).max() == 0 == len(link([], 0))


# --- near-duplicates --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def corpus():
    texts, pairs = planted(240, seed=1)
    minhash = MinHash()
    return texts, pairs, np.stack([minhash.signature(text) for text in texts])


def test_planted_near_duplicates_are_found_and_others_are_not(corpus):
    texts, expected, signatures = corpus
    found = {(first, copy) for copy, first in near_duplicates(signatures).items()}
    assert len(expected) > 70 and len(texts) == 480
    assert len(found & expected) / len(expected) >= 0.95 and len(found & expected) / len(found) >= 0.95
    grams = [{tuple(words[i:i + 5]) for i in range(len(words) - 4)} for words in map(str.split, texts[:100])]
    # The random documents are no duplicates of each other: the planted ones are all.
    assert all(len(a & b) < 0.8 * len(a | b) for a, b in itertools.combinations(grams, 2))


@pytest.mark.parametrize("P", [1, 2, 3, 5])
def test_near_duplicates_are_the_same_at_any_number_of_ranks(corpus, P):
    signatures = corpus[2][:, :64].copy()
    signatures[7:200:20] = signatures[3]  # a cluster of many, over all ranks
    whole = near_duplicates(signatures)
    borders = [0, *sorted(random.Random(P).sample(range(len(signatures)), P - 1)), len(signatures)]  # uneven parts
    results = run_ranks(P, lambda rank: near_duplicates(signatures[borders[rank]:borders[rank + 1]]))
    assert all(result == whole for result in results) and len(whole) > 80


def test_near_duplicates_of_few_or_none():
    minhash = MinHash(64)
    none = np.empty((0, 64), dtype=np.uint32)
    assert near_duplicates(none) == {} and near_duplicates(minhash.signature("a")[None]) == {}
    one = minhash.signature(document(50, 0))[None]
    assert run_ranks(2, lambda rank: near_duplicates(one if rank else none)) == [{}, {}]
    assert run_ranks(2, lambda rank: near_duplicates(one)) == [{1: 0}, {1: 0}]


# --- decontamination --------------------------------------------------------------------------

def test_overlap_matches_brute_force():
    tests = [document(40, seed) for seed in range(20)] + ["Eight words of a question, and no more!", "far too short"]
    held_out = HeldOut(tests)
    assert held_out.n_texts == 22 and held_out.n_skipped == 1 and set(held_out.grams) == {8, 13}
    grams = {n: {tuple(t.lower().split()[i:i + n]) for t in tests[:20] for i in range(28)} for n in (13,)}
    for seed in range(100, 130):
        words = document(100, seed).split()
        test, at, length = tests[seed % 20].split(), seed % 60, seed - 110
        if length > 0:
            words[at:at + length] = test[:length]
        expected = sum(tuple(words[i:i + 13]) in grams[13] for i in range(len(words) - 12))
        assert held_out.overlap(" ".join(words).upper()) == expected == max(0, length - 12)
    assert held_out.overlap("so: EIGHT words of a question and no more") == 1
    assert held_out.overlap("eight words of a question and no") == 0 == held_out.overlap("") == HeldOut([]).overlap("a")


# --- the program ------------------------------------------------------------------------------

def run(monkeypatch, capsys, *arguments: str) -> tuple[str, str, int]:
    monkeypatch.setattr(sys, "argv", ["deduplication.py", *arguments])
    try:
        runpy.run_path(deduplication.__file__, run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code
    found = capsys.readouterr()
    return found.out, found.err, code


def test_program_reaches_its_verdict_and_every_flag_changes_something(monkeypatch, capsys):
    first = run(monkeypatch, capsys, "--documents", "60")[0]
    assert re.search(r"recall 1.000, precision \d\.\d+: OK", first)
    for more in (["--documents", "90"], ["--permutations", "64"], ["--threshold", "0.7"], ["--seed", "1"]):
        assert run(monkeypatch, capsys, "--documents", "60", *more)[0] != first
    for wrong, message in ((["--documents", "2"], "at least 3"), (["--permutations", "0"], "k must be at least 1"),
                           (["--threshold", "2"], "threshold in (0, 1]"), (["--seed", "-1"], "--seed in 0 .. 2^32 - 1"), (["x"], "unrecognized")):
        _, error, code = run(monkeypatch, capsys, *wrong)
        assert code == 2 and error.startswith("deduplication.py: ") and error.count("\n") == 1 and message in error


def test_words_of_equal_letters_differ():
    """No pair of many anagrams and prefixes falls together: 64 bits."""
    words = ["".join(p) for n in range(1, 8) for p in itertools.product("abc", repeat=n)]
    assert Counter(word_hashes(" ".join(words)).tolist()).most_common(1)[0][1] == 1
