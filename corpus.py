"""A text, ready to be trained on: read, split, tokenised and packed once, opened by every process.

Idea      Reading and tokenising cost minutes, so one process of each machine does it and writes two arrays of token
          ids; all then map the same files into memory. A run that is resumed must learn from the tokens that it began
          with: it takes its tokenizer from the checkpoint and compares a fingerprint of the tokens.
Formula   fingerprint = SHA-256 of the lengths and of up to two million tokens a side, evenly spaced
          bits per byte = loss / ln 2 / (held-out bytes / held-out tokens)        comparable between tokenizers
Shapes    tokens (N,) of ids, documents one after another, an end-of-text token behind each;
          a window of them: inputs, targets (context,)
Omits     text larger than memory; cleaning and mixing: curate.py, mixture.py. The parts: data.py, tokenizer.py.
Run       python corpus.py                                   the default text, packed and opened again
          python corpus.py --data 'my/*.txt' --vocab_size 8192    what train.py would make of yours
          Ends with "decoded tokens = held-out text: True ..."
Test      pytest tests/test_corpus.py
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken


# --- 1. the text of a run --------------------------------------------------------------------

@dataclass
class Corpus:
    """Packed tokens to train on and to test with, as every process sees them; nothing of it is copied to memory."""
    encoding: tiktoken.Encoding
    train: data.TokenWindows
    validation: data.TokenWindows
    bytes_per_token: float  # of the held-out text, to state its loss in bits per byte
    fingerprint: str


def prepare(config, world, resumed: Path | None) -> Corpus:
    """Read, split, tokenise and pack the text, once per machine, into ``out/tokens``; then open it everywhere.

    config, a config.TrainConfig, says which text and tokenizer; world, a processes.World, who takes part. One run at
    a time: what another one is packing there would be deleted as a leftover (run_folder.lock keeps it out).

    A resumed run uses the tokenizer of its checkpoint, and the packed tokens if they are still there and whole.

    Raises:
        ProcessError: on every process, for text, a tokenizer or a checkpoint that cannot be used.
        ConfigError: for text that is not what the checkpoint was trained on, or not the same on all machines.
    """
    import checkpoint
    from config import ConfigError
    folder = Path(config.out) / "tokens"
    meta = world.first(lambda: checkpoint.load(resumed, parts=())["meta"]) if resumed else {}
    trained_on = meta.get("data_fingerprint")

    def pack() -> str | None:
        with contextlib.suppress(ValueError, OSError, EOFError):  # numpy's words for a file that is damaged
            if resumed and _open_corpus(config, folder).fingerprint == trained_on:
                return None
        return _pack_corpus(config, folder, resumed, world)

    world.agree(lambda: _delete_leftovers(folder), here=world.rank == 0)
    texts = world.gather(world.agree(pack, here=world.local_rank == 0, slow=True))
    # Machines that share the folder have overwritten each other's files: there the texts themselves tell.
    differ = len(set(texts) - {None}) > 1
    corpus = None if differ else world.agree(lambda: _open_corpus(config, folder))
    if differ or len(set(world.gather(corpus.fingerprint))) > 1:
        raise ConfigError("the machines read different text: give all of them the same --data and Python")
    if resumed and trained_on != corpus.fingerprint:
        raise ConfigError(f"{resumed} was trained on other text than {config.data or 'the default corpus'} is now: "
                          f"give it that text, or another --out")
    world.say(f"{len(corpus.train.tokens):,} tokens to train on, {len(corpus.validation.tokens):,} held out, "
              f"vocabulary {corpus.encoding.n_vocab}, {corpus.bytes_per_token:.2f} bytes per token")
    return corpus


def _open_corpus(config, folder: Path) -> Corpus:
    import data
    import tokenizer
    train, held_out = (np.load(folder / f"{side}.npy", mmap_mode="r") for side in ("train", "validation"))
    windows = data.TokenWindows(train, config.context, config.seed)
    # A held-out text shorter than one context is one shorter window.
    validation = data.TokenWindows(held_out, max(1, min(config.context, len(held_out) - 1)), shuffle=False)
    n_bytes = int((folder / "held_out_bytes").read_text())
    return Corpus(tokenizer.load(folder / "tokenizer.tiktoken"), windows, validation, n_bytes / len(held_out),
                  _fingerprint(train, held_out))


def _delete_leftovers(folder: Path) -> None:
    """Of a process that was killed while it packed: as large as the tokens."""
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()


def _pack_corpus(config, folder: Path, resumed: Path | None, world) -> str:
    """Write the four files that ``_open_corpus`` reads; returns a hash of all text."""
    import data
    import tokenizer
    from config import ConfigError
    try:  # a tokenizer that cannot be had is known before the text is read
        named = None if config.tokenizer == "train" and not resumed else \
            tokenizer.load(resumed / "tokenizer.tiktoken" if resumed else config.tokenizer)
    except ValueError as error:
        raise ConfigError(str(error) if resumed else
                          f"--tokenizer={config.tokenizer}: {error}: or take --tokenizer=train") from None
    what = "the documentation and docstrings of this Python" if config.data is None else config.data
    world.say(f"reading {what} ...")
    documents = data.default_documents() if config.data is None else list(data.read_documents(config.data))
    train, held_out = data.split_documents(documents, config.held_out)
    world.say(f"{len(train):,} documents to train on, {len(held_out):,} held out")
    if named is None:
        world.say(f"training a vocabulary of {config.vocab_size} ...")
    encoding = named or tokenizer.train(train, config.vocab_size)
    eot = tokenizer.eot(encoding)
    folder.mkdir(parents=True, exist_ok=True)
    for side, texts in (("train", train), ("validation", held_out)):
        data.pack(texts, lambda text: tokenizer.encode(encoding, text), eot, encoding.n_vocab, folder / f"{side}.npy")
    tokenizer.save(encoding, folder / "tokenizer.tiktoken")
    (folder / "held_out_bytes").write_text(str(sum(len(text.encode()) for text in held_out)))
    text = hashlib.sha256()
    for document in (*train, *held_out):
        text.update(hashlib.sha256(document.encode()).digest())
    return text.hexdigest()


def _fingerprint(*arrays: np.ndarray) -> str:
    """Of the packed tokens: their lengths and up to two million of each array, evenly spaced."""
    digest = hashlib.sha256()
    for tokens in arrays:
        digest.update(f"{len(tokens)} ".encode() + tokens[::max(1, len(tokens) >> 20)].tobytes())
    return digest.hexdigest()


# --- 2. demo ---------------------------------------------------------------------------------

def main(data: str | None, vocab_size: int) -> None:
    import tokenizer
    from config import TrainConfig
    from data import default_documents, read_documents, split_documents
    from processes import World
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(data=data, vocab_size=vocab_size, out=folder)
        corpus = prepare(config, World(), None)
        print(f"packed in {time.perf_counter() - began:.1f} s; {len(corpus.train)} windows of {config.context} tokens")
        again = _open_corpus(config, Path(folder) / "tokens")
        inputs, targets = again.train.batch(0, 1)
        print(f"the first window, in the order of seed {config.seed}: "
              f"{corpus.encoding.decode(inputs[0].tolist())[:80]!r} ...")
        same = again.fingerprint == corpus.fingerprint and bool((inputs[0, 1:] == targets[0, :-1]).all())
        text = tokenizer.decode_bytes(corpus.encoding, np.asarray(corpus.validation.tokens))
    _, held_out = split_documents(default_documents() if data is None else list(read_documents(data)), config.held_out)
    end = corpus.encoding.decode([tokenizer.eot(corpus.encoding)])
    same &= text == "".join(document + end for document in held_out).encode()
    print(f"decoded tokens = held-out text: {same} (expected True; {len(text):,} bytes)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", help="files, such as 'my/*.txt' or a.jsonl,b.txt (default: Python's own)")
    parser.add_argument("--vocab_size", type=int, default=2048, help="of the tokenizer (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
