"""Packing: documents into contexts, and contexts into batches.   Ding et al. 2024 (2404.10830), section 3

Idea      A model reads contexts of T tokens; documents have any length. Joined in one line and cut every T
          tokens, nothing is wasted, but documents are torn that would have fitted. One document a context
          tears none and wastes most of the computation. Best-fit-decreasing bin packing tears only what is
          longer than T and wastes next to nothing: longest first, each into the fullest context with room.
          An attention mask in blocks keeps documents that share a context from reading each other.
Formula   waste        = 1 - (sum of lengths) / (contexts * T)
          best fit     : context(d) = argmin over { c : space(c) >= n_d } of space(c), ties to the oldest
          query i sees key j  <=>  j <= i and document(i) = document(j); two pieces of a text are two documents
          input t + 1 of a document = its token t, input 0 = eot: every token is a target exactly once
Shapes    lengths (documents,) -> plan (pieces, 4); documents (n_d,) and plan -> inputs, targets, document ids (B, T)
          document ids -> mask (B, 1, T, T)
          model(inputs, PackedRows(document ids)): attention and positions of each document as if it stood alone
Omits     skipping what the mask hides (flash_attn.py does, given ``ids``); documents on the disk: shards.py.
Run       python packing.py                      Python's documentation, 3 s; ends with "refused by name: True ..."
          python packing.py --data 'my/*.txt' --context 1024 --out tokens
Test      pytest tests/test_packing.py
"""

import argparse
import hashlib
import heapq
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that no loss counts; cross_entropy's own default


# --- 1. documents into contexts, in four ways --------------------------------------------------

# A plan is an array (pieces, 4) of int64: context, document, first token in it, number of tokens; in the order of
# contexts, and within one in the order of its places.

def _pieces(lengths: np.ndarray, context: int, crossing: bool) -> tuple[np.ndarray, ...]:
    """Where each piece lies in the line of all tokens, its document, first token and length, (pieces,) each: the
    line cut at each document's begin and every T tokens of the line (crossing) or of the document."""
    lengths = np.asarray(lengths)
    if context < 1 or lengths.ndim != 1 or not lengths.size or lengths.dtype.kind not in "iu" or lengths.min() < 1:
        raise ValueError("context must be at least 1 and lengths integers (documents,) of at least 1, "
                         f"got {context} and {lengths.dtype} {lengths.shape}"
                         f"{f', smallest {lengths.min()}' if lengths.size else ''}")
    lengths = lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    if crossing:
        places = np.union1d(begins, np.arange(0, ends[-1], context))
    else:
        counts = -(-lengths // context)  # pieces of each document
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its document
        places = np.repeat(begins, counts) + number * context
    document = np.searchsorted(ends, places, side="right")
    return places, document, places - begins[document], np.diff(places, append=ends[-1])


def pack_crossing(lengths: np.ndarray, context: int) -> np.ndarray:
    """All documents in one line, cut every T tokens: GPT-3's way. lengths (documents,) >= 1 -> plan."""
    places, document, start, length = _pieces(lengths, context, crossing=True)
    return np.stack((places // context, document, start, length), 1)


def pack_padded(lengths: np.ndarray, context: int) -> np.ndarray:
    """Each piece of at most T tokens of a document in a context of its own."""
    _, document, start, length = _pieces(lengths, context, crossing=False)
    return np.stack((np.arange(len(document)), document, start, length), 1)


def pack_in_order(lengths: np.ndarray, context: int) -> np.ndarray:
    """The pieces in their order, a new context when the next does not fit: next fit, which needs no plan ahead."""
    _, document, start, length = _pieces(lengths, context, crossing=False)
    rows, row, space = [], 0, context
    for n in length.tolist():
        if n > space:
            row, space = row + 1, context
        rows.append(row)
        space -= n
    return np.stack((rows, document, start, length), 1)


def pack_best_fit_naive(lengths: np.ndarray, context: int) -> np.ndarray:
    """The longest piece first, into the context with the least space that is enough, the oldest of them; into a
    new one if there is none. Looks at every context for every piece."""
    _, document, start, length = _pieces(lengths, context, crossing=False)
    order, spaces, rows = np.argsort(-length, kind="stable"), [], []
    for n in length[order].tolist():
        fitting = [(space, row) for row, space in enumerate(spaces) if space >= n]
        row = min(fitting)[1] if fitting else len(spaces)
        if not fitting:
            spaces.append(context)
        spaces[row] -= n
        rows.append(row)
    return _in_rows(rows, document[order], start[order], length[order])


def pack_best_fit(lengths: np.ndarray, context: int) -> np.ndarray:
    """The plan of ``pack_best_fit_naive``: contexts lie in one heap per space left, and bit s of an integer says
    whether heap s holds any, so that the least space >= n is the lowest set bit from n on."""
    _, document, start, length = _pieces(lengths, context, crossing=False)
    order, rows, n_rows = np.argsort(-length, kind="stable"), [], 0
    heaps, occupied = defaultdict(list), 0
    for n in length[order].tolist():
        if fitting := occupied >> n:
            space = n + (fitting & -fitting).bit_length() - 1
            row = heapq.heappop(heaps[space])
            if not heaps[space]:
                occupied ^= 1 << space
        else:
            space, row, n_rows = context, n_rows, n_rows + 1
        rows.append(row)
        if space > n:
            heapq.heappush(heaps[space - n], row)
            occupied |= 1 << (space - n)
    return _in_rows(rows, document[order], start[order], length[order])


def _in_rows(rows: list[int], *columns: np.ndarray) -> np.ndarray:
    return np.stack((rows, *columns), 1)[np.argsort(rows, kind="stable")]


WAYS = {"crossing": pack_crossing, "padded": pack_padded, "in_order": pack_in_order, "best_fit": pack_best_fit}


def waste(plan: np.ndarray, context: int) -> float:
    """The share of the contexts' places that hold no token."""
    return 1 - plan[:, 3].sum() / ((plan[-1, 0] + 1) * context)


def torn(plan: np.ndarray, lengths: np.ndarray, context: int) -> int:
    """How many documents lie in several pieces though a context would have held them whole."""
    pieces = np.bincount(plan[:, 1], minlength=len(lengths))
    return int(((pieces > 1) & (lengths <= context)).sum())


# --- 2. contexts into batches ------------------------------------------------------------------

class PackedContexts:
    """The examples 0, 1, 2, ... of a plan, without end: example j is a context of epoch j // n, in an order that
    each epoch draws anew from (seed, epoch). The number of the next example is the only state.

    Args:
        shard: the documents, in a list or a shards.TokenShard; those that end with ``eot`` teach the model to end.
        plan: (pieces, 4), of their lengths.
        context: T, at least the longest row of the plan.
        eot: the input before a document's first token.
        seed: of the order, in 0 .. 2^32 - 1.
        shuffle: False keeps every epoch in the order of the plan.

    ValueError for a plan that does not fit the context or the documents; it names the first piece that does not.
    """

    def __init__(self, shard: Sequence[np.ndarray], plan: np.ndarray, context: int, eot: int, seed: int = 0,
                 shuffle: bool = True):
        if plan.ndim != 2 or plan.shape[1] != 4 or not len(plan):
            raise ValueError(f"a plan must be (pieces, 4) with pieces >= 1, got {plan.shape}")
        if plan.min() < 0 or (np.diff(plan[:, 0]) < 0).any():
            raise ValueError("a plan's numbers must be at least 0, its contexts in order")
        longest = int(np.bincount(plan[:, 0], plan[:, 3]).max())
        if longest > context or plan[:, 1].max() >= len(shard) or not 0 <= seed < 2**32:
            raise ValueError(f"a plan with rows of {longest} tokens and documents up to {plan[:, 1].max()} wants "
                             f"a context of at least {longest}, {plan[:, 1].max() + 1} documents and a seed in "
                             f"0 .. 2^32 - 1, got {context}, {len(shard)} and {seed}")
        # A shard has the lengths at hand; to ask each of its documents would take seconds per million.
        lengths = np.asarray(shard.lengths if hasattr(shard, "lengths") else [len(document) for document in shard])
        outside = np.flatnonzero((plan[:, 3] < 1) | (plan[:, 3] > lengths[plan[:, 1]] - plan[:, 2]))
        if len(outside):
            _, d, first, n = plan[outside[0]].tolist()
            raise ValueError(f"piece {outside[0]} of the plan, tokens [{first}, {first + n}) of document {d}, is empty "
                             f"or ends behind the document, which has {lengths[d]}: make the plan of these documents' "
                             "lengths")
        self.shard, self.plan, self.context, self.eot = shard, plan, context, eot
        self.seed, self.shuffle = seed, shuffle
        self._bounds = np.searchsorted(plan[:, 0], np.arange(plan[-1, 0] + 2))  # the pieces of each context
        self._epoch, self._order = -1, np.arange(len(self))

    def __len__(self) -> int:
        """n, the number of contexts: the examples of one epoch."""
        return len(self._bounds) - 1

    def _context_of(self, example: int) -> int:
        epoch, place = divmod(example, len(self))
        if self.shuffle and epoch != self._epoch:
            # RandomState is NumPy's one frozen stream: a later version resumes in the same order.
            self._epoch, self._order = epoch, np.random.RandomState([self.seed, epoch]).permutation(len(self))
        return int(self._order[place])

    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Examples start to start + count - 1: inputs, targets (IGNORE where empty), and document ids (0, 1, ... in
        each row, -1 where empty), each (count, T) int64. ValueError for a start below 0 or a count below 1."""
        if start < 0 or count < 1:
            raise ValueError(f"start must be at least 0 and count at least 1, got {start} and {count}")
        inputs, targets, ids = np.empty((3, count, self.context), dtype=np.int64)  # (count, T) each
        inputs[:], targets[:], ids[:] = self.eot, IGNORE, -1
        for i in range(count):
            row, place = self._context_of(start + i), 0
            for k, (_, d, first, n) in enumerate(self.plan[self._bounds[row]:self._bounds[row + 1]].tolist()):
                document, here = self.shard[d], slice(place, place + n)
                targets[i, here] = document[first:first + n]
                inputs[i, place] = document[first - 1] if first else self.eot
                inputs[i, place + 1:place + n] = document[first:first + n - 1]
                ids[i, here], place = k, place + n
        return torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(ids)


# --- 3. attention inside a document -------------------------------------------------------------

def block_diagonal_mask(document_ids: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, T) bool, [b, 0, i, j] whether query i sees key j: not later, and of the same document.
    Empty places see each other, so no softmax is over nothing."""
    return (document_ids[:, None, :, None] == document_ids[:, None, None, :]).tril()  # (B, 1, T, T)


class PackedRows:
    """Rows that hold several documents, to be given to GPT or Llama as a cache: positions begin anew with each
    document, and no query looks into another.

        inputs, targets, ids = contexts.batch(start, count)
        logits = model(inputs, PackedRows(ids))  # (B, T, V)

    Of a cache it has what the models ask for, ``begin``, ``layers[i].append`` and ``layers[i].mask``, but it keeps no
    keys: every call is a whole forward, and gradients flow. ``document_ids`` (B, T) of any kind: a document ends where
    the number changes. The mask is one of T^2 places, and each layer's attention keeps a copy of it for backward.
    """

    def __init__(self, document_ids: Tensor):
        if document_ids.dim() != 2:
            raise ValueError(f"document_ids must be (B, T), got shape {tuple(document_ids.shape)}")
        self.document_ids = document_ids

    def begin(self, T: int) -> Tensor:
        """Make ready for tokens (B, T); of longer rows of ids the first T count, so that inputs may be rows without
        their last token. Returns what has to be added to a token's place in its row to give its position, (B, T):
        ids 7 7 7 8 8 -> 0 0 0 -3 -3."""
        ids = self.document_ids[:, :T]
        if ids.size(1) < T:
            raise ValueError(f"rows of {T} tokens have document_ids for {ids.size(1)}")
        begins = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)  # (B, T)
        layer = _PackedLayer(block_diagonal_mask(begins.cumsum(1)))
        self.layers = defaultdict(lambda: layer)  # layer i, whatever i is
        # the last place so far where a document began
        return -(begins * torch.arange(T, device=ids.device)).cummax(1).values  # (B, T)


class _PackedLayer:
    def __init__(self, mask: Tensor):
        self.mask = mask  # (B, 1, T, T)

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


# --- 4. demo ------------------------------------------------------------------------------------

def main(data: str | None, context: int, held_out: float, seed: int, out: str | None) -> None:
    from data import default_documents, read_documents
    from shards import HEADER_BYTES, ShardError, open_shard, write_shard, write_split
    if not 1 <= context <= 2**24 or not 0 <= seed < 2**32:  # asked before anything is written
        raise ValueError(f"--context must be in 1 .. 2^24 and --seed in 0 .. 2^32 - 1, got {context} and {seed}")
    documents: Iterator[str] = iter(default_documents()) if data is None else read_documents(data)
    eot = 256  # the bytes are tokens 0 to 255, so that the demo needs no tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "tokens") if out is None else Path(out)
        train, validation = write_split(folder, documents, lambda text: np.frombuffer(text.encode(), dtype=np.uint8),
                                        eot, eot + 1, held_out)
        both = set.intersection(*({hashlib.sha256(document.tobytes()).digest() for document in side}
                                  for side in (train, validation)))
        print(f"{train.path}: {len(train):,} documents, {len(train.tokens):,} tokens, "
              f"{os.path.getsize(train.path):,} bytes")
        print(f"{validation.path}: {len(validation):,} documents, {len(validation.tokens):,} tokens; "
              f"on both sides: {len(both)} (expected 0)")

        lengths = train.lengths
        print(f"context {context}: {'contexts':>9}{'waste':>9}{'torn':>6}   (documents cut that would have fitted)")
        plans = {name: way(lengths, context) for name, way in WAYS.items()}
        for name, plan in plans.items():
            print(f"  {name:12}{plan[-1, 0] + 1:9,}{waste(plan, context):9.2%}{torn(plan, lengths, context):6,}")
        few = lengths[:200]
        same = np.array_equal(pack_best_fit(few, context), pack_best_fit_naive(few, context))
        print(f"best fit, naive = fast: {same} (expected True)")

        contexts, counted, most = PackedContexts(train, plans["best_fit"], context, eot, seed), 0, np.empty(0)
        for j in range(len(contexts)):  # one at a time: the tokens may be more than memory holds
            _, targets, ids = (x[0].numpy() for x in contexts.batch(j, 1))  # (T,) each
            counted = counted + np.bincount(targets[targets != IGNORE], minlength=eot + 1)
            sizes = np.bincount(ids[ids >= 0])  # tokens of each document in this context
            most = max(most, sizes, key=len)
        once = np.array_equal(counted, sum(np.bincount(document, minlength=eot + 1) for document in train))
        seen = (most * (most + 1)).sum() / (2 * context**2)
        print(f"a context holds up to {len(most)} documents; there block_diagonal_mask lets {seen:.1%} of the pairs "
              f"through, a causal one {(context + 1) / (2 * context):.1%}")

        flipped = Path(scratch, "flipped.tokens")
        write_shard(flipped, [train[0]], eot + 1)
        damaged = bytearray(flipped.read_bytes())
        damaged[HEADER_BYTES] ^= 1
        flipped.write_bytes(damaged)
        try:
            refused = not open_shard(flipped)
        except ShardError as error:
            refused = str(flipped) in str(error)
        print(f"every token a target exactly once: {once}; a flipped bit is refused by name: {refused} "
              "(expected True, True)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--data", help="files, such as 'my/*.txt' or a.jsonl,b.txt (default: Python's own)")
    parser.add_argument("--context", type=int, default=4096, help="T, tokens per context (default %(default)s)")
    parser.add_argument("--held_out", type=float, default=0.05, help="share held out (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of contexts (default %(default)s)")
    parser.add_argument("--out", metavar="DIR", help="write train.tokens and validation.tokens there")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
