"""The data pipeline: MB/s by stage and in all, memory and time against the size of the input, MinHash against datasketch.

    python bench/data.py                       all of it at small sizes, a few minutes
    python bench/data.py --only minhash        signatures against datasketch (pip install datasketch), claim: >= 5 x
    python bench/data.py --only stages         MB/s of each stage on one core
    python bench/data.py --only pipeline --sizes 100 300 1000      MB of made-up crawl: peak memory and time of a process

MinHash: the words 5-grams of Python's documentation, 128 permutations, from text to signature on both sides, in turn, medians.
datasketch is called as its documentation says is fastest (update_batch), with its default hash; ours hashes words with tables.
Pipeline: `python data.py` on a made-up crawl (crawl.py) of so many MB of text, in WET files of about 10 MB, uncompressed so that
its making does not take longer than its curation; the peak is the resident memory of the process, as the kernel counts it (the
process's own imports, torch above all, are in it: the line "imports" says how much). Claims: memory flat, time linear.
All times are of the processor, of one thread: they do not count what others do on the machine meanwhile.
"""

import argparse
import gzip
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import quality  # noqa: E402
import quality_classifier  # noqa: E402
from crawl import Pages, make_crawl  # noqa: E402
from deduplication import HeldOut, MinHash, band_hashes, choose_bands, units  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def medians(runs: dict, repeats: int) -> dict[str, float]:
    """Seconds of the processor for each run, all of them in turn, after one round to warm up."""
    seconds = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()  # one thread: what others do on the machine does not count
            run()
            if repeat:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def minhash(repeats: int) -> None:
    try:
        import datasketch
    except ImportError:
        raise ValueError("minhash needs datasketch: pip install datasketch") from None

    texts = [text for text in data.default_documents() if len(text) > 500][::3]
    hasher, n_bytes = MinHash(128), sum(map(len, texts))

    def shingles(text: str) -> list[bytes]:
        words = text.lower().split()
        return [" ".join(words[i:i + 5]).encode() for i in range(max(1, len(words) - 4))]

    def theirs(text: str) -> None:
        made = datasketch.MinHash(128)
        made.update_batch(shingles(text))

    def one_by_one(text: str) -> None:
        made = datasketch.MinHash(128)
        for shingle in shingles(text):
            made.update(shingle)

    ready = [shingles(text) for text in texts]
    times = medians({"ours, from text": lambda: [hasher.signature(text) for text in texts],
                     "datasketch, from text": lambda: [theirs(text) for text in texts],
                     "datasketch, 5-grams made before": lambda: [datasketch.MinHash(128).update_batch(grams) for grams in ready],
                     "datasketch, update in a loop": lambda: [one_by_one(text) for text in texts[:20]]}, repeats)
    times["datasketch, update in a loop"] *= n_bytes / sum(map(len, texts[:20]))
    print(f"\nMinHash, 128 permutations, 5-grams of words, {n_bytes:,} bytes in {len(texts)} documents, median of {repeats}; "
          f"datasketch {datasketch.__version__ if hasattr(datasketch, '__version__') else ''}")
    for name, seconds in times.items():
        print(f"  {name:34} {n_bytes / seconds / 1e6:7.2f} MB/s")
    for name in list(times)[1:]:
        print(f"  {name} / ours = {times[name] / times['ours, from text']:.2f}" + "   (claim: at least 5)" * (name == "datasketch, from text"))


def stages(repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pattern, _ = make_crawl(folder, 1, 600)
        pages = list(data.read_documents(pattern))
        cleaned = [text for page in pages if (text := quality.clean(page)[0])]
        words = [text.split() for text in cleaned]
        hasher, bands, classifier = MinHash(), choose_bands(128, 0.8), quality_classifier.QualityClassifier()
        held_out = HeldOut([Pages(1).new() for _ in range(3)])
        lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in cleaned)
        raw = sum(len(page.encode()) for page in pages)
        runs = {"read .warc.wet.gz": lambda: list(data.read_documents(pattern)),
                "rules of C4": lambda: [quality.clean(page, gopher=False) for page in pages],
                "rules of C4 and Gopher, masks": lambda: [quality.clean(page) for page in pages],
                "  of these, copied n-grams": lambda: [quality.ngram_shares(w) for w in words],
                "lines and spans, hashed": lambda: [units(text) for text in cleaned],
                "MinHash and bands": lambda: [band_hashes(hasher.signature(text)[None], *bands) for text in cleaned],
                "quality classifier (optional)": lambda: [classifier.keeps(text) for text in cleaned],
                "held-out overlap (optional)": lambda: [held_out.overlap(text) for text in cleaned],
                "gzip, level 1 (intermediate)": lambda: gzip.compress(lines, 1),
                "gzip, level 6 (shards)": lambda: gzip.compress(lines, 6)}
        print(f"\nstages on one core: {raw:,} bytes of pages, {len(pages)} documents, median of {repeats}; bytes of raw text per second")
        for name, seconds in medians(runs, repeats).items():
            print(f"  {name:34} {raw / seconds / 1e6:7.1f} MB/s")


def pipeline(sizes: list[int]) -> None:
    print("\npipeline, one process on one core, no classifier: MB of text, seconds of the processor, MB/s, peak of resident memory")
    code = "import runpy, resource, sys; sys.argv = sys.argv[1:]\n" \
           "try: runpy.run_path(sys.argv[0], run_name='__main__')\n" \
           "finally:\n" \
           "    r = resource.getrusage(resource.RUSAGE_SELF)\n" \
           "    print('peak', r.ru_utime + r.ru_stime, r.ru_maxrss)"
    imports = subprocess.run([sys.executable, "-c", "import torch, torch.distributed, resource\n"
                              "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"], capture_output=True, text=True)
    print(f"  {'imports':>8} {'':8} {'':7} {int(imports.stdout) / 1024:7.0f} MiB")
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            n_files = max(1, size // 10)
            pattern, _ = make_crawl(f"{folder}/crawl", n_files, size * 10**6 // n_files // 2000, zipped=False)  # bytes of a page, about
            true = sum(path.stat().st_size for path in Path(folder, "crawl").iterdir())
            found = subprocess.run([sys.executable, "-c", code, str(ROOT / "data.py"), pattern, "--out", f"{folder}/out"],
                                   capture_output=True, text=True)
            if found.returncode:
                raise ValueError(found.stderr[-500:])
            seconds = float(found.stdout.split()[-2])
            rows.append((true, seconds, int(found.stdout.split()[-1])))
            print(f"  {true / 1e6:8.0f} {seconds:8.1f} {true / seconds / 1e6:7.2f} {rows[-1][2] / 1024:7.0f} MiB   "
                  f"{found.stdout.splitlines()[-2].strip()}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            os.makedirs(folder, exist_ok=True)
    if len(rows) > 1:
        (a, s, m), (b, t, n) = rows[0], rows[-1]
        print(f"  {b / a:.1f} times the input: {t / s:.1f} times the time (claim: linear), {n / m:.2f} times the memory (claim: flat)")


def main(only: str | None, repeats: int, sizes: list[int]) -> None:
    if repeats < 1 or min(sizes) < 1:
        raise ValueError(f"repeats and sizes must be at least 1, got {repeats} and {sizes}")
    print(f"{processor()}, {os.cpu_count()} cores; Python {platform.python_version()}")
    for name, run in (("minhash", lambda: minhash(repeats)), ("stages", lambda: stages(repeats)), ("pipeline", lambda: pipeline(sizes))):
        if only in (None, name):
            run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--only", choices=("minhash", "stages", "pipeline"), help="one part (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement (default %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[30, 100], help="MB of the pipeline's input (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except ValueError as error:
        parser.error(str(error))
