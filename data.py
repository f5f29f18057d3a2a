"""Data: from files to batches of tokens.     Brown et al. 2020 (GPT-3), arXiv 2005.14165, appendix B

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
          the last (N - 1) mod T tokens
Run       python data.py                        Python's own documentation, under 10 s
          python data.py --data 'my/**/*.txt'   or .md .jsonl .jsonl.gz .warc.wet .warc.wet.gz
          Ends with "every target of the epoch seen exactly once: True ..."
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

    Sources are parsed, never imported. What a stripped Python lacks is left out; DataError if it lacks all.
    """
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

def read_documents(pattern: str | os.PathLike) -> Iterator[str]:
    """The documents of a file, of a glob ('my/*.txt'; ** enters subfolders) or of a comma-separated list of
    them, files in the order of their names, each once. Only .txt and .md files are ever in memory whole.

        .txt .md                 one file = one document; Windows line ends become \\n
        .jsonl .jsonl.gz         one line = one JSON object with the document in "text"
        .warc.wet .warc.wet.gz   Common Crawl's text (WARC, ISO 28500): one conversion record = one document

    Documents of nothing but white space are left out, as is a byte-order mark.

    Raises:
        DataError: at once for a pattern without files, a folder, an unknown suffix; when reached for a file
            that is empty, unreadable, binary, truncated, not UTF-8, or not what its suffix says.
    """
    pattern = os.fspath(pattern)
    files: dict[str, str] = {}  # path -> suffix
    # A name that exists, such as "[1], 2.txt", is neither a list nor a glob.
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
            files[path] = next((suffix for suffix in READERS if path.lower().endswith(suffix)), "")
            if not files[path]:
                raise DataError(f"{path}: unknown suffix: give one of {' '.join(READERS)}")
    return (document for path in sorted(files) for document in _read_file(path, files[path]))


def _read_file(path: str, suffix: str) -> Iterator[str]:
    holds_text = False
    try:
        with open(path, "rb") as file:
            head = file.peek(2)[:2]
            if suffix.endswith(".gz") and head:
                if head != b"\x1f\x8b":
                    raise DataError(f"{path}: not gzip, it begins with {head!r}: rename or fetch it again")
                file = io.BufferedReader(gzip.GzipFile(fileobj=file))  # one file may be many gzip members
            for document in READERS[suffix](path, file):
                if document and not document.isspace():
                    holds_text = True
                    yield document
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: truncated or damaged gzip ({error}): fetch it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check it and its permissions") from None
    if not holds_text:
        raise DataError(f"{path}: {'holds no text' if head else 'is empty'}: fetch it again, or leave it out")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}, byte {error.start}: 0x{data[error.start]:02x} is not UTF-8: convert the "
                        "file, for example with iconv -f LATIN1 -t UTF-8") from None


def _read_text(path: str, file: io.BufferedIOBase) -> Iterator[str]:
    data = file.read()
    if b"\0" in data:
        raise DataError(f"{path}, byte {data.index(0)}: NUL, so binary or UTF-16: give text in UTF-8")
    yield _decode(data, path).replace("\r\n", "\n")


def _read_jsonl(path: str, file: io.BufferedIOBase) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        line = _decode(line, where)
        try:
            text = json.loads(line)["text"]
            text.encode()  # JSON can spell half of a surrogate pair, "\ud800": no text in UTF-8 holds one
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f'{where}: want a JSON object with a string "text", found {line[:40]!r} '
                            f"({type(error).__name__}: {error}): correct or remove the line") from None
        yield text


def _read_wet(path: str, file: io.BufferedIOBase) -> Iterator[str]:
    # A record: the line WARC/1.0, lines "Name: value", an empty line, Content-Length bytes, two empty lines.
    while first := file.readline(2**16):
        where = f"{path}, record at byte {file.tell() - len(first)} of the uncompressed file"
        if not first.startswith(b"WARC/"):
            raise DataError(f"{where}: begins with {first[:16]!r}, not WARC/: fetch the file again")
        headers = {}
        while line := file.readline(2**16).strip():
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        length = headers.get(b"content-length", b"missing")
        if not length.isdigit() or len(length) > 9:  # pages have kilobytes; a lie must not exhaust the memory
            raise DataError(f"{where}: Content-Length is {length[:20]!r}, not below 10^9: fetch it again")
        block = file.read(int(length))
        if len(block) < int(length) or file.read(4) != b"\r\n\r\n":
            raise DataError(f"{where}: does not end after its Content-Length of {int(length)} bytes, so "
                            "truncated or damaged: fetch the file again")
        if headers.get(b"warc-type") == b"conversion":
            yield _decode(block, where)


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
    Raises ValueError for held_out, DataError for no documents or a single one too short to cut.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be inside (0, 1), got {held_out}")
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

    Raises ValueError for tokens outside [0, vocab_size), DataError for no documents or an unwritable path.
    """
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")

    def encoded() -> Iterator[np.ndarray]:
        tokens = None
        for document in documents:
            tokens = np.append(np.asarray(encode(document), dtype=np.int64), eot)
            if tokens.min() < 0 or tokens.max() >= vocab_size:
                raise ValueError(f"tokens {tokens.min()} ... {tokens.max()} exceed vocab_size {vocab_size}")
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
    return np.load(path, mmap_mode="r")


# --- 5. the order of the examples -----------------------------------------------------------

class TokenWindows:
    """The examples 0, 1, 2, ... that a line of tokens gives, without end: example j is a window of epoch
    j // n, in an order that each epoch draws anew from (seed, epoch). The number of the next example is the
    only state. Step s takes the examples s * B to (s + 1) * B - 1, and rank r of P its part of them:

        inputs, targets = windows.batch(s * B + r * (B // P), B // P)

    Args:
        tokens: (N,) integers, in memory or memory-mapped; N >= T + 1, else DataError.
        context: T, at least 1.
        seed: of the order, in [0, 2^32).
        shuffle: False keeps every epoch in the order of the text, for validation.
    """

    def __init__(self, tokens: np.ndarray, context: int, seed: int = 0, shuffle: bool = True):
        tokens = np.asarray(tokens)  # of a memory map, a plain view: slices of it are cheaper
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens must be integers of shape (N,), got {tokens.dtype} {tokens.shape}")
        if context < 1 or not 0 <= seed < 2**32:
            raise ValueError(f"context must be >= 1 and seed in [0, 2^32), got {context} and {seed}")
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
        """Examples start to start + count - 1: inputs and targets, each (count, T) int64. ValueError unless
        start >= 0 and count >= 1."""
        if start < 0 or count < 1:
            raise ValueError(f"a batch needs start >= 0 and count >= 1, got {start} and {count}")
        epochs, places = np.divmod(np.arange(start, start + count), len(self))
        windows = np.concatenate([self.order(epoch)[places[epochs == epoch]] for epoch in np.unique(epochs)])
        rows = np.stack([self.tokens[i * self.context:(i + 1) * self.context + 1] for i in windows.tolist()])
        rows = torch.from_numpy(rows.astype(np.int64))  # (count, T + 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# --- 6. demo --------------------------------------------------------------------------------

def main(data: str | None, context: int, held_out: float, seed: int, out: str | None) -> None:
    documents = default_documents() if data is None else list(read_documents(data))
    print(f"{len(documents):,} documents, {sum(map(len, documents)):,} characters. They begin:")
    print("".join(f"    {document[:80]!r}\n" for document in documents[:2]), end="")

    eot = 256  # the bytes are tokens 0 to 255, so that the demo needs no tokenizer
    train, validation = split_documents(documents, held_out)
    tokens = pack(train, lambda document: list(document.encode()), eot, eot + 1, out)
    size, rest = (sum(len(document.encode()) for document in side) for side in (train, validation))
    print(f"training {len(train):,} documents, {len(tokens):,} tokens (bytes) in {tokens.dtype}; "
          f"expected {size + len(train):,}")
    print(f"held out {len(validation):,} documents, {rest / (size + rest):.1%} of the bytes; expected about "
          f"{held_out:.1%} if documents are many. On both sides: {len({*train} & {*validation})}; expected 0")

    windows = TokenWindows(tokens, context, seed)
    window = min(int(np.argmax(tokens == eot)) // context, len(windows) - 1)
    shown = tokens[window * context:(window + 1) * context + 1]
    pieces = [bytes(piece[piece != eot].tolist()).decode(errors="replace")
              for piece in np.split(shown, np.flatnonzero(shown == eot))]
    print(f"window {window}, at the end of the first document: {'<|endoftext|>'.join(pieces)!r}")
    print(f"windows in the order of the examples: {windows.order(0)[:5].tolist()} ... in epoch 0, "
          f"{windows.order(1)[:5].tolist()} ... in epoch 1")

    targets = torch.cat([windows.batch(j, 1)[1] for j in range(len(windows))])  # (n, T)
    text = targets[np.argsort(windows.order(0))].flatten().numpy()
    once = np.array_equal(text, tokens[1:len(text) + 1])
    print(f"every target of the epoch seen exactly once: {once} ({len(windows):,} windows x {context} = "
          f"{len(text):,} targets, {len(tokens) - 1 - len(text)} left over at the end)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, no usage
    parser.add_argument("--data", help="files, such as 'my/*.txt' or a.jsonl,b.txt (default: Python's own)")
    parser.add_argument("--context", type=int, default=128, help="T, tokens per input (default %(default)s)")
    parser.add_argument("--held_out", type=float, default=0.05, help="share held out (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of windows (default %(default)s)")
    parser.add_argument("--out", metavar="FILE.npy", help="write the packed training tokens there")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (OSError, ValueError) as error:
        parser.error(str(error))
