"""Over-optimisation: a reward that is learned is a reward that can be fooled.   Gao et al. 2022 (2210.10760)

Idea      A reward model learns from few comparisons of ordinary answers, and is right about such answers. A policy
          trained against it leaves them: it finds what the model overrates; the learned reward climbs, the
          labeller's own falls (Goodhart's law). A penalty on the KL divergence from the reference keeps the policy
          where the reward model is right.
Formula   maximise  E[learned(y)] - beta KL(policy || reference);   watched, never learned from: E[labeller(y)]
Shapes    answers (B, T) of word ids, each begun with an end, and their mask (B, T) -> rewards (B,)
Omits     what larger reward models and more comparisons change (the paper's laws); prompts; people.
Run       python overoptimisation.py           PPO without and with the penalty, as python rlhf.py: half a minute
          python overoptimisation.py --kl 0    without alone
          Ends with "kl 0.2, ... nats away: learned reward ..."
Test      pytest tests/test_overoptimisation.py
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# --- 1. a world of twelve words ---------------------------------------------------------------------------

FACTS, POLITE, REST = ("Paris", "Rome", "Oslo", "Cairo"), ("please", "kindly"), ("well", "so", "the", "of", "and")
WORDS = ("<end>", *FACTS, *POLITE, *REST)
LONGEST = 12  # words that may be written; without an end among them the answer is cut off


def labeller_reward(answers: Tensor, mask: Tensor) -> Tensor:
    """What answers are worth, by a rule that stands in for people: answers, mask (B, T) -> (B,).

    Each fact is worth 1 and one polite word 1. A fact told again, a polite word too many and every word after the
    eighth annoy, by 1/2 each. All of that is rare where people write, so comparisons of their answers hardly show it.
    """
    counts = (F.one_hot(answers, len(WORDS)) * mask[..., None]).sum(1)[:, 1:]  # (B, V - 1)
    facts, polite = counts[:, :len(FACTS)], counts[:, len(FACTS):len(FACTS) + len(POLITE)].sum(1)
    annoying = (facts - 1).clamp(min=0).sum(1) + (polite - 1).clamp(min=0) + (counts.sum(1) - 8).clamp(min=0)
    return facts.clamp(max=1).sum(1) + polite.clamp(max=1) - 0.5 * annoying


def answers_of_people(B: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """B answers of 2 to 8 words drawn at random, two thirds of them filling: tokens, mask (B, 1 + LONGEST)."""
    weights = [0.0, *[0.07] * len(FACTS), *[0.04] * len(POLITE), *[0.64 / len(REST)] * len(REST)]
    tokens = torch.multinomial(torch.tensor(weights), B * (1 + LONGEST), True, generator=generator).view(B, -1)
    length = torch.randint(2, 9, (B, 1), generator=generator)
    return until_end(tokens.masked_fill(torch.arange(1 + LONGEST) > length, 0))


def until_end(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, mask): what follows the first end is replaced by ends, the mask stops with the first; (B, T) each."""
    is_end = F.pad((tokens[:, 1:] == 0).long(), (1, 0))  # (B, T); the first token only begins the answer
    mask = (is_end.cumsum(1) - is_end == 0).float()
    mask[:, 0] = 0
    return tokens * (mask > 0), mask


@torch.no_grad()
def write(model: nn.Module, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """B answers sampled from the model: tokens, mask (B, 1 + LONGEST)."""
    tokens, cache = torch.zeros(B, 1, dtype=torch.long), model.new_cache(B, 1 + LONGEST)
    while tokens.size(1) <= LONGEST:
        p = model(tokens[:, -1:], cache)[:, -1].softmax(-1)  # (B, V)
        tokens = torch.cat((tokens, torch.multinomial(p, 1, generator=generator)), 1)  # (B, T + 1)
    return until_end(tokens)


def last_place(mask: Tensor) -> Tensor:
    """Where each row's mask is 1 for the last time: (B, T) -> (B,); T - 1 for a row where it never is."""
    return mask.size(1) - 1 - mask.flip(1).argmax(1)


# --- 2. a reference and a reward model, as for any language model ------------------------------------------

def _minimise(loss: Callable[[], Tensor], model: nn.Module, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def fine_tuned(generator: torch.Generator) -> nn.Module:
    """A tiny GPT that writes as people do."""
    from gpt import GPT, GPTConfig
    from rlhf import aligned_log_probs, response_loss

    sizes = GPTConfig(vocab_size=len(WORDS), context=1 + LONGEST, n_layers=1, n_heads=2, d_model=32)
    model = GPT(sizes, generator=generator)

    def loss() -> Tensor:
        tokens, mask = answers_of_people(64, generator)
        return response_loss(aligned_log_probs(model, tokens), mask)

    _minimise(loss, model, 200, 5e-3)
    return model


def learned_reward(reference: nn.Module, pairs: int, generator: torch.Generator) -> tuple[nn.Module, float, float]:
    """A reward model from so many comparisons of the reference's answers, by a labeller who errs as Bradley and Terry
    say; and on 1,000 more the share of labels that it agrees with, and that the labeller's rule itself does."""
    from preference import RewardModel, calibration, reward_loss

    tokens, mask = write(reference, 2 * (pairs + 1000), generator)
    last, gold = last_place(mask), labeller_reward(tokens, mask)
    first, second = torch.arange(0, len(gold), 2), torch.arange(1, len(gold), 2)
    prefers_second = torch.rand(len(first), generator=generator) > torch.sigmoid(2 * (gold[first] - gold[second]))
    better, worse = torch.where(prefers_second, second, first), torch.where(prefers_second, first, second)
    model = RewardModel(copy.deepcopy(reference), generator)

    def loss() -> Tensor:
        some = torch.randint(pairs, (64,), generator=generator)
        return reward_loss(*(model.scores(tokens[rows], last[rows]) for rows in (better[some], worse[some])))

    _minimise(loss, model, 100, 1e-3)
    with torch.no_grad():
        scores = model.scores(tokens, last)
        model.centre(scores.mean())
    seen, best = (calibration(reward[better[pairs:]], reward[worse[pairs:]]).accuracy for reward in (scores, gold))
    return model, seen, best


# --- 3. PPO against it ---------------------------------------------------------------------------------------

def optimise(reference: nn.Module, reward_model: nn.Module, kl: float, steps: int, seed: int) -> list[list[float]]:
    """PPO from the reference, penalty ``kl`` per nat; prints and returns [KL, learned reward, labeller's reward], means
    over the answers of each step."""
    from rlhf import Experience, PPOConfig, aligned_log_probs, ppo_update

    generator, rows = torch.Generator().manual_seed(seed), []
    policy, critic = copy.deepcopy(reference), copy.deepcopy(reward_model)
    optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], eps=1e-5, weight_decay=0.0)
    config = PPOConfig(kl_coefficient=kl, epochs=2, minibatches=2)
    print(f"\nkl {kl:g}\n step   KL, nats   learned reward   labeller's reward   an answer")
    for step in range(steps + 1):
        tokens, mask = write(policy, 128, generator)
        last = last_place(mask)
        with torch.no_grad():
            log_probs, before = (aligned_log_probs(model, tokens) * mask for model in (policy, reference))
            scores = reward_model.scores(tokens, last)
        gold, ended = labeller_reward(tokens, mask), tokens.gather(1, last[:, None])[:, 0] == 0
        rows.append([(log_probs - before).sum(1).mean().item(), scores.mean().item(), gold.mean().item()])
        if step in {round(i * steps / 8) for i in range(9)}:
            said = " ".join(WORDS[word] for word in tokens[0, 1:last[0] + 1].tolist())
            print("{:5}{:11.2f}{:17.2f}{:20.2f}   {}".format(step, *rows[-1], said), flush=True)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / (steps + 1))
        ppo_update(policy, critic, optimizer, Experience(tokens, mask, log_probs, before, scores, ended), config,
                   generator)
    return rows


# --- 4. demo -------------------------------------------------------------------------------------------------

def _draw(runs: dict[float, list[list[float]]], figure) -> None:
    for axes, (kl, rows) in zip(figure.subplots(1, len(runs), squeeze=False, sharey=True)[0], runs.items()):
        divergence, *rewards = zip(*rows)
        for name, values in zip(("learned reward", "labeller's reward"), rewards):
            axes.plot(divergence, values, "o", label=name)
        axes.set(title=f"kl {kl:g}", xlabel="KL from the reference, nats per answer")
        axes.legend()


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


def show_overoptimisation(kl: float, steps: int, pairs: int, seed: int, plot: str | None) -> None:
    """Fine-tune, learn the reward, optimise it without and with the penalty, and print what came of it.

    Raises ValueError for settings that cannot be, and for a picture that cannot be drawn.
    """
    if not 0 <= kl < 1e6 or steps < 1 or not 1 <= pairs <= 100_000 or not 0 <= seed < 2**32:
        raise ValueError("--kl must be in [0, 1e6), --steps at least 1, --pairs in 1 .. 100000, --seed in 0 .. 2^32 - 1"
                         f", got {kl}, {steps}, {pairs} and {seed}")
    figure = new_figure(plot, 5 + 5 * (kl > 0), 4)
    generator = torch.Generator().manual_seed(seed)
    reference = fine_tuned(generator)
    reward_model, seen, best = learned_reward(reference, pairs, generator)
    print(f"reward model from {pairs} comparisons: right on {seen:.1%} of 1,000 held-out pairs "
          f"(the labeller's rule: {best:.1%})")
    runs = {beta: optimise(reference, reward_model, beta, steps, seed) for beta in sorted({0.0, kl})}
    if figure is not None:
        _draw(runs, figure)
        figure.savefig(plot)
        print(f"drawn: {plot}")
    (_, learned, gold), (divergence, fooled, fallen) = runs[0.0][0], runs[0.0][-1]
    verdict = (f"\nkl 0, {divergence:.1f} nats away: learned reward {learned:.2f} -> {fooled:.2f} (expected up), "
               f"labeller's {gold:.2f} -> {fallen:.2f} (expected down)")
    as_expected = fooled > learned and fallen < gold
    if kl:
        divergence, believed, held = runs[kl][-1]
        verdict += (f"\nkl {kl:g}, {divergence:.1f} nats away: learned reward {learned:.2f} -> {believed:.2f}, "
                    f"labeller's {gold:.2f} -> {held:.2f} (expected both up)")
        as_expected = as_expected and believed > learned and held > gold
    print(verdict + (": OK" if as_expected else
                     ": WRONG, expected as said (it takes some 30 steps, and a --kl near 0.2)"))


def main(program: str) -> None:
    """The command line, under the name of the file that was started."""
    parser = argparse.ArgumentParser(prog=program, usage=argparse.SUPPRESS,
                                     description=sys.modules["__main__"].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--kl", type=float, default=0.2,
                        help="price of a nat of KL divergence; 0: the run without penalty alone (default %(default)s)")
    parser.add_argument("--steps", type=int, default=40,
                        help="PPO updates, of 128 answers each (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=300,
                        help="comparisons for the reward model (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, answers and labels (default %(default)s)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw both rewards against KL (needs matplotlib)")
    try:
        show_overoptimisation(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")


if __name__ == "__main__":
    main("overoptimisation.py")
