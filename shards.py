"""Shards: documents as token ids on the disk, mapped instead of read, written whole or not at all.

Idea      A corpus of tokens may be larger than memory. So its file is mapped: the system reads those pages that are
          looked at, and all processes of a machine share one copy. A wrong token would be learned without a word, so
          a checksum tells a damaged file. A half-written one never stands under the name: it is written beside,
          forced to disk and only then renamed, which happens or does not. What is held out is decided by a document's
          text, not by its place: more text, another order or a copy elsewhere moves none to the other side.
Formula   file        = header | tokens | zeros up to a multiple of 8 | ends
          document i  = tokens[ends[i - 1] : ends[i]], the first from 0
          header      = magic, documents, tokens, vocab_size, bytes per token, BLAKE2b(all behind the header);
                        BLAKE2b(these 48 bytes)
          validation  <=>  document_hash(text) < held_out
Shapes    documents (n_d,) -> one line of tokens (N,) uint16 or uint32 and ends (documents,) uint64 on the disk
Omits     compression; several files as one; names of documents: only their order is kept. Contexts: packing.py.
Run       python shards.py      split, killed and damaged files, 4 s; ends with "refused by name: 272 of 272: OK"
Test      pytest tests/test_shards.py
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np


class ShardError(ValueError):
    """A file of tokens that cannot be used. One line: the file, what is wrong, what to do."""


# --- 1. tokens on the disk --------------------------------------------------------------------

# magic and version, documents, tokens, vocab_size, bytes per token, BLAKE2b of all behind the header; then
# BLAKE2b of these 48 bytes. Behind it the tokens, zeros up to a multiple of 8, and where each document ends.
HEADER, MAGIC, HEADER_BYTES = struct.Struct("<8sQQII16s"), b"TOKENS\x00\x01", 64


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


@contextlib.contextmanager
def _writing(path: str | os.PathLike) -> Iterator[None]:
    """What the system says of a file, as a ShardError that names ``path``."""
    try:
        yield
    except OSError as error:
        raise ShardError(f"{path}: cannot be written ({error.strerror}): check the folder, its permissions and the "
                         "room on the disk") from None


def _rename(beside: str | os.PathLike, path: str | os.PathLike) -> None:
    """Give it its name, and return when that, too, is on the disk."""
    os.replace(beside, path)
    with contextlib.suppress(OSError):  # not every system opens a folder
        descriptor = os.open(Path(path).parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class ShardWriter:
    """Documents into one file, one at a time; 8 bytes per document are held in memory.

        with ShardWriter("a.tokens", vocab_size) as shard:
            shard.add(tokens)

    The file appears under its name when the block ends, whole and on the disk; if the block raises, not at all.
    A kill leaves the name as it was (and maybe a *.tmp). Raises ValueError for tokens that are no integers of
    [0, vocab_size) or none; ShardError for a path that cannot be written or a shard without documents.
    """

    def __init__(self, path: str | os.PathLike, vocab_size: int):
        if not 1 <= vocab_size < 2**32:
            raise ValueError(f"vocab_size must be in 1 .. 2^32 - 1, got {vocab_size}")
        self.path, self.vocab_size, self.ends, self.n_tokens = os.fsdecode(path), vocab_size, array("Q"), 0
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._beside, self._hash = f"{self.path}.{uuid.uuid4().hex}.tmp", hashlib.blake2b(digest_size=16)

    def __enter__(self) -> "ShardWriter":
        with _writing(self.path):
            self._file = open(self._beside, "wb")
            self._file.write(bytes(HEADER_BYTES))
        return self

    def add(self, document: Sequence[int] | np.ndarray) -> None:
        """One document, (n,) tokens with n >= 1; its end-of-text token, if it has one, is among them."""
        tokens = np.asarray(document)
        if tokens.ndim != 1 or not tokens.size or tokens.dtype.kind not in "iu":
            raise ValueError(f"a document must be integers of shape (n,), n >= 1, got {tokens.dtype} {tokens.shape}")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(f"token ids {tokens.min()} .. {tokens.max()} are not all in the vocabulary, "
                             f"0 .. {self.vocab_size - 1}")
        self.n_tokens += len(tokens)
        self.ends.append(self.n_tokens)
        self._write(tokens.astype(self.dtype))

    def _write(self, data: bytes | np.ndarray) -> None:
        self._hash.update(data)
        with _writing(self.path):
            self._file.write(data)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            if kind is None:
                if not self.ends:
                    raise ShardError(f"{self.path}: no documents to write: give at least one")
                self._write(bytes(-self.n_tokens * self.dtype.itemsize % 8))
                self._write(np.frombuffer(self.ends, dtype=np.uint64).astype("<u8", copy=False))
                header = HEADER.pack(MAGIC, len(self.ends), self.n_tokens, self.vocab_size, self.dtype.itemsize,
                                     self._hash.digest())
                with _writing(self.path):
                    self._file.seek(0)
                    self._file.write(header + _digest(header))
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._file.close()
                    _rename(self._beside, self.path)
        finally:
            with contextlib.suppress(OSError):  # a full disk, which is said already, fails once more
                self._file.close()
            Path(self._beside).unlink(missing_ok=True)


def write_shard(path: str | os.PathLike, documents: Iterable[Sequence[int]], vocab_size: int) -> "TokenShard":
    """All documents (tokens each) into one file, whole or not at all, as ShardWriter; opened again."""
    with ShardWriter(path, vocab_size) as shard:
        for document in documents:
            shard.add(document)
    return open_shard(path, verify=False)


class TokenShard(Sequence):
    """The documents of one file: ``shard[i]`` is document i, (n_i,) tokens of the map, nothing copied.

    ``tokens`` (N,) is the line of all, ``lengths`` (documents,) int64, ``vocab_size`` what they are below. Given to
    another process, as a DataLoader does, it is mapped there again and not copied.
    """

    def __init__(self, path: str, tokens: np.ndarray, ends: np.ndarray, vocab_size: int):
        self.path, self.tokens, self.ends, self.vocab_size = path, tokens, ends, vocab_size

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends.astype(np.int64), prepend=0)

    def __len__(self) -> int:
        return len(self.ends)

    def __reduce__(self) -> tuple:
        return open_shard, (os.path.abspath(self.path), False)

    def __getitem__(self, i: int) -> np.ndarray:
        i = range(len(self))[i]
        return self.tokens[int(self.ends[i - 1]) if i else 0:int(self.ends[i])]


def open_shard(path: str | os.PathLike, verify: bool = True) -> TokenShard:
    """The documents of a file that ShardWriter wrote, mapped. ``verify`` reads it once (about 1 GB/s, in small
    blocks) and compares the checksum; without it, only the header's checksum and the file's length are.
    Raises ShardError, which names the file: missing, foreign, cut short, or a checksum that fails."""
    path = os.fsdecode(path)
    try:
        with open(path, "rb") as file:
            head, size = file.read(HEADER_BYTES), os.fstat(file.fileno()).st_size
            if head[:len(MAGIC)] != MAGIC:
                raise ShardError(f"{path}: begins with {head[:8]!r}, not {MAGIC!r}: no file of tokens: write it with "
                                 "write_shard")
            if len(head) < HEADER_BYTES or _digest(head[:HEADER.size]) != head[HEADER.size:]:
                raise ShardError(f"{path}: the checksum of the header fails: damaged: copy or write the file again")
            _, n_documents, n_tokens, vocab_size, itemsize, digest = HEADER.unpack(head[:HEADER.size])
            padded = -(-n_tokens * itemsize // 8) * 8
            if size != (expected := HEADER_BYTES + padded + 8 * n_documents):
                raise ShardError(f"{path}: has {size:,} bytes, its header says {expected:,}: cut short or grown: copy "
                                 "or write the file again")
            if verify:
                found = hashlib.blake2b(digest_size=16)
                while block := file.read(2**20):
                    found.update(block)
                if found.digest() != digest:
                    raise ShardError(f"{path}: the checksum of the tokens fails: damaged: copy or write the file again")
            # This file and not what may bear its name by now.
            whole = np.memmap(file, dtype=np.uint8, mode="r")
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    tokens = whole[HEADER_BYTES:HEADER_BYTES + n_tokens * itemsize].view(f"<u{itemsize}")
    # A plain view of the map: its slices are cheaper.
    return TokenShard(path, np.asarray(tokens), np.asarray(whole[HEADER_BYTES + padded:].view("<u8")), vocab_size)


# --- 2. training and validation ---------------------------------------------------------------

def document_hash(document: str) -> float:
    """A number in [0, 1) that depends on the document's text alone: the same in every run and process."""
    digest = hashlib.blake2b(document.encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48  # 48 bits fit a float's 53: never rounded up to 1


def write_split(folder: str | os.PathLike, documents: Iterable[str], encode: Callable[[str], Sequence[int]], eot: int,
                vocab_size: int, held_out: float = 0.05) -> tuple[TokenShard, TokenShard]:
    """(train, validation): encode(document) + [eot] of each document, in the order they come, one at a time in
    memory, into ``folder``/train.tokens and validation.tokens. A document whose hash is below held_out is held
    out: wherever it stands and however often, it is on one side only. The folder appears whole or not at all.

    Raises ValueError for held_out outside (0, 1), and as ShardWriter; ShardError if the folder is there already,
    or if a side would stay empty (data.split_documents has a rule for few documents).
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be in (0, 1), got {held_out}")
    folder = Path(folder)
    if folder.exists():
        raise ShardError(f"{folder}: is there already: remove it or name another")
    beside = Path(f"{folder}.{uuid.uuid4().hex}.tmp")
    names = ("train.tokens", "validation.tokens")
    try:
        with _writing(folder):
            beside.mkdir()
        with ShardWriter(beside / names[0], vocab_size) as train, ShardWriter(beside / names[1], vocab_size) as rest:
            for document in documents:
                side = rest if document_hash(document) < held_out else train
                tokens = encode(document)
                side.add(np.concatenate((tokens, [eot])) if len(tokens) else [eot])
            if not train.ends or not rest.ends:
                raise ShardError(f"{folder}: {len(train.ends)} documents to train on, {len(rest.ends)} held out with "
                                 f"held_out {held_out}: give more documents or another held_out")
        with _writing(folder):
            _rename(beside, folder)
    except ShardError as error:  # the reader knows the folder by its name
        raise ShardError(str(error).replace(str(beside), str(folder))) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return open_shard(folder / names[0], verify=False), open_shard(folder / names[1], verify=False)


# --- 3. demo ----------------------------------------------------------------------------------

# In a process of its own, which the demo kills: one file after another under the same name, each of one token only.
_WRITE_FOR_EVER = """
import itertools, signal, sys
import numpy, shards
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the demo
for token in itertools.count():
    shards.write_shard(sys.argv[1], [numpy.full(2**17, token % 2**16)] * 4, 2**16)
    print(flush=True)  # fails when the demo is gone
"""


def _why_refused(path: Path) -> str:
    """What ``open_shard`` says of a file; "" for one that it opens."""
    try:
        open_shard(path)
    except ShardError as error:
        return str(error)
    return ""


def main(held_out: float, kills: int) -> None:
    from data import default_documents
    if kills < 1:
        raise ValueError(f"--kills must be at least 1, got {kills}")
    documents, eot = list(default_documents()), 256  # the bytes are tokens 0 to 255: the demo needs no tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        def split(name: str, texts: Iterable[str]) -> tuple[list[bytes], list[bytes], TokenShard]:
            sides = write_split(Path(scratch, name), texts, lambda text: np.frombuffer(text.encode(), dtype=np.uint8),
                                eot, eot + 1, held_out)
            train, validation = ([document[:-1].astype(np.uint8).tobytes() for document in side] for side in sides)
            return train, validation, sides[0]

        train, validation, shard = split("forwards", documents)
        size = os.path.getsize(shard.path)
        print(f"train.tokens: {len(shard):,} documents, {len(shard.tokens):,} tokens, {size:,} bytes, "
              f"{size / len(shard.tokens):.3f} a token (expected a little over {shard.tokens.itemsize})")
        print(f"held out: {len(validation):,} of {len(documents):,} documents, {len(validation) / len(documents):.1%} "
              f"(expected about {held_out:.1%})")
        back = sorted(train + validation) == sorted(text.encode() for text in documents)
        backwards = [side[::-1] for side in split("backwards", reversed(documents))[:2]]
        stays = backwards == [train, validation] and not set(train) & set(validation)
        print(f"every document comes back: {back}; on the same side whatever the order, and on one only: {stays} "
              "(expected True)")

        path, whole = Path(scratch, "killed.tokens"), 0
        for k in range(kills):
            child = subprocess.Popen([sys.executable, "-c", _WRITE_FOR_EVER, path], stdout=subprocess.PIPE,
                                     cwd=Path(__file__).parent)
            try:
                writes = bool(child.stdout.readline())  # one file is there: from now on it is replacing it
                time.sleep(0.02 * (k + 1) / kills)
            finally:  # after Ctrl-C too
                child.kill()
                child.communicate()
            whole += writes and not _why_refused(path) and int(np.ptp(open_shard(path).tokens)) == 0
        print(f"killed while it replaced a file, {kills} times: half-written files left beside it: "
              f"{len(list(Path(scratch).glob('killed.tokens.*.tmp')))}")

        path = Path(scratch, "damaged.tokens")
        write_shard(path, [range(20), range(5)], eot + 1)
        good = path.read_bytes()
        flipped = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1:] for i in range(len(good))]
        cut = [good[:n] for n in range(len(good))]
        reasons = []
        for content in flipped + cut:
            path.write_bytes(content)
            reasons.append(_why_refused(path))
        print(f"one bit flipped in each of {len(flipped)} bytes, such as the last: {reasons[len(flipped) - 1]}\n"
              f"cut to each of {len(cut)} lengths, such as the longest: {reasons[-1]}")
        refused = sum(reason.startswith(f"{path}: ") for reason in reasons)
        right = back and stays and whole == kills and refused == len(reasons)
        print(f"whole after a kill: {whole} of {kills}; damaged and refused by name: {refused} of {len(reasons)}: "
              + ("OK" if right else "WRONG, expected all, and True above"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--held_out", type=float, default=0.05, help="share held out (default %(default)s)")
    parser.add_argument("--kills", type=int, default=5, help="times to kill the writing process (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
