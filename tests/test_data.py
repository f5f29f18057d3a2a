"""Every format against files made by other means, every bad input, the promises of split, pack, windows."""

import builtins
import gzip
import inspect
import io
import itertools
import json
import os
import random
import runpy
import signal
import statistics
import sys
import sysconfig
import threading
import tracemalloc
import zlib
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch

import data
from data import (DataError, TokenWindows, default_documents, document_hash, find_files, pack, read_documents,
                  read_file, split_documents)

TEXTS = ["one\ntwo", "Grüße, Jürgen ❤ 🎉", "line\u2028separator\x0b and \x85 stay inside", "x" * 5000]


def write(path: Path, content: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return str(path)


def read(pattern) -> list[str]:
    return list(read_documents(pattern))


def warc(kind: str, block: bytes, length: int | None = None) -> bytes:
    headers = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: http://a.example/?q=1:2\r\n"
    length = len(block) if length is None else length
    headers += f"Content-Type: text/plain\r\nContent-Length: {length}\r\n\r\n"
    return headers.encode() + block + b"\r\n\r\n"


RECORDS = [warc("warcinfo", b"Software-Info: ia-web-commons\r\n"),
           *(warc("conversion", text.encode()) for text in TEXTS)]


# --- the default corpus ---------------------------------------------------------------------

@pytest.fixture(scope="module")
def corpus():
    before = set(sys.modules)
    documents = default_documents()
    return documents, set(sys.modules) - before


def test_default_documents_match_pydoc_and_the_modules_own_docstrings(corpus):
    documents, imported = corpus
    expected = list(dict.fromkeys(topics[name].strip() for name in sorted(topics)))
    assert documents[:len(expected)] == expected
    for thing in (statistics.median, statistics.NormalDist, statistics.NormalDist.overlap):
        parts = f" {thing.__name__}", inspect.getdoc(thing), inspect.getdoc(statistics)
        assert any(all(part in d for part in parts) for d in documents)
    assert len(imported) < 5 and "antigravity" not in imported  # parsed, not imported (which opens a browser)


def test_default_documents_are_distinct_text_in_a_fixed_order(corpus):
    documents, _ = corpus
    assert len(set(documents)) == len(documents) > 300
    assert sum(map(len, documents)) > 1_500_000
    assert all(d == d.strip() and d for d in documents)


def test_docstrings_keep_the_order_of_the_file_and_skip_the_short():
    source = '''
"""The module's docstring, which is long enough to stay."""
if True:
\x0c
    class Thing(dict):
        """A class whose docstring is long enough to stay.

            indented

        and not.
        """
        async def method(self, a,
                         b=1) -> None:
            """A method whose docstring is long enough to stay."""
            def hidden(): "A function inside of a function, which nobody can call from outside."
def short(): "Too short."
'''
    assert data._docstrings(source) == """The module's docstring, which is long enough to stay.

class Thing(dict):
A class whose docstring is long enough to stay.

    indented

and not.

async def method(self, a, b=1) -> None:
A method whose docstring is long enough to stay."""


def test_default_documents_of_a_stripped_python_are_what_is_there(monkeypatch, tmp_path):
    write(tmp_path / "json" / "__init__.py", b'"""' + b"words " * 20 + b'"""')
    write(tmp_path / "json" / "tests" / "test_a.py", b'"""' + b"never " * 20 + b'"""')
    write(tmp_path / "foreign.py", b'"""' + b"never " * 20 + b'"""')
    write(tmp_path / "csv.py", b'"""' + b"words " * 20 + b'"""')  # a copy of json's
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # importing it raises ImportError
    assert default_documents() == ["words " * 19 + "words"]
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "none"))
    with pytest.raises(DataError, match="no pydoc_data and no sources"):
        default_documents()


# --- reading: every format ------------------------------------------------------------------

def test_text_files_match_what_was_written(tmp_path):
    write(tmp_path / "b.txt", TEXTS[1].encode())
    write(tmp_path / "a.MD", b"\xef\xbb\xbf# Title\r\nline\rsame\r\n")  # byte-order mark, Windows line ends
    assert read(tmp_path / "*") == ["# Title\nline\rsame\n", TEXTS[1]]


@pytest.mark.parametrize("escaped", [True, False])
def test_jsonl_matches_the_json_module(tmp_path, escaped):
    lines = [json.dumps({"id": i, "text": t}, ensure_ascii=escaped) for i, t in enumerate(TEXTS)]
    content = "\ufeff" + "\n".join(lines[:2]) + "\r\n\n   \n" + "\n".join(lines[2:])  # no newline at the end
    content = content.encode()
    assert read(write(tmp_path / "a.jsonl", content)) == TEXTS
    half = len(content) // 2  # two gzip members whose border is inside a line
    members = gzip.compress(content[:half]) + gzip.compress(content[half:])
    assert read(write(tmp_path / "a.jsonl.gz", members)) == TEXTS


def test_wet_matches_the_records_written_by_hand(tmp_path):
    assert read(write(tmp_path / "a.warc.wet", b"".join(RECORDS))) == TEXTS
    members = b"".join(map(gzip.compress, RECORDS))  # as Common Crawl does: each record its own gzip member
    assert read(write(tmp_path / "a.warc.wet.gz", members)) == TEXTS
    assert read(write(tmp_path / "b.warc.wet.gz", gzip.compress(b"".join(RECORDS)))) == TEXTS
    lower = b"".join(RECORDS).replace(b"WARC-Type: ", b"warc-type:").replace(b"Length:", b"length: ")
    assert read(write(tmp_path / "c.warc.wet", lower)) == TEXTS


def test_blank_documents_are_left_out(tmp_path):
    lines = [json.dumps({"text": t}) for t in ("", " \n", "word", "\u00a0")]
    assert read(write(tmp_path / "a.jsonl", "\n".join(lines).encode())) == ["word"]


def test_files_are_sorted_and_read_once(tmp_path, monkeypatch):
    for name in ("z.txt", "sub/a.txt", "sub/deep/b.txt", "[1], 2.txt"):
        write(tmp_path / name, name.encode())
    (tmp_path / "folder.txt").mkdir()  # a folder that a glob meets is passed over
    monkeypatch.chdir(tmp_path)
    assert read("**/*.txt") == ["[1], 2.txt", "sub/a.txt", "sub/deep/b.txt", "z.txt"]
    assert read("z.txt, sub/*.txt,z.t*") == ["sub/a.txt", "z.txt"]
    assert read("[1], 2.txt") == ["[1], 2.txt"]  # a name that exists is no pattern and no list


def test_reading_streams(tmp_path):
    """The first documents of a file come before its damaged end, and a second file opens only at its turn."""
    lines = json.dumps({"text": "first"}).encode() + b"\n" + b'{"text": "filler"}\n' * 20_000
    packed = gzip.compress(lines)
    first, second = write(tmp_path / "a.jsonl.gz", packed[:-9]), write(tmp_path / "b.txt", b"")
    documents = read_documents(f"{first},{second}")
    assert next(documents) == "first"
    with pytest.raises(DataError, match="a.jsonl.gz, .*truncated"):
        list(documents)


# --- reading: every bad input ---------------------------------------------------------------

GZIPPED = gzip.compress(b'{"text": "' + random.Random(0).randbytes(5000).hex().encode() + b'"}\n')
FLIPPED = bytearray(GZIPPED)
FLIPPED[len(FLIPPED) // 2] ^= 0xFF
BAD_FILES = {
    "empty.txt": (b"", "is empty"),
    "empty.jsonl.gz": (b"", "is empty"),
    "nothing.jsonl.gz": (gzip.compress(b""), "holds no text"),
    "blank.md": (b" \n\t\n", "holds no text"),
    "blank.jsonl": (b"\n\n", "holds no text"),
    "info.warc.wet": (RECORDS[0], "holds no text"),
    "binary.txt": (b"ab\0\1\2", "byte 2: NUL"),
    "latin.txt": ("Größe".encode("latin1"), "byte 2: 0xf6 is not UTF-8"),
    "cut.txt": ("Größe".encode()[:3], "byte 2: 0xc3 is not UTF-8"),
    "latin.jsonl": (b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2 .from byte 14., byte 10: 0xe9 is not UTF-8"),
    "wide.jsonl": ('{"text": "a"}\n'.encode("utf-16"), "line 1 .from byte 0., byte 3: NUL"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', r"line 2 .from byte \d+.: want .* found '{\"text\": \"b' .JSONDecodeError"),
    "field.jsonl": (b'{"content": "a"}\n', "line 1 .from byte \\d+.: want .*KeyError: 'text'"),
    "null.jsonl": (b'{"text": null}\n', "line 1 .from byte \\d+.: want .*NoneType"),
    "number.jsonl": (b'{"text": 5}\n', "line 1 .from byte \\d+.: want .*'int'"),
    "list.jsonl": (b'["text"]\n', "line 1 .from byte \\d+.: want .*TypeError"),
    "string.jsonl": (b'"text"\n', "line 1 .from byte \\d+.: want .*TypeError"),
    "surrogate.jsonl": (b'{"text": "a\\ud83d"}\n', "line 1 .from byte \\d+.: want .*ud83d"),
    "deep.jsonl": (b'{"text": ' + b"[" * 200_000 + b"\n", "line 1 .from byte \\d+.: want .*RecursionError"),
    "plain.jsonl.gz": (b'{"text": "a"}\n', "not gzip"),
    "cut.jsonl.gz": (GZIPPED[:-20], "truncated or damaged gzip"),
    "header.jsonl.gz": (GZIPPED[:5], "truncated or damaged gzip"),
    "flipped.jsonl.gz": (bytes(FLIPPED), "truncated or damaged gzip"),
    "deflate.jsonl.gz": (GZIPPED[:10] + b"\xff" * 50, "truncated or damaged gzip .Error -3"),
    "crc.jsonl.gz": (GZIPPED[:-8] + b"12345678", "truncated or damaged gzip"),
    "tail.jsonl.gz": (GZIPPED + b"tail", "truncated or damaged gzip"),
    "cut.warc.wet.gz": (b"".join(map(gzip.compress, RECORDS))[:-5], "truncated or damaged gzip"),
    "html.warc.wet": (b"<html>\n", "record at byte 0 .*begins with b'<html>"),
    "short.warc.wet": (RECORDS[1] + warc("conversion", b"12345", 3), rf"byte {len(RECORDS[1])} .*of 3 bytes"),
    "long.warc.wet": (warc("conversion", b"12345", 7), "of 7 bytes"),
    "huge.warc.wet": (warc("conversion", b"12345", 999_999), "of 999999 bytes"),
    "absurd.warc.wet": (warc("conversion", b"12345", 10**15), "Content-Length is b'10+', want 0 .. 999999999: fetch the file again"),
    "negative.warc.wet": (warc("conversion", b"12345", -5), "Content-Length is b'-5'"),
    "headers.warc.wet": (RECORDS[0] + b"WARC/1.0\r\nWARC-Ty", "Content-Length is b'missing'"),
    "blocks.warc.wet": (RECORDS[1][:-6], "truncated"),
    "latin.warc.wet": (warc("conversion", b"ab\xe9"), "record at byte 0 .*, byte 2: 0xe9 is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_named_with_place_and_cure_in_one_line(tmp_path, name):
    content, message = BAD_FILES[name]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", b"text")
    documents = read_documents(path)

    def denied(*args, **kwargs):  # not chmod: the superuser reads everything
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr(builtins, "open", denied)
    with pytest.raises(DataError, match=r"a.txt: cannot be read \(Permission denied\)"):
        list(documents)


def test_file_that_went_away_is_refused(tmp_path):
    os.symlink(tmp_path / "gone", tmp_path / "link.txt")
    with pytest.raises(DataError, match=r"link.txt: cannot be read \(No such file"):
        read(tmp_path / "*.txt")


@pytest.mark.parametrize("pattern, message", [
    ("sub", r"sub: is a folder: name files, such as 'sub/\*\*/\*.txt'"),
    ("a.txt,", "'a.txt,': no such file"),
    ("", "'': no such file"),
    ("sub/none/more/*.txt", r"sub/none/more/\*.txt: no such file.* directory is HERE, .*exists HERE/sub$"),
    ("a.txt,b.txt", "b.txt: no such file"),
    ("x" * 5000, "xxx: no such file"),  # too long for a file system
    ("su*", "su.: no such file"),
    ("*.rst", "c.rst: unknown suffix: give one of .txt .md .jsonl .jsonl.gz .warc.wet .warc.wet.gz"),
    ("d.gz", "d.gz: unknown suffix"),
])
def test_bad_pattern_is_refused_at_the_call(tmp_path, monkeypatch, pattern, message):
    for name in ("a.txt", "sub/a.txt", "c.rst", "d.gz"):
        write(tmp_path / name, b"text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message.replace("HERE", os.getcwd())):
        read_documents(pattern)


# --- reading on behind what is damaged ------------------------------------------------------

def salvage(path, longest: int | None = None) -> tuple[list[str], list[str], int]:
    """What read_file gives of a file, and what it says is lost."""
    lost = []
    documents = list(read_file(str(path), lambda message, n_bytes: lost.append((message, n_bytes)), longest))
    assert all(message.startswith(str(path)) and "\n" not in message for message, _ in lost)
    return documents, [message for message, _ in lost], sum(n_bytes for _, n_bytes in lost)


BLOCK = b"x" * 2**16
PAGES = [f"Page {i}. " + random.Random(i).randbytes(300 + 40 * i).hex() for i in range(12)]
MEMBERS = [gzip.compress(warc("conversion", page.encode())) for page in PAGES]


def changed(content: bytes, place: int, new: bytes) -> bytes:
    return content[:place] + new + content[place + len(new):]


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_passed_over_and_named(tmp_path, name):
    """Whatever stops read_documents does not stop read_file, and is the first thing that it tells."""
    content, message = BAD_FILES[name]
    path = write(tmp_path / name, content)
    documents, lost, _ = salvage(path)
    with pytest.raises(DataError) as caught:
        read(path)
    assert lost and lost[0] == str(caught.value) and len(documents) <= 4


def test_file_without_damage_loses_nothing(tmp_path):
    path = write(tmp_path / "a.warc.wet.gz", b"".join(MEMBERS))
    assert salvage(path) == (PAGES, [], 0)
    padded = write(tmp_path / "b.warc.wet.gz", MEMBERS[0] + bytes(100) + MEMBERS[1] + bytes(70_000) + MEMBERS[2] + bytes(9))
    assert salvage(padded) == (PAGES[:3], [], 0) == (read(padded), [], 0)  # gzip -t says that zeros behind members are fine


@pytest.mark.parametrize("place", [0, 1, 3, 9, 15, 200, -1, -5, -9])
def test_damaged_gzip_member_loses_its_record_only(tmp_path, place):
    place %= len(MEMBERS[4])
    bad = changed(MEMBERS[4], place, bytes([MEMBERS[4][place] ^ 0xFF]))
    path = write(tmp_path / "a.warc.wet.gz", b"".join(MEMBERS[:4] + [bad] + MEMBERS[5:]))
    documents, lost, n_bytes = salvage(path)
    if place == 9:  # the byte that names the operating system
        assert (documents, lost) == (PAGES, [])
    else:
        assert documents == PAGES[:4] + PAGES[5:] and n_bytes == len(bad)
        start = sum(map(len, MEMBERS[:4]))
        assert len(lost) == 1 and f", bytes {start} to {start + len(bad)}: truncated or damaged gzip (" in lost[0]


def test_truncated_gzip_keeps_what_was_before(tmp_path):
    whole = b"".join(MEMBERS)
    for left in (1, 5, 20, 300, len(MEMBERS[-1]) - 1):  # of the last member; with one byte less, its checksum is cut
        documents, lost, n_bytes = salvage(write(tmp_path / "a.warc.wet.gz", whole[:len(whole) - len(MEMBERS[-1]) + left]))
        assert documents == PAGES[:-1] + PAGES[-1:] * (left > 300) and n_bytes >= left
        assert "truncated or damaged gzip (it ends too early)" in lost[0]
    # One member for the whole file: what was unpacked before the end counts.
    lines = b"".join(json.dumps({"text": page}).encode() + b"\n" for page in PAGES * 200)
    documents, lost, _ = salvage(write(tmp_path / "a.jsonl.gz", gzip.compress(lines)[:-10_000]))
    assert documents == (PAGES * 200)[:len(documents)] and len(documents) > 1000 and 1 <= len(lost) <= 2


def test_member_that_spans_many_reads_is_found_again(tmp_path):
    long = random.Random(5).randbytes(150_000).hex()  # 150 kB compressed: three reads
    first, second, third = (gzip.compress(warc("conversion", t.encode())) for t in ("First page.", long, "Third page."))
    assert salvage(write(tmp_path / "a.warc.wet.gz", first + second + third)) == (["First page.", long, "Third page."], [], 0)
    bad = changed(second, 100_000, bytes(50))
    documents, lost, n_bytes = salvage(write(tmp_path / "b.warc.wet.gz", first + bad + third))
    assert documents == ["First page.", "Third page."] and n_bytes >= len(bad) and "damaged gzip" in lost[0]


@pytest.mark.parametrize("length", [0, 3, 90, 700, 10**8, 10**12, -1, None])
@pytest.mark.parametrize("zipped", [False, True])
def test_record_that_lies_about_its_length_is_lost_alone(tmp_path, length, zipped):
    records = [warc("conversion", page.encode()) for page in PAGES]
    true = len(PAGES[3])
    cover = len(records[4]) + true  # as long as this record and the next: they would become one page
    for lie in {length, cover} - {true}:
        records[3] = warc("conversion", PAGES[3].encode(), lie if lie is not None else 0)
        if lie is None:
            records[3] = records[3].replace(b"Content-Length: 0\r\n", b"")
        content = b"".join(map(gzip.compress, records)) if zipped else b"".join(records)
        documents, lost, n_bytes = salvage(write(tmp_path / f"a.warc.wet{'.gz' * zipped}", content))
        assert documents == PAGES[:3] + PAGES[4:] and len(lost) == 1 and n_bytes == len(records[3])
        assert f"record at byte {sum(map(len, records[:3]))} of" in lost[0]


def test_wrong_encodings_and_nuls_lose_their_document_only(tmp_path):
    pages = [b"fine", "Gr\u00f6\u00dfe".encode("latin1"), b"a\0b", "wide".encode("utf-16"), b"also fine"]
    documents, lost, n_bytes = salvage(write(tmp_path / "a.warc.wet", b"".join(warc("conversion", page) for page in pages)))
    assert documents == ["fine", "also fine"] and n_bytes == sum(len(warc("conversion", page)) for page in pages[1:4])
    assert ["0xf6 is not UTF-8" in lost[0], "byte 1: NUL" in lost[1], "NUL, so binary or UTF-16" in lost[2], len(lost)] == [True] * 3 + [3]
    lines = [b'{"text": "fine"}', b'{"text": "\xe9"}', b'{"text": 1}', b"{", b'{"text": "also fine"}']
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    documents, lost, n_bytes = salvage(path)
    assert documents == ["fine", "also fine"] and n_bytes == sum(map(len, lines[1:4])) + 3
    assert [f"line {i + 1} (from byte {sum(map(len, lines[:i])) + i})" in m for i, m in zip((1, 2, 3), lost)] == [True] * 3


@pytest.mark.parametrize("name, huge", [("a.jsonl", 10**9), ("a.jsonl.gz", 30_000_000), ("a.warc.wet", 999_999_999), ("a.warc.wet.gz", 30_000_000),
                                        ("a.txt", 10**9)])
def test_memory_does_not_depend_on_the_length_of_a_line(name, huge):
    """Of 3 MB and of up to 1 GB, which come in blocks as from a file: found, passed over, in equal memory."""
    suffix, peaks = name.removeprefix("a"), []

    def blocks(n):
        for text in (b"first", None, b"last"):
            begin, end = warc("conversion", b"|", n if text is None else len(text)).split(b"|") if "wet" in name else (b'{"text": "', b'"}\n')
            yield begin
            yield from [text] if text else itertools.repeat(BLOCK, n // len(BLOCK))
            yield bytes(n % len(BLOCK) if text is None else 0) + end

    def zipped(n):
        pack = zlib.compressobj(1, wbits=31)
        return io.BufferedReader(io.BytesIO(b"".join(map(pack.compress, blocks(n))) + pack.flush()))

    for n in (3_000_000, huge):
        lost = []
        note = lambda message, n_bytes: lost.append((message, n_bytes))  # noqa: E731
        pieces = data._unzip(name, zipped(n), note) if suffix.endswith("gz") else blocks(n)
        tracemalloc.start()
        documents = list(data.READERS[suffix](__file__, data._Bytes(pieces), note, 10**6))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert documents == ([] if name == "a.txt" else ["first", "last"]) and len(lost) == 1
        assert name == "a.txt" or lost[0][1] >= n
        assert ("Content-Length is" if "wet" in name else "than 1,000,000 bytes") in lost[0][0]
    # The longer one is in two blocks more of the compressed file; 6 MB are some times the longest document that is wanted.
    assert peaks[1] < peaks[0] + 2 * len(BLOCK) and peaks[0] < 6e6


def test_documents_of_just_the_longest_size_are_kept(tmp_path):
    for longest, n in ((1000, 1), (999, 0)):
        assert len(salvage(write(tmp_path / "a.warc.wet", warc("conversion", b"a" * 1000)), longest)[0]) == n
        assert len(salvage(write(tmp_path / "a.txt", b"a" * 1000), longest)[0]) == n
        assert len(salvage(write(tmp_path / "a.jsonl", b'{"text": "%b"}\n' % (b"a" * 987)), longest)[0]) == n


def test_unreadable_file_is_lost_whole(tmp_path):
    os.symlink(tmp_path / "gone", tmp_path / "link.txt")
    assert salvage(tmp_path / "link.txt")[1][0].endswith("cannot be read (No such file or directory): check the path and its permissions")


def test_random_damage_never_raises_and_never_invents(tmp_path):
    """200 files with random changes: nothing but DataError's messages, and most pages survive."""
    random_, survived = random.Random(0), 0
    for trial in range(200):
        content = bytearray(b"".join(MEMBERS) if trial % 2 else b"".join(warc("conversion", p.encode()) for p in PAGES))
        for _ in range(random_.randrange(1, 4)):
            place = random_.randrange(len(content))
            kind = random_.randrange(3)
            if kind == 0:
                content[place] ^= 1 << random_.randrange(8)
            elif kind == 1:
                del content[place:place + random_.randrange(1, 500)]
            else:
                content[place:place] = random_.randbytes(random_.randrange(1, 100))
        documents, _, _ = salvage(write(tmp_path / ("a.warc.wet.gz" if trial % 2 else "a.warc.wet"), bytes(content)))
        survived += len(set(documents) & set(PAGES))
        if trial % 2:
            assert set(documents) <= set(PAGES)  # gzip's checksum catches what is changed
    assert survived > 200 * 12 * 0.6


def test_find_files_matches_glob(tmp_path):
    for name in ("b.txt", "a.jsonl", "sub/c.md"):
        write(tmp_path / name, b"x")
    assert find_files(f"{tmp_path}/**/*.*") == [f"{tmp_path}/{name}" for name in ("a.jsonl", "b.txt", "sub/c.md")]


# --- splitting ------------------------------------------------------------------------------

def test_split_is_a_partition_that_order_and_additions_do_not_change():
    documents = [f"document {i}" for i in range(2000)]
    train, validation = split_documents(documents, 0.1)
    assert sorted(train + validation) == sorted(documents) and not set(train) & set(validation)
    # 200 expected; the standard deviation of a binomial is 13.4, and the hash never changes
    assert abs(len(validation) - 200) < 40
    assert train == [d for d in documents if d in set(train)]  # order is kept
    shuffled = random.Random(0).sample(documents, len(documents))
    assert list(map(set, split_documents(shuffled, 0.1))) == [set(train), set(validation)]
    assert set(validation) <= set(split_documents(documents, 0.2)[1])  # a larger share only adds
    more = split_documents(documents + [f"new {i}" for i in range(100)], 0.1)
    assert set(validation) <= set(more[1]) and set(train) <= set(more[0])


def test_document_hash_is_fixed_for_all_time():
    """A changed hash would train on what was held out before. The number is from coreutils: b2sum -l 48."""
    assert document_hash("Grüße") == int("c13bd5c0efda", 16) / 2**48
    documents = [f"document {i}" for i in range(100)]
    assert split_documents(documents, 0.3)[1] == [d for d in documents if document_hash(d) < 0.3]


def test_copies_stay_on_one_side():
    documents = [f"document {i % 50}" for i in range(200)]
    train, validation = split_documents(iter(documents), 0.3)
    assert not set(train) & set(validation) and len(train) + len(validation) == 200


@pytest.mark.parametrize("held_out", [1e-9, 0.5, 1 - 1e-9])
def test_two_documents_are_one_and_one(held_out):
    for i in range(20):
        documents = [f"a{i}", f"b{i}"]
        train, validation = split_documents(documents, held_out)
        assert len(train) == len(validation) == 1 and train != validation
        assert split_documents(documents[::-1], held_out) == (train, validation)


def test_lone_document_is_cut_at_the_nearest_line_end():
    lines = [f"line {i:03d}\n" for i in range(100)]
    text = "".join(lines)
    assert split_documents([text], 0.05) == ([text[:95 * 9]], [text[95 * 9:]])
    assert split_documents([text, text], 0.248) == ([text[:75 * 9]], [text[75 * 9:]])  # at line 75.2
    assert split_documents([text], 0.242) == ([text[:76 * 9]], [text[76 * 9:]])  # at line 75.8
    assert split_documents(["x" * 100], 0.05) == (["x" * 95], ["x" * 5])  # no line end
    assert split_documents(["x" * 100 + "\n\n"], 0.5) == (["x" * 51], ["x" * 49 + "\n\n"])  # no fitting one
    assert split_documents(["one\ntwo\n"], 0.05) == (["one\n"], ["two\n"])  # the last line end leaves nothing
    assert split_documents([" \n\none\ntwo\n"], 0.99) == ([" \n\none\n"], ["two\n"])  # nor does the first
    assert split_documents([" ab "], 0.01) == ([" a"], ["b "])


def test_split_refuses_what_it_cannot_split():
    for held_out in (0, 1, -0.1, 5):
        with pytest.raises(ValueError, match=rf"must be in \(0, 1\), got {held_out}"):
            split_documents(TEXTS, held_out)
    with pytest.raises(DataError, match="no documents"):
        split_documents([])
    for text, n in ((" a\n", 1), ("\n \n", 0)):
        with pytest.raises(DataError, match=f"has {n} characters, too few"):
            split_documents([text])


# --- packing --------------------------------------------------------------------------------

def utf8(document: str) -> list[int]:
    return list(document.encode())


@pytest.mark.parametrize("vocab_size, dtype", [(257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_pack_matches_brute_force_in_memory_and_on_disk(tmp_path, vocab_size, dtype):
    eot = vocab_size - 1
    expected = []
    for text in [*TEXTS, ""]:
        expected += utf8(text) + [eot]
    in_memory = pack([*TEXTS, ""], utf8, eot, vocab_size)
    on_disk = pack(iter([*TEXTS, ""]), utf8, eot, vocab_size, tmp_path / "tokens.npy")
    assert in_memory.tolist() == on_disk.tolist() == np.load(tmp_path / "tokens.npy").tolist() == expected
    assert in_memory.dtype == on_disk.dtype == dtype
    assert isinstance(on_disk, np.memmap) and not on_disk.flags.writeable
    assert os.listdir(tmp_path) == ["tokens.npy"]


def test_two_that_pack_to_one_path_at_once_get_one_of_both_whole(tmp_path, monkeypatch):
    texts, found = ["a" * 2000, "b"], []
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # more turns

    def write(text):
        found.extend(len(pack([text], utf8, 256, 257, tmp_path / "tokens.npy")) for _ in range(200))

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 400 and set(found) <= {2001, 2}


def test_npy_header_matches_numpys_own_reader_at_every_length(tmp_path):
    for n in (1, 9, 10, 123_456):
        pack(["a" * (n - 1)], utf8, 256, 257, tmp_path / "a.npy")
        with open(tmp_path / "a.npy", "rb") as file:
            assert np.lib.format.read_magic(file) == (1, 0)
            assert np.lib.format.read_array_header_1_0(file) == ((n,), False, np.dtype("<u2"))
            assert file.tell() == 128 and len(file.read()) == 2 * n


@pytest.mark.parametrize("before", [None, b"what was there"])
def test_pack_that_fails_leaves_the_path_as_it_was(tmp_path, before):
    path = tmp_path / "tokens.npy"
    if before:
        path.write_bytes(before)

    def documents():
        yield "fine"
        assert len(os.listdir(tmp_path)) == 1 + bool(before)  # the part that is written beside
        raise DataError("b.txt: damaged")
    with pytest.raises(DataError, match="b.txt: damaged"):
        pack(documents(), utf8, 256, 257, path)
    assert os.listdir(tmp_path) == (["tokens.npy"] if before else [])
    assert not before or path.read_bytes() == before


def test_pack_that_is_killed_leaves_nothing_at_the_path(tmp_path):
    def documents():
        yield "a" * 100_000
        os.kill(os.getpid(), signal.SIGKILL)
    path = tmp_path / "tokens.npy"
    if not (child := os.fork()):
        pack(documents(), utf8, 256, 257, path)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL and not path.exists() and len(os.listdir(tmp_path)) == 1


def test_pack_on_a_full_disk_leaves_the_path_as_it_was(tmp_path):
    import resource  # Unix
    path = tmp_path / "tokens.npy"
    pack(["before"], utf8, 256, 257, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # no file may grow further
    try:
        with pytest.raises(DataError, match=r"tokens.npy: cannot be written \(File too large\)"):
            pack(["a" * 100_000], utf8, 256, 257, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["tokens.npy"] and path.read_bytes() == before


def test_pack_refuses_what_does_not_fit(tmp_path):
    for path in (None, tmp_path / "a.npy"):
        with pytest.raises(DataError, match="no documents to pack"):
            pack([], utf8, 256, 257, path)
        with pytest.raises(ValueError, match=r"token ids 98 \.\. 256 are not all in the vocabulary, 0 \.\. 255"):
            pack(["b"], utf8, 256, 256, path)
        with pytest.raises(ValueError, match=r"token ids -1 \.\. 256 are not all in the vocabulary, 0 \.\. 256"):
            pack(["b"], lambda d: [-1], 256, 257, path)
    assert os.listdir(tmp_path) == []


# --- windows --------------------------------------------------------------------------------

TOKENS = np.arange(1000, 1000 + 1003, dtype=np.uint16)  # every token its own value: a window tells its place


@pytest.mark.parametrize("n_tokens, context", [(1003, 10), (1001, 10), (1000, 10), (11, 10), (2, 1), (99, 7)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_is_every_window_exactly_once(n_tokens, context, shuffle):
    windows = TokenWindows(TOKENS[:n_tokens], context, seed=3, shuffle=shuffle)
    n = (n_tokens - 1) // context
    assert len(windows) == n
    inputs, targets = windows.batch(0, n)
    assert inputs.shape == targets.shape == (n, context)
    assert inputs.dtype == targets.dtype == torch.int64 and targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    expected = torch.arange(1000, 1000 + n * context).view(n, context)
    assert torch.equal(inputs[inputs[:, 0].argsort()], expected)
    assert shuffle or torch.equal(inputs, expected)


def test_examples_are_independent_of_the_number_of_ranks():
    batch_size, steps = 12, 30  # 360 examples over epochs of 100: steps cross from epoch to epoch
    streams = []
    for ranks in (1, 2, 3, 4):
        part = batch_size // ranks
        each = [TokenWindows(TOKENS, 10, seed=1) for _ in range(ranks)]
        streams.append(torch.cat([each[rank].batch(step * batch_size + rank * part, part)[0]
                                  for step in range(steps) for rank in range(ranks)]))
    assert all(torch.equal(stream, streams[0]) for stream in streams[1:])
    assert torch.equal(streams[0], TokenWindows(TOKENS, 10, seed=1).batch(0, 360)[0])


def test_resumed_anywhere_equals_uninterrupted():
    whole = TokenWindows(TOKENS, 10, seed=1).batch(0, 450)
    for start in (1, 99, 100, 101, 237, 449):
        resumed = TokenWindows(TOKENS, 10, seed=1).batch(start, 450 - start)
        assert all(torch.equal(a[start:], b) for a, b in zip(whole, resumed))
    windows = TokenWindows(TOKENS, 10, seed=1)
    windows.batch(350, 10)
    assert torch.equal(windows.batch(5, 10)[0], whole[0][5:15])  # going back is as good


def test_order_depends_on_seed_and_epoch():
    orders = [TokenWindows(TOKENS, 10, seed).order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert TokenWindows(TOKENS, 10, seed=0).order(0).tolist() == orders[0]
    assert TokenWindows(TOKENS, 10, seed=0, shuffle=False).order(5).tolist() == list(range(100))


def test_order_is_fixed_for_all_time():
    """NumPy promises RandomState's stream, so a run resumed years later must meet these very windows."""
    assert TokenWindows(TOKENS[:11], 1, seed=7).order(3).tolist() == [7, 4, 1, 6, 8, 3, 5, 2, 9, 0]


def test_memory_mapped_tokens_give_the_same_examples(tmp_path):
    np.save(tmp_path / "tokens.npy", TOKENS)
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    for a, b in zip(TokenWindows(mapped, 10).batch(95, 20), TokenWindows(TOKENS, 10).batch(95, 20)):
        assert torch.equal(a, b)


def test_windows_refuse_bad_arguments():
    with pytest.raises(DataError, match=r"10 tokens cannot fill one window of context 10 \+ 1: .*at most 9"):
        TokenWindows(TOKENS[:10], 10)
    for tokens in (TOKENS.astype(float), TOKENS[:1000].reshape(10, 100)):
        with pytest.raises(ValueError, match=rf"integers of shape \(N,\), got {tokens.dtype}"):
            TokenWindows(tokens, 10)
    for context, seed in ((0, 0), (10, -1), (10, 2**32)):
        with pytest.raises(ValueError, match=f"got {context} and {seed}"):
            TokenWindows(TOKENS, context, seed)
    for start, count in ((-1, 5), (0, 0)):
        with pytest.raises(ValueError, match=f"got {start} and {count}"):
            TokenWindows(TOKENS, 10).batch(start, count)


# --- the demo -------------------------------------------------------------------------------

def run_demo(capsys, **changes) -> str:
    data.main(**{"data": None, "context": 16, "held_out": 0.05, "seed": 0, "out": None, **changes})
    return capsys.readouterr().out


def test_demo_reaches_its_verdict_and_every_flag_changes_something(tmp_path, capsys, monkeypatch):
    for i in range(40):
        write(tmp_path / f"{i}.txt", f"Text number {i}. ".encode() * (i + 1))
    pattern, out = str(tmp_path / "*.txt"), tmp_path / "tokens.npy"
    first = run_demo(capsys, data=pattern)
    assert "seen exactly once: True (expected True; " in first and "<|endoftext|>" in first and "on both sides: 0 (expected 0)" in first
    assert "windows x 32 =" in run_demo(capsys, data=pattern, context=32)
    assert run_demo(capsys, data=pattern, held_out=0.5) != first
    assert run_demo(capsys, data=pattern, seed=1) != first == run_demo(capsys, data=pattern, seed=0)
    assert run_demo(capsys, data=pattern, out=str(out)) == first and np.load(out).dtype == np.uint16
    monkeypatch.setattr(data, "default_documents", lambda: ["a default document"])
    assert "a default document" in run_demo(capsys, context=4)
    monkeypatch.setattr(TokenWindows, "order", lambda self, epoch: np.arange(len(self)) // 2)  # each twice
    assert "seen exactly once: False (expected True; " in run_demo(capsys, data=pattern)


@pytest.mark.parametrize("arguments, message", [
    (["--data", "none/*.txt"], "none/*.txt: no such file"),
    (["--data", "data.py"], "data.py: unknown suffix"),
    (["--data", "a.txt", "--held_out", "2"], "--held_out in (0, 1) and --seed in 0 .. 2^32 - 1, got 128, 2.0 and 0"),
    (["--data", "a.txt", "--seed", "-1"], "--seed in 0 .. 2^32 - 1, got 128, 0.05 and -1"),
    (["--data", "none.txt", "--context", "0"], "--context must be at least 1, --held_out in"),
    (["--data", "a.txt", "--context", "100"], "cannot fill one window of context 100 + 1"),
    (["--data", "a.txt", "--out", "none/tokens.npy"], "none/tokens.npy: cannot be written (No such file"),
    (["--data", "a.txt", "--context", "1", "--out", "sub"], "sub: cannot be written (Is a directory)"),
    (["--data="], "'': no such file"),
    (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
    (["--nope"], "unrecognized arguments: --nope"),
])
def test_bad_input_of_the_program_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    write(tmp_path / "a.txt", b"one\ntwo\n")
    write(tmp_path / "data.py", b"")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(data.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and error.startswith("data.py: ") and message in error
    assert not list(tmp_path.glob("*.tmp"))


def test_program_stops_without_a_traceback_on_ctrl_c(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(sysconfig, "get_path", interrupted)
    monkeypatch.setattr(sys, "argv", ["data.py"])
    with pytest.raises(BaseException) as exit:
        runpy.run_path(data.__file__, run_name="__main__")
    assert isinstance(exit.value, SystemExit) and exit.value.code == 130 and capsys.readouterr().err == ""
