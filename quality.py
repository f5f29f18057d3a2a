"""Quality: which pages of a crawl are text worth learning from, by rules.   C4: Raffel et al. 2020 (1910.10683)
Gopher: Rae et al. 2021 (2112.11446), appendix A.1

Idea      Most of a crawl is menus, code and lists. C4 throws away lines and pages by simple rules, Gopher adds
          statistics of words and repetitions. In what is left, addresses and telephone numbers are masked.
Formula   line is kept  <=>  C4's rules for lines hold of it
          page is kept  <=>  C4's and Gopher's rules for pages hold of the lines that are kept; the longest of these:
          n = 2, 3, 4   characters in the most frequent n-gram of words / all characters      <= 0.20, 0.18, 0.16
          n = 5 .. 10   characters in n-grams of words that occur more than once / all        <= 0.15 .. 0.10
Shapes    a page is a str, a line never contains its line end
Omits     the identification of languages (C4's tenth rule: langdetect); Gopher's rules for lists of documents;
          names and addresses, which no pattern finds; taste, which is learned (quality_classifier.py).
Run       python quality.py                       what each rule removes of Python's documentation; a few seconds
          python quality.py --data 'my/*.txt'     the same of your own pages
          Ends with "cleaned again, ..."
Test      pytest tests/test_quality.py
"""

import argparse
import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

# --- 1. C4's rules: True keeps ----------------------------------------------------------------

TERMINAL = (".", "!", "?", '"', "\u201d")  # a period, an exclamation or question mark, an end quotation mark
SENTENCE_END = re.compile(r"""(?<=[.!?])\s+|(?<=[.!?]["'\u201d\u2019)\]])\s+""")
CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]", re.IGNORECASE)
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def ends_in_terminal_punctuation(line: str) -> bool:
    """A line that is a sentence ends as one: menus and headings do not."""
    return line.endswith(TERMINAL)


def has_five_words(line: str) -> bool:
    """At least five words, which white space separates."""
    return len(line.split(None, 5)) >= 5


def has_no_javascript(line: str) -> bool:
    """Nothing like "please enable JavaScript"."""
    return "javascript" not in line.lower()


def has_no_policy(line: str) -> bool:
    """No boilerplate about terms, privacy or cookies."""
    line = line.lower()
    return not any(phrase in line for phrase in POLICIES)


def has_no_lorem_ipsum(page: str) -> bool:
    """No place-holder text anywhere on the page."""
    return "lorem ipsum" not in page.lower()


def has_no_curly_bracket(page: str) -> bool:
    """No "{", which programs have and prose has not."""
    return "{" not in page


def without_citation_markers(page: str) -> str:
    """Without Wikipedia's [1], [edit] and [citation needed]."""
    return CITATION.sub("", page)


def sentences(line: str) -> list[str]:
    """A line cut behind . ! ? (and a quotation mark or bracket that closes there) where white space follows."""
    return SENTENCE_END.split(line)


def has_three_sentences(page: str) -> bool:
    """At least three sentences, those of all lines together."""
    n = 0
    for line in page.split("\n"):
        n += len(sentences(line))
        if n >= 3:
            return True
    return False


class BadWords:
    """Called with a page: True if it has none of the words and phrases, which are found as whole words in any
    case. ``BadWords.from_file`` reads one a line, as in the List of Dirty, Naughty, Obscene or Otherwise Bad Words.
    """

    def __init__(self, words: Iterable[str]):
        pieces = [" ".join(self._words(word)) for word in words]
        self.words = frozenset(piece for piece in pieces if piece and " " not in piece)
        self.phrases = tuple(sorted({f" {piece} " for piece in pieces if " " in piece}))

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "BadWords":
        """Raises ValueError, which names the file, if it cannot be read or holds no word."""
        try:
            made = cls(Path(path).read_text(encoding="utf-8").splitlines())
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}): check the path") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, byte {error.start}: is not UTF-8: convert the file first") from None
        if not made.words and not made.phrases:
            raise ValueError(f"{path}: holds no word: give one word or phrase a line")
        return made

    @staticmethod
    def _words(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    def __call__(self, page: str) -> bool:
        words = self._words(page)
        if not self.words.isdisjoint(words):
            return False
        text = f" {' '.join(words)} " if self.phrases else ""
        return not any(phrase in text for phrase in self.phrases)


LINE_RULES: dict[str, Callable[[str], bool]] = {
    "terminal punctuation": ends_in_terminal_punctuation, "five words": has_five_words,
    "javascript": has_no_javascript, "policy": has_no_policy}
PAGE_RULES: dict[str, Callable[[str], bool]] = {
    "curly bracket": has_no_curly_bracket, "lorem ipsum": has_no_lorem_ipsum}


# --- 2. Gopher's rules: True keeps ------------------------------------------------------------

STOP_WORDS = frozenset("the be to of and that have with".split())
BULLETS = ("•", "‣", "◦", "▪", "●", "-", "*")


def has_50_to_100000_words(lines: Sequence[str], words: Sequence[str]) -> bool:
    """Neither a snippet nor a dump."""
    return 50 <= len(words) <= 100_000


def has_mean_word_length_3_to_10(lines: Sequence[str], words: Sequence[str]) -> bool:
    """Characters per word."""
    return 3 * len(words) <= sum(map(len, words)) <= 10 * len(words)


def has_few_symbols(lines: Sequence[str], words: Sequence[str]) -> bool:
    """At most one "#" and at most one ellipsis for ten words."""
    text = " ".join(words)
    return max(text.count("#"), text.count("...") + text.count("…")) <= 0.1 * len(words)


def has_few_bullets(lines: Sequence[str], words: Sequence[str]) -> bool:
    """At most 90% of the lines begin with a bullet."""
    return sum(line.lstrip().startswith(BULLETS) for line in lines) <= 0.9 * len(lines)


def has_few_ellipses(lines: Sequence[str], words: Sequence[str]) -> bool:
    """At most 30% of the lines end in an ellipsis."""
    return sum(line.rstrip().endswith(("...", "…")) for line in lines) <= 0.3 * len(lines)


def has_alphabetic_words(lines: Sequence[str], words: Sequence[str]) -> bool:
    """At least 80% of the words contain a letter."""
    return sum(word.isalpha() or any(map(str.isalpha, word)) for word in words) >= 0.8 * len(words)


def has_two_stop_words(lines: Sequence[str], words: Sequence[str]) -> bool:
    """At least two different ones of: the be to of and that have with."""
    return len(STOP_WORDS.intersection(" ".join(words).lower().split())) >= 2


# Most of the characters (share of all) that may lie in: the most frequent 2- to 4-gram of words; 5- to 10-grams
# that occur more than once (Gopher, table A1).
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
COPIED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def has_few_copied_lines(lines: Sequence[str], words: Sequence[str]) -> bool:
    """Lines that were there before: at most 30% of the lines, and 20% of the characters."""
    seen, n_lines, n_characters = set(), 0, 0
    for line in lines:
        if line in seen:
            n_lines, n_characters = n_lines + 1, n_characters + len(line)
        seen.add(line)
    return n_lines <= 0.3 * len(lines) and n_characters <= 0.2 * sum(map(len, lines))


def ngram_shares_naive(words: Sequence[str]) -> dict[int, float]:
    """n -> share of the words' characters, as the table says: n up to 4, of the n-gram that occurs most often (the
    longest of these), all occurrences, also where they overlap; n from 5, of all n-grams that
    occur more than once, each character once."""
    shares, total = {}, max(1, sum(map(len, words)))
    for n in (*TOP_NGRAM, *COPIED_NGRAMS):
        grams, places, covered = [tuple(words[i:i + n]) for i in range(len(words) - n + 1)], {}, set()
        for i, gram in enumerate(grams):
            places.setdefault(gram, []).append(i)
        most = max(map(len, places.values()), default=0)
        for gram, where in places.items():
            if len(where) > 1 and n >= 5:
                covered.update(j for i in where for j in range(i, i + n))
        if n >= 5:
            shares[n] = sum(len(words[j]) for j in covered) / total
        else:
            found = [len(where) * sum(map(len, gram)) for gram, where in places.items() if len(where) == most > 1]
            shares[n] = max(found, default=0) / total
    return shares


def ngram_shares(words: Sequence[str]) -> dict[int, float]:
    """The same by sorting. An n-gram occurs twice only if both (n - 1)-grams in it do: fewer and fewer are left."""
    numbers: dict[str, int] = {}
    gram = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.int64)  # (N,)
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])  # (N + 1,)
    total, shares = max(1, int(ends[-1])), dict.fromkeys((*TOP_NGRAM, *COPIED_NGRAMS), 0.0)
    again = np.bincount(gram)[gram] > 1 if len(gram) else np.zeros(0, dtype=bool)
    for n in shares:
        places = np.flatnonzero(again[:-1] & again[1:])  # of n-grams that may occur twice
        if not len(places):
            break
        pair = gram[places] * len(words) + gram[places + 1]
        order = np.argsort(pair, kind="stable")
        places, pair = places[order], pair[order]  # equal n-grams beside each other
        new = np.ones(len(pair) + 1, dtype=bool)
        new[1:-1] = pair[1:] != pair[:-1]
        starts = np.flatnonzero(new)
        counts = starts[1:] - starts[:-1]
        gram, again = np.zeros_like(gram[1:]), np.zeros_like(again[1:])  # (N - n + 1,)
        gram[places], again[places] = np.arange(len(counts)).repeat(counts), (counts > 1).repeat(counts)
        if n in TOP_NGRAM and (most := counts.max()) > 1:
            begins = places[starts[:-1][counts == most]]
            shares[n] = float(most * (ends[begins + n] - ends[begins]).max() / total)
        elif n in COPIED_NGRAMS:
            edges = np.zeros(len(words) + 1, dtype=np.int64)
            edges[:len(again)] += again
            edges[n:] -= again
            shares[n] = float(lengths[np.cumsum(edges)[:-1] > 0].sum() / total)
    return shares


def has_few_copied_ngrams(lines: Sequence[str], words: Sequence[str]) -> bool:
    """Neither one n-gram of words, nor all that occur more than once taken together, make too much of the page."""
    shares = ngram_shares(words)
    return all(shares[n] <= most for n, most in (TOP_NGRAM | COPIED_NGRAMS).items())


GOPHER_RULES: dict[str, Callable[[Sequence[str], Sequence[str]], bool]] = {
    "50 to 100,000 words": has_50_to_100000_words, "mean word length": has_mean_word_length_3_to_10,
    "symbols": has_few_symbols, "bullets": has_few_bullets, "ellipses": has_few_ellipses,
    "alphabetic words": has_alphabetic_words, "stop words": has_two_stop_words,
    "copied lines": has_few_copied_lines, "copied n-grams": has_few_copied_ngrams}


# --- 3. masking -------------------------------------------------------------------------------

EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[^\W\d_]{2,24}(?![\w-])")
# The first character stands before the look behind it: regular expressions that begin with one search slowly.
IPV4 = re.compile(r"\d(?<![\w.].)\d{0,2}(?:\.\d{1,3}){3}(?![\w]|\.\d)")
IPV6 = re.compile(r"[0-9A-Fa-f:](?<![\w:.].)[0-9A-Fa-f:]*:[0-9A-Fa-f:]*(?:\.\d{1,3}){0,3}(?![\w:])")
PHONE = re.compile(r"[+(\d](?<![\w+./-].)(?:(?<=\+)\d(?:[ ().-]{0,2}\d){7,14}"
                   r"|(?:(?<=\()\d{3}\) ?|(?<=\d)\d\d[ .-])\d{3}[ .-]\d{4})(?![\w-]|\.\d)")


def mask(text: str) -> tuple[str, dict[str, int]]:
    """E-mail addresses, IP addresses (4 and 6) and telephone numbers (+ and 8 to 15 digits; North American
    3-3-4) replaced by <email>, <ip>, <phone>; how many there were of each.
    """
    found = dict.fromkeys(("email", "ip", "phone"), 0)

    def replace(kind: str) -> Callable[[re.Match], str]:
        def by(match: re.Match) -> str:
            if kind == "ip":
                try:
                    ipaddress.ip_address(match[0])
                except ValueError:  # 999.1.1.1, or the time 12:30:45
                    return match[0]
                if not any(map(str.isdigit, match[0])):  # a::b, which is C++
                    return match[0]
            found[kind] += 1
            return f"<{kind}>"
        return by

    # The tests before the searches are for speed: few pages have an @ or two colons.
    if "@" in text:
        text = EMAIL.sub(replace("email"), text)
    text = IPV4.sub(replace("ip"), text)
    if "::" in text or text.count(":") > 6:
        text = IPV6.sub(replace("ip"), text)
    return PHONE.sub(replace("phone"), text), found


# --- 4. all rules on a page -------------------------------------------------------------------

def clean(page: str, bad_words: BadWords | None = None, gopher: bool = True) -> tuple[str, list[tuple[str, str]]]:
    """C4's rules, then Gopher's on what they leave, then the masks.

    Returns:
        the cleaned page, "" if it is removed, and (rule, what the rule removed) in the order of removal: the page
        as it was then, lines, citation markers, addresses. Lines lose white space at their ends.
    """
    removed: list[tuple[str, str]] = []
    for name, rule in PAGE_RULES.items():
        if not rule(page):
            return "", [(name, page)]
    if bad_words and not bad_words(page):
        return "", [("bad words", page)]
    if "[" in page:
        removed += [("citation markers", marker) for marker in CITATION.findall(page)]
        page = without_citation_markers(page)
    lines = []
    for line in map(str.strip, page.split("\n")):
        if line:
            for name, rule in LINE_RULES.items():
                if not rule(line):
                    removed.append((name, line))
                    break
            else:
                lines.append(line)
    page = "\n".join(lines)
    if not has_three_sentences(page):
        return "", removed + [("three sentences", page)]
    words = page.split()
    for name, rule in GOPHER_RULES.items() if gopher else ():
        if not rule(lines, words):
            return "", removed + [(name, page)]
    page, found = mask(page)
    return page, removed + [(f"masked {kind}", "") for kind in found for _ in range(found[kind])]


# --- 5. demo ----------------------------------------------------------------------------------

def main(data: str | None, bad_words: str | None, examples: int) -> None:
    if examples < 0:
        raise ValueError(f"--examples must be at least 0, got {examples}")
    from data import default_documents, read_documents
    pages = default_documents() if data is None else list(read_documents(data))
    bad = BadWords.from_file(bad_words) if bad_words else None
    counts: dict[str, list] = {}
    kept = []
    for page in pages:
        text, removed = clean(page, bad)
        kept += [text] if text else []
        for rule, what in removed:
            row = counts.setdefault(rule, [0, 0, []])
            row[0], row[1] = row[0] + 1, row[1] + len(what.split())
            if len(row[2]) < examples:
                row[2].append(what)
    print(f"{len(pages):,} pages of {sum(len(page.split()) for page in pages):,} words; kept {len(kept):,} of "
          f"{sum(len(page.split()) for page in kept):,}. Removed:")
    for rule, (times, words, shown) in counts.items():
        print(f"  {rule:22} {times:7,} times {words:10,} words")
        for what in shown:
            print(f"      {what[:90]!r}")
    same = sum(clean(page, bad)[0] == page for page in kept)
    print(f"cleaned again, {same:,} of {len(kept):,} kept pages stay as they are (expected all)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", help="files, such as 'my/*.txt' or a.jsonl,b.txt (default: Python's own)")
    parser.add_argument("--bad_words", metavar="FILE", help="one word or phrase a line (default: none)")
    parser.add_argument("--examples", type=int, default=1, help="of each rule to show (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
