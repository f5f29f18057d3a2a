"""The loop that all stages share: interrupted against unbroken, what a checkpoint holds, what is refused."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch

import checkpoint
import gpt
import processes
import stages
import tokenizer
from conftest import run_ranks
from run_here import run_here
from team import Team

ENCODING = tokenizer.train(["the quick brown fox"], 257)


def stage(folder, total=6, lr=1e-2, world=processes.World(), tp=1, zero=0, **settings):
    model = gpt.GPT(gpt.GPTConfig(257, 16, 1, 2, 16), generator=torch.Generator().manual_seed(0))
    config = stages._Settings(Path(folder), 0, 2)
    for name, value in settings.items():
        setattr(config, name, value)
    team = Team(world, tp, zero)
    made = stages.Stage("sft", config, team, ENCODING, {"model": team.cut(model)}, total, lr)
    texts = torch.randint(257, (total, 4, 17), generator=torch.Generator().manual_seed(1))

    def learn(step, scale=1.0):
        mine = texts[step, team.part::team.parts]
        return made.step(-scale * team.log_probs(model, mine)[:, 1:].mean() * len(mine) / 4)

    return made, learn, model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_demo_interrupts_a_run_that_then_ends_as_the_unbroken_one(capsys):
    stages.main(6, 0)
    assert capsys.readouterr().out.splitlines()[-1].startswith("interrupted = unbroken: True")


def test_program_refuses_in_one_line():
    bad = run_here(["stages.py", "--steps", "1"])
    assert bad.returncode == 2 and bad.stderr.startswith("stages.py: --steps") and bad.stderr.count("\n") == 1


def test_a_done_stage_stays_and_its_metrics_have_every_step_once(tmp_path):
    made, learn, model = stage(tmp_path)
    made.run(learn)
    again, learn, other = stage(tmp_path)
    again.run(lambda step: pytest.fail("a step was done twice"))
    assert torch.equal(weights(model), weights(other))
    lines = [json.loads(line) for line in (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and {"loss", "lr", "grad_norm"} <= lines[0].keys()
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_stage_saved_and_a_resumed_one_ends_as_the_unbroken_one(tmp_path, number):
    unbroken, learn, expected = stage(tmp_path / "a")
    unbroken.run(learn)
    made, learn, _ = stage(tmp_path / "b", save_every=100)
    before = signal.getsignal(signal.SIGINT)

    def signalled(step):
        if step == 2:
            os.kill(os.getpid(), number)
        return learn(step)

    with pytest.raises(SystemExit) as left:
        made.run(signalled)
    assert left.value.code == 128 + number and signal.getsignal(signal.SIGINT) is before
    assert checkpoint.latest(tmp_path / "b/sft").name == "step-00000003"
    again, learn, model = stage(tmp_path / "b", save_every=100)
    again.run(learn)
    assert torch.equal(weights(model), weights(expected))
    steps = [json.loads(line)["step"] for line in (tmp_path / "b/sft/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_second_ctrl_c_interrupts_at_once(monkeypatch):
    clock = iter([0.0, 1.0, 3.0])
    monkeypatch.setattr(processes.time, "monotonic", lambda: next(clock))
    with pytest.raises(KeyboardInterrupt), processes.noting_signals(lambda text: None) as received:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a second later: torchrun passing it on
        assert received == [signal.SIGINT] * 2
        os.kill(os.getpid(), signal.SIGINT)


def test_a_run_goes_on_in_another_layout(tmp_path):
    unbroken, learn, expected = stage(tmp_path / "a")
    unbroken.run(learn)

    def run_until(stop, **layout):
        def fn(rank):
            made, learn, _ = stage(tmp_path / "b", world=processes.World(rank, 2, rank, 2), **layout)

            def until(step):
                if step == stop:
                    raise InterruptedError
                return learn(step)

            with contextlib.suppress(InterruptedError):
                made.run(until)

        run_ranks(2, fn)

    run_until(2, zero=3)
    assert checkpoint.latest(tmp_path / "b/sft").name == "step-00000002"
    run_until(None, tp=2)
    found = checkpoint.load(checkpoint.latest(tmp_path / "b/sft"), ("model", "optimizer"))
    assert {key for states in found["optimizer"].values() for key in states} == {"step", "exp_avg", "exp_avg_sq"}
    for name, p in expected.named_parameters():
        torch.testing.assert_close(found["model"][name], p, rtol=0, atol=1e-3)  # as above: Adam, fp32
