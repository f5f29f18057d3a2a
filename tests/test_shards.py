"""Files of tokens: every document comes back, damage and a kill are noticed; the split is by text alone."""

import hashlib
import os
import pickle
import re
import runpy
import signal
import stat
import sys
import warnings

import numpy as np
import pytest
from conftest import ROOT

import data
import shards
from shards import ShardError, ShardWriter, document_hash, open_shard, write_shard, write_split


def random_documents(seed=0, n=50, vocab=300, longest=40):
    rng = np.random.RandomState(seed)
    return [rng.randint(0, vocab, size=rng.randint(1, longest)) for _ in range(n)]


# --- files --------------------------------------------------------------------------------------

@pytest.mark.parametrize("vocab, dtype", [(300, "<u2"), (2**16, "<u2"), (2**16 + 1, "<u4"), (2**31, "<u4")])
def test_shard_gives_back_every_document(tmp_path, vocab, dtype):
    for n in (1, 2, 3, 50):  # token bytes that do and do not fill a multiple of 8
        documents = random_documents(n=n, vocab=min(vocab, 2**31 - 1))
        shard = write_shard(tmp_path / "a.tokens", documents, vocab)
        again = open_shard(tmp_path / "a.tokens")
        assert shard.tokens.dtype == dtype and again.vocab_size == vocab and len(again) == n
        assert again.lengths.tolist() == [len(d) for d in documents]
        for i in [*range(n), -1]:
            np.testing.assert_array_equal(again[i], documents[i])
        with pytest.raises(IndexError):
            again[n]
    assert os.listdir(tmp_path) == ["a.tokens"]


def test_shard_is_mapped_and_not_read(tmp_path):
    """A sparse file of 64 GB of tokens, more than memory: one document in its middle is read alone."""
    n = 2**35
    ends = np.array([n // 2, n // 2 + 3, n], dtype="<u8").tobytes()
    head = shards.HEADER.pack(shards.MAGIC, 3, n, 300, 2, bytes(16))
    with open(tmp_path / "big.tokens", "wb") as file:
        file.write(head + hashlib.blake2b(head, digest_size=16).digest())
        file.seek(64 + n)  # token n // 2 of two bytes
        file.write(np.array([7, 8, 9], dtype="<u2").tobytes())
        file.seek(64 + 2 * n)
        file.write(ends)
    shard = open_shard(tmp_path / "big.tokens", verify=False)
    assert shard[1].tolist() == [7, 8, 9] and len(shard[2]) == n // 2 - 3


def test_shard_with_any_flipped_bit_or_cut_anywhere_is_refused_by_name(tmp_path):
    path = tmp_path / "a.tokens"
    write_shard(path, [[1, 2, 3], [4, 5]], 300)
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ShardError, match=f"^{path}: .*(checksum|no file of tokens)"):
            open_shard(path)
    for n in range(len(content)):
        path.write_bytes(content[:n])
        with pytest.raises(ShardError, match=f"^{path}: .*(checksum of the header|no file of tokens|cut short)"):
            open_shard(path, verify=False)


def test_what_is_mapped_is_the_file_that_was_checked(tmp_path, monkeypatch):
    """Though another takes its name in between."""
    write_shard(tmp_path / "a.tokens", [[1] * 10], 300)

    def late(*arguments, real=np.memmap, **options):
        monkeypatch.setattr(np, "memmap", real)
        write_shard(tmp_path / "a.tokens", [[2] * 20], 300)
        return real(*arguments, **options)

    monkeypatch.setattr(np, "memmap", late)
    assert [document.tolist() for document in open_shard(tmp_path / "a.tokens")] == [[1] * 10]
    assert [document.tolist() for document in open_shard(tmp_path / "a.tokens")] == [[2] * 20]


def test_shard_goes_to_another_process_without_its_tokens(tmp_path):
    shard = write_shard(tmp_path / "a.tokens", [[7] * 10_000, [8]], 300)
    sent = pickle.dumps(shard)
    assert len(sent) < 1000 and [d.tolist() for d in pickle.loads(sent)] == [[7] * 10_000, [8]]


def test_file_and_then_its_name_are_forced_to_disk(tmp_path, monkeypatch):
    forced = []

    def fsync(descriptor):
        forced.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), (tmp_path / "a.tokens").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_shard(tmp_path / "a.tokens", [[1]], 300)
    assert forced == [(False, False), (True, True)]


def test_shard_that_is_missing_short_or_foreign_is_refused_by_name(tmp_path):
    path = tmp_path / "a.tokens"
    reasons = "No such file", "no file of tokens", "no file of tokens", "header fails", "cut short", "cut short"
    for expected in reasons:
        with pytest.raises(ShardError, match=f"^{path}: .*{expected}"):
            open_shard(path, verify=False)
        if not path.exists():
            path.write_bytes(b"")
        elif not path.stat().st_size:
            path.write_text("hello " * 50)
        elif path.read_bytes()[:5] == b"hello":
            write_shard(path, [[1, 2, 3]], 300)
            whole = path.read_bytes()
            path.write_bytes(whole[:50])
        elif path.stat().st_size == 50:
            path.write_bytes(whole[:-1])
        else:
            path.write_bytes(whole + b"x")


@pytest.mark.parametrize("document, message", [
    ([300], r"300 \.\. 300 are not all in the vocabulary, 0 \.\. 299"), ([-1, 2], r"-1 \.\. 2 are not"),
    ([], r"n >= 1, got .* \(0,\)"), ([[1]], r"\(1, 1\)"), ([0.5], "float64")])
def test_documents_that_are_no_tokens_leave_the_old_file(tmp_path, document, message):
    write_shard(tmp_path / "a.tokens", [[1]], 300)
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "a.tokens", [[1, 2], document], 300)
    assert open_shard(tmp_path / "a.tokens")[0].tolist() == [1] and os.listdir(tmp_path) == ["a.tokens"]


def test_writer_refuses_bad_arguments_by_name(tmp_path):
    with pytest.raises(ShardError, match="no documents"):
        write_shard(tmp_path / "a.tokens", [], 300)
    with pytest.raises(ShardError, match="nowhere/a.tokens: cannot be written"):
        write_shard(tmp_path / "nowhere" / "a.tokens", [[1]], 300)
    with pytest.raises(ValueError, match="vocab_size must be"):
        ShardWriter(tmp_path / "a.tokens", 0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ShardError, match="folder: cannot be written"):
        write_shard(tmp_path / "folder", [[1]], 300)
    assert os.listdir(tmp_path) == ["folder"]


def test_writer_on_a_full_disk_says_so_in_one_line(tmp_path):
    writer = ShardWriter(tmp_path / "a.tokens", 300)
    writer._beside = tmp_path / "beside"
    writer._beside.symlink_to("/dev/full")
    with pytest.raises(ShardError, match="a.tokens: cannot be written .No space left"), writer:
        for _ in range(2000):
            writer.add(range(100))
    assert os.listdir(tmp_path) == []


def test_writer_holds_eight_bytes_per_document(tmp_path):
    with ShardWriter(tmp_path / "a.tokens", 300) as writer:
        for _ in range(1000):
            writer.add([1])
    assert sys.getsizeof(writer.ends) < 8 * 1000 * 9 / 8 + 200  # as it grows, an eighth is room for more


def test_writer_killed_in_the_middle_leaves_the_old_file(tmp_path):
    write_shard(tmp_path / "a.tokens", [[1]], 300)

    def documents():
        yield from [[1, 2, 3]] * 10_000
        os.kill(os.getpid(), signal.SIGKILL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of torch, which the child does not need
        child = os.fork()
    if child == 0:
        try:
            write_shard(tmp_path / "a.tokens", documents(), 300)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert open_shard(tmp_path / "a.tokens")[0].tolist() == [1] and len(os.listdir(tmp_path)) == 2


# --- training and validation --------------------------------------------------------------------

def test_split_matches_data_split_documents_and_is_disjoint(tmp_path):
    documents = [f"document {i % 80}" for i in range(100)]  # 20 of them twice
    train, validation = write_split(tmp_path / "out", documents, lambda text: list(text.encode()), 256, 257, 0.2)
    texts = [[bytes(map(int, d[:-1])).decode() for d in side] for side in (train, validation)]
    assert texts == list(data.split_documents(documents, 0.2))
    assert not {*texts[0]} & {*texts[1]} and len(texts[0]) + len(texts[1]) == 100
    assert all(d[-1] == 256 for side in (train, validation) for d in side)
    assert sorted(os.listdir(tmp_path / "out")) == ["train.tokens", "validation.tokens"]
    assert document_hash("x") == data.document_hash("x")


def test_split_is_whole_or_not_there(tmp_path):
    def failing():
        yield from map(str, range(50))
        raise RuntimeError("the source broke")

    def encode(text):
        return list(text.encode())

    with pytest.raises(RuntimeError, match="broke"):
        write_split(tmp_path / "out", failing(), encode, 256, 257)
    with pytest.raises(ShardError, match="out: 1 documents to train on, 0 held out"):
        write_split(tmp_path / "out", ["lonely"], encode, 256, 257, 1e-9)
    with pytest.raises(ValueError, match=r"held_out must be in \(0, 1\)"):
        write_split(tmp_path / "out", ["a"], encode, 256, 257, 1.0)
    with pytest.raises(ShardError, match="no/out: cannot be written"):
        write_split(tmp_path / "no" / "out", ["a"], encode, 256, 257)
    with pytest.raises(ValueError, match="float64"):
        write_split(tmp_path / "out", ["a"], lambda text: [0.5, 1.5], 256, 257)
    with pytest.raises(FileNotFoundError, match="no_such_source"):  # no fault of the folder
        write_split(tmp_path / "out", (open(name) for name in ["no_such_source"]), encode, 256, 257)
    assert os.listdir(tmp_path) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(ShardError, match="out: is there already"):
        write_split(tmp_path / "out", ["a"], encode, 256, 257)


def test_split_of_empty_texts_is_their_end_of_text(tmp_path):
    sides = write_split(tmp_path / "out", ["", *map(str, range(20))], lambda text: list(text.encode()), 256, 257, 0.5)
    assert [256] in [document.tolist() for side in sides for document in side]


def test_split_on_a_full_disk_names_the_folder(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ShardError, match=rf"^{tmp_path}/out/\w+.tokens: cannot be written \(No space left on device\)"):
        write_split(tmp_path / "out", map(str, range(50)), lambda text: list(text.encode()), 256, 257, 0.5)
    assert os.listdir(tmp_path) == []


# --- the program --------------------------------------------------------------------------------

def test_flags_change_what_is_done(monkeypatch, capsys):
    def run(*flags):
        monkeypatch.setattr("sys.argv", ["shards.py", *map(str, flags)])
        monkeypatch.setattr(data, "default_documents", lambda: [f"text number {i} " * (i + 1) for i in range(40)])
        try:
            runpy.run_path(str(ROOT / "shards.py"), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    for flags, message in ((("--kills", 0), "--kills must be"), (("--held_out", 1), "held_out must be"),
                           (("--held_out", 1e-12), "0 held out")):
        status, printed, error = run(*flags)
        assert (status, printed) == (2, "") and re.fullmatch(rf"shards\.py: .*{message}.*\n", error)
    found = [run("--kills", kills, "--held_out", held_out) for kills, held_out in ((1, 0.3), (2, 0.6))]
    for (status, printed, error), kills, share in zip(found, (1, 2), ("30", "60")):
        assert status == 0 and f"(expected about {share}.0%)" in printed, error
        assert "comes back: True" in printed and "on one only: True" in printed
        assert re.search(rf"whole after a kill: {kills} of {kills}; .*by name: (\d+) of \1: OK\n$", printed), printed
    assert len({re.search(r"held out: (\d+)", printed)[1] for _, printed, _ in found}) == 2


def test_verdict_is_wrong_when_damage_is_not_noticed(monkeypatch, capsys):
    """With a reader that leaves out the checksum of the tokens."""
    monkeypatch.setattr(data, "default_documents", lambda: [f"text number {i}" for i in range(40)])
    monkeypatch.setattr(shards, "open_shard", lambda path, verify=True, real=open_shard: real(path, verify=False))
    shards.main(held_out=0.3, kills=1)
    assert re.search(r"refused by name: (\d+) of (?!\1\b)\d+: WRONG, expected all, and True above\n$", capsys.readouterr().out)
