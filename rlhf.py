"""RLHF: a language model learns from a reward. PPO, GRPO, REINFORCE leave-one-out.   Ouyang et al. 2022 (2203.02155)

Idea      The model answers, a reward model says how good that was, and what did better than expected is made likelier.
          The reward is learned from few comparisons and right only near the answers that were compared: optimised
          naively it is overfitted. So leaving the reference model, which was trained on demonstrations, costs.
Formula   SFT      -sum_t log p(y_t | x, y_<t) over response tokens alone
          reward   r_t = -beta (log p(y_t) - log q(y_t)) + [t last] score(x, y),    p policy, q reference
          GAE      A_t = sum_l (gamma lambda)^l delta_{t+l},   delta_t = r_t + gamma V_{t+1} - V_t
          PPO      -mean min(w_t A_t, clip(w_t, 1 - c, 1 + c) A_t),   w_t = p_new(y_t) / p_old(y_t)
          GRPO     PPO's, A = (r - mean) / std over the G answers to a prompt; + beta (q/p - 1 - log q/p) in the loss
          RLOO     -A log p(y),   A = r - mean of the other answers' rewards
Shapes    tokens, mask, log-probs, rewards, values (B, T); scores (B,); groups (N, G). What is about a token stands at
          its place: log_probs[b, t] = log p(token t | tokens before), values[b, t] = what is expected before token t.
          mask: 1.0 at response tokens, else 0.0. Rows are padded left (``padding`` counts) or right (the mask ends).

            reward   value  reference  pairs  online  models kept (trained)  passes per answer, F = one forward
  SFT          -       -        -        -      -     1 (1)                  3 F
  reward model -       -        -       yes     -     1 (1)                  3 F
  PPO         yes     yes      yes       -     yes    4 (2)                  write, 4 F to judge, 6 F per epoch
  GRPO, RLOO  yes      -       yes       -     yes    3 (1)                  write, 3 F to judge, 3 F per epoch
  DPO          -        -       once     yes     -     1 (1)                  3 F, and F once for the reference
  best of n   yes      -        -        -     yes    2 (0)                  n times: write, F to judge

What makes PPO work (settings of ``PPOConfig`` and functions; each is tested to change something):
   1 the KL penalty is paid token by token                     7 advantages are whitened over all response tokens
   2 the score comes at the last response token                8 ratios start at 1: old log-probs without dropout, at
   3 scores are clipped: no answer rules the batch               the sampler's temperature
   4 an answer without an end gets a fixed, low score,         9 ratios are clipped
   5 or, if only the rollout was cut there, none: the         10 values are clipped
     critic's value stands for what was to come               11 shuffled minibatches, several times, until the KL
   6 rewards are scaled to variance 1, their mean kept           divergence from the old policy says enough
     (by default not: the critic starts as the reward         12 beta adapts, so that KL from the reference stays
     model, in its units)                                        near a target
Omits     reward models and DPO: preference.py. Gradients of pre-training mixed in (PPO-ptx), entropy bonuses, rewards
          of single steps, a critic that shares the policy's blocks.
Run       python rlhf.py                    PPO on a learned reward, without the penalty and with it: half a minute
          python rlhf.py --kl 0             without alone: the learned reward climbs, the labeller's own falls
          python rlhf.py --plot rlhf.png    both against KL (needs matplotlib)
          Ends with "kl 0.2, ... nats away: ..."
Test      pytest tests/test_rlhf.py
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# --- 1. log-probs and means: where one token off is the commonest mistake --------------------------------

def shift_rows(x: Tensor, by: Tensor) -> Tensor:
    """Row b moved right by ``by[b]`` places, to the left where that is negative; what leaves at one end enters at the
    other: x (B, T), by (B,) -> (B, T)."""
    places = torch.arange(x.size(1), device=x.device) - by[:, None]  # (B, T)
    return x.gather(1, places % x.size(1))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of every position, in fp32 or finer: logits (B, T, V), targets (B, T) -> (B, T)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def aligned_log_probs(model: nn.Module, tokens: Tensor, padding: Tensor | None = None, temperature: float = 1.0,
                      losses: Callable[[Tensor, Tensor], Tensor] = token_losses) -> Tensor:
    """log p(token t | tokens before it) at place t, in nats, with gradients: tokens (B, T) -> (B, T).

    A row's first token has none: 0, and so has padding on the left. What stands behind a row's last real token may be
    any valid id; its values mean nothing, and the mask has to leave them out.

    Args:
        padding: (B,), how many tokens on the left are none; positions are counted from the first real one.
        temperature: that the tokens were sampled at: log softmax(logits / temperature).
        losses: (logits, targets) -> -log p. For a model cut over its vocabulary
            ``lambda logits, targets: vocabulary_cross_entropy(logits, targets, V, group)``.
    """
    if tokens.dim() != 2 or tokens.size(1) < 2 or padding is not None and padding.shape != tokens.shape[:1]:
        raise ValueError("tokens must be (B, T), T at least 2, and padding (B,), got "
                         f"{tuple(tokens.shape)} and {None if padding is None else tuple(padding.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}: greedy answers have no log-probs")
    if padding is not None:  # a causal model needs no mask for what stands on the right
        tokens = shift_rows(tokens, -padding)
    logits = model(tokens[:, :-1])  # (B, T - 1, V)
    if temperature != 1:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    log_probs = F.pad(-losses(logits, tokens[:, 1:]), (1, 0))  # (B, T)
    if padding is None:
        return log_probs
    real = torch.arange(tokens.size(1), device=tokens.device) > padding[:, None]  # (B, T)
    return shift_rows(log_probs, padding) * real


def masked_mean(x: Tensor, mask: Tensor, count: float | Tensor | None = None) -> Tensor:
    """Mean of x (B, T) where mask is 1; 0 if it is nowhere.

    ``count``: what to divide by instead, the tokens of all ranks together: then the ranks' results add up to the mean.
    """
    _same_shape(x=x, mask=mask)
    return (x * mask).sum() / (mask.sum().clamp(min=1) if count is None else count)


def _same_shape(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        raise ValueError("shapes must be equal, got "
                         + ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()))


def last_place(mask: Tensor) -> Tensor:
    """Where each row's mask is 1 for the last time: (B, T) -> (B,); T - 1 for a row where it never is."""
    return mask.size(1) - 1 - mask.flip(1).argmax(1)


def response_loss(log_probs: Tensor, mask: Tensor, count: float | Tensor | None = None) -> Tensor:
    """Supervised fine-tuning: mean of -log p over response tokens, (B, T) each -> scalar; ``count`` as above."""
    return -masked_mean(log_probs, mask, count)


def kl_estimates(log_probs: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Estimates k1, k2, k3 of KL(p || q) from samples of p, each of the shape of log p and log q.   Schulman 2020

    k1 = log p/q is unbiased and noisy; k2 = k1^2 / 2 is biased; k3 = q/p - 1 - log q/p is unbiased and never negative.
    """
    k1 = log_probs - reference
    return k1, k1.square() / 2, torch.expm1(-k1) + k1


# --- 2. from scores to advantages --------------------------------------------------------------------------

def per_token_reward(scores: Tensor, log_probs: Tensor, reference: Tensor, mask: Tensor,
                     kl_coefficient: float) -> Tensor:
    """-beta log(p/q) at every response token, and the answer's score (B,) at its last one -> (B, T).
    Ziegler et al. 2019, equation 2, token by token

    Raises ValueError for an answer without a token and for a score that is not finite, naming rows.
    """
    _same_shape(log_probs=log_probs, reference=reference, mask=mask)
    _same_shape(scores=scores, rows=mask[:, 0])
    _refuse_answers(scores, mask)
    rewards = -kl_coefficient * (log_probs - reference) * mask
    return rewards.scatter_add(1, last_place(mask)[:, None], scores[:, None].to(rewards.dtype))


def _refuse_answers(scores: Tensor, mask: Tensor) -> None:
    for rows, what in ((mask.sum(1) == 0, "no response token"), (~scores.isfinite(), "a score that is not finite")):
        if rows.any():
            raise ValueError(f"rows {rows.nonzero()[:10, 0].tolist()} have {what}")


def naive_gae(rewards: Tensor, values: Tensor, mask: Tensor, terminated: Tensor, bootstrap: Tensor,
              gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """``gae`` by its sum, a double loop over each row's response tokens."""
    advantages = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        tokens = mask[b].nonzero()[:, 0].tolist()
        r, V = rewards[b, tokens], [*values[b, tokens], 0.0 if terminated[b] else bootstrap[b]]
        for t in range(len(tokens)):
            advantages[b, tokens[t]] = sum((gamma * lam) ** (s - t) * (r[s] + gamma * V[s + 1] - V[s])
                                           for s in range(t, len(tokens)))
    return advantages, (advantages + values) * mask


def gae(rewards: Tensor, values: Tensor, mask: Tensor, terminated: Tensor, bootstrap: Tensor,
        gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: (advantages, returns = advantages + values), (B, T) each, 0 outside the mask.
    Schulman et al. 2015 (1506.02438), equations 11 and 16

    Args:
        rewards, values: (B, T); values[b, t] is what the critic expects before token t.
        terminated: (B,) bool. After an answer's own end nothing follows: V = 0.
        bootstrap: (B,), the critic's value after the last token, for answers that would have gone on.
    """
    _same_shape(rewards=rewards, values=values, mask=mask)
    _same_shape(terminated=terminated, bootstrap=bootstrap, rows=mask[:, 0])
    advantages, following = torch.zeros_like(rewards), torch.zeros_like(bootstrap)
    next_value = bootstrap.masked_fill(terminated, 0.0)
    for t in reversed(range(rewards.size(1))):
        is_response = mask[:, t] > 0
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * following
        advantages[:, t] = advantage.where(is_response, 0)
        following = advantage.where(is_response, following)
        next_value = values[:, t].where(is_response, next_value)
    return advantages, (advantages + values) * mask


def whiten(x: Tensor, mask: Tensor, keep_mean: bool = False,
           sum_over_ranks: Callable[[Tensor], Tensor] = lambda total: total) -> Tensor:
    """x (B, T) to mean 0 and variance 1 over the mask; 0 outside it. ``keep_mean``: to variance 1 alone."""
    _same_shape(x=x, mask=mask)
    count, total = sum_over_ranks(torch.stack((mask.sum().to(x.dtype), (x * mask).sum())))
    mean = total / count.clamp(min=1)
    variance = sum_over_ranks(((x - mean).square() * mask).sum()) / count.clamp(min=1)
    return ((x - mean) * (variance + 1e-8).rsqrt() + (mean if keep_mean else 0.0)) * mask


class AdaptiveKL:
    """The penalty's coefficient, raised while KL is above its target, lowered below.   Ziegler et al. 2019, 2.2"""

    def __init__(self, coefficient: float, target: float, horizon: float):
        if not (coefficient > 0 and target > 0 and horizon > 0):
            raise ValueError("AdaptiveKL needs positive coefficient, target and horizon, got "
                             f"{coefficient}, {target} and {horizon}")
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl: float, answers: int) -> float:
        """The next coefficient, at most 20% off, after so many answers of a mean KL(policy || reference) in nats."""
        if not (math.isfinite(kl) and 0 <= answers <= self.horizon):
            raise ValueError(f"kl must be finite and answers in 0 .. {self.horizon}, got {kl} and {answers}")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * answers / self.horizon
        return self.coefficient


# --- 3. losses: minimised, so the objective's sign is turned -----------------------------------------------

def reinforce_loss(log_probs: Tensor, advantages: Tensor, mask: Tensor,
                   count: float | Tensor | None = None) -> Tensor:
    """Mean over answers of -A log p(answer): its gradient at the policy that answered is the policy gradient.
    Williams 1992; with ``rloo_advantages``: Ahmadian et al. 2024 (2402.14740).

    log_probs, mask (B, T); advantages (B,); ``count`` answers on all ranks.
    """
    _same_shape(log_probs=log_probs, mask=mask)
    _same_shape(advantages=advantages, rows=mask[:, 0])
    return -(advantages * (log_probs * mask).sum(1)).sum() / (max(1, len(advantages)) if count is None else count)


def ppo_loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2,
             count: float | Tensor | None = None) -> Tensor:
    """Clipped surrogate: a step gains nothing from ratios beyond 1 +- clip.   Schulman et al. 2017, equation 7

    new, old log-probs, advantages, mask: (B, T) -> scalar, a mean over response tokens.
    """
    _same_shape(new=new, old=old, advantages=advantages, mask=mask)
    ratio = ((new - old) * mask).exp()  # outside the mask anything may stand, and exp of it overflow
    return -masked_mean(torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages), mask, count)


def value_loss(new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float | None = 0.2,
               count: float | Tensor | None = None) -> Tensor:
    """Half the mean squared error of values, the larger of two: as they are, and kept within ``clip`` of the old ones.

    new, old, returns, mask: (B, T) -> scalar. The clipping is not in PPO's paper, but in its authors' code.
    """
    _same_shape(new=new, old=old, returns=returns, mask=mask)
    error = (new - returns).square()
    if clip is not None:
        error = torch.maximum(error, (old + (new - old).clamp(-clip, clip) - returns).square())
    return 0.5 * masked_mean(error, mask, count)


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """Rewards (N, G) of G answers to each of N prompts, less the group's mean, over its standard deviation; 0 where all
    are equal.   Shao et al. 2024 (GRPO, 2402.03300), section 4.1.2

    ``scale=False`` does not divide: else prompts that are nearly always or never solved weigh most.   Liu et al. 2025
    (Dr. GRPO, 2503.20783)
    """
    centred = _less_mean(rewards)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-6) if scale else centred


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Rewards (N, G), each less the mean of the G - 1 others: a baseline that does not depend on the answer itself,
    so the gradient stays unbiased.   Kool et al. 2019; Ahmadian et al. 2024"""
    return _less_mean(rewards) * rewards.size(1) / (rewards.size(1) - 1)


def _less_mean(rewards: Tensor) -> Tensor:
    """Rows less their means; where all are equal exactly 0: rounded, 0.1 less the mean of three times 0.1 is not."""
    if rewards.dim() != 2 or rewards.size(1) < 2 or not rewards.isfinite().all():
        raise ValueError("rewards must be finite and (N, G) with G at least 2 answers to compare, got shape "
                         f"{tuple(rewards.shape)}" + ("" if rewards.isfinite().all() else ", some not finite"))
    rewards = rewards - rewards[:, :1]
    return rewards - rewards.mean(1, keepdim=True)


def grpo_loss(new: Tensor, old: Tensor, reference: Tensor | None, advantages: Tensor, mask: Tensor, clip: float = 0.2,
              kl: float = 0.04, length: str = "sequence", max_length: int | None = None,
              count: float | Tensor | None = None) -> Tensor:
    """PPO's clipped objective with one advantage per answer, and KL in the loss.   Shao et al. 2024, equations 3 and 4

    Args:
        new, old, reference: log-probs (B, T); reference may be None if ``kl`` is 0.
        advantages: (B,), from ``group_advantages``.
        kl: coefficient of k3. (Its value estimates KL without bias; its gradient does so only for p = q.)
        length: "sequence" divides an answer's sum by its own length, as the paper, which makes long bad answers cheap;
            "constant" divides all by ``max_length``, the most that may be generated (Dr. GRPO).
        count: answers on all ranks together; None: these are all.
    """
    _same_shape(new=new, old=old, mask=mask, **({} if reference is None else {"reference": reference}))
    _same_shape(advantages=advantages, rows=mask[:, 0])
    if length not in ("sequence", "constant") or length == "constant" and not max_length or kl and reference is None:
        raise ValueError('length must be "sequence", or "constant" with max_length, and kl needs the reference, got '
                         f"{length!r}, {max_length}, kl {kl}, reference {'missing' if reference is None else 'given'}")
    A, ratio = advantages[:, None], ((new - old) * mask).exp()
    objective = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    if kl:
        objective = objective - kl * kl_estimates(new * mask, reference * mask)[2]
    lengths = mask.sum(1).clamp(min=1) if length == "sequence" else max_length
    return -((objective * mask).sum(1) / lengths).sum() / (max(1, len(mask)) if count is None else count)


def best_of_n(scores: Tensor, keep: int = 1) -> Tensor:
    """Rejection sampling: places of the ``keep`` best of G answers, best first: scores (N, G) -> (N, keep).

    The best of n is log n - (n - 1) / n nats, at most, from the model that wrote them.   Stiennon et al. 2020, G.3
    """
    if scores.dim() != 2 or not 1 <= keep <= scores.size(1) or not scores.isfinite().all():
        raise ValueError(f"scores must be finite and (N, G), keep in 1 .. G, got {tuple(scores.shape)} and {keep}"
                         + ("" if scores.isfinite().all() else ", some not finite"))
    return scores.topk(keep).indices


# --- 4. PPO's update ---------------------------------------------------------------------------------------

@dataclass
class PPOConfig:
    """Settings of ``ppo_update``; beta, gamma and the ratio's clip as Ouyang et al. 2022, appendix C.4."""
    kl_coefficient: float = 0.02  # beta, per nat; ``AdaptiveKL`` may move it between updates
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float | None = 0.2  # None: values are not clipped
    value_weight: float = 0.5  # of the critic's loss beside the policy's: matters where both share a gradient norm
    score_clip: float | None = 10.0  # scores are limited to -score_clip .. score_clip
    # Answers that were cut off: "judged" as they stand; a number: this score instead; "bootstrapped": no score, as they
    # would have gone on, and the critic's value after the last token stands for what was to come.
    truncated: str | float = "judged"
    scale_rewards: bool = False
    whiten_advantages: bool = True
    epochs: int = 4  # passes over each batch of answers
    minibatches: int = 4  # optimizer steps per epoch
    stop_kl: float | None = 0.05  # an update ends at so many nats per token between old and new policy; None: never
    max_gradient: float = 1.0  # norm, over the parameters of both models
    temperature: float = 1.0  # that the answers were sampled at

    def __post_init__(self):
        if isinstance(self.truncated, str) and self.truncated not in ("judged", "bootstrapped"):
            raise ValueError(f'truncated must be "judged", "bootstrapped" or a score, got {self.truncated!r}')
        limits = self.temperature, self.max_gradient, self.score_clip, self.value_clip, self.stop_kl
        if (min(self.epochs, self.minibatches) < 1 or not 0 < self.clip < 1 or not 0 <= self.gamma <= 1
                or not 0 <= self.lam <= 1 or not all(limit is None or limit > 0 for limit in limits)):
            raise ValueError("epochs and minibatches must be at least 1, clip in (0, 1), gamma and lam in [0, 1], "
                             f"temperature, max_gradient and other limits positive, got {self}")


@dataclass
class Experience:
    """B answers of one policy, and what was thought of them."""
    tokens: Tensor  # (B, T): prompt and response, padded on either side
    mask: Tensor  # (B, T): 1.0 at response tokens
    log_probs: Tensor  # (B, T) under the policy that answered: ``aligned_log_probs``, dropout off, at its temperature
    reference: Tensor  # (B, T) under the reference, likewise
    scores: Tensor  # (B,) from a reward model, or from anything else
    terminated: Tensor  # (B,) bool: ended by itself, not at the length limit
    padding: Tensor | None = None  # (B,), on the left


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout) inside; afterwards every module is back in the mode that it had."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


@torch.no_grad()
def ppo_targets(value: nn.Module, batch: Experience, config: PPOConfig,
                sum_over_ranks: Callable[[Tensor], Tensor] = lambda total: total) -> tuple[Tensor, Tensor, Tensor]:
    """(advantages, returns, values), (B, T) each, by the critic as it is: a preference.RewardModel."""
    b, c, bootstrapped = batch, config, config.truncated == "bootstrapped"
    _refuse_answers(b.scores, b.mask)  # before what is infinite is clipped
    scores = b.scores if c.score_clip is None else b.scores.clamp(-c.score_clip, c.score_clip)
    if c.truncated != "judged":
        scores = scores.masked_fill(~b.terminated, 0.0 if bootstrapped else c.truncated)
    rewards = per_token_reward(scores, b.log_probs, b.reference, b.mask, c.kl_coefficient)
    if c.scale_rewards:
        rewards = whiten(rewards, b.mask, True, sum_over_ranks)
    with evaluating(value):
        after = value(b.tokens, b.padding)  # (B, T): values[:, 1:] are the same numbers
    values = F.pad(after[:, :-1], (1, 0)) * b.mask
    advantages, returns = gae(rewards, values, b.mask, b.terminated | (not bootstrapped),
                              after.gather(1, last_place(b.mask)[:, None])[:, 0], c.gamma, c.lam)
    if c.whiten_advantages:
        advantages = whiten(advantages, b.mask, False, sum_over_ranks)
    return advantages, returns, values


def ppo_update(policy: nn.Module, value: nn.Module, optimizer: torch.optim.Optimizer, batch: Experience,
               config: PPOConfig, generator: torch.Generator | None = None, reduce: Callable[[], None] = lambda: None,
               sum_over_ranks: Callable[[Tensor], Tensor] = lambda total: total, rows: tuple[int, int] | None = None,
               losses: Callable[[Tensor, Tensor], Tensor] = token_losses,
               clip: Callable[[float], Tensor] | None = None) -> dict[str, float]:
    """Learn from one batch of answers: epochs of shuffled minibatches, until KL(old || new) says enough.

    Several processes have answers of their own, any number each; all get the parameters and the statistics of one
    process that has them all.

    Args:
        policy, value: a language model and its critic, a preference.RewardModel. Dropout is off in both.
        optimizer: over the parameters of both.
        generator: shuffles; in the same state on every process.
        reduce: called after each backward, to sum gradients over processes: the ``finish`` of ONE
            ``parallel.DataParallel(nn.ModuleList([policy, value]), reduction="sum")``, or ``team.Trained``'s.
        sum_over_ranks: a tensor -> its sum over processes, on each.
        rows: (number of the first answer that is here, number of answers everywhere); None: all are here.
        losses: as of ``aligned_log_probs``.
        clip: most -> the gradient's norm, which it has scaled down to ``most``; None: clip_grad_norm_ of the
            optimizer's parameters. Where models are cut or divided, their own, such as ``zero.ZeRO.clip_grad_norm``.

    Returns, of the batch: "kl" to the reference (nats per answer), "score", "length", "truncated" (share), "entropy"
    (nats per token, an estimate), "explained_variance" of the returns by the critic; means over the steps made:
    "policy_loss", "value_loss", "clipped" (share of ratios), "grad_norm" (before clipping); and "steps", how many,
    and "step_kl", KL(old || new) per token where it ended.

    Raises ValueError for answers without tokens or finite scores, by row, and for more minibatches than answers.
    """
    first, everywhere = rows or (0, len(batch.tokens))
    if config.minibatches > everywhere:
        raise ValueError(f"{everywhere} answers cannot be cut into {config.minibatches} minibatches")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    clip = clip or (lambda most: nn.utils.clip_grad_norm_(parameters, most))
    targets = ppo_targets(value, batch, config, sum_over_ranks)
    steps = []
    with evaluating(policy), evaluating(value):
        for part, count in _minibatches(batch.mask, config, generator, sum_over_ranks, first, everywhere):
            loss, measured = None, batch.log_probs.new_zeros(4)
            if len(batch.tokens):  # a process that has no answers takes part in sums and step all the same
                loss, measured = _ppo_minibatch(policy, value, batch, targets, part, count, config, losses)
            *seen, step_kl = sum_over_ranks(measured).tolist()
            if config.stop_kl is not None and step_kl > config.stop_kl:
                break
            optimizer.zero_grad()
            if loss is not None:
                loss.backward()
            reduce()
            steps.append([*seen, clip(config.max_gradient).item()])
            optimizer.step()
    optimizer.zero_grad()
    means = torch.tensor(steps or [[math.nan] * 4]).mean(0).tolist()
    return (_batch_statistics(batch, *targets[1:], sum_over_ranks)
            | dict(zip(("policy_loss", "value_loss", "clipped", "grad_norm"), means))
            | {"step_kl": step_kl, "steps": len(steps)})


def _minibatches(mask: Tensor, config: PPOConfig, generator: torch.Generator | None, sum_over_ranks: Callable,
                 first: int, everywhere: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(which of the rows here belong to a minibatch, response tokens in all of it), the same on any number of
    processes: rows are shuffled by their number among all."""
    for _ in range(config.epochs):
        parts = torch.randperm(everywhere, generator=generator).tensor_split(config.minibatches)
        mine = [(part[(part >= first) & (part < first + len(mask))] - first).to(mask.device) for part in parts]
        yield from zip(mine, sum_over_ranks(torch.stack([mask[part].sum() for part in mine])))


def _ppo_minibatch(policy: nn.Module, value: nn.Module, batch: Experience, targets: tuple[Tensor, ...],
                   part: Tensor, count: Tensor, config: PPOConfig, losses: Callable) -> tuple[Tensor, Tensor]:
    """(loss, what was measured: policy loss, value loss, share of ratios clipped, KL(old || new) per token)."""
    counts = len(part) > 0
    if not counts:  # one that does not count: where weights are gathered for each layer, all have to run through them
        part = part.new_zeros(1)
    longest = int(last_place(batch.mask[part]).max()) + 1  # what all rows have behind it is padding
    tokens, mask, old, advantages, returns, values = (
        x[part, :longest] for x in (batch.tokens, batch.mask * counts, batch.log_probs, *targets))
    padding = None if batch.padding is None else batch.padding[part]
    new = aligned_log_probs(policy, tokens, padding, config.temperature, losses)
    policy_loss = ppo_loss(new, old, advantages, mask, config.clip, count)
    critic_loss = value_loss(value.values(tokens, padding), values, returns, mask, config.value_clip, count)
    with torch.no_grad():
        k1, _, k3 = kl_estimates(old * mask, new * mask)
        clipped = masked_mean((torch.expm1(-k1).abs() > config.clip).to(mask.dtype), mask, count)
        measured = torch.stack([policy_loss, critic_loss, clipped, masked_mean(k3, mask, count)]).to(old.dtype)
    return policy_loss + config.value_weight * critic_loss, measured


def _batch_statistics(batch: Experience, returns: Tensor, values: Tensor,
                      sum_over_ranks: Callable) -> dict[str, float]:
    mask = batch.mask
    sums = [torch.ones_like(batch.scores), mask, (batch.log_probs - batch.reference) * mask, batch.scores,
            ~batch.terminated, -batch.log_probs * mask, returns, returns.square(), (returns - values).square()]
    answers, tokens, kl, score, truncated, entropy, total, squares, errors = sum_over_ranks(
        torch.stack([x.sum().to(batch.log_probs.dtype) for x in sums])).tolist()
    variance = squares - total**2 / tokens
    return {"kl": kl / answers, "score": score / answers, "length": tokens / answers, "truncated": truncated / answers,
            "entropy": entropy / tokens, "explained_variance": 1 - errors / variance if variance > 0 else math.nan}


if __name__ == "__main__":
    try:
        from overoptimisation import main  # PPO against a reward that is learned, with and without the penalty
    except ImportError as error:
        print(f"rlhf.py: {error}: copy that file beside this one, or install that package", file=sys.stderr)
        sys.exit(2)
    main("rlhf.py")
