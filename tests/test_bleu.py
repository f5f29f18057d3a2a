"""Scores against sacrebleu, alignments against counting by hand."""

import random
import re
import runpy
import sys

import pytest
import sacrebleu
import torch
from conftest import ROOT

from bleu import Pair, alignment_error_rate, attention_links, bleu, chrf, exact_match, mteval_words

HOSTILE = ["The cat sat on the mat.", "Well-known, isn't it? 3.14 and 2,500 - 7-8", "&quot;R&amp;D&quot; &lt;b&gt; a&b",
           "C++ {x} [y] (z) ~`|^_@#$%*=/\\<skipped>:;!?", "l'année 1997.", ".5 5. ,5 5, a.b a,b 1.000,5", "日本語 ÄÖÜß ...",
           "one", "two words", "a b c", "hyphen-\nbroken line\nnext", "  spaces   around\t", "a a a a a a", "end.\"", "-5 5-"]


def test_words_of_bleu_match_sacrebleus_tokenizer():
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    draw = random.Random(0)
    texts = HOSTILE + ["".join(draw.choices("ab1 2.,-'&;\"()/é", k=30)) for _ in range(300)]
    for text in texts:
        assert mteval_words(text) == Tokenizer13a()(text).split(), text


def test_scores_match_sacrebleu():
    draw = random.Random(0)
    words = "the a cat dog sat on mat , . 3.5 well-known isn't".split()
    for trial in range(60):
        n, size = draw.randint(1, 6), draw.choice((2, 5, 12))
        ours = [" ".join(draw.choices(words, k=draw.randint(0 if trial % 3 else 1, size))) for _ in range(n)]
        theirs = [" ".join(draw.choices(words, k=draw.randint(1, size))) if draw.random() < 0.5 else text or "cat"
                  for text in ours]
        assert bleu(ours, theirs) == pytest.approx(sacrebleu.corpus_bleu(ours, [theirs]).score, abs=1e-9)
        assert chrf(ours, theirs) == pytest.approx(sacrebleu.corpus_chrf(ours, [theirs]).score, abs=1e-9)
    shuffled = draw.sample(HOSTILE, len(HOSTILE))
    for ours, theirs in ((HOSTILE, HOSTILE), (HOSTILE, shuffled), ([""] * 2, ["a", "b"]), (["a b c d e"], ["v w x y z"]),
                         (["one"], ["one"]), (["a b c d"], ["a b x d"])):
        assert bleu(ours, theirs) == pytest.approx(sacrebleu.corpus_bleu(ours, [theirs]).score, abs=1e-9)
        assert chrf(ours, theirs) == pytest.approx(sacrebleu.corpus_chrf(ours, [theirs]).score, abs=1e-9)


def test_exact_match_is_a_share_and_scores_need_references():
    assert exact_match(["a", "b", "c", "d"], ["a", "b", "c", "D"]) == 75
    for score in (exact_match, bleu, chrf):
        for ours, theirs in ((["a"], []), ([], []), (["a"], ["a", "b"])):
            with pytest.raises(ValueError, match=f"{len(ours)} translations cannot be scored against {len(theirs)}"):
                score(ours, theirs)
        for ours, theirs in (("the cat", "the cat"), (["a"], [["a", "b"]]), (["a"], "a"), ([None], ["a"]), ([b"a"], ["a"])):
            with pytest.raises(ValueError, match="must be lists of strings"):
                score(ours, theirs)


def test_alignment_error_rate_matches_counting_by_hand():
    pair = Pair(["a", "b", "c"], ["x", "y", "z"], frozenset({(0, 0), (1, 2)}), frozenset({(0, 0), (1, 2), (2, 1)}))
    assert alignment_error_rate([set(pair.sure)], [pair]) == 0
    assert alignment_error_rate([set(pair.possible)], [pair]) == 0  # possible links cost nothing
    assert alignment_error_rate([{(0, 0), (2, 2)}], [pair]) == pytest.approx(1 - (1 + 1) / (2 + 2))
    assert alignment_error_rate([{(2, 1), (0, 2)}, {(0, 0)}], [pair, pair]) == pytest.approx(1 - (0 + 1 + 1 + 1) / (3 + 4))
    assert alignment_error_rate([set()], [pair]) == 1
    assert alignment_error_rate([{(0, 0)}], [Pair(["a"], ["x"], frozenset({(0, 0)}))]) == 0  # sure, so possible
    assert attention_links(torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.4, 0.6]])) == {(1, 0), (0, 1), (1, 2)}
    for links, pairs in (([], [pair]), ([{(0, 0)}], [Pair(["a"], ["b"])])):
        with pytest.raises(ValueError, match="sets of links for 1 pairs"):
            alignment_error_rate(links, pairs)
    with pytest.raises(ValueError, match=r"must be \(T, S\), .* got shape \(1, 2, 3\)"):
        attention_links(torch.zeros(1, 2, 3))


# --- the program ---

@pytest.fixture
def program(capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bleu.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "bleu.py"), run_name="__main__")
        return capsys.readouterr().out
    return run


def test_every_flag_changes_something(program, tmp_path):
    base = program("--count", 20)
    assert base == program("--count", 20) and base.endswith("with a word replaced (expected less)\n")
    for part in ("20 references, such as\n", "error rate 0.00 of the known", "chrF 100.0 of the references"):
        assert part in base
    assert program("--count", 20, "--seed", 1) != base != program("--count", 21)
    assert program("--count", 20, "--language", "german") != base == program("--count", 20, "--language", "french")
    (tmp_path / "own.tsv").write_text("Go.\tVa !\nHi\tSalut\n")
    own = program("--data", tmp_path / "own.tsv")
    assert "2 references, such as\nVa !\n" in own and "alignment" not in own and "chrF 100.0" in own


@pytest.mark.parametrize("arguments, message", [
    (["--count", 0], "--count must be at least 1"), (["--data", "x", "--count", 1000], "--count means nothing beside --data$"),
    (["--seed", -1], "--seed in 0"), (["--data", "missing.tsv"], "No such file"),
    (["--data", "x", "--language", "german"], "give one of them"), (["--language", "dutch"], "invalid choice")])
def test_program_answers_bad_input_in_one_line(program, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        program(*arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and re.search(message, error)


def test_a_missing_neighbour_is_one_line(program, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pairs", None)  # as if the file were not there
    with pytest.raises(SystemExit) as exit:
        program()
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and "pairs" in error and "beside this one" in error
