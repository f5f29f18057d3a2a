"""The processes of a run: who am I, which device is mine, and how do we all agree?

Idea      torchrun starts the same program P times and tells each copy its rank by environment variables; without it
          there is one process, and nothing else changes. What only one process can know (a file is broken, the disk
          is full) has to become known to all, or the others wait for ever in the next collective.
Formula   MFU = tokens/s * FLOPs per token / peak, the peak being that of a large matrix product, measured
Shapes    no tensors here but those of the measurement, (n, n)
Omits     meshes of several axes, and everything about gradients: parallel.py
Run       python processes.py                                         what this machine offers
          torchrun --standalone --nproc_per_node=2 processes.py       the same, seen by two processes
          Ends with "sum of ranks = ..."
Test      pytest tests/test_processes.py
"""

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


class ProcessError(ValueError):
    """What every process raises when one of them could not go on; the message is one line for the user."""


# --- 1. the processes and what they tell each other -----------------------------------------

@dataclass
class World:
    """Who this process is: rank of size; local_rank of local_size on this machine; its device."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = torch.device("cpu")
    patient: dist.ProcessGroup | None = None  # a group that waits for days: for work that one process does for all

    @property
    def everyone(self) -> dist.ProcessGroup | None:
        """The group of all processes; None if this is the only one."""
        return dist.group.WORLD if self.size > 1 else None

    def say(self, text: str) -> None:
        """Print on rank 0. That nobody listens any more (a closed pipe) is no reason to stop."""
        if self.rank == 0 and text:
            try:
                print(text, flush=True)
            except BrokenPipeError:
                sys.stdout = open(os.devnull, "w")

    def gather(self, value, group: dist.ProcessGroup | None = None) -> list:
        """Every process's value, in the order of ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=group)
        return values

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all processes."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def agree(self, do: Callable, here: bool = True, slow: bool = False):
        """``do()`` on the processes where ``here`` holds; returns its result there.

        Args:
            slow: ``do`` may take longer than the time-out of the collectives.

        Raises:
            ProcessError: on EVERY process, if ``do`` raised a ValueError or an OSError on any.
        """
        result = failure = cause = None
        try:
            result = do() if here else None
        except (ValueError, OSError) as error:
            cause, failure = error, str(error) or repr(error)
        failures = [f for f in self.gather(failure, self.patient if slow else None) if f]
        if failures:
            raise ProcessError(failures[0]) from cause
        return result

    def first(self, do: Callable):
        """``do()`` on rank 0, its result on every process; ProcessError on every process if it failed."""
        return self.gather(self.agree(do, here=self.rank == 0))[0]


def join(device: str | None = None, timeout: int = 600) -> World:
    """Read what torchrun set (nothing: one process), take a device, and start torch.distributed.

    Args:
        device: "cpu", "cuda" or "mps"; None: the best that is here.
        timeout: seconds after which a silent process counts as lost.

    Raises:
        ProcessError: for a device that is not here, or half an environment.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    size, local_size = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and size == 1, "cpu": True}
    here = [kind for kind in usable if usable[kind]]
    kind = device or here[0]
    if kind not in here:
        raise ProcessError(f"--device={kind} cannot be used here: take one of {', '.join(here)}")
    mine = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        if local_size > torch.cuda.device_count():
            raise ProcessError(f"{local_size} processes on a machine with {torch.cuda.device_count()} GPUs: "
                               f"torchrun --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(mine)
        torch.set_float32_matmul_precision("high")  # fp32 products in TF32: 10 bits of mantissa, 8 times the speed
    elif kind == "cpu":
        threads = int(os.environ.get("OMP_NUM_THREADS", 0))
        if threads == 0 or threads == 1 and local_size > 1:  # torchrun says 1 where the user said nothing
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(max(1, cores // local_size))
        keep_freed_memory()
    if size == 1:
        return World(device=mine)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    except ValueError as error:
        raise ProcessError(f"WORLD_SIZE is {size}, but {error}: start the processes by torchrun") from None
    # torchrun restarts with the store of the attempt before, where the addresses of the dead still stand.
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=size,
                            timeout=timedelta(seconds=timeout))
    return World(rank, size, local_rank, local_size, mine, dist.new_group(backend="gloo", timeout=timedelta(days=7)))


def is_lost(error: RuntimeError) -> bool:
    """Whether an error of a collective says that another process is gone, or silent for longer than the time-out."""
    if any(own in str(error) for own in ("CUDA error", "Duplicate GPU", "out of memory")):  # this process's own
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in (
        "Connection closed", "Connection reset", "Connection refused", "imed out", "Broken pipe"))


def start_ranks(function: Callable, arguments: tuple, P: int) -> None:
    """function(rank, *arguments) in P processes that end with this one, for demos without torchrun: Ctrl-C is for this
    process alone."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the others will have it
    ranks = torch.multiprocessing.spawn(function, arguments, nprocs=P, join=False, daemon=True)
    signal.signal(signal.SIGINT, handler)
    while not ranks.join():
        pass


@contextlib.contextmanager
def noting_signals(say: Callable[[str], None]) -> Iterator[list[int]]:
    """Inside, Ctrl-C and a polite kill only fill the list that this yields; a second Ctrl-C interrupts."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # others cannot have handlers
        yield received
        return
    moment = [0.0]

    def note(number, frame):
        if not received:
            moment[0] = time.monotonic()
            say("stopping after this step ... (Ctrl-C again: at once, without saving)")
        elif number == signal.SIGINT and time.monotonic() - moment[0] > 2:  # sooner it is torchrun passing it on
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- 2. what the machine can do -------------------------------------------------------------

def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks (no mmap, no trimming): every step asks for the same ones again, and the
    kernel would have to zero each page anew, 12 to 18% of a small step."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to ask
        libc = ctypes.CDLL("libc.so.6")
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 ones: GPUs since Ampere, CPUs with AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()


def memory(device: torch.device) -> int:
    """Bytes of memory that the device has; for a CPU and mps, the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measure_peak(world: World, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, on all processes at once, summed: what MFU is measured against."""
    n = 4096 if world.device.type == "cuda" else 768
    a, b = (torch.randn(n, n, device=world.device).to(dtype) for _ in range(2))
    times: list[float] = []
    while len(times) < 10 and sum(times) < 0.5:
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # reading a number waits for the device
        times.append(time.perf_counter() - began)
    return world.sum([2 * n**3 / min(times)])[0]


# --- 3. demo --------------------------------------------------------------------------------

def main(device: str | None) -> None:
    world = join(device)
    mine = (f"rank {world.rank} of {world.size}: {world.device}, {torch.get_num_threads()} threads, "
            f"{memory(world.device) / 2**30:.0f} GiB, bf16 products fast: {multiplies_bf16(world.device)}")
    world.say("\n".join(world.gather(mine)))
    world.say(f"matrix products: {measure_peak(world, torch.float32) / 1e12:.3g} TFLOP/s in fp32, all together")
    total = world.sum([float(world.rank)])[0]
    world.say(f"sum of ranks = {total:.0f} (expected {world.size * (world.size - 1) // 2})")
    if world.size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    first = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"  # of its machine: each may lack another
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n" if first else None)
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best that is here)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
