"""Decoding: from a language model's distributions to text.   Leviathan et al. 2023 (speculative, 2211.17192)

Idea      A language model gives p(next token | tokens so far). Decoding turns that into a sequence: draw it
          token by token (sampling), take the likeliest token (greedy), look for the likeliest sequence (beam
          search), or let a small model guess ahead and the large one check many guesses in one pass.
Formula   log p(x_1 ... x_T) = sum_{t >= 2} log p(x_t | x_<t)
          sampling     x_t ~ softmax(filter(logits / temperature))      temperature 0: x_t = argmax logits
          beam search  argmax of log p(continuation) / length^length_penalty, over the best few prefixes
          speculative  keep the guess x ~ q with probability min(1, p(x) / q(x)), else draw from
                       max(0, p - q) / sum max(0, p - q):  the result is distributed as p, whatever q is
Shapes    tokens (B, T) -> logits (B, V) of the last position -> next tokens (B,)
Omits     tree-shaped drafts, typical and contrastive sampling, constrained grammars, continuous batching.
Run       python decode.py                                    every method on two tiny models trained on the spot
          python decode.py --checkpoint out/pretrain --prompt "The function"    or --prompt -, or --chat
Test      pytest tests/test_decode.py
"""

import argparse
import codecs
import contextlib
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


# --- 1. what a language model is: a probability for every sequence ---------------------------

@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; every module's mode as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.inference_mode()
def token_log_probs(model: nn.Module, tokens: Tensor) -> Tensor:
    """tokens (B, T) -> (B, T - 1): log p(x_t | x_<t) in nats for t = 2 .. T."""
    if tokens.dim() != 2 or tokens.size(1) < 1:
        raise ValueError(f"tokens must be (B, T) with T >= 1, got shape {tuple(tokens.shape)}")
    with evaluating(model):
        logits = model(tokens)[:, :-1]  # (B, T - 1, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, tokens[:, 1:, None])[..., 0] - logits.logsumexp(-1)  # (B, T - 1)


def score(model: nn.Module, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
    """log p of each row, sum of log p(x_t | x_<t) over t >= 2, in nats: (B, T) -> (B,).

    Args:
        lengths: (B,), each in 1 .. T: row b ends after lengths[b] tokens; what follows is padding on the right,
            any valid id. None: all rows are full.
    """
    log_p = token_log_probs(model, tokens)  # (B, T - 1)
    if lengths is None:
        return log_p.sum(-1)
    if lengths.shape != tokens.shape[:1] or lengths.min() < 1 or lengths.max() > tokens.size(1):
        raise ValueError(f"lengths must be {tokens.size(0)} values in 1 .. {tokens.size(1)}, got {lengths.tolist()}")
    inside = torch.arange(1, tokens.size(1), device=tokens.device) < lengths[:, None].to(tokens.device)
    return log_p.where(inside, 0).sum(-1)


# --- 2. choosing a token: functions of logits (B, V), -inf for what is ruled out -------------

def repetition_penalty(logits: Tensor, tokens: Sequence[Sequence[int]] | Tensor, penalty: float) -> Tensor:
    """For tokens already in the row: logits > 0 divided by the penalty, others multiplied.

    Keskar et al. 2019 (CTRL, 1909.05858), section 4.1, with the usual care for the sign. ``tokens`` holds B rows
    of any length.
    """
    logits = logits.clone()
    for row, seen in zip(logits, tokens, strict=True):
        seen = torch.as_tensor(seen, device=logits.device)
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

    Among tokens of equal probability at the edge, those with larger ids stay.
    """
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
    """How logits become a distribution; the functions above, applied from repetition penalty to min-p in the
    order of their definition, which is also transformers'. None leaves a step out.

    Raises:
        ValueError: if a value is outside its range.
    """
    temperature: float = 1.0  # 0: greedy
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self):
        for name, allowed, fits in (
                ("temperature", "at least 0", lambda value: 0 <= value < math.inf),
                ("top_k", "at least 1", lambda value: value >= 1),
                ("top_p", "in (0, 1]", lambda value: 0 < value <= 1),
                ("min_p", "in [0, 1]", lambda value: 0 <= value <= 1),
                ("repetition_penalty", "positive", lambda value: 0 < value < math.inf)):
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise ValueError(f"{name} must be {allowed}, got {value}")

    def probabilities(self, logits: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
        """(B, V) -> (B, V), rows that sum to 1; ``tokens`` are the B rows so far. Temperature 0: one-hot."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.repetition_penalty is not None:
            logits = repetition_penalty(logits, tokens, self.repetition_penalty)
        if self.temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
        logits = temperature(logits, self.temperature)
        for keep, value in ((top_k, self.top_k), (top_p, self.top_p), (min_p, self.min_p)):
            if value is not None:
                logits = keep(logits, value)
        return logits.softmax(-1)

    def draw(self, logits: Tensor, tokens: Sequence[Sequence[int]], generator: torch.Generator | None) -> Tensor:
        """One token per row: logits (B, V) -> (B,)."""
        if self.temperature == 0 and self.repetition_penalty is None:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits, tokens), 1, generator=generator)[:, 0]


# --- 3. generation, as the formula reads -----------------------------------------------------

def room(model: nn.Module, prompts: Sequence[Sequence[int]] | Tensor, max_new_tokens: int) -> list[int]:
    """How many tokens each prompt may get: ``max_new_tokens``, or fewer where the context ends before.

    Raises:
        ValueError: if a prompt is empty, too long for the context, or holds an id outside the vocabulary.
    """
    context, V = model.config.context, model.config.vocab_size
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {row} is empty; start it with the end-of-text token")
        if len(prompt) > context:
            raise ValueError(f"prompt {row} has {len(prompt)} tokens, the model's context is {context}")
        if min(prompt) < 0 or max(prompt) >= V:
            raise ValueError(f"prompt {row} has token {max(prompt)} or {min(prompt)}, the vocabulary is 0 .. {V - 1}")
    return [min(max_new_tokens, context - len(prompt)) for prompt in prompts]


@torch.inference_mode()
def naive_generate(model: nn.Module, prompts: Sequence[Sequence[int]] | Tensor, max_new_tokens: int, *,
                   stop_tokens: Iterable[int] = (), generator: torch.Generator | None = None,
                   **sampling) -> list[list[int]]:
    """``generate`` without a cache or batches: every step runs the model on the whole sequence again."""
    sampling, completions = Sampling(**sampling), []
    device, stop_tokens = next(model.parameters()).device, set(stop_tokens)
    with evaluating(model):
        for prompt, limit in zip(prompts, room(model, prompts, max_new_tokens)):
            prompt, completion = list(map(int, prompt)), []
            while len(completion) < limit and stop_tokens.isdisjoint(completion[-1:]):
                text = prompt + completion
                logits = model(torch.tensor([text], device=device))[:, -1]  # (1, V)
                completion.append(int(sampling.draw(logits, [text], generator)))
            completions.append(completion)
    return completions


# --- 4. the same, fast: batches, a cache, and only the arithmetic that is needed -------------

_linear = F.linear


def _linear_few_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear on a CPU, x (..., in) -> (..., out), with the matrix product that is fastest for its few rows."""
    rows = x.numel() // x.size(-1)
    if weight.dtype == torch.float32 and 1 < rows <= 32 and weight.is_contiguous():
        columns = x.reshape(rows, -1).t()  # (in, rows): W x^T is up to twice as fast as x W^T
        y = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)  # (out, rows)
        return y.t().reshape(*x.shape[:-1], -1)
    if weight.dtype == torch.bfloat16 and rows > 8 and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        # Without bf16 instructions one fp32 copy of W costs less than its conversion for every row.
        return _linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return _linear(x, weight, bias)


@contextlib.contextmanager
def few_rows(device: torch.device) -> Iterator[None]:
    """F.linear is ``_linear_few_rows`` inside, if the device is a CPU: so it reaches tied heads too."""
    if device.type == "cpu":
        F.linear = _linear_few_rows
    try:
        yield
    finally:
        F.linear = _linear


def one_row_layout(model: nn.Module) -> None:
    """Make decoding one row on a CPU in fp32 faster: store wide matrices by columns, in place; values stay.

    A row times a matrix (out, in) with out > in reads a column at a time 1.3 to 1.8 times as fast.
    """
    for p in model.parameters():
        if p.dim() == 2 and p.size(0) > p.size(1) and p.dtype == torch.float32 and p.device.type == "cpu":
            p.data = p.data.t().contiguous().t()


def next_logits(model: nn.Module, tokens: Tensor, cache, last: int = 1) -> Tensor:
    """model(tokens, cache)[:, -last:], (B, T) -> (B, last, V), without the head's work on other positions."""
    start = cache.begin(tokens.size(1))
    with few_rows(tokens.device):
        x = model.embed(tokens, start)  # (B, T, D)
        for block, layer_cache in zip(model.blocks, cache.layers):
            x = block(x, start, layer_cache)
        return model.head(x[:, -last:])


@torch.inference_mode()
def _steps(model: nn.Module, prompts: list[list[int]], limits: list[int], stop_tokens: set[int],
           generator: torch.Generator | None, sampling: Sampling) -> Iterator[list[tuple[int, int]]]:
    """Yields, step by step, (row, token) for every row that is not finished."""
    rows = [row for row, limit in enumerate(limits) if limit > 0]
    if not rows:
        return
    device, longest = next(model.parameters()).device, max(len(prompts[row]) for row in rows)
    texts = [list(prompts[row]) for row in rows]
    padding = [longest - len(text) for text in texts]
    with evaluating(model):
        cache = model.new_cache(len(rows), longest + max(limits))
        if any(padding):
            cache.padding = torch.tensor(padding, device=device)
        tokens = torch.tensor([[0] * n + text for n, text in zip(padding, texts)], device=device)  # (B, T)
        for n in range(1, max(limits) + 1):
            drawn = sampling.draw(next_logits(model, tokens, cache)[:, 0], texts, generator)  # (B,)
            new = drawn.tolist()
            yield list(zip(rows, new))
            keep = [i for i, row in enumerate(rows) if new[i] not in stop_tokens and n < limits[row]]
            if not keep:
                return
            if len(keep) < len(rows):
                index = torch.tensor(keep, device=device)
                cache.select(index)
                drawn = drawn[index]
            rows, texts = [rows[i] for i in keep], [texts[i] + [new[i]] for i in keep]
            tokens = drawn[:, None]  # (B, 1)


def generate(model: nn.Module, prompts: Sequence[Sequence[int]] | Tensor, max_new_tokens: int, *,
             stop_tokens: Iterable[int] = (), generator: torch.Generator | None = None,
             **sampling) -> list[list[int]]:
    """Continue every prompt; returns the new tokens only, in the order of the prompts.

    A row ends after the first of ``stop_tokens`` (which it keeps), after ``max_new_tokens``, or when prompt and
    completion fill the model's context: ``ended`` says which. A greedy row is what it would be alone, up to the
    rounding of near ties. A sampled row depends on the generator and on the rows beside it, which draw from the
    same generator; on the same device the same seed and prompts give the same text.

    Args:
        prompts: B lists of token ids of any lengths, none empty, or a tensor (B, T).
        generator: source of randomness on the model's device; None takes torch's global one.
        sampling: fields of ``Sampling``, such as temperature=0.8, top_p=0.9.

    Raises:
        ValueError: if an argument is outside its range or a prompt does not fit (see ``room``).
    """
    sampling, prompts = Sampling(**sampling), [list(map(int, prompt)) for prompt in prompts]
    completions = [[] for _ in prompts]
    for step in _steps(model, prompts, room(model, prompts, max_new_tokens), set(stop_tokens), generator, sampling):
        for row, token in step:
            completions[row].append(token)
    return completions


def ended(completion: list[int], max_new_tokens: int, stop_tokens: Iterable[int] = ()) -> str:
    """Why ``generate`` ended a row: "stop", "length" or "context"."""
    if completion and completion[-1] in stop_tokens:
        return "stop"
    return "length" if len(completion) == max_new_tokens else "context"


# --- 5. streaming ----------------------------------------------------------------------------

def stream(model: nn.Module, prompt: Sequence[int], max_new_tokens: int, *, stop_tokens: Iterable[int] = (),
           generator: torch.Generator | None = None, **sampling) -> Iterator[int]:
    """``generate`` for one prompt, token by token as they are drawn. The model is in eval mode until it ends."""
    sampling, prompt = Sampling(**sampling), list(map(int, prompt))
    limits = room(model, [prompt], max_new_tokens)
    return (step[0][1] for step in _steps(model, [prompt], limits, set(stop_tokens), generator, sampling))


def decode_stream(tokens: Iterable[int], encoding, stop_strings: Sequence[str] = (),
                  stop_tokens: Iterable[int] = ()) -> Iterator[str]:
    """Tokens -> pieces of text, each as early as it is certain.

    A character whose bytes lie in several tokens comes out whole or, if the tokens end before it does, not at
    all; bytes that are no UTF-8, and ids that the encoding lacks, become U+FFFD. Text ends before the first
    stop string to be completed, or before the first stop token; what may yet become a stop string waits.

    Args:
        encoding: a ``tiktoken.Encoding``.

    Raises:
        ValueError: if a stop string is empty.
    """
    if "" in stop_strings:
        raise ValueError("a stop string must not be empty")
    decoder, held, stop_tokens = codecs.getincrementaldecoder("utf-8")("replace"), "", set(stop_tokens)
    for token in tokens:
        if token in stop_tokens:
            break
        try:
            held += decoder.decode(encoding.decode_single_token_bytes(token))
        except KeyError:  # a vocabulary padded to a round size has more ids than tokens
            held += "\ufffd"
        found = [(held.find(stop) + len(stop), held.find(stop)) for stop in stop_strings if stop in held]
        if found:
            held = held[:min(found)[1]]  # the one that ends first, as if characters came singly
            break
        waiting = max((n for stop in stop_strings for n in range(len(stop)) if held.endswith(stop[:n])), default=0)
        if len(held) > waiting:
            yield held[:len(held) - waiting]
            held = held[len(held) - waiting:]
    if held:
        yield held


# --- 6. beam search --------------------------------------------------------------------------

@torch.inference_mode()
def beam_search(model: nn.Module, prompt: Sequence[int], beams: int, max_new_tokens: int, *,
                length_penalty: float = 1.0, n_best: int = 1,
                stop_token: int | None = None) -> list[tuple[list[int], float]]:
    """The ``n_best`` continuations found with the highest log p / length^length_penalty, best first, with it.

    Length counts new tokens, the stop token included; this score and the rule for stopping early are
    transformers' (``early_stopping=False``), not Wu et al. 2016's ((5 + length) / 6)^penalty. With as many
    beams as there are prefixes the search is exhaustive.

    Raises:
        ValueError: as ``room``, or unless 1 <= n_best <= beams.
    """
    if not 1 <= n_best <= beams:
        raise ValueError(f"n_best must be in 1 .. beams, got {n_best} of {beams} beams")
    prompt, (limit,), V = list(map(int, prompt)), room(model, [prompt], max_new_tokens), model.config.vocab_size
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
            # log p only falls: at today's length no live beam can overtake the worst finished one.
            if not live or len(finished) == beams and live[0][2] / n ** length_penalty <= finished[-1][1]:
                break
            cache.select(torch.tensor([beam for beam, _, _ in live], device=tokens.device))
            texts, log_p = [texts[beam] + [token] for beam, token, _ in live], [total for _, _, total in live]
            tokens = torch.tensor([[token] for _, token, _ in live], device=tokens.device)  # (beams, 1)
    return finished[:n_best]


# --- 7. speculative decoding -----------------------------------------------------------------

class Speculation(NamedTuple):
    """New tokens, and how they came about: accepted / drafted is the acceptance rate."""
    tokens: list[int]
    drafted: int
    accepted: int
    target_calls: int


@torch.inference_mode()
def speculative(model: nn.Module, draft: nn.Module, prompt: Sequence[int], max_new_tokens: int, *,
                draft_tokens: int = 4, stop_tokens: Iterable[int] = (),
                generator: torch.Generator | None = None, **sampling) -> Speculation:
    """Tokens distributed as ``generate(model, ...)``'s, in fewer calls of the model.

    Leviathan et al. 2023, algorithm 1; Chen et al. 2023 (2302.01318), algorithm 2. The draft guesses
    ``draft_tokens`` tokens one by one; the model checks them in one pass. Temperature 0 gives the greedy tokens.

    Raises:
        ValueError: as ``generate``, or if the two vocabularies differ in size.
    """
    if model.config.vocab_size != draft.config.vocab_size:
        raise ValueError(f"model and draft must share a vocabulary, got {model.config.vocab_size} tokens and "
                         f"{draft.config.vocab_size}")
    if draft_tokens < 1:
        raise ValueError(f"draft_tokens must be at least 1, got {draft_tokens}")
    sampling, stop_tokens, prompt, new = Sampling(**sampling), set(stop_tokens), list(map(int, prompt)), []
    (limit,), device = room(model, [prompt], max_new_tokens), next(model.parameters()).device
    drafted = accepted = calls = 0
    with evaluating(model), evaluating(draft):
        caches = [m.new_cache(1, len(prompt) + limit) for m in (model, draft)]

        def missing(cache, text: list[int]) -> Tensor:  # what a cache, which holds a prefix of the text, lacks: (1, T)
            return torch.tensor([text[cache.length:]], device=device)

        while len(new) < limit and stop_tokens.isdisjoint(new[-1:]):
            guess, q = prompt + new, []
            known = len(guess)
            # The model's own token ends the round, so guess at most one less than may come.
            for _ in range(min(draft_tokens, limit - len(new) - 1, draft.config.context - known)):
                logits = next_logits(draft, missing(caches[1], guess), caches[1])[:, 0]  # (1, V)
                q.append(sampling.probabilities(logits, [guess])[0])  # (V,)
                guess.append(int(torch.multinomial(q[-1], 1, generator=generator)))
                if guess[-1] in stop_tokens:
                    break
            logits = next_logits(model, missing(caches[0], guess), caches[0], len(q) + 1)[0]  # (guesses + 1, V)
            p = sampling.probabilities(logits, [guess[:known + i] for i in range(len(q) + 1)])
            drafted, calls = drafted + len(q), calls + 1
            last = p[-1]  # if every guess is accepted, one more token comes for nothing
            for i, token in enumerate(guess[known:]):
                if torch.rand((), generator=generator, device=device) * q[i][token] >= p[i, token]:
                    last = (p[i] - q[i]).clamp(min=0)
                    last = last if last.sum() > 0 else p[i]  # p = q up to rounding
                    break
                accepted += 1
                new.append(token)
            if stop_tokens.isdisjoint(new[-1:]):
                new.append(int(torch.multinomial(last, 1, generator=generator)))
            for cache in caches:
                cache.truncate(len(prompt) + len(new) - 1)
    return Speculation(new, drafted, accepted, calls)


# --- 8. program ------------------------------------------------------------------------------

def load_model(directory: str | Path, device: str = "cpu"):
    """(model, encoding) of a training run's directory, one of its checkpoints, or a Hugging Face GPT-2 directory.

    Raises:
        ValueError: if there is no such directory, it holds no GPT, or its tokenizer has more ids than the model.
    """
    import checkpoint
    import tokenizer
    from gpt import GPT, GPTConfig

    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; give one that train.py wrote, or a Hugging Face GPT-2's")
    if (directory / "config.json").exists():
        model, encoding = GPT.from_pretrained(directory), tokenizer.load(directory)
    else:
        path = checkpoint.latest(directory)
        saved = checkpoint.load(path, parts=("model",))
        if saved["meta"].get("model_type") != "gpt":
            raise ValueError(f"{path}: model_type is {saved['meta'].get('model_type')!r}, this program reads 'gpt'")
        with torch.device("meta"):
            model = GPT(GPTConfig(**saved["meta"]["model_config"]))
        model.load_state_dict(saved["model"], assign=True)
        encoding = tokenizer.load(path / "tokenizer.tiktoken")
    if encoding.n_vocab > model.config.vocab_size:
        raise ValueError(f"{directory}: the tokenizer has {encoding.n_vocab} ids, the model {model.config.vocab_size}; "
                         "it is not the one that the model was trained with")
    model = model.to(device).eval()
    one_row_layout(model)
    return model, encoding


def converse(checkpoint: str, prompt: str | None, chat: bool, max_new_tokens: int, device: str, seed: int,
             **sampling) -> None:
    """Complete one prompt, or one conversation that grows by a line of stdin and an answer at a time."""
    Sampling(**sampling)  # before a large model is read
    model, encoding = load_model(checkpoint, device)
    import tokenizer
    eot, generator = tokenizer.eot(encoding), torch.Generator(device).manual_seed(seed)

    def answer(text: str, stop_strings: Sequence[str], newest: int | None = None) -> str:
        tokens = tokenizer.encode(encoding, text)
        pieces = []
        new = stream(model, ([eot] if newest is None and not tokens else tokens)[-(newest or 0):], max_new_tokens,
                     stop_tokens=[eot], generator=generator, **sampling)
        for piece in decode_stream(new, encoding, stop_strings, [eot]):
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        return "".join(pieces)

    if not chat:
        text = sys.stdin.read() if prompt == "-" else prompt or ""
        print(text, end="", flush=True)
        answer(text, ())
        return
    newest = model.config.context - max_new_tokens  # older lines leave the context first
    if newest < 1:
        raise ValueError(f"max_new_tokens {max_new_tokens} leaves no room in a context of {model.config.context}")
    text = prompt or ""
    while True:
        print("You: ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/exit":
            return
        text += f"\nYou: {line.strip()}\nModel:"
        print("Model:", end="", flush=True)
        text += answer(text, ("\nYou:",), newest)


def demo(max_new_tokens: int, seed: int, device: str, **sampling) -> None:
    """Train a small and a tiny GPT on a page of Python's documentation, byte by byte; decode with every method."""
    from gpt import GPT, GPTConfig, next_token_loss
    from pydoc_data.topics import topics

    generator, cpu = torch.Generator(device).manual_seed(seed), torch.Generator().manual_seed(seed)
    data = torch.tensor(list(topics["assert"].encode()), device=device)
    models = []
    for name, layers, width, steps in (("model", 2, 128, 500), ("draft", 1, 48, 400)):
        model = GPT(GPTConfig(256, context=80, n_layers=layers, n_heads=4, d_model=width), generator=cpu).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99))
        for step in range(steps):
            starts = torch.randint(len(data) - 81, (12, 1), generator=cpu).to(device)
            batch = data[starts + torch.arange(81, device=device)]  # (12, 81)
            loss = next_token_loss(model(batch[:, :-1]), batch[:, 1:])
            if step == 0:
                print(f"{name}: {layers} layers, width {width}: loss {loss:.2f} (expected ln 256 = 5.55)", end="")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f" -> {loss:.2f}")
        models.append(model.double().eval())  # in fp64 two ways of computing a logit do not disagree on ties
    model, draft = models
    prompt, n = list(b"The simple form"), min(max_new_tokens, 64)
    prompts = [prompt, list(b"A"), list(b"If the object is")]

    naive = naive_generate(model, prompts, n, temperature=0)
    greedy = generate(model, prompts, n, temperature=0)
    (sampled,) = generate(model, [prompt], n, generator=generator, **sampling)
    (best, _), = beam_search(model, prompt, 8, n, length_penalty=0)
    guessed = speculative(model, draft, prompt, n, temperature=0)
    drawn = speculative(model, draft, prompt, n, generator=generator, **sampling)
    log_p = [score(model, torch.tensor([prompt + tokens], device=device)).item() for tokens in (greedy[0], best)]

    for name, tokens in (("greedy", greedy[0]), ("beam 8", best), ("sampled", sampled), ("speculative", drawn.tokens)):
        print(f"{name:12}{bytes(prompt + tokens).decode(errors='replace')!r}")
    print(f"log p: greedy {log_p[0]:.2f} nats, beam 8 {log_p[1]:.2f} (expected: no lower)")
    for name, run in (("greedy", guessed), ("sampled", drawn)):
        print(f"speculative, {name}: {run.accepted} of {run.drafted} guesses accepted, "
              f"{len(run.tokens)} tokens in {run.target_calls} calls of the model")
    print(f"cached ragged batch = naive: {greedy == naive}; beam >= greedy: {log_p[1] >= log_p[0] - 1e-9}; "
          f"speculative = greedy: {guessed.tokens == greedy[0]}")


def main(checkpoint: str | None, prompt: str | None, chat: bool, **options) -> None:
    if checkpoint is None:
        if prompt is not None or chat:
            raise ValueError("--prompt and --chat need a --checkpoint; without one the demo runs")
        demo(**options)
    else:
        converse(checkpoint, prompt, chat, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="directory of a run, of one checkpoint, or of a Hugging Face GPT-2")
    parser.add_argument("--prompt", help="text to continue; - reads it from stdin; default: start at end-of-text")
    parser.add_argument("--chat", action="store_true", help="converse line by line; ends on /exit, Ctrl-D or Ctrl-C")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="per completion or answer (default 64)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default 0.8)")
    parser.add_argument("--top_p", type=float, default=0.95, help="in (0, 1]; 1 keeps every token (default 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, and of the demo's training (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps (default cpu)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        print()
    except (ValueError, RuntimeError, OSError) as error:  # torch reports an unusable device as a RuntimeError
        print(f"decode.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
