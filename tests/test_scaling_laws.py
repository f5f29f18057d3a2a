"""Laws against their papers; the three methods on points whose constants are known; scipy's minimizer on the same data."""

import functools
import runpy
import sys

import numpy as np
import pytest
import torch

import scaling_laws
from conftest import ROOT
from scaling_laws import (CHINCHILLA, CHINCHILLA_TABLE, KAPLAN, REPLICATION, ROUNDED, Law, bootstrap, check_runs, envelope_method,
                          fit_frontier, huber_objective, iso_flop_method, iso_flop_profiles, kaplan_fit, kaplan_loss_of_budget,
                          kaplan_objective, kaplan_optimum, kaplan_tokens, log_constants, parametric_fit, read_runs, sample_runs)

scipy_optimize = pytest.importorskip("scipy.optimize", reason="pip install -r tests/requirements.txt")
OTHER = Law(1.2, 90.0, 700.0, 0.25, 0.32)


# --- the laws -------------------------------------------------------------------------------

def test_kaplan_matches_the_paper():
    # Kaplan et al. 2020: L(N) = (8.8e13 / N)^0.076 alone; the joint fit of table 2 has Nc 6.4e13: 3% apart
    assert KAPLAN.loss(1.5e9) == pytest.approx((8.8e13 / 1.5e9) ** 0.076, rel=0.03)
    assert KAPLAN.loss(1e30, 22e9) == pytest.approx((5.4e13 / 22e9) ** 0.095, rel=0.07)  # L(D), its own fit
    # GPT-3, 3640 petaflop/s-days; Brown et al. 2020, figure 3.1: L = 2.57 C^-0.048
    assert kaplan_loss_of_budget(3640 * 8.64e19) == pytest.approx(2.57 * 3640**-0.048, rel=0.05)
    N, D = kaplan_optimum(1e3 * 8.64e19)
    assert (N, D) == pytest.approx((1.3e9 * 1e3**0.73, 2e10 * 1e3**0.27))
    assert kaplan_tokens(1e9) == pytest.approx(5e3 * 1e9**0.74) and kaplan_optimum(8.64e19)[0] == pytest.approx(1.3e9)


@pytest.mark.parametrize("law", [CHINCHILLA, REPLICATION, OTHER])
@pytest.mark.parametrize("C", [1e19, 1e23])
def test_optimum_matches_a_search(law, C):
    found = scipy_optimize.minimize_scalar(lambda n: law.loss(np.exp(n), C / 6 / np.exp(n)), bounds=(10, 35),
                                           method="bounded", options={"xatol": 1e-10})
    N, D = law.optimum(C)
    assert N == pytest.approx(np.exp(found.x), rel=1e-4) and 6 * N * D == pytest.approx(C)  # flat at the bottom
    more = law.optimum(10 * C)
    assert np.log10(more[0] / N) == pytest.approx(law.exponents[0]) and sum(law.exponents) == pytest.approx(1)


def test_chinchilla_table_is_reproduced():
    for N, C, D in CHINCHILLA_TABLE:
        assert 6 * N * D == pytest.approx(C, rel=0.05)  # 67B's tokens are printed with two digits
        assert ROUNDED.optimum(C) == pytest.approx((N, D), rel=0.2)  # the lecture's 0.1 and 1.7 have one or two
    line = fit_frontier(*np.array([(C, N) for N, C, _ in CHINCHILLA_TABLE]).T)
    assert line.a == pytest.approx(0.5, abs=0.005) and line.b == pytest.approx(0.5, abs=0.005)  # method 1: 0.50, 0.50
    for N, C, D in CHINCHILLA_TABLE:
        assert line.optimum(C) == pytest.approx((N, D), rel=0.061)  # 67B: 5.76e23 / 6 N is 1.43T, printed as 1.5T


def test_published_fits_agree_about_gopher():
    # Hoffmann et al. 2022, section 3.4 and eq. 10: with Gopher's 5.76e23 FLOPs 40 to 70 billion parameters are best
    for law, size in ((CHINCHILLA, 32e9), (REPLICATION, 70e9)):
        assert law.optimum(5.76e23)[0] == pytest.approx(size, rel=0.15)
    assert CHINCHILLA.exponents == pytest.approx((0.46, 0.54), abs=0.01)  # as printed in table 2
    assert REPLICATION.exponents[0] == pytest.approx(0.512, abs=0.002)  # as printed in Besiroglu et al. 2024
    assert CHINCHILLA.loss(70e9, 1.4e12) < CHINCHILLA.loss(280e9, 300e9)  # Chinchilla beats Gopher


# --- the methods ----------------------------------------------------------------------------

@pytest.mark.parametrize("law", [CHINCHILLA, REPLICATION])
def test_all_methods_recover_the_exponents(law):
    runs, (a, b) = sample_runs(law), law.exponents
    for method, tolerance in ((lambda r: envelope_method(r, 300), 0.01), (iso_flop_method, 0.01)):
        found = method(runs)  # interpolation between sizes and the parabola's asymmetry cost some thousandths
        assert (found.a, found.b) == pytest.approx((a, b), abs=tolerance)
        assert 0.44 < found.a < 0.56 and found.optimum(1e22) == pytest.approx(law.optimum(1e22), rel=0.1)


def test_parametric_fit_recovers_all_constants_from_the_grid():
    found = parametric_fit(sample_runs(CHINCHILLA, sizes=6, tokens=6), keep=1)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(CHINCHILLA, name), rel=1e-3)  # the objective is flat there


def test_parametric_fit_matches_scipy_on_noisy_runs():
    runs = sample_runs(OTHER, noise=0.003, sizes=7, tokens=7)
    start = log_constants(CHINCHILLA)
    data = torch.from_numpy(runs)

    def value_and_gradient(theta):
        x = torch.from_numpy(theta).requires_grad_()
        value = huber_objective(x, data)
        value.backward()
        return value.item(), x.grad.numpy()

    theirs = scipy_optimize.minimize(value_and_gradient, start[0].numpy(), jac=True, method="BFGS",
                                     options={"maxiter": 2000, "gtol": 1e-8})
    ours = parametric_fit(runs, start)
    assert huber_objective(log_constants(ours)[0], data) <= theirs.fun * (1 + 1e-4)
    assert ours.E == pytest.approx(OTHER.E, rel=0.1) and ours.alpha == pytest.approx(OTHER.alpha, rel=0.15)  # 0.3% noise


def test_huber_objective_matches_torch():
    runs = torch.from_numpy(sample_runs(OTHER, noise=0.01, sizes=4, tokens=3))
    theta = log_constants(CHINCHILLA)
    predicted = torch.from_numpy(CHINCHILLA.loss(runs[:, 0].numpy(), runs[:, 1].numpy())).log()
    expected = torch.nn.functional.huber_loss(predicted, runs[:, 2].log(), delta=1e-3) / 1e-3**2
    torch.testing.assert_close(huber_objective(theta, runs)[0], expected)
    assert huber_objective(theta.expand(7, 5), runs).shape == (7,)


def test_kaplan_fit_recovers_its_constants():
    runs = sample_runs(CHINCHILLA, sizes=7, tokens=7)
    runs[:, 2] = KAPLAN.loss(runs[:, 0], runs[:, 1])
    found = kaplan_fit(runs, keep=2)
    for name in ("Nc", "Dc", "alpha_N", "alpha_D"):
        assert getattr(found, name) == pytest.approx(getattr(KAPLAN, name), rel=1e-3)  # the objective is flat there
    theta = torch.tensor([np.log(KAPLAN.Nc), np.log(KAPLAN.Dc), KAPLAN.alpha_N, KAPLAN.alpha_D])
    noisy = runs * [1, 1, 1.01]
    assert kaplan_objective(theta, torch.from_numpy(runs)) < 1e-12  # rounding
    assert kaplan_objective(theta, torch.from_numpy(noisy)).item() == pytest.approx(np.log(1.01) / 1e-3 - 0.5)  # linear part


def test_an_outlier_moves_the_fit_little():
    runs = sample_runs(CHINCHILLA, sizes=8, tokens=8)
    runs[20, 2] *= 1.2
    found = parametric_fit(runs, log_constants(REPLICATION))
    assert found.exponents == pytest.approx(CHINCHILLA.exponents, abs=0.01)


def test_planned_budgets_are_used_as_they_are():
    C = np.repeat(np.geomspace(1e19, 1e22, 5), 7)
    N = np.concatenate([REPLICATION.optimum(c)[0] * np.geomspace(0.3, 3, 7) for c in C[::7]])
    runs = np.stack((N, C / 6 / N, REPLICATION.loss(N, C / 6 / N)), 1)
    runs = runs[np.random.RandomState(0).permutation(len(runs))]
    assert [c for c, *_ in iso_flop_profiles(runs)] == pytest.approx(np.unique(C.round(-10)).tolist())
    found = iso_flop_method(runs)
    assert (found.a, found.b) == pytest.approx(REPLICATION.exponents, abs=0.005)


def test_scale_is_no_matter_to_the_exponents():
    runs = sample_runs(REPLICATION, noise=0.001)
    scaled = runs * [1e-3, 1e-3, 1]
    assert envelope_method(scaled, 200).a == pytest.approx(envelope_method(runs, 200).a, abs=1e-9)
    assert iso_flop_method(scaled).a == pytest.approx(iso_flop_method(runs).a, abs=1e-6)  # rounding in polyfit


@pytest.mark.parametrize("method", [lambda r: envelope_method(r, 200), iso_flop_method,
                                    lambda r: parametric_fit(r, log_constants(CHINCHILLA))])
def test_bootstrap_interval_holds_the_truth_and_grows_with_noise(method):
    low, high = (bootstrap(method, sample_runs(CHINCHILLA, noise, sizes=12, tokens=12), 4) for noise in (0.001, 0.01))
    assert low.shape == (2, 2) and (low[0] <= low[1]).all() and np.ptp(high) >= 0
    assert (high[1] - high[0]).sum() > (low[1] - low[0]).sum() > 0
    assert np.abs(low.mean(0) - CHINCHILLA.exponents).max() < 0.02


def test_bootstrap_is_drawn_by_its_seed():
    runs = sample_runs(CHINCHILLA, 0.001)
    one, again, other = (bootstrap(iso_flop_method, runs, 5, seed) for seed in (0, 0, 1))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


# --- bad input and the program --------------------------------------------------------------

GOOD = "\n".join(f"{n:g},{d:g},{CHINCHILLA.loss(n, d):.5f}" for n in (1e7, 1e8, 1e9) for d in (1e9, 1e10, 1e11))


@pytest.mark.parametrize("text, message", [
    ("N,D\n1,2", "column loss is missing, found N, D: name all three"), ("", "column N and D and loss is missing, found none"),
    ("N,D,loss\n1e6,2e6,3.0", "needs six runs, of three N and three D; got 1 runs of 1 N and 1 D"), ("N,D,loss\n", "got 0 runs"),
    (f"N,D,loss\n{GOOD}\n1e6,x,3", "line 11: N, D and loss must be positive numbers"),
    (f"N,D,loss\n{GOOD}\n1e6,1e6", "line 11"), (f"N,D,loss\n{GOOD}\n-1,1e6,3", "line 11"),
    (f"N,D,loss\n{GOOD}\n1e6,1e6,nan", "line 11"), ("N,D,loss\n" + "1e6,1e6,3\n" * 9, "got 9 runs of 1 N and 1 D")])
def test_bad_csv_is_one_line(tmp_path, text, message):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_runs(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_csv_are_refused(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"N,D,loss\n\xff\xfe")
    (tmp_path / "y.csv").write_text("N,D,loss\n" + "1" * 200_000)
    for path, message in ((tmp_path / "x.csv", r"x\.csv, byte 9: is not UTF-8: convert the file first$"),
                          (tmp_path / "y.csv", r"y\.csv: not CSV \(field larger than .*\): save it as such$"),
                          (tmp_path, "cannot be read"), ("missing.csv", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            read_runs(path)


def test_csv_columns_in_any_order_with_others(tmp_path):
    path = tmp_path / "runs.csv"
    rows = [line.split(",") for line in GOOD.splitlines()]
    path.write_text("\ufeffname, loss, D, N\n" + "\n".join(f"run {i},{c},{b},{a}" for i, (a, b, c) in enumerate(rows)))
    assert read_runs(path) == pytest.approx(np.array(rows, dtype=float))


@pytest.mark.parametrize("call", [
    lambda: CHINCHILLA.optimum(0), lambda: ROUNDED.optimum(-1), lambda: KAPLAN.loss(0), lambda: kaplan_optimum(-1),
    lambda: kaplan_tokens(0), lambda: kaplan_loss_of_budget(0), lambda: KAPLAN.loss(1e9, -1), lambda: check_runs(np.ones((8, 2))),
    lambda: check_runs(-sample_runs(CHINCHILLA)), lambda: fit_frontier(np.ones(1), np.ones(1)),
    lambda: envelope_method(sample_runs(CHINCHILLA, sizes=3, tokens=3)[[0, 1, 2, 4, 5, 8]]),
    lambda: bootstrap(lambda r: fit_frontier(r[:1, 0], r[:1, 1]), sample_runs(CHINCHILLA), 3)])
def test_impossible_numbers_are_refused(call):
    with pytest.raises(ValueError):
        call()


def program(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["scaling_laws.py", *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "scaling_laws.py"), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.fixture
def one_start(monkeypatch):
    """L-BFGS from one start of the grid, not eight: seconds."""
    monkeypatch.setattr(scaling_laws, "parametric_fit", functools.partial(parametric_fit, keep=1))


def test_fit_of_a_csv_is_printed_and_drawn(one_start, capsys, tmp_path):
    runs = sample_runs(REPLICATION, noise=0.001, sizes=8, tokens=8)
    path = tmp_path / "runs.csv"
    path.write_text("N,D,loss\n" + "\n".join(",".join(map(str, row)) for row in runs.tolist()))
    scaling_laws.show_fit(path, tmp_path / "fit.png", samples=3)
    found = [float(word) for word in capsys.readouterr().out.splitlines()[-1].split(":")[1].split()]
    assert (tmp_path / "fit.png").stat().st_size > 0
    assert found == pytest.approx([REPLICATION.exponents[0]] * 3, abs=0.02)  # 0.1% noise, eight sizes


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_method_that_finds_nothing_says_so_and_the_others_go_on(one_start, capsys, tmp_path):
    (tmp_path / "few.csv").write_text(f"N,D,loss\n{GOOD}")
    scaling_laws.show_fit(tmp_path / "few.csv", str(tmp_path / "few.png"), samples=2)  # a figure without a parabola is no warning
    out = capsys.readouterr().out
    assert "1 envelope    a frontier needs two budgets" in out and out.splitlines()[-1].startswith("N_opt ~ C^a")


def test_losses_that_never_fall_are_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "same.csv").write_text("N,D,loss\n" + "\n".join(f"{n},{d},3" for n in (1e6, 1e7, 1e8) for d in (1e8, 1e9, 1e10)))
    status, out, err = program(monkeypatch, capsys, "--fit", tmp_path / "same.csv")
    assert status == 2 and err.startswith("scaling_laws.py: loss must fall with N and with D") and err.count("\n") == 1


def test_samples_are_those_of_the_bootstrap(one_start, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(scaling_laws, "bootstrap", lambda method, runs, samples: seen.append(samples) or ((0, 0), (1, 1)))
    (tmp_path / "few.csv").write_text(f"N,D,loss\n{GOOD}")
    scaling_laws.main(str(tmp_path / "few.csv"), 7, None)
    assert set(seen) == {7}


@pytest.mark.parametrize("arguments", [["--fit", "missing.csv"], ["--fits", "x"], ["--samples", 1]])
def test_bad_flags_are_one_line(monkeypatch, capsys, arguments):
    status, out, err = program(monkeypatch, capsys, *arguments)
    assert status == 2 and err.startswith("scaling_laws.py: ") and err.count("\n") == 1


def test_laws_are_shown(capsys):
    scaling_laws.show_laws()
    line = capsys.readouterr().out.splitlines()[-3]
    assert "C^0.498, D_opt" in line and float(line.split()[-1].rstrip("%")) < 6.1
