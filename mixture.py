"""Mixtures: how often each source of text is seen.   Touvron et al. 2023 (2302.13971), table 1

Idea      Sources differ in size and worth: Wikipedia is read twice, GitHub not once. A mixture is a proportion
          per source; examples are drawn so that every R of them hold exactly R * p_s of source s, in an order
          drawn anew for each R. How many of a source came before example j is then a formula, no history:
          ONE integer is the state, whatever the batch and the number of processes, and a run that stops
          anywhere goes on with the very next token.
Formula   p_s ~ weight_s^(1/temperature),  weight_s given, or tokens_s * epochs_s, or tokens_s
          (temperature 1: as given; infinite: all sources alike; XLM-R and mT5 take 1/0.3)
          q_s = R p_s rounded, sum of q = R;   source(j) = permutation(seed, j // R)[j mod R] of q_s times s
          example j = example number (j // R) q_s + #{i in the block, i < j : source(i) = s} of source s
          epochs of s after D tokens = p_s D / tokens_s
Shapes    sources of (count, T) batches -> inputs and targets (B, T); proportions (sources,)
Omits     proportions that change during training; finding good ones (DoReMi); a cap on epochs.
Run       python mixture.py                      CPU, 10 s; ends with "the same stream ...: True"
          python mixture.py --weights prose=0.5,code=0.25,docstrings=0.25 --temperature 2
          python mixture.py --data 'web=crawl/*.jsonl,books=my/*.txt' --weights web=0.8,books=0.2
Test      pytest tests/test_mixture.py
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

# Table 1 of the paper: share of the examples, epochs over the 1.4T tokens of training, size on the disk in GB.
LLAMA_TOKENS = 1.4e12
LLAMA = {"CommonCrawl": (0.670, 1.10, 3300), "C4": (0.150, 1.06, 783), "Github": (0.045, 0.64, 328),
         "Wikipedia": (0.045, 2.45, 83), "Books": (0.045, 2.23, 85), "ArXiv": (0.025, 1.06, 92),
         "StackExchange": (0.020, 1.03, 78)}


class Source(Protocol):
    """Examples 0, 1, 2, ... without end, such as data.TokenWindows or packing.PackedContexts."""

    def __len__(self) -> int:
        """Examples of one epoch."""

    def batch(self, start: int, count: int) -> tuple[Tensor, ...]:
        """Examples start to start + count - 1, (count, ...) each."""


# --- 1. proportions -------------------------------------------------------------------------------

def proportions(tokens: Mapping[str, float], weights: Mapping[str, float] | None = None,
                epochs: Mapping[str, float] | None = None, temperature: float = 1.0) -> dict[str, float]:
    """p_s of every source, adding up to 1.

    Args:
        tokens: what each source has.
        weights: wanted shares, in any unit; not together with epochs.
        epochs: how often each source is seen, beside the others. Neither weights nor epochs: each once.
        temperature: above 1 it draws the shares together, below it apart.

    Raises ValueError for other names than those of tokens, for numbers that are not finite and positive.
    """
    if weights is not None and epochs is not None:
        raise ValueError("give weights or epochs, not both: each of them decides the proportions")
    chosen = weights if weights is not None else epochs if epochs is not None else dict.fromkeys(tokens, 1.0)
    if set(chosen) != set(tokens) or not tokens:
        raise ValueError(f"the sources are {', '.join(sorted(tokens)) or 'none'}; weights or epochs are for "
                         f"{', '.join(sorted(chosen)) or 'none'}: give one for each")
    for name in tokens:
        if not (0 < tokens[name] < np.inf and 0 < chosen[name] < np.inf):
            raise ValueError(f"{name}: {tokens[name]} tokens, weight or epochs {chosen[name]}: both must be positive "
                             "and finite: leave out a source that is not wanted")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    wanted = np.array([chosen[name] * (1.0 if weights is not None else tokens[name]) for name in tokens])
    shares = (wanted / wanted.max()) ** (1 / temperature)
    return dict(zip(tokens, (shares / shares.sum()).tolist()))


def epochs_seen(tokens: Mapping[str, float], shares: Mapping[str, float], total: float) -> dict[str, float]:
    """How often each source has been seen after ``total`` tokens."""
    return {name: shares[name] * total / tokens[name] for name in tokens}


def quotas(shares: Sequence[float], block: int) -> np.ndarray:
    """block * p_s in integers that add up to block, (sources,): rounded down, and what is missing goes to the largest
    remainders. ValueError if a source would get none."""
    exact = np.array(shares) * block
    found = np.floor(exact).astype(np.int64)
    found[np.argsort(found - exact, kind="stable")[:block - found.sum()]] += 1
    if found.min() < 1:
        raise ValueError(f"a share of {min(shares):.2g} is less than one example in a block of {block}: give a larger "
                         "block or leave the source out")
    return found


# --- 2. the stream --------------------------------------------------------------------------------

def draw_naive(counts: np.ndarray, seed: int, n: int) -> list[tuple[int, int]]:
    """(source, its example) of examples 0 to n - 1, by going through them and counting."""
    seen, found = [0] * len(counts), []
    for j in range(n):
        number, place = divmod(j, int(counts.sum()))
        s = int(_block(counts, seed, number)[place])
        found.append((s, seen[s]))
        seen[s] += 1
    return found


def _block(counts: np.ndarray, seed: int, number: int) -> np.ndarray:
    # RandomState is NumPy's one frozen stream: a later version resumes in the same order.
    return np.random.RandomState([seed, number]).permutation(np.repeat(np.arange(len(counts)), counts))


class Mixture:
    """The examples 0, 1, 2, ... of several sources, without end. The number of the next example is the only state;
    step s takes the examples s * B to (s + 1) * B - 1, and rank r of P its part of them:

        batch = mixture.batch(s * B + r * (B // P), B // P)

    Args:
        sources: name -> Source; their batches are alike but for the number of rows.
        shares: name -> p_s, as of ``proportions``.
        seed: of the order of the sources, in 0 .. 2^32 - 1. Each source has its own order.
        block: R, the number of examples that hold exactly the wanted proportions.
    """

    def __init__(self, sources: Mapping[str, Source], shares: Mapping[str, float], seed: int = 0, block: int = 10_000):
        if set(sources) != set(shares) or not sources:
            raise ValueError(f"sources {', '.join(sources) or 'none'}, but shares of {', '.join(shares) or 'none'}: "
                             "want the same names, at least one")
        least, total = min(shares.values()), sum(shares.values())
        if not (least > 0 and abs(total - 1) <= 1e-6):  # NaN is refused, too
            raise ValueError(f"shares must be positive and add up to 1, got a least of {least:.3g} and "
                             f"a sum of {total:.6g}")
        if block < 1 or not 0 <= seed < 2**32:
            raise ValueError(f"block must be at least 1 and seed in 0 .. 2^32 - 1, got {block} and {seed}")
        self.sources, self.seed, self.block = dict(sources), seed, block
        self.names = list(self.sources)
        self.quotas = quotas([shares[name] for name in self.names], block)  # (sources,)
        self._number, self._order, self._before = -1, np.empty(0), np.empty(0)

    def draw(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The source (a place in ``names``) of examples start to start + count - 1, and which of the source's examples
        each is: (count,) each. ValueError for a start below 0 or a count below 1. Costs one block, wherever."""
        if start < 0 or count < 1:
            raise ValueError(f"start must be at least 0 and count at least 1, got {start} and {count}")
        source, example = np.empty((2, count), dtype=np.int64)  # (count,) each
        done = 0
        while done < count:
            number, place = divmod(start + done, self.block)
            if number != self._number:
                self._number, self._order = number, _block(self.quotas, self.seed, number)
                # How many of its source come before it: its place in a stable sort, less where its source begins there.
                sorted_place = np.argsort(np.argsort(self._order, kind="stable"))
                self._before = sorted_place - (np.cumsum(self.quotas) - self.quotas)[self._order]
            n = min(count - done, self.block - place)
            source[done:done + n] = self._order[place:place + n]
            example[done:done + n] = number * self.quotas[source[done:done + n]] + self._before[place:place + n]
            done += n
        return source, example

    def batch(self, start: int, count: int) -> tuple[Tensor, ...]:
        """Examples start to start + count - 1: what the sources' batches are made of, (count, ...) each."""
        source, example = self.draw(start, count)
        parts, rows = [], []
        for s in np.unique(source):
            (here,) = np.nonzero(source == s)
            # A source's examples come in its order: those of one batch are neighbours.
            parts.append(self.sources[self.names[s]].batch(int(example[here[0]]), len(here)))
            rows.append(torch.from_numpy(here))
        back = torch.argsort(torch.cat(rows))
        return tuple(torch.cat(pieces)[back] for pieces in zip(*parts))

    def counts(self, n: int) -> dict[str, int]:
        """How many of the examples 0 to n - 1 are of each source: without drawing all of them."""
        whole, rest = divmod(n, self.block)
        inside = np.bincount(self.draw(whole * self.block, rest)[0], minlength=len(self.names)) if rest else 0
        return dict(zip(self.names, (whole * self.quotas + inside).tolist()))


# --- 3. demo --------------------------------------------------------------------------------------

def _numbers(text: str | None, what: str) -> dict[str, float] | None:
    """"a=0.5,b=2" -> {"a": 0.5, "b": 2.0}."""
    try:
        parts = [part.partition("=") for part in text.split(",")] if text else []
        found = {name.strip(): float(value) for name, _, value in parts}
        if len(found) < len(parts):
            raise ValueError
        return found or None
    except ValueError:
        raise ValueError(f"--{what} {text!r}: want name=number,name=number, each name once") from None


def _python_itself() -> dict[str, list[str]]:
    """Three kinds of text that every machine has: prose, docstrings, code."""
    from pathlib import Path
    import sysconfig
    from pydoc_data.topics import topics
    from data import default_documents
    prose = [topic.strip() for topic in topics.values()]
    known = set(prose)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    return {"prose": prose, "docstrings": [d for d in default_documents() if d not in known],
            "code": [file.read_text(encoding="utf-8", errors="replace") for file in files]}


def main(data: str | None, weights: str | None, epochs: str | None, temperature: float, context: int, examples: int,
         seed: int) -> None:
    from data import TokenWindows, pack, read_documents
    wanted = _numbers(weights, "weights"), _numbers(epochs, "epochs"), temperature
    parts = [part.partition("=") for part in data.split(",")] if data else []
    names = {name for name, _, files in parts if name and files}
    if examples < 1 or len(names) < len(parts):
        raise ValueError(f"--examples {examples}, --data {data!r}: want at least 1, and name=files,name=files, "
                         "each name once")
    texts = {name: list(read_documents(files)) for name, _, files in parts} or _python_itself()
    sources = {name: TokenWindows(pack(documents, lambda text: list(text.encode()), 256, 257), context, seed)
               for name, documents in texts.items()}
    tokens = {name: len(source) * context for name, source in sources.items()}
    shares = proportions(tokens, *wanted)
    mixture = Mixture(sources, shares, seed)
    realised = np.bincount(mixture.draw(0, examples)[0], minlength=len(sources))

    print(f"Llama's table: {'share':>16}{'epochs':>8}{'tokens':>9}{'bytes/token':>13}   tokens = share x 1.4T / epochs")
    unique = {name: share * LLAMA_TOKENS / seen for name, (share, seen, _) in LLAMA.items()}
    back = proportions(unique, epochs={name: seen for name, (_, seen, _) in LLAMA.items()})
    for name, (share, seen, disk) in LLAMA.items():
        print(f"  {name:14}{share:14.1%}{seen:8.2f}{unique[name] / 1e9:8.0f}B{disk * 1e9 / unique[name]:13.2f}"
              f"   proportions() gives {back[name]:.1%}")
    seen = epochs_seen(tokens, shares, examples * context)
    print(f"{examples:,} examples of {context} tokens, temperature {temperature}:\n"
          f"  {'source':14}{'tokens':>12}{'wanted':>10}{'realised':>10}{'epochs':>8}")
    for name, n in zip(sources, realised.tolist()):
        print(f"  {name:14}{tokens[name]:12,}{shares[name]:10.3%}{n / examples:10.3%}{seen[name]:8.2f}")
    worst = max(abs(n / examples - share) for n, share in zip(realised.tolist(), shares.values()))

    B, steps = 24, 8
    whole = mixture.batch(0, B * steps)[0]  # (B steps, T)
    same = []
    for P in (1, 2, 3, 4, 8):
        ranks = [Mixture(sources, shares, seed) for _ in range(P)]  # each process has its own
        parts = [ranks[r].batch(s * B + r * (B // P), B // P)[0] for s in range(steps) for r in range(P)]
        same.append(torch.equal(torch.cat(parts), whole))
    middle = Mixture(sources, shares, seed).batch(B * steps // 2 + 1, B)[0]
    same.append(torch.equal(middle, whole[B * steps // 2 + 1:][:B]))
    bound = (1 + examples % mixture.block * mixture.block / examples) / mixture.block  # rounding, a block not ended
    print(f"max |realised - wanted| = {worst:.5f}, at most {bound:.5f}; "
          f"the same stream on 1, 2, 3, 4, 8 ranks and resumed in the middle: {all(same)} (expected True)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", help="name=files,name=files, files such as 'my/*.txt' (default: Python's own)")
    parser.add_argument("--weights", help="name=share,... in any unit (default: each source once)")
    parser.add_argument("--epochs", help="name=times,... in place of --weights")
    parser.add_argument("--temperature", type=float, default=1.0, help="above 1: more alike (default %(default)s)")
    parser.add_argument("--context", type=int, default=128, help="T, tokens per example (default %(default)s)")
    parser.add_argument("--examples", type=int, default=100_000, help="drawn for the table (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all orders (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
