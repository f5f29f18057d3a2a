"""Our parallelism beside torch's own, on two processes of one thread each (gloo on a CPU; NCCL with --device cuda).

    python bench/parallel.py              everything, about 5 minutes
    python bench/parallel.py --only dp    one part: dp, tp, pp, memory, bubble, scaling, simulate

dp       DataParallel beside torch's DDP and beside a step that sends nothing, on a GPT of 10M parameters; bytes; order
tp       tensor_parallel beside parallelize_module, the same blocks cut
pp       Pipeline (1F1B) beside torch.distributed.pipelining's Schedule1F1B
memory   bytes saved for backward on the first rank, GPipe and 1F1B, counted as they live and die
bubble   idle time of 4 ranks whose blocks sleep instead of computing, so that cores are not short, beside the formula
scaling  strong (the same batch) and weak (the same batch a process) on 1 and 2 processes
simulate pipeline_schedules.predict beside steps that ran on 2 processes, given this machine's compute and link

Every round times each in turn, another one first, in the same processes, which keep the memory they free as train.py's do; the
ratio is that of the medians over the rounds.
"""

import argparse
import contextlib
import copy
import statistics
import sys
import tempfile
import time
import warnings
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import communication
import parallel
import pipeline
import tensor_parallel
from gpt import GPT, GPTConfig, count_parameters
from pipeline_schedules import Timed, bubble, bubble_formula, peak_held, schedule
from processes import keep_freed_memory

PARTS = ("dp", "tp", "pp", "memory", "bubble", "scaling", "simulate")


def medians(runs: dict, rounds: int, steps: int = 2) -> dict[str, float]:
    """Seconds of one call, by name; every rank calls, rank 0's clock counts."""
    times = {name: [] for name in runs}
    for run in runs.values():
        run()
    for r in range(rounds):
        for name in [*runs][r % len(runs):] + [*runs][:r % len(runs)]:
            dist.barrier()
            began = time.perf_counter()
            for _ in range(steps):
                runs[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - began) / steps)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def say(*words) -> None:
    if dist.get_rank() == 0:
        print(*words, flush=True)


def loss_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def step_of(model, optimizer, tokens, finish=lambda: None):
    """A whole training step: forward, backward, what is sent, AdamW."""
    def step():
        loss_of(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        finish()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)


def model_and_tokens(device, layers=5, width=384, context=64, rows=8, heads=6):
    config = GPTConfig(vocab_size=2048, context=context, n_layers=layers, n_heads=heads, d_model=width)
    model = GPT(config, generator=torch.Generator().manual_seed(0)).to(device)
    tokens = torch.randint(2048, (rows, context + 1), generator=torch.Generator().manual_seed(dist.get_rank()))
    return model, tokens.to(device)


def bench_dp(device, rounds):
    """A step's gradients are the same bytes however many tokens it has: what sending them costs depends on these."""
    model, tokens = model_and_tokens(device, rows=32)
    one, ours = copy.deepcopy(model), copy.deepcopy(model)
    theirs = nn.parallel.DistributedDataParallel(copy.deepcopy(model), gradient_as_bucket_view=True)
    dp = parallel.DataParallel(ours)
    say(f"dp       GPT of {count_parameters(model.config):,} parameters, 2 processes")
    for rows in (8, 16, 32):  # 16 x 64 a process are train.py's 2,048 tokens a step
        x = tokens[:rows]
        runs = {"nothing sent": step_of(one, adamw(one), x), "DDP": step_of(theirs, adamw(theirs), x),
                "ours": step_of(ours, adamw(ours), x, dp.finish)}
        found = medians(runs, rounds)
        for name, seconds in found.items():
            say(f"  {rows:2} x 64 tokens a process   {name:13} {1e3 * seconds:7.1f} ms   ours / it = {found['ours'] / seconds:.2f}")
    with communication.counting() as sent:
        runs["ours"]()
    mine = sum(p.nbytes for p in model.parameters())  # of gradients; DDP sends each once, too (2006.15704, section 3.2)
    say(f"  sent {sum(number for _, number in sent) / 1e6:.3f} MB a rank; gradients {mine / 1e6:.3f} MB, x 2 (P-1)/P = "
        f"{mine / 1e6:.3f} MB is what DDP's all-reduces send")
    events, all_reduce = [], dist.all_reduce
    hooks = [p.register_hook(lambda gradient: events.append("gradient")) for p in ours.parameters()]
    dist.all_reduce = lambda *args, **kwargs: (events.append("send"), all_reduce(*args, **kwargs))[1]
    runs["ours"]()
    dist.all_reduce = all_reduce
    for hook in hooks:
        hook.remove()
    first = events.index("send")
    say(f"  overlap: the first bucket left after {events[:first].count('gradient')} of {events.count('gradient')} gradients, "
        f"{events.count('send')} buckets in all")


def bench_tp(device, rounds):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, tokens = model_and_tokens(device)
    dist.broadcast(tokens, 0)
    plan = {"attention.qkv": ColwiseParallel(), "mlp.up": ColwiseParallel(),
            "attention.out": RowwiseParallel(), "mlp.down": RowwiseParallel()}
    theirs = parallelize_module(copy.deepcopy(model), init_device_mesh(device.type, (2,)), {
        f"blocks.{i}.{name}": style for i in range(len(model.blocks)) for name, style in plan.items()})
    blocks_alone = copy.deepcopy(model)  # the same is cut: not the vocabulary
    blocks_alone.tp_plan = {name: kind for name, kind in model.tp_plan.items() if kind != "vocab"}
    ours = tensor_parallel.tensor_parallel(blocks_alone)
    whole = tensor_parallel.tensor_parallel(copy.deepcopy(model))

    def whole_step(optimizer):
        def step():
            losses = tensor_parallel.vocabulary_cross_entropy(whole(tokens[:, :-1]), tokens[:, 1:], 2048)
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return step
    # DTensor and plain parameters do not mix in one foreach call
    groups = [[p for p in theirs.parameters() if isinstance(p, dist.tensor.DTensor)],
              [p for p in theirs.parameters() if not isinstance(p, dist.tensor.DTensor)]]
    both = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-4, foreach=True)
    found = medians({"parallelize_module": step_of(theirs, both, tokens), "ours": step_of(ours, adamw(ours), tokens),
                     "ours, vocabulary cut too": whole_step(adamw(whole))}, rounds)
    say("tp       the same GPT, its blocks cut in two")
    for name, seconds in found.items():
        say(f"  {name:25} {1e3 * seconds:7.1f} ms   ours / it = {found['ours'] / seconds:.2f}")


class Half(nn.Module):
    """One of two stages, for torch's pipeline."""

    def __init__(self, whole, rank):
        super().__init__()
        self.whole, self.rank, half = whole, rank, len(whole.blocks) // 2
        self.mine = slice(0, half) if rank == 0 else slice(half, None)

    def forward(self, x):
        x = self.whole.embed(x) if self.rank == 0 else x
        for block in self.whole.blocks[self.mine]:
            x = block(x)
        return x if self.rank == 0 else self.whole.head(x)


def bench_pp(device, rounds):
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    warnings.simplefilter("ignore")
    model, tokens = model_and_tokens(device, layers=6, rows=16)
    dist.broadcast(tokens, 0)
    rank, M = dist.get_rank(), 8
    half = Half(copy.deepcopy(model), rank)
    step = Schedule1F1B(PipelineStage(half, rank, 2, device), M, loss_of)

    def theirs():
        step.step(tokens[:, :-1]) if rank == 0 else step.step(target=tokens[:, 1:])
        half.zero_grad(set_to_none=True)
    pipe = pipeline.Pipeline(copy.deepcopy(model), schedule("1f1b", 2, M), costs=[1] * 6)

    def ours():
        pipe.step(tokens[:, :-1], tokens[:, 1:], lambda logits, targets: loss_of(logits, targets) / M)
        pipe.model.zero_grad(set_to_none=True)
    found = medians({"torch pipelining": theirs, "ours": ours}, rounds)
    say(f"pp       a GPT of 6 layers in two halves, {M} microbatches, 1F1B, without the optimizer")
    for name, seconds in found.items():
        say(f"  {name:17} {1e3 * seconds:7.1f} ms   ours / it = {found['ours'] / seconds:.2f}")


def bench_memory(device, rounds):
    say("memory   most bytes saved for backward at once on the first of 2 ranks, 4 layers, by schedule and microbatches")
    for M in (2, 4, 8, 16):
        peaks = {}
        for name in ("gpipe", "1f1b", "zb"):
            model, _ = model_and_tokens(device, layers=4, width=128, heads=4)
            tokens = torch.randint(2048, (2 * M, 65), generator=torch.Generator().manual_seed(0)).to(device)
            pipe = pipeline.Pipeline(model, schedule(name, 2, M))
            parameters = {p.data_ptr() for p in pipe.model.parameters()}
            live, most, seen = [0], [0], weakref.WeakSet()

            def save(t):
                storage = t.untyped_storage()
                if t.data_ptr() not in parameters and storage not in seen:
                    seen.add(storage)
                    live[0] += storage.nbytes()
                    most[0] = max(most[0], live[0])
                    weakref.finalize(storage, lambda n=storage.nbytes(): live.__setitem__(0, live[0] - n))
                return t
            with torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
                pipe.step(tokens[:, :-1], tokens[:, 1:], lambda logits, targets: loss_of(logits, targets) / M)
            peaks[name] = most[0]
        planned = {name: peak_held(schedule(name, 2, M)[0]) for name in peaks}
        say(f"  M = {M:2}   " + "   ".join(f"{name} {peak / 1e6:6.1f} MB ({planned[name]} held)" for name, peak in peaks.items())
            + f"   1f1b / gpipe = {peaks['1f1b'] / peaks['gpipe']:.2f}")


class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        time.sleep(2 * ctx.seconds)
        return dy, None


class SleepingBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1))

    def forward(self, x, start=0, cache=None):
        return Sleep.apply(x * self.weight[0], 0.02)


def bench_bubble(rank, P):
    say(f"bubble   {P} ranks, a forward sleeps 20 ms, a backward 40 ms; measured (formula)")
    for M in (2, 4, 8, 16, 32):
        line = [f"  M = {M:2}"]
        for name, v in (("gpipe", 1), ("1f1b", 1), ("interleaved", 2)):
            if v > 1 and M % P:
                line.append(f"{name} -             ")
                continue
            model = GPT(GPTConfig(vocab_size=16, context=4, n_layers=P * v, n_heads=1, d_model=4))
            model.blocks = nn.ModuleList(SleepingBlock() for _ in range(P * v))
            pipe = pipeline.Pipeline(model, schedule(name, P, M, v), costs=[1.0] * P * v)
            tokens = torch.zeros(M, 5, dtype=torch.long)
            dist.barrier()
            pipe.step(tokens[:, :-1], tokens[:, 1:], loss_of)
            gathered = [None] * P
            dist.all_gather_object(gathered, pipe.times)
            times = [Timed(r, *t) for r, part in enumerate(gathered) for t in part]
            line.append(f"{name} {bubble(times):.3f} ({bubble_formula(name, P, M, v):.3f})")
        say("   ".join(line))


def bench_simulate(device, rounds):
    """The model of links and compute that `--simulate` ranks layouts by, beside layouts that can be run here."""
    from pipeline_schedules import Cluster, Layout, Workload, predict

    work = Workload(n_layers=4, d_model=512, vocab_size=64, context=128, sequences=8, head_width=64, value_bytes=4, recompute=False)
    config = GPTConfig(64, 128, 4, 8, 512)
    tokens = torch.randint(64, (8, 129), generator=torch.Generator().manual_seed(0)).to(device)
    whole = GPT(config, generator=torch.Generator().manual_seed(0)).to(device)
    rank = dist.get_rank()

    def piped():
        model = copy.deepcopy(whole)
        pipe = pipeline.Pipeline(model, schedule("1f1b", 2, 8))
        optimizer = adamw(model)

        def run():
            pipe.step(tokens[:, :-1], tokens[:, 1:], lambda y, t: loss_of(y, t) / 8)
            optimizer.step()
            optimizer.zero_grad()
        return run

    def microbatched(model, finish, batch, count):
        optimizer = adamw(model)

        def run():
            with finish.no_sync() if finish else contextlib.nullcontext():
                for part in batch.chunk(count):
                    (loss_of(model(part[:, :-1]), part[:, 1:]) / count).backward()
            if finish:
                finish.finish()
            optimizer.step()
            optimizer.zero_grad()
        return run

    cut = tensor_parallel.tensor_parallel(copy.deepcopy(whole))

    def sliced():
        for part in tokens.chunk(8):
            tensor_parallel.vocabulary_cross_entropy(cut(part[:, :-1]), part[:, 1:], 64).mean().backward()
        sliced.optimizer.step()
        sliced.optimizer.zero_grad()

    sliced.optimizer = adamw(cut)
    one, dp = copy.deepcopy(whole), copy.deepcopy(whole)
    big, small, message = (torch.zeros(n, device=device) for n in (1 << 20, 1, 128 * 512))  # message: tensor parallelism's
    times = medians({
        "1": microbatched(one, None, tokens, 8),  # on both processes at once: so is the compute of all others
        "dp 2": microbatched(dp, parallel.DataParallel(dp), tokens.chunk(2)[rank], 4),
        "tp 2": sliced, "pp 2": piped(), "4 MB": lambda: dist.all_reduce(big), "4 B": lambda: dist.all_reduce(small),
        "message": lambda: dist.all_reduce(message)}, rounds)
    base = predict(Layout(1, 1, 1, micro=1), work, Cluster(flops=1e9)).seconds * 1e9
    cluster = Cluster(base / times["1"], message.nbytes / (times["message"] - times["4 B"]), big.nbytes / times["4 MB"],
                      times["4 B"], 2)
    say(f"simulate  {cluster.flops / 1e9:.0f} GFLOP/s a process, {cluster.inside_node / 1e9:.2f} and {cluster.between_nodes / 1e9:.2f} GB/s, "
        f"{cluster.latency * 1e6:.0f} us")
    for name, where in (("dp 2", Layout(2, 1, 1)), ("tp 2", Layout(1, 2, 1)), ("pp 2", Layout(1, 1, 2))):
        seconds = predict(where, work, cluster).seconds
        say(f"  {name}  predicted {seconds * 1e3:7.1f} ms, measured {times[name] * 1e3:7.1f} ms, off by {seconds / times[name] - 1:+.0%}")

def bench_scaling(device, rounds):
    model, tokens = model_and_tokens(device, rows=8)
    alone = dist.new_group([0]), dist.new_group([1])
    rank, results = dist.get_rank(), {}
    for name, ranks, rows in (("1 process", 1, 8), ("2, the same batch", 2, 4), ("2, the same batch each", 2, 8)):
        copied = copy.deepcopy(model)
        dp = parallel.DataParallel(copied, alone[rank] if ranks == 1 else None)
        run = step_of(copied, adamw(copied), tokens[:rows], dp.finish)
        idle = ranks == 1 and rank == 1
        results[name] = medians({"x": (lambda: None) if idle else run}, rounds)["x"], ranks * rows * 64
    base, base_tokens = results["1 process"]
    say("scaling  data parallel, the same GPT")
    for name, (seconds, count) in results.items():
        say(f"  {name:23} {1e3 * seconds:7.1f} ms   {count / seconds:8,.0f} tokens/s   x {count / seconds / base_tokens * base:.2f}")


def main(rank, P, options, part, rendezvous):
    torch.set_num_threads(1)
    keep_freed_memory()
    device = torch.device(options.device, rank) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=rendezvous, rank=rank, world_size=P)
    if part == "bubble":
        bench_bubble(rank, P)
    else:
        globals()[f"bench_{part}"](device, options.rounds)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--only", choices=PARTS, help="one part (default all)")
    parser.add_argument("--repeats", dest="rounds", type=int, default=15, help="of every measurement (default %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default %(default)s)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--repeats must be at least 1, got {options.rounds}")
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "") \
        if Path("/proc/cpuinfo").exists() else ""
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if options.device == 'cuda' else cpu}, one thread a process")
    for part in [options.only] if options.only else PARTS:
        P = 4 if part == "bubble" else 2
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(main, (P, options, part, (Path(folder) / "ranks").as_uri()), nprocs=P)
