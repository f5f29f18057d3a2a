"""Ring attention against torch's attention and one process, in float64."""

import copy
import os
import runpy
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, run_ranks, spawn_ranks

import flash_attn
import parallel
import ring_attention as ring
from gpt import GPT, GPTConfig
from llama import Llama, LlamaConfig


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(B, H, Hkv, T, Dh, dtype=torch.float64):
    q, grad = draw(B, H, T, Dh, dtype=dtype), draw(B, H, T, Dh, dtype=dtype, seed=1)
    return q, draw(B, Hkv, T, Dh, dtype=dtype, seed=2), draw(B, Hkv, T, Dh, dtype=dtype, seed=3), grad


def expected(q, k, v, grad, is_causal):
    whole = [x.double().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*whole, is_causal=is_causal, enable_gqa=q.size(1) != k.size(1))
    out.backward(grad.double())
    return [out.detach(), *(x.grad for x in whole)]


def on_ring(P, q, k, v, grad, is_causal, **options):
    """Output and gradients, put together again."""
    def part(rank):
        mine = [ring.zigzag(x, 2).clone().requires_grad_() for x in (q, k, v)]
        out = ring.ring_attention(*mine, is_causal, **options)
        out.backward(ring.zigzag(grad, 2))
        return [ring.gather_zigzag(x, 2) for x in (out.detach(), *(x.grad for x in mine))]
    results = run_ranks(P, part)
    assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other))
    return results[0]


def flash_forward(q, k, v, is_causal):
    return flash_attn.tiled_forward(q, k, v, flash_attn.Options(is_causal))


def flash_backward(grad, q, k, v, out, lse, is_causal):
    return flash_attn.tiled_backward(grad, q, k, v, out, lse, flash_attn.Options(is_causal))[:3]


@pytest.mark.parametrize("is_causal", (True, False))
@pytest.mark.parametrize("P", (1, 2, 3, 4))
@pytest.mark.parametrize("H, Hkv", ((4, 4), (4, 2), (3, 1)))
def test_output_and_gradients_match_torchs_attention(P, H, Hkv, is_causal):
    data = inputs(2, H, Hkv, 24, 8)
    for found, right in zip(on_ring(P, *data, is_causal), expected(*data, is_causal)):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_causal", (True, False))
def test_flash_attention_handed_in_gives_the_same(is_causal):
    data = inputs(2, 4, 2, 32, 8)
    found = on_ring(4, *data, is_causal, forward=flash_forward, backward=flash_backward)
    for found, right in zip(found, expected(*data, is_causal)):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 2e-6), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)))
def test_lower_precision_errs_by_its_rounding_alone(dtype, tolerance):
    """Merged in fp32, rounded once at the end: the tolerance is a few units in the last place of values up to 3."""
    data = inputs(1, 4, 2, 32, 16, dtype)
    for found, right in zip(on_ring(4, *data, True), expected(*data, True)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), right, rtol=tolerance, atol=tolerance)


def test_large_logits_neither_overflow_nor_vanish():
    q, k, v, grad = inputs(1, 2, 2, 16, 8)
    for found, right in zip(on_ring(2, 100 * q, 100 * k, v, grad, True), expected(100 * q, 100 * k, v, grad, True)):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("P", (1, 2, 3))
def test_zigzag_and_its_inverse_give_back_the_text(P):
    text = torch.arange(12)
    parts = run_ranks(P, lambda rank: (ring.zigzag(text, 0), ring.gather_zigzag(ring.zigzag(text, 0), 0)))
    assert all(torch.equal(whole, text) for _, whole in parts)
    if P == 3:
        assert [part.tolist() for part, _ in parts] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]


def test_every_rank_computes_the_same_number_of_scores():
    """Load balance, the reason of the zigzag: (T/P)^2 / 2 a round, and half a diagonal."""
    def scores(rank):
        count = 0
        def forward(q, k, v, is_causal):
            nonlocal count
            T, S = q.size(2), k.size(2)
            count += T * (T + 1) // 2 if is_causal else T * S
            return ring.block_forward(q, k, v, is_causal)
        ring.ring_attention(*(ring.zigzag(x, 2) for x in inputs(1, 1, 1, 32, 4)[:3]), forward=forward)
        return count
    assert len(set(run_ranks(4, scores))) == 1
    assert sum(run_ranks(4, scores)) == 32 * 33 // 2  # each visible pair once


def test_bytes_sent_are_those_of_the_header():
    sent = []

    def part(rank):
        mine = [ring.zigzag(x, 2).requires_grad_() for x in inputs(1, 4, 2, 24, 8)[:3]]
        ring.ring_attention(*mine).sum().backward()

    exchange = dist.batch_isend_irecv
    dist.batch_isend_irecv = lambda ops: sent.append(ops[0].tensor.nbytes) or exchange(ops)
    try:
        run_ranks(3, part)
    finally:
        dist.batch_isend_irecv = exchange
    assert sum(sent) == 3 * (2 + 2 + 3) * 2 * 8 * (2 * 24 // 3 * 8)  # ranks * rounds * (k, v) * bytes * numbers


# --- models -------------------------------------------------------------------------------------

B, T, V = 4, 16, 20


def gpt():
    return GPT(GPTConfig(V, T, 2, 4, 16), generator=torch.Generator().manual_seed(1)).double()


def llama():
    config = LlamaConfig(vocab_size=V, context=T, n_layers=2, n_heads=4, n_kv_heads=2, d_model=16, d_ff=24)
    return Llama(config, generator=torch.Generator().manual_seed(1)).double()


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(V, (B, T + 1), generator=generator) for _ in range(2)]


def train(model, part, cut, finish=lambda: None):
    """AdamW with clipping, each rank the losses of its own positions."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), []
    for batch in batches():
        batch = batch[part]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), cut(batch[:, 1:]).flatten(), reduction="sum") / (B * T)
        loss.backward()
        finish()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), {name: p.detach() for name, p in model.named_parameters()}


def assert_equal(results, expected):
    """Ten digits of float64 are left to the order of sums, which AdamW's division enlarges."""
    torch.testing.assert_close(sum(losses for losses, _ in results), expected[0], rtol=0, atol=1e-10)
    for _, parameters in results:
        for name, p in parameters.items():
            torch.testing.assert_close(p, expected[1][name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", (gpt, llama))
@pytest.mark.parametrize("P", (1, 2, 4))
def test_training_matches_one_process(make, P):
    model = make()
    copies = [copy.deepcopy(model) for _ in range(P)]

    def part(rank):
        cut = ring.context_parallel(copies[rank], None, flash_forward, flash_backward)
        dp = parallel.DataParallel(cut, reduction="sum")
        return train(cut, slice(None), lambda targets: ring.zigzag(targets, 1), dp.finish)

    assert_equal(run_ranks(P, part), train(model, slice(None), lambda targets: targets))


@pytest.mark.parametrize("make", (gpt, llama))
def test_data_and_context_parallel_match_one_process(make):
    model = make()
    copies = [copy.deepcopy(model) for _ in range(4)]

    def part(rank):
        groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
        cp = groups[rank // 2]
        cut = ring.context_parallel(copies[rank], cp)
        dp = parallel.DataParallel(cut, reduction="sum")
        return train(cut, slice(rank // 2 * 2, rank // 2 * 2 + 2), lambda targets: ring.zigzag(targets, 1, cp), dp.finish)

    assert_equal(run_ranks(4, part), train(model, slice(None), lambda targets: targets))


def _process(rank):
    cut = ring.context_parallel(llama())
    dp = parallel.DataParallel(cut, reduction="sum")
    return train(cut, slice(None), lambda targets: ring.zigzag(targets, 1), dp.finish)


def test_processes_match_one_process():
    assert_equal(spawn_ranks(2, _process), train(llama(), slice(None), lambda targets: targets))


# --- a rank that is lost --------------------------------------------------------------------------

def _dies_or_hangs(rank, folder, how):
    (Path(folder) / str(os.getpid())).touch()
    dist.init_process_group("gloo")
    dist.barrier()  # from here on two seconds are long
    group = dist.new_group(timeout=timedelta(seconds=2))
    x = inputs(1, 2, 2, 8, 4)[:3]
    if rank == 1:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        while not (Path(folder) / "done").exists():
            time.sleep(0.05)
        return
    began = time.monotonic()
    try:
        ring.ring_attention(*(part.requires_grad_() for part in x), group=group).sum().backward()
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    finally:
        (Path(folder) / "done").touch()


@pytest.mark.parametrize("how", ("dies", "hangs"))
def test_a_rank_that_dies_or_hangs_stops_the_others_with_a_message(how, tmp_path):
    """kill -9, or silent for longer than the group's time-out of 2 s: the other rank says what it waited for."""
    results = spawn_ranks(2, _dies_or_hangs, tmp_path, how, timeout=30, init=False, return_exceptions=True)
    message, seconds = results[0]
    words = "ring attention, rank 0 of 2: keys and values to rank 1 and from rank 1 did not get through"
    assert words in message and "\n" not in message.split(": ")[0]
    assert seconds < 8
    assert how == "hangs" or "died, exit code -9" in str(results[1])
    deadline = time.monotonic() + 5
    left = [int(path.name) for path in tmp_path.iterdir() if path.name != "done"]
    assert len(left) == 2
    while any(map(is_alive, left)) and time.monotonic() < deadline:  # nor a zombie: it would still have its number
        time.sleep(0.05)
    assert not any(map(is_alive, left))


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- bad input ----------------------------------------------------------------------------------

@pytest.mark.parametrize("q, k, message", (((1, 3, 4, 8), (1, 2, 4, 8), "Hkv dividing H"), ((1, 2, 4, 8), (1, 2, 6, 8), "got"),
                                           ((1, 2, 3, 8), (1, 2, 3, 8), "even number of positions, got 3")))
def test_shapes_that_do_not_fit_are_refused(q, k, message):
    with pytest.raises(ValueError, match=message):
        ring.ring_attention(torch.zeros(q), torch.zeros(k), torch.zeros(k))


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="2 ranks cut a text into 4 chunks, which do not divide its length 6"):
        run_ranks(2, lambda rank: ring.zigzag(torch.zeros(6), 0))


@pytest.mark.parametrize("flags", (["--ranks", "0"], ["--length", "7"], ["--seed", "-1"]))
def test_bad_flags_are_one_line(flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ring_attention.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "ring_attention.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--length" in error and error.count("\n") == 1
