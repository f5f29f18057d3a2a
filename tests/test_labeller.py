"""The labeller's rule against cases judged by hand; the questions that every machine has."""

import sys

import pytest

import labeller
from labeller import Labeller, default_questions, first_sentence, make_labeller, name_words, words_of

KNOWN = make_labeller(["Return the name of a protocol.", "Remove common leading space from every line of the given text."])
ASK = "What does ssl.get_protocol_name do?"


@pytest.fixture(scope="module")
def questions():
    """Of a third of the library: it takes seconds to parse."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdlib_module_names", frozenset(name for name in sys.stdlib_module_names if "a" <= name[0] < "f"))
        return default_questions()


def test_questions_are_many_different_and_answered_by_one_sentence(questions):
    assert len(questions) > 500 and len({q for q, _ in questions}) == len(questions)
    for question, answer in questions:
        assert question.startswith("What does ") and question.endswith(" do?")
        assert 3 <= len(answer.split()) <= 16 and answer[0].isupper() and answer.endswith(".") and answer.count(".") == 1


def test_questions_are_the_same_each_time_and_as_long_as_asked(monkeypatch):
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset({"textwrap", "ast", "statistics", "not_there"}))
    found = default_questions()
    assert found == default_questions() and 10 < len(found) < 200
    short = default_questions(longest=6)
    assert 0 < len(short) < len(found) and all(len(a.split()) <= 6 for _, a in short)
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset({"not_there"}))
    with pytest.raises(ValueError, match="has no sources in"):
        default_questions()


@pytest.mark.parametrize("docstring, expected", [
    ("Return a list.\n\nMore.", "Return a list."), ("Return\n    a list. And more", "Return a list."), ("return a list.", ""),
    ("Return a list", ""), ("", ""), ("What? No.", ""), ("Return x.y now.", "")])
def test_first_sentences_are_cut_from_docstrings(docstring, expected):
    assert first_sentence(docstring) == expected


@pytest.mark.parametrize("question, expected", [
    (ASK, ["get", "protocol", "name"]), ("What does a.b.getLineNumber do?", ["get", "line", "number"]),
    ("What does x.HTTPServer do?", ["http", "server"]), ("How are you?", []), ("What does x.to_do do?", [])])
def test_name_words_are_those_of_the_last_part(question, expected):
    assert name_words(question) == expected


@pytest.mark.parametrize("answer, expected", [
    ("Return the name of a protocol.", 1 + 2 / 3), ("Return the names of a protocol.", 1 + 2 / 3 - 0.3), ("return the name.", 1 / 3),
    ("Return the name", 1 / 3), ("Return the name. A name.", 1 / 3 - 0.3), ("Return the zork.", 1 - 0.3), ("Return.", 1 - 1),
    ("Remove the leading space from every line of the given text.", 1 - 0.3), ("", -1.0)])
def test_gold_rewards_match_the_rule_by_hand(answer, expected):
    assert KNOWN.gold(ASK, answer) == pytest.approx(expected)


def test_preferences_are_antisymmetric_and_need_a_margin():
    good, bad = "Return the name of a protocol.", "Return the zork"
    assert KNOWN.prefers(ASK, good, bad) == 1 == -KNOWN.prefers(ASK, bad, good) and KNOWN.prefers(ASK, good, good) == 0
    assert KNOWN.prefers(ASK, good, "Return the names of a protocol.") == 0
    assert KNOWN.prefers(ASK, good, "Return the names of a protocol.", margin=0.2) == 1


def test_true_answers_beat_damaged_ones(questions):
    labeller = make_labeller(a for _, a in questions)
    assert isinstance(labeller, Labeller) and set(words_of(questions[0][1])) <= labeller.known
    verdicts = [labeller.prefers(q, a, b) for (q, a), (_, b) in zip(questions, questions[1:] + questions[:1])]
    assert sum(v > 0 for v in verdicts) > 0.8 * sum(v != 0 for v in verdicts)


def test_program_ends_on_its_verdict(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset({"textwrap", "ast", "statistics"}))
    outputs = []
    for seed in (0, 1):
        labeller.main(seed)
        outputs.append(capsys.readouterr().out)
        assert "true answers preferred: at least" in outputs[-1].splitlines()[-1]
    assert outputs[0] != outputs[1]
