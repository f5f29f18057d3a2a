"""The whole pipeline on a made-up crawl whose faults are known: counts, ranks, kills, damage, settings."""

import gzip
import itertools
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import run_ranks

import crawl
import curate
import data
import deduplication
import packing
import quality
import tokenizer
import train
from config import TrainConfig, derive
from crawl import make_crawl
from processes import ProcessError, World
from shards import open_shard

N_FILES, N_PAGES = 5, 20


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A crawl, what is in it, and its shards by one rank at a stretch."""
    folder = tmp_path_factory.mktemp("made")
    pattern, counts = make_crawl(folder / "crawl", N_FILES, N_PAGES, seed=3)
    return pattern, counts, folder / "out", curate.curate(pattern, folder / "out", World())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the work of an unfinished run."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def kept(folder: Path) -> list[str]:
    return list(data.read_documents(f"{folder}/*.jsonl.gz"))


# --- what comes out ---------------------------------------------------------------------------

def test_report_counts_exactly_what_was_planted(made):
    _, counts, out, report = made
    assert report["documents"]["read"]["documents"] == sum(counts.values()) == N_FILES * N_PAGES
    rows = {rule: row["documents"] for rule, row in report["rules"].items() if row["documents"]}
    assert rows.pop("copied document") == counts["copy"] > 5
    assert rows.pop("near-duplicate") == counts["near"] > 5
    assert sum(rows.values()) == counts["bad"] > 5 and rows.keys() <= {
        "curly bracket", "lorem ipsum", "three sentences", "50 to 100,000 words"}
    assert report["documents"]["kept"]["documents"] == counts["new"] == len(kept(out))
    assert report["documents"]["kept"]["tokens"] == sum(-(-len(text.encode()) // 4) for text in kept(out))
    assert report["places_lost"] == report["bytes_lost"] == 0 and report["auc"] is None
    assert report == json.loads((out / curate.REPORT).read_text())
    assert [row["examples"] != [] for rule, row in report["rules"].items() if not rule.startswith("masked")]


def test_shards_hold_each_line_and_span_once_and_no_near_pair(made):
    _, _, out, report = made
    texts = kept(out)
    lines = [line for text in texts for line in text.split("\n")]
    assert len(set(lines)) == len(lines) and not any(map(set(lines).__contains__, crawl.BOILERPLATE[:2]))
    spans = [tuple(s[i:i + 3]) for s in ([p for line in text.split("\n") for p in deduplication.sentences(line)] for text in texts)
             for i in range(len(s) - 2)]
    assert len(set(spans)) == len(spans)
    assert all(quality.clean(text)[0] == text for text in texts)
    assert not any(deduplication.jaccard(a, b) > 0.7 for a, b in itertools.combinations(texts[:40], 2))
    assert sum("@" in text for text in texts) == 0 and sum("<email>" in text for text in texts) == 1  # then the line is a copy


def test_shards_are_read_by_data_and_say_their_source(made):
    pattern, _, out, report = made
    files = data.find_files(pattern)
    names = sorted(path.name for path in out.glob("*.jsonl.gz"))
    assert names == [f"{i:06}-{i:05}.jsonl.gz" for i in range(N_FILES)] and report["shards"] == N_FILES
    for file, name in zip(files, names):
        with gzip.open(out / name) as lines:
            records = [json.loads(line) for line in lines]
        assert {tuple(record) for record in records} == {("text", "source")} and {r["source"] for r in records} == {file}
    assert sorted(os.listdir(out)) == [curate.REPORT, *names]  # nothing of the work is left


def test_pipeline_matches_its_parts_in_memory(made):
    """The same by plain lists and dictionaries, without files, buckets or places."""
    pattern, _, out, _ = made
    texts = [text for page in data.read_documents(pattern) if (text := quality.clean(page)[0])]
    minhash = deduplication.MinHash()
    copies = deduplication.near_duplicates(np.stack([minhash.signature(text) for text in texts]))
    unique = [text for i, text in enumerate(texts) if i not in copies]
    seen, expected = set(), []
    for text in unique:
        places = [i for i, value in enumerate(deduplication.units(text).tolist()) if value in seen or seen.add(value)]
        text = deduplication.without_units(text, places)[0]
        expected += [text] if quality.has_three_sentences(text) else []
    assert kept(out) == expected


# --- ranks and kills --------------------------------------------------------------------------

@pytest.mark.parametrize("P", [2, 3, 7])
def test_shards_are_the_same_at_any_number_of_ranks(made, tmp_path, P):
    pattern, _, out, report = made
    reports = run_ranks(P, lambda rank: curate.curate(pattern, tmp_path / "out", World(rank, P, rank, P)))
    assert all(r == report for r in reports) and contents(tmp_path / "out") == contents(out)


def test_shards_are_the_same_in_any_number_of_buckets_and_runs(made, tmp_path, monkeypatch):
    pattern, _, out, _ = made
    monkeypatch.setattr(curate, "BUCKET", 300)
    monkeypatch.setattr(deduplication, "RUN", 37)
    curate.curate(pattern, tmp_path / "out", World())
    assert contents(tmp_path / "out") == contents(out)


class Killed(BaseException):
    """Not an Exception: nothing in the pipeline catches it, as nothing catches SIGKILL."""


def test_run_that_dies_before_any_file_is_whole_goes_on_to_the_same(made, tmp_path, monkeypatch):
    """Dies at each of its files in turn, with the file half-written, then goes on, at another number of ranks."""
    pattern, _, out, _ = made
    whole_file, count, deaths = curate.whole_file, itertools.count(), 0

    def deadly(path):
        if next(count) == limit:
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / f"{path.name}.0.tmp").write_bytes(b"half")
            raise Killed
        return whole_file(path)
    monkeypatch.setattr(curate, "whole_file", deadly)
    finished = False
    while not finished:
        count, limit = itertools.count(), 11  # dies at its twelfth file, so each run gets a little further
        try:
            curate.curate(pattern, tmp_path / "out", World())
            finished = True
        except Killed:
            deaths += 1
            assert not (tmp_path / "out" / curate.REPORT).exists()
            names = [path.name for path in (tmp_path / "out").glob("*.jsonl.gz")]
            assert all((tmp_path / "out" / name).read_bytes() == (out / name).read_bytes() for name in names)  # whole or not there
    assert deaths >= 4 and contents(tmp_path / "out") == contents(out)


def test_killed_process_goes_on_to_the_same(made, tmp_path):
    pattern, _, out, report = made
    kills = 0
    for mark in ("clean/000001.json", "unique/000001.json", "write/000002.json"):
        if not (child := os.fork()):
            curate.curate(pattern, tmp_path / "out", World())
            os._exit(0)
        while not (ended := os.waitpid(child, os.WNOHANG)[0]) and not (tmp_path / "out" / ".work" / mark).exists():
            time.sleep(0.0005)
        if not ended:
            os.kill(child, signal.SIGKILL)
            kills += os.waitpid(child, 0)[1] == signal.SIGKILL
    assert kills >= 2  # a slow machine may look too late
    reports = run_ranks(2, lambda rank: curate.curate(pattern, tmp_path / "out", World(rank, 2, rank, 2)))
    assert contents(tmp_path / "out") == contents(out) and reports[0] == reports[1] == report


def test_finished_run_is_not_done_again(made, tmp_path):
    pattern, _, out, report = made
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / ".work").mkdir()  # killed while it was tidying up
    assert curate.curate(pattern, out, World()) == report
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    shutil.copytree(out, tmp_path / "less")
    next((tmp_path / "less").glob("*.gz")).unlink()
    with pytest.raises(ProcessError, match=f"whose {N_FILES} shards are now {N_FILES - 1}: delete the folder"):
        curate.curate(pattern, tmp_path / "less", World())


# --- damage -----------------------------------------------------------------------------------

def test_damage_loses_its_documents_and_is_counted(made, tmp_path):
    pattern, counts, out, clean_report = made
    shutil.copytree(Path(pattern).parent, tmp_path / "crawl")
    files = sorted((tmp_path / "crawl").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-700])  # truncated
    content = bytearray(files[1].read_bytes())
    content[3000:3004] = b"ruin"
    files[1].write_bytes(bytes(content))
    files[2].write_bytes(b"<html>not gzip</html>")
    files[3].unlink()
    os.symlink("nowhere", files[3])
    (tmp_path / "crawl" / "huge.jsonl").write_bytes(b'{"text": "' + b"x" * (curate.LONGEST + 1) + b'"}\n{"text": "a\xe9"}\n{}\n')
    report = curate.curate(f"{tmp_path}/crawl/*", tmp_path / "out", World())
    text = "\n".join(report["lost"])
    for name, what in ((files[0].name, "it ends too early"), (files[1].name, "damaged gzip"), (files[2].name, "not gzip"),
                       (files[3].name, "cannot be read"), ("huge.jsonl", "longer than 16,777,216 bytes"), ("huge.jsonl", "0xe9 is not UTF-8"),
                       ("huge.jsonl", "want a JSON object")):
        assert any(name in line and what in line for line in report["lost"]), (name, what, text)
    assert all("byte" in line or "gzip" in line or "cannot be read" in line for line in report["lost"])
    assert report["places_lost"] == len(report["lost"]) >= 7 and report["bytes_lost"] > curate.LONGEST
    read = report["documents"]["read"]["documents"]
    assert 3 * N_PAGES - 4 <= read < 3 * N_PAGES and len(kept(tmp_path / "out")) == report["documents"]["kept"]["documents"] > 20
    assert "lost to damage" in curate.show(report)


def test_crawl_of_which_nothing_is_left_ends_well(tmp_path):
    (tmp_path / "a.txt").write_text("menu")
    report = curate.curate(f"{tmp_path}/a.txt", tmp_path / "out", World())
    assert report["shards"] == 0 and "kept" not in report["documents"] and "0 documents, 0 tokens kept of 1, 1" in curate.show(report)


def test_full_disk_is_one_line_and_can_go_on(made, tmp_path, monkeypatch):
    import resource
    pattern, _, out, _ = made
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, limits[1]))  # no file may grow further
    try:
        with pytest.raises(ProcessError, match="File too large"):
            curate.curate(pattern, tmp_path / "out", World())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    curate.curate(pattern, tmp_path / "out", World())
    assert contents(tmp_path / "out") == contents(out)


# --- options ----------------------------------------------------------------------------------

def test_every_option_changes_something(made, tmp_path):
    pattern, _, out, report = made
    texts = kept(out)
    words = Counter(word for text in texts for word in set(re.findall(r"\w+", text.lower())))
    (tmp_path / "bad.txt").write_text(next(word for word, n in words.items() if n == 3) + "\n")
    questions = [" ".join(text.split("\n")[0].split()[2:18]) for text in texts[::2]]
    (tmp_path / "tests.jsonl").write_text("".join(json.dumps({"text": f"Question: {q}"}) + "\n" for q in questions))
    (tmp_path / "good.jsonl").write_text("".join(json.dumps({"text": text.replace(" of ", " wonderful ")}) + "\n" for text in texts))
    tokenizer.save(encoding := tokenizer.train(texts[:5], 270), tmp_path / "a.tiktoken")
    found = curate.curate(pattern, tmp_path / "most", World(), bad_words=str(tmp_path / "bad.txt"), threshold=0.999,
                          decontaminate=str(tmp_path / "tests.jsonl"), tokenizer=str(tmp_path / "a.tiktoken"))
    assert found["rules"]["bad words"]["documents"] >= 1 and "bad words" not in report["rules"]
    assert found["rules"]["held-out text"]["documents"] >= 1 and "held-out text" not in report["rules"]
    held_out = deduplication.HeldOut(questions)
    assert not any(map(held_out.overlap, kept(tmp_path / "most"))) and any(map(held_out.overlap, texts))
    # At 0.999 only copies whose changed words were on lines that went.
    assert found["rules"].get("near-duplicate", {"documents": 0})["documents"] < report["rules"]["near-duplicate"]["documents"]
    tokens = sum(len(tokenizer.encode(encoding, page)) for page in data.read_documents(pattern))
    assert found["documents"]["read"] == {"documents": N_FILES * N_PAGES, "tokens": tokens}
    assert "tokens: counted by" in curate.show(found) and "tokens: estimated, 4 bytes" in curate.show(report)
    trusted = curate.curate(pattern, tmp_path / "trusted", World(), trusted=str(tmp_path / "good.jsonl"))
    assert trusted["auc"] > 0.9 and trusted["rules"]["quality classifier"]["documents"] > 1
    again = run_ranks(2, lambda rank: curate.curate(pattern, tmp_path / "again", World(rank, 2, rank, 2), trusted=str(tmp_path / "good.jsonl")))
    assert again[0] == trusted and contents(tmp_path / "again") == contents(tmp_path / "trusted")


def test_folder_with_anything_else_is_refused(made, tmp_path):
    pattern, _, out, _ = made
    with pytest.raises(ProcessError, match="holds a run of other files or settings: give another folder"):
        curate.curate(pattern, out, World(), threshold=0.7)
    (tmp_path / "out").mkdir()
    for name in ("precious.txt", "precious.tmp"):
        (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ProcessError, match="is or holds other files"):
        curate.curate(pattern, tmp_path / "out", World())
    assert sorted(os.listdir(tmp_path / "out")) == ["precious.tmp", "precious.txt"]
    for content in ("{}", "[]", "no JSON"):  # a file of that name that is not ours
        (tmp_path / "foreign").mkdir(exist_ok=True)
        (tmp_path / "foreign" / curate.REPORT).write_text(content)
        with pytest.raises(ProcessError, match="other files or settings"):
            curate.curate(pattern, tmp_path / "foreign", World())
    shutil.copytree(Path(pattern).parent, tmp_path / "crawl")
    mine = f"{tmp_path}/crawl/*.gz"
    curate.curate(mine, tmp_path / "mine", World())
    with pytest.raises(ProcessError, match="is or holds other files"):
        curate.curate(pattern, data.__file__, World())
    data_file = sorted((tmp_path / "crawl").iterdir())[0]
    data_file.write_bytes(data_file.read_bytes() + data_file.read_bytes())  # the crawl has changed since
    with pytest.raises(ProcessError, match="other files or settings"):
        curate.curate(mine, tmp_path / "mine", World())


def test_failure_on_one_rank_is_known_to_all(made, tmp_path):
    pattern = made[0]

    def one(rank):
        options = {"bad_words": str(tmp_path / "none.txt")} if rank == 1 else {}
        with pytest.raises(ProcessError, match="none.txt: cannot be read"):
            curate.curate(pattern, tmp_path / "out", World(rank, 2, rank, 2), **options)
        return True
    assert run_ranks(2, one) == [True, True]


# --- the parts on the disk --------------------------------------------------------------------

def test_hash_table_finds_what_brute_force_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(deduplication, "RUN", 50)
    random_ = np.random.RandomState(0)
    for n in (0, 1, 50, 51, 333):
        hashes, places = random_.randint(0, 2**63, n).astype(np.uint64) * np.uint64(2), np.arange(n, dtype=np.uint64)
        with curate.hash_table(tmp_path / f"{n}") as table:
            for part in np.array_split(np.arange(n), 7):
                table.add(hashes[part], places[part])
        for low, high in ((0, 2**64 - 1), (2**62, 2**63), (5, 5)):
            found = deduplication.hashes_between(tmp_path / f"{n}", low, high)
            expected = {(h, p) for h, p in zip(hashes.tolist(), places.tolist()) if low <= h <= high}
            assert set(map(tuple, found.T.tolist())) == expected and found.shape == (2, len(expected))


def test_memory_is_flat_in_the_number_of_files_and_in_their_sizes(tmp_path, monkeypatch):
    """Hashes, signatures and copies of one file, and of two that are twice as large; half of the documents are copies or near-copies: the peak of
    each pass stays where it is, but for the declared 8 bytes a document (and their temporary copies) in `cluster` and `dropped`."""
    monkeypatch.setattr(deduplication, "RUN", 2**11)
    monkeypatch.setattr(curate, "BUCKET", 2**10)
    monkeypatch.setattr(curate, "COMPARED", 2**6)
    monkeypatch.setattr(os, "fsync", lambda file: None)  # for speed
    peaks = []
    for size, n_files, turn in ((1, 1, "to warm up"), (1, 1, "small"), (4, 2, "large")):
        (tmp_path / "a.txt").write_text("text")
        run = curate.Curation([str(tmp_path / "a.txt")] * n_files, tmp_path / turn, threshold=0.95)  # few bands, for speed
        random_, n = np.random.RandomState(0), 1200 * size // n_files
        first = random_.randint(0, 2**32, (n // 2, 128), dtype=np.uint32)
        for i in range(n_files):
            signatures = np.concatenate([first, first])[random_.permutation(n)]
            places = np.arange(n, dtype=np.uint64) + np.uint64(i * curate.FILE)
            with curate.whole_file(run.path("clean", i, ".minhash")) as file:
                signatures.tofile(file)
            for name, table in (("documents", signatures[:, :2].copy().view(np.uint64)), ("bands", run.dedup.band_hashes(signatures, *run.bands))):
                with curate.hash_table(run.path(name, i)) as hashes:
                    for a in range(0, n, 256):
                        hashes.add(table[a:a + 256].ravel(), places[a:a + 256].repeat(table.shape[1]))
            tally = curate.Tally(run.files[i])
            for j in range(50):
                tally.lose("x" * 100, 1)
            for name in ("clean", "unique", "write"):
                tally.save(run.path(name, i, ".json"))
        run.out.mkdir(exist_ok=True)
        peak = {}
        for name, count, do in (("copied", run.n_buckets("documents"), lambda b: run.copies("documents", "copied", b)),
                                ("pairs", run.n_buckets("bands"), run.near), ("cluster", 1, lambda _: run.cluster()),
                                ("dropped", n_files, lambda i: [run.dropped(name, i) for name in ("copied", "near")])):
            for b in range(count):
                if b % 10 == 0:  # for speed
                    tracemalloc.start()
                do(b)
                if b % 10 == 0:
                    peak[name] = max(peak.get(name, 0), tracemalloc.get_traced_memory()[1])
                    tracemalloc.stop()
        near = np.load(run.path("near", 0, ".npy"))
        assert len(near) == n_files * n - n // 2 and run.n_buckets("bands") > 5 * size  # every document but the first of each
        assert np.array_equal(np.sort(np.concatenate([run.dropped("copied", i) for i in range(n_files)])), np.sort(near % curate.FILE))
        peaks.append(peak)
    more = 3 * 1200  # documents
    for name, bytes_each in (("copied", 0), ("pairs", 0), ("cluster", 8 * 6), ("dropped", 8 * 3)):
        assert peaks[2][name] < 1.3 * peaks[1][name] + 20_000 + bytes_each * more, (name, peaks)


def test_report_is_summed_in_the_memory_of_one_file():
    row = {"documents": 1, "pieces": 1, "tokens": 5, "examples": ["e" * 160] * 3}
    one = {"rules": dict.fromkeys(curate.RULES, row), "counts": {"read": [2, 9]}, "lost": ["x" * 200] * 20, "places_lost": 30, "bytes_lost": 7}
    peaks = []
    for n in (10, 100):
        tracemalloc.start()
        total = curate.total_of(json.loads(json.dumps(one)) for _ in range(n))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total["documents"]["read"] == {"documents": 2 * n, "tokens": 9 * n} and total["places_lost"] == 30 * n
        assert total["rules"]["bullets"]["tokens"] == 5 * n and len(total["lost"]) == 100
    assert peaks[1] < 1.1 * peaks[0]


def test_whole_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "sub" / "a"
    with pytest.raises(KeyError):
        with curate.whole_file(path) as file:
            file.write(b"half")
            raise KeyError
    assert os.listdir(tmp_path / "sub") == []
    with curate.whole_file(path) as file:
        file.write(b"all")
        assert not path.exists()
    assert path.read_bytes() == b"all" and os.listdir(tmp_path / "sub") == ["a"]


def test_json_lines_are_the_same_at_any_time(tmp_path):
    for name in ("a", "b"):
        with curate.json_lines(tmp_path / name, 6) as write:
            for i in range(100):
                write({"text": f"é{i}"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert [r["text"] for r in curate.read_json_lines(tmp_path / "a")] == [f"é{i}" for i in range(100)]


# --- the made-up crawl and the programs -------------------------------------------------------

def test_crawl_is_fixed_by_its_seed(tmp_path):
    for name, seed, zipped in (("a", 1, True), ("b", 1, False), ("c", 2, True)):
        make_crawl(tmp_path / name, 2, 10, seed, zipped)
    texts = [list(data.read_documents(f"{tmp_path}/{name}/*")) for name in "abc"]
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) == 20


def run(monkeypatch, capsys, file, *arguments: str) -> tuple[str, str, int]:
    monkeypatch.setattr(sys, "argv", [os.path.basename(file), *arguments])
    code = 0
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as exit:
        code = exit.code or 0
    found = capsys.readouterr()
    return found.out, found.err, code


def test_programs_reach_their_verdicts(made, tmp_path, monkeypatch, capsys):
    found = run(monkeypatch, capsys, crawl.__file__, "--out", f"{tmp_path}/crawl", "--files", "2", "--pages", "5", "--seed", "1")
    assert "read again: 10 pages in 2 files: True (expected True)" in found[0]
    for file in (curate.__file__, data.__file__):
        out = tmp_path / Path(file).stem
        first = run(monkeypatch, capsys, file, f"{tmp_path}/crawl/*.gz", "--out", str(out))
        assert first[2] == 0 and " kept of 10, " in first[0].splitlines()[-1]
        explained = run(monkeypatch, capsys, file, f"{tmp_path}/crawl/*.gz", "--out", str(out), "--explain")[0]
        assert "Home | News | Contact" in explained and "Home | News | Contact" not in first[0]
    for arguments, message in (([f"{tmp_path}/crawl/*.gz"], "say where the shards shall go: --out"), (["none.txt", "--out", "x"], "no such file"),
                               ([f"{tmp_path}/crawl/*.gz", "--out", str(tmp_path / "data"), "--threshold", "3"], "threshold in (0, 1]"),
                               (["a.txt", "--nope"], "unrecognized arguments: --nope")):
        _, error, code = run(monkeypatch, capsys, data.__file__, *arguments)
        assert code == 2 and error.startswith("data.py: ") and error.count("\n") == 1 and message in error
    for flags in (["--threshold", "0.5"], ["--out", "x"], ["--explain"], ["--bad_words", "x"]):
        _, error, code = run(monkeypatch, capsys, curate.__file__, *flags)
        assert code == 2 and error.startswith("curate.py: without a crawl the demo takes no flag") and error.count("\n") == 1
    _, error, code = run(monkeypatch, capsys, crawl.__file__, "--files", "0")
    assert code == 2 and error.startswith("crawl.py: --files and --pages") and error.count("\n") == 1


def test_shards_become_tokens_and_a_model(made, tmp_path, capsys):
    """The chain: what the curation leaves, all of its folder, is packed and trained on."""
    out = made[2]
    packing.main(f"{out}/*", context=64, held_out=0.2, seed=0, out=str(tmp_path / "tokens"))
    assert "every token a target exactly once: True" in capsys.readouterr().out
    shards = [open_shard(tmp_path / "tokens" / f"{side}.tokens") for side in ("train", "validation")]
    assert sorted(bytes(map(int, d[:-1])).decode() for shard in shards for d in shard) == sorted(kept(out))
    config = derive(TrainConfig(data=f"{out}/*", out=str(tmp_path / "model"), context=16, vocab_size=260, device="cpu"), 1, "cpu", False)[0]
    corpus = train.prepare(config, World(), None)
    texts = tokenizer.decode_bytes(corpus.encoding, np.concatenate([corpus.train.tokens, corpus.validation.tokens])).split(b"<|endoftext|>")
    assert sorted(text.decode() for text in texts if text) == sorted(kept(out))


def test_random_garbage_files_never_stop_a_run(tmp_path):
    random_ = random.Random(0)
    for i, suffix in enumerate((".warc.wet.gz", ".jsonl.gz", ".jsonl", ".txt", ".warc.wet") * 3):
        (tmp_path / f"{i}{suffix}").write_bytes((b"\x1f\x8b\x08" if "gz" in suffix else b"") + random_.randbytes(5000))
    report = curate.curate(f"{tmp_path}/*.*", tmp_path / "out", World())
    assert report["places_lost"] >= 15 and report["shards"] == 0
