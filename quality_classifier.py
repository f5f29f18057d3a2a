"""A learned filter: pages like trusted text are kept more often.   GPT-3: Brown et al. 2020 (2005.14165), appendix A
LLaMA: Touvron et al. 2023 (2302.13971), section 2.1

Idea      No rule says what is well written, but examples do: books, an encyclopedia, pages that people linked to. A
          linear classifier on the words of a page learns to tell them from raw pages. LLaMA throws away what falls on
          the wrong side. GPT-3 draws the threshold anew for each page, so that what the classifier likes less still
          comes, rarely: text that is good and unlike the examples is not lost.
Formula   page score      p = sigmoid(b + sum_j w_j x_j),  x = counts of words in 2^18 hashed buckets, |x| = 1
          page is kept    <=>  pareto(alpha) > 1 - p,      P(kept) = (2 - p)^-alpha,  alpha = 9
          ROC AUC         = P(score of a trusted text > score of a raw text), ties count half
Shapes    a page is a str; weights (2^18,); scores of n trusted (n,) and m raw texts (m,)
Omits     rules and masks (quality.py), which come first; n-grams of words; classifiers that are language models.
Run       python quality_classifier.py            topics of Python's help against docstrings: under 20 s
          python quality_classifier.py --data 'my/*.txt' --trusted good.jsonl    the same of your own pages
          Ends with "held-out ROC AUC ..."
Test      pytest tests/test_quality_classifier.py
"""

import argparse
import contextlib
import hashlib
import os
import uuid
import zipfile
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


# --- 1. how well scores tell two classes apart ------------------------------------------------

def roc_auc_naive(trusted: np.ndarray, raw: np.ndarray) -> float:
    """The share of pairs (trusted, raw) whose first score is higher; ties count half: (n,), (m,) -> 0 .. 1.
    Raises ValueError where there are no pairs."""
    _check_scores(trusted, raw)
    trusted, raw = trusted[:, None], raw[None, :]  # (n, 1), (1, m)
    return float(((trusted > raw) + 0.5 * (trusted == raw)).mean())


def roc_auc(trusted: np.ndarray, raw: np.ndarray) -> float:
    """``roc_auc_naive`` by ranks, which takes a sort instead of n m comparisons."""
    _check_scores(trusted, raw)
    scores = np.concatenate([trusted, raw])
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mean rank of equal scores, from 1
    n, m = len(trusted), len(raw)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def _check_scores(trusted: np.ndarray, raw: np.ndarray) -> None:
    if not len(trusted) or not len(raw):
        raise ValueError(f"ROC AUC compares scores of two classes, got {len(trusted)} trusted and {len(raw)} raw")


# --- 2. GPT-3's classifier --------------------------------------------------------------------

class QualityClassifier:
    """Logistic regression on a hashed bag of words: trusted text against raw text.

    Args:
        n_buckets: words that fall in one bucket share a weight.
        l2: how much |w|^2 / 2 counts beside the mean loss of a document.

    Raises ValueError without buckets, or for a negative l2.
    """

    def __init__(self, n_buckets: int = 2**18, l2: float = 1e-4):
        if n_buckets < 1 or l2 < 0:
            raise ValueError(f"n_buckets must be at least 1 and l2 at least 0, got {n_buckets} and {l2}")
        self.n_buckets, self.l2 = n_buckets, l2
        self.weights, self.bias = np.zeros(n_buckets, dtype=np.float32), 0.0
        self._bucket: dict[str, int] = {}

    def features(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The buckets that occur, ascending, and their counts, divided by the length of that vector."""
        if len(self._bucket) > 2**17:  # texts without end must not fill the memory
            self._bucket.clear()
        known, buckets = self._bucket, []
        for word in text.lower().split():
            if word not in known:
                digest = hashlib.blake2b(word.encode(), digest_size=8).digest()  # hash() differs between processes
                known[word] = int.from_bytes(digest, "little") % self.n_buckets
            buckets.append(known[word])
        buckets, counts = np.unique(np.array(buckets, dtype=np.int64), return_counts=True)
        return buckets, (counts / max(1.0, np.sqrt(np.square(counts).sum()))).astype(np.float32)

    def fit(self, trusted: Sequence[str], raw: Sequence[str], steps: int = 60) -> "QualityClassifier":
        """Minimise  mean over documents of -log p(its class) + l2 |w|^2 / 2,  both classes of equal weight, by
        L-BFGS from zero: no random number is drawn. Raises ValueError for a class without documents."""
        if not trusted or not raw:
            raise ValueError(f"a classifier needs texts of both classes, got {len(trusted)} and {len(raw)}")
        features = [self.features(text) for text in (*trusted, *raw)]
        # Buckets without a word keep weight 0: only the others are variables.
        used, buckets = np.unique(np.concatenate([f[0] for f in features]), return_inverse=True)
        buckets = torch.from_numpy(buckets)  # (nonzeros,)
        values = torch.from_numpy(np.concatenate([f[1] for f in features]))
        offsets = torch.tensor(np.cumsum([0] + [len(f[0]) for f in features[:-1]]))  # (documents,)
        labels = torch.tensor([1.0] * len(trusted) + [0.0] * len(raw))
        share = torch.where(labels == 1, 0.5 / len(trusted), 0.5 / len(raw))
        weights = torch.zeros(max(1, len(used)), 1, requires_grad=True)
        bias = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights, bias], max_iter=steps, line_search_fn="strong_wolfe",
                                      tolerance_grad=1e-7, tolerance_change=1e-10, history_size=10)

        def loss() -> Tensor:
            optimizer.zero_grad()
            scores = F.embedding_bag(buckets, weights, offsets, mode="sum", per_sample_weights=values)[:, 0] + bias
            loss = (share * F.binary_cross_entropy_with_logits(scores, labels, reduction="none")).sum()
            loss = loss + 0.5 * self.l2 * weights.square().sum()
            loss.backward()
            return loss

        optimizer.step(loss)
        self.weights, self.bias = np.zeros(self.n_buckets, dtype=np.float32), bias.item()
        self.weights[used] = weights.detach()[:len(used), 0].numpy()
        return self

    def score(self, text: str) -> float:
        """p, 0 .. 1: how much like trusted text."""
        buckets, values = self.features(text)
        return float(1 / (1 + np.exp(-(self.bias + np.float64(self.weights[buckets] @ values)))))

    def keeps(self, text: str, alpha: float = 9.0) -> bool:
        """pareto(alpha) > 1 - p, the random number drawn from the text itself: the same in every run."""
        # A hash of its own ("person"): what is kept must not depend on what another hash of the text holds out.
        digest = hashlib.blake2b(text.encode(), digest_size=7, person=b"pareto").digest()
        uniform = (int.from_bytes(digest, "big") // 8 + 0.5) / 2**53
        return uniform < (2 - self.score(text)) ** -alpha  # as pareto is uniform^(-1 / alpha) - 1

    def save(self, path: str | os.PathLike) -> None:
        """Weights and bias as .npz, written beside and renamed. ValueError if it cannot be written there."""
        beside = f"{os.fspath(path)}.{uuid.uuid4().hex}.tmp.npz"
        try:
            np.savez(beside, weights=self.weights, bias=self.bias, l2=self.l2)
            os.replace(beside, path)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written ({error.strerror}): check the folder, its permissions and the "
                             "room on the disk") from None
        finally:
            with contextlib.suppress(OSError):  # it may never have been there
                os.unlink(beside)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "QualityClassifier":
        """What ``save`` wrote; ValueError for any other file."""
        try:
            with np.load(path) as saved:
                made = cls(len(saved["weights"]), float(saved["l2"]))
                made.weights, made.bias = saved["weights"], float(saved["bias"])
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: cannot be read as a classifier ({error!r}): fit one, and save it anew") from None
        return made


def held_out_auc(trusted: Sequence[str], raw: Sequence[str]) -> float:
    """ROC AUC on the fifth of the documents that a classifier, fitted to the rest, has not seen.
    Raises ValueError if a class has none to fit, or none to hold out."""
    def is_held_out(text: str) -> bool:
        return hashlib.blake2b(text.encode(), digest_size=8, person=b"auc").digest()[0] < 51

    sides = [[[t for t in dict.fromkeys(texts) if is_held_out(t) == side] for texts in (trusted, raw)]
             for side in (False, True)]
    if not all(texts for side in sides for texts in side):
        raise ValueError(f"{len(trusted)} trusted and {len(raw)} raw texts are too few to hold some out: give more")
    classifier = QualityClassifier().fit(*sides[0])
    return roc_auc(*(np.array([classifier.score(text) for text in texts]) for texts in sides[1]))


# --- 3. demo ----------------------------------------------------------------------------------

def main(data: str | None, trusted: str | None, alpha: float) -> None:
    if not 0 < alpha < 1e6:
        raise ValueError(f"--alpha must be in (0, 1e6), got {alpha}")
    from data import default_documents, read_documents

    pages = default_documents() if data is None else list(read_documents(data))
    # By default topics of Python's help against docstrings: two kinds of prose, told apart by their words.
    good = list(read_documents(trusted)) if trusted else [page for page in pages if "\n****" in page]
    known = set(good)
    raw = [page for page in pages if page not in known]
    auc = held_out_auc(good, raw)
    classifier = QualityClassifier().fit(good, raw)
    print("scored by a classifier that was fitted to all of them:")
    for name, texts in (("trusted", good), ("raw", raw)):
        p = np.array([classifier.score(text) for text in texts])
        kept = np.mean([classifier.keeps(text, alpha) for text in texts])
        print(f"{len(texts):6,} {name:7} documents: mean score {p.mean():.3f}, kept {kept:.1%} "
              f"(expected about {np.mean((2 - p) ** -alpha):.1%})")
    print(f"held-out ROC AUC {auc:.3f}: " + ("OK, above 0.6" if auc > 0.6 else
                                             "WRONG, expected above 0.6 (guessing: 0.5)"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", help="raw pages, such as 'my/*.txt' or a.jsonl,b.txt (default: Python's own)")
    parser.add_argument("--trusted", help="files of the quality that is wanted (default: Python's help topics)")
    parser.add_argument("--alpha", type=float, default=9.0,
                        help="how strict: of pages with score 0, 2^-alpha are kept (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
