"""Train and align a language model, on one process or many: raw text in, models that complete and answer out.

Idea      Everything before this file is a part; this is the program. Text is read, split and packed (data.py),
          turned into tokens (tokenizer.py), a model (gpt.py, llama.py, moe.py) is trained on it by all processes
          in any layout (layout.py), saved so that nothing is ever lost (checkpoint.py), asked to write (decode.py), and
          taught to answer (alignment.py: supervised, a reward model, PPO, DPO, GRPO).
Formula   loss = -(1/n) sum log p(x_t | x_<t) over ALL n tokens of a step, whoever computed them:
          n = batch_tokens = dp * ep * accumulation * micro_batch * context. The number of processes changes
          who does what, never what is learned.
Shapes    a microbatch: tokens (micro_batch, context) -> logits (micro_batch, context, V)
Omits     text larger than memory. With dropout the masks are each data-parallel process's own, and the number of
          processes changes them.
Run       python train.py                                           one process
          torchrun --standalone --nproc_per_node=2 train.py         the same run on two
          torchrun --standalone --nproc_per_node=8 train.py --tp 2 --pp 2 --zero 1 --out out/layout
          torchrun --standalone --nproc_per_node=8 train.py --preset gpt2_124m --data 'text/*.jsonl.gz' --out out/124m
          python train.py --stage dpo --init out/sft --out out/again    one stage of alignment alone
          python train.py --help                                    every setting and its default
          Ends with "trained on ... tokens: held-out loss ...; saved in ...", and the command that asks it
Test      pytest tests/test_train.py
"""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

import alignment
import checkpoint
import data
import decode
import gpt
import layout
import models
import precision
import recompute
import run_folder
import tokenizer
from config import ConfigError, TrainConfig, derive, parse, refuse_meaningless
from corpus import Corpus, prepare
from processes import ProcessError, World, is_lost, join, measure_peak, memory, multiplies_bf16, noting_signals


# --- 1. the step ----------------------------------------------------------------------------

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


def make_optimizer(groups: list[dict], c: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused where torch has it."""
    device = next((p.device.type for group in groups for p in group["params"]), "cpu")
    return torch.optim.AdamW(groups, lr=c.lr, betas=(c.beta1, c.beta2), fused=device in ("cpu", "cuda"))


def decay(p: nn.Parameter, c: TrainConfig) -> dict:
    """The settings of a parameter's group: matrices decay, biases and norms do not."""
    return {"weight_decay": c.weight_decay if p.dim() >= 2 else 0.0}


def pick_attention(device: torch.device, context: int, precision: str) -> Callable:
    """In bf16 on a CPU the fused kernel's backward is slow: for short sequences plain products beat it."""
    slow = device.type == "cpu" and precision == "bf16" and context <= 256
    return gpt.unfused_attention if slow else gpt.attention


class Trainer:
    """A model on its layout of processes, its optimizer, and the step.

    In bf16 a GPU computes under autocast; a CPU on a copy of the weights in bf16, and gradients are summed in fp32
    (autocast would convert every weight in every pass, which costs more there than it gains).
    """

    def __init__(self, config: TrainConfig, model: nn.Module, world: World, initialise: Callable | None = None):
        self.config, self.world, self.model_sizes = config, world, models.sizes_of(model)
        # Saving goes on beside training: its messages must not meet those of a step.
        self.saving_group = None
        if world.size > 1:
            self.saving_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.timeout))
        device, dtype = world.device.type, {"fp16": torch.float16}.get(config.precision, torch.bfloat16)
        half = config.precision == "bf16" and device == "cpu"
        # fp16 has no room for small gradients: the loss is multiplied by a scale, they are divided by it again.
        self.scale = precision.LossScale() if config.precision == "fp16" else None
        c, sizes = config, grid_of(config)
        self.accumulation = c.batch_tokens // (sizes.parts * c.micro_batch * c.context)
        self.parallel = layout.ParallelModel(
            model, lambda groups: make_optimizer(groups, c), lambda name, p: decay(p, c), sizes,
            self.accumulation, half, torch.autocast(device, dtype, enabled=c.precision != "fp32" and not half),
            c.timeout, initialise, world.device)
        if config.compile:
            self._compile()

    def _compile(self) -> None:
        """Compile each block in place (parameter names stay); whatever goes wrong, the run goes on without."""
        shape, model = (self.config.micro_batch, self.config.context), self.parallel.model
        tokens = torch.zeros(shape, dtype=torch.long, device=self.world.device)
        try:
            for block in model.blocks:
                block.compile()
            self.parallel.gradient([(tokens, tokens)], 1)
        except Exception as error:  # compilers fail in every way there is
            self.world.say(f"--compile failed, going on without: {str(error).splitlines()[0][:100]}")
            for block in model.blocks:
                block._compiled_call_impl = None
        self.parallel.zero_grad()

    def gradient(self, step: int, windows: data.TokenWindows) -> dict[int, torch.Tensor]:
        """Forward and backward over this process's share of the step; then every process has its gradient.

        Returns:
            first example of each microbatch -> its part of the mean loss over all ``batch_tokens`` of the step.
        """
        c, parallel = self.config, self.parallel
        count = self.accumulation * c.micro_batch
        first = (step * parallel.sizes.parts + parallel.part) * count
        # Dropout depends on (seed, step, part) alone: a resumed run draws what the unbroken one would have drawn.
        torch.manual_seed(hash((c.seed, step, parallel.seed_part)) % 2**63)
        starts = range(first, first + count, c.micro_batch)
        batches = (self._batch(windows, start, c.micro_batch) for start in starts)
        scale = self.scale.scale if self.scale else 1.0
        losses = parallel.gradient(batches, c.batch_tokens / scale, models.balancing_loss)
        if self.scale:
            parallel.scale_gradient(1 / scale)
        return {start: loss / scale for start, loss in zip(starts, losses)}

    def _batch(self, windows: data.TokenWindows, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.world.device
        return tuple(t.to(device, non_blocking=device.type == "cuda") for t in windows.batch(start, size))

    def step(self, step: int, windows: data.TokenWindows, stop: bool = False) -> dict:
        """One optimizer step, if its loss and gradient are finite.

        Returns:
            {"loss": mean over all tokens of the step, "grad_norm": before clipping, "lr": ..., "stop": whether
            any process wants to stop, "bad": None, or where the loss was not finite, "seconds": of the whole step}.
        """
        c, lr, began = self.config, learning_rate(self.config, step), time.perf_counter()
        losses = self.gradient(step, windows)
        norm = self.parallel.clip(c.max_gradient or math.inf)
        mine = sum(loss.item() for loss in losses.values()) * self.parallel.counts
        loss, stops = self.world.sum([mine, float(stop)])
        bad, finite = None, math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.parallel.step(lr)
        elif not (self.scale and math.isfinite(loss) and self.scale.scale > 2**-10):  # else the scale was too large
            bad = self._where(losses)
        if self.scale:
            self.scale.update(overflow=not finite)
        self.parallel.zero_grad()
        return {"loss": loss, "grad_norm": norm, "lr": lr, "stop": stops > 0, "bad": bad,
                "seconds": time.perf_counter() - began}

    def _where(self, losses: dict[int, torch.Tensor]) -> str:
        """Name the first rank and microbatch whose loss is not finite."""
        mine = next((start for start, loss in losses.items() if not loss.isfinite()), None)
        for rank, start in enumerate(self.world.gather(mine)):
            if start is not None:
                last = start + self.config.micro_batch * (self.accumulation if self.config.pp > 1 else 1) - 1
                return f"the loss is not finite on rank {rank}, examples {start} to {last}"
        return "the loss is finite, but the gradient is not"

    def evaluate(self, windows: data.TokenWindows) -> float:
        """Mean loss on the first ``eval_tokens`` held-out tokens, every part its share, in nats per token."""
        c, parallel = self.config, self.parallel
        count = min(len(windows), max(1, c.eval_tokens // windows.context))
        size = c.micro_batch * (self.accumulation if c.pp > 1 else 1)
        parts, total = parallel.sizes.parts, 0.0
        for start in range(parallel.part * size, count + parallel.part * size, parts * size):
            # All take part equally often, in batches of one size; what lies behind the end does not count.
            inputs, targets = self._batch(windows, start, size)
            targets[max(0, count - start):] = -1
            total += parallel.evaluate(inputs, targets)
        return self.world.sum([total * parallel.counts])[0] / (count * windows.context)


def grid_of(c: TrainConfig) -> layout.Grid:
    """The layout that a run's settings ask for."""
    return layout.Grid(c.dp or 1, c.tp, c.pp, c.cp, c.ep, c.zero, c.offload, c.sequence, c.pipeline)


# --- 2. the run -----------------------------------------------------------------------------

def run(settings: TrainConfig, given: set[str]) -> None:
    """Train as configured, from the text to the samples.

    Raises:
        ConfigError, ProcessError: one line each; what was good before is saved.
        SystemExit: 128 + n after signal n, everything saved.
    """
    world = join(settings.device, settings.timeout)
    settings, resumed = world.first(lambda: run_folder.decide(settings, given))
    if settings.resume:
        refuse_meaningless(settings, given)  # beside what the checkpoint brings
    c, notes = derive(settings, world.size, world.device.type, multiplies_bf16(world.device))
    world.say("\n".join(notes))
    if resumed:
        world.agree(lambda: _must_exist(resumed))
    try:
        layout.check(grid_of(c), c.model, models.describe(c, c.vocab_size), c.context)
    except ValueError as error:  # heads, widths, ranks
        raise ConfigError(str(error)) from None
    corpus = prepare(c, world, resumed)
    sizes = models.describe(c, corpus.encoding.n_vocab)
    try:
        layout.check(grid_of(c), c.model, sizes, corpus.validation.context)
    except ValueError:
        raise ConfigError(f"the held-out text is one window of {corpus.validation.context} tokens, which --cp or "
                          "--sequence cannot cut: give more text or a larger --held_out") from None
    N, active, flops = models.parameters_and_flops(c.model, sizes)
    needed = layout.bytes_needed(N, grid_of(c), layout.expert_parameters(sizes))
    here = memory(world.device) / (world.local_size if world.device.type == "cpu" else 1)  # processes share a machine's
    if needed > here:
        raise ConfigError(f"{needed / 2**30:,.0f} GiB for weights, gradients and AdamW's moments do not fit the "
                          f"{here / 2**30:,.0f} GiB of a process: take more processes with --zero=1, 2 or 3"
                          f"{', --tp or --ep' if c.model == 'moe' else ' or --tp'}, fewer --n_layers or a smaller "
                          f"--d_model")
    # ZeRO-3 alone: every process draws the whole model, one parameter at a time, and keeps its part of each.
    in_parts = c.zero == 3 and c.tp == c.cp == 1 and c.model != "moe"  # experts draw twice
    generator = torch.Generator().manual_seed(c.seed)
    model = models.build(c.model, sizes, pick_attention(world.device, c.context, c.precision),
                         None if in_parts else generator, "meta" if in_parts else "cpu")
    kept = recompute.values_kept(model.config, c.recompute, c.model != "gpt")
    world.say(f"recompute {c.recompute}: a layer keeps about {kept:,.0f} values per token for backward"
              if c.recompute != "none" else "")
    model = recompute.recompute(model if in_parts else model.to(world.device), c.recompute)
    trainer = Trainer(c, model, world, (lambda model: model.initialise(generator)) if in_parts else None)
    first, last_line = _restore(trainer, resumed)
    world.agree(lambda: run_folder.begin(Path(c.out), resumed), here=world.rank == 0)
    progress = Progress(trainer, corpus, flops, first, last_line)
    met = "" if active == N else f", {active:,} for a token"
    expected = "" if first else f"; expect a first loss of about ln V = {math.log(corpus.encoding.n_vocab):.3f}"
    world.say(f"{c.model} of {N:,} parameters{met}, {c.precision}, {world.size} x {c.device}; matrix products reach "
              f"{progress.peak / 1e12:.3g} TFLOP/s{expected}")

    saving: list[checkpoint.Saving] = []  # what is being written beside training
    with noting_signals(world.say) as received:
        try:
            loss = _train(trainer, settings, corpus, progress, first, received, saving)
        finally:  # whatever ended it
            for one in saving:
                one.join()
    _finish(trainer, corpus, loss)
    if c.stage == "all":
        del trainer, progress, corpus
        world.say("--- from the base model to one that answers ---")
        try:
            alignment.run_stages(alignment.AlignConfig(
                init=c.out, out=str(run_folder.home(Path(c.out))), seed=c.seed, device=c.device, timeout=c.timeout,
                tp=c.tp, zero=c.zero, resume=resumed is not None,
                overwrite=resumed is None and settings.overwrite), world)
        except ValueError as error:  # its word for what the user has to mend
            raise ConfigError((str(error) or repr(error)).splitlines()[0]) from error


def _train(trainer: Trainer, settings: TrainConfig, corpus: Corpus, progress: "Progress", first: int,
           received: list[int], saving: list[checkpoint.Saving]) -> float:
    """The steps from ``first`` on; returns the held-out loss at the end."""
    c, world, loss = trainer.config, trainer.world, None
    for step in range(first, c.steps):
        stats = trainer.step(step, corpus.train, stop=bool(received) or any(one.failed for one in saving))
        done, last = step + 1, step + 1 == c.steps
        if stats["bad"] or stats["stop"] or last or done % c.save_every == 0:
            while saving:  # one at a time; its failure ends the run
                saving.pop().wait()
        if stats["bad"]:
            _save(trainer, settings, corpus, step, None, keep=None).wait()
            raise ConfigError(f"stopped in step {step + 1}: {stats['bad']}; the weights from before it are saved as "
                              f"step {step} in {c.out}: look at that text, or --resume with a lower --lr, or delete "
                              f"that step to go on from the one before")
        line = progress.describe(done, stats)
        if last or stats["stop"] or done % c.save_every == 0:
            saving.append(_save(trainer, settings, corpus, done, line, keep=c.keep))
        if last or stats["stop"]:
            saving.pop().wait()
        # Validation comes after the save: it needs other memory than the step, and may be what ends the run.
        if not stats["stop"] and (last or done % c.eval_every == 0):
            loss = line["held_out_loss"] = trainer.evaluate(corpus.validation)
        progress.report(line)
        if stats["stop"] and not last:
            world.say(f"stopped after step {done}, saved in {c.out}; --resume goes on")
            raise SystemExit(128 + (received[0] if received else signal.SIGTERM))
    return trainer.evaluate(corpus.validation) if loss is None else loss


def _must_exist(path: Path) -> None:
    if not path.exists():
        raise ConfigError(f"{path} is not to be seen from every machine: --out must be a folder that they share")


def _restore(trainer: Trainer, resumed: Path | None) -> tuple[int, dict | None]:
    """Load a checkpoint into the trainer; returns the number of steps done and the last one's metrics."""
    if resumed is None:
        return 0, None
    world, parallel = trainer.world, trainer.parallel
    states = world.agree(lambda: checkpoint.shapes(resumed))
    meta = checkpoint.load_into(resumed, parallel.tensors(states), group=world.everyone)
    parallel.refresh()
    if trainer.scale and meta.get("loss_scale"):
        trainer.scale.load_state_dict(meta["loss_scale"])
    world.say(f"resuming from {resumed}")
    return meta["step"], meta.get("metrics")


def _save(trainer: Trainer, settings: TrainConfig, corpus: Corpus, step: int, line: dict | None,
          keep: int | None) -> checkpoint.Saving:
    """Begin to write, every process what it holds. What ``settings`` leaves to the machine stays None."""
    c = trainer.config
    meta = {"model_type": c.model, "model_config": trainer.model_sizes,
            "train_config": dataclasses.asdict(settings), "data_fingerprint": corpus.fingerprint,
            "examples_seen": step * c.batch_tokens // c.context, "metrics": line,
            "loss_scale": trainer.scale.state_dict() if trainer.scale else None,
            "git_revision": _git_revision(), "torch": torch.__version__}
    return checkpoint.Saving(c.out, step, trainer.parallel.tensors(), meta, keep=keep, group=trainer.saving_group,
                             write_files=lambda folder: tokenizer.save(corpus.encoding, folder / "tokenizer.tiktoken"))


def _git_revision() -> str | None:
    with contextlib.suppress(OSError):  # no git
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


class Progress:
    """What is said about a run while it goes on: a line now and then, and every step in metrics.jsonl.

    MFU (model FLOPs utilisation): the FLOPs that the model's formula asks for, over what the hardware could do in
    the same time at the speed of its large matrix products, measured at the start.
    """

    def __init__(self, trainer: Trainer, corpus: Corpus, flops: int, first: int, last_line: dict | None):
        self.c, self.world, self.corpus, self.flops = trainer.config, trainer.world, corpus, flops
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.c.precision, torch.float32)
        self.peak = measure_peak(self.world, dtype)
        self.pace, self.first = None, first  # pace: seconds per step, smoothed
        self.said = time.perf_counter()
        self.path = Path(self.c.out) / "metrics.jsonl"
        if self.world.rank == 0:
            self._drop_lines_after(first, last_line)

    def _drop_lines_after(self, first: int, last_line: dict | None) -> None:
        """Lines behind the checkpoint will be written again; its own may be missing, and stands in it."""
        lines = {}
        for text in self.path.read_text().splitlines() if first and self.path.exists() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut short by a kill
                line = json.loads(text)
                lines[line["step"]] = line
        if last_line:
            lines.setdefault(first, last_line)
        beside = self.path.with_suffix(".new")
        beside.write_text("".join(json.dumps(line) + "\n" for step, line in sorted(lines.items()) if step <= first))
        beside.replace(self.path)

    def describe(self, done: int, stats: dict) -> dict:
        """The line of metrics.jsonl for a step; prints one now and then."""
        c, seconds = self.c, stats["seconds"]
        self.pace = seconds if self.pace is None else 0.9 * self.pace + 0.1 * seconds
        rate = c.batch_tokens / self.pace
        if done == self.first + 1 or done % max(1, c.steps // 30) == 0 or time.perf_counter() - self.said > 10:
            self.said = time.perf_counter()
            left = timedelta(seconds=round(self.pace * (c.steps - done)))
            self.world.say(f"step {done:>6}/{c.steps}  loss {stats['loss']:.4f}  lr {stats['lr']:.2e}  "
                           f"norm {stats['grad_norm']:.2f}  {rate:,.0f} tokens/s  "
                           f"MFU {rate * self.flops / self.peak:.0%}  ETA {left}")
        return {"step": done, "loss": stats["loss"], "lr": stats["lr"], "grad_norm": stats["grad_norm"],
                "tokens": done * c.batch_tokens, "tokens_per_s": c.batch_tokens / seconds,
                "mfu": c.batch_tokens / seconds * self.flops / self.peak}

    def report(self, line: dict) -> None:
        """Write the line, with the held-out loss if there is one."""
        if "held_out_loss" in line:
            loss = line["held_out_loss"]
            bits = loss / math.log(2) / self.corpus.bytes_per_token
            self.world.say(f"step {line['step']:>6}/{self.c.steps}  held-out loss {loss:.4f}  perplexity "
                           f"{math.exp(min(loss, 80)):.1f}  {bits:.3f} bits per byte")
        if self.world.rank == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")


def _finish(trainer: Trainer, corpus: Corpus, loss: float) -> None:
    """Samples, and the verdict."""
    c, world, encoding = trainer.config, trainer.world, corpus.encoding
    if world.rank == 0 and c.samples:
        eot, generator = tokenizer.eot(encoding), torch.Generator(world.device).manual_seed(c.seed)
        model = models.build(c.model, trainer.model_sizes)  # as whoever opens the checkpoint will find it
        checkpoint.load_states(model, None, checkpoint.load(checkpoint.latest(c.out), parts=("model",)))
        texts = decode.generate(model.to(world.device), [[eot]] * c.samples, min(c.sample_tokens, c.context - 1),
                                temperature=0.8, top_p=0.95, stop_tokens=(eot,), generator=generator)
        for i, tokens in enumerate(texts):
            world.say(f"--- sample {i + 1} ---\n{encoding.decode([t for t in tokens if t != eot])}")
        world.say("---")
    world.say(f"trained on {c.steps * c.batch_tokens:,} tokens: held-out loss {loss:.4f} nats per token, uniform "
              f"guessing {math.log(encoding.n_vocab):.4f}; saved in {c.out}")
    world.say(f'python decode.py --checkpoint {shlex.quote(c.out)} --prompt "..."    completes a text')


def _stage_alone(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The stage of alignment that is asked for, and the other arguments: its settings are alignment.py's."""
    for i, word in enumerate(arguments):
        name, _, value = word.partition("=")
        if name == "--stage":
            value, behind = (value, i + 1) if value else (*arguments[i + 1:i + 2], "")[:1] + (i + 2,)
            if value in alignment.STAGES:
                return value, [*arguments[:i], *arguments[behind:]]
    return None, arguments


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 1 another process was lost, 2 the user has to mend something, 128 + n signal n."""
    rank = int(os.environ.get("RANK", 0))

    def one_line(text: str, status: int) -> int:
        print(f"train.py: {text}", file=sys.stderr, flush=True)
        return status

    stage, rest = _stage_alone(arguments)
    if stage:
        return alignment.main([*rest, f"--stages={stage}"], "train.py")
    try:
        settings, given = parse(arguments, __doc__)
        if not settings.resume:
            refuse_meaningless(settings, given)
        run(settings, given)
    except (ConfigError, ProcessError, checkpoint.CheckpointError) as error:
        return one_line(str(error), 2) if rank == 0 else 2
    except torch.OutOfMemoryError as error:
        return one_line(f"rank {rank}: {str(error).splitlines()[0][:150]}: take a smaller --micro_batch "
                        "(in alignment, a smaller batch of that stage: alignment.py --help)", 2)
    except OSError as error:
        return one_line(f"{error}; what was saved before is as it was: --resume goes on from there", 2)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except RuntimeError as error:
        if not is_lost(error):
            raise
        return one_line(f"rank {rank} lost another process ({str(error).splitlines()[0][:120]}): start again with "
                        f"--resume", 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        run_folder.unlock()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
