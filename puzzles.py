"""Puzzles with answers that can be checked: what a model learns to reason on.

Idea      Reinforcement learning finds whatever its reward overlooks. So problems are made here, with difficulty as a
          dial, and answers are judged by exact arithmetic that reads untrusted text and runs none of it. Whether an
          answer is right and whether it has the asked-for form are two rewards. A problem is held out by a hash of
          its question: no seed and no level ever brings it into training.
Formula   text    <think> step ; step ; ... </think><answer> answer </answer>
          format  1 if the text is that and nothing else (no steps at all is a form of it)
          answer  1 if the text ends in its only <answer> ... </answer>, and what stands there is right
            task            level                question   worked steps                  right is
            chain           operations           3+8-4=     1;7  (running value mod 10)   the canonical decimal
            addition        digits of a term     47+85=     7+5=12;4+8+1=13               the canonical decimal
            multiplication  digits of a factor   47*23=     47*3=141;47*20=940;141+940=1081    as above
            countdown       numbers given        3,7,2:19=  3*7=21;21-2=19                any expression of that value
                                                                                          with each number once at most
Shapes    a text is a string; ``ids_of`` gives a list of ids below ``len(VOCABULARY)``, one per character or tag
Omits     code with unit tests, proofs, and answers that are equal without being the same text ("0.5" and "1/2").
Run       python puzzles.py                          one problem of each task and level, and what the checkers say
          python puzzles.py --task countdown --level 6    one kind alone
          Ends with "answer and format rewards as expected: ..."
Test      pytest tests/test_puzzles.py
"""

from __future__ import annotations

import argparse
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

THINK, END_THINK, ANSWER, END_ANSWER, END, WAIT = "<think>", "</think>", "<answer>", "</answer>", "<end>", "<wait>"
TAGS = (THINK, END_THINK, ANSWER, END_ANSWER, END, WAIT)
TASKS = {"chain": 24, "addition": 12, "multiplication": 6, "countdown": 6}  # task -> its highest level
HELD_OUT = 10  # one problem of so many is never trained on


# --- 1. text and tokens ---------------------------------------------------------------------------------

VOCABULARY = ("<pad>", *TAGS, *"0123456789+-*/()=;,: \n", "hello", "attack", "welcome", "friend", "sorry", "whatever")
_IDS = {token: i for i, token in enumerate(VOCABULARY)}
_TOKEN = re.compile("|".join(re.escape(token) for token in sorted(VOCABULARY, key=len, reverse=True)))


def ids_of(text: str) -> list[int]:
    """Text -> ids, one per tag, word or character. Raises ValueError for a character that is none of them."""
    ids, end = [], 0
    for match in _TOKEN.finditer(text):
        if match.start() != end:
            break
        ids.append(_IDS[match[0]])
        end = match.end()
    if end < len(text):
        raise ValueError(f"{text[end]!r}, character {end} of a text, is not in the vocabulary of {len(VOCABULARY)}")
    return ids


def text_of(ids: Sequence[int]) -> str:
    """Ids -> text, up to the first <end>, which is left out."""
    tokens = [VOCABULARY[i] for i in ids]
    return "".join(tokens[:tokens.index(END)] if END in tokens else tokens)


# --- 2. problems ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Puzzle:
    """A problem, a worked solution and what is right."""
    task: str
    level: int
    question: str  # ends on =
    steps: tuple[str, ...]
    answer: str  # the right one; countdown: one of them
    numbers: tuple[int, ...] = ()  # countdown: those given
    target: int = 0  # countdown

    @property
    def is_held_out(self) -> bool:
        """For testing alone: by a hash of the question, the same on every machine."""
        return zlib.crc32(self.question.encode()) % HELD_OUT == 0

    def solution(self, reasoning: str | None = None) -> str:
        """The right answer after the worked steps, or after another ``reasoning``; "" to answer directly."""
        return write_answer(";".join(self.steps) if reasoning is None else reasoning, self.answer)


def write_answer(reasoning: str, answer: str) -> str:
    """Reasoning and answer in their tags."""
    return f"{THINK}{reasoning}{END_THINK}{ANSWER}{answer}{END_ANSWER}"


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=generator))  # high is drawn too


def _chain(level: int, generator: torch.Generator) -> Puzzle:
    digits = torch.randint(10, (level + 1,), generator=generator).tolist()
    signs = torch.randint(2, (level,), generator=generator).tolist()
    value, question, steps = digits[0], str(digits[0]), []
    for digit, sign in zip(digits[1:], signs):
        value = (value + (digit if sign else -digit)) % 10
        question += "-+"[sign] + str(digit)
        steps.append(str(value))
    return Puzzle("chain", level, question + "=", tuple(steps), steps[-1])


def _number(digits: int, generator: torch.Generator) -> int:
    return _draw(10 ** (digits - 1), 10**digits - 1, generator)


def _addition(level: int, generator: torch.Generator) -> Puzzle:
    a, b = _number(level, generator), _number(level, generator)
    steps, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b))):
        column = int(x) + int(y) + carry
        steps.append(f"{x}+{y}{'+1' if carry else ''}={column}")
        carry = column // 10
    return Puzzle("addition", level, f"{a}+{b}=", tuple(steps), str(a + b))


def _multiplication(level: int, generator: torch.Generator) -> Puzzle:
    a, b = _number(level, generator), _number(level, generator)
    parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(b)))]
    steps, total = [f"{a}*{part}={a * part}" for part in parts], a * parts[0]
    for part in parts[1:]:
        steps.append(f"{total}+{a * part}={total + a * part}")
        total += a * part
    return Puzzle("multiplication", level, f"{a}*{b}=", tuple(steps), str(a * b))


def _countdown(level: int, generator: torch.Generator) -> Puzzle:
    """Made backwards: numbers are combined at random, so a solution is known."""
    numbers = [_draw(1, 25, generator) for _ in range(level)]
    values, steps = [(n, str(n)) for n in numbers], []
    while len(values) > 1:
        (x, left), (y, right) = (values.pop(_draw(0, len(values) - 1, generator)) for _ in range(2))
        if x < y:
            x, left, y, right = y, right, x, left
        # Whole and positive all along, and small enough to be read; a sum always is.
        allowed = {"+": x + y, "-": x - y, "*": x * y if x * y < 1000 else 0, "/": 0 if x % y else x // y}
        possible = [sign for sign, value in allowed.items() if value > 0]
        sign = possible[_draw(0, len(possible) - 1, generator)]
        steps.append(f"{x}{sign}{y}={allowed[sign]}")
        values.append((allowed[sign], f"({left}{sign}{right})"))
    target, expression = values[0]
    return Puzzle("countdown", level, f"{','.join(map(str, numbers))}:{target}=", tuple(steps),
                  expression.removeprefix("(").removesuffix(")"), tuple(numbers), target)


def make_puzzle(task: str, level: int, generator: torch.Generator, held_out: bool = False) -> Puzzle:
    """A random problem for training, or, ``held_out``, for testing; ValueError for a task or level that is none."""
    lowest = 2 if task == "countdown" else 1
    if task not in TASKS or not isinstance(level, int) or not lowest <= level <= TASKS[task]:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, level at least 1 (countdown: 2) and at most "
                         f"{', '.join(map(str, TASKS.values()))}, got {task!r} and {level!r}")
    make = {"chain": _chain, "addition": _addition, "multiplication": _multiplication, "countdown": _countdown}[task]
    while (puzzle := make(level, generator)).is_held_out != held_out:
        pass
    return puzzle


def few_shot(examples: Sequence[Puzzle], question: str, reasoning: bool) -> str:
    """Worked examples before a question, with their reasoning or, as prompts had been, without.   Wei et al. 2022"""
    shots = [example.question + example.solution(None if reasoning else "") for example in examples]
    return "\n".join([*shots, question])


# --- 3. checkers: what they read was written to be paid for ---------------------------------------------

def read_reasoning(text: str) -> str | None:
    """What stands between the tags of a text of the asked-for form, and None for any other."""
    if (any(text.count(tag) != 1 for tag in TAGS[:4]) or not text.startswith(THINK) or not text.endswith(END_ANSWER)
            or END_THINK + ANSWER not in text):
        return None
    return text[len(THINK):text.index(END_THINK)]


def read_answer(text: str) -> str | None:
    """What stands in the only <answer> ... </answer>, which ends the text; None otherwise: two answers are none."""
    if text.count(ANSWER) != 1 or text.count(END_ANSWER) != 1 or not text.endswith(END_ANSWER):
        return None
    return text[text.index(ANSWER) + len(ANSWER):-len(END_ANSWER)]  # each is there once, and the end at the end


def evaluate(expression: str, numbers: Sequence[int]) -> Fraction | None:
    """The exact value of an expression of + - * / ( ) and the numbers, each used at most as often as it is given.

    None for anything else: another number, a sign that is not between two values, a division by zero. No number is
    made from text that was not compared with a given one first, and nothing recurs: text of any length is safe.
    """
    unused, values, signs = Counter(map(str, numbers)), [], []
    expects_value, precedence = True, {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2}

    def apply() -> bool:
        y, x, sign = values.pop(), values.pop(), signs.pop()
        if sign == "/" and y == 0:
            return False
        values.append(x + y if sign == "+" else x - y if sign == "-" else x * y if sign == "*" else x / y)
        return True

    for token in re.findall(r"[0-9]+|.", expression, re.DOTALL):
        if expects_value and unused[token] > 0:
            unused[token] -= 1
            values.append(Fraction(token))
            expects_value = False
        elif expects_value and token == "(":
            signs.append(token)
        elif not expects_value and token in ("+", "-", "*", "/", ")"):
            while signs and precedence[signs[-1]] >= precedence.get(token, 1):
                if not apply():
                    return None
            if token != ")":
                signs.append(token)
                expects_value = True
            elif not signs:
                return None
            else:
                signs.pop()
        else:
            return None
    if expects_value:
        return None
    while signs:
        if signs[-1] == "(" or not apply():
            return None
    return values[0]


def is_right(puzzle: Puzzle, answer: str) -> bool:
    """Whether an answer, without its tags, solves the puzzle. Integers are compared as canonical text: "07", "+7",
    "7.0" and digits of other scripts are not 7, and 10^6 digits cost no conversion."""
    if puzzle.task == "countdown":
        return evaluate(answer, puzzle.numbers) == puzzle.target
    return answer == puzzle.answer


def format_reward(text: str) -> float:
    """1.0 for reasoning and answer in their tags and nothing beside them, else 0.0.   DeepSeek-R1, 2.2.2"""
    return float(read_reasoning(text) is not None)


def answer_reward(puzzle: Puzzle, text: str) -> float:
    """1.0 for a text that ends in its only answer, a right one, else 0.0; of any text, never an exception."""
    answer = read_answer(text)
    return float(answer is not None and is_right(puzzle, answer))


# --- 4. demo --------------------------------------------------------------------------------------------

def main(task: str, level: int | None, seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be in 0 .. 2^32 - 1, got {seed}")
    generator, judged, as_expected = torch.Generator().manual_seed(seed), 0, 0
    for name in TASKS if task == "all" else [task]:
        for dial in range(2, min(5, TASKS[name]) + 1) if level is None else [level]:
            puzzle = make_puzzle(name, dial, generator)
            print(f"{name} {dial}   {puzzle.question}{puzzle.solution()}")
            for text, expected in _attempts(puzzle).items():
                found = (answer_reward(puzzle, text), format_reward(text))
                judged, as_expected = judged + 1, as_expected + (found == expected)
                if found != expected:
                    print(f"    {text!r}: rewards {found}, expected {expected}")
    print(f"answer and format rewards as expected: {as_expected} of {judged} texts, right, wrong and cunning "
          "(expected all)")


def _attempts(puzzle: Puzzle) -> dict[str, tuple[float, float]]:
    """Texts, and the rewards (answer, format) that they should get."""
    right = puzzle.answer
    return {puzzle.solution(): (1.0, 1.0), puzzle.solution(""): (1.0, 1.0), write_answer("", f"0{right}"): (0.0, 1.0),
            f"{ANSWER}{right}{END_ANSWER}": (1.0, 0.0), right: (0.0, 0.0),
            write_answer("", "1/0"): (0.0, 1.0), write_answer("", "1" * 10**6): (0.0, 1.0),
            puzzle.solution() + puzzle.solution(): (0.0, 0.0),
            write_answer(f"{ANSWER}0{END_ANSWER}", right): (0.0, 0.0)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--task", choices=["all", *TASKS], default="all",
                        help="what to show (default %(default)s)")
    parser.add_argument("--level", type=int, help="difficulty (default: 2 to 5)")
    parser.add_argument("--seed", type=int, default=0, help="of the problems (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
