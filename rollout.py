"""Rollouts: a policy answers many prompts at once, and keeps the log-probability of every token that it drew.

Idea      Reinforcement learning spends most of its time writing answers. Prompts of any lengths share a batch and a
          key-value cache; every step computes one token for each answer that goes on; those that have ended leave the
          batch at once. Each answer draws from random numbers of its own: it does not depend on who stands beside it.
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
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

PADDED = 0.15  # share of padding, at most, among prompts that go through the model together


# --- 1. answers, and how a token is drawn ---------------------------------------------------

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


# --- 2. generation, as the formula reads ----------------------------------------------------

@torch.no_grad()
def naive_generate_rollout(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, *,
                           temperature: float = 1.0, stop_tokens: Iterable[int] = (),
                           uniforms: Tensor | None = None, generator: torch.Generator | None = None,
                           whole_logits: Callable[[Tensor], Tensor] = lambda logits: logits) -> Rollout:
    """``generate_rollout`` one prompt after the other, every token from the whole text before it."""
    _checked(model, prompts, max_new_tokens, temperature)
    uniforms = _uniforms(len(prompts), max_new_tokens, uniforms, generator)
    device, stop_tokens, rows, log_probs = next(model.parameters()).device, set(map(int, stop_tokens)), [], []
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
    diverged = (~log_p.isfinite().all(1)).nonzero()[:10, 0].tolist()
    if diverged:
        raise ValueError(f"the model's logits are not finite for prompts {diverged}: it has diverged")
    places = torch.arange(T, device=device)
    mask = (places >= torch.tensor(starts, device=device)[:, None]) & (places < lengths[:, None])  # (B, T)
    ended = torch.tensor([row[-1] in stop_tokens for row in rows], device=device)
    return Rollout(tokens, mask.float(), log_p, ended, lengths)


# --- 3. the same, fast ----------------------------------------------------------------------

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
        ValueError: without prompts; for one that is empty, fills the context, or has ids outside the vocabulary; for
            logits that are not finite.
    """
    _checked(model, prompts, max_new_tokens, temperature)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    device, stop_tokens = next(model.parameters()).device, set(map(int, stop_tokens))
    uniforms = _uniforms(len(prompts), max_new_tokens, uniforms, generator).to(device)
    rows, log_probs = [list(prompt) for prompt in prompts], [[0.0] * len(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with evaluating(model):
        for begin in range(0, len(order), batch):
            some = order[begin:begin + batch]
            found = _answer(model, [rows[i] for i in some], uniforms[some], max_new_tokens, temperature, stop_tokens,
                            whole_logits)
            for i, (new, log_p) in zip(some, found):
                rows[i] += new
                log_probs[i] += log_p
    return _padded(rows, log_probs, [len(prompt) for prompt in prompts], stop_tokens, device)


def _answer(model: nn.Module, prompts: list[list[int]], uniforms: Tensor, most: int, temperature: float,
            stop_tokens: set[int], whole_logits: Callable) -> Iterator[tuple[list[int], list[float]]]:
    """Yields the new tokens of each prompt and their log-probs; prompts by length, shortest first."""
    device, context, longest = uniforms.device, model.config.context, len(prompts[-1])
    limits = torch.tensor([min(most, context - len(prompt)) for prompt in prompts], device=device)  # (B,)
    stops = torch.tensor(sorted(stop_tokens), dtype=torch.long, device=device)
    last_step, here = int(limits.max()), torch.arange(len(prompts), device=device)  # the rows that are in the cache
    cache = model.new_cache(len(prompts), longest + last_step)
    drawn = torch.zeros(len(prompts), last_step, dtype=torch.long, device=device)
    log_p = torch.zeros(len(prompts), last_step, device=device)
    ends = torch.zeros_like(here)  # number of new tokens, once that is known
    x = _read(model, prompts, cache, device)  # (B, 1, D)
    for n in range(last_step):
        logits = whole_logits(model.head(x)[:, 0]).float()  # (B, V)
        new = draw_tokens(logits, uniforms[here, n], temperature)  # (B,)
        drawn[here, n] = new
        log_p[here, n] = logits.gather(1, new[:, None])[:, 0] - logits.logsumexp(1)
        going = ~torch.isin(new, stops) & (n + 1 < limits[here])
        count = int(going.sum())
        if count < len(here):
            ends[here[~going]] = n + 1
            if not count:
                break
            order = _leave(cache, going, count)
            here, new = here[order], new[order]
        start = cache.begin(1)
        x = model.embed(new[:, None], start)  # (B, 1, D)
        for block, layer in zip(model.blocks, cache.layers):
            x = block(x, start, layer)
    for new, values, end in zip(drawn.tolist(), log_p.tolist(), ends.tolist()):
        yield new[:end], values[:end]


def _read(model: nn.Module, prompts: list[list[int]], cache, device: torch.device) -> Tensor:
    """Fill the cache with the prompts, all ending in the same slot; x of their last tokens, (B, 1, D). Only prompts of
    like length go through the model together: of 4 to 64 tokens, all at once would be half padding."""
    found, longest, begin = [], len(prompts[-1]), 0
    for end in _ends_of_alike([len(prompt) for prompt in prompts]):
        some, T = prompts[begin:end], len(prompts[end - 1])
        part, padding = model.new_cache(len(some), T), [T - len(prompt) for prompt in some]
        for layer, whole in zip(part.layers, cache.layers):  # a window on the cache
            layer.k, layer.v = (x[begin:end, :, longest - T:longest] for x in (whole.k, whole.v))
            for x in (whole.k, whole.v):  # nobody looks at what stands before it, but 0 x NaN is NaN
                x[begin:end, :, :longest - T] = 0
        if any(padding):
            part.padding = torch.tensor(padding, device=device)
        start = part.begin(T)
        x = model.embed(torch.tensor([[0] * n + prompt for n, prompt in zip(padding, some)], device=device), start)
        for block, layer in zip(model.blocks, part.layers):
            x = block(x, start, layer)  # (B', T, D)
        found.append(x[:, -1:])
        begin = end
    for layer in cache.layers:
        layer.length = longest
    if len(prompts[0]) < longest:
        cache.padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    return torch.cat(found)


def _ends_of_alike(lengths: list[int]) -> list[int]:
    """Where to cut ascending lengths, so that each part padded to its longest is padding to PADDED at most."""
    ends, begin = [], 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or 1 - sum(lengths[begin:end + 1]) / ((end + 1 - begin) * lengths[end]) > PADDED:
            ends.append(end)
            begin = end
    return ends


def _leave(cache, going: Tensor, count: int) -> Tensor:
    """Leave ``count`` rows in the cache, those that go on; returns which, (count,). The last of them move to where
    others have ended: nothing else is copied."""
    order = torch.arange(count, device=going.device)
    free = (~going[:count]).nonzero()[:, 0]
    order[free] = count + going[count:].nonzero()[:, 0]
    for layer in cache.layers:
        for x in (layer.k, layer.v):
            x[free, :, :layer.length] = x[order[free], :, :layer.length]
        layer.k, layer.v = layer.k[:count], layer.v[:count]
    if cache.padding is not None:
        cache.padding = cache.padding[order]
    return order


# --- 4. demo --------------------------------------------------------------------------------

def main(prompts: int, max_new_tokens: int, seed: int) -> None:
    if prompts < 1 or max_new_tokens < 1 or not 0 <= seed < 2**32:
        raise ValueError("--prompts and --max_new_tokens must be at least 1 and --seed in 0 .. 2^32 - 1, got "
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
    print(f"batched = alone: {same} (expected True; {prompts} answers); max |difference of log-probs| = {error:.1e} "
          "(expected below 1e-4)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--prompts", type=int, default=64, help="answers to write (default %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="per answer, at most (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="of weights, prompts and answers (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
