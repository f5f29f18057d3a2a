"""Attention (1, 8, T, Dh): our tiles and kernels against the naive formula and F.scaled_dot_product_attention.

    python bench/flash_attn.py                                        CPU: fp32 and bf16, T = 1024 ... 4096
    python bench/flash_attn.py --lengths 1024 2048 4096 8192 16384    the whole table, a quarter of an hour
    python bench/flash_attn.py --spread 8                             logits too large for tiles without a maximum
    python bench/flash_attn.py --device cuda                          GPU: every kernel, Dh 64 and 128, to T = 16384

Claims on a CPU, time over SDPA's: at most 1.25 forward and forward + backward in fp32, 1.25 forward + backward and 2.7
forward in bf16 (where the processor has AMX); 3 times faster than naive from T = 2048; extra memory within 1.5 of SDPA's.
On a GPU: the kernel that `auto` picks at least 0.97 of the speed of the fastest SDPA backend; our own at least 0.6 of
aten's flash kernel forward and 0.5 backward.
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
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention_kernels import works
from attention_traffic import peak_extra_bytes
from flash_attn import flash_attention, naive_attention_with_lse


def seconds_of(runs, device, repeats):
    """name -> times of run(), interleaved, the first round left out."""
    times = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(1_000_000)  # the GPU waits for half a millisecond, so that launching is not measured
                start.record()
                run()
                end.record()
                end.synchronize()
                elapsed = start.elapsed_time(end) / 1e3
            else:
                begin = time.perf_counter()
                run()
                elapsed = time.perf_counter() - begin
            if repeat:
                times[name].append(elapsed)
    return times


def measure_peak(dtype):
    """TFLOP/s of a large matrix product on the GPU, on random numbers: the ceiling here and now."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    times = seconds_of({"product": lambda: a @ b}, "cuda", 20)["product"]
    return 2 * 8192**3 / statistics.median(times) / 1e12


def torch_with(backend):
    def attention(q, k, v, is_causal):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return attention


def cpu_methods(T, naive_up_to):
    methods = {"sdpa": lambda q, k, v, c: F.scaled_dot_product_attention(q, k, v, is_causal=c),
               "tiled": lambda q, k, v, c: flash_attention(q, k, v, c, backend="tiled"),
               "auto": lambda q, k, v, c: flash_attention(q, k, v, c)}
    if T <= naive_up_to:
        methods["naive"] = lambda q, k, v, c: naive_attention_with_lse(q, k, v, c)[0]
    return methods


def cuda_methods(T, naive_up_to, dtype, Dh):
    device, methods = torch.device("cuda", torch.cuda.current_device()), {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION),
                          ("efficient", SDPBackend.EFFICIENT_ATTENTION)):
        if works(name, device, dtype, Dh, 1, True):
            methods[f"sdpa {name}"] = torch_with(backend)
    methods["auto"] = lambda q, k, v, c: flash_attention(q, k, v, c)
    if dtype != torch.float32 and works("own", device, dtype, Dh, 1, True):
        methods["own"] = lambda q, k, v, c: flash_attention(q, k, v, c, backend="own")
    if T <= naive_up_to:
        methods["naive"] = lambda q, k, v, c: naive_attention_with_lse(q, k, v, c)[0]
    return methods


def report(device, times, flops, peak):
    medians = {name: statistics.median(values) for name, values in times.items()}
    peers = {name: value for name, value in medians.items() if name.startswith("sdpa")}
    best, parts = min(peers.values()), []
    for name, median in medians.items():
        line = f"{name} {1e3 * median:.2f} ms"
        if device == "cuda":
            line += f" {flops / median / 1e12:.0f} TFLOP/s = {flops / median / 1e12 / peak:.2f} of peak"
            if name == "own" and "sdpa flash" in medians:
                line += f", {medians['sdpa flash'] / median:.2f} x flash's speed"
            if name == "auto":
                line += f", {best / median:.2f} x the fastest SDPA's speed"
        elif name in ("tiled", "auto"):
            # best runs: what remains when other load on the machine is least
            line += f" = {median / best:.2f} of SDPA's time (best runs {min(times[name]) / min(times['sdpa']):.2f})"
            if name == "tiled" and "naive" in medians:
                line += f", {medians['naive'] / median:.1f} x as fast as naive"
        parts.append(line)
    return "; ".join(parts)


def main(device, lengths, widths, dtypes, repeats, naive_up_to, threads, spread):
    if threads:
        torch.set_num_threads(threads)
    if device == "cuda":
        where = torch.cuda.get_device_name()
    else:
        where = platform.processor() or platform.machine()
        if Path("/proc/cpuinfo").exists():
            where = next(line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
        where += f", {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        where += ", AMX" if torch.cpu._is_amx_tile_supported() else ", no AMX"
    print(f"{where}, torch {torch.__version__}")
    for dtype in (getattr(torch, name) for name in dtypes):
        peak = measure_peak(dtype) if device == "cuda" else None
        if peak:
            print(f"matrix products in {str(dtype)[6:]} reach {peak:.0f} TFLOP/s")
        for Dh in widths:
            for T in lengths:
                for is_causal in (False, True):
                    q, k, v, grad = torch.randn(4, 1, 8, T, Dh, device=device).to(dtype)
                    q = q * spread
                    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                    methods = cpu_methods(T, naive_up_to) if device == "cpu" else cuda_methods(T, naive_up_to, dtype, Dh)

                    def forward(method):
                        with torch.no_grad():
                            method(q, k, v, is_causal)

                    def both(method):
                        torch.autograd.grad(method(*leaves, is_causal), leaves, grad)

                    # two products of 2 T^2 Dh forward, five backward; half of it is hidden by a causal mask
                    flops = 4 * 8 * T * T * Dh * (0.5 if is_causal else 1)
                    for direction, step, factor in (("forward", forward, 1), ("forward + backward", both, 3.5)):
                        runs = {name: (lambda method=method: step(method)) for name, method in methods.items()}
                        times = seconds_of(runs, device, repeats)
                        print(f"{str(dtype)[6:]} Dh {Dh} T {T:5} {'causal' if is_causal else 'full  '} {direction:18} "
                              f"{report(device, times, factor * flops, peak)}", flush=True)
                        if device == "cuda" and direction != "forward" and "own" in runs:
                            ours, theirs = (statistics.median(times[name]) - statistics.median(forward_times[name])
                                            for name in ("own", "sdpa flash"))
                            print(f"{'':20} backward alone: own {theirs / ours:.2f} x flash's speed")
                        forward_times = times
                    memory = {name: peak_extra_bytes(lambda: both(methods[name]), device) / 2**20
                              for name in methods if name != "naive"}
                    print("  extra memory, forward + backward: " + "; ".join(
                        f"{name} {value:.1f} MB" for name, value in memory.items()), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", help="T (default 1024 2048 4096; on cuda 1024 ... 16384)")
    parser.add_argument("--widths", type=int, nargs="+", help="Dh (default 64; on cuda 64 128)")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"],
                        help="default float32 bfloat16; on cuda bfloat16 float16")
    parser.add_argument("--repeats", type=int, help="measured runs of each (default 5; on cuda 20)")
    parser.add_argument("--naive_up_to", type=int, default=4096, help="largest T for naive (default %(default)s)")
    parser.add_argument("--spread", type=float, default=1.0, help="standard deviation of q (default %(default)s; with 8 some "
                        "logits are so large that tiles on a CPU cannot leave their maximum out)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: its own choice)")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    arguments.lengths = arguments.lengths or ([1024, 2048, 4096, 8192, 16384] if on_gpu else [1024, 2048, 4096])
    arguments.widths = arguments.widths or ([64, 128] if on_gpu else [64])
    arguments.dtypes = arguments.dtypes or (["bfloat16", "float16"] if on_gpu else ["float32", "bfloat16"])
    arguments.repeats = arguments.repeats or (20 if on_gpu else 5)
    if min(*arguments.lengths, *arguments.widths, arguments.repeats, arguments.threads or 1) < 1:
        parser.error("every number must be at least 1")
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    try:
        main(**vars(arguments))
    except KeyboardInterrupt:
        parser.exit(130)
