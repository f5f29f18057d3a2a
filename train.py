"""Train a language model, on one process or many: raw text in, a checkpoint that completes text out.

Idea      Everything before this file is a part; this is the program. Text is read, split and packed (data.py),
          turned into tokens (tokenizer.py), a GPT (gpt.py) is trained on it by every process at once
          (parallel.py), saved so that nothing is ever lost (checkpoint.py), and asked to write (decode.py).
Formula   loss = -(1/n) sum log p(x_t | x_<t) over ALL n tokens of a step, whoever computed them:
          n = batch_tokens = processes * accumulation * micro_batch * context. The number of processes changes
          who does what, never what is learnt.
Shapes    a micro-batch: tokens (micro_batch, context) -> logits (micro_batch, context, V)
Omits     everything that the concept files explain. Here are only the run and its configuration.
Run       python train.py                                           one process
          torchrun --standalone --nproc_per_node=2 train.py         the same run on two
          torchrun --standalone --nproc_per_node=8 train.py --preset gpt2_124m --data 'text/*.jsonl.gz'
          python train.py --help                                    every setting and its default
Test      pytest tests/test_train.py
"""

import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

import checkpoint
import data
import decode
import gpt
import parallel
import tokenizer
from config import FIXED_BY_CHECKPOINT, ConfigError, TrainConfig, derive, parse, refuse_meaningless


# --- 1. the processes -----------------------------------------------------------------------

@dataclass
class World:
    """Who this process is among all that train: rank of size; ``local_rank`` 0 is the first on its machine."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    def say(self, text: str) -> None:
        if self.rank == 0 and text:
            print(text, flush=True)

    def agree(self, do: Callable, who: bool):
        """Those processes for which ``who`` holds do something; if it fails on any, all raise its ConfigError."""
        result, failure = None, None
        try:
            result = do() if who else None
        except (ConfigError, data.DataError, checkpoint.CheckpointError) as error:
            failure = str(error)
        except OSError as error:
            failure = f"{error.strerror or error}: {error.filename}; what was saved before is as it was"
        failures = [f for f in self.gather(failure) if f]
        if failures:
            raise ConfigError(failures[0])
        return result

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all processes."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value) -> list:
        """Every process's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def join(config: TrainConfig) -> World:
    """Read what torchrun set (nothing: one process), pick the device, and start torch.distributed.

    Raises:
        ConfigError: for a device that is not here.
    """
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    size, local_size = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * (torch.backends.mps.is_available() and size == 1) + ["cpu"]
    kind = config.device or here[0]
    if kind not in here:
        raise ConfigError(f"--device={kind} cannot be used here; there is {', '.join(here)}")
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        if local_size > torch.cuda.device_count():
            raise ConfigError(f"{local_size} processes on a machine with {torch.cuda.device_count()} GPUs: "
                              f"torchrun --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:
        threads = int(os.environ.get("OMP_NUM_THREADS", 0))
        if threads == 0 or threads == 1 and local_size > 1:  # torchrun says 1 where the user said nothing
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(max(1, cores // local_size))
        keep_freed_memory()
    if size > 1:
        wait = timedelta(seconds=config.timeout)
        store, _, _ = next(dist.rendezvous("env://", timeout=wait))
        # torchrun restarts with the store of the attempt before, where the addresses of the dead still stand.
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    return World(rank, size, local_rank, device)


def keep_freed_memory() -> None:
    """Ask glibc to keep freed pages: every step asks for them again, and the kernel would zero each anew."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to ask
        libc = ctypes.CDLL("libc.so.6")
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()  # without it bf16 is slower than fp32


# --- 2. the text ----------------------------------------------------------------------------

@dataclass
class Corpus:
    encoding: tiktoken.Encoding
    train: data.TokenWindows
    validation: data.TokenWindows
    bytes_per_token: float  # of the held-out text, to state its loss in bits per byte
    fingerprint: str


def prepare(config: TrainConfig, world: World, resumed: Path | None) -> Corpus:
    """Read, split, tokenise and pack the text, once per machine, into ``out/tokens``; then open it everywhere.

    A resumed run uses the tokenizer of its checkpoint, and the packed tokens if they are still there.

    Raises:
        ConfigError: for text that cannot be used, or that is not what the checkpoint was trained on.
    """
    folder = Path(config.out) / "tokens"
    if not (resumed and (folder / "held_out_bytes").exists()):
        world.agree(lambda: _pack_corpus(config, folder, resumed, world), who=world.local_rank == 0)

    def open_corpus() -> Corpus:
        train, held_out = (np.load(folder / f"{side}.npy", mmap_mode="r") for side in ("train", "validation"))
        windows = data.TokenWindows(train, config.context, config.seed)
        # A held-out text shorter than one context is one shorter window.
        validation = data.TokenWindows(held_out, max(1, min(config.context, len(held_out) - 1)), shuffle=False)
        n_bytes = int((folder / "held_out_bytes").read_text())
        return Corpus(tokenizer.load(folder / "tokenizer.tiktoken"), windows, validation, n_bytes / len(held_out),
                      _fingerprint(train, held_out))

    corpus = world.agree(open_corpus, who=True)
    if len(set(world.gather(corpus.fingerprint))) > 1:
        raise ConfigError("the machines read different text: give all of them the same --data and Python")
    if resumed and checkpoint.load(resumed, parts=())["meta"]["data_fingerprint"] != corpus.fingerprint:
        raise ConfigError(f"{resumed} was trained on other text than {config.data or 'the default corpus'} is now; "
                          f"give it that text, or another --out")
    world.say(f"{len(corpus.train.tokens):,} tokens to train on, {len(corpus.validation.tokens):,} held out, "
              f"vocabulary {corpus.encoding.n_vocab}, {corpus.bytes_per_token:.2f} bytes per token")
    return corpus


def _pack_corpus(config: TrainConfig, folder: Path, resumed: Path | None, world: World) -> None:
    world.say(f"reading {config.data or 'the documentation and docstrings of this Python'} ...")
    documents = data.default_documents() if config.data is None else list(data.read_documents(config.data))
    train, held_out = data.split_documents(documents, config.held_out)
    world.say(f"{len(train):,} documents to train on, {len(held_out):,} held out")
    try:
        if resumed or config.tokenizer != "train":
            encoding = tokenizer.load(resumed / "tokenizer.tiktoken" if resumed else config.tokenizer)
        else:
            world.say(f"training a vocabulary of {config.vocab_size} ...")
            encoding = tokenizer.train(train, config.vocab_size)
        eot = tokenizer.eot(encoding)
    except ValueError as error:
        raise ConfigError(f"--tokenizer={config.tokenizer}: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "held_out_bytes").unlink(missing_ok=True)
    for side, texts in (("train", train), ("validation", held_out)):
        data.pack(texts, lambda text: tokenizer.encode(encoding, text), eot, encoding.n_vocab, folder / f"{side}.npy")
    tokenizer.save(encoding, folder / "tokenizer.tiktoken")
    # Written last: its presence says that the rest is whole.
    (folder / "held_out_bytes").write_text(str(sum(len(text.encode()) for text in held_out)))


def _fingerprint(*arrays: np.ndarray) -> str:
    """Of the packed tokens: their lengths and up to a million of them, evenly spaced."""
    digest = hashlib.sha256()
    for tokens in arrays:
        digest.update(f"{len(tokens)} ".encode() + tokens[::max(1, len(tokens) >> 20)].tobytes())
    return digest.hexdigest()


# --- 3. the step ----------------------------------------------------------------------------

def learning_rate(c: TrainConfig, step: int) -> float:
    """Linear warm-up to lr; then half a cosine to min_lr, or flat with a linear decay over the last ``decay_steps``
    (warm-up, stable, decay: Hu et al. 2024, 2404.06395), or flat."""
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    if c.schedule == "cosine":
        done = (step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
        return c.min_lr + (c.lr - c.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    if c.schedule == "wsd":
        return c.min_lr + (c.lr - c.min_lr) * min(1.0, max(0.0, (c.steps - step) / c.decay_steps))
    return c.lr


def make_optimizer(model: nn.Module, c: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused where torch has it; decay on matrices, not on biases and norms."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": c.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), fused=fused)


def pick_attention(device: torch.device, context: int, precision: str) -> Callable:
    """In bf16 on a CPU the fused kernel's backward is slow: for short sequences the plain formula beats it."""
    slow = device.type == "cpu" and precision == "bf16" and context <= 256
    return gpt.naive_attention if slow else gpt.attention


class Trainer:
    """A model, its optimizer, and the step: what there is to know after every step is ``stats``.

    ``model`` holds the fp32 weights that are optimised and saved. ``working`` is what forward and backward run
    on: the same module, but for bf16 on a CPU, where it is a copy in bf16 and gradients are summed in fp32
    (autocast would convert every weight in every pass, which costs more there than it gains).
    """

    def __init__(self, config: TrainConfig, model: nn.Module, world: World):
        self.config, self.model, self.world = config, model, world
        self.optimizer = make_optimizer(model, config)
        bf16, device = config.precision == "bf16", world.device.type
        copied = bf16 and device == "cpu"
        self.working = copy.deepcopy(model).bfloat16() if copied else model
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=bf16 and not copied)
        self.dp = parallel.DataParallel(self.working, reduction="sum", grad_dtype=torch.float32 if copied else None)
        self.accumulation = config.batch_tokens // (config.dp * config.micro_batch * config.context)
        self.parameters, self.copies = list(model.parameters()), list(self.working.parameters())
        if config.compile:
            self._compile()

    def update_copies(self) -> None:
        """Bring the bf16 copies, if there are any, to the values of the weights."""
        if self.working is not self.model:
            with torch.no_grad():
                torch._foreach_copy_(self.copies, self.parameters)

    def _compile(self) -> None:
        """Compile each block in place (parameter names stay); whatever goes wrong, the run goes on without."""
        shape = self.config.micro_batch, self.config.context
        tokens = torch.zeros(shape, dtype=torch.long, device=self.world.device)
        try:
            for block in self.working.blocks:
                block.compile()
            with self.autocast, self.dp.no_sync():
                self.working(tokens).float().sum().backward()
        except Exception as error:  # compilers fail in every way there is
            self.world.say(f"--compile failed, going on without: {str(error).splitlines()[0][:100]}")
            for block in self.working.blocks:
                block._compiled_call_impl = None
        self.dp.finish()
        self.working.zero_grad()

    def gradient(self, step: int, windows: data.TokenWindows) -> dict[int, torch.Tensor]:
        """Forward and backward over this process's share of the step; then every process has the whole gradient.

        Returns:
            first example of each micro-batch -> its part of the mean loss over all ``batch_tokens`` of the step.
        """
        c, device, losses = self.config, self.world.device, {}
        count = self.accumulation * c.micro_batch
        first = (step * c.dp + self.world.rank) * count
        # Dropout depends on (seed, step, rank) alone: a resumed run draws what the unbroken one would have drawn.
        torch.manual_seed(hash((c.seed, step, self.world.rank)) % 2**63)
        for start in range(first, first + count, c.micro_batch):
            inputs, targets = (t.to(device, non_blocking=True) for t in windows.batch(start, c.micro_batch))
            is_last = start + c.micro_batch == first + count
            with contextlib.nullcontext() if is_last else self.dp.no_sync():
                losses[start] = self.loss(inputs, targets) / c.batch_tokens
                losses[start].backward()
        self.dp.finish()
        if self.working is not self.model:
            for p, copied in zip(self.parameters, self.copies):
                p.grad = self.dp.gradient(copied)
        return {start: loss.detach() for start, loss in losses.items()}

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """-log p(targets | inputs) in nats, summed over all (B, T) of them, in fp32 -> scalar."""
        with self.autocast:
            logits = self.working(inputs)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")

    def step(self, step: int, windows: data.TokenWindows, stop: bool = False) -> dict:
        """One optimizer step, if its loss and gradient are finite.

        Returns:
            {"loss": mean over all tokens of the step, "grad_norm": before clipping, "lr": ..., "stop": whether
            any process wants to stop, "bad": None, or where the loss was not finite, "seconds": for all of it}.
        """
        c, lr, began = self.config, learning_rate(self.config, step), time.perf_counter()
        losses = self.gradient(step, windows)
        norm = nn.utils.clip_grad_norm_(self.parameters, c.clip if c.clip > 0 else math.inf).item()
        loss, stops = self.world.sum([sum(losses.values()).item(), float(stop)])
        bad = None
        if math.isfinite(loss) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.update_copies()
        else:
            bad = self._where(losses)
        self.model.zero_grad()
        return {"loss": loss, "grad_norm": norm, "lr": lr, "stop": stops > 0, "bad": bad,
                "seconds": time.perf_counter() - began}

    def _where(self, losses: dict[int, torch.Tensor]) -> str:
        """Name the first rank and micro-batch whose loss is not finite."""
        mine = next((start for start, loss in losses.items() if not loss.isfinite()), None)
        for rank, start in enumerate(self.world.gather(mine)):
            if start is not None:
                last = start + self.config.micro_batch - 1
                return f"the loss is not finite on rank {rank}, examples {start} to {last}"
        return "the loss is finite, but the gradient is not"

    @torch.no_grad()
    def evaluate(self, windows: data.TokenWindows) -> float:
        """Mean loss on the first ``eval_tokens`` held-out tokens, every process its part, in nats per token."""
        count = min(len(windows), max(1, self.config.eval_tokens // windows.context))
        size, total = self.config.micro_batch, 0.0
        self.working.eval()
        for start in range(0, count, size)[self.world.rank::self.world.size]:
            batch = windows.batch(start, min(size, count - start))
            total += self.loss(*(t.to(self.world.device) for t in batch)).item()
        self.working.train()
        return self.world.sum([total])[0] / (count * windows.context)


def measure_peak(world: World, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, on all processes at once, summed: what MFU is measured against."""
    n = 4096 if world.device.type == "cuda" else 768
    a, b = (torch.randn(n, n, device=world.device).to(dtype) for _ in range(2))
    times: list[float] = []
    while len(times) < 10 and sum(times) < 0.5:
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # reading a number waits for the device
        times.append(time.perf_counter() - began)
    return world.sum([2 * n**3 / min(times)])[0]


# --- 4. the run -----------------------------------------------------------------------------

def configure(arguments: list[str]) -> TrainConfig:
    """The settings of this run: where it is resumed, those of the checkpoint in --out under what is given now.

    Raises:
        ConfigError: for a bad flag, or one that would make the resumed run another one.
        CheckpointError: for a checkpoint that cannot be trusted.
    """
    settings, given = parse(arguments, __doc__)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # torchrun started us again: go on where we died
        settings = dataclasses.replace(settings, resume=True, overwrite=False)
    refuse_meaningless(settings, given)
    if not settings.resume or not any(Path(settings.out).glob("step-*")):
        return dataclasses.replace(settings, resume=False)
    path = checkpoint.latest(settings.out)
    saved = checkpoint.load(path, parts=())["meta"].get("train_config", {})
    for name in FIXED_BY_CHECKPOINT:
        if name in given and getattr(settings, name) != saved.get(name):
            raise ConfigError(f"{path} was trained with --{name}={saved.get(name)}, not {getattr(settings, name)}; "
                              f"leave the flag out to resume, or give another --out")
    known = {field.name for field in dataclasses.fields(TrainConfig)} - given - {"out", "resume", "overwrite"}
    return dataclasses.replace(settings, **{name: value for name, value in saved.items() if name in known})


def run(settings: TrainConfig) -> None:
    """Train as configured, from the text to the samples.

    Raises:
        ConfigError, DataError, CheckpointError: one line each; what was good before is saved.
        SystemExit: 128 + n after signal n, everything saved.
    """
    world = join(settings)
    c, notes = derive(settings, world.size, world.device.type, _multiplies_bf16(world.device))
    resumed = world.agree(lambda: _find_run(c), who=True)
    world.say("\n".join(notes))
    corpus = prepare(c, world, resumed)
    try:
        sizes = gpt.GPTConfig(corpus.encoding.n_vocab, c.context, c.n_layers, c.n_heads, c.d_model, dropout=c.dropout)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    model = gpt.GPT(sizes, pick_attention(world.device, c.context, c.precision), torch.Generator().manual_seed(c.seed))
    trainer = Trainer(c, model.to(world.device), world)
    first = _restore(trainer, resumed)
    progress = Progress(trainer, corpus, first)
    world.say(f"GPT of {gpt.count_parameters(sizes):,} parameters, {c.precision}, {world.size} x {c.device}; matrix "
              f"products reach {progress.peak / 1e12:.3g} TFLOP/s; expect a first loss of about ln V = "
              f"{math.log(sizes.vocab_size):.3f}")

    received = _note_signals(world)
    for step in range(first, c.steps):
        stats = trainer.step(step, corpus.train, stop=bool(received))
        if stats["bad"]:
            _save(trainer, settings, corpus, step)
            raise ConfigError(f"stopped in step {step + 1}: {stats['bad']}; the weights from before it are saved "
                              f"in {c.out}; look at that text, or --resume with a lower --lr")
        done, last = step + 1, step + 1 == c.steps or stats["stop"]
        if last or done % c.save_every == 0:
            _save(trainer, settings, corpus, done)
        # Validation comes after the save: it needs other memory than the step, and may be what ends the run.
        validate = not stats["stop"] and (last or done % c.eval_every == 0)
        progress.report(done, stats, trainer.evaluate(corpus.validation) if validate else None)
        if stats["stop"]:
            world.say(f"stopped after step {done}, saved in {c.out}; --resume goes on")
            raise SystemExit(128 + (received or [signal.SIGTERM])[0])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    _finish(trainer, corpus)


def _find_run(c: TrainConfig) -> Path | None:
    """The checkpoint to resume from. A run that is there and not resumed is only overwritten if told so."""
    if c.overwrite or not any(Path(c.out).glob("step-*")):
        return None
    path = checkpoint.latest(c.out)
    if not c.resume:
        raise ConfigError(f"{c.out} already holds a run ({path.name}): --resume goes on with it, --overwrite starts "
                          f"again, --out=DIR writes elsewhere")
    return path


def _restore(trainer: Trainer, resumed: Path | None) -> int:
    """Load a checkpoint into the trainer, or clear the way for a new run; returns the number of steps done."""
    world, c = trainer.world, trainer.config
    if resumed is None:
        world.agree(lambda: [checkpoint.remove(path) for path in Path(c.out).glob("step-*")], who=world.rank == 0)
        return 0
    state = world.agree(lambda: checkpoint.load(resumed), who=True)
    world.agree(lambda: checkpoint.load_states(trainer.model, trainer.optimizer, state), who=True)
    trainer.update_copies()
    world.say(f"resuming from {resumed}")
    return state["meta"]["step"]


def _save(trainer: Trainer, settings: TrainConfig, corpus: Corpus, step: int) -> None:
    """One process writes, all learn whether it worked. Of ``settings`` None stays None: the next machine derives."""
    c, model, world = trainer.config, trainer.model, trainer.world

    def write() -> None:
        meta = {"model_type": "gpt", "model_config": dataclasses.asdict(model.config),
                "train_config": dataclasses.asdict(settings), "data_fingerprint": corpus.fingerprint,
                "examples_seen": step * c.batch_tokens // c.context, "git_revision": _git_revision(),
                "torch": torch.__version__}
        tensors = {"model": {name: p.detach() for name, p in model.named_parameters()},
                   "optimizer": checkpoint.optimizer_state(model, trainer.optimizer)}
        checkpoint.save(c.out, step, tensors, meta, keep=c.keep,
                        write_files=lambda folder: tokenizer.save(corpus.encoding, folder / "tokenizer.tiktoken"))

    world.agree(write, who=world.rank == 0)


def _git_revision() -> str | None:
    with contextlib.suppress(OSError):  # no git
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def _note_signals(world: World) -> list[int]:
    """From now on Ctrl-C and a polite kill only fill the list that this returns; the loop looks at it."""
    received: list[int] = []

    def note(number, frame):
        if not received:  # torchrun passes Ctrl-C on to processes that have it already
            world.say("stopping after this step ...")
        received.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return received


class Progress:
    """What is said about a run while it goes on: a line now and then, and every step in metrics.jsonl.

    MFU (model FLOPs utilisation): the FLOPs that the model's formula asks for, over what the hardware could do in
    the same time at the speed of its large matrix products, measured at the start.
    """

    def __init__(self, trainer: Trainer, corpus: Corpus, first: int):
        self.c, self.world, self.corpus = trainer.config, trainer.world, corpus
        self.flops = gpt.flops_per_token(trainer.model.config)
        self.peak = measure_peak(self.world, torch.bfloat16 if self.c.precision == "bf16" else torch.float32)
        self.pace, self.began = None, time.perf_counter()  # pace: seconds per step, smoothed
        self.path = Path(self.c.out) / "metrics.jsonl"
        if self.world.rank == 0:  # lines behind the checkpoint that is resumed from will be written again
            lines = self.path.read_text().splitlines() if first and self.path.exists() else []
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first]
            self.path.write_text("".join(line + "\n" for line in kept))

    def report(self, done: int, stats: dict, held_out_loss: float | None) -> None:
        c, seconds = self.c, stats["seconds"]
        self.pace = seconds if self.pace is None else 0.9 * self.pace + 0.1 * seconds
        rate = c.batch_tokens / self.pace
        if done == 1 or done % max(1, c.steps // 30) == 0:
            left = timedelta(seconds=round(self.pace * (c.steps - done)))
            self.world.say(f"step {done:>6}/{c.steps}  loss {stats['loss']:.4f}  lr {stats['lr']:.2e}  "
                           f"norm {stats['grad_norm']:.2f}  {rate:,.0f} tokens/s  "
                           f"MFU {rate * self.flops / self.peak:.0%}  ETA {left}")
        line = {"step": done, "loss": stats["loss"], "lr": stats["lr"], "grad_norm": stats["grad_norm"],
                "tokens": done * c.batch_tokens, "tokens_per_s": c.batch_tokens / seconds,
                "mfu": c.batch_tokens / seconds * self.flops / self.peak}
        if held_out_loss is not None:
            line["held_out_loss"] = held_out_loss
            bits = held_out_loss / math.log(2) / self.corpus.bytes_per_token
            self.world.say(f"step {done:>6}/{c.steps}  held-out loss {held_out_loss:.4f}  perplexity "
                           f"{math.exp(min(held_out_loss, 80)):.1f}  {bits:.3f} bits per byte")
        if self.world.rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")


def _finish(trainer: Trainer, corpus: Corpus) -> None:
    """Samples, and the verdict."""
    c, world, encoding = trainer.config, trainer.world, corpus.encoding
    loss = trainer.evaluate(corpus.validation)
    if world.rank == 0 and c.samples:
        eot, generator = tokenizer.eot(encoding), torch.Generator(world.device).manual_seed(c.seed)
        texts = decode.generate(trainer.model, [[eot]] * c.samples, min(c.sample_tokens, c.context - 1),
                                temperature=0.8, top_p=0.95, stop_tokens=(eot,), generator=generator)
        for i, tokens in enumerate(texts):
            print(f"--- sample {i + 1} ---\n{encoding.decode([t for t in tokens if t != eot])}", flush=True)
        print("---")
    world.say(f"trained on {c.steps * c.batch_tokens:,} tokens: held-out loss {loss:.4f} nats per token, uniform "
              f"guessing {math.log(encoding.n_vocab):.4f}; saved in {c.out}")
    world.say(f'python decode.py --checkpoint {c.out} --prompt "..."    completes a text')


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 2 the user has to mend something, 128 + n stopped by signal n."""
    rank = int(os.environ.get("RANK", 0))
    try:
        run(configure(arguments))
    except (ConfigError, data.DataError, checkpoint.CheckpointError) as error:
        if rank == 0:
            print(f"train.py: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        print(f"train.py: {error.strerror or error}: {error.filename}; what was saved before is as it was", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the first step: there is nothing to save
        return 128 + signal.SIGINT
    except RuntimeError as error:
        signs = "onnection", "imed out", "roken pipe"
        if not dist.is_initialized() or not any(sign in str(error) for sign in signs):
            raise
        print(f"train.py: rank {rank} lost another process ({str(error).splitlines()[0][:120]}); start again with "
              f"--resume", file=sys.stderr, flush=True)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
