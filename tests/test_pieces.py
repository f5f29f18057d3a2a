"""Boxes against brute force; what is written against torch.distributed.checkpoint, both ways; files that lie."""

import math
import pickle
import runpy
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import ROOT, run_ranks

import pieces
from pieces import Pieces, flat_boxes, flatten, overlap, pieces_of, read_pieces, stored, write_pieces


def numbers(*shape, dtype=torch.float32):
    return torch.arange(math.prod(shape), dtype=dtype).view(shape)


# --- boxes ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", ((), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (3, 1, 2), (2, 2, 2, 3)), ids=str)
def test_boxes_of_a_range_match_brute_force(shape):
    whole = numbers(*shape, dtype=torch.long)
    for start in range(whole.numel() + 1):
        for stop in range(start, whole.numel() + 1):
            found = []
            for offsets, sizes in flat_boxes(shape, start, stop):
                box = whole
                for dim, (offset, size) in enumerate(zip(offsets, sizes)):
                    box = box.narrow(dim, offset, size)
                found += box.flatten().tolist()
            assert found == list(range(start, stop))


def test_overlap_matches_brute_force():
    cells = [(offsets, sizes) for offsets in ((0, 0), (1, 0), (2, 1), (0, 3)) for sizes in ((1, 1), (2, 2), (3, 1), (0, 2))]

    def inside(offsets, sizes):
        return {(i, j) for i in range(offsets[0], offsets[0] + sizes[0]) for j in range(offsets[1], offsets[1] + sizes[1])}

    for a in cells:
        for b in cells:
            found, expected = overlap(*a, *b), inside(*a) & inside(*b)
            assert (found is None) == (not expected)
            for (offsets, _), slices in zip((a, b), found or ()):
                corner = [offset + part.start for offset, part in zip(offsets, slices)]
                assert inside(corner, [part.stop - part.start for part in slices]) == expected
    assert overlap((), (), (), ()) == ((), ())


def test_a_slices_flat_shard_lies_where_it_belongs_and_padding_is_left_out():
    whole = numbers(5, 3)  # cut over rows 3 .. 5, of which row 5 is padding
    local = torch.cat([whole[3:], torch.full((1, 3), -1.0)])
    flat = local.flatten()[1:8]
    found = pieces_of(flat, 1, (3, 3), (5, 3), 0, 3)
    assert found.shape == (5, 3) and sum(box.numel() for _, box in found.boxes) == 5
    for (i, j), box in found.boxes:
        assert torch.equal(box, whole[i:i + box.size(0), j:j + box.size(1)])
        assert box.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr(), "a view: what is read goes there"


def test_what_is_no_tensor_is_refused_by_name():
    assert set(flatten({"a": {"b": torch.ones(2)}, "c": Pieces((3,), [])})) == {"a/b", "c"}
    with pytest.raises(ValueError, match="holds tensors, a/b is a int"):
        flatten({"a": {"b": 3}})


# --- files ----------------------------------------------------------------------------------------------

def test_any_cut_is_read_as_any_other(tmp_path):
    """Written as flat ranges of three ranks, a replica beside; read as columns, rows, single numbers and the whole."""
    whole = {"w": numbers(7, 5), "b": numbers(4, dtype=torch.bfloat16), "s": torch.tensor(3.0), "none": torch.empty(0, 3)}

    def write(rank):
        mine = {}
        for name, tensor in whole.items():
            start, stop = (tensor.numel() * i // 3 for i in (rank, rank + 1))
            mine[name] = pieces_of(tensor.view(-1)[start:stop], start, tensor.shape, tensor.shape)
        mine |= flatten({"b": whole["b"], "s": whole["s"], "none": whole["none"]})  # what all of them hold
        write_pieces(tmp_path, mine, dist.group.WORLD)

    run_ranks(3, write)
    assert {name: (held.shape, held.dtype) for name, held in stored(tmp_path).items()} == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in whole.items()}
    found = {name: torch.full_like(tensor, -1) for name, tensor in whole.items()}
    read_pieces(tmp_path, flatten(found))
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    for dim in (0, 1):
        boxes = [part.clone().fill_(-1) for part in whole["w"].split(2, dim)]
        places = [((2 * i, 0), (0, 2 * i))[dim] for i in range(len(boxes))]
        read_pieces(tmp_path, {"w": Pieces((7, 5), list(zip(places, boxes)))})
        assert torch.equal(torch.cat(boxes, dim), whole["w"])
    one = torch.zeros(1, 1, dtype=torch.float64)
    read_pieces(tmp_path, {"w": Pieces((7, 5), [((6, 4), one)]), "b": Pieces((4,), [])})
    assert one.item() == 34


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_written_torchs_own_loader_reads(tmp_path):
    whole = numbers(4, 3)
    write_pieces(tmp_path, {"w": Pieces((4, 3), [((0, 0), whole[:1]), ((1, 0), whole[1:])])} | flatten({"s": torch.tensor(2.0)}))
    found = {"w": torch.zeros(4, 3), "s": torch.zeros(())}
    dcp.load(found, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(found["w"], whole) and found["s"] == 2


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_torchs_own_saver_writes_is_read(tmp_path):
    state = {"w": numbers(4, 3), "s": torch.tensor(2.0), "nested": {"half": torch.ones(5, dtype=torch.bfloat16)}}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    found = {name: torch.zeros(held.shape, dtype=held.dtype) for name, held in stored(tmp_path).items()}
    read_pieces(tmp_path, flatten(found))
    assert torch.equal(found["w"], state["w"]) and found["s"] == 2 and torch.equal(found["nested.half"], torch.ones(5).bfloat16())


def test_reading_needs_no_torch_distributed_checkpoint(tmp_path, monkeypatch):
    """Importing it costs a second."""
    write_pieces(tmp_path, flatten({"w": numbers(3)}))
    monkeypatch.setitem(sys.modules, "torch.distributed.checkpoint", None)  # an import of it raises now
    found = torch.zeros(3)
    read_pieces(tmp_path, flatten({"w": found}))
    assert torch.equal(found, numbers(3))


def test_what_is_not_there_is_refused(tmp_path):
    write_pieces(tmp_path, {"w": Pieces((4, 3), [((0, 0), torch.ones(3, 3))])})
    read_pieces(tmp_path, {"w": Pieces((4, 3), [((1, 0), torch.zeros(2, 3))])})
    with pytest.raises(ValueError, match="w is not there in full: 3 numbers are missing"):
        read_pieces(tmp_path, flatten({"w": torch.zeros(4, 3)}))
    for wanted in ({"w": torch.zeros(3, 4)}, {"v": torch.zeros(4, 3)}):
        with pytest.raises(ValueError, match="^want [vw] of shape .*, got "):
            read_pieces(tmp_path, flatten(wanted))


def test_a_process_that_cannot_write_is_an_error_on_every_one(tmp_path):
    class Full(torch.Tensor):
        def detach(self):
            raise OSError("no space left\non device")

    def write(rank):
        value = torch.ones(2) if rank == 0 else torch.ones(2).as_subclass(Full)
        with pytest.raises(OSError, match="^no space left$"):
            write_pieces(tmp_path, {f"w{rank}": Pieces((2,), [((0,), value)])}, dist.group.WORLD)

    run_ranks(2, write)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('exploded')",)


def test_files_that_lie_are_refused_and_run_nothing(tmp_path):
    write_pieces(tmp_path, flatten({"w": torch.ones(3)}))
    good, piece = (tmp_path / ".metadata").read_bytes(), tmp_path / "__0_0.distcp"
    for bad in (pickle.dumps(Bomb()), good.replace(b"_get_layout", b"load       ".replace(b" ", b"_"))):
        (tmp_path / ".metadata").write_bytes(bad)
        with pytest.raises(pickle.UnpicklingError):
            stored(tmp_path)
    (tmp_path / ".metadata").write_bytes(good.replace(b"__0_0.distcp", b"../../passwd"))
    with pytest.raises(ValueError, match="../../passwd is not a file beside it"):
        stored(tmp_path)
    (tmp_path / ".metadata").write_bytes(good)
    torch.save(Bomb(), piece)
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        read_pieces(tmp_path, flatten({"w": torch.zeros(3)}))


# --- the program ----------------------------------------------------------------------------------------

def test_demo_ends_on_its_verdict_and_flags_change_it(capsys):
    pieces.main(2, 5, 5)
    lines = capsys.readouterr().out.splitlines()
    assert "over 2 processes" in lines[0] and len(lines) == 7 and lines[-1] == "all 5 slices are what was written: True (expected True)"


@pytest.mark.parametrize("flags", (["--writers", "0"], ["--readers", "11"], ["--size", "x"]))
def test_bad_flags_are_one_line(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pieces.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "pieces.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("pieces.py: ") and flags[0] in error and error.count("\n") == 1
