"""The corpus against a listener who adds up, its alignments against the languages, its batches against its sentences."""

import collections
import datetime
import itertools
import random
import re
import runpy
import sys

import pytest
import torch
from conftest import ROOT

from pairs import (END, PAD, START, UNKNOWN, Pair, align, build_vocabulary, date_in_words, endless_batches,
                   english_number, french_number, generate_pairs, german_number, list_in_words, read_corpus, read_pairs,
                   shuffled_batches, to_batch, to_ids, to_sentences, to_text, to_words, translate)


# --- the corpus ---

VALUES = {language: {name: value for value, name in enumerate(names.split())} | more for language, names, more in (
    ("english", "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
     "seventeen eighteen nineteen", dict(twenty=20, thirty=30, forty=40, fifty=50, sixty=60, seventy=70, eighty=80, ninety=90)),
    ("french", "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize",
     dict(vingt=20, trente=30, quarante=40, cinquante=50, soixante=60)),
    ("german", "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn "
     "siebzehn achtzehn neunzehn", dict(ein=1, zwanzig=20, dreißig=30, vierzig=40, fünfzig=50, sechzig=60, siebzig=70,
                                        achtzig=80, neunzig=90)))}
NUMBERS = {"english": english_number, "french": french_number, "german": german_number}


def value_of(words, language):
    """Reads a number the way a listener adds it up."""
    total = group = 0
    for word in (word.text.lstrip("+-") for word in words):
        if word in ("thousand", "mille", "tausend"):
            total, group = total + max(group, 1) * 1000, 0
        elif word in ("hundred", "cent", "cents", "hundert"):
            group = max(group, 1) * 100
        elif word in ("vingt", "vingts") and group % 10 == 4 and group % 100 < 10:
            group += 76  # quatre-vingts
        elif word not in ("and", "et", "und"):
            group += VALUES[language][word]
    return total + group


@pytest.mark.parametrize("language", NUMBERS)
def test_numbers_are_what_a_listener_adds_up(language):
    draw = random.Random(0)
    for n in (*range(2100), *(draw.randrange(10 ** 6) for _ in range(1000)), 999_999):
        assert value_of(NUMBERS[language](n), language) == n
        assert "--" not in to_text(word.text for word in NUMBERS[language](n))


@pytest.mark.parametrize("n, english, french, german", [
    (0, "zero", "zéro", "null"), (1, "one", "un", "eins"), (17, "seventeen", "dix-sept", "siebzehn"),
    (21, "twenty-one", "vingt et un", "einundzwanzig"), (60, "sixty", "soixante", "sechzig"),
    (61, "sixty-one", "soixante et un", "einundsechzig"), (70, "seventy", "soixante-dix", "siebzig"),
    (71, "seventy-one", "soixante et onze", "einundsiebzig"), (76, "seventy-six", "soixante-seize", "sechsundsiebzig"),
    (79, "seventy-nine", "soixante-dix-neuf", "neunundsiebzig"), (80, "eighty", "quatre-vingts", "achtzig"),
    (81, "eighty-one", "quatre-vingt-un", "einundachtzig"), (90, "ninety", "quatre-vingt-dix", "neunzig"),
    (91, "ninety-one", "quatre-vingt-onze", "einundneunzig"),
    (97, "ninety-seven", "quatre-vingt-dix-sept", "siebenundneunzig"), (100, "one hundred", "cent", "einhundert"),
    (101, "one hundred and one", "cent un", "einhunderteins"), (200, "two hundred", "deux cents", "zweihundert"),
    (280, "two hundred and eighty", "deux cent quatre-vingts", "zweihundertachtzig"),
    (1000, "one thousand", "mille", "eintausend"), (1001, "one thousand and one", "mille un", "eintausendeins"),
    (2100, "two thousand one hundred", "deux mille cent", "zweitausendeinhundert"),
    (80_000, "eighty thousand", "quatre-vingt mille", "achtzigtausend"),
    (200_000, "two hundred thousand", "deux cent mille", "zweihunderttausend"),
    (201_021, "two hundred and one thousand and twenty-one", "deux cent un mille vingt et un",
     "zweihunderteintausendeinundzwanzig")])
def test_numbers_are_written_as_the_languages_write_them(n, english, french, german):
    assert [to_text(word.text for word in f(n)) for f in NUMBERS.values()] == [english, french, german]


@pytest.mark.parametrize("date, english, french, german", [
    ((1997, 3, 3), "Monday, the third of March nineteen ninety-seven",
     "le lundi trois mars mille neuf cent quatre-vingt-dix-sept", "Montag, der dritte März neunzehnhundertsiebenundneunzig"),
    ((1905, 3, 1), "Wednesday, the first of March nineteen oh five", "le mercredi premier mars mille neuf cent cinq",
     "Mittwoch, der erste März neunzehnhundertfünf"),
    ((1900, 7, 21), "Saturday, the twenty-first of July nineteen hundred", "le samedi vingt et un juillet mille neuf cent",
     "Samstag, der einundzwanzigste Juli neunzehnhundert"),
    ((1180, 8, 12), "Tuesday, the twelfth of August eleven eighty", "le mardi douze août mille cent quatre-vingt",
     "Dienstag, der zwölfte August elfhundertachtzig"),
    ((2005, 1, 30), "Sunday, the thirtieth of January two thousand and five", "le dimanche trente janvier deux mille cinq",
     "Sonntag, der dreißigste Januar zweitausendfünf"),
    ((2080, 2, 8), "Thursday, the eighth of February two thousand and eighty", "le jeudi huit février deux mille quatre-vingt",
     "Donnerstag, der achte Februar zweitausendachtzig")])
def test_dates_are_written_as_the_languages_write_them(date, english, french, german):
    found = [to_text(w.text for w in date_in_words(datetime.date(*date), language)) for language in NUMBERS]
    assert found == [english, french, german]


def linked(n, other, which="sure"):
    pair = align(english_number(n), other(n))
    return {(pair.source[s], pair.target[t]) for s, t in getattr(pair, which)}


def test_alignments_are_not_one_to_one():
    assert linked(97, french_number) == {("ninety", "quatre"), ("ninety", "-vingt"), ("ninety", "-dix"), ("-seven", "-sept")}
    assert linked(71, french_number) == {("seventy", "soixante"), ("seventy", "onze"), ("-one", "onze")}
    assert linked(17, french_number) == {("seventeen", "dix"), ("seventeen", "-sept")}
    assert linked(100, french_number) == {("one", "cent"), ("hundred", "cent")}
    assert linked(97, german_number) == {("-seven", "sieben"), ("ninety", "+neunzig")}
    assert align(english_number(97), german_number(97)).sure == {(1, 0), (0, 2)}  # the units come first
    assert linked(97, german_number, "possible") - linked(97, german_number) == {("ninety", "+und"), ("-seven", "+und")}
    date = [date_in_words(datetime.date(1997, 3, 3), language) for language in ("english", "french")]
    pair = align(*date)
    assert {pair.target[t] for s, t in pair.sure if pair.source[s] == "nineteen"} == {"mille", "neuf", "cent"}


@pytest.mark.parametrize("language", ["french", "german"])
def test_every_word_with_meaning_is_aligned_and_sure_links_are_possible(language):
    draw = random.Random(0)
    for pair in generate_pairs(300, language, seed=3):
        for side, words in ((0, pair.source), (1, pair.target)):
            aligned = {link[side] for link in pair.sure}
            alone = {words[i].lstrip("+") for i in set(range(len(words))) - aligned}
            assert alone <= {"and", "of", "oh", ",", "et", "und"}
        assert pair.sure <= pair.possible
        assert all(s < len(pair.source) and t < len(pair.target) for s, t in pair.possible)
    items = [draw.randrange(10 ** 6), datetime.date(1999, 1, 1)]
    both = align(list_in_words(items, "english"), list_in_words(items, language))
    first, second = (align(list_in_words([item], "english"), list_in_words([item], language)) for item in items)
    s, t = len(first.source) + 1, len(first.target) + 1  # and the semicolon
    assert both.sure == first.sure | {(s - 1, t - 1)} | {(i + s, j + t) for i, j in second.sure}


def test_generated_pairs_are_different_and_the_same_for_the_same_seed():
    pairs = generate_pairs(300, seed=5)
    assert pairs == generate_pairs(300, seed=5) and pairs != generate_pairs(300, seed=6)
    assert len({tuple(pair.source) for pair in pairs}) == len({tuple(pair.target) for pair in pairs}) == len(pairs) == 300
    german = generate_pairs(300, "german", seed=5)
    assert [pair.source for pair in pairs] == [pair.source for pair in german]
    assert all(";" not in pair.source for pair in generate_pairs(50, max_items=1))
    assert max(pair.source.count(";") for pair in generate_pairs(50, max_items=4)) == 3
    for arguments, message in (((3, "dutch"), "'dutch'"), ((0,), "got 0 and 3"), ((3, "french", 0), "got 3 and 0")):
        with pytest.raises(ValueError, match=message):
            generate_pairs(*arguments)


def test_sentences_survive_being_split_and_written():
    for pair in generate_pairs(100):
        assert to_words(to_text(pair.source)) == pair.source
        assert to_words(to_text(pair.target)) == pair.target
    assert to_words(" Don't go, well-known\tÉmile! ") == ["Don", "'", "t", "go", ",", "well", "-known", "Émile", "!"]
    assert to_text(["sieben", "+und", "+neunzig", ",", "vingt", "-deux", "."]) == "siebenundneunzig, vingt-deux."


# --- files, vocabularies, batches ---

def tsv(tmp_path, content):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_pairs_are_read_in_both_layouts(tmp_path):
    expected = [Pair(["Go", "."], ["Va", "!"]), Pair(["ninety", "-seven"], ["quatre", "-vingt", "-dix", "-sept"])]
    for content in ("Go.\tVa !\nninety-seven\tquatre-vingt-dix-sept\n",
                    "\ufeffGo.\tVa !\tCC-BY 2.0\r\n\r\nninety-seven\tquatre-vingt-dix-sept\tCC-BY\r\n",
                    "12\tGo.\t7\tVa !\n13\tninety-seven\t8\tquatre-vingt-dix-sept"):
        assert read_pairs(tsv(tmp_path, content)) == expected


@pytest.mark.parametrize("content, message", [
    ("a\tb\nonly one\n", "line 2: 1 of the columns sentence, translation"),
    ("1\ta\t2\tb\n\n3\tc\t4\n", "line 3: 3 of the columns id, sentence, id, translation"),
    ("1\ta\t2\tb\nc\td\n", "line 2: 2 of the columns id"),
    ("a\tb\n\tb\n", "line 2: the sentence is empty: correct or remove the line$"), ("a\t \n", "line 1: the translation is empty: correct or remove the line$"),
    ("", "no sentence pairs"), ("\n \n", "no sentence pairs"), (b"a\tb\n\xff\xfe\t", "byte 4: is not UTF-8")])
def test_bad_pairs_are_refused_with_their_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"pairs.tsv.*{message}"):
        read_pairs(tsv(tmp_path, content))


def test_vocabularies_hold_frequent_words_after_the_special_ones():
    sentences = [["b", "a", "b"], ["c", "b", "c"]]
    assert list(build_vocabulary(sentences)) == ["<pad>", "<start>", "<end>", "<unknown>", "b", "c", "a"]
    assert len(build_vocabulary(sentences, max_words=2)) == 6
    for empty in ([], [[]], iter(())):
        with pytest.raises(ValueError, match="a vocabulary needs a word: the corpus has 0"):
            build_vocabulary(empty)
    vocabulary = build_vocabulary(sentences)
    ids, lengths = to_ids([["a"], ["b", "z", "c"]], vocabulary)
    assert ids.tolist() == [[6, PAD, PAD], [4, UNKNOWN, 5]] and lengths.tolist() == [1, 3]
    assert to_sentences([[6], [4, 3]], vocabulary) == [["a"], ["b", "<unknown>"]]


def test_batches_hold_every_pair_once_and_sentences_of_one_length_together():
    pairs = generate_pairs(200)
    batches = shuffled_batches(pairs, 16, seed=0)
    assert collections.Counter(map(id, itertools.chain(*batches))) == collections.Counter(map(id, pairs))
    assert all(len(batch) == 16 for batch in batches[:-1]) or sorted(map(len, batches)) == [8] + [16] * 12
    widths = [max(len(p.source) for p in batch) - min(len(p.source) for p in batch) for batch in batches]
    assert sorted(widths)[len(widths) // 2] <= 3
    assert batches == shuffled_batches(pairs, 16, seed=0) and batches != shuffled_batches(pairs, 16, seed=1)


def test_batches_begin_with_start_and_end_with_end():
    pairs = [Pair(["a", "b"], ["x"]), Pair(["b"], ["y", "new"])]
    vocabularies = build_vocabulary([["b", "b", "a"]]), build_vocabulary([["x", "x", "y"]])
    source, lengths, inputs, targets = to_batch(pairs, *vocabularies)
    assert source.tolist() == [[5, 4], [4, PAD]] and lengths.tolist() == [2, 1]
    assert inputs.tolist() == [[START, 4, PAD], [START, 5, UNKNOWN]]
    assert targets.tolist() == [[4, END, PAD], [5, UNKNOWN, END]]


def test_endless_batches_are_the_batches_of_one_epoch_after_the_other():
    pairs = generate_pairs(20, max_items=1)
    vocabularies = [build_vocabulary(side) for side in zip(*((pair.source, pair.target) for pair in pairs))]
    found = list(itertools.islice(endless_batches(pairs, *vocabularies, 8, seed=4), 6))
    expected = [*reversed(shuffled_batches(pairs, 8, seed=4)), *reversed(shuffled_batches(pairs, 8, seed=5))]
    for ours, batch in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, to_batch(batch, *vocabularies), strict=True))
    for bad, size in (([], 8), (pairs, 0)):
        with pytest.raises(ValueError, match=f"got {len(bad)} in batches of {size}"):
            next(endless_batches(bad, *vocabularies, size, seed=0))


def test_held_out_sentences_are_never_trained_on(tmp_path):
    training, test = read_corpus(None, "german", 4, seed=0)
    assert len(training) + len(test) == 64 * 4 + 500 and len(test) == 151
    lines = [f"{to_text(pair.source)}\t{to_text(pair.target)}" for pair in generate_pairs(30, max_items=1)]
    training, test = read_corpus(str(tsv(tmp_path, "\n".join(lines * 2))), None, 1, seed=0)
    assert test and not {tuple(pair.source) for pair in training} & {tuple(pair.source) for pair in test}
    for content, message in (("a\tb\n" * 4, "only 4 pairs: give at least 5"), ("a\tb\n" * 9, "no held-out sentence is new")):
        with pytest.raises(ValueError, match=message):
            read_corpus(str(tsv(tmp_path, content)), None, 1, seed=0)


def test_translate_hands_ids_to_a_search_and_writes_what_it_finds():
    vocabulary = build_vocabulary([["one", "-two", ",", "one"]])

    def mirrored(source, lengths):
        return [row[:n].flip(0).tolist() for row, n in zip(source, lengths)]

    assert translate(mirrored, ["one-two", "one,one-two moon"], vocabulary, vocabulary) == ["-two one", "<unknown>-two one, one"]
    for sentences, message in ((["one", "  "], "sentence 1 is empty"), (["blue moon"], "no known word: 'blue moon'"), ([], "no sentences")):
        with pytest.raises(ValueError, match=message):
            translate(mirrored, sentences, vocabulary, vocabulary)


# --- the program ---

@pytest.fixture
def program(capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pairs.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "pairs.py"), run_name="__main__")
        return capsys.readouterr().out
    return run


def test_every_flag_changes_something(program, tmp_path):
    base = program("--count", 20)
    assert base == program("--count", 20) and "word for word: 21 of 21 pairs (expected all" in base.splitlines()[-1]
    assert "    ninety       quatre -vingt -dix\n" in base
    assert "    -seven       sieben\n" in program("--count", 20, "--language", "german")
    assert program("--count", 20, "--seed", 1) != base != program("--count", 21)
    own = program("--data", tsv(tmp_path, "Go.\tVa !\nHi\tSalut\n"))
    assert "Go.\n= Va !\n" in own and "links" not in own and "word for word: 2 of 2 pairs" in own


@pytest.mark.parametrize("arguments, message", [
    (["--count", 0], "--count must be at least 1"), (["--data", "x", "--count", 1000], "--count means nothing beside --data$"),
    (["--seed", -1], "--seed in 0"), (["--data", "missing.tsv"], "No such file"),
    (["--data", "x", "--language", "german"], "give one of them"), (["--language", "dutch"], "invalid choice"),
    (["--data", "{broken}"], "pairs.tsv, line 2: 1 of the columns sentence, translation: separate them by tabs$")])
def test_program_answers_bad_input_in_one_line(program, tmp_path, capsys, arguments, message):
    path = tsv(tmp_path, "c\td\ne\n")
    with pytest.raises(SystemExit) as exit:
        program(*(str(argument).format(broken=path) for argument in arguments))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and re.search(message, error)
