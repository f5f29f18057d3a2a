"""Data: from files to batches of tokens.   Brown et al. 2020 (2005.14165), appendix B

Idea      Documents are split by a hash of their own text, so that none is on both sides. Their tokens are
          joined into one line, an end-of-text token after each, and the line is cut into windows of one
          context length: no padding, every batch full. Which window comes when depends on the seed and on
          the number of the example alone: ONE integer is the state, whatever the number of processes.
Formula   held out   <=>  hash(document) < held_out,  hash in [0, 1)
          tokens     =    encode(d_0) + [eot] + encode(d_1) + [eot] + ...           N tokens
          window i   =    tokens[i T : i T + T + 1]                                 n = (N - 1) // T windows
          example j  =    window permutation(seed, j // n)[j mod n],  j = 0, 1, 2, ... without end
Shapes    tokens (N,) uint16 or uint32 -> inputs and targets (B, T) int64, targets one token ahead
Omits     the tokenizer (`encode` is handed in); a mask between the documents of a window (as does GPT-3);
          the last (N - 1) mod T tokens; the choice and cleaning of documents (curate.py).
Run       python data.py                        Python's own documentation, under 10 s
          python data.py --data 'my/**/*.txt'   or .md .jsonl .jsonl.gz .warc.wet .warc.wet.gz
          Ends with "every target of the epoch seen exactly once: True ..."
          python data.py 'crawl/*.warc.wet.gz' --out shards/   from a raw crawl to clean shards, by curate.py
          torchrun --standalone --nproc_per_node=2 data.py 'crawl/*.warc.wet.gz' --out shards/   by two processes
Test      pytest tests/test_data.py
"""

import argparse
import ast
import glob
import gzip
import hashlib
import io
import json
import os
import sys
import sysconfig
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class DataError(ValueError):
    """Data that cannot be used. One line: the file, the place in it, what is wrong, what to do."""


# --- 1. the corpus that every machine has ---------------------------------------------------

# Near-copies of one text (encodings), example programs, and packages that only some versions of Python have.
SKIPPED_PACKAGES = {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}


def default_documents() -> list[str]:
    """Python's own documentation, 2 MB: the topics of its help(), then the docstrings of each module of the
    standard library as one document. Copies are dropped; one version of Python gives one text and order.

    Sources are parsed, never imported. What a stripped Python lacks is left out; DataError if it lacks all."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}
    library = Path(sysconfig.get_path("stdlib"))
    documents = [topics[name].strip() for name in sorted(topics)]
    for name in sorted(sys.stdlib_module_names - SKIPPED_PACKAGES):
        for path in (library / f"{name}.py", *sorted((library / name).rglob("*.py"))):
            if path.is_file() and not {"test", "tests"} & set(path.relative_to(library).parts):
                documents.append(_docstrings(path.read_text(encoding="utf-8", errors="replace")))
    if not any(documents):
        raise DataError(f"this Python has no pydoc_data and no sources in {library}: give files of your own")
    return list(dict.fromkeys(filter(None, documents)))


def _docstrings(source: str) -> str:
    """The docstrings of a module in its order, each under its signature, from 40 characters on."""
    lines, paragraphs = source.split("\n"), []  # splitlines would count form feeds as lines, and ast does not

    def visit(node: ast.AST) -> None:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if len(text := ast.get_docstring(node) or "") >= 40:
                if not isinstance(node, ast.Module):
                    signature = lines[node.lineno - 1:max(node.lineno, node.body[0].lineno - 1)]
                    text = " ".join(map(str.strip, signature)) + "\n" + text
                paragraphs.append(text)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.If, ast.Try)):  # not what functions hide inside
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(source))
    return "\n\n".join(paragraphs).strip()


# --- 2. reading -----------------------------------------------------------------------------

Lost = Callable[[str, int], None]  # told one line (file, place, cause, cure) and how many bytes are lost


def find_files(pattern: str | os.PathLike) -> list[str]:
    """The files that a path, a glob or a comma-separated list of them names, sorted, each once. A name that
    exists, such as "[1], 2.txt", is neither a list nor a glob. Raises DataError for a name or glob without
    files, for a folder, for a suffix that is not in READERS."""
    pattern, files = os.fspath(pattern), set()
    for part in [pattern] if os.path.exists(pattern) else map(str.strip, pattern.split(",")):
        if os.path.isdir(part):
            raise DataError(f"{part}: is a folder: name files, such as '{os.path.join(part, '**', '*.txt')}'")
        paths = [part] if os.path.exists(part) else glob.glob(part, recursive=True)
        paths = [path for path in paths if not os.path.isdir(path)]
        if not paths:
            nearest = next(folder for folder in Path(part).absolute().parents if os.path.isdir(folder))
            raise DataError(f"{part or repr(pattern)}: no such file: check the path; the working directory "
                            f"is {os.getcwd()}, the nearest folder that exists {nearest}")
        for path in paths:
            if not path.lower().endswith(tuple(READERS)):
                raise DataError(f"{path}: unknown suffix: give one of {' '.join(READERS)}")
        files.update(paths)
    return sorted(files)


def read_documents(pattern: str | os.PathLike) -> Iterator[str]:
    """The documents of a file, of a glob ('my/*.txt'; ** enters subfolders) or of a comma-separated list of
    them, files in the order of their names, each once. Only .txt and .md files are ever in memory whole.

        .txt .md                 one file = one document; Windows line ends become \\n
        .jsonl .jsonl.gz         one line = one JSON object with the document in "text"
        .warc.wet .warc.wet.gz   Common Crawl's text (WARC, ISO 28500): one conversion record = one document

    Documents of nothing but white space are left out, as is a byte-order mark. Raises DataError: at once as
    find_files does; when reached, for a file that is empty, unreadable, or not what its suffix says."""
    return (document for path in find_files(pattern) for document in read_file(path))


def read_file(path: str, lost: Lost | None = None, longest: int | None = None) -> Iterator[str]:
    """The documents of one file, as read_documents gives them.

    Args:
        lost: called for every damaged or unusable place; reading goes on behind it: at the next line, WARC
            record or gzip member. None: the first such place raises DataError.
        longest: bytes of a text, line or record; a longer one is passed over without being held in memory.
    """
    def note(message: str, n_bytes: int) -> None:
        nonlocal complained
        if lost is None:
            raise DataError(message) from None
        complained = True
        lost(message, n_bytes)

    suffix = next(suffix for suffix in READERS if path.lower().endswith(suffix))
    complained, holds_text, head = False, False, b""
    try:
        with open(path, "rb") as file:
            head = file.peek(2)[:2]
            if suffix.endswith(".gz") and head and head != GZIP_MAGIC[:2]:
                what = f"{path}: not gzip, it begins with {head!r}: rename or fetch it again"
                return note(what, os.path.getsize(path))
            raw = iter(lambda: file.read(2**16), b"")
            pieces = _unzip(path, file, note) if suffix.endswith(".gz") else raw
            for document in READERS[suffix](path, _Bytes(pieces), note, longest):
                if document and not document.isspace():
                    holds_text = True
                    yield document
    except OSError as error:
        note(f"{path}: cannot be read ({error.strerror}): check the path and its permissions", 0)
    if not holds_text and not complained:
        note(f"{path}: {'holds no text' if head else 'is empty'}: fetch it again, or leave it out", 0)


GZIP_MAGIC = b"\x1f\x8b\x08"  # identification and the one method there is (RFC 1952)


def _unzip(path: str, file: io.BufferedIOBase, lost: Lost) -> Iterator[bytes | None]:
    """The content of a gzip file, which may be many members, in pieces; None where damage was passed over."""
    data, place, member, unpack = b"", 0, 0, None  # place: of data in the file; member: where this one began
    damage = "bytes {} to {}: truncated or damaged gzip ({}): fetch it again"
    while data := data or file.read(2**16):
        try:
            if unpack is None:
                member = place = place + len(data) - len(data := data.lstrip(b"\0"))  # padding
                if not data:
                    continue
                unpack = zlib.decompressobj(31)
            piece = unpack.decompress(data, 2**20)  # a limit: 64 kB of zeros may unpack to 64 MB
        except zlib.error as error:
            place, data = (place + 1, data[1:]) if member == place else (place, data)
            while (found := data.find(GZIP_MAGIC)) < 0 and (more := file.read(2**16)):
                place, data = place + len(data) - len(data[-2:]), data[-2:] + more
            found = found if found >= 0 else len(data)
            place, data, unpack = place + found, data[found:], None
            lost(f"{path}, " + damage.format(member, place, error), place - member)
            yield None
            continue
        rest = unpack.unused_data or unpack.unconsumed_tail
        place, data = place + len(data) - len(rest), rest
        unpack = None if unpack.eof else unpack
        if piece:
            yield piece
    if unpack is not None:
        lost(f"{path}, " + damage.format(member, place, "it ends too early"), place - member)
        yield None


class _Bytes:
    """What a reader needs of a file: lines, and blocks that can be looked at before they are taken. A None
    among the pieces ends a segment: nothing is read across it, only `more` goes on behind it."""

    def __init__(self, pieces: Iterator[bytes | None]):
        self.pieces, self.buffer, self.start, self.offset = pieces, bytearray(), 0, 0
        self.segment_ended = self.exhausted = False

    def fill(self) -> bool:
        """One piece more in the buffer; False at the end of the segment."""
        if not self.segment_ended:
            if self.start > 2**16:
                del self.buffer[:self.start]
                self.start = 0
            piece = next(self.pieces, b"")
            self.segment_ended, self.exhausted = not piece, piece == b""
            self.buffer += piece or b""
        return not self.segment_ended

    def more(self) -> bool:
        """Whether anything is left, in this segment or in one behind it."""
        while self.start == len(self.buffer) and not self.fill():
            if self.exhausted:
                return False
            self.segment_ended = False
        return True

    def peek(self, n: int) -> bytes:
        """The next n bytes, fewer at the end of the segment."""
        while len(self.buffer) - self.start < n and self.fill():
            pass
        return bytes(self.buffer[self.start:self.start + n])

    def take(self, n: int) -> bytes:
        """The next n bytes, which are in the buffer; the reader stands behind them."""
        self.start, self.offset = self.start + n, self.offset + n
        return bytes(self.buffer[self.start - n:self.start])

    def line(self, limit: int | None = None) -> bytes:
        """The next line with its end; `limit` bytes of a longer one; what is left at the segment's end."""
        n = 0
        while not (end := self.buffer.find(b"\n", self.start + n) + 1):
            n = len(self.buffer) - self.start
            if limit and n >= limit or not self.fill():
                end = len(self.buffer)
                break
        return self.take(min(end - self.start, limit or end))

    def skip_to(self, marker: bytes) -> None:
        """Go to where the marker begins, or to the end of the segment; memory stays small."""
        while (found := self.buffer.find(marker, self.start)) < 0:
            self.take(max(0, len(self.buffer) - len(marker) + 1 - self.start))
            if not self.fill():
                found = len(self.buffer)
                break
        self.take(found - self.start)


def _decode(data: bytes, where: str) -> str:
    """Text of UTF-8. Raises DataError, beginning with where, that says which byte of data is wrong."""
    if b"\0" in data:
        raise DataError(f"{where}, byte {data.index(0)}: NUL, so binary or UTF-16: give text in UTF-8")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}, byte {error.start}: 0x{data[error.start]:02x} is not UTF-8: convert the "
                        "file, for example with iconv -f LATIN1 -t UTF-8") from None


def _read_text(path: str, file: _Bytes, lost: Lost, longest: int | None) -> Iterator[str]:
    data = file.peek(longest + 1 if longest else sys.maxsize)
    try:
        if longest and len(data) > longest:
            raise DataError(f"{path}: one document of more than {longest:,} bytes: cut it in several files")
        yield _decode(data, path).replace("\r\n", "\n")
    except DataError as error:
        lost(str(error), os.path.getsize(path))


def _read_jsonl(path: str, file: _Bytes, lost: Lost, longest: int | None) -> Iterator[str]:
    number = 0
    while file.more():
        begin, number, line = file.offset, number + 1, file.line(longest and longest + 1)
        where = f"{path}, line {number} (from byte {begin})"
        try:
            if longest and len(line) > longest:
                if not line.endswith(b"\n"):
                    file.skip_to(b"\n")
                raise DataError(f"{where}: longer than {longest:,} bytes: cut it in several documents")
            if not line.strip():
                continue
            text = json.loads(_decode(line, where))["text"]
            text.encode()  # JSON can spell half of a surrogate pair, "\ud800": no text in UTF-8 holds one
            yield text
        except DataError as error:
            lost(str(error), file.offset - begin)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            found = line[:40].decode(errors="replace")
            lost(f'{where}: want a JSON object with a string "text", found {found!r} '
                 f"({type(error).__name__}: {error}): correct or remove the line", file.offset - begin)


def _read_wet(path: str, file: _Bytes, lost: Lost, longest: int | None) -> Iterator[str]:
    # A record: the line WARC/1.0, lines "Name: value", an empty line, Content-Length bytes, two empty lines.
    while file.more():
        begin, headers, taken = file.offset, {}, False
        where = f"{path}, record at byte {begin} of the uncompressed file"
        try:
            if not (first := file.line(2**16)).startswith(b"WARC/"):
                raise DataError(f"{where}: begins with {first[:16]!r}, not WARC/: fetch the file again")
            while line := file.line(2**16).strip():
                name, _, value = line.partition(b":")
                headers[name.lower()] = value.strip()
            length, limit = headers.get(b"content-length", b"missing"), longest or 10**9 - 1
            if not length.isdigit() or len(length) > 9 or int(length) > limit:  # a lie must not fill the memory
                raise DataError(f"{where}: Content-Length is {length[:20]!r}, want 0 .. {limit}: fetch the file again")
            block = file.peek(int(length) + 4)
            # A length that covers whole records would make one page of them.
            if len(block) < int(length) + 4 or block[-4:] != b"\r\n\r\n" or b"\r\n\r\nWARC/1." in block:
                raise DataError(f"{where}: does not end after its Content-Length of {int(length)} bytes, so "
                                "truncated or damaged: fetch the file again")
            file.take(len(block))
            taken = True
            if headers.get(b"warc-type") == b"conversion":
                yield _decode(block[:-4], where)
        except DataError as error:
            if not taken:  # whatever the header says, the next record begins where a line begins with WARC/1.
                file.skip_to(b"\nWARC/1.")
                file.take(min(1, len(file.peek(1))))
            lost(str(error), file.offset - begin)


READERS = {".txt": _read_text, ".md": _read_text, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl,
           ".warc.wet": _read_wet, ".warc.wet.gz": _read_wet}


# --- 3. splitting ---------------------------------------------------------------------------

def document_hash(document: str) -> float:
    """A number in [0, 1) that depends on the document's text alone: the same in every run and process."""
    digest = hashlib.blake2b(document.encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48  # 48 bits fit a float's 53: never rounded up to 1


def split_documents(documents: Iterable[str], held_out: float = 0.05) -> tuple[list[str], list[str]]:
    """(train, validation). Documents with a hash below held_out, in (0, 1), are held out: copies stay
    together, reordering moves none. A side that would be empty gets the one document whose hash is nearest.

    A lone document (copies count once) is cut in two, the first part for training: at the line end nearest to
    the fraction 1 - held_out of its characters, or just there if no line end leaves text on both sides.

    For a corpus larger than memory, test `document_hash(document) < held_out` as the documents stream by.
    Raises ValueError for held_out, DataError for no documents or a single one too short to cut."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be in (0, 1), got {held_out}")
    documents = list(documents)
    hashes = {document: document_hash(document) for document in documents}
    if not hashes:
        raise DataError("no documents to split: give at least one")
    if len(hashes) == 1:
        train, validation = _cut(documents[0], 1 - held_out)
        return [train], [validation]
    chosen = {document for document in hashes if hashes[document] < held_out} or {min(hashes, key=hashes.get)}
    if len(chosen) == len(hashes):
        chosen.remove(max(hashes, key=hashes.get))
    return [d for d in documents if d not in chosen], [d for d in documents if d in chosen]


def _cut(document: str, fraction: float) -> tuple[str, str]:
    n_characters, end = len(document.strip()), len(document.rstrip())
    if n_characters < 2:
        raise DataError(f"the only document has {n_characters} characters, too few to split: give more")
    begin = end - n_characters
    target = min(max(round(len(document) * fraction), begin + 1), end - 1)
    line_ends = document.rfind("\n", begin, target) + 1, document.find("\n", target, end) + 1  # 0: none
    cut = min(filter(None, line_ends), key=lambda place: abs(place - target), default=target)
    return document[:cut], document[cut:]


# --- 4. packing -----------------------------------------------------------------------------

def pack(documents: Iterable[str], encode: Callable[[str], Sequence[int]], eot: int, vocab_size: int,
         path: str | os.PathLike | None = None) -> np.ndarray:
    """encode(document) + [eot] of every document, joined: (N,) uint16, or uint32 where vocab_size > 65536.

    With a path, the array is written there as .npy, one document in memory at a time, and returned
    memory-mapped (again later: `np.load(path, mmap_mode="r")`). It is written beside and renamed once it is
    whole and on the disk: a kill at any moment leaves the path as it was (and maybe a *.tmp).

    Raises ValueError for tokens outside [0, vocab_size), DataError for no documents or an unwritable path."""
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")

    def encoded() -> Iterator[np.ndarray]:
        tokens = None
        for document in documents:
            tokens = np.append(np.asarray(encode(document), dtype=np.int64), eot)
            if tokens.min() < 0 or tokens.max() >= vocab_size:
                raise ValueError(f"token ids {tokens.min()} .. {tokens.max()} are not all in the vocabulary, "
                                 f"0 .. {vocab_size - 1}")
            yield tokens.astype(dtype)
        if tokens is None:
            raise DataError("no documents to pack: give at least one")

    def header(n: int) -> bytes:  # .npy version 1.0, in 128 bytes for every n, so that it can be rewritten
        fields = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': ({n},), }}".ljust(117) + "\n"
        return b"\x93NUMPY\x01\x00" + len(fields).to_bytes(2, "little") + fields.encode()

    if path is None:
        return np.concatenate(list(encoded()))
    beside = f"{os.fspath(path)}.{uuid.uuid4().hex}.tmp"  # unique: several processes may pack to one path
    try:
        with open(beside, "wb") as file:
            file.write(header(0))
            n_tokens = sum(file.write(part) // dtype.itemsize for part in encoded())
            file.seek(0)
            file.write(header(n_tokens))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise DataError(f"{os.fspath(path)}: cannot be written ({error.strerror}): check the folder, its "
                        "permissions and the room on the disk") from None
    finally:
        Path(beside).unlink(missing_ok=True)
    with open(path, "rb") as file:  # np.load opens it twice; in between another process may put its own there
        return np.memmap(file, dtype, "r", offset=len(header(0)))


# --- 5. the order of the examples -----------------------------------------------------------

class TokenWindows:
    """The examples 0, 1, 2, ... that a line of tokens gives, without end: example j is a window of epoch
    j // n, in an order that each epoch draws anew from (seed, epoch). The number of the next example is the
    only state. Step s takes the examples s * B to (s + 1) * B - 1, and rank r of P its part of them:

        inputs, targets = windows.batch(s * B + r * (B // P), B // P)

    Args:
        tokens: (N,) integers, in memory or memory-mapped; N >= T + 1, else DataError.
        context: T, at least 1.
        seed: of the order, in 0 .. 2^32 - 1: NumPy's frozen stream takes no more.
        shuffle: False keeps every epoch in the order of the text, for validation.
    """

    def __init__(self, tokens: np.ndarray, context: int, seed: int = 0, shuffle: bool = True):
        tokens = np.asarray(tokens)  # of a memory map, a plain view: slices of it are cheaper
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens must be integers of shape (N,), got {tokens.dtype} {tokens.shape}")
        if context < 1 or not 0 <= seed < 2**32:
            raise ValueError(f"context must be at least 1 and seed in 0 .. 2^32 - 1, got {context} and {seed}")
        if len(tokens) < context + 1:
            raise DataError(f"{len(tokens)} tokens cannot fill one window of context {context} + 1: give "
                            f"more text, or a context of at most {len(tokens) - 1}")
        self.tokens, self.context, self.seed, self.shuffle = tokens, context, seed, shuffle
        self._epoch, self._order = -1, np.arange(len(self))

    def __len__(self) -> int:
        """n, the number of windows: the examples of one epoch."""
        return (len(self.tokens) - 1) // self.context

    def order(self, epoch: int) -> np.ndarray:
        """The windows of an epoch, in the order of its examples: (n,)."""
        if self.shuffle and epoch != self._epoch:
            # RandomState is NumPy's one frozen stream: a later version resumes in the same order.
            self._epoch, self._order = epoch, np.random.RandomState([self.seed, epoch]).permutation(len(self))
        return self._order

    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Examples start to start + count - 1: inputs and targets, each (count, T) int64. ValueError for
        a start below 0 or a count below 1."""
        if start < 0 or count < 1:
            raise ValueError(f"start must be at least 0 and count at least 1, got {start} and {count}")
        epochs, places = np.divmod(np.arange(start, start + count), len(self))
        windows = np.concatenate([self.order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)])
        rows = np.stack([self.tokens[i * self.context:(i + 1) * self.context + 1] for i in windows.tolist()])
        rows = torch.from_numpy(rows.astype(np.int64))  # (count, T + 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# --- 6. demo --------------------------------------------------------------------------------

def main(data: str | None, context: int, held_out: float, seed: int, out: str | None) -> None:
    if context < 1 or not 0 < held_out < 1 or not 0 <= seed < 2**32:
        raise ValueError("--context must be at least 1, --held_out in (0, 1) and --seed in 0 .. 2^32 - 1, "
                         f"got {context}, {held_out} and {seed}")
    documents = default_documents() if data is None else list(read_documents(data))
    print(f"{len(documents):,} documents, {sum(map(len, documents)):,} characters: {documents[0][:60]!r} ...")
    eot = 256  # the bytes are tokens 0 to 255
    train, validation = split_documents(documents, held_out)
    tokens = pack(train, lambda document: list(document.encode()), eot, eot + 1, out)
    size, rest = (sum(len(document.encode()) for document in side) for side in (train, validation))
    print(f"training {len(train):,} documents, {len(tokens):,} tokens (bytes; expected {size + len(train):,})")
    print(f"held out {len(validation):,} documents, {rest / (size + rest):.1%} of the bytes (expected about "
          f"{held_out:.1%} if documents are many); on both sides: {len({*train} & {*validation})} (expected 0)")
    windows = TokenWindows(tokens, context, seed)
    window = min(int(np.argmax(tokens == eot)) // context, len(windows) - 1)
    shown = tokens[window * context:(window + 1) * context + 1]
    shown = "".join("<|endoftext|>" if token == eot else chr(token) for token in shown.tolist())
    print(f"window {window}, at the end of the first document: {shown!r}")
    print(f"windows in the order of epoch 0: {windows.order(0)[:8].tolist()} ...")
    targets = torch.cat([windows.batch(j, 1)[1] for j in range(len(windows))])  # (n, T)
    text = targets[np.argsort(windows.order(0))].flatten().numpy()
    once = np.array_equal(text, tokens[1:len(text) + 1])
    print(f"every target of the epoch seen exactly once: {once} (expected True; {len(windows):,} windows x {context} = "
          f"{len(text):,} targets, {len(tokens) - 1 - len(text)} left over at the end)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n"  # one line of all ranks, without usage
                                               if os.environ.get("RANK", "0") == "0" else None)
    parser.add_argument("crawl", nargs="?", help="files to clean, as by python curate.py, with its flags")
    parser.add_argument("--data", help="files, such as 'my/*.txt' or a.jsonl,b.txt (default: Python's own)")
    parser.add_argument("--context", type=int, default=128, help="T, tokens per input (default %(default)s)")
    parser.add_argument("--held_out", type=float, default=0.05, help="share held out (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of windows (default %(default)s)")
    parser.add_argument("--out", metavar="FILE.npy", help="write the packed training tokens there")
    try:
        if parser.parse_known_args()[0].crawl is not None:
            import curate
            parser.exit(curate.start(sys.argv[1:]))
        main(**{name: value for name, value in vars(parser.parse_args()).items() if name != "crawl"})
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
