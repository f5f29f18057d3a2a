"""Two machines: network namespaces joined by a cable that can be cut. `torchrun --nnodes=2` trains over it."""

import json
import os
import subprocess
import time

import pytest
from conftest import ROOT, Program

SETTINGS = ("--n_layers=1 --n_heads=2 --d_model=16 --context=16 --batch_tokens=64 --steps=120 --warmup_steps=0 --samples=0 "
            "--vocab_size=280 --save_every=20 --eval_every=60 --timeout=6 --resume").split()


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines():
    """Names of two namespaces, their addresses, and what cuts and mends the cable."""
    names = [f"llm{os.getpid()}{side}" for side in "ab"]
    addresses = ["10.213.7.1", "10.213.7.2"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, addresses):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                ip("-n", name, "link", "set", link, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}".strip())
    yield names, addresses, lambda state: ip("-n", names[0], "link", "set", "cable", state)
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start(machines, out, port):
    """One torchrun on each machine, one process each."""
    names, addresses, _ = machines
    return [Program(["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}",
                     f"--master_addr={addresses[0]}", f"--master_port={port}", "train.py", *SETTINGS,
                     f"--data={ROOT}/README.md", f"--out={out}"],
                    variables={"GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}, machine=name)
            for rank, name in enumerate(names)]


def ended(programs, seconds):
    """Exit statuses and outputs; all must have ended by then."""
    deadline = time.monotonic() + seconds
    done = [program.wait(max(0.1, deadline - time.monotonic())) for program in programs]
    assert time.monotonic() < deadline, f"not ended after {seconds} s: {[one.stderr[-3000:] for one in done]}"
    return [one.returncode for one in done], [one.stdout + one.stderr for one in done]


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_cut_cable_ends_both_and_the_run_goes_on_with_the_same_losses(machines, tmp_path):
    statuses, outputs = ended(start(machines, tmp_path / "whole", 29400), 100)
    assert statuses == [0, 0], outputs
    expected = losses(tmp_path / "whole")
    assert len(expected) == 120

    out = tmp_path / "cut"
    running = start(machines, out, 29401)
    deadline = time.monotonic() + 60
    while not list(out.glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    machines[2]("down")
    began = time.monotonic()
    statuses, outputs = ended(running, 90)
    print(f"both ended after {time.monotonic() - began:.0f} s", *(output[-1500:] for output in outputs))
    assert 0 not in statuses and max(losses(out)) < 120
    machines[2]("up")
    statuses, outputs = ended(start(machines, out, 29402), 100)
    assert statuses == [0, 0], outputs
    assert losses(out) == expected
