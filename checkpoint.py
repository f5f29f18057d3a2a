"""Checkpoints that survive a crash: whole or not there, checked before use, tied to no layout.

Idea      A checkpoint is a directory. It is written under a temporary name, forced to disk, and only then
          renamed: on every POSIX file system a rename happens or does not, so a kill, a crash or a full disk
          at any moment leaves the last checkpoint as it was. A manifest with the length and SHA-256 of every
          file is what a reader trusts, so a truncated file or one flipped bit is refused by name.
Shapes    out/step-00000200/ model.pt       parameter name -> tensor, full shape, fp32
                             optimizer.pt   parameter name -> {"exp_avg": ..., "exp_avg_sq": ..., "step": ...}
                             meta.json      step, configs, whatever the run wants to know of itself
                             ...            files of the caller's (the tokenizer)
                             manifest.json  file -> length and SHA-256, written last
          Names are those of the whole model, never of a rank or a shard: any number of processes can read it.
Safety    torch.load(weights_only=True) reads tensors only: opening a foreign checkpoint runs no code.
Omits     saving in pieces from many ranks: here one process writes everything; two runs in one folder.
Run       python checkpoint.py    kills a saving process 10 times, loads what is left each time; 30 s
Test      pytest tests/test_checkpoint.py
"""

import argparse
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found, or trusted; the message is one line and names the cure."""


# --- 1. writing -----------------------------------------------------------------------------

def save(directory: str | os.PathLike, step: int, tensors: dict[str, dict], meta: dict,
         write_files: Callable[[Path], None] | None = None, keep: int | None = None) -> Path:
    """Write ``directory/step-<step>`` atomically, then delete all but the newest ``keep`` checkpoints.

    Args:
        tensors: part name -> (possibly nested) dict of tensors; each part becomes ``<part>.pt``.
        meta: what json can hold; ``step`` is added.
        write_files: called with the temporary directory, to add files of the caller's (no folders).
        keep: how many checkpoints remain, this one included; None keeps all.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: if it could not be written (a full disk, no permission). What was there stays.
        ValueError: for a negative step, or if ``keep`` is less than one.
    """
    if step < 0 or keep is not None and keep < 1:
        raise ValueError(f"a checkpoint needs step >= 0 and keep >= 1 or None, got {step} and {keep}")
    directory = Path(directory)
    target = directory / f"step-{step:08d}"
    temporary = directory / f".{target.name}.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".step-*"):  # of a writer that was killed
            shutil.rmtree(leftover)
        temporary.mkdir()
        for part, state in tensors.items():
            torch.save(state, temporary / f"{part}.pt")
        (temporary / "meta.json").write_text(json.dumps({"step": step} | meta, indent=2) + "\n")
        if write_files:
            write_files(temporary)
        manifest = {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        for file in temporary.iterdir():
            _flush_to_disk(file)
        _flush_to_disk(temporary)
        superseded = target.with_suffix(".old")  # the same step, saved before
        if target.exists():
            remove(superseded)
            target.rename(superseded)
        temporary.rename(target)
        remove(superseded)
        _flush_to_disk(directory)
        for old in _steps(directory)[:-keep] if keep else ():
            remove(old)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        kept = _steps(directory)
        stays = f"{kept[-1]} stays as it was" if kept else "there was none before it"
        raise CheckpointError(f"could not save {target} ({_first_line(error)}); {stays}; "
                              "see that it has room and may be written to, then go on from there") from error
    return target


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _steps(directory: Path) -> list[Path]:
    """Oldest first; of one step the superseded one before the one that took its place."""
    ours = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+(\.old)?", path.name)]
    return sorted(ours, key=lambda path: (int(path.stem.removeprefix("step-")), path.suffix != ".old"))


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; a kill in the middle must not leave half of one under its name."""
    if checkpoint.exists():
        dying = checkpoint.rename(checkpoint.parent / f".{checkpoint.name}.removed")
        shutil.rmtree(dying)


def _fingerprint(file: Path) -> dict:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _flush_to_disk(path: Path) -> None:
    """A rename is only as safe as the data behind it: force file or directory out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- 2. reading -----------------------------------------------------------------------------

def latest(directory: str | os.PathLike) -> Path:
    """The newest checkpoint in ``directory``, or ``directory`` itself if it is one.

    Raises:
        CheckpointError: if there is none.
    """
    directory = Path(directory)
    if (directory / "manifest.json").exists():
        return directory
    if not _steps(directory):
        what = "holds no checkpoint (step-*)" if directory.is_dir() else "is not a directory"
        raise CheckpointError(f"{directory} {what}; give the directory that a run was told to write to")
    return _steps(directory)[-1]


def load(path: str | os.PathLike, parts: tuple[str, ...] = ("model", "optimizer")) -> dict:
    """Read a checkpoint, every file of it that is needed checked against the manifest first.

    Returns:
        {"meta": dict, part: dict of CPU tensors, ...}

    Raises:
        CheckpointError: if a file is missing, cut short, changed, or not of this form.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        names = [name for name in manifest if not name.endswith(".pt") or name.removesuffix(".pt") in parts]
        for name in names + [f"{part}.pt" for part in parts]:
            if name not in manifest or not (path / name).exists():
                raise CheckpointError(_refusal(path, f"{name} is missing"))
            now, then = _fingerprint(path / name), manifest[name]
            if now["bytes"] != then["bytes"]:
                raise CheckpointError(_refusal(path, f"{name} has {now['bytes']} bytes of {then['bytes']}"))
            if now != then:
                raise CheckpointError(_refusal(path, f"{name} is damaged: its SHA-256 is not the manifest's"))
        loaded = {part: torch.load(path / f"{part}.pt", "cpu", weights_only=True) for part in parts}
        return {"meta": json.loads((path / "meta.json").read_text())} | loaded
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        reason = "it holds more than tensors, and reading that could run code"
        raise CheckpointError(_refusal(path, reason)) from error
    except Exception as error:  # whatever json and torch make of foreign bytes
        raise CheckpointError(_refusal(path, f"not readable: {_first_line(error)}")) from error


def _refusal(path: Path, reason: str) -> str:
    others = [step for step in _steps(path.parent) if step != path]
    cure = f"delete it to go on from {others[-1]}" if others else "there is no other one beside it"
    return f"checkpoint {path}: {reason}; {cure}"


# --- 3. optimizer states under full parameter names -----------------------------------------

def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    """The optimizer's parameters -> names, in the order by which torch's own state_dict numbers them."""
    names = {p: name for name, p in model.named_parameters()}
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p not in names for p in ordered):
        raise ValueError("the optimizer has a parameter that is not the model's")
    return {p: names[p] for p in ordered}


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """The optimizer's states by parameter name. ValueError if it has a parameter that is not the model's."""
    names, states = _names(model, optimizer), optimizer.state
    return {name: dict(states[p]) for p, name in names.items() if p in states}


def load_states(model: nn.Module, optimizer: torch.optim.Optimizer | None, checkpoint: dict) -> None:
    """Put what ``load`` returned into a model and its optimizer; nothing is touched unless everything fits.

    The optimizer keeps its own learning rate and other settings. It may go on with the checkpoint's own
    tensors: load anew for a second one.

    Raises:
        CheckpointError: if a part or a parameter is missing, unknown, or of another shape: another model's.
    """
    parameters = dict(model.named_parameters())
    names = [] if optimizer is None else list(_names(model, optimizer).values())
    for part in ("model",) if optimizer is None else ("model", "optimizer"):
        if part not in checkpoint:
            raise CheckpointError(f"this checkpoint was loaded without its part {part!r}")
    theirs, states = checkpoint["model"], checkpoint.get("optimizer", {})
    for name in sorted(parameters.keys() ^ theirs.keys() | states.keys() - parameters.keys()):
        whose = "the model" if name in parameters else "the checkpoint"
        raise CheckpointError(f"this checkpoint is of another model: only {whose} has {name}")
    for name, p in parameters.items():
        if p.shape != theirs[name].shape:
            raise CheckpointError(f"this checkpoint is of another model: {name} is "
                                  f"{tuple(theirs[name].shape)} in it, {tuple(p.shape)} here")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(theirs[name])
    if optimizer is not None:
        # Through torch's own loader, which knows on which device each optimizer wants which state.
        numbered = {i: states[name] for i, name in enumerate(names) if name in states}
        optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


# --- 4. demo --------------------------------------------------------------------------------

def _save_for_ever(directory: str) -> None:
    """What the demo kills: a process that saves one checkpoint after another, from the last one on."""
    parent, step = os.getppid(), load(latest(directory), parts=())["meta"]["step"]
    print("started", flush=True)
    while os.getppid() == parent:  # not for ever, if it is the demo that was killed
        step += 1
        w = torch.full((1 << 20,), float(step))
        save(directory, step, {"model": {"weight": w}, "optimizer": {"weight": {"exp_avg": w}}}, {}, keep=2)


def main(kills: int, seed: int) -> None:
    if kills < 1 or not 0 <= seed < 2**63:
        raise ValueError(f"--kills must be at least 1 and --seed in 0 .. 2^63 - 1, got {kills} and {seed}")
    generator = torch.Generator().manual_seed(seed)
    whole = 0
    with tempfile.TemporaryDirectory() as directory:
        save(directory, 0, {"model": {"weight": torch.zeros(1)}, "optimizer": {}}, {})
        for _ in range(kills):
            with subprocess.Popen([sys.executable, __file__, "--save_for_ever", directory],
                                  stdout=subprocess.PIPE, start_new_session=True) as child:
                try:
                    child.stdout.readline()
                    time.sleep(0.3 * torch.rand((), generator=generator).item())
                finally:  # after Ctrl-C too
                    child.kill()
            found = load(latest(directory))
            whole += bool((found["model"]["weight"] == found["meta"]["step"]).all())
        path = latest(directory)
        print(f"killed in the middle of saving {kills} times; the last checkpoint is {path.name}, "
              f"left behind: {[p.name for p in Path(directory).glob('.step-*')]}")
        damaged = bytearray((path / "model.pt").read_bytes())
        damaged[len(damaged) // 2] ^= 1
        (path / "model.pt").write_bytes(damaged)
        try:
            load(path)
            print("one bit flipped, and nobody noticed: WRONG")
        except CheckpointError as error:
            print(f"one bit flipped: {error}")
    print(f"whole after a kill: {whole} of {kills} (expected {kills} of {kills})")


if __name__ == "__main__":
    # Without argparse's usage lines a mistake is answered in one line.
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="times to kill the saving process (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments to kill it at (default 0)")
    parser.add_argument("--save_for_ever", metavar="DIR", help=argparse.SUPPRESS)
    arguments = vars(parser.parse_args())
    victim = arguments.pop("save_for_ever")
    try:
        _save_for_ever(victim) if victim else main(**arguments)
    except ValueError as error:
        print(f"checkpoint.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
