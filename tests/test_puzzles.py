"""Checkers against Python's own parser and against everything that a model under reward might write."""

import ast
import random
from fractions import Fraction

import pytest
import torch
from conftest import ROOT, run_program
from puzzles import (ANSWER, END_ANSWER, END_THINK, HELD_OUT, TAGS, TASKS, THINK, VOCABULARY, answer_reward, text_of, ids_of,
                     evaluate, few_shot, format_reward, is_right, make_puzzle, read_answer, read_reasoning, write_answer)


def puzzles(count=20, seed=0, **kinds):
    generator = torch.Generator().manual_seed(seed)
    for task, highest in TASKS.items():
        for level in range(2, min(highest, 6) + 1):
            for _ in range(count):
                yield make_puzzle(task, level, generator, **kinds)


def oracle(expression, numbers):
    """Value by Python's syntax tree: digits, the four operations and parentheses alone, each number as often as given."""
    if not set(expression) <= set("0123456789+-*/()"):
        return None
    try:
        tree = ast.parse(expression, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    used = []

    def value(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, int) and not isinstance(node.value, bool):
            used.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
            x, y = value(node.left), value(node.right)
            return (x + y if isinstance(node.op, ast.Add) else x - y if isinstance(node.op, ast.Sub)
                    else x * y if isinstance(node.op, ast.Mult) else x / y)
        raise ValueError

    try:
        result = value(tree)
    except (ValueError, ZeroDivisionError):
        return None
    return result if all(used.count(n) <= list(numbers).count(n) for n in used) else None


# --- evaluate -----------------------------------------------------------------------------------

def random_expression(rng, numbers, depth):
    if depth == 0 or rng.random() < 0.25:
        return str(rng.choice(numbers))
    inner = f"{random_expression(rng, numbers, depth - 1)}{rng.choice('+-*/')}{random_expression(rng, numbers, depth - 1)}"
    return f"({inner})" if rng.random() < 0.5 else inner


def test_evaluate_matches_pythons_parser_on_random_expressions():
    rng, valued = random.Random(0), 0
    for _ in range(3000):
        numbers = [rng.choice([0, 1, 2, 3, 7, 10, 25]) for _ in range(6)]
        expression = random_expression(rng, numbers, rng.randint(0, 3))
        expected = oracle(expression, numbers)
        assert evaluate(expression, numbers) == expected, expression
        valued += expected is not None
    assert valued > 1000


def test_evaluate_matches_pythons_parser_on_random_strings():
    """Mostly no expressions at all; those that Python reads and this checker does not are signs before a value."""
    rng, numbers, valued = random.Random(1), [1, 2, 3, 12], 0
    for _ in range(8000):
        expression = "".join(rng.choice("1233+-*/()") for _ in range(rng.randint(1, 7)))
        expected = oracle(expression, numbers)
        assert evaluate(expression, numbers) == expected, expression
        valued += expected is not None
    assert valued > 100


def test_evaluate_matches_pythons_parser_on_mutated_solutions():
    rng = random.Random(2)
    generator = torch.Generator().manual_seed(2)
    for _ in range(2000):
        puzzle = make_puzzle("countdown", rng.randint(2, 6), generator)
        text = list(puzzle.answer)
        for _ in range(rng.randint(0, 2)):
            place = rng.randrange(len(text))
            text[place:place + rng.randint(0, 1)] = rng.choice("0123456789+-*/()")
        text = "".join(text)
        expected = oracle(text, puzzle.numbers)
        assert evaluate(text, puzzle.numbers) == expected, text
        assert is_right(puzzle, text) is (expected == puzzle.target)


@pytest.mark.parametrize("expression, value", [("8/3*3", 8), ("1-2-3", None), ("8-3-2", 3), ("8/2/2", None), ("2-8/8", None),
                                               ("(2)", 2), ("((2))*3", 6), ("8/3", Fraction(8, 3))])
def test_evaluate_is_exact_and_left_to_right(expression, value):
    assert evaluate(expression, [8, 3, 2] if "3*3" not in expression else [8, 3, 3]) == value


@pytest.mark.parametrize("expression", [
    "", " ", "()", "(", ")", "2+", "+2", "-2", "2--3", "2**3", "2//3", "23", "02", "2 3", "2 + 3", "2+3)", "(2+3", ")2+3(", "2(3)",
    "2/0", "2/(3-3)", "0/0", "3+3", "2+3+8+2", "2e3", "2.0", "0x2", "2_3", "٢", "²", "２", "2\n", "\n2", "2;3", "2\x00", "__import__('os')",
    "2if 3 else 8", "[2]", "2,3", "True", "2=2", "2%3", "1" * 10**6, "(" * 10**6, "(" * 10**5 + "2" + ")" * 10**5 + "+", "2+" * 10**5])
def test_evaluate_is_none_for_what_is_no_expression_of_the_numbers(expression):
    assert evaluate(expression, [2, 3, 8, 0]) is None


def test_evaluate_is_at_home_in_any_depth():
    assert evaluate("(" * 10**5 + "2" + ")" * 10**5 + "+3", [2, 3]) == 5


# --- rewards --------------------------------------------------------------------------------------

def test_solutions_are_right_and_well_formed():
    for held_out in (False, True):
        for puzzle in puzzles(held_out=held_out):
            for text in (puzzle.solution(), puzzle.solution(""), puzzle.solution("anything: 1+1")):
                assert (answer_reward(puzzle, text), format_reward(text)) == (1.0, 1.0)
            assert read_reasoning(puzzle.solution()) == ";".join(puzzle.steps)


def test_answers_match_pythons_arithmetic():
    for puzzle in puzzles():
        question = puzzle.question.removesuffix("=")
        if puzzle.task == "countdown":
            assert oracle(puzzle.answer, puzzle.numbers) == puzzle.target
            assert question == ",".join(map(str, puzzle.numbers)) + f":{puzzle.target}"
        else:
            value = oracle(question, [int(word) for word in question.translate(str.maketrans("+-*", "   ")).split()])
            assert puzzle.answer == str(value % 10 if puzzle.task == "chain" else value)


def test_worked_steps_match_pythons_arithmetic():
    for puzzle in puzzles():
        if puzzle.task == "chain":
            for n, step in enumerate(puzzle.steps, 1):
                start = puzzle.question[:2 * n + 1]
                assert int(step) == oracle(start, list(map(int, start[::2]))) % 10
        else:
            for step in puzzle.steps:
                left, right = step.split("=")
                numbers = list(map(int, left.translate(str.maketrans("+-*/", "    ")).split()))
                assert oracle(left, numbers) == int(right)


def hostile(puzzle):
    right, inner = puzzle.answer, write_answer("", puzzle.answer)
    yield from (f"0{right}", f"+{right}", f" {right}", f"{right} ", f"{right}\n", f"{right}.0", f"{right};", f"-{right}", "", "-0",
                f"{right},{right}", f"{right} or 7", "1" * 10**6, "9" * 10**6 + "/0", "1/0", "True", "None", "nan", "inf", "[]", "\x00",
                "".join(chr(0x660 + int(c)) if c.isdigit() else c for c in right), "__import__('os').abort()", inner, inner + inner)


def test_hostile_answers_are_wrong_and_never_raise():
    for puzzle in puzzles(count=2):
        for answer in hostile(puzzle):
            assert answer_reward(puzzle, write_answer("", answer)) == 0.0, answer
            assert format_reward(write_answer("", answer)) == float(not any(tag in answer for tag in TAGS[:4]))


def slow_form(text):
    """The form, character by character: a machine with one state per tag, none to be met twice or in another place."""
    order, rest = [THINK, END_THINK, ANSWER, END_ANSWER], text
    pieces = []
    while rest:
        found = next((tag for tag in order if rest.startswith(tag)), rest[0])
        pieces.append(found)
        rest = rest[len(found):]
    tags = [piece for piece in pieces if piece in order]
    return (tags == order and pieces[0] == THINK and pieces[-1] == END_ANSWER
            and pieces.index(ANSWER) == pieces.index(END_THINK) + 1)


def test_rewards_match_a_state_machine_on_random_strings_of_tags():
    rng = random.Random(3)
    puzzle = make_puzzle("chain", 3, torch.Generator().manual_seed(0))
    wrong = str((int(puzzle.answer) + 1) % 10)
    pieces = [*TAGS, THINK, END_THINK, ANSWER, END_ANSWER, puzzle.answer, wrong, ";", " ", "<", "answer>", "</", "<answer"]
    seen = {0.0: 0, 1.0: 0}
    for _ in range(8000):
        if rng.random() < 0.5:
            text = "".join(rng.choice(pieces) for _ in range(rng.randint(0, 9)))
        else:  # a good one, with a piece more or less
            text = [THINK, ";", END_THINK, ANSWER, puzzle.answer, END_ANSWER]
            place = rng.randrange(len(text) + 1)
            text[place:place + rng.randint(0, 1)] = [rng.choice(pieces)] * rng.randint(0, 1)
            text = "".join(text)
        assert format_reward(text) == float(slow_form(text)), text
        ends = text.split(ANSWER)
        expected = len(ends) == 2 and ends[1] == puzzle.answer + END_ANSWER and END_ANSWER not in ends[0]
        assert answer_reward(puzzle, text) == float(expected), text
        seen[format_reward(text)] += 1
    assert min(seen.values()) > 500


def test_an_answer_inside_the_reasoning_does_not_count():
    puzzle = make_puzzle("addition", 2, torch.Generator().manual_seed(0))
    text = f"{THINK}{ANSWER}{puzzle.answer}{END_ANSWER}{END_THINK}{ANSWER}1{END_ANSWER}"
    assert (answer_reward(puzzle, text), format_reward(text), read_answer(text)) == (0.0, 0.0, None)


def test_rewards_take_a_million_characters():
    puzzle = make_puzzle("countdown", 3, torch.Generator().manual_seed(0))
    for text in ("9" * 10**6, ANSWER * 10**5, THINK * 10**5 + puzzle.solution(), "(" * 10**6):
        assert answer_reward(puzzle, text) == (text.endswith(puzzle.solution()))
        assert answer_reward(puzzle, write_answer("", text)) == 0.0


# --- problems -------------------------------------------------------------------------------------

def test_held_out_problems_are_never_trained_on():
    trained = {puzzle.question for puzzle in puzzles(count=100)}
    tested = {puzzle.question for puzzle in puzzles(count=20, held_out=True)}
    assert not trained & tested
    generator = torch.Generator().manual_seed(0)
    share = sum(puzzle.is_held_out for puzzle in (make_puzzle("chain", 6, generator, held) for held in (True, False)))
    assert share == 1 and HELD_OUT > 1


def test_levels_are_longer_and_seeds_differ():
    for task, highest in TASKS.items():
        made = [[make_puzzle(task, level, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)] for level in (2, highest)]
        for same, again, other in made:
            assert same == again and same != other
        assert len(made[0][0].steps) < len(made[1][0].steps) and made[1][0].level == highest


def test_encoding_is_undone_by_decoding():
    for puzzle in puzzles(count=3):
        text = puzzle.question + puzzle.solution()
        assert text_of(ids_of(text)) == text
    assert text_of(ids_of("1<end>2")) == "1" and max(ids_of("".join(VOCABULARY))) == len(VOCABULARY) - 1
    assert len(ids_of(write_answer("12", "3"))) == 7


def test_few_shot_prompts_show_reasoning_or_not():
    *examples, last = puzzles(count=1)
    prompt = few_shot(examples[:2], last.question, True)
    assert prompt.count("\n") == 2 and prompt.endswith(last.question) and examples[0].solution() in prompt
    assert few_shot(examples[:2], last.question, False).count(THINK + END_THINK) == 2
    assert few_shot([], last.question, True) == last.question


@pytest.mark.parametrize("task, level", [("chess", 2), ("chain", 0), ("chain", 25), ("countdown", 1), ("addition", 2.0)])
def test_a_kind_that_is_none_is_refused(task, level):
    with pytest.raises(ValueError, match="task must be one of chain, .*got"):
        make_puzzle(task, level, torch.Generator())


@pytest.mark.parametrize("text", ["a", "1+x", "<thin>", "é", "<"])
def test_characters_outside_the_vocabulary_are_named(text):
    with pytest.raises(ValueError, match="not in the vocabulary of"):
        ids_of(text)


# --- the program ----------------------------------------------------------------------------------

def test_demo_ends_on_a_verdict_and_flags_change_it():
    outputs = [run_program(["puzzles.py", *flags]).stdout for flags in
               ([], ["--seed", "1"], ["--task", "chain"], ["--task", "countdown", "--level", "6"])]
    assert len(set(outputs)) == 4
    for output in outputs:
        verdict = output.splitlines()[-1].split(": ")[1].split(" texts")[0].split(" of ")
        assert verdict[0] == verdict[1]


@pytest.mark.parametrize("flags, cause", [(["--level", "99"], "task must be one of"), (["--seed", "-1"], "--seed must be"),
                                          (["--task", "countdown", "--level", "1"], "task must be one of")])
def test_bad_flags_get_one_line(flags, cause):
    found = run_program(["puzzles.py", *flags])
    assert found.returncode == 2 and found.stderr.startswith("puzzles.py: ") and cause in found.stderr
    assert found.stderr.count("\n") == 1


def test_no_text_is_ever_run():
    names = {node.id for node in ast.walk(ast.parse((ROOT / "puzzles.py").read_text())) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "compile", "__import__"}
