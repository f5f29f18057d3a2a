"""Training a Unigram vocabulary: seeds, EM, pruning.   Kudo 2018 (1804.10959), section 3.2

Idea      A word is pieces drawn one by one from one distribution, so its probability is a sum over all ways to
          cut it. Begin with every frequent substring. EM finds the probabilities that make the words likeliest:
          expect how often each piece is used (forward-backward over each word's lattice), divide by the sum.
          Then drop the 15% of the pieces whose loss hurts least, and again, until as many are left as are
          wanted. Every character stays, so that every word can still be cut.
Formula   p(w) = sum over cuts (s_1 ... s_m) of w of  prod_i p(s_i),   L = sum over words of count(w) log p(w)
          E     c(s) = sum over w of count(w) * E[how often s is in the cut of w]
                     = sum over places i < j where s fits of count(w) exp(alpha_i + log p(s) + beta_j) / p(w)
          M     p(s) = c(s) / sum of c;   L never falls from one E to the next
          prune: loss(s) = c(s) * (log p(s) - max over cuts (s_1 ... s_m), m > 1, of s of
                                   sum_i log((c(s_i) + c(s)) / sum of c)): its parts take over its uses
Shapes    words and counts -> n_pieces pieces and their log probabilities; a lattice of all words is three
          arrays (edges,): start, end, piece
Omits     SentencePiece's digamma in place of M (a prior for few pieces, not in the paper), its rule that a
          piece keeps to one script; more than one process.
Run       python unigram_training.py            CPU, 15 s; ends with "EM never fell: True ..."
          python unigram_training.py --data 'my/*.txt' --pieces 8000
Test      pytest tests/test_unigram_training.py
"""

import argparse
import heapq
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import regex  # tiktoken depends on it, so it is there; Python's own `re` lacks \p{L} and \p{N}

# A word takes the blank before it along; of longer white space, all but the last is a word. Classes are spelled
# out, as engines differ in what \s is.
WORDS = r" ?[^ \t\r\n]+|[ \t\r\n]+(?![^ \t\r\n])|[ \t\r\n]"
LONGEST_WORD = 256  # longer ones are cut
# U+2581 stands for the blank in files of vocabularies; halves of surrogate pairs are what no file can hold.
NOT_IN_PIECES = {"\u2581", *map(chr, range(0xD800, 0xE000))}


# --- 1. the algorithm, as it reads ----------------------------------------------------------------

def seed_pieces_naive(words: dict[str, int], size: int, longest: int) -> dict[str, int]:
    """All characters, and the substrings that occur at least twice, with their counts: the ``size`` of greatest
    count * length (ties: the smaller str). A substring that occurs only as the beginning of one longer one
    gives way to it: what is left are the inner nodes of a suffix tree.

    words: str -> count; at most ``longest`` characters a piece."""
    counts: Counter[str] = Counter()
    for word, n in words.items():
        for i in range(len(word)):
            for j in range(i + 1, min(len(word), i + longest) + 1):
                counts[word[i:j]] += n
    begins = {piece[:-1] for piece, n in counts.items() if counts[piece[:-1]] == n}
    found = {piece: counts[piece] for piece in sorted(counts) if len(piece) == 1}
    rest = [piece for piece, n in counts.items() if len(piece) > 1 and n > 1 and piece not in begins]
    rest = heapq.nsmallest(max(0, size - len(found)), rest, key=lambda piece: (-counts[piece] * len(piece), piece))
    return found | {piece: counts[piece] for piece in rest}


def expected_counts_naive(words: dict[str, int], log_p: dict[str, float]) -> tuple[float, dict[str, float]]:
    """L, and c(s) of every piece, from the probabilities of all prefixes (alpha) and suffixes (beta) of a word:
    for words so short that these are no zeros in floating point."""
    p = {piece: float(np.exp(score)) for piece, score in log_p.items()}
    likelihood, expected = 0.0, dict.fromkeys(p, 0.0)
    for word, n in words.items():
        end = len(word)
        alpha, beta = [1.0] + [0.0] * end, [0.0] * end + [1.0]
        for j in range(1, end + 1):
            alpha[j] = sum(alpha[i] * p.get(word[i:j], 0.0) for i in range(j))
        for i in reversed(range(end)):
            beta[i] = sum(p.get(word[i:j], 0.0) * beta[j] for j in range(i + 1, end + 1))
        likelihood += n * float(np.log(alpha[end]))
        for i in range(end):
            for j in range(i + 1, end + 1):
                if word[i:j] in p:
                    expected[word[i:j]] += n * alpha[i] * p[word[i:j]] * beta[j] / alpha[end]
    return likelihood, expected


# --- 2. the same, all words at once ---------------------------------------------------------------

def seed_pieces(words: dict[str, int], size: int, longest: int) -> dict[str, int]:
    """``seed_pieces_naive``, by arrays: a substring of length l is a number, made from the number of its first
    l - 1 characters and its last character; a place whose substring occurs nowhere else is given up."""
    text = "".join(words)
    sizes = np.fromiter(map(len, words), dtype=np.int64)
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    alphabet, characters = np.unique(characters, return_inverse=True)
    room = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(text))  # characters from a place to its word's end
    weight = np.repeat(np.fromiter(words.values(), dtype=np.int64), sizes)
    places, number, before, found = np.arange(len(text)), np.zeros(len(text), dtype=np.int64), None, []
    for length in range(1, longest + 1):
        fits = room[places] >= length
        places, number = places[fits], number[fits]
        if not len(places):
            break
        keys, first, which = np.unique(number * len(alphabet) + characters[places + length - 1], return_index=True,
                                       return_inverse=True)
        counts = np.zeros(len(keys), dtype=np.int64)
        np.add.at(counts, which, weight[places])
        if before is not None:  # (places, length, counts, whether to keep) of the substrings one character shorter
            parent = keys // len(alphabet)
            before[3][parent[before[2][parent] == counts]] = length == 2  # a longer one stands for it
        before = places[first], length, counts, (counts > 1) | (length == 1)
        found.append(before)
        again = counts[which] > 1
        places, number = places[again], which[again]
    pieces = {text[place:place + length]: int(n) for places, length, counts, kept in found
              for place, n in zip(places[kept].tolist(), counts[kept].tolist())}
    n_characters = len(alphabet)
    rest = sorted(list(pieces)[n_characters:], key=lambda piece: (-pieces[piece] * len(piece), piece))
    return {piece: pieces[piece] for piece in [*list(pieces)[:n_characters], *rest[:max(0, size - n_characters)]]}


class Lattice:
    """Where which piece fits in which word, as arrays: nodes are places in words, edges are pieces.

    Forward and backward go over all words together, place by place: at step t all edges that end (backward:
    begin) at place t of a word, which is one logsumexp per node over a sorted array.

    words: str; pieces: str -> id from 0 on; own = False leaves out the edge that is a whole word.
    """

    def __init__(self, words: Sequence[str], pieces: dict[str, int], own: bool = True):
        longest, edges, n_nodes = max(map(len, pieces)), [], 0
        firsts, lasts = [], []
        for number, word in enumerate(words):
            n = len(word)
            for i in range(n):
                for j in range(i + 1, min(n, i + longest) + 1):
                    if (piece := pieces.get(word[i:j])) is not None and (own or j - i < n):
                        edges.append((n_nodes + i, n_nodes + j, piece, number))
            firsts.append(n_nodes)
            n_nodes += n + 1
            lasts.append(n_nodes - 1)
        self.first, self.last = np.array(firsts), np.array(lasts)
        self.place = np.arange(n_nodes) - np.repeat(self.first, self.last - self.first + 1)  # of a node in its word
        columns = np.array(edges, dtype=np.int64).reshape(-1, 4).T
        self.start, self.end, self.piece, self.word = columns[:, np.lexsort((columns[1], self.place[columns[1]]))]
        self.backward = np.lexsort((self.start, -self.place[self.start]))

    def keep(self, new_id: np.ndarray) -> None:
        """Renumber the pieces; the edges of those that become -1 go. What is left keeps its order."""
        kept = new_id[self.piece] >= 0
        position = np.cumsum(kept) - 1
        self.backward = position[self.backward[kept[self.backward]]]
        self.start, self.end, self.word = self.start[kept], self.end[kept], self.word[kept]
        self.piece = new_id[self.piece[kept]]

    def _sweep(self, source: np.ndarray, target: np.ndarray, score: np.ndarray, begin: np.ndarray,
               total: bool = True) -> np.ndarray:
        """values[t] = logsumexp (or maximum) over the edges to t of values[source] + score; 0 where it begins.
        -> (nodes,)"""
        values = np.full(len(self.place), -np.inf)
        values[begin] = 0.0
        if not len(target):
            return values
        groups = np.flatnonzero(np.diff(target, prepend=-1))  # where the edges of each target begin
        steps = np.flatnonzero(np.diff(self.place[target[groups]], prepend=-1))  # the first group of each step
        sizes = np.diff(groups, append=len(target))
        for a, b in pairwise([*steps.tolist(), len(groups)]):
            edges = slice(groups[a], groups[b] if b < len(groups) else None)
            found, borders = values[source[edges]] + score[edges], groups[a:b] - groups[a]
            largest = np.maximum.reduceat(found, borders)
            if total:
                largest += np.log(np.add.reduceat(np.exp(found - np.repeat(largest, sizes[a:b])), borders))
            values[target[groups[a:b]]] = largest
        return values

    def best(self, score: np.ndarray) -> np.ndarray:
        """The score of each word's best cut, from those of the edges, (words,); -inf if there is none."""
        return self._sweep(self.start, self.end, score, self.first, total=False)[self.last]

    def expected_counts(self, log_p: np.ndarray, counts: np.ndarray) -> tuple[float, np.ndarray]:
        """``expected_counts_naive`` in logarithms. log_p (pieces,), counts (words,) -> L, c (pieces,)."""
        score, back = log_p[self.piece], self.backward
        alphas = self._sweep(self.start, self.end, score, self.first)
        betas = self._sweep(self.end[back], self.start[back], score[back], self.last)
        totals = alphas[self.last]  # (words,)
        share = np.exp(alphas[self.start] + score + betas[self.end] - totals[self.word]) * counts[self.word]
        return float(totals @ counts), np.bincount(self.piece, share, minlength=len(log_p))


# --- 3. training ----------------------------------------------------------------------------------

def count_pretokens(texts: Iterable[str], pattern: str = WORDS) -> Counter[str]:
    """The words of the texts and how often each occurs. ValueError if ``texts`` is one str, or ``pattern`` is no
    regular expression, captures groups, or leaves out part of a text."""
    if isinstance(texts, (str, bytes)):
        raise ValueError(f"texts must be an iterable of str, got one {type(texts).__name__}: pass [text]")
    try:
        split = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None
    if split.groups:
        raise ValueError(f"pattern {pattern!r} captures {split.groups} group(s): write (?:...) for (...)")
    counts: Counter[str] = Counter()
    for text in texts:
        words = split.findall(text)
        if (covered := sum(map(len, words))) < len(text):
            raise ValueError(f"pattern {pattern!r} covers {covered} of {len(text)} characters: add |(?s:.)")
        counts.update(words)
    return counts


def train_unigram(texts: Iterable[str], n_pieces: int, pattern: str = WORDS, coverage: float = 0.9995,
                  longest: int = 16, seed_size: int | None = None, shrink: float = 0.85, em_steps: int = 2,
                  history: list[tuple[int, float]] | None = None) -> list[tuple[str, float]]:
    """``n_pieces`` pieces and their log probabilities, most probable first; fewer if the texts have no more. The
    logarithms are multiples of 2^-12: sums of them are exact, so that cuts which are equally probable, such as a
    run of blanks has, are so in every order of addition and in every program.

    Args:
        texts: any number of str.
        pattern: cuts texts in words; no piece crosses from one to the next.
        coverage: share of all characters that must have a piece of their own, the frequent ones first.
        longest: characters of a piece, at most.
        seed_size: pieces to begin with; None: 6 * n_pieces.
        shrink: share of the pieces that a round keeps (the paper's eta).
        em_steps: E and M steps before each pruning and after the last.
        history: gets (number of pieces, L) of each E step.

    Raises ValueError for these arguments, for texts without any character, and if the characters alone are more
    than n_pieces.
    """
    if not (0 < coverage <= 1 and longest >= 1 and 0 < shrink < 1 and em_steps >= 1 and n_pieces >= 1):
        raise ValueError("coverage must be in (0, 1], shrink in (0, 1), longest, em_steps and n_pieces at least 1, "
                         f"got {coverage}, {shrink}, {longest}, {em_steps} and {n_pieces}")
    words = _covered(count_pretokens(texts, pattern), coverage)
    if not words:
        raise ValueError("the texts hold no characters: give some")
    seeds = seed_pieces(words, max(6 * n_pieces if seed_size is None else seed_size, n_pieces), longest)
    n_characters = sum(len(piece) == 1 for piece in seeds)
    if n_characters > n_pieces:
        raise ValueError(f"{n_characters} characters cannot all be among {n_pieces} pieces: give more pieces or "
                         "a lower coverage")
    names, numbers = list(seeds), {piece: i for i, piece in enumerate(seeds)}
    lattice, counts = Lattice(list(words), numbers), np.array(list(words.values()), dtype=float)
    in_pieces, rows = Lattice(names, numbers, own=False), np.arange(len(names))  # rows: of the seeds that are left
    expected = np.array(list(seeds.values()), dtype=float)
    while True:
        for _ in range(em_steps):
            likelihood, expected = lattice.expected_counts(m_step(expected), counts)
            if history is not None:
                history.append((len(rows), likelihood))
        if len(rows) <= n_pieces:
            break
        uses = np.zeros(len(names))
        uses[rows] = expected
        taken_over = np.log(np.maximum(expected[in_pieces.piece] + uses[in_pieces.word], 1e-100) / expected.sum())
        in_parts = in_pieces.best(taken_over)[rows]
        loss, cut = np.full(len(rows), np.inf), in_parts > -np.inf  # a character has no parts: no loss is greater
        loss[cut] = expected[cut] * (m_step(expected) - in_parts)[cut]
        kept = np.sort(np.argsort(-loss, kind="stable")[:max(n_pieces, int(shrink * len(rows)))])
        new_id = np.full(len(rows), -1)
        new_id[kept] = np.arange(len(kept))
        lattice.keep(new_id)
        in_pieces.keep(new_id)
        rows, expected = rows[kept], expected[kept]
    # A character that EM has taken everything from stays possible: half an occurrence.
    log_p = np.round(m_step(np.maximum(expected, 0.5)) * 4096) / 4096
    return sorted(zip((names[row] for row in rows), log_p.tolist()), key=lambda item: (-item[1], item[0]))


def m_step(expected: np.ndarray) -> np.ndarray:
    """log(c / sum of c), (pieces,). A piece that is never used gets about -230, as -inf would make NaN of 0 * log 0."""
    return np.log(np.maximum(expected, 1e-100) / expected.sum())


def _covered(words: Counter[str], coverage: float) -> dict[str, int]:
    """The words, cut at the characters that get no piece (the rarest) and into parts of at most LONGEST_WORD."""
    characters: Counter[str] = Counter()
    for word, n in words.items():
        for character in word:
            characters[character] += n
    spare, dropped = (1 - coverage) * characters.total(), set(NOT_IN_PIECES)
    for character, n in sorted(characters.items(), key=lambda item: (item[1], item[0])):
        spare -= n
        if spare < 0:
            break
        dropped.add(character)
    gap, found = regex.compile(f"[{regex.escape(''.join(sorted(dropped)))}]"), Counter()
    for word, n in words.items():
        for part in word and (gap.split(word) if not dropped.isdisjoint(word) else [word]):
            for i in range(0, len(part), LONGEST_WORD):
                found[part[i:i + LONGEST_WORD]] += n
    return dict(found)


# --- 4. demo --------------------------------------------------------------------------------------

def main(data: str | None, pieces: int, coverage: float, em_steps: int) -> None:
    from data import default_documents, read_documents
    documents = default_documents() if data is None else list(read_documents(data))
    history: list[tuple[int, float]] = []
    began = time.perf_counter()
    found = train_unigram(documents, pieces, coverage=coverage, em_steps=em_steps, history=history)
    seconds, n_characters = time.perf_counter() - began, sum(map(len, documents))
    print(f"{len(found):,} pieces learned from {n_characters:,} characters in {seconds:.1f} s; "
          "-L in nats a character:")
    for size in dict.fromkeys(size for size, _ in history):
        print(f"  {size:8,} pieces   " + " -> ".join(f"{-x / n_characters:.4f}" for n, x in history if n == size))
    print("most probable:", " ".join(repr(piece) for piece, _ in found if len(piece) > 3)[:100], "...")

    few = dict(count_pretokens(documents[:1]).most_common(200))
    seeds = seed_pieces(few, 500, 8)
    same = list(seeds.items()) == list(seed_pieces_naive(few, 500, 8).items())
    log_p = m_step(np.array(list(seeds.values()), dtype=float))
    naive = expected_counts_naive(few, dict(zip(seeds, log_p)))[1]
    fast = Lattice(list(few), {piece: i for i, piece in enumerate(seeds)}).expected_counts(
        log_p, np.array(list(few.values()), dtype=float))[1]
    print(f"seeds, naive = fast: {same} (expected True); expected counts, max |naive - fast| = "
          f"{np.abs(fast - list(naive.values())).max():.1e} (expected below 1e-9)")
    # Within a number of pieces: dropping pieces costs likelihood.
    fell = any(b < a - 1e-9 * abs(a) for (n, a), (m, b) in pairwise(history) if n == m)
    total = sum(np.exp(score) for _, score in found)
    print(f"probabilities add up to {total:.4f} (expected 1 within 0.0002); EM never fell: {not fell} "
          "(expected True)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", help="files, such as 'my/*.txt' or a.jsonl,b.txt (default: Python's own)")
    parser.add_argument("--pieces", type=int, default=4096, help="how many to learn (default %(default)s)")
    parser.add_argument("--coverage", type=float, default=0.9995, help="share of characters (default %(default)s)")
    parser.add_argument("--em_steps", type=int, default=2, help="before each pruning (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
