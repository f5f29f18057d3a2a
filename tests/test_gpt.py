"""GPT against transformers' GPT-2, torch's attention and FLOP counter; the cache against doing without."""

import dataclasses
import json
import math
import runpy
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import gpt
from gpt import GPT, GPTConfig, attention, count_parameters, flops_per_token, naive_attention, next_token_loss, unfused_attention

transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")

TINY = GPTConfig(vocab_size=61, context=24, n_layers=3, n_heads=4, d_model=32)


def tiny(seed=0, **changes):
    return GPT(dataclasses.replace(TINY, **changes), generator=torch.Generator().manual_seed(seed))


def tokens_of(batch, length, vocab_size=61, seed=1):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_gpt2(folder, seed=0, **changes):
    """A transformers GPT-2 with every parameter random (its own start has zero biases), saved to a folder."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(**(dict(vocab_size=61, n_positions=24, n_layer=3, n_head=4, n_embd=32) | changes))
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return model


# --- against transformers -------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"n_inner": 48}, {"n_head": 1, "n_layer": 1}, {"n_positions": 7}])
def test_logits_and_gradients_match_transformers(tmp_path, changes):
    theirs = random_gpt2(tmp_path, **changes)
    ours = GPT.from_pretrained(tmp_path).eval()
    x = tokens_of(3, 7)
    a, b = ours(x), theirs(x).logits
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # fp32, logits of order 10
    next_token_loss(a[:, :-1], x[:, 1:]).backward()
    theirs(x, labels=x).loss.backward()
    torch.testing.assert_close(ours.token_embedding.weight.grad, theirs.transformer.wte.weight.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.blocks[0].mlp.up.weight.grad, theirs.transformer.h[0].mlp.c_fc.weight.grad.t(),
                               atol=1e-5, rtol=1e-4)


def test_logits_match_transformers_in_float64(tmp_path):
    theirs = random_gpt2(tmp_path).double()
    ours = GPT.from_pretrained(tmp_path).double().eval()
    x = tokens_of(2, 24)
    torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-12, rtol=1e-12)


def test_transformers_loads_what_we_save(tmp_path):
    ours = tiny().eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.2)
    ours.save_pretrained(tmp_path, eot=60)
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert theirs.config.eos_token_id == 60
    x = tokens_of(2, 9)
    torch.testing.assert_close(ours(x), theirs.eval()(x).logits, atol=1e-5, rtol=1e-5)


def test_saved_and_loaded_is_bit_for_bit_the_same(tmp_path):
    ours = tiny(dropout=0.1)
    ours.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(ours.parameters(), again.parameters()))


def test_sharded_weights_are_read(tmp_path):
    theirs = random_gpt2(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    x = tokens_of(1, 5)
    torch.testing.assert_close(GPT.from_pretrained(tmp_path / "shards")(x), theirs(x).logits, atol=1e-5, rtol=1e-5)
    tiny().save_pretrained(tmp_path / "shards")  # the new file beside the shards of another model
    assert torch.equal(GPT.from_pretrained(tmp_path / "shards")(x), tiny()(x))


def test_first_losses_of_training_match_transformers(tmp_path):
    theirs = random_gpt2(tmp_path, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    ours = GPT.from_pretrained(tmp_path).train()
    losses = []
    for model, loss_of in ((ours, lambda x: next_token_loss(ours(x[:, :-1]), x[:, 1:])),
                           (theirs, lambda x: F.cross_entropy(theirs(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten()))):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses.append([])
        for step in range(5):
            loss = loss_of(tokens_of(4, 12, seed=step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)  # Adam divides by small numbers: errors of 1e-6 grow
    assert losses[0][-1] < losses[0][0]


# --- attention ------------------------------------------------------------------------------

@pytest.mark.parametrize("T, S, causal", [(1, 1, True), (5, 5, True), (5, 5, False), (1, 7, True), (3, 8, True), (3, 8, False)])
def test_attention_matches_brute_force(T, S, causal):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 8, dtype=torch.float64, generator=g) for n in (T, S, S))
    expected = torch.zeros_like(q)
    for b, h, t in product(range(2), range(4), range(T)):
        seen = S - T + t + 1 if causal else S  # queries are the last T positions
        weights = torch.tensor([math.exp(q[b, h, t] @ k[b, h, s] / math.sqrt(8)) for s in range(seen)], dtype=q.dtype)
        expected[b, h, t] = (weights / weights.sum()) @ v[b, h, :seen]
    for function in (naive_attention, attention, unfused_attention):
        torch.testing.assert_close(function(q, k, v, is_causal=causal), expected, atol=1e-12, rtol=0)


def test_attention_gradients_agree():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64, generator=g, requires_grad=True) for n in (3, 5, 5))
    expected, *others = [torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v))
                         for f in (naive_attention, attention, unfused_attention)]
    for grads in others:
        for a, b in zip(grads, expected):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("function", [attention, unfused_attention])
@pytest.mark.parametrize("T, causal", [(5, True), (3, True), (1, True), (3, False)])
def test_attention_shares_key_heads(function, T, causal):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, *shape, 4, generator=g, dtype=torch.float64, requires_grad=True) for shape in ((6, T), (2, 5), (2, 5)))
    expected = naive_attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), causal)
    found = function(q, k, v, causal)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (found, expected))):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_unfused_attention_refuses_what_attention_refuses_and_rounds_as_the_formula_does():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 32, 16, generator=g) for h in (4, 2, 2))
    for function in (attention, unfused_attention):
        with pytest.raises(ValueError, match="5 queries cannot be the last of 3 positions"):
            function(q[:, :, :5], k[:, :, :3], v[:, :, :3])
        assert function(q[:0], k[:0], v[:0]).shape == (0, 4, 32, 16)
    exact = naive_attention(q.double(), *(x.double().repeat_interleave(2, 1) for x in (k, v)))
    q, k, v = (x.bfloat16() for x in (q, k, v))
    errors = [(y - exact).square().mean() for y in (naive_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)),
                                                    unfused_attention(q, k, v))]
    assert errors[1] <= 1.2 * errors[0]


def test_a_model_with_another_attention_is_the_same_model():
    x = tokens_of(2, 10)
    a, b, c = (GPT(TINY, f, torch.Generator().manual_seed(0)) for f in (attention, naive_attention, unfused_attention))
    torch.testing.assert_close(a(x), b(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(a(x), c(x), atol=1e-5, rtol=0)


def test_no_token_sees_the_future():
    model, x = tiny().eval(), tokens_of(1, 10)
    changed = x.clone()
    changed[0, 6] = (x[0, 6] + 1) % 61
    a, b = model(x), model(changed)
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.allclose(a[:, 6:], b[:, 6:])


# --- the cache ------------------------------------------------------------------------------

@pytest.mark.parametrize("pieces", [(1,) * 24, (24,), (5, 1, 1, 7, 10)])
def test_cached_logits_match_uncached(pieces):
    model, x = tiny().double().eval(), tokens_of(3, 24)
    cache = model.new_cache(3, 24)
    parts = [model(piece, cache) for piece in x.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(x), atol=1e-12, rtol=0)
    assert cache.length == 24


def test_padded_rows_match_rows_alone():
    model, lengths = tiny().double().eval(), [3, 7, 1]
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
        torch.testing.assert_close(first[i], alone[-3], atol=1e-12, rtol=0)
        torch.testing.assert_close(second[i], alone[-2], atol=1e-12, rtol=0)
    torch.testing.assert_close(third[1], model(rows[0])[0, -1], atol=1e-12, rtol=0)
    torch.testing.assert_close(third[0], model(rows[2])[0, -1], atol=1e-12, rtol=0)


def test_truncated_and_selected_cache_goes_on_as_if_nothing_had_been():
    model, x = tiny().double().eval(), tokens_of(2, 12)
    cache = model.new_cache(2, 12)
    model(x[:, :9], cache)
    cache.truncate(5)
    assert cache.length == 5
    cache.select(torch.tensor([1, 1, 0]))
    torch.testing.assert_close(model(x[[1, 1, 0], 5:8], cache), model(x[[1, 1, 0], :8])[:, 5:], atol=1e-12, rtol=0)


def test_a_batch_of_another_size_than_the_caches_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="a cache of 3 rows cannot take a batch of 1"):
        model(tokens_of(1, 2), model.new_cache(3, 4))


def test_a_full_cache_and_a_full_context_are_refused():
    model = tiny()
    cache = model.new_cache(1, 4)
    model(tokens_of(1, 3), cache)
    with pytest.raises(ValueError, match="4 slots holds 3: no room for 2"):
        model(tokens_of(1, 2), cache)
    with pytest.raises(ValueError, match="25 tokens from position 0 do not fit a context of 24"):
        model(tokens_of(1, 25))
    cache = model.new_cache(1, 30)
    cache.padding = torch.tensor([0])
    with pytest.raises(ValueError, match="26 tokens from position 0 do not fit a context of 24"):
        model(tokens_of(1, 26), cache)


# --- counting -------------------------------------------------------------------------------

@pytest.mark.parametrize("name, published", [("gpt2", 124e6), ("gpt2-medium", 355e6), ("gpt2-large", 774e6),
                                             ("gpt2-xl", 1558e6), ("gpt3-175b", 175e9)])
def test_preset_sizes_match_the_published_ones_and_the_model(name, published):
    config = gpt.PRESETS[name]
    with torch.device("meta"):
        counted = sum(p.numel() for p in GPT(config).parameters())
    assert counted == count_parameters(config) == pytest.approx(published, rel=5e-3)  # three digits are published


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, d_ff=40, n_heads=2, context=10)])
def test_flops_match_torchs_counter(config):
    model, x = GPT(config, naive_attention), tokens_of(2, config.context)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert counter.get_total_flops() == flops_per_token(config) * x.numel()
    assert flops_per_token(config, 5) < flops_per_token(config)


def test_initialisation_is_the_papers():
    model = GPT(dataclasses.replace(TINY, d_model=256, n_layers=8), generator=torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "norm" in name:
            assert (p == 1).all()
        else:
            std = 0.02 / math.sqrt(16) if "out." in name or "down." in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name  # at least 6144 draws: 1% error, 5 sigma
    loss = next_token_loss(model(tokens_of(4, 20)), tokens_of(4, 20, seed=2))
    assert loss.item() == pytest.approx(math.log(61), abs=0.2)  # logits start with a spread of 0.02 sqrt(D) = 0.3


def test_same_generator_same_weights_and_dropout_changes_something():
    a, b, c = tiny(0), tiny(0), tiny(1)
    x = tokens_of(1, 5)
    assert torch.equal(a(x), b(x)) and not torch.equal(a(x), c(x))
    dropping = tiny(0, dropout=0.5)
    assert not torch.equal(dropping(x), a(x)) and torch.equal(dropping.eval()(x), a(x))


# --- bad input ------------------------------------------------------------------------------

@pytest.mark.parametrize("bad, message", [
    (dict(n_heads=5), "n_heads must divide d_model, got 5 heads and width 768"),
    (dict(n_layers=0), "n_layers must be a whole number and at least 1, got 0"),
    (dict(vocab_size=-3), "vocab_size must be .* at least 1, got -3"),
    (dict(n_layers=2.5), "n_layers must be a whole number .* got 2.5"),
    (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0")])
def test_impossible_sizes_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**bad)


def test_tokens_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"tokens must be \(B, T\), got shape \(3,\)"):
        tiny()(torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("token", [-1, 60])
def test_ids_outside_of_the_vocabulary_are_refused(token):
    with pytest.raises(ValueError, match=r"token ids -?\d+ .. \d+ are not all in the vocabulary, 0 .. \d+"):
        tiny(vocab_size=60)(torch.tensor([[3, token]]))


def test_more_queries_than_keys_are_refused():
    q, k = torch.zeros(1, 1, 5, 4), torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="5 queries cannot be the last of 3 positions"):
        attention(q, k, k)
    assert attention(q, k, k, is_causal=False).shape == q.shape


def test_the_loss_checks_shapes_and_keeps_float64():
    logits, targets = torch.randn(2, 3, 7, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"logits \(2, 3, 7\) and targets \(3, 2\) do not fit"):
        next_token_loss(logits, targets.t())
    torch.testing.assert_close(next_token_loss(logits, targets), -logits.log_softmax(-1)[..., 0].mean(), atol=1e-15, rtol=0)
    assert next_token_loss(logits.bfloat16(), targets).dtype == torch.float32


def test_demo_ends_on_its_verdict(capsys):
    gpt.main(steps=1, seed=0)
    assert "of 64 bytes right (expected all)" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("flag, value", [("--steps", "0"), ("--steps", "x"), ("--seed", "-1")])
def test_bad_flags_are_one_line(flag, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpt.py", flag, value])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(gpt.__file__, run_name="__main__")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and message.startswith("gpt.py: ")
    assert flag in message


def test_foreign_and_broken_directories_are_refused(tmp_path):
    random_gpt2(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (({"model_type": "llama"}, "model_type = 'llama', GPT computes 'gpt2'"),
                             ({"activation_function": "relu"}, "activation_function = 'relu'"),
                             ({"n_embd": 64}, r"wte.weight has shape \(61, 32\), config.json says \(61, 64\)"),
                             ({"n_layer": 4}, "h.3.ln_1.weight is missing"),
                             ({"n_layer": 2}, "h.2.* is in no GPT-2 of 2 layers"),
                             ({"n_head": "4"}, "config.json: n_heads must be a whole number")):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors: .*damaged or cut short"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model\\*.safetensors is there"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no Hugging Face GPT-2: config.json"):
        GPT.from_pretrained(tmp_path)
