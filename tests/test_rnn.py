"""Cells and layers against torch's own, forward and gradients, in float64."""

import itertools
import re
import runpy
import sys

import pytest
import torch
import torch.nn as nn
from conftest import ROOT

from rnn import CELLS, Recurrent, RecurrentNetwork, gradient_by_distance, naive_recurrent

TORCH = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
TORCH_CELLS = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
LENGTHS = torch.tensor([3, 6, 1, 4])
EXACT = {"atol": 1e-12, "rtol": 0}  # float64, sums of a few dozen products in another order


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


# --- cells and layers ---

@pytest.mark.parametrize("cell", CELLS)
def test_cell_matches_torch_forward_and_gradients(cell):
    torch.manual_seed(0)
    theirs, x = TORCH_CELLS[cell](3, 5).double(), randn(4, 3).requires_grad_()
    weights = (theirs.weight_ih, theirs.weight_hh, theirs.bias_ih, theirs.bias_hh)
    state = tuple(randn(4, 5, seed=s).requires_grad_() for s in range(1, 1 + CELLS[cell][2]))
    ours = CELLS[cell][0](x, state, *weights)
    expected = theirs(x, state if cell == "lstm" else state[0])
    expected = expected if cell == "lstm" else (expected,)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    leaves = (x, *state, *weights)
    for a, b in zip(torch.autograd.grad(sum(part.square().sum() for part in ours), leaves),
                    torch.autograd.grad(sum(part.square().sum() for part in expected), leaves), strict=True):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("cell", CELLS)
def test_layers_both_ways_match_torch_bidirectional_with_packed_lengths_and_gradients(cell):
    torch.manual_seed(0)
    theirs = TORCH[cell](3, 5, batch_first=True, bidirectional=True).double()
    layers = [Recurrent(3, 5, cell, reverse).double() for reverse in (False, True)]
    for layer, ending in zip(layers, ("", "_reverse")):
        layer.load_state_dict({name: getattr(theirs, name + ending) for name in layer.state_dict()})
    x, ours_x = randn(4, 6, 3).requires_grad_(), randn(4, 6, 3).requires_grad_()
    packed = nn.utils.rnn.pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    expected, last = theirs(packed)
    expected, _ = nn.utils.rnn.pad_packed_sequence(expected, batch_first=True)
    last = last if cell == "lstm" else (last,)
    found = [layer(ours_x, lengths=LENGTHS) for layer in layers]
    torch.testing.assert_close(torch.cat([outputs for outputs, _ in found], -1), expected, **EXACT)
    for direction in range(2):
        for a, b in zip(found[direction][1], last, strict=True):
            torch.testing.assert_close(a, b[direction], **EXACT)
    sum(outputs.pow(3).sum() + sum(part.sum() for part in state) for outputs, state in found).backward()
    (expected.pow(3).sum() + sum(part.sum() for part in last)).backward()
    torch.testing.assert_close(ours_x.grad, x.grad, **EXACT)
    for layer, ending in zip(layers, ("", "_reverse")):
        for name, p in layer.named_parameters():
            torch.testing.assert_close(p.grad, getattr(theirs, name + ending).grad, **EXACT)


@pytest.mark.parametrize("cell, reverse", list(itertools.product(CELLS, (False, True))))
def test_naive_and_fast_layers_agree(cell, reverse):
    layer, x = Recurrent(3, 5, cell, reverse, seeded()).double(), randn(4, 6, 3)
    outputs, state = layer(x, lengths=LENGTHS)
    expected, last = naive_recurrent(cell, x, LENGTHS.tolist(), tuple(layer.parameters()), reverse)
    torch.testing.assert_close(outputs, expected, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)


@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_in_two_parts_is_the_whole_sequence(cell):
    layer, x = Recurrent(3, 5, cell, generator=seeded()).double(), randn(4, 6, 3)
    first, state = layer(x[:, :2])
    second, last = layer(x[:, 2:], state)
    whole, whole_last = layer(x)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, **EXACT)
    torch.testing.assert_close(last, whole_last, **EXACT)
    torch.testing.assert_close(layer(x, lengths=torch.full((4,), 6))[0], whole, **EXACT)


def test_layers_are_the_same_for_the_same_seed_and_refuse_what_does_not_fit():
    assert torch.equal(Recurrent(3, 5, generator=seeded(1)).weight_hh_l0, Recurrent(3, 5, generator=seeded(1)).weight_hh_l0)
    plain, open_gates = (Recurrent(3, 5, generator=seeded(1), forget_bias=b).bias_ih_l0 for b in (0.0, 2.0))
    assert torch.equal(open_gates - plain, torch.tensor([0.0] * 5 + [2.0] * 5 + [0.0] * 10))
    for arguments in ((3, 5, "elman"), (0, 5), (3, 0)):
        with pytest.raises(ValueError, match="cell must be one of rnn, gru, lstm and widths at least 1, got"):
            Recurrent(*arguments)
    layer = Recurrent(3, 5)
    for shape in ((2, 3), (2, 4, 4), (2, 0, 3), (0, 2, 3)):
        with pytest.raises(ValueError, match=r"x must be \(B, S, 3\) and not empty, got shape "):
            layer(torch.zeros(shape))
    for lengths in ([1], [0, 2], [1, 5]):
        with pytest.raises(ValueError, match=r"lengths must be 2 values in 1 \.\. 4, got \["):
            layer(torch.zeros(2, 4, 3), lengths=torch.tensor(lengths))
    for state in ((torch.zeros(2, 5),), (torch.zeros(2, 5),) * 3, (torch.zeros(1, 5),) * 2, (torch.zeros(2, 4),) * 2):
        with pytest.raises(ValueError, match=r"the state of this lstm must be 2 of shape \(2, 5\), got \["):
            layer(torch.zeros(2, 4, 3), state)


@pytest.mark.parametrize("cell, dtype", list(itertools.product(CELLS, (torch.bfloat16, torch.float16))))
def test_half_precision_is_kept_and_close(cell, dtype):
    layer, x = Recurrent(3, 5, cell, generator=seeded()), randn(4, 6, 3).float()
    expected, _ = layer(x, lengths=LENGTHS)
    found, state = layer.to(dtype)(x.to(dtype), lengths=LENGTHS)
    assert found.dtype == state[0].dtype == dtype
    torch.testing.assert_close(found.float(), expected, atol=0.03, rtol=0)  # six steps of 3 digits


# --- the four shapes, and vanishing gradients ---

def test_four_shapes_match_torch():
    ours = RecurrentNetwork(9, 4, generator=seeded()).double()
    theirs = nn.LSTM(4, 4, batch_first=True).double()
    theirs.load_state_dict(ours.layer.state_dict())
    tokens = torch.randint(9, (3, 5), generator=seeded())
    outputs, _ = theirs(ours.embedding(tokens))
    torch.testing.assert_close(ours.many_to_many(tokens), ours.head(outputs), **EXACT)
    torch.testing.assert_close(ours.many_to_one(tokens), ours.head(outputs[:, -1]), **EXACT)
    torch.testing.assert_close(ours.many_to_one(tokens, torch.tensor([2, 5, 1])),
                               ours.head(outputs[range(3), (1, 4, 0)]), **EXACT)
    torch.testing.assert_close(ours.one_to_one(tokens[:, 0]), ours.head(outputs[:, 0]), **EXACT)
    state, token, expected = None, tokens[:, :1], []
    for _ in range(6):
        output, state = theirs(ours.embedding(token), state)
        token = ours.head(output).argmax(-1)
        expected.append(token)
    assert torch.equal(ours.one_to_many(tokens[:, 0], 6), torch.cat(expected, 1))
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        ours.one_to_many(tokens[:, 0], 0)


def test_gradient_by_distance_matches_the_jacobian():
    layer, x = Recurrent(3, 5, "gru", generator=seeded()).double(), randn(2, 6, 3)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[0][:, -1].sum(1), x)  # (B, B, S, 3)
    expected = (jacobian[0, 0].norm(dim=-1) + jacobian[1, 1].norm(dim=-1)) / 2
    torch.testing.assert_close(gradient_by_distance(layer, x), expected.flip(0), **EXACT)
    backwards = Recurrent(3, 5, "gru", reverse=True).double()
    backwards.load_state_dict(layer.state_dict())  # reads the mirrored sequence as the other reads the sequence
    torch.testing.assert_close(gradient_by_distance(backwards, x.flip(1)), expected.flip(0), **EXACT)


def test_gradients_of_an_rnn_vanish_faster_than_those_of_an_lstm():
    x = torch.randn(8, 41, 32, generator=seeded())
    layers = [Recurrent(32, 32, cell, False, seeded(1), bias) for cell, bias in (("rnn", 0), ("lstm", 0), ("lstm", 3))]
    rnn, lstm, remembering = (norms[40] / norms[0] for norms in (gradient_by_distance(layer, x) for layer in layers))
    assert rnn < 1e-8 and lstm > 1e3 * rnn and remembering > 0.01


# --- the program ---

@pytest.fixture
def program(capsys, monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rnn.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "rnn.py"), run_name="__main__")
        return capsys.readouterr().out
    return run


def test_program_shows_four_shapes_and_fading_gradients(program):
    out = program("--d_model", 32, "--batch", 4)
    for part in ("one to many  (2,) -> (2, 4)", "many to one  (2, 5) -> (2, 9)", "each above the one before: True (expected True, from ten steps on)\n"):
        assert part in out
    rows = {line[:20].strip(): [float(v) for v in line[20:].split()] for line in out.splitlines() if "e+00" in line}
    assert set(rows) == {*CELLS, "lstm, forget bias 3"} and rows["rnn"][-1] < 1e-6 * rows["lstm, forget bias 3"][-1]


def test_every_flag_changes_something(program, tmp_path):
    small = ("--d_model", 8, "--distance", 4, "--batch", 2)
    base = program(*small)
    assert base == program(*small)
    for flag, value in (("--d_model", 9), ("--distance", 5), ("--batch", 3), ("--seed", 1)):
        assert program(*small, flag, value) != base
    assert "drawn: " in program(*small, "--plot", tmp_path / "rnn.png")
    assert (tmp_path / "rnn.png").read_bytes()[:4] == b"\x89PNG"
    assert "left after 1 steps" in program("--d_model", 1, "--distance", 1, "--batch", 1)


@pytest.mark.parametrize("arguments, message", [
    (["--d_model", 0], "--d_model, --distance and --batch must be at least 1"), (["--distance", -1], "at least 1"),
    (["--batch", "x"], "invalid int"), (["--seed", -1], "--seed in 0"), (["--seed", 2**63], "--seed in 0"),
    (["--plot", "rnn"], "name a picture"), (["--plot", "no/folder.png"], "no/folder.png: cannot be drawn")])
def test_program_answers_bad_input_in_one_line(program, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        program("--d_model", 2, "--distance", 2, *arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and re.search(message, error)


def test_plot_without_matplotlib_says_so(program, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        program("--d_model", 2, "--distance", 2, "--plot", "rnn.png")
    assert "--plot needs matplotlib: pip install matplotlib" in capsys.readouterr().err
