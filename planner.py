"""Planner: which layout of a model on a cluster fits, and which is fastest.   Narayanan et al. 2021 (2104.04473)

Idea      A layout says who holds what. Its memory is a sum; its step is arithmetic on three rates: FLOP/s, bytes/s of
          the chip's memory, bytes/s of the link that a group of chips shares. So all layouts can be tried on paper.
Formula   step      = (M + (pp - 1) / v) * stage + exposed DP + optimizer;   bubble = (pp - 1) / (v M)
          stage     = layers / pp * (matrix products + attention + pointwise + exposed TP, CP, EP) + head + PP
          product   = max(FLOPs / (0.87 matmul peak), bytes of the weights / (0.8 bandwidth))
          pointwise = 5 * bytes of a layer's activations / (0.8 bandwidth): written, read; read, gradient written, read
          ring      = (p - 1) / p * bytes / (0.8 link) for a reduce-scatter or all-gather; an all-reduce is both
          link      of a group = min(link in the node, members per node * network), NCCL's rings use every card
          memory    = weights + gradients + optimizer + activations in flight + logits + 2 GB
Shapes    no tensors; model: scaling.ModelShape, chip: scaling.Accelerator, both handed in
Omits     stragglers, failures and restarts (a run loses some percent to them), data loading, zero-bubble schedules,
          products and collectives that overlap (TP is charged in full), networks with fewer links than ports, experts
          that are loaded unevenly.
Run       python planner.py --plan llama3_405b --gpus 16384 --gpu h100 --tokens 15e12
          python planner.py --validate      beside 28 published runs; it says which of them are no blind test
          Ends with "best: ...", or "planned MFU within 20% of the published one: ..."
Test      pytest tests/test_planner.py
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# The only constants beside the chips' data, the same for every chip and run. Adjusted after seeing runs: a first draft
# had one pair of shares for all chips, 0.75 of the peak for products and 0.5 for attention, and planned Llama 3's runs
# 19.5, 15.5 and 23% too fast. The measured shares of each chip (scaling.ACCELERATORS) replaced the pair; MATMUL keeps
# the A100 at about 0.75. So Llama 3 is no blind test of the shares: with the pair in this file its runs come out 17.5,
# 13.6 and 21.8% too fast (24 of 28 runs within 20%), and all others within 2.6% of what --validate shows.
MATMUL = 0.87  # of the best rate that the chip's products reach, what the products of a model's shapes reach
STREAM = 0.8  # share of the memory's bandwidth that a pointwise kernel sustains
LINK = 0.8  # share of a link that a large collective sustains
LATENCY = 20e-6  # seconds that a collective takes even with nothing to carry
RESERVED = 2e9  # bytes for the driver's context and the collectives' buffers
USABLE = 0.95  # share of the memory: the rest is lost between blocks
RECOMPUTE = ("none", "selective", "block")  # selective is Korthikanti et al. 2022's, which recompute.py omits


# --- 1. a layout ----------------------------------------------------------------------------

@dataclass(frozen=True)
class ClusterLayout:
    """Ranks per kind of parallelism; neighbours first: tp, then cp, then dp (experts inside), then pp."""
    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1  # divides dp * cp
    zero: int = 1  # 0: nothing is divided by dp, 1: the optimizer, 2: gradients too, 3: weights too
    microbatch: int = 1  # sequences
    recompute: str = "none"
    interleave: int = 1  # chunks of layers per pipeline rank, v
    sequence_parallel: bool = True  # tensor parallelism divides norms and dropout too (Korthikanti et al. 2022)
    flash: bool = True  # attention scores never leave the chip

    @property
    def gpus(self) -> int:
        """GPUs that it takes."""
        return self.dp * self.tp * self.pp * self.cp

    def __str__(self) -> str:
        return (f"dp {self.dp} tp {self.tp} pp {self.pp} cp {self.cp} ep {self.ep} zero {self.zero} "
                f"microbatch {self.microbatch} recompute {self.recompute} v {self.interleave}")


@dataclass(frozen=True)
class Estimate:
    """What a layout costs."""
    layout: ClusterLayout
    seconds: dict[str, float]  # of one step, by part
    memory: dict[str, float]  # bytes per GPU, by part, on the fullest stage
    mfu: float
    hfu: float  # recomputed FLOPs count too
    capacity: float  # bytes that a GPU can give

    @property
    def step(self) -> float:
        """Seconds of one optimizer step."""
        return sum(self.seconds.values())

    @property
    def bytes(self) -> float:
        """Bytes per GPU."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a GPU holds it."""
        return self.bytes <= self.capacity

    @property
    def exposed(self) -> float:
        """Share of the step in which a GPU waits for communication alone."""
        return sum(self.seconds[part] for part in ("tp", "cp", "ep", "pp", "dp")) / self.step


def check_layout(model: Any, layout: ClusterLayout, batch_tokens: int, context: int) -> int:
    """Microbatches per step and rank, M; ValueError that says why a layout is impossible."""
    o = layout
    for name in ("dp", "tp", "pp", "cp", "ep", "microbatch", "interleave"):
        if not isinstance(value := getattr(o, name), int) or value < 1:
            raise ValueError(f"{name} must be a whole number and at least 1, got {value!r}")
    if o.zero not in (0, 1, 2, 3) or o.recompute not in RECOMPUTE:
        raise ValueError(f"zero must be in 0 .. 3 and recompute one of {', '.join(RECOMPUTE)}, "
                         f"got {o.zero} and {o.recompute!r}")
    if batch_tokens < 1 or context < 1:
        raise ValueError(f"batch_tokens and context must be at least 1, got {batch_tokens} and {context}")
    if model.n_heads % o.tp:
        raise ValueError(f"tp {o.tp} does not divide {model.n_heads} heads")
    if o.pp > model.n_layers or o.interleave > -(-model.n_layers // o.pp) or (o.pp == 1 and o.interleave > 1):
        raise ValueError(f"{model.n_layers} layers cannot be cut into pp {o.pp} x {o.interleave} chunks")
    if context % o.cp:
        raise ValueError(f"cp {o.cp} does not divide a context of {context}")
    if model.experts % o.ep or (o.dp * o.cp) % o.ep:
        raise ValueError(f"ep {o.ep} must divide {model.experts} experts and dp * cp = {o.dp * o.cp}")
    sequences, rest = divmod(batch_tokens, context)
    if rest or sequences % (o.dp * o.microbatch):
        raise ValueError(f"{batch_tokens} tokens are no multiple of dp {o.dp} x microbatch {o.microbatch} x "
                         f"context {context}")
    return sequences // (o.dp * o.microbatch)


# --- 2. its cost ----------------------------------------------------------------------------

def weights_per_gpu(model: Any, layout: ClusterLayout) -> list[tuple[float, int, int]]:
    """[(weights, stride, ranks)]: weights that a GPU of the fullest stage computes with, and over how many ranks,
    ``stride`` apart, ZeRO can divide them: first those that every rank has, then experts, which fewer ranks share."""
    o, most = layout, -(-model.n_layers // layout.pp)
    tables = 1 if o.pp > 1 or model.tied else 2  # embedding and head
    embeddings = (tables * model.vocab_size + model.learned_positions * model.context) * model.d_model
    if model.experts == 1:
        return [((most * model.layer_parameters(1) + embeddings) / o.tp, o.tp, o.dp * o.cp)]
    experts = most * model.experts * model.expert_weights / (o.tp * o.ep)
    return [((most * model.layer_parameters(0) + embeddings) / o.tp, o.tp, o.dp * o.cp),
            (experts, o.tp * o.ep, o.dp * o.cp // o.ep)]


def memory_per_gpu(model: Any, layout: ClusterLayout, microbatches: int, context: int) -> dict[str, float]:
    """Bytes by part on the first stage, which keeps the most microbatches (Korthikanti et al. 2022, section 4.2.3)."""
    o, parts, most = layout, weights_per_gpu(model, layout), -(-model.n_layers // layout.pp)
    n = o.microbatch * context // o.cp  # tokens of a microbatch on one GPU

    def divided(stage: int) -> float:
        return sum(size / (ranks if o.zero >= stage else 1) for size, _, ranks in parts)

    def layer(recompute: str) -> float:
        stream, others = model.activation_values(context, recompute, o.flash, dropout=not o.flash)
        return 2 * n * (stream / (o.tp if o.sequence_parallel else 1) + others / o.tp)

    flight = o.pp if o.interleave == 1 else o.pp + (o.pp - 1) / o.interleave
    gathered = 2 * sum(size for size, _, _ in parts) / most if o.zero == 3 else 0.0  # this layer, the next
    return {"weights": 2 * (divided(3) + gathered), "gradients": 4 * divided(2), "optimizer": 12 * divided(1),
            "activations": most * min(microbatches, flight) * layer(o.recompute)
            + (layer("none") if o.recompute != "none" else 0.0),  # the one that is computed again
            "logits": 8 * n * model.vocab_size / o.tp if o.pp == 1 else 0.0, "reserved": RESERVED}


def estimate(model: Any, chip: Any, layout: ClusterLayout, batch_tokens: int, context: int,
             causal: bool = True) -> Estimate:
    """Seconds, bytes and utilisation of one optimizer step.

    Args:
        model, chip: a scaling.ModelShape and a scaling.Accelerator.
        batch_tokens, context: tokens of a step over all GPUs, and of a sequence.
        causal: MFU counts half of the attention matrix, as a causal kernel computes; False counts all of it,
            as papers before FlashAttention do.
    Raises:
        ValueError: for a layout that cannot be.
    """
    o, D = layout, model.d_model
    M = check_layout(model, o, batch_tokens, context)
    n = o.microbatch * context // o.cp  # tokens of a microbatch on one GPU
    product_rate, memory_rate = MATMUL * chip.matmul * chip.best, STREAM * chip.bandwidth

    def ring(size: float, stride: int, ranks: int) -> float:
        """Seconds of one reduce-scatter or all-gather of ``size`` bytes over ``ranks`` that are ``stride`` apart."""
        if ranks == 1:
            return 0.0
        members = max(1, chip.node // stride)
        rate = chip.link if stride * ranks <= chip.node else min(chip.link, members * chip.network)
        return (ranks - 1) / ranks * size / (LINK * rate) + LATENCY

    # One layer, one microbatch: seconds forward.
    dense, experts = model.attention_weights, model.experts_per_token * model.expert_weights
    held = dense + model.expert_weights * model.experts / o.ep  # weights that are read
    products = max(2 * n * (dense + experts) / o.tp / product_rate, 2 * held / o.tp / memory_rate)
    scores = 4 * n * context * model.n_heads * model.d_head / o.tp / (2 if o.flash else 1)
    attention = scores / (chip.attention * chip.best)
    stream, others = model.activation_values(context, "none", o.flash, dropout=not o.flash)
    stream_ranks = o.tp if o.sequence_parallel else 1
    pointwise = 2 * n * (stream / stream_ranks + others / o.tp) / memory_rate  # one pass over all activations
    all_reduces = 1 if model.parallel else 2
    tp = all_reduces * 2 * ring(2 * n * D, 1, o.tp)
    # Ring attention: keys and values pass by while the scores of the last block are computed.
    kv = 4 * n * o.cp * model.n_kv_heads * model.d_head / min(o.tp, model.n_kv_heads)
    cp = max(0.0, ring(kv, o.tp, o.cp) - attention), max(0.0, 2 * ring(kv, o.tp, o.cp) - 2 * attention)
    ep = 2 * ring(2 * n * D * model.experts_per_token / o.tp, o.tp, o.ep)  # there and back
    again = int(o.recompute == "block")  # a second forward, in backward
    passes = 5 + 2 * again + 2 * (o.recompute == "selective")
    # Selective recomputation repeats the scores, but where a fused kernel has stored none.
    scores_again = attention if o.recompute == "selective" and not o.flash else again * attention
    layer = {"products": (3 + again) * products, "attention": 3 * attention + scores_again,
             "pointwise": passes * pointwise, "tp": (2 + again) * tp,
             "cp": cp[0] * (1 + again) + cp[1], "ep": (2 + again) * ep}

    # One stage. Where layers do not divide, the last stage has one layer less, and room for the head.
    most, last = -(-model.n_layers // o.pp), model.n_layers // o.pp
    head = 3 * 2 * n * D * model.vocab_size / o.tp / product_rate + 5 * 4 * n * model.vocab_size / o.tp / memory_rate
    per_layer = sum(layer.values())
    slowest_is_last = o.pp == 1 or last * per_layer + head > most * per_layer
    stage = {part: value * (last if slowest_is_last else most) for part, value in layer.items()}
    stage["head"] = head if slowest_is_last else 0.0
    boundary = 2 * n * D / stream_ranks
    sent = 0.0 if o.pp == 1 else boundary / (LINK * (chip.link if o.gpus <= chip.node else chip.network)) + LATENCY
    stage["pp"] = 2 * o.interleave * sent
    seconds = {part: M * value for part, value in stage.items()}
    seconds["bubble"] = (o.pp - 1) / o.interleave * sum(stage.values())

    # What data parallelism moves: gradients in fp32, weights in 16 bits.
    parts = weights_per_gpu(model, o)
    gather = sum(ring(2 * size, stride, ranks) for size, stride, ranks in parts if size)
    scatter = sum(ring(4 * size, stride, ranks) for size, stride, ranks in parts if size)
    forward, backward = sum(stage.values()) / 3, sum(stage.values()) * 2 / 3  # what a microbatch can hide
    if o.zero == 3:  # weights are gathered in both, for every microbatch
        seconds["dp"] = M * (max(0.0, gather - forward) + max(0.0, gather + scatter - backward))
    else:  # gradients hide behind the last backward, ZeRO-2's behind each; then new weights (stage 0: gradients) come
        rounds = M if o.zero == 2 else 1
        seconds["dp"] = rounds * max(0.0, scatter - backward) + (2 * gather if o.zero == 0 else gather)
    divided = sum(size / (ranks if o.zero else 1) for size, _, ranks in parts)
    seconds["optimizer"] = divided * 30 / chip.bandwidth  # 12 bytes read and written, 4 and 2 more

    flops = model.training_flops(context, causal) * batch_tokens
    layers_again = (model.forward_flops(context, causal) - 2 * D * model.vocab_size) * batch_tokens * again
    available = sum(seconds.values()) * o.gpus * chip.best
    memory = memory_per_gpu(model, o, M, context)
    return Estimate(o, seconds, memory, flops / available, (flops + layers_again) / available, USABLE * chip.memory)


# --- 3. all layouts -------------------------------------------------------------------------

def _powers(limit: int) -> list[int]:
    return [2**i for i in range(limit.bit_length())]


def layouts(model: Any, chip: Any, gpus: int, batch_tokens: int, context: int) -> Iterator[ClusterLayout]:
    """Every possible layout of so many GPUs: tp inside a node, powers of two for tp, cp, ep and the microbatch."""
    for tp in (t for t in _powers(min(chip.node, 64)) if gpus % t == 0 and model.n_heads % t == 0):
        for pp in (p for p in range(1, model.n_layers + 1) if gpus // tp % p == 0):
            most = -(-model.n_layers // pp)
            for cp in (c for c in _powers(max(1, context // 4096)) if gpus // tp // pp % c == 0 and context % c == 0):
                dp, sequences = gpus // (tp * pp * cp), batch_tokens // context
                if sequences % dp:
                    continue
                for ep in (e for e in _powers(model.experts) if model.experts % e == 0 and (dp * cp) % e == 0):
                    for microbatch in (b for b in (1, 2, 4, 8) if sequences // dp % b == 0):
                        interleaves = pp > 1 and sequences // dp // microbatch % pp == 0
                        for v in (v for v in (1, 2, 3, 4, 5, 6, 8, 16) if v == 1 or interleaves and most % v == 0):
                            for zero in ((1, 2, 3) if dp * cp > 1 else (0,)):
                                for recompute in RECOMPUTE:
                                    yield ClusterLayout(dp, tp, pp, cp, ep, zero, microbatch, recompute, v)


def plan(model: Any, chip: Any, gpus: int, batch_tokens: int, context: int) -> list[Estimate]:
    """The layouts that fit, the fastest first.

    Raises:
        ValueError: for sizes that cannot be; for a cluster too small: how much memory the leanest layout takes, and
            how many GPUs would do.
    """
    if gpus < 1 or batch_tokens < context or batch_tokens % context:
        raise ValueError(f"want at least one GPU and a batch of whole sequences, got {gpus} GPUs and {batch_tokens} "
                         f"tokens of context {context}")

    def tried(number: int) -> list[Estimate]:
        return [estimate(model, chip, layout, batch_tokens, context)
                for layout in layouts(model, chip, number, batch_tokens, context)]

    found = tried(gpus)
    fitting = sorted((e for e in found if e.fits), key=lambda e: (e.step, e.bytes))
    if fitting:
        return fitting
    reason = f"{gpus} GPUs cannot share {batch_tokens // context} sequences and {model.n_layers} layers evenly"
    if found:
        reason = (f"{gpus} GPUs are too few: the leanest of {len(found)} layouts takes "
                  f"{min(e.bytes for e in found) / 1e9:.0f} GB per GPU, there are {chip.memory / 1e9:.0f}")
    nearest = sorted(_powers(2**20), key=lambda number: (number < gpus, abs(number - gpus)))  # more first
    enough = next((number for number in nearest if any(e.fits for e in tried(number))), None)
    raise ValueError(f"{reason}; " + (f"{enough} GPUs would do" if enough else
                                      "no power of two would do: change the context or the batch"))


# --- 4. published runs ----------------------------------------------------------------------

ASSUMED = """layouts and rates of papers are quoted from memory: look them up where the last column says. Llama 3 is no
blind test: a first version with one share of the peak for all chips was 19.5, 15.5 and 23% too fast there, and got
shares per chip for it. Not published, and assumed: microbatch 1, and one or two chunks of layers (v), where a paper is
silent; pp 16 of 175B on 1024 A100; microbatch 4 of PaLM; for Llama 3 one layer per chunk (v = 8), selective
recomputation (it frees memory by hand) and MFUs that count half of the attention matrix, which matters at 128k: counted
in full its FLOPs are 1.4 times as many. The last run's width is that of its source's 298 layers."""


@dataclass(frozen=True)
class PublishedRun:
    """A run with the layout and the speed that its authors report."""
    name: str
    model: Any
    chip: str
    layout: ClusterLayout
    batch_tokens: int
    context: int
    mfu: float | None  # None: none was published
    causal: bool  # how its authors count attention
    source: str


def published_runs() -> list[PublishedRun]:
    """What ``--validate`` is judged by. Rates published with recomputed FLOPs are converted to MFU by the formula."""
    import scaling

    def with_recomputation(model: Any, teraflops: float) -> float:
        model_flops, head = model.training_flops(), 6 * model.d_model * model.vocab_size
        return teraflops / 312 * model_flops / ((model_flops - head) * 4 / 3 + head)

    runs, llama = [], scaling.MODELS["llama3_405b"]
    megatron_2021 = dict(zero=0, recompute="block", sequence_parallel=False, flash=False)
    # layers, width, heads, tp, pp, GPUs, sequences, TFLOP/s per GPU; v as assumed
    table = [(24, 2304, 24, 1, 1, 32, 512, 137), (30, 3072, 32, 2, 1, 64, 512, 138),
             (36, 4096, 32, 4, 1, 128, 512, 142), (40, 6144, 48, 8, 1, 256, 1024, 135),
             (48, 8192, 64, 8, 2, 512, 1536, 138), (60, 10240, 80, 8, 4, 1024, 1792, 140),
             (80, 12288, 96, 8, 8, 1536, 2304, 148), (96, 16384, 128, 8, 16, 1920, 2160, 155),
             (105, 20480, 128, 8, 35, 2520, 2520, 163), (128, 25600, 160, 8, 64, 3072, 3072, 163)]
    rows = [(*row, 1 if row[4] == 1 else 2 - row[0] // row[4] % 2, "Narayanan 2021, table 1") for row in table]
    rows.append((96, 12288, 96, 8, 16, 1024, 1536, 140, 2, "Narayanan 2021, section 5.1"))
    rows += [(96, 12288, 96, 8, 12, gpus, 1536, rate, 1, "Narayanan 2021, table 2")
             for gpus, rate in ((384, 153), (768, 149), (1536, 141))]
    rows += [(105, 20480, 128, 8, 35, gpus, 2240, rate, 1, "Narayanan 2021, table 2")
             for gpus, rate in ((560, 171), (1120, 167), (2240, 159))]
    rows += [(105, 20480, 128, 8, 35, gpus, 1920, rate, 1, "Smith 2022 (MT-NLG), section 2.4")
             for gpus, rate in ((2240, 126), (2800, 121), (3360, 113))]
    for layers, width, heads, tp, pp, gpus, sequences, rate, v, source in rows:
        model = scaling.gpt_shape(layers, width, heads, 2048, 51200)
        layout = ClusterLayout(gpus // (tp * pp), tp, pp, interleave=v, **megatron_2021)
        runs.append(PublishedRun(f"{model.parameters / 1e9:.1f}B on {gpus} A100", model, "a100", layout,
                                 sequences * 2048, 2048, with_recomputation(model, rate), False, source))
    for layers, width, heads, pp, sequences, v, microbatch, mfu in (
            (48, 6144, 64, 1, 4, 1, 4, 0.415), (96, 12288, 96, 8, 64, 3, 1, 0.514),
            (105, 20480, 128, 35, 280, 3, 1, 0.560), (128, 25600, 160, 64, 512, 1, 1, 0.563)):
        model = scaling.gpt_shape(layers, width, heads, 2048, 51200)
        layout = ClusterLayout(1, 8, pp, zero=0, microbatch=microbatch, recompute="selective", interleave=v,
                               flash=False)
        runs.append(PublishedRun(f"{model.parameters / 1e9:.1f}B on {8 * pp} A100", model, "a100", layout,
                                 sequences * 2048, 2048, mfu, False, "Korthikanti 2022, table 5"))
    runs.append(PublishedRun("PaLM 540B on 6144 TPU v4", scaling.MODELS["palm_540b"], "tpu_v4", ClusterLayout(
        512, 12, zero=3, recompute="block", microbatch=4, flash=False), 2**22, 2048, 0.462, False,
        "Chowdhery 2022, table 3"))
    for dp, cp, context, mfu in ((64, 1, 8192, 0.43), (128, 1, 8192, 0.41), (8, 16, 131072, 0.38)):
        layout = ClusterLayout(dp, 8, 16, cp, recompute="selective", interleave=8)
        runs.append(PublishedRun(f"Llama 3 405B on {layout.gpus} H100, {context // 1024}k", llama, "h100", layout,
                                 2**24, context, mfu, True, "Grattafiori 2024, table 4"))
    lecture = ClusterLayout(8, 8, 64, recompute="block", flash=False)
    runs.append(PublishedRun("256 layers, lecture's 8 x 64 x 8", scaling.gpt_shape(256, 17408, 136, 2048, 51200),
                             "a100", lecture, 2**22, 2048, None, False, "no rate published"))
    return runs


# --- 5. demo --------------------------------------------------------------------------------

def show_plan(name: str, gpus: int = 1024, gpu: str = "h100", tokens: float = 1e12, context: int | None = None,
              batch_tokens: int | None = None, plot: str | None = None) -> None:
    """Print the ten fastest layouts and what the best one costs."""
    import scaling

    model, chip = scaling.pick(scaling.MODELS, name, "model"), scaling.pick(scaling.ACCELERATORS, gpu, "GPU")
    context = model.context if context is None else context
    if context < 1:
        raise ValueError(f"--context must be at least 1, got {context}")
    batch = max(1, model.batch_tokens // context) * context if batch_tokens is None else batch_tokens
    if not (math.isfinite(tokens) and tokens > 0):
        raise ValueError(f"--tokens must be positive and finite, got {tokens}")
    figure = scaling.new_figure(plot, 9, 5)
    found = plan(model, chip, gpus, batch, context)
    print(f"{name}: {model.parameters:,} parameters, {tokens:.3g} tokens, {batch:,} per step, context {context}, "
          f"on {gpus} {gpu}; {len(found)} layouts fit\n")
    parts = ("weights", "gradients", "optimizer", "activations", "logits")
    print(f"  dp tp  pp cp ep zero mb recompute  v  step s   MFU  GB = {RESERVED / 1e9:.0f} + "
          + " + ".join(part[:8] for part in parts) + "  bubble exposed   days   million $")
    for e in found[:10]:
        o, seconds = e.layout, tokens / batch * e.step
        print(f"{o.dp:4} {o.tp:2} {o.pp:3} {o.cp:2} {o.ep:2} {o.zero:4} {o.microbatch:2} {o.recompute:9} "
              f"{o.interleave:2} {e.step:7.2f} {e.mfu:5.1%} {e.bytes / 1e9:3.0f}     "
              + "".join(f"{e.memory[part] / 1e9:10.1f} " for part in parts)
              + f"{e.seconds['bubble'] / e.step:9.1%} {e.exposed:7.1%} {seconds / 86400:6.1f} "
              f"{scaling.training_cost(seconds, gpus, chip.dollars)[1] / 1e6:11,.2f}")
    best = found[0]
    print("\nseconds of the best: " + ", ".join(f"{part} {s:.2f}" for part, s in best.seconds.items() if s >= 0.005))
    if figure is not None:
        axes = figure.add_subplot()
        names, left = [str(e.layout) for e in found[:10]], [0.0] * len(found[:10])
        for part in best.seconds:
            widths = [e.seconds[part] for e in found[:10]]
            axes.barh(names, widths, left=left, label=part)
            left = [a + b for a, b in zip(left, widths)]
        axes.set(xlabel="seconds per step")
        axes.invert_yaxis()  # the best on top
        figure.legend(loc="outside right upper")
        scaling.save_figure(figure, plot)
    seconds = tokens / batch * best.step
    gpu_days, dollars = scaling.training_cost(seconds, gpus, chip.dollars)
    print(f"best: {best.layout}: MFU {best.mfu:.1%} (half of the attention matrix counted), {batch / best.step:,.0f} "
          f"tokens/s, {seconds / 86400:.1f} days, {gpu_days:,.0f} GPU-days, {dollars:,.0f} dollars")


def show_validation(plot: str | None = None) -> None:
    """Print the planner's MFU beside the published one, for every run."""
    import scaling

    figure = scaling.new_figure(plot, 9, 5)
    print(f"{'run':37}{'layout: tp pp cp dp':21}{'GB':>4} {'planned':>8}{'published':>10}{'off by':>8}  source")
    pairs = []
    for run in published_runs():
        e = estimate(run.model, scaling.ACCELERATORS[run.chip], run.layout, run.batch_tokens, run.context, run.causal)
        o = run.layout
        pairs += [(run.mfu, e.mfu)] if run.mfu else []
        compared = f"{run.mfu:10.1%}{e.mfu / run.mfu - 1:+8.1%}" if run.mfu else " " * 18
        print(f"{run.name:37}{'':8}{o.tp:2} {o.pp:2} {o.cp:2} {o.dp:3} {e.bytes / 1e9:6.0f} {e.mfu:8.1%}{compared}"
              f"  {run.source}")
    if figure is not None:
        axes = figure.add_subplot()
        axes.plot(*zip(*pairs), "o")
        axes.plot([0.2, 0.6], [0.2, 0.6], "k-", [0.2, 0.6], [0.24, 0.72], "k:", [0.2, 0.6], [0.16, 0.48], "k:")
        axes.set(xlabel="published MFU", ylabel="planned MFU (dotted: 20% off)")
        scaling.save_figure(figure, plot)
    print(ASSUMED)
    inside = sum(abs(ours / theirs - 1) <= 0.2 for theirs, ours in pairs)
    print(f"planned MFU within 20% of the published one: {inside} of {len(pairs)} runs (expected 25)")


def main(plan: str | None, validate: bool, **flags: str | float | None) -> None:
    if validate == (plan is not None):
        raise ValueError("give --plan MODEL or --validate, one of them")
    given = {name: value for name, value in flags.items() if value is not None}
    if validate and (idle := set(given) - {"plot"}):
        raise ValueError(f"--{min(idle)} means nothing beside --validate")
    show_validation(**given) if validate else show_plan(plan, **given)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--plan", metavar="MODEL", help="rank the layouts of a model, such as llama3_405b")
    parser.add_argument("--gpus", type=int, help="chips of the cluster (default 1024)")
    parser.add_argument("--gpu", help="a chip of scaling.ACCELERATORS (default h100)")
    parser.add_argument("--tokens", type=float, help="to train on (default 1e12)")
    parser.add_argument("--context", type=int, help="tokens per sequence (default: the model's)")
    parser.add_argument("--batch_tokens", type=int, help="tokens per step (default: as published)")
    parser.add_argument("--validate", action="store_true", help="the planner beside published runs")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it (needs matplotlib)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
