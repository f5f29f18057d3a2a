"""ZeRO against one process in float64, torch's ZeroRedundancyOptimizer and fully_shard; memory and messages counted."""

import copy
import gc
import itertools
import re
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from conftest import run_ranks, spawn_ranks
from torch.utils.checkpoint import checkpoint

import communication
import flattening
import parallel
import tensor_parallel as tp
import zero_memory
from gpt import GPT, GPTConfig
from llama import Llama, LlamaConfig, RMSNorm
from zero import ZeRO

T, V, B = 8, 21, 12
adamw = partial(torch.optim.AdamW, lr=1e-2)


def gpt(dtype=torch.float64, generator=True, **sizes):
    sizes = {"vocab_size": V, "context": T, "n_layers": 3, "n_heads": 2, "d_model": 8} | sizes
    return GPT(GPTConfig(**sizes), generator=torch.Generator().manual_seed(1) if generator else None).to(dtype)


class ExactNorm(RMSNorm):
    """Llama's norm takes its statistics in fp32, whose roundings would hide what is exact in float64."""

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.gain


def llama(tied=False, dtype=torch.float64, generator=True, n_layers=2):
    sizes = {"vocab_size": V, "context": T, "n_layers": n_layers, "n_heads": 4, "n_kv_heads": 2, "d_model": 16, "d_ff": 24}
    model = Llama(LlamaConfig(**sizes, tied=tied), generator=torch.Generator().manual_seed(1) if generator else None).to(dtype)
    for module in model.modules() if dtype == torch.float64 else ():
        if type(module) is RMSNorm:
            module.__class__ = ExactNorm
    return model


MODELS = {"gpt": gpt, "llama": llama, "tied llama": partial(llama, True)}


def batches(steps=3):
    return [torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(i)) for i in range(steps)]


def loss_of(model, rows):
    """This part's share of the mean over the whole batch."""
    logits = model(rows[:, :-1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum") / (B * T)


def decay(name, p):
    return {"weight_decay": 0.1 if p.dim() > 1 else 0.0}


def one_process(model, optimizer=adamw, steps=3, clip=0.5, losses=loss_of):
    """Parameters, and gradient norms, after some steps on whole batches."""
    kinds = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kinds.setdefault(p.dim() > 1, {"params": [], **decay(name, p)})["params"].append(p)
    optimizer, norms = optimizer(list(kinds.values())), []
    for batch in batches(steps):
        losses(model, batch).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
    return values(model), norms


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def rows_of(batch, rank, P):
    """Uneven parts: the first ranks have more."""
    return batch.tensor_split(P)[rank] if B % P else batch[rank::P]


def train(rank, P, model, stage, accumulate=1, optimizer=adamw, steps=3, clip=0.5, losses=loss_of, group=None, sync=False,
          **options):
    model = model() if callable(model) and not isinstance(model, nn.Module) else model
    trainer = ZeRO(model, optimizer, group, stage, reduction="sum", groups=decay, **{"bucket_mb": 0.006} | options)
    norms = []
    for batch in batches(steps):
        parts = rows_of(batch, rank, P).tensor_split(accumulate)
        for i, part in enumerate(parts):
            with nullcontext() if i == accumulate - 1 or sync else trainer.no_sync():
                losses(model, part).backward()
        trainer.finish()
        norms.append(trainer.clip_grad_norm(clip).item())
        trainer.step()
        trainer.zero_grad()
    return trainer, norms


def result(trainer):
    with trainer.gathered():
        return values(trainer.model)


def assert_same(found, expected, tolerance=1e-12):
    (parameters, norms), (wanted, wanted_norms) = found, expected
    assert list(parameters) == list(wanted)
    for name, p in parameters.items():
        assert (p - wanted[name]).abs().max() <= tolerance, name
    assert max(abs(a - b) for a, b in zip(norms, wanted_norms)) <= tolerance


# --- equality --------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("P", [1, 2, 3, 4])
def test_every_stage_and_offload_match_one_process(P, name, dtype):
    """Sums over ranks are in another order. Accumulation, clipping, weight decay by group, other data on every rank. The
    llamas of 2 and 4 ranks are tied."""
    make = partial(gpt, dtype, n_layers=2) if name == "gpt" else partial(llama, P % 2 == 0, dtype, n_layers=1)
    optimizer, moments = adamw, 2
    tolerance = 1e-12
    if dtype == torch.float32:  # of a gradient that is nothing but rounding, Adam makes a whole step
        optimizer, moments, tolerance = partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1, 2e-6  # some roundings around 1

    def work(rank):
        for stage, offload in itertools.product(range(4), (False, True)):
            trainer, norms = train(rank, P, make, stage, 2, optimizer, steps=2, offload=offload)
            yield result(trainer), norms, trainer.bytes_held()["host"]
    expected = one_process(make(), optimizer, steps=2)
    ranks = run_ranks(P, lambda rank: list(work(rank)))
    for found in ranks:
        for *each, _ in found:
            assert_same(each, expected, tolerance)
    n, hosts = sum(p.nbytes for p in expected[0].values()), [sum(host for _, _, host in each) for each in zip(*ranks)]
    assert hosts[::2] == [0] * 4  # offloaded, the ranks have masters, moments and gradients there, together once
    assert min(hosts[1] / P, *hosts[3::2]) >= (2 + moments) * n


def test_a_delayed_update_is_one_step_behind():
    """Ren et al. 2021, figure 6: forward and backward of a step run with the parameters of the step before."""
    model, steps = gpt(), 3
    ahead = copy.deepcopy(model)  # what the background has
    optimizer = adamw([{"params": [p], **decay(name, p)} for name, p in ahead.named_parameters()])
    for batch in batches(steps):
        loss_of(model, batch).backward()
        gradients = [p.grad for p in model.parameters()]
        model = copy.deepcopy(ahead)
        for p, gradient in zip(ahead.parameters(), gradients):
            p.grad = gradient
        nn.utils.clip_grad_norm_(ahead.parameters(), 0.5)
        optimizer.step()
    def work(rank):
        found = []
        for stage in (1, 2, 3):
            trainer, _ = train(rank, 2, gpt, stage, steps=steps, offload=True, delayed=True)
            found.append(result(trainer))
            trainer.refresh()
            found.append(result(trainer))
        return found
    for found in run_ranks(2, work):
        for behind, caught_up in zip(found[::2], found[1::2]):
            assert_same((behind, [0]), (values(model), [0]))
            assert_same((caught_up, [0]), (values(ahead), [0]))


def test_a_delayed_update_begins_when_the_copies_of_the_last_have_arrived(monkeypatch):
    """On a GPU they go on while Python does, and the update writes where they read."""
    done = []
    for name in ("_publish", "_wait_for_copies", "_in_background"):
        method = getattr(ZeRO, name)
        monkeypatch.setattr(ZeRO, name, lambda self, *args, name=name, method=method: (done.append(name), method(self, *args))[1])
    model = gpt()
    trainer = ZeRO(model, adamw, offload=True, delayed=True)
    for batch in batches(2):
        loss_of(model, batch).backward()
        trainer.finish()
        done.clear()
        trainer.step()
        trainer._join()
        published = done.index("_wait_for_copies")
        assert set(done[:published]) == {"_publish"} and done[published + 1:] == ["_in_background"]
        trainer.zero_grad()


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.RMSprop, lr=1e-3),
                                       partial(torch.optim.AdamW, lr=1e-2, fused=True),
                                       partial(torch.optim.NAdam, lr=1e-3, foreach=True)],
                         ids=["SGD", "RMSprop", "fused AdamW", "NAdam"])
def test_other_optimizers_match_one_process(optimizer):
    def work(rank):
        for stage in (1, 3):
            trainer, norms = train(rank, 2, gpt, stage, optimizer=optimizer, steps=2)
            yield result(trainer), norms
    expected = one_process(gpt(), optimizer, steps=2)
    for found in run_ranks(2, lambda rank: list(work(rank))):
        for each in found:
            assert_same(each, expected)


def test_stages_agree_bit_for_bit_in_half_precision_and_follow_fp32():
    def work(rank):
        found = []
        for stage in range(4):
            trainer, _ = train(rank, 2, partial(gpt, torch.float32), stage, dtype=torch.bfloat16)
            assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
            found.append((result(trainer), {name: s.master.clone() for name, s in trainer.shards().items()}))
        return found
    expected, _ = one_process(gpt(torch.float32))
    for found in run_ranks(2, work):
        for parameters, masters in found:
            for name, p in parameters.items():
                assert torch.equal(p, found[1][0][name]) or found[0][0] is parameters  # stage 0 sums in bf16
                # three steps of at most 0.01 each, in a direction that bf16 may turn where the gradient is noise
                assert (p - expected[name]).abs().max() < 0.04
        assert {m.dtype for _, masters in found for m in masters.values()} == {torch.float32}


def test_masters_begin_with_the_values_that_the_parameters_had():
    def work(rank):
        model = gpt(torch.float32)
        before = values(model)
        trainer = ZeRO(model, adamw, stage=3, dtype=torch.bfloat16)
        for name, shard in trainer.shards().items():
            assert torch.equal(shard.master, before[name].flatten()[shard.start:shard.stop])
        with trainer.gathered():
            assert all(torch.equal(p, before[name].bfloat16()) for name, p in model.named_parameters())
    run_ranks(3, work)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_grad_dtype_accumulates_and_sends_in_fp32(stage):
    """Micro-batches whose gradients are 256, 1, 1 and 1: in bf16, 256 + 1 = 256."""
    def norm(grad_dtype):
        def work(rank):
            model = nn.Linear(4, 4, bias=False).bfloat16()
            trainer = ZeRO(model, adamw, stage=stage, reduction="sum", grad_dtype=grad_dtype)
            with trainer.no_sync():
                for size in (256.0, 1.0, 1.0):
                    model(torch.full((1, 4), size, dtype=torch.bfloat16)).sum().backward()
            model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
            trainer.finish()
            return trainer.squared_norm().sqrt().item()
        return run_ranks(2, work)
    assert norm(torch.float32) == [pytest.approx(2 * 259 * 4)] * 2
    assert norm(None) == [pytest.approx(2 * 256 * 4)] * 2


def test_stages_2_and_3_reduce_at_every_backward_outside_of_no_sync():
    def work(rank):
        for stage in (2, 3):
            trainer, norms = train(rank, 2, gpt, stage, 3, sync=True, steps=2)
            yield result(trainer), norms
        with pytest.raises(RuntimeError, match="already sent"):
            train(rank, 2, gpt, 1, 2, sync=True)
    expected = one_process(gpt(), steps=2)
    for found in run_ranks(2, lambda rank: list(work(rank))):
        for each in found:
            assert_same(each, expected)


class Odd(nn.Module):
    """Shared, frozen, unused and single numbers; a head that is used by one sample of one rank only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.blocks[2].weight = self.blocks[0].weight  # shared by two units
        self.blocks[1].weight.requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.never, self.seldom = nn.Linear(3, 3), nn.Linear(3, 1)
        self.double()

    def forward(self, x, seldom=None):
        for block in self.blocks:
            x = torch.tanh(block(x)) * self.scale
        return x.sum() + (0 if seldom is None else seldom * self.seldom(x).sum())


@pytest.mark.parametrize("P", [1, 2, 4])
def test_shared_frozen_and_unused_parameters_match_one_process(P):
    draw = torch.Generator().manual_seed(0)
    data = [torch.randn(4, 3, generator=draw, dtype=torch.float64) for _ in range(3)]

    first = Odd()  # drawn here: the default generator is shared by all threads
    one = copy.deepcopy(first)
    optimizer = adamw([p for p in one.parameters() if p.requires_grad])
    for step, x in enumerate(data):
        for i, row in enumerate(x):
            one(row, 1.0 if i == 0 and step == 1 else None).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = values(one)

    def work(rank):
        for stage in range(4):
            model = copy.deepcopy(first)
            trainer = ZeRO(model, adamw, stage=stage, reduction="sum", bucket_mb=1e-4)
            for step, x in enumerate(data):
                parts = x.tensor_split(P)[rank]
                for i, row in enumerate(parts):
                    with nullcontext() if i == len(parts) - 1 else trainer.no_sync():
                        here = i == 0 and step == 1 and (rank == 0 or stage == 3)  # stage 3: all run the same modules
                        model(row, float(rank == 0) if here else None).backward()
                trainer.finish()
                trainer.step()
                trainer.zero_grad()
            yield result(trainer)
            assert trainer.shards()["blocks.1.weight"].state == {}
    for found in run_ranks(P, lambda rank: list(work(rank))):
        for parameters in found:
            assert_same((parameters, [0]), (expected, [0]))
    assert torch.equal(expected["never.weight"], first.never.weight)  # no decay either


def test_more_ranks_than_numbers():
    def work(rank):
        for stage in range(4):
            torch.manual_seed(0)
            model = nn.Linear(2, 1, bias=False).double()
            trainer = ZeRO(model, adamw, stage=stage)
            model(torch.full((1, 2), 1.0 + rank, dtype=torch.float64)).sum().backward()
            trainer.finish()
            yield trainer.squared_norm().item(), {s.stop - s.start for s in trainer.shards().values()}
            trainer.step()
            assert not torch.isnan(result(trainer)["weight"]).any()
    for rank, found in enumerate(run_ranks(5, lambda rank: list(work(rank)))):
        assert [square for square, _ in found] == [pytest.approx(2 * 3.0 ** 2)] * 4
        assert [sizes for _, sizes in found][1:] == [{1 if rank < 2 else 0}] * 3


def test_zero_on_top_of_tensor_parallelism_matches_one_process():
    losses_of = lambda model, rows: tp.vocabulary_cross_entropy(  # noqa: E731
        model(rows[:, :-1]), rows[:, 1:], V, model.tp_group).sum() / (B * T)

    def work(rank):
        mesh = parallel.mesh(dp=2, tp=2)
        for stage, make in ((1, gpt), (3, llama), (3, gpt)):
            model = make()
            model.tp_group = mesh.tp
            tp.tensor_parallel(model, mesh.tp, sequence=stage == 3 and make is gpt)
            trainer, norms = train(dist.get_rank(mesh.dp), 2, model, stage, losses=losses_of, group=mesh.dp, steps=2)
            with trainer.gathered():
                yield {name: tp.whole(p).clone() for name, p in model.named_parameters()}, norms
    expected = [one_process(make(), steps=2) for make in (gpt, llama, gpt)]
    for found in run_ranks(4, lambda rank: list(work(rank))):
        for each, wanted, tolerance in zip(found, expected, (1e-12, 1e-12, 1e-12)):
            assert_same(each, wanted, tolerance)


# --- oracles ---------------------------------------------------------------------------------

def _beside_torch(rank):
    """The same steps by DDP + ZeroRedundancyOptimizer, fully_shard and each stage; largest differences."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    one, P = gpt(), dist.get_world_size()
    ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(one))
    sharded = copy.deepcopy(one)
    for block in sharded.blocks:
        fully_shard(block)
    fully_shard(sharded)
    optimizers = [ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.AdamW, lr=1e-2),
                  torch.optim.AdamW(sharded.parameters(), lr=1e-2)]
    for model, optimizer in zip((ddp, sharded), optimizers):
        for batch in batches():
            (P * loss_of(model, rows_of(batch, rank, P))).backward()
            optimizer.step()
            optimizer.zero_grad()
    theirs = values(ddp.module), {name: p.full_tensor().detach() for name, p in sharded.named_parameters()}
    differences = []
    for stage in range(4):
        model = copy.deepcopy(one)
        trainer = ZeRO(model, adamw, stage=stage)
        for batch in batches():
            (P * loss_of(model, rows_of(batch, rank, P))).backward()
            trainer.finish()
            trainer.step()
            trainer.zero_grad()
        ours = result(trainer)
        differences += [max((p - wanted[name]).abs().max().item() for name, p in ours.items()) for wanted in theirs]
    return differences


@pytest.mark.filterwarnings("ignore")
def test_stages_match_zero_redundancy_optimizer_and_fully_shard():
    """On three ranks, which divide neither the parameters nor the rows of a matrix."""
    for found in run_ranks(3, _beside_torch, backend="gloo"):
        assert len(found) == 8 and max(found) < 1e-12


# --- memory and messages ---------------------------------------------------------------------

def _in_processes(rank):
    return {"memory": [_memory(rank, False), _memory(rank, True)], "building": _build(rank),
            "sent": [_count_bytes(rank, stage) for stage in range(4)]}


@pytest.fixture(scope="module")
def in_processes():
    """What cannot be seen from threads, of two ranks that are processes, started once."""
    return spawn_ranks(2, _in_processes)


def _memory(rank, half):
    adamw([nn.Parameter(torch.zeros(1))])  # imports what optimizers need
    gc.freeze()  # looked at is what comes from here on
    before, found = weakref.WeakSet(zero_memory.every_storage().values()), []
    for stage in range(4):
        model = gpt(torch.float32, vocab_size=64, d_model=96)
        n = sum(p.numel() for p in model.parameters())
        trainer = ZeRO(model, adamw, stage=stage, dtype=torch.bfloat16 if half else None)
        for _ in range(2):
            model(torch.zeros(1, 1, dtype=torch.long)).float().sum().backward()
            trainer.finish()
            held = trainer.bytes_held()
            found.append((sum(held.values()) / n, zero_memory.every_tensor(before) / n))
            trainer.step()
            trainer.zero_grad()
        resting = zero_memory.every_tensor(before)
        with zero_memory.PeakBytes() as peak:
            model(torch.zeros(1, 1, dtype=torch.long)).float().sum().backward()
            trainer.finish()
        unit = sum(p.numel() for p in model.blocks[0].parameters())
        limit = zero_memory.peak_of_stage_3(n, unit, n - 3 * unit, 2, half)
        found[-1] += ((resting + peak.most) / limit, resting / n)
        del model, trainer
    return found


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_bytes_held_are_the_formulas(half, in_processes):
    """Every tensor of the process. 2%: padding, one step counter a parameter, one NaN."""
    for found in (each["memory"][half] for each in in_processes):
        for stage in range(4):
            held, everything, peak, resting = found[2 * stage + 1]
            formula = zero_memory.bytes_per_parameter(stage, 2, half)
            assert held == pytest.approx(formula, rel=0.02) and everything == pytest.approx(formula, rel=0.02)
            assert resting <= 1.02 * formula
        assert 0.85 < found[7][2] <= 1.02  # of what stage 3 may take within a step


def test_bytes_per_parameter_is_figure_1_of_the_paper():
    """7.5 B parameters on 64 ranks: 120, 31.4, 16.6, 1.9 GB."""
    found = [round(7.5 * zero_memory.bytes_per_parameter(stage, 64), 1) for stage in range(4)]
    assert found == [120.0, 31.4, 16.6, 1.9]


def test_no_more_than_two_units_are_whole_at_a_time():
    def work(rank):
        model = gpt()
        trainer = ZeRO(model, adamw, stage=3)
        most, start = [0], trainer._gathering._start

        def counted(unit):
            start(unit)
            most[0] = max(most[0], sum(any(f.whole is not None for f in u.flats) for u in trainer._gathering.units))
        trainer._gathering._start = counted
        assert all(torch.isnan(p).all() for p in model.parameters())
        for _ in range(2):
            loss_of(model, batches(1)[0]).backward()
            trainer.finish()
            trainer.step()
        with torch.no_grad():
            model(batches(1)[0][:, :-1])
        assert all(torch.isnan(p).all() for p in model.parameters())
        return most[0]
    assert run_ranks(2, work) == [2, 2]


def test_the_next_unit_is_asked_for_while_one_computes():
    def work(rank):
        model, events = gpt(), []
        trainer = ZeRO(model, adamw, stage=3)
        start = trainer._gathering._start
        trainer._gathering._start = lambda unit: (events.append(("gather", unit.index)) if unit.flats[0].whole is None else None, start(unit))
        for i, block in enumerate(model.blocks, 1):
            block.mlp.up.register_forward_hook(lambda *_, i=i: events.append(("compute", i)))
        loss = loss_of(model, batches(1)[0])
        forward = list(events)
        loss.backward()
        return forward, events[len(forward):]
    forward, backward = run_ranks(2, work)[0]
    assert forward == [("gather", 0), ("gather", 1), ("gather", 2), ("compute", 1), ("gather", 3), ("compute", 2),
                       ("gather", 0), ("compute", 3)]
    assert backward == [("gather", 3), ("gather", 2), ("gather", 1)]  # the rest was kept, the embedding needs nothing


def test_stage_2_takes_memory_for_two_pieces_of_the_gradient(monkeypatch):
    """One fills while the one before travels; the sum comes where it stays. Fresh memory costs as much as sending it."""
    taken, empty = [[], []], flattening.empty
    monkeypatch.setattr(flattening, "empty", lambda shape, *kind: (taken[dist.get_rank()].append(shape), empty(shape, *kind))[1])

    def work(rank):
        trainer, _ = train(rank, 2, gpt, 2, steps=1)
        taken[rank].clear()
        loss_of(trainer.model, rows_of(batches(1)[0], rank, 2)).backward()
        trainer.finish()
        return len(trainer._flats), max(2 * flat.C for flat in trainer._flats)
    for (count, largest), shapes in zip(run_ranks(2, work), taken):
        assert count > 3 and shapes == [(largest,)] * 2


def _count_bytes(rank, stage):
    model = gpt(torch.float32, d_model=32)
    n = sum(p.nbytes for p in model.parameters())
    trainer = ZeRO(model, adamw, stage=stage)
    with communication.counting() as sent:
        loss_of(model, batches(1)[0]).backward()
        trainer.finish()
        trainer.step()
    return sum(number for _, number in sent), n


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_sent_are_the_formulas(stage, in_processes):
    for sent, n in (each["sent"][stage] for each in in_processes):
        assert sent / n == pytest.approx((3 if stage == 3 else 2) / 2, rel=0.01)  # padding, and one flag a parameter


# --- models that never exist whole --------------------------------------------------------------

@pytest.mark.parametrize("name", MODELS)
def test_a_model_from_meta_has_the_weights_of_one_process(name):
    def work(rank):
        for stage in (1, 3):
            with torch.device("meta"):
                model = MODELS[name](dtype=torch.float32, generator=False)
            trainer = ZeRO(model, adamw, stage=stage,
                           initialise=lambda model: model.initialise(torch.Generator().manual_seed(1)))
            yield result(trainer)
            loss_of(model, batches(1)[0]).backward()
            trainer.finish()
            yield result(trainer)
    expected = values(MODELS[name](dtype=torch.float32))
    for found in run_ranks(3, lambda rank: list(work(rank))):
        for parameters in found:
            assert all(torch.equal(p, parameters[name]) for name, p in expected.items())


def _build(rank):
    with torch.device("meta"):
        model = gpt(torch.float32, generator=False, n_layers=8, d_model=64)
    with zero_memory.PeakBytes() as peak:
        trainer = ZeRO(model, adamw, stage=3, initialise=lambda model: model.initialise(torch.Generator().manual_seed(1)))
    held = trainer.bytes_held()
    return peak.most, held["parameters"] + held["gradients"], max(p.nbytes for p in model.parameters())


def test_building_from_meta_takes_the_shards_and_one_parameter(in_processes):
    for most, shards, largest in (each["building"] for each in in_processes):
        assert most <= 1.02 * (shards + largest)


def test_generators_of_other_seeds_are_refused():
    def work(rank):
        with torch.device("meta"):
            model = gpt(torch.float32, generator=False)
        with pytest.raises(ValueError, match="ranks drew different values, from generators of different seeds: rank 0 .*token_emb"):
            ZeRO(model, adamw, stage=3, initialise=lambda model: model.initialise(torch.Generator().manual_seed(rank)))
    run_ranks(2, work)


# --- stage 3 beside what else changes autograd ----------------------------------------------------

@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_match_one_process(reentrant):
    def losses(model, rows):
        x = model.embed(rows[:, :-1])
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return F.cross_entropy(model.head(x).flatten(0, 1), rows[:, 1:].flatten(), reduction="sum") / (B * T)
    def work(rank):
        trainer, norms = train(rank, 2, gpt, 3, 2, losses=losses)
        return result(trainer), norms
    for found in run_ranks(2, work):
        assert_same(found, one_process(gpt()))


def test_forwards_before_backwards_and_foreign_hooks_match_one_process():
    """As a pipeline does, by embed, blocks and head; and with hooks that keep what autograd saves."""
    def whole(model, rows):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            x = model.embed(rows[:, :-1])
            for block in model.blocks:
                x = block(x)
            logits = model.head(x)
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum") / (B * T)

    def work(rank):
        model = llama()
        trainer, norms = ZeRO(model, adamw, stage=3, reduction="sum", groups=decay), []
        for batch in batches():
            losses = [whole(model, part) for part in rows_of(batch, rank, 2).tensor_split(3)]
            for loss in reversed(losses):
                loss.backward()
            trainer.finish()
            norms.append(trainer.clip_grad_norm(0.5).item())
            trainer.step()
            trainer.zero_grad()
        return result(trainer), norms
    for found in run_ranks(2, work):
        assert_same(found, one_process(llama()))


def test_between_forward_and_backward_the_last_unit_alone_is_whole():
    def work(rank):
        model = gpt(torch.float32, n_layers=6, d_model=64)
        trainer = ZeRO(model, adamw, stage=3)
        loss_of(model, batches(1)[0][:, :2]).backward()
        trainer.finish()
        loss = loss_of(model, batches(1)[0][:1, :2])
        whole = sum(f.whole.nbytes for f in trainer._flats if f.whole is not None)
        loss.backward()
        return whole
    for whole in run_ranks(2, work):
        rest = 4 * ((V + T) * 64 + 2 * 64)
        assert whole == pytest.approx(rest, rel=0.02)  # the rest alone, which backward begins with


# --- the interface ---------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", [0, 2, 3])
def test_shards_can_be_written_and_carry_a_run_over(stage):
    """The state of three ranks' shards, put together, continues on two as if nothing had been."""
    def first(rank):
        trainer, _ = train(rank, 3, gpt, stage, steps=2)
        return {name: (s.start, s.stop, s.master.clone(), {key: torch.as_tensor(t).clone() for key, t in s.state.items()})
                for name, s in trainer.shards().items()}
    whole, model = {}, gpt()
    for shards in run_ranks(3, first):
        for name, (start, stop, master, state) in shards.items():
            for key, part in {"master": master, **state}.items():
                to = whole.setdefault(name, {}).setdefault(key, torch.zeros(model.get_parameter(name).numel(), dtype=torch.float64))
                to[start:stop] = part

    def second(rank):
        model = gpt()
        trainer = ZeRO(model, adamw, stage=(stage + 1) % 4, reduction="sum", groups=decay)
        for name, shard in trainer.shards().items():
            shard.master.copy_(whole[name]["master"][shard.start:shard.stop])
            for key, value in whole[name].items():
                if key != "master" and shard.stop > shard.start:
                    part = value[shard.start:shard.stop].clone()
                    shard.state[key] = torch.tensor(part[0].item(), dtype=torch.float32) if key == "step" else part
        trainer.refresh()
        loss_of(model, rows_of(batches()[2], rank, 2)).backward()
        trainer.finish()
        norm = trainer.clip_grad_norm(0.5).item()
        trainer.step()
        return result(trainer), [norm]
    parameters, norms = one_process(gpt())
    for found in run_ranks(2, second):
        assert_same(found, (parameters, norms[2:]))


def test_shards_cover_every_parameter_once_and_gradients_are_the_whole_ones():
    model = gpt()
    loss_of(model, batches(1)[0]).backward()

    def work(rank):
        found = []
        for stage in range(4):
            ours = gpt()
            trainer = ZeRO(ours, adamw, stage=stage, reduction="sum", bucket_mb=0.001)
            loss_of(ours, rows_of(batches(1)[0], rank, 3)).backward()
            assert all(s.grad is None for s in trainer.shards().values())
            trainer.finish()
            assert all(p.grad is None for p in ours.parameters())
            for name, s in trainer.shards().items():
                wanted = model.get_parameter(name).grad.flatten()[s.start:s.stop]
                torch.testing.assert_close(s.grad, wanted, rtol=0, atol=1e-14)
            found.append({name: (s.start, s.stop) for name, s in trainer.shards().items()})
        return found
    found = run_ranks(3, work)
    for stage in (1, 2, 3):
        for name, p in model.named_parameters():
            ranges = sorted(r for r in (ranks[stage][name] for ranks in found) if r[0] < r[1])
            assert ranges[0][0] == 0 and ranges[-1][1] == p.numel()
            assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:]))


def test_the_learning_rate_and_reduction_count():
    def work(rank, lr, reduction, stage):
        model = gpt()
        trainer = ZeRO(model, partial(torch.optim.SGD, lr=1.0), stage=stage, reduction=reduction)
        for group in trainer.param_groups:
            group["lr"] = lr
        before = result(trainer)["norm.weight"]
        loss_of(model, batches(1)[0]).backward()
        trainer.finish()
        trainer.step()
        return result(trainer)["norm.weight"] - before
    def all_three(rank, stage):
        return [work(rank, *given, stage) for given in ((1.0, "mean"), (0.5, "mean"), (1.0, "sum"))]
    for stage in (0, 1, 3):
        base, slow, total = run_ranks(2, all_three, stage)[0]
        assert torch.allclose(slow, base / 2) and torch.allclose(total, base * 2)


def test_clipping_takes_a_norm_from_outside():
    def work(rank):
        model = gpt()
        trainer = ZeRO(model, adamw, stage=2)
        loss_of(model, batches(1)[0]).backward()
        trainer.finish()
        square = trainer.squared_norm()
        assert trainer.clip_grad_norm(1.0, 4 * square) == 2 * square.sqrt()
        return (trainer.squared_norm() / square).item(), square.item()
    for ratio, square in run_ranks(2, work):
        assert ratio == pytest.approx(min(1.0, 1 / (2 * square ** 0.5 + 1e-6)) ** 2)


def test_models_start_equal_and_models_that_differ_are_refused():
    def work(rank):
        model = gpt()
        with torch.no_grad():
            model.norm.weight += rank
        assert torch.equal(result(ZeRO(model, adamw, stage=3))["norm.weight"], torch.ones(8, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"ranks differ: rank 0 of the group has \[.*stage=1.*rank 1 has \[.*stage=2"):
            ZeRO(gpt(), adamw, stage=1 + rank)
        with pytest.raises(ValueError, match="ranks differ"):
            ZeRO(gpt(n_layers=1 + rank), adamw)
    run_ranks(2, work)


@pytest.mark.parametrize("options, message", [
    ({"stage": 4}, "a stage of 0, 1, 2, 3"), ({"reduction": "max"}, "'max'"), ({"bucket_mb": 0}, "bucket_mb > 0"),
    ({"delayed": True}, "offload to be delayed"), ({"stage": 3, "units": [nn.Linear(1, 1)]}, "modules of the model"),
    ({"initialise": print}, "nothing to initialise")])
def test_arguments_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ZeRO(gpt(), adamw, **options)


def test_a_model_without_trained_parameters_and_half_an_initialise_are_refused():
    with pytest.raises(ValueError, match="nothing to train"):
        ZeRO(gpt().requires_grad_(False), adamw)
    with torch.device("meta"):
        model = gpt(torch.float32, generator=False)
    with pytest.raises(ValueError, match=r"went over 1 of \d+ parameters"):
        ZeRO(model, adamw, initialise=lambda model: [next(it := model.named_parameters()), next(it)] and None)


@pytest.mark.parametrize("arguments", [["--ranks", "9"], ["--d_model", "65"], ["--d_model", "60"], ["--steps", "0"], ["--plot", "nowhere/x.png"],
                                       ["--seed", "-1"]])
def test_the_program_refuses_in_one_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["zero.py", *arguments])
    with pytest.raises(SystemExit, match="^2$"):
        zero_memory.main("zero.py")
    found = capsys.readouterr()
    assert re.fullmatch(r"zero\.py: .*\n", found.err) and not found.out


def test_bytes_besides_those_named_do_not_sink_when_one_of_them_is_freed():
    kept, freed = torch.zeros(1000), torch.zeros(500)
    before = weakref.WeakSet(zero_memory.every_storage().values())
    assert zero_memory.every_tensor(before) == 0
    del freed
    made = torch.zeros(300)
    assert zero_memory.every_tensor(before) == made.nbytes
    assert zero_memory.every_tensor() >= made.nbytes + kept.nbytes


def test_the_plot_is_a_picture(tmp_path):
    """The program itself, offloading and drawing, is run by test_commands.py."""
    found = [{"n": 10, "parameters": 20, "gradients": 20, "states": 120 // (1 + stage)} for stage in range(4)]
    zero_memory._plot(found, 2, str(tmp_path / "zero.png"))
    assert (tmp_path / "zero.png").read_bytes().startswith(b"\x89PNG")
