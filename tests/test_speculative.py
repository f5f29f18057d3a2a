"""Speculative decoding against the target alone: exactly where greedy, by enumeration and chi-square where sampled."""

import itertools
from collections import Counter

import pytest
import torch
from run_here import run_here

import decode
import speculative as speculative_decoding
from decode import Sampling, generate
from gpt import GPT, GPTConfig
from speculative import (Bigram, accept_or_replace, acceptance, at_temperature, expected_speedup, expected_tokens,
                         naive_speculative, residual, speculative)


def tiny(vocab_size=11, context=24, seed=0, scale=8.0, **sizes):
    """A GPT in float64, its weights scaled so that its distributions are far from uniform."""
    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 16} | sizes
    model = GPT(GPTConfig(vocab_size, context, **sizes), generator=torch.Generator().manual_seed(seed)).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p *= scale
    return model.eval()


PROMPTS = [[1], [5, 9, 2, 6, 5, 3, 5]]
GREEDY = at_temperature(0)


# --- the rule on one position ---

def distributions():
    """Pairs p, q (V,): drawn, the same, with zeros where the other has none, one-hot."""
    draws = torch.randn(8, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    some, others = (torch.tensor(x, dtype=torch.float64) for x in ([0.5, 0.5, 0, 0], [0, 0.25, 0.75, 0]))
    one, other = torch.eye(4, dtype=torch.float64)[:2]
    return [*zip(draws[::2], draws[1::2]), (draws[0], draws[0]), (some, others), (others, some), (one, other),
            (one, one), (one, some), (some, one)]


@pytest.mark.parametrize("p, q", distributions())
def test_the_rule_keeps_the_targets_distribution_by_enumeration(p, q):
    r = residual(p, q)
    kept = torch.where(q > 0, q * (p / q.clamp(min=1e-300)).clamp(max=1), 0)
    assert acceptance(p, q) == pytest.approx(kept.sum().item(), abs=1e-12)
    assert acceptance(p, q) == pytest.approx(1 - (p - q).abs().sum().item() / 2, abs=1e-12)  # less the total variation
    torch.testing.assert_close(kept + (1 - kept.sum()) * r / r.sum(), p, rtol=0, atol=1e-12)


@pytest.mark.parametrize("p, q", [distributions()[i] for i in (0, 4, 5, 7, 10)])
def test_drawn_by_the_rule_tokens_follow_the_target_and_guesses_are_kept_as_often_as_said(p, q):
    generator, n = torch.Generator().manual_seed(1), 3000
    guesses = torch.multinomial(q, n, True, generator=generator).tolist()
    drawn = [accept_or_replace(p, q, guess, generator) for guess in guesses]
    frequencies = torch.bincount(torch.tensor([token for token, _ in drawn]), minlength=len(p)) / n
    assert (frequencies[p == 0] == 0).all()
    assert ((frequencies - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()  # five standard errors
    a = acceptance(p, q)
    assert abs(sum(kept for _, kept in drawn) / n - a) <= 5 * max(0, a * (1 - a) / n) ** 0.5 + 1e-9


@pytest.mark.parametrize("a", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("k", [0, 1, 5])
def test_expected_tokens_match_the_formula_and_a_simulation(a, k):
    formula = k + 1 if a == 1 else (1 - a ** (k + 1)) / (1 - a)
    assert expected_tokens(a, k) == pytest.approx(formula, rel=1e-12)
    kept = torch.rand(20_000, k, generator=torch.Generator().manual_seed(0)) < a
    assert (1 + kept.cumprod(1).sum(1)).double().mean().item() == pytest.approx(formula, abs=0.08)  # 5 standard errors
    assert expected_speedup(a, k, 0.1) == pytest.approx(formula / (1 + 0.1 * k))


def test_a_temperature_matches_sampling_and_a_bad_one_is_refused():
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    for value in (0, 0.5, 1.0, 2.0):
        expected = Sampling(value).probabilities(logits, [[]] * 3)
        torch.testing.assert_close(at_temperature(value)(logits, [[]] * 3), expected)
    assert at_temperature(1.0)(logits.bfloat16(), [[]] * 3).dtype == torch.float32
    for value in (-1.0, 1e-40, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"temperature must be .* got {value}"):
            at_temperature(value)


# --- the whole text ---

@pytest.mark.parametrize("draft_tokens", [0, 1, 4])
@pytest.mark.parametrize("stop_tokens", [(), (0, 5)])
def test_speculative_greedy_matches_greedy(draft_tokens, stop_tokens):
    model = tiny()
    for prompt in PROMPTS:
        for options in (dict(), dict(repetition_penalty=1.5)):
            options |= dict(temperature=0)
            expected = generate(model, [prompt], 40, stop_tokens=stop_tokens, **options)[0]
            for draft in (model, tiny(seed=1), tiny(seed=0, scale=7.0), tiny(context=9, seed=2)):
                run = speculative(model, draft, prompt, 40, draft_tokens=draft_tokens, stop_tokens=stop_tokens,
                                  probabilities=Sampling(**options).probabilities)
                assert run.tokens == expected
                if draft is model:
                    assert run.accepted == run.drafted


@pytest.mark.parametrize("draft_tokens", [0, 1, 4])
@pytest.mark.parametrize("stop_tokens", [(), (0, 5)])
@pytest.mark.parametrize("next_logits", [speculative_decoding.last_logits, decode.next_logits])
def test_cached_matches_naive_draw_by_draw(draft_tokens, stop_tokens, next_logits):
    model, runs = tiny(scale=4.0), []
    options = dict(draft_tokens=draft_tokens, stop_tokens=stop_tokens)
    options |= dict(probabilities=Sampling(0.9, top_k=8).probabilities)
    pairs = Bigram(torch.randn(11, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 99)
    for draft, prompt in itertools.product((tiny(seed=1, scale=4.0), tiny(context=9, seed=2), pairs), PROMPTS):
        naive, fast = (f(model, draft, prompt, 40, generator=torch.Generator().manual_seed(3), **options, **more)
                       for f, more in ((naive_speculative, {}), (speculative, dict(next_logits=next_logits))))
        assert naive == fast
        runs.append(fast)
    assert draft_tokens == 0 or 0 < sum(run.accepted for run in runs) < sum(run.drafted for run in runs)


def test_a_table_of_pairs_is_a_model_as_any_other():
    text = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    pairs = Bigram.counted(text, 3, 20)
    assert generate(pairs, [[0]], 5, temperature=0) == [[1, 2, 0, 1, 2]]
    run = speculative(pairs, pairs, [0], 9, draft_tokens=2, probabilities=GREEDY, next_logits=decode.next_logits)
    assert run == ([1, 2, 0, 1, 2, 0, 1, 2, 0], 6, 6, 3)
    counts = pairs(torch.tensor([[0, 1, 2]])).exp()[0]
    torch.testing.assert_close(counts, torch.tensor([[0.01, 3.01, 0.01], [0.01, 0.01, 2.01], [2.01, 0.01, 0.01]]))


class Table(torch.nn.Module):
    """The quickest language model: what follows a token depends on it and on its position alone."""

    def __init__(self, V, context, seed):
        super().__init__()
        self.config, self.blocks = GPTConfig(V, context, 1, 1, 1), ()
        draws = torch.randn(context, V, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.table = torch.nn.Parameter(draws)

    def embed(self, tokens, start=0):
        return self.table[start + torch.arange(tokens.size(1)), tokens]  # (B, T, V)

    def head(self, x):
        return x

    def forward(self, tokens, cache=None):
        return self.embed(tokens, 0 if cache is None else cache.begin(tokens.size(1)))

    def new_cache(self, batch, max_len):
        return TableCache()


class TableCache:
    layers, length = (), 0

    def begin(self, T):
        self.length += T
        return self.length - T

    def truncate(self, length):
        self.length = min(self.length, length)


def test_speculative_samples_follow_the_models_distribution():
    model, draft, generator = Table(3, 8, 0), Table(3, 8, 1), torch.Generator().manual_seed(0)
    sampling, n, draws = Sampling(0.9, top_p=0.95), 3, 1200
    expected = {}  # of every continuation of three tokens, by the chain rule
    for tokens in itertools.product(range(3), repeat=n):
        p = 1.0
        for i in range(n):
            seen = [1, *tokens[:i]]
            p *= sampling.probabilities(model(torch.tensor([seen]))[:, -1], [seen])[0, tokens[i]].item()
        expected[tokens] = p * draws
    runs = [speculative(model, draft, [1], n, draft_tokens=2, generator=generator, probabilities=sampling.probabilities)
            for _ in range(draws)]
    observed = Counter(tuple(run.tokens) for run in runs)
    assert all(expected[tokens] > 0 for tokens in observed)
    cells = [tokens for tokens, count in expected.items() if count >= 5]  # chi-square needs cells of that size
    rest = draws - sum(expected[t] for t in cells), draws - sum(observed[t] for t in cells)
    chi_square = sum((observed[t] - expected[t]) ** 2 / expected[t] for t in cells)
    chi_square += (rest[1] - rest[0]) ** 2 / max(rest[0], 5)
    k = len(cells)
    assert chi_square < k + 4 * (2 * k) ** 0.5  # four standard deviations above its mean
    assert 0.05 < sum(run.accepted for run in runs) / sum(run.drafted for run in runs) < 0.95  # the draft is no copy


def test_every_option_changes_the_text():
    model, draft = tiny(scale=4.0), tiny(seed=1, scale=4.0)

    def run(**options):
        return speculative(model, draft, [3, 1], 12, generator=torch.Generator().manual_seed(0), **options)

    plain = run()
    assert plain == run() != run(draft_tokens=1)
    for options in (dict(probabilities=at_temperature(3.0)), dict(probabilities=GREEDY), dict(stop_tokens=range(11))):
        assert run(**options).tokens != plain.tokens, options


def test_eval_mode_is_used_and_the_modes_are_restored():
    model = tiny(dropout=0.5)
    model.train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    for function in (speculative, naive_speculative):
        runs = [function(model, model, [1], 8, probabilities=GREEDY) for _ in range(2)]
        assert runs[0] == runs[1] and runs[0].accepted == runs[0].drafted  # no dropout
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("prompt, message", [([], "prompt 0 is empty"),
                                             ([1] * 25, "25 tokens, the model's context is 24: shorten it"),
                                             ([11], "the vocabulary is 0 .. 10"), ([-1], "the vocabulary is 0 .. 10")])
def test_bad_prompts_are_refused(prompt, message):
    for function in (speculative, naive_speculative):
        with pytest.raises(ValueError, match=message):
            function(tiny(), tiny(), prompt, 3)
        with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
            function(tiny(), tiny(), [1], 0)


def test_speculative_refuses_bad_arguments():
    for function in (speculative, naive_speculative):
        with pytest.raises(ValueError, match="11 tokens and 12"):
            function(tiny(), tiny(12), [1], 3)
        for value in (-1, 2.5):
            with pytest.raises(ValueError, match=f"draft_tokens must be .* got {value}"):
                function(tiny(), tiny(), [1], 3, draft_tokens=value)


def test_at_the_edges_cached_is_naive():
    """A prompt that fills the context, stop tokens in a tensor, a draft that reads all of its own context."""
    model, pairs = tiny(), Bigram.counted(torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), 3, 99)
    short = Bigram(pairs.logits.data, 5)
    for function in (speculative, naive_speculative):
        assert function(model, model, [1] * 24, 3) == ([], 0, 0, 0)
        assert len(function(model, model, [1], 9, stop_tokens=torch.arange(11)).tokens) == 1
        run = function(pairs, short, [0], 9, draft_tokens=8, probabilities=GREEDY)
        assert run == ([1, 2, 0, 1, 2, 0, 1, 2, 0], 5, 5, 4)  # behind its context the target goes on alone


# --- the program ---

def test_every_flag_changes_something_and_the_verdict_can_fail(monkeypatch, capsys):
    untrained = GPTConfig(256, 64, 1, 1, 16)
    monkeypatch.setattr(speculative_decoding, "_train", lambda text, generator: GPT(untrained, generator=generator))
    base, seen = dict(draft_tokens=4, max_new_tokens=8, draws=500, seed=0), []
    for change in ({}, {"draft_tokens": 1}, {"max_new_tokens": 9}, {"draws": 600}, {"seed": 1}):
        speculative_decoding.main(**{**base, **change})
        seen.append(capsys.readouterr().out)
        assert seen[-1].endswith("distribution kept: True; tokens per call = formula: True; cached = uncached, "
                                 "greedy = the GPT alone: True (expected True each)\n")
    assert len(set(seen)) == len(seen)
    monkeypatch.setattr(speculative_decoding, "residual", lambda p, q: p)  # a likely mistake
    speculative_decoding.main(**base | dict(draws=4000))
    assert "distribution kept: False; tokens per call = formula: True" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--draft_tokens", "-1"], ["--max_new_tokens", "50"], ["--draws", "1"],
                                   ["--seed", "-1"], ["--no_such_flag"]])
def test_a_bad_flag_is_answered_in_one_line(flags):
    found = run_here(["speculative.py", *flags])
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("speculative.py: ") and len(found.stderr.strip().splitlines()) == 1
