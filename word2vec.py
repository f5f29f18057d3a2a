"""word2vec: vectors of words, or of any items, from what stands near what.   Mikolov et al. 2013 (1301.3781)

Idea      A network with one hidden layer and no nonlinearity predicts the words around a word. Its input is
          one-hot, so its first product looks up one column of the weights: the word's vector. Words that can
          replace each other get similar vectors, and so do products in baskets or functions in programs.
Formula   hidden    h = W^T onehot(c) = W_in[c]               skip-gram: the centre c predicts each context o
                    h = mean of W_in[o] over the contexts     CBOW: the contexts predict the centre
          softmax                -log softmax(W_out h)_o                                      1310.4546, eq. 2
          negative sampling      -log s(h u_o) - sum_{i=1..k} log s(-h u_{n_i}), n ~ count^0.75          eq. 4
          hierarchical softmax   -sum over the nodes on o's path in a Huffman tree of log s(+-h u_node)  eq. 3
          a word of frequency f stays with probability sqrt(t/f) + t/f     (the authors' program; eq. 5: sqrt)
          contexts: b places to either side, b uniform in 1 .. window;   learning rate: linear, down to min_lr
Shapes    tokens (N,) -> tiles of T centres and C = T + 2 window columns -> W_in (V, D), W_out (V, D)
Omits     phrases, subwords; asynchronous updates: M tiles are one step, so one seed gives one result;
          what vectors are good for, and their files: vectors.py.
Run       python word2vec.py                     functions of the standard library, from calls in its sources
          python word2vec.py --data words        words of Python's documentation; --data 'my/*.txt': of yours
          python word2vec.py --plot calls.png    10 s each; ends with "held-out loss ... lower: True ..."
Test      pytest tests/test_word2vec.py
"""

import argparse
import ast
import builtins
import heapq
import math
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


# --- 1. config and vocabulary ---------------------------------------------------------------

@dataclass
class Word2VecConfig:
    """The settings of a training run. A value that cannot be raises ValueError."""
    architecture: str = "skipgram"  # or "cbow"
    objective: str = "negative"  # or "hierarchical", "softmax"
    d_model: int = 100
    window: int = 5  # largest distance of a context, in items that subsampling left
    negatives: int = 5  # k per pair
    min_count: int = 5  # rarer items are left out
    subsample: float = 1e-3  # t; 0 keeps every item
    epochs: int = 5
    lr: float = 0.05
    min_lr: float = 1e-4
    seed: int = 0
    tile: int = 32  # T, centres that share their negatives
    tiles_per_step: int = 48  # M
    shared_negatives: int = 16  # per tile; each stands for k / shared_negatives of a pair's k
    step_limit: float = 5.0  # a row in more than step_limit / lr terms of one step's loss moves less per term

    def __post_init__(self):
        for name, known in (("architecture", ("skipgram", "cbow")),
                            ("objective", ("negative", "hierarchical", "softmax"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("d_model", "window", "negatives", "min_count", "epochs", "tile", "tiles_per_step",
                     "shared_negatives"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"{name} must be a whole number and at least 1, got {value!r}")
        if not 0 <= self.min_lr <= self.lr < math.inf:
            raise ValueError(f"lr must be finite and at least min_lr, got lr {self.lr} and min_lr {self.min_lr}")
        whole = isinstance(self.seed, int) and 0 <= self.seed < 2**32
        if not self.subsample >= 0 or not self.step_limit > 0 or not whole:
            raise ValueError("subsample must be at least 0, step_limit above 0, seed in 0 .. 2^32 - 1, "
                             f"got {self.subsample}, {self.step_limit} and {self.seed}")


class Vocabulary:
    """Hashable items, most frequent first, and how often each occurs.

    Raises ValueError where there is nothing to learn from: no item, or only one, occurs min_count times.
    """

    def __init__(self, sequences: Iterable[Sequence[Hashable]], min_count: int = 1):
        counter: Counter = Counter()
        for sequence in sequences:
            if isinstance(sequence, (str, bytes)):
                raise ValueError("a sequence is a list of items, got the string "
                                 f"{sequence[:30]!r}: split it first")
            try:
                counter.update(sequence)
            except TypeError as error:
                raise ValueError(f"a sequence is a list of hashable items, got {str(sequence)[:30]}: "
                                 f"{error}") from None
        if not counter:
            raise ValueError("the corpus is empty: give sequences of items")
        kept = [(item, count) for item, count in counter.most_common() if count >= min_count]
        if len(kept) < 2:
            raise ValueError(f"{len(kept)} of {len(counter)} different items occur {min_count} times, and it "
                             "takes two to tell apart: give more data or a lower min_count")
        self.items = [item for item, _ in kept]
        self.counts = torch.tensor([count for _, count in kept], dtype=torch.float64)  # (V,)
        self.index = {item: i for i, item in enumerate(self.items)}

    def __len__(self) -> int:
        return len(self.items)

    def encode(self, sequences: Iterable[Sequence[Hashable]]) -> tuple[Tensor, Tensor]:
        """Tokens (N,) of all sequences and the number of each one's sequence (N,). Unknown items are left
        out, and those around them become neighbours."""
        rows = [[self.index[item] for item in sequence if item in self.index] for sequence in sequences]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        tokens = torch.tensor([token for row in rows for token in row], dtype=torch.long)
        return tokens, torch.arange(len(rows)).repeat_interleave(lengths)

    def keep_probability(self, subsample: float) -> Tensor:
        """(V,): the probability that an occurrence stays; 1 for f below about 2.6 subsample."""
        if not subsample:
            return torch.ones_like(self.counts)
        ratio = subsample * self.counts.sum() / self.counts  # t / f
        return (ratio.sqrt() + ratio).clamp(max=1)

    def noise(self) -> Tensor:
        """(V,): the distribution of negatives, count^0.75 over its sum (1310.4546, section 2.2)."""
        return self.counts**0.75 / (self.counts**0.75).sum()


def huffman_tree(counts: Sequence[float]) -> tuple[Tensor, Tensor]:
    """The binary tree in which frequent items are near the root.

    Returns path and turn, both (V, depth): the inner nodes 0 .. V-2 that lead from the root to each item, and
    at each the branch to take, 0 or 1. Shorter paths are filled up with -1.
    """
    V = len(counts)
    heap = [(count, i) for i, count in enumerate(counts)]  # ties by number: one tree for one vocabulary
    heapq.heapify(heap)
    parent = {}
    for node in range(V, 2 * V - 1):
        for branch in (0, 1):
            count, child = heapq.heappop(heap)
            parent[child] = node, branch
            weight = count + weight if branch else count
        heapq.heappush(heap, (weight, node))
    steps = []
    for item in range(V):
        walk, node = [], item
        while node in parent:
            node, branch = parent[node]
            walk.append((node - V, branch))
        steps.append(torch.tensor(walk[::-1]))  # (depth of the item, 2)
    padded = torch.nn.utils.rnn.pad_sequence(steps, batch_first=True, padding_value=-1)  # (V, depth, 2)
    return padded[..., 0].contiguous(), padded[..., 1].contiguous()


def draw_windows(sequence: Tensor, window: int,
                 generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """First and last position, (N,) each, of each token's contexts: b places to either side, b
    uniform in 1 .. window, but within its sequence. ``sequence`` (N,): whose each token is, ascending."""
    position = torch.arange(len(sequence))
    width = torch.randint(1, window + 1, (len(sequence),), generator=generator)
    begin, end = (torch.searchsorted(sequence, sequence, right=right) for right in (False, True))
    return torch.maximum(position - width, begin), torch.minimum(position + width, end - 1)


# --- 2. the network of the lecture, as it is drawn ------------------------------------------

def naive_loss(tokens: Tensor, first: Tensor, last: Tensor, W_in: Tensor, W_out: Tensor,
               architecture: str = "skipgram") -> Tensor:
    """One-hot vectors, two matrix products and a softmax over the vocabulary: the summed loss in nats.

    tokens, first, last (N,) as from ``draw_windows``; W_in, W_out (V, D).
    """
    one_hot, total = torch.eye(len(W_in), dtype=W_in.dtype), W_in.new_zeros(())
    for i in range(len(tokens)):
        contexts = [tokens[j] for j in range(first[i], last[i] + 1) if j != i]
        if architecture == "skipgram":
            predictions = [(one_hot[tokens[i]], context) for context in contexts]
        else:
            predictions = [(sum(one_hot[c] for c in contexts) / len(contexts), tokens[i])] if contexts else []
        for x, target in predictions:
            hidden = W_in.mT @ x  # (D, V) (V,) -> (D,)
            y = torch.softmax(W_out @ hidden, 0)  # (V,)
            total = total - torch.log(y[target])
    return total


# --- 3. the same without the zeros, and two objectives without the sum over V ----------------

def pairs(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of all centres and their contexts, (n,) each, from the windows (N,)."""
    n_contexts = last - first
    centre = torch.arange(len(first)).repeat_interleave(n_contexts)  # (n,)
    context = first[centre] + torch.arange(len(centre)) - (n_contexts.cumsum(0) - n_contexts)[centre]
    return centre, context + (context >= centre)  # not the centre itself


def hidden_and_targets(tokens: Tensor, first: Tensor, last: Tensor, W_in: Tensor,
                       architecture: str = "skipgram") -> tuple[Tensor, Tensor]:
    """Hidden vectors (n, D) and the tokens (n,) that they are to predict."""
    centre, context = pairs(first, last)
    if architecture == "skipgram":
        return W_in[tokens[centre]], tokens[context]
    total = W_in.new_zeros(len(tokens), W_in.size(1)).index_add(0, centre, W_in[tokens[context]])  # (N, D)
    predicted = last > first
    return total[predicted] / (last - first)[predicted, None], tokens[predicted]


def softmax_loss(hidden: Tensor, targets: Tensor, W_out: Tensor) -> Tensor:
    """-log softmax(W_out h)_target: hidden (n, D), targets (n,), W_out (V, D) -> (n,) nats."""
    return F.cross_entropy(hidden @ W_out.mT, targets, reduction="none")


def negative_sampling_loss(hidden: Tensor, targets: Tensor, W_out: Tensor, negatives: Tensor) -> Tensor:
    """1310.4546, eq. 4: hidden (n, D), targets (n,), W_out (V, D), negatives (n, k) -> (n,) nats."""
    positive = (hidden * W_out[targets]).sum(-1)  # (n,)
    negative = (W_out[negatives] @ hidden[..., None]).squeeze(-1)  # (n, k)
    return -F.logsigmoid(positive) - F.logsigmoid(-negative).sum(-1)


def hierarchical_softmax_loss(hidden: Tensor, targets: Tensor, W_out: Tensor, path: Tensor,
                              turn: Tensor) -> Tensor:
    """1310.4546, eq. 3: hidden (n, D), targets (n,), W_out (V - 1, D), the tree (V, depth) -> (n,) nats."""
    path, turn = path[targets], turn[targets]  # (n, depth)
    scores = (W_out[path] @ hidden[..., None]).squeeze(-1)  # (n, depth); row -1 where there is no node
    return -(F.logsigmoid(scores * (1 - 2 * turn)) * (path >= 0)).sum(-1)


# --- 4. training: tiles of text, gradients by hand ------------------------------------------
#
# A pair at a time is a gather, a dot product and a scatter of single rows: memory traffic. T neighbouring
# centres are a tile: their rows are fetched once, all its scores are ONE matrix product, the window is a band
# of it. Negatives are drawn per tile and weighted, so that each pair meets k of them. In all three objectives
# the gradient of a score is weight x (probability - label), and then two more products do.

def cut_tiles(tokens: Tensor, first: Tensor, last: Tensor, T: int,
              window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a text (N,) into n tiles: tokens (n, C), and the first and last context of each centre (n, T).

    C = T + 2 window: the t-th centre is in column window + t, and first and last count columns. Every pair is
    in exactly one tile. Places beyond the text hold token 0, without contexts.
    """
    n = max(1, math.ceil(len(tokens) / T))
    position = torch.arange(n * T)
    beyond, to_column = position[len(tokens):], window - position.view(n, T)[:, :1]
    tiles = F.pad(tokens, (window, len(beyond) + window)).unfold(0, T + 2 * window, T)  # (n, C)
    first, last = (torch.cat([ends, beyond]).view(n, T) + to_column for ends in (first, last))
    return tiles, first, last


class Word2Vec:
    """The two matrices, and how they are trained; ``W_in[i]`` is the vector of ``vocabulary.items[i]``.

    W_in starts uniform in +-1/(2 D) and W_out at zero, as in the authors' program: every probability is 1/2
    (or 1/V) before the first step.
    """

    def __init__(self, vocabulary: Vocabulary, config: Word2VecConfig,
                 generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32):
        V, D = len(vocabulary), config.d_model
        self.vocabulary, self.config = vocabulary, config
        self.W_in = (torch.rand(V, D, generator=generator, dtype=dtype) - 0.5) / D
        self.W_out = torch.zeros(V, D, dtype=dtype)
        self.noise_cdf = vocabulary.noise().cumsum(0)
        if config.objective == "hierarchical":
            self.W_out = self.W_out[:-1].clone()  # a tree of V leaves has V - 1 inner nodes
            self.path, self.turn = huffman_tree(vocabulary.counts.tolist())  # (V, depth)

    def draw_negatives(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """Tokens of this shape, drawn from the noise distribution."""
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(self.noise_cdf, uniform)
        return drawn.clamp_(max=len(self.vocabulary) - 1)  # the sums may end just below 1

    def loss(self, sequences: Iterable[Sequence[Hashable]], seed: int = 0) -> float:
        """Mean loss of a prediction in nats on (held-out) sequences; windows and negatives depend on the seed
        alone. ValueError if no two known items are in one sequence."""
        generator = torch.Generator().manual_seed(seed)
        tokens, sequence = self.vocabulary.encode(sequences)
        windows = draw_windows(sequence, self.config.window, generator)
        hidden, targets = hidden_and_targets(tokens, *windows, self.W_in, self.config.architecture)
        if not len(targets):
            raise ValueError("nothing to predict: no sequence has two items of the vocabulary")
        total = 0.0
        for h, o in zip(hidden.split(4096), targets.split(4096)):
            if self.config.objective == "softmax":
                losses = softmax_loss(h, o, self.W_out)
            elif self.config.objective == "hierarchical":
                losses = hierarchical_softmax_loss(h, o, self.W_out, self.path, self.turn)
            else:
                negatives = self.draw_negatives((len(o), self.config.negatives), generator)
                losses = negative_sampling_loss(h, o, self.W_out, negatives)
            total += losses.double().sum().item()
        return total / len(targets)

    def step(self, tile: Tensor, first: Tensor, last: Tensor, negatives: Tensor, lr: float) -> None:
        """Descend the summed loss of M tiles: tile (M, C), first, last (M, T), negatives (M, shared).

        Gradients are those of the sum, so ``lr`` is what it is for single pairs.
        """
        config, (M, T), C = self.config, first.shape, tile.size(1)
        column = torch.arange(C)
        own = column == column[config.window:config.window + T, None]  # (T, C): the centre itself
        contexts = (column >= first[..., None]) & (column <= last[..., None]) & ~own  # (M, T, C)
        contexts = contexts.to(self.W_in.dtype)
        if config.architecture == "skipgram":
            inputs, targets = tile[:, config.window:config.window + T], contexts
            hidden = F.embedding(inputs, self.W_in)  # (M, T, D)
        else:
            n_contexts = contexts.sum(-1, keepdim=True)
            inputs, average = tile, contexts / n_contexts.clamp(min=1)  # (M, T, C)
            hidden = average @ F.embedding(inputs, self.W_in)  # (M, T, D)
            targets = own * (n_contexts > 0).to(contexts.dtype)  # (M, T, C)

        # Rows of W_out (M, R), the loss's gradient by each score (M, T, R), and of how many terms of the loss
        # each hidden vector (M, T) and each row (M, R) is part.
        n_targets = targets.sum(-1, keepdim=True)  # (M, T, 1)
        if config.objective == "negative":
            rows = torch.cat([tile, negatives], 1)
            outputs = F.embedding(rows, self.W_out)  # (M, R, D)
            share = n_targets * (config.negatives / negatives.size(1))  # what each negative stands for
            gradient = (hidden @ outputs.mT).sigmoid_()
            gradient[..., :C].sub_(1).mul_(targets)
            gradient[..., C:].mul_(share)
            terms = n_targets * (1 + config.negatives)
            row_terms = torch.cat([targets.sum(1), share.sum(1).expand(negatives.shape)], 1)
        elif config.objective == "hierarchical":
            path = self.path[tile].flatten(1)  # (M, R = C depth)
            rows, label = path.clamp(min=0), 1 - self.turn[tile].flatten(1)[:, None]
            outputs = F.embedding(rows, self.W_out)  # (M, R, D)
            weights = targets.repeat_interleave(self.path.size(1), -1) * (path >= 0)[:, None]
            gradient = ((hidden @ outputs.mT).sigmoid_() - label) * weights
            terms, row_terms = weights.sum(-1), weights.sum(1)
        else:  # one tile of M T hidden vectors, whose rows are the whole vocabulary
            rows, outputs = torch.arange(len(self.W_out))[None], self.W_out[None]  # (1, V), (1, V, D)
            hidden = hidden.flatten(0, 1)[None]  # (1, M T, D)
            expected = torch.softmax(hidden @ outputs.mT, -1) * n_targets.view(1, -1, 1)  # (1, M T, V)
            at = tile[:, None].expand(M, T, C).reshape(1, M * T, C)
            found = torch.zeros_like(expected).scatter_add_(2, at, targets.view(1, M * T, C))
            gradient = expected - found
            # Four times: a term's curvature has no factor 1/4 here (see _descend).
            terms, row_terms = 8 * n_targets, 4 * (expected + found).sum(1)

        d_hidden = (gradient @ outputs).view(M, T, -1)
        d_outputs = gradient.mT @ hidden  # (M, R, D)
        terms = terms.view(M, T)
        if config.architecture == "cbow":
            d_hidden = average.mT @ d_hidden  # (M, C, D), by the inputs
            terms = (average.mT @ terms[..., None]).squeeze(-1)  # (M, C)
        self._descend(self.W_in, inputs, d_hidden, terms, lr)
        self._descend(self.W_out, rows, d_outputs, row_terms, lr)

    def _descend(self, W: Tensor, rows: Tensor, gradient: Tensor, terms: Tensor, lr: float) -> None:
        # A term's curvature is at most |other row|^2 / 4, and the terms of a row add up: frequent items have
        # thousands in one step, and with lr x curvature above 2 gradient descent diverges. The limit is on
        # the FIRST learning rate, so that the steps of these rows fall along with it.
        rows, gradient = rows.reshape(-1), gradient.flatten(0, 1)
        total = torch.bincount(rows, terms.reshape(-1), minlength=len(W))  # (V,)
        rate = (self.config.step_limit / (self.config.lr * total)).clamp_(max=1).mul_(-lr).to(W.dtype)
        # Not index_add_: with an index that is expanded from (n, 1), scatter_add_ uses all cores.
        W.scatter_add_(0, rows[:, None].expand_as(gradient), gradient.mul_(rate[rows, None]))


def train(sequences: Iterable[Sequence[Hashable]], config: Word2VecConfig | None = None) -> Word2Vec:
    """Vectors of the items of these sequences. ValueError as ``Vocabulary``, or if there are no pairs."""
    sequences, config = list(sequences), config or Word2VecConfig()
    generator = torch.Generator().manual_seed(config.seed)
    vocabulary = Vocabulary(sequences, config.min_count)
    model = Word2Vec(vocabulary, config, generator)
    tokens, sequence = vocabulary.encode(sequences)
    if not (sequence[1:] == sequence[:-1]).any():
        raise ValueError("nothing to predict: no sequence has two items of the vocabulary")
    keep = vocabulary.keep_probability(config.subsample)
    for epoch in range(config.epochs):
        kept = torch.rand(len(tokens), generator=generator, dtype=keep.dtype) < keep[tokens]
        first, last = draw_windows(sequence[kept], config.window, generator)
        tiles, first, last = cut_tiles(tokens[kept], first, last, config.tile, config.window)
        negatives = model.draw_negatives((len(tiles), config.shared_negatives), generator)
        # Tiles from all over the text: neighbouring ones are about the same words, whose steps would add up.
        steps = torch.randperm(len(tiles), generator=generator).split(config.tiles_per_step)
        for i, chosen in enumerate(steps):
            done = (epoch + i / len(steps)) / config.epochs
            model.step(tiles[chosen], first[chosen], last[chosen], negatives[chosen],
                       max(config.min_lr, config.lr * (1 - done)))
    return model


# --- 5. demo --------------------------------------------------------------------------------

def standard_library_calls() -> list[list[str]]:
    """What each function of the standard library calls, in order: imported functions by their full names,
    built-in ones as builtins.len, methods of unknown objects as .append. Sources are parsed, not imported."""
    library, sequences = Path(sysconfig.get_path("stdlib")), []
    for name in sorted(sys.stdlib_module_names):
        for path in (library / f"{name}.py", *sorted((library / name).rglob("*.py"))):
            if path.is_file() and not {"test", "tests"} & set(path.relative_to(library).parts):
                try:
                    sequences += _calls(ast.parse(path.read_text(encoding="utf-8", errors="replace")))
                except SyntaxError:  # examples of bad programs
                    continue
    return sequences


def _calls(tree: ast.Module) -> list[list[str]]:
    names = {name: f"builtins.{name}" for name in dir(builtins)}  # name in this file -> full name
    functions, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            for a in node.names:
                top = a.name.split(".")[0]
                names |= {a.asname: a.name} if a.asname else {top: top}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            functions.append([inner for inner in ast.walk(node) if isinstance(inner, ast.Call)])
        elif isinstance(node, (ast.Module, ast.ClassDef, ast.If, ast.Try)):
            waiting += ast.iter_child_nodes(node)
    return [[name for call in sorted(calls, key=lambda call: (call.end_lineno, call.end_col_offset))
             if (name := _full_name(call.func, names))] for calls in functions]


def _full_name(function: ast.expr, names: dict[str, str]) -> str:
    parts = []
    while isinstance(function, ast.Attribute):
        parts, function = [function.attr, *parts], function.value
    if isinstance(function, ast.Name) and function.id in names:
        return ".".join([names[function.id], *parts])
    return f".{parts[-1]}" if parts else ""


def main(data: str, architecture: str, objective: str, d_model: int, epochs: int, seed: int,
         out: str | None, plot: str | None) -> None:
    from vectors import Vectors, check_writable, new_figure
    config = Word2VecConfig(architecture, objective, d_model, epochs=epochs, seed=seed)
    check_writable(out)
    new_figure(plot, 1, 1)
    if data == "calls":
        sequences = standard_library_calls()
    else:
        from data import default_documents, read_documents
        documents = default_documents() if data == "words" else read_documents(data)
        paragraphs = (part for document in documents for part in re.split(r"\n\s*\n", document))
        sequences = [re.findall(r"[^\W\d]\w*", paragraph.lower()) for paragraph in paragraphs]
    if len(sequences) < 2:
        raise ValueError(f"{data}: too few paragraphs to hold one out, {len(sequences)}: give at least two")
    held_out, training = sequences[::10], [s for i, s in enumerate(sequences) if i % 10]
    vocabulary = Vocabulary(training, config.min_count)
    V, n_items = len(vocabulary), sum(map(len, training))
    print(f"{len(training):,} sequences of {n_items:,} items, {V:,} different ones at least "
          f"{config.min_count} times; {len(held_out):,} sequences held out")

    untrained = Word2Vec(vocabulary, config, torch.Generator().manual_seed(seed))
    x = F.one_hot(torch.tensor(1), V).float()  # (V,)
    print(f"W^T onehot(1) is the vector of item 1: {torch.equal(untrained.W_in.mT @ x, untrained.W_in[1])} "
          "(expected True)")
    expected = f"(1 + {config.negatives}) ln 2 = {(1 + config.negatives) * math.log(2):.4f}"
    if objective == "softmax":
        expected = f"ln V = {math.log(V):.4f}"
    elif objective == "hierarchical":
        depth = (untrained.path >= 0).sum(1)[vocabulary.encode(held_out)[0]].double().mean().item()
        expected = f"ln 2 x the mean length of a path, about {math.log(2) * depth:.1f}"
    before = untrained.loss(held_out)
    print(f"held-out loss before training {before:.4f} nats a prediction (expected {expected})")
    start = time.perf_counter()
    model = train(training, config)
    seconds, after = time.perf_counter() - start, model.loss(held_out)
    print(f"trained in {seconds:.1f} s, {n_items * epochs / seconds:,.0f} items/s")

    vectors = shown = Vectors(vocabulary.items, model.W_in)
    labels = {}
    if data == "calls":  # the label of an imported function is the module that its name begins with
        labels = {item: item.split(".")[0] for item in vectors.items
                  if item[0] != "." and not item.startswith("builtins.")}
        shown = Vectors(list(labels), torch.stack([vectors[item] for item in labels]))
        found, chance = shown.agreement(labels)
        print(f"nearest of {len(labels)} imported functions is of the same module: {found:.0%}, by chance "
              f"{chance:.0%}, at least twice as often: {found >= 2 * chance} (expected True)")
    for item in shown.items[:400:40]:
        near = "  ".join(f"{other} {cosine:.2f}" for other, cosine in shown.nearest(item, 4))
        print(f"  {item:20} {near}")
    for a, b, c in (("read", "write", "reader"), ("encode", "decode", "encoder")):
        if {a, b, c} <= shown.index.keys():
            add, mul = ([item for item, _ in shown.analogy(a, b, c, 3, method)] for method in ("add", "mul"))
            print(f"  {a} : {b} = {c} : ?  3CosAdd {', '.join(add)}; 3CosMul {', '.join(mul)}")
    if out is not None:
        vectors.save(out, binary=out.endswith(".bin"))
        print(f"saved: {out}")
    if plot is not None:
        shown.plot(plot, labels)
        print(f"drawn: {plot}")
    print(f"held-out loss {before:.4f} -> {after:.4f}, lower: {after < before} (expected True)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", default="calls", help="calls: in the standard library (default); "
                        "words: of Python's documentation; or files, such as 'my/*.txt' or a.jsonl")
    parser.add_argument("--architecture", default="skipgram", choices=("skipgram", "cbow"),
                        help="a word predicts its neighbours, or they predict it (default %(default)s)")
    parser.add_argument("--objective", default="negative", choices=("negative", "hierarchical", "softmax"),
                        help="five sampled words, a tree, or all words (default %(default)s)")
    parser.add_argument("--d_model", type=int, default=100, help="D, width of a vector (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="write the vectors there, as text or FILE.bin")
    parser.add_argument("--plot", metavar="FILE.png", help="draw items in two dimensions (needs matplotlib)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
