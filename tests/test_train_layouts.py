"""train.py on layouts of processes: what it learns is what one process learns; what it cannot do is said before work."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import run_program, spawn_ranks
from test_train import losses, main_and_errors_on_rank, main_on_rank, metrics, text, weights  # noqa: F401

import train
from config import ConfigError, TrainConfig, derive, parse, refuse_meaningless
from gpt import GPT

SMALL = ["--n_layers=2", "--n_heads=4", "--d_model=16", "--context=16", "--vocab_size=281", "--batch_tokens=256", "--steps=6",
         "--eval_every=3", "--eval_tokens=400", "--save_every=3", "--warmup_steps=2", "--samples=1", "--sample_tokens=4",
         "--precision=fp32"]  # bf16 is the default where the CPU multiplies it


@pytest.fixture(scope="module")
def one_process(text, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("one")
    assert train.main([f"--out={out}", f"--data={text}", *SMALL]) == 0
    return out, metrics(out)


def assert_learns_the_same(out, one_process):
    theirs, expected = weights(one_process[0]), one_process[1]
    found = metrics(out)
    assert losses(found) == pytest.approx(losses(expected), abs=1e-5)
    for key in ("held_out_loss", "grad_norm"):
        assert [line[key] for line in found if key in line] == pytest.approx([line[key] for line in expected if key in line], abs=1e-4)
    for name, a in weights(out).items():
        # Adam divides a gradient that is all rounding error by itself: such a weight may move by lr a step.
        assert (a - theirs[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("P, flags", ((8, "--tp=2 --pp=2 --zero=1"), (4, "--cp=2 --zero=3"), (2, "--tp=2 --sequence --recompute=block"),
                                      (2, "--zero=2 --offload --recompute=attention")), ids=str)
def test_a_layout_learns_what_one_process_learns(text, tmp_path, one_process, P, flags):  # noqa: F811
    """The vocabulary, 281, is divided by none of them."""
    assert spawn_ranks(P, main_on_rank, [f"--out={tmp_path}", f"--data={text}", *SMALL, *flags.split()], init=False,
                       timeout=150) == [0] * P
    assert_learns_the_same(tmp_path, one_process)


def test_a_run_goes_on_in_another_layout_and_is_exported(text, tmp_path, one_process):  # noqa: F811
    arguments = [f"--out={tmp_path}", f"--data={text}", *SMALL]
    assert spawn_ranks(2, stop_after_3, [*arguments, "--pp=2"], init=False) == [9, 9]
    assert spawn_ranks(2, main_on_rank, [f"--out={tmp_path}", "--resume", "--zero=3"], init=False) == [0, 0]
    assert_learns_the_same(tmp_path, one_process)
    done = run_program(["checkpoint.py", "--export", tmp_path, "--to", tmp_path / "hf"])
    assert done.returncode == 0 and "step-00000006" in done.stdout
    exported = GPT.from_pretrained(tmp_path / "hf")
    assert all((p - weights(tmp_path)[name]).abs().max() == 0 for name, p in exported.named_parameters())
    half = run_program(["checkpoint.py", "--export", tmp_path])
    assert half.returncode == 2 and half.stderr == "checkpoint.py: --export needs --to and the other way round: from where, to where\n"


def stop_after_3(rank, arguments):
    original = train.Trainer.step
    train.Trainer.step = lambda self, n, *rest, **options: original(self, n, *rest, **options) if n < 3 else sys.exit(9)
    try:
        train.main(arguments)
    except SystemExit:
        return 9


def silent_or_dead(rank, arguments, how):
    original = train.Trainer.step

    def step(self, n, *rest, **options):
        if n == 2 and rank == 1:
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return original(self, n, *rest, **options)

    train.Trainer.step = step
    began = time.monotonic()
    return (*main_and_errors_on_rank(rank, arguments), time.monotonic() - began)


@pytest.mark.parametrize("layout, how", (("--pp=2", "dies"), ("--tp=2", "dies"), ("--zero=3", "dies"), ("--pp=2", "hangs")))
def test_a_rank_that_dies_or_hangs_stops_the_others_within_the_time_out(text, tmp_path, layout, how):  # noqa: F811
    arguments = [f"--out={tmp_path}", f"--data={text}", *SMALL, layout, "--timeout=6"]
    results = spawn_ranks(2, silent_or_dead, arguments, how, init=False, timeout=40, return_exceptions=True) \
        if how == "dies" else spawn_ranks(2, first_only, arguments, how, init=False, timeout=100)
    status, errors, seconds = results[0]
    assert status == 1 and errors.count("\n") == 1 and seconds < 40
    assert "rank 0 lost another process" in errors and "--resume" in errors


def first_only(rank, arguments, how):
    """The silent rank leaves when the other one has given up."""
    gave_up, sleep = Path(arguments[0].removeprefix("--out="), "gave_up"), time.sleep
    if rank == 0:
        found = silent_or_dead(rank, arguments, how)
        gave_up.touch()
        return found

    def until_then(seconds):
        deadline = time.monotonic() + seconds
        while not (seconds == 60 and gave_up.exists()) and time.monotonic() < deadline:
            sleep(min(0.05, seconds))

    time.sleep = until_then
    try:
        silent_or_dead(rank, arguments, how)
    except BaseException:
        pass


@pytest.mark.parametrize("flags, message", (
    ("--tp=3 --n_heads=4", "--tp=3 cannot share 4 heads, 4 key and value heads and 64 hidden units: 1, 2, 4 can"),
    ("--pp=3", "--pp=3 stages need as many blocks, the model has 2: --pp=2 at most"),
    ("--cp=3 --batch_tokens=240 --context=20", "--cp=3 needs a --context that 2 * 3 divides, got 20: 18 is one")))
def test_a_layout_that_does_not_fit_the_model_is_refused_by_all_ranks(text, tmp_path, flags, message):  # noqa: F811
    results = spawn_ranks(3, main_and_errors_on_rank, [f"--out={tmp_path}", f"--data={text}", *SMALL, *flags.split()], init=False)
    assert [status for status, _ in results] == [2, 2, 2]
    assert message in results[0][1] and results[0][1].count("\n") == 1 and not any(tmp_path.glob("step-*"))


def test_processes_that_do_not_make_the_layout_are_refused():
    for settings, processes, message in (
            (TrainConfig(tp=2, pp=2), 6, "dp 1 \\* tp 2 \\* pp 2 \\* cp 1 \\* ep 1 = 4 needs 4 processes, there are 6"),
            (TrainConfig(tp=2), 1, "needs 2 processes, there are 1: start them by torchrun --nproc_per_node=2"),
            (TrainConfig(dp=3, cp=2), 4, "= 6 needs 6 processes")):
        with pytest.raises(ConfigError, match=message):
            derive(settings, processes, "cpu", False)
    derived, notes = derive(TrainConfig(tp=2, pp=2), 8, "cpu", False)
    assert derived.dp == 2 and "dp = 2 (8 processes / (tp 2 * pp 2 * cp 1 * ep 1))" in notes
    assert derived.micro_batch == 1 and derived.batch_tokens // (2 * 128) == 8  # eight microbatches for two stages


@pytest.mark.parametrize("flags, message", (
    ("--ep=2", "--ep means nothing here: a gpt has no experts"), ("--sequence", "it divides work over --tp, which is 1"),
    ("--offload", "it moves what --zero divides"), ("--pipeline=zb", "--pp=1 is no pipeline"),
    ("--compile --tp=2", "it is for data parallelism alone"),
    ("--model=moe --recompute=block", "experts would count visits twice")))
def test_flags_that_mean_nothing_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        refuse_meaningless(*parse(flags.split(), ""))


def test_recomputation_that_would_draw_other_masks_is_refused():
    with pytest.raises(ConfigError, match="other dropout masks"):
        derive(TrainConfig(recompute="block", tp=2, sequence=True, dropout=0.1), 2, "cpu", False)


def test_saving_goes_on_beside_the_steps_after_it(text, tmp_path, monkeypatch):  # noqa: F811
    """The checkpoint of step 3 is held up until step 5 is done; nothing waits for it, and it is that of step 3."""
    import checkpoint

    original, steps, held = checkpoint._fingerprint, [], []

    def slow(file):
        if "step-00000003" in str(file) and not held:
            held.append(True)
            deadline = time.monotonic() + 30
            while len(steps) < 5 and time.monotonic() < deadline:
                time.sleep(0.01)
        return original(file)

    step = train.Trainer.step
    monkeypatch.setattr(checkpoint, "_fingerprint", slow)
    monkeypatch.setattr(train.Trainer, "step", lambda self, n, *rest, **o: (step(self, n, *rest, **o), steps.append(n))[0])
    assert train.main([f"--out={tmp_path}", f"--data={text}", *SMALL, "--keep=5"]) == 0
    assert held and json.loads((tmp_path / "step-00000003" / "meta.json").read_text())["step"] == 3
    assert checkpoint.load(tmp_path / "step-00000003")["optimizer"]["norm.bias"]["step"] == 3


@pytest.mark.parametrize("P, flags", ((1, ""), (2, "--zero=2"), (2, "--tp=2")))
def test_fp16_with_a_scaled_loss_learns_about_the_same(text, tmp_path, one_process, P, flags):  # noqa: F811
    """Half precision keeps three digits of each product."""
    arguments = [f"--out={tmp_path}", f"--data={text}", *SMALL, "--precision=fp16", *flags.split()]
    assert spawn_ranks(P, main_on_rank, arguments, init=False, timeout=100) == [0] * P
    found = losses(metrics(tmp_path))
    assert found == pytest.approx(losses(one_process[1]), abs=0.02) and found != losses(one_process[1])


def test_a_scale_that_is_too_large_skips_steps_and_comes_down(text, tmp_path, monkeypatch):  # noqa: F811
    class TooLarge(train.precision.LossScale):
        def __init__(self):
            super().__init__(scale=2.0**40, backoff=2.0**-10)

    monkeypatch.setattr(train.precision, "LossScale", TooLarge)
    assert train.main([f"--out={tmp_path}", f"--data={text}", *SMALL, "--precision=fp16", "--steps=8"]) == 0
    found, meta = metrics(tmp_path), json.loads((tmp_path / "step-00000008" / "meta.json").read_text())
    assert found[0]["loss"] == pytest.approx(5.64, abs=0.05) and found[-1]["loss"] < found[0]["loss"] - 0.02
    assert meta["loss_scale"]["scale"] < 2.0**40 and meta["loss_scale"]["good_steps"] > 0
