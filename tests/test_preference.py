"""Reward models and DPO against one sequence at a time, transformers, and the papers' equations term by term."""

import copy
import itertools
import math

import pytest
import torch
from conftest import run_ranks
from run_here import run_here

from gpt import GPT, GPTConfig
from llama import Llama, LlamaConfig
from preference import (RewardModel, by_ranking, calibration, dpo_loss, implicit_reward, pairs_of, ranking_loss,
                        reward_loss, shift_rows)

ROWS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]


def small(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "gpt":
        return GPT(GPTConfig(11, 12, 2, 2, 8), generator=generator).double()
    return Llama(LlamaConfig(11, 12, 2, 2, 1, 8, 16, rope_base=1e4), generator=generator).double()


def reward_model(kind="gpt"):
    return RewardModel(small(kind), torch.Generator().manual_seed(1))


def padded(left):
    T = max(map(len, ROWS))
    rows = [[10] * (T - len(row)) + row if left else row + [10] * (T - len(row)) for row in ROWS]
    lengths = torch.tensor([len(row) for row in ROWS])
    return torch.tensor(rows), lengths, (T - lengths if left else None)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_scores_and_values_of_padded_rows_match_one_row_at_a_time(kind, left):
    model = reward_model(kind)
    tokens, lengths, padding = padded(left)
    first = torch.zeros_like(lengths) if padding is None else padding
    scores, values = model.scores(tokens, first + lengths - 1, padding), model.values(tokens, padding)
    for b, row in enumerate(ROWS):
        alone = model(torch.tensor([row]))[0]
        torch.testing.assert_close(scores[b], alone[-1], atol=1e-12, rtol=0)
        own = values[b, first[b]:first[b] + lengths[b]]
        torch.testing.assert_close(own, torch.cat((torch.zeros(1).double(), alone[:-1])), atol=1e-12, rtol=0)
        assert (values[b, :first[b]] == 0).all()
    parameters = [model.score.weight, model.model.token_embedding.weight]
    together = torch.autograd.grad(scores.sum(), parameters)
    one_by_one = torch.autograd.grad(sum(model(torch.tensor([row]))[0, -1] for row in ROWS), parameters)
    for a, b in zip(together, one_by_one):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_scores_match_transformers_sequence_classifier(tmp_path):
    from transformers import GPT2ForSequenceClassification

    model = RewardModel(small("gpt").float(), torch.Generator().manual_seed(1)).eval()
    model.model.save_pretrained(tmp_path)
    theirs = GPT2ForSequenceClassification.from_pretrained(tmp_path, num_labels=1, pad_token_id=10).eval()
    theirs.score.weight.data.copy_(model.score.weight.data)
    tokens, lengths, _ = padded(left=False)
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=(tokens != 10).long()).logits[:, 0]
        torch.testing.assert_close(model.scores(tokens, lengths - 1), expected, atol=1e-5, rtol=0)  # fp32


def test_the_head_is_drawn_from_its_generator_in_the_models_dtype_and_can_be_centred():
    a, b = reward_model(), reward_model()
    assert torch.equal(a.score.weight, b.score.weight) and a.score.weight.dtype == torch.float64
    wide = RewardModel(GPT(GPTConfig(11, 12, 1, 2, 1024)), torch.Generator().manual_seed(0))
    assert wide.score.weight.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.1)
    tokens, lengths, _ = padded(left=False)
    before = a.scores(tokens, lengths - 1).detach()
    a.centre(before.mean())
    torch.testing.assert_close(a.scores(tokens, lengths - 1), before - before.mean(), atol=1e-12, rtol=0)


def test_scores_of_a_bf16_model_are_fp32():
    model = RewardModel(small("gpt").bfloat16())
    scores = model(torch.tensor(ROWS[:1]))
    assert scores.dtype == torch.float32 and not torch.equal(scores, scores.bfloat16().float())  # not of 8 bits


def test_shift_rows_is_undone_by_its_negative():
    x, by = torch.arange(12).view(3, 4), torch.tensor([0, 3, 1])
    assert shift_rows(x, by)[1].tolist() == [5, 6, 7, 4]
    assert torch.equal(shift_rows(shift_rows(x, by), -by), x)


def test_reward_model_under_tensor_parallelism_matches_one_process():
    from tensor_parallel import tensor_parallel

    tokens, lengths, padding = padded(left=True)

    def gradients(model):
        scores = model.scores(tokens, torch.full((3,), 6), padding)
        scores.square().sum().backward()
        return scores.detach(), model.score.weight.grad, model.model.norm.weight.grad, model.model.position_embedding.weight.grad

    expected = gradients(reward_model())

    def rank_of(rank):
        model = reward_model()
        tensor_parallel(model.model)
        return gradients(model)

    for found in run_ranks(2, rank_of):
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


# --- losses -----------------------------------------------------------------------------------------------------------

def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def assert_same_with_gradients(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def sigma(x):
    return 1 / (1 + torch.exp(-x))


def test_reward_loss_matches_equation_1():
    chosen, rejected = numbers(5), numbers(5, seed=1)
    expected = sum(-torch.log(sigma(c - r)) for c, r in zip(chosen, rejected)) / 5
    assert_same_with_gradients(reward_loss(chosen, rejected), expected, [chosen, rejected])
    assert reward_loss(torch.zeros(3), torch.zeros(3)) == pytest.approx(math.log(2))
    assert reward_loss(torch.tensor([-1e4]), torch.tensor([1e4])) == 2e4  # no overflow


def test_ranking_loss_matches_plackett_luce_and_the_chances_of_all_rankings_add_up_to_1():
    scores = numbers(3, 4)
    expected = 0
    for row in scores:
        left = list(row)
        while left:
            expected = expected - torch.log(torch.exp(left[0]) / sum(torch.exp(s) for s in left)) / 3
            left = left[1:]
    assert_same_with_gradients(ranking_loss(scores), expected, [scores])
    row = scores[0].detach()
    total = sum(math.exp(-ranking_loss(row[list(order)][None])) for order in itertools.permutations(range(4)))
    assert total == pytest.approx(1, abs=1e-12)
    assert_same_with_gradients(ranking_loss(scores[:, :2]), reward_loss(scores[:, 0], scores[:, 1]), [scores])


def test_shorter_rankings_are_filled_with_minus_infinity():
    scores = numbers(2, 4)
    ragged = torch.cat((scores[1, :2], torch.full((2,), -math.inf)))
    ours = ranking_loss(torch.stack((scores[0], ragged)))
    expected = (ranking_loss(scores[:1]) + ranking_loss(scores[1:, :2])) / 2
    assert_same_with_gradients(ours, expected, [scores])


def test_a_score_that_is_nan_is_not_taken_for_a_filling():
    scores = torch.tensor([[1.0, math.nan, 0.0], [2.0, 1.0, -math.inf]])
    assert ranking_loss(scores).isnan() and ranking_loss(scores[1:]).isfinite()


def test_answers_are_put_by_ranking_and_in_pairs():
    values = torch.arange(6.0)
    assert by_ranking(values, [2, 1, 3]).tolist() == [[0, 1, -math.inf], [2, -math.inf, -math.inf], [3, 4, 5]]
    assert pairs_of(values, [2, 1, 3]).tolist() == [[0, 3, 3, 4], [1, 4, 5, 5]]
    assert pairs_of(values[:1], [1]).shape == (2, 0)


def test_direct_preference_over_rankings_is_plackett_luce_of_implicit_rewards_and_dpo_on_pairs():
    policy, reference = numbers(5), numbers(5, seed=1).detach()  # answers best first, of a ranking of 3 and one of 2

    def rewards():
        return implicit_reward(policy, reference, 0.3)

    first, second, third, better, worse = rewards().exp()
    expected = -(torch.log(first / (first + second + third)) + torch.log(second / (second + third))
                 + torch.log(better / (better + worse))) / 2  # Rafailov et al. 2023, equation 20
    assert_same_with_gradients(ranking_loss(by_ranking(rewards(), [3, 2])), expected, [policy])
    pair = dpo_loss(policy[3:4], policy[4:], reference[3:4], reference[4:], 0.3)
    assert_same_with_gradients(ranking_loss(by_ranking(rewards()[3:], [2])), pair, [policy])


def test_calibration_matches_numpy_and_is_near_zero_where_confidence_is_right():
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(20000, generator=generator, dtype=torch.float64) * 2
    swap = torch.rand(20000, generator=generator, dtype=torch.float64) > torch.sigmoid(difference)
    difference = torch.where(swap, -difference, difference)
    seen = calibration(difference, torch.zeros_like(difference), bins=5)
    confidence, right = torch.sigmoid(difference.abs()).numpy(), (difference > 0).numpy()
    error = 0.0
    for b in range(5):
        inside = (confidence >= 0.5 + b / 10) & (confidence < 0.6 + b / 10)
        assert seen.pairs[b] == inside.sum()
        assert seen.right[b].item() == pytest.approx(right[inside].mean())
        assert seen.confidence[b].item() == pytest.approx(confidence[inside].mean())
        error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert seen.error == pytest.approx(error) and seen.error < 0.02  # chance: about 0.5 / sqrt(4000) a bin
    assert seen.accuracy == pytest.approx(right.mean())
    assert calibration(10 * difference, torch.zeros_like(difference)).error > 0.1  # too sure of itself


def test_a_tie_is_half_right_and_an_empty_bin_is_nan():
    seen = calibration(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    assert seen.accuracy == 0.75 and seen.pairs.sum() == 2 and seen.right[-1].isnan()


def naive_dpo(pw, pl, rw, rl, beta, smoothing, kind):
    total = 0
    for i in range(len(pw)):
        h = pw[i] - pl[i] - ((rw[i] - rl[i]) if kind != "reference_free" else 0)
        if kind == "ipo":
            total = total + (h - 1 / (2 * beta)) ** 2
        else:
            total = total - (1 - smoothing) * torch.log(sigma(beta * h)) - smoothing * torch.log(sigma(-beta * h))
    return total / len(pw)


@pytest.mark.parametrize("kind, smoothing", [("sigmoid", 0.0), ("sigmoid", 0.1), ("ipo", 0.0), ("reference_free", 0.0),
                                             ("reference_free", 0.2)])
def test_dpo_loss_matches_its_equation_with_gradients(kind, smoothing):
    four = [numbers(6, seed=seed) for seed in range(4)]
    ours = dpo_loss(*four, beta=0.3, label_smoothing=smoothing, kind=kind)
    assert_same_with_gradients(ours, naive_dpo(*four, 0.3, smoothing, kind), four[:2])


def test_dpo_is_the_reward_loss_of_its_implicit_rewards_and_has_the_papers_gradient():
    pw, pl, rw, rl = (numbers(6, seed=seed) for seed in range(4))
    r_chosen, r_rejected = implicit_reward(pw, rw, 0.3), implicit_reward(pl, rl, 0.3)
    torch.testing.assert_close(r_chosen, 0.3 * torch.log(torch.exp(pw) / torch.exp(rw)), atol=1e-12, rtol=0)
    loss = dpo_loss(pw, pl, rw, rl, beta=0.3)
    torch.testing.assert_close(loss, reward_loss(r_chosen, r_rejected), atol=1e-12, rtol=0)
    for leaf, sign in ((pw, -1), (pl, 1)):  # section 4: -beta sigma(r_l - r_w) (grad log p_w - grad log p_l)
        expected = sign * 0.3 * sigma(r_rejected - r_chosen) / 6
        torch.testing.assert_close(torch.autograd.grad(loss, leaf, retain_graph=True)[0], expected, atol=1e-12, rtol=0)


def test_the_reference_free_loss_asks_for_no_reference_and_the_others_do():
    pw, pl = numbers(3), numbers(3, seed=1)
    zero = torch.zeros(3, dtype=torch.float64)
    assert dpo_loss(pw, pl, None, None, kind="reference_free") == dpo_loss(pw, pl, zero, zero)
    with pytest.raises(ValueError, match="sigmoid needs the log-probs of the reference"):
        dpo_loss(pw, pl, None, None)


def test_losses_of_uneven_parts_add_up_to_the_loss_of_all():
    four = [numbers(7, seed=seed).detach() for seed in range(4)]
    parts = [[x[:5] for x in four], [x[5:7] for x in four], [x[7:] for x in four]]  # the last has none
    for loss in (dpo_loss, lambda a, b, c, d, count=None: reward_loss(a, b, count),
                 lambda a, b, c, d, count=None: ranking_loss(torch.stack((a, b, c), 1), count)):
        torch.testing.assert_close(sum(loss(*part, count=7) for part in parts), loss(*four), atol=1e-12, rtol=0)


def test_a_tabular_policy_learns_by_dpo_what_the_reward_model_says_it_should():
    found = run_here(["preference.py", "--pairs", "400"])
    assert found.returncode == 0 and found.stdout.rstrip().endswith(": OK, below 0.01"), found.stdout + found.stderr
    other = run_here(["preference.py", "--pairs", "400", "--beta", "1", "--seed", "3"])
    assert other.stdout.rstrip().endswith(": OK, below 0.01") and other.stdout != found.stdout


# --- bad input --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, message", [
    (lambda: reward_model()(torch.zeros(3, dtype=torch.long)), r"tokens must be \(B, T\) .* got \(3,\)"),
    (lambda: reward_model()(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3)), r"\(2, 3\) and \(3,\)"),
    (lambda: reward_model().scores(torch.zeros(2, 3, dtype=torch.long), torch.zeros(3, dtype=torch.long)), r"last must be \(2,\)"),
    (lambda: reward_loss(torch.zeros(2), torch.zeros(3)), r"chosen \(2,\), rejected \(3,\)"),
    (lambda: reward_loss(torch.zeros(2, 1), torch.zeros(2, 1)), "want 1 dimensions"),
    (lambda: ranking_loss(torch.zeros(2)), r"must be \(N, K\)"),
    (lambda: calibration(torch.zeros(0), torch.zeros(0)), "0 pairs and 10 bins"),
    (lambda: calibration(torch.zeros(1), torch.zeros(1), 0), "1 pairs and 0 bins"),
    (lambda: calibration(torch.zeros(2), torch.tensor([1, math.nan])), r"pairs \[1\] have a score that is not finite"),
    (lambda: dpo_loss(*torch.zeros(4, 2), kind="hinge"), "'hinge' and 0.1"),
    (lambda: dpo_loss(*torch.zeros(4, 2), beta=0), "'sigmoid' and 0"),
    (lambda: dpo_loss(*torch.zeros(4, 2), label_smoothing=0.5), "got 0.5 for sigmoid"),
    (lambda: dpo_loss(*torch.zeros(4, 2), label_smoothing=0.1, kind="ipo"), "0.1 for ipo"),
    (lambda: dpo_loss(*torch.zeros(3, 2), torch.zeros(3)), r"policy_chosen \(2,\).*reference_rejected \(3,\)"),
])
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("flags", [["--pairs", "3"], ["--pairs", "1000000000000"], ["--beta", "0"], ["--beta", "nan"], ["--seed", "-1"], ["--pears", "1"]])
def test_a_bad_flag_is_answered_in_one_line(flags):
    found = run_here(["preference.py", *flags])
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.strip().startswith("preference.py:") and len(found.stderr.strip().splitlines()) == 1


def test_a_reward_model_can_share_or_copy_its_language_model():
    model = small("gpt")
    assert RewardModel(model).model is model
    critic = copy.deepcopy(reward_model())
    assert torch.equal(critic(torch.tensor(ROWS[:1])), reward_model()(torch.tensor(ROWS[:1])))
