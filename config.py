"""The settings of a training run: defaults, presets, flags, and what follows from them.

Idea      One flat dataclass is the only home of defaults. Its fields are the flags of train.py; a preset is a few
          fields with other values; a field that is None is derived from the others, and the formula is printed.
          A run is described by this and by its text alone, so a checkpoint carries it along.
Formula   batch_tokens = dp * ep * accumulation * micro_batch * context
          The left side is what is learned and is stated; the right side is who does it and is derived. A number of
          processes that does not divide the batch is refused: it would quietly train something else.
Shapes    no tensors here
Omits     configuration files: a shell script with flags is one, and a checkpoint holds the whole of it.
Run       python config.py --preset gpt2_124m --lr 3e-4    prints the settings that train.py would use
          Ends with "one step = ... tokens = ..."
Test      pytest tests/test_config.py
"""

import argparse
import dataclasses
import difflib
import math
import sys
from dataclasses import dataclass


class ConfigError(ValueError):
    """A setting that the user has to mend; the message is one line that says which and how."""


# --- 1. the settings ------------------------------------------------------------------------

def setting(default, help: str, choices: tuple = (), least: float | None = None, below: float | None = None):
    """A field with what its flag needs: a help text, the values allowed."""
    metadata = {"help": help, "choices": choices, "least": least, "below": below}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Every setting of a run; each field is a flag. None means derived: the formula is printed with the value."""

    stage: str | None = setting(None, "pretrain; or all: sft, reward, ppo, dpo and grpo after it; or one of "
                                      "those alone, with alignment.py's flags; derived: all on the default text "
                                      "with a --context of at least 96, else pretrain",
                                ("all", "pretrain", "sft", "reward", "ppo", "dpo", "grpo"))
    # the text
    data: str | None = setting(None, "files to train on, e.g. 'my/*.txt' (.txt .md .jsonl[.gz] .warc.wet[.gz]); "
                                     "derived: Python's own documentation")
    held_out: float = setting(0.05, "share of the documents that is kept for validation", least=0.001, below=1)
    tokenizer: str = setting("train", "'train' a vocabulary on the text; or a tiktoken name, a file, or a folder with "
                                         "vocab.json and merges.txt")
    vocab_size: int = setting(2048, "size of the vocabulary to train, end-of-text included", least=257)
    # the model
    model: str = setting("gpt", "gpt.py's GPT-2, llama.py's Llama 3, or Llama with moe.py's experts",
                         ("gpt", "llama", "moe"))
    context: int = setting(128, "longest sequence, in tokens", least=1)
    n_layers: int = setting(4, "blocks", least=1)
    n_heads: int = setting(4, "attention heads per block", least=1)
    n_kv_heads: int | None = setting(None, "key and value heads of llama and moe; derived: n_heads", least=1)
    d_model: int = setting(128, "width of the residual stream", least=1)
    d_ff: int | None = setting(None, "hidden width of the feed-forward layers; derived: 4 d_model, llama: 8/3", least=1)
    n_experts: int = setting(8, "experts of a moe layer", least=1)
    experts_per_token: int = setting(2, "experts that a token visits", least=1)
    dropout: float = setting(0.0, "dropout on embeddings and residual branches", least=0, below=1)
    # learning
    steps: int = setting(500, "optimizer steps", least=1, below=10**10)
    batch_tokens: int = setting(2048, "tokens per optimizer step, over all processes", least=1)
    micro_batch: int | None = setting(None, "sequences per pass of one process; derived: up to 16384 tokens", least=1)
    lr: float = setting(3e-3, "peak learning rate", least=0)
    min_lr: float | None = setting(None, "learning rate at the end; derived: lr / 10", least=0)
    warmup_steps: int | None = setting(None, "steps of linear warm-up; derived: steps / 20", least=0)
    schedule: str = setting("cosine", "shape of the decay", ("cosine", "wsd", "constant"))
    decay_steps: int | None = setting(None, "steps of decay at the end, for wsd; derived: steps / 5", least=1)
    weight_decay: float = setting(0.1, "AdamW's decay, on matrices only", least=0)
    beta1: float = setting(0.9, "AdamW's decay rate of the mean gradient", least=0, below=1)
    beta2: float = setting(0.95, "AdamW's decay rate of the mean squared gradient", least=0, below=1)
    max_gradient: float = setting(1.0, "largest norm of a gradient; 0 turns clipping off", least=0)
    seed: int = setting(0, "of initial weights, order of the data, dropout and samples")
    # the machine
    device: str | None = setting(None, "cpu, cuda or mps; derived: the best that is here")
    precision: str | None = setting(None, "of forward and backward (fp16 scales the loss); derived: bf16 where "
                                          "the hardware multiplies it", ("fp32", "bf16", "fp16"))
    dp: int | None = setting(None, "data-parallel processes; derived: processes / (tp * pp * cp * ep)", least=1)
    tp: int = setting(1, "tensor-parallel processes: they share every matrix", least=1)
    pp: int = setting(1, "pipeline stages: each has some of the blocks", least=1)
    cp: int = setting(1, "context-parallel processes: each has a part of every sequence", least=1)
    ep: int = setting(1, "expert-parallel processes: each has some of a moe's experts", least=1)
    zero: int = setting(0, "ZeRO: divide optimizer states (1), gradients (2), parameters (3) over dp", (0, 1, 2, 3))
    offload: bool = setting(False, "ZeRO-Offload: keep what ZeRO divides on the CPU, and run the optimizer there")
    sequence: bool = setting(False, "with tp: divide norms and residuals over the sequence, too")
    pipeline: str = setting("1f1b", "order of the pipeline's work", ("gpipe", "1f1b", "zb"))
    recompute: str = setting("none", "activations to compute again in backward instead of keeping them: a block's, "
                                     "attention's, or none", ("none", "block", "attention"))
    compile: bool = setting(False, "torch.compile the blocks: faster after a minute's wait")
    timeout: int = setting(600, "seconds after which a silent process counts as lost", least=1, below=10**7)
    # the run
    out: str = setting("out/pretrain", "directory of checkpoints, metrics.jsonl and packed tokens")
    resume: bool = setting(False, "go on from the newest checkpoint in --out, if there is one")
    overwrite: bool = setting(False, "start again although --out holds a run: its checkpoints are deleted")
    save_every: int | None = setting(None, "steps between checkpoints; derived: steps / 5", least=1)
    keep: int = setting(2, "checkpoints that remain", least=1)
    eval_every: int | None = setting(None, "steps between validations; derived: steps / 5", least=1)
    eval_tokens: int = setting(65536, "held-out tokens per validation, at most", least=1)
    samples: int = setting(3, "texts to print at the end", least=0)
    sample_tokens: int = setting(80, "length of each sample", least=1)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least, below = getattr(self, field.name), field.metadata["least"], field.metadata["below"]
            if value is None:
                continue
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"--{field.name} must be finite, got {value}")
            if least is not None and not value >= least:
                raise ConfigError(f"--{field.name} must be at least {least}, got {value}")
            if below is not None and not value < below:
                raise ConfigError(f"--{field.name} must be below {below}, got {value}")
        if not 0 <= self.seed < 2**32:  # 32 bits, as NumPy's frozen stream of the order of the data takes
            raise ConfigError(f"--seed must be in 0 .. 2^32 - 1, got {self.seed}")


PRESETS = {
    "tiny_cpu": {},  # the defaults: 1 to 2 minutes on two cores
    "llama_tiny": dict(model="llama", n_kv_heads=2),
    "moe_tiny": dict(model="moe", n_kv_heads=2, d_ff=128),
    # Llama 3.2 1B's sizes with another vocabulary; 20 tokens per parameter (Hoffmann et al. 2022).
    "llama_1b": dict(model="llama", tokenizer="cl100k_base", context=4096, n_layers=16, n_heads=32, n_kv_heads=8,
                     d_model=2048, d_ff=8192, lr=3e-4, steps=22500, batch_tokens=2**20, warmup_steps=1000,
                     eval_every=500, eval_tokens=2**20, save_every=1000),
    # Sizes of Radford et al. 2019; learning rate and batch (0.5M tokens) of Brown et al. 2020, table 2.1; 10B tokens.
    "gpt2_124m": dict(tokenizer="gpt2", context=1024, n_layers=12, n_heads=12, d_model=768, lr=6e-4, steps=19073,
                      batch_tokens=2**19, warmup_steps=715, eval_every=250, eval_tokens=2**20, save_every=1000),
    "gpt2_355m": dict(tokenizer="gpt2", context=1024, n_layers=24, n_heads=16, d_model=1024, lr=3e-4, steps=19073,
                      batch_tokens=2**19, warmup_steps=715, eval_every=250, eval_tokens=2**20, save_every=1000),
}

# What a checkpoint fixes: with any of these changed a resumed run would be another one.
FIXED_BY_CHECKPOINT = ("data", "held_out", "tokenizer", "vocab_size", "model", "context", "n_layers", "n_heads",
                       "n_kv_heads", "d_model", "d_ff", "n_experts", "experts_per_token", "batch_tokens", "seed")
# What belongs to the machine and the moment: never taken from a checkpoint.
OF_THE_MACHINE = {"device", "dp", "tp", "pp", "cp", "ep", "zero", "offload", "sequence", "pipeline",
                  "recompute", "micro_batch", "compile", "timeout", "out", "resume", "overwrite"}


# --- 2. flags -------------------------------------------------------------------------------

class OneLineParser(argparse.ArgumentParser):
    """argparse, but an error is one line for the caller to print, not a page of usage."""

    def error(self, message: str):
        raise ConfigError(message)


def whole_number(text: str) -> int:
    """int, also from 1e6 and 2**19."""
    try:
        base, _, exponent = text.partition("**")
        value = int(base) ** int(exponent) if exponent else float(text)
        if value == int(value):
            return int(value)
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")


def parse_flags(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """The values of the flags; an unknown one is an error that names what it may be short for, or the nearest."""
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        name = unknown[0].split("=")[0]
        longer = [flag for flag in flags if flag.endswith(f"_{name.lstrip('-')}")]
        near = longer or difflib.get_close_matches(name, flags, 1)
        parser.error(f"unknown flag {name}: " + (f"did you mean {' or '.join(near)}?" if near else "see --help"))
    return known


def parse(arguments: list[str], description: str) -> tuple[TrainConfig, set[str]]:
    """Command line -> (config, the names that flags or a preset gave). Precedence: defaults < preset < flags.

    Raises:
        ConfigError: for an unknown flag (with the nearest known one) or a value that cannot be.
    """
    parser = OneLineParser(description=description, usage=argparse.SUPPRESS, allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny_cpu",
                        help="sizes to start from (default %(default)s)")
    for field in dataclasses.fields(TrainConfig):
        text = field.metadata["help"] + (f" (default {field.default})" if field.default is not None else "")
        kind = {"int": whole_number, "float": float, "str": str}.get(_type_name(field))
        if kind is None:
            parser.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, default=None,
                                help=text)
        else:
            parser.add_argument(f"--{field.name}", type=kind, help=text.replace("%", "%%"),
                                choices=field.metadata["choices"] or None,
                                metavar=None if field.metadata["choices"] else _type_name(field).upper())
    known = parse_flags(parser, arguments)
    flags = {name: value for name, value in vars(known).items() if value is not None and name != "preset"}
    given = PRESETS[known.preset] | flags
    return TrainConfig(**given), set(given)


def _type_name(field: dataclasses.Field) -> str:
    name = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return str(name).removesuffix(" | None")


def refuse_meaningless(config: TrainConfig, given: set[str]) -> None:
    """Raise ConfigError for a setting that was given and means nothing beside the others."""
    c = config
    for name, means_something, reason in (
            ("vocab_size", c.tokenizer == "train", f"the tokenizer {c.tokenizer!r} brings its own vocabulary"),
            ("n_kv_heads", c.model != "gpt", "every head of a gpt has its own keys and values"),
            ("n_experts", c.model == "moe", f"a {c.model} has no experts"),
            ("experts_per_token", c.model == "moe", f"a {c.model} has no experts"),
            ("dropout", c.model == "gpt" or not c.dropout, f"a {c.model} has none"),
            ("decay_steps", c.schedule == "wsd", f"only --schedule=wsd has it, this is {c.schedule}"),
            ("min_lr", c.schedule != "constant", "a constant schedule has no end to go to"),
            ("ep", c.ep == 1 or c.model == "moe", f"a {c.model} has no experts"),
            ("sequence", not c.sequence or c.tp > 1, "it divides work over --tp, which is 1"),
            ("offload", not c.offload or c.zero > 0, "it moves what --zero divides, which is 0"),
            ("pipeline", c.pp > 1, "--pp=1 is no pipeline"),
            ("recompute", c.recompute != "block" or c.model != "moe", "experts would count visits twice"),
            ("compile", not c.compile or c.pp == c.tp == c.cp == 1 and c.zero == 0, "it is for data parallelism alone"),
            ("sample_tokens", c.samples > 0, "--samples=0 prints none"),
            ("resume", not (c.resume and c.overwrite), "--overwrite starts again")):
        if name in given and not means_something:
            raise ConfigError(f"--{name} means nothing here: {reason}")


# --- 3. what follows from the settings ------------------------------------------------------

def derive(config: TrainConfig, processes: int, device: str, has_bf16: bool) -> tuple[TrainConfig, list[str]]:
    """(config without None, the formulas to print), for that many processes on devices of this kind.

    Raises:
        ConfigError: for a batch that does not divide, naming the numbers and the nearest that would.
    """
    c, notes = dataclasses.replace(config), []

    def fill(name: str, value, formula: str) -> None:
        if getattr(c, name) is None:
            setattr(c, name, value)
            shown = f"{value:g}" if isinstance(value, float) else value
            notes.append(f"{name} = {shown} ({formula})")

    fill("stage", "all" if c.data is None and c.context >= 96 else "pretrain",
         "all on the default text, in contexts that hold a conversation; else pretrain")
    if c.stage not in ("all", "pretrain"):
        raise ConfigError(f"--stage={c.stage} is alignment's: python alignment.py --stages {c.stage} has its settings")
    fill("device", device, "the best that is here")
    fill("precision", "bf16" if has_bf16 and (c.pp == 1 or c.device != "cpu") else "fp32",
         "bf16 where the hardware multiplies it")
    model_size = c.tp * c.pp * c.cp * c.ep
    fill("dp", max(1, processes // model_size), "all processes" if model_size == 1 else
         f"{processes} processes / (tp {c.tp} * pp {c.pp} * cp {c.cp} * ep {c.ep})")
    if c.dp * model_size != processes:
        product = f"--dp={c.dp}" if model_size == 1 else \
            f"dp {c.dp} * tp {c.tp} * pp {c.pp} * cp {c.cp} * ep {c.ep} = {c.dp * model_size}"
        raise ConfigError(f"{product} needs {c.dp * model_size} processes, there are {processes}: "
                          f"start them by torchrun --nproc_per_node={c.dp * model_size}")
    parts = c.dp * c.ep  # of a batch
    sequences, rest = divmod(c.batch_tokens, c.context)
    if rest or sequences % parts:
        least = c.context * parts
        raise ConfigError(f"--batch_tokens={c.batch_tokens} is no multiple of context * dp * ep = "
                          f"{c.context} * {parts}: the nearest is {max(1, round(c.batch_tokens / least)) * least}")
    local = sequences // parts
    most = max(1, 16384 // c.context)  # more tokens a pass make no device busier
    fewest = min(local, 4 * c.pp) if c.pp > 1 else 1  # a pipeline is idle for (pp - 1) / (microbatches + pp - 1)
    fill("micro_batch", max(m for m in range(1, min(local, most) + 1) if local % m == 0 and local // m >= fewest),
         f"the largest divisor of a process's {local} sequences with at most 16384 tokens"
         + (f" that leaves {fewest} for the pipeline" if c.pp > 1 else ""))
    if local % c.micro_batch:
        raise ConfigError(f"--micro_batch={c.micro_batch} does not divide a process's {local} sequences "
                          f"(batch_tokens {c.batch_tokens} / context {c.context} / dp * ep {parts})")
    fill("min_lr", c.lr / 10, "lr / 10")
    fill("warmup_steps", c.steps // 20, "steps / 20")
    for name in ("decay_steps", "save_every", "eval_every"):
        fill(name, max(1, c.steps // 5), "steps / 5")
    if c.recompute != "none" and c.sequence and c.dropout:
        raise ConfigError("--recompute with --sequence would draw other dropout masks the second time: leave one out")
    if c.pp > 1 and c.device == "cpu" and c.precision == "bf16":
        raise ConfigError("--precision=bf16 on a CPU sums gradients outside of the pipeline's reach: take "
                          "--precision=fp32 with --pp")
    if c.d_model % c.n_heads:
        raise ConfigError(f"--n_heads={c.n_heads} does not divide --d_model={c.d_model}")
    if c.n_kv_heads and c.n_heads % c.n_kv_heads:
        raise ConfigError(f"--n_kv_heads={c.n_kv_heads} does not divide --n_heads={c.n_heads}")
    if c.model == "moe" and c.experts_per_token > c.n_experts:
        raise ConfigError(f"--experts_per_token={c.experts_per_token} is more than --n_experts={c.n_experts}")
    if c.min_lr > c.lr:
        raise ConfigError(f"--min_lr={c.min_lr:g} is above --lr={c.lr:g}")
    if c.warmup_steps + (c.decay_steps if c.schedule == "wsd" else 0) > c.steps:
        raise ConfigError(f"--warmup_steps={c.warmup_steps} and the decay do not fit into --steps={c.steps}")
    notes.append(f"one step = {c.batch_tokens} tokens = {parts} (dp * ep) * {local // c.micro_batch} accumulated "
                 f"* {c.micro_batch} sequences * {c.context} tokens")
    return c, notes


# --- 4. demo --------------------------------------------------------------------------------

def main(arguments: list[str]) -> int:
    try:
        config, given = parse(arguments, __doc__)
        refuse_meaningless(config, given)
        processes = (config.dp or 1) * config.tp * config.pp * config.cp * config.ep
        derived, notes = derive(config, processes, config.device or "cpu", has_bf16=False)
    except ConfigError as error:
        print(f"config.py: {error}", file=sys.stderr)
        return 2
    for field in dataclasses.fields(derived):
        origin = "given" if field.name in given else "derived" if getattr(config, field.name) is None else "default"
        print(f"{field.name:14} {str(getattr(derived, field.name)):14} {origin:8} {field.metadata['help']}")
    print("\n".join(notes))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
