"""The Transformer against torch's layers, F.cross_entropy and transformers' schedule; its cache against doing without."""

import dataclasses
import math
import re
import runpy
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import pairs
import transformer
from bleu import bleu
from transformer import (MultiHeadAttention, Transformer, TransformerConfig, causal_mask, greedy_decode, label_smoothing_loss,
                         masked_attention, naive_label_smoothing_loss, naive_masked_attention, naive_positions,
                         sinusoidal_positions, warmup_learning_rate)

TINY = TransformerConfig(vocab_size=23, context=16, n_layers=2, n_heads=4, d_model=16, d_ff=40, dropout=0.0)
EXACT = dict(atol=1e-12, rtol=1e-10)  # float64: the same sums in another order
SOURCE = torch.tensor([[5, 3, 9, 2, 7], [4, 8, 0, 0, 0], [6, 1, 1, 12, 0]])
TARGETS = torch.tensor([[1, 7, 7, 2], [1, 9, 2, 0], [1, 3, 0, 0]])


def tiny(seed=0, **changes):
    """A model in float64 and evaluation mode, all parameters random (biases and norms too)."""
    torch.set_default_dtype(torch.float64)  # the table of positions too: .double() would widen its fp32 numbers
    try:
        model = Transformer(dataclasses.replace(TINY, **changes)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4, generator=generator)
    return model


# --- against torch --------------------------------------------------------------------------

def copy_attention(ours, theirs):
    theirs.in_proj_weight.copy_(torch.cat((ours.q.weight, ours.k.weight, ours.v.weight)))
    theirs.out_proj.weight.copy_(ours.out.weight)
    theirs.in_proj_bias.zero_()  # torch's projections have biases, the paper's do not
    theirs.out_proj.bias.zero_()


@torch.no_grad()
def torchs(model):
    """The same stacks from torch.nn, and pairs of (our parameter, their parameter)."""
    c = model.config
    sizes = dict(d_model=c.d_model, nhead=c.n_heads, dim_feedforward=c.d_ff, dropout=0.0, batch_first=True,
                 norm_first=c.norm_first, dtype=torch.float64)
    norm = (lambda: nn.LayerNorm(c.d_model, dtype=torch.float64)) if c.norm_first else (lambda: None)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes), c.n_layers, norm(), enable_nested_tensor=False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes), c.n_layers, norm())
    pairs = []
    for ours, theirs in [*zip(model.encoder, encoder.layers), *zip(model.decoder, decoder.layers)]:
        copy_attention(ours.self_attention, theirs.self_attn)
        pairs += [(ours.self_attention.out.weight, theirs.self_attn.out_proj.weight),
                  (ours.feed_forward.up.weight, theirs.linear1.weight), (ours.feed_forward.up.bias, theirs.linear1.bias),
                  (ours.feed_forward.down.weight, theirs.linear2.weight), (ours.feed_forward.down.bias, theirs.linear2.bias)]
        if hasattr(ours, "cross_attention"):
            copy_attention(ours.cross_attention, theirs.multihead_attn)
        for i, residual in enumerate(ours.residuals):
            norm_i = getattr(theirs, f"norm{i + 1}")
            pairs += [(residual.norm.weight, norm_i.weight), (residual.norm.bias, norm_i.bias)]
    if c.norm_first:
        pairs += [(ours.weight, theirs.weight) for ours, theirs in ((model.encoder_norm, encoder.norm), (model.decoder_norm, decoder.norm))]
        pairs += [(ours.bias, theirs.bias) for ours, theirs in ((model.encoder_norm, encoder.norm), (model.decoder_norm, decoder.norm))]
    for ours, theirs in pairs:
        theirs.copy_(ours)
    return encoder, decoder, pairs


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_logits_and_all_gradients_match_torchs_transformer(norm_first):
    model = tiny(norm_first=norm_first)
    encoder, decoder, pairs = torchs(model)
    embedding = model.target_embedding.weight.detach().clone().requires_grad_()
    assert model.positions.dtype == torch.float64

    def embed(tokens):
        return F.embedding(tokens, embedding) * 4.0 + naive_positions(16, 16)[:tokens.size(1)]  # sqrt(16) = 4

    padding = SOURCE == 0
    memory = encoder(embed(SOURCE), src_key_padding_mask=padding)
    T = TARGETS.size(1)
    x = decoder(embed(TARGETS), memory, tgt_mask=~causal_mask(T, T), memory_key_padding_mask=padding)
    theirs, ours = x @ embedding.t(), model(SOURCE, TARGETS)
    torch.testing.assert_close(ours, theirs, **EXACT)

    weights = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(model.target_embedding.weight.grad, embedding.grad, atol=1e-10, rtol=1e-9)
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, atol=1e-10, rtol=1e-9)  # summed over all positions
    for a, b in [*((x.self_attention, y.self_attn) for x, y in zip(model.encoder, encoder.layers)),
                 *((x.cross_attention, y.multihead_attn) for x, y in zip(model.decoder, decoder.layers))]:
        torch.testing.assert_close(torch.cat((a.q.weight.grad, a.k.weight.grad, a.v.weight.grad)), b.in_proj_weight.grad,
                                   atol=1e-10, rtol=1e-9)


def test_multi_head_attention_matches_torchs_and_the_heads_one_by_one():
    ours = MultiHeadAttention(12, 3, 4).double()
    theirs = nn.MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        copy_attention(ours, theirs)
    x, y = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x, y), theirs(x, y, y)[0], **EXACT)
    heads = []
    for h in range(3):  # head_h = Attention(X W^Q_h, Y W^K_h, Y W^V_h), each matrix a slice
        q, k, v = (z @ part.weight[4 * h:4 * h + 4].t() for z, part in ((x, ours.q), (y, ours.k), (y, ours.v)))
        heads.append(torch.softmax(q @ k.mT / 2, -1) @ v)
    torch.testing.assert_close(ours(x, y), torch.cat(heads, -1) @ ours.out.weight.t(), **EXACT)


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_fast_attention_matches_the_naive_one_and_brute_force(kind):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64, generator=g, requires_grad=True) for n in (5, 6, 6))
    mask = {"none": None, "bool": torch.rand(2, 1, 5, 6, generator=g) > 0.4,
            "float": torch.randn(1, 3, 5, 6, dtype=torch.float64, generator=g)}[kind]
    if kind == "bool":
        mask[..., 0] = True  # something to look at
    results = [f(q, k, v, mask, scale) for scale in (None, 1.0) for f in (naive_masked_attention, masked_attention)]
    for a, b in (results[:2], results[2:]):
        torch.testing.assert_close(a, b, **EXACT)
        for x, y in zip(torch.autograd.grad(a.square().sum(), (q, k, v), retain_graph=True),
                        torch.autograd.grad(b.square().sum(), (q, k, v), retain_graph=True)):
            torch.testing.assert_close(x, y, **EXACT)
    b, h, t = 1, 2, 3
    weights = []
    for s in range(6):
        score = math.exp(float(q[b, h, t].detach() @ k[b, h, s].detach()) / 2 + (float(mask[0, h, t, s]) if kind == "float" else 0))
        weights.append(score if kind != "bool" or mask[b, 0, t, s] else 0.0)
    expected = sum(w / sum(weights) * v[b, h, s] for s, w in enumerate(weights))
    torch.testing.assert_close(results[0][b, h, t], expected, **EXACT)


# --- positions ------------------------------------------------------------------------------

def test_positions_match_the_formula_number_by_number():
    torch.testing.assert_close(sinusoidal_positions(50, 12), naive_positions(50, 12), atol=1e-12, rtol=0)


def test_products_of_positions_depend_on_their_distance_alone():
    table = sinusoidal_positions(40, 32)
    products = table @ table.t()
    for distance in (1, 7):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-10, rtol=0)


# --- invariants of the model ----------------------------------------------------------------

@pytest.mark.parametrize("norm_first", [False, True])
def test_no_target_sees_the_future_and_all_see_the_whole_source(norm_first):
    model = tiny(norm_first=norm_first)
    before = model(SOURCE, TARGETS)
    changed = TARGETS.clone()
    changed[0, 2] = 11
    after = model(SOURCE, changed)
    assert torch.equal(before[0, :2], after[0, :2]) and not torch.allclose(before[0, 2:], after[0, 2:])
    changed = SOURCE.clone()
    changed[0, -1] = 11
    assert (model(changed, TARGETS)[0] - before[0]).abs().amax(-1).min() > 1e-6


def test_padding_changes_nothing():
    model = tiny()
    together = model(SOURCE, TARGETS)
    for i, (source, targets) in enumerate(zip(SOURCE, TARGETS)):
        source, targets = source[source != 0][None], targets[targets != 0][None]
        torch.testing.assert_close(together[i, :targets.size(1)], model(source, targets)[0], **EXACT)
    torch.testing.assert_close(model(F.pad(SOURCE, (0, 4)), F.pad(TARGETS, (0, 2)))[:, :4], together, **EXACT)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("pieces", [(1, 1, 1, 1), (3, 1), (1, 2, 1)])
def test_cached_logits_match_uncached(norm_first, pieces):
    model = tiny(norm_first=norm_first)
    memory, cache = model.encode(SOURCE), model.new_cache()
    parts = [model.decode(piece, *memory, cache) for piece in TARGETS.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(SOURCE, TARGETS), **EXACT)


def test_greedy_decoding_matches_the_whole_sequence_recomputed():
    for seed in range(4):
        model = tiny(seed=seed).train()
        expected = []
        for row in SOURCE:
            tokens = torch.tensor([[1]])
            for _ in range(9):
                tokens = torch.cat((tokens, model(row[row != 0][None], tokens)[:, -1:].argmax(-1)), 1)
                if tokens[0, -1] == 2:
                    break
            row = tokens[0, 1:].tolist()
            expected.append(row[:row.index(2)] if 2 in row else row)
        assert greedy_decode(model, SOURCE, start=1, stop=2, max_new_tokens=9) == expected
        assert model.training  # as it was
        stop = expected[0][min(3, len(expected[0]) - 1)]  # stopping in the middle of a row
        cut = greedy_decode(model, SOURCE, start=1, stop=stop, max_new_tokens=9)
        assert cut[0] == expected[0][:expected[0].index(stop)]


def test_one_vocabulary_has_one_matrix_and_two_have_two():
    shared, apart = tiny(), tiny(source_vocab_size=9)
    assert shared.source_embedding is shared.target_embedding
    assert apart.source_embedding.weight.shape == (9, 16) and apart.target_embedding.weight.shape == (23, 16)
    assert sum(p.numel() for p in apart.parameters()) - sum(p.numel() for p in shared.parameters()) == 9 * 16
    assert apart(SOURCE.clamp(max=8), TARGETS).shape == (3, 4, 23)


@pytest.mark.parametrize("config, published", [(transformer.BASE, 65e6), (transformer.BIG, 213e6)])
def test_sizes_match_the_papers_table_3(config, published):
    with torch.device("meta"):
        counted = sum(p.numel() for p in Transformer(config).parameters())
    assert counted == pytest.approx(published, rel=0.04)  # "about 37000" words, rounded to millions


def test_initial_logits_have_variance_one_and_generators_decide():
    make = lambda seed: Transformer(dataclasses.replace(TINY, d_model=64), torch.Generator().manual_seed(seed))
    a, b, c = make(0), make(0), make(1)
    assert torch.equal(a(SOURCE, TARGETS), b(SOURCE, TARGETS)) and not torch.equal(a(SOURCE, TARGETS), c(SOURCE, TARGETS))
    # the top LayerNorm's outputs have mean square 1, the 23 x 64 embedding entries variance 1/64
    assert a(SOURCE, TARGETS).std().item() == pytest.approx(1.0, abs=0.35)


def test_dropout_and_the_kind_of_norm_change_something():
    model = Transformer(dataclasses.replace(TINY, dropout=0.5))
    assert not torch.equal(model(SOURCE, TARGETS), model(SOURCE, TARGETS))
    assert torch.equal(model.eval()(SOURCE, TARGETS), model(SOURCE, TARGETS))
    post, pre = (Transformer(dataclasses.replace(TINY, norm_first=x), torch.Generator().manual_seed(0)) for x in (False, True))
    assert not torch.allclose(post(SOURCE, TARGETS), pre(SOURCE, TARGETS))


# --- the loss and the schedule --------------------------------------------------------------

@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6, 1.0])
def test_label_smoothing_matches_torchs_cross_entropy_and_the_naive_one(smoothing):
    logits = torch.randn(3, 4, 23, dtype=torch.float64, requires_grad=True)
    theirs = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), label_smoothing=smoothing, ignore_index=0)
    for ours in (label_smoothing_loss(logits, TARGETS, smoothing, pad=0), naive_label_smoothing_loss(logits, TARGETS, smoothing, 0)):
        torch.testing.assert_close(ours, theirs, **EXACT)
        torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(theirs, logits, retain_graph=True)[0], **EXACT)


def test_the_loss_is_computed_in_fp32_or_finer():
    logits = torch.randn(3, 4, 23)
    assert label_smoothing_loss(logits.bfloat16(), TARGETS).dtype == torch.float32
    assert label_smoothing_loss(logits.double(), TARGETS).dtype == torch.float64


def test_schedule_matches_transformers():
    transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=(512 * 40) ** -0.5)  # the peak's learning rate
    theirs = transformers.get_inverse_sqrt_schedule(optimizer, num_warmup_steps=40)
    rates = []
    for step in range(1, 200):
        optimizer.step()
        theirs.step()
        rates.append(warmup_learning_rate(step, 512, 40))
        assert rates[-1] == pytest.approx(theirs.get_last_lr()[0], rel=1e-12)
    assert max(rates) == rates[39]


# --- bad input ------------------------------------------------------------------------------

@pytest.mark.parametrize("bad, message", [
    (dict(n_heads=5), "n_heads must divide d_model, .* got 5 heads and width 512"),
    (dict(d_model=15, n_heads=3), "d_model be even .* got 3 heads and width 15"),
    (dict(n_layers=0), "n_layers must be a whole number and at least 1, got 0"),
    (dict(vocab_size=2.5), "vocab_size must be a whole number and at least 1, got 2.5"),
    (dict(source_vocab_size=0), "source_vocab_size must be a whole number and at least 1, got 0"),
    (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
    (dict(pad=37000), "pad must be an id of the vocabulary, in 0 .. 36999, got 37000"),
    (dict(vocab_size=100, source_vocab_size=10, pad=50), "in 0 .. 9, got 50")])
def test_impossible_sizes_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**bad)


@pytest.mark.parametrize("source, targets, message", [
    (torch.tensor([[1, 23]]), TARGETS[:1], r"token ids 1 .. 23 are not all in the vocabulary, 0 .. 22"),
    (SOURCE, TARGETS - 1, r"token ids -1 .. 8 are not all in the vocabulary, 0 .. 22"),
    (torch.ones(1, 17, dtype=torch.long), TARGETS[:1], "a sequence of 17 tokens does not fit a context of 16"),
    (SOURCE[:1], torch.ones(1, 17, dtype=torch.long), "a sequence of 17 tokens does not fit a context of 16"),
    (SOURCE[0], TARGETS, r"tokens must be \(B, T\) and not empty, got shape \(5,\)"),
    (SOURCE, TARGETS[:, :0], r"tokens must be \(B, T\) and not empty, got shape \(3, 0\)"),
    (SOURCE[:2], TARGETS, "source and targets must have as many rows, got 2 and 3"),
    (torch.tensor([[1, 2], [0, 0]]), TARGETS[:2], "row 1 of the source is nothing but padding")])
def test_tokens_that_cannot_be_are_refused(source, targets, message):
    with pytest.raises(ValueError, match=message):
        tiny()(source, targets)


def test_the_context_is_kept_with_a_cache_too():
    model = tiny()
    with pytest.raises(ValueError, match="a sequence of 17 tokens does not fit a context of 16"):
        greedy_decode(model, SOURCE, start=1, stop=-1, max_new_tokens=17)
    assert len(greedy_decode(model, SOURCE, start=1, stop=-1, max_new_tokens=16)[0]) == 16


def test_losses_and_schedules_that_cannot_be_are_refused():
    logits = torch.randn(3, 4, 23)
    with pytest.raises(ValueError, match=r"logits \(3, 4, 23\) and targets \(4, 3\) do not fit"):
        label_smoothing_loss(logits, TARGETS.t())
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 1\], got 1.5"):
        label_smoothing_loss(logits, TARGETS, 1.5)
    with pytest.raises(ValueError, match="all 12 targets are padding"):
        label_smoothing_loss(logits, torch.zeros_like(TARGETS))
    for step, warmup in ((0, 10), (1, 0)):
        with pytest.raises(ValueError, match=f"must be at least 1, got {step} and {warmup}"):
            warmup_learning_rate(step, 512, warmup)


def test_an_error_in_decoding_leaves_the_model_in_training():
    model = tiny().train()
    with pytest.raises(ValueError, match="nothing but padding"):
        greedy_decode(model, SOURCE * 0, start=1, stop=2, max_new_tokens=3)
    assert model.training


def test_half_precision_stays_half_and_near():
    model = Transformer(TINY, torch.Generator().manual_seed(0)).eval()
    expected = model(SOURCE, TARGETS)
    for dtype in (torch.bfloat16, torch.float16):
        logits = model.to(dtype)(SOURCE, TARGETS)
        assert logits.dtype == dtype
        torch.testing.assert_close(logits.float(), expected, atol=0.15, rtol=0)  # 8 bits, two layers, logits of order 1
        assert label_smoothing_loss(logits, TARGETS).dtype == torch.float32


# --- the demo -------------------------------------------------------------------------------

DEMO = dict(data=None, language=None, post_norm=False, steps=2, warmup_steps=4, smoothing=0.1, text=None, seed=0)


def run_demo(capsys, **changes):
    transformer.main(**DEMO | changes)
    return re.sub(r" +\d+ s$", "", capsys.readouterr().out, flags=re.MULTILINE)


def test_demo_ends_on_its_verdict_and_every_flag_changes_something(capsys, monkeypatch, tmp_path):
    generate = pairs.generate_pairs
    monkeypatch.setattr(pairs, "generate_pairs", lambda count, language, seed: generate(40, language, 1, seed))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    before = run_demo(capsys)
    for name in ("Transformer, pre-norm", "LSTM, no attention", "LSTM, dot attention"):
        assert re.search(rf"^{name} +\d+\.\d +\d+\.\d$", before, re.MULTILINE)
    assert re.fullmatch(r"better than both in both: (True|False) \(expected True\)", before.splitlines()[-1])
    lines = [f"number {i} here\tnummer {i} hier\tCC-BY" for i in range(30)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    for changes in (dict(data=str(tmp_path / "pairs.tsv")), dict(language="german"), dict(post_norm=True), dict(steps=4),
                    dict(warmup_steps=1), dict(smoothing=0.5), dict(text="twenty-two"), dict(seed=1)):
        assert run_demo(capsys, **changes) != before, changes
    assert run_demo(capsys) == before  # the same seed, the same run


def test_training_learns_and_keeps_the_mean_of_its_last_weights():
    corpus = pairs.generate_pairs(60, max_items=1, seed=1)
    vocabularies = tuple(pairs.build_vocabulary(side) for side in zip(*((p.source, p.target) for p in corpus)))
    config = TransformerConfig(len(vocabularies[1]), len(vocabularies[0]), 64, 1, 2, 32, 64, dropout=0.0)

    def trained(steps):
        model = Transformer(config, torch.Generator().manual_seed(0))
        return model, transformer.train(model, pairs.endless_batches(corpus, *vocabularies, 32, 0), steps, 60, 0.0)

    model, losses = trained(120)
    assert len(losses) == 120 and losses[-1] < losses[0] / 4
    references = [pairs.to_text(p.target) for p in corpus[:7]]
    translated = pairs.translate(lambda source, _: greedy_decode(model, source, pairs.START, pairs.END, 30),
                                 [pairs.to_text(p.source) for p in corpus[:7]], *vocabularies)
    assert bleu(translated, references) > 10
    thirteen, fourteen = trained(13)[0], trained(14)[0]  # 13 // 7 = 1 step, 14 // 7 = 2 steps averaged
    optimizer_only = Transformer(config, torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(optimizer_only.parameters(), betas=(0.9, 0.98), eps=1e-9)
    for step, (source, _, inputs, targets) in zip(range(1, 15), pairs.endless_batches(corpus, *vocabularies, 32, 0)):
        optimizer.zero_grad()
        label_smoothing_loss(optimizer_only(source, inputs), targets, 0.0).backward()
        optimizer.param_groups[0]["lr"] = 0.3 * warmup_learning_rate(step, 32, 60)
        optimizer.step()
        if step == 13:
            after_13 = [p.detach().clone() for p in optimizer_only.parameters()]
            for p, q in zip(after_13, thirteen.parameters()):
                torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)  # fused Adam rounds otherwise
    for p, q, r in zip(after_13, optimizer_only.parameters(), fourteen.parameters()):
        torch.testing.assert_close((p + q) / 2, r, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flags, message", [
    (["--steps", "1"], "--steps"), (["--steps", "x"], "--steps"), (["--warmup_steps", "0"], "--warmup_steps"),
    (["--label_smoothing", "2"], "--label_smoothing"), (["--label_smoothing", "nan"], "--label_smoothing"), (["--seed", "-1"], "--seed"),
    (["--language", "latin"], "--language"), (["--data", "missing.tsv"], "missing.tsv"),
    (["--data", "x.tsv", "--language", "german"], "give one of them"), (["--data", "{tmp}/two.tsv"], "only 2 pairs: give at least 5"),
    (["--data", "{tmp}/column.tsv"], "column.tsv, line 2"), (["--steps", "2", "--translate", "xyz"], "no known word")])
def test_bad_flags_are_one_line(flags, message, monkeypatch, capsys, tmp_path):
    (tmp_path / "two.tsv").write_text("a\tb\nc\td\n")
    (tmp_path / "column.tsv").write_text("a\tb\nc\n")
    monkeypatch.setattr(sys, "argv", ["transformer.py", *(flag.replace("{tmp}", str(tmp_path)) for flag in flags)])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(transformer.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("transformer.py: ") and message in error


def test_a_missing_neighbour_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rnn_nmt", None)  # as if the file were not there
    monkeypatch.setattr(sys, "argv", ["transformer.py"])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(transformer.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "rnn_nmt" in error and "beside this one" in error
