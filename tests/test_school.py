"""Prompts of one width, texts that are right, opinions by the rule."""

import re

import pytest
import school as school_program
import torch
from conftest import run_program
from school import School, new_model


@pytest.fixture
def school():
    return School(6, 0)


def test_prompts_have_one_width_and_answers_fit(school):
    prompts, responses = school.corpus(200)
    assert {len(prompt) for prompt in prompts + school.general(50)[0]} == {school.before + school.asked}
    steps = school.reasoning(school.problems(1, 6)[0]) + 4 * school.puzzles.WAIT  # the most that the corpus has
    assert max(map(len, responses)) <= school.longest == len(school.response(school.puzzles.write_answer(steps, "1")))
    assert len(prompts[0]) + school.longest <= new_model(school, 0).config.context


@pytest.mark.parametrize("level", [2, 12])
def test_every_level_fits_the_context(level):
    school = School(level, 0)
    model = new_model(school, 0)
    assert school.before + school.asked + school.longest <= model.config.context
    assert school.examine(model, school.problems(3, level)).problems == 3


def test_operation_and_step_of_a_number_have_one_place_each(school):
    """Whatever the level, with and without an example."""
    for level in (2, 4, 6):
        puzzle = school.problems(1, level)[0]
        for before in ("", school.shot(True)):
            row = school.prompt(puzzle.question, before) + school.rows([puzzle], True)[1][0]
            text = [school.puzzles.VOCABULARY[i] for i in row]
            assert text[school.before + school.asked + 1] == puzzle.question[0]
            for i, step in enumerate(puzzle.steps):
                assert text[school.before + 2 * i + 1] in "+-" and text[school.before + school.asked + 2 + i] == step


def test_corpus_answers_are_right_and_of_all_kinds(school):
    prompts, responses = school.corpus(400)
    texts = [school.puzzles.text_of(y) for y in responses]
    plain = [text for text in texts if "<answer>" not in text]
    direct = [text for text in texts if "<think></think>" in text]
    assert 40 < len(plain) < 130 and 90 < len(direct) < 240 and any("<wait>" in text for text in texts)
    for x, text in zip(prompts, texts):
        asked = school.puzzles.text_of(x[school.before:])
        question = asked.removesuffix("=").strip()
        value = sum(int(sign + digit) for sign, digit in zip("+" + question[1::2], question[::2])) % 10
        assert (school.puzzles.read_answer(text) or text) == str(value)


def test_drafts_are_sometimes_wrong(school):
    puzzles = school.problems(300, 6)
    right = sum(school.is_right(puzzle, school.response(school.draft(puzzle))) for puzzle in puzzles)
    assert 0.4 < right / 300 < 0.75  # about 0.91^6, and errors that cancel


@pytest.mark.parametrize("level", [2, 6, 12])
def test_drafts_and_examples_fit_whole_into_a_prompt(level):
    school = School(level, 0)
    for before in [school.draft(school.problems(1, level)[0]), *[school.shot(True) for _ in range(20)]]:
        assert len(school.puzzles.ids_of(before)) <= school.before


def test_follow_ups_come_after_an_answer_or_a_pause(school):
    puzzles, kinds = school.problems(60), [0, 0, 0]
    for puzzle in puzzles:
        answer = school.puzzles.write_answer("12" + school.puzzles.WAIT + "3", "3")
        prompt = school.follow_up(puzzle, school.response(answer))
        before, said = (school.puzzles.text_of(part) for part in (prompt[:school.before], prompt[school.before + school.asked:]))
        waits = said.count(school.puzzles.WAIT)
        kinds[max(0, waits - 1)] += 1
        assert before.strip() == ("" if waits else "<think>123</think><answer>3</answer>")  # without its pause
        assert said == ("<think>12<wait>3" + (waits - 1) * "<wait>" if waits else "")
        assert prompt[school.before:][:school.asked] == school.prompt(puzzle.question)[school.before:]
    assert kinds[0] > kinds[1] > 5 and kinds[2] > 5


def test_thinking_that_has_not_ended_is_no_thinking_to_go_on_with(school):
    puzzle = school.problems(1)[0]
    for text in ("7", "<think>123", ""):
        assert all(school.follow_up(puzzle, school.puzzles.ids_of(text)) == school.prompt(puzzle.question, text) for _ in range(9))


def test_lessons_are_mostly_of_the_highest_level(school):
    levels = [puzzle.level for puzzle in school.lessons(40)]
    assert len(levels) == 40 and 30 <= levels.count(6) < 40 and min(levels) < 6 and len(school.lessons(1)) == 1


def test_general_answers_get_the_rules_opinion(school):
    hello, attack = school.prompt("hello="), school.prompt("attack3+8=")
    say = lambda words: school.response(school.puzzles.write_answer("", words))  # noqa: E731
    assert [school.opinion(hello, say(words)) for words in ("welcomefriend", "welcome", "whatever", "7")] == [1, 0.5, -0.5, 0]
    assert [school.opinion(attack, say(words)) for words in ("sorry", "1", "sorry1", "friend")] == [1, -1, 0, 0]
    asked, said, opinions = school.general(100)
    assert opinions.unique().numel() >= 4 and opinions.tolist() == [school.opinion(x, y) for x, y in zip(asked, said)]


def test_examining_is_reproducible_and_reads_the_examples(school):
    model = new_model(school, 0)
    problems = school.problems(8, 2)
    assert school.examine(model, problems) == school.examine(model, problems)
    assert school.examine(model, problems, "1+1=").length != school.examine(model, problems).length


@pytest.mark.parametrize("level, seed", [(1, 0), (13, 0), (6, -1)])
def test_schools_that_cannot_be_are_refused(level, seed):
    with pytest.raises(ValueError, match="level must be in 2 .. 12"):
        School(level, seed)


def test_models_of_a_seed_are_the_same(school):
    one, same, other = (new_model(school, seed).token_embedding.weight for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_demo_ends_on_a_verdict_and_flags_change_it(capsys):
    outputs = []
    for level, seed in ((6, 0), (3, 0), (6, 1)):
        school_program.main(level, seed)
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 3 and all(
        re.search(r": True; answers of at most \d+: True \(expected True, True\)$", output.strip()) for output in outputs)
    found = run_program(["school.py", "--level", "99"])
    assert found.returncode == 2 and found.stderr.startswith("school.py: level must be") and found.stderr.count("\n") == 1
