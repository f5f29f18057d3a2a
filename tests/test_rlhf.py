"""Log-probs on padded rows against one row at a time, losses and advantages against the papers' equations term by term,
gradients against those of the expected reward where it can be enumerated, PPO's update on several ranks against one."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from conftest import run_ranks

from gpt import GPT, GPTConfig
from llama import Llama, LlamaConfig
from preference import RewardModel
from rlhf import (AdaptiveKL, Experience, PPOConfig, aligned_log_probs, best_of_n, gae, group_advantages, grpo_loss,
                  kl_estimates, last_place, masked_mean, naive_gae, per_token_reward, ppo_loss, ppo_targets, ppo_update,
                  reinforce_loss, response_loss, rloo_advantages, value_loss, whiten)

ROWS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]


def small(kind="gpt", seed=0, dropout=0.0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "gpt":
        return GPT(GPTConfig(11, 12, 2, 2, 8, dropout=dropout), generator=generator).double()
    return Llama(LlamaConfig(11, 12, 2, 2, 1, 8, 16, rope_base=1e4), generator=generator).double()


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ragged_mask(B=4, T=7):
    """Responses that begin and end anywhere, the last one with a hole, as of two turns."""
    mask = torch.zeros(B, T, dtype=torch.float64)
    for b, (first, last) in enumerate([(2, 6), (1, 1), (3, 5), (1, 6)][:B]):
        mask[b, first:last + 1] = 1
    mask[-1, 3:5] = 0
    return mask


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)  # float64: a few hundred roundings


def assert_same_with_gradients(ours, theirs, leaves):
    assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)):
        assert_close(a, b)


# --- log-probs --------------------------------------------------------------------------------------------------------

def alone(model, row, temperature=1.0):
    """log p of every token of a row, from the whole softmax, one place at a time."""
    logits = model(torch.tensor([row]))[0] / temperature
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return torch.stack([torch.zeros((), dtype=p.dtype), *(p[t - 1, row[t]].log() for t in range(1, len(row)))])


@pytest.mark.parametrize("padding_on", ["left", "right", "both"])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_log_probs_of_padded_rows_match_one_row_at_a_time(kind, padding_on):
    model, lefts = small(kind), {"left": [2, 5, 0], "right": [0, 0, 0], "both": [1, 3, 0]}[padding_on]
    tokens = torch.full((3, 7), 10)
    for b, (row, left) in enumerate(zip(ROWS, lefts)):
        tokens[b, left:left + len(row)] = torch.tensor(row)
    padding = None if padding_on == "right" else torch.tensor(lefts)
    log_probs = aligned_log_probs(model, tokens, padding, temperature=0.7)
    places = [slice(left, left + len(row)) for row, left in zip(ROWS, lefts)]
    expected = [alone(model, row, 0.7) for row in ROWS]
    for b in range(3):
        assert_close(log_probs[b, places[b]], expected[b])
        assert (log_probs[b, :lefts[b]] == 0).all()
    ours = torch.autograd.grad(sum(log_probs[b, places[b]].sum() for b in range(3)), list(model.parameters()))
    theirs = torch.autograd.grad(sum(row.sum() for row in expected), list(model.parameters()))
    for a, b in zip(ours, theirs):
        assert_close(a, b)


def test_log_probs_of_left_padded_rows_match_transformers(tmp_path):
    from transformers import GPT2LMHeadModel

    model = small().float().eval()
    model.save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    padding = torch.tensor([2, 5, 0])
    tokens = torch.tensor([[0] * (7 - len(row)) + row for row in ROWS])
    real = torch.arange(7) >= padding[:, None]
    with torch.no_grad():
        logits = theirs(tokens, attention_mask=real.long(),
                        position_ids=(torch.arange(7) - padding[:, None]).clamp(min=0)).logits
        expected = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0] * real[:, :-1]
        torch.testing.assert_close(aligned_log_probs(model, tokens, padding)[:, 1:], expected, atol=1e-5, rtol=0)  # fp32


def test_log_probs_of_a_bf16_model_are_fp32_and_temperature_matters():
    tokens = torch.tensor([ROWS[0]])
    assert aligned_log_probs(small().bfloat16(), tokens).dtype == torch.float32
    assert not torch.equal(aligned_log_probs(small(), tokens), aligned_log_probs(small(), tokens, temperature=2.0))


def test_response_loss_matches_a_loop_and_parts_add_up():
    log_probs, mask = numbers(4, 7), ragged_mask()
    picked = [log_probs[b, t] for b in range(4) for t in range(7) if mask[b, t]]
    assert_close(response_loss(log_probs, mask), -sum(picked) / len(picked))
    parts = sum(response_loss(log_probs[rows], mask[rows], count=mask.sum()) for rows in (slice(3), slice(3, 4), slice(4, 4)))
    assert_close(parts, response_loss(log_probs, mask))
    assert response_loss(log_probs, 0 * mask) == 0


def test_last_place_is_the_last_token_of_the_mask():
    assert last_place(ragged_mask()).tolist() == [6, 1, 5, 6]


def test_kl_estimates_have_the_expectations_that_are_claimed():
    p, q = numbers(9).log_softmax(0), (numbers(9) + 0.3 * numbers(9, seed=1)).log_softmax(0)
    k1, k2, k3 = kl_estimates(p, q)
    kl = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist()))
    assert (p.exp() * k1).sum().item() == pytest.approx(kl, abs=1e-12)
    assert (p.exp() * k3).sum().item() == pytest.approx(kl, abs=1e-12)
    assert abs((p.exp() * k2).sum().item() - kl) > 1e-5 and (k3 >= 0).all() and (k1 < 0).any()
    assert_close(k3, q.exp() / p.exp() - 1 - (q.exp() / p.exp()).log())


# --- rewards and advantages -------------------------------------------------------------------------------------------

def test_per_token_reward_matches_a_loop():
    log_probs, reference, scores, mask = numbers(4, 7), numbers(4, 7, seed=1), numbers(4, seed=2), ragged_mask()
    expected = torch.zeros(4, 7, dtype=torch.float64)
    for b in range(4):
        for t in range(7):
            if mask[b, t]:
                expected[b, t] = -0.3 * (log_probs[b, t] - reference[b, t])
        expected[b, max(t for t in range(7) if mask[b, t])] += scores[b]
    assert_close(per_token_reward(scores, log_probs, reference, mask, 0.3), expected)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_gae_matches_the_double_loop_on_ragged_rows(gamma, lam):
    rewards, values, mask = numbers(4, 7), numbers(4, 7, seed=1), ragged_mask()
    ends = torch.tensor([True, False, False, True]), numbers(4, seed=2)
    for a, b in zip(gae(rewards, values, mask, *ends, gamma, lam), naive_gae(rewards, values, mask, *ends, gamma, lam)):
        assert_close(a, b)


def test_gae_at_lambda_1_is_what_came_less_what_was_expected_and_a_cut_off_answer_goes_on():
    rewards, values, mask = numbers(4, 7), numbers(4, 7, seed=1), ragged_mask()
    terminated, bootstrap = torch.tensor([True, False, True, False]), numbers(4, seed=2)
    advantages, returns = gae(rewards, values, mask, terminated, bootstrap, 1.0, 1.0)
    for b in range(4):
        tokens = [t for t in range(7) if mask[b, t]]
        for i, t in enumerate(tokens):
            came = sum(rewards[b, s] for s in tokens[i:]) + (0 if terminated[b] else bootstrap[b])
            assert_close(returns[b, t], came)
            assert_close(advantages[b, t], came - values[b, t])
    assert (advantages[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()
    assert not torch.equal(advantages, gae(rewards, values, mask, ~terminated, bootstrap, 1.0, 1.0)[0])


def test_whiten_matches_numpy_over_the_mask():
    x, mask = 3 * numbers(4, 7) + 5, ragged_mask()
    inside = x[mask > 0].numpy()
    expected = (inside - inside.mean()) / inside.std()
    np.testing.assert_allclose(whiten(x, mask)[mask > 0].numpy(), expected, atol=1e-8)  # 1e-8 is added to the variance
    np.testing.assert_allclose(whiten(x, mask, keep_mean=True)[mask > 0].numpy(), expected + inside.mean(), atol=1e-8)
    assert (whiten(x, mask)[mask == 0] == 0).all() and (whiten(x, 0 * mask) == 0).all()


def test_adaptive_kl_moves_towards_its_target_at_a_limited_speed():
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    assert controller.update(6.6, 100) == pytest.approx(0.1 * (1 + 0.1 * 100 / 1000))
    assert controller.update(60.0, 100) == pytest.approx(0.101 * 1.02)
    assert controller.update(0.0, 100) == pytest.approx(0.101 * 1.02 * 0.98)
    assert AdaptiveKL(0.1, 6.0, 1000).update(6.0, 100) == 0.1
    for kl, answers in ((math.nan, 10), (6.0, 1001)):  # the second would turn a penalty into a reward at 5,000
        with pytest.raises(ValueError, match=f"got {kl} and {answers}"):
            AdaptiveKL(0.1, 6.0, 1000).update(kl, answers)


def test_group_and_leave_one_out_advantages_match_loops():
    rewards = numbers(3, 4)
    for n, row in enumerate(rewards.tolist()):
        mean, std = np.mean(row), np.std(row)
        for g, r in enumerate(row):
            assert group_advantages(rewards)[n, g].item() == pytest.approx((r - mean) / std, abs=1e-5)  # 1e-6 beside std
            assert group_advantages(rewards, scale=False)[n, g].item() == pytest.approx(r - mean, abs=1e-12)
            others = [x for i, x in enumerate(row) if i != g]
            assert rloo_advantages(rewards)[n, g].item() == pytest.approx(r - np.mean(others), abs=1e-12)
    for equal in (0.5, 0.1, 3.7, 1000.1):  # the rounded mean of three times 1000.1 is off by more than the 1e-6 beside std
        assert (group_advantages(torch.full((2, 3), equal)) == 0).all() and (rloo_advantages(torch.full((2, 3), equal)) == 0).all()
    # divided, a prompt whose rewards differ little weighs as much as any other
    torch.testing.assert_close(group_advantages(rewards), group_advantages(1000 * rewards), atol=1e-5, rtol=0)
    assert_close(group_advantages(1000 * rewards, scale=False), 1000 * group_advantages(rewards, scale=False))


def test_best_of_n_names_the_best_first():
    assert best_of_n(torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]]), 2).tolist() == [[1, 2], [2, 0]]


# --- losses -----------------------------------------------------------------------------------------------------------

def test_ppo_loss_matches_equation_7_with_gradients():
    new, old, A, mask = numbers(4, 7).requires_grad_(), numbers(4, 7, seed=1), numbers(4, 7, seed=2), ragged_mask()
    terms = []
    for b, t in itertools.product(range(4), range(7)):
        if mask[b, t]:
            w = torch.exp(new[b, t]) / torch.exp(old[b, t])
            limited = w if 0.8 <= w <= 1.2 else torch.tensor(0.8 if w < 0.8 else 1.2, dtype=torch.float64)
            terms.append(w * A[b, t] if w * A[b, t] <= limited * A[b, t] else limited * A[b, t])
    expected = -sum(terms) / len(terms)
    assert_same_with_gradients(ppo_loss(new, old, A, mask, 0.2), expected, [new])
    assert ppo_loss(new, old, A, mask, 0.2) != ppo_loss(new, old, A, mask, 10.0)


def test_ppo_at_ratio_1_is_the_vanilla_policy_gradient():
    new, A, mask = numbers(4, 7).requires_grad_(), numbers(4, 7, seed=2), ragged_mask()
    ours = torch.autograd.grad(ppo_loss(new, new.detach(), A, mask), new)[0]
    vanilla = torch.autograd.grad(-(A * new * mask).sum() / mask.sum(), new)[0]
    assert_close(ours, vanilla)


def test_what_stands_outside_the_mask_changes_nothing_and_overflows_nowhere():
    new, old, A, mask = numbers(4, 7), numbers(4, 7, seed=1), numbers(4, 7, seed=2), ragged_mask()
    wild = torch.where(mask > 0, new, 1e6).requires_grad_()
    assert_close(ppo_loss(wild, old, A, mask), ppo_loss(new, old, A, mask))
    loss = grpo_loss(wild, old, old, A[:, 0], mask)
    assert_close(loss, grpo_loss(new, old, old, A[:, 0], mask))
    assert torch.autograd.grad(loss, wild)[0].isfinite().all()


def test_value_loss_matches_a_loop_with_gradients():
    new, old, returns, mask = numbers(4, 7).requires_grad_(), numbers(4, 7, seed=1), numbers(4, 7, seed=2), ragged_mask()
    terms = []
    for b, t in itertools.product(range(4), range(7)):
        if mask[b, t]:
            near = old[b, t] + max(-0.2, min(0.2, (new - old)[b, t].item()))
            if abs((new - old)[b, t]) < 0.2:
                near = new[b, t]
            terms.append(max((new[b, t] - returns[b, t]) ** 2, (near - returns[b, t]) ** 2, key=lambda x: x.item()) / 2)
    assert_same_with_gradients(value_loss(new, old, returns, mask, 0.2), sum(terms) / len(terms), [new])
    assert_close(value_loss(new, old, returns, mask, None), masked_mean((new - returns) ** 2, mask) / 2)


@pytest.mark.parametrize("length", ["sequence", "constant"])
def test_grpo_loss_matches_equations_3_and_4_with_gradients(length):
    new, old, q, A = numbers(4, 7).requires_grad_(), numbers(4, 7, seed=1), numbers(4, 7, seed=2), numbers(4, seed=3)
    mask, total = ragged_mask(), 0
    for b in range(4):
        answer = 0
        for t in range(7):
            if mask[b, t]:
                w = torch.exp(new[b, t] - old[b, t])
                gain = min(w * A[b], w.clamp(0.8, 1.2) * A[b])
                ratio = torch.exp(q[b, t]) / torch.exp(new[b, t])
                answer = answer + gain - 0.04 * (ratio - torch.log(ratio) - 1)
        total = total - answer / (mask[b].sum() if length == "sequence" else 7) / 4
    ours = grpo_loss(new, old, q, A, mask, length=length, max_length=7)
    assert_same_with_gradients(ours, total, [new])
    assert grpo_loss(new, old, q, A, mask, kl=0.0) == grpo_loss(new, old, None, A, mask, kl=0.0) != grpo_loss(new, old, q, A, mask)


def test_with_a_constant_length_every_token_of_every_answer_pulls_equally():
    log_probs, mask = numbers(4, 7).requires_grad_(), ragged_mask()
    A = torch.ones(4, dtype=torch.float64)
    pull = {length: torch.autograd.grad(grpo_loss(log_probs, log_probs.detach(), None, A, mask, kl=0, length=length,
                                                  max_length=6), log_probs)[0] for length in ("sequence", "constant")}
    assert_close(pull["constant"], -mask / 24)
    assert_close(pull["sequence"], -mask / mask.sum(1, keepdim=True) / 4)


def test_losses_of_uneven_parts_add_up_to_the_loss_of_all():
    new, old, A, mask = numbers(4, 7), numbers(4, 7, seed=1), numbers(4, 7, seed=2), ragged_mask()
    parts = slice(3), slice(3, 4), slice(4, 4)
    for loss, count in ((lambda r, n: ppo_loss(new[r], old[r], A[r], mask[r], count=n), mask.sum()),
                        (lambda r, n: value_loss(new[r], old[r], A[r], mask[r], count=n), mask.sum()),
                        (lambda r, n: grpo_loss(new[r], old[r], old[r], A[r, 0], mask[r], count=n), 4),
                        (lambda r, n: reinforce_loss(new[r], A[r, 0], mask[r], n), 4)):
        assert_close(sum(loss(part, count) for part in parts), loss(slice(None), None))


def test_a_count_of_zero_is_a_count_in_all_losses():
    """None alone means that these rows are all."""
    x, mask, count = torch.ones(2, 3), torch.ones(2, 3), torch.tensor(0.0)
    for loss in (response_loss(-x, mask, count), ppo_loss(x, x, x, mask, count=count), value_loss(x, x, x + 1, mask, count=count),
                 grpo_loss(x, x, x, x[:, 0], mask, count=count), reinforce_loss(x, x[:, 0], mask, count)):
        assert not loss.isfinite()


# --- gradients of the expected reward, enumerated ---------------------------------------------------------------------

def test_leave_one_out_gradient_is_that_of_the_expected_reward_of_a_bandit():
    theta, reward = numbers(4).requires_grad_(), numbers(4, seed=1)
    exact = torch.autograd.grad((theta.softmax(0) * reward).sum(), theta)[0]

    def expected_gradient(advantages_of, loss_of):
        p, total = theta.softmax(0).detach(), torch.zeros(4, dtype=torch.float64)
        for pair in itertools.product(range(4), repeat=2):  # all pairs of answers, each with its chance
            actions = torch.tensor(pair)
            advantages = advantages_of(reward[actions][None])[0]
            log_probs = theta.log_softmax(0)[actions][:, None]
            total += p[actions].prod() * torch.autograd.grad(loss_of(log_probs, advantages), theta)[0]
        return -total

    one = torch.ones(2, 1, dtype=torch.float64)
    assert_close(expected_gradient(rloo_advantages, lambda l, A: reinforce_loss(l, A, one)), exact)
    # the group's mean contains the answer itself: (G - 1) / G of the gradient, in its direction
    grpo = expected_gradient(lambda r: group_advantages(r, scale=False),
                             lambda l, A: grpo_loss(l, l.detach(), None, A, one, kl=0))
    assert_close(grpo, exact / 2)
    assert_close(expected_gradient(lambda r: r, lambda l, A: ppo_loss(l, l.detach(), A[:, None], one)), exact)


def test_policy_gradient_of_a_language_model_is_that_of_its_expected_reward():
    model = GPT(GPTConfig(3, 4, 1, 1, 4), generator=torch.Generator().manual_seed(0)).double()
    parameters = list(model.parameters())
    for p in parameters:
        p.data += 0.5 * numbers(*p.shape)
    answers = torch.tensor([[2, a, b, c] for a, b, c in itertools.product(range(3), repeat=3)])  # all of them, to prompt 2
    mask = torch.tensor([0.0, 1, 1, 1], dtype=torch.float64).expand(27, 4)
    reward, log_probs = numbers(27, seed=1), aligned_log_probs(model, answers)
    p = (log_probs * mask).sum(1).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    exact = torch.autograd.grad((p * reward).sum(), parameters, retain_graph=True)
    ours = torch.autograd.grad(-27 * reinforce_loss(log_probs, reward * p.detach(), mask), parameters)
    for a, b in zip(ours, exact):
        assert_close(a, b)


# --- PPO's update -----------------------------------------------------------------------------------------------------

def experience(policy, reference, B=6, T=9, temperature=1.0, left=True):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(11, (B, T), generator=generator)
    padding = torch.randint(0, 3, (B,), generator=generator) if left else None
    lengths, mask = torch.randint(1, 6, (B,), generator=generator), torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        mask[b, 4:4 + int(lengths[b])] = 1
    with torch.no_grad():
        log_probs, before = (aligned_log_probs(model.eval(), tokens, padding, temperature) * mask for model in (policy, reference))
    scores = 3 * torch.randn(B, generator=generator, dtype=torch.float64)
    return Experience(tokens, mask, log_probs, before, scores, torch.arange(B) % 3 != 0, padding)


def models(dropout=0.0):
    policy, reference = small(seed=1, dropout=dropout), small(seed=2)
    return policy, reference, RewardModel(small(seed=3, dropout=dropout), torch.Generator().manual_seed(4))


def updated(config, batch=None, **more):
    """The parameters after one update, and its statistics."""
    policy, reference, value = models()
    batch = batch or experience(policy, reference, temperature=config.temperature)
    optimizer = torch.optim.SGD([*policy.parameters(), *value.parameters()], lr=0.1)
    statistics = ppo_update(policy, value, optimizer, batch, config, torch.Generator().manual_seed(0), **more)
    return torch.cat([p.detach().flatten() for p in (*policy.parameters(), *value.parameters())]), statistics


BASE = dict(kl_coefficient=0.5, score_clip=None, stop_kl=None, max_gradient=1e9, epochs=2, minibatches=2, value_clip=0.01,
            clip=0.01)


@pytest.mark.parametrize("change", [
    dict(kl_coefficient=0.0), dict(score_clip=1.0), dict(truncated=-1.0), dict(truncated="bootstrapped"),
    dict(scale_rewards=True), dict(whiten_advantages=False), dict(clip=0.5), dict(value_clip=None), dict(value_weight=0.1),
    dict(epochs=1), dict(minibatches=3), dict(stop_kl=1e-9), dict(max_gradient=0.01), dict(temperature=0.5),
    dict(gamma=0.9), dict(lam=0.5)], ids=str)
def test_every_detail_of_ppo_changes_what_is_learned(change):
    before, _ = updated(PPOConfig(**BASE))
    after, _ = updated(PPOConfig(**{**BASE, **change}))
    assert (before - after).abs().max() > 1e-6


@pytest.mark.parametrize("left", [True, False])
def test_one_step_of_ppo_matches_the_formulas_put_together(left):
    """One epoch of one minibatch: every part computed by the naive functions, one row at a time."""
    config = PPOConfig(**{**BASE, "epochs": 1, "minibatches": 1, "truncated": "bootstrapped", "score_clip": 1.0})
    policy, reference, value = models()
    batch = experience(policy, reference, left=left)
    found, statistics = updated(config, batch)
    values, after = torch.zeros(6, 9, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    log_probs = torch.zeros(6, 9, dtype=torch.float64)
    predicted = log_probs.clone()
    for b in range(6):
        first, last = int(batch.padding[b]) if left else 0, int(last_place(batch.mask)[b])
        row = batch.tokens[b, first:last + 1].tolist()
        log_probs = log_probs.index_put((torch.full((len(row),), b), torch.arange(first, last + 1)), alone(policy, row))
        seen = value(torch.tensor([row]))[0]
        after[b] = seen[-1].detach()
        predicted = predicted.index_put((torch.full((len(row) - 1,), b), torch.arange(first + 1, last + 1)), seen[:-1])
    log_probs, predicted = log_probs * batch.mask, predicted * batch.mask
    values = predicted.detach()
    rewards = -0.5 * (log_probs.detach() - batch.reference) * batch.mask
    for b in range(6):
        rewards[b, last_place(batch.mask)[b]] += batch.scores[b].clamp(-1, 1) if batch.terminated[b] else 0.0
    advantages, returns = naive_gae(rewards, values, batch.mask, batch.terminated, after, 1.0, 0.95)
    count = batch.mask.sum()
    mean = advantages.sum() / count
    std = (((advantages - mean) ** 2 * batch.mask).sum() / count).sqrt()
    loss = (-((advantages - mean) / std * log_probs * batch.mask).sum() / count
            + 0.5 * 0.5 * (((predicted - returns) ** 2) * batch.mask).sum() / count)
    parameters = [*policy.parameters(), *value.parameters()]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected = torch.cat([(p - (0 if g is None else 0.1 * g)).detach().flatten() for p, g in zip(parameters, gradients)])
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)  # 1e-8 is added to the variance of advantages
    assert statistics["kl"] == pytest.approx(((batch.log_probs - batch.reference) * batch.mask).sum().item() / 6)
    assert statistics["score"] == pytest.approx(batch.scores.mean().item())
    assert statistics["length"] == pytest.approx(count.item() / 6) and statistics["truncated"] == pytest.approx(2 / 6)
    assert statistics["entropy"] == pytest.approx(-(batch.log_probs.sum() / count).item())
    inside = batch.mask > 0
    explained = 1 - ((returns - values)[inside] ** 2).sum() / (returns[inside] - returns[inside].mean()).square().sum()
    assert statistics["explained_variance"] == pytest.approx(explained.item(), abs=1e-9)
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients if g is not None))
    assert statistics["grad_norm"] == pytest.approx(norm, rel=1e-5) and statistics["steps"] == 1  # kept in fp32


def test_ratios_start_at_1_although_the_models_have_dropout():
    policy, reference, value = models(dropout=0.5)
    batch = experience(policy, reference)
    policy.train()
    optimizer = torch.optim.SGD([*policy.parameters(), *value.parameters()], lr=0.0)
    statistics = ppo_update(policy, value, optimizer, batch, PPOConfig(), torch.Generator().manual_seed(0))
    assert statistics["step_kl"] < 1e-12 and statistics["clipped"] == 0
    assert policy.training and all(block.training for block in policy.blocks)
    wrong = dataclasses.replace(batch, log_probs=batch.log_probs - 0.5 * batch.mask)  # as of another temperature
    assert ppo_update(policy, value, optimizer, wrong, PPOConfig(), torch.Generator().manual_seed(0))["steps"] == 0


def test_epochs_end_when_the_policy_has_moved_far_enough():
    assert updated(PPOConfig(**BASE))[1]["steps"] == 4
    statistics = updated(PPOConfig(**{**BASE, "stop_kl": 1e-9}))[1]
    assert statistics["steps"] == 1 and statistics["step_kl"] > 1e-9


def test_the_same_seed_gives_the_same_update_and_another_another_order():
    a, b = updated(PPOConfig(**BASE))[0], updated(PPOConfig(**BASE))[0]
    assert torch.equal(a, b)
    policy, reference, value = models()
    optimizer = torch.optim.SGD([*policy.parameters(), *value.parameters()], lr=0.1)
    ppo_update(policy, value, optimizer, experience(policy, reference), PPOConfig(**BASE), torch.Generator().manual_seed(1))
    assert not torch.equal(a, torch.cat([p.detach().flatten() for p in (*policy.parameters(), *value.parameters())]))


def test_a_large_score_is_clipped_and_an_infinite_one_refused():
    policy, reference, value = models()
    batch = experience(policy, reference)
    plain = ppo_targets(value, batch, PPOConfig(score_clip=2.0))[1]
    batch.scores[0] = 1e30
    assert ppo_targets(value, batch, PPOConfig(score_clip=2.0))[1].abs().max() < 10 and plain.abs().max() < 10
    batch.scores[1] = math.inf
    with pytest.raises(ValueError, match=r"rows \[1\] have a score that is not finite"):
        ppo_targets(value, batch, PPOConfig(score_clip=2.0, truncated=-1.0))


@pytest.mark.parametrize("parts", [(3, 3), (2, 3, 1), (0, 6)], ids=str)
def test_an_update_on_several_ranks_matches_one_process(parts):
    from parallel import DataParallel

    config = PPOConfig(**{**BASE, "minibatches": 4, "max_gradient": 0.5, "stop_kl": 0.5, "scale_rewards": True})
    expected, statistics = updated(config)

    def rank_of(rank):
        policy, reference, value = models()
        first, whole = sum(parts[:rank]), experience(policy, reference)
        here = slice(first, first + parts[rank])
        batch = Experience(*(getattr(whole, field.name)[here] for field in dataclasses.fields(Experience)))
        optimizer = torch.optim.SGD([*policy.parameters(), *value.parameters()], lr=0.1)

        def sum_over_ranks(total):
            total = total.clone()
            dist.all_reduce(total)
            return total

        dp = DataParallel(nn.ModuleList([policy, value]), reduction="sum")
        found = ppo_update(policy, value, optimizer, batch, config, torch.Generator().manual_seed(0), dp.finish,
                           sum_over_ranks, (first, 6))
        return torch.cat([p.detach().flatten() for p in (*policy.parameters(), *value.parameters())]), found

    for parameters, found in run_ranks(len(parts), rank_of):
        torch.testing.assert_close(parameters, expected, atol=1e-10, rtol=0)
        assert found == pytest.approx(statistics, abs=1e-6)  # step means are kept in fp32


def test_an_update_under_tensor_parallelism_matches_one_process():
    from tensor_parallel import tensor_parallel, vocabulary_cross_entropy

    config = PPOConfig(**{**BASE, "value_weight": 0.1})
    policy, reference, value = models()
    batch = experience(policy, reference)

    def after(policy, value, losses):
        optimizer = torch.optim.SGD([*policy.parameters(), *value.parameters()], lr=0.1)
        more = {} if losses is None else {"losses": losses}
        ppo_update(policy, value, optimizer, batch, config, torch.Generator().manual_seed(0), **more)
        return aligned_log_probs(policy, batch.tokens, batch.padding, **more).detach(), value(batch.tokens).detach()

    expected = after(policy, value, None)

    def rank_of(rank):
        policy, _, value = models()
        tensor_parallel(policy)
        tensor_parallel(value.model)
        return after(policy, value, lambda logits, targets: vocabulary_cross_entropy(logits, targets, 11))

    for found in run_ranks(2, rank_of):
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


# --- bad input --------------------------------------------------------------------------------------------------------

ONES = torch.ones(2, 3)


@pytest.mark.parametrize("call, message", [
    (lambda: aligned_log_probs(small(), torch.zeros(3, dtype=torch.long)), r"got \(3,\) and None"),
    (lambda: aligned_log_probs(small(), torch.zeros(3, 1, dtype=torch.long)), r"T at least 2"),
    (lambda: aligned_log_probs(small(), torch.zeros(2, 3, dtype=torch.long), torch.zeros(3)), r"\(2, 3\) and \(3,\)"),
    (lambda: aligned_log_probs(small(), torch.zeros(2, 3, dtype=torch.long), temperature=0), "must be positive, got 0"),
    (lambda: response_loss(ONES, ONES[:, 1:]), r"x \(2, 3\), mask \(2, 2\)"),
    (lambda: per_token_reward(torch.tensor([1.0, math.nan]), ONES, ONES, ONES, 0.1), r"rows \[1\] have a score that is not"),
    (lambda: per_token_reward(torch.ones(2), ONES, ONES, torch.tensor([[0.0, 0, 0], [1, 1, 1]]), 0.1), r"rows \[0\] have no"),
    (lambda: per_token_reward(torch.ones(3), ONES, ONES, ONES, 0.1), r"scores \(3,\), rows \(2,\)"),
    (lambda: gae(ONES, ONES, ONES[:1], torch.ones(2).bool(), torch.ones(2)), r"mask \(1, 3\)"),
    (lambda: gae(ONES, ONES, ONES, torch.ones(3).bool(), torch.ones(2)), r"terminated \(3,\)"),
    (lambda: whiten(ONES, ONES[:1]), r"x \(2, 3\), mask \(1, 3\)"),
    (lambda: AdaptiveKL(0.1, 0.0, 1000), "0.1, 0.0 and 1000"),
    (lambda: reinforce_loss(ONES, torch.ones(3), ONES), r"advantages \(3,\)"),
    (lambda: ppo_loss(ONES, ONES, ONES[:1], ONES), r"advantages \(1, 3\)"),
    (lambda: value_loss(ONES, ONES[:1], ONES, ONES), r"old \(1, 3\)"),
    (lambda: group_advantages(torch.ones(3, 1)), r"got shape \(3, 1\)"),
    (lambda: rloo_advantages(torch.tensor([[1.0, math.inf]])), "some not finite"),
    (lambda: grpo_loss(ONES, ONES, None, torch.ones(2), ONES), "reference missing"),
    (lambda: grpo_loss(ONES, ONES, ONES, torch.ones(2), ONES, length="constant"), "'constant', None"),
    (lambda: grpo_loss(ONES, ONES, ONES, torch.ones(2), ONES, length="token"), "'token'"),
    (lambda: best_of_n(torch.ones(2, 3), 4), r"\(2, 3\) and 4"),
    (lambda: PPOConfig(truncated="ignored"), "got 'ignored'"),
    (lambda: PPOConfig(epochs=0), "got PPOConfig.*epochs=0"),
    (lambda: PPOConfig(value_clip=-0.2), "limits positive, got PPOConfig.*value_clip=-0.2"),
    (lambda: PPOConfig(lam=1.5), r"lam in \[0, 1\]"),
    (lambda: updated(PPOConfig(minibatches=7)), "6 answers cannot be cut into 7 minibatches"),
])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
