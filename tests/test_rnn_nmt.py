"""Translators against torch's layers word by word, and searches against brute force, in float64."""

import itertools
import math
import re
import runpy
import sys

import pytest
import torch
import torch.nn as nn
from conftest import ROOT

from pairs import Pair, build_vocabulary, endless_batches, generate_pairs, to_batch, to_ids, to_text, translate
from rnn import CELLS, Recurrent
from rnn_nmt import (END, PAD, START, SourceAttention, Translator, TranslatorConfig, attention_to, beam_translation,
                     greedy_translations, train, translation_loss)

EXACT = {"atol": 1e-12, "rtol": 0}  # float64, sums of a few dozen products in another order


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


# --- attention and the translator ---

def translator(attention="general", cell="lstm", feeding=False, D=6, V=(9, 8), scale=3.0):
    """A translator in float64, its weights scaled so that its predictions are far from uniform."""
    model = Translator(TranslatorConfig(*V, 5, D, cell, attention, feeding), Recurrent, seeded()).double()
    with torch.no_grad():
        for p in model.parameters():
            p *= scale
    return model


SOURCE = torch.tensor([[4, 5, 6, 7], [8, 4, PAD, PAD], [7, 7, 5, PAD]])
SOURCE_LENGTHS = torch.tensor([4, 2, 3])
INPUTS = torch.tensor([[START, 4, 5, 6, 7], [START, 7, 7, PAD, PAD], [START, 6, 4, 5, PAD]])
KINDS = ["dot", "general", "concat"]


@pytest.mark.parametrize("kind", KINDS)
def test_attention_matches_its_formula_word_by_word(kind):
    torch.manual_seed(0)
    attention, h, states = SourceAttention(kind, 6).double(), randn(2, 3, 6), randn(2, 4, 6, seed=1)
    inside = torch.tensor([[True] * 4, [True, True, False, False]])
    context, a = attention(h, attention.keys(states), states, inside)
    for b, t in itertools.product(range(2), range(3)):
        length = int(inside[b].sum())
        score = {"dot": lambda e: h[b, t] @ e,
                 "general": lambda e: h[b, t] @ attention.key.weight @ e,
                 "concat": lambda e: attention.v.weight[0] @ torch.tanh(
                     torch.cat((attention.query.weight, attention.key.weight), 1) @ torch.cat((h[b, t], e)))}[kind]
        weights = [score(e).exp().item() for e in states[b, :length]]
        expected = [w / sum(weights) for w in weights]
        torch.testing.assert_close(a[b, t, :length], torch.tensor(expected, dtype=torch.float64), **EXACT)
        assert not a[b, t, length:].any()
        torch.testing.assert_close(context[b, t], sum(w * e for w, e in zip(expected, states[b])), **EXACT)


def reference_logits(model, source, inputs):
    """One sentence, word by word, with torch's LSTM and LSTMCell: (T, V)."""
    config, weights = model.config, model.state_dict()
    encoder = nn.LSTM(config.d_embedding, config.d_model // 2, batch_first=True, bidirectional=True).double()
    encoder.load_state_dict({f"{name}{end}": weights[f"{layer}.{name}"] for layer, end in
                             (("forwards", ""), ("backwards", "_reverse")) for name in model.forwards.state_dict()})
    states, (h, c) = encoder(model.source_embedding(source)[None])
    cell = nn.LSTMCell(model.decoder.weight_ih_l0.size(1), config.d_model).double()
    cell.load_state_dict({name.removesuffix("_l0"): w for name, w in model.decoder.state_dict().items()})
    state, vector, logits = (h.flatten()[None], c.flatten()[None]), torch.zeros(1, config.d_model).double(), []
    for token in inputs:
        x = model.target_embedding(token)[None]
        state = cell(torch.cat((x, vector), -1) if config.input_feeding else x, state)
        seen = state[0]
        if config.attention:
            a = (seen @ model.attention.key.weight @ states[0].T).softmax(-1)  # (1, S)
            seen = torch.cat((a @ states[0], seen), -1)
        vector = torch.tanh(seen @ model.combine.weight.T)
        logits.append(model.head(vector)[0])
    return torch.stack(logits)


@pytest.mark.parametrize("attention, feeding", list(itertools.product((None, "general"), (False, True))))
def test_translator_matches_torch_word_by_word_with_gradients_and_ignores_padding(attention, feeding):
    model = translator(attention, feeding=feeding, scale=1.0)
    logits = model(SOURCE, SOURCE_LENGTHS, INPUTS)
    rows = [(int(length), int((row != PAD).sum())) for length, row in zip(SOURCE_LENGTHS, INPUTS)]
    expected = [reference_logits(model, SOURCE[b, :s], INPUTS[b, :t]) for b, (s, t) in enumerate(rows)]
    for b, (_, t) in enumerate(rows):
        torch.testing.assert_close(logits[b, :t], expected[b], **EXACT)
    # The reference's encoder and decoder are copies, so compare the gradients of what it shares with the model.
    shared = [p for name, p in model.named_parameters() if name.startswith(("head", "combine", "attention", "source", "target"))]
    for a, b in zip(torch.autograd.grad(sum(logits[b, :t].pow(2).sum() for b, (_, t) in enumerate(rows)), shared),
                    torch.autograd.grad(sum(e.pow(2).sum() for e in expected), shared), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)  # sums of squares over all words


@pytest.mark.parametrize("attention, cell, feeding", list(itertools.product((None, *KINDS), CELLS, (False, True))))
def test_decoding_word_by_word_is_decoding_at_once(attention, cell, feeding):
    model = translator(attention, cell, feeding)
    memory = model.encode(SOURCE, SOURCE_LENGTHS)
    whole, a, _ = model.decode(INPUTS, memory, model.start(memory))
    state, steps = model.start(memory), []
    for t in range(INPUTS.size(1)):
        logits, looked, state = model.decode(INPUTS[:, t:t + 1], memory, state)
        steps.append(logits)
        if attention:
            torch.testing.assert_close(looked[:, 0], a[:, t], **EXACT)
            torch.testing.assert_close(looked.sum(-1), torch.ones(3, 1).double(), **EXACT)
    torch.testing.assert_close(torch.cat(steps, 1), whole, **EXACT)
    assert (a is None) == (attention is None)


def test_without_attention_the_last_state_is_all_that_the_decoder_gets():
    for attention in (None, "general"):
        model = translator(attention)
        memory = model.encode(SOURCE, SOURCE_LENGTHS)
        changed = memory._replace(states=memory.states + 1, keys=memory.keys + 1)
        same = torch.equal(model.decode(INPUTS, memory, model.start(memory))[0],
                           model.decode(INPUTS, changed, model.start(changed))[0])
        assert same == (attention is None)
    assert sum(part[0].numel() for part in memory.state) == 12  # whatever the length


def test_input_feeding_changes_what_the_decoder_reads():
    model = translator(feeding=True)
    memory = model.encode(SOURCE, SOURCE_LENGTHS)
    state, vector = model.start(memory)
    first, second = (model.decode(INPUTS[:, :1], memory, (state, v))[0] for v in (vector, vector + 1))
    assert not vector.any() and (first - second).abs().max() > 1e-3


def test_scheduled_sampling_reads_true_words_or_own_ones():
    model = translator(V=(9, 8), scale=1.0)
    others = INPUTS.clone()
    others[:, 1:] = 5

    def logits(inputs, sampling, seed=0):
        return model(SOURCE, SOURCE_LENGTHS, inputs, sampling, seeded(seed))

    torch.testing.assert_close(logits(INPUTS, 1e-12), logits(INPUTS, 0.0), **EXACT)  # all coins say: the true word
    assert torch.equal(logits(INPUTS, 1.0), logits(others, 1.0))  # no true word is read
    assert not torch.equal(logits(INPUTS, 0.0), logits(others, 0.0))
    assert torch.equal(logits(INPUTS, 0.5), logits(INPUTS, 0.5))
    assert not torch.equal(logits(INPUTS, 1.0), logits(INPUTS, 1.0, seed=1))  # its words are drawn
    for bad in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"sampling must be in \[0, 1\], got {bad}"):
            logits(INPUTS, bad)


def test_scheduled_sampling_reads_own_words_as_often_as_it_says():
    model = translator(None, V=(9, 50), scale=0.0)  # predicts every word alike: its own are hardly ever the true one
    seen, decode = [], model.decode
    model.decode = lambda tokens, *rest: seen.append(tokens) or decode(tokens, *rest)
    model(SOURCE[:1].expand(400, 4), SOURCE_LENGTHS[:1].expand(400), torch.full((400, 6), 7), 0.3, seeded())
    true = torch.cat(seen, 1) == 7
    assert true[:, 0].all()
    # 2000 coins: the standard deviation is 0.010; an own word is the true one by chance in 1 of 50
    assert true[:, 1:].double().mean().item() == pytest.approx(0.7 + 0.3 / 50, abs=0.04)


def test_loss_matches_the_mean_log_probability_of_words_that_are_not_padding():
    logits, targets = randn(2, 3, 5), torch.tensor([[4, 2, PAD], [3, 4, 2]])
    log_p = [logits[b, t].log_softmax(-1)[targets[b, t]] for b in range(2) for t in range(3) if targets[b, t] != PAD]
    torch.testing.assert_close(translation_loss(logits, targets), -sum(log_p) / 5, **EXACT)
    with pytest.raises(ValueError, match=r"logits \(2, 3, 5\) and targets \(2, 2\)"):
        translation_loss(logits, targets[:, :2])


@pytest.mark.parametrize("change, message", [
    ({"source_vocab_size": 0}, "source_vocab_size must be at least 1, got 0"), ({"d_model": 7}, "d_model must be even"),
    ({"cell": "tree"}, "got 'tree'"), ({"attention": "bilinear"}, "got 'bilinear'"), ({"attention": ""}, "got ''")])
def test_a_translator_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Translator(TranslatorConfig(**{"source_vocab_size": 5, "target_vocab_size": 5} | change), Recurrent)


def test_shapes_that_do_not_fit_are_refused():
    model = translator()
    for source, lengths in ((SOURCE[0], SOURCE_LENGTHS), (SOURCE, SOURCE_LENGTHS[:2])):
        with pytest.raises(ValueError, match=r"source must be \(B, S\) and lengths \(B,\), got shapes "):
            model.encode(source, lengths)
    with pytest.raises(ValueError, match=r"the state of this lstm must be 2 of shape \(2, 6\), got \[\(3, 6\)"):
        model(SOURCE, SOURCE_LENGTHS, INPUTS[:2])  # of another batch
    with pytest.raises(ValueError, match="lengths must be 3 values in 1 .. 4"):
        greedy_translations(model, SOURCE, SOURCE_LENGTHS * 2)
    with pytest.raises(ValueError, match="max_words must be at least 1, got 0"):
        greedy_translations(model, SOURCE, SOURCE_LENGTHS, max_words=0)


# --- greedy and beam ---

@pytest.mark.parametrize("attention, feeding", [(None, False), ("concat", True)])
def test_batched_greedy_translations_match_one_sentence_at_a_time(attention, feeding):
    model = translator(attention, feeding=feeding)
    rows, matrices = greedy_translations(model, SOURCE, SOURCE_LENGTHS, max_words=7)
    for b, length in enumerate(SOURCE_LENGTHS.tolist()):
        expected = [START]
        while len(expected) < 8 and expected[-1] != END:
            logits = model(SOURCE[b:b + 1, :length], SOURCE_LENGTHS[b:b + 1], torch.tensor([expected]))
            expected.append(int(logits[0, -1].argmax()))
        assert rows[b] == [token for token in expected[1:] if token != END]
        assert attention is None or matrices[b].shape == (len(rows[b]), 4)
    assert (matrices is None) == (attention is None)
    assert all(len(row) <= 2 * 4 + 10 for row in greedy_translations(model, SOURCE, SOURCE_LENGTHS)[0])


def log_p_of(model, source, text):
    inputs = torch.tensor([[START, *text][:len(text)]])
    log_p = model(source[None], torch.tensor([len(source)]), inputs)[0].log_softmax(-1)
    return log_p[range(len(text)), text].sum().item()


@pytest.mark.parametrize("penalty, feeding", [(0.0, True), (0.6, False), (1.0, True)])
def test_a_wide_beam_finds_the_best_of_all_translations(penalty, feeding):
    model = translator(feeding=feeding, V=(9, 5), scale=2.0)  # END and four others
    for source in (SOURCE[0], SOURCE[1, :2]):
        whole = [(*words, END) for n in range(3) for words in itertools.product((0, 1, 3, 4), repeat=n)]
        whole += list(itertools.product((0, 1, 3, 4), repeat=3))  # those that are cut off
        score, best = max((log_p_of(model, source, text) / len(text) ** penalty, text) for text in whole)
        found, found_score = beam_translation(model, source, beams=300, max_words=3, length_penalty=penalty)
        assert found == [token for token in best if token != END]
        assert found_score == pytest.approx(score, abs=1e-12)


def test_a_beam_of_one_is_greedy_and_a_longer_penalty_makes_longer_translations():
    model = translator(V=(9, 6), scale=2.0)
    rows, _ = greedy_translations(model, SOURCE, SOURCE_LENGTHS, max_words=9)
    for source, length, row in zip(SOURCE, SOURCE_LENGTHS, rows):
        assert beam_translation(model, source[:length], 1, max_words=9, length_penalty=0.0)[0] == row
        short, long = (beam_translation(model, source[:length], 200, 4, penalty)[0] for penalty in (0.0, 2.0))
        assert len(short) <= len(long)
    with pytest.raises(ValueError, match=r"got 0, 18 and shape \(4,\)"):
        beam_translation(model, SOURCE[0], 0)
    with pytest.raises(ValueError, match=r"got 2, 16 and shape \(3, 4\)"):
        beam_translation(model, SOURCE, 2)


# --- training and translating ---

def small_model(pairs, attention="dot", steps=0, **options):
    vocabularies = tuple(build_vocabulary(side) for side in zip(*((pair.source, pair.target) for pair in pairs)))
    config = TranslatorConfig(*map(len, vocabularies), d_embedding=24, d_model=48, attention=attention)
    model = Translator(config, Recurrent, seeded())
    return model, vocabularies, train(model, endless_batches(pairs, *vocabularies, 64, 0), steps, **options)


def searches(model):
    return (lambda source, lengths: greedy_translations(model, source, lengths)[0],
            lambda source, lengths: [beam_translation(model, row[:n], 3)[0] for row, n in zip(source, lengths)])


def test_training_learns_a_few_sentences_by_heart_and_translates_them():
    pairs = generate_pairs(3, "german", max_items=1)
    model, vocabularies, losses = small_model(pairs, steps=80)
    assert losses[0] == pytest.approx(math.log(len(vocabularies[1])), abs=0.3) and losses[-1] < 0.5
    sources, targets = ([to_text(side) for side in sides] for sides in zip(*((p.source, p.target) for p in pairs)))
    for search in searches(model):
        assert translate(search, sources, *vocabularies) == targets
    once, again, sampled = (small_model(pairs, steps=3, sampling=sampling)[2] for sampling in (0.0, 0.0, 0.9))
    assert once == again != sampled


def test_sources_longer_than_any_trained_on_and_unknown_words_are_translated_in_bounded_length():
    pairs = generate_pairs(20, max_items=1)
    model, vocabularies, _ = small_model(pairs, steps=2)
    long = [word for pair in pairs for word in pair.source] + ["moon"]
    assert len(long) > 4 * max(len(pair.source) for pair in pairs)
    source, lengths = to_ids([long], vocabularies[0])
    for search in searches(model):
        assert 0 < len(search(source, lengths)[0]) <= 2 * len(long) + 10


def test_a_vocabulary_of_one_word_is_learned():
    pairs = [Pair(["ha"] * n, ["oh"] * n) for n in (1, 2, 3)]
    model, vocabularies, losses = small_model(pairs, steps=40)
    assert len(vocabularies[0]) == 5 and losses[-1] < losses[0]
    assert set(translate(searches(model)[0], ["ha ha"], *vocabularies)[0].split()) == {"oh"}


def test_attention_to_references_is_what_decoding_them_gives():
    pairs = generate_pairs(5)
    model, vocabularies, _ = small_model(pairs)
    for a, pair in zip(attention_to(model, to_batch(pairs, *vocabularies)), pairs, strict=True):
        (alone,) = attention_to(model, to_batch([pair], *vocabularies))
        assert a.shape == (len(pair.target), len(pair.source))
        torch.testing.assert_close(a, alone, atol=1e-6, rtol=0)  # float32, another batch
        torch.testing.assert_close(a.sum(-1), torch.ones(len(pair.target)), atol=1e-6, rtol=0)


# --- the program ---

def program(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["rnn_nmt.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "rnn_nmt.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture
def small(tmp_path, capsys, monkeypatch):
    """The program on thirty pairs with alignments unknown, a second or less."""
    lines = [f"{to_text(pair.source)}\t{to_text(pair.target)}" for pair in generate_pairs(30, max_items=1)]
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join(lines))
    return lambda *arguments: program(capsys, monkeypatch, "--data", path, "--steps", 1, *arguments)


def test_program_shows_both_problems_in_the_language_asked_for(capsys, monkeypatch):
    out = program(capsys, monkeypatch, "--steps", 1, "--language", "german")
    for part in ("no attention, % right", "dot attention, % right", "BLEU", "alignment error rate"):
        assert part in out
    assert re.search(r"^= .*(hundert|tausend|zig)", out, re.MULTILINE)
    assert re.search(r"the longest fifth: \d+% right without attention, \d+% with it \(expected more\)\n$", out)


def test_every_flag_changes_something(small, tmp_path):
    base = small()
    assert base == small() and "alignment error rate" not in base
    assert "general attention, % right" in small("--attention", "general")
    assert small("--seed", 1) != base
    translated = small("--translate", "one" + " one" * 19)
    assert "note: 20 words, and no sentence trained on has more than" in translated
    assert " one\ngreedy  " in translated and "\nbeam 4  " in translated
    assert small("--steps", 3, "--sampling", 1) != small("--steps", 3) != base
    assert "drawn: " in small("--plot", tmp_path / "nmt.png")
    assert (tmp_path / "nmt.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("arguments, message", [
    (["--steps", 0], "--steps must be at least 1"), (["--seed", -1], "--seed in 0"), (["--sampling", 1.5], r"--sampling in \[0, 1\]"),
    (["--language", "french"], "--language chooses the generated corpus and --data brings another"),
    (["--translate", ""], "sentence 0 is empty"), (["--translate", "blue moon"], "no known word: 'blue moon'"),
    (["--plot", "rnn"], "name a picture"), (["--plot", "no/folder.png"], "no/folder.png: cannot be drawn"), (["--plot", "{folder}"], "Is a directory"),
    (["--attention", "self"], "invalid choice"),
    (["--data", "missing.tsv"], "No such file"), (["--data", "{few}"], "only 4 pairs: give at least 5"),
    (["--data", "{broken}"], "broken.tsv, line 3: 1 of the columns"), (["--data", "{strange}"], "no held-out sentence")])
def test_program_answers_bad_input_in_one_line(small, tmp_path, capsys, arguments, message):
    files = {"few": "a\tb\n" * 4, "broken": "a\tb\nc\td\ne\n", "strange": "\n".join(f"{c}\t{c}" for c in "abcde")}
    for name, content in files.items():
        (tmp_path / f"{name}.tsv").write_text(content)
    paths = {name: tmp_path / f"{name}.tsv" for name in files} | {"folder": tmp_path / "folder.png"}
    paths["folder"].mkdir()
    with pytest.raises(SystemExit) as exit:
        small(*(str(argument).format(**paths) for argument in arguments))
    out, error = capsys.readouterr()
    assert exit.value.code == 2 and error.count("\n") == 1 and re.search(message, error)
    assert "nats per word" not in out  # before the long work


@pytest.mark.parametrize("module, message", [
    ("matplotlib.figure", "--plot needs matplotlib: pip install matplotlib"),
    ("rnn", "copy that file beside this one")])
def test_what_is_not_there_is_said_in_one_line(small, capsys, monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as exit:
        small("--plot", "nmt.png")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and message in error
