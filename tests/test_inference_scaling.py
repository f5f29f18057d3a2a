"""Estimators against enumeration, votes and searches against brute force, budgets and reproducibility."""

import itertools
import math
import random
from fractions import Fraction

import inference_scaling
import pytest
import torch
import torch.nn.functional as F
from conftest import run_program
from gpt import GPT, GPTConfig
from preference import RewardModel
from rollout import generate_rollout
from inference_scaling import (SurpriseReward, auc, best_of, beam_over_steps, curves, draw_uniforms, fit_log, force_budget, last_values, majority_vote,
                       pass_at_k, process_loss, sample_many, self_refine, step_ends, train_verifier)

END, SEP, STOP_THINKING, WAIT = 1, 2, 3, 4


def tiny(seed=0, context=48, vocab=10):
    model = GPT(GPTConfig(vocab_size=vocab, context=context, n_layers=1, n_heads=2, d_model=16),
                generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.token_embedding.weight *= 20  # answers that are not all alike
    return model


def generating(model, batch=128):
    def generate(prompts, uniforms, stops):
        return generate_rollout(model, prompts, uniforms.size(1), uniforms=uniforms, stop_tokens=stops, batch=batch).responses()
    return generate


PROMPTS = [[5, 6], [7, 8, 9], [5]]


# --- estimators -----------------------------------------------------------------------------------

def test_pass_at_k_matches_enumeration():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                exact = Fraction(sum(map(any, subsets)), len(subsets))
                assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-15)  # one rounding of a quotient


def test_pass_at_k_is_unbiased():
    """Its mean over Binomial(n, p) successes is 1 - (1 - p)^k, exactly; 1 - (1 - c/n)^k is not."""
    n, k, p = 8, 3, 0.3
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert abs(sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights)) - (1 - (1 - p) ** k)) > 0.01


def test_pass_at_k_takes_large_counts():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, abs=1e-12)


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_of_counts_that_cannot_be_is_refused(n, c, k):
    with pytest.raises(ValueError, match=r"pass@k needs .*got n"):
        pass_at_k(n, c, k)


def test_majority_vote_matches_counting():
    rng = random.Random(0)
    for _ in range(2000):
        answers = [rng.choice(["1", "2", "3", None]) for _ in range(rng.randint(0, 7))]
        given = [answer for answer in answers if answer is not None]
        most = max((given.count(answer) for answer in given), default=0)
        expected = next((answer for answer in given if given.count(answer) == most), None)
        assert majority_vote(answers) == expected


@pytest.mark.parametrize("answers, winner", [(["2", "1", "1", "2"], "2"), (["1", "2"], "1"), ([None, None, "3"], "3"),
                                             ([None], None), ([], None), (["", "", "1"], "")])
def test_majority_vote_ties_go_to_the_first_given(answers, winner):
    assert majority_vote(answers) == winner


def test_weighted_votes_can_outvote_a_majority():
    assert majority_vote(["1", "1", "2"], [0.1, 0.1, 0.9]) == "2" and majority_vote(["1", "1", "2"], [0.5] * 3) == "1"
    with pytest.raises(ValueError):
        majority_vote(["1"], [1.0, 2.0])


def test_best_of_is_the_first_of_the_highest_with_an_answer():
    assert best_of(["1", "2", "3"], [0.1, 0.7, 0.7]) == "2"
    assert best_of([None, "2"], [9.0, -5.0]) == "2" and best_of([None], [1.0]) is None and best_of([], []) is None


def test_fit_log_matches_numpy_and_finds_a_line():
    import numpy as np
    x, y = [10, 40, 90, 1000], [0.2, 0.5, 0.4, 0.9]
    b, a = np.polyfit(np.log10(x), y, 1)
    r = np.corrcoef(np.log10(x), y)[0, 1]
    assert fit_log(x, y) == pytest.approx((a, b, r * r), abs=1e-12)  # the same least squares in another order
    assert fit_log([1, 10, 100], [0.1, 0.3, 0.5]) == pytest.approx((0.1, 0.2, 1.0))
    assert fit_log([1, 10], [0.5, 0.5])[2] == 1.0
    for tokens in ([10, 10], [0, 10], [5]):
        with pytest.raises(ValueError, match="two different positive"):
            fit_log(tokens, [0.1] * len(tokens))


# --- learned rewards ------------------------------------------------------------------------------

def test_process_loss_matches_its_sum_and_gradient():
    g = torch.Generator().manual_seed(0)
    values = torch.randn(4, 6, generator=g, dtype=torch.float64, requires_grad=True)
    ends = (torch.rand(4, 6, generator=g) < 0.5).double()
    right = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    loss = process_loss(values, ends, right)
    expected = sum(-math.log(1 / (1 + math.exp(-v))) if right[b] else -math.log(1 - 1 / (1 + math.exp(-v)))
                   for b in range(4) for t in range(6) if ends[b, t] for v in [values[b, t].item()]) / ends.sum().item()
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    loss.backward()
    torch.testing.assert_close(values.grad, (values.sigmoid() - right[:, None]).detach() * ends / ends.sum(), rtol=0, atol=1e-12)


def test_process_loss_of_shapes_that_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="got"):
        process_loss(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="got"):
        process_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))


def test_step_ends_are_separators_and_the_last_token_of_the_response():
    tokens = torch.tensor([[2, 5, 2, 6, 1, 0], [5, 5, 6, 2, 6, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]).float()
    assert step_ends(tokens, mask, [2]).tolist() == [[0, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 1]]
    assert step_ends(tokens, mask, []).sum(1).tolist() == [1, 1]


def test_a_verifier_learns_what_makes_answers_right():
    """Answers with a 9 in them are wrong; after the training its values order unseen rows."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 10, (256, 6), generator=g)
    right = (tokens != 9).all(1).float()
    verifier = RewardModel(tiny(), g)
    ends = torch.zeros(256, 6)
    ends[:, -1] = 1
    train_verifier(verifier, tokens[:192], ends[:192], right[:192], 150, g, lr=3e-3)
    values = torch.tensor(last_values(verifier, tokens[192:].tolist()))
    assert ((values > 0.5) == (right[192:] > 0)).float().mean() > 0.9
    ragged = [row[:n] for row, n in zip(tokens.tolist(), itertools.cycle((2, 4, 6)))]
    one_by_one = [last_values(verifier, [row])[0] for row in ragged[:9]]
    assert last_values(verifier, ragged[:9], batch=4) == pytest.approx(one_by_one, abs=1e-5)  # fp32 in another batch


def test_surprise_reward_matches_token_by_token_and_trains_two_numbers():
    model, rows = tiny(), torch.randint(1, 10, (3, 8), generator=torch.Generator().manual_seed(0))
    reward = SurpriseReward(model, 3)
    with torch.no_grad():
        reward.w.fill_(0.5)
        reward.b.fill_(2.0)
    for row, values in zip(rows, reward(rows)):
        total = 0.0
        for t in range(8):
            if t >= 3:
                total += model(row[None, :t])[0, -1].log_softmax(-1)[row[t]].item()
            assert values[t].item() == pytest.approx(2 + 0.5 * total, abs=1e-4)  # fp32, one text at a time
    assert [name for name, _ in reward.named_parameters()] == ["w", "b"]
    reward(rows).sum().backward()
    assert reward.w.grad != 0 and all(p.grad is None for p in model.parameters())


def test_surprise_tells_slips_from_a_policys_own_answers():
    """Samples of a policy, half of them with one token that it would not have written: AUC far above one half."""
    model, g = tiny(), torch.Generator().manual_seed(0)
    answers = generate_rollout(model, [[5, 6]] * 128, 6, generator=g).tokens
    slipped = answers.clone()
    slipped[:, 4] = model(answers[:, :4])[:, -1].argmin(-1)
    tokens, right = torch.cat([answers, slipped]), torch.arange(256).lt(128).float()
    ends = F.one_hot(torch.full((256,), 7), 8).float()
    reward = SurpriseReward(model, 2)
    train_verifier(reward, tokens[::2], ends[::2], right[::2], 40, g, lr=0.1)
    values = torch.tensor(last_values(reward, tokens[1::2].tolist()))
    good, bad = values[right[1::2] > 0], values[right[1::2] == 0]
    assert reward.w > 0 and (good[:, None] > bad).float().mean() > 0.9


def test_auc_matches_counting_pairs():
    values, right = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    assert auc(values, right) == pytest.approx(5.5 / 6) and auc(-values, right) == pytest.approx(0.5 / 6)
    assert math.isnan(auc(values, torch.ones(5)))


# --- methods --------------------------------------------------------------------------------------

def test_samples_are_the_same_at_any_batch_size():
    model = tiny()
    runs = [sample_many(generating(model, batch), PROMPTS, 4, 12, 7, [END]) for batch in (1, 3, 128)]
    assert runs[0].candidates == runs[1].candidates == runs[2].candidates
    assert sample_many(generating(model), PROMPTS, 4, 12, 8, [END]).candidates != runs[0].candidates
    assert runs[0].tokens == [sum(map(len, group)) for group in runs[0].candidates]
    assert [len(group) for group in runs[0].candidates] == [4, 4, 4]


def test_random_numbers_of_a_row_depend_on_its_problem_alone():
    all_rows, some = draw_uniforms(3, range(6), 20), draw_uniforms(3, [4, 1], 20)
    assert torch.equal(all_rows[[4, 1]], some) and not torch.equal(all_rows[0], all_rows[1])
    assert all_rows.min() >= 0 and all_rows.max() < 1


def scripted(script):
    """A generator that writes what a script says, up to a stop."""
    def generate(prompts, uniforms, stops):
        found = []
        for prompt, u in zip(prompts, uniforms):
            row, new = list(prompt), []
            while len(new) < uniforms.size(1):
                new.append(script(row, u[len(new)].item()))
                row.append(new[-1])
                if new[-1] in stops:
                    break
            found.append(new)
        return found
    return generate


def test_beam_finds_the_answer_that_its_values_like():
    """Steps are one of 5 .. 9 and a separator; the values like 9s; four steps, then the end."""
    def script(row, u):
        steps = row.count(SEP)
        return END if steps == 4 else SEP if row[-1] >= 5 else 5 + int(u * 5)

    def value(rows):
        return [row.count(9) - row.count(5) for row in rows]

    alone = sample_many(scripted(script), [[0]] * 20, 1, 30, 0, [END])
    found = beam_over_steps(scripted(script), value, [[0]] * 20, 8, 2, [SEP], END, 30, 0)
    best = [max(group, key=lambda row: value([row])[0]) for group in found.candidates]
    assert sum(row.count(9) for row in best) > 2 * sum(group[0].count(9) for group in alone.candidates)
    assert all(row[-1] == END and row.count(SEP) == 4 for group in found.candidates for row in group)
    assert found.tokens == [8 * 9] * 20 and [len(scores) for scores in found.scores] == [8] * 20


def test_beam_of_one_is_a_sample_and_stops_at_the_limit():
    found = beam_over_steps(scripted(lambda row, u: 5), lambda rows: [0.0] * len(rows), PROMPTS, 1, 1, [SEP], END, 7, 0)
    assert [group[0] for group in found.candidates] == [[5] * 7] * 3


@pytest.mark.parametrize("N, width", [(3, 2), (0, 1), (4, 0), (4, -1)])
def test_beams_that_cannot_be_shared_out_are_refused(N, width):
    with pytest.raises(ValueError, match="multiple of width"):
        beam_over_steps(None, None, PROMPTS, N, width, [SEP], END, 7, 0)


def thinking(row, u):
    """Thinks in 6s, at most four at a time (counted from the last wait), ends, answers with how many it wrote."""
    if STOP_THINKING in row:
        return END if row[-1] >= 7 else 7 + min(2, row.count(6) // 3)
    since = row[len(row) - row[::-1].index(WAIT):] if WAIT in row else row
    return STOP_THINKING if since.count(6) == 4 else 6


def test_budget_stops_thinking():
    for budget in (1, 3, 4):
        found = force_budget(scripted(thinking), [[0], [0, 0]], budget, 0, [STOP_THINKING], [WAIT], END, 4, 0)
        for (row,), cost in zip(found.candidates, found.tokens):
            assert row[:budget + 1] == [6] * budget + [STOP_THINKING] and row[-1] == END
            assert cost == budget + 2  # the answer and the end; what is put in is not generated


def test_waits_prolong_thinking():
    lengths = []
    for waits in (0, 1, 2):
        found = force_budget(scripted(thinking), [[0]], 40, waits, [STOP_THINKING], [WAIT], END, 4, 0)
        row = found.candidates[0][0]
        assert row.count(WAIT) == waits and row.count(STOP_THINKING) == 1 and row[-1] == END
        lengths.append(row.count(6))
    assert lengths == [4, 8, 12]


def test_waits_end_with_the_budget():
    row = force_budget(scripted(thinking), [[0]], 6, 9, [STOP_THINKING], [WAIT], END, 4, 0).candidates[0][0]
    assert row.index(STOP_THINKING) <= 6 + 1 and row[-1] == END


@pytest.mark.parametrize("budget, waits, most", [(0, 0, 4), (4, -1, 4), (4, 0, 0)])
def test_budgets_that_cannot_be_are_refused(budget, waits, most):
    with pytest.raises(ValueError, match="at least"):
        force_budget(None, PROMPTS, budget, waits, [STOP_THINKING], [WAIT], END, most, 0)


def test_budgets_and_searches_are_the_same_at_any_batch_size():
    model = tiny()
    for batch in (1, 128):
        found = [force_budget(generating(model, batch), PROMPTS, 6, 2, [STOP_THINKING], [WAIT], END, 4, 0).candidates,
                 beam_over_steps(generating(model, batch), lambda rows: [float(sum(row) % 7) for row in rows], PROMPTS, 4, 2,
                                 [SEP], END, 12, 0).candidates,
                 [answers.candidates for answers in
                  self_refine(generating(model, batch), PROMPTS, 3, lambda p, y: [*PROMPTS[p], *y[-2:]], 8, 0, END)]]
        assert batch == 1 or found == first
        first = found


def test_refinement_reads_the_last_turn_and_only_that():
    """The answer is one more than the last that is read."""
    seen = []

    def script(row, u):
        seen.append(list(row))
        return END if len(row) > 2 else row[-1] + 1

    found = self_refine(scripted(script), [[0, 4]], 3, lambda p, y: [0, y[0]], 5, 0, END)
    assert [answers.candidates[0][0] for answers in found] == [[5, END], [6, END], [7, END]]
    assert [answers.tokens for answers in found] == [[2], [4], [6]]
    assert max(map(len, seen)) == 3


# --- the harness ------------------------------------------------------------------------------------

def made(P=40, S=16, seed=0):
    """Samples right with a probability of each problem's own; a score that knows a little of it."""
    g = torch.Generator().manual_seed(seed)
    right = (torch.rand(P, S, generator=g) < torch.rand(P, 1, generator=g)).float()
    wrong = torch.randint(1, 9, (P, S), generator=g)
    answers = [["0" if r else str(w) for r, w in zip(rs, ws)] for rs, ws in zip(right.tolist(), wrong.tolist())]
    return answers, right, torch.full((P, S), 10.0), {"score": (right + torch.randn(P, S, generator=g)).sigmoid()}


def test_curves_match_choosing_by_hand():
    answers, right, tokens, scores = made()
    points = {(point.method, point.n): point for point in curves(answers, right, tokens, scores, [1, 4, 16])}
    alone = right.mean().item()
    for method in ("majority", "best of N, score", "vote weighted by score", "oracle pass@N"):
        assert points[method, 1].accuracy == pytest.approx(alone, abs=1e-6)
        assert [points[method, N].tokens for N in (1, 4, 16)] == [10, 40, 160]
    assert points["majority", 16].accuracy == pytest.approx(sum(majority_vote(row) == "0" for row in answers) / 40)
    assert points["best of N, score", 16].accuracy == pytest.approx(right.gather(1, scores["score"].argmax(1, True)).mean().item())
    assert points["oracle pass@N", 16].accuracy == pytest.approx(right.any(1).float().mean().item())


def test_no_method_is_above_the_oracle():
    points = curves(*made(), [1, 2, 4, 8, 16])
    for N in (1, 2, 4, 8, 16):
        of = {point.method: point.accuracy for point in points if point.n == N}
        assert max(of.values()) <= of["oracle pass@N"] + 1e-9


def test_a_perfect_verifier_is_the_oracle():
    answers, right, tokens, _ = made()
    of = {point.method: point.accuracy for point in curves(answers, right, tokens, {"verifier": right}, [16])}
    assert of["best of N, verifier"] == of["vote weighted by verifier"] == pytest.approx(of["oracle pass@N"])


@pytest.mark.parametrize("sizes", [[0], [17]])
def test_more_samples_than_there_are_are_refused(sizes):
    with pytest.raises(ValueError, match="sizes must be in 1 .. 16"):
        curves(*made(), sizes)


def test_a_missing_answer_is_wrong():
    points = curves([[None, None]], torch.zeros(1, 2), torch.ones(1, 2), {}, [2])
    assert [point.accuracy for point in points] == [0.0, 0.0]


# --- the program ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A model as reason.py keeps it, untrained."""
    from school import School, new_model
    path = tmp_path_factory.mktemp("model") / "thinker.pt"
    torch.save({"level": 3, "model": new_model(School(3, 0), 0).state_dict()}, path)
    return path


def test_demo_compares_methods_and_flags_change_it(thinker, tmp_path, capsys):
    outputs = []
    for seed, plot in ((0, None), (1, tmp_path / "a.png")):
        inference_scaling.main(checkpoint=thinker, problems=4, samples=2, steps=2, seed=seed, plot=plot)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] != outputs[1] and (tmp_path / "a.png").stat().st_size > 1000
    for method in ("majority", "outcome reward", "verifier", "oracle", "process reward", "stopped", "wait", "self-refinement", "R^2"):
        assert outputs[0].count(method) >= 2, method
    assert "points gained by a majority of 2" in outputs[0].splitlines()[-1]


@pytest.mark.parametrize("flags, cause", [(["--samples", "3"], "a power of 2"), (["--problems", "0"], "at least 1"), (["--steps", "0"], "--steps"),
                                          (["--checkpoint", "/nowhere.pt"], "no model of reason.py"), (["--plot", "/nowhere/a.png"], "cannot be drawn")])
def test_bad_flags_get_one_line(flags, cause):
    found = run_program(["inference_scaling.py", *flags])
    assert found.returncode == 2 and found.stderr.startswith("inference_scaling.py: ") and cause in found.stderr
    assert found.stderr.count("\n") == 1
