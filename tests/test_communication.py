"""Bytes by formula against bytes counted around torch.distributed's collectives."""

import contextlib
import runpy
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, run_ranks

import communication
from communication import Sizes, bytes_sent, counting, cut_and_step
from gpt import GPT, GPTConfig, count_parameters


@pytest.mark.parametrize("P", (2, 4))
@pytest.mark.parametrize("strategy", communication.WHEN)
def test_bytes_counted_match_the_formula(strategy, P):
    """Within 3%: what the formulas leave out is the loss, the flags of buckets and the gradients of norms."""
    config = GPTConfig(vocab_size=64, context=32, n_layers=4, n_heads=4, d_model=32)
    model = GPT(config, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(0))
    ready, counted = threading.Barrier(P), []

    def step(rank):  # ranks are threads, and the counter replaces functions that all of them call
        run = cut_and_step(strategy, model, tokens)
        ready.wait(30)
        if rank == 0:
            counter = counting()
            counted.append(counter.__enter__())
        ready.wait(30)
        run()
        ready.wait(30)
        if rank == 0:
            counter.__exit__(None, None, None)

    run_ranks(P, step)
    total = sum(number for _, number in counted[0])
    if strategy == "pipeline":  # the tied embedding's gradient, both ways between the ends, and the targets
        total -= 2 * 4 * 64 * 32 + 8 * 8 * 32
    expected = bytes_sent(strategy, P, Sizes(count_parameters(config), 4, 8, 32, 32))
    assert total / (P - 1 if strategy == "pipeline" else P) == pytest.approx(expected, rel=0.03)


def test_one_rank_sends_nothing():
    assert all(bytes_sent(strategy, 1, Sizes(100, 2, 2, 8, 4)) == 0 for strategy in communication.WHEN)


def test_counting_leaves_the_functions_as_they_were():
    before = dist.all_reduce, dist.isend, dist.batch_isend_irecv
    with counting():
        assert dist.all_reduce is not before[0]
    assert (dist.all_reduce, dist.isend, dist.batch_isend_irecv) == before


@pytest.mark.filterwarnings("ignore:`torch.distributed")
def test_every_collective_counts_what_its_ring_sends():
    """Of 12 numbers in fp32 on 3 ranks; a ring of 3 sends two thirds of what it moves."""
    ready, counted = threading.Barrier(3), []

    def call(rank):
        whole, part = torch.ones(12), torch.ones(4)
        with counting() if rank == 0 else contextlib.nullcontext() as sent:  # the threads share what it replaces
            ready.wait(30)
            dist.all_reduce(whole)
            dist.all_gather_into_tensor(whole, part)
            dist.all_gather(list(whole.split(4)), part)
            dist.reduce_scatter_tensor(part, whole)
            dist.all_to_all_single(torch.empty(12), whole)
            dist.broadcast(whole, 0)
            if rank == 0:
                dist.send(whole, 1)
            elif rank == 1:
                dist.recv(whole, 0)
            ready.wait(30)
        counted.extend(sent or ())

    run_ranks(3, call)
    expected = {"all-reduce": 64, "all-gather": 32, "reduce-scatter": 32, "all-to-all": 32, "broadcast": 32, "send": 48}
    assert {name: number for name, number in counted} == expected
    assert len(counted) == 3 * 6 + 1


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="a strategy is one of data, tensor"):
        bytes_sent("zero", 2, Sizes(1, 1, 1, 1, 1))


@pytest.mark.parametrize("flags", (["--ranks", "3"], ["--seed", "-1"], ["--ranks", "x"]))
def test_bad_flags_are_one_line(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["communication.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "communication.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and flags[1] in error and error.count("\n") == 1
