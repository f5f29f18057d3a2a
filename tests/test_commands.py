"""Every command that a header or the README shows, run at its smallest size, ends as it says."""

import ast
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT

TINY = "--n_layers=1 --n_heads=2 --d_model=16 --context=16 --batch_tokens=64 --steps=2 --warmup_steps=0 --samples=1 "
TEXT = "{tmp}/my/text.txt"

# command as it is shown -> (the command at its smallest size, what its last lines say); {tmp} is a folder with
# a text, and {tmp}/run a finished tiny run.
COMMANDS = {
    "python processes.py": (None, "sum of ranks = 0, expected 0"),
    "torchrun --standalone --nproc_per_node=2 processes.py": (None, "sum of ranks = 1, expected 1"),
    "python gpt.py": ("python gpt.py --steps 2", r"max \|cached - uncached logits\| = \d\.\de-0[5-9]"),
    "python checkpoint.py": ("python checkpoint.py --kills 1", "whole after a kill: 1 of 1"),
    "python config.py --preset gpt2_124m --lr 3e-4": (None, "one step = 524288 tokens = 1 processes"),
    "python tokenizer.py": (None, "naive = fast: True .* round trip: True"),
    "python tokenizer.py --data book.txt --out book.tiktoken": (
        f"python tokenizer.py --data {TEXT} --out {{tmp}}/book.tiktoken --vocab_size 300", "round trip: True"),
    "python data.py": (None, "seen exactly once: True"),
    "python data.py --data 'my/**/*.txt'": ("python data.py --data {tmp}/my/**/*.txt --context 16",
                                             "seen exactly once: True"),
    "python decode.py": (None, "True"),
    'python decode.py --checkpoint out/pretrain --prompt "The function"': (
        'python decode.py --checkpoint {tmp}/run --prompt "The" --max_new_tokens 5', "The"),
    "python decode.py --checkpoint out/pretrain --chat": (
        "python decode.py --checkpoint {tmp}/run --chat --max_new_tokens 3", ""),
    "python parallel.py": ("python parallel.py --steps 3 --width 16 --batch 6", r"max \|DP - one process\| = \d\.\de-1\d .*OK, below 1e-10"),
    "torchrun --nproc_per_node 2 parallel.py": ("torchrun --nproc_per_node 2 parallel.py --steps 2 --width 16 --batch 6",
                                                 r"max \|DP - one process\| = \d\.\de-1\d .*OK, below 1e-10"),
    "python train.py": (f"python train.py --data {TEXT} --vocab_size=280 --out {{tmp}}/1 {TINY}", "saved in"),
    "torchrun --standalone --nproc_per_node=2 train.py": (
        f"torchrun --standalone --nproc_per_node=2 train.py --data {TEXT} --vocab_size=280 --out {{tmp}}/2 {TINY}", "saved in"),
    "torchrun --standalone --nproc_per_node=8 train.py --preset gpt2_124m --data 'text/*.jsonl.gz' --out out/124m": (
        "torchrun --standalone --nproc_per_node=2 train.py --preset gpt2_124m --data {tmp}/my/*.jsonl.gz "
        f"--tokenizer train --vocab_size=280 --out {{tmp}}/3 {TINY}", "saved in"),
    "python train.py --data 'my/*.txt' --out out/mine": (
        f"python train.py --data {{tmp}}/my/*.txt --vocab_size=280 --out {{tmp}}/4 {TINY}", "saved in"),
    "python train.py --resume": ("python train.py --resume --out {tmp}/run --steps 3", "resuming from"),
    "python train.py --help": (None, "--batch_tokens"),
}
NOT_RUN_HERE = {  # what installs, and what would run this very test
    "pip install -r requirements.txt", "pip install -r requirements.txt -r tests/requirements.txt", "pytest"}


def commands_shown():
    """Commands in the Run lines of headers and in the shell blocks of the README."""
    lines = []
    for path in ROOT.glob("*.py"):
        header = ast.get_docstring(ast.parse(path.read_text()))
        run = re.search(r"^Run\s+(.*?)^Test", header, re.MULTILINE | re.DOTALL)[1]
        lines += [re.split(r"\s{3,}", line.strip())[0] for line in run.splitlines()]
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        for line in block.splitlines():
            lines += re.split(r"\s+#|\s{3,}", line)[0].split(" && ")
    shown = {line.strip() for line in lines}
    return {line for line in shown if re.match(r"(python|torchrun|pip|pytest)\b", line)} - NOT_RUN_HERE


def run(command):
    words = shlex.split(command)
    start = [sys.executable, "-m", "torch.distributed.run"] if words[0] == "torchrun" else [sys.executable]
    return subprocess.run([*start, *words[1:]], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=170)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All commands, two at a time."""
    tmp = tmp_path_factory.mktemp("commands")
    (tmp / "my").mkdir()
    text = (ROOT / "README.md").read_text()
    (tmp / "my" / "text.txt").write_text(text)
    with gzip.open(tmp / "my" / "text.jsonl.gz", "wt") as file:
        for paragraph in text.split("\n\n"):
            file.write(json.dumps({"text": paragraph}) + "\n")
    first = run(f"python train.py --data {tmp}/my/text.txt --vocab_size=280 --out {tmp}/run {TINY}")
    assert first.returncode == 0, first.stderr
    small = {shown: (smallest or shown).replace("{tmp}", str(tmp)) for shown, (smallest, _) in COMMANDS.items()}
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(small, pool.map(run, small.values())))


def test_every_command_that_is_shown_is_run_here():
    assert commands_shown() <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_ends_as_it_says(results, command):
    found = results[command]
    assert found.returncode == 0, found.stderr[-2000:]
    assert re.search(COMMANDS[command][1], found.stdout[-3000:]), found.stdout[-3000:]
