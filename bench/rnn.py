"""Our LSTM over a sequence against nn.LSTM on the same weights, and how many sentences a second are translated.

    python bench/rnn.py                  CPU: width 256, length 64, batch 64, fp32; forward, and with backward
    python bench/rnn.py --device cuda    against cuDNN's

Claim on a CPU: forward and backward take at most twice nn.LSTM's time. Runs are interleaved and their medians
compared: other load on the machine meets both sides alike. Translation: greedy, untrained weights that never end a
sentence, so that every row has the length of its source.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.nn as nn

from rnn import CELLS, Recurrent
from rnn_nmt import END, Translator, TranslatorConfig, greedy_translations

PEERS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(device: str, cells: list[str], width: int, length: int, batch: int, repeats: int) -> None:
    where = platform.processor() or platform.machine() if device == "cpu" else torch.cuda.get_device_name()
    if device == "cpu" and Path("/proc/cpuinfo").exists():
        where = next(line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    print(f"{where}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, width, generator=generator).to(device).requires_grad_()
    upstream = torch.randn(batch, length, width, generator=generator).to(device)
    for cell in cells:
        ours = Recurrent(width, width, cell, generator=generator).to(device)
        theirs = PEERS[cell](width, width, batch_first=True).to(device)
        theirs.load_state_dict(ours.state_dict())
        forward, both, results = {ours: [], theirs: []}, {ours: [], theirs: []}, []
        for repeat in range(repeats + 2):
            for layer in (ours, theirs):
                start = now(device)
                outputs, _ = layer(x)
                middle = now(device)
                gradients = torch.autograd.grad(outputs, (x, *layer.parameters()), upstream)
                end = now(device)
                if repeat > 1:  # the first are for warming up
                    forward[layer].append(middle - start)
                    both[layer].append(end - start)
                elif repeat == 0:
                    results.append([outputs, *gradients])
        difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results))
        print(f"{cell}, width {width}, length {length}, batch {batch}: largest relative difference {difference:.0e}")
        for name, seconds in (("forward", forward), ("forward and backward", both)):
            mine, peer = (statistics.median(seconds[layer]) for layer in (ours, theirs))
            print(f"  {name:20} ours {1000 * mine:7.1f} ms   torch's {1000 * peer:7.1f} ms   {mine / peer:.2f} x its time "
                  f"(best runs {min(seconds[ours]) / min(seconds[theirs]):.2f})", flush=True)

    for attention in (None, "general"):
        config = TranslatorConfig(10_000, 10_000, d_embedding=width, d_model=width, attention=attention)
        model = Translator(config, Recurrent, generator).to(device)
        nn.init.constant_(model.head.bias[END:END + 1].data, -1e4)
        for rows in (1, batch):
            source = torch.randint(4, 10_000, (rows, 20), generator=generator).to(device)
            seconds = []
            for _ in range(repeats + 1):
                start = now(device)
                greedy_translations(model, source, torch.full((rows,), 20, device=device), max_words=20)
                seconds.append(now(device) - start)
            print(f"greedy, {attention or 'no'} attention, width {width}, 10,000 words, 20 -> 20 words, batch {rows}: "
                  f"{rows / statistics.median(seconds[1:]):.0f} sentences/s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default %(default)s)")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=["lstm", "gru", "rnn"], help="(default all)")
    parser.add_argument("--d_model", dest="width", type=int, default=256, help="width of inputs and states (default %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="of the sequences (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="sequences at a time (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="measured runs of each side (default %(default)s)")
    arguments = parser.parse_args()
    if min(arguments.width, arguments.length, arguments.batch, arguments.repeats) < 1 or arguments.width % 2:
        parser.error("every number must be at least 1, and --d_model even")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here; leave the flag out")
    try:
        main(**vars(arguments))
    except KeyboardInterrupt:
        parser.exit(130)
