"""BERT against transformers' Bert* classes on random weights: every output, gradients, files both ways."""

import argparse
import csv
import dataclasses
import gzip
import heapq
import inspect
import json
import random
import re
import runpy
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F

import bert
from bert import (BERT, PRESETS, BERTClassifier, BERTConfig, BERTForPretraining, BERTSpans, BERTTagger,
                  bidirectional_attention, naive_bidirectional_attention)

transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="pip install -r tests/requirements.txt")

TINY = BERTConfig(vocab_size=61, context=24, n_layers=3, n_heads=4, d_model=32, n_labels=3)
MODELS = [BERT, BERTForPretraining, BERTClassifier, BERTSpans, BERTTagger]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(cls=BERT, seed=0, **changes):
    return cls(dataclasses.replace(TINY, **changes), generator=seeded(seed)).eval()


def inputs(batch=3, length=9, seed=1, lengths=(9, 4, 1)):
    """tokens, segments, real with rows of these lengths."""
    tokens = torch.randint(1, 61, (batch, length), generator=seeded(seed))
    segments = (torch.arange(length) >= length // 2).long().expand(batch, -1).contiguous()
    real = torch.arange(length) < torch.tensor(lengths)[:, None]
    return tokens.masked_fill(~real, 0), segments, real


def random_bert(folder, architecture, seed=0, **changes):
    """One of transformers' classes with every parameter random (its own start has zero biases), saved to a folder."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=61, max_position_embeddings=24, num_hidden_layers=3, num_attention_heads=4, hidden_size=32,
                 intermediate_size=128, num_labels=3)
    if architecture == "BertForQuestionAnswering":
        sizes["num_labels"] = 2
    model = getattr(transformers, architecture)(transformers.BertConfig(**(sizes | changes))).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    return model


def their_outputs(model, tokens, segments, real):
    out = model(input_ids=tokens, token_type_ids=segments, attention_mask=None if real is None else real.long())
    if hasattr(out, "pooler_output"):
        return [out.last_hidden_state, out.pooler_output]
    if hasattr(out, "seq_relationship_logits"):
        return [out.prediction_logits, out.seq_relationship_logits]
    return [torch.stack((out.start_logits, out.end_logits), -1)] if hasattr(out, "start_logits") else [out.logits]


def our_outputs(model, *batch):
    out = model(*batch)
    if isinstance(model, BERT):
        return [out, model.pool(out)]
    return list(out) if isinstance(out, tuple) else [out]


# --- against transformers -------------------------------------------------------------------

@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("cls", MODELS)
def test_every_output_matches_transformers(cls, padded, tmp_path):
    theirs = random_bert(tmp_path, cls.architecture)
    ours = cls.from_pretrained(tmp_path)
    tokens, segments, real = inputs()
    batch = (tokens, segments, real if padded else None)
    for a, b in zip(our_outputs(ours, *batch), their_outputs(theirs, *batch), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # fp32, values up to 10; at padded positions, too
    for a, b in zip(our_outputs(ours.double(), *batch), their_outputs(theirs.double(), *batch), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("changes", [{"intermediate_size": 48}, {"num_attention_heads": 1, "num_hidden_layers": 1},
                                     {"max_position_embeddings": 9}, {"type_vocab_size": 3}])
def test_other_sizes_match_transformers(changes, tmp_path):
    theirs = random_bert(tmp_path, "BertForPreTraining", **changes)
    batch = inputs()
    for a, b in zip(our_outputs(BERTForPretraining.from_pretrained(tmp_path), *batch), their_outputs(theirs, *batch), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_gradients_match_transformers(tmp_path):
    theirs = random_bert(tmp_path, "BertForPreTraining").double()
    ours = BERTForPretraining.from_pretrained(tmp_path).double()
    tokens, segments, real = inputs()
    targets, labels = torch.where(real & (torch.rand(3, 9, generator=seeded()) < 0.5), tokens, -100), torch.tensor([0, 1, 1])
    theirs(tokens, token_type_ids=segments, attention_mask=real.long(), labels=targets, next_sentence_label=labels).loss.backward()
    masked, following = ours(tokens, segments, real, targets != -100)
    (F.cross_entropy(masked, targets[targets != -100]) + F.cross_entropy(following, labels)).backward()
    for name, p, names in bert._hugging_face(ours):
        grads = [theirs.get_parameter(n if n.startswith("cls.") else "bert." + n).grad for n in names]
        grad = torch.cat(grads)
        if len(names) == 3:
            grad = grad.unflatten(0, (3, 4, -1)).transpose(0, 1).flatten(0, 2)
        torch.testing.assert_close(p.grad, grad, atol=1e-12, rtol=1e-9, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("cls", MODELS)
def test_transformers_loads_what_we_save(cls, tmp_path):
    ours = tiny(cls, n_labels=2 if cls is BERTSpans else 3)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(0.0, 0.2, generator=seeded(3))
    ours.save_pretrained(tmp_path)
    theirs, report = getattr(transformers, cls.architecture).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = inputs()
    for a, b in zip(our_outputs(ours, *batch), their_outputs(theirs.eval(), *batch), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cls", MODELS)
def test_saved_and_loaded_is_bit_for_bit_the_same(cls, tmp_path):
    ours = tiny(cls)
    ours.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    assert again.config == ours.config and not again.training
    for (name, a), (_, b) in zip(ours.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_sharded_weights_and_older_names_are_read(tmp_path):
    theirs = random_bert(tmp_path, "BertForPreTraining")
    w = safetensors_torch.load_file(tmp_path / "model.safetensors")
    w = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x for name, x in w.items()}
    w["bert.embeddings.position_ids"] = torch.arange(24)[None]
    w["cls.predictions.decoder.weight"] = w["bert.embeddings.word_embeddings.weight"].clone()
    w["cls.predictions.decoder.bias"] = w["cls.predictions.bias"].clone()
    names = sorted(w)
    (tmp_path / "model.safetensors").unlink()
    for i, part in enumerate((names[::2], names[1::2]), 1):
        safetensors_torch.save_file({name: w[name] for name in part}, tmp_path / f"model-0000{i}-of-00002.safetensors")
    batch = inputs()
    for a, b in zip(our_outputs(BERTForPretraining.from_pretrained(tmp_path), *batch), their_outputs(theirs, *batch), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_first_losses_of_training_match_transformers(tmp_path):
    # No dropout: their masks are drawn in another order.
    theirs = random_bert(tmp_path, "BertForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    ours = BERTClassifier.from_pretrained(tmp_path).train()
    tokens, segments, real = inputs()
    labels, losses = torch.tensor([2, 0, 1]), ([], [])
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-3) for model in (ours, theirs)]
    for _ in range(4):
        for found, loss, optimizer in zip(losses, (F.cross_entropy(ours(tokens, segments, real), labels),
                                                   theirs(tokens, token_type_ids=segments, attention_mask=real.long(), labels=labels).loss),
                                          optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][-1] < losses[0][0]  # Adam divides rounding by small gradients


# --- attention, padding, segments -----------------------------------------------------------

@pytest.mark.parametrize("padded", [True, False])
def test_fast_attention_matches_naive_forward_and_gradients(padded):
    q, k, v = (torch.randn(3, 2, 9, 4, dtype=torch.float64, generator=seeded(i), requires_grad=True) for i in range(3))
    real = inputs()[2] if padded else None
    a, b = (f(q, k, v, real) for f in (bidirectional_attention, naive_bidirectional_attention))
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    for x, y in zip(torch.autograd.grad(a.square().sum(), (q, k, v)), torch.autograd.grad(b.square().sum(), (q, k, v))):
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("attention", [bidirectional_attention, naive_bidirectional_attention])
def test_attention_dropout_keeps_the_mean(attention):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 8, 4).unbind()
    mean = torch.stack([attention(q, k, v, None, 0.3) for _ in range(2000)]).mean(0)
    assert not torch.equal(attention(q, k, v, None, 0.3), attention(q, k, v))
    torch.testing.assert_close(mean, attention(q, k, v), atol=0.06, rtol=0)  # sd of one about 0.5: 0.011 of the mean


def test_padding_changes_nothing_for_real_tokens():
    model = tiny(BERTTagger).double()
    tokens, segments, real = inputs()
    together = model(tokens, segments, real)
    for row, length in enumerate((9, 4, 1)):
        alone = model(tokens[row:row + 1, :length], segments[row:row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], atol=1e-12, rtol=0)


def test_every_token_sees_both_directions_and_its_segment():
    model = tiny().double()
    tokens, segments, _ = inputs(1, 9, lengths=(9,))
    base, changed = model(tokens, segments), tokens.clone()
    changed[0, 4] = tokens[0, 4] % 60 + 1
    assert ((model(changed, segments) - base).abs().amax(-1) > 1e-8).all()
    assert ((model(tokens, 1 - segments) - base).abs().amax(-1) > 1e-8).all()
    assert torch.equal(model(tokens), model(tokens, torch.zeros_like(tokens)))


def test_logits_at_hidden_positions_alone_are_the_same():
    model = tiny(BERTForPretraining)
    tokens, segments, real = inputs()
    hidden = real & (tokens % 2 == 0)
    every, following = model(tokens, segments, real)
    some, again = model(tokens, segments, real, hidden)
    torch.testing.assert_close(some, every[hidden], atol=1e-5, rtol=0)
    assert torch.equal(following, again)


def test_the_decoder_is_tied_to_the_embedding():
    model = tiny(BERTForPretraining)
    tokens = inputs()[0]
    absent = next(i for i in range(61) if i not in tokens)  # its gradient comes by the decoder alone
    masked, following = model(tokens)
    (masked.square().sum() + following.square().sum()).backward()
    assert model.bert.token_embedding.weight.grad[absent].any() and all(p.grad is not None for p in model.parameters())
    assert sum(p.size(0) == 61 and p.dim() == 2 for p in model.parameters()) == 1


# --- start, sizes, cutting ------------------------------------------------------------------

@pytest.mark.parametrize("name, encoder, published", [("bert-base", 109482240, 110e6), ("bert-large", 335141888, 340e6)])
def test_presets_have_the_published_sizes(name, encoder, published):
    with torch.device("meta"):
        model = BERTForPretraining(PRESETS[name])
        theirs = transformers.BertForPreTraining(transformers.BertConfig(
            hidden_size=PRESETS[name].d_model, num_hidden_layers=PRESETS[name].n_layers,
            num_attention_heads=PRESETS[name].n_heads, intermediate_size=PRESETS[name].d_ff))
    assert sum(p.numel() for p in model.bert.parameters()) == encoder == pytest.approx(published, rel=0.02)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_initialisation_is_the_papers():
    for name, p in tiny(BERTForPretraining, d_model=256).named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif "norm" in name:
            assert (p == 1).all()
        elif p.numel() > 6000:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name


def test_same_generator_same_weights_and_dropout_changes_something():
    a, b, c = tiny(BERTTagger), tiny(BERTTagger), tiny(BERTTagger, seed=1)
    tokens = inputs()[0]
    assert torch.equal(a(tokens), b(tokens)) and not torch.equal(a(tokens), c(tokens))
    for only in ("dropout", "attention_dropout"):
        off = {"dropout": 0.0, "attention_dropout": 0.0}
        torch.manual_seed(0)
        assert not torch.equal(tiny(**(off | {only: 0.5})).train()(tokens), tiny(**off).train()(tokens))
        assert torch.equal(tiny(**off).train()(tokens), tiny()(tokens))


def test_a_task_starts_from_a_copy_of_the_encoder():
    pretrained = tiny(BERTForPretraining)
    for cls in (BERTClassifier, BERTSpans, BERTTagger):
        model = cls(TINY, pretrained.bert, seeded(5)).eval()
        tokens = inputs()[0]
        assert torch.equal(model.bert(tokens), pretrained.bert(tokens))
        with torch.no_grad():
            model.bert.token_embedding.weight.zero_()
        assert pretrained.bert.token_embedding.weight.any()
        assert (model.bert.pooler is not None) == (cls is BERTClassifier)
    with pytest.raises(ValueError, match="the encoder is none of this config: token_embedding.weight"):
        BERTTagger(dataclasses.replace(TINY, vocab_size=60), pretrained.bert)
    with pytest.raises(ValueError, match="the encoder is none of this config: pooler.weight, pooler.bias"):
        BERTClassifier(TINY, BERTTagger(TINY).bert)


def test_the_tensor_parallel_plan_names_every_parameter_it_cuts():
    """Blocks cut by heads and by columns of the hidden layer, as the plan says, add up to the whole."""
    model = tiny(BERTForPretraining).double()
    names = [name for name, _ in model.named_parameters()]
    assert BERTForPretraining.tp_plan == BERTTagger.tp_plan == BERT.tp_plan
    for suffix in BERT.tp_plan:
        assert any(name.endswith(suffix) for name in names), suffix
    block, x, real = model.bert.blocks[0], torch.randn(3, 9, 32, dtype=torch.float64, generator=seeded()), inputs()[2]

    def part(module, rank, P=2):
        shard = type(module)(TINY).double().eval()
        for name, p in module.named_parameters():
            cut = next((how for suffix, how in BERT.tp_plan.items() if suffix.endswith(name)), None)
            q = p.chunk(P, 0 if cut == "column" else 1)[rank] if cut in ("column", "row") else p if name.endswith("weight") else p / P
            owner, last = shard.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            setattr(owner, last, torch.nn.Parameter(q.detach().clone()))
        return shard

    for module, args in ((block.attention, (x, real)), (block.mlp, (x,))):
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.normal_(0.0, 0.2, generator=seeded(2))
        whole = sum(part(module, rank)(*args) for rank in range(2))
        torch.testing.assert_close(whole, module(*args), atol=1e-12, rtol=0)


# --- bad input ------------------------------------------------------------------------------

@pytest.mark.parametrize("bad, message", [
    ({"d_model": 30}, "n_heads must divide d_model, got 4 heads and width 30"), ({"n_layers": 0}, "n_layers must be a whole number"),
    ({"vocab_size": 6.5}, "vocab_size must be"), ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ({"attention_dropout": -0.1}, "attention_dropout must be"), ({"n_labels": 0}, "n_labels must be"),
    ({"initializer_range": 0.0}, "initializer_range must be above 0, got 0.0")])
def test_impossible_sizes_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **bad)


@pytest.mark.parametrize("batch, message", [
    ((torch.ones(5, dtype=torch.long),), r"tokens must be \(B, T\) and not empty, got shape \(5,\)"),
    ((torch.ones(1, 0, dtype=torch.long),), "not empty"),
    ((torch.ones(1, 25, dtype=torch.long),), "a sequence of 25 tokens does not fit a context of 24"),
    ((torch.tensor([[3, 61]]),), r"token ids 3 .. 61 are not all in 0 .. 60"), ((torch.tensor([[-1, 2]]),), "token ids -1 .. 2"),
    ((torch.ones(1, 3, dtype=torch.long), torch.full((1, 3), 2)), r"segment ids 2 .. 2 are not all in 0 .. 1"),
    ((torch.ones(1, 3, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)), r"tokens \(1, 3\) and segments \(1, 2\)"),
    ((torch.ones(1, 3, dtype=torch.long), None, torch.ones(1, 2, dtype=torch.bool)), r"real must be bool of shape \(1, 3\)"),
    ((torch.ones(1, 3, dtype=torch.long), None, torch.ones(1, 3)), "real must be bool"),
    ((torch.ones(2, 3, dtype=torch.long), None, torch.tensor([[True] * 3, [False] * 3])), "row 1 is nothing but padding")])
def test_inputs_that_do_not_fit_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        tiny()(*batch)


def test_all_missing_extra_and_misshapen_tensors_are_named(tmp_path):
    tiny(BERTTagger).save_pretrained(tmp_path)
    w = safetensors_torch.load_file(tmp_path / "model.safetensors")
    del w["bert.encoder.layer.0.attention.self.key.weight"], w["classifier.bias"]
    w["bert.encoder.layer.3.output.dense.bias"] = torch.zeros(32)
    w["bert.embeddings.position_ids"] = torch.arange(24).flip(0)  # not what it should be
    w["bert.embeddings.LayerNorm.weight"] = torch.ones(31)
    safetensors_torch.save_file(w, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as caught:
        BERTTagger.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path) in message
    for part in ("encoder.layer.0.attention.self.key.weight is missing", "classifier.bias is missing",
                 "encoder.layer.3.output.dense.bias is none of BERTTagger's", "embeddings.position_ids is none",
                 "embeddings.LayerNorm.weight has shape (31,), config.json says (32,)"):
        assert part in message


def test_another_models_directory_and_untied_decoders_are_refused(tmp_path):
    tiny(BERTForPretraining).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cls.seq_relationship.weight is none of BERT's"):
        BERT.from_pretrained(tmp_path)
    w = safetensors_torch.load_file(tmp_path / "model.safetensors")
    w["cls.predictions.decoder.weight"] = torch.zeros(61, 32)
    safetensors_torch.save_file(w, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="cls.predictions.decoder.weight is not the same as embeddings.word_embeddings.weight"):
        BERTForPretraining.from_pretrained(tmp_path)


def test_foreign_and_broken_directories_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is no Hugging Face BERT: config.json.*No such file"):
        BERT.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for cut in (len(whole) // 2, 100, 4):
        (tmp_path / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged or cut short"):
            BERT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, message in (("model_type", "roberta", "model_type = 'roberta'"), ("hidden_act", "relu", "hidden_act = 'relu'"),
                                ("layer_norm_eps", 1e-5, "layer_norm_eps"), ("hidden_size", 30, "n_heads must divide d_model"),
                                ("vocab_size", None, "vocab_size must be a whole number")):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(ValueError, match=message):
            BERT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is no Hugging Face BERT: config.json"):
        BERT.from_pretrained(tmp_path)


# --- demo -----------------------------------------------------------------------------------

def demo(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["bert.py", *map(str, flags)])
    runpy.run_path(bert.__file__, run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture
def small(monkeypatch):
    """The documentation of a few modules, one task, few held-out rows: the demo's path in a second."""
    import data
    import finetune
    import masked_lm
    import wordpiece
    train_wordpiece, make_tasks, accuracy = wordpiece.train_wordpiece, finetune.make_tasks, masked_lm.pretraining_accuracy
    some = [data._docstrings(inspect.getsource(module)) for module in (argparse, csv, gzip, heapq, inspect, random, shutil)]
    monkeypatch.setattr(data, "default_documents", lambda: some)
    monkeypatch.setattr(wordpiece, "train_wordpiece", lambda texts, size: train_wordpiece(texts, 600))  # words have pieces
    monkeypatch.setattr(finetune, "make_tasks", lambda *args: [dataclasses.replace(task, test=task.test[:8]) for task in make_tasks(*args)[3:]])
    monkeypatch.setattr(masked_lm, "pretraining_accuracy", lambda model, batches, n: accuracy(model, batches, 1))


def test_demo_ends_on_its_verdict_and_every_flag_changes_something(small, tmp_path, monkeypatch, capsys):
    base = ("--steps", 2, "--examples", 4)
    runs = [re.sub(r" +\d+ s\b", "", demo(monkeypatch, capsys, *base, *more))  # without the seconds
            for more in ((), (), ("--seed", 1), ("--steps", 3), ("--examples", 6, "--out", tmp_path / "saved"))]
    assert re.search(r"transfer: pre-training is ahead of the baseline and of training from scratch on [01] of 1 tasks", runs[0])
    assert re.search(r"step      1/2  loss [678]\.\d+ +\(expected ln V \+ ln 2 = 7\.\d+\)\n", runs[0])
    assert runs[0] == runs[1] and len(set(runs)) == 4  # the same seed gives the same run
    model = BERTForPretraining.from_pretrained(tmp_path / "saved")
    assert model.config.vocab_size == len((tmp_path / "saved" / "vocab.txt").read_text().splitlines())


@pytest.mark.parametrize("flags, message", [(("--steps", 0), "--steps and --examples must be at least 1 and --seed in 0 .. 2^32 - 1, got 0, 500 and 0")])
def test_bad_flags_are_one_line(flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        demo(monkeypatch, capsys, *flags)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1


def test_a_folder_that_cannot_be_made_is_told_before_training(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as caught:
        demo(monkeypatch, capsys, "--out", tmp_path / "file")
    out, error = capsys.readouterr()
    assert caught.value.code == 2 and "cannot be written (" in error and error.count("\n") == 1 and not out
