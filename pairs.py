"""Parallel sentences: a corpus whose word alignments are known, vocabularies, batches.   Och & Ney 2003

Idea      Translation is learned from pairs of sentences that mean the same. Numbers and dates written out are real
          translation that can be generated, and it is not word by word: ninety-seven is quatre-vingt-dix-sept,
          four twenties and seventeen, in French, and siebenundneunzig, the units first, in German. Every word is
          generated from a part of the meaning, so which words translate each other is known, too.
Formula   (s, t) is a sure link  <=>  source word s and target word t share a part of the meaning; a possible one, too,
          where a word without meaning ("and", "of") stands beside such a word
Shapes    pairs -> source (B, S), lengths (B,), inputs (B, T), targets (B, T), padded on the right
Omits     subwords, lower-casing; apostrophes come back as words of their own. The scores are in bleu.py.
Run       python pairs.py                      pairs with their alignments, and batches of them
          python pairs.py --language german
          python pairs.py --data fra.tsv       sentence pairs of your own, Tatoeba's say
          Ends with "read back from their batches ..."
Test      pytest tests/test_pairs.py
"""

import argparse
import datetime
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor


# --- 1. a parallel corpus whose word alignments are known -------------------------------------

class Word(NamedTuple):
    """A word, or a piece of one: "-x" and "+x" are written onto the word before, with a hyphen and without.

    ``parts`` names the parts of the sentence's meaning that the word carries: words of two languages that share
    a part translate each other. Words like "and" and "of" carry none.
    """
    text: str
    parts: frozenset[str] = frozenset()


class Pair(NamedTuple):
    """A sentence and its translation, word by word; of generated pairs the links (source, target) are known."""
    source: list[str]
    target: list[str]
    sure: frozenset[tuple[int, int]] = frozenset()  # words that share a part of the meaning
    possible: frozenset[tuple[int, int]] = frozenset()  # these, and "and", "of", ... with what they stand beside


def _words(text: str, *parts: str) -> list[Word]:
    return [Word(word, frozenset(parts)) for word in text.split()]


def _digits(n: int, of: str) -> list[str]:
    """The parts of the meaning of n < 100: tens and units, where they are not zero."""
    return [of + "tens"] * (n >= 10) + [of + "units"] * (n % 10 > 0 or n == 0)


def english_number(n: int, of: str = "") -> list[Word]:
    """n < 10^6, as in "two hundred and one"; ``of`` begins the names of all parts of its meaning."""
    words = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
             "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety").split()
    if n >= 1000:
        rest = _words("and" if n % 1000 < 100 else "") + english_number(n % 1000, of) if n % 1000 else []
        return english_number(n // 1000, of + "thousand ") + _words("thousand", of + "thousand") + rest
    if n >= 100:
        rest = _words("and") + english_number(n % 100, of) if n % 100 else []
        return _words(words[n // 100], of + "hundreds") + _words("hundred", of + "hundred") + rest
    if n < 20:
        return _words(words[n], *_digits(n, of))
    return _words(words[18 + n // 10], of + "tens") + _words(f"-{words[n % 10]}" if n % 10 else "", of + "units")


def french_number(n: int, of: str = "", plural: bool = True) -> list[Word]:
    """n < 10^6, as in "deux cent un"; ``plural``: nothing follows that takes the s from "cents" and "vingts"."""
    words = ("zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize dix-sept "
             "dix-huit dix-neuf vingt trente quarante cinquante soixante").split()
    if n >= 1000:  # mille alone is one thousand, as cent is one hundred
        many = french_number(n // 1000, of + "thousand ", plural=False) if n >= 2000 else []
        thousand = _words("mille", of + "thousand", *[] if many else [of + "thousand units"])
        return many + thousand + (french_number(n % 1000, of, plural) if n % 1000 else [])
    if n >= 100:
        many = _words(words[n // 100], of + "hundreds") if n >= 200 else []
        hundred = "cents" if many and plural and n % 100 == 0 else "cent"
        hundred = _words(hundred, of + "hundred", *[] if many else [of + "hundreds"])
        return many + hundred + (french_number(n % 100, of, plural) if n % 100 else [])
    if n < 17:
        return _words(words[n], *_digits(n, of))
    if n < 20:
        return _words("dix", of + "tens") + _words(words[n][3:], of + "units")
    # 70 is 60 + 10, 80 is 4 x 20 and 90 is 4 x 20 + 10.
    base = 80 if n >= 80 else min(n // 10 * 10, 60)
    if base == 80:
        tens = _words("quatre -vingts" if plural and n == 80 else "quatre -vingt", of + "tens")
    else:
        tens = _words(words[18 + base // 10], of + "tens")
    if n == base:
        return tens
    first, *others = french_number(n - base, of)
    if n - base in (1, 11) and base < 80:
        return tens + _words("et") + [first, *others]
    return tens + [Word("-" + first.text, first.parts), *others]


def german_number(n: int, of: str = "", last: bool = True) -> list[Word]:
    """n < 10^6, written as one word, as in "zweihundert+ein+und+zwanzig"; one is "eins" only if ``last``."""
    words = ("null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn "
             "siebzehn achtzehn neunzehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig").split()
    if n >= 1000:
        pieces = german_number(n // 1000, of + "thousand ", last=False) + _words("tausend", of + "thousand")
        pieces += german_number(n % 1000, of, last) if n % 1000 else []
    elif n >= 100:
        pieces = _words("ein" if n < 200 else words[n // 100], of + "hundreds") + _words("hundert", of + "hundred")
        pieces += german_number(n % 100, of, last) if n % 100 else []
    elif n < 20:
        pieces = _words("ein" if n == 1 and not last else words[n], *_digits(n, of))
    else:  # the units come first
        units = _words("ein" if n % 10 == 1 else words[n % 10], of + "units") + _words("und") if n % 10 else []
        pieces = units + _words(words[18 + n // 10], of + "tens")
    return pieces[:1] + [Word("+" + word.text.lstrip("+"), word.parts) for word in pieces[1:]]


def date_in_words(date: datetime.date, language: str, of: str = "") -> list[Word]:
    """A day from 1100 on: "Monday, the third of March nineteen ninety-seven" in one of the three languages."""
    def ordinal(words: list[Word], irregular: dict[str, str], ending: str) -> list[Word]:
        joint, stem = re.fullmatch(r"([-+]?)(.*)", words[-1].text).groups()
        return words[:-1] + [Word(joint + irregular.get(stem, stem + ending), words[-1].parts)]

    weekdays, months = {
        "english": ("Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
                    "January February March April May June July August September October November December"),
        "french": ("lundi mardi mercredi jeudi vendredi samedi dimanche",
                   "janvier février mars avril mai juin juillet août septembre octobre novembre décembre"),
        "german": ("Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag",
                   "Januar Februar März April Mai Juni Juli August September Oktober November Dezember")}[language]
    weekday = _words(weekdays.split()[date.weekday()], of + "weekday")
    month = _words(months.split()[date.month - 1], of + "month")
    century, rest, day = date.year // 100, date.year % 100, of + "day "
    nineteen = [of + "thousand", of + "thousand units", of + "hundreds"]  # nineteen hundred: mille neuf cent
    if language == "french":
        day = _words("premier", day + "units") if date.day == 1 else french_number(date.day, day)
        return _words("le", of + "the") + weekday + day + month + french_number(date.year, of, plural=False)
    if language == "german":
        day = ordinal(german_number(date.day, day), {"eins": "erste", "drei": "dritte", "sieben": "siebte",
                                                     "acht": "achte"}, "te" if date.day < 20 else "ste")
        year = german_number(date.year, of)
        if century < 20:
            year = _words(german_number(century)[0].text, *nineteen) + _words("+hundert", of + "hundred")
            for word in german_number(rest, of) if rest else []:
                year.append(Word("+" + word.text.lstrip("+"), word.parts))
        return weekday + _words(",") + _words("der", of + "the") + day + month + year
    day = ordinal(english_number(date.day, day), {
        "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
        "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth"}, "th")
    year = english_number(date.year, of)
    if century < 20:
        year = _words(english_number(century)[0].text, *nineteen, *[of + "hundred"] if rest else [])
        year += _words("oh" if 0 < rest < 10 else "")
        year += english_number(rest, of) if rest else _words("hundred", of + "hundred")
    return weekday + _words(",") + _words("the", of + "the") + day + _words("of") + month + year


def list_in_words(items: Sequence[int | datetime.date], language: str) -> list[Word]:
    """Numbers and dates one after another: "four; Monday, the third of March nineteen ninety-seven; two"."""
    number = {"english": english_number, "french": french_number, "german": german_number}[language]
    sentence = []
    for i, item in enumerate(items):
        sentence += _words(";" if i else "", f"before {i}")
        sentence += number(item, f"{i} ") if isinstance(item, int) else date_in_words(item, language, f"{i} ")
    return sentence


def align(source: Sequence[Word], target: Sequence[Word]) -> Pair:
    """The pair of two sentences that mean the same, and its links: sure ones join words that share a part."""
    def links(one: list[frozenset], other: list[frozenset]) -> frozenset[tuple[int, int]]:
        return frozenset((i, j) for i, a in enumerate(one) for j, b in enumerate(other) if a & b)

    def nearby(words: Sequence[Word]) -> list[frozenset]:  # a word without meaning takes that of its neighbours
        return [word.parts or frozenset().union(*(w.parts for w in words[max(i - 1, 0):i + 2]))
                for i, word in enumerate(words)]

    return Pair([word.text for word in source], [word.text for word in target],
                links([word.parts for word in source], [word.parts for word in target]),
                links(nearby(source), nearby(target)))


def generate_pairs(count: int, language: str = "french", max_items: int = 3, seed: int = 0) -> list[Pair]:
    """Up to ``count`` different lists of 1 .. max_items numbers below 10^6 and dates, in English and in ``language``.

    One item in four is a date of the years 1100 to 2099; a number has 1 to 6 digits, each as likely.
    Raises ValueError for a language other than french and german, or a count or max_items below 1.
    """
    if language not in ("french", "german"):
        raise ValueError(f"language must be 'french' or 'german', got {language!r}")
    if count < 1 or max_items < 1:
        raise ValueError(f"count and max_items must be at least 1, got {count} and {max_items}")
    draw, pairs, first_day = random.Random(seed), {}, datetime.date(1100, 1, 1).toordinal()
    for _ in range(100 * count):
        items = [datetime.date.fromordinal(first_day + draw.randrange(365_000)) if draw.random() < 0.25
                 else draw.randrange(10 ** draw.randint(1, 6)) for _ in range(draw.randint(1, max_items))]
        pairs.setdefault(tuple(items), None)
        if len(pairs) == count:
            break
    return [align(list_in_words(items, "english"), list_in_words(items, language)) for items in pairs]


# --- 2. sentences, files, vocabularies and batches --------------------------------------------

PAD, START, END, UNKNOWN = range(4)  # the first ids of every vocabulary


def to_words(text: str) -> list[str]:
    """Words and punctuation marks; what follows a hyphen is a piece of its own: "ninety-seven" -> ninety, -seven."""
    return re.findall(r"-?\w+|[^\w\s]", text)


def to_text(words: Iterable[str]) -> str:
    """The sentence as it is written: pieces joined to the words before them, no space before a comma."""
    text = " ".join(words).replace(" +", "").replace(" -", "-")
    return re.sub(r" ([,;.])", r"\1", text)


def read_pairs(path: str | Path) -> list[Pair]:
    """Sentence pairs of a tab-separated UTF-8 file, one to a line: Tatoeba's (id, sentence, id, translation), or
    (sentence, translation, anything).

    Raises ValueError with the number of the line that lacks a column or has an empty sentence, for a file that is
    not UTF-8, cannot be read, or has no pairs.
    """
    pairs, has_ids = [], None
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the path") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, byte {error.start}: is not UTF-8: convert the file first") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        columns = line.split("\t")
        if has_ids is None:  # the first line tells which of the two layouts the file has
            has_ids = len(columns) > 2 and columns[0].strip().isdecimal() and columns[2].strip().isdecimal()
        if len(columns) < 2 + 2 * has_ids:
            layout = "id, sentence, id, translation" if has_ids else "sentence, translation"
            raise ValueError(f"{path}, line {number}: {len(columns)} of the columns {layout}: separate them by tabs")
        columns = columns[1::2] if has_ids else columns
        source, target = (to_words(column) for column in columns[:2])
        if not source or not target:
            raise ValueError(f"{path}, line {number}: the {'translation' if source else 'sentence'} is empty: correct "
                             "or remove the line")
        pairs.append(Pair(source, target))
    if not pairs:
        raise ValueError(f"{path}: no sentence pairs: give lines of a sentence, a tab and its translation")
    return pairs


def build_vocabulary(sentences: Iterable[Sequence[str]], max_words: int = 10_000) -> dict[str, int]:
    """Word -> id: the four special ones, then the ``max_words`` most frequent words, the most frequent first.

    Raises ValueError if there is no word.
    """
    counts = Counter(word for sentence in sentences for word in sentence)
    if not counts or max_words < 1:
        raise ValueError(f"a vocabulary needs a word: the corpus has {len(counts)}, max_words is {max_words}")
    frequent = [word for word, _ in counts.most_common(max_words)]
    return {word: i for i, word in enumerate(["<pad>", "<start>", "<end>", "<unknown>", *frequent])}


def to_ids(sentences: Sequence[Sequence[str]], vocabulary: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Sentences -> ids (B, longest), padded on the right with PAD, and lengths (B,); unknown words are UNKNOWN.

    Raises ValueError for an empty sentence, no sentence, and a sentence without any known word.
    """
    rows = [[vocabulary.get(word, UNKNOWN) for word in sentence] for sentence in sentences]
    if not rows:
        raise ValueError("no sentences were given")
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"sentence {i} is empty")
        if set(row) == {UNKNOWN}:
            raise ValueError(f"sentence {i} has no known word: {' '.join(sentences[i])!r}")
    lengths = torch.tensor([len(row) for row in rows])  # (B,)
    return torch.tensor([row + [PAD] * (int(lengths.max()) - len(row)) for row in rows]), lengths


def to_sentences(ids: Iterable[Sequence[int]], vocabulary: dict[str, int]) -> list[list[str]]:
    """Rows of ids -> words."""
    words = list(vocabulary)
    return [[words[i] for i in row] for row in ids]


def shuffled_batches(pairs: Sequence[Pair], batch_size: int, seed: int) -> list[list[Pair]]:
    """All pairs once, in random order, those of about the same length together: little of a batch is padding."""
    draw = random.Random(seed)
    keys = [(len(pair.source) + draw.random(), i) for i, pair in enumerate(pairs)]
    order = [pairs[i] for _, i in sorted(keys)]
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    draw.shuffle(batches)
    return batches


def to_batch(pairs: Sequence[Pair], source_vocabulary: dict[str, int], target_vocabulary: dict[str, int]):
    """Pairs -> source (B, S), lengths (B,), inputs (B, T): START and the target, targets (B, T): it and END."""
    source, lengths = to_ids([pair.source for pair in pairs], source_vocabulary)
    rows = [[START, *(target_vocabulary.get(word, UNKNOWN) for word in pair.target), END] for pair in pairs]
    target = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)
    return source, lengths, target[:, :-1].masked_fill(target[:, :-1] == END, PAD), target[:, 1:]


def endless_batches(pairs: Sequence[Pair], source_vocabulary: dict[str, int], target_vocabulary: dict[str, int],
                    batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What training reads: ``to_batch`` of ``shuffled_batches``, epoch after epoch.   ValueError for no pairs."""
    if not pairs or batch_size < 1:
        raise ValueError(f"training needs pairs in batches of at least 1, got {len(pairs)} in batches of {batch_size}")
    batches, epoch = [], 0
    while True:
        if not batches:
            batches, epoch = shuffled_batches(pairs, batch_size, seed + epoch), epoch + 1
        yield to_batch(batches.pop(), source_vocabulary, target_vocabulary)


def read_corpus(path: str | None, language: str | None, steps: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on for ``steps`` batches of 64, and up to 500 new sentences held out, at most a fifth.

    path: a file as of ``read_pairs``; None: generated ones in ``language``, French if None.
    Raises ValueError for fewer than five pairs, and if no held-out sentence is new and has a known word.
    """
    if path:
        corpus = read_pairs(path)
    else:
        corpus = generate_pairs(min(64 * steps, 20_000) + 500, language or "french", seed=seed)
    if len(corpus) < 5:
        raise ValueError(f"{path}: only {len(corpus)} pairs: give at least 5, a fifth of them is held out")
    random.Random(seed).shuffle(corpus)
    held_out = min(500, len(corpus) // 5)
    seen = {tuple(pair.source) for pair in corpus[held_out:]}
    known = {word for sentence in seen for word in sentence}
    test = [pair for pair in corpus[:held_out]
            if tuple(pair.source) not in seen and not known.isdisjoint(pair.source)]
    if not test:
        raise ValueError(f"{path}: no held-out sentence is new and has a known word: give more pairs")
    return corpus[held_out:], test


def translate(search: Callable[[Tensor, Tensor], list[list[int]]], sentences: Sequence[str],
              source_vocabulary: dict[str, int], target_vocabulary: dict[str, int]) -> list[str]:
    """Sentences as they are written -> translations as they are written.

    search: source (B, S) and lengths (B,) -> B lists of ids, by a translator's greedy or beam search.
    Raises ValueError for no sentence, an empty one, and one in which no word is known.
    """
    rows = search(*to_ids([to_words(text) for text in sentences], source_vocabulary))
    return [to_text(words) for words in to_sentences(rows, target_vocabulary)]


# --- 3. demo ----------------------------------------------------------------------------------

def main(data: str | None, language: str | None, count: int | None, seed: int) -> None:
    if data and count is not None:
        raise ValueError("--count means nothing beside --data")
    count = 1000 if count is None else count
    if count < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"--count must be at least 1 and --seed in 0 .. 2^32 - 1, got {count} and {seed}")
    if data and language:
        raise ValueError("--language chooses the generated corpus and --data brings another: give one of them")
    corpus = read_pairs(data) if data else generate_pairs(count, language or "french", seed=seed)
    if not data:  # the first pair shows all that is not one to one
        number = {"french": french_number, "german": german_number}[language or "french"]
        corpus = [align(english_number(97_071), number(97_071)), *corpus]
    for pair in corpus[:3]:
        print(f"{to_text(pair.source)}\n= {to_text(pair.target)}")
        for s, word in enumerate(pair.source):
            if partners := [pair.target[t] for link, t in sorted(pair.sure) if link == s]:
                print(f"    {word:12} {' '.join(partners)}")
    links = Counter(len([s for s, _ in pair.sure if s == i]) for pair in corpus for i in range(len(pair.source)))
    if links[0] < links.total():
        print(f"\nsource words with 0, 1, 2, .. links: {', '.join(str(links[n]) for n in range(max(links) + 1))}")

    vocabularies = (build_vocabulary(pair.source for pair in corpus), build_vocabulary(pair.target for pair in corpus))
    batches = [to_batch(batch, *vocabularies) for batch in shuffled_batches(corpus, 64, seed)]
    real, padded = sum(int(batch[1].sum()) for batch in batches), sum(batch[0].numel() for batch in batches)
    print(f"\n{len(corpus)} pairs; vocabularies of {len(vocabularies[0])} and {len(vocabularies[1])}; batches of 64, "
          f"of which {1 - real / padded:.0%} is padding")
    read = Counter()
    for source, lengths, _, targets in batches:
        rows = ([row[:n] for row, n in zip(source.tolist(), lengths.tolist())],
                [row[:row.index(END)] for row in targets.tolist()])
        read.update(zip(*(map(tuple, to_sentences(ids, words)) for ids, words in zip(rows, vocabularies))))
    same = (read & Counter((tuple(pair.source), tuple(pair.target)) for pair in corpus)).total()
    print(f"read back from their batches, word for word: {same} of {len(corpus)} pairs (expected all, if no side has "
          "more than 10,000 words)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", help="file of lines: sentence, tab, translation (default: generated ones)")
    parser.add_argument("--language", choices=["french", "german"], help="of the generated pairs (default french)")
    parser.add_argument("--count", type=int, help="how many to generate (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs and batches (default %(default)s)")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ? for it
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
