"""The processes of a run: what one knows, all know; what torchrun sets is read; what is wrong is said in one line."""

import re
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, run_ranks, spawn_ranks
from run_here import run_here

from processes import ProcessError, World, is_lost, join, measure_peak, memory, multiplies_bf16


@pytest.mark.parametrize("P", [1, 2, 3])
def test_gather_and_sum_match_brute_force(P):
    def on_rank(rank):
        world = World(rank, P)
        return world.gather({"rank": rank}), world.sum([float(rank), 1.0]), world.first(lambda: f"said by {rank}")

    for gathered, total, first in run_ranks(P, on_rank):
        assert gathered == [{"rank": r} for r in range(P)]
        assert total == [P * (P - 1) / 2, P] and first == "said by 0"


@pytest.mark.parametrize("error", [ValueError("bad text"), OSError(28, "No space left on device", "out/x")])
@pytest.mark.parametrize("guilty", [0, 2])
def test_what_fails_on_one_process_is_raised_by_all(error, guilty):
    def fail():
        raise error

    def on_rank(rank):
        world = World(rank, 3)
        with pytest.raises(ProcessError) as caught:
            world.agree(fail, here=rank == guilty)
        return str(caught.value), world.agree(lambda: rank, here=rank != guilty)

    results = run_ranks(3, on_rank)
    assert {message for message, _ in results} == {str(error)}
    assert [value for _, value in results] == [None if r == guilty else r for r in range(3)]


def test_an_unexpected_error_is_not_hidden():
    with pytest.raises(TypeError):
        World().agree(lambda: None + 1)


def join_and_work_longer_than_the_timeout(rank):
    world = join("cpu", timeout=2)
    found = world.agree(lambda: time.sleep(2.5) or "done", here=rank == 0, slow=True)
    backend, size = dist.get_backend(), dist.get_world_size()
    return world.rank, world.size, world.local_rank, world.local_size, world.device.type, backend, size, found


def test_join_reads_what_torchrun_sets_and_slow_work_outlasts_the_timeout():
    zero, one = spawn_ranks(2, join_and_work_longer_than_the_timeout, init=False)
    assert zero == (0, 2, 0, 2, "cpu", "gloo", 2, "done") and one == (1, 2, 1, 2, "cpu", "gloo", 2, None)


def test_join_alone_needs_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world = join("cpu")
    assert (world.rank, world.size, world.device.type) == (0, 1, "cpu") and not dist.is_initialized()


@pytest.mark.parametrize("asked, threads", [("1", 1), ("2", 2)])
def test_the_users_threads_are_kept(monkeypatch, asked, threads):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    torch.set_num_threads(threads)
    join("cpu")
    assert torch.get_num_threads() == threads
    torch.set_num_threads(before)


def test_wrong_environments_are_refused(monkeypatch):
    with pytest.raises(ProcessError, match="--device=tpu cannot be used here: take one of .*cpu"):
        join("tpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ProcessError, match="WORLD_SIZE is 2, but .*start the processes by torchrun"):
        join("cpu")


def test_a_closed_pipe_does_not_stop_what_prints():
    code = "import time; from processes import World; w = World(); [w.say('x' * 10000) for _ in range(50)]"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == b""


@pytest.mark.parametrize("error, lost", [
    (RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:2"), True),
    (RuntimeError("Timed out waiting 600000ms for recv operation to complete"), True),
    (dist.DistBackendError("NCCL communicator was aborted on rank 1"), True),
    (dist.DistBackendError("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"), False),
    (RuntimeError("CUDA error: the launch timed out and was terminated"), False),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False)])
def test_a_lost_process_is_told_from_an_error_of_ones_own(error, lost):
    assert is_lost(error) is lost


def test_the_machine_is_measured():
    cpu = torch.device("cpu")
    assert 1e8 < measure_peak(World(), torch.float32) < 1e14
    assert memory(cpu) > 2**28 and multiplies_bf16(cpu) in (True, False) and not multiplies_bf16(torch.device("meta"))


UNDER_TORCHRUN = {path.name for path in ROOT.glob("*.py")  # as a header says
                  if re.search(rf"^ +torchrun .* {path.name}\b", path.read_text().split('"""')[1], re.MULTILINE)}
REFUSED = {"processes.py": ["--device=tpu"], "train.py": ["--steps=0"], "data.py": ["crawl/*.wet"]}


@pytest.mark.parametrize("file", sorted(UNDER_TORCHRUN | {"zero_memory.py"}))
@pytest.mark.parametrize("flags", (["--nonsense"], None), ids=("unknown", "refused"))
def test_a_refused_flag_is_said_once_by_all_ranks(file, flags, monkeypatch):
    flags = flags or REFUSED.get(file, ["--seed=-1"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        found = run_here([file, *flags])
        assert (found.returncode, found.stderr.count("\n")) == (2, lines), found.stderr
        assert found.stderr.startswith(f"{file}: ") or rank == "1"
