"""Ladder: our own scaling law, from small models that are trained here.   Hoffmann et al. 2022, section 3.3

Idea      Train a ladder of small GPTs, each on several numbers of tokens; fit the law; predict a larger model; and
          only then train it. A law that misses what it has not seen is a curve drawn through points.
Formula   L(N, D) = E + A / N^alpha + B / D^beta                               Chinchilla's form
          L(N, D) = ((Nc / N)^(alpha_N / alpha_D) + Dc / D)^alpha_D            Kaplan's
          Both are fitted; the one that fits the ladder better is read at the larger N.
Shapes    runs (n, 3): N parameters with embeddings, D tokens, held-out loss in nats per token
Omits     a search for each width's best learning rate; several seeds.
Run       python ladder.py    a law, a prediction, its test: 2 to 5 minutes; also python scaling.py --measure
          Ends with "predicted loss ..., actual ...: ..."
Test      pytest tests/test_ladder.py
"""

import argparse
import copy
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch


# --- 1. one rung --------------------------------------------------------------------------

LADDER, TARGET = (32, 48, 64, 80, 96), 128  # widths of three layers with heads of 16
CONTEXT, BATCH, VOCABULARY, TOKENS = 64, 16, 1024, 1e6


def train_width(width: int, tokens: np.ndarray, held_out: np.ndarray, marks: list[int], threads: int,
                seed: int = 0) -> list[tuple[float, float, float]]:
    """[(N, D, held-out loss)] of one GPT after each number of tokens in ``marks``.

    One run at a constant learning rate serves all marks: at 0.8 of each a copy goes on with a rate that falls to
    zero at the mark, for a model that has not cooled is worse than its size allows (Hu et al. 2024, 2404.06395).
    """
    import data
    import gpt

    torch.set_num_threads(threads)
    config = gpt.GPTConfig(VOCABULARY, CONTEXT, 3, width // 16, width)
    model = gpt.GPT(config, generator=torch.Generator().manual_seed(seed))
    windows = data.TokenWindows(tokens, CONTEXT, seed)
    validation = data.TokenWindows(held_out, CONTEXT, shuffle=False)
    rate = 0.25 / width  # Adam's best rate falls with the width (Yang et al. 2022, 2203.03466)

    def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, number: int, scale: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (number + 1) / 50) * scale
        inputs, targets = windows.batch(number * BATCH, BATCH)
        optimizer.zero_grad()
        gpt.next_token_loss(model(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    @torch.no_grad()
    def evaluate(model: torch.nn.Module) -> float:
        total, n = 0.0, len(validation)
        for first in range(0, n, BATCH):
            inputs, targets = validation.batch(first, min(BATCH, n - first))
            total += float(gpt.next_token_loss(model(inputs), targets)) * len(inputs)
        return total / n

    optimizer, found, number = optimizer_of(model), [], 0
    for end in (mark // (BATCH * CONTEXT) for mark in marks):
        while number < int(0.8 * end):
            step(model, optimizer, number, 1.0)
            number += 1
        cooled = copy.deepcopy(model)
        cooling = optimizer_of(cooled)
        cooling.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for later in range(number, end):
            step(cooled, cooling, later, (end - later) / (end - number))
        found.append((gpt.count_parameters(config), end * BATCH * CONTEXT, evaluate(cooled)))
    return found


# --- 2. demo ------------------------------------------------------------------------------

def show_measure(tokens: float = TOKENS, plot: str | None = None, seed: int = 0) -> None:
    """Train the ladder, fit, predict a larger model, train that one too."""
    import data
    import scaling
    import scaling_laws
    import tokenizer

    least = 40 * BATCH * CONTEXT  # twenty steps at the first mark
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be in 0 .. 2^32 - 1, got {seed}")
    if not least <= tokens < 1e9:
        raise ValueError(f"--tokens must be at least {least} for a law, and below 1e9 for this machine, got {tokens:g}")
    figure = scaling.new_figure(plot, 9, 5)
    start, marks = time.perf_counter(), [int(tokens * share) for share in (0.5, 0.7, 1)]
    train, validation = data.split_documents(data.default_documents())
    encoding = tokenizer.train(train, VOCABULARY)
    line, held_out = (data.pack(part, lambda text: tokenizer.encode(encoding, text), tokenizer.eot(encoding),
                                encoding.n_vocab) for part in (train, validation))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(f"{len(line):,} tokens of Python's documentation, read up to {tokens / len(line):.1f} times; "
          f"{len(held_out):,} held out; {cores} cores", flush=True)
    # One process per core: models this small leave a second thread idle. The widest first.
    with ProcessPoolExecutor(min(cores, len(LADDER)), multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(train_width, width, line, held_out, marks, 1, seed)
                for width in sorted(LADDER, reverse=True)]
        results = [run for job in jobs for run in job.result()]
    runs = scaling_laws.check_runs(np.array(sorted(results)))
    chinchilla, kaplan = scaling_laws.parametric_fit(runs), scaling_laws.kaplan_fit(runs)
    print("\n         N          D    loss   Chinchilla's form   Kaplan's")
    for N, D, loss in runs:
        print(f"{N:10,.0f} {D:10,.0f}  {loss:.4f}   {chinchilla.loss(N, D):17.4f}   {kaplan.loss(N, D):8.4f}")
    misfits = [float(np.abs(np.log(form.loss(runs[:, 0], runs[:, 1]) / runs[:, 2])).mean())
               for form in (chinchilla, kaplan)]
    law = kaplan if misfits[1] < misfits[0] else chinchilla
    constants = ", ".join(f"{name} {value:.3g}" for name, value in vars(law).items())
    print(f"mean misfit {misfits[0]:.2%} and {misfits[1]:.2%}: the better form predicts, with {constants}\n"
          f"{time.perf_counter() - start:.0f} s so far", flush=True)
    N = scaling.gpt_shape(3, TARGET, TARGET // 16, CONTEXT, VOCABULARY).parameters
    D = marks[-1] // (BATCH * CONTEXT) * BATCH * CONTEXT
    predicted = float(law.loss(N, D))
    print(f"predicted before it is trained: {N:,} parameters ({N / runs[:, 0].max():.1f} times the largest), "
          f"{D:,} tokens: {predicted:.4f}", flush=True)
    actual = train_width(TARGET, line, held_out, marks[-1:], cores, seed)[0][2]
    if figure is not None:
        axes = figure.add_subplot()
        sizes = np.geomspace(runs[0, 0], N, 50)
        for tokens_seen in np.unique(runs[:, 1]):
            points = runs[runs[:, 1] == tokens_seen]
            color = axes.plot(points[:, 0], points[:, 2], "o")[0].get_color()
            axes.plot(sizes, law.loss(sizes, tokens_seen), color=color, label=f"D = {tokens_seen:,.0f}")
        axes.plot([N], [actual], "k*", markersize=14, label="the larger model, not fitted")
        axes.set(xlabel="parameters", ylabel="held-out loss, nats per token", xscale="log")
        axes.legend()
        scaling.save_figure(figure, plot)
    print(f"predicted loss {predicted:.4f}, actual {actual:.4f}: {predicted / actual - 1:+.2%} "
          f"(expected within 3%);   {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--tokens", type=float, default=TOKENS, help="of each run (default %(default)g)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it (needs matplotlib)")
    parser.add_argument("--seed", type=int, default=0,
                        help="of initial weights and order of the data (default %(default)s)")
    try:
        show_measure(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
