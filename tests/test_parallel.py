"""Ring collectives against torch.distributed's; data parallelism against one process on the whole batch."""

import copy
import math
import os
import runpy
import signal
import sys
import time
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import parallel
import processes
from conftest import ROOT, run_ranks, spawn_ranks
from parallel import DataParallel, average_gradients, rank_and_size
from parallel import ring_all_gather, ring_all_reduce, ring_reduce_scatter

TINY = 1e-5  # MiB: a bucket for every parameter
EXACT = dict(atol=1e-12, rtol=0)  # float64, values near 1, sums in another order


def seeded(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Net(nn.Module):
    """A tied embedding, a frozen layer, a buffer, a parameter with gaps, and two optional branches."""

    def __init__(self, width=6, vocabulary=11):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.hidden = nn.Linear(width, width)
        self.hidden.weight = nn.Parameter(torch.zeros(width, 2 * width, dtype=torch.float64)[:, ::2])
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.ones(()))

    def forward(self, tokens, branch=None):
        x = F.gelu(self.hidden(self.frozen(self.embedding(tokens)))) * self.scale
        if branch is not None:
            x = x + getattr(self, branch)(x)
        return self.head(x)


def net(seed=0):
    model = Net().double()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=p.dtype) * 0.3)
    return model


def batch(step, size, vocabulary=11):
    draw = torch.Generator().manual_seed(100 + step)
    return torch.randint(vocabulary, (2, size), generator=draw)


def loss_of(model, part, branch=None, reduction="mean"):
    return F.cross_entropy(model(part[0], branch), part[1], reduction=reduction)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def one_process(steps=3, size=24, branch=None):
    model = net()
    optimizer = adamw(model)
    for step in range(steps):
        loss_of(model, batch(step, size), branch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same(a, b, **tolerance):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values()):
        torch.testing.assert_close(p, q, **(tolerance or EXACT), msg=lambda text: f"{name}: {text}")


def part_of(step, size, rank, P):
    return batch(step, size).tensor_split(P, dim=1)[rank]


# --- ring collectives ---------------------------------------------------------------------------------

def compare_collectives(rank, shape, dtype, strided):
    P = dist.get_world_size()
    x = seeded(*shape, seed=rank).mul(8).round().to(dtype)  # small integers: exact in any order
    if strided:
        x = x.t()
    before = x.clone()
    summed = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed)
    assert torch.equal(ring_all_reduce(x), summed)
    C = math.ceil(x.numel() / P)
    padded = F.pad(x.reshape(-1), (0, P * C - x.numel()))
    scattered = padded.new_empty(C)
    dist.reduce_scatter(scattered, list(padded.view(P, C)))
    assert torch.equal(ring_reduce_scatter(x), scattered)
    gathered = [torch.empty(x.shape, dtype=dtype) for _ in range(P)]
    dist.all_gather(gathered, x.contiguous())
    assert torch.equal(ring_all_gather(x), torch.stack(gathered))
    assert torch.equal(x, before)


@pytest.mark.parametrize("P", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 6)])
def test_ring_collectives_match_torch_distributed(P, shape):
    run_ranks(P, compare_collectives, shape, torch.float64, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("strided", [False, True])
def test_ring_collectives_match_torch_distributed_in_other_dtypes_and_strides(dtype, strided):
    run_ranks(3, compare_collectives, (5, 7), dtype, strided)


def test_ring_all_reduce_matches_torch_distributed_on_random_numbers_and_is_the_same_on_every_rank():
    def fn(rank, dtype):
        x = seeded(1000, seed=rank, dtype=dtype)
        total = x.clone()
        dist.all_reduce(total)
        return ring_all_reduce(x), total
    # Four terms of size ~1 in another order: a few units in the last place of numbers up to ~8.
    for dtype, tolerance in [(torch.float64, 1e-14), (torch.float32, 1e-5), (torch.bfloat16, 0.2)]:
        results = run_ranks(4, fn, dtype)
        for ours, theirs in results:
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
            assert torch.equal(ours, results[0][0])


def test_ring_collectives_accept_scalars_and_empty_tensors():
    def fn(rank):
        assert ring_all_reduce(torch.tensor(float(rank))) == 3
        assert ring_all_gather(torch.tensor(rank)).tolist() == [0, 1, 2]
        assert ring_all_reduce(torch.zeros(0, 4)).shape == (0, 4)
        assert not ring_all_reduce(torch.ones(2, requires_grad=True)).requires_grad
    run_ranks(3, fn)


def test_ring_collectives_match_torch_distributed_in_subgroups():
    def fn(rank):
        groups = [dist.new_group([0, 2, 3]), dist.new_group([4, 1])]  # torch sorts the ranks of a group
        mine = groups[rank in (1, 4)]
        x = seeded(7, seed=rank)
        total = x.clone()
        dist.all_reduce(total, group=mine)
        torch.testing.assert_close(ring_all_reduce(x, mine), total, **EXACT)
        with pytest.raises(ValueError, match=f"global rank {rank} is not in the group"):
            ring_all_reduce(x, groups[rank not in (1, 4)])
    run_ranks(5, fn)


@pytest.mark.parametrize("P", [1, 2, 3, 8])
def test_bytes_sent_by_ring_all_reduce_match_the_formula(P, monkeypatch):
    sent, exchange = [], dist.batch_isend_irecv

    def counted(operations):
        sent.append(sum(op.tensor.nbytes for op in operations if op.op is dist.isend))
        return exchange(operations)

    monkeypatch.setattr(dist, "batch_isend_irecv", counted)
    run_ranks(P, lambda rank: ring_all_reduce(torch.zeros(24 * P, dtype=torch.float32)))
    assert sum(sent) / P == 2 * (P - 1) / P * (24 * P * 4)  # the ranks share the list


def test_without_torch_distributed_a_group_has_one_rank():
    assert rank_and_size() == (0, 1)
    x = seeded(5)
    assert torch.equal(ring_all_reduce(x), x)
    model = net()
    dp = DataParallel(model)
    loss_of(model, batch(0, 4)).backward()
    expected = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    with dp.no_sync():
        pass
    dp.finish()
    average_gradients(model)
    for p, gradient in expected.items():
        assert torch.equal(p.grad, gradient) and dp.gradient(p) is p.grad


# --- data parallelism against one process ---------------------------------------------------------------

def train_naive(rank, steps=3, size=24, branch=None):
    P, model = dist.get_world_size(), net()
    optimizer = adamw(model)
    for step in range(steps):
        loss_of(model, part_of(step, size, rank, P), branch).backward()
        average_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return model


def train(rank, steps=3, size=24, branch=None, set_to_none=True, microbatches=1, **options):
    P, model = dist.get_world_size(), net(seed=rank)  # other values on every rank: rank 0's count
    model.scale.add_(rank)
    dp, optimizer = DataParallel(model, **options), adamw(model)
    for step in range(steps):
        parts = part_of(step, size, rank, P).tensor_split(microbatches, dim=1)
        for i, part in enumerate(parts):
            with dp.no_sync() if i < microbatches - 1 else nullcontext():
                (loss_of(model, part, branch) / microbatches).backward()
        dp.finish()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    return model


# torch warns that buckets are contiguous where Net's transposed parameter is not.
@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract")
@pytest.mark.parametrize("P", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("bucket_mb", [TINY, 25.0])
def test_data_parallel_matches_one_process(P, bucket_mb):
    # Every branch in every step: what set_to_none=False does to unused parameters has a test of its own.
    expected = one_process(branch="left")
    for set_to_none in (True, False):
        for model in run_ranks(P, lambda rank: train(rank, branch="left", bucket_mb=bucket_mb,
                                                     set_to_none=set_to_none)):
            assert_same(model, expected)


@pytest.mark.parametrize("P", [1, 2, 3])
def test_average_gradients_matches_one_process(P):
    expected = one_process(branch="left")
    for model in run_ranks(P, lambda rank: train_naive(rank, branch="left")):
        model.right = expected.right  # unused everywhere: zeros here, None there
        assert_same(model, expected)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulation_matches_one_process(set_to_none):
    expected = one_process(branch="left")
    options = dict(branch="left", microbatches=3, set_to_none=set_to_none)
    for model in run_ranks(2, lambda rank: train(rank, **options)):
        assert_same(model, expected)


def test_no_sync_sends_nothing(monkeypatch):
    calls, all_reduce = [], dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **kw: calls.append(1) or all_reduce(*args, **kw))

    def fn(rank):
        model = net()
        dp = DataParallel(model)
        counts = []
        for _ in range(2):
            with dp.no_sync():
                loss_of(model, part_of(0, 8, rank, 2)).backward()
            dist.barrier()
            counts.append(len(calls))
            dist.barrier()
        loss_of(model, part_of(0, 8, rank, 2)).backward()
        dp.finish()
        dist.barrier()
        return counts + [len(calls)]

    for counts in run_ranks(2, fn):
        assert counts == [0, 0, 2]  # one bucket, two ranks


def test_all_backwards_under_no_sync_match_one_process():
    def fn(rank):
        model = net()
        dp = DataParallel(model)
        with dp.no_sync():
            loss_of(model, part_of(0, 8, rank, 2)).backward()
        dp.finish()
        return model
    expected = net()
    loss_of(expected, batch(0, 8)).backward()
    for model in run_ranks(2, fn):
        for p, q in zip(model.parameters(), expected.parameters()):
            assert p.grad is None and q.grad is None or torch.allclose(p.grad, q.grad, **EXACT)


@pytest.mark.parametrize("bucket_mb", [TINY, 25.0])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_parameters_unused_on_some_ranks_match_one_process(bucket_mb, set_to_none):
    """Who uses which branch, step by step: left by ranks 0 and 2, right by all, none, left by rank 1."""
    branches = [["left", None, "left"], ["right"] * 3, [None] * 3, [None, "left", None]]

    def fn(rank):
        model = net()
        dp, optimizer = DataParallel(model, bucket_mb=bucket_mb), adamw(model)
        absent = []
        for step, branch in enumerate(branches):
            loss_of(model, part_of(step, 12, rank, 3), branch[rank]).backward()
            dp.finish()
            absent.append([name for name, p in model.named_parameters() if p.grad is None])
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        return model, absent

    model = net()
    optimizer, expected = adamw(model), []
    for step, branch in enumerate(branches):
        for rank in range(3):
            (loss_of(model, part_of(step, 12, rank, 3), branch[rank]) / 3).backward()
        expected.append([name for name, p in model.named_parameters() if p.grad is None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    assert "right.weight" in expected[0] and "left.weight" not in expected[0]
    for ours, absent in run_ranks(3, fn):
        assert absent == expected
        assert_same(ours, model)


@pytest.mark.parametrize("P", [2, 4])
def test_sum_over_uneven_parts_matches_one_process(P):
    """3 samples over P ranks: for P = 4 the last has none, and only calls finish()."""
    def fn(rank):
        model = net()
        dp, optimizer = DataParallel(model, reduction="sum"), adamw(model)
        for step in range(3):
            part = part_of(step, 3, rank, P)
            if part.numel():
                (loss_of(model, part, "left", reduction="sum") / 3).backward()
            dp.finish()
            optimizer.step()
            optimizer.zero_grad()
        return model
    expected = one_process(size=3, branch="left")
    for model in run_ranks(P, fn):
        assert_same(model, expected)


def test_data_parallel_in_subgroups_matches_one_process_each():
    """Two independent replicas-of-two over four ranks, with the ranks interleaved."""
    def fn(rank):
        groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
        model = net(seed=rank)
        dp, optimizer = DataParallel(model, group=groups[rank % 2]), adamw(model)
        for step in range(2):
            loss_of(model, part_of(step + 10 * (rank % 2), 8, rank // 2, 2)).backward()
            dp.finish()
            optimizer.step()
            optimizer.zero_grad()
        return model
    models = run_ranks(4, fn)
    for first in (0, 1):
        expected = net(seed=first)
        optimizer = adamw(expected)
        for step in range(2):
            loss_of(expected, batch(step + 10 * first, 8)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_same(models[first], expected)
        assert_same(models[first + 2], expected)


def mixed(seed=0):
    model = nn.Sequential(*(nn.Linear(4, 4, dtype=dtype) for dtype in [torch.float32, torch.bfloat16] * 2))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw))
    return model


def mixed_loss(model, x):
    """Of a size that gives gradients of about one: a sum of large ones that cancel would keep their rounding errors."""
    for layer in model:
        x = layer(x.to(layer.weight.dtype))
    return x.float().square().mean() / 256


def test_mixed_dtypes_match_the_mean_of_the_gradients():
    def fn(rank, bucket_mb):
        model = mixed()
        dp = DataParallel(model, bucket_mb=bucket_mb)
        mixed_loss(model, seeded(3, 4, seed=rank)).backward()
        dp.finish()
        return [p.grad for p in model.parameters()]
    gradients = []
    for rank in range(2):
        model = mixed()
        mixed_loss(model, seeded(3, 4, seed=rank)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for bucket_mb in (TINY, 25.0):
        for ours in run_ranks(2, fn, bucket_mb):
            for mean, a, b in zip(ours, *gradients):  # two halves and one sum: the same roundings
                assert mean.dtype == a.dtype and torch.equal(mean, a / 2 + b / 2)


@pytest.mark.parametrize("P", [1, 3])
def test_grad_dtype_matches_sums_in_fp32_of_bf16_gradients(P):
    """Two microbatches a step, two steps; the last layer is not used in the second."""
    def fn(rank):
        model = mixed()
        dp, results = DataParallel(model, grad_dtype=torch.float32), []
        for step in range(2):
            for micro in range(2):
                with dp.no_sync() if micro == 0 else nullcontext():
                    mixed_loss(model[:4 - step], seeded(3, 4, seed=100 * step + 10 * micro + rank)).backward()
            dp.finish()
            assert all(p.grad is None for p in model.parameters())
            results.append([copy.deepcopy(dp.gradient(p)) for p in model.parameters()])
        return results
    expected = []
    for step in range(2):
        sums = [None] * 8
        for seed in (100 * step + 10 * micro + rank for micro in range(2) for rank in range(P)):
            model = mixed()
            mixed_loss(model[:4 - step], seeded(3, 4, seed=seed)).backward()
            sums = [s if p.grad is None else (0 if s is None else s) + p.grad.double() / P
                    for s, p in zip(sums, model.parameters())]
        expected.append(sums)
    for results in run_ranks(P, fn):
        for ours, sums in zip(results, expected):
            assert [g is None for g in ours] == [s is None for s in sums]
            for g, s in zip(ours, sums):
                if s is not None:  # fp32 sums; in bf16 the error would be near 4e-3 of the value
                    assert g.dtype == torch.float32
                    torch.testing.assert_close(g.double(), s, atol=1e-6, rtol=1e-6)


def test_parameters_and_buffers_are_the_first_ranks_after_construction():
    def fn(rank):
        groups = [dist.new_group([1, 2])]
        model = net(seed=rank)
        model.scale.fill_(rank + 5.0)
        model.register_buffer("mask", torch.tensor([rank == 1, False]))
        names = list(model.state_dict())
        if rank:
            DataParallel(model, group=groups[0])
        assert list(model.state_dict()) == names
        return model
    first, one, two = run_ranks(3, fn)
    assert_same(two, one)
    assert two.scale == 6 and two.mask.tolist() == [True, False]
    assert first.scale == 5 and torch.equal(one.head.weight, net(seed=1).head.weight)


def test_reduction_and_bucket_mb_change_something(monkeypatch):
    sizes, all_reduce = [], dist.all_reduce

    def logged(tensor, *args, **keywords):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **keywords)

    monkeypatch.setattr(dist, "all_reduce", logged)

    def fn(rank, **options):
        model = net()
        dp = DataParallel(model, **options)
        loss_of(model, part_of(0, 8, rank, 2)).backward()
        dp.finish()
        return model.hidden.bias.grad
    mean, total = (run_ranks(2, lambda rank: fn(rank, reduction=r))[0] for r in ("mean", "sum"))
    torch.testing.assert_close(2 * mean, total, **EXACT)
    assert len(sizes) == 4  # two runs, two ranks, one bucket
    run_ranks(2, lambda rank: fn(rank, bucket_mb=TINY))
    assert len(sizes) == 4 + 2 * len([p for p in net().parameters() if p.requires_grad])


def test_the_first_bucket_is_small_and_the_last_a_part_only():
    MiB = 2**20

    def fn(rank, **options):
        layers = [nn.Linear(512, 512, bias=False) for _ in range(8)]  # 1 MiB each
        return [bucket.flat.nbytes // MiB for bucket in DataParallel(nn.Sequential(*layers), **options)._buckets]
    assert run_ranks(2, fn)[0] == [1, 6, 1]  # 0.7 of 8 MiB are 5.6
    assert run_ranks(2, lambda rank: fn(rank, bucket_mb=3.0))[0] == [1, 3, 3, 1]
    assert run_ranks(2, lambda rank: fn(rank, bucket_mb=0.5))[0] == [1] * 8
    assert run_ranks(2, lambda rank: fn(rank, grad_dtype=torch.float64))[0] == [2, 12, 2]


def test_a_large_parameter_does_not_keep_others_waiting():
    def fn(rank):
        sizes = [12, 1, 1, 6, 1]  # MiB, from the first to the last; 0.7 of 21 are 14.7
        rows = [nn.Linear(512, 512 * n, bias=False) for n in sizes]
        dp = DataParallel(nn.Sequential(*rows), bucket_mb=7.0)
        return [[p.nbytes // 2**20 for p in bucket.parameters] for bucket in dp._buckets]
    assert run_ranks(2, fn)[0] == [[1], [6, 1], [1], [12]]


def test_parameters_do_not_keep_it_alive_and_take_another():
    def fn(rank):
        model, freed = net(), []
        for step in range(3):
            dp = DataParallel(model)  # in place of the last
            loss_of(model, part_of(step, 8, rank, 2)).backward()
            dp.finish()
            freed.append(weakref.ref(dp))
            assert freed[0]() is (dp if step == 0 else None)
            gradient = model.hidden.bias.grad.clone()
            model.zero_grad()
        return gradient
    alone = net()
    loss_of(alone, batch(2, 8)).backward()
    for gradient in run_ranks(2, fn):
        torch.testing.assert_close(gradient, alone.hidden.bias.grad, **EXACT)


def test_buckets_are_sent_while_backward_runs(monkeypatch):
    events, all_reduce = [[], []], dist.all_reduce

    def logged(tensor, *args, **keywords):
        events[dist.get_rank()].append("send")
        return all_reduce(tensor, *args, **keywords)

    monkeypatch.setattr(dist, "all_reduce", logged)

    def fn(rank):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
        dp = DataParallel(model, bucket_mb=TINY)
        for i, layer in enumerate(model):
            layer.weight.register_hook(lambda gradient, i=i: events[rank].append(i))  # before p.grad exists
        model(torch.ones(2, 4)).sum().backward()
        events[rank].append("end of backward")
        dp.finish()

    run_ranks(2, fn)
    for event in events:
        assert event.index("send") < event.index(0)  # the first layer's gradient does not exist yet
        assert event.count("send") == 6 and event[-1] == "end of backward"  # nothing is left to finish()


def test_buckets_start_in_one_order_although_ranks_finish_them_in_another():
    def fn(rank):
        model = nn.ModuleList(nn.Linear(3, 3).double() for _ in range(3))
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.1)
        dp = DataParallel(model, bucket_mb=TINY)
        order = [0, 1, 2] if rank == 0 else [2, 0, 1]
        for step in range(3):
            model.zero_grad()
            x = seeded(2, 3, seed=rank)
            for i in order:
                x = torch.tanh(model[i](x))
            x.sum().backward()
            dp.finish()
        return [p.grad for p in model.parameters()], order
    results = run_ranks(2, fn)
    expected = nn.ModuleList(nn.Linear(3, 3).double() for _ in range(3))
    with torch.no_grad():
        for p in expected.parameters():
            p.fill_(0.1)
    for rank, (_, order) in enumerate(results):
        x = seeded(2, 3, seed=rank)
        for i in order:
            x = torch.tanh(expected[i](x))
        (x.sum() / 2).backward()
    for gradients, _ in results:
        for gradient, p in zip(gradients, expected.parameters()):
            torch.testing.assert_close(gradient, p.grad, **EXACT)


# --- mistakes ---------------------------------------------------------------------------------------------

def test_a_second_backward_before_finish_is_refused():
    def fn(rank):
        model = net()
        dp = DataParallel(model)
        loss_of(model, batch(0, 4)).backward()
        with pytest.raises(RuntimeError, match="no_sync"):
            loss_of(model, batch(0, 4)).backward()
        dp.finish()
    run_ranks(2, fn)


@pytest.mark.parametrize("bucket_mb", [TINY, 25.0])
def test_training_goes_on_after_an_exception_in_backward(bucket_mb):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise MemoryError("out of memory")

    def fn(rank):
        model = net()
        dp, optimizer = DataParallel(model, bucket_mb=bucket_mb), adamw(model)
        hook = model.hidden.register_forward_hook(lambda _, __, out: Fails.apply(out) if rank == 1 else None)
        with pytest.raises(MemoryError) if rank == 1 else nullcontext():
            loss_of(model, batch(50, 8), "left").backward()
        hook.remove()
        dp.finish()
        optimizer.zero_grad()  # every rank drops the step
        for step in range(3):
            loss_of(model, part_of(step, 24, rank, 2), "left").backward()
            dp.finish()
            optimizer.step()
            optimizer.zero_grad()
        return model
    expected = one_process(branch="left")
    for model in run_ranks(2, fn):
        assert_same(model, expected)


def test_ranks_with_different_models_are_refused_on_every_rank():
    def fn(rank, build, message):
        with pytest.raises(ValueError, match=message):
            build(rank)
        return True
    cases = [
        (lambda rank: DataParallel(nn.Linear(3, 2 + rank // 2)), r"rank 0 .*\(2, 3\).*rank 2 .*\(3, 3\)"),
        (lambda rank: DataParallel(nn.Linear(3, 2, bias=rank == 0)), r"rank 0 .*\[bias .*rank 1 .*\[nothing"),
        (lambda rank: DataParallel(nn.Linear(3, 2).requires_grad_(rank == 0)), "grad=True.*grad=False"),
        (lambda rank: DataParallel(nn.Linear(3, 2), bucket_mb=1.0 + rank), "bucket_mb=1.0.*bucket_mb=2.0"),
        (lambda rank: DataParallel(nn.Linear(3, 2), reduction=("sum", "mean")[rank > 0]), "='sum'.*='mean'"),
    ]
    for build, message in cases:
        assert run_ranks(3, fn, build, message) == [True] * 3


def test_bad_arguments_are_refused():
    for options in (dict(reduction="average"), dict(bucket_mb=0), dict(bucket_mb=math.nan)):
        with pytest.raises(ValueError, match=str(next(iter(options.values())))):
            DataParallel(nn.Linear(2, 2), **options)
    with pytest.raises(ValueError, match="no parameter of Linear requires a gradient"):
        DataParallel(nn.Linear(2, 2).requires_grad_(False))


# --- real processes -----------------------------------------------------------------------------------

def against_ddp(rank):
    def run(model, module, finish):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(4):
            tokens, targets = part_of(step, 16, rank, 2)
            F.cross_entropy(module(tokens, "left"), targets).backward()
            finish()
            optimizer.step()
            optimizer.zero_grad()
        return model
    ours, theirs = net().float(), net().float()  # right is never used
    ddp = nn.parallel.DistributedDataParallel(theirs, find_unused_parameters=True)
    return run(ours, ours, DataParallel(ours, bucket_mb=TINY).finish), run(theirs, ddp, lambda: None)


def test_data_parallel_matches_torch_ddp():
    for ours, theirs in spawn_ranks(2, against_ddp):
        # The same operations in fp32; only AdamW's division enlarges a last bit, of gradients near zero.
        assert_same(ours, theirs, atol=1e-6, rtol=1e-6)


def dies(rank):
    model = net()
    dp = DataParallel(model)
    for step in range(100):
        if rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        loss_of(model, part_of(step, 8, rank, 2)).backward()
        dp.finish()
        model.zero_grad()


def test_a_rank_that_dies_makes_the_others_raise():
    started = time.monotonic()
    survivor, dead = spawn_ranks(2, dies, timeout=20, return_exceptions=True)
    assert isinstance(survivor, RuntimeError) and "rank 0" in str(survivor)
    assert isinstance(dead, ProcessLookupError) and "exit code -9" in str(dead)
    assert time.monotonic() - started < 20


def is_gone(pid):
    """No process, not even a zombie, has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def record_pid_and_sleep(rank, folder):
    (folder / str(rank)).write_text(str(os.getpid()))
    time.sleep(60)


def test_no_process_remains_after_a_time_out(tmp_path):
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2 not back after 3"):
        spawn_ranks(2, record_pid_and_sleep, tmp_path, timeout=3.0)
    pids = [int(file.read_text()) for file in tmp_path.iterdir()]
    assert len(pids) == 2
    deadline = time.monotonic() + 5  # their parent, multiprocessing's fork server, reaps them
    while not all(map(is_gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(is_gone, pids))


@pytest.mark.parametrize("flag, value", [
    ("--batch", "7"), ("--ranks", "0"), ("--steps", "0"), ("--d_model", "-1"), ("--bucket_mb", "0"),
    ("--bucket_mb", "x"), ("--seed", "1" + "0" * 30)])
def test_demo_refuses_bad_flags_in_one_line(flag, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["parallel.py", flag, value])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "parallel.py"), run_name="__main__")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and len(message.splitlines()) == 1 and flag in message


def test_demo_starts_as_many_ranks_as_asked_whatever_another_launcher_left_in_the_environment(monkeypatch):
    started = []
    monkeypatch.setattr(sys, "argv", ["parallel.py", "--ranks", "2"])
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(processes, "start_ranks", lambda function, arguments, P: started.append(P))
    runpy.run_path(str(ROOT / "parallel.py"), run_name="__main__")
    assert started == [2]


def test_empty_and_scalar_parameters_match_the_mean_of_the_gradients():
    def fn(rank):
        model = nn.ParameterList([torch.zeros(0, 3), torch.ones(()), torch.ones(2)])
        dp = DataParallel(model, bucket_mb=TINY)
        (model[0].sum() + (rank + 1) * model[1] * model[2].sum()).backward()
        dp.finish()
        return [p.grad for p in model]
    for empty, scalar, pair in run_ranks(3, fn):  # the mean of 1, 2, 3 is 2; a third is not exact in fp32
        assert empty.shape == (0, 3)
        torch.testing.assert_close((scalar.item(), pair.tolist()), (4.0, [2.0, 2.0]), atol=1e-6, rtol=0)


# --- meshes ---------------------------------------------------------------------------------------

def test_mesh_groups_are_the_lines_of_the_grid():
    def lines(rank):
        mesh = parallel.mesh(dp=2, tp=2, pp=2)
        return {axis: dist.get_process_group_ranks(group) for axis, group in vars(mesh).items()}

    found = run_ranks(8, lines)
    assert found[0] == {"pp": [0, 4], "dp": [0, 2], "ep": [0], "cp": [0], "tp": [0, 1], "data": [0, 2], "replicas": [0, 2],
                        "back": [0, 4]}
    assert found[7]["tp"] == [6, 7] and found[7]["dp"] == [5, 7] and found[7]["pp"] == [3, 7]


def test_mesh_sums_along_each_axis_see_its_ranks_alone():
    def sums(rank):
        mesh, result = parallel.mesh(tp=2, cp=2, ep=2), {}
        for axis, group in vars(mesh).items():
            total = torch.tensor([2.0**rank])
            dist.all_reduce(total, group=group)
            result[axis] = int(total.item())
        return result

    found = run_ranks(8, sums)  # ranks (ep, cp, tp)
    assert found[5]["tp"] == 2**4 + 2**5 and found[5]["cp"] == 2**5 + 2**7 and found[5]["ep"] == 2**1 + 2**5
    assert found[5]["data"] == 2**1 + 2**3 + 2**5 + 2**7 and found[5]["replicas"] == found[5]["cp"]
    assert found[5]["dp"] == found[5]["pp"] == 2**5


@pytest.mark.parametrize("sizes, message", (
    ({"dp": 2, "tp": 3}, r"2 \* 3 \* 1 \* 1 \* 1 = 6 does not fit 4"), ({"tp": 3}, "a multiple of 3 does not fit 4"),
    ({"dp": 0}, "= 0 does not fit 4"), ({"tp": -1, "pp": -4}, "does not fit 4")))
def test_mesh_refuses_a_product_that_does_not_fit_and_says_it(sizes, message):
    with pytest.raises(ValueError, match=message):
        run_ranks(4, lambda rank: parallel.mesh(**sizes))
