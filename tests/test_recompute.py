"""Recomputation changes memory and time, and no number."""

import functools
import runpy
import sys

import pytest
import torch
import torch.nn as nn
from conftest import run_ranks
from torch.utils.checkpoint import checkpoint

import models
import recompute
from recompute import naive_recompute, saved_bytes, values_kept
from zero import ZeRO

SIZES = {"gpt": {"vocab_size": 20, "context": 16, "n_layers": 3, "n_heads": 2, "d_model": 16, "dropout": 0.2},
         "llama": {"vocab_size": 20, "context": 16, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_model": 16, "d_ff": 40}}


def build(kind, what="none", **changes):
    model = models.build(kind, SIZES[kind] | changes, generator=torch.Generator().manual_seed(0)).double()
    return recompute.recompute(model, what)


def gradients(model, seed=1):
    torch.manual_seed(seed)  # dropout
    tokens = torch.randint(20, (3, 11), generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("what", ("attention", "block"))
@pytest.mark.parametrize("kind", SIZES)
def test_gradients_match_those_without_bit_for_bit(kind, what):
    """Dropout on: what is run again has to drop the same."""
    loss, expected = gradients(build(kind))
    again, found = gradients(build(kind, what))
    assert torch.equal(loss, again) and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def under_zero(rank, P, kind, what, stage):
    """Gradient norms and weights of two steps on this rank's rows of six."""
    model = build(kind, what, dropout=0.0) if kind == "gpt" else build(kind, what)
    trainer = ZeRO(model, functools.partial(torch.optim.SGD, lr=0.1), stage=stage, reduction="sum", bucket_mb=0.01)
    tokens, norms = torch.randint(20, (2, 6, 13), generator=torch.Generator().manual_seed(0)), []
    for batch in tokens:
        logits, targets = model(batch[rank::P, :-1]), batch[rank::P, 1:]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
        trainer.finish()
        norms.append(trainer.clip_grad_norm(1.0).item())
        trainer.step()
        trainer.zero_grad()
    with trainer.gathered():
        return norms, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("stage", (2, 3))
@pytest.mark.parametrize("what", ("attention", "block"))
@pytest.mark.parametrize("kind", SIZES)
def test_recomputing_on_weights_that_are_freed_matches_one_process(kind, what, stage):
    """Stage 3 frees a block's weights behind its forward: they have to be there when it is run again. 1e-12: sums over
    ranks are in another order."""
    norms, expected = under_zero(0, 1, kind, "none", 0)
    for found_norms, found in run_ranks(2, lambda rank: under_zero(rank, 2, kind, what, stage)):
        torch.testing.assert_close(found_norms, norms, rtol=0, atol=1e-12)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_naive_recompute_matches_torchs_checkpoint(dropout):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Dropout(dropout), nn.Linear(9, 4)).double()
    results = []
    for run in (lambda x: net(x), lambda x: naive_recompute(net, x), lambda x: checkpoint(net, x, use_reentrant=False)):
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).requires_grad_()
        run(run(x)).square().sum().backward()  # twice: the second draws other masks than the first
        results.append([x.grad, *(p.grad for p in net.parameters())])
        net.zero_grad()
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0]))


def test_naive_recompute_keeps_its_input_alone():
    net = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8))
    x = torch.randn(5, 8, requires_grad=True)
    assert saved_bytes(lambda: naive_recompute(net, x), net.parameters()) == 5 * 8 * 4
    assert saved_bytes(lambda: net(x), net.parameters()) > 5 * 64 * 4


@pytest.mark.parametrize("what", recompute.WAYS)
@pytest.mark.parametrize("kind", SIZES)
def test_bytes_kept_match_the_formula(kind, what):
    """Within 5%: fused attention's log-sum-exp and the norms' statistics are left out."""
    wide = {"d_model": 64, "n_heads": 2, "context": 64} | ({"dropout": 0.0} if kind == "gpt" else {"n_kv_heads": 1, "d_ff": 96})
    model = build(kind, what, **wide).float()
    x = torch.randn(2, 64, 64, requires_grad=True)

    def forward():
        y = x
        for block in model.blocks:
            y = block(y)
        return y

    expected = 4 * 2 * 64 * 3 * values_kept(model.config, what, kind == "llama")
    assert saved_bytes(forward, model.parameters()) == pytest.approx(expected, rel=0.05)


def test_decoding_is_as_without():
    model, plain = build("gpt", "block").eval(), build("gpt").eval()
    tokens = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))
        cache = model.new_cache(1, 8)
        model(tokens[:, :2], cache)
        torch.testing.assert_close(model(tokens[:, 2:], cache)[:, -1], plain(tokens)[:, -1], atol=1e-12, rtol=0)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="one of none, attention, block, got 'all'"):
        build("gpt", "all")
    with pytest.raises(ValueError, match="one of none, attention, block, got 'all'"):
        values_kept(build("gpt").config, "all", False)
    with pytest.raises(ValueError, match="without requires_grad"):
        naive_recompute(nn.Linear(2, 2), torch.ones(2))
    moe = models.build("moe", SIZES["llama"] | {"experts": {"n_experts": 2, "k": 1, "router": "softmax_before"}})
    with pytest.raises(ValueError, match="recompute attention, not block"):
        recompute.recompute(moe, "block")
    recompute.recompute(moe, "attention")


def test_main_itself_refuses_sizes_that_cannot_be():
    for sizes, message in (((0, 8, 8, 1, 0), "--n_layers, --context and"), ((1, 12, 8, 1, 0), "--d_model a multiple of 8, got 1, 8, 1 and 12"),
                           ((1, 8, 8, 1, -1), "--seed must be in 0 .. 2")):
        with pytest.raises(ValueError, match=message):
            recompute.main("gpt", *sizes)


@pytest.mark.parametrize("flags, message", ((("--n_layers", "0"), "must be at least 1"), (("--d_model", "12"), "a multiple of 8"),
                                            (("--seed", "-1"), "--seed must be"), (("--model", "bert"), "invalid choice")))
def test_bad_flags_are_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recompute.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(recompute.__file__, run_name="__main__")
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == "" and message in output.err and output.err.count("\n") == 1


def test_flags_change_what_they_say(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recompute.py", "--repeats", "1", "--n_layers", "2", "--d_model", "32", "--context", "8",
                                      "--model", "llama"])
    runpy.run_path(recompute.__file__, run_name="__main__")
    output = capsys.readouterr().out
    assert "llama, 2 layers of width 32, 4 texts of 8 tokens" in output
    assert "max |gradient - gradient of none| = 0e+00" in output
