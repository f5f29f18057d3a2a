"""Counts against the meta device, transformers and torch's FLOP counter; memory against what autograd keeps."""

import dataclasses
import itertools
import runpy
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gpt
import llama
import scaling
from conftest import ROOT
from scaling import (ACCELERATORS, MODELS, ModelShape, gpt_shape, largest_model, layer_multiplications, layer_weights,
                     lecture_numbers, llama_shape, meta_parameters, saved_bytes, shape_of, state_bytes, throughput, training_cost,
                     training_seconds, utilisation)

transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")


def run(monkeypatch, capsys, *arguments, file="scaling.py"):
    """(exit status, stdout, stderr) of the program with these flags, in this process."""
    monkeypatch.setattr(sys, "argv", [file, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / file), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    out = capsys.readouterr()
    return status, out.out, out.err


# --- counting -------------------------------------------------------------------------------

PRESETS = [(gpt.GPT, name, config) for name, config in gpt.PRESETS.items()]
PRESETS += [(llama.Llama, name, config) for name, config in llama.PRESETS.items()]


@pytest.mark.parametrize("model, name, config", PRESETS, ids=lambda value: value if isinstance(value, str) else "")
def test_parameters_match_meta_device(model, name, config):
    config = dataclasses.replace(config, n_layers=2)  # the program counts all layers, which takes seconds
    assert shape_of(config).parameters == meta_parameters(lambda: model(config))


def test_parameters_match_transformers():
    base = dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=3, num_attention_heads=32,
                num_key_value_heads=8, tie_word_embeddings=False)
    ours = llama_shape(3, 4096, 32, 8, 14336, 8192, 32000)
    assert meta_parameters(lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**base))) == ours.parameters
    moe = transformers.MixtralConfig(**base, num_local_experts=8, num_experts_per_tok=2)
    ours = llama_shape(3, 4096, 32, 8, 14336, 8192, 32000, experts=8, experts_per_token=2)
    assert meta_parameters(lambda: transformers.MixtralForCausalLM(moe)) == ours.parameters
    assert ours.parameters - ours.active_parameters == 3 * 6 * 3 * 4096 * 14336  # six of eight experts rest


@pytest.mark.parametrize("name", MODELS)
def test_parameters_match_published(name):
    # 0.5%: the figures are published with two to four digits
    assert MODELS[name].parameters == pytest.approx(MODELS[name].published, rel=0.005)


@pytest.mark.parametrize("heads, keys, context", [(4, 4, 24), (2, 2, 17)])
def test_flops_match_torch_flop_counter(heads, keys, context):
    tokens = torch.randint(61, (3, context))
    g = gpt.GPTConfig(61, context, 2, heads, 32)
    l = llama.LlamaConfig(61, context, 2, heads, keys, 32, 48)
    for model, config in ((gpt.GPT(g, gpt.naive_attention), g), (llama.Llama(l, attention=llama.naive_attention), l)):
        with FlopCounterMode(display=False) as counter:
            logits = model(tokens)
        assert counter.get_total_flops() == shape_of(config).forward_flops(context) * tokens.numel()
        with FlopCounterMode(display=False) as counter:
            model(tokens).sum().backward()
        assert counter.get_total_flops() == shape_of(config).training_flops(context) * tokens.numel()
        assert logits.shape[-1] == 61


def test_layer_multiplications_match_a_sum_over_the_matrix_products():
    for T, D, H in ((7, 12, 3), (16, 16, 4)):
        products = [(T, D, D)] * 4 + [(T, D // H, T), (T, T, D // H)] * H  # (N, K, M) of Q K V O, Q K^T and P V per head
        assert layer_multiplications(T, D) == (sum(n * k * m for n, k, m in products), 2 * T * D * 4 * D)
        assert sum(layer_multiplications(T, D)) == 12 * T * D**2 + 2 * T**2 * D
    assert layer_weights(16) == (4 * 256, 8 * 256, 12 * 256)


def test_multiplications_and_flops_are_one_count():
    shape = gpt_shape(3, 64, 4, 32, 1)
    head = 64  # multiplications per token with a vocabulary of one
    assert shape.forward_flops(32) * 32 == 2 * (3 * sum(layer_multiplications(32, 64)) + 32 * head)
    assert shape.forward_flops(32, causal=True) == shape.forward_flops(16)  # half the keys
    # 6 N where the vocabulary and the text are small beside the width
    assert gpt_shape(96, 12288, 96, 2048, 1, learned_positions=False).training_flops(1) == pytest.approx(
        6 * 96 * 12 * 12288**2, rel=1e-3)


def test_experts_cost_what_a_token_meets():
    dense, moe = MODELS["mistral_7b"], MODELS["mixtral_8x7b"]
    more = moe.forward_flops() - dense.forward_flops()
    assert more == 2 * 32 * (3 * 4096 * 14336 + 4096 * 8)  # a second expert and the router


# --- memory ---------------------------------------------------------------------------------

@pytest.mark.parametrize("B, T, D, H", [(2, 64, 64, 4), (3, 40, 96, 2), (1, 128, 32, 4)])
def test_activations_match_saved_tensors(B, T, D, H):
    x = torch.randn(B, T, D, requires_grad=True)
    config = gpt.GPTConfig(61, T, 1, H, D)
    shape = shape_of(config)
    for attention, flash in ((gpt.naive_attention, False), (gpt.attention, True)):
        block = gpt.Block(config, attention)
        kept = saved_bytes(lambda: block(x), block.parameters())
        assert kept == pytest.approx(4 * B * T * sum(shape.activation_values(T, flash=flash)), rel=0.1)
        kept = saved_bytes(lambda: checkpoint(block, x, use_reentrant=False), block.parameters())
        assert kept == 4 * B * T * sum(shape.activation_values(T, "block"))


@pytest.mark.parametrize("keys, d_ff", [(4, 192), (2, 192), (1, 224)])
def test_llama_activations_match_saved_tensors(keys, d_ff):
    config = llama.LlamaConfig(61, 48, 1, 4, keys, 64, d_ff)
    block = llama.Llama(config).blocks[0]
    x = torch.randn(2, 48, 64, requires_grad=True)
    kept = saved_bytes(lambda: block(x), block.parameters())
    assert kept == pytest.approx(4 * 2 * 48 * sum(shape_of(config).activation_values(48)), rel=0.1)


def test_activations_match_korthikanti():
    s, a, h = 2048, 96, 12288
    shape = gpt_shape(96, h, a, s, 51200)
    stream, others = shape.activation_values(s, flash=False, dropout=True)
    assert 2 * (stream + others) == pytest.approx(h * (34 + 5 * a * s / h))  # eq. 1
    assert 2 * (stream + others / 8) == pytest.approx(h * (10 + 24 / 8 + 5 * a * s / (h * 8)))  # eq. 2, tensor parallel
    assert 2 * sum(shape.activation_values(s, flash=True, dropout=True)) == 34 * h  # table 2: scores recomputed
    assert 2 * sum(shape.activation_values(s, "block")) == 2 * h
    assert sum(shape.activation_values(s, "block")) < sum(shape.activation_values(s, "selective")) \
        < sum(shape.activation_values(s))


def test_saved_bytes_counts_a_storage_once_and_no_parameters():
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    assert saved_bytes(lambda: (x @ w) * 1.0, [w]) == 8 * 4 * 4
    assert saved_bytes(lambda: x[:4] * x[4:]) == 8 * 4 * 4  # two views of one storage


def test_state_bytes_match_torch_adamw():
    model = torch.nn.Linear(512, 512, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 512)).sum().backward()
    optimizer.step()
    moments = [t for t in optimizer.state[model.weight].values() if t.numel() > 1]
    kept = sum(t.numel() * t.element_size() for t in (model.weight, model.weight.grad, *moments))
    assert kept == state_bytes("fp32") * 512 * 512 == 16 * 512 * 512


def test_state_bytes_match_zero_paper():
    for ranks, stages in ((1, (120, 120, 120, 120)), (64, (120, 31.4, 16.6, 1.88)), (1024, (120, 30.1, 15.1, 0.12))):
        for zero, expected in enumerate(stages):  # Rajbhandari et al. 2020, table 1, 7.5B; printed to three digits
            assert 7.5 * state_bytes(zero=zero, ranks=ranks) == pytest.approx(expected, rel=0.03)
    assert state_bytes("fp32", gradients=False) == 12
    assert [state_bytes(p) for p in scaling.PRECISIONS] == [16, 16, 18, 8]
    assert largest_model(32e9, offload=True) == 16e9
    assert largest_model(80e9, zero=3, ranks=8) == 8 * largest_model(80e9)


def test_kv_cache_matches_the_cache_of_the_models():
    for model, config in ((gpt.GPT(gpt.GPTConfig(61, 24, 3, 4, 32)), gpt.GPTConfig(61, 24, 3, 4, 32)),
                          (llama.Llama(llama.LlamaConfig(61, 24, 3, 4, 2, 32, 48)), llama.LlamaConfig(61, 24, 3, 4, 2, 32, 48))):
        cache = model.new_cache(2, 24)
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.k, layer.v))
        assert held == shape_of(config).kv_cache_bytes(2, 24, 4)


# --- units ----------------------------------------------------------------------------------

@pytest.mark.parametrize("what, ours, theirs, tolerance", lecture_numbers())
def test_numbers_match_the_lectures(what, ours, theirs, tolerance):
    assert ours == pytest.approx(theirs, rel=tolerance + 1e-9)


def test_units_match_published_runs():
    # Brown et al. 2020, table D.1: 3.14e23 FLOPs, 3640 petaflop/s-days for GPT-3
    assert 6 * 174.6e9 * 300e9 / scaling.PETAFLOP_S_DAY == pytest.approx(3640, rel=0.005)
    # Narayanan et al. 2021, section 5.1: 300B tokens, 175B, 1024 A100 at 140 TFLOP/s with recomputation (8 N): 34 days
    hfu = 140e12 / 312e12
    assert training_seconds(8 * 300e9 * 175e9, 1024, 312e12, hfu) / 86400 == pytest.approx(34, rel=0.01)
    # Chowdhery et al. 2022, section 4.1: 238.3K tokens/s on 6144 TPU v4 is an MFU of 46.2%, 45.7% without attention
    palm, peak = MODELS["palm_540b"], ACCELERATORS["tpu_v4"].best
    assert utilisation(palm.training_flops(), 238.3e3, 6144, peak) == pytest.approx(0.462, abs=0.001)
    assert utilisation(6 * palm.parameters, 238.3e3, 6144, peak) == pytest.approx(0.457, abs=0.001)


def test_utilisation_is_the_inverse_of_training_seconds():
    seconds = training_seconds(6e20, 8, 1e15, 0.4)
    assert utilisation(6e9, 1e11 / seconds, 8, 1e15) == pytest.approx(0.4)
    assert throughput(6e9, 8, 1e15, 0.4) == pytest.approx(1e11 / seconds)
    assert training_cost(86400 * 3, 8, 2.5) == (24, 24 * 24 * 2.5)


# --- bad input and the program --------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    ({"n_layers": 0}, "n_layers must be a whole number and at least 1, got 0"),
    ({"d_model": -8}, "d_model"), ({"n_heads": 3}, "n_heads must divide d_model"), ({"vocab_size": 1.5}, "vocab_size"),
    ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads"), ({"d_ff": 0}, "d_ff must be"), ({"d_head": 0}, "d_head"),
    ({"experts_per_token": 2}, "experts_per_token must be at most experts, got 2 and 1")])
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelShape(**(dict(n_layers=2, d_model=32, n_heads=4, vocab_size=61, context=8) | changes))


@pytest.mark.parametrize("call", [
    lambda: layer_weights(0), lambda: layer_multiplications(-1, 8), lambda: MODELS["gpt2"].forward_flops(-3),
    lambda: MODELS["gpt2"].activation_values(8, "some"), lambda: MODELS["gpt2"].activation_values(0), lambda: MODELS["gpt2"].kv_cache_bytes(0, 8),
    lambda: state_bytes("fp8"), lambda: state_bytes(zero=4), lambda: state_bytes(ranks=0), lambda: largest_model(-1),
    lambda: training_seconds(1, 0, 1, 1), lambda: training_cost(-1, 1, 1), lambda: throughput(1, 1, 0, 1),
    lambda: utilisation(1, 1, 1, float("nan"))])
def test_zero_and_negative_sizes_are_refused(call):
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize("arguments, message", [
    (["--gpu", "abacus"], "unknown GPU 'abacus': choose from p100"),
    (["--plan", "gpt5"], "unknown model 'gpt5': choose from gpt2"),
    (["--gpus", 0], "gpus must be positive and finite"), (["--plan", "gpt2", "--gpus", 0], "at least one GPU"),
    (["--plan", "gpt2", "--tokens", -1], "--tokens must be positive and finite"),
    (["--plan", "gpt2", "--tokens", "nan"], "--tokens must be positive and finite"),
    (["--plan", "llama1_7b", "--gpus", 1], "2 GPUs would do"),
    (["--fit", "no/such.csv"], "no/such.csv: cannot be read"), (["--fit", "a", "--measure"], "give one of them"),
    (["--plan", ""], "unknown model"), (["--fit", ""], "cannot be read"),
    (["--tokens", 5], "--tokens means nothing alone"), (["--validate", "--gpu", "a100"], "--gpu means nothing"),
    (["--measure", "--tokens", 10], "--tokens must be at least"), (["--plot", "x.png"], "--plot means nothing alone"),
    (["--gpus", "many"], "invalid int value"), (["--speed", 1], "unrecognized arguments"),
    (["--validate", "--plot", "no/such/folder/x.png"], "cannot be drawn")])
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, message):
    status, out, err = run(monkeypatch, capsys, *arguments)
    assert status == 2 and message in err and err.count("\n") == 1 and "Traceback" not in err


def test_plots_without_matplotlib_are_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = run(monkeypatch, capsys, "--validate", "--plot", "x.png")
    assert (status, err) == (2, "scaling.py: --plot needs matplotlib: pip install matplotlib\n")


def test_flags_change_what_is_printed(monkeypatch, capsys, tmp_path):
    fits = [run(monkeypatch, capsys, *flags)[1] for flags in (["--gpu", "a100"], ["--gpu", "v100"], ["--gpus", 64])]
    plan = ["--plan", "gpt2", "--gpus", 8]
    plans = [run(monkeypatch, capsys, *plan, *flags)[1] for flags in (
        [], ["--gpu", "a100"], ["--tokens", 1e10], ["--plot", tmp_path / "plan.png"])]
    every = [*fits, *plans, run(monkeypatch, capsys, "--validate")[1]]
    assert all(a != b for a, b in itertools.combinations(every, 2)) and all(every)
    assert (tmp_path / "plan.png").stat().st_size > 0
    assert "best: dp 8" in plans[0]
