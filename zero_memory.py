"""What a rank holds under each stage of ZeRO: by formula, and by looking at every tensor there is.

Idea      A formula for memory is believed when the tensors of a process add up to it: those that lie there between two
          steps, and the most that is there at once within one.
Formula   bytes a parameter on each of P ranks, AdamW, bf16 with fp32 copies: 16, 4 + 12/P, 2 + 14/P, 16/P by stage; in
          fp32 16, 8 + 8/P, 4 + 12/P, 16/P.                               Rajbhandari et al. 2020 (1910.02054), figure 1
          stage 3 within a step, more than that: the parameters and the gradients of two units, (P-1)/P of a gradient
          that is received, 2^15 numbers of its sum in fp32; and two gradients of the rest (embedding, last norm,
          head), with which backward begins and ends: the head's, if it is the embedding, waits
Shapes    no tensors here
Omits     activations (the peak is that of one token); the allocator's gaps; what the backend takes for itself.
Run       python zero_memory.py --ranks 4    on 4 processes; ends with "max |bytes measured / formula - 1| = ..."
Test      pytest tests/test_zero.py
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


# --- 1. by formula, and measured ----------------------------------------------------------------------

def bytes_per_parameter(stage: int, P: int, half: bool = True) -> float:
    """Of parameters, gradients and AdamW's states, on each of P ranks.   Rajbhandari et al. 2020, figure 1"""
    parameter, gradient, rest = (2, 2, 12) if half else (4, 4, 8)
    cut = [P if stage >= needed else 1 for needed in (3, 2, 1)]
    return parameter / cut[0] + gradient / cut[1] + rest / cut[2]


def peak_of_stage_3(n: int, unit: int, rest: int, P: int, half: bool = True) -> float:
    """Bytes within a step, at most, but for activations. n: numbers of the model, of which ``unit`` are the largest
    unit's and ``rest`` those that no unit has alone."""
    more = (2 + 2 + (P - 1) / P) * max(unit, rest) + 2 * rest
    return bytes_per_parameter(3, P, half) * n + (2 if half else 4) * more + 4 * min(2**15, -(-max(unit, rest) // P))


def every_storage() -> dict[int, torch.UntypedStorage]:
    """The memory of all tensors that Python can see in this process, by address; without those before gc.freeze()."""
    gc.collect()
    # not isinstance: it asks lazy objects for a class that they have to make first
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
    storages = [t.untyped_storage() for t in tensors if not t.is_meta]
    return {storage.data_ptr(): storage for storage in storages}


def every_tensor(besides: Collection[torch.UntypedStorage] = ()) -> int:
    """Bytes of ``every_storage``, not counting those named."""
    return sum(storage.nbytes() for storage in every_storage().values() if storage not in besides)


class PeakBytes(TorchDispatchMode):
    """``most``: how many bytes of tensors made inside the context were alive at once, activations and all."""

    def __enter__(self):
        self.now = self.most = 0
        self.seen = weakref.WeakSet(every_storage().values())
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for storage in {t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)}:
            if storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._died, storage.nbytes())
        return result

    def _died(self, size: int) -> None:
        self.now -= size


# --- 2. demo ----------------------------------------------------------------------------------------

def _train(model: nn.Module, zero, steps: int, text: Tensor, part: slice, look=lambda zero: None) -> list[float]:
    """AdamW with clipping on this rank's rows of every batch, in two microbatches; without ZeRO on one process."""
    plain = zero or torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, generator = [], torch.Generator().manual_seed(0)
    for step in range(steps):
        starts = torch.randint(len(text) - 17, (8, 1), generator=generator)
        batch = text[starts + torch.arange(17)]  # (8, T + 1)
        total = 0.0
        for i, rows in enumerate(batch[part].tensor_split(2)):
            with zero.no_sync() if zero and i == 0 else nullcontext():
                logits = model(rows[:, :-1])  # (B, T, V)
                loss = F.cross_entropy(logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
                                       rows[:, 1:].flatten(), reduction="sum") / (8 * 16)
                loss.backward()
            total += loss.item()
        if zero:
            zero.finish()
            look(zero)
            zero.clip_grad_norm(1.0)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        plain.step()
        plain.zero_grad()
        losses.append(total)
    return losses


def _measure(stage: int, options: argparse.Namespace, P: int, text: Tensor, part: slice, make: Callable) -> dict:
    """Train in bf16 with fp32 copies; what is held when the second step's gradients are there, and the peak."""
    from zero import ZeRO

    # Which and not how much: what a thread of gloo still holds of the stage before may be gone a moment later.
    before, found = weakref.WeakSet(every_storage().values()), {}

    def look(zero) -> None:
        found.update(zero.bytes_held(), all=every_tensor(before))
    with torch.device("meta"):
        model = make()
    n = sum(p.numel() for p in model.parameters())
    zero = ZeRO(model, torch.optim.AdamW, stage=stage, reduction="sum", dtype=torch.bfloat16, offload=options.offload,
                initialise=lambda model: model.initialise(torch.Generator().manual_seed(options.seed)))
    _train(model, zero, 2, text, part, look)
    resting = every_tensor(before)
    rows = text[:2][None]  # one token: activations that are nothing beside weights
    with PeakBytes() as peak:
        model(rows[:, :1]).float().sum().backward()
        zero.finish()
    units = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    return found | {"n": n, "peak": resting + peak.most, "limit": peak_of_stage_3(n, max(units), n - sum(units), P)}


def _demo(rank: int, P: int, options: argparse.Namespace, rendezvous: str) -> None:
    """What every rank runs; rank 0 prints."""
    from gpt import GPT, GPTConfig
    from zero import ZeRO

    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=P)
    torch.set_num_threads(1)
    gc.freeze()  # what the libraries have made is not looked at again
    say = print if rank == 0 else lambda *words: None
    text = torch.tensor(list(subprocess.check_output([sys.executable, "-m", "this"])))  # bytes
    part = slice(rank * 8 // P, (rank + 1) * 8 // P)

    def small() -> nn.Module:
        return GPT(GPTConfig(vocab_size=128, context=16, n_layers=2, n_heads=2, d_model=32),
                   generator=torch.Generator().manual_seed(options.seed)).double()

    def large() -> nn.Module:
        return GPT(GPTConfig(vocab_size=128, context=16, n_layers=8, n_heads=4, d_model=options.d_model))

    one = small()
    losses = _train(one, None, options.steps, text, slice(None))
    say(f"{P} ranks, {options.steps} steps in float64 on one process: loss {losses[0]:.4f} (expected ln 128 = 4.852) "
        f"-> {losses[-1]:.4f}")
    error, worst, rows = 0.0, 0.0, []
    for stage in range(4):
        model = small()
        zero = ZeRO(model, lambda groups: torch.optim.AdamW(groups, lr=1e-3), stage=stage, reduction="sum",
                    offload=options.offload)
        _train(model, zero, options.steps, text, part)
        with zero.gathered():
            errors = [(p - q).abs().max().item() for p, q in zip(one.parameters(), model.parameters())]
            error = torch.tensor([error, *errors]).max().item()  # NaN, if there is one; Python's max would lose it
        del zero, model
    say(f"max |stage 0, 1, 2, 3 - one process| = {error:.1e} over all parameters: "
        + ("OK, below 1e-10" if error < 1e-10 else "WRONG, expected below 1e-10"))

    where = "of them on the host, which here is the device" if options.offload else "all on the device"
    found = [_measure(stage, options, P, text, part, large) for stage in range(4)]
    n = found[0]["n"]
    say(f"\n{n:,} parameters in bf16; bytes a parameter on rank 0 when the gradients are there, {where}")
    say("stage   parameters   gradients   states      sum   formula   every tensor of the process     host")
    for stage, held in enumerate(found):
        formula = bytes_per_parameter(stage, P)
        if options.offload and stage < 2:  # whole on the device, and reduced on the host
            formula += 2 / P if stage else 2
        each = [held[kind] / n for kind in ("parameters", "gradients", "states")]
        worst = max(worst, abs(held["all"] / n / formula - 1))
        say(f"{stage:5} {each[0]:12.3f} {each[1]:11.3f} {each[2]:8.3f} {sum(each):8.3f} {formula:9.3f} "
            f"{held['all'] / n:29.3f} {held['host'] / n:8.3f}")
    peak, limit = found[3]["peak"], found[3]["limit"]
    say(f"stage 3, most in a step: {peak / n:.3f} bytes a parameter; with two units' parameters and gradients, "
        f"and what is on its way, {limit / n:.3f}: "
        + ("OK, at most 1.02 of it" if peak <= 1.02 * limit else "WRONG, expected at most 1.02 of it"))
    if options.plot and rank == 0:
        _plot(found, P, options.plot)
        print(f"drawn: {options.plot}")
    say(f"max |bytes measured / formula - 1| = {worst:.4f}: "
        + ("OK, below 0.02" if worst < 0.02 else "WRONG, expected below 0.02"))
    dist.destroy_process_group()


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


def _plot(found: list[dict], P: int, path: str) -> None:
    figure = new_figure(path, 6, 3.5)
    axes = figure.subplots()
    left = [0.0] * 4
    for kind in ("parameters", "gradients", "states"):
        widths = [held[kind] / held["n"] for held in found]
        axes.barh([f"stage {stage}" for stage in range(4)], widths, left=left, label=kind)
        left = [a + b for a, b in zip(left, widths)]
    axes.plot([bytes_per_parameter(stage, P) for stage in range(4)], range(4), "k|", markersize=20, label="formula")
    axes.set(xlabel=f"bytes a parameter on each of {P} ranks, measured")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=150)


def _start(options: argparse.Namespace) -> None:
    started_by_torchrun = "RANK" in os.environ
    P = int(os.environ["WORLD_SIZE"]) if started_by_torchrun else options.ranks
    if not 1 <= P <= 8 or options.steps < 1 or options.d_model < 64 or options.d_model % 4:
        raise ValueError("--ranks must be in 1 .. 8, --steps at least 1, --d_model a multiple of 4 and at least 64 "
                         "(beside less, a token's activations are no trifle), "
                         f"got {P}, {options.steps} and {options.d_model}")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed must be in 0 .. 2^32 - 1, got {options.seed}")
    new_figure(options.plot, 1, 1)  # what cannot be drawn is known before the work
    if started_by_torchrun:
        return _demo(int(os.environ["RANK"]), P, options, "env://")
    from processes import start_ranks
    with tempfile.TemporaryDirectory() as folder:  # the ranks meet through a file: no port to be taken
        start_ranks(_demo, (P, options, (Path(folder) / "ranks").as_uri()), P)


def main(program: str) -> None:
    """The command line, under the name of the file that was started."""
    parser = argparse.ArgumentParser(prog=program, usage=argparse.SUPPRESS,
                                     description=sys.modules["__main__"].__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n"  # one line of all ranks, without usage
                                               if os.environ.get("RANK", "0") == "0" else None)
    parser.add_argument("--ranks", type=int, default=2,
                        help="processes to start, if not under torchrun: 1 to 8 (default %(default)s)")
    parser.add_argument("--steps", type=int, default=10,
                        help="optimizer steps in float64 (default %(default)s)")
    parser.add_argument("--d_model", type=int, default=192,
                        help="width of the model that is measured, 64 or more (default %(default)s)")
    parser.add_argument("--offload", action="store_true", help="masters, states and gradients in the host's memory")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the bytes (needs matplotlib)")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters (default %(default)s)")
    try:
        _start(parser.parse_args())
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")


if __name__ == "__main__":
    main("zero_memory.py")
