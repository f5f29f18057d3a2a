"""Every command that a header or the README shows, run at its smallest size, ends as it says."""

import gzip
import json
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_program
from run_here import run_here

TINY = "--n_layers=1 --n_heads=2 --d_model=16 --context=16 --batch_tokens=64 --steps=2 --warmup_steps=0 --samples=1 "
TEXT = "{tmp}/my/text.txt"
THINK = "--steps 1 --rl_steps 1 --problems 1 --level 2"
THINKER = f"python reason.py {THINK} --out {{tmp}}/thinker.pt --plot {{tmp}}/growth.png"
ALIGN = ("--instructions {tmp}/pairs.jsonl --preferences {tmp}/preferences.jsonl --max_new_tokens 4 --sft_epochs 1 --held_out 0.2 "
         "--evaluation_prompts 8")

# command as it is shown -> (the command at its smallest size, what its last lines say); {tmp} is a folder with
# a text, and {tmp}/run a finished tiny run.
COMMANDS = {
    "python processes.py": (None, r"sum of ranks = 0 \(expected 0\)"),
    "torchrun --standalone --nproc_per_node=2 processes.py": (None, r"sum of ranks = 1 \(expected 1\)"),
    "python gpt.py": ("python gpt.py --steps 2", r"max \|cached - uncached logits\| = \d\.\de-0[5-9]"),
    "python checkpoint.py": ("python checkpoint.py --kills 1", "whole after a kill: 1 of 1"),
    "python config.py --preset gpt2_124m --lr 3e-4": (None, r"one step = 524288 tokens = 1 \(dp \* ep\)"),
    "python tokenizer.py": (None, "naive = fast: True .* round trip: True"),
    "python tokenizer.py --data book.txt --out book.tiktoken": (
        f"python tokenizer.py --data {TEXT} --out {{tmp}}/book.tiktoken --vocab_size 300", "round trip: True"),
    "python data.py": (None, "seen exactly once: True .expected True"),
    "python data.py --data 'my/**/*.txt'": ("python data.py --data {tmp}/my/**/*.txt --context 16",
                                             "seen exactly once: True .expected True"),
    "python decode.py": ("python decode.py --max_new_tokens 8", "True"),
    "python few_rows.py": ("python few_rows.py --d_model 128 --megabytes 2 --repeats 1", r"max \|fast - x W\^T\| = \d\.\de-\d+: OK"),
    "python few_rows.py --dtype bfloat16 --d_model 1024": (
        "python few_rows.py --dtype bfloat16 --d_model 128 --megabytes 2 --repeats 1", r"max \|fast - x W\^T\| = \d\.\de-\d+: OK"),
    "python speculative.py": ("python speculative.py --max_new_tokens 8 --draws 2000", "distribution kept: True; .*: True; .*: True"),
    'python decode.py --checkpoint out/pretrain --prompt "The function"': (
        'python decode.py --checkpoint {tmp}/run --prompt "The" --max_new_tokens 5', "The"),
    "python decode.py --checkpoint out/pretrain --chat": (
        "python decode.py --checkpoint {tmp}/wide --chat --max_new_tokens 3", ""),
    "python parallel.py": ("python parallel.py --steps 3 --d_model 16 --batch 6", r"max \|DP - one process\| = \d\.\de-1\d .*OK, below 1e-10"),
    "torchrun --standalone --nproc_per_node=2 parallel.py": ("torchrun --standalone --nproc_per_node=2 parallel.py --steps 2 --d_model 16 --batch 6",
                                                 r"max \|DP - one process\| = \d\.\de-1\d .*OK, below 1e-10"),
    "python parallel.py --communication": (None, r"max \|counted / formula - 1\| = 0\.00\d+: OK"),
    "python communication.py --ranks 4": ("python communication.py --ranks 2", r"max \|counted / formula - 1\| = 0\.00\d+: OK"),
    "python tensor_parallel.py": ("python tensor_parallel.py --steps 2", r"max \|TP - one process\| = \d\.\de-1\d .*OK, below 1e-10"),
    "torchrun --standalone --nproc_per_node=2 tensor_parallel.py --sequence": (
        "torchrun --standalone --nproc_per_node=2 tensor_parallel.py --sequence --steps 2", "OK, below 1e-10"),
    "python pipeline.py": (None, r"max \|pipeline - one process\| = \d\.\de-1\d .*OK, below 1e-10"),
    "python pipeline.py --schedule zb --stages 4 --microbatches 8": (
        "python pipeline.py --schedule zb --stages 2 --microbatches 3", "OK, below 1e-10"),
    "python pipeline.py --simulate --ranks 4096": (None, r"best of \d+ layouts of 4096 GPUs"),
    "python pipeline_schedules.py": (None, r"max \|bubble - formula\| = .*: OK"),
    "python pipeline_schedules.py --simulate --ranks 4096": (None, r"best of \d+ layouts of 4096 GPUs"),
    "python ring_attention.py": ("python ring_attention.py --length 64", r"max \|ring - one process\| = \d\.\de-1\d .*OK"),
    "torchrun --standalone --nproc_per_node=2 ring_attention.py --length 512": (
        "torchrun --standalone --nproc_per_node=2 ring_attention.py --length 32", "OK, below 1e-12"),
    "python models.py": (None, r"max \|counted - made\| = 0 parameters"),
    "python corpus.py": (f"python corpus.py --data {TEXT} --vocab_size 280", "decoded tokens = held-out text: True"),
    "python corpus.py --data 'my/*.txt' --vocab_size 8192": (
        "python corpus.py --data {tmp}/pages.jsonl --vocab_size 280", "decoded tokens = held-out text: True"),
    "python run_folder.py": (None, "8 of 8 cases as expected"),
    "python llama.py": ("python llama.py --steps 2", r"max \|cached - uncached logits\| = \d\.\de-0[5-9]"),
    "python dialogue.py": ("python dialogue.py --steps 10", r"of 10 answered: .*; the oldest turns are forgotten: "),
    "python llama_chat.py": (None, "stays text: True"),
    "python moe.py": ("python moe.py --steps 2", "z-loss keeps the logits small: "),
    "python rnn.py": (None, "each above the one before: True"),
    "python rnn.py --plot rnn.png": ("python rnn.py --plot {tmp}/rnn.png", "each above the one before: True"),
    "python pairs.py": ("python pairs.py --count 20", "word for word: 21 of 21 pairs"),
    "python pairs.py --language german": ("python pairs.py --language german --count 20", "word for word: 21 of 21 pairs"),
    "python pairs.py --data fra.tsv": ("python pairs.py --data {tmp}/fra.tsv", r"word for word: (\d+) of \1 pairs"),
    "python bleu.py": ("python bleu.py --count 20", r"chrF 100.0 of the references \(expected 100\), \d+\.\d with a word replaced"),
    "python bleu.py --language german": ("python bleu.py --language german --count 20", "chrF 100.0 of the references"),
    "python bleu.py --data fra.tsv": ("python bleu.py --data {tmp}/fra.tsv", "chrF 100.0 of the references"),
    "python rnn_nmt.py": ("python rnn_nmt.py --steps 1", r"the longest fifth: \d+% right without attention, \d+% with it"),
    'python rnn_nmt.py --language german --translate "ninety-seven"': (
        'python rnn_nmt.py --language german --translate "ninety-seven" --steps 1', r"the longest fifth: \d+% right"),
    "python rnn_nmt.py --data fra.tsv": ("python rnn_nmt.py --data {tmp}/fra.tsv --steps 1", r"the longest fifth: \d+% right"),
    "python word2vec.py": ("python word2vec.py --epochs 4 --d_model 16", r"held-out loss 4\.1589 -> \d\.\d+, lower: True"),
    "python word2vec.py --data words": (
        "python word2vec.py --data words --epochs 1 --d_model 8 --plot {tmp}/calls.png", r"held-out loss .*lower: True"),
    "python word2vec.py --plot calls.png": ("python word2vec.py --data words --epochs 1 --d_model 8 --plot {tmp}/calls.png", r"held-out loss .*lower: True"),
    "python transformer.py": ("python transformer.py --steps 2", r"better than both in both: (True|False) \(expected True\)"),
    "python transformer.py --data fra.tsv": ("python transformer.py --data {tmp}/fra.tsv --steps 2", "better than both in both"),
    "python t5.py": ("python t5.py --steps 1", r"\d of 4 answers right \(expected all\)"),
    "python span_corruption.py": ("python span_corruption.py --steps 2 --words 100", r"every task above 90%: (True|False)"),
    "python scaling.py": (None, "lectures' numbers: 21 of 21"),
    "python scaling.py --gpu v100 --gpus 64": (None, r"\d+ of 17 models can be trained"),
    "python scaling.py --fit runs.csv": ("python scaling.py --fit {tmp}/runs.csv", r"N_opt ~ C\^a by the methods"),
    "python scaling.py --plan llama3_405b --gpus 16384 --gpu h100 --tokens 15e12": (None, "best: dp"),
    "python scaling.py --validate": (None, "25 of 28 runs"),
    "python scaling_laws.py": ("python scaling_laws.py --samples 2", r"N_opt ~ C\^a .*expected 0.452"),
    "python scaling_laws.py --fit runs.csv": ("python scaling_laws.py --samples 2 --fit {tmp}/runs.csv", r"N_opt ~ C\^a by the methods"),
    "python planner.py --validate": (None, "25 of 28 runs"),
    "python speedup.py": ("python speedup.py --repeats 1", r"0\.0500 \(expected 0\.0500\)"),
    "python wordpiece.py": (None, "naive = fast: True"),
    "python wordpiece.py --data book.txt --out vocab.txt": (
        f"python wordpiece.py --data {TEXT} --out {{tmp}}/vocab.txt --vocab_size 300", "naive = fast: True"),
    "python masked_lm.py": ("python masked_lm.py --data {tmp}/pages.jsonl --vocab_size 300", r"chosen [\d.]+%: \[MASK\]"),
    "python bert.py": ("python bert.py --steps 2 --examples 2 --out {tmp}/bert", r"transfer: .* on \d of 4 tasks"),
    "python finetune.py": ("python finetune.py --examples 2", r"above the baseline on \d of 4 tasks"),
    "python flash_attn.py": ("python flash_attn.py --lengths 32 64", r"counted = formula: True; .*: OK"),
    "python flash_attn.py --plot attention.png": (
        "python flash_attn.py --lengths 32 64 --plot {tmp}/attention.png", "counted = formula: True"),
    "python attention_traffic.py": ("python attention_traffic.py --lengths 32 64", r"counted = formula: True; .*: OK"),
    "python flash_attn_cuda.py": (None, r"nothing was run|largest relative error .*: OK"),
    "python planner.py --plan llama3_405b --gpus 16384 --gpu h100 --tokens 15e12": ("python planner.py --plan gpt2 --gpus 8", r"best: dp \d+ "),
    "python attention_kernels.py": (None, r"max \|kernel - formula\| of .*: OK"),
    "python attention_kernels.py --dtype bfloat16": (None, r"max \|kernel - formula\| of .*: OK"),
    "python vectors.py": (None, "gives all back: True"),
    "python vectors.py --plot letters.png": ("python vectors.py --plot {tmp}/letters.png", "gives all back: True"),
    "python vectors.py --vectors my.vec --item king": (
        "python vectors.py --vectors {tmp}/my.vec --item king", "2 vectors; 2 of them written and read again are the same: True"),
    "python weights.py": (None, "read again bit for bit: "),
    "python finetune.py --init out/bert": ("python finetune.py --init {tmp}/bert --examples 2", r"transfer: .* on \d of 4 tasks"),
    "python layout.py": (None, r"\d+ layouts of 8 processes fit, \d+ do not: 2\.00 to 16\.00 bytes"),
    "python layout.py --preset llama_1b --processes 8": (None, r"\d+ layouts of 8 processes fit"),
    "python planner.py --plan llama3_8b --gpus 64 --gpu h100": (None, r"best: dp \d+ "),
    "python recompute.py": ("python recompute.py --repeats 1 --n_layers 2 --d_model 32 --context 32", r"max \|gradient - gradient of none\| = 0e\+00"),
    "python recompute.py --context 512": ("python recompute.py --repeats 1 --n_layers 1 --d_model 16 --context 64", "gradient of none"),
    "python train.py --recompute block --out out/block": (
        f"python train.py --recompute block --data {TEXT} --vocab_size=280 --out {{tmp}}/r {TINY}", "saved in"),
    "torchrun --standalone --nproc_per_node=2 train.py --tp 2 --steps 20": (
        f"torchrun --standalone --nproc_per_node=2 train.py --tp 2 --data {TEXT} --vocab_size=280 --out {{tmp}}/tp {TINY}", "saved in"),
    "torchrun --standalone --nproc_per_node=8 train.py --tp 2 --pp 2 --zero 1 --out out/layout": (
        f"torchrun --standalone --nproc_per_node=2 train.py --pp 2 --data {TEXT} --vocab_size=280 --out {{tmp}}/pp {TINY} --n_layers=2",
        "saved in"),
    "python train.py --stage dpo --init out/sft --out out/again": (
        "python train.py --stage dpo --init {tmp}/aligned/sft --out {tmp}/aligned2 " + ALIGN, "saved in"),
    "python alignment.py --init out/sft --stages dpo": (
        "python alignment.py --init {tmp}/aligned/sft --out {tmp}/aligned3 --stages dpo " + ALIGN, "saved in"),
    "python alignment.py --init out/pretrain": ("python alignment.py --init {tmp}/wide --out {tmp}/aligned4 --stages sft " + ALIGN, "saved in"),
    "torchrun --standalone --nproc_per_node=2 alignment.py --init out/pretrain": (
        "torchrun --standalone --nproc_per_node=2 alignment.py --init {tmp}/wide --out {tmp}/aligned5 --stages sft " + ALIGN, "saved in"),
    "python puzzles.py": (None, r"as expected: (\d+) of \1 texts"),
    "python puzzles.py --task countdown --level 6": (None, r"as expected: (\d+) of \1 texts"),
    "python school.py": (None, r"answers of at most \d+: True \(expected True, True\)"),
    "python school.py --level 3": (None, r"answers of at most \d+: True \(expected True, True\)"),
    "python reason.py": (THINKER, "points gained: chain of thought over direct"),
    "python reason.py --plot growth.png": (THINKER, "points gained: chain of thought over direct"),
    "python reason.py --out thinker.pt": (THINKER, "points gained: chain of thought over direct"),
    "torchrun --standalone --nproc_per_node=2 reason.py": (
        f"torchrun --standalone --nproc_per_node=2 reason.py {THINK}", "points gained: chain of thought over direct"),
    "python inference_scaling.py": (
        "python inference_scaling.py --checkpoint {tmp}/thinker.pt --problems 1 --samples 2 --steps 1", r"points gained by a majority of \d+ over one sample"),
    "python inference_scaling.py --checkpoint thinker.pt": (
        "python inference_scaling.py --checkpoint {tmp}/thinker.pt --problems 1 --samples 2 --steps 1", r"points gained by a majority of \d+ over one sample"),
    "python inference_scaling.py --checkpoint thinker.pt --plot tokens.png": (
        "python inference_scaling.py --checkpoint {tmp}/thinker.pt --problems 1 --samples 2 --steps 1 --plot {tmp}/tokens.png",
        r"points gained by a majority of \d+ over one sample"),
    "python decode.py --checkpoint out/ppo --chat": (
        "python decode.py --checkpoint {tmp}/aligned/sft --chat --max_new_tokens 3", ""),
    "python checkpoint.py --export out/pretrain --to hf": (
        "python checkpoint.py --export {tmp}/run --to {tmp}/hf", r"saved: .* parameters of "),
    "python rlhf.py": ("python rlhf.py --steps 1 --pairs 20 --plot {tmp}/rlhf.png", r"kl 0\.2, .* nats away: "),
    "python rlhf.py --kl 0": ("python rlhf.py --kl 0 --steps 1 --pairs 20", r"kl 0, .* nats away: "),
    "python rlhf.py --plot rlhf.png": ("python rlhf.py --steps 1 --pairs 20 --plot {tmp}/rlhf.png", "drawn: "),
    "python overoptimisation.py": ("python overoptimisation.py --steps 1 --pairs 20", r"kl 0\.2, .* nats away: "),
    "python overoptimisation.py --kl 0": ("python overoptimisation.py --kl 0 --steps 1 --pairs 20", r"kl 0, .* nats away: "),
    "python preference.py": ("python preference.py --pairs 400", "total variation of DPO .*: OK"),
    "python chat.py": ("python chat.py --vocab_size 300", "packed = alone: True"),
    "python chat.py --data my/pairs.jsonl": ("python chat.py --vocab_size 300 --data {tmp}/pairs.jsonl", "packed = alone: True"),
    "python labeller.py": (None, "true answers preferred: at least"),
    "python rollout.py": ("python rollout.py --prompts 6 --max_new_tokens 12", "batched = alone: True"),
    "python stages.py": ("python stages.py --steps 6", "interrupted = unbroken: True"),
    "python unigram.py": (f"python unigram.py --data {TEXT} --vocab_size 400", "round trip: True"),
    "python unigram.py --data 'my/*.txt' --vocab_size 8000 --out tokenizer.json": (
        f"python unigram.py --data {TEXT} --vocab_size 400 --out {{tmp}}/tokenizer.json", "round trip: True"),
    "python unigram_training.py": (f"python unigram_training.py --data {TEXT} --pieces 150", "EM never fell: True"),
    "python unigram_training.py --data 'my/*.txt' --pieces 8000": (
        f"python unigram_training.py --data {TEXT} --pieces 150", "EM never fell: True"),
    "python mixture.py": ("python mixture.py --examples 200 --context 16", "resumed in the middle: True"),
    "python mixture.py --weights prose=0.5,code=0.25,docstrings=0.25 --temperature 2": (
        "python mixture.py --weights prose=0.5,code=0.25,docstrings=0.25 --temperature 2 --examples 200 --context 16",
        "resumed in the middle: True"),
    "python mixture.py --data 'web=crawl/*.jsonl,books=my/*.txt' --weights web=0.8,books=0.2": (
        f"python mixture.py --data web={TEXT},books={TEXT} --weights web=0.8,books=0.2 --examples 200 --context 16", "resumed in the middle: True"),
    "python shards.py": ("python shards.py --kills 1", r"whole after a kill: 1 of 1; .*refused by name: (\d+) of \1: OK"),
    "python packing.py": (None, "refused by name: True"),
    "python packing.py --data 'my/*.txt' --context 1024 --out tokens": (
        "python packing.py --data {tmp}/pages.jsonl --context 64 --held_out 0.3 --out {tmp}/tokens", "refused by name: True"),
    "python precision.py": ("python precision.py --steps 5", "with it: (True|False)"),
    "python moe.py --plot experts.png": ("python moe.py --steps 2 --plot {tmp}/experts.png", "z-loss keeps the logits small: "),
    "python pipeline_schedules.py --plot timelines.png": (
        "python pipeline_schedules.py --plot {tmp}/timelines.png", r"max \|bubble - formula\| = .*: OK"),
    "python precision.py --plot lost.png": ("python precision.py --steps 5 --plot {tmp}/lost.png", "with it: (True|False)"),
    "python quality.py": (None, r"cleaned again, ([\d,]+) of \1 kept pages"),
    "python quality.py --data 'my/*.txt'": ("python quality.py --data {tmp}/pages.jsonl", r"cleaned again, ([\d,]+) of \1 kept pages"),
    "python quality_classifier.py": (None, r"held-out ROC AUC [\d.]+: OK, above 0.6"),
    "python quality_classifier.py --data 'my/*.txt' --trusted good.jsonl": (
        "python quality_classifier.py --data {tmp}/pages.jsonl --trusted {tmp}/good.jsonl", "held-out ROC AUC"),
    "python deduplication.py": ("python deduplication.py --documents 60", r"recall \d\.\d+, precision \d\.\d+: OK"),
    "torchrun --standalone --nproc_per_node=2 deduplication.py": (
        "torchrun --standalone --nproc_per_node=2 deduplication.py --documents 60", r"recall \d\.\d+, precision \d\.\d+: OK"),
    "python crawl.py --out crawl/": ("python crawl.py --out {tmp}/crawl2 --files 2 --pages 20", r"pages in 2 files: True \(expected True\)"),
    "python curate.py": (None, r"the same shards after a kill: True \(expected True"),
    "python data.py 'crawl/*.warc.wet.gz' --out shards/": ("python data.py {tmp}/crawl/*.warc.wet.gz --out {tmp}/shards", "kept of"),
    "torchrun --standalone --nproc_per_node=2 data.py 'crawl/*.warc.wet.gz' --out shards/": (
        "torchrun --standalone --nproc_per_node=2 data.py {tmp}/crawl/*.warc.wet.gz --out {tmp}/shards2", "kept of"),
    "python zero.py": ("python zero.py --steps 2 --d_model 64", r"max \|bytes measured / formula - 1\| = 0\.0\d+: OK"),
    "python zero.py --offload --plot zero.png": (
        "python zero.py --steps 2 --d_model 64 --offload --plot {tmp}/zero.png", r"max \|bytes measured / formula - 1\| = 0\.0\d+: OK"),
    "torchrun --standalone --nproc_per_node=2 zero.py": (
        "torchrun --standalone --nproc_per_node=2 zero.py --steps 2 --d_model 64", r"max \|bytes measured / formula - 1\| = 0\.0\d+: OK"),
    "python zero_memory.py --ranks 4": (
        "python zero_memory.py --ranks 2 --steps 2 --d_model 64", r"max \|bytes measured / formula - 1\| = 0\.0\d+: OK"),
    "python flattening.py": (None, "every number has one owner: OK"),
    "python pieces.py": (None, "all 4 slices are what was written: True"),
    "python pieces.py --writers 7 --readers 2": (None, "all 2 slices are what was written: True"),
    "python team.py": ("python team.py --steps 2", r"max \|layout - one process\| = .*: OK"),
    "python gathering.py": (None, "units there at once: 2 at most"),
    "python train.py": (f"python train.py --data {TEXT} --vocab_size=280 --out {{tmp}}/1 {TINY}", "saved in"),
    "torchrun --standalone --nproc_per_node=2 train.py": (
        f"torchrun --standalone --nproc_per_node=2 train.py --data {TEXT} --vocab_size=280 --out {{tmp}}/2 {TINY}", "saved in"),
    "torchrun --standalone --nproc_per_node=8 train.py --preset gpt2_124m --data 'text/*.jsonl.gz' --out out/124m": (
        "torchrun --standalone --nproc_per_node=2 train.py --preset gpt2_124m --data {tmp}/my/*.jsonl.gz "
        f"--tokenizer train --vocab_size=280 --out {{tmp}}/3 {TINY}", "saved in"),
    "python train.py --data 'my/*.txt' --out out/mine": (
        f"python train.py --data {{tmp}}/my/*.txt --vocab_size=280 --out {{tmp}}/4 {TINY}", "saved in"),
    "python train.py --resume": ("python train.py --resume --out {tmp}/run --steps 3", "resuming from"),
    "python train.py --help": (None, "--save_every INT"),
    "python alignment.py --help": (None, "--dpo_kind DPO_KIND"),
}
FIGURES = runpy.run_path(str(ROOT / "docs" / "figures.py"))["FIGURES"]
NOT_RUN_HERE = {  # what installs, what would run this very test, and a ladder of models (tests/test_ladder.py has a short one)
    "python scaling.py --measure", "python ladder.py",
    "torchrun --standalone --nproc_per_node=8 train.py ...",  # on machines that one does not have: test_two_machines.py
    "torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_id=run --rdzv_endpoint=first-machine:29400 train.py ...",
    "torchrun --nnodes=4 --nproc_per_node=8 --node_rank=r --master_addr=first-machine --master_port=29500 train.py ...",
    "python docs/figures.py",  # its programs are
    "pip install -r requirements.txt", "pip install -r requirements.txt -r tests/requirements.txt", "pytest"}


def commands_shown():
    """Commands in the Run lines of headers and in the shell blocks of the README."""
    lines = []
    for path in ROOT.glob("*.py"):
        header = path.read_text().split('"""')[1]
        run = re.search(r"^Run\s+(.*?)^Test", header, re.MULTILINE | re.DOTALL)[1]
        lines += [re.split(r"\s{3,}", line.strip())[0] for line in run.splitlines()]
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        for line in block.splitlines():
            lines += re.split(r"\s+#|\s{3,}", line)[0].split(" && ")
    lines += re.findall(r"`((?:python|torchrun) [^`]*)`", (ROOT / "README.md").read_text())
    shown = {line.strip() for line in lines} - set(FIGURES.values())  # with --plot they are here under other names
    return {line for line in shown if re.match(r"(python|torchrun|pip|pytest)\b", line)} - NOT_RUN_HERE


REAL = "torchrun --standalone --nproc_per_node=2 processes.py"  # in fresh processes, as a user's are


def run(command):
    words = shlex.split(command)
    if words[0] == "python":
        return run_program(words[1:])
    if command == REAL:
        return subprocess.run([sys.executable, "-m", "torch.distributed.run", *words[1:]], cwd=ROOT, capture_output=True,
                              text=True, stdin=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=170)
    if words[3] in ("train.py", "alignment.py"):  # by torchrun itself; of the others its processes alone
        return run_program(["-m", "torch.distributed.run", *words[1:]])
    processes, *words = re.fullmatch(r"torchrun --standalone --nproc_per_node=(\d+) (.*)", command).groups()
    return run_program(shlex.split(*words), processes=int(processes))


# what a command reads -> what makes it
MADE_BY = {
    "{tmp}/run": f"python train.py --data {TEXT} --vocab_size=280 --out {{tmp}}/run {TINY}",
    "{tmp}/wide": f"python train.py --data {TEXT} --vocab_size=280 --out {{tmp}}/wide {TINY} --context=96 --batch_tokens=192",
    "{tmp}/aligned/": f"python alignment.py --init {{tmp}}/wide --out {{tmp}}/aligned --stages sft,dpo {ALIGN}",
    "{tmp}/crawl/": "python crawl.py --out {tmp}/crawl --files 2 --pages 20",
    "{tmp}/bert": "python bert.py --steps 2 --examples 2 --out {tmp}/bert",
    "{tmp}/thinker.pt": THINKER,
}


@pytest.fixture(scope="module")
def do(tmp_path_factory):
    """Runs a command at its smallest size, once, after those that make what it reads."""
    tmp, done = tmp_path_factory.mktemp("commands"), {}
    (tmp / "my").mkdir()
    text = (ROOT / "README.md").read_text()
    (tmp / "my" / "text.txt").write_text(text)
    with gzip.open(tmp / "my" / "text.jsonl.gz", "wt") as file:
        for paragraph in text.split("\n\n"):
            file.write(json.dumps({"text": paragraph}) + "\n")
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    (tmp / "fra.tsv").write_text("".join(f"{a} and {b}\t{b} et {a}\n" for a in numbers for b in numbers))
    (tmp / "my.vec").write_text("2 2\nking 1 0\nqueen 0 1\n")
    paragraphs = [p for p in text.split("\n\n") if len(p) > 40]
    for name, documents in (("pages", paragraphs * 3), ("good", [p.upper() for p in paragraphs] * 3)):
        (tmp / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{i} {p}"}) + "\n" for i, p in enumerate(documents)))
    asked = [f"what is {a} and {b}?" for a in numbers for b in numbers]
    (tmp / "pairs.jsonl").write_text("".join(json.dumps({"prompt": q, "response": f"a number: {q[8:-1]}"}) + "\n" for q in asked))
    (tmp / "preferences.jsonl").write_text("".join(
        json.dumps({"prompt": q, "chosen": "a number", "rejected": "no number"}) + "\n" for q in asked))
    runs = [(N, C / (6 * N)) for C in (1e18, 1e19, 1e20) for N in (C / 1e18) ** 0.5 * torch.logspace(7, 9, 5).numpy()]
    (tmp / "runs.csv").write_text("N,D,loss\n" + "".join(
        f"{N},{D},{1.7 + 400 / N ** 0.34 + 400 / D ** 0.28}\n" for N, D in runs))

    def do(command):
        if command not in done:
            for what, maker in MADE_BY.items():
                if what in command and maker != command:
                    assert do(maker).returncode == 0, do(maker).stderr
            done[command] = run(command.replace("{tmp}", str(tmp)))
        return done[command]

    return do


def test_every_command_that_is_shown_is_run_here():
    assert commands_shown() <= set(COMMANDS)


@pytest.mark.parametrize("script, peer", [("bpe", "tokenizers"), ("word2vec", "gensim"), *(
    (name, "transformers") for name in ("decode", "models", "moe", "rlhf", "train_step"))])
def test_a_benchmark_without_its_peer_says_so_in_one_line(script, peer, monkeypatch):
    monkeypatch.setitem(sys.modules, peer, None)  # as if it were not installed
    monkeypatch.setattr(sys, "path", [*sys.path])
    found = run_here([f"bench/{script}.py"])
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert found.stderr.endswith(f"bench/{script}.py: needs {peer}: pip install -r tests/requirements.txt\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_command_ends_as_it_says(do, command):
    smallest, ending = COMMANDS[command]
    found = do(smallest or command)
    assert found.returncode == 0, found.stderr[-2000:]
    assert re.search(ending, found.stdout[-3000:]), found.stdout[-3000:]
