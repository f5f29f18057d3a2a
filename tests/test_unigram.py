"""Unigram's cuts against all cuts enumerated and against Hugging Face tokenizers; a text always comes back."""

import json
import math
import pickle
import random
import re
import runpy
from collections import Counter

import pytest
from conftest import ROOT
from pydoc_data.topics import topics
from scipy.stats import chisquare
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from unigram import (END_OF_TEXT, UNKNOWN_PENALTY, WORDS, Unigram, best_cuts, cuts_naive, load, log_marginals, sample_cut,
                     save, viterbi)
from unigram_training import train_unigram

CORPUS = ["\n\n".join(topics.values())[:40_000]]
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
HOSTILE = ["", " ", "\n", "   leading and trailing   ", "a\r\n\r\n  b\t\tc  \n", "naïve café Ünïcödé", "日本語テキスト、中国話",
           "😀👩‍👩‍👧‍👦🏳️‍🌈", "\x00\x01\x7f\x85\xa0\u2028\u200b\x1c\x1d", "e\u0301\u0301\u0301 z̶a̶l̶g̶o̶", "a" * 3000, " " * 3000 + "x",
           "!?" * 1000, "\ufeffBOM", "def f(x):\n    return x**2  # ok\n", "العربية עברית हिन्दी ไทย", "\U0010ffff\uffff\ufffd"]
ALPHABETS = ["abet ", "the and of\n ", "aé😀 \n'", "".join(map(chr, range(32, 0x250))), "日本 語\u3000\x85\t "]


def texts(n, seed=0, longest=60):
    rng = random.Random(seed)
    return ["".join(rng.choices(alphabet, k=rng.randrange(longest))) for _ in range(n) for alphabet in ALPHABETS]


@pytest.fixture(scope="module")
def unigram():
    return Unigram(train_unigram(CORPUS, 800))


def random_scores(seed, alphabet="ab"):
    """Log probabilities of some substrings, all characters among them."""
    rng = random.Random(seed)
    pieces = [*alphabet, *{"".join(rng.choices(alphabet, k=rng.randrange(2, 5))) for _ in range(8)}]
    return {piece: math.log(rng.random() / len(pieces)) for piece in pieces}


# --- one word against all its cuts ----------------------------------------------------------------

@pytest.mark.parametrize("seed", range(10))
def test_marginal_viterbi_and_n_best_match_enumeration(seed):
    scores, rng = random_scores(seed), random.Random(seed)
    for _ in range(10):
        word = "".join(rng.choices("ab", k=rng.randrange(1, 12)))
        cuts = sorted(cuts_naive(word, scores), key=lambda cut: -cut[1])
        total = math.log(math.fsum(math.exp(score) for _, score in cuts))
        assert log_marginals(word, scores, 4, -99.0)[-1] == pytest.approx(total, abs=1e-12)
        score_of = {tuple(pieces): score for pieces, score in cuts}
        # The same pieces in another order score the same but for rounding: either is best.
        assert score_of[tuple(viterbi(word, scores, 4, -99.0))] == pytest.approx(cuts[0][1], abs=1e-12)
        found = best_cuts(word, scores, 4, -99.0, 5)
        assert [score for score, _ in found] == pytest.approx([score for _, score in cuts[:5]], abs=1e-12)
        assert [score for score, _ in found] == pytest.approx([score_of[tuple(p)] for _, p in found], abs=1e-12)
        assert {tuple(pieces) for _, pieces in best_cuts(word, scores, 4, -99.0, 10_000)} == set(score_of)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0, 2.5])
def test_drawn_cuts_have_the_probabilities_of_enumeration(alpha):
    scores, word, rng = random_scores(3), "abbaba", random.Random(0)
    cuts = cuts_naive(word, scores)
    weights = [math.exp(alpha * score) for _, score in cuts]
    drawn = Counter(tuple(sample_cut(word, scores, 4, -99.0, alpha, rng)) for _ in range(4000))
    assert set(drawn) <= {tuple(pieces) for pieces, _ in cuts} and len(cuts) >= 8
    expected = [4000 * weight / sum(weights) for weight in weights]
    common = [(drawn[tuple(pieces)], e) for (pieces, _), e in zip(cuts, expected) if e >= 5]
    rest = 4000 - sum(n for n, _ in common), 4000 - sum(e for _, e in common)
    pairs = [*common, rest] if rest[1] > 1e-6 else common
    # A right sampler falls below 1e-4 once in 10,000 seeds, and the seed is fixed.
    assert chisquare([n for n, _ in pairs], [e for _, e in pairs]).pvalue > 1e-4


def test_equal_cuts_are_decided_as_documented():
    scores = dict.fromkeys(["a", "aa"], 0.0)  # every cut has log p 0
    assert viterbi("aaa", scores, 2, -9.0) == ["a", "aa"]
    assert viterbi("aaaa", scores, 2, -9.0) == ["aa", "aa"]


def test_long_words_do_not_underflow():
    scores = random_scores(0)
    word = "ab" * 5000
    assert -1e5 < log_marginals(word, scores, 4, -99.0)[-1] < -1e3
    assert "".join(sample_cut(word, scores, 4, -99.0, 0.5, random.Random(0))) == word


# --- Hugging Face ---------------------------------------------------------------------------------

@pytest.mark.parametrize("pattern", [WORDS, GPT2_SPLIT])
def test_ids_match_hugging_face_on_thousands_of_strings(tmp_path, pattern):
    unigram = Unigram(train_unigram(CORPUS, 500, pattern), pattern=pattern)
    save(unigram, tmp_path / "tokenizer.json")
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.get_vocab_size() == unigram.n_vocab
    prose = CORPUS[0].split("\n")
    # \s of GPT2_SPLIT has U+001C and U+0085 here and not there.
    checked = [t for t in [*HOSTILE, *texts(500), *prose] if pattern == WORDS or not {*"\x1c\x1d\x85"} & {*t}]
    assert len(checked) > 3000
    for text in checked:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert unigram.encode(text) == expected, text
        assert theirs.decode(expected, skip_special_tokens=False) == text == unigram.decode(expected)


def train_hugging_face(corpus, vocab_size):
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"),
        pre_tokenizers.Metaspace("\u2581", prepend_scheme="never", split=False)])
    made.train_from_iterator(corpus, trainers.UnigramTrainer(vocab_size=vocab_size + 1, special_tokens=["<unk>"],
                                                             unk_token="<unk>", show_progress=False))
    return made, json.loads(made.to_str())["model"]["vocab"]


def test_vocabulary_of_hugging_face_gives_its_cuts_and_ours_compresses_no_worse():
    corpus, held_out = ["\n\n".join(topics.values())[30_000:120_000]], "\n\n".join(topics.values())[:15_000]
    theirs, vocab = train_hugging_face(corpus, 1000)
    pieces = [(piece.replace("\u2581", " "), score) for piece, score in vocab if piece != "<unk>"]
    unigram, ours = Unigram(pieces), Unigram(train_unigram(corpus, 1000))
    for text in held_out.split("\n"):
        cut = [piece.replace("\u2581", " ") for piece in theirs.encode(text).tokens]
        assert [unigram.tokens[i] for i in unigram.encode(text)] == cut
    assert len(unigram.scores) == len(ours.scores) == 1000
    # Their seeds, M step and pruning differ; so the vocabulary is to be as good, not the same.
    assert len(ours.encode(held_out)) < len(unigram.encode(held_out))
    assert ours.log_likelihood(held_out) > unigram.log_likelihood(held_out)


# --- whole texts ----------------------------------------------------------------------------------

def test_any_str_comes_back(unigram):
    rng = random.Random(0)
    anything = ["".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(20))) for _ in range(300)]
    halves = ["\ud800", "\udfff\ud800", "a\ud83d\ude00b", "\udc80" * 5]
    named = ["\u2581", " \u2581the \u2581", "<0x41>", "<unk>", END_OF_TEXT, f"a{END_OF_TEXT}b"]
    for text in [*HOSTILE, *anything, *halves, *named, *texts(20)]:
        for ids in (unigram.encode(text), unigram.sample(text, 0.1, rng)):
            assert min(ids, default=2) > 1  # neither <unk> nor a special token
            assert unigram.decode(ids) == text


def test_whole_texts_are_their_words(unigram):
    text = "the value of x\n  is None"
    best = unigram.n_best(text, 20)
    assert best[0][1] == unigram.encode(text)
    assert [score for score, _ in best] == sorted((score for score, _ in best), reverse=True)
    assert len({tuple(ids) for _, ids in best}) == 20 and {unigram.decode(ids) for _, ids in best} == {text}
    for score, ids in best:
        assert score == pytest.approx(sum(unigram.scores[unigram.tokens[i]] for i in ids), abs=1e-10)
    assert best[0][0] < unigram.log_likelihood(text) < 0
    assert unigram.sample(text, 1e3, random.Random(0)) == best[0][1]
    assert len({tuple(unigram.sample(text, 0.1, random.Random(seed))) for seed in range(10)}) > 5
    assert unigram.sample(text, 0.1, random.Random(7)) == unigram.sample(text, 0.1, random.Random(7))
    assert unigram.log_likelihood("\u6f22") == pytest.approx(min(unigram.scores.values()) - UNKNOWN_PENALTY)


def test_vocabulary_goes_to_other_processes(unigram):
    assert pickle.loads(pickle.dumps(unigram)).encode(CORPUS[0][:500]) == unigram.encode(CORPUS[0][:500])


def test_memory_of_words_is_bounded():
    two = Unigram([("a", -1.0), (" ", -2.0)])
    two._remembered = {f"a{i}": [0] for i in range(2**16 - 1)}
    assert two.encode("a0 b")[0] == 0 and len(two._remembered) == 2**16  # remembered as it was; one word more
    assert len(two.encode("c d")) == 3 and len(two._remembered) == 2


def test_ids_are_laid_out_as_documented(unigram):
    two = Unigram([("a", -1.0), (" a", -2.0)], ("<|endoftext|>", "<|pad|>"))
    assert (unigram.eot, two.eot, two.n_vocab) == (1, 1, 1 + 2 + 256 + 2)
    assert two.encode("a ab") == [259, 260, 3 + ord("b")]
    assert two.decode([1, 259, 2]) == "<|endoftext|>a<|pad|>"
    assert two.decode([3 + 0xE6, 259]) == "\ufffda" and two.decode_bytes([3 + 0xE6]) == b"\xe6"
    for ids in ([261], [-1]):
        with pytest.raises(ValueError, match=r"token id -?\d+ is not in the vocabulary, 0 \.\. 260"):
            two.decode(ids)


@pytest.mark.parametrize("arguments, message", [
    (([],), "0 pieces"), (([("a", -1.0), ("a", -2.0)],), "1 of them different"), (([("", -1.0)],), "none empty"),
    (([("\u2581", -1.0)],), "none with"), (([("a", 0.5)],), "at most 0"), (([("a", math.nan)],), "finite"),
    (([("a", -1.0)], "<eot>"), "list of different"), (([("a", -1.0)], ("x", "x")), "list of different"),
    (([("a", -1.0)], ("<unk>",)), "list of different"), (([("a", -1.0)], (), "("), "not a regular expression"),
    (([("a", -1.0)], (), "(.)"), "captures 1 group")])
def test_bad_vocabulary_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Unigram(*arguments)


def test_bad_arguments_are_refused(unigram):
    with pytest.raises(ValueError, match="alpha must be finite and at least 0, got -1"):
        unigram.sample("a", -1, random.Random(0))
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        unigram.n_best("a", 0)
    with pytest.raises(ValueError, match="no special tokens"):
        Unigram([("a", -1.0)], ()).eot
    with pytest.raises(ValueError, match="covers 1 of 2 characters"):
        Unigram([("a", -1.0)], (), "a").encode("ab")


# --- files ----------------------------------------------------------------------------------------

def test_saved_vocabulary_is_loaded_alike(tmp_path, unigram):
    save(unigram, tmp_path / "tokenizer.json")
    again = load(tmp_path / "tokenizer.json")
    assert (again.scores, again.tokens, again.pattern) == (unigram.scores, unigram.tokens, unigram.pattern)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    with pytest.raises(ValueError, match="nowhere.*cannot be written"):
        save(unigram, tmp_path / "nowhere" / "tokenizer.json")


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path, unigram):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match=f"^{path}: cannot be read"):
        load(path)
    save(unigram, path)
    whole = path.read_text()
    theirs, _ = train_hugging_face(CORPUS, 200)
    for content in ("", whole[:-100], "[]", "{}", whole.replace('"<0x00>"', '"<0xZZ>"'), whole.replace('"never"', '"always"'),
                    theirs.to_str(), whole.replace('"type": "Unigram"', '"type": "BPE"'), "\ud800".join("ab")):
        path.write_text(content, errors="surrogatepass")
        with pytest.raises(ValueError, match=f"^{path}: is not a tokenizer.json that unigram.save wrote"):
            load(path)


def test_flags_change_what_is_printed_and_written(tmp_path, monkeypatch, capsys):
    def run(*flags):
        monkeypatch.setattr("sys.argv", ["unigram.py", "--data", f"{tmp_path}/*.txt", *map(str, flags)])
        try:
            runpy.run_path(str(ROOT / "unigram.py"), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(CORPUS[0][i * 5000:(i + 1) * 5000])
    status, out, error = run("--vocab_size", 500, "--text", "the object", "--alpha", 0.1, "--seed", 1,
                             "--out", tmp_path / "tokenizer.json")
    assert status == 0 and "round trip: True (expected True; " in out, error
    assert "500 tokens" in out and "drawn with alpha 0.1" in out and "the| object" in out
    assert load(tmp_path / "tokenizer.json").n_vocab == 500
    for flags, message in ((("--vocab_size", 258), "at least 259, .* got 258"), (("--alpha", -1), "finite and at least 0, .*-1"),
                           (("--vocab_size", 290), "cannot all be among 32 pieces"),
                           (("--out", tmp_path / "no" / "a.json"), "no/a.json: cannot be written .No such file")):
        status, out, error = run(*flags)
        assert (status, out) == (2, "") and re.fullmatch(rf"unigram\.py: .*{message}.*\n", error)
