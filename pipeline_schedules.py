"""Pipeline schedules: in which order every rank runs its forwards and backwards, and what that costs.

Idea      Stages of a model stand on P ranks one after the other, M microbatches follow one another through them. At the
          ends of a step ranks wait for one another: the bubble. A schedule is a list of operations for every rank; its
          timeline follows from what they wait for. It is the same code for 4 ranks that run and 4096 that do not.
Formula   bubble = idle time / all time of a step, for stages of equal time, backward = 2 forward:
          GPipe, 1F1B      (P-1) / (M + P-1)             Huang et al. 2019; Narayanan et al. 2021, section 2.2
          interleaved      (P-1) / (v M + P-1)           v stages a rank: Narayanan et al. 2021, section 2.2
          zero-bubble H1   (P-1) / (3 M + P-1)           backward = input part I + weight part W: Qi et al. 2023
                                                         for M >= P: fewer microbatches cannot fill the ends
          activations held, in microbatches: GPipe M, 1F1B and ZB-H1 at most P; interleaved, of stages of 1/v the
          size, at most 2 (P-1) + (v-1) P + 1
Shapes    no tensors here: ranks -> operations -> times; pipeline.py runs them
Omits     schedules that hold more than 1F1B to have no bubble at all (ZB-H2, ZB-V); stages of unequal time in the plan.
Run       python pipeline_schedules.py                             four schedules, drawn: P = 4, M = 8
          python pipeline_schedules.py --plot timelines.png        the same as a picture
          python pipeline_schedules.py --simulate --ranks 4096     a 175B model: the best layouts
          Ends with "max |bubble - formula| = ...", or the best layout
Test      pytest tests/test_pipeline.py
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


# --- 1. schedules -------------------------------------------------------------------------------------
#
# Stage s = 0 .. v P - 1 lives on rank s mod P. An operation is one of
#   F  forward of a microbatch through a stage             needs F of the stage before
#   B  its whole backward                                  needs B of the stage behind, and its own F
#   I  the part of B that the stage before waits for: the gradient of the input
#   W  the rest, which nobody waits for: the gradients of the weights
# A schedule is, for every rank, the order of its operations; when they run follows from what they wait for.

@dataclass(frozen=True)
class Op:
    """One operation: kind "F", "B", "I" or "W", of a microbatch, in a stage."""
    kind: str
    microbatch: int
    stage: int


SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb")


def schedule(name: str, P: int, M: int, v: int = 1) -> list[list[Op]]:
    """The operations of every rank, in order: P ranks, M microbatches, v stages a rank (for "interleaved").

    Raises ValueError for an unknown name or numbers that make no schedule.
    """
    if name not in SCHEDULES or min(P, M, v) < 1 or (v > 1 and name != "interleaved"):
        raise ValueError(f"a schedule is one of {', '.join(SCHEDULES)} with at least one rank and microbatch, and "
                         f"several stages a rank only if interleaved, got {name!r}, P={P}, M={M}, v={v}")
    if name == "zb":
        return _zero_bubble(P, M)
    if name == "gpipe":  # all forwards, then all backwards
        return [[Op("F", m, r) for m in range(M)] + [Op("B", m, r) for m in range(M)] for r in range(P)]
    # One forward, one backward: a few forwards ahead, just enough for the first gradient to come back; then every
    # backward frees what the next forward fills. With v stages a rank, P microbatches at a time go through one
    # stage, then through the rank's next one; a microbatch comes round v times. If M is no multiple of P the last
    # round is short, and a few forwards more save time until a gradient is there: the shortest step is taken.
    candidates = []
    for more in range(1 if v == 1 or M % P == 0 else P * v):
        ranks = []
        for r in range(P):
            rounds = [range(g, min(g + P, M)) for g in range(0, M, P)]
            forwards = [Op("F", m, i * P + r) for g in rounds for i in range(v) for m in g]
            backwards = [Op("B", m, i * P + r) for g in rounds for i in reversed(range(v)) for m in g]
            ahead = P - r - 1 if v == 1 else 2 * (P - r - 1) + (v - 1) * P
            ahead = min(ahead + more, len(forwards))
            steady = [op for pair in zip(forwards[ahead:], backwards) for op in pair]
            ranks.append(forwards[:ahead] + steady + backwards[len(forwards) - ahead:])
        with contextlib.suppress(ValueError):  # these would wait for one another
            candidates.append((max(t.end for t in timeline(ranks)), more, ranks))
    return min(candidates)[2]


def _zero_bubble(P: int, M: int) -> list[list[Op]]:
    """ZB-H1: a rank that would wait for a gradient or an activation computes gradients of weights instead.

    At most P microbatches are held from F to W on any rank, as with 1F1B. Qi et al. 2023 (2401.10241), section 3.1.
    """
    ranks, counts = [[] for _ in range(P)], [dict.fromkeys("FIW", 0) for _ in range(P)]
    while any(n["W"] < M for n in counts):  # one slot of time for each of F, I, W
        before = [dict(n) for n in counts]  # what the neighbours see: the slots that have ended
        for r, n in enumerate(counts):
            # A forward comes first, if it can: the ranks behind have nothing else to do. It can if no more
            # microbatches are under way than 1F1B has, and memory for its activations is free.
            may = {"F": n["F"] < M and n["F"] - n["I"] < P - r and n["F"] - n["W"] < P and
                   (r == 0 or n["F"] < before[r - 1]["F"]),
                   "I": n["I"] < n["F"] and (r == P - 1 or n["I"] < before[r + 1]["I"]),
                   "W": n["W"] < n["I"]}
            kind = next((kind for kind in "FIW" if may[kind]), None)
            if kind:
                ranks[r].append(Op(kind, n[kind], r))
                n[kind] += 1
    return ranks


@dataclass(frozen=True)
class Timed:
    """An operation, the rank that ran it, and when, in seconds or in units of a forward."""
    rank: int
    start: float
    end: float
    op: Op


def unit_seconds(op: Op) -> float:
    """Every part costs as much as a forward: B = I + W = 2 F."""
    return 2.0 if op.kind == "B" else 1.0


def timeline(ranks: Sequence[Sequence[Op]], seconds: Callable[[Op], float] = unit_seconds,
             message: float = 0.0) -> list[Timed]:
    """When every operation runs, if ``seconds(op)`` is how long it takes and ``message`` how long its result travels.

    Raises ValueError if the ranks would wait for one another for ever.
    """
    P, last = len(ranks), max(op.stage for ops in ranks for op in ops)
    ends, free, waiting = {}, [0.0] * P, [deque(ops) for ops in ranks]
    result, ready = [], deque(range(P))
    while ready:
        r = ready.popleft()
        while waiting[r]:
            op = waiting[r][0]
            needs = []
            if op.kind == "F" and op.stage > 0:
                needs = [Op("F", op.microbatch, op.stage - 1)]
            elif op.kind in "BI":
                needs = [Op(op.kind, op.microbatch, op.stage + 1)] if op.stage < last else []
                needs.append(Op("F", op.microbatch, op.stage))
            elif op.kind == "W":
                needs = [Op("I", op.microbatch, op.stage)]
            if not all(need in ends for need in needs):
                break
            start = max([free[r], *(ends[need] + message * (need.stage % P != r) for need in needs)])
            free[r] = ends[op] = start + seconds(op)
            result.append(Timed(r, start, free[r], op))
            waiting[r].popleft()
            neighbour = (r + (1 if op.kind == "F" else -1)) % P
            if neighbour not in ready:
                ready.append(neighbour)
    if any(waiting):
        raise ValueError(f"the ranks wait for one another: {[ops[0] for ops in waiting if ops]}")
    return result


def bubble(times: Iterable[Timed]) -> float:
    """The share of all ranks' time, from the first start to the last end, in which they wait."""
    times = list(times)
    whole = max(t.end for t in times) - min(t.start for t in times)
    return 1 - sum(t.end - t.start for t in times) / (whole * (1 + max(t.rank for t in times)))


def bubble_formula(name: str, P: int, M: int, v: int = 1) -> float:
    """The same by the header's formulas: exact for stages of equal time, if P divides M (interleaved), M >= P (zb)."""
    return (P - 1) / ({"interleaved": v, "zb": 3}.get(name, 1) * M + P - 1)


def peak_held(ops: Iterable[Op]) -> int:
    """Most microbatches of a stage whose activations a rank holds at once, from their F to their B or W."""
    held = list(itertools.accumulate({"F": 1, "B": -1, "I": 0, "W": -1}[op.kind] for op in ops))
    return max(held)


def draw_text(times: list[Timed], width: int = 100) -> str:
    """The timeline, a line for a rank: the microbatch's number under a letter for what is done with it."""
    begin, end = min(t.start for t in times), max(t.end for t in times)
    columns = min(width, max(1, round(end - begin))) if all(t.end - t.start >= 1 for t in times) else width
    lines = []
    for rank in range(1 + max(t.rank for t in times)):
        cells = ["."] * columns
        for t in (t for t in times if t.rank == rank):
            first, behind = (round((x - begin) / (end - begin) * columns) for x in (t.start, t.end))
            cells[first:behind] = [{"F": "f", "B": "b", "I": "i", "W": "w"}[t.op.kind]] * (behind - first)
            if behind > first:
                cells[first] = "0123456789"[t.op.microbatch % 10]
        lines.append(f"rank {rank}  " + "".join(cells))
    return "\n".join(lines)


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


def draw(path: str, timelines: dict[str, list[Timed]]) -> None:
    """Named timelines as Gantt charts on one axis of time, one below the other, to a picture file. Needs matplotlib."""
    ranks = [1 + max(t.rank for t in times) for times in timelines.values()]
    figure = new_figure(path, 12, sum(0.35 * P + 0.8 for P in ranks))
    colours = {"F": "tab:blue", "B": "tab:orange", "I": "tab:red", "W": "tab:green"}
    all_axes = figure.subplots(len(ranks), 1, squeeze=False, sharex=True, height_ratios=ranks)[:, 0]
    for axes, P, (name, times) in zip(all_axes, ranks, timelines.items()):
        for t in times:
            axes.barh(t.rank, t.end - t.start, left=t.start, color=colours[t.op.kind], edgecolor="white")
            axes.text((t.start + t.end) / 2, t.rank, t.op.microbatch, ha="center", va="center", fontsize=7)
        axes.set_yticks(range(P), [f"rank {r}" for r in range(P)])
        axes.invert_yaxis()
        axes.set_title(f"{name}: bubble {bubble(times):.2f}", loc="left", fontsize="medium")
    all_axes[-1].set_xlabel("time")
    named = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}
    kinds = sorted({t.op.kind for times in timelines.values() for t in times})
    for kind in kinds:
        all_axes[0].barh(0, 0, color=colours[kind], label=named[kind])
    all_axes[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(kinds), frameon=False)
    figure.savefig(path, dpi=100)


# --- 2. what it costs on many GPUs ----------------------------------------------------------------------

@dataclass(frozen=True)
class Cluster:
    """Compute and links of a GPU, per second. The defaults are an A100's (312 TFLOP/s in bf16, NVLink 3) with one
    200 Gbit/s InfiniBand port each; a large matrix product reaches some 60% of the peak there."""
    flops: float = 0.6 * 312e12
    inside_node: float = 250e9  # bytes, each direction, as all-reduces see it
    between_nodes: float = 22e9
    latency: float = 10e-6  # seconds, of a message
    gpus_per_node: int = 8


@dataclass(frozen=True)
class Workload:
    """A decoder and its batch; the defaults are GPT-3's with Megatron's batch: Narayanan et al. 2021, table 1."""
    n_layers: int = 96
    d_model: int = 12288
    vocab_size: int = 51200
    context: int = 2048
    sequences: int = 1536
    head_width: int = 128
    value_bytes: int = 2  # of a weight, an activation, a gradient: 2 in bf16
    recompute: bool = True  # backward runs the forward again: 3 forwards, as Megatron runs it


@dataclass(frozen=True)
class Layout:
    """How many ranks share what: ranks = dp * tp * pp; v stages a rank, microbatches of ``micro`` sequences."""
    dp: int
    tp: int
    pp: int
    v: int = 1
    micro: int = 1


@dataclass(frozen=True)
class Step:
    """What a step is predicted to take, per GPU: seconds, and bytes sent by kind of link."""
    seconds: float
    bubble: float
    bytes_inside: float
    bytes_between: float
    mfu: float  # of the peak that Cluster's flops are 60% of


def predict(layout: Layout, work: Workload = Workload(), cluster: Cluster = Cluster(), name: str = "") -> Step:
    """One step by the schedule's own timeline: compute, all-reduces of tensor parallelism inside every operation,
    messages between stages, and behind it the all-reduce of the gradients, nothing of which overlaps.

    Beside Narayanan et al. 2021, table 1, who count the recomputed forward too (4/3 of this MFU): 175B on 1024 A100s
    50% of the peak, published 45; 1T on 3072 50%, published 52. The timeline alone, beside small pipelines that ran,
    given the times of their operations: within 25% of a step (tests/test_pipeline.py). Beside 2 processes on a CPU,
    given their speed and links: within 20%: dp -4%, tp -14%, pp -3% (bench/parallel.py --only simulate).

    Raises ValueError for a layout that does not fit the model or the batch.
    """
    dp, tp, pp, v, b = layout.dp, layout.tp, layout.pp, layout.v, layout.micro
    M, rest = divmod(work.sequences, max(1, dp * b))
    if min(dp, tp, pp, v, b) < 1 or rest or not M or work.n_layers % (pp * v) or work.d_model // work.head_width % tp:
        raise ValueError(f"{layout} does not divide {work}: dp * micro must divide the sequences, pp * v the layers "
                         "and tp the heads")
    layers, tokens = work.n_layers // (pp * v), b * work.context  # of a stage; of a microbatch
    forward = layers * tokens * (24 * work.d_model**2 + 4 * work.context * work.d_model) / (tp * cluster.flops)
    message = work.value_bytes * tokens * work.d_model / tp  # bytes; each tensor-parallel rank sends a slice
    reduced = 2 * layers * 2 * (tp - 1) / tp * work.value_bytes * tokens * work.d_model  # bytes, 2 all-reduces a layer
    inside = cluster.inside_node if tp <= cluster.gpus_per_node else cluster.between_nodes
    talk = reduced / inside + (2 * layers * cluster.latency if tp > 1 else 0.0)

    def seconds(op: Op) -> float:
        if op.kind == "F":
            return forward + talk
        return (2 + work.recompute) * forward + (1 + work.recompute) * talk

    times = timeline(schedule(name or ("interleaved" if v > 1 else "1f1b"), pp, M, v), seconds,
                     message / cluster.between_nodes + cluster.latency if pp > 1 else 0.0)
    weights = 12 * work.n_layers * work.d_model**2 / (tp * pp)
    gradients = 2 * (dp - 1) / dp * work.value_bytes * weights  # bytes
    total = max(t.end for t in times) + gradients / cluster.between_nodes
    useful = 3 * work.sequences * work.context * (
        work.n_layers * (24 * work.d_model**2 + 4 * work.context * work.d_model) + 2 * work.vocab_size * work.d_model)
    stages, passes = 2 * v * M * (pp > 1), 2 + work.recompute
    return Step(total, bubble(times), passes * M * v * reduced * (tp <= cluster.gpus_per_node),
                gradients + stages * message + passes * M * v * reduced * (tp > cluster.gpus_per_node),
                useful / (total * dp * tp * pp * cluster.flops / 0.6))


def simulate(ranks: int, work: Workload = Workload(), cluster: Cluster = Cluster(), gigabytes: float = 80.0) -> str:
    """A table of the layouts of so many GPUs, best first; those that do not fit their memory are left out.

    Raises ValueError for less than one, and if no layout fits.
    """
    if ranks < 1:
        raise ValueError(f"--ranks must be at least 1, got {ranks}")
    found = []
    for tp, pp, v, b in itertools.product((1, 2, 4, 8), range(1, work.n_layers + 1), (1, 2, 3), (1, 2, 4)):
        weights = 12 * work.n_layers * work.d_model**2 / (tp * pp)
        # of each layer its input is kept, in bf16, for as many microbatches as 1F1B holds
        kept = 2 * work.n_layers / pp * min(pp, work.sequences) * b * work.context * work.d_model
        if ranks % (tp * pp) or 18 * weights + kept / tp > gigabytes * 1e9:
            continue
        if v > 1 and (pp == 1 or work.sequences // (ranks // (tp * pp) * b) % pp):  # its rounds would be ragged
            continue
        layout = Layout(ranks // (tp * pp), tp, pp, v, b)
        with contextlib.suppress(ValueError):
            found.append((predict(layout, work, cluster), layout))
    if not found:
        state = 18 * 12 * work.n_layers * work.d_model**2 / 1e9
        raise ValueError(f"no layout of {ranks} GPUs fits: weights, gradients and optimizer take {state:,.0f} GB, "
                         f"and ranks / (tp * pp) must divide a batch of {work.sequences} sequences")
    lines = ["  dp  tp  pp   v   b   step      bubble   MFU   GB inside nodes   GB between"]
    for step, layout in sorted(found, key=lambda pair: pair[0].seconds)[:8]:
        lines.append(f"{layout.dp:4} {layout.tp:3} {layout.pp:3} {layout.v:3} {layout.micro:3} {step.seconds:8.2f} s "
                     f"{step.bubble:6.3f}   {step.mfu:4.0%} {step.bytes_inside / 1e9:12.1f} "
                     f"{step.bytes_between / 1e9:14.1f}")
    best = min(found, key=lambda pair: pair[0].seconds)
    lines.append(f"best of {len(found)} layouts of {ranks} GPUs: {best[1]}, {best[0].seconds:.2f} s a step")
    return "\n".join(lines)


# --- 3. demo --------------------------------------------------------------------------------------------

def main(options: argparse.Namespace) -> None:
    if options.simulate:
        print(simulate(4096 if options.ranks is None else options.ranks))
        return
    if options.ranks is not None:
        raise ValueError("--ranks means nothing without --simulate")
    new_figure(options.plot, 1, 1)  # what cannot be drawn is known before the work
    worst, timelines = 0.0, {}
    for name in SCHEDULES:
        v = 2 if name == "interleaved" else 1
        ranks = schedule(name, options.stages, options.microbatches, v)
        times = timeline(ranks, lambda op: unit_seconds(op) / v)  # a rank's stages together do the same work
        found, expected = bubble(times), bubble_formula(name, options.stages, options.microbatches, v)
        exact = {"interleaved": options.microbatches % options.stages == 0,
                 "zb": options.microbatches >= options.stages}.get(name, True)
        worst = max(worst, abs(found - expected)) if exact else worst
        print(f"{name}: bubble {found:.4f}, formula {expected:.4f}; microbatches held "
              f"{[peak_held(ops) for ops in ranks]}" + (" of stages of half the size" if v == 2 else ""))
        print(draw_text(times))
        timelines[name + " (two stages a rank)" * (v == 2)] = times
    if options.plot:
        draw(options.plot, timelines)
        print(f"drawn: {options.plot}")
    print(f"max |bubble - formula| = {worst:.1e}: "
          + ("OK, below 1e-12" if worst < 1e-12 else "WRONG, expected below 1e-12"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--stages", type=int, default=4, help="P, ranks of the pipeline (default %(default)s)")
    parser.add_argument("--microbatches", type=int, default=8, help="M, of a step (default %(default)s)")
    parser.add_argument("--simulate", action="store_true", help="predict a 175B model on --ranks GPUs instead")
    parser.add_argument("--ranks", type=int, help="GPUs to simulate (default 4096)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw all timelines (needs matplotlib)")
    try:
        main(parser.parse_args())
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
