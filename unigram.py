"""Unigram: a vocabulary of pieces with probabilities.   Kudo 2018 (1804.10959); SentencePiece (1808.06226)

Idea      A word is pieces drawn one by one from one distribution (learned by unigram_training.py): its
          probability is a sum over all ways to cut it. A text is cut in its most probable way, found by
          dynamic programming; in training also in ways drawn by probability, so that a model sees many cuts
          of one word: a regularisation. What no piece spells is written in bytes: no text is unknown.
Formula   p(x) = sum over cuts (s_1 ... s_m) of x of  prod_i p(s_i)
          alpha_0 = 0,  alpha_j = logsumexp over i < j of alpha_i + log p(x_i ... x_j-1),  log p(x) = alpha_n
          best cut = argmax prod_i p(s_i): the same with max (Viterbi)
          drawn cut ~ (prod_i p(s_i))^a: from the end j, a piece begins at i with probability
          exp(alpha_i + a log p(x_i ... x_j-1) - alpha_j), these alpha made of p^a; a is --alpha
Shapes    text -> ids in [0, n_vocab) -> the same text, any str
Omits     SentencePiece's Unicode normalisation and its blank before a text: a text comes back as it was.
Run       python unigram.py                     CPU, 20 s; ends with "round trip: True (...)"
          python unigram.py --data 'my/*.txt' --vocab_size 8000 --out tokenizer.json
Test      pytest tests/test_unigram.py
"""

import argparse
import heapq
import json
import math
import os
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import regex  # tiktoken depends on it, so it is there; Python's own `re` lacks \p{L} and \p{N}

# A word takes the blank before it along; of longer white space, all but the last is a word. Classes are spelled
# out, as engines differ in what \s is.
WORDS = r" ?[^ \t\r\n]+|[ \t\r\n]+(?![^ \t\r\n])|[ \t\r\n]"
BLANK = "\u2581"  # how files show the blank; as a character of a text it is spelled in bytes
UNKNOWN_PENALTY = 10.0  # a character without a piece costs that much more than the rarest piece
END_OF_TEXT = "<|endoftext|>"


# --- 1. a word's lattice, as the formulas read ----------------------------------------------------

def cuts_naive(word: str, scores: dict[str, float]) -> list[tuple[list[str], float]]:
    """Every way to cut a word in pieces, and its log probability. Exponentially many."""
    if not word:
        return [([], 0.0)]
    return [([word[:i], *rest], scores[word[:i]] + score) for i in range(1, len(word) + 1) if word[:i] in scores
            for rest, score in cuts_naive(word[i:], scores)]


def log_marginals(word: str, scores: dict[str, float], longest: int, unknown: float, power: float = 1.0) -> list[float]:
    """alpha_j, log of the sum over cuts of word[:j] of p^power, (n + 1,).   Kudo 2018, section 3.1"""
    alphas = [0.0]
    for end in range(1, len(word) + 1):
        found = [alphas[start] + power * score for start, score in _edges_to(word, end, scores, longest, unknown)]
        largest = max(found)
        alphas.append(largest + math.log(sum(math.exp(x - largest) for x in found)))
    return alphas


def _edges_to(word: str, end: int, scores: dict[str, float], longest: int, unknown: float
              ) -> list[tuple[int, float]]:
    """(start, log p) of the pieces that end there, the longest first; one character always is one."""
    edges = [(start, scores[piece]) for start in range(max(0, end - longest), end)
             if (piece := word[start:end]) in scores]
    return edges if edges and edges[-1][0] == end - 1 else [*edges, (end - 1, unknown)]


def viterbi(word: str, scores: dict[str, float], longest: int, unknown: float) -> list[str]:
    """The most probable cut; of equals the one whose last piece is longest, and so on to the front."""
    best, begin = [0.0], [0]
    for end in range(1, len(word) + 1):
        largest, first = -math.inf, end - 1
        for start in range(max(0, end - longest), end):  # _edges_to, written out: most of the time goes here
            score = scores.get(word[start:end], unknown if start == end - 1 else None)
            if score is not None and best[start] + score > largest:
                largest, first = best[start] + score, start
        best.append(largest)
        begin.append(first)
    pieces, end = [], len(word)
    while end:
        pieces.append(word[begin[end]:end])
        end = begin[end]
    return pieces[::-1]


def sample_cut(word: str, scores: dict[str, float], longest: int, unknown: float, alpha: float, rng: random.Random
               ) -> list[str]:
    """A cut drawn with probability ~ p^alpha: alphas forward, then pieces from the end, each by its share of the
    sum that its end's alpha is (forward-filtering, backward-sampling)."""
    alphas, pieces, end = log_marginals(word, scores, longest, unknown, alpha), [], len(word)
    while end:
        edges = _edges_to(word, end, scores, longest, unknown)
        shares = [math.exp(alphas[start] + alpha * score - alphas[end]) for start, score in edges]
        start = rng.choices([start for start, _ in edges], shares)[0]
        pieces.append(word[start:end])
        end = start
    return pieces[::-1]


def best_cuts(word: str, scores: dict[str, float], longest: int, unknown: float, n: int
              ) -> list[tuple[float, list[str]]]:
    """The n most probable cuts and their log probabilities, best first: Viterbi with n cuts kept at each place."""
    best: list[list[tuple[float, tuple]]] = [[(0.0, ())]]  # a cut is (its piece before last, its last piece)
    for end in range(1, len(word) + 1):
        best.append(heapq.nlargest(n, ((before + score, (cut, word[start:end])) for start, score in
                                       _edges_to(word, end, scores, longest, unknown)
                                       for before, cut in best[start]), key=lambda item: item[0]))
    unrolled = []
    for score, cut in best[-1]:
        pieces = []
        while cut:
            cut, piece = cut
            pieces.append(piece)
        unrolled.append((score, pieces[::-1]))
    return unrolled


# --- 2. text to ids and back ----------------------------------------------------------------------

def _compile(pattern: str) -> regex.Pattern:
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    if compiled.groups:
        raise ValueError(f"pattern {pattern!r} captures {compiled.groups} group(s): write (?:...) for (...)")
    return compiled


def _split(compiled: regex.Pattern, text: str) -> list[str]:
    words = compiled.findall(text)
    if (covered := sum(map(len, words))) < len(text):
        raise ValueError(f"pattern {compiled.pattern!r} covers {covered} of {len(text)} characters: add |(?s:.)")
    return words


class Unigram:
    """A vocabulary in use: ids 0 "<unk>" (never given out), 1 and on the special tokens, the 256 bytes, the pieces.

    Args:
        pieces: (piece, log probability), different, of at least one character and without U+2581.
        special_tokens: END_OF_TEXT first; ``eot`` is its id.
        pattern: cuts a text in words; no piece crosses from one to the next.
    """

    def __init__(self, pieces: Sequence[tuple[str, float]], special_tokens: Sequence[str] = (END_OF_TEXT,),
                 pattern: str = WORDS):
        self.scores = dict(pieces)
        if len(self.scores) < len(pieces) or not self.scores or "" in self.scores or BLANK in "".join(self.scores):
            raise ValueError(f"{len(pieces)} pieces, {len(self.scores)} of them different: want at least one, all "
                             f"different, none empty, none with {BLANK!r}")
        if not all(math.isfinite(score) and score <= 0 for score in self.scores.values()):
            raise ValueError("the log probabilities of pieces must be finite and at most 0")
        if isinstance(special_tokens, str) or len({*special_tokens, "", "<unk>"}) < len(special_tokens) + 2:
            raise ValueError(f"special_tokens must be a list of different, non-empty str, got {special_tokens!r}")
        self.special_tokens, self.pattern = list(special_tokens), pattern
        self._split, self._byte = _compile(pattern), 1 + len(special_tokens)  # id of byte 0
        self.tokens = ["<unk>", *special_tokens, *(f"<0x{b:02X}>" for b in range(256)), *self.scores]
        self.ids = {piece: self._byte + 256 + i for i, piece in enumerate(self.scores)}
        self.n_vocab = len(self.tokens)
        # scores, longest, unknown, as the functions above take them
        self.lattice_options = (self.scores, max(map(len, self.scores)), min(self.scores.values()) - UNKNOWN_PENALTY)
        self._remembered: dict[str, list[int]] = {}

    @property
    def eot(self) -> int:
        """The id that ends a document. ValueError without special tokens."""
        if not self.special_tokens:
            raise ValueError("this vocabulary has no special tokens, so none that ends a document")
        return 1

    def _ids(self, pieces: Iterable[str]) -> list[int]:
        found = []
        for piece in pieces:
            if (i := self.ids.get(piece)) is not None:
                found.append(i)
            else:
                found += [self._byte + b for b in piece.encode("utf-8", "surrogatepass")]
        return found

    def encode(self, text: str) -> list[int]:
        """The ids of the most probable cut. A special token that a text spells out stays text."""
        found = []
        for word in _split(self._split, text):
            ids = self._remembered.get(word)
            if ids is None:
                ids = self._ids(viterbi(word, *self.lattice_options))
                if len(word) <= 64:
                    if len(self._remembered) == 2**16:  # texts without end must not fill the memory
                        self._remembered.clear()
                    self._remembered[word] = ids
            found += ids
        return found

    def sample(self, text: str, alpha: float, rng: random.Random) -> list[int]:
        """The ids of a cut drawn with probability ~ p^alpha: alpha 0 draws every cut alike, a large one the best
        (0.1 to 0.5 are used for training). ValueError for alpha < 0."""
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be finite and at least 0, got {alpha}")
        return [i for word in _split(self._split, text)
                for i in self._ids(sample_cut(word, *self.lattice_options, alpha, rng))]

    def n_best(self, text: str, n: int) -> list[tuple[float, list[int]]]:
        """The n most probable cuts (fewer if there are fewer): log probability and ids, best first."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        best: list[tuple[float, list[int]]] = [(0.0, [])]
        for word in _split(self._split, text):
            cuts = best_cuts(word, *self.lattice_options, n)
            best = heapq.nlargest(n, ((a + b, [*ids, *self._ids(pieces)]) for a, ids in best for b, pieces in cuts),
                                  key=lambda item: item[0])
        return best

    def log_likelihood(self, text: str) -> float:
        """log p(text), all cuts summed, in nats; a character without a piece counts as in the best cut."""
        return sum(log_marginals(word, *self.lattice_options)[-1] for word in _split(self._split, text))

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes that ids stand for, special tokens as they are spelled. ValueError for ids not in [0, n_vocab)."""
        found = []
        for token in tokens:
            if not 0 <= token < self.n_vocab:
                raise ValueError(f"token id {token} is not in the vocabulary, 0 .. {self.n_vocab - 1}")
            if self._byte <= token < self._byte + 256:
                found.append(bytes([token - self._byte]))
            else:
                found.append(self.tokens[token].encode("utf-8", "surrogatepass"))
        return b"".join(found)

    def decode(self, tokens: Iterable[int]) -> str:
        """The text: of encode(text) text itself, halves of surrogate pairs too. Bytes that are no UTF-8: U+FFFD."""
        data = self.decode_bytes(tokens)
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")


# --- 3. files: the tokenizer.json of Hugging Face tokenizers ----------------------------------------

def save(unigram: Unigram, path: str | os.PathLike) -> None:
    """Write a tokenizer.json that tokenizers.Tokenizer.from_file reads and cuts texts alike with (but for the text
    "<0x41>", special tokens and U+2581, which it does not tell from the tokens of that name). Written beside, then
    renamed. ValueError if it cannot be written."""
    specials = [{"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True} for i, token in enumerate(unigram.tokens[:unigram._byte])]
    vocab = [[token, 0.0] for token in unigram.tokens[:unigram._byte + 256]]
    vocab += [[piece.replace(" ", BLANK), score] for piece, score in unigram.scores.items()]
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": specials, "normalizer": None,
               "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                   {"type": "Split", "pattern": {"Regex": unigram.pattern}, "behavior": "Isolated", "invert": False},
                   {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": "never", "split": False}]},
               "post_processor": None,
               "decoder": {"type": "Sequence", "decoders": [
                   {"type": "Replace", "pattern": {"String": BLANK}, "content": " "}, {"type": "ByteFallback"},
                   {"type": "Fuse"}]},
               "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True}}
    beside = Path(f"{path}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}): check the folder, its permissions and the "
                         "room on the disk") from None
    finally:
        beside.unlink(missing_ok=True)


def load(path: str | os.PathLike) -> Unigram:
    """What ``save`` wrote. ValueError, one line with the file: missing, damaged, or a tokenizer of another kind."""
    try:
        content = json.loads(Path(path).read_bytes())
        split, blanks = content["pre_tokenizer"]["pretokenizers"]
        vocab, n_specials = content["model"]["vocab"], len(content["added_tokens"])
        found = Unigram([(piece.replace(BLANK, " "), score) for piece, score in vocab[n_specials + 256:]],
                        [token for token, _ in vocab[1:n_specials]], split["pattern"]["Regex"])
        kind = content["model"]["type"], content["normalizer"], blanks["prepend_scheme"]
        first = [token for token, _ in vocab[:n_specials + 256]]
        if kind != ("Unigram", None, "never") or first != found.tokens[:n_specials + 256]:
            raise ValueError("another kind of tokenizer")
        return found
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: is not a tokenizer.json that unigram.save wrote, or is damaged ({error!r}): copy it "
                         "again, or use the tokenizers library") from None


# --- 4. demo --------------------------------------------------------------------------------------

HARD = {"no spaces": "thefunctionreturnsthedefaultvalue", "compounds": "filesystem keyword-only multithreading",
        "contractions": "it doesn't, isn't and won't"}


def _shown(encoding: object, ids: list[int]) -> str:
    return "|".join(encoding.decode([i]) for i in ids)


def check_writable(path: str | None) -> None:
    """ValueError for a file that cannot be written: now, not after the work. None is no file."""
    if path is not None:
        try:
            is_new = not os.path.exists(path)
            open(path, "ab").close()  # keeps what is there
            if is_new:
                os.remove(path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror}): check the folder, its permissions and the "
                             "room on the disk") from None


def main(data: str | None, vocab_size: int, alpha: float, text: str, seed: int, out: str | None) -> None:
    import tokenizer
    from data import default_documents, read_documents, split_documents
    from unigram_training import train_unigram
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be in 0 .. 2^32 - 1, got {seed}")
    if vocab_size < 259 or not 0 <= alpha < math.inf:  # asked before anything is learned
        raise ValueError(f"--vocab_size must be at least 259, as <unk>, {END_OF_TEXT} and the bytes are 258, and "
                         f"--alpha finite and at least 0, got {vocab_size} and {alpha}")
    check_writable(out)
    documents = default_documents() if data is None else list(read_documents(data))
    training, held_out = split_documents(documents)
    began = time.perf_counter()
    unigram = Unigram(train_unigram(training, vocab_size - 258))
    print(f"{unigram.n_vocab} tokens, {len(unigram.scores)} of them pieces, learned from "
          f"{sum(map(len, training)):,} characters in {time.perf_counter() - began:.1f} s")

    bpe = tokenizer.train(training, vocab_size, WORDS)
    n_bytes = sum(len(document.encode()) for document in held_out)
    ours, theirs = (sum(len(encode(d)) for d in held_out) for encode in (unigram.encode, bpe.encode_ordinary))
    print(f"held-out text, bytes per token: Unigram {n_bytes / ours:.3f}, BPE {n_bytes / theirs:.3f} (same words, "
          "same number of tokens)")
    for name, hard in {**HARD, "yours": text}.items():
        print(f"  {name:13} Unigram {_shown(unigram, unigram.encode(hard))}\n"
              f"  {'':13} BPE     {_shown(bpe, bpe.encode_ordinary(hard))}")
    rng = random.Random(seed)
    drawn = [unigram.sample(text, alpha, rng) for _ in range(4)]
    print(f"drawn with alpha {alpha}:   {'   '.join(_shown(unigram, ids) for ids in drawn)}")
    for score, ids in unigram.n_best(text, 3):
        print(f"  log p {score:8.3f}   {_shown(unigram, ids)}")
    print(f"  log p {unigram.log_likelihood(text):8.3f}   all cuts together (expected to be the greatest)")
    if out is not None:
        save(unigram, out)
        print(f"saved: {out}")

    hostile = ["日本語 😀\ud800", "\u2581 <unk><|endoftext|><0x41>", " \n\t  \0", *held_out[:20]]
    same = [unigram.decode(ids) == t for t in hostile for ids in (unigram.encode(t), unigram.sample(t, alpha, rng))]
    print(f"round trip: {all(same)} (expected True; {len(same)} texts, half of them by drawn cuts)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", help="files, such as 'my/*.txt' or a.jsonl,b.txt (default: Python's own)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="V (default %(default)s)")
    parser.add_argument("--alpha", type=float, default=0.2, help="of the drawn cuts (default %(default)s)")
    parser.add_argument("--text", default="unsplittable tokenizers",
                        help="cut before your eyes (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn cuts (default %(default)s)")
    parser.add_argument("--out", metavar="tokenizer.json", help="write the vocabulary there")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
