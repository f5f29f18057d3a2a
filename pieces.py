"""Tensors in pieces: each process writes the boxes that it holds, and reads those that it needs, whatever the cut.

Idea      However many processes hold a tensor, what each holds of it are boxes: the rows first .. last - 1, say, or the
          columns. A box with its place in the whole says all that is to be known of it: who held it, beside how many
          others, does not matter any more. So boxes are what is stored, and a reader asks where its own boxes and
          the stored ones overlap. ZeRO's shards are no boxes but ranges of the flat tensor: each is a few of them.
Formula   overlap of two boxes, in each dimension: max(first, first') .. min(last, last')
          elements start .. stop - 1 of a matrix = the end of a row, whole rows, the beginning of a row
Shapes    a box: offsets in the whole (one number a dimension), and a tensor of as many dimensions
          folder/ __0_0.distcp ...   boxes of each process, each as torch.save writes it
                  .metadata          tensor -> shape, dtype, boxes; box -> file, first byte, length
          It is torch.distributed.checkpoint's format, written by that, and readable by it.
Also      reading runs no code that a file could bring: numbers, names and tensors are all that is accepted.
Omits     compression; storage other than files; tensors that are not dense.
Run       python pieces.py                        rows of 3 processes, read as columns of 4
          python pieces.py --writers 7 --readers 2    of 7, as columns of 2
          Ends with "all 4 slices are what was written: True ..."
Test      pytest tests/test_pieces.py
"""

from __future__ import annotations

import argparse
import io
import math
import os
import pickle
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Pieces:
    """A tensor of ``shape``, of which this process holds boxes: [(offsets in the whole, values)], none, some, or one
    that is the whole."""
    shape: tuple[int, ...]
    boxes: list[tuple[tuple[int, ...], Tensor]]


# --- 1. boxes -----------------------------------------------------------------------------------------

def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements start .. stop - 1 of a tensor, in the order of memory, as boxes: (offsets, sizes), in that order.

    A range of a matrix is the end of a row, whole rows, and the beginning of a row; of more dimensions, likewise.
    """
    if start >= stop:
        return
    if len(shape) == 0:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner  # rows that are touched
    whole_first, whole_behind = -(-start // inner), stop // inner  # of them, those that are whole
    if first == last and stop - start < inner:
        for offsets, sizes in flat_boxes(shape[1:], start - first * inner, stop - first * inner):
            yield (first, *offsets), (1, *sizes)
        return
    if first < whole_first:
        for offsets, sizes in flat_boxes(shape[1:], start - first * inner, inner):
            yield (first, *offsets), (1, *sizes)
    if whole_first < whole_behind:
        yield (whole_first, *(0,) * (len(shape) - 1)), (whole_behind - whole_first, *shape[1:])
    if whole_behind <= last:
        for offsets, sizes in flat_boxes(shape[1:], 0, stop - last * inner):
            yield (last, *offsets), (1, *sizes)


def pieces_of(flat: Tensor, start: int, local: tuple[int, ...], shape: tuple[int, ...], dim: int = 0,
              first: int = 0) -> Pieces:
    """Where a flat shard belongs, as ZeRO (flat ranges) and tensor parallelism (slices) cut tensors.

    Args:
        flat: (n,), elements start .. start + n - 1 of a tensor of shape ``local``; views of it are the boxes.
        shape: of the whole, of which ``local`` is a slice: it begins at index ``first`` of dimension ``dim``, and what
            lies behind the end of the whole (a padded vocabulary) is left out.
    """
    boxes, at = [], 0
    for offsets, sizes in flat_boxes(local, start, start + flat.numel()):
        n = math.prod(sizes)
        box = flat.narrow(0, at, n).view(sizes)
        at += n
        if local:
            offsets = (*offsets[:dim], offsets[dim] + first, *offsets[dim + 1:])
            inside = min(sizes[dim], shape[dim] - offsets[dim])
            if inside <= 0:
                continue
            box = box.narrow(dim, 0, inside)
        boxes.append((offsets, box))
    return Pieces(tuple(shape), boxes)


def overlap(first: tuple[int, ...], sizes: tuple[int, ...], second: tuple[int, ...], others: tuple[int, ...],
            ) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where two boxes, of offsets and sizes each, overlap: as slices of the one and of the other; None: nowhere."""
    ranges = [(max(i, j), min(i + n, j + m), i, j) for i, n, j, m in zip(first, sizes, second, others)]
    if any(start >= stop for start, stop, _, _ in ranges):
        return None
    return (tuple(slice(start - i, stop - i) for start, stop, i, _ in ranges),
            tuple(slice(start - j, stop - j) for start, stop, _, j in ranges))


def flatten(tensors: dict, prefix: str = "") -> dict[str, Pieces]:
    """Nested dicts of tensors and pieces -> "part/parameter/state" -> pieces. ValueError for anything else in them."""
    flat = {}
    for name, value in tensors.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, Tensor):
            flat[prefix + name] = Pieces(tuple(value.shape), [((0,) * value.dim(), value.detach())])
        elif isinstance(value, Pieces):
            flat[prefix + name] = value
        else:
            raise ValueError(f"a checkpoint holds tensors, {prefix}{name} is a {type(value).__name__}")
    return flat


def unflatten(flat: dict[str, Tensor]) -> dict:
    """The inverse of ``flatten``: "part/parameter/state" -> nested dicts."""
    nested = {}
    for name, value in flat.items():
        *folders, last = name.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
    return nested


# --- 2. writing -----------------------------------------------------------------------------------------

def write_pieces(folder: str | os.PathLike, tensors: dict[str, Pieces], group: dist.ProcessGroup | None = None) -> None:
    """Write every box of every process; one that several hold is written by one of them. They need not cover a tensor.

    Args:
        group: the processes that write together, all of which call this; None: this one alone.
    Raises:
        OSError: on every process, if one could not write; the message is its first line.
    """
    # It takes a second to import, which those who only read need not wait for.
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import planner
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties

    class BoxPlanner(dcp.DefaultSavePlanner):
        def create_local_plan(self) -> planner.SavePlan:
            self.plan = planner.SavePlan([
                planner.WriteItem(MetadataIndex(name, torch.Size(offsets)), planner.WriteItemType.SHARD,
                                  tensor_data=planner.TensorWriteData(
                                      ChunkStorageMetadata(torch.Size(offsets), box.shape),
                                      TensorProperties.create_from_tensor(box), torch.Size(pieces.shape)))
                for name, pieces in self.state_dict.items() for offsets, box in pieces.boxes])
            return self.plan

        def lookup_object(self, index: MetadataIndex) -> Tensor:
            boxes = self.state_dict[index.fqn].boxes
            return next(box for offsets, box in boxes if tuple(offsets) == tuple(index.offset))

    try:
        with warnings.catch_warnings():  # that one process writes alone is meant
            warnings.simplefilter("ignore")
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), process_group=group, no_dist=group is None,
                     planner=BoxPlanner(flatten_state_dict=False, flatten_sharded_tensors=False))
    except dcp.CheckpointException as error:  # not an Exception: it would pass every `except Exception`
        causes = [cause for cause, _ in error.failures.values()]
        if any(isinstance(cause, KeyboardInterrupt) for cause in causes):
            raise KeyboardInterrupt from None
        raise OSError((str(causes[0]) or repr(causes[0])).splitlines()[0]) from error


# --- 3. reading -----------------------------------------------------------------------------------------

@dataclass
class Stored:
    """A tensor as it lies in a folder: boxes are (offsets, sizes, file, first byte, bytes)."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: list[tuple[tuple[int, ...], tuple[int, ...], str, int, int]]


class _Record:
    """Stands for a class of torch.distributed.checkpoint's: keeps what was pickled, and has no methods to call."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads a .metadata file. Whatever class or function it names that is not known here could be code."""
    records = {"torch.distributed.checkpoint.metadata": (
                   "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex",
                   "StorageMeta", "_MEM_FORMAT_ENCODING"),
               "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
               "torch.serialization": ("_get_layout",),
               "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath")}

    def find_class(self, module: str, name: str):
        if name in self.records.get(module, ()):
            return _Record
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{module}.{name}")


def stored(folder: str | os.PathLike) -> dict[str, Stored]:
    """What a folder holds, from its .metadata alone.

    Raises:
        OSError: if it cannot be read. pickle.UnpicklingError: if it holds what could run code. ValueError: if it names
        a file outside of the folder. Or whatever foreign bytes lead to: KeyError, TypeError, EOFError ...
    """
    with open(os.path.join(folder, ".metadata"), "rb") as file:
        metadata = _Unpickler(file).load().state
    places = {}
    for index, info in metadata["storage_data"].items():
        where = info.state
        if os.path.basename(where["relative_path"]) != where["relative_path"]:
            raise ValueError(f"{where['relative_path']} is not a file beside it")
        places[index.state["fqn"], index.state["offset"]] = (where["relative_path"], where["offset"], where["length"])
    found = {}
    for name, entry in metadata["state_dict_metadata"].items():
        boxes = [chunk.state for chunk in entry.state["chunks"]]
        found[name] = Stored(entry.state["size"], entry.state["properties"].state[0],
                             [(box["offsets"], box["sizes"], *places[name, box["offsets"]]) for box in boxes])
    return found


@torch.no_grad()
def read_pieces(folder: str | os.PathLike, wanted: dict[str, Pieces]) -> None:
    """Fill the boxes, in place, out of whatever boxes were written. No other process is needed.

    Raises:
        as ``stored``; ValueError: for a tensor that is unknown, of another shape, or not there in full.
    """
    held = stored(folder)
    for name, pieces in wanted.items():
        if name not in held or held[name].shape != tuple(pieces.shape):
            raise ValueError(f"want {name} of shape {tuple(pieces.shape)}, got "
                             f"{held[name].shape if name in held else 'none'}")
        missing = sum(box.numel() for _, box in pieces.boxes)
        for offsets, sizes, file, first_byte, length in held[name].boxes:
            common = [(overlap(offsets, sizes, at, tuple(box.shape)), box) for at, box in pieces.boxes]
            if not any(both for both, _ in common):
                continue
            with open(os.path.join(folder, file), "rb") as stream:
                stream.seek(first_byte)
                values = torch.load(io.BytesIO(stream.read(length)), map_location="cpu", weights_only=True)
            if values.shape != sizes:
                raise ValueError(f"want a box of {name} of shape {sizes}, got {tuple(values.shape)}")
            for both, box in common:
                if both:
                    missing -= box[both[1]].copy_(values[both[0]]).numel()
        if missing:
            raise ValueError(f"{name} is not there in full: {missing} numbers are missing")


# --- 4. demo --------------------------------------------------------------------------------------------

def main(writers: int, readers: int, size: int) -> None:
    if min(writers, readers, size) < 1 or max(writers, readers) > size:
        raise ValueError(f"--writers and --readers must be in 1 .. --size, got {writers}, {readers} and {size}")
    whole = torch.arange(size * size, dtype=torch.float32).view(size, size)
    ends = [size * size * i // writers for i in range(writers + 1)]
    boxes = [box for start, stop in zip(ends, ends[1:])
             for box in pieces_of(whole.view(-1)[start:stop], start, (size, size), (size, size)).boxes]
    with tempfile.TemporaryDirectory() as folder:
        write_pieces(folder, {"weight": Pieces((size, size), boxes)})
        print(f"a matrix of {size} x {size}, as ZeRO cuts it over {writers} processes: {len(boxes)} boxes, "
              f"{[box.numel() for _, box in boxes]} numbers")
        equal, cuts = True, [size * i // readers for i in range(readers + 1)]
        for first, last in zip(cuts, cuts[1:]):
            column = torch.full((size, last - first), math.nan)
            read_pieces(folder, {"weight": Pieces((size, size), [((0, first), column)])})
            equal &= torch.equal(column, whole[:, first:last])
            touched = [overlap((0, first), column.shape, at, box.shape) is not None for at, box in boxes]
            print(f"  columns {first} to {last - 1}, as tensor parallelism cuts it: read from {sum(touched)} boxes")
    print(f"all {readers} slices are what was written: {equal} (expected True)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--writers", type=int, default=3,
                        help="processes that wrote, flat ranges (default %(default)s)")
    parser.add_argument("--readers", type=int, default=4,
                        help="processes that read, columns (default %(default)s)")
    parser.add_argument("--size", type=int, default=10,
                        help="rows and columns of the matrix (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
