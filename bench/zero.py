"""ZeRO beside torch's DistributedDataParallel and fully_shard, on processes of one thread each (gloo on a CPU).

    python bench/zero.py                  everything, 2 processes, about 2 minutes
    python bench/zero.py --ranks 4        on 4 processes; the times alone about 2 minutes
    python bench/zero.py --only time      one part: time, memory, bytes, scaling

time     a whole training step (forward, backward, what is sent, AdamW) of a GPT of 34M parameters; every round times each
         in turn in the same processes, beginning with another one; ratios are medians of those within a round. Beside
         it the CPU's time, of all threads: what others on the machine take does not count there, nor does waiting
memory   most memory that a process had resident in three steps, above what it had before the model was made; each in
         processes of its own
bytes    sent in a step per stage, counted, beside 2, 2, 2 and 3 (P-1)/P times the parameters' bytes
scaling  stage 1 and stage 3 with the same batch a process on 1, 2 and 4 processes
"""

import argparse
import copy
import re
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import communication
from gpt import GPT, GPTConfig, count_parameters
from zero import ZeRO

PARTS = ("time", "memory", "bytes", "scaling")
NAMES = ("DDP", "fully_shard", "stage 0", "stage 1", "stage 2", "stage 3")
adamw = partial(torch.optim.AdamW, lr=1e-4, foreach=True)


def say(*words) -> None:
    if dist.get_rank() == 0:
        print(*words, flush=True)


def make(small=False):
    sizes = {"n_layers": 4, "d_model": 256, "vocab_size": 1024} if small else {"n_layers": 10, "d_model": 512, "vocab_size": 4096}
    model = GPT(GPTConfig(context=64, n_heads=8, **sizes), generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(sizes["vocab_size"], (4, 65), generator=torch.Generator().manual_seed(dist.get_rank()))
    return model, tokens


def step_of(name, model, tokens, group=None):
    """A whole training step by one of NAMES; ``model`` becomes its own."""
    def loss_of():
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    if name.startswith("stage"):
        zero = ZeRO(model, adamw, group, int(name[-1]))

        def ours():
            loss_of().backward()
            zero.finish()
            zero.step()
            zero.zero_grad()
        ours.zero = zero
        return ours
    if name == "DDP":
        model = nn.parallel.DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
    else:
        from torch.distributed.fsdp import fully_shard
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer = adamw(model.parameters())

    def theirs():
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return theirs


def measure(runs, rounds):
    """Seconds of one call by a clock, and of this process' CPU, by name, a list over the rounds; every rank calls."""
    clock, cpu = {name: [] for name in runs}, {name: [] for name in runs}
    names = list(runs)
    for run in runs.values():
        run()
    for i in range(rounds):
        for name in names[i % len(names):] + names[:i % len(names)]:
            dist.barrier()
            began, spent = time.perf_counter(), time.process_time()
            runs[name]()
            cpu[name].append(time.process_time() - spent)
            clock[name].append(time.perf_counter() - began)
    return clock, cpu


def ratio(times, name, other):
    """The median, over the rounds, of one's time over the other's in the same round."""
    return statistics.median(mine / theirs for mine, theirs in zip(times[name], times[other]))


def bench_time(rounds, only):
    model, tokens = make()
    clock, cpu = measure({name: step_of(name, copy.deepcopy(model), tokens) for name in NAMES}, rounds)
    say(f"time     GPT of {count_parameters(model.config):,} parameters in fp32, {len(tokens)} x 64 tokens a process, "
        f"{dist.get_world_size()} processes")
    for name in NAMES:
        say(f"  {name:12} {1e3 * statistics.median(clock[name]):7.0f} ms   / DDP's {ratio(clock, name, 'DDP'):.2f}   "
            f"/ fully_shard's {ratio(clock, name, 'fully_shard'):.2f}       CPU {1e3 * statistics.median(cpu[name]):7.0f} ms   "
            f"/ DDP's {ratio(cpu, name, 'DDP'):.2f}   / fully_shard's {ratio(cpu, name, 'fully_shard'):.2f}")


def resident(field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def bench_memory(rounds, name):
    warm = step_of(name, *make(small=True))  # what the libraries take once is not counted
    warm()
    del warm
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    model, tokens = make()
    step = step_of(name, model, tokens)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    n = sum(p.numel() for p in model.parameters()) if name == "DDP" else count_parameters(model.config)
    held = sum(step.zero.bytes_held().values()) if hasattr(step, "zero") else None
    say(f"  {name:12} {(resident('VmHWM') - before) / 1e6:7.0f} MB"
        + (f"   of which parameters, gradients and states at rest {held / 1e6:4.0f} MB" if held else "") + f"   ({n:,})")


def bench_bytes(rounds, only):
    P = dist.get_world_size()
    say(f"bytes    sent by a rank in a step, {P} processes; n the parameters' bytes")
    for stage in range(4):
        model, tokens = make(small=True)
        n = sum(p.nbytes for p in model.parameters())
        step = step_of(f"stage {stage}", model, tokens)
        step()
        with communication.counting() as sent:
            step()
        total, rule = sum(number for _, number in sent), 3 if stage == 3 else 2
        say(f"  stage {stage}   {total / 1e6:7.3f} MB   {rule} (P-1)/P n = {rule * (P - 1) / P * n / 1e6:7.3f} MB   "
            f"ratio {total / (rule * (P - 1) / P * n):.4f}" if P > 1 else f"  stage {stage}   {total} bytes")


def bench_scaling(rounds, only):
    model, tokens = make()
    clock, _ = measure({name: step_of(name, copy.deepcopy(model), tokens) for name in ("stage 1", "stage 3")}, rounds)
    found = {name: statistics.median(seconds) for name, seconds in clock.items()}
    P = dist.get_world_size()
    say(f"scaling  {P} processes   " + "   ".join(f"{name} {1e3 * s:6.0f} ms, {P * tokens[:, 1:].numel() / s:6.0f} tokens/s"
                                                  for name, s in found.items()))


def main(rank, P, options, part, name, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=P)
    globals()[f"bench_{part}"](options.rounds or max(1, 12 // P), name)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--only", choices=PARTS, help="one part (default all)")
    parser.add_argument("--repeats", dest="rounds", type=int, help="of every measurement (default 12 / processes)")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default %(default)s)")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--repeats must be at least 1, got {options.rounds}")
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "") \
        if Path("/proc/cpuinfo").exists() else ""
    print(f"torch {torch.__version__}, {cpu}, one thread a process")
    for part in [options.only] if options.only else PARTS:
        names = NAMES if part == "memory" else [None]
        if part == "memory":
            print(f"memory   resident at most, above what was before the model, {options.ranks} processes", flush=True)
        for name in names:
            for P in (1, 2, 4) if part == "scaling" else (options.ranks,):
                with tempfile.TemporaryDirectory() as folder:
                    torch.multiprocessing.spawn(main, (P, options, part, name, (Path(folder) / "ranks").as_uri()), nprocs=P)
