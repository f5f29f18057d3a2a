"""Intervals and losses against oracles; learning from rewards; processes that share the work."""


import pytest
import reason
import rlhf
import torch
import torch.nn.functional as F
from conftest import run_program, run_ranks
from gpt import GPT, GPTConfig
from reason import (Report, share_gradients, learn_from_rows, grpo_step, join_rows, rejection_sample, reinforce, report,
                    supervised_loss, wilson_interval)
from rollout import generate_rollout
from school import School, new_model


def tiny(seed=0, dtype=torch.float32, vocab=8):
    config = GPTConfig(vocab_size=vocab, context=16, n_layers=1, n_heads=2, d_model=16)
    return GPT(config, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sampler(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda prompts: generate_rollout(model, prompts, 6, stop_tokens=[1], generator=generator)


# --- figures ----------------------------------------------------------------------------------------

def test_wilson_interval_matches_scipy():
    from scipy.stats import binomtest
    for right, total in ((0, 1), (1, 1), (0, 500), (37, 500), (250, 500), (499, 500), (500, 500)):
        expected = binomtest(right, total).proportion_ci(method="wilson")
        assert wilson_interval(right, total) == pytest.approx((expected.low, expected.high), abs=2e-5)  # z is 1.96 rounded


@pytest.mark.parametrize("right, total", [(-1, 5), (6, 5), (0, 0)])
def test_shares_that_cannot_be_are_refused(right, total):
    with pytest.raises(ValueError, match="right <= total"):
        wilson_interval(right, total)


def test_report_counts():
    found = report([[5], [6, 6], [7, 7, 7]], lambda i, y: y[0] == 5 + i and i > 0, lambda y: len(y) > 2)
    assert (found.right, found.well_formed, found.problems, found.length, found.accuracy) == (2, 1, 3, 2.0, 2 / 3)
    assert str(Report(250, 500, 500, 9.0)) == "accuracy 0.500 [0.456, 0.544]   length   9.0   well-formed 1.00"


# --- what is shown ----------------------------------------------------------------------------------

def test_rows_are_padded_and_masked():
    tokens, mask = join_rows([[1, 2], [3]], [[4], [5, 6, 7]])
    assert tokens.tolist() == [[1, 2, 4, 0], [3, 5, 6, 7]] and mask.tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    for prompts, responses in (([], []), ([[1]], [])):
        with pytest.raises(ValueError, match="a response to each prompt"):
            join_rows(prompts, responses)


def test_supervised_loss_matches_response_by_response():
    model = tiny(dtype=torch.float64)
    prompts, responses = [[2, 3], [4], [5, 6, 7]], [[3, 1], [7, 7, 1], [1]]
    loss = supervised_loss(model, *join_rows(prompts, responses))
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    terms = []
    for x, y in zip(prompts, responses):
        logits = model(torch.tensor([x + y]))[0]
        terms += [F.cross_entropy(logits[len(x) + t - 1], torch.tensor(token)) for t, token in enumerate(y)]
    expected = torch.stack(terms).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=0, atol=1e-12)  # float64 sums in another order
    assert loss.item() == pytest.approx(rlhf.response_loss(
        rlhf.aligned_log_probs(model, join_rows(prompts, responses)[0]), join_rows(prompts, responses)[1]).item(), abs=1e-12)


def test_fine_tuning_learns_and_counts_tokens():
    model = tiny()
    rows = ([[2], [3]], [[4, 1], [5, 1]])
    seen = learn_from_rows(model, lambda step: rows, 60, 2e-2)
    assert seen == 60 * 6
    assert generate_rollout(model, rows[0], 4, temperature=0, stop_tokens=[1]).responses() == rows[1]


# --- what is rewarded -------------------------------------------------------------------------------

def test_grpo_step_raises_what_is_rewarded():
    """A reward for 7s: after some steps they are most of what is written."""
    model = tiny()
    optimizer, sample, means = torch.optim.AdamW(model.parameters(), lr=1e-2), sampler(model), []
    for _ in range(30):
        rewards, responses = grpo_step(model, optimizer, [[2], [3, 4]], 8, lambda i, y: y.count(7) / len(y), sample, rlhf)
        means.append(rewards.mean().item())
    assert rewards.shape == (2, 8) and len(responses) == 16
    assert means[-1] > 0.8 and means[0] < 0.4


def test_grpo_step_matches_the_policy_gradient():
    """At the policy that answered: mean of -A log p(y) over answers, per max_length, to float64's rounding."""
    model = tiny(dtype=torch.float64)
    found = generate_rollout(model, [[2]] * 4 + [[3, 4]] * 4, 6, stop_tokens=[1], generator=torch.Generator().manual_seed(0))
    scores = [0.0, 1.0, 3.0, 0.5, 2.0, 2.0, 0.0, 1.0]
    given = iter(scores)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    grpo_step(model, optimizer, [[2], [3, 4]], 4, lambda i, y: next(given), lambda prompts: found, rlhf)
    fresh = tiny(dtype=torch.float64)
    A = torch.cat([(r - r.mean()) / (r.std(correction=0) + 1e-6) for r in torch.tensor(scores).view(2, 4)])
    log_p = fresh(found.tokens[:, :-1]).log_softmax(-1).gather(2, found.tokens[:, 1:, None])[..., 0] * found.mask[:, 1:]
    loss = -(A * log_p.sum(1)).mean() / found.mask.size(1)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in fresh.parameters()]).norm()
    for name, p in fresh.named_parameters():
        step = before[name] - dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(step, p.grad / max(1.0, norm.item()), rtol=0, atol=1e-7)  # rewards are float32


def test_kl_holds_the_policy_near_its_reference():
    moved = []
    for kl in (0.0, 5.0):
        model, reference = tiny(), tiny()
        optimizer, sample = torch.optim.SGD(model.parameters(), lr=0.5), sampler(model)
        for _ in range(15):
            grpo_step(model, optimizer, [[2]], 16, lambda i, y: float(y.count(7)), sample, rlhf, reference, kl)
        with torch.no_grad():
            moved.append((model(torch.tensor([[2]])).softmax(-1) - reference(torch.tensor([[2]])).softmax(-1)).abs().sum())
    assert moved[1] < 0.7 * moved[0]


def test_equal_rewards_teach_nothing():
    model = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    grpo_step(model, torch.optim.SGD(model.parameters(), lr=1.0), [[2]], 4, lambda i, y: 1.0, sampler(model), rlhf)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_rejection_sampling_keeps_different_good_answers():
    prompts, groups = [[1], [2]], [[[5], [5], [6], [7]], [[8], [8], [8], [9]]]
    x, y = rejection_sample(prompts, groups, lambda i, response: response != [6] and response != [9], 2)
    assert (x, y) == ([[1], [1], [2]], [[5], [7], [8]])
    assert rejection_sample(prompts, groups, lambda i, response: False, 2) == ([], [])
    for bad in ((prompts, groups[:1], 2), (prompts, groups, 0)):
        with pytest.raises(ValueError, match="samples of each prompt"):
            rejection_sample(*bad[:2], lambda i, response: True, bad[2])


def test_a_random_reward_does_not_look_at_answers():
    """The control gets the same rewards whatever is written, and reports the accuracy all the same."""
    school = School(2, 0)
    rewards = [[one.reward for one in reinforce(new_model(school, seed), School(2, 0), 2, 5, 4, 4, is_random=True)]
               for seed in (0, 1)]
    assert rewards[0] == rewards[1] and all(0 < reward < 1 for reward in rewards[0])


def test_reinforcement_goes_on_after_its_own_answers():
    """Half of the second step's prompts follow up answers of the first, as they were sampled."""
    school, followed, sampled = School(2, 0), [], []
    follow_up, is_right = school.follow_up, school.is_right
    school.follow_up = lambda puzzle, y: followed.append((puzzle, y)) or follow_up(puzzle, y)
    school.is_right = lambda puzzle, y: sampled.append((puzzle, y)) or is_right(puzzle, y)
    reinforce(new_model(school, 0), school, 1, 0, 6, 4)
    assert not followed
    reinforce(new_model(school, 0), school, 2, 0, 6, 4)
    assert len(followed) == 3 and all(pair in sampled for pair in followed)


def test_a_judge_rewards_what_no_checker_knows():
    school, asked = School(2, 0), []
    reinforce(new_model(school, 0), school, 1, 0, 4, 4, judge=lambda x, y: asked.append(x) or 0.5, general=0.5)
    assert len(asked) == 8 and all(any(word in school.puzzles.text_of(x) for word in ("hello", "attack")) for x in asked)


# --- processes --------------------------------------------------------------------------------------

def test_shared_batches_match_one_process():
    """Two ranks with half of the rows each, of equal length, for several steps; float64."""
    g = torch.Generator().manual_seed(0)
    batches = [torch.randint(1, 8, (8, 6), generator=g) for _ in range(3)]

    def train(rank=0, P=1):
        model = tiny(dtype=torch.float64)
        learn_from_rows(model, lambda step: ([row[:3].tolist() for row in batches[step][rank::P]],
                                       [row[3:].tolist() for row in batches[step][rank::P]]), 3, 1e-2)
        return [p.detach() for p in model.parameters()]

    alone, both = train(), run_ranks(2, train, 2)
    for mine in both:
        for p, q in zip(mine, alone):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)  # Adam divides by gradients' sizes: rounding grows


def test_without_processes_gradients_stay():
    model = tiny()
    supervised_loss(model, *join_rows([[2]], [[3]])).backward()
    before = [p.grad.clone() for p in model.parameters()]
    share_gradients(model)
    assert all(torch.equal(p.grad, q) for p, q in zip(model.parameters(), before))


# --- the program ------------------------------------------------------------------------------------


def test_demo_tells_the_whole_story(tmp_path, capsys):
    reason.main(level=2, steps=3, rl_steps=1, problems=4, seed=0, plot=tmp_path / "a.png", out=tmp_path / "a.pt")
    said = capsys.readouterr().out
    for phase in ("direct answers", "worked steps", "base", "prompted with reasoning", "zero", "control", "1 cold start",
                  "2 reasoning RL", "3 rejection", "4 diverse RL", "drawn", "saved"):
        assert phase in said, phase
    assert "points gained: chain of thought over direct" in said.splitlines()[-1]
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert set(torch.load(tmp_path / "a.pt", weights_only=True)) == {"level", "model"}


@pytest.mark.parametrize("flags, cause", [(["--level", "1"], "--level"), (["--steps", "0"], "--steps"), (["--seed", "-1"], "--seed"),
                                          (["--plot", "/nowhere/a.png"], "cannot be drawn")])
def test_bad_flags_get_one_line(flags, cause):
    found = run_program(["reason.py", *flags])
    assert found.returncode == 2 and found.stderr.startswith("reason.py: ") and cause in found.stderr
    assert found.stderr.count("\n") == 1


def test_seeds_and_levels_change_what_is_learned():
    rows = [School(level, seed).corpus(4) for level, seed in ((3, 0), (3, 0), (3, 1), (4, 0))]
    assert rows[0] == rows[1] and rows[0] != rows[2] and len(rows[3][0][0]) > len(rows[0][0][0])


def test_reinforcement_keeps_processes_equal():
    """Different problems and samples on each rank, one model in the end; each brings its share of the prompts."""
    seen = []

    def train(rank):
        school = School(2, rank)
        model = new_model(school, 0)
        grown = reinforce(model, school, 2, rank, prompts=5, G=4, is_random=True)
        seen.append(grown[0].reward)
        return [p.detach() for p in model.parameters()], reason._share(5)

    (one, share), (two, _) = run_ranks(2, train)
    assert share == 3 and reason._share(5) == 5 and seen[0] != seen[1]
    assert all(torch.equal(p, q) for p, q in zip(one, two))
    assert not torch.equal(one[0], new_model(School(2, 0), 0).token_embedding.weight)
