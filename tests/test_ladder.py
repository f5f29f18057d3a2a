"""The ladder: a run that serves several marks is several runs; the program predicts before it trains."""

import functools
import math
import re
import runpy
import sys

import numpy as np
import pytest
import torch

import data
import gpt
import ladder
import scaling_laws
from conftest import ROOT
from ladder import BATCH, CONTEXT, VOCABULARY, train_width

STEP = BATCH * CONTEXT


@pytest.fixture(scope="module")
def text():
    """Tokens with something to learn: each is mostly the one before it plus one."""
    random = np.random.RandomState(0)
    return (np.cumsum(np.where(random.rand(20_000) < 0.8, 1, random.randint(0, 50, 20_000))) % 50).astype(np.uint16)


def test_one_run_for_several_marks_matches_a_run_for_each(monkeypatch, text):
    monkeypatch.setattr(ladder, "BATCH", 2)
    few, many = 10 * CONTEXT, 20 * CONTEXT  # 5 and 10 steps
    together = train_width(16, text, text[:1000], [few, many], 1)
    alone = [train_width(16, text, text[:1000], [mark], 1)[0] for mark in (few, many)]
    assert together == alone  # exactly: the same steps in the same order
    config = gpt.GPTConfig(VOCABULARY, CONTEXT, 3, 1, 16)
    assert [(n, d) for n, d, _ in alone] == [(gpt.count_parameters(config), few), (gpt.count_parameters(config), many)]
    assert alone[1][2] < alone[0][2] < math.log(VOCABULARY)
    assert train_width(16, text, text[:1000], [few], 1, seed=1) != alone[:1]


def test_losses_match_a_plain_loop(text):
    """Warm-up and cooling spelt out, with windows cut by hand."""
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(VOCABULARY, CONTEXT, 3, 1, 16), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    order = data.TokenWindows(text, CONTEXT, 0).order(0)
    for number in range(10):
        rate = 0.25 / 16 * (number + 1) / 50 * (1 if number < 8 else (10 - number) / 2)
        rows = torch.stack([torch.from_numpy(text[i * CONTEXT:i * CONTEXT + CONTEXT + 1].astype(np.int64))
                            for i in order[number * BATCH:(number + 1) * BATCH]])
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    held = torch.from_numpy(text[:961].astype(np.int64))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(held[:-1].view(15, CONTEXT)).flatten(0, 1), held[1:])
    found = train_width(16, text, text[:1000], [10 * STEP], 1)[0][2]
    assert found == pytest.approx(expected.item(), abs=1e-4)  # fused AdamW rounds differently in fp32


def program(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["ladder.py", *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "ladder.py"), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_prediction_is_printed_before_the_larger_model_is_trained(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(ladder, "LADDER", (16, 32, 48))
    monkeypatch.setattr(data, "default_documents", lambda: [path.read_text() for path in ROOT.glob("s*.py")])  # quick
    for name in ("parametric_fit", "kaplan_fit"):
        monkeypatch.setattr(scaling_laws, name, functools.partial(getattr(scaling_laws, name), keep=1))
    calls = []

    def trained(width, tokens, held_out, marks, threads, seed):
        calls.append((width, capsys.readouterr().out))
        return [(4e5, marks[-1], 6.5)]

    class Pool:  # in this process: starting others costs seconds
        def __init__(self, *arguments):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, width, line, held_out, marks, threads, seed):
            runs = [(1e4 * width, mark, 5 + 30 / width + 1e4 / mark) for mark in marks]
            return type("Done", (), {"result": lambda self: runs})()

    monkeypatch.setattr(ladder, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(ladder, "train_width", trained)
    ladder.show_measure(41000, str(tmp_path / "law.png"))
    (width, before), = calls
    assert width == ladder.TARGET and "predicted before it is trained" in before
    predicted = float(re.search(r"tokens: (\d\.\d+)", before)[1])
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"predicted loss {predicted:.4f}, actual 6.5000: {predicted / 6.5 - 1:+.2%} (expected within 3%)" in last
    assert (tmp_path / "law.png").stat().st_size > 0


@pytest.mark.parametrize("arguments, message", [
    (["--tokens", 100], "--tokens must be at least"), (["--tokens", "nan"], "--tokens must be"), (["--tokens", "x"], "invalid float"),
    (["--tokens", 1e12], "below 1e9"), (["--widths", 3], "unrecognized"),
    (["--plot", "no/such/folder.png"], "cannot be drawn")])  # before it trains, not after minutes
def test_bad_flags_are_one_line(monkeypatch, capsys, arguments, message):
    status, out, err = program(monkeypatch, capsys, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1
