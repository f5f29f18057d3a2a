"""Learning from pairs: reward models and DPO.   Ouyang et al. 2022 (2203.02155); Rafailov et al. 2023 (2305.18290)

Idea      People cannot say how good an answer is, but which of two is better. Bradley and Terry (1952): the chance that
          y beats z is the logistic function of the difference of two scores. So a language model whose head gives one
          number learns the scores by maximum likelihood. Or the scores are left out: every policy is the optimum of
          some reward less KL from a reference; with that reward for the scores, it learns from the pairs itself.
Formula   P(y beats z | x) = sigma(r(x, y) - r(x, z))
          reward model   -log sigma(r_chosen - r_rejected);   K ranked answers (Plackett 1975, Luce 1959):
                         -sum_k (r_k - log sum_{j >= k} exp r_j),  best first
          optimum of E[r] - beta KL(policy || reference):   policy = reference exp(r / beta) / Z
          DPO            -log sigma(beta h),   h = log (p/q)(chosen) - log (p/q)(rejected),  p policy, q reference
          smoothed       -(1 - e) log sigma(beta h) - e log sigma(-beta h): a label is wrong with probability e
          DPO of K       Plackett and Luce's, of r = beta log (p/q): ``ranking_loss`` of ``implicit_reward``
          IPO            (h - 1 / (2 beta))^2: cannot be satisfied by ever larger h   (Azar et al. 2023, 2310.12036)
Shapes    tokens (B, T) -> scores (B,);   log-probs of whole answers (N,) each -> scalar
Omits     margins between grades, process rewards, length-controlled rewards, KTO and other losses without pairs.
Run       python preference.py   a labeller's pairs teach a reward model and DPO; both against the optimum: seconds
          Ends with "total variation of DPO to the labeller's optimum ..."
Test      pytest tests/test_preference.py
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# --- 1. the reward model -------------------------------------------------------------------------------

def shift_rows(x: Tensor, by: Tensor) -> Tensor:
    """Row b moved right by ``by[b]`` places, to the left where that is negative; what leaves at one end enters at the
    other: x (B, T), by (B,) -> (B, T)."""
    places = torch.arange(x.size(1), device=x.device) - by[:, None]  # (B, T)
    return x.gather(1, places % x.size(1))


class ScoreHead(nn.Linear):
    """x (..., D) -> (..., 1), through a language model's last norm.

    The norm is not called but applied: a tensor-parallel one has a hook that prepares for a head cut over ranks, and
    this head is whole. The head is called: ZeRO's hook on it gathers both. One number of bf16 has no more than 8 bits,
    too few to tell two good answers apart: the product is taken in fp32 or finer.
    """

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        x = norm.forward(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class RewardModel(nn.Module):
    """A language model whose head gives one number: what a text is worth, or (PPO's critic) is going to be worth.

    Rows of different lengths: what stands behind a row's last real token cannot change what was read before it, so
    right padding needs no mask, only valid ids; left padding is named by ``padding`` (B,), the number of such tokens.

    Args:
        model: a language model of the contract, with ``norm`` and ``config.d_model``; used, not copied. Its own head
            is not used.
        generator: draws the new one from N(0, 1 / (D + 1)).   Stiennon et al. 2020 (2009.01325), appendix B.1
    """

    def __init__(self, model: nn.Module, generator: torch.Generator | None = None):
        super().__init__()
        D, like = model.config.d_model, next(model.parameters())
        self.model = model
        self.score = ScoreHead(D, 1, device=like.device, dtype=like.dtype)
        with torch.no_grad():  # drawn where the generator is: the same weights on every device
            where = like.device if generator is None else generator.device
            self.score.weight.copy_(torch.randn(1, D, generator=generator, device=where) / math.sqrt(D + 1))
            self.score.bias.zero_()

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> (B, T) in fp32 or finer: at t, the score of the text up to and with token t."""
        if tokens.dim() != 2 or padding is not None and padding.shape != tokens.shape[:1]:
            raise ValueError("tokens must be (B, T) and padding (B,), got "
                             f"{tuple(tokens.shape)} and {None if padding is None else tuple(padding.shape)}")
        if padding is not None:
            tokens = shift_rows(tokens, -padding)  # every row begins at position 0
        x = self.model.embed(tokens)  # (B, T, D)
        for block in self.model.blocks:
            x = block(x)
        scores = self.score(x, self.model.norm)[..., 0]  # (B, T)
        return scores if padding is None else shift_rows(scores, padding)

    def scores(self, tokens: Tensor, last: Tensor, padding: Tensor | None = None) -> Tensor:
        """The score of each row, read at its last real token: tokens (B, T), last (B,) -> (B,)."""
        if last.shape != tokens.shape[:1]:
            raise ValueError(f"last must be ({len(tokens)},), one place per row, got {tuple(last.shape)}")
        return self(tokens, padding).gather(1, last[:, None])[:, 0]  # (B,)

    def values(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """(B, T), at the token's place as log-probs are: at t what is expected BEFORE token t; 0 at a row's first."""
        before = F.pad(self(tokens, padding)[:, :-1], (1, 0))  # (B, T)
        if padding is None:
            return before
        return before * (torch.arange(tokens.size(1), device=tokens.device) > padding[:, None])

    @torch.no_grad()
    def centre(self, mean: Tensor | float) -> None:
        """Subtract ``mean`` from all scores. Pairs leave a constant free; InstructGPT (section 3.5) fixes it so that
        the labellers' demonstrations score 0 on average."""
        self.score.bias -= mean


def _mean(losses: Tensor, count: float | Tensor | None) -> Tensor:
    """Sum over ``count``, of all ranks together, so that their losses add up to the mean; None: these alone."""
    return losses.sum() / max(1, len(losses)) if count is None else losses.sum() / count


def _same_shape(dims: int, **tensors: Tensor | None) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if len(set(shapes.values())) > 1 or any(len(shape) != dims for shape in shapes.values()):
        raise ValueError(f"want {dims} dimensions and equal shapes, got "
                         + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))


def reward_loss(chosen: Tensor, rejected: Tensor, count: float | Tensor | None = None) -> Tensor:
    """Mean of -log sigma(chosen - rejected), scores (N,) each; ``count`` pairs on all ranks together.
    Ouyang et al. 2022, equation 1 at K = 2; ln 2 for a model that cannot tell."""
    _same_shape(1, chosen=chosen, rejected=rejected)
    return _mean(-F.logsigmoid(chosen - rejected), count)


def ranking_loss(scores: Tensor, count: float | Tensor | None = None) -> Tensor:
    """Mean over prompts of -log P(ranking), the best answer drawn first, then the best of the rest (Plackett-Luce).

    scores (N, K), best first; a shorter ranking is filled up with -inf. At K = 2 the same as ``reward_loss``.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores must be (N, K), got shape {tuple(scores.shape)}")
    real = scores != -math.inf  # a score that is NaN stays one
    scores = scores.masked_fill(~real, -1e30)  # finite: the gradient of logsumexp over nothing but -inf is NaN
    rest = scores.flip(1).logcumsumexp(1).flip(1)  # (N, K): log sum_{j >= k} exp r_j
    return _mean((rest - scores).where(real, 0).sum(1), count)


def by_ranking(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Values of all answers of N rankings of these sizes, one ranking after the other, best first: (sum of sizes,) ->
    (N, K), shorter rankings filled up with -inf: what ``ranking_loss`` takes."""
    return nn.utils.rnn.pad_sequence(list(values.split(list(sizes))), batch_first=True, padding_value=-math.inf)


def pairs_of(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Of every two answers in a ranking the better one's value and the other's: (sum of sizes,) -> (2, pairs)."""
    starts = itertools.accumulate(sizes, initial=0)
    pairs = [pair for first, size in zip(starts, sizes)
             for pair in itertools.combinations(range(first, first + size), 2)]
    return values[torch.tensor(pairs, dtype=torch.long, device=values.device).view(-1, 2).T]


@dataclass
class Calibration:
    """How far a reward model's confidence can be trusted, in bins of it from 1/2 to 1."""
    accuracy: float  # share of pairs in which the chosen one scores higher, a tie counted as half
    confidence: Tensor  # (bins,): mean of sigma(|difference|); NaN where no pair fell
    right: Tensor  # (bins,): share of pairs in the right order
    pairs: Tensor  # (bins,)
    error: float  # expected calibration error: mean over pairs of |confidence - right| of their bin


@torch.no_grad()
def calibration(chosen: Tensor, rejected: Tensor, bins: int = 10) -> Calibration:
    """Confidence against accuracy on pairs that were held out, scores (N,) each.   Guo et al. 2017, section 2

    Raises ValueError without a pair or a bin, and for scores that are not finite.
    """
    _same_shape(1, chosen=chosen, rejected=rejected)
    if not len(chosen) or bins < 1:
        raise ValueError(f"calibration needs a pair and a bin, got {len(chosen)} pairs and {bins} bins")
    difference = chosen.cpu().double() - rejected.cpu().double()  # a Mac's GPU has no float64
    if not difference.isfinite().all():
        raise ValueError(f"pairs {(~difference.isfinite()).nonzero()[:10, 0].tolist()} have a score that is not finite")
    right = (difference > 0).double() + 0.5 * (difference == 0)
    confidence = torch.sigmoid(difference.abs())
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    pairs, sum_right, sum_confidence = (torch.zeros(bins, dtype=torch.float64, device=x.device).index_add_(0, bin_of, x)
                                        for x in (torch.ones_like(right), right, confidence))
    error = (sum_confidence - sum_right).abs().sum() / len(chosen)
    return Calibration(right.mean().item(), sum_confidence / pairs, sum_right / pairs, pairs.long(), error.item())


# --- 2. direct preference optimisation -------------------------------------------------------------------

def implicit_reward(policy: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """beta log(policy / reference) of whole answers, (N,) each -> (N,): the reward for which ``policy`` is the optimum,
    up to a constant of the prompt.   Rafailov et al. 2023, equation 5"""
    return beta * (policy - reference)


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor | None,
             reference_rejected: Tensor | None, beta: float = 0.1, label_smoothing: float = 0.0, kind: str = "sigmoid",
             count: float | Tensor | None = None) -> Tensor:
    """DPO's loss, a mean over pairs.   Rafailov et al. 2023, equation 7

    Args:
        policy_chosen, ...: log-probs of whole answers, (log_probs * mask).sum(1), (N,) each. The reference's never
            change: compute them once, before the first step, and keep them.
        beta: what a unit of KL divergence from the reference costs; for IPO the paper's tau.
        label_smoothing: the probability e that a label is wrong, below 1/2; not for IPO.
        kind: "sigmoid"; "ipo" (Azar et al. 2023, equation 17); "reference_free", every answer equally likely under the
            reference, which is then not asked for.
        count: pairs on all ranks together; None: these are all.

    Raises:
        ValueError: for shapes that differ or an argument out of range.
    """
    if kind not in ("sigmoid", "ipo", "reference_free") or not beta > 0:
        raise ValueError(f'kind must be "sigmoid", "ipo" or "reference_free", beta positive, got {kind!r} and {beta}')
    if not 0 <= label_smoothing < 0.5 or label_smoothing and kind == "ipo":
        raise ValueError(f"label_smoothing must be in [0, 0.5), and 0 for ipo, got {label_smoothing} for {kind}")
    if kind != "reference_free" and (reference_chosen is None or reference_rejected is None):
        raise ValueError(f"{kind} needs the log-probs of the reference")
    _same_shape(1, policy_chosen=policy_chosen, policy_rejected=policy_rejected,
                reference_chosen=reference_chosen, reference_rejected=reference_rejected)
    h = policy_chosen - policy_rejected
    if kind != "reference_free":
        h = h - (reference_chosen - reference_rejected)
    if kind == "ipo":
        return _mean((h - 1 / (2 * beta)).square(), count)
    losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    return _mean(losses, count)


# --- 3. demo ---------------------------------------------------------------------------------------------

def main(pairs: int, beta: float, seed: int) -> None:
    if not 100 <= pairs <= 10_000_000 or not 0 < beta < 1e6 or not 0 <= seed < 2**32:
        raise ValueError("--pairs must be in 100 .. 10000000, --beta in (0, 1e6) and --seed in 0 .. 2^32 - 1, got "
                         f"{pairs}, {beta} and {seed}")
    generator, N = torch.Generator().manual_seed(seed), 8
    reward = torch.randn(N, generator=generator)  # of eight answers to one prompt; only the labeller knows it
    reference = torch.randn(N, generator=generator).log_softmax(0)
    optimum = (reference + reward / beta).softmax(0)
    y, z = torch.multinomial(reference.exp().expand(pairs, N), 2, generator=generator).T  # two different answers each
    swap = torch.rand(pairs, generator=generator) > torch.sigmoid(reward[y] - reward[z])
    chosen, rejected = torch.where(swap, z, y), torch.where(swap, y, z)
    train, held_out = slice(0, pairs // 2), slice(pairs // 2, pairs)

    def fit(loss, start: Tensor) -> Tensor:
        table = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([table], lr=0.1)
        for step in range(400):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 400)
            optimizer.zero_grad()
            loss(table).backward()
            optimizer.step()
        return table.detach()

    learned = fit(lambda r: reward_loss(r[chosen[train]], r[rejected[train]]), torch.zeros(N))
    by_reward = (reference + learned / beta).softmax(0)

    def loss_of_policy(logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(0)
        return dpo_loss(log_probs[chosen[train]], log_probs[rejected[train]],
                        reference[chosen[train]], reference[rejected[train]], beta)

    by_dpo = fit(loss_of_policy, reference).softmax(0)
    seen, best = (calibration(r[chosen[held_out]], r[rejected[held_out]]) for r in (learned, reward))
    print(f"reward model from {pairs // 2} noisy pairs: held-out accuracy {seen.accuracy:.3f} (the labeller's own "
          f"reward: {best.accuracy:.3f}), calibration error {seen.error:.3f}")
    print("answer      " + "".join(f"{i:8}" for i in range(N)))
    for name, row in (("reward", reward), ("reference", reference.exp()), ("optimum", optimum),
                      ("reward model", by_reward), ("DPO", by_dpo)):
        print(f"{name:12}" + "".join(f"{value:8.3f}" for value in row))
    same, distance = (by_dpo - by_reward).abs().sum() / 2, (by_dpo - optimum).abs().sum() / 2
    print(f"total variation of DPO to the labeller's optimum {distance:.3f} (pairs are noisy), to the reward model's "
          f"{same:.4f} (the same likelihood): " + ("OK, below 0.01" if same < 0.01 else "WRONG, expected below 0.01"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--pairs", type=int, default=4000,
                        help="comparisons, half of them held out (default %(default)s)")
    parser.add_argument("--beta", type=float, default=0.5,
                        help="price of leaving the reference (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of rewards, answers and labels (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
