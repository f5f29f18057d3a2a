"""Speedup: the two laws against a simulated machine, the fit against known shares."""

import runpy
import sys

import numpy as np
import pytest
import torch

from conftest import ROOT
from speedup import amdahl_serial_share, amdahl_speedup, fit_serial_share, gustafson_speedup, measure_threads


@pytest.mark.parametrize("serial", [0.0, 0.001, 0.25, 1.0])
@pytest.mark.parametrize("p", [1, 2, 7, 256])
def test_speedups_match_a_schedule(serial, p):
    work = 1000.0  # seconds on one processor: a serial part, and a rest that is dealt out
    strong = serial * work + max(np.full(p, (1 - serial) * work / p))
    assert amdahl_speedup(serial, p) == pytest.approx(work / strong)
    weak_work = serial * work + p * (1 - serial) * work  # each processor brings its own rest: done in ``work``
    assert gustafson_speedup(serial, p) == pytest.approx(weak_work / work)


def test_amdahl_is_bounded_and_the_lectures_thousand_processors_need_a_thousandth():
    assert amdahl_speedup(0.01, 1e12) == pytest.approx(100)
    assert amdahl_serial_share(500, 1000) == pytest.approx(0.001, rel=0.002)  # the lecture rounds to 0.1%
    for serial in (0.0, 0.01, 0.5):
        assert amdahl_serial_share(amdahl_speedup(serial, 64), 64) == pytest.approx(serial, abs=1e-12)


@pytest.mark.parametrize("serial", [0.0, 0.03, 0.4, 1.0])
@pytest.mark.parametrize("processors", [[1, 2], [2, 3, 5], [1, 2, 4, 8, 256]])
def test_fit_recovers_a_known_share(serial, processors):
    seconds = [17 / amdahl_speedup(serial, p) for p in processors]
    assert fit_serial_share(processors, seconds) == pytest.approx(serial, abs=1e-9)


def test_weak_fit_recovers_a_known_share_and_noise_moves_it_little():
    p = [1, 2, 4, 8, 16]
    seconds = [3 * n / gustafson_speedup(0.1, n) for n in p]  # n-fold work
    assert fit_serial_share(p, seconds, weak=True) == pytest.approx(0.1)
    noise = 1 + 0.02 * np.random.RandomState(0).standard_normal(5)
    strong = noise * [1 / amdahl_speedup(0.1, n) for n in p]
    assert fit_serial_share(p, strong) == pytest.approx(0.1, abs=0.02)  # 2% noise


def test_measured_times_leave_the_number_of_threads_alone():
    before = torch.get_num_threads()
    threads, seconds = measure_threads(1)
    assert torch.get_num_threads() == before and threads[0] == 1 and min(seconds) > 0 and len(threads) == len(seconds)


@pytest.mark.parametrize("call", [
    lambda: amdahl_speedup(-0.1, 2), lambda: amdahl_speedup(1.1, 2), lambda: gustafson_speedup(0.5, 0),
    lambda: gustafson_speedup(float("nan"), 2), lambda: amdahl_serial_share(9, 8), lambda: amdahl_serial_share(1, 1),
    lambda: fit_serial_share([1], [1]), lambda: fit_serial_share([2, 2], [1, 1]), lambda: fit_serial_share([1, 2], [1, 0]),
    lambda: fit_serial_share([1, 2], [1])])
def test_impossible_numbers_are_refused(call):
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize("arguments, status", [(["--repeats", "1"], 0), (["--repeats", "0"], 2), (["--repeat", "x"], 2)])
def test_program_ends_on_a_verdict_or_one_line(monkeypatch, capsys, tmp_path, arguments, status):
    plot = ["--plot", str(tmp_path / "speedup.png")] if status == 0 else []
    monkeypatch.setattr(sys, "argv", ["speedup.py", *arguments, *plot])
    try:
        runpy.run_path(str(ROOT / "speedup.py"), run_name="__main__")
        found = 0
    except SystemExit as stop:
        found = stop.code
    out, err = capsys.readouterr()
    assert found == status
    if status:
        assert err.count("\n") == 1 and err.startswith("speedup.py: ")
    else:
        assert "fitted to times of s = 0.05: 0.0500 (expected 0.0500)" in out and (tmp_path / "speedup.png").exists()
