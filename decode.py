"""Decoding: from a language model's distributions to text.   Holtzman et al. 2020 (top-p, 1904.09751)

Idea      A language model gives p(next token | tokens so far). Decoding turns that into a sequence: draw it
          token by token (sampling), take the likeliest token (greedy), or look for the likeliest sequence (beam
          search).
Formula   log p(x_1 ... x_T) = sum_{t >= 2} log p(x_t | x_<t)
          sampling     x_t ~ softmax(filter(logits / temperature))      temperature 0: x_t = argmax logits
          beam search  argmax of log p(continuation) / length^length_penalty, over the best few prefixes
Shapes    tokens (B, T) -> logits (B, V) of the last position -> next tokens (B,)
Also      few_rows.py, if it can be imported: faster products on a CPU. What conversations become in tokens:
          dialogue.py.
Omits     a draft that guesses ahead (speculative.py has it), typical and contrastive sampling, constrained
          grammars, continuous batching.
Run       python decode.py               a tiny model is trained, then decoded: 10 s on one core;
                                         ends with "greedy cached = uncached: True; ..."
          python decode.py --checkpoint out/pretrain --prompt "The function"    or --prompt -, or --chat
Test      pytest tests/test_decode.py
"""

import argparse
import codecs
import contextlib
import functools
import math
import operator
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Prompts = Sequence[Sequence[int]] | Tensor  # B rows of token ids of any lengths, none empty; or (B, T)


# --- 1. what a language model is: a probability for every sequence ---------------------------

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


@torch.inference_mode()
def token_log_probs(model: nn.Module, tokens: Tensor) -> Tensor:
    """tokens (B, T) -> (B, T - 1): log p(x_t | x_<t) in nats for t = 2 .. T."""
    with evaluating(model):
        logits = model(tokens)[:, :-1]  # (B, T - 1, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, tokens[:, 1:, None])[..., 0] - logits.logsumexp(-1)  # (B, T - 1)


def score(model: nn.Module, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
    """log p of each row, the sum of log p(x_t | x_<t) over t >= 2, in nats: (B, T) -> (B,).

    ``lengths`` (B,), each in 1 .. T: what follows the first lengths[b] tokens of row b is padding, any valid id.
    """
    log_p = token_log_probs(model, tokens)  # (B, T - 1)
    if lengths is None:
        return log_p.sum(-1)
    B, T = tokens.shape
    if lengths.shape != (B,) or not all(1 <= length <= T for length in lengths.tolist()):
        raise ValueError(f"lengths must be {B} values in 1 .. {T}, got {lengths.tolist()}")
    inside = torch.arange(1, T, device=tokens.device) < lengths[:, None].to(tokens.device)  # (B, T - 1)
    return log_p.where(inside, 0).sum(-1)


# --- 2. choosing a token: functions of logits (B, V), -inf for what is ruled out -------------

def repetition_penalty(logits: Tensor, tokens: Prompts, penalty: float) -> Tensor:
    """For tokens already in the row: logits > 0 divided by the penalty, others multiplied.
    Keskar et al. 2019 (CTRL, 1909.05858), section 4.1, with the usual care for the sign."""
    logits = logits.clone()
    for row, seen in zip(logits, tokens, strict=True):
        seen = torch.as_tensor(seen, dtype=torch.long, device=logits.device)
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    return logits


def temperature(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature: below 1 sharper, above 1 flatter."""
    return logits / temperature


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits, and all that tie with the k-th.   Fan et al. 2018"""
    kth = logits.topk(min(k, logits.size(-1))).values[..., -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, float("-inf"))


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens with total probability >= p, never none.   Holtzman et al. 2020
    Among tokens of equal probability at the edge, those with larger ids stay."""
    ascending, order = logits.sort(stable=True)
    # Sorted upwards, a token goes if it and all below it together weigh no more than 1 - p.
    remove = ascending.softmax(-1).cumsum(-1) <= 1 - p
    remove[..., -1] = False
    return logits.masked_fill(remove.scatter(-1, order, remove), float("-inf"))


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens with at least p times the likeliest one's probability.   Nguyen et al. 2024 (2407.01082)"""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), float("-inf"))


@dataclass
class Sampling:
    """How logits become a distribution: the functions above in the order of their definition, which is also
    transformers'. None leaves a step out; temperature 0 is greedy. A value outside its range is a ValueError."""
    temperature: float | None = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self):
        for name, allowed, fits in (
                # Below 1e-6 the quotient of an fp32 logit might be infinite.
                ("temperature", "0 or at least 1e-6", lambda x: x == 0 or 1e-6 <= x < math.inf),
                ("top_k", "a whole number and at least 1", lambda x: hasattr(x, "__index__") and x >= 1),
                ("top_p", "in (0, 1]", lambda x: 0 < x <= 1), ("min_p", "in [0, 1]", lambda x: 0 <= x <= 1),
                ("repetition_penalty", "positive", lambda x: 0 < x < math.inf)):
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise ValueError(f"{name} must be {allowed}, got {value}")

    def probabilities(self, logits: Tensor, tokens: Prompts) -> Tensor:
        """(B, V) -> (B, V), rows that sum to 1; ``tokens`` are the B rows so far. Temperature 0: one-hot."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.repetition_penalty is not None:
            logits = repetition_penalty(logits, tokens, self.repetition_penalty)
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
        for step in (temperature, top_k, top_p, min_p):
            if (value := getattr(self, step.__name__)) is not None:
                logits = step(logits, value)
        return logits.softmax(-1)

    def draw(self, logits: Tensor, tokens: Prompts, generator: torch.Generator | None) -> Tensor:
        """One token per row: logits (B, V) -> (B,)."""
        if self.temperature == 0 and self.repetition_penalty is None:
            return logits.max(-1).indices  # as argmax(-1), which takes four times as long for bf16
        return torch.multinomial(self.probabilities(logits, tokens), 1, generator=generator)[:, 0]


# --- 3. generation, as the formula reads -----------------------------------------------------

def checked(model: nn.Module, prompts: Prompts, max_new_tokens: int) -> tuple[list[list[int]], list[int]]:
    """The prompts as lists, and how many tokens each may get: fewer than the maximum where the context ends.
    Raises ValueError if a prompt is empty, too long, or not of ids inside the vocabulary."""
    context, V = model.config.context, model.config.vocab_size
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    try:
        rows = prompts.tolist() if isinstance(prompts, Tensor) else prompts
        rows = [[operator.index(token) for token in row] for row in rows]
    except TypeError:
        raise ValueError("prompts must be rows of token ids: lists of ints, or an integer tensor (B, T)") from None
    for i, row in enumerate(rows):
        if not row:
            raise ValueError(f"prompt {i} is empty: start it with the end-of-text token")
        if len(row) > context:
            raise ValueError(f"prompt {i} has {len(row)} tokens, the model's context is {context}: shorten it")
        if min(row) < 0 or max(row) >= V:
            raise ValueError(f"prompt {i} has ids {min(row)} .. {max(row)}, the vocabulary is 0 .. {V - 1}")
    return rows, [min(max_new_tokens, context - len(row)) for row in rows]


@torch.inference_mode()
def naive_generate(model: nn.Module, prompts: Prompts, max_new_tokens: int, *, stop_tokens: Iterable[int] = (),
                   generator: torch.Generator | None = None, **sampling) -> list[list[int]]:
    """``generate`` without a cache or batches: every step runs the model on the whole sequence again."""
    sampling, stop_tokens, completions = Sampling(**sampling), set(map(int, stop_tokens)), []
    device = next(model.parameters()).device
    with evaluating(model):
        for prompt, limit in zip(*checked(model, prompts, max_new_tokens)):
            text = list(prompt)
            while len(text) < len(prompt) + limit and stop_tokens.isdisjoint(text[len(prompt):][-1:]):
                logits = model(torch.tensor([text], device=device))[:, -1]  # (1, V)
                text.append(int(sampling.draw(logits, [text], generator)))
            completions.append(text[len(prompt):])
    return completions


# --- 4. the same, fast: batches, a cache, and only the arithmetic that is needed -------------

@functools.cache
def _few_rows():
    """few_rows.py, which has faster products for a CPU; None where it is not beside this file."""
    try:
        import few_rows
    except ModuleNotFoundError:
        return None
    return few_rows


def next_logits(model: nn.Module, tokens: Tensor, cache, last: int = 1) -> Tensor:
    """model(tokens, cache)[:, -last:], (B, T) -> (B, last, V), without the head's work on other positions."""
    start, fast = cache.begin(tokens.size(1)), _few_rows() if tokens.device.type == "cpu" else None
    # _steps has exchanged the layers by fast_layers; the mode finds what is no layer too (a tied head, experts), and
    # what beam_search runs. For one token it would cost the blocks more than it saves.
    is_helped = fast and tokens.numel() > 1 and not fast.is_compiled(model)
    with fast.FastLinear() if is_helped else contextlib.nullcontext():
        x = model.embed(tokens, start)  # (B, T, D)
        for block, layer_cache in zip(model.blocks, cache.layers):
            x = block(x, start, layer_cache)
    with fast.FastLinear() if fast else contextlib.nullcontext():
        return model.head(x[:, -last:])


@torch.inference_mode()
def _steps(model: nn.Module, prompts: list[list[int]], limits: list[int], stop_tokens: set[int],
           generator: torch.Generator | None, sampling: Sampling) -> Iterator[list[tuple[int, int]]]:
    """Yields, step by step, (row, token) for every row that is not finished."""
    rows = [row for row, limit in enumerate(limits) if limit > 0]
    if not rows:
        return
    device, texts = next(model.parameters()).device, [prompts[row] for row in rows]
    longest = max(map(len, texts))
    padding = [longest - len(text) for text in texts]
    tokens = torch.tensor([[0] * n + text for n, text in zip(padding, texts)], device=device)  # (B, T)
    fast = _few_rows()
    with evaluating(model), fast.fast_layers(model) if fast else contextlib.nullcontext():
        cache = model.new_cache(len(rows), longest + max(limits))
        if any(padding):
            cache.padding = torch.tensor(padding, device=device)
        for n in range(1, max(limits) + 1):
            drawn = sampling.draw(next_logits(model, tokens, cache)[:, 0], texts, generator)  # (B,)
            new = drawn.tolist()
            yield list(zip(rows, new))
            keep = [i for i, row in enumerate(rows) if new[i] not in stop_tokens and n < limits[row]]
            if not keep:
                return
            if len(keep) < len(rows):
                cache.select(index := torch.tensor(keep, device=device))
                drawn = drawn[index]
            rows, texts = [rows[i] for i in keep], [texts[i] + [new[i]] for i in keep]
            tokens = drawn[:, None]  # (B, 1)


def generate(model: nn.Module, prompts: Prompts, max_new_tokens: int, *, stop_tokens: Iterable[int] = (),
             generator: torch.Generator | None = None, **sampling) -> list[list[int]]:
    """Continue every prompt; returns the new tokens only, in the order of the prompts.

    A row ends with the first of ``stop_tokens`` (which it keeps), after ``max_new_tokens``, or where prompt and
    completion fill the model's context. A greedy row is what it would be alone, up to the rounding of near
    ties. Sampled rows depend on those beside them: all draw from one generator, which is on the model's device
    (None: torch's global one). ``sampling`` are fields of ``Sampling``, such as temperature=0.8, top_p=0.9.
    Raises ValueError if one of those is outside its range, or as ``checked``.
    """
    sampling, (prompts, limits) = Sampling(**sampling), checked(model, prompts, max_new_tokens)
    completions = [[] for _ in prompts]
    for step in _steps(model, prompts, limits, set(map(int, stop_tokens)), generator, sampling):
        for row, token in step:
            completions[row].append(token)
    return completions


# --- 5. streaming ----------------------------------------------------------------------------

def stream(model: nn.Module, prompt: Sequence[int], max_new_tokens: int, *, stop_tokens: Iterable[int] = (),
           generator: torch.Generator | None = None, **sampling) -> Iterator[int]:
    """``generate`` for one prompt, token by token as they are drawn. The model is in eval mode until it ends (of two at
    once, until the first ends), and its weights are not to be replaced, moved or copied (few_rows.fast_layers)."""
    sampling, (prompts, limits) = Sampling(**sampling), checked(model, [prompt], max_new_tokens)
    return (step[0][1] for step in _steps(model, prompts, limits, set(map(int, stop_tokens)), generator, sampling))


def decode_stream(tokens: Iterable[int], encoding, stop_strings: Sequence[str] = (),
                  stop_tokens: Iterable[int] = ()) -> Iterator[str]:
    """Tokens -> pieces of text, each as early as it is certain; ``encoding`` is a ``tiktoken.Encoding``.

    A character whose bytes lie in several tokens comes out whole or, if the tokens end before it does, not at
    all; bytes that are no UTF-8, and ids that the encoding lacks, become U+FFFD. Text ends before the first
    stop string to be completed, or before the first stop token; what may yet become a stop string waits.
    """
    if "" in stop_strings:
        raise ValueError("a stop string must not be empty")
    decoder, held, stop_tokens = codecs.getincrementaldecoder("utf-8")("replace"), "", set(map(int, stop_tokens))
    for token in tokens:
        if token in stop_tokens:
            break
        try:
            held += decoder.decode(encoding.decode_single_token_bytes(token))
        except KeyError:  # a vocabulary padded to a round size has more ids than tokens
            held += decoder.decode(b"\xff")
        found = [(held.find(stop) + len(stop), held.find(stop)) for stop in stop_strings if stop in held]
        if found:
            held = held[:min(found)[1]]  # the one that ends first, as if characters came singly
            break
        waiting = max((n for stop in stop_strings for n in range(len(stop)) if held.endswith(stop[:n])), default=0)
        ready, held = held[:len(held) - waiting], held[len(held) - waiting:]
        if ready:
            yield ready
    if held:
        yield held


# --- 6. beam search --------------------------------------------------------------------------

@torch.inference_mode()
def beam_search(model: nn.Module, prompt: Sequence[int], beams: int, max_new_tokens: int, *,
                length_penalty: float = 1.0, n_best: int = 1,
                stop_token: int | None = None) -> list[tuple[list[int], float]]:
    """The ``n_best`` continuations found with the highest log p / length^length_penalty, best first, with it.

    Length counts new tokens, the stop token included. Score and early stopping are transformers'
    (``early_stopping=False``); Wu et al. 2016 divide by ((5 + length) / 6)^penalty. With as many beams as there
    are prefixes the search is exhaustive. None is found where the prompt fills the model's context. Raises
    ValueError as ``checked``, or unless 1 <= n_best <= beams.
    """
    if not 1 <= n_best <= beams:
        raise ValueError(f"n_best must be in 1 .. beams, got {n_best} of {beams} beams")
    ((prompt,), (limit,)), V = checked(model, [prompt], max_new_tokens), model.config.vocab_size
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)  # (1, T)
    texts, log_p, finished = [[]], [0.0], []
    with evaluating(model):
        cache = model.new_cache(1, len(prompt) + limit)
        for n in range(1, limit + 1):
            logits = next_logits(model, tokens, cache)[:, 0]  # (beams, V)
            totals = logits.log_softmax(-1, torch.promote_types(logits.dtype, torch.float32))
            totals = (totals + totals.new_tensor(log_p)[:, None]).flatten()  # (beams V,)
            # A beam has one way to stop, so among twice as many candidates enough go on.
            best, live = totals.topk(min(2 * beams, totals.numel())), []
            for rank, (total, index) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
                beam, token = divmod(index, V)
                if token == stop_token or n == limit:
                    if rank < beams:
                        finished.append((texts[beam] + [token], total / n ** length_penalty))
                elif len(live) < beams:
                    live.append((beam, token, total))
            finished = sorted(finished, key=lambda item: -item[1])[:beams]
            # log p only falls, so judged by today's length no live beam overtakes the worst finished one; with a
            # length penalty above 0 one that grows longer still might: that is the price of stopping here.
            if not live or len(finished) == beams and live[0][2] / n ** length_penalty <= finished[-1][1]:
                break
            cache.select(torch.tensor([beam for beam, _, _ in live], device=tokens.device))
            texts, log_p = [texts[beam] + [token] for beam, token, _ in live], [total for _, _, total in live]
            tokens = torch.tensor([[token] for _, token, _ in live], device=tokens.device)  # (beams, 1)
    return finished[:n_best]


# --- 7. program and demo ---------------------------------------------------------------------

def demo(max_new_tokens: int, seed: int, device: str) -> None:
    """A small GPT learns the beginning of a page of documentation by heart; then all methods decode."""
    from gpt import GPT, GPTConfig, next_token_loss
    from pydoc_data.topics import topics

    text, cpu = torch.tensor(list(topics["assert"].encode())[:500]), torch.Generator().manual_seed(seed)
    model, losses = GPT(GPTConfig(256, 80, 2, 4, 128), generator=cpu).to(device), []
    prompt, n = list(b"The simple form"), min(max_new_tokens, 64)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    for step in range(220):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 30, (220 - step) / 110)
        batch = text[torch.randint(len(text) - 80, (4, 1), generator=cpu) + torch.arange(81)].to(device)
        losses.append(next_token_loss(model(batch[:, :-1]), batch[:, 1:]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    print(f"2 layers, width 128: loss {losses[0]:.2f} (expected ln 256 = 5.55) -> {losses[-1]:.2f}")
    # In float64 two ways of computing a logit do not disagree on ties; an mps device has none.
    model = model if device == "mps" else model.double()

    (naive, _), (greedy, _) = (f(model, [prompt, list(b"A")], n, temperature=0) for f in (naive_generate, generate))
    (beam, _), = beam_search(model, prompt, 8, n, length_penalty=0)
    log_p = [score(model, torch.tensor([prompt + tokens], device=device)).item() for tokens in (greedy, beam)]
    for name, value, tokens in zip(("greedy", "beam 8"), log_p, (greedy, beam)):
        print(f"{name}  log p {value:7.2f} nats   {bytes(prompt + tokens).decode(errors='replace')!r}")
    print(f"greedy cached = uncached: {greedy == naive}; beam >= greedy: {log_p[1] >= log_p[0] - 1e-9} (expected True "
          "each)")


def main(checkpoint: str | None, prompt: str | None, chat: bool, system: str, max_new_tokens: int, temperature: float,
         top_p: float, seed: int, device: str) -> None:
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be in 0 .. 2^32 - 1, got {seed}")
    if max_new_tokens < 1:  # bad values are refused before the long work
        raise ValueError(f"--max_new_tokens must be at least 1, got {max_new_tokens}")
    try:
        Sampling(temperature, top_p=top_p)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    if chat and prompt == "-":
        raise ValueError("--chat and --prompt - would both read stdin: give the prompt as text")
    if checkpoint is None and (chat or prompt is not None):
        raise ValueError("--prompt and --chat need a --checkpoint: without one the demo runs")
    if (chat or prompt == "-") and sys.stdin is None:
        raise ValueError("stdin is closed: --chat and --prompt - read it")
    if system and not chat:
        raise ValueError("--system is what a conversation begins with: take --chat, too")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter if torch was built without it
        raise ValueError(f"--device {device}: {str(error).splitlines()[0][:80]}: take cpu, or another torch") from None
    if checkpoint is None:
        return demo(max_new_tokens, seed, device)

    from dialogue import Dialogue, complete, converse, print_as_it_comes, text_begins_with
    from models import load_model
    model, encoding = load_model(checkpoint, device)
    if fast := _few_rows():
        fast.one_row_layout(model)
    options = dict(generator=torch.Generator(device).manual_seed(seed), temperature=temperature, top_p=top_p)
    if chat:
        return converse(Dialogue(model, encoding, max_new_tokens, system=system, **options), prompt)
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    pieces = complete(model, encoding, text, max_new_tokens, begin=text_begins_with(checkpoint, encoding), **options)
    print(text, end="", flush=True)
    print_as_it_comes(pieces)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--checkpoint", help="a run's folder, a checkpoint's, or as Hugging Face or Meta publishes it")
    parser.add_argument("--prompt", help="text to continue, with --chat the first line; - reads it from stdin "
                                         "(default: start at end-of-text)")
    parser.add_argument("--chat", action="store_true",
                        help="converse line by line; ends on /exit, Ctrl-D or Ctrl-C")
    parser.add_argument("--system", default="", metavar="TEXT",
                        help="with --chat: what stands in front of the conversation (default: nothing)")
    parser.add_argument("--max_new_tokens", type=int, default=64,
                        help="per completion or answer (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8,
                        help="0: the likeliest token (default %(default)s)")
    parser.add_argument("--top_p", type=float, default=0.95,
                        help="in (0, 1]; 1 keeps every token (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="of sampling and the demo's training (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (default %(default)s)")
    for side in (sys.stdin, sys.stdout):
        if hasattr(side, "reconfigure"):  # a closed one is None
            side.reconfigure(errors="replace")  # a terminal that lacks a character shows ? for it
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch looks at its first tensor: see few_rows.py
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130, "\n")
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error).split("\n")[0][:200])
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
