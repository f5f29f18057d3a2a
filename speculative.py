"""Speculative decoding: a small model guesses ahead, the large one checks.   Leviathan et al. 2023 (2211.17192)

Idea      A large model that writes one token reads all of its weights for it; for five tokens at once it reads them
          once, too, and takes hardly longer. So a small draft q guesses the next k tokens one by one, and one call of
          the target p looks at all of them: it keeps those before the first that it refuses, and draws one more token
          itself. What is kept is chosen such that the text is distributed as if the target had written it alone.
          A bad draft costs time, never quality.
Formula   keep the guess x ~ q with probability min(1, p(x) / q(x)), else draw from the residual distribution
          r(x) = max(0, p(x) - q(x)) / sum max(0, p - q)
          The token is distributed as p, whatever q is. A guess is kept with probability
          a = sum q min(1, p / q) = sum min(p, q), and sum max(0, p - q) = sum (p - min(p, q)) = 1 - a, so
          P(x) = q(x) min(1, p(x) / q(x)) + (1 - a) r(x) = min(p(x), q(x)) + max(0, p(x) - q(x)) = p(x)
          and so is the next token, given this one: in the same way if there is a guess for it, drawn from p itself
          behind the last guess. By the chain rule the whole text is distributed as p's.
          Token i + 1 of a round comes if i guesses are kept, with probability a^i if a is the same at each position:
          a call brings 1 + a + ... + a^k = (1 - a^(k+1)) / (1 - a) tokens on average, in the time of 1 + k c calls
          if a guess takes c of one
Shapes    p, q (V,) at one position; a model's tokens (1, T) -> logits (1, T, V)
Omits     batches of several texts; trees of guesses; drafts that are a part of the target; a k that adapts.
Run       python speculative.py    the rule on one position, the formula, a GPT with a table of pairs as its draft:
                                   8 s on one core; ends with "distribution kept: True; ..."
Test      pytest tests/test_speculative.py
"""

import argparse
import contextlib
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Prompts = Sequence[Sequence[int]] | Tensor  # B rows of token ids of any lengths, none empty; or (B, T)


# --- 1. the rule on one position, and what it brings ------------------------------------------

def residual(p: Tensor, q: Tensor) -> Tensor:
    """max(0, p - q), (V,) -> (V,), not divided by its sum: what p has to make up for where q guesses too rarely."""
    r = (p - q).clamp(min=0)
    return r if r.sum() > 0 else p  # p = q up to rounding


def accept_or_replace(p: Tensor, q: Tensor, token: int, generator: torch.Generator | None = None) -> tuple[int, bool]:
    """``token``, drawn from q (V,) -> (a token distributed as p (V,), whether it is the guess).

    Leviathan et al. 2023, section 2.3; Chen et al. 2023 (2302.01318), theorem 1.
    """
    if torch.rand((), generator=generator, device=p.device) * q[token] < p[token]:
        return token, True
    return int(torch.multinomial(residual(p, q), 1, generator=generator)), False


def acceptance(p: Tensor, q: Tensor) -> float:
    """a = sum min(p, q), the probability that a guess is kept: 1 less the total variation between p and q, (V,) each.
    Leviathan et al. 2023, theorem 3.5"""
    return torch.minimum(p, q).sum().item()


def expected_tokens(a: float, k: int) -> float:
    """Tokens that one call of the target brings, with k guesses of which each is kept with probability a:
    (1 - a^(k+1)) / (1 - a), as the sum that it stands for; a = 1 is no exception. Leviathan et al. 2023, equation 1"""
    return sum(a ** i for i in range(k + 1))


def expected_speedup(a: float, k: int, cost: float) -> float:
    """Times as fast as the target alone, if a call of the draft takes ``cost`` of the target's time and the target
    looks at k + 1 tokens as fast as at one. Leviathan et al. 2023, theorem 3.8"""
    return expected_tokens(a, k) / (1 + k * cost)


# --- 2. what is needed of a model: a distribution of the next token, for prompts that fit ------

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


def _check_draft(model: nn.Module, draft: nn.Module, draft_tokens: int) -> None:
    if not hasattr(draft_tokens, "__index__") or draft_tokens < 0:
        raise ValueError(f"draft_tokens must be a whole number and at least 0, got {draft_tokens}")
    sizes = [m.config.vocab_size for m in (model, draft)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"model and draft must share a vocabulary, got {sizes[0]} tokens and {sizes[1]}")


def at_temperature(temperature: float) -> Callable[[Tensor, Prompts], Tensor]:
    """How logits (n, V) become distributions (n, V): softmax(logits / temperature); at 0 the likeliest token has all.

    Whatever else maps (logits, the n rows so far) to rows that sum to 1 may stand in its place, for instance
    ``decode.Sampling(0.8, top_p=0.9).probabilities``. Raises ValueError unless it is 0 or at least 1e-6.
    """
    if not (temperature == 0 or 1e-6 <= temperature < math.inf):
        raise ValueError(f"temperature must be 0 or at least 1e-6, got {temperature}")

    def probabilities(logits: Tensor, tokens: Prompts) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if temperature == 0:
            return F.one_hot(logits.argmax(-1), logits.size(-1)).to(logits.dtype)
        return (logits / temperature).softmax(-1)

    return probabilities


def last_logits(model: nn.Module, tokens: Tensor, cache, last: int = 1) -> Tensor:
    """tokens (B, T), which the cache does not hold yet -> logits (B, last, V). ``decode.next_logits``, which may stand
    in its place, gives the same faster."""
    return model(tokens, cache)[:, -last:]


# --- 3. the whole text, as the rule reads ------------------------------------------------------

class Speculation(NamedTuple):
    """accepted / drafted is less than the acceptance a: guesses behind a refused one are lost without a look."""
    tokens: list[int]  # the new ones
    drafted: int
    accepted: int
    target_calls: int


@torch.inference_mode()
def naive_speculative(model: nn.Module, draft: nn.Module, prompt: Sequence[int], max_new_tokens: int, *,
                      draft_tokens: int = 4, stop_tokens: Iterable[int] = (),
                      generator: torch.Generator | None = None,
                      probabilities: Callable[[Tensor, Prompts], Tensor] = at_temperature(1.0)) -> Speculation:
    """``speculative`` without caches: every call runs its model on the whole text again. The same generator draws the
    same tokens, up to the rounding of near ties."""
    _check_draft(model, draft, draft_tokens)
    (text,), (limit,) = checked(model, [prompt], max_new_tokens)
    device, begin, end = next(model.parameters()).device, len(text), len(text) + limit
    stop_tokens, drafted, accepted, calls = set(map(int, stop_tokens)), 0, 0, 0

    def distributions(m: nn.Module, text: list[int], last: int) -> Tensor:  # behind the last prefixes: (last, V)
        logits = m(torch.tensor([text], device=device))[0, -last:]
        return probabilities(logits, [text[:len(text) - last + 1 + i] for i in range(last)])

    def goes_on(text: list[int]) -> bool:
        return stop_tokens.isdisjoint(text[begin:][-1:])

    with evaluating(model), evaluating(draft):
        while len(text) < end and goes_on(text):
            guess, q = list(text), []
            # The model's own token ends the round, so guess at most one less than may come.
            while len(q) < draft_tokens and len(guess) < min(end - 1, draft.config.context + 1) and goes_on(guess):
                q.append(distributions(draft, guess, 1)[0])  # (V,)
                guess.append(int(torch.multinomial(q[-1], 1, generator=generator)))
            p = distributions(model, guess, len(q) + 1)  # (guesses + 1, V)
            drafted, calls, kept = drafted + len(q), calls + 1, True
            for p_i, q_i, token in zip(p, q, guess[len(text):]):
                token, kept = accept_or_replace(p_i, q_i, token, generator)
                accepted += kept
                text.append(token)
                if not kept:
                    break
            if kept and goes_on(text):  # if every guess is accepted, one more token comes for nothing
                text.append(int(torch.multinomial(p[-1], 1, generator=generator)))
    return Speculation(text[begin:], drafted, accepted, calls)


# --- 4. the same, fast: both models keep a cache and forget what was refused --------------------

@torch.inference_mode()
def speculative(model: nn.Module, draft: nn.Module, prompt: Sequence[int], max_new_tokens: int, *,
                draft_tokens: int = 4, stop_tokens: Iterable[int] = (),
                generator: torch.Generator | None = None,
                probabilities: Callable[[Tensor, Prompts], Tensor] = at_temperature(1.0),
                next_logits: Callable[..., Tensor] = last_logits) -> Speculation:
    """Tokens distributed as those that the model draws alone from the same ``probabilities``, in fewer calls of it.

    Leviathan et al. 2023, algorithm 1; Chen et al. 2023 (2302.01318), algorithm 2. The draft guesses
    ``draft_tokens`` tokens (0: none) one by one, the model checks them in one pass; beyond the draft's context it goes
    on alone. The text ends with the first of ``stop_tokens`` (which it keeps), after
    ``max_new_tokens``, or where prompt and text fill the model's context. A model is anything with
    ``config.vocab_size``, ``config.context``, parameters, ``model(tokens, cache)`` and ``new_cache``, whose cache knows
    its ``length`` and can ``truncate``. Both and the generator (None: torch's global one) are on one device.
    Raises ValueError as ``checked``, for a ``draft_tokens`` below 0, or if the two vocabularies differ in size.
    """
    _check_draft(model, draft, draft_tokens)
    ((prompt,), (limit,)), device = checked(model, [prompt], max_new_tokens), next(model.parameters()).device
    new, stop_tokens, drafted, accepted, calls = [], set(map(int, stop_tokens)), 0, 0, 0
    with evaluating(model), evaluating(draft):
        caches = [m.new_cache(1, len(prompt) + limit) for m in (model, draft)]

        def missing(cache, text: list[int]) -> Tensor:  # what a cache, which holds a prefix of the text, lacks
            return torch.tensor([text[cache.length:]], device=device)  # (1, T)

        while len(new) < limit and stop_tokens.isdisjoint(new[-1:]):
            guess, q = prompt + new, []
            known = len(guess)
            # The model's own token ends the round, so guess at most one less than may come.
            for _ in range(min(draft_tokens, limit - len(new) - 1, draft.config.context + 1 - known)):
                logits = next_logits(draft, missing(caches[1], guess), caches[1])[:, 0]  # (1, V)
                q.append(probabilities(logits, [guess])[0])  # (V,)
                guess.append(int(torch.multinomial(q[-1], 1, generator=generator)))
                if guess[-1] in stop_tokens:
                    break
            logits = next_logits(model, missing(caches[0], guess), caches[0], len(q) + 1)[0]  # (guesses + 1, V)
            p = probabilities(logits, [guess[:known + i] for i in range(len(q) + 1)])
            drafted, calls, kept = drafted + len(q), calls + 1, True
            for p_i, q_i, token in zip(p, q, guess[known:]):
                token, kept = accept_or_replace(p_i, q_i, token, generator)
                accepted += kept
                new.append(token)
                if not kept:
                    break
            if kept and stop_tokens.isdisjoint(new[-1:]):  # one more token comes for nothing
                new.append(int(torch.multinomial(p[-1], 1, generator=generator)))
            for cache in caches:
                cache.truncate(len(prompt) + len(new) - 1)
    return Speculation(new, drafted, accepted, calls)


# --- 5. the cheapest draft ----------------------------------------------------------------------

class Bigram(nn.Module):
    """What follows a token depends on it alone: ``logits`` (V, V), a row for each token. A draft that costs nothing.
    ``embed``, ``blocks`` (there are none) and ``head`` are what decode.py asks of a model beside the rest."""

    def __init__(self, logits: Tensor, context: int):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=len(logits), context=context)
        self.blocks, self.logits = nn.ModuleList(), nn.Parameter(logits)

    @classmethod
    def counted(cls, tokens: Tensor, V: int, context: int) -> "Bigram":
        """log of the counts of pairs in tokens (T,); pairs that are not there count as 1/100: none is ruled out."""
        counts = torch.full((V, V), 0.01)
        counts.index_put_((tokens[:-1], tokens[1:]), torch.ones(len(tokens) - 1), accumulate=True)
        return cls(counts.log(), context)

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """(B, T) -> (B, T, V)"""
        return self.logits[tokens]

    def head(self, x: Tensor) -> Tensor:
        """What ``embed`` gives are logits."""
        return x

    def forward(self, tokens: Tensor, cache: "_Length | None" = None) -> Tensor:
        """(B, T) -> logits (B, T, V)"""
        return self.head(self.embed(tokens, 0 if cache is None else cache.begin(tokens.size(1))))

    def new_cache(self, batch: int, max_len: int) -> "_Length":
        """There is nothing to keep but how many tokens were seen."""
        return _Length()


class _Length:
    layers, length = (), 0

    def begin(self, T: int) -> int:
        self.length += T
        return self.length - T

    def truncate(self, length: int) -> None:
        self.length = min(self.length, length)


# --- 6. demo ------------------------------------------------------------------------------------

def one_position(draws: int, generator: torch.Generator) -> bool:
    """Tokens by the rule, from a p and a q of six tokens, beside p: whether each is as frequent as p says."""
    p, q = torch.randn(2, 6, dtype=torch.float64, generator=generator).softmax(-1)
    kept, counts = 0, torch.zeros_like(p)
    for guess in torch.multinomial(q, draws, True, generator=generator).tolist():
        token, is_guess = accept_or_replace(p, q, guess, generator)
        counts[token] += 1
        kept += is_guess
    print("one position        " + "".join(f"token {i}".rjust(9) for i in range(len(p))))
    for name, values in (("the draft's q", q), ("the target's p", p), (f"{draws:,} draws", counts / draws)):
        print(f"{name:20}" + "".join(f"{value:9.4f}" for value in values.tolist()))
    errors = (counts / draws - p).abs() / (p * (1 - p) / draws).sqrt()  # in standard errors of a frequency
    print(f"kept: {kept / draws:.3f} of the guesses (expected sum min(p, q) = {acceptance(p, q):.3f}); largest "
          f"difference from p: {errors.max():.1f} standard errors (expected below 5)")
    return errors.max().item() < 5


def tokens_per_call(max_tokens: int, generator: torch.Generator) -> bool:
    """Tokens that a call of the target brings where each guess is kept with one probability, beside the formula."""
    p, q = torch.randn(2, 6, dtype=torch.float64, generator=generator)
    q = p + 0.8 * q
    model, draft = (Bigram(logits.expand(6, 6), max_tokens + 1) for logits in (p, q))  # whatever came before
    a, as_expected = acceptance(p.softmax(-1), q.softmax(-1)), True
    print(f"\nguesses k   tokens per call   formula, a = {a:.3f}   times as fast, if a guess costs 1/20 of a call")
    for k in (1, 2, 4, 8, 16):
        run = speculative(model, draft, [0], max_tokens, draft_tokens=k, generator=generator)
        found, expected = len(run.tokens) / run.target_calls, expected_tokens(a, k)
        print(f"{k:9}{found:18.2f}{expected:21.2f}{expected_speedup(a, k, 1 / 20):15.2f}")
        # A call brings more than i tokens with probability a^i: E[n^2] = sum (2 i + 1) a^i.
        variance = sum((2 * i + 1) * a ** i for i in range(k + 1)) - expected ** 2
        # The last call may bring less than it could.
        as_expected &= abs(found - expected) < 5 * (variance / run.target_calls) ** 0.5 + k / run.target_calls
    return as_expected


def _train(text: Tensor, generator: torch.Generator) -> nn.Module:
    """A small GPT that knows the text (T,) nearly by heart."""
    from gpt import GPT, GPTConfig, next_token_loss
    model, losses = GPT(GPTConfig(256, 64, 2, 4, 64), generator=generator), []
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 6e-3 * min(1, step / 20, (150 - step) / 75)
        batch = text[torch.randint(len(text) - 64, (4, 1), generator=generator) + torch.arange(65)]  # (4, 65)
        losses.append(next_token_loss(model(batch[:, :-1]), batch[:, 1:]))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    print(f"\nGPT of 2 layers: loss {losses[0]:.2f} (expected ln 256 = 5.55) -> {losses[-1]:.2f}")
    return model


def main(draft_tokens: int, max_new_tokens: int, draws: int, seed: int) -> None:
    if not 0 <= draft_tokens <= 49 or not 1 <= max_new_tokens <= 49 or draws < 100 or not 0 <= seed < 2**32:
        raise ValueError("--draft_tokens must be in 0 .. 49, --max_new_tokens in 1 .. 49, --draws at least 100, --seed "
                         f"in 0 .. 2^32 - 1, got {draft_tokens}, {max_new_tokens}, {draws} and {seed}")
    from pydoc_data.topics import topics
    generator = torch.Generator().manual_seed(seed)
    is_kept, is_formula = one_position(draws, generator), tokens_per_call(max(draws // 10, 100), generator)

    text = torch.tensor(list(topics["assert"].encode())[140:300])
    model, draft, prompt, same = _train(text, generator), Bigram.counted(text, 256, 64), list(b"The simple form"), True
    print("its draft: a table of the pairs of characters in the same text")
    # In float64 two ways of computing a logit do not disagree on ties.
    model, draft = model.double(), draft.double()
    alone = naive_speculative(model, draft, prompt, max_new_tokens, draft_tokens=0, probabilities=at_temperature(0))
    for name, temperature in (("greedy", 0), ("sampled", 1)):
        options = dict(draft_tokens=draft_tokens, probabilities=at_temperature(temperature))
        fast, naive = (f(model, draft, prompt, max_new_tokens, **options, generator=torch.Generator().manual_seed(seed))
                       for f in (speculative, naive_speculative))
        same &= fast == naive and (name == "sampled" or fast.tokens == alone.tokens)
        print(f"{name}: {bytes(prompt + fast.tokens).decode(errors='replace')!a}\n  {fast.accepted} of {fast.drafted} "
              f"guesses kept, {len(fast.tokens)} tokens in {fast.target_calls} calls of the GPT, alone in "
              f"{alone.target_calls}")
    print(f"distribution kept: {is_kept}; tokens per call = formula: {is_formula}; cached = uncached, greedy = the GPT "
          f"alone: {same} (expected True each)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--draft_tokens", type=int, default=4,
                        help="guesses before each call of the GPT; 0: none (default %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=48,
                        help="that the GPT writes (default %(default)s)")
    parser.add_argument("--draws", type=int, default=10_000,
                        help="from the rule on one position (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and draws (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
