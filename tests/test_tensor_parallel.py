"""Tensor and sequence parallelism against one process, torch's DTensor and F.cross_entropy, in float64."""

import copy
import os
import re
import runpy
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, run_ranks, spawn_ranks

import bert as bert_file
import parallel
import tensor_parallel as tp
from gpt import GPT, GPTConfig
from llama import Llama, LlamaConfig

B, T, V = 4, 8, 21  # 21: no number of ranks here divides it


def gpt(dropout=0.0, **sizes):
    sizes = {"vocab_size": V, "context": T, "n_layers": 2, "n_heads": 4, "d_model": 16, "dropout": dropout} | sizes
    return GPT(GPTConfig(**sizes), generator=torch.Generator().manual_seed(1)).double()


def llama(n_kv_heads=2, tied=False, **sizes):
    sizes = {"vocab_size": V, "context": T, "n_layers": 2, "n_heads": 4, "d_model": 16, "d_ff": 24} | sizes
    return Llama(LlamaConfig(**sizes, n_kv_heads=n_kv_heads, tied=tied),
                 generator=torch.Generator().manual_seed(1)).double()


def batches(steps=2, rows=B, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (rows, T + 1), generator=draw) for _ in range(steps)]


def train(model, data, group, clip=0.5, accumulate=1, finish=lambda: None, rows=slice(None)):
    """AdamW on micro-batches with clipping; returns losses, norms, and {name: whole parameter}."""
    optimizer, losses, norms = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), [], []
    for step, batch in enumerate(data):
        torch.manual_seed(step)  # of the dropout
        loss = 0.0
        for part in batch[rows].chunk(accumulate):
            each = tp.vocabulary_cross_entropy(model(part[:, :-1]), part[:, 1:], V, group)
            each = each.sum() / (len(batch) * T)
            each.backward()
            loss += each.item()
        finish()
        norms.append(tp.clip_grad_norm(model.parameters(), clip, group).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses, norms, {name: tp.whole(p) for name, p in model.named_parameters()}


def alone(model, data, clip=0.5, **options):
    """The same on one process, with torch's own loss and clipping."""
    optimizer, losses, norms = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), [], []
    for step, batch in enumerate(data):
        torch.manual_seed(step)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def assert_equal(found, expected, tolerance=1e-10):
    """Ten digits of float64 are left to the order of sums, which AdamW's division enlarges."""
    for i in (0, 1):
        torch.testing.assert_close(torch.tensor(found[i]), torch.tensor(expected[i]), rtol=0, atol=tolerance)
    assert found[2].keys() == expected[2].keys()
    for name in expected[2]:
        torch.testing.assert_close(found[2][name], expected[2][name], rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")


# --- the operators ------------------------------------------------------------------------------

OPERATORS = {  # operator, what it does to the stacked tensors x (P, n, k) of all ranks, forward
    "copy": (lambda x: tp.copy_to_ranks(x), lambda x: x),
    "reduce": (lambda x: tp.reduce_from_ranks(x), lambda x: x.sum(0).expand_as(x)),
    "scatter": (lambda x: tp.scatter_to_ranks(x, 0), lambda x: torch.stack([x[r].chunk(len(x))[r] for r in range(len(x))])),
    "gather": (lambda x: tp.gather_from_ranks(x, 1), lambda x: torch.cat(list(x), 1).expand(len(x), -1, -1)),
    "gather terms": (lambda x: tp.gather_to_terms(x, 1), lambda x: torch.cat(list(x), 1).expand(len(x), -1, -1)),
    "scatter terms": (lambda x: tp.reduce_scatter_terms(x, 1),
                      lambda x: torch.stack(x.sum(0).chunk(len(x), 1)))}


@pytest.mark.parametrize("P", (1, 2, 3))
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_matches_its_definition_on_the_stacked_ranks(name, P):
    x = torch.randn(P, 6, 6, dtype=torch.float64)
    outputs = run_ranks(P, lambda rank: OPERATORS[name][0](x[rank]))
    expected = OPERATORS[name][1](x)
    for rank in range(P):
        assert torch.equal(outputs[rank], expected[rank]) or torch.allclose(outputs[rank], expected[rank], atol=1e-15)


@pytest.mark.parametrize("name, conjugate", (("copy", "reduce"), ("reduce", "copy"), ("scatter", "gather"), ("gather", "scatter"),
                                             ("gather terms", "scatter terms"), ("scatter terms", "gather terms")))
def test_backward_is_the_conjugate_operator(name, conjugate):
    P = 3
    x = torch.randn(P, 6, 6, dtype=torch.float64)

    def gradient(rank):
        mine = x[rank].clone().requires_grad_()
        y = OPERATORS[name][0](mine)
        dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        y.backward(dy)
        dim = 0 if name == "scatter" else 1
        expected = {"gather": lambda: tp.gather_from_ranks(dy, dim), "scatter": lambda: tp.scatter_to_ranks(dy, dim)}
        return mine.grad, expected.get(conjugate, lambda: OPERATORS[conjugate][0](dy))()

    for found, expected in run_ranks(P, gradient):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_uneven_slices_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="3 ranks cannot share 7 entries"):
        run_ranks(3, lambda rank: tp.scatter_to_ranks(torch.ones(7), 0))


# --- the loss -----------------------------------------------------------------------------------

@pytest.mark.parametrize("P", (1, 2, 3, 4, 13))
def test_vocabulary_cross_entropy_matches_torch(P):
    """13 ranks: the last ones hold nothing but padding."""
    logits = 1e3 * torch.randn(B, T, V, dtype=torch.float64)  # exp overflows unless the maximum is taken off
    targets, weights = torch.randint(V, (B, T)), torch.randn(B, T, dtype=torch.float64)
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole.flatten(0, 1), targets.flatten(), reduction="none").view(B, T)
    (expected * weights).sum().backward()

    def part(rank):
        padded = F.pad(logits, (0, -V % P), value=7e4)  # what stands in the padding must not matter
        mine = padded.chunk(P, -1)[rank].clone().requires_grad_()
        losses = tp.vocabulary_cross_entropy(mine, targets, V)
        (losses * weights).sum().backward()
        return losses.detach(), mine.grad

    results = run_ranks(P, part)
    for losses, _ in results:
        torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
    gradient = torch.cat([gradient for _, gradient in results], -1)
    torch.testing.assert_close(gradient[..., :V], whole.grad, rtol=0, atol=1e-12)
    assert not gradient[..., V:].any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_loss_of_half_precision_logits_is_fp32(dtype):
    logits, targets = torch.randn(B, T, 2 * V).to(dtype), torch.randint(2 * V, (B, T))
    losses = run_ranks(2, lambda rank: tp.vocabulary_cross_entropy(logits.chunk(2, -1)[rank], targets, 2 * V))
    expected = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(B, T)
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(losses[0], expected)


@pytest.mark.parametrize("logits, targets", (((2, 3, 5), (2, 3)), ((2, 3, 4), (2, 4))))
def test_loss_refuses_shapes_that_do_not_fit(logits, targets):
    with pytest.raises(ValueError, match="do not fit"):
        tp.vocabulary_cross_entropy(torch.zeros(logits), torch.zeros(targets, dtype=torch.long), 4)


# --- models -------------------------------------------------------------------------------------

MODELS = {"gpt": gpt, "gpt with dropout": lambda: gpt(dropout=0.3), "llama": llama, "llama, one key head": lambda: llama(1),
          "llama, tied": lambda: llama(4, tied=True)}
CUTS = [("gpt", 1), ("gpt", 4), ("gpt with dropout", 2), ("llama", 2), ("llama", 4), ("llama, one key head", 2), ("llama, tied", 2)]


@pytest.mark.parametrize("sequence", (False, True))
@pytest.mark.parametrize("name, P", CUTS)
def test_training_matches_one_process(name, P, sequence):
    """Losses, gradient norms and every parameter after AdamW steps with clipping and, without dropout, accumulation."""
    model = MODELS[name]()
    cut = [copy.deepcopy(model) for _ in range(P)]
    accumulate = 1 if "dropout" in name else 2
    expected = alone(model, batches())
    if "dropout" not in name:
        results = run_ranks(P, lambda rank: train(tp.tensor_parallel(cut[rank], None, sequence), batches(), None,
                                                  accumulate=accumulate))
    else:  # threads share the default generator
        results = spawn_ranks(P, _with_dropout, sequence)
    for result in results:
        assert_equal(result, expected)
    assert all(norm > 0.5 for norm in expected[1])  # clipping was on


def _with_dropout(rank, sequence):
    return train(tp.tensor_parallel(MODELS["gpt with dropout"](), None, sequence), batches(), None)


@pytest.mark.parametrize("sequence", (False, True))
@pytest.mark.parametrize("make", (gpt, llama))
def test_data_and_tensor_parallel_match_one_process(make, sequence):
    """4 ranks = 2 x 2; each data-parallel half has its own rows."""
    model = make()
    copies = [copy.deepcopy(model) for _ in range(4)]
    expected = alone(model, batches())

    def part(rank):
        groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
        tp_group, dp_group = groups[rank // 2], groups[2 + rank % 2]
        cut = tp.tensor_parallel(copies[rank], tp_group, sequence)
        dp = parallel.DataParallel(cut, dp_group, reduction="sum")
        rows = slice(0, B // 2) if rank < 2 else slice(B // 2, B)
        losses, norms, parameters = train(cut, batches(), tp_group, finish=dp.finish, rows=rows)
        losses = parallel.ring_all_reduce(torch.tensor(losses, dtype=torch.float64), dp_group).tolist()
        return losses, norms, parameters

    for result in run_ranks(4, part):
        assert_equal(result, expected)


def test_training_matches_torchs_parallelize_module():
    """The same MLP cut by DTensor: outputs, and gradients of each rank's slice."""
    torch.manual_seed(0)
    up, down, x = nn.Linear(6, 8).double(), nn.Linear(8, 6).double(), torch.randn(B, T, 6, dtype=torch.float64)

    def part(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        theirs = nn.Sequential(copy.deepcopy(up), nn.GELU(), copy.deepcopy(down))
        theirs = parallelize_module(theirs, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
        ours = nn.Sequential(tp._cut(up, "column", None, None, False), nn.GELU(), tp._cut(down, "row", None, None, False))
        outputs = []
        for model in (ours, theirs):
            y = model(x)
            y.square().sum().backward()
            outputs.append(y.detach())
        gradients = [(a.grad, b.grad.to_local()) for a, b in zip(ours.parameters(), theirs.parameters())]
        return [outputs, *gradients]

    for found in run_ranks(2, part, backend="gloo"):  # a DeviceMesh wants one of torch's own
        for ours, theirs in found:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_no_rank_holds_logits_of_the_whole_vocabulary():
    def largest(rank):
        sizes, model = [], tp.tensor_parallel(gpt())
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
            logits = model(batches()[0][:, :-1])
            tp.vocabulary_cross_entropy(logits, batches()[0][:, 1:], V).mean().backward()
        return logits.shape, sizes

    for shape, sizes in run_ranks(4, largest):
        assert shape == (B, T, 6)
        assert all(size[-1:] != (V,) for size in sizes if len(size))


def test_sequence_parallelism_keeps_norms_on_slices_of_the_text():
    def seen(rank, sequence):
        shapes, model = [], tp.tensor_parallel(gpt(), None, sequence)
        model.blocks[0].norm1.register_forward_hook(lambda module, inputs, y: shapes.append(y.shape))
        model(batches()[0][:, :-1])
        return shapes

    assert run_ranks(2, seen, False)[0] == [(B, T, 16)]
    assert run_ranks(2, seen, True)[0] == [(B, T // 2, 16)]


def test_gathered_logits_and_cached_decoding_match_one_process():
    model = llama(1).eval()
    copies, tokens = [copy.deepcopy(model) for _ in range(2)], batches()[0]
    expected = model(tokens[:, :T]).detach()

    @torch.no_grad()
    def decode(rank):
        cut = tp.tensor_parallel(copies[rank])
        cache = cut.new_cache(B, T)
        logits = torch.cat([cut(tokens[:, t:t + 1], cache) for t in range(T)], 1)
        return tp.gather_from_ranks(logits, -1)[..., :V]

    for logits in run_ranks(2, decode):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def _dies_or_hangs(rank, folder, how):
    (Path(folder) / str(os.getpid())).touch()
    dist.init_process_group("gloo")
    dist.barrier()  # from here on two seconds are long
    group = dist.new_group(timeout=timedelta(seconds=2))
    cut = tp.tensor_parallel(gpt(), group)
    if rank == 1:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        while not (Path(folder) / "done").exists():
            time.sleep(0.05)
        return
    began = time.monotonic()
    try:
        train(cut, batches(), group)
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    finally:
        (Path(folder) / "done").touch()


@pytest.mark.parametrize("how", ("dies", "hangs"))
def test_a_rank_that_dies_or_hangs_stops_the_others_with_a_message(how, tmp_path):
    """kill -9, or silent for longer than the group's time-out of 2 s: the other rank says what it waited for."""
    results = spawn_ranks(2, _dies_or_hangs, tmp_path, how, timeout=30, init=False, return_exceptions=True)
    message, seconds = results[0]
    assert re.search(r"tensor parallelism, rank 0 of 2: all-reduce of \(4, 8, 16\) did not get through", message) and "\n" not in message.split(": ")[0]
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


@pytest.mark.parametrize("make, P, message", (
    (lambda: gpt(n_heads=2), 4, "4 ranks cannot share 2 heads, 2 key and value heads and 64 hidden units: 1, 2 can"),
    (lambda: gpt(d_ff=18), 4, "18 hidden units: 1, 2 can"), (lambda: llama(4), 3, "3 ranks cannot share 4 heads"),
    (lambda: llama(qk_norm=True), 2, "beside a norm over all heads: 1 can")))
def test_a_model_that_does_not_fit_is_refused_with_what_would(make, P, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        run_ranks(P, lambda rank: tp.tensor_parallel(copy.deepcopy(model)))


def test_sequence_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="2 ranks cannot share 7 entries"):
        run_ranks(2, lambda rank: tp.tensor_parallel(gpt(), None, True)(batches()[0][:, :7]))


@pytest.mark.parametrize("flags, message", ((["--ranks", "3"], "--ranks must be 1, 2 or 4"), (["--d_model", "6"], "multiple of 4"),
                                            (["--steps", "0"], "--steps must be at least 1"), (["--seed", "-1"], "--seed")))
def test_bad_flags_are_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tensor_parallel.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "tensor_parallel.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


# --- BERT ---------------------------------------------------------------------------------------

def bert(task, dropout=0.0, **sizes):
    sizes = {"vocab_size": V, "context": T, "n_layers": 2, "n_heads": 4, "d_model": 16, "d_ff": 24,
             "initializer_range": 0.3, "dropout": dropout, "attention_dropout": dropout} | sizes
    return getattr(bert_file, task)(bert_file.BERTConfig(**sizes), generator=torch.Generator().manual_seed(1)).double()


def bert_loss(model, batch, group):
    """Ragged rows of two segments; of a pre-training model both losses, of the others one of tokens or of rows."""
    tokens, lengths = batch[:, :-1], torch.tensor([T, T - 3, T, T - 1])
    real, segments = torch.arange(T) < lengths[:, None], (torch.arange(T) > 3).expand(B, T).long()
    if isinstance(model, bert_file.BERTForPretraining):
        hidden = real & (batch[:, 1:] % 3 == 0)
        masked, following = model(tokens, segments, real, hidden)
        masked = tp.vocabulary_cross_entropy(masked, tokens[hidden], V, group) if group != "alone" \
            else F.cross_entropy(masked, tokens[hidden], reduction="none")
        return masked.mean() + F.cross_entropy(following, batch[:, -1] % 2)
    logits = model(tokens, segments, real)
    return F.cross_entropy(logits, batch[:, -1] % 2) if logits.dim() == 2 else F.cross_entropy(logits[real], tokens[real] % 2)


def train_bert(model, group, steps=2):
    optimizer, losses, norms = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), [], []
    for step, batch in enumerate(batches(steps)):
        torch.manual_seed(step)
        loss = bert_loss(model, batch, group)
        loss.backward()
        norms.append((nn.utils.clip_grad_norm_(model.parameters(), 0.5) if group == "alone"
                      else tp.clip_grad_norm(model.parameters(), 0.5, group)).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {name: tp.whole(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("sequence", (False, True))
@pytest.mark.parametrize("task, P", (("BERTForPretraining", 2), ("BERTForPretraining", 4), ("BERTClassifier", 2),
                                     ("BERTSpans", 2), ("BERTTagger", 4)))
def test_training_bert_matches_one_process(task, P, sequence):
    """Post-norm, a bias of its own at the tied head, heads that are whole, padding; no number of ranks divides V."""
    expected = train_bert(bert(task), "alone")
    results = run_ranks(P, lambda rank: train_bert(tp.tensor_parallel(bert(task), None, sequence), None))
    for result in results:
        assert_equal(result, expected)
    assert min(expected[1]) > 0.5  # clipping was on


@pytest.mark.parametrize("sequence", (False, True))
def test_dropout_of_bert_is_that_of_one_process(sequence):
    """Also on attention's weights, whose heads are on different ranks."""
    expected = train_bert(bert("BERTForPretraining", 0.3), "alone")
    without = train_bert(bert("BERTForPretraining", 0.3, attention_dropout=0.0), "alone")
    assert abs(expected[0][0] - without[0][0]) > 1e-6
    for result in spawn_ranks(2, _bert_with_dropout, sequence):
        assert_equal(result, expected)


def _bert_with_dropout(rank, sequence):
    return train_bert(tp.tensor_parallel(bert("BERTForPretraining", 0.3), None, sequence), None)


def _bert_recomputed(rank, sequence):
    from recompute import recompute
    cut = tp.tensor_parallel(bert("BERTForPretraining", 0.3, attention_dropout=0.0), None, sequence)
    recompute(cut.bert, "block")
    return train_bert(cut, None)


def test_a_recomputed_block_drops_what_it_dropped():
    """Recomputation calls a block's forward, past its hooks."""
    expected = train_bert(bert("BERTForPretraining", 0.3, attention_dropout=0.0), "alone")
    for result in spawn_ranks(2, _bert_recomputed, True):
        assert_equal(result, expected)


def test_a_refused_length_leaves_modes_of_the_caller_alone():
    class Mine(torch.overrides.TorchFunctionMode):
        seen = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            Mine.seen += 1
            return function(*args, **(kwargs or {}))

    def part(rank):
        cut = tp.tensor_parallel(gpt(0.3), None, True)
        with Mine():
            with pytest.raises(ValueError, match="2 ranks cannot share 7 entries"):
                cut(batches()[0][:, :7])
            before = Mine.seen
            torch.ones(2).add(1)
            return Mine.seen - before

    assert min(run_ranks(2, part)) > 0


def test_every_rank_holds_its_share_of_bert():
    """Encoder matrices, vocabulary and its bias in slices; an encoder alone is cut, too, and gives the whole x."""
    model = bert("BERT")
    expected = model.eval()(batches()[0][:, :-1]).detach()

    def part(rank):
        cut = tp.tensor_parallel(bert("BERTForPretraining"))
        sizes = {name: tuple(p.shape) for name, p in cut.named_parameters()}
        return sizes, tp.tensor_parallel(bert("BERT")).eval()(batches()[0][:, :-1]).detach()

    for sizes, x in run_ranks(4, part):
        assert sizes["bert.token_embedding.weight"] == (6, 16) and sizes["mlm_bias"] == (6,)
        assert sizes["bert.blocks.1.attention.qkv.weight"] == (12, 16) and sizes["bert.blocks.1.mlp.down.weight"] == (16, 6)
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)


def test_a_model_without_a_plan_and_a_bert_that_does_not_fit_are_refused():
    with pytest.raises(ValueError, match="Linear has no tp_plan: GPT, Llama"):
        tp.tensor_parallel(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="3 ranks cannot share 4 heads, 4 key and value heads and 24 hidden units"):
        run_ranks(3, lambda rank: tp.tensor_parallel(bert("BERT")))
