"""What FlashAttention saves: bytes by formula and counted; memory and time, measured.   Dao et al. 2022 (2205.14135)

Idea      A GPU multiplies faster than its large memory (HBM) delivers: attention takes as long as its bytes take.
          Naively the T x S matrix of logits is written there and read again, and so is that of the weights. In tiles
          that fit in the small, fast memory (SRAM) neither is ever written; instead keys and values are read once
          for every tile of queries. The larger the fast memory, the fewer the tiles, and the less is moved.
Formula   bytes of one head's forward pass, b bytes a number:
          naive   b (2 (T + S) Dh + 4 T S)                Theta(T Dh + T^2) numbers
          tiled   b (2 T Dh + 2 Dh sum_i S_i) + 4 T       Theta(T^2 Dh^2 / M);   S_i: keys that query tile i sees;
                  4 T: an fp32 log-sum-exp of each query, which the backward pass needs (8 T in float64)
          tile    the largest Br with 4 Br Dh + Br^2 <= M     Q, O, K, V and logits in a fast memory of M numbers
Shapes    no tensors in the formulas; in the demo q, k, v (1, H, T, Dh)
Omits     the backward pass's bytes; caches between the two memories; the proof that no exact algorithm moves fewer,
          to the order, for every M (the paper's proposition 3).
Run       python attention_traffic.py    as python flash_attn.py: memory and time against length, half a minute
          Ends with "counted = formula: True; ..."
Test      pytest tests/test_attention_traffic.py
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F


# --- 1. bytes, by formula -------------------------------------------------------------------

def naive_traffic(T: int, S: int, Dh: int, itemsize: int = 4) -> int:
    """HBM bytes of one head's naive forward: read q and k, write logits; read them, write weights; read these
    and v, write out.   Theta(T Dh + T^2): Dao et al. 2022, algorithm 0 and theorem 2.
    """
    return (2 * (T + S) * Dh + 4 * T * S) * itemsize


def tiled_traffic(T: int, S: int, Dh: int, tile: tuple[int, int], is_causal: bool = True, itemsize: int = 4) -> int:
    """HBM bytes of one head's tiled forward: q read once, out and lse written once, k and v read once per query tile.

    ``tile``: query rows, and key rows, which do not matter. With query rows proportional to M / Dh this is
    Theta(T^2 Dh^2 / M): Dao et al. 2022, theorem 2.
    """
    Br, _ = tile
    lasts = [min(r + Br, T) for r in range(0, T, Br)]  # query tiles end here, and see so many keys:
    keys = sum(min(S, max(0, S - T + last)) if is_causal else S for last in lasts)
    return (2 * T * Dh + 2 * keys * Dh) * itemsize + max(4, itemsize) * T


def tile_size(fast_memory: int, Dh: int, itemsize: int = 4) -> int:
    """Rows of the largest square tile, a multiple of 16, whose Q, O, K, V and logits fit in so many bytes.

    4 Br Dh + Br^2 <= M numbers: Theta(M / Dh) rows as in algorithm 1, where M / (4 Dh) leaves out the logits.
    """
    M = fast_memory // itemsize
    rows = int(math.sqrt(4 * Dh * Dh + M) - 2 * Dh) // 16 * 16
    if rows < 16:
        raise ValueError(f"{fast_memory} bytes hold no tile of 16 rows of width {Dh}: take a narrower head")
    return rows


# --- 2. memory and time, measured -----------------------------------------------------------

def peak_extra_bytes(run: Callable[[], object], device: str) -> int:
    """The most memory, in bytes, that run() holds at any time beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says on stderr that it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    return max(itertools.accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))


def _milliseconds(run: Callable[[], object], device: str) -> float:
    """The shortest of three calls."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return min(times)


# --- 3. demo --------------------------------------------------------------------------------

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


def _demo(lengths: list[int], n_heads: int, d_head: int, dtype: str, device: str, plot: str | None) -> None:
    from flash_attn import Options, flash_attention, naive_attention_with_lse, online_softmax, tiled_forward

    if min(*lengths, n_heads, d_head) < 1:
        raise ValueError("--lengths, --n_heads and --d_head must be at least 1, "
                         f"got {min(lengths)}, {n_heads} and {d_head}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device: leave it out to run on the CPU")
    tile = (tile_size(192 * 1024, d_head),) * 2  # an A100's fast memory, per processor
    figure = new_figure(plot, 10, 4)
    lengths, generator = sorted(lengths), torch.Generator().manual_seed(0)
    row = torch.randn(1000, generator=generator)
    print(f"softmax of 1000 numbers in one pass, 7 at a time: differs from torch's by "
          f"{(online_softmax(row, 7) - row.softmax(0)).abs().max():.0e} (expected below 1e-7)")

    T, traffic = min(1024, lengths[-1]), []
    tiled_forward(*torch.randn(3, 1, 1, T, d_head, generator=generator), Options(), tile, traffic)
    expected = tiled_traffic(T, T, d_head, tile)
    print(f"192 KiB of fast memory hold tiles of {tile[0]} rows; at T = {T} one causal head moves {sum(traffic):,} "
          f"bytes in tiles (formula: {expected:,}), naively {naive_traffic(T, T, d_head):,}")

    methods = {
        "naive": lambda q, k, v: naive_attention_with_lse(q, k, v)[0],
        "tiled": lambda q, k, v: flash_attention(q, k, v, backend="tiled"),
        "torch": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)}
    print(f"\nforward + backward, (1, {n_heads}, T, {d_head}), causal, {dtype} on {device}: "
          "milliseconds, and MB beyond the inputs\n     T" + "".join(f"{name:>18}" for name in methods))
    table: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    worst = 0.0
    for T in lengths:
        inputs = torch.randn(4, 1, n_heads, T, d_head, generator=generator)
        q, k, v, grad_out = inputs.to(device, getattr(torch, dtype))
        leaves, results = [x.requires_grad_() for x in (q, k, v)], {}
        for name, method in methods.items():
            def run():
                out = method(*leaves)
                return out.detach(), *torch.autograd.grad(out, leaves, grad_out)
            results[name] = run()
            table[name].append((_milliseconds(run, device), peak_extra_bytes(run, device) / 1e6))
        # One key has weight 1 whatever q and k are: there dq and dk are 0, and no measure of their own errors.
        largest = torch.stack([b.abs().max() for b in results["torch"]]).max()
        errors = [(a - b).abs().max() / largest for a, b in zip(results["tiled"], results["torch"])]
        worst = torch.tensor([worst, *errors]).max().item()  # NaN, if there is one; Python's max would lose it
        print(f"{T:6}" + "".join("{:9.1f} {:8.1f}".format(*table[name][-1]) for name in methods), flush=True)
    if figure is not None:
        for axis, title, column in zip(figure.subplots(1, 2), ("milliseconds", "MB beyond the inputs"), (0, 1)):
            for name in methods:
                axis.loglog(lengths, [values[column] for values in table[name]], marker="o", label=name)
            axis.set_xticks(lengths, lengths)
            axis.minorticks_off()
            axis.set(xlabel="T", title=title)
            axis.legend()
        figure.savefig(plot)
        print(f"drawn: {plot}")
    grown = {name: values[-1][1] / values[0][1] for name, values in table.items()}
    print(f"from T = {lengths[0]} to {lengths[-1]}, {lengths[-1] / lengths[0]:.1f} x, memory grew "
          f"{grown['naive']:.1f} x naive, {grown['tiled']:.1f} x tiled")
    bound = 1e-5 if dtype == "float32" else 0.02
    print(f"counted = formula: {sum(traffic) == expected};   max |tiled - torch| = {worst:.1e} of the largest: "
          f"{'OK, below' if worst < bound else 'WRONG, expected below'} {bound:.0e}")


def main(program: str) -> None:
    """The command line, under the name of the file that was started."""
    parser = argparse.ArgumentParser(prog=program, usage=argparse.SUPPRESS,
                                     description=sys.modules["__main__"].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], metavar="T",
                        help="T = S, one after the other (default %(default)s)")
    parser.add_argument("--n_heads", type=int, default=4, help="H (default %(default)s)")
    parser.add_argument("--d_head", type=int, default=64, help="Dh, width of a head (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"],
                        help="of q, k and v (default %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default %(default)s)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the table (needs matplotlib)")
    try:
        _demo(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error).split("\n")[0][:200])
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")


if __name__ == "__main__":
    main("attention_traffic.py")
