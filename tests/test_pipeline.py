"""Pipeline schedules against their formulas; the pipeline against one process and torch's, in float64."""

import copy
import itertools
import runpy
import sys
import time
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, run_ranks, spawn_ranks

import parallel
import pipeline
import pipeline_schedules as schedules
import tensor_parallel as tp
from gpt import GPT, GPTConfig
from llama import Llama, LlamaConfig
from pipeline_schedules import Layout, Op, bubble, bubble_formula, peak_held, schedule, timeline

T, V = 8, 20


def gpt(n_layers=5):
    return GPT(GPTConfig(V, T, n_layers, 4, 16), generator=torch.Generator().manual_seed(1)).double()


def llama(n_layers=5):
    config = LlamaConfig(vocab_size=V, context=T, n_layers=n_layers, n_heads=4, n_kv_heads=2, d_model=16, d_ff=24, tied=False)
    return Llama(config, generator=torch.Generator().manual_seed(1)).double()


MODELS = {"gpt": gpt, "llama": llama}


def batches(rows, steps=2):
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(V, (rows, T + 1), generator=draw) for _ in range(steps)]


def alone(model, data, clip=0.5):
    optimizer, losses, norms = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), [], []
    for batch in data:
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, dict(model.named_parameters())


def train(pipe, data, clip=0.5, rows=slice(None), finish=lambda: None, square=None, loss_of=None, whole=lambda p: p.detach()):
    """On every rank; targets are known to the first alone."""
    optimizer = torch.optim.AdamW(pipe.model.parameters(), lr=1e-2, weight_decay=0.1)
    losses, norms = [], []
    for batch in data:
        def loss(logits, targets):
            each = loss_of(logits, targets) if loss_of else \
                F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            return each.sum() / (len(batch) * T)
        mine = batch[rows]
        losses.append(pipe.step(mine[:, :-1], mine[:, 1:] if pipe.rank == 0 else None, loss).item())
        finish()
        norms.append(pipe.clip_grad_norm(clip, square).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, {name: whole(p) for name, p in pipe.model.named_parameters()}


def assert_equal(results, expected, tolerance=1e-10):
    """Ten digits of float64 are left to the order of sums, which AdamW's division enlarges."""
    seen = set()
    for losses, norms, parameters in results:
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected[0]), rtol=0, atol=tolerance)
        torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected[1]), rtol=0, atol=tolerance)
        for name, p in parameters.items():
            torch.testing.assert_close(p, expected[2][name].detach(), rtol=0, atol=tolerance)
        seen |= parameters.keys()
    assert seen == expected[2].keys()  # under full names, and none is lost


# --- schedules ----------------------------------------------------------------------------------

GRID = [(name, P, M, chunks) for name in schedules.SCHEDULES for P in (1, 2, 3, 4) for M in (1, 2, 3, 4, 5, 8)
        for chunks in ((1, 2, 3) if name == "interleaved" else (1,))]


@pytest.mark.parametrize("name, P, M, chunks", GRID)
def test_schedule_runs_every_operation_once_on_its_rank_and_ends(name, P, M, chunks):
    ranks = schedule(name, P, M, chunks)
    kinds = "FIW" if name == "zb" else "FB"
    for r, ops in enumerate(ranks):
        assert sorted(ops, key=repr) == sorted((Op(k, m, s) for k in kinds for m in range(M)
                                                for s in range(r, P * chunks, P)), key=repr)
    assert len(timeline(ranks)) == len(kinds) * M * P * chunks


def brute_force(ranks, message=0.0):
    """Longest path over what operations wait for, by relaxing until nothing changes."""
    start = {op: 0.0 for ops in ranks for op in ops}
    last = max(op.stage for op in start)
    rank_of = {op: r for r, ops in enumerate(ranks) for op in ops}
    edges = [(a, b, 0.0) for ops in ranks for a, b in zip(ops, ops[1:])]
    for op in start:
        hop = {"F": (Op("F", op.microbatch, op.stage - 1), op.stage > 0),
               "W": (Op("I", op.microbatch, op.stage), True)}.get(op.kind, (Op(op.kind, op.microbatch, op.stage + 1), op.stage < last))
        if hop[1]:
            edges.append((hop[0], op, message * (rank_of[hop[0]] != rank_of[op])))
        if op.kind in "BI":
            edges.append((Op("F", op.microbatch, op.stage), op, 0.0))
    changed = True
    while changed:
        changed = False
        for a, b, wait in edges:
            if start[b] < (end := start[a] + schedules.unit_seconds(a) + wait):
                start[b], changed = end, True
    return start


@pytest.mark.parametrize("name, P, M, chunks", [case for case in GRID if case[1:3] in ((3, 5), (4, 3), (2, 4))])
@pytest.mark.parametrize("message", (0.0, 0.7))
def test_timeline_matches_the_longest_path(name, P, M, chunks, message):
    ranks = schedule(name, P, M, chunks)
    expected = brute_force(ranks, message)
    assert all(abs(t.start - expected[t.op]) < 1e-9 for t in timeline(ranks, message=message))


@pytest.mark.parametrize("name, P, M, chunks", [case for case in GRID if case[2] >= case[1] and (case[3] == 1 or case[2] % case[1] == 0)])
def test_bubble_matches_its_formula(name, P, M, chunks):
    assert bubble(timeline(schedule(name, P, M, chunks))) == pytest.approx(bubble_formula(name, P, M, chunks), abs=1e-12)


@pytest.mark.parametrize("P, M", list(itertools.product((2, 4, 8), (8, 16, 32))))
def test_activations_held_are_gpipes_m_and_at_most_p_for_1f1b_and_zero_bubble(P, M):
    assert [peak_held(ops) for ops in schedule("gpipe", P, M)] == [M] * P
    assert [peak_held(ops) for ops in schedule("1f1b", P, M)] == [min(P - r, M) for r in range(P)]
    assert max(peak_held(ops) for ops in schedule("zb", P, M)) <= P


@pytest.mark.parametrize("P, chunks", ((2, 2), (4, 2), (4, 3)))
def test_activations_held_interleaved_are_those_of_the_header(P, chunks):
    found = max(peak_held(ops) for ops in schedule("interleaved", P, 2 * P, chunks))
    assert found == 2 * (P - 1) + (chunks - 1) * P + 1


@pytest.mark.parametrize("M", (2, 3, 6))
def test_demo_counts_formulas_only_where_they_hold(M, monkeypatch, capsys):
    """With fewer microbatches than ranks zero-bubble has a longer wait than its formula, ragged rounds too."""
    monkeypatch.setattr(sys, "argv", ["pipeline_schedules.py", "--stages", "4", "--microbatches", str(M)])
    runpy.run_path(str(ROOT / "pipeline_schedules.py"), run_name="__main__")
    assert "OK, below 1e-12" in capsys.readouterr().out.splitlines()[-1]


def test_ranks_that_wait_for_one_another_are_refused():
    with pytest.raises(ValueError, match="wait for one another"):
        timeline([[Op("B", 0, 0), Op("F", 0, 0)], [Op("F", 0, 1), Op("B", 0, 1)]])


@pytest.mark.parametrize("case", (("zbv", 2, 2, 1), ("gpipe", 0, 2, 1), ("1f1b", 2, 0, 1), ("1f1b", 2, 2, 2), ("interleaved", 2, 2, 0)))
def test_numbers_that_make_no_schedule_are_refused(case):
    with pytest.raises(ValueError, match="a schedule is one of gpipe, 1f1b, interleaved, zb"):
        schedule(*case)


def test_text_shows_a_line_for_each_rank():
    lines = schedules.draw_text(timeline(schedule("1f1b", 2, 2))).splitlines()
    assert lines == ["rank 0  01..0b.1b", "rank 1  .00b11b.."]


# --- slicing ------------------------------------------------------------------------------------

@pytest.mark.parametrize("stages", (1, 2, 3, 6))
def test_split_matches_brute_force(stages):
    costs = torch.rand(6, generator=torch.Generator().manual_seed(stages)).tolist()
    def dearest(inner):
        bounds = [0, *inner, 6]
        return max(sum(costs[a:b]) for a, b in zip(bounds, bounds[1:]))
    found = pipeline.split(costs, stages)
    best = min(map(dearest, itertools.combinations(range(1, 6), stages - 1)))
    assert found[0] == 0 and found[-1] == 6 and dearest(found[1:-1]) == pytest.approx(best)


def test_more_stages_than_blocks_are_refused():
    with pytest.raises(ValueError, match="5 layers cannot make 6 stages"):
        run_ranks(2, lambda rank: pipeline.Pipeline(gpt(5), schedule("interleaved", 2, 2, 3)))


def test_costs_of_other_blocks_are_refused():
    with pytest.raises(ValueError, match="want a cost of each of the 5 blocks, got 2"):
        run_ranks(2, lambda rank: pipeline.Pipeline(gpt(5), schedule("1f1b", 2, 2), costs=[1, 1]))


def test_schedule_for_other_ranks_is_refused():
    with pytest.raises(ValueError, match="a schedule for 3 ranks cannot run on 1"):
        pipeline.Pipeline(gpt(), schedule("1f1b", 3, 2))


# --- the engine ---------------------------------------------------------------------------------

RUNS = [("gpipe", 2, 3, 1), ("gpipe", 4, 4, 1), ("1f1b", 1, 2, 1), ("1f1b", 2, 4, 1), ("1f1b", 4, 6, 1), ("1f1b", 4, 2, 1),
        ("interleaved", 2, 4, 2), ("interleaved", 2, 3, 2), ("interleaved", 1, 2, 3), ("zb", 1, 2, 1), ("zb", 2, 3, 1), ("zb", 4, 6, 1)]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name, P, M, chunks", RUNS)
def test_training_matches_one_process(name, P, M, chunks, kind):
    """GPT has its embedding on both ends, Llama a head of its own."""
    model = MODELS[kind]()
    expected = alone(copy.deepcopy(model), batches(2 * M))
    copies = [copy.deepcopy(model) for _ in range(P)]
    results = run_ranks(P, lambda rank: train(pipeline.Pipeline(copies[rank], schedule(name, P, M, chunks)), batches(2 * M)))
    assert_equal(results, expected)
    assert all(norm > 0.5 for norm in expected[1])  # clipping was on


@pytest.mark.parametrize("kind", MODELS)
def test_four_by_two_stages_and_uneven_costs_match_one_process(kind):
    model = MODELS[kind](9)
    expected = alone(copy.deepcopy(model), batches(6))
    copies = [copy.deepcopy(model) for _ in range(4)]
    results = run_ranks(4, lambda rank: train(pipeline.Pipeline(copies[rank], schedule("interleaved", 4, 6, 2),
                                                                costs=[1, 1, 1, 1, 1, 1, 1, 1, 5]), batches(6)))
    assert_equal(results, expected)


def _process(rank):
    return train(pipeline.Pipeline(gpt(), schedule("zb", 2, 4)), batches(8))


def test_targets_may_be_given_on_every_rank_and_be_a_view():
    data = batches(4, 1)[0]
    def step(rank):
        pipe = pipeline.Pipeline(gpt(), schedule("1f1b", 2, 2))
        return pipe.step(data[:, :-1], data[:, 1:] if rank == 0 else data[:, :-1],
                         lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / 2).item()
    assert run_ranks(2, step)[0] == pytest.approx(alone(gpt(), [data])[0][0], abs=1e-12)


def test_processes_match_one_process():
    results = spawn_ranks(2, _process)
    assert_equal(results, alone(gpt(), batches(8)))


def test_fp32_matches_one_process():
    """Single precision: 1e-5 is some hundred roundings."""
    def model():
        return gpt().float()
    results = run_ranks(2, lambda rank: train(pipeline.Pipeline(model(), schedule("1f1b", 2, 4)), batches(8)))
    assert_equal(results, alone(model(), batches(8)), 1e-5)


@pytest.mark.parametrize("name", schedules.SCHEDULES[:2] + ("zb",))
def test_activations_held_are_those_of_the_plan(name):
    def held(rank):
        pipe = pipeline.Pipeline(gpt(), schedule(name, 2, 6))
        train(pipe, batches(6, 1))
        return pipe.most_held
    assert run_ranks(2, held) == [peak_held(ops) for ops in schedule(name, 2, 6)]


def test_weights_are_deferred_under_zero_bubble():
    """Between I and W no linear layer has its weight's gradient yet; afterwards all have."""
    pipe = pipeline.Pipeline(gpt(), [[Op("F", 0, 0), Op("I", 0, 0), Op("W", 0, 0)]])
    seen, run = {}, pipe._run
    def spy(op, began):
        run(op, began)
        seen[op.kind] = {name for name, p in pipe.model.named_parameters() if p.grad is not None}
    pipe._run = spy
    pipe.step(batches(2)[0][:, :-1], batches(2)[0][:, 1:], lambda logits, targets: F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    linear = {name for name, _ in pipe.model.named_parameters() if name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight"))}
    assert not linear & seen["I"] and linear <= seen["W"] and not seen["F"]


def test_training_matches_torchs_pipeline_schedule():
    """torch.distributed.pipelining's 1F1B on the same two halves: the gradients."""
    model = llama(4)
    data = batches(4, 1)[0]

    def loss_of(logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    class Half(nn.Module):
        def __init__(self, whole, first):
            super().__init__()
            self.whole, self.first = whole, first

        def forward(self, x):
            x = self.whole.embed(x) if self.first else x
            for block in self.whole.blocks[:2] if self.first else self.whole.blocks[2:]:
                x = block(x)
            return x if self.first else self.whole.head(x)

    def part(rank):
        from torch.distributed.pipelining import PipelineStage, Schedule1F1B
        ours = pipeline.Pipeline(copy.deepcopy(model), schedule("1f1b", 2, 4), costs=[1] * 4)
        ours.step(data[:, :-1], data[:, 1:] if rank == 0 else None, lambda logits, targets: loss_of(logits, targets) / 4)
        theirs = copy.deepcopy(model)
        stage = PipelineStage(Half(theirs, rank == 0), rank, 2, torch.device("cpu"))
        step = Schedule1F1B(stage, 4, loss_of)
        step.step(data[:, :-1]) if rank == 0 else step.step(target=data[:, 1:])
        grads = dict(theirs.named_parameters())
        return [(p.grad, grads[name].grad) for name, p in ours.model.named_parameters()]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for pairs in run_ranks(2, part):
            assert len(pairs) > 10
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_a_batch_that_does_not_divide_is_refused():
    pipe = pipeline.Pipeline(gpt(), schedule("1f1b", 1, 3))
    with pytest.raises(ValueError, match="3 microbatches do not divide a batch of 4"):
        pipe.step(torch.zeros(4, T, dtype=torch.long), torch.zeros(4, T, dtype=torch.long), None)


def _dies(rank):
    import os
    import signal
    pipe = pipeline.Pipeline(gpt(), schedule("1f1b", 2, 4))
    if rank == 1:
        pipe._forward = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return train(pipe, batches(4, 1))


def test_a_rank_that_dies_is_named_with_the_message_that_did_not_come():
    results = spawn_ranks(2, _dies, timeout=20, return_exceptions=True)
    assert "died" in str(results[1])
    assert "pipeline, rank 0 of 2: the" in str(results[0]) and "rank 1" in str(results[0])


# --- with data and tensor parallelism -----------------------------------------------------------

def three_d(rank, model, dp, tp_size, pp, name="1f1b", sequence=False):
    """Ranks in the order (pipeline, data, tensor); every data-parallel part has its own rows."""
    grid = torch.arange(dp * tp_size * pp).view(pp, dp, tp_size)
    groups = {}
    for axis, lines in (("pp", grid.flatten(1).t()), ("dp", grid.transpose(1, 2).flatten(0, 1)), ("tp", grid.flatten(0, 1))):
        for line in lines.tolist():
            group = dist.new_group(line)
            if rank in line:
                groups[axis] = group
    cut = tp.tensor_parallel(model, groups["tp"], sequence)
    pipe = pipeline.Pipeline(cut, schedule(name, pp, 2), groups["pp"], slices=tp_size if sequence else 1)
    dp_rank, M = dist.get_rank(groups["dp"]), 2
    data = batches(4 * M)
    part = slice(dp_rank * 4 * M // dp, (dp_rank + 1) * 4 * M // dp)
    average = parallel.DataParallel(cut, groups["dp"], reduction="sum")
    step = pipe.step
    def quiet_step(*args):
        with average.no_sync():  # gradients of tied and of deferred weights come outside of backward
            return step(*args)
    pipe.step = quiet_step
    losses, norms, parameters = train(
        pipe, data, rows=part, finish=average.finish, square=lambda ps: tp.squared_norm(ps, groups["tp"]), whole=tp.whole,
        loss_of=lambda logits, targets: tp.vocabulary_cross_entropy(logits, targets, V, groups["tp"]))
    losses = parallel.ring_all_reduce(torch.tensor(losses, dtype=torch.float64), groups["dp"]).tolist()
    return losses, norms, parameters


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dp, tp_size, pp, name, sequence", (
    (2, 1, 2, "1f1b", False), (1, 2, 2, "zb", False), (2, 2, 2, "1f1b", False), (2, 2, 2, "zb", True)))
def test_data_tensor_and_pipeline_parallel_match_one_process(kind, dp, tp_size, pp, name, sequence):
    model = MODELS[kind]()
    copies = [copy.deepcopy(model) for _ in range(dp * tp_size * pp)]
    expected = alone(copy.deepcopy(model), batches(8))
    results = run_ranks(len(copies), lambda rank: three_d(rank, copies[rank], dp, tp_size, pp, name, sequence))
    assert_equal(results, expected)


# --- prediction ---------------------------------------------------------------------------------

def test_prediction_is_near_published_runs():
    """Narayanan et al. 2021, table 1: 45% of the peak for 175B on 1024 A100s, 52% for 1T on 3072, recomputation counted."""
    small = schedules.predict(Layout(8, 8, 16))
    large = schedules.predict(Layout(6, 8, 64), schedules.Workload(128, 25600, 51200, 2048, 3072))
    assert small.mfu * 4 / 3 == pytest.approx(0.45, rel=0.15) and large.mfu * 4 / 3 == pytest.approx(0.52, rel=0.15)


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(0.01)
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        time.sleep(0.02)
        return dy


class SleepingBlock(nn.Module):
    """Sleeps instead of computing, so that cores are not short."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))

    def forward(self, x):
        return Sleep.apply(x * self.weight[0])


@pytest.mark.parametrize("name, P, M, chunks", (("gpipe", 2, 4, 1), ("1f1b", 2, 4, 1), ("1f1b", 4, 6, 1), ("interleaved", 4, 4, 2)))
def test_timeline_given_measured_operations_matches_the_step_that_ran(name, P, M, chunks):
    """Within 25%, in the best of five runs: what it leaves out is the sending, and other work on the machine."""
    ranks = schedule(name, P, M, chunks)

    def run(rank):
        model = GPT(GPTConfig(16, 4, P * chunks, 1, 4))
        model.blocks = nn.ModuleList(SleepingBlock() for _ in range(P * chunks))
        pipe = pipeline.Pipeline(model, ranks, costs=[1.0] * P * chunks)
        tokens = torch.zeros(M, 5, dtype=torch.long)
        dist.barrier()
        began = time.perf_counter()
        pipe.step(tokens[:, :-1], tokens[:, 1:], lambda logits, targets: logits.sum())
        return pipe.times, time.perf_counter() - began

    errors = []
    while not errors or len(errors) < 5 and min(errors) > 0.25:
        results = run_ranks(P, run)
        took = {op: end - start for times, _ in results for start, end, op in times}
        predicted = max(t.end for t in timeline(ranks, took.__getitem__))
        errors.append(abs(predicted / max(seconds for _, seconds in results) - 1))
    assert min(errors) < 0.25


def test_prediction_grows_with_what_it_should():
    base = schedules.predict(Layout(96, 8, 16))
    assert schedules.predict(Layout(96, 8, 16, v=3)).bubble < base.bubble
    assert schedules.predict(Layout(96, 8, 16, v=3)).bytes_between > base.bytes_between
    assert schedules.predict(Layout(96, 8, 16), cluster=schedules.Cluster(between_nodes=1e9)).seconds > base.seconds
    assert schedules.predict(Layout(96, 4, 32)).bytes_inside < base.bytes_inside


@pytest.mark.parametrize("layout", (Layout(7, 8, 16), Layout(8, 8, 7), Layout(8, 5, 16), Layout(0, 1, 1)))
def test_layouts_that_do_not_divide_are_refused(layout):
    with pytest.raises(ValueError, match="does not divide"):
        schedules.predict(layout)


def test_simulation_prints_the_best_layout_first():
    lines = schedules.simulate(4096).splitlines()
    seconds = [float(line.split()[5]) for line in lines[1:-1]]
    assert seconds == sorted(seconds) and "best of" in lines[-1]
    with pytest.raises(ValueError, match="no layout of 7 GPUs fits"):
        schedules.simulate(7)
    with pytest.raises(ValueError, match="--ranks must be at least 1, got 0"):
        schedules.simulate(0)


@pytest.mark.parametrize("flags, message", ((["--stages", "0"], "--stages"), (["--schedule", "zbv"], "zbv"), (["--chunks", "2"], "interleaved"),
                                            (["--simulate", "--ranks", "7"], "no layout of 7"),
                                            (["--ranks", "8"], "--ranks means nothing without --simulate")))
def test_bad_flags_are_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pipeline.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "pipeline.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
