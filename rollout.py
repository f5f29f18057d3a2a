"""Rollouts: a policy answers many prompts at once, and keeps the log-probability of every token that it drew.

Idea      Reinforcement learning spends most of its time writing answers. Prompts of any lengths share a batch and a
          key-value cache; every step computes one token for each answer that goes on; answers that have ended leave the
          batch. Each answer draws from random numbers of its own, so it does not depend on who stands beside it.
Formula   x_t = min {v : sum_{w <= v} p(w | x_<t) >= u_t},  u_t uniform on [0, 1):  x_t ~ p     (inverse transform)
          p = softmax(logits / temperature);   temperature 0: x_t = argmax logits
Shapes    prompts, B rows of any lengths -> tokens (B, T) int64, mask (B, T), log_probs (B, T), terminated (B,).
          A row is prompt, response, padding on the right. mask is 1.0 at response tokens, the stop token included;
          log_probs[b, t] is that of token t given those before it, 0 outside the mask.
Omits     top-k, top-p (the policy would not be the one that is trained); continuous batching; sampling while training.
Run       python rollout.py    ragged prompts in batches, against one at a time with the whole text anew: 10 s
          Ends with "batched = alone: True ..."
Test      pytest tests/test_rollout.py
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

SPARE = 0.75  # rows leave the cache when fewer than this share of them goes on: to copy it each step would cost more


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout) inside; afterwards every module is back in the mode that it had."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


@dataclass
class Rollout:
    """B answers; shapes as in the header. ``lengths`` (B,) counts prompt and response."""
    tokens: Tensor
    mask: Tensor
    log_probs: Tensor
    terminated: Tensor  # (B,) bool: ended by a stop token, not by the limit or the end of the context
    lengths: Tensor

    def responses(self) -> list[list[int]]:
        """The new tokens of each row, the stop token included."""
        starts, ends = (self.lengths - self.mask.sum(1).long()).tolist(), self.lengths.tolist()
        return [row[start:end] for row, start, end in zip(self.tokens.tolist(), starts, ends)]


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """One token per row by inverse transform: logits (B, V), uniforms (B,) in [0, 1) -> (B,). 0: the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    edges = (logits / temperature).softmax(-1).cumsum(-1)  # (B, V)
    # Rounding may leave the last edge below 1: it is what u is a share of.
    found = torch.searchsorted(edges, (uniforms * edges[:, -1])[:, None].contiguous(), right=True)[:, 0]
    return found.clamp(max=logits.size(-1) - 1)


def _checked(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float) -> None:
    context, V = model.config.context, model.config.vocab_size
    if max_new_tokens < 1 or not (temperature == 0 or 1e-6 <= temperature < float("inf")) or not len(prompts):
        raise ValueError("a rollout needs a prompt, max_new_tokens of at least 1 and a temperature of 0 or at least "
                         f"1e-6, got {len(prompts)} prompts, {max_new_tokens} and {temperature}")
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < context:
            raise ValueError(f"prompt {i} has {len(prompt)} tokens; a context of {context} leaves room for an answer "
                             f"to 1 .. {context - 1}")
        if min(prompt) < 0 or max(prompt) >= V:
            raise ValueError(f"prompt {i} has ids {min(prompt)} .. {max(prompt)}, the vocabulary is 0 .. {V - 1}")


# --- 1. as the formula reads ----------------------------------------------------------------

@torch.no_grad()
def naive_generate_rollout(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, *,
                           temperature: float = 1.0, stop_tokens: Iterable[int] = (),
                           uniforms: Tensor | None = None, generator: torch.Generator | None = None,
                           whole_logits: Callable[[Tensor], Tensor] = lambda logits: logits) -> Rollout:
    """``generate_rollout`` one prompt after the other, every token from the whole text before it."""
    _checked(model, prompts, max_new_tokens, temperature)
    uniforms = _uniforms(len(prompts), max_new_tokens, uniforms, generator)
    device, stop_tokens, rows, log_probs = next(model.parameters()).device, set(stop_tokens), [], []
    with evaluating(model):
        for prompt, u in zip(prompts, uniforms):
            row, log_p = list(prompt), [0.0] * len(prompt)
            while (n := len(row) - len(prompt)) < max_new_tokens and len(row) < model.config.context:
                logits = whole_logits(model(torch.tensor([row], device=device))[:, -1]).float()  # (1, V)
                row.append(int(draw_tokens(logits, u[n:n + 1].to(device), temperature)))
                log_p.append(logits.log_softmax(-1)[0, row[-1]].item())
                if row[-1] in stop_tokens:
                    break
            rows.append(row)
            log_probs.append(log_p)
    return _padded(rows, log_probs, [len(prompt) for prompt in prompts], stop_tokens, device)


def _uniforms(B: int, most: int, uniforms: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if uniforms is None:
        device = "cpu" if generator is None else generator.device
        return torch.rand(B, most, generator=generator, device=device)
    if uniforms.dim() != 2 or uniforms.size(0) != B or uniforms.size(1) < most:
        raise ValueError(f"uniforms must be ({B}, {most}) or longer, got {tuple(uniforms.shape)}")
    return uniforms


def _padded(rows: list[list[int]], log_probs: list[list[float]], starts: list[int], stop_tokens: set[int],
            device: torch.device) -> Rollout:
    T = max(map(len, rows))
    lengths = torch.tensor([len(row) for row in rows], device=device)
    tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)  # (B, T)
    log_p = torch.tensor([row + [0.0] * (T - len(row)) for row in log_probs], device=device)  # (B, T)
    places = torch.arange(T, device=device)
    mask = (places >= torch.tensor(starts, device=device)[:, None]) & (places < lengths[:, None])  # (B, T)
    ended = torch.tensor([row[-1] in stop_tokens for row in rows], device=device)
    return Rollout(tokens, mask.float(), log_p, ended, lengths)


# --- 2. the same, fast ----------------------------------------------------------------------

@torch.no_grad()
def generate_rollout(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, *,
                     temperature: float = 1.0, stop_tokens: Iterable[int] = (), uniforms: Tensor | None = None,
                     generator: torch.Generator | None = None, batch: int = 128,
                     whole_logits: Callable[[Tensor], Tensor] = lambda logits: logits) -> Rollout:
    """Answer every prompt, up to and with the first of ``stop_tokens``, ``max_new_tokens`` or the context's end.

    Args:
        model: any language model of the contract; it answers without dropout, whatever mode it is in.
        temperature: of the sampling; 0: greedy. ``log_probs`` are the model's own, at temperature 1.
        uniforms: (B, max_new_tokens) numbers in [0, 1), row b for answer b; None: drawn from the generator. The same
            numbers give the same answer in any batch (but where rounding turns a near tie), on any process.
        batch: prompts in the cache at a time, of like length, so that little of it is padding.
        whole_logits: (B, Vp) as the model gives them -> (B, V); for a model cut over its vocabulary, what joins the
            slices, on ranks that all have the same prompts and numbers. Weights in parts (ZeRO-3) must be gathered
            outside, once: here a layer is asked for every token.

    Raises:
        ValueError: without prompts, or one that is empty, fills the context, or has ids outside the vocabulary.
    """
    _checked(model, prompts, max_new_tokens, temperature)
    device, stop_tokens = next(model.parameters()).device, set(stop_tokens)
    uniforms = _uniforms(len(prompts), max_new_tokens, uniforms, generator).to(device)
    rows, log_probs = [list(prompt) for prompt in prompts], [[0.0] * len(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with evaluating(model):
        for begin in range(0, len(order), batch):
            some = order[begin:begin + batch]
            for i, new, log_p in _answer(model, [rows[i] for i in some], uniforms[some], max_new_tokens, temperature,
                                         stop_tokens, whole_logits):
                rows[some[i]] += new
                log_probs[some[i]] += log_p
    return _padded(rows, log_probs, [len(prompt) for prompt in prompts], stop_tokens, device)


def _answer(model: nn.Module, prompts: list[list[int]], uniforms: Tensor, most: int, temperature: float,
            stop_tokens: set[int], whole_logits: Callable) -> Iterator[tuple[int, list[int], list[float]]]:
    """Yields (row, its new tokens, their log-probs), rows that were drawn longest last."""
    device, context, longest = uniforms.device, model.config.context, max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    limits = torch.tensor([min(most, context - len(prompt)) for prompt in prompts], device=device)  # (B,)
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.long, device=device)
    tokens = torch.tensor([[0] * n + prompt for n, prompt in zip(padding, prompts)], device=device)  # (B, T)
    last_step, tightest = int(limits.max()), context - longest
    cache = model.new_cache(len(prompts), longest + last_step)
    if any(padding):
        cache.padding = torch.tensor(padding, device=device)
    drawn = torch.zeros(len(prompts), last_step, dtype=torch.long, device=device)
    log_p = torch.zeros(len(prompts), last_step, device=device)
    ends = torch.zeros(len(prompts), dtype=torch.long, device=device)  # number of new tokens, once that is known
    here = torch.arange(len(prompts), device=device)  # the rows that are in the cache
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)  # which of those have not ended
    for n in range(last_step):
        start = cache.begin(tokens.size(1))
        x = model.embed(tokens, start)  # (B, T, D), then (B, 1, D)
        for block, layer_cache in zip(model.blocks, cache.layers):
            x = block(x, start, layer_cache)
        logits = whole_logits(model.head(x[:, -1:])[:, 0]).float()  # (B, V): of one position, not the prompt's
        new = draw_tokens(logits, uniforms[here, n], temperature)  # (B,)
        drawn[here, n] = new
        log_p[here, n] = logits.gather(1, new[:, None])[:, 0] - logits.logsumexp(1)
        ended = torch.isin(new, stops) | (n + 1 >= limits[here])
        ends[here[going & ended]] = n + 1
        going &= ~ended
        count = int(going.sum())
        if not count:
            break
        # One whose context is full must leave: it has no next position.
        if count < (SPARE * len(here) if n + 1 < tightest else len(here)):
            keep = going.nonzero()[:, 0]
            cache.select(keep)
            here, new, going = here[keep], new[keep], going[keep]
        tokens = new[:, None]  # (B, 1)
    for i, (new, values, end) in enumerate(zip(drawn.tolist(), log_p.tolist(), ends.tolist())):
        yield i, new[:end], values[:end]


# --- 3. demo --------------------------------------------------------------------------------

def main(prompts: int, max_new_tokens: int, seed: int) -> None:
    if prompts < 1 or max_new_tokens < 1 or not 0 <= seed < 2**63:
        raise ValueError("--prompts and --max_new_tokens must be at least 1 and --seed in 0 .. 2^63 - 1, got "
                         f"{prompts}, {max_new_tokens} and {seed}")
    from gpt import GPT, GPTConfig
    draw = torch.Generator().manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=256, context=128, n_layers=4, n_heads=4, d_model=128), generator=draw)
    lengths = torch.randint(4, 33, (prompts,), generator=draw).tolist()
    texts = [torch.randint(1, 256, (length,), generator=draw).tolist() for length in lengths]
    uniforms, results = torch.rand(prompts, max_new_tokens, generator=draw), []
    for function in (naive_generate_rollout, generate_rollout):
        began = time.perf_counter()
        found = function(model, texts, max_new_tokens, stop_tokens=range(8), uniforms=uniforms)
        seconds = time.perf_counter() - began
        count = int(found.mask.sum())
        print(f"{function.__name__:22} {count:6} tokens in {seconds:6.2f} s, {count / seconds:8,.0f} tokens/s")
        results.append(found)
    one, many = results
    length = one.mask.sum(1).mean().item()
    expected = 32 * (1 - (31 / 32) ** min(max_new_tokens, 96))
    print(f"mean length {length:.1f}; expected about {expected:.0f}: each token ends an answer with probability 1/32")
    same = one.tokens.shape == many.tokens.shape and bool((one.tokens == many.tokens).all())
    error = (one.log_probs - many.log_probs).abs().max().item() if same else float("inf")
    print(f"batched = alone: {same} ({prompts} answers); max |difference of log-probs| = {error:.1e} "
          "(expected below 1e-4)")


if __name__ == "__main__":
    # Without argparse's usage lines a mistake is answered in one line.
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64, help="answers to write (default 64)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="per answer, at most (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and answers (default 0)")
    try:
        main(**vars(parser.parse_args()))
    except ValueError as error:
        print(f"rollout.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
