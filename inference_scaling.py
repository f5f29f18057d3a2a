"""Test-time scaling: the same model answers better when it may write more.   Snell et al. 2024 (2408.03314); OpenAI o1

Idea      Accuracy can be bought at inference: more samples and a way to choose (a vote, a verifier, a learned reward),
          a search over steps, more thinking, another turn. All methods answer the same problems here, and are paid for
          in generated tokens. Above all of them lies the oracle: the chance that any of N samples is right.
Formula   pass@k = 1 - C(n - c, k) / C(n, k)                    c of n samples right   (Chen et al. 2021, 2107.03374)
          majority = argmax_a sum_i [a_i = a]                   self-consistency       (Wang et al. 2022, 2203.11171)
          best of N = a_i with i = argmax_i r(x, y_i)           r a verifier, or learned from right and wrong answers
          ORM  -[c log s + (1 - c) log(1 - s)] at an answer's last token, s = sigma(r), c whether it was right;
               here r = w log p(y | x) + b of the policy itself: w and b are learned (SurpriseReward)
          PRM  the same at every step's end: c of the whole answer is an unbiased sample of how the step ends
                                                                (Lightman et al. 2023; Wang et al. 2023, 2312.08935)
          accuracy ~ a + b log10 tokens                         least squares; R^2 = 1 - residual / total
Shapes    P problems, N answers each; tokens and right (P, N); values (B, T), at t that of the text up to token t
Also      measured: 500 held-out chains each of 6 and of 2 operations, 16 samples of each, the model of reason.py: one
          sample 0.875 and 0.871, majority of 16 1.000 and 1.000 (R^2 of the fit 0.85 and 0.83), best of 4 by the
          learned reward 0.999 and 1.000, 4 beams by steps 0.998 and 1.000. Thinking stopped after 6 tokens 0.092, after
          8 0.900. Self-refinement, four turns: the last turn 0.886 -> 0.942 and 0.858 -> 0.968; the turn that the
          learned reward likes best 0.998 and 1.000. Two claims do not hold here. Hard ones do not gain most after an RL
          so short: 12.5 and 12.9 points (8.6 and 10.0 with reason.py --seed 3). And <wait> in place of the end of
          thinking, twice, is no gain, 0.888 -> 0.880 (--seed 3, 200 problems: a loss, 0.905 -> 0.805), though the model
          has read pauses and RL rewards what follows them.
          Not every reward can be searched by: a reward model on the policy's body, which reads whole answers, learned
          nothing of use from a few thousand samples here; the two numbers of a SurpriseReward do.
Omits     tree search with rollouts (MCTS), lookahead, parallel decoding costs.
Run       python reason.py --out thinker.pt                      trains the model: minutes
          python inference_scaling.py --checkpoint thinker.pt    accuracy against generated tokens, method by method
          python inference_scaling.py                            both, without a file between them
          python inference_scaling.py --checkpoint thinker.pt --plot tokens.png
          Ends with "points gained by a majority of 16 over one sample: ..."
Test      pytest tests/test_inference_scaling.py
"""

from __future__ import annotations

import argparse
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Generate = Callable[..., list[list[int]]]  # (prompts, uniforms (B, most), stop tokens) -> new tokens of each prompt


# --- 1. estimators --------------------------------------------------------------------------------------

def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k samples is right, of which c of n were: unbiased.   Chen et al. 2021, equation 1

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n {n}, c {c}, k {k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)  # whole numbers of any size: nothing overflows


def majority_vote(answers: Sequence[str | None], weights: Sequence[float] | None = None) -> str | None:
    """The answer that most samples gave, or that has most weight (>= 0); of those that tie the one given first. None,
    no answer, has no vote; it is returned if nothing was answered."""
    votes: dict[str, float] = {}
    for answer, weight in zip(answers, [1.0] * len(answers) if weights is None else weights, strict=True):
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + weight
    return max(votes, key=votes.__getitem__, default=None)  # of equals, max and dict keep the first


def best_of(answers: Sequence[str | None], scores: Sequence[float]) -> str | None:
    """The answer with the highest score, of equals the first. Samples without an answer come last."""
    ranked = [(answer is not None, score, -i) for i, (answer, score) in enumerate(zip(answers, scores, strict=True))]
    return answers[-max(ranked)[2]] if ranked else None


def fit_log(tokens: Sequence[float], accuracy: Sequence[float]) -> tuple[float, float, float]:
    """(a, b, R^2) of accuracy ~ a + b log10(tokens), by least squares. Raises ValueError for under two different x."""
    x, y = torch.tensor(tokens, dtype=torch.float64).log10(), torch.tensor(accuracy, dtype=torch.float64)
    if len(x) != len(y) or len(x) < 2 or not x.isfinite().all() or (x == x[0]).all():
        raise ValueError(f"a line needs two different positive numbers of tokens, got {list(tokens)}")
    dx, dy = x - x.mean(), y - y.mean()
    b = (dx * dy).sum() / dx.square().sum()
    residual, total = (dy - b * dx).square().sum(), dy.square().sum()
    return (y.mean() - b * x.mean()).item(), b.item(), (1 - residual / total).item() if total > 0 else 1.0


# --- 2. learned rewards ---------------------------------------------------------------------------------

def process_loss(values: Tensor, ends: Tensor, right: Tensor) -> Tensor:
    """Binary cross-entropy at every step's end, against whether the answer that went on from there was right.

    values (B, T), logits; ends (B, T), 1.0 at the last token of each step; right (B,) of 0.0 and 1.0 -> scalar. With
    only the last token in ``ends`` it is the loss of an outcome reward model.   Cobbe et al. 2021 (2110.14168)
    """
    if values.shape != ends.shape or values.dim() != 2 or right.shape != values.shape[:1]:
        raise ValueError("values and ends must be (B, T) and right (B,), got "
                         f"{tuple(values.shape)}, {tuple(ends.shape)} and {tuple(right.shape)}")
    losses = F.binary_cross_entropy_with_logits(values, right[:, None].expand_as(values), reduction="none")
    return (losses * ends).sum() / ends.sum().clamp(min=1)


def step_ends(tokens: Tensor, mask: Tensor, separators: Sequence[int]) -> Tensor:
    """1.0 at response tokens that end a step, and at each response's last one: tokens, mask (B, T) -> (B, T)."""
    is_last = mask * (F.pad(mask[:, 1:], (0, 1)) == 0)
    return torch.maximum(torch.isin(tokens, torch.tensor(separators, device=tokens.device)) * mask, is_last)


class SurpriseReward(nn.Module):
    """A reward of two numbers on top of a policy: w (log p of the response up to t) + b, a logit of being right. Where
    a policy slips it mostly knew better: what it writes against its own odds is wrong. How much that says is learned.

    Args:
        policy: a language model of the contract; not trained, not copied.
        start: tokens of a prompt, which are not judged.
    """

    def __init__(self, policy: nn.Module, start: int):
        super().__init__()
        self.policy, self.start = [policy], start  # in a list: its parameters are not this module's
        self.w, self.b = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> logits (B, T)."""
        with torch.no_grad():
            log_p = self.policy[0](tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]  # (B, T - 1)
        log_p = F.pad(log_p, (1, 0))  # (B, T): the first token has no odds
        log_p[:, :self.start] = 0.0
        return self.w * log_p.cumsum(1) + self.b


def train_verifier(verifier: nn.Module, tokens: Tensor, ends: Tensor, right: Tensor, steps: int,
                   generator: torch.Generator, batch: int = 64, lr: float = 1e-3) -> float:
    """Fit a verifier, tokens (B, T) -> logits (B, T), to sampled answers; returns the last loss."""
    optimizer = torch.optim.AdamW(verifier.parameters(), lr=lr)
    for step in range(steps):
        some = torch.randint(len(tokens), (batch,), generator=generator)
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss = process_loss(verifier(tokens[some]), ends[some], right[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def last_values(verifier: nn.Module, rows: Sequence[Sequence[int]], batch: int = 512) -> list[float]:
    """The verifier's probability of a right answer, read at each row's last token."""
    found = []
    for begin in range(0, len(rows), batch):
        some = rows[begin:begin + batch]
        T = max(map(len, some))
        values = verifier(torch.tensor([[*row, *[0] * (T - len(row))] for row in some]))  # (B, T)
        found += values[range(len(some)), [len(row) - 1 for row in some]].sigmoid().tolist()
    return found


def auc(values: Tensor, right: Tensor) -> float:
    """The chance that a right answer's value is above a wrong one's, ties by halves: values, right (N,). 0.5: nothing
    was learned; NaN if all are right or all wrong."""
    good, bad = values[right > 0, None], values[right == 0]
    return ((good > bad).float().mean() + (good == bad).float().mean() / 2).item()


# --- 3. methods: each takes P prompts, returns texts (new tokens) and what they cost --------------------

@dataclass
class Answers:
    """For each of P problems: candidates as new tokens, a score for each, and how many tokens were generated."""
    candidates: list[list[list[int]]]
    scores: list[list[float]]
    tokens: list[int]


def draw_uniforms(seed: int, problems: Sequence[int], most: int) -> Tensor:
    """(B, most) numbers in [0, 1), those of a row from its seed and its problem's number alone: an answer is the same
    whatever else is in the batch."""
    rows = []
    for problem in problems:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + problem) % 2**63)
        rows.append(torch.rand(most, generator=generator))
    return torch.stack(rows)


def sample_many(generate: Generate, prompts: Sequence[list[int]], N: int, most: int, seed: int,
                stops: Sequence[int]) -> Answers:
    """N independent samples of every prompt: what votes and verifiers choose from."""
    repeated = [prompt for prompt in prompts for _ in range(N)]
    new = generate(repeated, draw_uniforms(seed, range(len(repeated)), most), stops)
    groups = [new[i:i + N] for i in range(0, len(new), N)]
    return Answers(groups, [[0.0] * N for _ in groups], [sum(map(len, group)) for group in groups])


def beam_over_steps(generate: Generate, value: Callable[[list[list[int]]], list[float]], prompts: Sequence[list[int]],
                    N: int, width: int, separators: Sequence[int], end: int, most: int, seed: int) -> Answers:
    """Search step by step: N beams; of each step's N continuations the N / width best are kept, and each goes on in
    ``width`` ways.   Snell et al. 2024, section 5.2

    Args:
        generate: stops at any of the ids that it is given: here the separators and ``end``.
        value: whole rows -> how good they are (a process reward model at their last token).
        most: tokens of an answer, at most; longer ones stay without an end.
    """
    if min(N, width) < 1 or N % width:
        raise ValueError(f"N beams must be a multiple of width, at least 1 each, got {N} and {width}")
    beams = [[(list(prompt), 0.0)] * N for prompt in prompts]
    cost, rounds = [0] * len(prompts), 0
    while True:
        going = [(p, n) for p, kept in enumerate(beams) for n, (row, _) in enumerate(kept)
                 if row[-1] != end and len(row) < len(prompts[p]) + most]
        if not going:
            break
        rounds += 1
        uniforms = draw_uniforms(seed + rounds, [p * N + n for p, n in going], most)
        steps = generate([beams[p][n][0] for p, n in going], uniforms, [*separators, end])
        rows = [(beams[p][n][0] + step)[:len(prompts[p]) + most] for (p, n), step in zip(going, steps)]
        beams = [list(kept) for kept in beams]
        for (p, n), step, row, score in zip(going, steps, rows, value(rows)):
            beams[p][n], cost[p] = (row, score), cost[p] + len(step)
        for p in {p for p, _ in going}:
            best = sorted(beams[p], key=lambda beam: -beam[1])[:N // width]  # stable: of equals the first
            beams[p] = [beam for beam in best for _ in range(width)]
    return Answers([[row[len(prompt):] for row, _ in kept] for prompt, kept in zip(prompts, beams)],
                   [[score for _, score in kept] for kept in beams], cost)


def force_budget(generate: Generate, prompts: Sequence[list[int]], budget: int, waits: int, end_thinking: list[int],
                 wait: list[int], stop: int, most: int, seed: int) -> Answers:
    """One answer per prompt, its thinking stopped after ``budget`` tokens, or, where it would end, made to go on
    ``waits`` times.   Muennighoff et al. 2025 (s1, 2501.19393), section 3.1

    Args:
        end_thinking: what is put in to end it; its first token ends thinking by itself, too.
        wait: what is put in instead of that token.
        most: tokens of the answer that follows.
    """
    if budget < 1 or waits < 0 or most < 1:
        raise ValueError(f"budget and most must be at least 1, waits at least 0, got {budget}, {most} and {waits}")
    rows, cost = [list(prompt) for prompt in prompts], [0] * len(prompts)
    left = [budget] * len(prompts)
    for turn in range(waits + 1):
        going = [p for p in range(len(rows)) if left[p] > 0 and rows[p][-1] != stop]
        if not going:
            break
        uniforms = draw_uniforms(seed + turn, going, budget)
        for p, new in zip(going, generate([rows[p] for p in going], uniforms, [end_thinking[0], stop])):
            new = new[:left[p]]
            cost[p], left[p] = cost[p] + len(new), left[p] - len(new)
            rows[p] += new
            if new[-1] == end_thinking[0]:
                if turn == waits or left[p] < len(wait):
                    left[p] = 0
                else:
                    rows[p][-1:] = wait
    for p, row in enumerate(rows):
        if row[-1] != stop:
            row += end_thinking[row[-1] == end_thinking[0]:]
    going = [p for p, row in enumerate(rows) if row[-1] != stop]
    if going:
        uniforms = draw_uniforms(seed + waits + 1, going, most)
        for p, new in zip(going, generate([rows[p] for p in going], uniforms, [stop])):
            rows[p] += new
            cost[p] += len(new)
    return Answers([[row[len(prompt):]] for row, prompt in zip(rows, prompts)], [[0.0]] * len(rows), cost)


def self_refine(generate: Generate, prompts: Sequence[list[int]], turns: int,
                again: Callable[[int, list[int]], list[int]], most: int, seed: int, stop: int) -> list[Answers]:
    """Turn after turn: question, reasoning and output of the last turn are what the next one reads.   OpenAI o1

    ``again``: (number of a problem, last turn's response) -> the next turn's prompt. Of all that was written only the
    last turn is read again, so what is read does not grow. Returns the answers after each turn, at the cost of all
    turns up to it.
    """
    found, asked, cost = [], list(prompts), [0] * len(prompts)
    for turn in range(turns):
        new = generate(asked, draw_uniforms(seed + turn, range(len(asked)), most), [stop])
        cost = [before + len(answer) for before, answer in zip(cost, new)]
        found.append(Answers([[answer] for answer in new], [[0.0]] * len(new), cost))
        asked = [again(p, answer) for p, answer in enumerate(new)]
    return found


# --- 4. the harness -------------------------------------------------------------------------------------

@dataclass
class Point:
    """One method at one budget, over problems."""
    method: str
    n: int
    tokens: float  # generated per problem, mean
    accuracy: float


def curves(answers: Sequence[Sequence[str | None]], right: Tensor, tokens: Tensor, scores: dict[str, Tensor],
           sizes: Sequence[int]) -> list[Point]:
    """Accuracy at N = each of ``sizes`` by vote, by each score and by the oracle, from S samples of each problem.

    answers: P lists of S; right, tokens and each of ``scores`` (P, S), at least 0: they weigh votes, too. The S
    samples are cut into groups of N and the mean is taken over groups: so the figures of small N lose their noise.
    """
    P, S = right.shape
    if not all(1 <= N <= S for N in sizes):
        raise ValueError(f"sizes must be in 1 .. {S}, the samples that there are, got {list(sizes)}")
    points = []
    for N in sizes:
        groups = [(p, slice(i, i + N)) for p in range(P) for i in range(0, S - N + 1, N)]
        rights = [dict(zip(reversed(answers[p][s]), reversed(right[p, s].tolist()))) for p, s in groups]
        cost = tokens.float().mean().item() * N
        chosen = {"majority": [majority_vote(answers[p][s]) for p, s in groups]}
        for name, score in scores.items():
            chosen[f"best of N, {name}"] = [best_of(answers[p][s], score[p, s].tolist()) for p, s in groups]
            chosen[f"vote weighted by {name}"] = [majority_vote(answers[p][s], score[p, s].tolist()) for p, s in groups]
        for name, answer in chosen.items():
            points.append(Point(name, N, cost, sum(r[a] for r, a in zip(rights, answer)) / len(groups)))
        counts = right.sum(1).long().tolist()
        points.append(Point("oracle pass@N", N, cost, sum(pass_at_k(S, c, N) for c in counts) / P))
    return points


# --- 5. demo --------------------------------------------------------------------------------------------

def _thinker(checkpoint: str | None, seed: int):
    """(school, policy): as ``reason.py --out`` kept them, or trained now."""
    from reason import LEVEL, RL_STEPS, STEPS, cold_start, pretrain_base, reinforce, study
    from school import School, new_model
    if checkpoint is None:
        school = School(LEVEL, seed)
        policy = cold_start(pretrain_base(study(school, True, STEPS, seed)[0], school, STEPS // 5), school)
        reinforce(policy, school, RL_STEPS, seed)
        return school, policy
    try:
        saved = torch.load(checkpoint, weights_only=True)
        school = School(saved["level"], seed)
        policy = new_model(school, seed)
        policy.load_state_dict(saved["model"])
    except (OSError, LookupError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        why = (str(error).splitlines() or ["empty or cut short"])[0]
        raise ValueError(f"{checkpoint}: no model of reason.py --out ({why}): write it anew") from None
    return school, policy


def _learn_rewards(school, policy: nn.Module, generate: Generate, count: int, steps: int,
                   seed: int) -> dict[bool, nn.Module]:
    """Verifiers of steps (True) and of outcomes (False), from the policy's samples on hard training problems: texts of
    the kind that they are going to judge, no made-up ones."""
    from reason import join_rows
    problems = school.problems(count, school.level)
    prompts = [school.prompt(puzzle.question) for puzzle in problems]
    sampled = sample_many(generate, prompts, 4, school.longest, seed + 1, [school.end])
    right = torch.tensor([float(school.is_right(puzzle, y)) for puzzle, group in zip(problems, sampled.candidates)
                          for y in group])
    tokens, mask = join_rows([prompt for prompt in prompts for _ in range(4)],
                             [y for group in sampled.candidates for y in group])
    learned, draw = {}, torch.Generator().manual_seed(seed)
    for by_step in (False, True):
        learned[by_step] = SurpriseReward(policy, school.before + school.asked)
        train_verifier(learned[by_step], tokens, step_ends(tokens, mask, school.separators if by_step else []), right,
                       steps, draw, lr=0.1)
    return learned


def _compare(school, generate: Generate, learned: dict[bool, nn.Module], problems: Sequence, N: int,
             seed: int) -> list[Point]:
    prompts = [school.prompt(puzzle.question) for puzzle in problems]
    found = sample_many(generate, prompts, N, school.longest, seed, [school.end])
    P = len(problems)

    def likeliest(texts: list[list[int]], scores: list[float]) -> list[int]:
        return texts[max(range(len(texts)), key=scores.__getitem__)]

    def points(method: str, n: int, answers: Answers, choose: Callable = lambda texts, scores: texts[0]) -> Point:
        texts = [choose(some, scores) for some, scores in zip(answers.candidates, answers.scores)]
        right = sum(school.is_right(puzzle, text) for puzzle, text in zip(problems, texts))
        return Point(method, n, sum(answers.tokens) / P, right / P)

    flat = [[*prompt, *y] for prompt, group in zip(prompts, found.candidates) for y in group]
    right = torch.tensor([[float(school.is_right(puzzle, y)) for y in group]
                          for puzzle, group in zip(problems, found.candidates)])
    scores = {"outcome reward": torch.tensor(last_values(learned[False], flat)).view(P, N),
              "verifier": right}
    print(f"\nthe outcome reward's AUC on {P * N} held-out samples: "
          f"{auc(scores['outcome reward'].flatten(), right.flatten()):.3f} (nothing learned: 0.5)")
    answers = [[school.answer(y) for y in group] for group in found.candidates]
    tokens = torch.tensor([[len(y) for y in group] for group in found.candidates])
    sizes = [2**i for i in range(N.bit_length())]
    result = curves(answers, right, tokens, scores, sizes)
    for beams in (2, 4, 8):
        kept = beam_over_steps(generate, lambda rows: last_values(learned[True], rows), prompts, beams, 2,
                               school.separators, school.end, school.longest, seed)
        result.append(points("beam over steps, process reward", beams, kept, likeliest))
    stop = school.puzzles.ids_of(school.puzzles.END_THINK + school.puzzles.ANSWER)
    for budget in range(2, 2 * school.level, 2):
        stopped = force_budget(generate, prompts, budget, 0, stop, [], school.end, 3, seed)
        result.append(points("thinking stopped", budget, stopped))
    for waits in (0, 1, 2):
        result.append(points("thinking prolonged (wait)", waits, force_budget(
            generate, prompts, school.longest, waits, stop, school.puzzles.ids_of(school.puzzles.WAIT), school.end, 3,
            seed)))

    def again(p: int, response: list[int]) -> list[int]:
        return school.next_turn(problems[p], response)

    best = Answers([[] for _ in prompts], [[] for _ in prompts], [])
    for turn, each in enumerate(self_refine(generate, prompts, 4, again, school.longest, seed, school.end), 1):
        result.append(points("self-refinement, last turn", turn, each))
        texts = [group[0] for group in each.candidates]
        values = last_values(learned[False], [[*prompt, *text] for prompt, text in zip(prompts, texts)])
        best = Answers([[*old, text] for old, text in zip(best.candidates, texts)],
                       [[*old, value] for old, value in zip(best.scores, values)], each.tokens)
        result.append(points("self-refinement, best turn", turn, best, likeliest))
    return result


def main(checkpoint: str | None, problems: int, samples: int, steps: int, seed: int, plot: str | None) -> None:
    if min(problems, samples, steps) < 1 or samples & (samples - 1) or not 0 <= seed < 2**32:
        raise ValueError("--problems and --steps must be at least 1, --samples a power of 2, --seed in 0 .. 2^32 - 1, "
                         f"got {problems}, {steps}, {samples} and {seed}")
    from reason import new_figure
    from rollout import generate_rollout
    figure = new_figure(plot, 12, 5)
    school, policy = _thinker(checkpoint, seed)

    def generate(prompts: Sequence[list[int]], uniforms: Tensor, stops: Sequence[int]) -> list[list[int]]:
        return generate_rollout(policy, prompts, uniforms.size(1), uniforms=uniforms, stop_tokens=stops,
                                batch=512).responses()

    learned = _learn_rewards(school, policy, generate, problems, steps, seed)
    gained, by_level, all_worse = {}, {}, []
    for level in (2, school.level):
        tested = school.problems(problems, level, True)
        found = by_level[level] = _compare(school, generate, learned, tested, samples, seed)
        print(f"level {level}, {problems} held-out problems\n{'method':34}{'N':>4}{'tokens':>9}{'accuracy':>10}")
        for point in found:
            print(f"{point.method:34}{point.n:4}{point.tokens:9.1f}{point.accuracy:10.3f}")
        by_method = {point.method: [p for p in found if p.method == point.method] for point in found}
        for name, some in by_method.items():
            if len({point.tokens for point in some}) > 1:
                a, b, r2 = fit_log([point.tokens for point in some], [point.accuracy for point in some])
                print(f"{name}: accuracy = {a:.3f} + {b:.3f} log10(tokens), R^2 = {r2:.3f}")
        # Two standard errors of the difference of two shares, as if they were of different problems.
        noise = {name: 2 * math.sqrt(sum(p.accuracy * (1 - p.accuracy) for p in (some[0], some[-1])) / problems)
                 for name, some in by_method.items()}
        worse = [name for name, some in by_method.items() if some[-1].accuracy < some[0].accuracy - noise[name]]
        print("worse at the largest budget than at the smallest, by more than chance: "
              f"{', '.join(worse) or 'no method'}")
        all_worse += worse
        votes = by_method["majority"]
        gained[level] = 100 * (votes[min(4, len(votes) - 1)].accuracy - votes[0].accuracy)
    if figure is not None:
        _draw(figure, by_level)
        figure.savefig(plot)
        print(f"drawn: {plot}")
    hard, easy = gained[school.level], gained[2]
    verdict = "OK" if hard >= 5 and not all_worse else "WRONG, expected as said"
    print(f"\nhard problems gain most, as the lectures say: {'so it is' if hard > easy else 'not so'} with this model")
    print(f"points gained by a majority of {min(16, samples)} over one sample: {hard:.1f} on hard problems (expected "
          f"at least 5), {easy:.1f} on easy ones; methods worse with more tokens: {len(all_worse)} (expected 0): "
          f"{verdict}")


def _draw(figure, by_level: dict[int, list[Point]]) -> None:
    rows = figure.subplots(1, len(by_level), sharey=True, squeeze=False)
    for axes, (level, points) in zip(rows[0], by_level.items()):
        for i, method in enumerate(dict.fromkeys(point.method for point in points)):
            some = [point for point in points if point.method == method]
            axes.plot([point.tokens for point in some], [point.accuracy for point in some], "-", marker="osv^D"[i % 5],
                      color=f"C{i % 10}" if i < 10 else "black", markerfacecolor="none", label=method)
        axes.set(xscale="log", xlabel="generated tokens per problem", ylabel="accuracy", title=f"level {level}")
        axes.legend(fontsize="small")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--checkpoint", metavar="FILE.pt", help="of reason.py --out (default: train one now)")
    parser.add_argument("--problems", type=int, default=500,
                        help="held-out problems of each level (default %(default)s)")
    parser.add_argument("--samples", type=int, default=16,
                        help="of each problem, a power of 2 (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50,
                        help="of training each learned reward (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="of problems, samples and training (default %(default)s)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw accuracy against tokens (needs matplotlib)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
