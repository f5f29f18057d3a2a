"""WordPiece: words cut into the longest pieces that a vocabulary has.   Devlin et al. 2019 (1810.04805)

Idea      BERT's tokenizer. A text is cleaned, lowered, freed of accents and split at blanks and punctuation; each
          word is cut from left to right into the longest known pieces, "##" before a piece that continues a word.
          A vocabulary is learned as in byte-pair encoding, from characters, but within words only.
Formula   train    (a, b) = argmax over neighbours of  sum over words w of  count(w) * #{i : (w_i, w_i+1) = (a, b)}
                   a + b joins the vocabulary and replaces its two parts everywhere; repeat
          encode   piece = the longest prefix of what is left of the word that is in the vocabulary; repeat
                   a word with a rest that has no such prefix, or of more than 100 characters, is one [UNK]
Shapes    n characters -> ids in [0, V), one or more for each word -> the words again, cleaned and lowered
Omits     the likelihood in place of the count (Schuster & Nakajima 2012): BERT's own trainer was never published.
Run       python wordpiece.py                  CPU, 10 s; ends with "naive = fast: True, words read back: ..."
          python wordpiece.py --data book.txt --out vocab.txt
Test      pytest tests/test_wordpiece.py
"""

import argparse
import heapq
import os
import re
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in the order of their ids in a new vocabulary
LONGEST_WORD = 100  # characters
REMEMBERED = 1_000_000  # words whose pieces are kept in memory


# --- 1. basic tokenisation: text to words -------------------------------------------------------

# Hugging Face's tables of marks and punctuation are those of Unicode 8, Python's are newer: a mark, sign or format
# character that came later, inside these ranges, is a letter to the former. Ids must not depend on the Python.
_NEWER = re.compile("([" + "".join(re.sub(r"(\w+)", lambda code: chr(int(code[1], 16)), part) for part in (
    "5c8-5c9 61d 7fd 890-8e2 9fd-9fe a76 afa-aff b53-b55 c04 c3c c77 c84 d00 d3b-d3c d81 eba ece 180f 1885-1886 "
    "1abf-1af0 1b4e-1b4f 1b7d-1b7f 1df6-1dfb 2e43-2e63 a82c a8c5 a8ff a9bd 10d24-10f89 11070-11074 110c2-110cd 111cf "
    "1123e-11241 1133b 113bb-1145e 11660-1166c 116b9 1182f-11fff 12ff1-1612f 16d6d-16f4f 16fe2-16fe4 1cf00-1d128 "
    "1d25b-1d25c 1e000-1e6f5 1e944-1e95f").split()) + "])")


def _category(character: str) -> str:
    if character in "\u166d\U000111c9":  # punctuation in Unicode 8, now a symbol and a mark
        return "Po"
    return "Lo" if _NEWER.match(character) else unicodedata.category(character)


def _decompose(text: str) -> str:
    """Canonical decomposition (NFD): "é" is "e" and a mark. The newer characters stay where they are."""
    return "".join(unicodedata.normalize("NFD", part) for part in _NEWER.split(text))


def _is_chinese(character: str) -> bool:
    """Ideographs, each a word of its own; Japanese and Korean letters are not. The gap before 2B920 is BERT's."""
    code = ord(character)
    return (0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0xF900 <= code <= 0xFAFF
            or 0x20000 <= code <= 0x2A6DF or 0x2A700 <= code <= 0x2B81F or 0x2B920 <= code <= 0x2CEAF
            or 0x2F800 <= code <= 0x2FA1F)


def _clean(character: str) -> str:
    if character in "\t\n\r" or _category(character)[0] == "Z":
        return " "
    if character == "\ufffd" or _category(character) in ("Cc", "Cf", "Co", "Cs"):  # control characters and the like
        return ""
    return f" {character} " if _is_chinese(character) else character


def _split_punctuation(character: str) -> str:
    # All of ASCII that is no letter, digit or blank counts, also $ + < = > ^ ` | ~, which Unicode calls symbols.
    is_ascii_sign = character.isascii() and character.isprintable() and not character.isalnum() and character != " "
    return f" {character} " if is_ascii_sign or _category(character)[0] == "P" else character


def _lower(character: str) -> str:
    return "" if _category(character) == "Mn" else _split_punctuation(character.lower())


class _Table(dict):
    """For str.translate: code point -> what replaces it, worked out when the character first comes up."""

    def __init__(self, rule: Callable[[str], str]):
        super().__init__()
        self.rule = rule

    def __missing__(self, code: int) -> str:
        self[code] = self.rule(chr(code))
        return self[code]


_CLEAN, _LOWER, _SPLIT = _Table(_clean), _Table(_lower), _Table(_split_punctuation)


def split_words(text: str, lower: bool = True) -> list[str]:
    """A text's words and signs. ``lower`` also takes accents off: characters are decomposed, and marks dropped.

    Control characters vanish, ideographs and punctuation stand alone.   google-research/bert, BasicTokenizer
    """
    text = text.translate(_CLEAN)
    if lower:
        text = _decompose(text).translate(_LOWER)
    else:
        text = text.translate(_SPLIT)
    return text.split()


# --- 2. a vocabulary from a corpus --------------------------------------------------------------

def _count_words(texts: Iterable[str], vocab_size: int, lower: bool) -> tuple[dict[tuple[str, ...], int], list[str]]:
    """Words in pieces of one character with their counts, and the vocabulary so far: SPECIAL and all characters."""
    if isinstance(texts, str):
        raise ValueError("texts must be an iterable of str, got one str: pass [text]")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(split_words(text, lower))
    words = {(word[0], *("##" + c for c in word[1:])): n for word, n in counts.items() if len(word) <= LONGEST_WORD}
    alphabet = sorted({piece for word in words for piece in word})
    if not words:
        raise ValueError("the texts hold no words: give text to learn a vocabulary from")
    if vocab_size < len(SPECIAL) + len(alphabet):
        raise ValueError(f"vocab_size {vocab_size} cannot hold the {len(SPECIAL)} special tokens and {len(alphabet)} "
                         "characters at the start of words and inside them: give a larger one, or other texts")
    return words, [*SPECIAL, *alphabet]


def _merge(word: Sequence[str], first: str, second: str) -> tuple[str, ...]:
    merged, i = [], 0
    while i < len(word):
        if word[i] == first and i + 1 < len(word) and word[i + 1] == second:
            merged.append(first + second[2:])
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return tuple(merged)


def train_wordpiece_naive(texts: Iterable[str], vocab_size: int, lower: bool = True) -> list[str]:
    """The ``vocab_size`` tokens learned from the texts, in order of id, all pairs counted anew each round.

    Special tokens come first, then characters, then merges, the most frequent pair first; a tie goes to the pair
    that comes first in lexicographic order. Fewer tokens, if every word has become one.
    Raises ValueError for texts without words and a ``vocab_size`` too small for their characters.
    """
    words, tokens = _count_words(texts, vocab_size, lower)
    while len(tokens) < vocab_size:
        counts: Counter[tuple[str, str]] = Counter()
        for word, n in words.items():
            for pair in pairwise(word):
                counts[pair] += n
        if not counts:
            break
        first, second = min(counts, key=lambda pair: (-counts[pair], pair))
        tokens.append(first + second[2:])
        words = {_merge(word, first, second): n for word, n in words.items()}
    return tokens


def train_wordpiece(texts: Iterable[str], vocab_size: int, lower: bool = True) -> list[str]:
    """``train_wordpiece_naive``, touching only the words that hold the pair.

    A count that falls leaves its old entry in the heap, too high; it is corrected when it comes up. Only pairs
    with the new token gain, and they are pushed. So the first entry that is true is the maximum.
    """
    counted, tokens = _count_words(texts, vocab_size, lower)
    words, frequency = list(counted), list(counted.values())
    counts: defaultdict[tuple[str, str], int] = defaultdict(int)
    holders: defaultdict[tuple[str, str], set[int]] = defaultdict(set)  # pair -> words that hold it, or once did
    for i, word in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += frequency[i]
            holders[pair].add(i)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < vocab_size:
        minus_count, best = heapq.heappop(heap)
        if counts[best] != -minus_count:
            if counts[best] > 0:
                heapq.heappush(heap, (-counts[best], best))
            continue
        tokens.append(best[0] + best[1][2:])
        gained = set()
        for i in holders.pop(best):
            merged = _merge(words[i], *best)
            if len(merged) == len(words[i]):  # an earlier merge took the pair apart
                continue
            for pair in pairwise(words[i]):
                counts[pair] -= frequency[i]
            for pair in pairwise(merged):
                counts[pair] += frequency[i]
                if tokens[-1] in pair:
                    holders[pair].add(i)
                    gained.add(pair)
            words[i] = merged
        for pair in gained:
            heapq.heappush(heap, (-counts[pair], pair))
    return tokens


# --- 3. words to ids and back -------------------------------------------------------------------

class WordPiece:
    """A vocabulary at work, with the ids ``pad``, ``unk``, ``cls``, ``sep``, ``mask`` as attributes.

    Args:
        tokens: the vocabulary in order of id, SPECIAL among it.
        lower: lower case without accents ("uncased" models) or the text as it is ("cased").

    Raises:
        ValueError: if a token comes twice, or a special one is missing.
    """

    def __init__(self, tokens: Sequence[str], lower: bool = True):
        self.tokens, self.lower = list(tokens), lower
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if self.ids[token] != i)
            raise ValueError(f"token {twice!r} is in the vocabulary twice")
        if missing := [token for token in SPECIAL if token not in self.ids]:
            raise ValueError(f"the vocabulary of {len(self.tokens)} tokens lacks {' '.join(missing)}")
        self.pad, self.unk, self.cls, self.sep, self.mask = (self.ids[token] for token in SPECIAL)
        self.longest = max(map(len, self.tokens))
        self._known: dict[str, list[int]] = {}  # words seen before, to skip cutting them again

    def __len__(self) -> int:
        """V, the number of tokens."""
        return len(self.tokens)

    def cut(self, word: str) -> list[int]:
        """The ids of one word's pieces, the longest possible first."""
        if len(word) > LONGEST_WORD:
            return [self.unk]
        pieces, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(min(len(word), start + self.longest), start, -1):
                if (piece := self.ids.get(prefix + word[start:end])) is not None:
                    break
            else:
                return [self.unk]
            pieces.append(piece)
            start = end
        return pieces

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of a text, without [CLS] and [SEP]. ``allow_special``: one that the text spells out, such as
        "[MASK]", is that token (transformers' default); else it is text like any other."""
        ids = []
        for part in re.split(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])", text) if allow_special else [text]:
            if allow_special and part in SPECIAL:
                ids.append(self.ids[part])
                continue
            for word in split_words(part, self.lower):
                if word not in self._known:
                    if len(self._known) >= REMEMBERED:  # texts without end must not fill the memory
                        self._known.clear()
                    self._known[word] = self.cut(word)
                ids += self._known[word]
        return ids

    def encode_words(self, words: Iterable[str]) -> list[list[int]]:
        """The ids of each word apart, at least one: what is nothing but control characters is an [UNK]."""
        return [self.encode(word) or [self.unk] for word in words]

    def decode(self, ids: Iterable[int]) -> str:
        """The tokens with a blank between words. ValueError for an id outside [0, V)."""
        ids = list(ids)
        if wrong := [i for i in ids if not 0 <= i < len(self)]:
            raise ValueError(f"token id {wrong[0]} is not in the vocabulary, 0 .. {len(self) - 1}")
        return " ".join(self.tokens[i] for i in ids).replace(" ##", "")

    @classmethod
    def load(cls, path: str | os.PathLike, lower: bool = True) -> "WordPiece":
        """Read ``vocab.txt``, one token a line. ValueError, one line: no such file, empty, not UTF-8, incomplete."""
        try:
            text = Path(path).read_bytes().decode().replace("\r\n", "\n")
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}): check the path") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, byte {error.start}: is not UTF-8: convert the file first") from None
        try:
            # splitlines would also cut at U+2028, which can be a token
            return cls(text.removesuffix("\n").split("\n"), lower)
        except ValueError as error:
            raise ValueError(f"{path}: {error}: copy a whole vocab.txt of BERT's") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write ``vocab.txt``: beside first, then renamed. ValueError if it cannot be written there."""
        beside = Path(f"{path}.{os.getpid()}.tmp")
        try:
            beside.write_text("".join(token + "\n" for token in self.tokens), encoding="utf-8", newline="\n")
            os.replace(beside, path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror}): check the folder, its permissions and the "
                             "room on the disk") from None
        finally:
            beside.unlink(missing_ok=True)


# --- 4. demo ------------------------------------------------------------------------------------

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


def main(data: str | None, vocab_size: int, cased: bool, out: str | None) -> None:
    from data import default_documents, read_documents, split_documents
    check_writable(out)
    documents = default_documents() if data is None else list(read_documents(data))
    train, held_out = split_documents(documents)
    began = time.perf_counter()
    tokenizer = WordPiece(train_wordpiece(train, vocab_size, not cased), not cased)
    seconds = time.perf_counter() - began
    print(f"{len(tokenizer)} tokens learned from {sum(map(len, train)):,} characters in {seconds:.1f} s")
    print(f"the last ten: {' '.join(tokenizer.tokens[-10:])}")
    if out is not None:
        tokenizer.save(out)
        print(f"saved: {out}")

    for text in ("Tokenizers split the unsplittable.", "Café déjà-vu, 東京!"):
        print(f"{text!r} -> {' '.join(tokenizer.tokens[i] for i in tokenizer.encode(text))}")
    words = [word for text in held_out for word in split_words(text, not cased)]
    pieces = tokenizer.encode_words(words)
    read_back = sum(tokenizer.decode(ids) == word for ids, word in zip(pieces, words)) / len(words)
    print(f"held-out text: {sum(map(len, pieces)) / len(words):.2f} tokens a word")
    few, size = train[:3], min(vocab_size, 400)
    same = train_wordpiece_naive(few, size, not cased) == train_wordpiece(few, size, not cased)
    print(f"naive = fast: {same} (expected True), words read back: {read_back:.2%} (expected above 99%; a character "
          "never seen is [UNK])")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", help="files, such as 'my/*.txt' or a.jsonl,b.txt (default: Python's own)")
    parser.add_argument("--vocab_size", type=int, default=4096, help="V (default %(default)s)")
    parser.add_argument("--cased", action="store_true", help="keep capitals and accents")
    parser.add_argument("--out", metavar="vocab.txt", help="write the vocabulary there")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
