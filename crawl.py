"""A made-up crawl: what is wrong with a real one, in known amounts, and as large as one likes.

Idea      What a curation removes can only be counted if one knows what there was. Pages of words that are made of
          syllables, with the frequencies of a language (Zipf), are prose to every rule of C4 and Gopher; each page has
          a menu and a line of boilerplate, and of ten pages one is a copy, one a near-copy, one is no text.
Formula   P(word of rank i) ~ i^-1.2
Shapes    a page has about 3 kB; a file is n_pages WARC records, each a gzip member of its own as in Common Crawl
Omits     HTML (WET files have its text only); meaning.
Run       python crawl.py --out crawl/      4 files of 100 pages; ends with "... pages in 4 files: True ..."
Test      pytest tests/test_curate.py
"""

import argparse
import gzip
import os

import numpy as np

BOILERPLATE = ("We use cookies as our privacy policy says here.", "Please enable JavaScript to see this page.",
               "Write to info@{}.example or call +49 30 1234567 today.", "Share this page with all of your friends.")
NO_TEXT = ("if (a) {{ b(); }}\n{}", "Lorem ipsum dolor sit amet.\n{}", "Home\nNews\n{}")


# --- 1. the pages ----------------------------------------------------------------------------

class Pages:
    """Called, it gives the next page and its kind: "new", "copy", "near" (two words differ from an older page's) or
    "bad". Equal seeds give equal pages."""

    def __init__(self, seed: int = 0):
        self.random, self.old = np.random.RandomState(seed), []
        syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
        words = ["".join(syllables[i] for i in self.random.randint(70, size=1 + j % 4)) for j in range(5000)]
        self.words = np.array(["the", "of", "and", "to", "that", "with", "have", "be"] + words)
        self.frequent = self.random.zipf(1.2, 10**5) % len(self.words)

    def new(self) -> str:
        """A menu, 3 to 8 paragraphs of six sentences, boilerplate."""
        lines = ["Home | News | Contact"]
        for _ in range(self.random.randint(3, 9)):
            begin = self.random.randint(len(self.frequent) - 50)
            rare = self.random.randint(len(self.words), size=20)
            words = self.words[np.concatenate([self.frequent[begin:begin + 50], rare])].tolist()
            lines.append(" ".join(" ".join(words[i:i + 12]).capitalize() + "." for i in range(0, len(words), 12)))
        lines.append(BOILERPLATE[self.random.randint(4)].format(self.words[self.random.randint(len(self.words))]))
        return "\n".join(lines)

    def __call__(self) -> tuple[str, str]:
        kind = {0: "copy", 1: "near", 2: "bad"}.get(self.random.randint(10), "new") if self.old else "new"
        if kind in ("copy", "near"):
            text = self.old[self.random.randint(len(self.old))]
            if kind == "near":
                words = text.split(" ")
                for place in self.random.randint(3, len(words), size=2):
                    words[place] = f"{self.words[self.random.randint(len(self.words))]}ing"
                text = " ".join(words)
        else:
            text = self.new()
            if kind == "bad":
                text = NO_TEXT[self.random.randint(3)].format(text[:200])
            elif len(self.old) < 1000:  # bounded memory
                self.old.append(text)
        return text, kind


def make_crawl(folder: str | os.PathLike, n_files: int, n_pages: int, seed: int = 0,
               zipped: bool = True) -> tuple[str, dict[str, int]]:
    """Write n_files WET files of n_pages pages. Returns the glob that names them, and how many pages of each kind."""
    pages, counts = Pages(seed), dict.fromkeys(("new", "copy", "near", "bad"), 0)
    os.makedirs(folder, exist_ok=True)
    suffix = ".warc.wet.gz" if zipped else ".warc.wet"
    for i in range(n_files):
        with open(os.path.join(folder, f"{i:05}{suffix}"), "wb") as file:
            for _ in range(n_pages):
                text, kind = pages()
                counts[kind] += 1
                block = text.encode()
                record = (b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: %d\r\n\r\n" % len(block)
                          + block + b"\r\n\r\n")
                file.write(gzip.compress(record, 1) if zipped else record)
    return os.path.join(folder, f"*{suffix}"), counts


# --- 2. demo ---------------------------------------------------------------------------------

def main(out: str, files: int, pages: int, seed: int) -> None:
    from data import read_documents
    if files < 1 or pages < 1 or not 0 <= seed < 2**32:
        raise ValueError("--files and --pages must be at least 1 and --seed in 0 .. 2^32 - 1, "
                         f"got {files}, {pages} and {seed}")
    try:
        pattern, counts = make_crawl(out, files, pages, seed)
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror}): check the folder, its permissions and the "
                         "room on the disk") from None
    print(f"{pattern}: {', '.join(f'{n:,} {kind}' for kind, n in counts.items())}")
    print(f"begins {next(read_documents(pattern))[:150]!r}")
    read = sum(1 for _ in read_documents(pattern))
    print(f"read again: {read:,} pages in {files} files: {read == sum(counts.values())} (expected True)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--out", metavar="DIR", default="crawl", help="for the files (default %(default)s/)")
    parser.add_argument("--files", type=int, default=4, help="how many (default %(default)s)")
    parser.add_argument("--pages", type=int, default=100, help="in each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the pages (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
