"""Curation: a crawl in, clean documents out, each once.   C4 (Raffel et al. 2020); Gopher (Rae et al. 2021); GPT-3
(Brown et al. 2020), appendix A; the parts are in data.py (reading), quality.py, quality_classifier.py and
deduplication.py.

Idea      Passes over files, each file by one rank. What must be compared over the whole crawl (documents, bands of
          their signatures, lines) is compared by hashes, which are cut in buckets by their value: a bucket fits in
          memory however large the crawl is. Every pass writes its files beside and renames them when whole: a file
          that is there is done. So a kill costs at most the files being written, and the number of ranks, which may
          change in between, decides nothing but the time: who is first is decided by (file, place in the file).
Formula   clean    file -> rules of C4 and Gopher, masks             -> documents; their hashes, signatures, bands
          copied   bucket of documents' hashes -> all places but the first of each
          pairs    bucket of band hashes -> pairs that met and are similar; then clusters of pairs
          unique   file -> without copies, near-copies, poor quality -> documents; hashes of lines and spans
          repeated bucket of these hashes -> all places but the first of each
          write    file -> without repeated lines and spans, held-out text -> out/000000-name.jsonl.gz, one
                   {"text", "source"} a line, which data.py and train.py read; at last out/.report.json
Shapes    a place is file number * 2^40 + number in the file, in int64 and uint64; hashes are uint64
Also      memory: a document, a bucket of hashes and 8 bytes for each copy in a file; on one rank, while near-duplicates
          are linked, some times 8 bytes for each document of the crawl. Nothing else grows with the crawl.
Omits     mixtures of sources (mixture.py); tokens (packing.py --data 'shards/*.jsonl.gz'); ranks that share no folder.
Run       python curate.py                                       made up; ends with "same shards after a kill: True ..."
          python data.py 'crawl/*.warc.wet.gz' --out shards/     your crawl; ends with "... kept of ..."
Test      pytest tests/test_curate.py
"""

import argparse
import contextlib
import gzip
import hashlib
import heapq
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

LONGEST = 2**24  # bytes of a document; a longer "line" of a crawl is damage or a dump
FILE = 2**40  # a place: file number * FILE + number in the file
BUCKET = 2**19  # hashes that are compared together, about
COMPARED = 4096  # pairs of signatures that are compared together
SAMPLE = 4000  # documents of each class for the classifier
REPORT = ".report.json"  # out of sight of 'shards/*', which are text
RULES = ("curly bracket", "lorem ipsum", "bad words", "citation markers", "terminal punctuation", "five words",
         "javascript", "policy", "three sentences", "50 to 100,000 words", "mean word length", "symbols", "bullets",
         "ellipses", "alphabetic words", "stop words", "copied lines", "copied n-grams", "masked email", "masked ip",
         "masked phone", "copied document", "near-duplicate", "quality classifier", "repeated line",
         "repeated three sentences", "too short without them", "held-out text")

THRESHOLD = 0.8  # from which similarity on documents are near-duplicates


# --- 1. files that are whole or not there ------------------------------------------------------

@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[io.BufferedWriter]:
    """A file to write to, which appears at the path when the block ends, whole and on the disk; or not at all."""
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise ValueError(f"{error.filename or path}: {error.strerror or error}: check the folder, its permissions and "
                         "the room on the disk, then repeat the command, which goes on from there") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


@contextlib.contextmanager
def json_lines(path: Path, level: int) -> Iterator[Callable[[dict], None]]:
    """A function that writes a record as one line of a .jsonl.gz, which is `whole` and the same at any time."""
    with whole_file(path) as file, gzip.GzipFile("", "wb", level, file, mtime=0) as packed, \
            io.BufferedWriter(packed, 2**18) as buffered:
        yield lambda record: buffered.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def read_json_lines(path: Path) -> Iterator[dict]:
    """The records that `json_lines` wrote."""
    with gzip.open(path, "rb") as file:
        yield from map(json.loads, file)


@contextlib.contextmanager
def hash_table(path: Path) -> Iterator["deduplication.HashWriter"]:
    """Hashes and places to be added to, in path.hashes and path.places, both `whole`."""
    from deduplication import HashWriter

    with whole_file(path.with_suffix(".hashes")) as hashes, whole_file(path.with_suffix(".places")) as places:
        yield (table := HashWriter(hashes, places))
        table.flush()


# --- 2. what is counted ------------------------------------------------------------------------

def estimated_tokens(text: str) -> int:
    """About how many tokens a text is: GPT-2's and Llama's vocabularies make one of about 4 bytes of English."""
    return -(-len(text.encode()) // 4)


class Tally:
    """What happened to the documents of one file. n_tokens: counts the tokens of a text."""

    def __init__(self, source: str, n_tokens: Callable[[str], int] = estimated_tokens):
        self.source, self.rules, self.counts = source, {}, {}
        self.lost, self.places_lost, self.bytes_lost = [], 0, 0
        self._n_tokens = n_tokens

    def count(self, name: str, text: str) -> None:
        """One document more of this name."""
        n_documents, n_tokens = self.counts.get(name, (0, 0))
        self.counts[name] = n_documents + 1, n_tokens + self._n_tokens(text)

    def remove(self, rule: str, text: str, document: bool) -> None:
        """A rule removed a document or a piece of one."""
        row = self.rules.setdefault(rule, {"documents": 0, "pieces": 0, "tokens": 0, "examples": []})
        row["documents" if document else "pieces"] += 1
        row["tokens"] += self._n_tokens(text)
        example = f"{self.source}: {text[:160]}"
        if text and len(row["examples"]) < 3 and example not in row["examples"]:
            row["examples"].append(example)

    def lose(self, message: str, n_bytes: int) -> None:
        """A damaged place: the first twenty of a file are remembered."""
        self.places_lost, self.bytes_lost = self.places_lost + 1, self.bytes_lost + n_bytes
        if len(self.lost) < 20:
            self.lost.append(message)

    def save(self, path: Path) -> None:
        """As JSON; written last, it says that the file is done."""
        with whole_file(path) as file:
            file.write(json.dumps({k: value for k, value in vars(self).items() if k[0] != "_"}).encode())


def total_of(tallies: Iterable[dict]) -> dict:
    """The sum of tallies, in their order; of the examples and messages, the first."""
    total = {"documents": {}, "rules": {}, "places_lost": 0, "bytes_lost": 0, "lost": []}
    for tally in tallies:
        for name, row in tally["counts"].items():
            old = total["documents"].setdefault(name, {"documents": 0, "tokens": 0})
            old["documents"], old["tokens"] = old["documents"] + row[0], old["tokens"] + row[1]
        for rule, row in tally["rules"].items():
            old = total["rules"].setdefault(rule, {"documents": 0, "pieces": 0, "tokens": 0, "examples": []})
            for name in ("documents", "pieces", "tokens"):
                old[name] += row[name]
            old["examples"] = (old["examples"] + row["examples"])[:3]
        for name in ("places_lost", "bytes_lost", "lost"):
            total[name] += tally[name]
        del total["lost"][100:]
    total["rules"] = {rule: total["rules"][rule] for rule in RULES if rule in total["rules"]}
    return total


def show(report: dict, examples: bool = False) -> str:
    """The report as a table."""
    read, kept = (report["documents"].get(name, {"documents": 0, "tokens": 0}) for name in ("read", "kept"))
    lines = [f"{'removed by':26} {'documents':>11} {'pieces':>11} {'tokens':>15}"]
    for rule, row in report["rules"].items():
        lines.append(f"{rule:26} {row['documents']:11,} {row['pieces']:11,} {row['tokens']:15,}")
        lines += [f"    {example!r}" for example in row["examples"]] if examples else []
    if report["auc"] is not None:
        lines.append(f"quality classifier: held-out ROC AUC {report['auc']:.3f} (0.5 is guessing)")
    lines.append(f"lost to damage: {report['places_lost']:,} places, {report['bytes_lost']:,} bytes")
    lines += [f"    {message}" for message in report["lost"][:None if examples else 5]]
    lines.append(f"tokens: counted by {report['tokenizer']}" if report["tokenizer"] else
                 "tokens: estimated, 4 bytes of UTF-8 are one; --tokenizer counts them")
    lines.append(f"{kept['documents']:,} documents, {kept['tokens']:,} tokens kept of {read['documents']:,}, "
                 f"{read['tokens']:,}, in {report['shards']:,} shards")
    return "\n".join(lines)


# --- 3. the passes -----------------------------------------------------------------------------

class Curation:
    """One run: its files, its settings, and a method for each pass's item, which is done when its file is there."""

    def __init__(self, files: list[str], out: str | os.PathLike, bad_words: str | None = None,
                 trusted: str | None = None, decontaminate: str | None = None, threshold: float = THRESHOLD,
                 tokenizer: str | None = None):
        import data
        import deduplication
        import quality
        import quality_classifier
        import tokenizer as tokenizers

        self.files, self.out, self.work, self.trusted = files, Path(out), Path(out) / ".work", trusted
        self.data, self.dedup, self.quality, self.threshold = data, deduplication, quality, threshold
        self.quality_classifier = quality_classifier
        self.bad_words = quality.BadWords.from_file(bad_words) if bad_words else None
        self.held_out = deduplication.HeldOut(data.read_documents(decontaminate)) if decontaminate else None
        self.tokenizer, self.n_tokens, self.hasher = tokenizer, estimated_tokens, deduplication.MinHash()
        if tokenizer:
            encoding = tokenizers.load(tokenizer)
            self.n_tokens = lambda text: len(tokenizers.encode(encoding, text))
        self.bands = deduplication.choose_bands(self.hasher.k, threshold)
        texts = (data.find_files(pattern) if pattern else [] for pattern in (trusted, decontaminate))
        groups = files, *texts, *([path] if path else [] for path in (bad_words, tokenizer))
        self.settings = {"version": 2, "threshold": threshold, "files": [[[f, *_stamp(f)] for f in g] for g in groups]}

    def path(self, name: str, i: int, suffix: str = "") -> Path:
        return self.work / name / f"{i:06}{suffix}"

    def prepare(self) -> bool:
        """Make the folder, or find what another run with the same settings has done there; whether that is all.
        Raises ValueError for a folder with anything else."""
        report, settings = self.out / REPORT, self.work / "settings.json"
        for path in (report, settings):
            if path.exists():
                found = None
                with contextlib.suppress(ValueError):  # raised by a file that is not ours
                    found = json.loads(path.read_bytes())
                if not isinstance(found, dict) or found.get("settings") != self.settings:
                    raise ValueError(f"{self.out}: holds a run of other files or settings: give another folder, "
                                     "or delete this one")
                if path == report and found["shards"] != (n := len(list(self.out.glob("*.jsonl.gz")))):
                    raise ValueError(f"{self.out}: a finished run whose {found['shards']} shards are now {n}: delete "
                                     "the folder to make them again, or give another")
                for left in (*self.out.glob("*.gz.*.tmp"), *self.work.rglob("*.tmp")):  # half-written at a kill
                    left.unlink(missing_ok=True)
                return path == report
        if self.out.exists() and (not self.out.is_dir() or set(os.listdir(self.out)) - {".work"}):
            raise ValueError(f"{self.out}: is or holds other files: give a new or an empty folder")
        with whole_file(settings) as file:
            file.write(json.dumps({"settings": self.settings}).encode())
        return False

    def clean(self, i: int) -> None:
        """Of file i: documents, and by what they are compared."""
        tally, sample, batch, number = Tally(self.files[i], self.n_tokens), [], [], 0

        def add() -> None:
            if batch:
                places = np.arange(number - len(batch), number, dtype=np.uint64) + np.uint64(i * FILE)
                documents.add(np.array([value for value, _ in batch], dtype=np.uint64), places)
                table = np.stack([signature for _, signature in batch])
                table.tofile(signatures)
                bands.add(self.dedup.band_hashes(table, *self.bands).ravel(), places.repeat(self.bands[0]))
                batch.clear()

        with contextlib.ExitStack() as stack:
            write = stack.enter_context(json_lines(self.path("clean", i, ".jsonl.gz"), 1))
            documents, bands = (stack.enter_context(hash_table(self.path(t, i))) for t in ("documents", "bands"))
            signatures = stack.enter_context(whole_file(self.path("clean", i, ".minhash")))
            for page in self.data.read_file(self.files[i], tally.lose, LONGEST):
                tally.count("read", page)
                text, removed = self.quality.clean(page, self.bad_words)
                for n, (rule, what) in enumerate(removed, 1):
                    tally.remove(rule, what, document=not text and n == len(removed))
                if not text:
                    continue
                write({"text": text})
                batch.append((self.dedup.hash64(text), self.hasher.signature(text)))
                number += 1
                if len(batch) == 256:
                    add()
                if self.trusted:  # a random sample: the documents with the smallest hashes
                    heapq.heappush(sample, (-_number(text), number, text))
                    if len(sample) > max(1, SAMPLE // len(self.files)):
                        heapq.heappop(sample)
            add()
        with json_lines(self.path("sample", i, ".jsonl.gz"), 1) as write:
            for _, _, text in sorted(sample):
                write({"text": text})
        tally.save(self.path("clean", i, ".json"))

    def n_buckets(self, name: str) -> int:
        total = sum(os.path.getsize(self.path(name, i, ".hashes")) // 8 for i in range(len(self.files)))
        return -(-total // BUCKET) or 1

    def bucket(self, name: str, b: int) -> np.ndarray:
        """(2, N): the hashes of bucket b, of all files, and their places."""
        n = self.n_buckets(name)
        low, high = b * 2**64 // n, (b + 1) * 2**64 // n - 1
        paths = (self.path(name, i) for i in range(len(self.files)))
        return np.concatenate([self.dedup.hashes_between(path, low, high) for path in paths], 1)

    def copies(self, source: str, target: str, b: int) -> None:
        """Of bucket b: the places of what also stands at an earlier one."""
        with whole_file(self.path(target, b, ".npy")) as file:
            np.save(file, self.dedup.later_copies(*self.bucket(source, b)))

    def fit(self) -> None:
        """The classifier, and how well it tells held-out documents of the two classes apart."""
        samples = (self.path("sample", i, ".jsonl.gz") for i in range(len(self.files)))
        raw = (record["text"] for path in samples for record in read_json_lines(path))
        good, raw = (heapq.nsmallest(SAMPLE, texts, _number) for texts in (self.data.read_documents(self.trusted), raw))
        if not raw:
            raise ValueError("no document of the crawl is left to fit the classifier: give more, or no --trusted")
        auc = self.quality_classifier.held_out_auc(good, raw)
        self.quality_classifier.QualityClassifier().fit(good, raw).save(self.work / "classifier.npz")
        with whole_file(self.work / "classifier.json") as file:
            file.write(json.dumps({"auc": auc}).encode())

    def dropped(self, name: str, i: int) -> np.ndarray:
        """The numbers in file i, ascending, that sorted lists of places name."""
        found = []
        for path in sorted((self.work / name).glob("*.npy")):
            places = np.load(path, mmap_mode="r")
            begin, end = np.searchsorted(places, np.array([i * FILE, (i + 1) * FILE], dtype=places.dtype))
            found.append(places[begin:end].astype(np.int64) - i * FILE)
        return np.sort(np.concatenate(found))

    def unique(self, i: int) -> None:
        """Of file i: the documents that stand nowhere earlier and are good enough, and the hashes of their units."""
        tally, n_units = Tally(self.files[i], self.n_tokens), 0
        copied, near = self.dropped("copied", i), self.dropped("near", i)
        load = self.quality_classifier.QualityClassifier.load
        classifier = load(self.work / "classifier.npz") if self.trusted else None
        with json_lines(self.path("unique", i, ".jsonl.gz"), 1) as write, hash_table(self.path("units", i)) as table:
            for number, record in enumerate(read_json_lines(self.path("clean", i, ".jsonl.gz"))):
                text = record["text"]
                if _holds(copied, number) or _holds(near, number):
                    tally.remove("copied document" if _holds(copied, number) else "near-duplicate", text, document=True)
                elif classifier and not classifier.keeps(text):
                    tally.remove("quality classifier", text, document=True)
                else:
                    units = self.dedup.units(text)
                    write({"text": text, "units": len(units)})
                    table.add(units, np.arange(n_units, n_units + len(units), dtype=np.uint64) + np.uint64(i * FILE))
                    n_units += len(units)
        tally.save(self.path("unique", i, ".json"))

    def signatures(self, places: np.ndarray) -> np.ndarray:
        """(M,) places of documents -> (M, k), read one by one: of a mapped file, all pages would soon be in memory."""
        places, where = np.unique(places, return_inverse=True)
        found = np.empty((len(places), self.hasher.k), dtype=np.uint32)
        for i, of_file in itertools.groupby(zip(places.tolist(), found), lambda pair: pair[0] // FILE):
            with open(self.path("clean", i, ".minhash"), "rb", 0) as file:
                for place, row in of_file:
                    file.seek(place % FILE * row.nbytes)
                    file.readinto(row)
        return found[where]

    def near(self, b: int) -> None:
        """Of bucket b: (M, 2) near-duplicate pairs."""
        hashes, places = self.bucket("bands", b)
        pairs = self.dedup.meeting_pairs(hashes, places.view(np.int64))
        similar = [np.empty((0, 2), dtype=np.int64)]
        for part in np.array_split(pairs, len(pairs) // COMPARED + 1):
            equal = (self.signatures(part[:, 0]) == self.signatures(part[:, 1])).mean(1) if len(part) else np.empty(0)
            similar.append(part[equal >= self.threshold])
        with whole_file(self.path("pairs", b, ".npy")) as file:
            np.save(file, np.concatenate(similar))

    def cluster(self) -> None:
        """Of every cluster of near-duplicates, all places but the first."""
        sizes = [os.path.getsize(self.path("clean", i, ".minhash")) for i in range(len(self.files))]
        starts = np.cumsum([0, *sizes]) // (4 * self.hasher.k)  # of file i, in numbers without gaps
        buckets = (np.load(path) for path in sorted((self.work / "pairs").glob("*.npy")))
        first = self.dedup.link((starts[pairs // FILE] + pairs % FILE for pairs in buckets), int(starts[-1]))
        later = np.flatnonzero(first != np.arange(len(first)))
        file_of = np.searchsorted(starts, later, side="right") - 1
        with whole_file(self.path("near", 0, ".npy")) as file:
            np.save(file, file_of * FILE + later - starts[file_of])

    def write(self, i: int) -> None:
        """Of file i: its shard; none if nothing is left."""
        tally, dropped, place, write = Tally(self.files[i], self.n_tokens), self.dropped("repeated", i), 0, None
        shard = self.out / f"{i:06}-{Path(self.files[i]).name.split('.')[0]}.jsonl.gz"
        with contextlib.ExitStack() as stack:
            for record in read_json_lines(self.path("unique", i, ".jsonl.gz")):
                begin, end = np.searchsorted(dropped, [place, place + record["units"]])
                copies, text = (dropped[begin:end] - place).tolist(), record["text"]
                place += record["units"]
                if copies:
                    text, gone = self.dedup.without_units(text, copies)
                    for kind, what in gone.items():
                        tally.remove(f"repeated {kind}", what, document=False)
                if copies and not self.quality.has_three_sentences(text):
                    tally.remove("too short without them", text, document=True)
                elif self.held_out and self.held_out.overlap(text):
                    tally.remove("held-out text", text, document=True)
                else:
                    tally.count("kept", text)
                    write = write or stack.enter_context(json_lines(shard, 6))
                    write({"text": text, "source": self.files[i]})
        tally.save(self.path("write", i, ".json"))

    def report(self) -> None:
        """The sum of what was counted."""
        paths = (self.path(name, i, ".json") for name in ("clean", "unique", "write") for i in range(len(self.files)))
        report = total_of(json.loads(path.read_bytes()) for path in paths)
        classifier = self.work / "classifier.json"
        report["auc"] = json.loads(classifier.read_text())["auc"] if classifier.exists() else None
        report["shards"] = len(list(self.out.glob("*.jsonl.gz")))
        report["tokenizer"], report["settings"] = self.tokenizer, self.settings
        with whole_file(self.out / REPORT) as file:
            file.write(json.dumps(report, indent=1).encode())


def _holds(ascending: np.ndarray, number: int) -> bool:
    return number in ascending[(place := np.searchsorted(ascending, number)):place + 1]


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6, person=b"sample").digest(), "big")


def _stamp(path: str) -> list[int]:
    return [os.path.getsize(path), os.stat(path).st_mtime_ns] if os.path.exists(path) else [0, 0]


def curate(pattern: str, out: str | os.PathLike, world, say: Callable[[str], None] = str, **options) -> dict:
    """All passes, on every rank of world (processes.World), or what a killed run with the same settings left of them.

    Args:
        pattern: the crawl, files as for data.find_files. What is damaged in them is passed over and counted.
        out: the folder for the shards, which all ranks share. One run at a time works in it.
        say: called with lines on the progress.
        options: bad_words: file of words and phrases that no document may have; trusted: text for the quality
            classifier (None: no classifier); decontaminate: text that no document may share a 13-gram with;
            threshold: the similarity from which documents are near-duplicates; tokenizer: as for tokenizer.load,
            to count the tokens (None: they are estimated).

    Returns the report, which is also in out/.report.json. Raises ProcessError, on every rank, for files, words or
    folders that cannot be used, or a full disk; what is done by then stays done."""
    import data

    run = world.agree(lambda: Curation(data.find_files(pattern), out, **options))
    n, began = len(run.files), time.monotonic()

    def each(name: str, count: int, do: Callable[[int], None], suffix: str) -> None:
        """do(0) to do(count - 1), those of this rank that are not done."""
        def mine() -> None:
            for i in range(world.rank, count, world.size):
                if not run.path(name, i, suffix).exists():
                    do(i)
                    say(f"{name}: {i + 1:,} of {count:,}, {time.monotonic() - began:.0f} s")
        world.agree(mine, slow=True)

    def once(name: str, do: Callable[[], None]) -> None:
        world.agree(lambda: None if (run.work / name).exists() else do(), here=world.rank == 0, slow=True)

    if not world.first(run.prepare):
        each("clean", n, run.clean, ".json")
        each("copied", run.n_buckets("documents"), lambda b: run.copies("documents", "copied", b), ".npy")
        each("pairs", run.n_buckets("bands"), run.near, ".npy")
        once("near/000000.npy", run.cluster)
        if run.trusted:
            once("classifier.json", run.fit)
        each("unique", n, run.unique, ".json")
        each("repeated", run.n_buckets("units"), lambda b: run.copies("units", "repeated", b), ".npy")
        each("write", n, run.write, ".json")
        once(f"../{REPORT}", run.report)
    world.agree(lambda: shutil.rmtree(run.work, ignore_errors=True), here=world.rank == 0)
    return world.first(lambda: json.loads((run.out / REPORT).read_bytes()))


# --- 4. demo -----------------------------------------------------------------------------------

def _demo() -> None:
    """A crawl with damage, curated without a stop, and by a process that is killed on the way and started again."""
    from crawl import make_crawl
    from processes import World

    with tempfile.TemporaryDirectory() as folder:
        pattern, counts = make_crawl(f"{folder}/crawl", 6, 150)
        os.truncate(f"{folder}/crawl/00001.warc.wet.gz", 50_000)
        print(f"6 files of made-up pages, {counts}; then one is cut short")
        print(show(curate(pattern, f"{folder}/whole", World())))
        killed, work = 0, Path(folder, "killed", ".work")
        for mark in ("clean/000002.json", "unique/000001.json", "write/000004.json"):
            words = [sys.executable, os.path.abspath(__file__), pattern, "--out", f"{folder}/killed"]
            child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
            while child.poll() is None and not (work / mark).exists():
                time.sleep(0.002)
            killed += child.poll() is None
            child.kill()
            child.wait()
        curate(pattern, f"{folder}/killed", World())
        shards = [{path.name: path.read_bytes() for path in Path(folder, n).iterdir()} for n in ("whole", "killed")]
        print(f"the same shards after a kill: {shards[0] == shards[1]} (expected True; {len(shards[0]) - 1} shards and "
              f"the report; killed {killed} times)")


def main(crawl: str | None, out: str | None, explain: bool, **options) -> None:
    if crawl is None:
        if out or explain or any(value not in (None, THRESHOLD) for value in options.values()):
            raise ValueError("without a crawl the demo takes no flag: say which files, such as 'crawl/*.warc.wet.gz'")
        return _demo()
    if out is None:
        raise ValueError("say where the shards shall go: --out DIR")
    from processes import join
    world = join("cpu")
    report = curate(crawl, out, world, say=lambda text: world.say(f"  {text}"), **options)
    world.say(show(report, explain))


def start(arguments: list[str]) -> None:
    """As a program, of this file and of data.py."""
    name = os.path.basename(sys.argv[0])
    parser = argparse.ArgumentParser(name, description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n"  # one line of all ranks, without usage
                                               if os.environ.get("RANK", "0") == "0" else None)
    parser.add_argument("crawl", nargs="?", help="files, such as 'crawl/*.warc.wet.gz' (default: made up)")
    parser.add_argument("--out", metavar="DIR",
                        help="for the shards and .report.json; new, empty, or to go on in")
    parser.add_argument("--bad_words", metavar="FILE",
                        help="one word or phrase a line; pages with one are removed")
    parser.add_argument("--trusted", metavar="FILES",
                        help="text of the quality that is wanted: fits the classifier")
    parser.add_argument("--decontaminate", metavar="FILES",
                        help="tests: what shares 13 words with them is removed")
    parser.add_argument("--threshold", type=float, default=THRESHOLD,
                        help="similarity of near-duplicates (default %(default)s)")
    parser.add_argument("--tokenizer", metavar="NAME",
                        help="counts the tokens of the report: a tiktoken name, a file, or a folder "
                             "(default: estimated)")
    parser.add_argument("--explain", action="store_true", help="show examples of what each rule removed")
    try:
        main(**vars(parser.parse_args(arguments)))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
    finally:
        if "RANK" in os.environ:
            import torch.distributed as dist
            if dist.is_initialized():
                dist.destroy_process_group()


if __name__ == "__main__":
    start(sys.argv[1:])
