"""Questions, answers and a labeller, on every machine: what preference learning learns from when nobody is asked.

Idea      Python's documentation answers questions: what does textwrap.dedent do? Its docstring's first sentence says
          it. Which of two answers is better a rule decides, a stand-in for the people who would. As it is known, it can
          also measure what people would have said of the trained policy (the gold reward), which in earnest nobody
          knows. The learner never sees the rule, only which of two answers it preferred.
Formula   gold(question, answer)     =  1  if it is a sentence: a capital letter first, one full stop, at the end
                                     +  share of the name's words that the answer takes up
                                     -  0.3 per word that no answer of the documentation contains
                                     -  0.3 per word of four letters or more that was said before
                                     -  0.1 per word beyond 8,  - 1 for fewer than 3 words
          the better of two answers  <=>  |gold(a) - gold(b)| >= margin, else no preference
Shapes    text -> text; one number per (question, answer)
Omits     truth: people would judge that first, but a model this small has little of it; labellers who disagree.
Run       python labeller.py    the rule's judgement of true, exchanged and damaged answers: 5 s
          Ends with "true answers preferred: ..."
Test      pytest tests/test_labeller.py
"""

import argparse
import ast
import random
import re
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SKIPPED_PACKAGES = {"distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}


# --- 1. questions and their answers ---------------------------------------------------------

def default_questions(longest: int = 16) -> list[tuple[str, str]]:
    """("What does textwrap.dedent do?", first sentence of its docstring) of some 3,800 functions and classes of the
    standard library, those with a sentence of 3 to ``longest`` words. Sources are parsed, never imported; the same
    Python gives the same list. ValueError if this Python has no sources."""
    library, found = Path(sysconfig.get_path("stdlib")), {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                name = f"{prefix}.{child.name}"
                sentence = first_sentence(ast.get_docstring(child) or "")
                if 3 <= len(sentence.split()) <= longest and not child.name.startswith("_"):
                    found.setdefault(f"What does {name} do?", sentence)
                if isinstance(child, ast.ClassDef):
                    visit(child, name)
            elif isinstance(child, (ast.If, ast.Try)):
                visit(child, prefix)

    for module in sorted(sys.stdlib_module_names - SKIPPED_PACKAGES):
        for path in (library / f"{module}.py", *sorted((library / module).rglob("*.py"))):
            if path.is_file() and not {"test", "tests"} & set(path.relative_to(library).parts):
                dotted = ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
                visit(ast.parse(path.read_text(encoding="utf-8", errors="replace")), dotted)
    if not found:
        raise ValueError(f"this Python has no sources in {library}: give files of your own")
    return list(found.items())


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph, if it begins with a capital letter and is plain; else ''."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = re.match(r"[A-Z][^.!?`]*[a-z)\]'\"]\.(?=\s|$)", paragraph)
    return sentence[0] if sentence else ""


# --- 2. the rule ----------------------------------------------------------------------------

def words_of(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return [word.lower() for word in re.findall(r"[A-Za-z]+", text)]


def name_words(question: str) -> list[str]:
    """The words of the name that is asked about, of at least three letters, its last dotted part alone:
    "What does ssl.get_protocol_name do?" -> get, protocol, name."""
    names = re.findall(r"[\w.]*\.(\w+)", question)
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", names[-1] if names else "")
            if len(word) >= 3]


@dataclass(frozen=True)
class Labeller:
    """The rule of the header. ``known``: all words of the documentation's answers, as ``words_of`` has them."""
    known: frozenset[str]

    def gold(self, question: str, answer: str) -> float:
        """The gold reward. A name's word counts as taken up if a word of the answer has the same first four letters."""
        said, names = words_of(answer), name_words(question)
        taken_up = sum(any(word[:4] == name[:4] for word in said) for name in names) / max(1, len(names))
        long = [word for word in said if len(word) >= 4]
        return (float(bool(re.fullmatch(r"[A-Z][^.]*\.", answer))) + taken_up
                - 0.3 * sum(word not in self.known for word in said) - 0.3 * (len(long) - len(set(long)))
                - 0.1 * max(0, len(said) - 8) - (len(said) < 3))

    def prefers(self, question: str, first: str, second: str, margin: float = 0.4) -> int:
        """1 if the first answer is better by at least ``margin``, -1 if the second is; 0 where a person might toss a
        coin, and for the same words twice."""
        difference = self.gold(question, first) - self.gold(question, second)
        return 0 if first == second or abs(difference) < margin else 1 if difference > 0 else -1


def make_labeller(answers: Iterable[str]) -> Labeller:
    """A labeller who knows the words of these answers."""
    return Labeller(frozenset(word for answer in answers for word in words_of(answer)))


# --- 3. demo --------------------------------------------------------------------------------

def main(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be in 0 .. 2^32 - 1, got {seed}")
    pairs = default_questions()
    labeller, draw = make_labeller(answer for _, answer in pairs), random.Random(seed)
    others = [answer for _, answer in pairs]
    draw.shuffle(others)
    kinds = {"true": [answer for _, answer in pairs], "another's": others,
             "words shuffled": [" ".join(draw.sample(answer.split(), len(answer.split()))) for _, answer in pairs],
             "cut in half": [answer[:len(answer) // 2] for _, answer in pairs],
             "said twice": [f"{answer} {answer}" for _, answer in pairs]}
    print(f"{len(pairs):,} questions, {len(labeller.known):,} known words, for example:\n    {' '.join(pairs[0])}")
    worst = 1.0
    for kind, answers in kinds.items():
        mean = sum(labeller.gold(q, a) for (q, _), a in zip(pairs, answers)) / len(pairs)
        verdicts = [labeller.prefers(q, true, a) for (q, true), a in zip(pairs, answers)]
        decided = [verdict for verdict in verdicts if verdict]
        share = sum(verdict > 0 for verdict in decided) / max(1, len(decided))
        worst = min(worst, share) if decided else worst
        print(f"{kind:15} gold {mean:6.2f}   " + (f"the true answer is preferred in {share:.1%} of {len(decided):,} "
                                                  "decided pairs" if decided else "the same words: no preference"))
    print(f"true answers preferred: at least {worst:.1%} of the time, against every kind (expected above 85%)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
