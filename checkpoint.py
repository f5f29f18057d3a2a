"""Checkpoints that survive a crash: whole or not there, checked before use, tied to no layout.

Idea      A checkpoint is a directory. It is written under a temporary name, forced to disk, and only then
          renamed: on every POSIX file system a rename happens or does not, so a kill, a crash or a full disk
          at any moment leaves the last checkpoint as it was. A manifest with the length and SHA-256 of every
          file is what a reader trusts, so a truncated file or one flipped bit is refused by name.
          Every process writes what it holds: boxes of tensors, under the tensor's full name and its place in the
          whole (torch.distributed.checkpoint). Which processes held which box is not kept, so any other number of
          processes, cut in any other way, can read it: each asks for the boxes that it needs.
Shapes    out/step-00000200/ __0_0.distcp ... boxes of tensors, a file from each process
                             .metadata        tensor name -> shape, and where its boxes are
                             meta.json        step, configs, whatever the run wants to know of itself
                             ...              files of the caller's (the tokenizer)
                             manifest.json    file -> length and SHA-256, written last
          Tensors: "model/<parameter>" and "optimizer/<parameter>/<state>", e.g. optimizer/blocks.0.norm1.weight/exp_avg
Safety    Tensors and shapes are all that is read: opening a foreign checkpoint runs no code.
Omits     file systems that the processes do not share; compression.
Run       python checkpoint.py                                 kills a saving process 10 times, loads what is left
          python checkpoint.py --export out/pretrain --to hf   a Hugging Face directory, whatever layout saved it
Test      pytest tests/test_checkpoint.py
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list


class CheckpointError(ValueError):
    """A checkpoint cannot be written, found, or trusted; the message is one line and names the cure."""


# --- 1. what a process holds of a tensor ------------------------------------------------------

@dataclass
class Pieces:
    """A tensor of ``shape``, of which this process holds boxes: [(offsets in the whole, box)], none, some, or one that
    is the whole."""
    shape: tuple[int, ...]
    boxes: list[tuple[tuple[int, ...], Tensor]]

    def chunks(self) -> list[ChunkStorageMetadata]:
        """The places of the boxes, as torch.distributed.checkpoint writes them."""
        return [ChunkStorageMetadata(torch.Size(offsets), box.shape) for offsets, box in self.boxes]

    def box(self, offsets: tuple[int, ...]) -> Tensor:
        """The box that begins at these offsets."""
        return next(box for first, box in self.boxes if tuple(first) == tuple(offsets))


def _flatten(tensors: dict, prefix: str = "") -> dict[str, Pieces]:
    """Nested dicts of tensors and pieces -> "part/parameter/state" -> pieces."""
    flat = {}
    for name, value in tensors.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, Tensor):
            flat[prefix + name] = Pieces(tuple(value.shape), [((0,) * value.dim(), value.detach())])
        elif isinstance(value, Pieces):
            flat[prefix + name] = value
        else:
            raise ValueError(f"a checkpoint holds tensors, {prefix}{name} is a {type(value).__name__}")
    return flat


class _Save(dcp.DefaultSavePlanner):
    """Writes every box of every Pieces; a box that several processes hold is written by one of them."""

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([
            WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(
                chunk, TensorProperties.create_from_tensor(box), torch.Size(pieces.shape)))
            for name, pieces in self.state_dict.items()
            for chunk, (_, box) in zip(pieces.chunks(), pieces.boxes)])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].box(index.offset)


class _Load(dcp.DefaultLoadPlanner):
    """Reads every box of every Pieces, out of whatever boxes it was saved in."""

    def set_up_planner(self, state_dict: dict, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        entries = self.metadata.state_dict_metadata
        return LoadPlan([item for name, pieces in self.state_dict.items() for item in
                         create_read_items_for_chunk_list(name, entries[name], pieces.chunks())])

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].box(index.offset)


class _Unpickler(pickle.Unpickler):
    """Reads a .metadata file: shapes, dtypes and places. Anything else in it could be code."""

    def find_class(self, module: str, name: str):
        ours = module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        known = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"),
                 ("pathlib", "WindowsPath"), ("pathlib", "PurePosixPath"), ("collections", "OrderedDict")}
        if ours and name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                             "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING", "_StorageInfo") \
                or (module, name) in known or module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *_, **__) -> Metadata:
        return _metadata(Path(self.path))


def _metadata(path: Path) -> Metadata:
    with open(path / ".metadata", "rb") as file:
        return _Unpickler(file).load()


# --- 2. writing -----------------------------------------------------------------------------

def save(directory: str | os.PathLike, step: int, tensors: dict[str, dict], meta: dict,
         write_files: Callable[[Path], None] | None = None, keep: int | None = None,
         group: dist.ProcessGroup | None = None) -> Path:
    """Write ``directory/step-<step>`` atomically, then delete all but the newest ``keep`` checkpoints.

    Args:
        tensors: part name -> (possibly nested) dict of tensors or ``Pieces``.
        meta: what json can hold; ``step`` is added. Of a group, the first rank's is written.
        write_files: called with the temporary directory, to add files of the caller's (no folders); on the first rank.
        keep: how many checkpoints remain, this one included; None keeps all.
        group: the processes that save together, each what it holds, and all call this; None: this one alone.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: on every rank, if it could not be written (a full disk, no permission). What was there stays.
        ValueError: for a negative step, if ``keep`` is less than one, or for what is no tensor.
    """
    if step < 0 or keep is not None and keep < 1:
        raise ValueError(f"a checkpoint needs step >= 0 and keep >= 1 or None, got {step} and {keep}")
    boxes, rank = _flatten(tensors), 0 if group is None else dist.get_rank(group)
    directory = Path(directory)
    target = directory / f"step-{step:08d}"
    temporary = directory / f".{target.name}.{_gather(os.getpid(), group)[0]}"

    def begin() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".step-*"):  # of a writer that was killed
            shutil.rmtree(leftover)
        temporary.mkdir()

    def write() -> dict[str, dict]:
        return {file.name: _fingerprint(file) for file in sorted(temporary.glob(f"__{rank}_*.distcp"))}

    def finish() -> None:
        (temporary / "meta.json").write_text(json.dumps({"step": step} | meta, indent=2) + "\n")
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
        with warnings.catch_warnings():  # that one process saves alone is meant
            warnings.simplefilter("ignore")
            dcp.save(boxes, storage_writer=dcp.FileSystemWriter(temporary), planner=_Save(False, False),
                     process_group=group, no_dist=group is None)
        manifest = {name: print_ for part in _gather(_agree(write, group), group) for name, print_ in part.items()}
        _agree(finish, group, here=rank == 0)
    except (CheckpointError, OSError, dcp.CheckpointException) as error:
        if isinstance(error, dcp.CheckpointException) and any(
                isinstance(cause, KeyboardInterrupt) for cause, _ in error.failures.values()):
            raise KeyboardInterrupt from None
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = _steps(directory)
        stays = f"{kept[-1]} stays as it was" if kept else "there was none before it"
        raise CheckpointError(f"could not save {target} ({_first_line(error)}); {stays}; "
                              "see that it has room and may be written to, then go on from there") from error
    return target


class Saving:
    """``save`` in a thread, while training goes on: the tensors are copied to the CPU before the constructor returns.

    Args:
        group: None, or a gloo group of these processes that nobody else uses: collectives of two threads of a process
            would meet those of the wrong thread.

    Attributes:
        failed: whether it has ended with an error, which ``wait`` raises.
    """

    def __init__(self, directory: str | os.PathLike, step: int, tensors: dict[str, dict], meta: dict,
                 write_files: Callable[[Path], None] | None = None, keep: int | None = None,
                 group: dist.ProcessGroup | None = None):
        copies = {name: Pieces(pieces.shape, [(at, box.to("cpu", copy=True)) for at, box in pieces.boxes])
                  for name, pieces in _flatten(tensors).items()}
        self._error, self._path = None, None

        def run() -> None:
            try:
                self._path = save(directory, step, copies, meta, write_files, keep, group)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name=f"saving step {step}")
        self._thread.start()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def join(self) -> None:
        """Until it has ended, well or not."""
        self._thread.join()

    def wait(self) -> Path:
        """Until it is written; returns its path. Raises what ``save`` raises."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._path


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
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
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


# --- 3. reading -----------------------------------------------------------------------------

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
    """Read whole tensors into this process, every file that is needed checked against the manifest first.

    Returns:
        {"meta": dict, part: (nested) dict of CPU tensors, ...}

    Raises:
        CheckpointError: if a file is missing, cut short, changed, or not of this form.
    """
    path = Path(path)
    with _refusing(path):
        _check(path, bool(parts))
        meta = json.loads((path / "meta.json").read_text())
        if not parts:
            return {"meta": meta}
        wanted = {name: torch.empty(entry.size, dtype=entry.properties.dtype)
                  for name, entry in _metadata(path).state_dict_metadata.items() if name.split("/")[0] in parts}
        _read(path, _flatten(wanted), None)
        loaded = {part: {} for part in parts}
        for name, tensor in wanted.items():
            *folders, last = name.split("/")
            place = loaded
            for folder in folders:
                place = place.setdefault(folder, {})
            place[last] = tensor
        return {"meta": meta} | loaded


def shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """What a checkpoint holds: "part/parameter/state" -> shape of the whole. CheckpointError if it cannot be read."""
    with _refusing(Path(path)):
        return {name: tuple(entry.size) for name, entry in _metadata(Path(path)).state_dict_metadata.items()}


def load_into(path: str | os.PathLike, tensors: dict[str, dict], group: dist.ProcessGroup | None = None) -> dict:
    """Read into the boxes that each process holds, in place; nothing is touched unless everything fits on every rank.

    Args:
        tensors: as ``save`` takes them: part -> nested dict of tensors or Pieces. What the checkpoint holds of these
            parts must be what the ranks together ask for.
        group: the processes that load together, all of which call this; each checks a part of the files.

    Returns:
        the checkpoint's meta
    Raises:
        CheckpointError: on every rank, as ``load``; or for a tensor that is missing, unknown, or of another shape.
    """
    path, wanted = Path(path), _flatten(tensors)
    rank, P = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def check() -> dict[str, tuple[int, ...]]:
        with _refusing(path):
            _check(path, True, rank, P)
        return shapes(path)

    theirs = _agree(check, group)
    asked = {name for names in _gather(sorted(wanted), group) for name in names}

    def fits() -> None:
        held = {name for name in theirs if name.split("/")[0] in tensors}
        for name in sorted(asked ^ held):
            whose = "the model" if name in asked else "the checkpoint"
            raise CheckpointError(f"this checkpoint is of another model: only {whose} has {name.split('/', 1)[1]}")
        for name, pieces in wanted.items():
            if tuple(pieces.shape) != theirs[name]:
                raise CheckpointError(f"this checkpoint is of another model: {name.split('/', 1)[1]} is "
                                      f"{theirs[name]} in it, {tuple(pieces.shape)} here")

    _agree(fits, group)
    with _refusing(path):
        _read(path, wanted, group)
    return json.loads((path / "meta.json").read_text())


def _read(path: Path, wanted: dict[str, Pieces], group: dist.ProcessGroup | None) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        dcp.load(wanted, storage_reader=_Reader(path), planner=_Load(False, False), process_group=group,
                 no_dist=group is None)


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
    except (Exception, dcp.CheckpointException) as error:
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        if isinstance(cause, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        if isinstance(cause, pickle.UnpicklingError):
            reason = "it holds more than tensors, and reading that could run code"
        else:
            reason = f"not readable: {_first_line(cause)}"
        raise CheckpointError(_refusal(path, reason)) from error


def _refusal(path: Path, reason: str) -> str:
    others = [step for step in _steps(path.parent) if step != path]
    cure = f"delete it to go on from {others[-1]}" if others else "there is no other one beside it"
    return f"checkpoint {path}: {reason}; {cure}"


# --- 4. optimizer states under full parameter names -----------------------------------------

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


def export(directory: str | os.PathLike, to: str | os.PathLike) -> None:
    """Write the model of a checkpoint that train.py made as a Hugging Face directory, its tokenizer beside it."""
    import models

    path = latest(directory)
    saved = load(path, parts=("model",))
    try:
        model = models.build(saved["meta"]["model_type"], saved["meta"]["model_config"])
    except KeyError as error:
        raise CheckpointError(f"{path} does not say what model it is ({error} is missing): train.py's do") from None
    load_states(model, None, saved)
    model.save_pretrained(to)
    shutil.copy(path / "tokenizer.tiktoken", to)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{path}, step {saved['meta']['step']}: {parameters:,} parameters, written to {to}")


# --- 5. demo --------------------------------------------------------------------------------

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
        file = next(path.glob("*.distcp"))
        damaged = bytearray(file.read_bytes())
        damaged[len(damaged) // 2] ^= 1
        file.write_bytes(damaged)
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
    parser.add_argument("--export", metavar="DIR", help="write the model of the newest checkpoint here ...")
    parser.add_argument("--to", metavar="DIR", help="... as a Hugging Face directory here")
    parser.add_argument("--save_for_ever", metavar="DIR", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        if (arguments.export is None) != (arguments.to is None):
            raise ValueError("--export needs --to and the other way round: from where, to where")
        if arguments.export:
            export(arguments.export, arguments.to)
        elif arguments.save_for_ever:
            _save_for_ever(arguments.save_for_ever)
        else:
            main(arguments.kills, arguments.seed)
    except ValueError as error:
        print(f"checkpoint.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
