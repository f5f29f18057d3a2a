"""Llama against transformers' Llama and Mistral, in both directions and both file formats; RoPE, windows, the cache."""

import dataclasses
import math
import runpy
import sys
from itertools import product

import pytest
import tiktoken
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import decode
import llama
import weights
from few_rows import one_row_layout
from llama import (PRESETS, Llama, LlamaConfig, Rotations, attention, naive_attention, naive_rope, next_token_loss,
                   rope, rope_frequencies)
from speculative import at_temperature, speculative

transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TINY = LlamaConfig(61, 64, 3, 4, 2, 32, 40, rope_base=1e4)
LONG = dict(rope_factor=8.0, context=131072)
THEIR_LONG = dict(max_position_embeddings=131072, rope_parameters=dict(
    rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192))


def tiny(seed=0, std=None, **changes):
    model = Llama(dataclasses.replace(TINY, **changes), generator=torch.Generator().manual_seed(seed)).eval()
    for p in model.parameters() if std else ():
        torch.nn.init.normal_(p, std=std, generator=torch.Generator().manual_seed(seed))
    return model


def tokens_of(batch, length, vocab_size=61, seed=1):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_peer(folder, kind="Llama", seed=0, std=0.3, **changes):
    """A transformers model with every parameter random (its own start has gains of 1), saved to a folder."""
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3) | changes
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, std)
    model.save_pretrained(folder)
    return model


def assert_same(a, b, tolerance=1e-5):  # fp32, logits of order 10
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- against transformers -------------------------------------------------------------------

@pytest.mark.parametrize("kind, changes", [
    ("Llama", {}), ("Llama", dict(num_key_value_heads=4)), ("Llama", dict(num_key_value_heads=1)),
    ("Llama", dict(tie_word_embeddings=True)), ("Llama", dict(head_dim=16, rms_norm_eps=1e-3)),
    ("Llama", dict(rope_parameters=dict(rope_type="default", rope_theta=50.0))),
    ("Mistral", dict(sliding_window=7)), ("Mistral", dict(sliding_window=None, head_dim=6))])
def test_logits_and_gradients_match_transformers(tmp_path, kind, changes):
    theirs = random_peer(tmp_path, kind, **changes)
    ours = Llama.from_pretrained(tmp_path)
    x = tokens_of(2, 20)
    a, b = ours(x), theirs(x).logits
    assert_same(a, b)
    next_token_loss(a[:, :-1], x[:, 1:]).backward()
    theirs(x, labels=x).loss.backward()
    layer = theirs.model.layers[0]
    assert_same(ours.token_embedding.weight.grad, theirs.model.embed_tokens.weight.grad)
    assert_same(ours.blocks[0].mlp.up.weight.grad, layer.mlp.up_proj.weight.grad)
    assert_same(ours.blocks[0].attention.v.weight.grad, layer.self_attn.v_proj.weight.grad)
    assert_same(ours.blocks[0].norm2.gain.grad, layer.post_attention_layernorm.weight.grad)


def test_logits_match_transformers_in_float64(tmp_path):
    theirs, x = random_peer(tmp_path).double(), tokens_of(2, 24)
    assert_same(Llama.from_pretrained(tmp_path).double()(x), theirs(x).logits, 1e-12)


def test_long_scaled_positions_match_transformers_with_and_without_cache(tmp_path):
    theirs = random_peer(tmp_path, num_hidden_layers=1, num_attention_heads=2, std=0.2, **THEIR_LONG)
    ours, x = Llama.from_pretrained(tmp_path), tokens_of(1, 8500)
    assert ours.config.rope_factor == 8.0
    with torch.no_grad():
        cache = ours.new_cache(1, 8500)
        a, b = ours(x), theirs(x).logits
        cached = torch.cat([ours(part, cache) for part in x.split((8400, 99, 1), 1)], 1)
        assert_same(a, b)
        assert_same(cached, b)
        # and at the far end of the context, where nothing but the angles is different
        start = 131072 - 9
        y = ours.head(ours.blocks[0](ours.embed(x[:, :9], start), start))
        assert_same(y, theirs(x[:, :9], position_ids=torch.arange(start, start + 9)[None]).logits)


@pytest.mark.parametrize("kind, changes", [("Llama", {}), ("Mistral", dict(sliding_window=5))])
def test_generated_tokens_match_transformers(tmp_path, kind, changes):
    theirs, x = random_peer(tmp_path, kind, **changes), tokens_of(2, 9)
    ours = Llama.from_pretrained(tmp_path)
    expected = theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=20, do_sample=False, eos_token_id=None,
                               pad_token_id=0)
    assert decode.generate(ours, x, 20, temperature=0) == expected[:, 9:].tolist()


# --- rotary positions -----------------------------------------------------------------------

def test_rope_matches_rotation_matrices_in_both_conventions():
    config = dataclasses.replace(TINY, d_model=32)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.empty_like(x)
    for t, j in product(range(5), range(4)):
        angle = (7 + t) * 1e4 ** (-2 * j / 8)
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=x.dtype)
        expected[:, :, t, 2 * j:2 * j + 2] = x[:, :, t, 2 * j:2 * j + 2] @ turn.T
    rotation = Rotations(config)(7, 5, x.device)
    for function in (naive_rope, rope):
        torch.testing.assert_close(function(x, rotation), expected, atol=1e-5, rtol=0)  # angles up to 11 in fp32
    to_halves = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
    torch.testing.assert_close(weights.rope_halves(to_halves, rotation), torch.cat((expected[..., 0::2], expected[..., 1::2]), -1),
                               atol=1e-5, rtol=0)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    rope(a, rotation).pow(3).sum().backward()
    naive_rope(b, rotation).pow(3).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=0)


def test_scores_depend_on_distances_only():
    rotations, g = Rotations(TINY), torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=g)
    scores = [(rope(q, rotations(t, 1, q.device)) * rope(k, rotations(t - 5, 1, q.device))).sum() for t in (5, 50, 900)]
    assert scores[0].item() == pytest.approx(scores[1].item(), abs=1e-4)  # angles of 900 rad in fp32: 6e-5
    assert scores[0].item() == pytest.approx(scores[2].item(), abs=1e-3)


def test_frequencies_match_transformers_bit_for_bit():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    ours = rope_frequencies(LlamaConfig(d_model=128, n_heads=1, n_kv_heads=1, **LONG))
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](transformers.LlamaConfig(hidden_size=128, num_attention_heads=1, **THEIR_LONG))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=2e-7)  # one rounding
    plain = rope_frequencies(LlamaConfig(d_model=128, n_heads=1, n_kv_heads=1))
    assert ours[0] == plain[0] and ours[-1] == plain[-1] / 8


# --- attention, window, cache ---------------------------------------------------------------

def test_window_matches_brute_force():
    """Removing what a query may not see changes nothing; removing the oldest key that it may, does."""
    model, x = tiny(window=4, n_layers=1), tokens_of(1, 12)
    logits = model(x)
    for start in range(12):
        changed = x.clone()
        changed[0, start] = (x[0, start] + 1) % 61
        differs = (model(changed) - logits).abs().amax(-1)[0] > 1e-7
        assert differs.tolist() == [start <= t < start + 4 for t in range(12)]


def test_no_token_sees_the_future():
    model, x = tiny(), tokens_of(1, 10)
    changed = x.clone()
    changed[0, 6] = (x[0, 6] + 1) % 61
    assert torch.equal(model(x)[:, :6], model(changed)[:, :6])
    assert not torch.allclose(model(x)[:, 6:], model(changed)[:, 6:])


def test_a_model_with_another_attention_is_the_same_model():
    def expanded(q, k, v, is_causal=True):
        return naive_attention(q, *(y.repeat_interleave(q.size(1) // y.size(1), 1) for y in (k, v)), is_causal)
    a, b = (Llama(TINY, f, generator=torch.Generator().manual_seed(0)) for f in (attention, expanded))
    assert_same(a(tokens_of(2, 10)), b(tokens_of(2, 10)))


@pytest.mark.parametrize("changes", [{}, dict(n_kv_heads=1), dict(n_kv_heads=4), dict(window=5)])
@pytest.mark.parametrize("pieces", [(1,) * 24, (5, 1, 1, 7, 10)])
def test_cached_logits_match_uncached(pieces, changes):
    model, x = tiny(std=0.3, **changes).double(), tokens_of(3, 24)
    cache = model.new_cache(3, 24)
    assert cache.layers[0].k.shape == (3, model.config.n_kv_heads, 24, 8)
    parts = [model(piece, cache) for piece in x.split(pieces, 1)]
    assert_same(torch.cat(parts, 1), model(x), 1e-5)  # RMSNorm's statistics are fp32 in any model


@pytest.mark.parametrize("changes", [{}, dict(window=4)])
def test_padded_rows_match_rows_alone(changes):
    model, lengths = tiny(std=0.3, **changes), [3, 7, 1]
    rows = [tokens_of(1, n + 2, seed=n) for n in lengths]
    cache = model.new_cache(3, 10)
    cache.padding = torch.tensor([7 - n for n in lengths])
    prompt = torch.cat([F.pad(row[:, :-2], (7 - n, 0)) for row, n in zip(rows, lengths)])
    first = model(prompt, cache)[:, -1]
    second = model(torch.cat([row[:, -2:-1] for row in rows]), cache)[:, -1]
    cache.select(torch.tensor([2, 0]))
    third = model(torch.cat([rows[2][:, -1:], rows[0][:, -1:]]), cache)[:, -1]
    for i, row in enumerate(rows):
        alone = model(row)[0]
        assert_same(first[i], alone[-3])
        assert_same(second[i], alone[-2])
    assert_same(third[1], model(rows[0])[0, -1])
    assert_same(third[0], model(rows[2])[0, -1])


@pytest.mark.parametrize("changes", [{}, dict(window=4)])
def test_decode_works_on_llama_as_on_gpt(changes):
    model, draft = tiny(std=0.3, **changes), tiny(1, std=0.3, n_layers=1)
    prompts = [tokens_of(1, n, seed=n)[0].tolist() for n in (3, 9, 1)]  # padded on the left
    expected = decode.naive_generate(model, prompts, 8, temperature=0)
    assert decode.generate(model, prompts, 8, temperature=0) == expected
    guessed = speculative(model, draft, prompts[1], 8, probabilities=at_temperature(0), next_logits=decode.next_logits)
    assert guessed.tokens == expected[1]
    assert list(decode.stream(model, prompts[1], 8, temperature=0)) == expected[1]
    (best, log_p), = decode.beam_search(model, prompts[1], 4, 8, length_penalty=0)
    rows = torch.tensor([prompts[1] + best, prompts[1] + expected[1]])
    scores = decode.score(model, rows) - decode.score(model, torch.tensor([prompts[1]]))
    assert log_p == pytest.approx(scores[0].item(), abs=1e-3)
    assert scores[0] >= scores[1] - 1e-4
    one_row_layout(model)
    assert decode.generate(model, prompts, 8, temperature=0) == expected


def test_training_goes_on_after_generation():
    model = tiny()
    decode.generate(model, [[1, 2]], 3, temperature=0)
    next_token_loss(model(tokens_of(1, 9)), tokens_of(1, 9)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bfloat16_keeps_its_rotations():
    model, x = tiny(std=0.1), tokens_of(2, 40)
    a, b = model(x), model.bfloat16()(x)
    assert b.dtype == torch.bfloat16
    assert (a - b).abs().max() < 0.05 * a.abs().max()  # 8 bits of mantissa, three layers


def test_a_full_cache_and_a_full_context_are_refused():
    model = tiny()
    cache = model.new_cache(1, 4)
    model(tokens_of(1, 3), cache)
    with pytest.raises(ValueError, match="4 slots holds 3: no room for 2"):
        model(tokens_of(1, 2), cache)
    with pytest.raises(ValueError, match="65 tokens from position 0 do not fit a context of 64"):
        model(tokens_of(1, 65))
    with pytest.raises(ValueError, match=r"tokens must be \(B, T\), got shape \(3,\)"):
        model(torch.tensor([1, 2, 3]))
    for bad in ([[3, 61]], [[-1, 2]]):
        with pytest.raises(ValueError, match=r"token ids -?\d+ .. \d+ are not all in the vocabulary, 0 .. 60"):
            model(torch.tensor(bad))


# --- counting -------------------------------------------------------------------------------

@pytest.mark.parametrize("name, published", [
    ("llama1_7b", 6738415616), ("llama2_7b", 6738415616), ("llama2_70b", 68976648192), ("llama3_8b", 8030261248),
    ("llama31_8b", 8030261248), ("llama3_70b", 70553706496), ("llama31_70b", 70553706496), ("llama3_405b", 405853388800),
    ("llama32_1b", 1235814400), ("llama32_3b", 3212749824), ("mistral_7b", 7241732096)])
def test_preset_sizes_match_the_published_ones_and_the_model(name, published):
    assert PRESETS[name].count_parameters() == published
    two = dataclasses.replace(PRESETS[name], n_layers=2)  # all 126 layers would take seconds
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(two).parameters()) == two.count_parameters()


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, n_heads=2, d_head=6, tied=True, context=10)])
def test_flops_match_torchs_counter(config):
    def expanded(q, k, v, is_causal=True):
        return naive_attention(q, *(y.repeat_interleave(q.size(1) // y.size(1), 1) for y in (k, v)), is_causal)
    model, x = Llama(config, expanded), tokens_of(2, config.context)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert counter.get_total_flops() == config.flops_per_token() * x.numel()
    assert config.flops_per_token(5) < config.flops_per_token()


def test_initialisation_is_small_and_drawn_from_the_generator():
    model = Llama(dataclasses.replace(TINY, d_model=256, n_layers=8), generator=torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if name.endswith("gain"):
            assert (p == 1).all()
        else:
            std = 0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name  # at least 10240 draws: 1% error, 5 sigma
    loss = next_token_loss(model(tokens_of(4, 20)), tokens_of(4, 20, seed=2))
    assert loss.item() == pytest.approx(math.log(61), abs=0.2)
    x = tokens_of(1, 5)
    assert torch.equal(tiny(0)(x), tiny(0)(x)) and not torch.equal(tiny(0)(x), tiny(1)(x))


# --- bad input ------------------------------------------------------------------------------

@pytest.mark.parametrize("bad, message", [
    (dict(n_heads=5), "n_heads must divide d_model, got 5 heads and width 4096"),
    (dict(n_kv_heads=5), "n_kv_heads must divide n_heads, got 5 and 32"),
    (dict(n_layers=0), "n_layers must be a whole number and at least 1, got 0"),
    (dict(d_head=5), r"d_head must be even \(rope turns pairs\), got 5"),
    (dict(d_ff=1.5), "d_ff must be a whole number .* got 1.5"),
    (dict(window=0), "window must be a whole number and at least 1, got 0"),
    (dict(rope_factor=0.5), "rope scaling needs a factor of at least 1"),
    (dict(rope_factor=8.0, rope_high_frequency=1.0), "low < high frequency, got factor 8.0, 1.0 and 1.0"),
    (dict(norm_eps=0.0), "norm_eps and rope_original_context must be positive, got 500000.0, 0.0 and 8192")])
def test_impossible_sizes_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**bad)


def test_demo_ends_on_its_verdict(capsys):
    llama.main(steps=1, seed=0)
    assert "of 64 bytes right (expected all)" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("flag, value", [("--steps", "0"), ("--steps", "x"), ("--seed", "-1")])
def test_bad_flags_are_one_line(flag, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["llama.py", flag, value])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(llama.__file__, run_name="__main__")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and message.startswith("llama.py: ")
    assert flag in message
