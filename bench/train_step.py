"""Our training step beside a plain eager one: transformers' GPT2LMHeadModel with torch's AdamW, same size, same data.

    python bench/train_step.py                 time of a step, both shapes, ours in fp32 and bf16
    python bench/train_step.py --quality       held-out loss after 2,000 steps at the small shape, from the same weights, five times
    python bench/train_step.py --device cuda   the same on a GPU

Every round times a few steps of each, in turn; the ratio is that of the medians over the rounds. The peer is what a
public single-file trainer does: forward, cross-entropy, backward, clip, AdamW over two parameter groups, in fp32.
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

try:
    import transformers
except ImportError as error:
    print(f"{sys.argv[0]}: needs {error.name}: pip install -r tests/requirements.txt", file=sys.stderr)
    sys.exit(2)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import gpt
import tokenizer
from config import TrainConfig, derive
from processes import World, keep_freed_memory
from train import Trainer, pick_attention

SHAPES = {"small": dict(context=64, n_layers=4, n_heads=4, d_model=128, batch=12),
          "medium": dict(context=256, n_layers=6, n_heads=6, d_model=384, batch=8)}


class Peer:
    """The public way, in as few lines."""

    def __init__(self, shape: dict, vocab_size: int, device: torch.device, lr: float, autocast: bool, seed: int = 0):
        torch.manual_seed(seed)
        config = transformers.GPT2Config(vocab_size=vocab_size, n_positions=shape["context"], n_embd=shape["d_model"],
                                         n_layer=shape["n_layers"], n_head=shape["n_heads"], resid_pdrop=0.0,
                                         embd_pdrop=0.0, attn_pdrop=0.0)
        self.model = transformers.GPT2LMHeadModel(config).to(device)
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
        self.device, self.batch, self.autocast = device, shape["batch"], autocast

    def loss(self, x, y):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.model(x).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())

    def step(self, step: int, windows: data.TokenWindows) -> float:
        x, y = (t.to(self.device) for t in windows.batch(step * self.batch, self.batch))
        loss = self.loss(x, y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()


def ours(shape: dict, vocab_size: int, device: torch.device, lr: float, precision: str, steps: int,
         like: transformers.GPT2LMHeadModel | None = None) -> Trainer:
    """``like``: their model, whose weights ours begins with."""
    sizes = {name: value for name, value in shape.items() if name != "batch"}
    config = TrainConfig(**sizes, batch_tokens=shape["batch"] * shape["context"], precision=precision,
                         device=device.type, lr=lr, steps=steps, schedule="constant", warmup_steps=0)
    config, _ = derive(config, 1, device.type, False)
    sizes = gpt.GPTConfig(vocab_size, config.context, config.n_layers, config.n_heads, config.d_model)
    attention = pick_attention(device, config.context, precision)
    model = gpt.GPT(sizes, attention, torch.Generator().manual_seed(0))
    if like is not None:
        with tempfile.TemporaryDirectory() as folder:
            like.save_pretrained(folder)
            model.load_state_dict(gpt.GPT.from_pretrained(folder).state_dict())
    model = model.to(device)
    return Trainer(config, model, World(device=device))


def time_steps(device: torch.device, rounds: int, vocab_size: int, slow_bf16: bool) -> None:
    for name, shape in SHAPES.items():
        tokens = np.random.RandomState(0).randint(0, vocab_size, 200_000).astype(np.uint16)
        windows = data.TokenWindows(tokens, shape["context"])
        runs = {"peer fp32": Peer(shape, vocab_size, device, 1e-4, False),
                "ours fp32": ours(shape, vocab_size, device, 1e-4, "fp32", 10**6)}
        if slow_bf16 or device.type == "cuda" or torch.cpu._is_amx_tile_supported():
            runs |= {"peer bf16": Peer(shape, vocab_size, device, 1e-4, True),
                     "ours bf16": ours(shape, vocab_size, device, 1e-4, "bf16", 10**6)}
        for run in runs.values():
            for step in range(3):
                run.step(step, windows)
        steps, times = 3, {label: [] for label in runs}
        for i in range(rounds):
            for label, run in runs.items():
                began = time.perf_counter()
                for step in range(steps):
                    run.step(step, windows)
                times[label].append((time.perf_counter() - began) / steps)
        peer = statistics.median(times["peer fp32"])
        tokens = shape["batch"] * shape["context"]
        for label, seconds in times.items():
            median = statistics.median(seconds)
            print(f"{name:7} {label}   {1000 * median:8.1f} ms   {tokens / median:10,.0f} tokens/s   "
                  f"{median / peer:.2f} of the peer's fp32 step", flush=True)


def compare_quality(device: torch.device, steps: int, precisions: list[str], seeds: int) -> None:
    documents, held_out = data.split_documents(data.default_documents())
    encoding = tokenizer.train(documents, 1024)
    eot = tokenizer.eot(encoding)
    shape = SHAPES["small"]
    packed, held_out = (data.pack(texts, lambda text: tokenizer.encode(encoding, text), eot, encoding.n_vocab)
                        for texts in (documents, held_out))
    validation = data.TokenWindows(held_out, shape["context"], shuffle=False)
    losses = {f"{who} {kind}": [] for kind in precisions for who in ("peer", "ours")}
    for seed in range(seeds):  # of the weights, the same for all, and of the order of the windows
        train = data.TokenWindows(packed, shape["context"], seed)
        for label, values in losses.items():
            who, kind = label.split()
            peer = Peer(shape, 1024, device, 1e-3, kind == "bf16", seed)
            run = peer if who == "peer" else ours(shape, 1024, device, 1e-3, kind, steps, peer.model)
            for step in range(steps):
                run.step(step, train)
            values.append(held_out_loss(run, validation, device))
            print(f"seed {seed}   {label}   held-out loss after {steps} steps {values[-1]:.4f}", flush=True)
    for label, values in losses.items():
        print(f"mean of {seeds} seeds   {label} {statistics.mean(values):.4f}")
    for ours_kind in precisions:
        for peer_kind in precisions:
            pairs = zip(losses[f"ours {ours_kind}"], losses[f"peer {peer_kind}"])
            differences = [a - b for a, b in pairs]
            error = statistics.stdev(differences) / seeds ** 0.5 if seeds > 1 else float("nan")
            print(f"ours {ours_kind} - peer {peer_kind} = {statistics.mean(differences):+.4f}, standard error over the "
                  f"seeds {error:.4f}")


@torch.no_grad()
def held_out_loss(run, validation: data.TokenWindows, device: torch.device, batch: int = 256) -> float:
    """Nats a token over up to 4,096 windows, averaged in fp32: a mean in bf16 would be a multiple of 1/64."""
    losses = []
    for first in range(0, min(4096, len(validation) // batch * batch), batch):
        x, y = (t.to(device) for t in validation.batch(first, batch))
        if isinstance(run, Peer):
            losses.append(run.loss(x, y).item())
        else:
            logits = run.parallel.model.eval()(x)
            losses.append(F.cross_entropy(logits.flatten(0, 1).float(), y.flatten()).item())
    return statistics.mean(losses)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    parser.add_argument("--repeats", dest="rounds", type=int, default=15, help="of a few steps each (default %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=65, help="of random tokens (default %(default)s: characters)")
    parser.add_argument("--quality", action="store_true", help="compare held-out loss instead of time")
    parser.add_argument("--steps", type=int, default=2000, help="of --quality (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="how many, each of weights and of the order of the data, for --quality (default %(default)s)")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"), help="of both sides, for --quality (default: both)")
    parser.add_argument("--slow_bf16", action="store_true", help="time bf16 even without hardware for it")
    a = parser.parse_args()
    if min(a.steps, a.seeds, a.rounds, a.vocab_size) < 1:
        parser.error("every number must be at least 1")
    try:
        device = torch.device(a.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {a.device}: {str(error).splitlines()[0]}")
    if device.type == "cpu":
        keep_freed_memory()
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "") \
        if Path("/proc/cpuinfo").exists() else platform.processor()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{torch.cuda.get_device_name() if device.type == 'cuda' else cpu}, {torch.get_num_threads()} threads")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if a.quality:
            compare_quality(device, a.steps, a.precisions, a.seeds)
        else:
            time_steps(device, a.rounds, a.vocab_size, a.slow_bf16)
    except KeyboardInterrupt:
        parser.exit(130)
