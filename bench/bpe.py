"""BPE against Hugging Face tokenizers and tiktoken: training time, and encoding in MB/s.

    python bench/bpe.py                        about 20 s
    python bench/bpe.py --gpt2 DIR             encode with GPT-2's vocabulary, not the trained one

Training: a vocabulary of 4096 on pydoc_data.topics, GPT-2's split, ours and theirs in turn, medians. Hugging
Face runs with as many threads as it takes by default (TOKENIZERS_PARALLELISM and RAYON_NUM_THREADS as they are
in the environment); ours is one thread of Python. Claim: ours / theirs <= 1.2.
Encoding: the same ranks, all documents one after the other in one thread for ours and tiktoken, and as a batch
in the threads of tiktoken and of Hugging Face. Claim: ours / tiktoken <= 1.1, being tiktoken behind one `if`.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import regex
import tiktoken
from pydoc_data.topics import topics

try:
    import tokenizers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError as error:
    print(f"{sys.argv[0]}: needs {error.name}: pip install -r tests/requirements.txt", file=sys.stderr)
    sys.exit(2)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tokenizer import encode, load, train, train_bpe  # noqa: E402

TEXTS = list(topics.values())
BYTES = sum(len(text.encode()) for text in TEXTS)


def hugging_face(model: models.BPE) -> Tokenizer:
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def train_hugging_face(vocab_size: int) -> Tokenizer:
    made = hugging_face(models.BPE())
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return made


def from_encoding(encoding: tiktoken.Encoding) -> Tokenizer:
    """Hugging Face's BPE with the ranks of an encoding: each token's merge is its two parts by lower ranks."""
    ranks, shown = encoding._mergeable_ranks, {}
    prints = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    for i, b in enumerate(prints + [b for b in range(256) if b not in prints]):
        shown[b] = chr(b) if i < len(prints) else chr(256 + i - len(prints))

    def text(token: bytes) -> str:
        return "".join(shown[b] for b in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
            i = min(pairs)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((text(parts[0]), text(parts[1])))
    return hugging_face(models.BPE({text(token): rank for token, rank in ranks.items()}, merges))


def medians(runs: dict, repeats: int) -> dict[str, float]:
    """Seconds of each run, all of them in turn, after one round to warm up."""
    seconds = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(vocab_size: int, repeats: int, gpt2: str | None) -> None:
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    encoding = load(gpt2) if gpt2 else train(TEXTS, vocab_size)
    print(f"{processor()}, {os.cpu_count()} cores; Python {platform.python_version()}, "
          f"tiktoken {tiktoken.__version__}, tokenizers {tokenizers.__version__}, regex {regex.__version__}")
    for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS"):
        print(f"{name} {os.environ.get(name, 'not set: theirs uses every core')}")

    ours, theirs = train_bpe(TEXTS, vocab_size), train_hugging_face(vocab_size)
    print(f"\ntrain, {BYTES:,} bytes, {len(ours)} / {theirs.get_vocab_size()} ranks, median of {repeats}")
    times = medians({"ours": lambda: train_bpe(TEXTS, vocab_size),
                     "tokenizers": lambda: train_hugging_face(vocab_size)}, repeats)
    for name, seconds in times.items():
        print(f"  {name:24s} {seconds:7.3f} s")
    print(f"  ours / tokenizers = {times['ours'] / times['tokenizers']:.2f}   (claim: at most 1.2)")

    peer = from_encoding(encoding)
    same = [encode(encoding, text) for text in TEXTS] == [made.ids for made in peer.encode_batch(TEXTS)]
    print(f"\nencode, {BYTES:,} bytes, {encoding.n_vocab} ids, median of {repeats}; same ids: {same}")
    times = medians({"ours": lambda: [encode(encoding, text) for text in TEXTS],
                     "tiktoken": lambda: [encoding.encode_ordinary(text) for text in TEXTS],
                     "tiktoken, 8 threads": lambda: encoding.encode_ordinary_batch(TEXTS),
                     "tokenizers, encode_batch": lambda: peer.encode_batch(TEXTS)}, repeats)
    for name, seconds in times.items():
        print(f"  {name:24s} {BYTES / seconds / 1e6:7.1f} MB/s")
    print(f"  time of ours / tiktoken = {times['ours'] / times['tiktoken']:.2f}   (claim: at most 1.1)")
    print(f"  time of ours / tokenizers = {times['ours'] / times['tokenizers, encode_batch']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--vocab_size", type=int, default=4096, help="ids to learn (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="of each measurement (default %(default)s)")
    parser.add_argument("--gpt2", metavar="DIR", help="folder with GPT-2's vocab.json and merges.txt")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except ValueError as error:
        parser.error(str(error))
