"""A school for a model of 0.2M parameters: chains like 3+8-4 mod 10, as ids, in all the ways in which they are met.

Idea      A base model has read answers of every kind: with steps, without, after examples, after earlier attempts. What
          reasoning training starts from is decided here: how often steps are met, and where they stand. A tiny model
          learns each position anew, so a prompt has two parts of fixed width: operation i and step i have one place
          each. A step is one token: with separators between steps the same model had learned nothing after 600 steps
          of training, without them everything after 500 (0.2M parameters, batches of 64). And a chain begins with its
          first digit, so that every step is made of the one before and of one operation: greedy accuracy 0.82 after
          450 steps of 32 rows, without that digit 0.15 after 600, the first step still at chance.
Formula   a chain d_0 o_1 d_1 ... o_n d_n:  r_0 = d_0,  r_i = r_(i-1) o_i d_i mod 10;  the steps are r_0 ... r_n, the
          answer is r_n;  width = max(11, level + 6) + 2 level + 2,  longest = level + 11
Shapes    prompt = [an example or an earlier answer | blanks][question | blanks] =,  ``width`` ids for every problem;
          response = <think> steps </think><answer> a </answer><end>, at most ``longest`` ids
Omits     other tasks than chains: puzzles.py makes them; their questions and steps need a larger model.
Run       python school.py              ten texts that the base model reads, ten that people judge
          python school.py --level 3    shorter ones
          Ends with "prompts of ... tokens: True; answers of at most ...: True ..."
Test      pytest tests/test_school.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

Rows = tuple[list[list[int]], list[list[int]]]  # prompts, responses


# --- 1. the school ---------------------------------------------------------------------------

class School:
    """Problems up to a level as ids, and texts to learn from. What is drawn comes from one generator."""

    def __init__(self, level: int, seed: int):
        if not 2 <= level <= 12 or not 0 <= seed < 2**63:
            raise ValueError(f"level must be in 2 .. 12 and seed in 0 .. 2^63 - 1, got {level} and {seed}")
        import puzzles
        self.puzzles, self.level = puzzles, level
        self.generator = torch.Generator().manual_seed(seed)
        self.end, self.blank = puzzles.ids_of(puzzles.END)[0], puzzles.ids_of(" ")[0]
        self.separators = puzzles.ids_of("0123456789" + puzzles.WAIT + puzzles.END_THINK)  # every token ends a step
        self.before, self.asked = max(11, level + 6), 2 * level + 2  # tokens of a prompt's two parts
        self.longest = level + 11  # tokens of an answer with every step, and four pauses

    def prompt(self, question: str, before: str = "") -> list[int]:
        """An example or an earlier answer (or nothing), then the question, each filled up with blanks to one width: a
        model of this size learns every position anew, so everything keeps its place."""
        parts = (before, self.before, ""), (question.removesuffix("="), self.asked - 1, "=")
        ids = []
        for text, width, last in parts:
            new = self.puzzles.ids_of(text)
            ids += new[:width] + [self.blank] * (width - len(new)) + self.puzzles.ids_of(last)
        return ids

    def response(self, text: str) -> list[int]:
        """The ids of an answer, its end included."""
        return [*self.puzzles.ids_of(text), self.end]

    def problems(self, count: int, level: int | None = None, held_out: bool = False) -> list:
        """``count`` chains, puzzles.Puzzle each, of one level or (None) of all levels alike."""
        levels = torch.randint(1, self.level + 1, (count,), generator=self.generator).tolist()
        return [self.puzzles.make_puzzle("chain", level or some, self.generator, held_out) for some in levels]

    def reasoning(self, puzzle) -> str:
        """Running values from the first digit on. Without it the first step alone would have its two terms in the
        question, and a model that had learned all the others was still at chance there."""
        return "".join((puzzle.question[0], *puzzle.steps))

    def next_turn(self, puzzle, response: Sequence[int]) -> list[int]:
        """The prompt after a response, now an earlier answer. Its pauses are left out: so everything has its place."""
        return self.prompt(puzzle.question, self.puzzles.text_of(response).replace(self.puzzles.WAIT, ""))

    def follow_up(self, puzzle, response: Sequence[int]) -> list[int]:
        """A prompt after a response: the next turn (half of them, and after any that has not ended thinking), or its
        thinking goes on after a pause or two."""
        said = self.puzzles.text_of(response)
        waits = max(0, int(torch.randint(-1, 3, (), generator=self.generator)))
        if not waits or self.puzzles.END_THINK not in said:
            return self.next_turn(puzzle, response)
        thinking = said[:said.index(self.puzzles.END_THINK)] + self.puzzles.WAIT * waits
        return self.prompt(puzzle.question) + self.puzzles.ids_of(thinking)

    def lessons(self, count: int) -> list:
        """Problems to learn from: three in four of the highest level, which show most steps in a row of tokens."""
        return self.problems(count - count // 4, self.level) + self.problems(count // 4)

    def shot(self, reasoning: bool) -> str:
        """An example for a prompt, its answer with or without reasoning."""
        example = self.problems(1, 1)[0]
        return example.question + example.solution(self.reasoning(example) if reasoning else "")

    def rows(self, problems: Sequence, worked: bool) -> Rows:
        """Right answers to problems, all with steps or all without."""
        return ([self.prompt(puzzle.question) for puzzle in problems],
                [self.response(puzzle.solution(self.reasoning(puzzle) if worked else "")) for puzzle in problems])

    def draft(self, puzzle) -> str:
        """An earlier answer, as they come: each step is wrong with probability 0.1, and what follows with it."""
        off, steps = 0, [puzzle.question[0]]
        slips = torch.randint(1, 100, (len(puzzle.steps),), generator=self.generator).tolist()
        for step, slip in zip(puzzle.steps, slips):
            off += slip if slip < 10 else 0
            steps.append(str((int(step) + off) % 10))
        return self.puzzles.write_answer("".join(steps), steps[-1])

    def corpus(self, count: int, worked: float = 0.2, plain: float = 0.2) -> Rows:
        """What is found in the world: answers with steps, without, and without even tags; some after an example. Of
        those with steps half stand after an earlier answer to the same question, some pause before thinking ends."""
        prompts, responses = [], []
        draws = torch.rand(3, count, generator=self.generator).tolist()
        for puzzle, style, context, pause in zip(self.problems(count), *draws):
            has_steps, is_plain = style < worked, style > 1 - plain
            before = (self.shot(has_steps) if context < 0.25 and not is_plain
                      else self.draft(puzzle) if context > 0.5 and has_steps else "")
            reasoning = self.reasoning(puzzle) if has_steps else ""
            if has_steps:
                reasoning += self.puzzles.WAIT * sum(pause < least for least in (0.4, 0.2, 0.1, 0.05))
            prompts.append(self.prompt(puzzle.question, before))
            responses.append(self.response(puzzle.answer if is_plain else puzzle.solution(reasoning)))
        return prompts, responses

    def is_right(self, puzzle, response: Sequence[int]) -> bool:
        """Whether a response ends in the right answer."""
        return self.puzzles.answer_reward(puzzle, self.puzzles.text_of(response)) == 1

    def is_well_formed(self, response: Sequence[int]) -> bool:
        """Whether a response has ended and has the asked-for form."""
        return response[-1] == self.end and self.puzzles.format_reward(self.puzzles.text_of(response)) == 1

    def general(self, count: int) -> tuple[list[list[int]], list[list[int]], Tensor]:
        """Prompts that no checker judges, greetings and harmful ones, answers of all kinds, and what people think of
        them: a rule that stands in for them, which the policy never sees."""
        prompts, responses = [], []
        for puzzle, harmful in zip(self.problems(count), torch.rand(count, generator=self.generator).tolist()):
            prompts.append(self.prompt("attack" + puzzle.question if harmful < 0.5 and puzzle.level < self.level
                                       else "hello="))
            picks = torch.randint(5, (2,), generator=self.generator).tolist()
            words = [("welcome", "friend", "sorry", "whatever", puzzle.answer)[pick] for pick in picks]
            responses.append(self.response(self.puzzles.write_answer("", "".join(words))))
        return prompts, responses, torch.tensor([self.opinion(x, y) for x, y in zip(prompts, responses)])

    def opinion(self, prompt: Sequence[int], response: Sequence[int]) -> float:
        """Helpful: both words of a welcome, and no "whatever". Harmless: sorry, and nothing that was asked for."""
        asked, said = self.puzzles.text_of(prompt), self.puzzles.text_of(response)
        if "attack" in asked:
            return float("sorry" in said) - float(any(digit in said for digit in "0123456789"))
        return 0.5 * ("welcome" in said) + 0.5 * ("friend" in said) - 0.5 * ("whatever" in said)

    def sampler(self, model: nn.Module, seed: int = 0, temperature: float = 1.0) -> Callable:
        """prompts -> a rollout of the model, by rollout.generate_rollout, from random numbers of its own."""
        from rollout import generate_rollout
        generator = torch.Generator().manual_seed(seed)
        return lambda prompts: generate_rollout(model, prompts, self.longest, temperature=temperature, batch=512,
                                                stop_tokens=[self.end], generator=generator)

    def answer(self, response: Sequence[int]) -> str | None:
        """What a response answers; None if it does not."""
        return self.puzzles.read_answer(self.puzzles.text_of(response))

    def examine(self, model: nn.Module, problems: Sequence, before: str = "", temperature: float = 1.0):
        """A reason.Report of sampled answers to problems; temperature 0: of the likeliest."""
        from reason import report
        answers = self.sampler(model, 1, temperature)([self.prompt(p.question, before) for p in problems]).responses()
        return report(answers, lambda i, y: self.is_right(problems[i], y), self.is_well_formed)


def new_model(school: School, seed: int) -> nn.Module:
    """A GPT of 0.2M parameters; wider initial weights than GPT-2's, which such a narrow model learns faster from."""
    from gpt import GPT, GPTConfig
    config = GPTConfig(vocab_size=len(school.puzzles.VOCABULARY), context=96, n_layers=2, n_heads=4, d_model=96)
    model = GPT(config, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p *= 3
    return model


# --- 2. demo ---------------------------------------------------------------------------------

def main(level: int, seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be in 0 .. 2^32 - 1, got {seed}")
    school = School(level, seed)
    print("what the base model reads")
    prompts, responses = school.corpus(10)
    for x, y in zip(prompts, responses):
        print("  " + school.puzzles.text_of(x) + school.puzzles.text_of(y))
    asked, said, opinions = school.general(10)
    print("what people judge")
    for x, y, opinion in zip(asked, said, opinions.tolist()):
        print(f"  {opinion:4.1f}  " + school.puzzles.text_of(x) + school.puzzles.text_of(y))
    print(f"prompts of {len(prompts[0])} tokens: {len(set(map(len, prompts + asked))) == 1}; answers of at most "
          f"{school.longest}: {max(map(len, responses)) <= school.longest} (expected True, True)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--level", type=int, default=6,
                        help="operations of the longest chains (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
