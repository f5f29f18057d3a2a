"""Greedy decoding at the size of GPT-2 small, ours against transformers' generate, on the same random weights.

    python bench/decode.py                  CPU, batch 1 and 8: fp32 against fp32, and our bf16 against their fp32;
                                            "packed" is inside few_rows.packed_weights
    python bench/decode.py --device cuda    each data type against the same

Goals on a CPU: tokens/s at least 1.2 times theirs in fp32 at batch 1 and 8, 1.75 times in bf16 at batch 1.
Runs are interleaved and their medians compared: other load on the machine meets both sides alike.
"""

import argparse
import contextlib
import copy
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

# This file has the name of the file that it measures, so its own folder must not come first.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

try:
    import transformers
except ImportError as error:
    print(f"{sys.argv[0]}: needs {error.name}: pip install -r tests/requirements.txt", file=sys.stderr)
    sys.exit(2)

from decode import generate
from few_rows import one_row_layout, packed_weights
from gpt import GPT, GPTConfig


def main(device: str, batches: list[int], new_tokens: int, repeats: int, threads: int | None) -> None:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as decode.py sets it; both sides' weights lie in large pages
    if threads:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    generator = torch.Generator().manual_seed(0)
    ours = {torch.float32: GPT(GPTConfig(), generator=generator).eval()}
    with tempfile.TemporaryDirectory() as directory:
        ours[torch.float32].save_pretrained(directory)
        theirs = {torch.float32: transformers.GPT2LMHeadModel.from_pretrained(directory).eval().to(device)}
        ours[torch.bfloat16] = GPT.from_pretrained(directory).bfloat16().eval()
        if device != "cpu":
            half = transformers.GPT2LMHeadModel.from_pretrained(directory).bfloat16()
            theirs[torch.bfloat16] = half.eval().to(device)
    ours = {dtype: model.to(device) for dtype, model in ours.items()}
    where = platform.processor() or platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    if device == "cpu" and Path("/proc/cpuinfo").exists():
        where = next(line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    print(f"{where}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
          f"torch {torch.__version__}, transformers {transformers.__version__}")

    def our_tokens(prompts: torch.Tensor, dtype: torch.dtype) -> list[list[int]]:
        return generate(ours[dtype], prompts, new_tokens, temperature=0)

    def packed_tokens(prompts: torch.Tensor, dtype: torch.dtype) -> list[list[int]]:
        return generate(packed[dtype], prompts, new_tokens, temperature=0)

    def their_tokens(prompts: torch.Tensor, dtype: torch.dtype) -> list[list[int]]:
        out = theirs[dtype].generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, use_cache=True,
                                     max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0)
        return out[:, prompts.size(1):].tolist()

    for B in batches:
        prompts = torch.randint(50257, (B, 32), generator=generator).to(device)
        if B == 1:
            one_row_layout(ours[torch.float32])
        else:
            for p in ours[torch.float32].parameters():
                p.data = p.data.contiguous()
        runs = {("theirs", dtype): (their_tokens, dtype) for dtype in theirs}
        runs |= {("ours", dtype): (our_tokens, dtype) for dtype in ours}
        packed = {}
        if device == "cpu":  # one row in fp32 is not packed
            packed = {dtype: copy.deepcopy(model) for dtype, model in ours.items() if B > 1 or dtype != torch.float32}
        runs |= {("packed", dtype): (packed_tokens, dtype) for dtype in packed}
        seconds, tokens = {name: [] for name in runs}, {}
        with contextlib.ExitStack() as stack:
            for model in packed.values():
                stack.enter_context(packed_weights(model, B))
            for repeat in range(repeats + 1):
                for name, (run, dtype) in runs.items():
                    start = time.perf_counter()
                    tokens[name] = run(prompts, dtype)  # ends in a list: the device has finished
                    if repeat:  # the first is for warming up
                        seconds[name].append(time.perf_counter() - start)
        same = tokens["ours", torch.float32] == tokens["theirs", torch.float32]
        print(f"batch {B}, 32 + {new_tokens} tokens, {repeats} repeats; the same tokens in fp32: {same}")
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for (who, dtype), median in medians.items():
            line = f"  {who:6} {str(dtype)[6:]:8} {B * new_tokens / median:9.1f} tokens/s"
            if who != "theirs":
                peer = dtype if dtype in theirs else torch.float32
                best = min(seconds["theirs", peer]) / min(seconds[who, dtype])
                line += (f"   {medians['theirs', peer] / median:.2f} x theirs in {str(peer)[6:]}"
                         f" (best runs {best:.2f})")
            print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes (default %(default)s)")
    parser.add_argument("--max_new_tokens", dest="new_tokens", type=int, default=64, help="tokens decoded per row (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of each side (default %(default)s)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: its own choice)")
    arguments = parser.parse_args()
    if min(*arguments.batches, arguments.new_tokens, arguments.repeats, arguments.threads or 1) < 1:
        parser.error("every number must be at least 1")
    if arguments.new_tokens > 992:
        parser.error(f"--max_new_tokens {arguments.new_tokens} and 32 of the prompt exceed the context of 1024")
    try:
        main(**vars(arguments))
    except KeyboardInterrupt:
        parser.exit(130)
