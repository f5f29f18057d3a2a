"""A layer of experts: grouped against the naive loop over tokens and against transformers' block, at equal weights.

    python bench/moe.py

Claims: grouped is no slower than transformers' Mixtral block, forward and backward, at E = 8 and 64, be that computed by
torch's grouped product (its default) or by its loop over experts; its cost grows with K, at least in proportion, and
hardly with E: eight times the experts cost a quarter more.
Runs are interleaved and their medians compared: other load on the machine meets all sides alike.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

# This file has the name of the file that it measures, so its own folder must not come first.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

try:
    import transformers
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock
except ImportError as error:
    print(f"{sys.argv[0]}: needs {error.name}: pip install -r tests/requirements.txt", file=sys.stderr)
    sys.exit(2)

from moe import MoE, naive_experts


def copy_of(layer: MoE, way: str) -> MixtralSparseMoeBlock:
    """transformers' block with the same weights."""
    config = MixtralConfig(hidden_size=layer.router.in_features, intermediate_size=layer.down.size(-1),
                           num_local_experts=layer.n_experts, num_experts_per_tok=layer.k)
    config._experts_implementation = way
    block = MixtralSparseMoeBlock(config).to(layer.down.device, layer.down.dtype)
    with torch.no_grad():
        for theirs, ours in ((block.gate.weight, layer.router.weight), (block.experts.gate_up_proj, layer.gate_up),
                             (block.experts.down_proj, layer.down)):
            theirs.copy_(ours)
    return block


def main(device: str, tokens: int, d_model: int, d_ff: int, repeats: int, threads: int | None) -> None:
    if threads:
        torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    where = platform.processor() or platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    if device == "cpu" and Path("/proc/cpuinfo").exists():
        where = next(line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, transformers {transformers.__version__}\n"
          f"{tokens} tokens, D {d_model}, Dff {d_ff}, {dtype}, forward and backward, medians of {repeats}")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, d_model, generator=generator).to(device, dtype)
    few, gradient = x[:, :max(1, tokens // 64)], torch.randn(x.shape, generator=generator).to(device, dtype)
    runs, layers = {}, {}
    for E, K in ((8, 2), (64, 2), (8, 1), (8, 4)):
        ours = layers[E, K] = MoE(d_model, d_ff, E, K, balance=0.0, z=0.0, generator=generator).to(device, dtype)
        runs["grouped", E, K] = (ours, x)
        if K == 2:
            runs["naive", E, K] = (lambda x, ours=ours: naively(ours, x), few)
            runs["grouped, few", E, K] = (ours, few)
            for way in ("grouped_mm", "eager"):
                runs["theirs, " + way, E, K] = (copy_of(ours, way), x)
    seconds = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, (run, inputs) in runs.items():
            if repeat > 2 and ("naive" in name or "theirs, eager" in name and name[1] > 8):
                continue  # seconds each: three are enough
            for p in [p for layer in layers.values() for p in layer.parameters()]:
                p.grad = None
            if isinstance(run, torch.nn.Module):
                run.zero_grad()
            start = time.perf_counter()
            run(inputs).backward(gradient[:, :inputs.size(1)])
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first is for warming up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for E in (8, 64):
        grouped = medians["grouped", E, 2]
        per_token = medians["naive", E, 2] / medians["grouped, few", E, 2]
        print(f"E {E:2}, K 2: grouped {1e3 * grouped:8.1f} ms;   theirs grouped_mm {medians['theirs, grouped_mm', E, 2] / grouped:5.2f}, "
              f"theirs eager {medians['theirs, eager', E, 2] / grouped:5.2f}, naive loop {per_token:5.1f} times that "
              f"(naive: {few.size(1)} tokens on both sides)")
    print(f"from E 8 to E 64: {medians['grouped', 64, 2] / medians['grouped', 8, 2]:.2f} times the time "
          f"(8 would be the cost of every expert);   from K 1 to 2 {medians['grouped', 8, 2] / medians['grouped', 8, 1]:.2f}, "
          f"to 4 {medians['grouped', 8, 4] / medians['grouped', 8, 1]:.2f}")


def naively(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """The layer, its experts by the loop over tokens."""
    compute, layer.compute = layer.compute, naive_experts
    try:
        return layer(x)
    finally:
        layer.compute = compute


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a batch (default %(default)s)")
    parser.add_argument("--d_model", type=int, default=128, help="width D (default %(default)s)")
    parser.add_argument("--d_ff", type=int, default=256, help="width of an expert (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of each side (default %(default)s)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: its own choice)")
    arguments = parser.parse_args()
    if min(arguments.tokens, arguments.d_model, arguments.d_ff, arguments.repeats, arguments.threads or 1) < 1:
        parser.error("every number must be at least 1")
    try:
        main(**vars(arguments))
    except KeyboardInterrupt:
        parser.exit(130)
