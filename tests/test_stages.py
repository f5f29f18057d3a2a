"""The loop that all stages share: interrupted against unbroken, what a checkpoint holds, what is refused."""

import json
from pathlib import Path

import pytest
import torch

import checkpoint
import gpt
import processes
import stages
import tokenizer
from conftest import run_program, run_ranks

ENCODING = tokenizer.train(["the quick brown fox"], 257)


def stage(folder, total=6, lr=1e-2, world=processes.World(), **settings):
    model = gpt.GPT(gpt.GPTConfig(257, 16, 1, 2, 16), generator=torch.Generator().manual_seed(0))
    config = stages._Settings(Path(folder), 0, 2)
    for name, value in settings.items():
        setattr(config, name, value)
    made = stages.Stage("sft", config, world, ENCODING, {"model": model}, total, lr)
    texts = torch.randint(257, (total, 4, 17), generator=torch.Generator().manual_seed(1))

    def learn(step, scale=1.0):
        mine = texts[step, world.rank::world.size]
        return made.step(scale * gpt.next_token_loss(model(mine[:, :-1]), mine[:, 1:]) * len(mine) / 4)

    return made, learn, model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_demo_interrupts_a_run_that_then_ends_as_the_unbroken_one(capsys):
    stages.main(6, 0)
    assert capsys.readouterr().out.splitlines()[-1].startswith("interrupted = unbroken: True")


def test_program_refuses_in_one_line():
    bad = run_program(["stages.py", "--steps", "1"])
    assert bad.returncode == 2 and bad.stderr.startswith("stages.py: --steps") and bad.stderr.count("\n") == 1


def test_a_done_stage_stays_and_its_metrics_have_every_step_once(tmp_path):
    made, learn, model = stage(tmp_path)
    made.run(learn)
    again, learn, other = stage(tmp_path)
    again.run(lambda step: pytest.fail("a step was done twice"))
    assert torch.equal(weights(model), weights(other))
    lines = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and {"loss", "lr", "gradient"} <= lines[0].keys()
    saved = checkpoint.load(checkpoint.latest(tmp_path / "sft"))
    assert saved["meta"]["model_type"] == "gpt" and saved["meta"]["step"] == 6
    assert saved["model"].keys() == dict(model.named_parameters()).keys()
    assert tokenizer.load(checkpoint.latest(tmp_path / "sft") / "tokenizer.tiktoken").n_vocab == 257


def test_two_ranks_learn_what_one_process_learns(tmp_path):
    def rank_of(P):
        def fn(rank):
            made, learn, model = stage(tmp_path / str(P), world=processes.World(rank, P, rank, P) if P > 1 else processes.World())
            made.run(learn)
            return weights(model)
        return fn

    one = rank_of(1)(0)
    for found in run_ranks(2, rank_of(2)):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-3)  # Adam divides gradients near 0, fp32, by their size


def test_learning_rate_and_clipping_change_what_is_learnt(tmp_path):
    results = []
    for i, settings in enumerate(({"max_gradient": 0.0}, {"lr": 1e-3}, {"max_gradient": 1e-4})):
        made, learn, model = stage(tmp_path / str(i), **settings)
        made.run(learn)
        results.append(weights(model))
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


def test_a_loss_that_is_not_finite_stops_the_stage_and_keeps_the_weights(tmp_path):
    made, learn, model = stage(tmp_path)
    with pytest.raises(ValueError, match="sft: loss nan and gradient norm nan are not finite"):
        made.run(lambda step: learn(step, float("nan") if step == 3 else 1.0))
    assert weights(model).isfinite().all() and checkpoint.latest(tmp_path / "sft").name == "step-00000002"


def test_parts_of_ranks_are_disjoint_and_whole():
    for P in (1, 2, 3, 5):
        for count in (5, 7, 12):
            rows = [list(range(count))[stages.part_of(processes.World(r, P), count)] for r in range(P)]
            assert sum(rows, []) == list(range(count)) and max(map(len, rows)) - min(map(len, rows)) <= 1
