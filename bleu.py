"""Scores of translations: BLEU, chrF, exact match, alignment error rate.   Papineni et al. 2002; Popovic 2015
Och & Ney 2003

Idea      A sentence has many good translations, a test set one of them, so a score asks how much of it came back. BLEU
          counts the words, pairs, triples and quadruples of words that the reference confirms, each as often as it
          stands there: "the the the" earns one "the". That is precision alone, and whoever leaves out what is hard
          would win; a brevity penalty on the whole corpus takes that back. chrF counts characters, in both directions:
          a wrong ending is not a wrong word. Which word a translator looked at is scored against known links.
Formula   BLEU = brevity * (p_1 p_2 p_3 p_4)^(1/4),  p_n the share of n-grams that the reference confirms,
          brevity = min(1, e^(1 - r/c)),  c and r the numbers of words of all translations and of all references
          chrF = (1 + 4) P R / (4 P + R),  precision P and recall R of character n-grams, n = 1 .. 6
          alignment error rate = 1 - (|A & sure| + |A & possible|) / (|A| + |sure|) of links A
Shapes    as many translations as references, all str -> 0 .. 100; attention (T, S) -> a set of links (source, target)
Omits     several references, lower-casing, chrF++; scores that are learned from people's judgements.
Run       python bleu.py                      what the scores make of mistakes, on sentences of pairs.py
          python bleu.py --language german
          python bleu.py --data fra.tsv       sentence pairs of your own, Tatoeba's say
          Ends with "chrF 100.0 of the references ..."
Test      pytest tests/test_bleu.py
"""

import argparse
import math
import random
import re
import string
import sys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


# --- 1. BLEU ----------------------------------------------------------------------------------

def _check(translations: Sequence[str], references: Sequence[str]) -> None:
    for texts in (translations, references):
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):  # a str is a sequence of str
            raise ValueError("translations and references must be lists of strings, one reference to a translation")
    if len(translations) != len(references) or not references:
        raise ValueError(f"{len(translations)} translations cannot be scored against {len(references)} references")


def mteval_words(text: str) -> list[str]:
    """How BLEU is agreed to split words (the rules "13a" of NIST's mteval): marks stand alone, but an apostrophe
    stays, and so do a point or comma between digits, and a hyphen unless it follows a digit."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        text = text.replace(entity, character)
    marks = re.escape("".join(set(string.punctuation) - set("'-.,")))
    text = re.sub(rf"([{marks}])", r" \1 ", f" {text} ")
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def bleu(translations: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU in 0 .. 100, as sacrebleu computes it by default.   Papineni et al. 2002; Post 2018 (1804.08771)

    brevity * (p_1 p_2 p_3 p_4)^(1/4), p_n being the share of all n-grams that the references confirm. The k-th p_n
    of zero counts as 1 / (2^k times the number of n-grams).   Chen & Cherry 2014, smoothing 3
    No word confirmed, or no translation of four words: 0.
    Raises ValueError unless there are as many references as translations, and some, all of them strings.
    """
    _check(translations, references)
    found, total, length, reference_length = [0] * 4, [0] * 4, 0, 0
    for translation, reference in zip(translations, references):
        ours, theirs = mteval_words(translation), mteval_words(reference)
        length, reference_length = length + len(ours), reference_length + len(theirs)
        for n in range(1, 5):
            a, b = (Counter(zip(*(words[i:] for i in range(n)))) for words in (ours, theirs))
            found[n - 1] += (a & b).total()
            total[n - 1] += a.total()
    if not found[0] or not all(total):
        return 0.0
    zeros, log_precision = 0, 0.0
    for n in range(4):
        zeros += found[n] == 0
        log_precision += math.log(found[n] / total[n] if found[n] else 1 / (2 ** zeros * total[n])) / 4
    return 100 * math.exp(min(0.0, 1 - reference_length / length) + log_precision)


# --- 2. chrF and exact match ------------------------------------------------------------------

def chrf(translations: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 in 0 .. 100: F-score of character 1- to 6-grams, recall twice as important.   Popovic 2015

    Spaces do not count; precision and recall are averages over the orders n that occur. A reference shorter than n
    leaves its translation's n-grams out: all as sacrebleu has it. ValueError as ``bleu``.
    """
    _check(translations, references)
    found, ours, theirs = [0] * 6, [0] * 6, [0] * 6
    for translation, reference in zip(translations, references):
        for n in range(6):
            a, b = (Counter(text[i:i + n + 1] for i in range(len(text) - n))
                    for text in ("".join(translation.split()), "".join(reference.split())))
            found[n] += (a & b).total()
            ours[n] += a.total() if b else 0
            theirs[n] += b.total()
    orders = [n for n in range(6) if ours[n] and theirs[n]]
    precision = sum(found[n] / ours[n] for n in orders) / max(len(orders), 1)
    recall = sum(found[n] / theirs[n] for n in orders) / max(len(orders), 1)
    return 100 * 5 * precision * recall / (4 * precision + recall) if found[0] else 0.0


def exact_match(translations: Sequence[str], references: Sequence[str]) -> float:
    """The percentage of translations that are their reference, character by character; ValueError as ``bleu``."""
    _check(translations, references)
    return 100 * sum(a == b for a, b in zip(translations, references)) / len(references)


# --- 3. alignments ----------------------------------------------------------------------------

class Pair(NamedTuple):
    """A sentence and its translation, word by word; of generated pairs the links (source, target) are known."""
    source: list[str]
    target: list[str]
    sure: frozenset[tuple[int, int]] = frozenset()  # words that share a part of the meaning
    possible: frozenset[tuple[int, int]] = frozenset()  # these, and "and", "of", ... with what they stand beside


def attention_links(attention: Tensor) -> set[tuple[int, int]]:
    """(T, S) -> {(source, target)}: every target word linked to the source word that it looked at most."""
    if attention.dim() != 2:
        raise ValueError(f"attention must be (T, S), of one sentence pair, got shape {tuple(attention.shape)}")
    return {(s, t) for t, s in enumerate(attention.argmax(-1).tolist())}


def alignment_error_rate(links: Sequence[set[tuple[int, int]]], pairs: Sequence[Pair]) -> float:
    """1 - (|A & sure| + |A & possible|) / (|A| + |sure|) over all pairs, A the links: 0 is best.

    Och & Ney 2003, section 4.1. Links of a word without meaning, "and" say, to what it stands beside are possible:
    they may be found or not. A sure link is a possible one, too. Raises ValueError unless every pair has its links,
    and some link is sure.
    """
    sure = sum(len(pair.sure) for pair in pairs)
    if len(links) != len(pairs) or not sure:
        raise ValueError(f"{len(links)} sets of links for {len(pairs)} pairs with {sure} sure links")
    agreed = sum(len(a & pair.sure) + len(a & (pair.sure | pair.possible)) for a, pair in zip(links, pairs))
    return 1 - agreed / (sum(len(a) for a in links) + sure)


# --- 4. demo ----------------------------------------------------------------------------------

def _damaged(sentences: list[list[str]], seed: int) -> dict[str, list[list[str]]]:
    """Translations that are right, and some that are wrong in ways that the scores judge differently."""
    draw, words = random.Random(seed), sorted({word for sentence in sentences for word in sentence})
    return {"the references themselves": sentences,
            "one word replaced": [[*s[:(i := draw.randrange(len(s)))], draw.choice(words), *s[i + 1:]]
                                  for s in sentences],
            "the last word missing": [s[:-1] for s in sentences],
            "words in another order": [draw.sample(s, len(s)) for s in sentences],
            "another sentence's": sentences[1:] + sentences[:1]}


def main(data: str | None, language: str | None, count: int | None, seed: int) -> None:
    if data and count is not None:
        raise ValueError("--count means nothing beside --data")
    count = 1000 if count is None else count
    if count < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"--count must be at least 1 and --seed in 0 .. 2^32 - 1, got {count} and {seed}")
    if data and language:
        raise ValueError("--language chooses the generated corpus and --data brings another: give one of them")
    from pairs import generate_pairs, read_pairs, to_text

    corpus = read_pairs(data) if data else generate_pairs(count, language or "french", seed=seed)
    references = [to_text(pair.target) for pair in corpus]
    print(f"{len(references)} references, such as\n{references[0]}\n")
    if any(pair.sure for pair in corpus):
        known = [set(pair.sure) for pair in corpus]
        diagonal = [{(t * len(p.source) // len(p.target), t) for t in range(len(p.target))} for p in corpus]
        print(f"alignment error rate {alignment_error_rate(known, corpus):.2f} of the known links (expected 0), "
              f"{alignment_error_rate(diagonal, corpus):.2f} of the diagonal (expected more)\n")
    print(f"{'translations':26}  right   BLEU   chrF")
    found = []
    for name, sentences in _damaged([pair.target for pair in corpus], seed).items():
        ours = [to_text(words) for words in sentences]
        found.append([score(ours, references) for score in (exact_match, bleu, chrf)])
        print(f"{name:26}" + "".join(f"{value:7.1f}" for value in found[-1]))
    print(f"chrF {found[0][2]:.1f} of the references (expected 100), {found[1][2]:.1f} with a word replaced "
          "(expected less)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", help="file of lines: sentence, tab, translation (default: generated ones)")
    parser.add_argument("--language", choices=["french", "german"], help="of the generated pairs (default french)")
    parser.add_argument("--count", type=int, help="how many to generate (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs and mistakes (default %(default)s)")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ? for it
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
