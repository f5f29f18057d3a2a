"""All-reduce or all-gather? What each kind of parallelism sends, when, and how much: by formula, and counted.

Idea      Data parallelism sums gradients once a step, whatever the batch; tensor parallelism sums activations twice a
          layer and direction, whatever the weights; a pipeline sends activations to one neighbour; context parallelism
          sends keys and values round a ring. Which is cheap follows from the sizes, and from which link is fast.
Formula   bytes that one rank sends, for a whole tensor of n bytes on P ranks in a ring:
          all-reduce 2 (P-1)/P n,   all-gather and reduce-scatter (P-1)/P n,   send n
          a step of a GPT with N parameters, L layers, x = B T D activations, times the bytes of a number:
          data       2 (P-1)/P N                       summed gradients
          tensor     2 (P-1)/P (4 L + 2) x             2 sums a layer forward and 2 backward; embedding and head
          sequence   2 (P-1)/P (4 L + 2.5) x           the same in halves: all-gather + reduce-scatter; half a sum more
                                                       for the gradient of the embedding
          pipeline   x each way between two stages      whatever the number of layers
          context    (P-1) 2 x/P forward a layer, and (2P-1) 2 x/P backward         keys and values, and their gradients
Shapes    no tensors here
Omits     what a library's tree or hierarchical algorithms send; headers; the few numbers of targets, a loss or a norm.
Run       python parallel.py --communication      the table for a small GPT on 2 ranks; ends with "max |counted / ..."
          python communication.py --ranks 4         the same on 4
Test      pytest tests/test_communication.py
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


# --- 1. by formula ------------------------------------------------------------------------------------

@dataclass
class Sizes:
    """What the bytes depend on: N parameters of ``itemsize`` bytes, L layers, B sequences of T tokens, width D."""
    N: int
    L: int
    B: int
    T: int
    D: int
    itemsize: int = 4


def bytes_sent(strategy: str, P: int, s: Sizes) -> float:
    """Bytes that each rank of a group of P sends in a step (of a pipeline: each pair of neighbours).

    Raises ValueError for a strategy other than data, tensor, sequence, pipeline or context.
    """
    x = s.B * s.T * s.D
    ring = 2 * (P - 1) / P
    numbers = {"data": ring * s.N, "tensor": ring * (4 * s.L + 2) * x, "sequence": ring * (4 * s.L + 2.5) * x,
               "pipeline": 2 * x if P > 1 else 0, "context": s.L * ((P - 1) + (2 * P - 1) * (P > 1)) * 2 * x / P}
    if strategy not in numbers:
        raise ValueError(f"a strategy is one of {', '.join(numbers)}, got {strategy!r}")
    return s.itemsize * numbers[strategy]


WHEN = {"data": ("all-reduce of gradients", "during backward, once a step"),
        "tensor": ("all-reduce of activations", "twice a layer, forward and backward"),
        "sequence": ("all-gather, reduce-scatter of activations", "twice each a layer, forward and backward"),
        "pipeline": ("send of activations and their gradients", "once a microbatch and stage"),
        "context": ("send of keys, values, their gradients", "P-1 times a layer forward, 2P-1 backward")}


# --- 2. counted ---------------------------------------------------------------------------------------

@contextmanager
def counting() -> Iterator[list[tuple[str, float]]]:
    """Inside, every collective or send of tensors adds (its name, the bytes that this process sends for it).

    A collective counts as its ring sends, 2 (P-1)/P n or (P-1)/P n, whatever algorithm the backend has. Counted is what
    is called as torch.distributed.<name>, by all threads of the process; objects (all_gather_object) are left out.
    """
    sent, before = [], {}

    def size(group) -> int:
        return dist.get_world_size(group)

    def count(name: str, group, tensor: Tensor, factor: float) -> None:
        P = size(group)
        sent.append((name, factor * (P - 1) / P * tensor.nbytes))

    def wrap(name: str, note) -> None:
        if hasattr(dist, name):
            original = before[name] = getattr(dist, name)
            setattr(dist, name, lambda *args, **kwargs: (note(*args, **kwargs), original(*args, **kwargs))[1])

    wrap("all_reduce", lambda tensor, *_, group=None, **__: count("all-reduce", group, tensor, 2))
    for name in ("all_gather", "all_gather_into_tensor", "all_gather_single"):
        wrap(name, lambda parts, tensor, group=None, *_, **__: sent.append(
            ("all-gather", (size(group) - 1) * tensor.nbytes)))
    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
        wrap(name, lambda output, tensor, *_, group=None, **__: count("reduce-scatter", group, tensor, 1))
    wrap("all_to_all_single", lambda output, tensor, *_, group=None, **__: count("all-to-all", group, tensor, 1))
    wrap("broadcast", lambda tensor, *_, group=None, **__: count("broadcast", group, tensor, 1))
    wrap("isend", lambda tensor, *_, **__: sent.append(("send", tensor.nbytes)))  # send calls it, too
    dist.distributed_c10d.isend = dist.isend  # batch_isend_irecv calls this one, and insists on it
    try:
        yield sent
    finally:
        dist.distributed_c10d.isend = before["isend"]
        for name, original in before.items():
            setattr(dist, name, original)


# --- 3. demo ------------------------------------------------------------------------------------------

def cut_and_step(strategy: str, model: torch.nn.Module, tokens: Tensor) -> Callable[[], None]:
    """Cut a copy of the model by the strategy over all processes; returns what runs one step of it."""
    import gpt
    import parallel
    import pipeline
    import pipeline_schedules
    import ring_attention
    import tensor_parallel

    (rank, P), (inputs, targets) = parallel.rank_and_size(), (tokens[:, :-1], tokens[:, 1:])
    V, model = model.config.vocab_size, copy.deepcopy(model)
    if strategy == "data":
        dp = parallel.DataParallel(model)
        rows = slice(rank * len(tokens) // P, (rank + 1) * len(tokens) // P)
        return lambda: (gpt.next_token_loss(model(inputs[rows]), targets[rows]).backward(), dp.finish())
    if strategy in ("tensor", "sequence"):
        tensor_parallel.tensor_parallel(model, None, strategy == "sequence")
        return lambda: tensor_parallel.vocabulary_cross_entropy(model(inputs), targets, V).mean().backward()
    if strategy == "pipeline":
        pipe = pipeline.Pipeline(model, pipeline_schedules.schedule("1f1b", P, 2))
        return lambda: pipe.step(inputs, targets, gpt.next_token_loss)
    ring_attention.context_parallel(model)
    return lambda: gpt.next_token_loss(model(inputs), ring_attention.zigzag(targets, 1)).backward()


def _demo(rank: int, P: int, seed: int, rendezvous: str) -> None:
    """What every rank runs; rank 0 prints."""
    from gpt import GPT, GPTConfig, count_parameters

    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=P)
    torch.set_num_threads(1)
    config = GPTConfig(vocab_size=512, context=128, n_layers=4, n_heads=4, d_model=128)
    generator = torch.Generator().manual_seed(seed)
    model, tokens = GPT(config, generator=generator), torch.randint(512, (8, 129), generator=generator)
    sizes = Sizes(count_parameters(config), config.n_layers, 8, 128, config.d_model)
    say, worst = print if rank == 0 else lambda *words: None, 0.0
    say(f"GPT of {sizes.N:,} parameters in fp32, {sizes.L} layers; a step of {sizes.B} x {sizes.T} tokens on {P} ranks")
    say(f"{'strategy':9} {'MB sent, formula':>16} {'counted':>8}   {'what':42} when")
    for strategy, (what, when) in WHEN.items():
        step = cut_and_step(strategy, model, tokens)
        with counting() as sent:
            step()
        total = torch.tensor(float(sum(number for _, number in sent)), dtype=torch.float64)
        dist.all_reduce(total)
        pairs = P - 1 if strategy == "pipeline" else P  # a pipeline's formula is for a pair of neighbours
        expected, counted = bytes_sent(strategy, P, sizes), total.item() / max(1, pairs)
        if strategy == "pipeline" and P > 1:  # the two ends also exchange the gradient of the tied embedding
            counted -= 2 * 4 * config.vocab_size * config.d_model / pairs
        worst = max(worst, abs(counted / expected - 1) if expected else counted)
        say(f"{strategy:9} {expected / 1e6:16.3f} {counted / 1e6:8.3f}   {what:42} {when}")
    say("all-reduce sums what every rank has (data, tensor); all-gather copies what each has a part of (sequence)")
    say(f"max |counted / formula - 1| = {worst:.4f}: "
        + ("OK, below 0.02" if worst < 0.02 else "WRONG, expected below 0.02"))
    dist.destroy_process_group()


def table(ranks: int = 2, seed: int = 0) -> None:
    """Print the table, from a step of each strategy on so many processes.

    Raises ValueError for a number of ranks that 4 heads and 8 sequences cannot share, or a seed of more than 32 bits.
    """
    if ranks not in (1, 2, 4) or not 0 <= seed < 2**32:
        raise ValueError("--ranks must be 1, 2 or 4, for the model has 4 heads, and --seed in 0 .. 2^32 - 1, "
                         f"got {ranks} and {seed}")
    from processes import start_ranks
    with tempfile.TemporaryDirectory() as folder:  # the ranks meet through a file: no port to be taken
        start_ranks(_demo, (ranks, seed, (Path(folder) / "ranks").as_uri()), ranks)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--ranks", type=int, default=2, help="processes to start: 1, 2 or 4 (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and data (default %(default)s)")
    try:
        table(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
