"""Policy and critic on every layout against one process, in float64: each loss, PPO's update, clipping, checkpoints, gathers."""

import dataclasses

import pytest
import torch
from conftest import run_ranks
from test_rlhf import BASE, experience, small

import checkpoint
import preference
import processes
import rlhf
import rollout
from preference import RewardModel
from rlhf import PPOConfig, ppo_update
from team import Team, Trained, main
from tensor_parallel import whole

LAYOUTS = [(2, dict(zero=0)), (2, dict(zero=3)), (2, dict(tp=2)), (4, dict(tp=2, zero=3))]


def world(rank, P):
    return processes.World(rank, P, rank, P)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1)


def trained(team, with_critic=True):
    """A policy of a vocabulary, 11, that 2 does not divide; its critic; what trains them."""
    models = {"model": small("llama", seed=1)}
    if with_critic:
        models["critic"] = RewardModel(small(seed=3), torch.Generator().manual_seed(4))
    for model in models.values():
        team.cut(getattr(model, "model", model))
    return models, Trained(team, list(models.values()), models, sgd, lambda name, p: {})


def whole_weights(trainer):
    with trainer.gathered():
        return torch.cat([whole(p).flatten() for module in trainer.parts.values() for p in module.parameters()])


def on_layouts(step, P, layout):
    """(weights after ``step(team, models, trainer)`` on one process, those of every rank)"""
    def run(team):
        models, trainer = trained(team)
        found = step(team, models, trainer)
        return whole_weights(trainer), found

    one = run(Team(processes.World()))
    return one, run_ranks(P, lambda rank: run(Team(world(rank, P), **layout)))


@pytest.mark.parametrize("P, layout", LAYOUTS, ids=str)
def test_ppo_on_every_layout_matches_one_process(P, layout):
    """Also with minibatches of one answer: then parts of the batch have none."""
    whole_batch = experience(small("llama", seed=1), small("llama", seed=2))
    config = PPOConfig(**{**BASE, "epochs": 1, "minibatches": 6, "max_gradient": 0.5, "stop_kl": 0.5})

    def step(team, models, trainer):
        here = team.share(6)
        batch = rlhf.Experience(*(getattr(whole_batch, field.name)[here] for field in dataclasses.fields(rlhf.Experience)))
        return ppo_update(models["model"], models["critic"], trainer, batch, config, torch.Generator().manual_seed(0),
                          trainer.finish, team.total, (here.start, 6), team.losses(models["model"]), trainer.clip)

    (expected, statistics), results = on_layouts(step, P, layout)
    for weights, found in results:
        torch.testing.assert_close(weights, expected, atol=1e-10, rtol=0)
        assert found == pytest.approx(statistics, abs=1e-6)  # step means are kept in fp32


def test_without_a_team_ppo_learns_the_same():
    """Trained as the optimizer, against torch's own and its clipping."""
    policy, batch = small("llama", seed=1), experience(small("llama", seed=1), small("llama", seed=2))
    critic = RewardModel(small(seed=3), torch.Generator().manual_seed(4))
    config = PPOConfig(**{**BASE, "max_gradient": 0.5})
    plain = sgd([*policy.parameters(), *critic.parameters()])
    ppo_update(policy, critic, plain, batch, config, torch.Generator().manual_seed(0))
    models, trainer = trained(Team(processes.World()))
    ppo_update(models["model"], models["critic"], trainer, batch, config, torch.Generator().manual_seed(0), trainer.finish,
               clip=trainer.clip)
    expected = torch.cat([p.flatten() for p in (*policy.parameters(), *critic.parameters())])
    torch.testing.assert_close(whole_weights(trainer), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("P, layout", LAYOUTS, ids=str)
def test_losses_on_every_layout_match_one_process(P, layout):
    """A step each of SFT, GRPO, DPO and of a reward model, on five rows: uneven parts, and one row: a part without any."""
    batch = experience(small("llama", seed=1), small("llama", seed=2), B=5, left=False)
    reference = (batch.reference * batch.mask).sum(1)

    def step(team, models, trainer):
        model, critic, seen = models["model"], models["critic"], []

        def learn(loss):
            loss.backward()
            trainer.finish()
            norm = trainer.clip(0.5).item()
            seen.append((team.sum([loss.item()])[0], norm))
            trainer.step()
            trainer.zero_grad()

        for rows in (range(5), range(1)):
            mine, counts = team.deal(list(rows))
            tokens, mask, count = batch.tokens[mine], batch.mask[mine], len(rows)
            learn(counts * rlhf.response_loss(team.log_probs(model, tokens), mask, batch.mask[list(rows)].sum()))
            new = team.log_probs(model, tokens) * mask
            learn(counts * rlhf.grpo_loss(new, new.detach(), batch.reference[mine], batch.scores[mine], mask, count=count))
            p = (team.log_probs(model, tokens) * mask).sum(1)
            q = (team.log_probs(model, tokens.flip(1)) * mask).sum(1)
            learn(counts * preference.dpo_loss(p, q, reference[mine], reference[mine] + 1, count=count))
            scores, last = critic.scores(tokens, rlhf.last_place(mask)), critic.scores(tokens.flip(1), rlhf.last_place(mask))
            learn(counts * preference.reward_loss(scores, last, count))
        return seen

    (expected, losses), results = on_layouts(step, P, layout)
    for weights, found in results:
        torch.testing.assert_close(weights, expected, atol=1e-10, rtol=0)
        assert [x for pair in found for x in pair] == pytest.approx([x for pair in losses for x in pair], abs=1e-10)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_sharded_policy_is_gathered_once_per_rollout_whatever_its_length(tp):
    prompts, uniforms = [[3, 1], [9], [2, 6, 5], [3, 5]], torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    alone = rollout.generate_rollout(small("llama", seed=1), prompts, 8, uniforms=uniforms)

    def fn(rank):
        team, gathers, counts = Team(world(rank, 2 * tp), tp, zero=3), [], []
        models, trainer = trained(team, with_critic=False)
        gathering = trainer.zeros[0]._gathering
        start = gathering.start_all_gather
        gathering.start_all_gather = lambda flat: (gathers.append(flat), start(flat))[1]
        for most in (2, 8):
            here = team.share(4)
            with trainer.gathered():
                found = rollout.generate_rollout(models["model"], prompts[here], most, uniforms=uniforms[here],
                                                 whole_logits=team.whole_logits(models["model"]))
            counts.append(len(gathers))
            gathers.clear()
        assert counts == [len(models["model"].blocks) + 1] * 2  # each block, and the rest
        return [row for part in team.gather(found.responses()) for row in part]

    assert run_ranks(2 * tp, fn) == [alone.responses()] * 2 * tp


@pytest.mark.parametrize("P, layout", [(2, dict(zero=3)), (4, dict(tp=2, zero=2))], ids=str)
def test_checkpoints_hold_whole_tensors_under_full_names(tmp_path, P, layout):
    def fn(rank):
        team = Team(world(rank, P), **layout)
        models, trainer = trained(team)
        trainer.add(models["critic"].score.bias, torch.tensor(3.0))
        checkpoint.save(tmp_path, 1, trainer.tensors(), {}, group=team.world.everyone)

    run_ranks(P, fn)
    found, (models, _) = checkpoint.load(checkpoint.latest(tmp_path), ("model", "critic")), trained(Team(processes.World()))
    for part, module in models.items():
        for name, p in module.named_parameters():
            expected = p + 3.0 if name == "score.bias" else p
            assert found[part].pop(name).equal(expected), name
        assert not found[part]


def test_parts_are_disjoint_and_whole():
    for P in (1, 2, 3, 5):
        for count in (5, 7, 12):
            teams = [Team(processes.World(r, P)) for r in range(P)]
            rows = [list(range(count))[team.share(count)] for team in teams]
            assert sum(rows, []) == list(range(count)) and max(map(len, rows)) - min(map(len, rows)) <= 1
            assert sorted(sum((team.deal(list(range(count)))[0] for team in teams), [])) == list(range(count))


def test_what_cannot_be_is_refused_in_one_line():
    with pytest.raises(ValueError, match="--tp=2 does not divide 3 processes"):
        Team(processes.World(0, 3), tp=2)
    with pytest.raises(ValueError, match="--steps must be at least 1 .* got 0 and 0"):
        main(0, 0)
