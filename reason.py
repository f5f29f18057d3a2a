"""A model learns to think: chain of thought, R1-Zero, and DeepSeek-R1's four phases.   DeepSeek-AI 2025 (2501.12948)

Idea      A small transformer cannot compute a long chain in one token, but it can write it down step by step. Who shows
          it worked steps teaches it to (chain of thought). Or nobody does: among its samples some have steps and are
          right more often; a reward for right answers alone makes them likelier, and answers grow longer.
Formula   SFT      -mean log p(y_t | x, y_<t) over response tokens
          reward   r(x, y) = [answer right] + w [form right];  diverse: a reward model's score where there is no check
          GRPO     A_i = (r_i - mean r) / std r over the G samples of one prompt; rlhf.grpo_loss, handed in
          Wilson   interval of a share: (s + z^2/2n +- z sqrt(s (1 - s)/n + z^2/4n^2)) / (1 + z^2/n)
Shapes    prompts and responses: lists of ids, ragged -> tokens, mask (B, T), 1.0 at response tokens; rewards (N, G)

            phase            learns from                                            R1 used
  base      pre-training     problems, mostly answered without steps, some with     DeepSeek-V3
  zero      RL alone         right answers, form                                    the same rewards, by rules
  1         cold start       a few worked examples                                  thousands of long ones
  2         reasoning RL     as zero, from 1                                        + a language reward
  3         self-training    2's own right answers, with general data, from base    600k + 200k samples
  4         diverse RL       checked answers, and a learned reward for the rest     helpfulness, harmlessness

Also      measured: the whole demo, 500 held-out chains of 6 operations, 64 s on two cores. Direct answers 0.108,
          worked steps 1.000. Base 0.148, zero 0.746; cold start 0.524, after RL 0.906 (length 9.5 -> 13.2), phase 3
          0.964, phase 4 0.954; RL with a random reward 0.168. One of 16 samples of phase 2's model 0.905, their
          majority 1.000: 9.5 points. On an older CPU with --seed 3 and 4: cold start 0.592 and 0.466, after RL 0.930
          and 0.894; one sample 0.913 and 0.891, majority 1.000 and 0.998. RL and votes share what is between cold
          start and 1: each step gives to the one and takes from the other. There, by steps of RL, one sample of 250
          (seeds 0 and 1): cold start 0.485 and 0.566; 4: 0.698, 0.767; 8: 0.878, 0.916; 12: 0.930, 0.953, where the
          majority of 16, 1.000, is but 4.7 points above with seed 1. So the demo takes 7.

Omits     other tasks than chains, which is all that this model learns in minutes (puzzles.py makes harder ones);
          the language-consistency reward, a judge model in phase 3, distillation, levels that grow with the model.
Run       python reason.py                                      all of it from random weights: minutes
          python reason.py --plot growth.png                    length and accuracy under RL as a picture
          python reason.py --out thinker.pt                     keeps the model, for inference_scaling.py
          torchrun --standalone --nproc_per_node=2 reason.py    batches and samples shared out over processes
          Ends with "points gained: chain of thought over direct ..."
Test      pytest tests/test_reason.py
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

LEVEL, STEPS, RL_STEPS = 6, 1100, 7  # of the demo: operations of the hardest chains, batches of study, steps of RL
Rows = tuple[list[list[int]], list[list[int]]]  # prompts, responses
Reward = Callable[[Sequence[int], Sequence[int]], float]  # (number of a prompt, response) -> its reward


# --- 1. figures -----------------------------------------------------------------------------------------

def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share; never beyond 0 and 1, and right for shares near them.   Wilson 1927"""
    if not 0 <= right <= total or total < 1:
        raise ValueError(f"want 0 <= right <= total, total at least 1, got {right} of {total}")
    share, scale = right / total, 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


@dataclass
class Report:
    """What a model does on problems that it has not seen."""
    right: int
    well_formed: int
    problems: int
    length: float  # tokens of a response, mean

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.problems

    def __str__(self) -> str:
        low, high = wilson_interval(self.right, self.problems)
        return (f"accuracy {self.accuracy:.3f} [{low:.3f}, {high:.3f}]   length {self.length:5.1f}   "
                f"well-formed {self.well_formed / self.problems:.2f}")


def report(responses: Sequence[Sequence[int]], is_right: Callable[[int, Sequence[int]], bool],
           is_well_formed: Callable[[Sequence[int]], bool]) -> Report:
    """Judge one response to each problem: ``is_right`` gets its number and the response."""
    return Report(sum(is_right(i, y) for i, y in enumerate(responses)), sum(map(is_well_formed, responses)),
                  len(responses), sum(map(len, responses)) / max(1, len(responses)))


# --- 2. learning from what is shown ---------------------------------------------------------------------

def join_rows(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ragged rows -> tokens, mask (B, T), padded on the right with 0; mask 1.0 at response tokens."""
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(f"want a response to each prompt, got {len(prompts)} and {len(responses)}")
    T = max(len(x) + len(y) for x, y in zip(prompts, responses))
    tokens = torch.tensor([[*x, *y, *[0] * (T - len(x) - len(y))] for x, y in zip(prompts, responses)])
    mask = torch.tensor([[0.0] * len(x) + [1.0] * len(y) + [0.0] * (T - len(x) - len(y))
                         for x, y in zip(prompts, responses)])
    return tokens, mask


def supervised_loss(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean of -log p over the tokens where mask is 1: tokens, mask (B, T) -> scalar."""
    logits = model(tokens[:, :-1])  # (B, T - 1, V)
    wanted = mask[:, 1:] > 0
    return F.cross_entropy(logits[wanted], tokens[:, 1:][wanted])


def share_gradients(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Each gradient becomes its mean over the processes of the group: with equal shares of a batch that of the whole
    batch. Without process groups it stays as it is."""
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        for p in model.parameters():
            if p.grad is not None:
                dist.all_reduce(p.grad, group=group)
                p.grad /= dist.get_world_size(group)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, group) -> None:
    optimizer.zero_grad()
    loss.backward()
    share_gradients(model, group)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def learn_from_rows(model: nn.Module, rows: Callable[[int], Rows], steps: int, lr: float, group=None) -> int:
    """``steps`` steps of AdamW on batches ``rows(step)``, lr warmed up, then down to 0. Returns tokens trained on."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    seen, warm_up = 0, max(1, min(30, steps // 10))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warm_up, 1.0, 2 * (1 - step / steps))
        prompts, responses = rows(step)
        tokens, mask = join_rows(prompts, responses)
        seen += sum(map(len, prompts)) + sum(map(len, responses))
        _step(model, optimizer, supervised_loss(model, tokens, mask), group)
    return seen


# --- 3. learning from what was rewarded -----------------------------------------------------------------

@dataclass
class Growth:
    """What was seen at one step of reinforcement learning, means over its samples."""
    reward: float
    accuracy: float
    length: float


def grpo_step(policy: nn.Module, optimizer: torch.optim.Optimizer, prompts: Sequence[list[int]], G: int, reward: Reward,
              generate: Callable, rlhf, reference: nn.Module | None = None, kl: float = 0.0, group=None) -> tuple:
    """Sample G answers to each prompt, reward them, take one step of GRPO on them.   Shao et al. 2024, algorithm 1

    Args:
        reward: (number of the prompt, response) -> its reward.
        generate: prompts -> a rollout: tokens, mask and log_probs (B, T), and ``responses()``.
        rlhf: what has ``group_advantages``, ``aligned_log_probs`` and ``grpo_loss``: the module of that name.
        reference, kl: coefficient of the KL penalty to a model that stays; 0: none.

    Returns (rewards (N, G), responses).
    """
    found = generate([prompt for prompt in prompts for _ in range(G)])
    responses = found.responses()
    rewards = torch.tensor([float(reward(i // G, y)) for i, y in enumerate(responses)]).view(len(prompts), G)
    before = None
    if kl:
        with torch.no_grad():
            before = rlhf.aligned_log_probs(reference, found.tokens)
    new = rlhf.aligned_log_probs(policy, found.tokens)
    # The answers are the policy's own: old and new are the same numbers, and what is learned is in their gradient.
    # Lengths are all divided by one number: by each one's own, long wrong answers would be cheap, and length pay.
    loss = rlhf.grpo_loss(new, new.detach(), before, rlhf.group_advantages(rewards).flatten(), found.mask, kl=kl,
                          length="constant", max_length=found.mask.size(1))
    _step(policy, optimizer, loss, group)
    return rewards, responses


def rejection_sample(prompts: Sequence[list[int]], responses: Sequence[Sequence[list[int]]],
                     is_good: Callable[[int, Sequence[int]], bool], keep: int) -> Rows:
    """Of each prompt's samples those that are good, no two the same, the first ``keep``: what phase 3 is trained on."""
    if len(prompts) != len(responses) or keep < 1:
        raise ValueError(f"want samples of each prompt and keep of at least 1, got {len(prompts)} prompts, "
                         f"{len(responses)} groups and keep {keep}")
    kept = [(prompt, list(y)) for i, (prompt, group) in enumerate(zip(prompts, responses))
            for y in list(dict.fromkeys(tuple(y) for y in group if is_good(i, y)))[:keep]]
    return [x for x, _ in kept], [y for _, y in kept]


# --- 4. the phases, on a school.School -------------------------------------------------------------------

def _share(count: int) -> int:
    """Of ``count`` rows of a batch those that one process brings."""
    return -(-count // dist.get_world_size()) if dist.is_initialized() else count


def reinforce(policy: nn.Module, school, steps: int, seed: int, prompts: int = 24, G: int = 12, lr: float = 2e-4,
              is_random: bool = False, judge: Callable | None = None, general: float = 0.0) -> list[Growth]:
    """RL on the school's problems: 1 for a right answer and 0.2 for the form; ``is_random``: a coin instead, the
    control. ``judge``: (prompt, response) -> a learned reward, for the share ``general`` of prompts that no checker
    knows. Half of the others go on after the policy's own answers of the step before, right and wrong: what is never
    rewarded is unlearned."""
    import rlhf
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0, fused=True)
    sample, grown, coin = school.sampler(policy, seed), [], torch.Generator().manual_seed(seed)
    prompts, earlier = _share(prompts), []
    for step in range(steps):
        problems = school.problems(prompts)
        asked = [school.prompt(puzzle.question) for puzzle in problems]
        others = round(general * prompts)
        asked[:others] = school.general(others)[0] if others else []
        again = earlier[:(prompts - others) // 2]
        seen = others + len(again)
        problems[others:seen] = [puzzle for puzzle, _ in again]
        asked[others:seen] = [school.follow_up(puzzle, answer) for puzzle, answer in again]

        def reward(i: int, response: Sequence[int]) -> float:
            if i < others:
                return judge(asked[i], response)
            if is_random:
                return float(torch.rand((), generator=coin) < 0.5)
            written = asked[i][school.before + school.asked:]  # of the answer, before a pause
            return school.is_right(problems[i], response) + 0.2 * school.is_well_formed([*written, *response])

        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 5)
        rewards, responses = grpo_step(policy, optimizer, asked, G, reward, sample, rlhf)
        earlier = [(problems[i], responses[i * G]) for i in range(seen, prompts)]
        checked = range(seen * G, len(responses))
        right = [school.is_right(problems[i // G], responses[i]) for i in checked]
        grown.append(Growth(rewards.mean().item(), sum(right) / max(1, len(right)),
                            sum(len(responses[i]) for i in checked) / max(1, len(right))))
    return grown


def learn_opinions(policy: nn.Module, school, pairs: int, seed: int) -> Callable:
    """A reward model of ``preference.py`` on the policy's own body, from so many comparisons of general answers whose
    labels follow Bradley and Terry: (prompt, response) -> its score."""
    from preference import RewardModel, reward_loss
    model = RewardModel(copy.deepcopy(policy), torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(max(1, pairs // 32)):
        asked, first, value = school.general(_share(32))
        _, second, _ = school.general(len(asked))
        other = torch.tensor([school.opinion(x, y) for x, y in zip(asked, second)])
        prefers = torch.rand(len(asked), generator=school.generator) < torch.sigmoid(4 * (value - other))
        scores = [model.scores(*_ends(asked, answers)) for answers in (first, second)]
        loss = reward_loss(torch.where(prefers, *scores), torch.where(prefers, *reversed(scores)))
        optimizer.zero_grad()
        loss.backward()
        share_gradients(model)
        optimizer.step()

    @torch.no_grad()
    def judge(prompt: Sequence[int], response: Sequence[int]) -> float:
        return model.scores(*_ends([prompt], [response])).item()
    return judge


def _ends(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows (B, T), and the place of each one's last token (B,)."""
    return join_rows(prompts, responses)[0], torch.tensor([len(x) + len(y) - 1 for x, y in zip(prompts, responses)])


# --- 5. demo ---------------------------------------------------------------------------------

def study(school, worked: bool, steps: int, seed: int) -> tuple[nn.Module, int]:
    """A model from random weights that has seen right answers, all with steps or all without, and how many tokens. The
    same number either way: shorter answers come in larger batches."""
    from school import new_model
    model = new_model(school, seed)
    width = school.before + school.asked + 6  # of a row without steps
    written = 1 + 0.75 * school.level + 0.25 * (school.level + 1) / 2  # mean reasoning of a lesson
    rows = 32 if worked else round(32 * (1 + written / width))
    return model, learn_from_rows(model, lambda step: school.rows(school.lessons(_share(rows)), worked), steps, 3e-3)


def pretrain_base(student: nn.Module, school, steps: int) -> nn.Module:
    """The base model: one that has studied worked steps reads more of them, with pauses and after earlier answers, and
    goes on to what is found everywhere, mostly without steps."""
    base = copy.deepcopy(student)
    learn_from_rows(base, lambda step: school.corpus(_share(32), worked=1.0, plain=0.0), steps, 2e-3)
    learn_from_rows(base, lambda step: school.corpus(_share(64)), steps, 1e-3)
    return base


def cold_start(base: nn.Module, school) -> nn.Module:
    """Phase 1: a few worked examples."""
    model = copy.deepcopy(base)
    few = school.rows(school.problems(32), True)
    learn_from_rows(model, lambda step: tuple(part[16 * step:16 * step + 16] for part in few), 2, 3e-4)
    return model


def self_train(base: nn.Module, policy: nn.Module, school, steps: int, seed: int) -> nn.Module:
    """Phase 3: from the base again, on the policy's right and well-formed samples, and general answers of all kinds."""
    problems = school.problems(400)
    prompts = [school.prompt(puzzle.question) for puzzle in problems]
    samples = school.sampler(policy, seed)([prompt for prompt in prompts for _ in range(4)]).responses()
    groups = [samples[i:i + 4] for i in range(0, len(samples), 4)]
    x, y = rejection_sample(prompts, groups, lambda i, response: school.is_right(problems[i], response)
                            and school.is_well_formed(response), 2)
    model = copy.deepcopy(base)

    def rows(step: int) -> Rows:
        some = torch.randint(len(x), (_share(48),), generator=school.generator).tolist() if x else []
        asked, said, _ = school.general(_share(16))
        return [x[i] for i in some] + asked, [y[i] for i in some] + said
    learn_from_rows(model, rows, steps, 1e-3)
    return model


def main(level: int, steps: int, rl_steps: int, problems: int, seed: int, plot: str | None, out: str | None) -> None:
    if not 2 <= level <= 12 or min(steps, rl_steps, problems) < 1 or not 0 <= seed < 2**32:
        raise ValueError("--level must be in 2 .. 12, --steps, --rl_steps and --problems at least 1, --seed in "
                         f"0 .. 2^32 - 1, got {level}, {steps}, {rl_steps}, {problems} and {seed}")
    from school import School
    rank = int(os.environ.get("RANK", 0))
    figure = new_figure(plot if rank == 0 else None, 10, 4)
    check_writable(out if rank == 0 else None)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    school, began = School(level, seed + 2**32 * rank), time.perf_counter()  # other problems on every process
    tested = {dial: school.problems(problems, dial, True) for dial in sorted({2, (2 + level) // 2, level})}
    hard = tested[level]

    def say(text: str) -> None:
        if rank == 0:
            print(f"{time.perf_counter() - began:5.0f} s  {text}", flush=True)

    def show(name: str, model: nn.Module, **how) -> Report:
        found = school.examine(model, hard, **how)
        say(f"{name:34} {found}")
        return found

    say(f"chains of up to {level} operations mod 10; held-out problems: {problems} of each kind, chance is 0.10")
    by_kind = {}
    for worked in (False, True):
        student, tokens = study(school, worked, steps, seed)
        found = by_kind[worked] = {dial: school.examine(student, some, temperature=0.0)
                                   for dial, some in tested.items()}
        say(f"{'worked steps' if worked else 'direct answers'}, {tokens:,} training tokens: accuracy "
            + ", ".join(f"{each.accuracy:.3f} at level {dial}" for dial, each in found.items()))
    base = pretrain_base(student, school, max(1, steps // 5))
    untrained = show("base", base)
    few = {reasoning: show(f"base, prompted {'with' if reasoning else 'without'} reasoning", base,
                           before=school.shot(reasoning)) for reasoning in (False, True)}

    grown = {}
    zero = copy.deepcopy(base)
    grown["R1-Zero: RL from the base"] = reinforce(zero, school, rl_steps, seed + rank)
    from_zero = show("zero: RL without a cold start", zero)
    control = copy.deepcopy(base)
    grown["control: random reward"] = reinforce(control, school, rl_steps, seed + rank, is_random=True)
    random = show("control: RL with a random reward", control)
    policy = cold_start(base, school)
    cold = show("1 cold start", policy)
    grown["phase 2: RL after the cold start"] = reinforce(policy, school, rl_steps, seed + rank)
    reasoned = show("2 reasoning RL", policy)
    trained = self_train(base, policy, school, max(1, steps // 8), seed)
    show("3 rejection sampling and SFT", trained)
    judge = learn_opinions(trained, school, 64 * rl_steps, seed)
    _say_opinion(say, school, trained, "before")
    reinforce(trained, school, rl_steps, seed + rank, lr=5e-4, judge=judge, general=1 / 3)
    show("4 diverse RL", trained)
    _say_opinion(say, school, trained, "after")

    samples = school.sampler(policy, seed)([school.prompt(p.question) for p in hard for _ in range(16)]).responses()
    alone, voted = _vote(school, hard, samples)
    say(f"phase 2's model at level {level}: {alone:.3f} with one sample, {voted:.3f} with the majority of 16")
    for name, growth in grown.items():
        first, last = growth[:max(1, rl_steps // 10)], growth[-max(1, rl_steps // 10):]
        say(f"{name}: " + ", ".join(f"{what} {_mean(first, what):.2f} -> {_mean(last, what):.2f}"
                                    for what in ("accuracy", "length")))
    if out is not None and rank == 0:
        torch.save({"level": level, "model": policy.state_dict()}, out)
        say(f"saved: {out}")
    if figure is not None:
        _draw(figure, grown)
        figure.savefig(plot)
        say(f"drawn: {plot}")
    gains = (by_kind[True][level].accuracy - by_kind[False][level].accuracy, reasoned.accuracy - cold.accuracy,
             voted - alone)
    zero_gain, control_gain = from_zero.accuracy - untrained.accuracy, random.accuracy - untrained.accuracy
    as_expected = control_gain < zero_gain / 3 and all(gain >= least for gain, least in zip(gains, (0.20, 0.15, 0.05)))
    if rank == 0:
        points = (100 * gain for gain in (*gains, zero_gain, control_gain))
        print("points gained: chain of thought over direct {:.1f} (expected at least 20), RL over the cold start "
              "{:.1f} (at least 15), majority of 16 over one {:.1f} (at least 5); over the base, RL {:.1f} and with a "
              "random reward {:.1f} (under a third of it): {}".format(
                  *points, "OK" if as_expected else "WRONG, expected as said"))
    if dist.is_initialized():
        dist.destroy_process_group()


def _mean(growth: list[Growth], what: str) -> float:
    return sum(getattr(one, what) for one in growth) / len(growth)


def _say_opinion(say: Callable, school, model: nn.Module, when: str) -> None:
    asked, _, _ = school.general(200)
    opinions = map(school.opinion, asked, school.sampler(model, 2)(asked).responses())
    say(f"  people's opinion of general answers, {when}: {sum(opinions) / len(asked):.2f} (best: 1)")


def _vote(school, problems: Sequence, samples: list[list[int]]) -> tuple[float, float]:
    """(accuracy of single samples, of the majority of 16)."""
    from inference_scaling import majority_vote
    voted = 0
    for i, puzzle in enumerate(problems):
        answer = majority_vote([school.answer(y) for y in samples[16 * i:16 * i + 16]])
        voted += answer is not None and school.puzzles.is_right(puzzle, answer)
    alone = sum(school.is_right(problems[i // 16], y) for i, y in enumerate(samples))
    return alone / len(samples), voted / len(problems)


def new_figure(path: str | None, width: float, height: float):
    """A matplotlib figure to be saved under ``path``, None without one. ValueError without matplotlib, and for what
    cannot be drawn there: now, not after the work."""
    if path is None:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    try:
        if str(path).rpartition(".")[2].lower() not in figure.canvas.get_supported_filetypes():
            raise OSError(None, "no format of pictures has that name")
        is_new = not os.path.exists(path)
        open(path, "ab").close()  # keeps a picture that is there
        if is_new:
            os.remove(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be drawn ({error.strerror}): name a picture in a folder that is "
                         "there") from None
    return figure


def check_writable(path: str | None) -> None:
    """ValueError for a file that cannot be written: now, not after the work. None is no file."""
    if path is not None:
        try:
            is_new = not os.path.exists(path)
            open(path, "ab").close()  # keeps what is there
            if is_new:
                os.remove(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror}): check the folder, its permissions and the "
                             "room on the disk") from None


def _draw(figure, grown: dict[str, list[Growth]]) -> None:
    for axes, what in zip(figure.subplots(1, 2), ("accuracy", "length")):
        for name, growth in grown.items():
            axes.plot([getattr(one, what) for one in growth], label=name)
        axes.set(xlabel="step of RL", ylabel=what + (", tokens" if what == "length" else ""))
        axes.legend()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n"  # one line of all ranks, without usage
                                               if os.environ.get("RANK", "0") == "0" else None)
    parser.add_argument("--level", type=int, default=LEVEL,
                        help="operations of the hardest chains (default %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS,
                        help="of learning from worked steps (default %(default)s)")
    parser.add_argument("--rl_steps", type=int, default=RL_STEPS,
                        help="of each reinforcement learning (default %(default)s)")
    parser.add_argument("--problems", type=int, default=500,
                        help="held-out problems of each level (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="of weights, problems and samples (default %(default)s)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw growth under RL (needs matplotlib)")
    parser.add_argument("--out", metavar="FILE.pt", help="keep phase 2's model for inference_scaling.py")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
