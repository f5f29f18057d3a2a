"""The whole run: equal on any number of processes, resumed bit for bit, stopped by anything without loss."""

import contextlib
import dataclasses
import gzip
import io
import json
import math
import os
import pydoc_data.topics
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Program, run_program, spawn_ranks

import alignment
import checkpoint
import data
import gpt
import models
import processes
import tokenizer
import train
from config import ConfigError, TrainConfig, derive

SMALL = ["--n_layers=1", "--n_heads=2", "--d_model=16", "--context=16", "--vocab_size=280", "--batch_tokens=128",
         "--steps=12", "--save_every=4", "--eval_every=6", "--eval_tokens=256", "--samples=0", "--device=cpu",
         "--precision=fp32", "--lr=2e-3"]


# What MFU is measured against: large products in each of some hundred runs; test_processes.py measures.
train.measure_peak = lambda world, dtype: 1e11


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of forty short documents; each test has its own --out."""
    path = tmp_path_factory.mktemp("text") / "topics.jsonl"
    documents = [topic[:500] for _, topic in sorted(pydoc_data.topics.topics.items())[:40]]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def run(out, text, *flags, expect=0):
    """train.main in this process; returns the lines of metrics.jsonl."""
    assert train.main([f"--out={out}", f"--data={text}", *SMALL, *flags]) == expect
    return metrics(out)


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses(lines):
    return [line["loss"] for line in lines]


def weights(out):
    return checkpoint.load(checkpoint.latest(out), parts=("model",))["model"]


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory):
    """The run that all others are compared with: its folder and metrics."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    return out, run(out, text)


def main_on_rank(rank, arguments):
    return train.main(arguments)


def main_and_errors_on_rank(rank, arguments):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        return train.main(arguments), errors.getvalue()


# --- what is learnt ---------------------------------------------------------------------------

@pytest.mark.parametrize("library", ["ours", "transformers"])
def test_losses_match_a_plain_loop_with_torchs_own_parts(library, unbroken, text, tmp_path):
    """Forward by our GPT or by transformers' from the same weights, everything else as torch's tutorials do it."""
    out, lines = unbroken
    encoding = tokenizer.load(out / "tokens" / "tokenizer.tiktoken")
    windows = data.TokenWindows(np.load(out / "tokens" / "train.npy"), 16, seed=0)
    model = gpt.GPT(gpt.GPTConfig(encoding.n_vocab, 16, 1, 2, 16), generator=torch.Generator().manual_seed(0))
    forward = model
    if library == "transformers":
        import transformers
        model.save_pretrained(tmp_path)
        model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)

        def forward(x):
            return model(x).logits
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}],
                                  lr=2e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12, eta_min=2e-4)  # 12 // 20 = 0 steps of warm-up
    for step, line in enumerate(lines):
        x, y = windows.batch(8 * step, 8)
        loss = F.cross_entropy(forward(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert line["lr"] == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)  # fp32 sums in another order
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    held_out = np.load(out / "tokens" / "validation.npy").astype(np.int64)[:16 * 16 + 1]
    x, y = torch.tensor(held_out[:-1]).view(16, 16), torch.tensor(held_out[1:]).view(16, 16)
    expected = F.cross_entropy(forward(x).flatten(0, 1), y.flatten()).item()
    assert lines[-1]["held_out_loss"] == pytest.approx(expected, abs=1e-5)
    assert losses(lines)[0] == pytest.approx(math.log(280), abs=0.1) and losses(lines)[-1] < losses(lines)[0]


@pytest.mark.parametrize("P", [2, 4])
def test_any_number_of_processes_learns_the_same(unbroken, text, tmp_path, P):
    arguments = [f"--out={tmp_path}", f"--data={text}", *SMALL, "--micro_batch=1"]
    assert spawn_ranks(P, main_on_rank, arguments, init=False) == [0] * P
    mine, one = metrics(tmp_path), unbroken[1]
    assert losses(mine) == pytest.approx(losses(one), abs=1e-5)
    assert mine[-1]["held_out_loss"] == pytest.approx(one[-1]["held_out_loss"], abs=1e-5)
    theirs = weights(unbroken[0])
    for name, a in weights(tmp_path).items():
        # Adam divides a gradient that is all rounding error by itself: such a weight may move by lr a step.
        torch.testing.assert_close(a, theirs[name], atol=1e-4, rtol=0)


def test_accumulation_learns_the_same(unbroken, text, tmp_path):
    assert losses(run(tmp_path, text, "--micro_batch=2")) == pytest.approx(losses(unbroken[1]), abs=1e-5)


def test_bf16_learns_nearly_the_same_and_keeps_fp32_weights(unbroken, text, tmp_path):
    lines = run(tmp_path, text, "--precision=bf16", "--micro_batch=4")
    assert losses(lines) != losses(unbroken[1])
    assert losses(lines) == pytest.approx(losses(unbroken[1]), abs=0.02)  # 8 bits of mantissa in logits of order 1
    assert all(p.dtype == torch.float32 for p in weights(tmp_path).values())


def test_attention_of_short_sequences_in_bf16_on_a_cpu_is_unfused():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert train.pick_attention(cpu, 256, "bf16") is gpt.unfused_attention
    assert {train.pick_attention(*other) for other in ((cpu, 257, "bf16"), (cpu, 256, "fp32"), (cuda, 256, "bf16"))} == {gpt.attention}


@pytest.mark.parametrize("preset", ["llama_tiny", "moe_tiny"])
def test_every_model_learns_in_bf16_what_it_learns_in_fp32(text, tmp_path, preset):
    """Their groups of heads share keys. bf16 is the default where the CPU multiplies it."""
    found = []
    for precision in ("fp32", "bf16"):
        assert train.main([f"--out={tmp_path / precision}", f"--data={text}", *SMALL[1:], f"--preset={preset}", "--stage=pretrain",
                           "--n_heads=4", "--d_model=32", f"--precision={precision}", "--n_layers=1"]) == 0
        found.append(losses(metrics(tmp_path / precision)))
    assert found[0] != found[1] and found[1] == pytest.approx(found[0], abs=0.03)  # 8 bits of mantissa in logits of order 1


def test_every_format_gives_the_same_tokens(text, tmp_path):
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    (tmp_path / "txt").mkdir()
    for i, document in enumerate(documents):
        (tmp_path / "txt" / f"{i:02}.txt").write_text(document)
    with gzip.open(tmp_path / "all.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    with gzip.open(tmp_path / "crawl.warc.wet.gz", "wb") as file:
        for document in documents:
            body = document.encode()
            file.write(b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: %d\r\n\r\n" % len(body) + body + b"\r\n\r\n")
    expected = losses(run(tmp_path / "0", text, "--steps=1"))
    for i, pattern in enumerate(("txt/*.txt", "all.jsonl.gz", "crawl.warc.wet.gz"), 1):
        assert losses(run(tmp_path / str(i), tmp_path / pattern, "--steps=1")) == expected


# --- stopped and resumed ------------------------------------------------------------------------

class Killed(BaseException):
    pass


def run_killed_in_step(step, out, text, monkeypatch, *flags):
    """A run that is gone in the middle of a step, without a chance to save."""
    original = train.Trainer.step

    def dying(self, number, *arguments, **options):
        if number == step:
            raise Killed
        return original(self, number, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", dying)
        with pytest.raises(Killed):
            run(out, text, *flags)


@pytest.mark.parametrize("flags", [(), ("--dropout=0.1", "--micro_batch=4"), ("--precision=bf16",)])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(text, tmp_path, monkeypatch, flags):
    whole = run(tmp_path / "whole", text, *flags)
    run_killed_in_step(6, tmp_path / "broken", text, monkeypatch, *flags)
    assert len(metrics(tmp_path / "broken")) == 6
    broken = run(tmp_path / "broken", text, "--resume", *flags)
    assert losses(broken) == losses(whole)
    assert [line["step"] for line in broken] == list(range(1, 13))
    for a, b in zip(weights(tmp_path / "broken").values(), weights(tmp_path / "whole").values()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 4)])
def test_a_run_resumes_on_another_number_of_processes(unbroken, text, tmp_path, before, after):
    arguments = [f"--out={tmp_path}", f"--data={text}", *SMALL]
    assert spawn_ranks(before, main_on_rank_until_step_8, arguments, init=False) == [9] * before
    assert spawn_ranks(after, main_on_rank, [*arguments, "--resume"], init=False) == [0] * after
    assert losses(metrics(tmp_path)) == pytest.approx(losses(unbroken[1]), abs=1e-5)


def main_on_rank_until_step_8(rank, arguments):
    original = train.Trainer.step
    train.Trainer.step = lambda self, n, *rest, **options: original(self, n, *rest, **options) if n < 8 else sys.exit(9)
    try:
        train.main(arguments)
    except SystemExit:
        return 9


def test_resume_alone_takes_the_settings_of_the_run(text, tmp_path, monkeypatch):
    run_killed_in_step(6, tmp_path, text, monkeypatch, "--lr=0.01", "--seed=5")
    assert train.main([f"--out={tmp_path}", "--resume"]) == 0
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 13))
    assert metrics(tmp_path)[5]["lr"] > metrics(tmp_path)[-1]["lr"] > 1e-3


def test_a_finished_run_can_be_made_longer(text, tmp_path):
    run(tmp_path, text)
    assert [line["step"] for line in run(tmp_path, text, "--resume", "--steps=15")] == list(range(1, 16))


def test_resume_without_a_run_starts_one_and_says_so(text, tmp_path, capsys):
    assert losses(run(tmp_path / "a", text, "--resume", "--steps=4")) == losses(run(tmp_path / "b", text, "--steps=4"))
    assert "nothing to resume" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_damaged_tokens_are_packed_again(unbroken, text, tmp_path, monkeypatch, damage):
    run_killed_in_step(6, tmp_path, text, monkeypatch)
    file = tmp_path / "tokens" / "train.npy"
    good = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(good[:len(good) // 2] if damage == "cut" else good[:2000] + bytes([good[2000] ^ 1]) + good[2001:])
    assert losses(run(tmp_path, text, "--resume")) == losses(unbroken[1])
    assert file.read_bytes() == good


def test_a_kill_between_saving_and_reporting_loses_no_line(unbroken, text, tmp_path, monkeypatch):
    def dying(self, line):
        if line["step"] == 8:
            raise Killed
        original(self, line)

    original = train.Progress.report
    with monkeypatch.context() as patch:
        patch.setattr(train.Progress, "report", dying)
        with pytest.raises(Killed):
            run(tmp_path, text)
    assert len(metrics(tmp_path)) == 7 and checkpoint.latest(tmp_path).name == "step-00000008"
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # and a line that was cut short
    assert losses(run(tmp_path, text, "--resume")) == losses(unbroken[1])


def test_fewer_steps_than_are_done_are_refused(text, tmp_path, capsys):
    run(tmp_path, text)
    assert "has done 12 steps already, --steps=8 is less" in refused(
        capsys, f"--data={text}", f"--out={tmp_path}", *SMALL, "--resume", "--steps=8")


def test_settings_of_the_machine_are_not_inherited(text, tmp_path, monkeypatch):
    run_killed_in_step(6, tmp_path, text, monkeypatch, "--micro_batch=8", "--dp=1")
    assert spawn_ranks(2, main_on_rank, [f"--out={tmp_path}", "--resume"], init=False) == [0, 0]


def test_torchrun_does_not_go_on_with_a_run_that_it_did_not_begin(text, tmp_path, capsys, monkeypatch):
    run(tmp_path, text, "--steps=4")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    mine = (tmp_path / ".torchrun").read_text()
    (tmp_path / ".torchrun").write_text("another torchrun")
    assert "already holds a run" in refused(capsys, f"--data={text}", f"--out={tmp_path}", *SMALL, "--steps=6")
    (tmp_path / ".torchrun").write_text(mine)
    assert len(run(tmp_path, text, "--steps=6", "--overwrite")) == 6
    assert "resuming from" in capsys.readouterr().out


def test_two_runs_in_one_folder_are_refused(text, tmp_path, capsys):
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); "
                               "fcntl.flock(f, fcntl.LOCK_EX); f.write('123'); f.flush(); print('locked', flush=True); "
                               "time.sleep(60)", str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    holder.stdout.readline()
    assert "is being written by process 123" in refused(capsys, f"--data={text}", f"--out={tmp_path}", *SMALL)
    holder.kill()
    holder.communicate()
    run(tmp_path, text, "--steps=1")


def test_a_second_ctrl_c_leaves_at_once(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with train.noting_signals(print) as received:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun's copy of the first
        assert received == [signal.SIGINT, signal.SIGINT]
        now = time.monotonic()
        monkeypatch.setattr(processes.time, "monotonic", lambda: now + 3)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_is_not_overwritten_unless_told_so(text, tmp_path, capsys):
    first = run(tmp_path, text, "--steps=4")
    assert run(tmp_path, text, "--steps=4", expect=2) == first
    assert "already holds a run (step-00000004): --resume" in capsys.readouterr().err
    again = run(tmp_path, text, "--steps=2", "--overwrite", "--seed=1")
    assert losses(again) != losses(first)[:2]
    assert checkpoint.latest(tmp_path).name == "step-00000002"
    for bad in ("--batch_tokens=100", "--data=missing.txt", "--tokenizer=missing"):
        flags = [flag for flag in SMALL if not (flag.startswith("--vocab_size") and "tokenizer" in bad)]
        refused(capsys, f"--data={text}", f"--out={tmp_path}", *flags, "--overwrite", bad)
    assert checkpoint.latest(tmp_path).name == "step-00000002", "what is refused deletes nothing"


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


DIES = f"""
import os, pathlib, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
import train

save, step, out = torch.save, train.Trainer.step, sys.argv[1].removeprefix("--out=")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dying_save(state, file):
    save(state, file)
    if any("00000008" in str(path) for path in pathlib.Path(out).glob(".step-*")):
        die()

def dying_step(self, number, *arguments, **options):
    while number == 10 and not os.path.exists(out + "/step-00000008"):
        time.sleep(0.01)  # it is being written
    self.parallel.dp[0].finish = die if number == 10 else self.parallel.dp[0].finish
    return step(self, number, *arguments, **options)

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    torch.save = dying_save
elif os.environ["TORCHELASTIC_RESTART_COUNT"] == "1" and os.environ["RANK"] == "1":
    train.Trainer.step = dying_step
sys.exit(train.main(sys.argv[1:]))
"""


def test_torchrun_restarts_a_killed_rank_and_the_losses_are_those_of_an_unkilled_run(text, tmp_path):
    """SIGKILL to whoever is in the middle of writing a checkpoint; then to rank 1 in the middle of a step."""
    arguments = [f"--data={text}", *SMALL]
    assert spawn_ranks(2, main_on_rank, [f"--out={tmp_path / 'whole'}", *arguments], init=False) == [0, 0]
    (tmp_path / "dies.py").write_text(DIES)
    done = run_program(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=2",
                        tmp_path / "dies.py", f"--out={tmp_path / 'killed'}", *arguments])
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"resuming from .*(step-\d+)\n", done.stdout) == ["step-00000004", "step-00000008"]
    assert losses(metrics(tmp_path / "killed")) == losses(metrics(tmp_path / "whole"))


def test_ctrl_c_saves_and_leaves(text, tmp_path):
    arguments = ["train.py", f"--out={tmp_path}", f"--data={text}", *SMALL, "--steps=100000", "--save_every=100000",
                 "--eval_every=100000", "--lr=1e-3", "--schedule=constant"]
    program = Program(arguments)
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and len(metrics(tmp_path)) > 3)
    os.kill(program.process.pid, signal.SIGINT)
    done = program.wait(60)
    assert done.returncode == 130 and done.stderr == ""
    stopped = len(metrics(tmp_path))
    assert f"stopped after step {stopped}, saved in" in done.stdout
    assert checkpoint.load(checkpoint.latest(tmp_path))["meta"]["step"] == stopped
    assert len(run(tmp_path, text, "--resume", f"--steps={stopped + 2}", "--lr=1e-3", "--schedule=constant")) == stopped + 2


# --- bad input and bad luck ---------------------------------------------------------------------

def refused(capsys, *flags):
    """The one line that train.py says on stderr before it leaves with status 2."""
    capsys.readouterr()
    assert train.main(list(flags)) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and errors.startswith("train.py: "), errors
    return errors


@pytest.mark.parametrize("name, content, message", [
    ("missing.txt", None, "missing.txt"),
    ("empty.txt", b"", "empty.txt"),
    ("binary.txt", b"\x00\x01\x02" * 100, "binary.txt"),
    ("latin.txt", "déjà vu ".encode("latin-1") * 100, "latin.txt"),
    ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "bad.jsonl.*2"),
    ("nothing-*.txt", None, "nothing-"),
    ("cut.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 1000, mtime=0)[:-20], "cut.jsonl.gz"),
    ("short.txt", b"too short", "fill one window of context 16"),
    ("model.bin", b"x", "model.bin")])
def test_unusable_text_is_refused_in_one_line(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert re.search(message, refused(capsys, f"--data={tmp_path / name}", f"--out={tmp_path / 'out'}", *SMALL))
    assert not list(tmp_path.glob("out/step-*"))


@pytest.mark.parametrize("flags, message", [
    (["--bathc_tokens=4"], "unknown flag --bathc_tokens: did you mean --batch_tokens?"),
    (["--qqq"], "unknown flag --qqq: see --help"),
    (["--steps=many"], "--steps: 'many' is not a whole number"),
    (["--steps=inf"], "--steps: 'inf' is not a whole number"),
    (["--min_lr=1"], "--min_lr=1 is above --lr=0.002"),
    (["--warmup_steps=13"], "--warmup_steps=13 and the decay do not fit into --steps=12"),
    (["--d_model=1e8", "--batch_tokens=128"], "take more processes with --zero=1, 2 or 3 or --tp, fewer --n_layers"),
    (["--d_model=1e8", "--batch_tokens=128", "--model=moe"], "--zero=1, 2 or 3, --tp or --ep, fewer --n_layers"),
    (["--d_model=1e8", "--batch_tokens=128"], "GiB for weights, gradients and AdamW's moments do not fit"),
    (["--schedule=linear"], "--schedule"),
    (["--preset=gpt5"], "--preset"),
    (["--lr=-1"], "--lr must be at least 0, got -1.0"),
    (["--batch_tokens=100"], "no multiple of context * dp * ep = 16 * 1: the nearest is 96"),
    (["--micro_batch=3"], "--micro_batch=3 does not divide a process's 8 sequences"),
    (["--dp=2"], "--dp=2 needs 2 processes, there are 1"),
    (["--n_heads=3"], "--n_heads=3 does not divide --d_model=16"),
    (["--decay_steps=3"], "only --schedule=wsd has it"),
    (["--min_lr=0", "--schedule=constant"], "a constant schedule"),
    (["--resume", "--overwrite"], "--overwrite starts again"),
    (["--device=tpu"], "--device=tpu cannot be used here: take one of "),
    (["--tokenizer=no/such/file"], "--tokenizer=no/such/file")])
def test_bad_settings_are_refused_in_one_line(text, tmp_path, capsys, flags, message):
    keep = [flag for flag in SMALL if not (flag.startswith("--vocab_size") and any("tokenizer" in f for f in flags))]
    assert message in refused(capsys, f"--data={text}", f"--out={tmp_path}", *keep, *flags)


def test_what_alignment_refuses_after_pretraining_is_one_line(text, tmp_path, capsys, monkeypatch):
    def run_stages(config, world):
        raise alignment.AlignmentError("of the 9 pairs none is left: give more\nthan that")

    monkeypatch.setattr(alignment, "run_stages", run_stages)
    error = refused(capsys, f"--data={text}", f"--out={tmp_path}", *SMALL, "--stage=all", "--steps=1")
    assert error == "train.py: of the 9 pairs none is left: give more\n"


@pytest.mark.parametrize("saved, flags, message", [
    (dict(model="moe"), ["--n_experts=8", "--ep=1"], "--min_lr=1 is above --lr"),  # nothing else is wrong
    (dict(schedule="wsd"), ["--decay_steps=5"], "--min_lr=1 is above --lr"),
    (dict(schedule="constant"), [], "--min_lr means nothing here: a constant schedule"),
    (dict(model="llama"), ["--n_experts=8"], "--n_experts means nothing here: a llama has no experts")])
def test_flags_of_a_resumed_run_are_judged_beside_the_settings_of_its_checkpoint(tmp_path, capsys, saved, flags, message):
    checkpoint.save(tmp_path, 4, {}, {"train_config": dataclasses.asdict(TrainConfig(**saved))})
    assert message in refused(capsys, f"--out={tmp_path}", "--resume", "--min_lr=1", *flags)


def test_checkpoints_that_do_not_fit_are_refused(text, tmp_path, capsys):
    run(tmp_path, text, "--steps=8")
    arguments = [f"--data={text}", f"--out={tmp_path}", *SMALL, "--resume"]
    assert "was trained with --n_layers=1, not 2" in refused(capsys, *arguments, "--n_layers=2")
    other = text.parent / "other.jsonl"
    other.write_text(text.read_text() + '{"text": "more"}\n')
    assert "was trained with --data=" in refused(capsys, *arguments, f"--data={other}")
    step8 = tmp_path / "step-00000008"
    good = (step8 / "__0_0.distcp").read_bytes()
    for bad in (good[:-100], good[:2000] + bytes([good[2000] ^ 1]) + good[2001:]):
        (step8 / "__0_0.distcp").write_bytes(bad)
        message = refused(capsys, *arguments)
        assert "__0_0.distcp" in message and "delete it to go on from" in message and "step-00000004" in message
    subprocess.run(["rm", "-r", str(step8)], check=True)
    run(tmp_path, text, "--resume")
    state = checkpoint.load(checkpoint.latest(tmp_path))
    state["model"]["extra"] = torch.zeros(1)
    checkpoint.save(tmp_path, 99, {"model": state["model"], "optimizer": state["optimizer"]}, state["meta"],
                    lambda folder: tokenizer.save(tokenizer.load(tmp_path / "tokens/tokenizer.tiktoken"), folder / "tokenizer.tiktoken"))
    assert "another model: only the checkpoint has extra" in refused(capsys, *arguments)


def test_changed_text_is_noticed_on_resume(text, tmp_path, capsys):
    mine = tmp_path / "mine.jsonl"
    mine.write_text(text.read_text())
    run(tmp_path / "out", mine, "--steps=4")
    mine.write_text(text.read_text() + '{"text": "one more document that was not there"}\n')
    run(tmp_path / "out", mine, "--resume", "--steps=5")  # the packed tokens are still there
    for file in (tmp_path / "out" / "tokens").iterdir():
        file.unlink()
    assert "was trained on other text" in refused(capsys, f"--data={mine}", f"--out={tmp_path / 'out'}", *SMALL, "--resume")


def test_a_full_disk_while_saving_leaves_the_last_checkpoint(text, tmp_path, capsys, monkeypatch):
    original = torch.save

    def full(state, path, *arguments):
        if any(tmp_path.glob(".step-00000008*")):
            raise OSError(28, "No space left on device")
        return original(state, path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        message = refused(capsys, f"--data={text}", f"--out={tmp_path}", *SMALL)
    assert "No space left" in message and "step-00000004 stays as it was" in message
    assert [path.name for path in sorted(tmp_path.glob("*step-*"))] == ["step-00000004"]
    assert len(run(tmp_path, text, "--resume")) == 12


def test_a_loss_that_is_not_finite_stops_the_run_after_saving(text, tmp_path, capsys):
    message = refused(capsys, f"--data={text}", f"--out={tmp_path}", *SMALL, "--lr=1e30", "--max_gradient=0", "--warmup_steps=0")
    assert "stopped in step 2: the loss is not finite on rank 0, examples 8 to 15" in message and "saved as step 1" in message
    state = checkpoint.load(checkpoint.latest(tmp_path))
    assert state["meta"]["step"] == 1 and all(p.isfinite().all() for p in state["model"].values())


def break_loss_of_rank_1(rank, arguments):
    original = train.layout.ParallelModel.losses
    if rank == 1:
        train.layout.ParallelModel.losses = lambda self, x, y: original(self, x, y) * math.nan
    return main_and_errors_on_rank(rank, arguments)


def test_the_rank_with_the_loss_that_is_not_finite_is_named(text, tmp_path):
    arguments = [f"--data={text}", f"--out={tmp_path}", *SMALL, "--micro_batch=2", "--eval_every=100"]
    (status, errors), other = spawn_ranks(2, break_loss_of_rank_1, arguments, init=False)
    assert status == 2 and other == (2, "") and errors.count("\n") == 1
    assert "stopped in step 1: the loss is not finite on rank 1, examples 4 to 5" in errors


def test_errors_before_training_are_said_once_by_all_ranks(tmp_path):
    arguments = [f"--data={tmp_path}/none.txt", f"--out={tmp_path}", *SMALL]
    (status, errors), other = spawn_ranks(2, main_and_errors_on_rank, arguments, init=False)
    assert status == 2 and other == (2, "") and errors.count("\n") == 1 and "none.txt" in errors


# --- every flag changes something ---------------------------------------------------------------

@pytest.mark.parametrize("flag", ["--lr=0.01", "--seed=1", "--context=32", "--n_layers=2", "--n_heads=4", "--d_model=32",
                                  "--dropout=0.2", "--batch_tokens=256", "--vocab_size=300", "--weight_decay=10",
                                  "--beta1=0.5", "--beta2=0.5", "--max_gradient=0.01", "--schedule=wsd", "--schedule=constant",
                                  "--warmup_steps=3", "--min_lr=0.002", "--held_out=0.3", "--steps=9"])
def test_settings_of_learning_change_the_losses(unbroken, text, tmp_path, flag):
    changed = losses(run(tmp_path, text, flag, "--eval_every=100", "--save_every=100"))
    assert changed[:9] != losses(unbroken[1])[:9] and all(map(math.isfinite, changed))


def test_settings_of_the_run_do_what_they_say(text, tmp_path, capsys):
    lines = run(tmp_path / "a", text, "--save_every=3", "--keep=3", "--eval_every=5", "--samples=2", "--sample_tokens=4")
    assert [p.name[-2:] for p in sorted((tmp_path / "a").glob("step-*"))] == ["06", "09", "12"]
    assert [line["step"] for line in lines if "held_out_loss" in line] == [5, 10, 12]
    output = capsys.readouterr().out
    assert "--- sample 2 ---" in output and "--- sample 3" not in output
    a = run(tmp_path / "b", text, "--eval_tokens=64")[-1]["held_out_loss"]
    assert a != lines[-1]["held_out_loss"]
    assert [set(line) >= {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu"} for line in lines] == [True] * 12


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_learning_rates_match_torchs_schedulers(schedule):
    c, _ = derive(TrainConfig(steps=50, warmup_steps=10, schedule=schedule, lr=1.0, min_lr=0.1, decay_steps=15), 1, "cpu", False)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    S = torch.optim.lr_scheduler
    parts = {"cosine": [S.CosineAnnealingLR(optimizer, 40, eta_min=0.1)], "constant": [S.ConstantLR(optimizer, 1.0)],
             "wsd": [S.ConstantLR(optimizer, 1.0), S.LinearLR(optimizer, 1.0, 0.1, 15)]}[schedule]
    warm = S.LinearLR(optimizer, 0.1, 1.0, 9)
    theirs = S.SequentialLR(optimizer, [warm, *parts], [10, 35][:len(parts)])
    for step in range(50):
        assert train.learning_rate(c, step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-9), step
        optimizer.step()
        theirs.step()


def test_decay_is_on_matrices_only():
    model = gpt.GPT(gpt.GPTConfig(50, 8, 1, 2, 16))
    trainer = train.Trainer(train.derive(TrainConfig(), 1, "cpu", False)[0], model, train.World())
    decayed, plain = trainer.parallel.optimizer.param_groups
    assert all(p.dim() == 2 for p in decayed["params"]) and all(p.dim() == 1 for p in plain["params"])
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0 and decayed["fused"]
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_a_compiler_that_fails_is_not_fatal(unbroken, text, tmp_path, capsys, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    assert losses(run(tmp_path, text, "--compile")) == losses(unbroken[1])
    assert "--compile failed, going on without: no compiler here" in capsys.readouterr().out


# --- what the run leaves behind -------------------------------------------------------------------

def test_the_checkpoint_says_everything(unbroken, text):
    out, lines = unbroken
    state = checkpoint.load(checkpoint.latest(out))
    meta = state["meta"]
    assert meta["step"] == 12 and meta["examples_seen"] == 12 * 8 and meta["model_type"] == "gpt"
    assert meta["train_config"]["data"] == str(text) and meta["train_config"]["micro_batch"] is None
    assert set(state["optimizer"]) == set(state["model"])
    assert lines[-1]["tokens"] == 12 * 128


def test_a_trained_checkpoint_decodes(unbroken):
    model, encoding = models.load_model(str(unbroken[0]), "cpu")
    assert encoding.n_vocab == 280 and model.config.context == 16
    x = torch.randint(280, (2, 10), generator=torch.Generator().manual_seed(0))
    again = gpt.GPT(model.config)
    again.load_state_dict(weights(unbroken[0]))
    torch.testing.assert_close(model(x), again.eval()(x))


def test_an_error_of_ours_still_shows_its_traceback(text, tmp_path, monkeypatch):
    def bug(*arguments):
        raise ValueError("a bug, not the user's")

    monkeypatch.setattr(train, "learning_rate", bug)
    with pytest.raises(ValueError, match="a bug"):
        run(tmp_path, text)


def test_config_errors_are_value_errors():
    assert issubclass(ConfigError, ValueError)
