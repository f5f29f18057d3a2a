"""Each rule on both sides of its border, the masks, n-gram shares by definition."""

import random
import runpy
import sys
import warnings

import numpy as np
import pytest

import quality
from quality import BadWords, clean, mask, ngram_shares, ngram_shares_naive, sentences

WORDS = ("the river and that old house have to be with all of its people near enough for long winter evenings "
         "while children play outside until their mother calls them home again").split()


def prose(n_sentences: int, seed: int = 0) -> str:
    """Sentences of ten words, no two with the same five words in a row."""
    random_ = random.Random(seed)
    return " ".join(" ".join(f"{random_.choice(WORDS)}" if i % 2 else f"w{random_.randrange(10**6)}word" for i in range(10))
                    .capitalize() + "." for _ in range(n_sentences))


# --- C4 ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule, kept, removed", [
    (quality.ends_in_terminal_punctuation, ["A.", "Why?", "Ah!", 'He said "no"', "“no”"], ["Menu", "one, two,", "a:", "(so.)", ""]),
    (quality.has_five_words, ["one two three four five.", "a b c d e f"], ["one two three four.", "", "  a  b  c  d  "]),
    (quality.has_no_javascript, ["Java scripts are nice.", "Coffee."], ["Enable JavaScript.", "javascript:void", "JAVASCRIPT!"]),
    (quality.has_no_policy, ["Terms for use.", "I like cookies."],
     ["Our Terms of Use apply.", "See the privacy policy.", "Cookie Policy.", "This uses cookies.", "the use of cookies", "We use cookies."]),
    (quality.has_no_lorem_ipsum, ["lorem dolor"], ["a\nLorem Ipsum dolor"]),
    (quality.has_no_curly_bracket, ["f(x) [y]", "}"], ["a\nb {"]),
    (quality.has_three_sentences, ["One. Two. Three.", "One.\nTwo.\nThree.", 'He said "Go!" She went. "So?" I asked.'],
     ["One. Two.", "One.\nTwo.", "3.14 is a number. e.g.this is 1 sentence."]),
    (BadWords(["darn", "Oh Heck", " "]), ["darning", "oh, what the heck"], ["Darn it", "he said 'DARN'", "well oh heck.", "Oh,\nheck"]),
])
def test_c4_rule_keeps_and_removes_what_the_paper_says(rule, kept, removed):
    assert [rule(text) for text in kept] == [True] * len(kept)
    assert [rule(text) for text in removed] == [False] * len(removed)


def test_citation_markers_go_and_other_brackets_stay():
    assert quality.without_citation_markers("Rome[12] fell[citation needed] in [edit]476 [sic] a[i] [Citation Needed].") == \
        "Rome fell in 476 [sic] a[i] ."


def test_sentences_are_cut_behind_their_ends_only():
    text = 'Dr. No came. "Who?" he asked. It cost $3.50! (Really.) Yes'
    assert sentences(text) == ["Dr.", "No came.", '"Who?"', "he asked.", "It cost $3.50!", "(Really.)", "Yes"]
    assert sentences("") == [""]


def test_bad_words_come_from_a_file(tmp_path):
    (tmp_path / "bad.txt").write_text("darn\n\nstraw berry\n")
    bad = BadWords.from_file(tmp_path / "bad.txt")
    assert bad.words == {"darn"} and bad.phrases == (" straw berry ",)
    assert clean(prose(9) + " Darn it all to pieces.", bad)[1][0][0] == "bad words"
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    for name, message in (("empty.txt", ": holds no word"), ("latin.txt", ", byte 0: is not UTF-8: convert the file first$"),
                          ("none.txt", r": cannot be read \(No such file or directory\): check the path$")):
        with pytest.raises(ValueError, match=f"{name}{message}"):
            BadWords.from_file(tmp_path / name)


# --- Gopher -----------------------------------------------------------------------------------

def gopher(name: str, lines: list[str]) -> bool:
    return quality.GOPHER_RULES[name](lines, " ".join(lines).split())


@pytest.mark.parametrize("name, kept, removed", [
    ("50 to 100,000 words", [["a"] * 50, ["a"] * 100_000], [["a"] * 49, ["a"] * 100_001]),
    ("mean word length", [["abc"], ["abcdefghij"], ["a abcde"]], [["ab abc"], ["abcdefghijk"]]),
    ("symbols", [["# a a a a a a a a a"], ["so... a a a a a a a a a"]], [["# # a a a a a a a a"], ["so... a… a a a a a a a a"]]),
    ("bullets", [["- a"] * 9 + ["a"]], [["• a"] * 10, ["* a"] * 19 + ["a"]]),
    ("ellipses", [["a..."] * 3 + ["a"] * 7], [["a…"] * 4 + ["a"] * 6]),
    ("alphabetic words", [["a a a a 1"], ["a1 b2 é 漢 !"]], [["a a a 1 2"]]),
    ("stop words", [["The cat of"]], [["the cat the"], ["cat"]]),
    ("copied lines", [["aa"] * 2 + list("bcdefgh")], [["a"] * 5 + list("bcde"), ["long line"] * 2 + list("bcdefghi")]),
])
def test_gopher_rule_keeps_and_removes_what_the_paper_says(name, kept, removed):
    assert [gopher(name, lines) for lines in kept] == [True] * len(kept)
    assert [gopher(name, lines) for lines in removed] == [False] * len(removed)


def test_ngram_shares_match_the_definition():
    random_ = random.Random(0)
    for vocabulary in (1, 2, 5, 50):
        for length in (0, 1, 2, 5, 9, 10, 11, 60):
            words = [("word", "a", "longer-word")[i % 3] + str(i) for i in (random_.randrange(vocabulary) for _ in range(length))]
            ours, naive = ngram_shares(words), ngram_shares_naive(words)
            assert ours.keys() == naive.keys() == set(range(2, 11))
            assert np.allclose([ours[n] for n in naive], list(naive.values()), rtol=0, atol=1e-12)  # sums of integers, divided


def test_ngram_shares_are_those_of_an_example_by_hand():
    shares = ngram_shares("aa b aa b cc".split())  # 8 characters; the bigram "aa b" twice
    assert shares[2] == 2 * 3 / 8 and shares[3] == 0
    shares = ngram_shares("a b c d e x a b c d e".split())  # 11 characters; the 5-gram covers ten of them
    assert shares[5] == 10 / 11 and shares[6] == 0 and shares[4] == 2 * 4 / 11
    assert not quality.has_few_copied_ngrams([], "a b c d e x a b c d e".split())
    assert quality.has_few_copied_ngrams([], prose(20).split())


# --- masks ------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, masked", [
    ("Mail a.b+c@x-y.co.uk, or <bob@example.com>.", "Mail <email>, or <<email>>."),
    ("user@host, @name, a@b.c and 5@3.2", "user@host, @name, a@b.c and 5@3.2"),
    ("192.168.1.1, (10.0.0.255) but 999.1.1.1, 1.2.3.4.5 and v1.2.3", "<ip>, (<ip>) but 999.1.1.1, 1.2.3.4.5 and v1.2.3"),
    ("::1 fe80::1ff:fe23:4567:890a at 12:30:45, 2001:db8:0:0:0:0:2:1.", "<ip> <ip> at 12:30:45, <ip>."),
    ("std::vector and a::b at 10:11:12:13:14:15:16:17:18", "std::vector and a::b at 10:11:12:13:14:15:16:17:18"),
    ("+49 30 1234567, (555) 123-4567, 555-123-4567, 555.123.4567", "<phone>, <phone>, <phone>, <phone>"),
    ("2020-11-21, 1990-1995 2000, 123-45-6789, 3.14159265358, 1234567890, C++ 11", None),
])
def test_mask_replaces_addresses_and_nothing_else(text, masked):
    assert mask(text)[0] == (masked or text)
    assert sum(mask(text)[1].values()) == (masked or "").count("<") - (masked or "").count("<<")


# --- a whole page -----------------------------------------------------------------------------

def test_clean_says_what_went_and_why():
    page = (f"Home | News\n{prose(4, 1)}[3]\nToo few words.\nPlease enable JavaScript to see all of this.\n  {prose(4, 2)}  \n"
            "All our pages have a privacy policy.\nWrite to me@example.com or +49 30 1234567 soon.")
    text, removed = clean(page)
    assert text == f"{prose(4, 1)}\n{prose(4, 2)}\nWrite to <email> or <phone> soon."
    assert removed == [("citation markers", "[3]"), ("terminal punctuation", "Home | News"), ("five words", "Too few words."),
                       ("javascript", "Please enable JavaScript to see all of this."),
                       ("policy", "All our pages have a privacy policy."), ("masked email", ""), ("masked phone", "")]
    for bad, rule in ((page + "{", "curly bracket"), ("Lorem ipsum " + page, "lorem ipsum"), (prose(2), "three sentences"),
                      (prose(4), "50 to 100,000 words"), ("\n".join([prose(6)] * 3), "copied lines"),
                      (" ".join([prose(3)] * 5), "copied n-grams")):
        text, removed = clean(bad)
        assert text == "" and removed[-1] == (rule, removed[-1][1]) and removed[-1][1]
    assert clean(prose(4), gopher=False)[0] == prose(4)
    assert clean("")[0] == "" and clean("\n\n")[1] == [("three sentences", "")]


# --- the program ------------------------------------------------------------------------------

def run(monkeypatch, capsys, *arguments: str) -> tuple[str, str, int]:
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments])
    try:
        runpy.run_path(quality.__file__, run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code
    found = capsys.readouterr()
    return found.out, found.err, code


def test_program_reaches_its_verdict_and_every_flag_changes_something(tmp_path, monkeypatch, capsys):
    for name in ("raw", "more"):
        pages = [f"{prose(6, i)} winter." for i in range(20 + len(name))] + ["Home | News"]
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{page}"}}\n' for page in pages))
    (tmp_path / "bad.txt").write_text("winter\n")
    common = ["--data", f"{tmp_path}/raw.jsonl"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, _, code = run(monkeypatch, capsys, *common)
    assert code == 0 and first.endswith("cleaned again, 23 of 23 kept pages stay as they are (expected all)\n")
    for more in (["--bad_words", f"{tmp_path}/bad.txt"], ["--examples", "0"], ["--data", f"{tmp_path}/more.jsonl"]):
        assert run(monkeypatch, capsys, *common, *more)[0] != first
    for wrong, message in ((["--data", "none.txt"], "no such file"), (["--bad_words", "none"], "cannot be read"), (["-x"], "unrecognized"),
                           (["--examples", "-1"], "--examples must be at least 0, got -1")):
        _, error, code = run(monkeypatch, capsys, *common, *wrong)
        assert code == 2 and error.startswith("quality.py: ") and error.count("\n") == 1 and message in error
