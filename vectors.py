"""Vectors of things: neighbours, analogies, maps, and word2vec's files.   Levy & Goldberg 2014, W14-1618

Idea      Where things are vectors, "alike" is a small angle, and "a is to b as c is to x" is the same step
          from a to b as from c to x. What the vectors are worth is a number: how often the nearest of a thing
          has its label.
Formula   cos(x, y) = x y / (|x| |y|)       below, a .. x are unit vectors and cos' = (cos + 1) / 2
          3CosAdd   the x with the largest cos(x, b - a + c)                          Mikolov et al., N13-1090
          3CosMul   the x with the largest cos'(x, b) cos'(x, c) / (cos'(x, a) + 1e-6)        W14-1618, eq. 5
Shapes    items: V of any hashable kind; vectors (V, D); scores (V,); a map (V, 2)
Omits     approximate search: a query is one product with all vectors, exact; training (word2vec.py).
Run       python vectors.py         letters as counts of the words in their Unicode names
          python vectors.py --plot letters.png
          python vectors.py --vectors my.vec --item king       a file that word2vec.py, gensim or others wrote
          a few seconds each; ends with "... gives all back: True ...", of a file with "... are the same: True ..."
Test      pytest tests/test_vectors.py
"""

import argparse
import contextlib
import difflib
import math
import os
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


# --- 1. neighbours, analogies, labels, a map ------------------------------------------------

class Vectors:
    """Items, most frequent first if they have frequencies, and their vectors (V, D), at least in float32.

    ValueError if there are none, numbers of items and vectors differ, an item is there twice, or a number is
    not finite.
    """

    def __init__(self, items: Sequence[Hashable], vectors: Tensor):
        self.items = list(items)
        self.index = {item: i for i, item in enumerate(self.items)}
        fit = vectors.dim() == 2 and len(self.items) == len(self.index) == len(vectors)
        if not fit or not vectors.numel():
            raise ValueError(f"{len(self.items)} items ({len(self.index)} different) and vectors of shape "
                             f"{tuple(vectors.shape)} do not fit")
        self.vectors = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
        if not self.vectors.isfinite().all():
            bad = self.items[int(self.vectors.isfinite().all(1).int().argmin())]
            raise ValueError(f"the vector of {bad!r} has numbers that are not finite")
        self.unit = F.normalize(self.vectors, dim=1)  # (V, D); a vector of zeros stays one

    def __getitem__(self, item: Hashable) -> Tensor:
        return self.vectors[self._find(item)]

    def _find(self, item: Hashable) -> int:
        if item not in self.index:
            close = difflib.get_close_matches(str(item), map(str, self.items[:20_000]), 3)
            hint = f"; close in spelling: {', '.join(close)}" if close else ""
            raise ValueError(f"{item!r} is not among the {len(self.items)} items{hint}")
        return self.index[item]

    def _best(self, scores: Tensor, k: int, without: Sequence[int]) -> list[tuple[Hashable, float]]:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        scores[without] = -math.inf
        best = scores.topk(min(k, len(scores) - len(set(without))))
        return [(self.items[i], score) for score, i in zip(best.values.tolist(), best.indices.tolist())]

    def nearest(self, query: Hashable | Tensor, k: int = 10) -> list[tuple[Hashable, float]]:
        """The k items nearest to an item, itself left out, or to a vector (D,), and their cosines."""
        if not isinstance(query, Tensor):
            i = self._find(query)
            return self._best(self.unit @ self.unit[i], k, [i])
        if query.shape != self.unit.shape[1:]:
            raise ValueError(f"a query must be ({self.unit.size(1)},), got shape {tuple(query.shape)}")
        return self._best(self.unit @ F.normalize(query.to(self.unit), dim=0), k, [])

    def analogy(self, a: Hashable, b: Hashable, c: Hashable, k: int = 10,
                method: str = "add") -> list[tuple[Hashable, float]]:
        """a is to b as c is to ...: the k best of all items but a, b and c, and their scores, by 3CosAdd or
        3CosMul (method "mul"; the 1e-6 is gensim's, the paper has 1e-3)."""
        if method not in ("add", "mul"):
            raise ValueError(f"method must be add or mul, got {method!r}")
        places = [self._find(item) for item in (a, b, c)]
        if method == "add":
            query = self.unit[places[1]] - self.unit[places[0]] + self.unit[places[2]]  # (D,)
            return self._best(self.unit @ F.normalize(query, dim=0), k, places)
        to_a, to_b, to_c = (self.unit[places] @ self.unit.mT + 1) / 2  # (V,) each
        return self._best(to_b * to_c / (to_a + 1e-6), k, places)

    def agreement(self, labels: dict[Hashable, Hashable]) -> tuple[float, float]:
        """How often the nearest of the labelled items has the same label, and how often a random one would.

        Items that alone have their label are not asked for. ValueError if no label has two items.
        """
        items = [item for item in self.items if item in labels]
        names = {name: i for i, name in enumerate(dict.fromkeys(labels[item] for item in items))}
        label = torch.tensor([names[labels[item]] for item in items], dtype=torch.long)  # (n,)
        others = label.bincount()[label] - 1  # (n,), with the same label
        asked = (others > 0).nonzero().squeeze(1)
        if not len(asked):
            raise ValueError(f"no two of the {len(items)} labelled items have the same label")
        unit = self.unit[[self.index[item] for item in items]]  # (n, D)
        right = 0
        for part in asked.split(1024):  # n^2 scores are too many for large n
            scores = (unit[part] @ unit.mT).scatter_(1, part[:, None].to(unit.device), -math.inf)
            right += (label[scores.argmax(1).cpu()] == label[part]).sum().item()
        return right / len(asked), others[asked].double().mean().item() / (len(items) - 1)

    def project(self) -> Tensor:
        """The items on the two directions of largest variance: (V, 2)."""
        centred = self.vectors - self.vectors.mean(0)
        _, _, directions = torch.linalg.svd(centred, full_matrices=False)
        points = centred @ directions[:2].mT
        return F.pad(points, (0, 2 - points.size(1)))  # of one vector, or of width 1, there is only one

    def plot(self, path: str | os.PathLike, labels: dict[Hashable, Hashable], n: int = 150) -> None:
        """Draw the unit vectors of the first n items in two dimensions, coloured by label."""
        figure = new_figure(path, 14, 10)
        axes, items = figure.subplots(), self.items[:n]
        common = [label for label, _ in Counter(labels.get(item) for item in items).most_common(9)]
        for item, (x, y) in zip(items, Vectors(items, self.unit[:n]).project().tolist()):
            label = labels.get(item)
            axes.plot(x, y, ".", color=f"C{common.index(label)}" if label in common else "grey")
            axes.annotate(str(item).replace("$", r"\$"), (x, y), fontsize=7)  # $ would begin a formula
        axes.set_title("the two directions of largest variance")
        figure.savefig(path, dpi=120)

    # --- 2. word2vec's formats: "V D", then an item and D numbers, as text or little-endian float32 ---

    def save(self, path: str | os.PathLike, binary: bool = False) -> None:
        """Write float32 in word2vec's and gensim's format; a file is there whole or not at all.

        ValueError for items whose names are not distinct words, and for a file that cannot be written.
        """
        names = [str(item) for item in self.items]
        bad = next((name for name in names if len(name.split()) != 1 or name != name.strip()), None)
        if bad is not None or len(set(names)) < len(names):
            what = f"{bad!r} is not one word without white space" if bad is not None else "two have one name"
            raise ValueError(f"{path}: items cannot be written: {what}")
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError(f"{path}: cannot be written (it is there and is not a file): name another")
        beside, values = Path(f"{os.fspath(path)}.{os.getpid()}.tmp"), self.vectors.cpu().numpy().astype("<f4")
        try:
            with open(beside, "wb") as file:
                file.write(b"%d %d\n" % values.shape)
                for name, row in zip(names, values):
                    # Nine digits give every float32 back.
                    numbers = row.tobytes() if binary else " ".join(f"{x:.9g}" for x in row.tolist()).encode()
                    file.write(name.encode() + b" " + numbers + b"\n")
            os.replace(beside, path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror}): check the folder, its permissions and the "
                             "room on the disk") from None
        finally:
            with contextlib.suppress(OSError):  # it may never have been there
                beside.unlink()

    @classmethod
    def load(cls, path: str | os.PathLike, binary: bool = False) -> "Vectors":
        """Read what ``save``, word2vec or gensim wrote; items are strings. ValueError tells the place."""
        try:
            header, _, rest = Path(path).read_bytes().partition(b"\n")
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror}): check the path") from None
        try:
            V, D = map(int, header.split())
        except ValueError:
            V = D = 0
        if V < 1 or not 1 <= D <= len(rest):
            raise ValueError(f"{path}, line 1: want the number of items and the width, found {header[:40]!r}: give a "
                             "file in word2vec's format")
        names, rows, place = [], [], 0
        if binary:
            while len(names) < V:
                end = rest.find(b" ", place)
                if end < 0 or len(rest) < end + 1 + 4 * D:
                    raise ValueError(f"{path}: ends inside of item {len(names) + 1} of {V}: cut short, or "
                                     "text: copy it again, or name it without .bin")
                names.append(rest[place:end].lstrip(b"\n"))  # a new line ends an item in some programs' files
                rows.append(torch.from_numpy(np.frombuffer(rest, "<f4", D, end + 1).astype(np.float32)))
                place = end + 1 + 4 * D
        else:
            for number, line in enumerate(rest.splitlines()[:V], 2):  # of bytes: at \n and \r, no others
                name, *row = line.strip().rsplit(b" ", D)  # gensim writes items with spaces as they are
                try:
                    rows.append(torch.tensor([float(x) for x in row], dtype=torch.float32))
                except ValueError:
                    row = []
                if len(row) != D:
                    raise ValueError(f"{path}, line {number}: want an item and {D} numbers, "
                                     f"found {line[:40]!r}: copy it again")
                names.append(name)
            if len(names) < V:
                raise ValueError(f"{path}: ends after {len(names)} of {V} items: cut short: copy it again")
        try:
            return cls([name.decode() for name in names], torch.stack(rows))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: item {error.object[:20]!r} is not UTF-8: damaged, or text taken for "
                             "binary or the reverse") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


# --- 3. demo --------------------------------------------------------------------------------

def letters() -> Vectors:
    """The letters of some alphabets as counts of the words in their Unicode names: known meanings."""
    names = {chr(i): unicodedata.name(chr(i), "").split() for i in range(0x590)}
    items = [letter for letter, words in names.items() if "LETTER" in words]
    words = {word: i for i, word in enumerate(dict.fromkeys(word for item in items for word in names[item]))}
    vectors = torch.zeros(len(items), len(words))  # (V, D)
    for row, item in zip(vectors, items):
        for word in names[item]:
            row[words[word]] += 1
    return Vectors(items, vectors)


def new_figure(path: str | None, width: float, height: float):
    """A matplotlib figure to be saved under ``path``, None without one. ValueError without matplotlib, and for what
    cannot be drawn there: now, not after the work."""
    if path is None:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    try:
        if str(path).rpartition(".")[2].lower() not in figure.canvas.get_supported_filetypes():
            raise OSError(None, "no format of pictures has that name")
        is_new = not os.path.exists(path)
        open(path, "ab").close()  # keeps a picture that is there
        if is_new:
            os.remove(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be drawn ({error.strerror}): name a picture in a folder that is "
                         "there") from None
    return figure


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


def main(vectors: str | None, item: str | None, analogy: list[str] | None, out: str | None,
         plot: str | None) -> None:
    check_writable(out)
    new_figure(plot, 1, 1)
    found = Vectors.load(vectors, vectors.endswith(".bin")) if vectors else letters()
    print("{:,} items of width {:,}".format(*found.vectors.shape))
    for query in [item] if item else found.items[:200:20]:
        near = "  ".join(f"{other} {cosine:.2f}" for other, cosine in found.nearest(query, 5))
        print(f"  {query:12} {near}")
    for method in ("add", "mul") if analogy else ():
        best = "  ".join(f"{other} {score:.2f}" for other, score in found.analogy(*analogy, 5, method))
        print("  {} : {} = {} : ?  ".format(*analogy) + f"3Cos{method.title()} {best}")
    labels = {} if vectors else {letter: unicodedata.name(letter).split()[0] for letter in found.items}
    if out is not None:
        found.save(out, out.endswith(".bin"))
        print(f"saved: {out}")
    if plot is not None:
        found.plot(plot, labels)
        print(f"drawn: {plot}")
    if vectors:
        # Names with blanks are read and not written; of millions of vectors, some say enough.
        words = [word for word in found.items if len(word.split()) == 1 and word == word.strip()][:10_000]
        if not words:
            print(f"{len(found.items):,} vectors; no name of theirs can be written: nothing is compared")
            return
        same = _gives_back(Vectors(words, found.vectors[[found.index[word] for word in words]]))
        print(f"{len(found.items):,} vectors; {len(words):,} of them written and read again are the same: {same} "
              "(expected True)")
        return
    print("nearest letter is of the same alphabet: {:.0%}, by chance {:.0%}".format(*found.agreement(labels)))
    pairs = [(x, x.upper()) for x in found.items if x.islower() and x.upper() in found.index and x != "a"]
    for method in ("add", "mul"):
        solved = sum(found.analogy("a", "A", x, 1, method)[0][0] == capital for x, capital in pairs)
        print(f"a : A = small letter : ?   3Cos{method.title()} has the capital of {solved} of {len(pairs)}")
    print(f"a file of text or numbers gives all back: {_gives_back(found)} (expected True)")


def _gives_back(found: Vectors) -> bool:
    """Whether files of text and of numbers hold what was written."""
    same = True
    with tempfile.TemporaryDirectory() as folder:
        for binary in (False, True):
            found.save(path := Path(folder) / "vectors", binary)
            again = Vectors.load(path, binary)
            same &= again.items == found.items and torch.equal(again.vectors, found.vectors)
    return same


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--vectors", metavar="FILE", help="read these, text or FILE.bin (default: letters)")
    parser.add_argument("--item", help="show the neighbours of this item (default: of ten items)")
    parser.add_argument("--analogy", nargs=3, metavar=("A", "B", "C"), help="A is to B as C is to what?")
    parser.add_argument("--out", metavar="FILE", help="write the vectors there, as text or FILE.bin")
    parser.add_argument("--plot", metavar="FILE.png", help="draw items in two dimensions (needs matplotlib)")
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ? for it
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
