"""Scaling laws: how good a model will be before it is trained.   Kaplan et al. 2020, Hoffmann et al. 2022 (2203.15556)

Idea      Loss falls as a power of parameters N and tokens D. Small runs fix the law's few constants; the law then says
          what a large run will reach, and how to share a budget of C FLOPs between N and D.
Formula   L(N, D) = E + A / N^alpha + B / D^beta,   C = 6 N D                                    (eq. 2)
          N_opt = G (C/6)^a,  D_opt = (C/6)^b / G,  a = beta / (alpha + beta),  b = 1 - a,
          G = (alpha A / (beta B))^(1 / (alpha + beta))                                          (eq. 4)
          method 1   for every C the best of all runs (fixed N, any D): a line through log N, log C
          method 2   loss at one C is a parabola in log N: a line through the bottoms
          method 3   min over the constants of  mean Huber_0.001(log of the law - log L),  the law's log being
                     logsumexp(log A - alpha log N, log B - beta log D, log E)
Shapes    runs (n, 3) float64: columns N, D, loss in nats per token
Omits     downstream scores; the law for repeated data (Muennighoff et al. 2023); the FLOPs of attention in C.
Run       python scaling_laws.py                        the three methods on points from the published law
          python scaling_laws.py --fit runs.csv         on a CSV with the columns N, D, loss
          Ends with "N_opt ~ C^a by the methods: ..."
Test      pytest tests/test_scaling_laws.py
"""

import argparse
import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HUBER = 1e-3  # Hoffmann et al. 2022, appendix D.3: beyond it an outlier counts by its distance, not its square


# --- 1. Kaplan et al. 2020 ------------------------------------------------------------------

@dataclass(frozen=True)
class KaplanLaw:
    """L(N, D) = ((Nc / N)^(alpha_N / alpha_D) + Dc / D)^alpha_D in nats per token; N without embeddings. Eq. 1.5."""
    Nc: float
    Dc: float
    alpha_N: float
    alpha_D: float

    def loss(self, N, D=math.inf):
        """Loss of N parameters after D tokens; numbers or arrays."""
        _positive(N=np.min(N), D=np.min(D))
        return ((self.Nc / N) ** (self.alpha_N / self.alpha_D) + self.Dc / D) ** self.alpha_D


KAPLAN = KaplanLaw(6.4e13, 1.8e13, 0.076, 0.103)  # table 2


def kaplan_loss_of_budget(flops: float) -> float:
    """L(C) = (Cc / C)^0.050 in nats, if C is well spent: Cc = 3.1e8 petaflop/s-days. Eq. 1.3."""
    _positive(C=flops)
    return (3.1e8 * 1e15 * 86400 / flops) ** 0.050


def kaplan_optimum(flops: float) -> tuple[float, float]:
    """(N, D) for a budget: N = 1.3e9 C^0.73 and D = 2e10 C^0.27, with C in petaflop/s-days. Table 6."""
    _positive(C=flops)
    days = flops / (1e15 * 86400)
    return 1.3e9 * days**0.73, 2e10 * days**0.27


def kaplan_tokens(parameters: float) -> float:
    """Tokens below which N parameters overfit: D = 5e3 N^0.74. Eq. 4.4."""
    _positive(N=parameters)
    return 5e3 * parameters**0.74


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


# --- 2. Chinchilla --------------------------------------------------------------------------

@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats per token."""
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N, D):
        """Loss of N parameters after D tokens; numbers or arrays."""
        return self.E + self.A / N**self.alpha + self.B / D**self.beta

    @property
    def exponents(self) -> tuple[float, float]:
        """(a, b): N_opt grows as C^a, D_opt as C^b. ValueError if loss does not fall with both N and D: no optimum."""
        if min(self.A, self.B, self.alpha, self.beta) < 1e-9:
            raise ValueError("loss must fall with N and with D for an optimum; the law has "
                             f"A {self.A:.3g}, B {self.B:.3g}, alpha {self.alpha:.3g}, beta {self.beta:.3g}")
        return self.beta / (self.alpha + self.beta), self.alpha / (self.alpha + self.beta)

    def optimum(self, flops: float) -> tuple[float, float]:
        """(N, D) of least loss with 6 N D = ``flops``."""
        _positive(C=flops)
        a, b = self.exponents
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return G * (flops / 6) ** a, (flops / 6) ** b / G


CHINCHILLA = Law(1.69, 406.4, 410.7, 0.34, 0.28)  # Hoffmann et al. 2022, eq. 10, as printed
REPLICATION = Law(1.8172, 482.01, 2085.43, 0.3478, 0.3658)  # the same data fitted anew: Besiroglu et al. 2024
# Hoffmann et al. 2022, table 3 (method 1): parameters, FLOPs, tokens. Figures of papers here are quoted from memory.
CHINCHILLA_TABLE = [(400e6, 1.92e19, 8.0e9), (1e9, 1.21e20, 20.2e9), (10e9, 1.23e22, 205.1e9), (67e9, 5.76e23, 1.5e12),
                    (175e9, 3.85e24, 3.7e12), (280e9, 9.90e24, 5.9e12), (520e9, 3.43e25, 11.0e12),
                    (1e12, 1.27e26, 21.2e12), (10e12, 1.30e28, 216.2e12)]


@dataclass(frozen=True)
class Frontier:
    """N_opt = n_scale * C^a and D_opt = d_scale * C^b."""
    n_scale: float
    a: float
    d_scale: float
    b: float

    def optimum(self, flops: float) -> tuple[float, float]:
        """(N, D) for a budget in FLOPs."""
        _positive(C=flops)
        return self.n_scale * flops**self.a, self.d_scale * flops**self.b


ROUNDED = Frontier(0.1, 0.5, 1.7, 0.5)  # the lecture's rule: 17 tokens per parameter


def fit_frontier(flops: np.ndarray, parameters: np.ndarray) -> Frontier:
    """Straight lines through log N against log C, and through D = C / 6N."""
    if len(flops) < 2:
        raise ValueError(f"a frontier needs two budgets whose best size lies between two others, got {len(flops)}: "
                         "give more sizes N, or more numbers of tokens D for each")
    a, n = np.polyfit(np.log(flops), np.log(parameters), 1)
    b, d = np.polyfit(np.log(flops), np.log(flops / 6 / parameters), 1)
    return Frontier(math.exp(n), float(a), math.exp(d), float(b))


# --- 3. runs --------------------------------------------------------------------------------

def check_runs(runs: np.ndarray) -> np.ndarray:
    """(n, 3) float64 of positive numbers; ValueError for too few runs or sizes to fit anything."""
    runs = np.asarray(runs, dtype=np.float64)
    if runs.ndim != 2 or runs.shape[1] != 3:
        raise ValueError(f"runs must be (n, 3), columns N, D, loss, got shape {runs.shape}")
    if not (np.isfinite(runs).all() and (runs > 0).all()):
        raise ValueError("N, D and loss must be positive numbers in every run")
    sizes, tokens = len(set(runs[:, 0])), len(set(runs[:, 1]))
    if len(runs) < 6 or sizes < 3 or tokens < 3:
        raise ValueError(f"a law of five constants needs six runs, of three N and three D; got {len(runs)} runs of "
                         f"{sizes} N and {tokens} D")
    return runs


def read_runs(path: str | Path) -> np.ndarray:
    """Runs (n, 3) from a CSV with a header that names N, D and loss, in any order and among others.

    Raises:
        ValueError: for a file that is missing or no text, a missing column, a cell that is no positive number (the
            line is named), too few runs.
    """
    try:
        with io.StringIO(Path(path).read_bytes().decode().removeprefix("\ufeff"), newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            columns = [name.strip() for name in reader.fieldnames or []]
            reader.fieldnames = columns
            missing = [name for name in ("N", "D", "loss") if name not in columns]
            if missing:
                raise ValueError(f"{path}: column {' and '.join(missing)} is missing, "
                                 f"found {', '.join(columns) or 'none'}: name all three in the first line")
            rows = []
            for row in reader:
                try:
                    rows.append([float(row[name]) for name in ("N", "D", "loss")])
                    good = all(0 < value < math.inf for value in rows[-1])
                except (TypeError, ValueError):
                    good = False
                if not good:
                    raise ValueError(f"{path}, line {reader.line_num}: N, D and loss must be positive numbers: "
                                     "correct or remove the line")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, byte {error.start}: is not UTF-8: convert the file first") from None
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV ({error}): save it as such") from None
    try:
        return check_runs(np.array(rows).reshape(-1, 3))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def sample_runs(law: Law, noise: float = 0.0, seed: int = 0, sizes: int = 15, tokens: int = 15) -> np.ndarray:
    """Runs that obey a law, in Chinchilla's range: N from 44M to 16B, D from 0.5 to 2000 billion (n, 3).

    ``noise`` is the standard deviation of log loss; the seed draws it.
    """
    N, D = np.meshgrid(np.geomspace(44e6, 16e9, sizes), np.geomspace(0.5e9, 2e12, tokens), indexing="ij")
    scatter = np.exp(noise * np.random.RandomState(seed).standard_normal(N.shape))
    return np.stack((N, D, law.loss(N, D) * scatter), -1).reshape(-1, 3)  # (sizes * tokens, 3)


# --- 4. three methods -----------------------------------------------------------------------

def _profiles(runs: np.ndarray, budgets: int) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """[(C, sizes N in order, their losses at C)]: by interpolation along each size's own curve of loss against D."""
    curves = []
    for N in np.unique(runs[:, 0]):
        _, D, loss = runs[runs[:, 0] == N].T
        order = np.argsort(D)
        curves.append((N, np.log(6 * N * D[order]), np.log(loss[order])))
    found = []
    ends = [log_c for _, log_c, _ in curves if len(log_c) > 1]
    if ends:
        for log_c in np.linspace(min(c[0] for c in ends), max(c[-1] for c in ends), budgets):
            at = [(N, np.exp(np.interp(log_c, c, loss))) for N, c, loss in curves
                  if len(c) > 1 and c[0] <= log_c <= c[-1]]
            if len(at) >= 3:
                found.append((math.exp(log_c), *np.array(at).T))
    return found


def _planned_profiles(runs: np.ndarray) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """The same for runs that share their C by plan: three sizes or more within 5% of it. Empty if most runs do not."""
    log_c = np.log(runs[:, 0] * runs[:, 1])
    order = np.argsort(log_c, kind="stable")
    found, grouped = [], 0
    for group in np.split(order, np.flatnonzero(np.diff(log_c[order]) > 0.02) + 1):
        _, first = np.unique(runs[group, 0], return_index=True)  # sizes in order
        if len(first) >= 3 and np.ptp(log_c[group]) < 0.05:
            C = 6 * math.exp(log_c[group].mean())
            found.append((C, *runs[group[first]].T[[0, 2]]))
            grouped += len(group)
    return found if 2 * grouped > len(runs) else []


def envelope_method(runs: np.ndarray, budgets: int = 1500) -> Frontier:
    """Method 1: at each of ``budgets`` values of C the size with the least loss. Section 3.1.

    Needs several D for each N. A budget whose best size is the smallest or largest at hand says nothing: left out.
    """
    best = []
    for C, N, loss in _profiles(check_runs(runs), budgets):
        if 0 < (i := int(loss.argmin())) < len(N) - 1:
            best.append((C, N[i]))
    return fit_frontier(*np.array(best).reshape(-1, 2).T)


def iso_flop_profiles(runs: np.ndarray, budgets: int = 30) -> list[tuple[float, np.ndarray, np.ndarray, np.ndarray]]:
    """[(C, N, losses, parabola in log N)]: runs that share a C, or else curves cut at ``budgets`` values of C."""
    runs, found = check_runs(runs), []
    for C, N, loss in _planned_profiles(runs) or _profiles(runs, budgets):
        near = np.abs(np.log(N / N[loss.argmin()])) <= math.log(10)  # further off it is no parabola
        if near.sum() >= 3:
            parabola = np.polyfit(np.log(N[near]), loss[near], 2)
            bottom = -parabola[1] / (2 * parabola[0])
            if parabola[0] > 0 and math.log(N[near][0]) < bottom < math.log(N[near][-1]):
                found.append((C, N[near], loss[near], parabola))
    return found


def iso_flop_method(runs: np.ndarray, budgets: int = 30) -> Frontier:
    """Method 2: the bottom of a parabola of loss in log N, for each C. Section 3.2."""
    found = iso_flop_profiles(runs, budgets)
    sizes = np.array([math.exp(-p[1] / (2 * p[0])) for _, _, _, p in found])
    return fit_frontier(np.array([C for C, _, _, _ in found]), sizes)


def huber_objective(theta: Tensor, runs: Tensor) -> Tensor:
    """Mean Huber loss of log L, over HUBER^2. Eq. 3.

    theta (..., 5) = (a, b, e, alpha, beta), where a, b, e = log A, log B, log E; runs (n, 3) -> (...).
    """
    log_n, log_d, log_l = runs.log().unbind(-1)  # each (n,)
    a, b, e, alpha, beta = theta[..., None].unbind(-2)  # each (..., 1)
    terms = torch.stack((a - alpha * log_n, b - beta * log_d, e.expand(*e.shape[:-1], len(runs))))  # (3, ..., n)
    return _huber(torch.logsumexp(terms, 0) - log_l)


def _huber(residual: Tensor) -> Tensor:
    error = residual.abs() / HUBER  # in units of the threshold: a well-scaled objective
    return torch.where(error < 1, error**2 / 2, error - 0.5).mean(-1)


def kaplan_objective(theta: Tensor, runs: Tensor) -> Tensor:
    """The same for Kaplan's form: theta (..., 4) = (log Nc, log Dc, alpha_N, alpha_D), runs (n, 3) -> (...)."""
    log_n, log_d, log_l = runs.log().unbind(-1)  # each (n,)
    n, d, alpha_n, alpha_d = theta[..., None].unbind(-2)  # each (..., 1)
    terms = torch.stack(((n - log_n) * alpha_n / alpha_d, d - log_d))  # (2, ..., n)
    return _huber(alpha_d * torch.logsumexp(terms, 0) - log_l)


def parametric_fit(runs: np.ndarray, starts: Tensor | None = None, keep: int = 8) -> Law:
    """Method 3: L-BFGS from the best ``keep`` of a grid of starts (4500, those of appendix D.3). Section 3.3.

    ``starts`` (n, 5), such as the constants of an earlier fit, replaces the grid. Float64: the objective is flat.
    """
    data = torch.from_numpy(check_runs(runs))
    if starts is None:
        starts = _grid([0, 5, 10, 15, 20, 25], [0, 5, 10, 15, 20, 25], [-1, -0.5, 0, 0.5, 1], [0, 0.5, 1, 1.5, 2],
                       [0, 0.5, 1, 1.5, 2])  # (4500, 5)
    a, b, e, alpha, beta = _minimise(lambda theta: huber_objective(theta, data), starts, keep)
    return Law(math.exp(e), math.exp(a), math.exp(b), alpha, beta)


def kaplan_fit(runs: np.ndarray, keep: int = 8) -> KaplanLaw:
    """Kaplan's four constants by the same loss and search."""
    data = torch.from_numpy(check_runs(runs))
    starts = _grid([10, 15, 20, 25, 30], [10, 15, 20, 25, 30], [0.05, 0.1, 0.2, 0.4], [0.05, 0.1, 0.2, 0.4])  # (400, 4)
    n, d, alpha_n, alpha_d = _minimise(lambda theta: kaplan_objective(theta, data), starts, keep)
    return KaplanLaw(math.exp(n), math.exp(d), alpha_n, alpha_d)


def _grid(*axes: list[float]) -> Tensor:
    return torch.cartesian_prod(*(torch.tensor(axis, dtype=torch.float64) for axis in axes))


def _minimise(objective: Callable[[Tensor], Tensor], starts: Tensor, keep: int) -> list[float]:
    """The best end of L-BFGS from the best ``keep`` of ``starts`` (n, constants)."""
    order = objective(starts).argsort()[:keep]
    best, least = None, math.inf
    for start in starts[order]:
        theta = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-12,
                                      history_size=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = objective(theta)
            value.backward()
            return value

        optimizer.step(closure)
        value = float(objective(theta.detach()))
        if value < least:
            best, least = theta.detach(), value
    if best is None:
        raise ValueError("no start led to a finite fit: check the runs for losses that cannot be")
    return best.tolist()


def log_constants(law: Law) -> Tensor:
    """(1, 5): a law as a start for ``parametric_fit``."""
    return torch.tensor([[math.log(law.A), math.log(law.B), math.log(law.E), law.alpha, law.beta]], dtype=torch.float64)


def bootstrap(fit: Callable[[np.ndarray], Frontier | Law], runs: np.ndarray, samples: int = 100,
              seed: int = 0) -> np.ndarray:
    """10th and 90th percentiles of exponents a and b, (2, 2), from fits to random 80% of the runs (table 2's way).

    A sample on which a method finds no frontier is left out; ValueError if that is most of them.
    """
    random, found = np.random.RandomState(seed), []
    for _ in range(samples):
        chosen = random.permutation(len(runs))[:max(6, round(0.8 * len(runs)))]
        try:
            result = fit(runs[chosen])
        except ValueError:
            continue
        found.append(result.exponents if isinstance(result, Law) else (result.a, result.b))
    if 2 * len(found) <= samples:
        raise ValueError(f"only {len(found)} of {samples} samples could be fitted: give more runs")
    return np.percentile(np.array(found), [10, 90], axis=0)  # (2, 2)


# --- 5. demo --------------------------------------------------------------------------------

def show_laws() -> None:
    """Kaplan's and Chinchilla's advice for budgets; Chinchilla's table by one line."""
    print("   FLOPs     Kaplan N        D   Chinchilla N       D   fitted anew N       D   rounded N       D")
    for C in (1e19, 1e21, 1e23, 1e25):
        pairs = [kaplan_optimum(C), CHINCHILLA.optimum(C), REPLICATION.optimum(C), ROUNDED.optimum(C)]
        print(f"{C:8.0e}" + "".join(f"{N:13.3g} {D:9.3g}" for N, D in pairs))
    line = fit_frontier(*np.array([(C, N) for N, C, _ in CHINCHILLA_TABLE]).T)
    print("\nChinchilla's table:  N        C       D   |  6 N D     one line's N      D   0.1 C^0.5  1.7 C^0.5")
    worst = 0.0
    for N, C, D in CHINCHILLA_TABLE:
        n, d = line.optimum(C)
        worst = max(worst, abs(n / N - 1), abs(d / D - 1), abs(6 * N * D / C - 1))
        rounded = ROUNDED.optimum(C)
        print(f"{N:22.3g} {C:8.3g} {D:8.3g} | {6 * N * D:8.3g} {n:12.3g} {d:10.3g} {rounded[0]:9.3g} {rounded[1]:9.3g}")
    print(f"N_opt = {line.n_scale:.4f} C^{line.a:.3f}, D_opt = {line.d_scale:.3f} C^{line.b:.3f}; every entry within "
          f"{worst:.1%}")
    gpt3 = KAPLAN.loss(175e9, 300e9)
    print(f"GPT-3, 175B on 300B tokens: Kaplan {gpt3:.3f} (N without embeddings), Chinchilla "
          f"{CHINCHILLA.loss(175e9, 300e9):.3f} nats; overfits below {kaplan_tokens(175e9):.2g} tokens\n")


def show_fit(source: str, plot: str | None = None, samples: int = 40) -> None:
    """Three methods on a CSV, or on points of the published law ("chinchilla")."""
    import scaling

    figure = scaling.new_figure(plot, 9, 5)
    known = source == "chinchilla"
    runs = sample_runs(CHINCHILLA, noise=0.002) if known else read_runs(source)
    print(f"{len(runs)} runs, N from {runs[:, 0].min():.3g} to {runs[:, 0].max():.3g}, "
          f"D from {runs[:, 1].min():.3g} to {runs[:, 1].max():.3g}")
    law = parametric_fit(runs)
    methods = [("1 envelope", lambda r: envelope_method(r, 300)), ("2 isoFLOP", iso_flop_method),
               ("3 parametric", lambda r: parametric_fit(r, log_constants(law)))]
    exponents = []
    for name, method in methods:
        try:
            result = law if name.startswith("3") else method(runs)
            a, b = result.exponents if isinstance(result, Law) else (result.a, result.b)
            exponents.append(a)
            (a10, b10), (a90, b90) = bootstrap(method, runs, samples)
            print(f"{name:13} N_opt ~ C^{a:.3f} ({a10:.3f} to {a90:.3f})   D_opt ~ C^{b:.3f} ({b10:.3f} to {b90:.3f})")
        except ValueError as error:
            print(f"{name:13} {error}")
    print(f"L = {law.E:.4g} + {law.A:.4g} / N^{law.alpha:.4f} + {law.B:.4g} / D^{law.beta:.4f}"
          + ("   (expected 1.69, 406.4, 0.34, 410.7, 0.28)" if known else ""))
    for C in (1e21, 1e23, 1e25) if runs[:, 0].max() > 1e8 else (1e15, 1e17, 1e19):
        N, D = law.optimum(C)
        print(f"  {C:.0e} FLOPs: N = {N:.3g}, D = {D:.3g}, loss {law.loss(N, D):.4f}")
    if figure is not None:
        axes = figure.add_subplot()
        profiles = iso_flop_profiles(runs)
        for C, N, loss, parabola in profiles[::max(1, len(profiles) // 6)]:
            color = axes.plot(N, loss, "o")[0].get_color()
            sizes = np.geomspace(N[0], N[-1], 50)
            axes.plot(sizes, np.polyval(parabola, np.log(sizes)), color=color, label=f"C = {C:.1e}")
            axes.plot(sizes, law.loss(sizes, C / 6 / sizes), ":", color=color)
        axes.set(xlabel="parameters", ylabel="loss (dotted: method 3)", xscale="log")
        if profiles:
            axes.legend()
        scaling.save_figure(figure, plot)
    print("N_opt ~ C^a by the methods: " + " ".join(f"{a:.3f}" for a in exponents)
          + (f" (expected {CHINCHILLA.exponents[0]:.3f})" if known else ""))


def main(fit: str | None, samples: int, plot: str | None) -> None:
    if samples < 2:
        raise ValueError(f"--samples must be at least 2, got {samples}")
    if fit is None:
        show_laws()
    show_fit("chinchilla" if fit is None else fit, plot, samples)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--fit", metavar="FILE.csv",
                        help="fit laws to columns N, D, loss ('chinchilla': to points of its law)")
    parser.add_argument("--samples", type=int, default=40,
                        help="of the runs, for the intervals: the bootstrap (default %(default)s)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the parabolas (needs matplotlib)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
