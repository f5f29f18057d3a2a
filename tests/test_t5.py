"""T5 against transformers' T5ForConditionalGeneration: logits, gradients, buckets, files; the cache against doing without."""

import dataclasses
import json
import math
import runpy
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import t5
from t5 import T5, PRESETS, T5Config, greedy_decode, naive_bucket, relative_position_bucket, shift_right, target_loss

transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

TINY = T5Config(vocab_size=37, n_layers=2, n_heads=3, d_model=16, d_head=8, d_ff=24, n_buckets=8, max_distance=12, dropout=0.0)
FORMS = {"original": {}, "three decoder layers": {"num_decoder_layers": 3},
         "version 1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}}
SOURCE = torch.tensor([[5, 3, 9, 2, 7, 30, 36], [4, 8, 1, 0, 0, 0, 0], [6, 2, 2, 12, 1, 0, 0]])
TARGETS = torch.tensor([[7, 7, 2, 9, 1], [9, 2, 1, 0, 0], [3, 1, 0, 0, 0]])
FP32 = dict(atol=1e-5, rtol=1e-5)  # logits of order 1 to 10


def tiny(seed=0, **changes):
    model = T5(dataclasses.replace(TINY, **changes)).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4, generator=generator)
    return model


def random_t5(folder, seed=0, **changes):
    """transformers' T5 with every parameter random, saved to a folder; an untied head is a matrix of its own."""
    torch.manual_seed(seed)
    config = transformers.T5Config(**(dict(vocab_size=37, num_layers=2, num_heads=3, d_model=16, d_kv=8, d_ff=24, dropout_rate=0.0,
                                           relative_attention_num_buckets=8, relative_attention_max_distance=12,
                                           decoder_start_token_id=0) | changes))
    model = transformers.T5ForConditionalGeneration(config).eval()
    if changes.get("tie_word_embeddings") is False:
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    if changes.get("tie_word_embeddings") is False:  # as in the published directories; transformers 5 drops it
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    return model


# --- against transformers -------------------------------------------------------------------

@pytest.mark.parametrize("form", FORMS)
def test_logits_loss_and_gradients_match_transformers(tmp_path, form):
    theirs = random_t5(tmp_path, **FORMS[form])
    ours = T5.from_pretrained(tmp_path)
    their_output = theirs(input_ids=SOURCE, attention_mask=(SOURCE != 0).long(), labels=TARGETS.masked_fill(TARGETS == 0, -100))
    logits = ours(SOURCE, shift_right(TARGETS))
    real = TARGETS != 0
    torch.testing.assert_close(logits[real], their_output.logits[real], **FP32)
    loss = target_loss(logits, TARGETS)
    torch.testing.assert_close(loss, their_output.loss, **FP32)
    loss.backward()
    their_output.loss.backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, their_gradients[t5._hugging_face_name(name, ours.config)], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_transformers_loads_what_we_save(tmp_path, form):
    gated, three = form == "version 1.1", form == "three decoder layers"
    ours = tiny(gated=gated, tied=not gated, n_decoder_layers=3 if three else None).float()
    ours.save_pretrained(tmp_path)
    theirs, report = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    x = shift_right(TARGETS)
    their_logits = theirs.eval()(input_ids=SOURCE, attention_mask=(SOURCE != 0).long(), decoder_input_ids=x).logits
    torch.testing.assert_close(ours(SOURCE, x), their_logits, **FP32)
    again = T5.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(ours.parameters(), again.parameters()))


def test_sharded_weights_are_read(tmp_path):
    theirs = random_t5(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    a, b = T5.from_pretrained(tmp_path / "whole"), T5.from_pretrained(tmp_path / "shards")
    assert torch.equal(a(SOURCE, TARGETS), b(SOURCE, TARGETS))


def test_greedy_decoding_matches_transformers_generate(tmp_path):
    theirs = random_t5(tmp_path)
    expected = theirs.generate(input_ids=SOURCE, attention_mask=(SOURCE != 0).long(), do_sample=False, max_new_tokens=8,
                               eos_token_id=1, pad_token_id=0)[:, 1:].tolist()
    ours = greedy_decode(T5.from_pretrained(tmp_path), SOURCE, start=0, stop=1, max_new_tokens=8)
    assert ours == [row[:row.index(1)] if 1 in row else row for row in expected]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("n_buckets, max_distance", [(32, 128), (8, 12), (64, 256), (16, 128), (4, 8)])
def test_buckets_match_transformers_and_the_naive_ones(bidirectional, n_buckets, max_distance):
    distances = torch.arange(-300, 301)
    ours = relative_position_bucket(distances, bidirectional, n_buckets, max_distance)
    assert torch.equal(ours, T5Attention._relative_position_bucket(distances, bidirectional, n_buckets, max_distance))
    assert ours.tolist() == [naive_bucket(d, bidirectional, n_buckets, max_distance) for d in distances.tolist()]
    assert set(ours.tolist()) == set(range(n_buckets)) - ({n_buckets // 2} if bidirectional else set())  # 0 counts to the left


@pytest.mark.parametrize("name, published", [("small", 60e6), ("base", 220e6), ("large", 770e6), ("3b", 2.8e9), ("11b", 11e9)])
def test_preset_sizes_match_the_published_ones(name, published):
    with torch.device("meta"):
        counted = sum(p.numel() for p in T5(PRESETS[name]).parameters())
    # the paper's figures are rounded, 738 million to 770 most of all
    assert counted == pytest.approx(published, rel=0.05)


# --- invariants -----------------------------------------------------------------------------

@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1), (3, 2), (1, 3, 1)])
def test_cached_logits_match_uncached(pieces):
    model, inputs = tiny(), shift_right(TARGETS)
    memory, cache = model.encode(SOURCE), model.new_cache()
    parts = [model.decode(piece, *memory, cache) for piece in inputs.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(SOURCE, inputs), atol=1e-6, rtol=1e-6)  # norms are fp32


def test_padding_changes_nothing():
    model, inputs = tiny(), shift_right(TARGETS)
    together = model(F.pad(SOURCE, (0, 3)), inputs)
    for i, source in enumerate(SOURCE):
        alone = model(source[source != 0][None], inputs[i:i + 1])[0]
        torch.testing.assert_close(together[i], alone, atol=1e-6, rtol=1e-6)


def test_no_target_sees_the_future():
    model, inputs = tiny(), shift_right(TARGETS)
    changed = inputs.clone()
    changed[0, 3] = 11
    before, after = model(SOURCE, inputs)[0], model(SOURCE, changed)[0]
    assert torch.equal(before[:3], after[:3]) and not torch.allclose(before[3:], after[3:])


def test_the_encoder_knows_distances_and_no_places():
    model = tiny()
    memory, _ = model.encode(torch.tensor([[5, 8, 9, 5, 7]]))
    assert not torch.allclose(memory[0, 0], memory[0, 3])  # the words around it are at other distances
    with torch.no_grad():
        model.encoder.position_bias.bias.weight.zero_()
    memory, _ = model.encode(torch.tensor([[5, 8, 9, 7]]))
    turned, _ = model.encode(torch.tensor([[7, 9, 8, 5]]))
    torch.testing.assert_close(memory.flip(1), turned, atol=1e-6, rtol=1e-6)  # without the bias: a bag of words


def test_a_long_text_needs_no_table_of_positions():
    assert tiny()(torch.full((1, 700), 5), TARGETS[:1]).isfinite().all()


@pytest.mark.parametrize("tied", [True, False])
def test_initial_loss_is_about_ln_v_plus_one_half(tied):
    config = dataclasses.replace(TINY, vocab_size=500, d_model=64, d_ff=256, d_head=16, n_heads=4, tied=tied)
    model = T5(config, torch.Generator().manual_seed(0))
    targets = torch.randint(2, 500, (8, 40), generator=torch.Generator().manual_seed(1))
    loss = target_loss(model(targets, shift_right(targets)), targets)
    assert loss.item() == pytest.approx(math.log(500) + 0.5, abs=0.25)  # logits of variance 1
    assert torch.equal(T5(config, torch.Generator().manual_seed(0)).embedding.weight, model.embedding.weight)


def test_dropout_changes_something():
    model = T5(dataclasses.replace(TINY, dropout=0.5))
    assert not torch.equal(model(SOURCE, TARGETS), model(SOURCE, TARGETS))
    assert torch.equal(model.eval()(SOURCE, TARGETS), model(SOURCE, TARGETS))


# --- bad input ------------------------------------------------------------------------------

@pytest.mark.parametrize("bad, message", [
    (dict(n_heads=0), "n_heads must be a whole number and at least 1, got 0"),
    (dict(d_head=2.5), "d_head must be a whole number and at least 1, got 2.5"),
    (dict(n_buckets=30), "n_buckets must be a multiple of 4 .* got 30 buckets"),
    (dict(max_distance=16), "less than twice max_distance, got 32 buckets and distance 16"),
    (dict(dropout=-0.1), r"dropout must be in \[0, 1\), got -0.1"),
    (dict(eos=32128), "eos must be an id of the vocabulary, in 0 .. 32127, got 32128")])
def test_impossible_sizes_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        T5Config(**bad)


@pytest.mark.parametrize("source, inputs, message", [
    (torch.tensor([[1, 37]]), TARGETS[:1], "token ids 1 .. 37 are not all in the vocabulary, 0 .. 36"),
    (SOURCE, TARGETS - 1, "token ids -1 .. 8 are not all in the vocabulary, 0 .. 36"),
    (SOURCE[0], TARGETS, r"tokens must be \(B, T\) and not empty, got shape \(7,\)"),
    (SOURCE, TARGETS[:, :0], r"tokens must be \(B, T\) and not empty, got shape \(3, 0\)"),
    (SOURCE[:2], TARGETS, "source and inputs must have as many rows, got 2 and 3"),
    (torch.tensor([[1, 2], [0, 0]]), TARGETS[:2], "row 1 of the source is nothing but padding")])
def test_tokens_that_cannot_be_are_refused(source, inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny()(source, inputs)


def test_a_loss_of_wrong_shapes_or_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"logits \(3, 4, 9\) and targets \(3, 5\) do not fit"):
        target_loss(torch.randn(3, 4, 9), TARGETS)
    with pytest.raises(ValueError, match="all 15 targets are padding"):
        target_loss(torch.randn(3, 5, 9), torch.zeros_like(TARGETS))


def rewrite(folder, change):
    """Save the tensors again after ``change`` has been at their dictionary."""
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_extra_and_misshapen_tensors_are_all_named(tmp_path):
    random_t5(tmp_path)

    def spoil(tensors):
        del tensors["encoder.block.1.layer.0.SelfAttention.k.weight"], tensors["decoder.final_layer_norm.weight"]
        tensors["decoder.block.2.layer.0.SelfAttention.q.weight"] = torch.zeros(24, 16)
        tensors["encoder.block.0.layer.1.DenseReluDense.wo.weight"] = torch.zeros(16, 25)

    rewrite(tmp_path, spoil)
    with pytest.raises(ValueError) as error:
        T5.from_pretrained(tmp_path)
    for part in ("encoder.block.1.layer.0.SelfAttention.k.weight is missing", "decoder.final_layer_norm.weight is missing",
                 "decoder.block.2.layer.0.SelfAttention.q.weight is in no T5 of this config.json",
                 "encoder.block.0.layer.1.DenseReluDense.wo.weight has shape (16, 25), config.json says (16, 24)"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_copies_of_the_embedding_have_to_be_copies_and_the_unused_bias_is_a_warning(tmp_path):
    theirs = random_t5(tmp_path)
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors["shared.weight"].clone(),
                                                      "lm_head.weight": tensors["shared.weight"].clone(), unused: torch.zeros(8, 3)}))
    with pytest.warns(UserWarning, match="EncDecAttention.relative_attention_bias.weight is left out"):
        ours = T5.from_pretrained(tmp_path)
    torch.testing.assert_close(ours(SOURCE, TARGETS)[0], theirs(input_ids=SOURCE[:1], decoder_input_ids=TARGETS[:1]).logits[0], **FP32)
    rewrite(tmp_path, lambda tensors: (tensors.pop(unused), tensors["lm_head.weight"].add_(1.0)))
    with pytest.raises(ValueError, match="lm_head.weight is not the same as shared.weight"):
        T5.from_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: (tensors.pop("lm_head.weight"), tensors["encoder.embed_tokens.weight"].add_(1.0)))
    with pytest.raises(ValueError, match="encoder.embed_tokens.weight is not the same as shared.weight"):
        T5.from_pretrained(tmp_path)


def test_foreign_and_broken_directories_are_refused(tmp_path):
    random_t5(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (({"model_type": "gpt2"}, "model_type is 'gpt2', not 't5'"),
                             ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'"),
                             ({"num_heads": "3"}, "config.json: n_heads must be a whole number"),
                             ({"d_ff": 32}, r"wi.weight has shape \(24, 16\), config.json says \(32, 16\)")):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            T5.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no Hugging Face T5: config.json"):
        T5.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors: .*damaged or cut short"):
        T5.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model\\*.safetensors is there"):
        T5.from_pretrained(tmp_path)


# --- the demo -------------------------------------------------------------------------------

def test_demo_ends_on_its_verdict_and_its_flags_change_something(capsys, monkeypatch):
    monkeypatch.setattr(t5, "PRESETS", dict.fromkeys(PRESETS, TINY))  # the real ones take their time
    outputs = []
    for flags in (dict(), dict(steps=2), dict(version="1.1"), dict(seed=1)):
        t5.main(**dict(steps=1, version="1.0", seed=0) | flags)
        outputs.append(capsys.readouterr().out)
        assert " of 4 answers right (expected all)" in outputs[-1].splitlines()[-1]
    assert len(set(outputs)) == 4


@pytest.mark.parametrize("flag, value", [("--steps", "0"), ("--steps", "x"), ("--seed", "-1"), ("--version", "2")])
def test_bad_flags_are_one_line(flag, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["t5.py", flag, value])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(t5.__file__, run_name="__main__")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and message.startswith("t5.py: ") and flag in message
