"""Checkpoints that survive a crash: whole or not there, checked before use, tied to no layout.

Idea      A checkpoint is a directory. It is written under a temporary name, forced to disk, and only then
          renamed: on every POSIX file system a rename happens or does not, so a kill, a crash or a full disk
          at any moment leaves the last checkpoint as it was. A manifest with the length and SHA-256 of every
          file is what a reader trusts, so a truncated file or one flipped bit is refused by name.
          Every process writes what it holds of each tensor, and reads what it needs (pieces.py): any other number of
          processes, cut in any other way, can go on from it. Reading a foreign checkpoint runs no code.
Formula   whole = manifest.json is there, and each file has the length and the SHA-256 that it says
          bytes = 12 a parameter with AdamW in fp32 (weight, mean and mean square of its gradient), keep + 1 times
          while one is written
Shapes    out/step-00000200/ __0_0.distcp ... boxes of tensors, a file from each process
                             .metadata        tensor name -> shape, and where its boxes are
                             meta.json        step, configs, whatever the run wants to know of itself
                             ...              files of the caller's (the tokenizer)
                             manifest.json    file -> length and SHA-256, written last
          Tensors: "model/<parameter>" and "optimizer/<parameter>/<state>", e.g. optimizer/blocks.0.norm1.weight/exp_avg
Omits     file systems that the processes do not share; compression.
Run       python checkpoint.py                                 kills a saving process 10 times, loads what is left
          python checkpoint.py --export out/pretrain --to hf   a Hugging Face directory, whatever layout saved it
          Ends with "whole after a kill: 10 of 10 ...", or "saved: ..."
Test      pytest tests/test_checkpoint.py
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import tempfile
import time
from collections import ChainMap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found, or trusted; the message is one line and names the cure."""


# --- 1. writing -----------------------------------------------------------------------------

def save(directory: str | os.PathLike, step: int, tensors: dict[str, dict], meta: dict,
         write_files: Callable[[Path], None] | None = None, keep: int | None = None,
         group: dist.ProcessGroup | None = None) -> Path:
    """Write ``directory/step-<step>`` atomically, then delete all but the newest ``keep``; returns its path.

    Args:
        tensors: part name -> (possibly nested) dict of tensors or ``Pieces``.
        meta: what json can hold; ``step`` is added. Of a group, the first rank's is written.
        write_files: called with the temporary directory, to add files of the caller's (no folders); on the first rank.
        keep: how many checkpoints remain, this one included; None keeps all.
        group: the processes that save together, each what it holds, and all call this; None: this one alone.

    Raises:
        CheckpointError: on every rank, if it could not be written (a full disk, no permission). What was there stays.
        ValueError, TypeError: for a negative step, if ``keep`` is less than one, for what is no tensor or not for json.
    """
    if step < 0 or keep is not None and keep < 1:
        raise ValueError(f"step must be at least 0 and keep at least 1 or None, got {step} and {keep}")
    from pieces import flatten, write_pieces

    boxes, text = flatten(tensors), json.dumps({"step": step} | meta, indent=2) + "\n"
    directory, rank = Path(directory), 0 if group is None else dist.get_rank(group)
    target = directory / f"step-{step:08d}"
    temporary = directory / f".{target.name}.{_gather(os.getpid(), group)[0]}"

    def begin() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".step-*"):  # of a writer that was killed
            shutil.rmtree(leftover)
        temporary.mkdir()

    def finish() -> None:
        (temporary / "meta.json").write_text(text)
        if write_files:
            write_files(temporary)
        for file in sorted(temporary.iterdir()):
            if file.name not in manifest:
                manifest[file.name] = _fingerprint(file)
                _flush_to_disk(file)
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        _flush_to_disk(temporary / "manifest.json")
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

    try:
        _agree(begin, group, here=rank == 0)
        write_pieces(temporary, boxes, group)
        mine = _agree(lambda: {file.name: _fingerprint(file) for file in temporary.glob(f"__{rank}_*.distcp")}, group)
        manifest = dict(ChainMap(*_gather(mine, group)))
        _agree(finish, group, here=rank == 0)
    except (CheckpointError, OSError) as error:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        stays = f"{kept[-1]} stays as it was" if (kept := _steps(directory)) else "there was none before it"
        raise CheckpointError(f"could not save {target} ({_first_line(error)}); {stays}: "
                              "see that it has room and may be written to, then go on from there") from error
    return target


class Saving:
    """``save`` in a thread, while training goes on: the tensors are copied to the CPU before the constructor returns.

    Args: as ``save``'s. ``group``: None, or a gloo group of these processes that nobody else uses: collectives of two
    threads of a process would meet those of the wrong thread.
    """

    def __init__(self, directory: str | os.PathLike, step: int, tensors: dict[str, dict], *arguments, **keywords):
        from pieces import Pieces, flatten

        copies = {name: Pieces(held.shape, [(at, box.to("cpu", copy=True)) for at, box in held.boxes])
                  for name, held in flatten(tensors).items()}
        thread = ThreadPoolExecutor(1, thread_name_prefix=f"saving step {step}")
        self._future = thread.submit(save, directory, step, copies, *arguments, **keywords)
        thread.shutdown(wait=False)  # it ends when it has saved

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error, which ``wait`` raises."""
        return self._future.done() and self._future.exception() is not None

    def join(self) -> None:
        """Until it has ended, well or not."""
        self._future.exception()

    def wait(self) -> Path:
        """Until it is written; returns its path. Raises what ``save`` raises."""
        return self._future.result()


def _gather(value, group: dist.ProcessGroup | None) -> list:
    """Every rank's value; of no group, this process's."""
    if group is None:
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _agree(do: Callable, group: dist.ProcessGroup | None, here: bool = True):
    """``do()`` where ``here`` holds, its result there; CheckpointError on every rank if it failed on one."""
    result = failure = cause = None
    try:
        result = do() if here else None
    except (OSError, ValueError) as error:
        failure, cause = _first_line(error), error
    failures = [f for f in _gather(failure, group) if f]
    if failures:
        raise CheckpointError(failures[0]) from cause
    return result


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _steps(directory: Path) -> list[Path]:
    """The checkpoints, oldest first; of one step the superseded one before the one that took its place."""
    ours = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+(\.old)?", path.name)]
    return sorted(ours, key=lambda path: (int(path.stem.removeprefix("step-")), path.suffix != ".old"))


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; a kill in the middle must not leave half of one under its name."""
    if checkpoint.exists():
        shutil.rmtree(checkpoint.rename(checkpoint.parent / f".{checkpoint.name}.removed"))


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
    """The newest checkpoint in ``directory``, or that itself if it is one. CheckpointError if there is none."""
    directory = Path(directory)
    if (directory / "manifest.json").exists():
        return directory
    if not _steps(directory):
        what = "holds no checkpoint (step-*)" if directory.is_dir() else "is not a directory"
        raise CheckpointError(f"{directory} {what}: give the directory that a run was told to write to")
    return _steps(directory)[-1]


def load(path: str | os.PathLike, parts: tuple[str, ...] = ("model", "optimizer")) -> dict:
    """Read whole tensors into this process, every file that is needed checked against the manifest first.

    Returns {"meta": dict, part: (nested) dict of CPU tensors, ...}. CheckpointError for what is missing or changed.
    """
    from pieces import flatten, read_pieces, stored, unflatten

    path = Path(path)
    with _refusing(path):
        _check(path, bool(parts))
        meta = json.loads((path / "meta.json").read_text())
        if not parts:
            return {"meta": meta}
        wanted = {name: torch.empty(held.shape, dtype=held.dtype)
                  for name, held in stored(path).items() if name.split("/")[0] in parts}
        read_pieces(path, flatten(wanted))
        return {"meta": meta} | {part: {} for part in parts} | unflatten(wanted)


def shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """What a checkpoint holds: "part/parameter/state" -> shape of the whole. CheckpointError if it cannot be read."""
    from pieces import stored
    with _refusing(Path(path)):
        return {name: held.shape for name, held in stored(path).items()}


def load_into(path: str | os.PathLike, tensors: dict[str, dict], group: dist.ProcessGroup | None = None) -> dict:
    """Read into the boxes that each process holds, in place; returns the checkpoint's meta. Nothing is touched unless
    everything fits on every rank.

    Args:
        tensors: as ``save`` takes them: part -> nested dict of tensors or Pieces. What the checkpoint holds of these
            parts must be what the ranks together ask for.
        group: the processes that load together, all of which call this; each checks a part of the files.

    Raises:
        CheckpointError: on every rank, as ``load``; or for a tensor that is missing, unknown, or of another shape.
    """
    from pieces import flatten, read_pieces

    path, wanted = Path(path), flatten(tensors)
    rank, P = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def check() -> dict[str, tuple[int, ...]]:
        with _refusing(path):
            _check(path, True, rank, P)
        return {name: shape for name, shape in shapes(path).items() if name.split("/")[0] in tensors}

    def read() -> dict:
        with _refusing(path):
            read_pieces(path, wanted)
            return json.loads((path / "meta.json").read_text())

    theirs = _agree(check, group)
    asked = _gather({name: tuple(held.shape) for name, held in wanted.items()}, group)
    _refuse_another_model(dict(ChainMap(*asked)), theirs)
    return _agree(read, group)


def _check(path: Path, tensors: bool, rank: int = 0, P: int = 1) -> None:
    """Compare the files (of tensors, every P-th) with the manifest."""
    manifest = json.loads((path / "manifest.json").read_text())
    pieces = sorted(name for name in manifest if name.endswith(".distcp"))
    others = [name for name in manifest if name not in pieces and (tensors or name != ".metadata")]
    for name in (pieces[rank::P] if tensors else []) + others + ["meta.json"] + [".metadata"] * tensors:
        if name not in manifest or not (path / name).exists():
            raise CheckpointError(_refusal(path, f"{name} is missing"))
        now, then = _fingerprint(path / name), manifest[name]
        if now["bytes"] != then["bytes"]:
            raise CheckpointError(_refusal(path, f"{name} has {now['bytes']} bytes of {then['bytes']}"))
        if now != then:
            raise CheckpointError(_refusal(path, f"{name} is damaged: its SHA-256 is not the manifest's"))


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Whatever json, pickle and torch make of foreign bytes becomes one line that names the checkpoint."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        code = isinstance(error, pickle.UnpicklingError)
        reason = "it holds more than tensors, and reading that could run code" if code else _first_line(error)
        raise CheckpointError(_refusal(path, f"not readable: {reason}")) from error


def _refusal(path: Path, reason: str) -> str:
    others = [step for step in _steps(path.parent) if step != path]
    cure = f"delete it to go on from {others[-1]}" if others else "there is no other one beside it"
    return f"checkpoint {path}: {reason}; {cure}"


def _refuse_another_model(ours: dict[str, tuple], theirs: dict[str, tuple]) -> None:
    """CheckpointError unless the names and shapes are the same."""
    differences = [f"only {'the model' if name in ours else 'the checkpoint'} has {name.split('/', 1)[-1]}"
                   for name in sorted(ours.keys() ^ theirs.keys())]
    differences += [f"{name.split('/', 1)[-1]} is {theirs[name]} in it, {shape} here"
                    for name, shape in ours.items() if shape != theirs.get(name, shape)]
    if differences:
        raise CheckpointError(f"this checkpoint is of another model: {differences[0]}")


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
    return {name: dict(optimizer.state[p]) for p, name in _names(model, optimizer).items() if p in optimizer.state}


def load_states(model: nn.Module, optimizer: torch.optim.Optimizer | None, checkpoint: dict) -> None:
    """Put what ``load`` returned into a model and its optimizer; nothing is touched unless everything fits.

    The optimizer keeps its own learning rate and other settings. It may go on with the checkpoint's own tensors: load
    anew for a second one. CheckpointError if a part or a parameter is missing, unknown, or of another shape.
    """
    parameters = dict(model.named_parameters())
    names = [] if optimizer is None else list(_names(model, optimizer).values())
    for part in ("model",) if optimizer is None else ("model", "optimizer"):
        if part not in checkpoint:
            raise CheckpointError(f"this checkpoint was loaded without its part {part!r}: name it in load's parts")
    theirs, states = checkpoint["model"], checkpoint.get("optimizer", {})
    _refuse_another_model({name: tuple(p.shape) for name, p in parameters.items()},
                          {name: tuple(tensor.shape) for name, tensor in theirs.items()}
                          | dict.fromkeys(states.keys() - parameters.keys(), ()))
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(theirs[name])
    if optimizer is not None:
        # Through torch's own loader, which knows on which device each optimizer wants which state.
        numbered = {i: states[name] for i, name in enumerate(names) if name in states}
        optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def export(directory: str | os.PathLike, to: str | os.PathLike) -> None:
    """Write the model of a checkpoint that train.py made as a Hugging Face directory, with its tokenizer."""
    import models
    import tokenizer

    path = latest(directory)
    saved = load(path, parts=("model",))
    try:
        model = models.build(saved["meta"]["model_type"], saved["meta"]["model_config"])
    except KeyError as error:
        raise CheckpointError(f"{path} does not say what model it is ({error} is missing): train.py's do") from None
    load_states(model, None, saved)
    encoding = tokenizer.load(path / "tokenizer.tiktoken")
    model.save_pretrained(to, eot=tokenizer.eot(encoding))
    tokenizer.save(encoding, Path(to) / "tokenizer.tiktoken")
    tokenizer.save_hugging_face(encoding, to)
    print(f"saved: {to}, {sum(p.numel() for p in model.parameters()):,} parameters of {path}")


# --- 4. demo --------------------------------------------------------------------------------

def _save_for_ever(directory: str, started: Connection) -> None:
    """What the demo kills: a process that saves one checkpoint after another, from the last one on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the demo
    parent, step = os.getppid(), load(latest(directory), parts=())["meta"]["step"]
    while os.getppid() == parent:  # not for ever, if it is the demo that was killed
        step += 1
        w = torch.full((1 << 20,), float(step))
        save(directory, step, {"model": {"weight": w}, "optimizer": {"weight": {"exp_avg": w}}}, {}, keep=2)
        if not started.closed:
            started.send("")  # everything is imported: from now on it is saving that is killed
            started.close()


def main(kills: int, seed: int) -> None:
    if kills < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"--kills must be at least 1 and --seed in 0 .. 2^32 - 1, got {kills} and {seed}")
    generator, whole = torch.Generator().manual_seed(seed), 0
    # A server that has imported torch starts each process in a moment; Windows has none.
    processes = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    processes.set_forkserver_preload(["torch.distributed.checkpoint"])
    with tempfile.TemporaryDirectory() as directory:
        save(directory, 0, {"model": {"weight": torch.zeros(1)}, "optimizer": {}}, {})
        for _ in range(kills):
            here, there = processes.Pipe(duplex=False)
            child = processes.Process(target=_save_for_ever, args=(directory, there), daemon=True)
            child.start()
            there.close()
            try:
                here.recv()
                time.sleep(0.1 * torch.rand((), generator=generator).item())
            finally:  # after Ctrl-C too
                child.kill()
                child.join()
            found = load(latest(directory))
            whole += bool((found["model"]["weight"] == found["meta"]["step"]).all())
        path = latest(directory)
        print(f"killed in the middle of saving {kills} times; the last checkpoint is {path.name}, "
              f"left behind: {[p.name for p in Path(directory).glob('.step-*')]}")
        file = next(path.glob("*.distcp"))
        good, middle = file.read_bytes(), file.stat().st_size // 2
        file.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:])
        try:
            load(path)
            print("one bit flipped, and nobody noticed: WRONG, expected a refusal")
        except CheckpointError as error:
            print(f"one bit flipped: {error}")
    print(f"whole after a kill: {whole} of {kills} (expected {kills} of {kills})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--kills", type=int, default=10,
                        help="times to kill the saving process (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments to kill it at (default %(default)s)")
    parser.add_argument("--export", metavar="DIR", help="write the model of the newest checkpoint here ...")
    parser.add_argument("--to", metavar="DIR", help="... as a Hugging Face directory here")
    arguments = parser.parse_args()
    try:
        if (arguments.export is None) != (arguments.to is None):
            raise ValueError("--export needs --to and the other way round: from where, to where")
        if arguments.export:
            export(arguments.export, arguments.to)
        else:
            main(arguments.kills, arguments.seed)
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
