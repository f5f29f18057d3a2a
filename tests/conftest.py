"""Shared by all tests: the import path, one thread per process, two ways to run P ranks, one to run a program.

    from conftest import run_program, run_ranks, spawn_ranks

    run_ranks(4, fn, *args)      ranks are threads of this process: 0.1 s, closures allowed.
                                 The default random generator is shared by all threads, so let fn draw from
                                 a torch.Generator of its own, or make the random tensors before the call.
    spawn_ranks(2, fn, *args)    ranks are processes, as torchrun starts them: about a second. fn and args are
                                 pickled: fn is a module-level function.

Both call fn(rank, *args) on every rank with torch.distributed initialised on gloo, and return the P
results in rank order. An exception on a rank is raised again here, its message preceded by "rank r: ".

    run_program(["gpt.py", "--steps", "2"])    a file as the main program, in a process that has torch already
    run_program(["zero.py"], processes=2)      on two, as torchrun starts them
    run_program(["-m", "torch.distributed.run", "--standalone", ...])   by torchrun, whose ranks have torch already, too
"""

import contextlib
import ctypes
import functools
import gc
import logging
import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import thread_ranks  # noqa: E402

# The tests' tensors are small: a second thread costs more than it brings, and ranks share the cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
logging.disable(logging.DEBUG)  # a checkpoint of torch.distributed writes some hundred such records, to nobody


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """With pytest-xdist there, tests are shared out over two processes; ``-n 0`` has one, as without."""
    is_worker = hasattr(config, "workerinput")
    if not is_worker and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = 2, "worksteal"


def pytest_collection_finish():
    gc.freeze()  # what libraries made while they were imported is not looked at again


def _with_rank(error, rank):
    """The same exception, its message preceded by the rank it comes from."""
    error.args = (f"rank {rank}: {error}", *error.args[1:])
    return error


# --- ranks as threads -------------------------------------------------------------------------

@contextlib.contextmanager
def _on_one_core():
    """Threads that take turns at Python's lock lose a third of their time to passing it between cores."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()  # only Linux has it
    if cores:
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
        os.sched_setaffinity(0, {sorted(cores)[worker % len(cores)]})
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


def run_ranks(P, fn, *args, timeout=60.0, backend="threads"):
    """[fn(0, *args), ..., fn(P - 1, *args)], every call in a thread with its own process group.

    backend: "threads" (thread_ranks.py) or "gloo", over sockets.

    Raises:
        the exception of the rank that failed first; TimeoutError if a rank is not back in `timeout` seconds.
    """
    from torch.testing._internal.distributed import multi_threaded_pg

    store, everyone_done = dist.HashStore(), threading.Barrier(P)
    office = thread_ranks.open_office(store)
    results, errors = [None] * P, []  # errors: (rank, exception), the first one first

    def run(rank):
        try:
            dist.init_process_group(backend, store=store, rank=rank, world_size=P,
                                    timeout=timedelta(seconds=timeout))
            results[rank] = fn(rank, *args)
            everyone_done.wait(timeout)  # a group destroyed early would cut off ranks still talking to it
        except threading.BrokenBarrierError:
            pass  # another rank failed, and reports it
        except BaseException as error:
            errors.append((rank, error))
            everyone_done.abort()
            office.close(f"rank {rank} failed")
            traceback.clear_frames(error.__traceback__)  # they hold the group, and with it its connections
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()  # closes the connections: ranks waiting for this one raise

    deadline = time.monotonic() + timeout
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()
    try:
        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(P)]
        with _on_one_core():
            for thread in threads:
                thread.start()
        for thread in threads:
            while thread.is_alive() and time.monotonic() < deadline:
                thread.join(0.1)
                if errors:  # the others can only fail: give them a moment to do so
                    deadline = min(deadline, time.monotonic() + 2.0)
        late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    finally:
        multi_threaded_pg._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        thread_ranks.close_office(office)
    if errors:
        rank, error = errors[0]
        raise _with_rank(error, rank)
    if late:
        raise TimeoutError(f"ranks {late} of {P} not back after {timeout} s")
    return results


# --- processes ------------------------------------------------------------------------------

def _context():
    """A fork server that has imported torch: a fresh process costs 0.1 s, and, unlike a fork of this process, it
    inherits no thread's lock. Only Unix has it."""
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        context.set_forkserver_preload(["preloaded"])
        # The server finds modules by this variable alone; what it starts is not to have it.
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        forkserver.ensure_running()
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    return context


def _main_program(words):
    """What ``python words...`` does, in this process, which began as another."""
    # It has streams of its own.
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", closefd=False), open(2, "w", closefd=False)
    torch.set_num_threads(1)
    sys.argv = list(words)
    if words[0] == "-m":
        return _torchrun_program(words)
    file = Path(words[0]).resolve()
    sys.path[:] = [str(file.parent), *(p for p in sys.path if p not in (str(ROOT), str(ROOT / "tests")))]
    if file.parent != ROOT:  # a copy has no neighbours
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").parent == ROOT:
                del sys.modules[name]
    # The processes that a program starts have torch already, too.
    torch.multiprocessing.spawn = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: get_context(method and "fork")
    runpy.run_path(str(file), run_name="__main__")


def _torchrun_program(words):
    """torchrun itself, of which only the ranks are forked instead of started anew."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    assert words[1] == "torch.distributed.run"
    subprocess_handler.Popen = _ForkedRank
    run.main(words[2:])


class _ForkedRank:
    """What torchrun wants of subprocess.Popen([python, "-u", *words]): a fork of torchrun, with its variables."""

    def __init__(self, args, env, stdout=None, stderr=None, **options):
        assert args[1] == "-u" and not (stdout or stderr)
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(args[2:], env))
        self._process.start()
        self.pid = self._process.pid
        with contextlib.suppress(OSError):  # torchrun sends signals to the group; the rank may have done it already
            os.setpgid(self.pid, self.pid)

    @staticmethod
    def _run(words, env):
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # torchrun has handlers
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(env)
        _main_program(words)

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("rank", timeout)
        return self.poll()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _program(words, folder, outputs, variables, machine=None):
    """A fork of the server becomes the program, its output in files."""
    if machine:  # a network namespace, as "ip netns exec" enters it
        with open(f"/run/netns/{machine}") as file:
            assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
    for number, path in zip((1, 2), outputs):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    os.environ.pop("PYTHONPATH", None)
    os.environ.update(variables)
    _main_program(words)


class Program:
    """subprocess.Popen([python, *words], cwd=folder), without the seconds of importing torch.

    ``words`` may be those of torchrun: "-m", "torch.distributed.run", ...: its ranks are without them, too.
    ``machine``: the network namespace to run in.
    """

    def __init__(self, words, folder=ROOT, variables=None, machine=None):
        self.words, self._folder = [str(word) for word in words], tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        self.process = _context().Process(target=_program, args=(self.words, folder, self._outputs, variables or {}, machine))
        self.process.start()  # the first of all waits for the fork server's imports

    def wait(self, timeout=170.0):
        """What subprocess.run returns; after ``timeout`` seconds the program is killed."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        texts = [path.read_text() if path.exists() else "" for path in self._outputs]
        return subprocess.CompletedProcess(self.words, self.process.exitcode, *texts)


def run_program(words, folder=ROOT, timeout=170.0, processes=None):
    """What ``Program`` gives when it has ended. ``processes``: as many at once, with the variables that torchrun sets;
    the output is that of rank 0."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes else None
    started = [Program(words, folder, _torchrun(rank, processes, store.port) if processes else None)
               for rank in range(processes or 1)]
    deadline = time.monotonic() + timeout
    done = [program.wait(max(0.0, deadline - time.monotonic())) for program in started]
    done[0].returncode = next((one.returncode for one in done if one.returncode), 0)
    return done[0]


def _torchrun(rank, P, port):
    """The variables that torchrun sets."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(P), "LOCAL_WORLD_SIZE": str(P),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            "TORCHELASTIC_USE_AGENT_STORE": "True"}  # the store is up, no rank has to host it


# --- ranks as processes -----------------------------------------------------------------------

def _process(rank, P, port, timeout, init, call, connection):
    """One rank: reports (True, result) or (False, (exception, traceback)), by value, pickled once."""
    try:
        torch.set_num_threads(1)
        os.environ.update(_torchrun(rank, P, port))
        if init:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        fn, args = pickle.loads(call)
        report = pickle.dumps((True, fn(rank, *args)))
    except BaseException as error:
        try:
            report = pickle.dumps((False, (error, traceback.format_exc())))
            pickle.loads(report)
        except Exception:  # an exception that cannot be pickled
            report = pickle.dumps((False, (RuntimeError(repr(error)), traceback.format_exc())))
        connection.send_bytes(report)
    else:
        connection.send_bytes(report)
        try:
            connection.recv_bytes()  # alive until every rank is done: some may still be talking to this one
        except EOFError:
            pass
    if dist.is_initialized():
        dist.destroy_process_group()


def spawn_ranks(P, fn, *args, timeout=60.0, init=True, return_exceptions=False):
    """[fn(0, *args), ..., fn(P - 1, *args)], every call in a process of its own.

    Args:
        timeout: seconds, for the whole and for every collective; then what is still running is killed.
        init: False leaves init_process_group to fn; torchrun's environment (RANK, WORLD_SIZE, MASTER_PORT,
            ...) is set in either case.
        return_exceptions: put a rank's exception in its place in the list (ProcessLookupError for a rank
            that died without a word) and wait for the others, instead of raising the first one at once.

    Raises:
        the exception of the rank that failed first; TimeoutError if a rank is not back in `timeout` seconds.
    """
    context = _context()
    # Port 0: the system picks a free one, and the store keeps it, so nobody can take it in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    call = pickle.dumps((fn, args))
    processes, ends, results = [], {}, {}  # ends: our end of the pipe to a rank -> rank
    try:
        for rank in range(P):
            ours, theirs = context.Pipe()
            process = context.Process(target=_process, daemon=True,
                                      args=(rank, P, store.port, timeout, init, call, theirs))
            process.start()
            theirs.close()  # so that our end reports the end of file when the rank dies
            processes.append(process)
            ends[ours] = rank
        deadline = time.monotonic() + timeout  # the first start of all waits for the fork server's imports
        while len(results) < P:
            pending = [end for end, rank in ends.items() if rank not in results]
            ready = wait(pending, max(0.0, deadline - time.monotonic()))
            if not ready:
                late = [ends[end] for end in pending]
                raise TimeoutError(f"ranks {late} of {P} not back after {timeout} s")
            for end in ready:
                rank = ends[end]
                try:
                    succeeded, result = pickle.loads(end.recv_bytes())
                except (EOFError, ConnectionError):
                    processes[rank].join(5.0)
                    succeeded = False
                    result = ProcessLookupError(f"died, exit code {processes[rank].exitcode}"), ""
                if not succeeded:
                    error, trace = result
                    result = _with_rank(error, rank)
                    result.__cause__ = RuntimeError("\n" + trace) if trace else None
                    if not return_exceptions:
                        raise result
                results[rank] = result
        return [results[rank] for rank in range(P)]
    finally:
        for end in ends:
            end.close()
        if len(results) < P:  # failed or late: no rank has a reason to go on
            for process in processes:
                process.kill()
        for process in processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
