"""Deduplication: nothing is learned from the same text twice, nor from the test.
Broder 1997; Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", chapter 3; Lee et al. 2022 (2107.06499)

Idea      Equal texts have equal hashes: sort the hashes, keep the first of each. Nearly equal documents share
          most of their 5-grams. The smallest of the hashed 5-grams is the same in two documents with
          probability J, their similarity: 128 such minima are a short signature of a document. Cut in
          bands, a signature gives a few hashes, one of which agrees if the documents are similar: only documents
          that meet in a band are ever compared.
Formula   J(A, B) = |A n B| / |A u B|                            similarity of two sets of n-grams
          s_i(A) = min over x in A of (a_i hash(x) mod 2^32)     P(s_i(A) = s_i(B)) = J, a_i odd and random
          P(meet in some band) = 1 - (1 - J^r)^b                 b bands of r rows: the S-curve
          a pair is a near-duplicate  <=>  it met, and the share of equal s_i >= threshold
          documents linked by such pairs form a cluster, of which the first is kept
Shapes    signatures (N, k) uint32; band hashes (N, b) uint64; pairs (M, 2) int64, smaller document first
Omits     suffix arrays (copies of any length, Lee et al. 4.1); embeddings (copies in other words).
Run       python deduplication.py                                       one process, under 20 s
          torchrun --standalone --nproc_per_node=2 deduplication.py     band hashes exchanged, the same answer
          Ends with "recall ..., precision ...: OK"
Test      pytest tests/test_deduplication.py
"""

import argparse
import bisect
import hashlib
import io
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

# --- 1. exact copies: documents, lines, spans of three sentences ------------------------------

SENTENCE_END = re.compile(r"""(?<=[.!?])\s+|(?<=[.!?]["'\u201d\u2019)\]])\s+""")


def sentences(line: str) -> list[str]:
    """A line cut behind . ! ? (and a quotation mark or bracket that closes there) where white space follows."""
    return SENTENCE_END.split(line)


def hash64(text: str) -> int:
    """64 bits of a text, the same in every process: below 10^8 texts, two that differ agree by chance with less
    than 0.03% probability."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(x: np.ndarray) -> np.ndarray:
    """Each bit of the result depends on each bit of x: a bijection of uint64 (the finaliser of splitmix64)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """The hashes of all n-grams of (N,) uint64 hashes: (N - n + 1,), or empty."""
    m = len(hashes) - n + 1
    if m < 1:
        return np.empty(0, dtype=np.uint64)
    gram = hashes[:m]
    for i in range(1, n):
        gram = gram * np.uint64(0xD6E8FEB86659FD93) + hashes[i:i + m]  # a polynomial: the order of words counts
    return _mix(gram + np.uint64(n))


def units(document: str) -> np.ndarray:
    """What must not occur twice in a corpus, as hashes (U,) uint64: the lines of a document (case counts), then
    its spans of three sentences, which go on over line ends."""
    line_hashes, sentence_hashes = [], []
    for line in document.split("\n"):
        line_hashes.append(hash64(line))
        pieces = sentences(line)
        sentence_hashes += [hash64(piece) for piece in pieces] if len(pieces) > 1 else line_hashes[-1:]
    return np.concatenate([np.array(line_hashes, dtype=np.uint64),
                           ngram_hashes(np.array(sentence_hashes, dtype=np.uint64), 3)])


def without_units(document: str, copies: Sequence[int]) -> tuple[str, dict[str, str]]:
    """A document without its units at these places (as in `units`), which are in the corpus already.

    Returns what is left, and what went: {"line": text, "three sentences": text}, without the empty ones.
    """
    lines = document.split("\n")
    copied_lines = {i for i in copies if i < len(lines)}
    copied_sentences = {i - len(lines) + j for i in copies if i >= len(lines) for j in range(3)}
    kept, gone, number = [], {"line": [], "three sentences": []}, 0
    for i, line in enumerate(lines):
        pieces = sentences(line)
        if i in copied_lines:
            gone["line"].append(line)
        elif copied_sentences.isdisjoint(range(number, number + len(pieces))):
            kept.append(line)  # as it was, with the white space between its sentences
        else:
            gone["three sentences"] += [p for j, p in enumerate(pieces, number) if j in copied_sentences]
            kept.append(" ".join(p for j, p in enumerate(pieces, number) if j not in copied_sentences))
        number += len(pieces)
    return "\n".join(filter(None, kept)), {kind: "\n".join(texts) for kind, texts in gone.items() if texts}


def later_copies(hashes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The places, ascending, whose hash is also at a smaller place. Both (N,) uint64; places are distinct."""
    order = np.lexsort((places, hashes))
    hashes, places = hashes[order], places[order]
    return np.sort(places[1:][hashes[1:] == hashes[:-1]])


# --- 2. more hashes than fit in memory --------------------------------------------------------

# What is equal has equal hashes, so hashes of [low, high] can be compared without the others. Each file's are written
# in sorted runs; a run's part of any interval is found by binary search, and an interval is as small as one likes.
RUN = 2**18  # hashes that are sorted and written together


class HashWriter:
    """Writes hashes, and where they are from, to two files, in runs of RUN that are sorted by hash."""

    def __init__(self, hashes: io.BufferedWriter, places: io.BufferedWriter):
        self.files, self.parts, self.n_waiting = (hashes, places), [], 0

    def add(self, hashes: np.ndarray, places: np.ndarray) -> None:
        """(N,) uint64 each; the memory of RUN of them is held."""
        self.parts.append(np.stack([hashes, places]))
        self.n_waiting += len(hashes)
        if self.n_waiting >= RUN:
            self.flush(RUN)

    def flush(self, at_least: int = 1) -> None:
        """Write what waits, in runs; what does not fill a run waits on, unless at_least is 1."""
        table = np.concatenate([np.empty((2, 0), np.uint64), *self.parts], 1)
        while table.shape[1] >= at_least:
            run, table = table[:, :RUN], table[:, RUN:]
            for file, column in zip(self.files, run[:, np.argsort(run[0], kind="stable")]):
                column.tofile(file)
        self.parts, self.n_waiting = [table.copy()], table.shape[1]


def hashes_between(path: Path, low: int, high: int) -> np.ndarray:
    """(2, N): those of path.hashes that are in [low, high], and theirs of path.places, by binary search in every run.
    The files are read and not mapped, as what is mapped and was looked at counts as memory."""
    found = [np.empty((2, 0), np.uint64)]
    with open(path.with_suffix(".hashes"), "rb", 0) as hashes, open(path.with_suffix(".places"), "rb", 0) as places:
        def hash_at(i: int) -> int:
            hashes.seek(8 * i)
            return int.from_bytes(hashes.read(8), sys.byteorder)

        n = os.path.getsize(hashes.name) // 8
        for i in range(0, n, RUN):
            run = range(i, min(i + RUN, n))
            begin = i + bisect.bisect_left(run, low, key=hash_at)
            end = i + bisect.bisect_right(run, high, key=hash_at)
            part = np.empty((2, end - begin), dtype=np.uint64)
            for file, column in zip((hashes, places), part):
                file.seek(8 * begin)
                file.readinto(column)
            found.append(part)
    return np.concatenate(found, 1)


# --- 3. n-grams of words ----------------------------------------------------------------------

# Bytes of words, ASCII letters and digits and all of what is beyond ASCII, have an odd random number, others 0.
WORD = re.compile(r"[0-9a-z\x80-\U0010ffff]+")  # the same, of lower case
BYTE = np.random.RandomState(0).randint(0, 2**64, 256, dtype=np.uint64) | np.uint64(1)  # fixed for all time
BYTE[[b for b in range(128) if not chr(b).isalnum()]] = 0
BYTE[ord("A"):ord("Z") + 1] = BYTE[ord("a"):ord("z") + 1]
BLOCK = 2**16  # characters, of up to 4 bytes
G = 0x9E3779B97F4A7C15  # odd, so that it has an inverse mod 2^64
POWERS, INVERSE_POWERS = (np.cumprod(np.full(4 * BLOCK, g, dtype=np.uint64)) for g in (G, pow(G, -1, 2**64)))


def word_hashes(text: str) -> np.ndarray:
    """The words of a text in lower case, hashed, (N,) uint64: sum_i BYTE[byte_i] g^i mod 2^64, i from the beginning of
    the word. It is counted from the beginning of the text, for all words together, and then divided by g^begin."""
    parts = [np.empty(0, dtype=np.uint64)]
    while text:  # a long text in blocks, which end at spaces
        end = len(text) if len(text) < BLOCK else text.rfind(" ", 1, BLOCK) if " " in text[1:BLOCK] else BLOCK
        block, text = text[:end], text[end:]
        data = np.frombuffer((block if block.isascii() else block.lower()).encode(), np.uint8)
        values = BYTE.take(data)  # (bytes,)
        inside = np.zeros(len(data) + 1, dtype=bool)
        inside[1:] = values != 0
        begins = np.flatnonzero(inside[1:] > inside[:-1])  # (N,)
        if len(begins):
            values *= POWERS[:len(data)]
            parts.append(np.add.reduceat(values, begins) * INVERSE_POWERS.take(begins))
    return np.concatenate(parts)


def jaccard(a: str, b: str, n: int = 5) -> float:
    """|A n B| / |A u B| of the sets of n-grams of words, by definition; a shorter text is one n-gram."""
    def grams(text: str) -> set:
        words = WORD.findall(text.lower())
        return {tuple(words[i:i + n]) for i in range(max(1, len(words) - n + 1))} if words else set()

    a, b = grams(a), grams(b)
    return len(a & b) / max(1, len(a | b))


# --- 4. MinHash -------------------------------------------------------------------------------

class MinHash:
    """Signatures of documents; equal arguments give equal signatures, anywhere and at any time.

    Args:
        k: permutations, so numbers in a signature. The estimate of J has a standard deviation of
            sqrt(J (1 - J) / k): 0.035 at J = 0.8 and k = 128.
        n: words in an n-gram. A document of fewer words is one n-gram, of none the hash of itself.
        seed: of the permutations.
    """

    def __init__(self, k: int = 128, n: int = 5, seed: int = 0):
        if k < 1 or n < 1 or not 0 <= seed < 2**32:
            raise ValueError(f"k and n must be at least 1 and seed in 0 .. 2^32 - 1, got {k}, {n} and {seed}")
        random = np.random.RandomState(seed)  # NumPy's one frozen stream
        self.k, self.n = k, n
        # For odd a, x -> ax is a permutation of the 2^32 numbers; x is a hash already, so a needs no b beside it.
        self.a = random.randint(0, 2**32, (k, 1), dtype=np.uint32) | np.uint32(1)  # (k, 1)
        self.values = np.empty((k, 1024), dtype=np.uint32)  # kept: memory from the system costs more than the products

    def ngrams(self, text: str) -> np.ndarray:
        """The n-grams, each once or more, as hashes (N,) uint32."""
        words = word_hashes(text)
        if not len(words):
            return np.array([hash64(text) >> 32], dtype=np.uint32)
        return (ngram_hashes(words, min(self.n, len(words))) >> np.uint64(32)).astype(np.uint32)

    def signature_naive(self, text: str) -> np.ndarray:
        """As the formula reads: (k,) uint32."""
        grams = self.ngrams(text).tolist()
        return np.array([min(a * x % 2**32 for x in grams) for a in self.a[:, 0].tolist()], dtype=np.uint32)

    def signature(self, text: str) -> np.ndarray:
        """The same, n-grams in blocks that stay in the cache; uint32 overflows as mod 2^32 wants it."""
        grams = self.ngrams(text)
        smallest = np.full(self.k, 2**32 - 1, dtype=np.uint32)
        for i in range(0, len(grams), 1024):
            block = grams[i:i + 1024]
            values = np.multiply(self.a, block, out=self.values[:, :len(block)])  # (k, up to 1024)
            np.minimum(smallest, values.min(1), out=smallest)
        return smallest


# --- 5. banded locality-sensitive hashing -----------------------------------------------------

def s_curve(similarity: float, bands: int, rows: int) -> float:
    """The probability that two documents of this similarity meet in at least one band."""
    return 1 - (1 - similarity**rows) ** bands


def choose_bands(k: int, threshold: float, recall: float = 0.98) -> tuple[int, int]:
    """(bands, rows): the most rows, so the fewest chance meetings, with which documents that are exactly as
    similar as the threshold still meet with probability recall. Raises ValueError if not even one row does."""
    if not (k >= 1 and 0 < threshold <= 1):
        raise ValueError(f"k must be at least 1 and threshold in (0, 1], got {k} and {threshold}")
    for rows in range(k, 0, -1):
        if s_curve(threshold, k // rows, rows) >= recall:
            return k // rows, rows
    raise ValueError(f"{k} permutations cannot find pairs of similarity {threshold} with probability {recall}: "
                     "take more")


def band_hashes(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """(N, k) -> (N, bands) uint64. Bands differ by their number, so equal rows in two bands do not meet."""
    cut = signatures[:, :bands * rows].reshape(len(signatures), bands, rows).astype(np.uint64)
    value = np.arange(bands, dtype=np.uint64)[None].repeat(len(signatures), 0)  # (N, bands)
    for i in range(rows):
        value = _mix(value) + cut[:, :, i]
    return _mix(value)


def meeting_pairs(hashes: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """(M, 2) pairs, distinct and ascending, of documents with an equal hash: each with the first that has it, and
    with the one before it. Not all pairs: a page that is in a crawl 10^5 times would make 5 * 10^9 of them."""
    order = np.lexsort((documents, hashes))
    hashes, documents = hashes[order], documents[order]
    same = hashes[1:] == hashes[:-1]
    first = np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), np.arange(len(hashes)), 0))
    pairs = np.concatenate([np.stack([documents[first[1:]], documents[1:]], 1)[same],
                            np.stack([documents[:-1], documents[1:]], 1)[same]])
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return np.unique(pairs, axis=0)


def clusters(pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
    """Union-find: document -> the first document of its cluster, for every document that is not first itself."""
    parent: dict[int, int] = {}

    def root(x: int) -> int:
        while (above := parent.get(x, x)) != x:
            parent[x] = x = parent.get(above, above)  # halve the path
        return x

    for a, b in pairs:
        a, b = root(a), root(b)
        if a != b:
            parent[max(a, b)] = min(a, b)
    return {x: root(x) for x in sorted(parent)}


def link(pieces: Iterable[np.ndarray], n: int) -> np.ndarray:
    """``clusters`` for more pairs than memory holds, which come in pieces (M, 2): (n,) the first document of each one's
    cluster, of 0 to n - 1. All roots of a piece are found at once, and each is hung below the smallest that it met."""
    parent = np.arange(n)
    for pairs in pieces:
        while len(pairs):
            while not np.array_equal(parent[pairs], above := parent[parent[pairs]]):
                parent[pairs] = above  # halve the paths
            pairs = parent[pairs]
            pairs = np.sort(pairs[pairs[:, 0] != pairs[:, 1]], 1)  # roots that differ, smaller first
            np.minimum.at(parent, pairs[:, 1], pairs[:, 0])  # downwards only: no circles
    while not np.array_equal(parent, above := parent[parent]):
        parent = above
    return parent


def near_duplicates(signatures: np.ndarray, threshold: float = 0.8,
                    group: ProcessGroup | None = None) -> dict[int, int]:
    """Document -> first document of its cluster, for all documents but the first of each cluster.

    Args:
        signatures: (N, k) of this rank's documents. Documents have numbers in the order of ranks: those of
            rank 0 are 0 to N_0 - 1, those of rank 1 N_0 to N_0 + N_1 - 1, ...
        group: of the ranks, all of which call and all of which get the same answer, which the number of ranks
            does not change. None outside of torch.distributed: one rank.

    Every rank owns a part of the hashes: (1) band hashes go to their owners, (2) owners find who meets, (3) the
    pairs go to the ranks that have the second document, with the signatures of the first, (4) these compare, (5) all
    get all near-duplicate pairs. Memory of a rank: 2 b (8 + 8) bytes for each of its documents, and the pairs.
    """
    P = dist.get_world_size(group) if dist.is_initialized() else 1
    rank = dist.get_rank(group) if P > 1 else 0
    bands, rows = choose_bands(signatures.shape[1], threshold)
    starts = np.cumsum([0, *_all_gather(len(signatures), P, group)])  # (P + 1,)
    hashes = band_hashes(signatures, bands, rows).ravel()  # (N b,)
    documents = np.arange(starts[rank], starts[rank + 1]).repeat(bands)  # (N b,)
    table = np.stack([hashes.view(np.int64), documents], 1)
    table = _exchange(table, (hashes % np.uint64(P)).astype(np.int64), P, group)  # 1
    pairs = meeting_pairs(table[:, 0], table[:, 1])  # 2
    of = np.searchsorted(starts, pairs, side="right") - 1  # (M, 2) the ranks that have the documents
    # 3. A pair goes to the rank of its first document, which adds the signature and sends it on to the second's.
    pairs = np.unique(_exchange(pairs, of[:, 0], P, group), axis=0)
    found = np.concatenate([pairs, signatures[pairs[:, 0] - starts[rank]].astype(np.int64)], 1)  # (M, 2 + k)
    found = _exchange(found, np.searchsorted(starts, pairs[:, 1], side="right") - 1, P, group)
    equal = (found[:, 2:] == signatures[found[:, 1] - starts[rank]]).mean(1) >= threshold  # 4
    everyone = _all_gather(found[equal, :2], P, group)  # 5
    return clusters(np.unique(np.concatenate(everyone), axis=0).tolist())


def _all_gather(value, P: int, group: ProcessGroup | None) -> list:
    values = [value] * P
    if P > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def _exchange(table: np.ndarray, owner: np.ndarray, P: int, group: ProcessGroup | None) -> np.ndarray:
    """Rows (N, C) int64 to the ranks that own them (N,); returns the rows that came."""
    if P == 1:
        return table
    order = np.argsort(owner, kind="stable")
    send = np.bincount(owner, minlength=P).tolist()
    receive = [counts[dist.get_rank(group)] for counts in _all_gather(send, P, group)]
    came = torch.empty(sum(receive), table.shape[1], dtype=torch.int64)
    dist.all_to_all_single(came, torch.from_numpy(table[order]), receive, send, group=group)
    return came.numpy()


# --- 6. decontamination -----------------------------------------------------------------------

class HeldOut:
    """The n-grams of the texts that a model will be tested on. GPT-3 (appendix C), which calls a document
    contaminated if it shares a 13-gram of words with them.

    Args:
        texts: of held-out sets. A text of 8 to 12 words is one n-gram of its own; shorter ones are too common to
            tell anything, and are only counted, in n_skipped.
    """

    def __init__(self, texts: Iterable[str], n: int = 13, shortest: int = 8):
        self.n_texts, self.n_skipped, grams = 0, 0, {}
        for text in texts:
            words = word_hashes(text)
            self.n_texts += 1
            if len(words) < shortest:
                self.n_skipped += 1
            else:
                length = min(n, len(words))
                grams.setdefault(length, []).append(ngram_hashes(words, length))
        self.grams = {length: np.unique(np.concatenate(parts)) for length, parts in sorted(grams.items())}

    def overlap(self, text: str) -> int:
        """How many of the text's n-grams are in a held-out text: 0 for a clean document."""
        words, n = word_hashes(text), 0
        for length, known in self.grams.items():
            grams = ngram_hashes(words, length)
            places = np.minimum(np.searchsorted(known, grams), len(known) - 1)
            n += int((known[places] == grams).sum())
        return n


# --- 7. demo ----------------------------------------------------------------------------------

def planted(n: int, seed: int, threshold: float = 0.8, n_words: int = 200) -> tuple[list[str], set[tuple[int, int]]]:
    """n documents of random words, then a copy of each with some words replaced, of three kinds in turn: near
    (2 words: a duplicate), far (8 words: none) and none at all. Returns them and the pairs of duplicates, which
    are those with J >= threshold by definition."""
    random = np.random.RandomState(seed)
    documents = [" ".join(f"w{i}" for i in random.zipf(1.3, n_words) % 5000) for _ in range(n)]
    pairs = set()
    for i in range(n):
        words = documents[i].split()
        for place in random.choice(n_words, (2, 8, n_words)[i % 3], replace=False):
            words[place] = f"x{random.randint(5000)}"
        documents.append(" ".join(words))
        if jaccard(documents[i], documents[-1]) >= threshold:
            pairs.add((i, n + i))
    return documents, pairs


def main(documents: int, permutations: int, threshold: float, seed: int) -> None:
    if documents < 3 or not 0 <= seed < 2**32:
        raise ValueError(f"--documents must be at least 3 and --seed in 0 .. 2^32 - 1, got {documents} and {seed}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
    rank, P = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    say = print if rank == 0 else lambda *words: None
    bands, rows = choose_bands(permutations, threshold)
    say(f"{permutations} permutations, threshold {threshold}: {bands} bands of {rows} rows. P(two documents meet):")
    for percent in range(10, 101, 10):
        probability = s_curve(percent / 100, bands, rows)
        say(f"  J = {percent / 100:.1f}  {probability:6.4f}  {'#' * round(50 * probability)}")
    texts, expected = planted(documents, seed, threshold)
    if not expected:
        raise ValueError(f"--threshold {threshold}: none of the planted copies is so like its original: want at most "
                         "about 0.9")
    hasher = MinHash(permutations, seed=seed)
    mine = texts[rank * len(texts) // P:(rank + 1) * len(texts) // P]
    signatures = np.stack([hasher.signature(text) for text in mine])
    found = {(first, copy) for copy, first in near_duplicates(signatures, threshold).items()}
    estimates = np.array([(hasher.signature(texts[i]) == hasher.signature(texts[documents + i])).mean()
                          - jaccard(texts[i], texts[documents + i]) for i in range(min(documents, 100))])
    say(f"estimated - exact J of {len(estimates)} pairs: mean {estimates.mean():+.4f} (expected 0), standard deviation "
        f"{estimates.std():.4f} (expected at most {0.5 / permutations**0.5:.4f})")
    say(f"{len(texts):,} documents on {P} processes, {len(expected):,} planted near-duplicates, found {len(found):,}")
    recall, precision = (len(found & expected) / max(1, len(part)) for part in (expected, found))
    say(f"recall {recall:.3f}, precision {precision:.3f}: "
        + ("OK, both at least 0.95" if min(recall, precision) >= 0.95 else "WRONG, expected at least 0.95"))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n"  # one line of all ranks, without usage
                                               if os.environ.get("RANK", "0") == "0" else None)
    parser.add_argument("--documents", type=int, default=1500, help="planted (default %(default)s)")
    parser.add_argument("--permutations", type=int, default=128, help="k (default %(default)s)")
    parser.add_argument("--threshold", type=float, default=0.8,
                        help="similarity of duplicates (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of documents and permutations (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
