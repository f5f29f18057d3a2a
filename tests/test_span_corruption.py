"""Span corruption: figure 2 word for word, nothing lost, every choice of spans equally likely; tasks as text."""

import runpy
import sys
from collections import Counter
from itertools import combinations
from pydoc_data.topics import topics

import pytest
import torch

import data
import span_corruption
from span_corruption import Words, corrupt_spans, fill_spans, noise_spans, pad_pairs

WORDS = Words("Thank you for inviting me to your party last week .".split(), 3)  # sentinels <3> <2> <1>, <1> the highest id


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_figure_2_of_the_paper_word_for_word():
    tokens = WORDS.encode("Thank you for inviting me to your party last week .".split())
    inputs, targets = corrupt_spans(tokens, [(2, 4), (8, 9)], WORDS.first_sentinel)
    assert WORDS.decode(inputs.tolist()) == "Thank you <1> me to your party <2> week . <eos>"
    assert WORDS.decode(targets.tolist()) == "<1> for inviting <2> last <3> <eos>"


@pytest.mark.parametrize("length, density, mean_span", [(2, 0.15, 3.0), (7, 0.15, 3.0), (40, 0.5, 1.0), (512, 0.15, 3.0), (100, 0.9, 10.0)])
def test_nothing_is_lost_and_as_much_is_cut_out_as_was_asked(length, density, mean_span):
    tokens, generator = torch.arange(2, 2 + length), seeded()
    for _ in range(20):
        spans = noise_spans(length, density, mean_span, generator)
        n_noise = min(max(round(length * density), 1), length - 1)
        assert sum(end - begin for begin, end in spans) == n_noise
        assert len(spans) == min(max(round(n_noise / mean_span), 1), length - n_noise + 1)
        assert all(a[1] < b[0] for a, b in zip(spans, spans[1:])) and spans[0][0] >= 0 and spans[-1][1] <= length
        inputs, targets = corrupt_spans(tokens, spans, 2000)
        assert len(inputs) + len(targets) == length + 2 * len(spans) + 3
        assert inputs[-1] == targets[-1] == 1 and targets[-2] == 2000 - len(spans)
        assert [i for i in inputs.tolist() if i > 1000] == [i for i in targets.tolist() if i > 1000][:-1]  # the same order
        assert fill_spans(inputs.tolist(), targets.tolist(), 2000) == tokens.tolist()


def test_every_choice_of_spans_is_equally_likely():
    """9 tokens, 4 to cut out in 2 spans that do not touch: chi-square against the list of all ways."""
    ways = []
    for noise in combinations(range(9), 4):
        spans = [[noise[0], noise[0] + 1]]
        for i in noise[1:]:
            if i == spans[-1][1]:
                spans[-1][1] += 1
            else:
                spans.append([i, i + 1])
        if len(spans) == 2:
            ways.append(tuple(map(tuple, spans)))
    generator, n = seeded(), 6000
    counts = Counter(tuple(noise_spans(9, 4 / 9, 2.0, generator)) for _ in range(n))
    assert set(counts) == set(ways)
    expected = n / len(ways)
    chi_square = sum((counts[way] - expected) ** 2 / expected for way in ways)
    freedom = len(ways) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations; the seed is fixed


def test_the_generator_decides():
    assert noise_spans(100, generator=seeded(1)) == noise_spans(100, generator=seeded(1)) != noise_spans(100, generator=seeded(2))


def test_what_a_model_writes_is_filled_in_as_far_as_it_goes():
    inputs = [5, 100, 6, 99, 7, 1]
    assert fill_spans(inputs, [100, 8, 8, 1], 100) == [5, 8, 8, 6, 99, 7]  # the second span is missing
    assert fill_spans(inputs, [9, 99, 3, 100, 100, 4, 1], 100) == [5, 4, 6, 3, 7]  # a word before any sentinel


@pytest.mark.parametrize("arguments, got", [((1, 0.15, 3.0), "1, 0.15 and 3.0"), ((10, 0.0, 3.0), "10, 0.0 and 3.0"),
                                            ((10, 1.0, 3.0), "10, 1.0 and 3.0"), ((10, 0.15, 0.5), "10, 0.15 and 0.5")])
def test_spans_that_cannot_be_are_refused(arguments, got):
    with pytest.raises(ValueError, match=f"length must be at least 2, density in .* got {got}"):
        noise_spans(*arguments)


def test_sentinels_that_run_out_or_stand_in_the_text_are_refused():
    tokens = torch.arange(2, 12)
    with pytest.raises(ValueError, match="2 spans need 3 sentinels, from 3 down and above 1"):
        corrupt_spans(tokens, [(1, 2), (4, 5)], 3)
    with pytest.raises(ValueError, match=r"the text contains ids in 10 .. 12, which are to be sentinels"):
        corrupt_spans(tokens, [(1, 2), (4, 5)], 12)


def test_tasks_are_text_and_rows_are_padded_on_the_right():
    inputs, targets = pad_pairs([WORDS.pair("Thank you .", "me"), WORDS.pair("party", "last week")])
    assert WORDS.decode(inputs[1].tolist()) == "party <eos> <pad> <pad>"
    assert WORDS.decode(targets[0].tolist()) == "me <eos> <pad>"
    assert WORDS.decode(WORDS.encode(["Tank", "you"]).tolist()) == "<other> you"


# --- the demo -------------------------------------------------------------------------------

@pytest.mark.parametrize("flag, value", [("--steps", "0"), ("--words", "3"), ("--seed", "-1"), ("--steps", "x")])
def test_bad_flags_are_one_line(flag, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["span_corruption.py", flag, value])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(span_corruption.__file__, run_name="__main__")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and message.startswith("span_corruption.py: ") and flag in message


def test_demo_ends_on_its_verdict_and_its_flags_change_something(capsys, monkeypatch):
    documents = [topic for _, topic in sorted(topics.items())][:60]
    monkeypatch.setattr(data, "default_documents", lambda: documents)
    outputs = []
    for flags in (dict(steps=2, words=100, seed=0), dict(steps=2, words=200, seed=0), dict(steps=2, words=100, seed=1)):
        span_corruption.main(**flags)
        outputs.append(capsys.readouterr().out)
        assert "better than frequency, and every task above 90%: " in outputs[-1].splitlines()[-1]
    assert len(set(outputs)) == 3


def test_a_missing_neighbour_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "t5", None)  # as if the file were not there
    monkeypatch.setattr(sys, "argv", ["span_corruption.py"])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(span_corruption.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "t5" in error and "beside this one" in error
