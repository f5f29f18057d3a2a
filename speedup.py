"""Speedup: how much faster a job gets on more processors.   Amdahl 1967, Gustafson 1988

Idea      A share s of the work is serial. On a problem of fixed size it is in the end all of the time that is left
          (strong scaling). A problem that grows with the machine hides it (weak scaling).
Formula   Amdahl      speedup(p) = 1 / (s + (1 - s) / p)  ->  1 / s: 500 x on 1000 processors needs s <= 0.1%
          Gustafson   speedup(p) = s + (1 - s) p
Shapes    no tensors: p processors, s in [0, 1], seconds
Omits     costs that grow with p, such as communication: planner.py counts those.
Run       python speedup.py      tables for 1 ... 256 processors, and the serial share measured here: a few seconds
          Ends with "serial share fitted to times of s = 0.05: ..."
Test      pytest tests/test_speedup.py
"""

import argparse
import math
import os
import time
from collections.abc import Sequence

import numpy as np
import torch


# --- 1. the two laws --------------------------------------------------------------------------

def _check(serial: float, processors: float) -> None:
    if not (math.isfinite(processors) and processors >= 1):
        raise ValueError(f"processors must be at least 1, got {processors}")
    if not 0 <= serial <= 1:
        raise ValueError(f"the serial share must be in [0, 1], got {serial}")


def amdahl_speedup(serial: float, processors: float) -> float:
    """Strong scaling, one problem on more processors: 1 / (s + (1 - s) / p). ``serial`` = s in [0, 1]."""
    _check(serial, processors)
    return 1 / (serial + (1 - serial) / processors)


def amdahl_serial_share(speedup: float, processors: float) -> float:
    """The largest serial share that still allows ``speedup`` in [1, p] on p > 1 processors: Amdahl's law, solved."""
    _check(0.0, processors)
    if not 1 <= speedup <= processors or processors == 1:
        raise ValueError(f"a speedup of {speedup} cannot come from {processors} processors")
    return (1 / speedup - 1 / processors) / (1 - 1 / processors)


def gustafson_speedup(serial: float, processors: float) -> float:
    """Weak scaling, the problem grows with the processors: s + (1 - s) p."""
    _check(serial, processors)
    return serial + (1 - serial) * processors


# --- 2. the share, from measurements ----------------------------------------------------------

def fit_serial_share(processors: Sequence[float], seconds: Sequence[float], weak: bool = False) -> float:
    """The serial share s that explains measured times best, by least squares on relative errors.

    Strong scaling: seconds = t (s + (1 - s) / p). Weak: p-fold work takes ``seconds``, so the speedup p t_1 / seconds
    is s + (1 - s) p. ValueError without two different numbers of processors, and for weak scaling without p = 1.
    """
    p, t = np.asarray(processors, dtype=float), np.asarray(seconds, dtype=float)
    if p.shape != t.shape or p.ndim != 1 or len(set(p.tolist())) < 2 or (p <= 0).any() or (t <= 0).any():
        raise ValueError(f"want as many positive times as processors, of at least two numbers, got {p} and {t}")
    if weak and p.min() != 1:
        raise ValueError(f"weak scaling is measured against one processor, got {p}")
    if weak:  # p t_1 / t = s (1 - p) + p, with t_1 the time of the smallest number
        speedup = p * t[p.argmin()] / t
        share = ((1 - p) * (speedup - p)).sum() / ((1 - p) ** 2).sum()
    else:  # linear in t s and t (1 - s)
        columns = np.stack((np.ones_like(p), 1 / p), 1)
        fixed, divided = np.linalg.lstsq(columns / t[:, None], np.ones_like(t), rcond=None)[0]
        share = fixed / (fixed + divided)
    return float(min(max(share, 0.0), 1.0))


def measure_threads(repeats: int = 5) -> tuple[list[int], list[float]]:
    """(threads, seconds): a matrix product, which threads share, after a sum in Python, which they cannot."""
    before, a = torch.get_num_threads(), torch.ones(768, 768)
    threads, seconds = list(range(1, min(8, os.cpu_count() or 1) + 1)), []
    try:
        for n in threads:
            torch.set_num_threads(n)
            times = []
            for _ in range(repeats + 1):  # the first one wakes the threads
                start = time.perf_counter()
                sum(range(200_000))
                for _ in range(4):
                    a @ a
                times.append(time.perf_counter() - start)
            seconds.append(min(times[1:]))
    finally:
        torch.set_num_threads(before)
    return threads, seconds


# --- 3. demo ----------------------------------------------------------------------------------

def new_figure(path: str | None, width: float, height: float):
    """A matplotlib figure to be saved under ``path``, None without one. ValueError without matplotlib, and for what
    cannot be drawn there: now, not after the work."""
    if path is None:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    try:
        if str(path).rpartition(".")[2].lower() not in figure.canvas.get_supported_filetypes():
            raise OSError(None, "no format of pictures has that name")
        is_new = not os.path.exists(path)
        open(path, "ab").close()  # keeps a picture that is there
        if is_new:
            os.remove(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be drawn ({error.strerror}): name a picture in a folder that is "
                         "there") from None
    return figure


def main(repeats: int, plot: str | None) -> None:
    if repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {repeats}")
    figure, processors = new_figure(plot, 9, 5), [2**i for i in range(9)]
    print(f"{'':22}" + "".join(f"{p:>8}" for p in processors))
    for serial in (0.001, 0.01, 0.1):
        for name, law in (("Amdahl", amdahl_speedup), ("Gustafson", gustafson_speedup)):
            print(f"{name:10} s = {serial:<8}" + "".join(f"{law(serial, p):>8.1f}" for p in processors))
    print(f"500 x on 1000 processors: s = {amdahl_serial_share(500, 1000):.4%} (expected about 0.1%)")
    threads, seconds = measure_threads(repeats)
    print("measured here: " + ", ".join(f"{n} threads {s * 1e3:.1f} ms" for n, s in zip(threads, seconds)))
    if figure is not None:
        axes = figure.add_subplot()
        for serial in (0.001, 0.01, 0.1):
            axes.loglog(processors, [amdahl_speedup(serial, p) for p in processors], label=f"Amdahl, s = {serial}")
            axes.loglog(processors, [gustafson_speedup(serial, p) for p in processors], "--",
                        label=f"Gustafson, s = {serial}")
        axes.set(xlabel="processors", ylabel="speedup")
        axes.legend()
        figure.savefig(plot)
        print(f"drawn: {plot}")
    known = fit_serial_share(processors, [amdahl_speedup(0.05, p) ** -1 for p in processors])
    here = f"{fit_serial_share(threads, seconds):.2f}" if len(threads) > 1 else "unknown: there is one processor"
    print(f"serial share fitted to times of s = 0.05: {known:.4f} (expected 0.0500); of the work measured here: {here}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--repeats", type=int, default=5,
                        help="of each measurement; the fastest counts (default %(default)s)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the two laws (needs matplotlib)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
