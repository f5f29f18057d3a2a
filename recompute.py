"""Activation recomputation: keep less of forward, and compute it again for backward.   Chen et al. 2016 (1604.06174)

Idea      Backward needs what forward computed: the inputs of every layer, of every nonlinearity. Kept, that is most of
          a training step's memory. So a piece of the network keeps nothing but its input; when its backward begins, its
          forward is run once more, with the same dropout. A step costs one more forward of the piece.
Formula   values kept per token and layer, of width D, heads H Dh = D, keys Hkv Dh, hidden width Dff
            none        all of the layer: 34 D bytes in 16 bits with dropout, about      Korthikanti et al. 2022, eq. 1
            attention   2 H Dh + 2 Hkv Dh fewer: q, k, v and the heads' outputs
            block       D: the layer's input, and one layer in full while it is computed again
          a step of 2 + 4 FLOPs per weight and token becomes 2 + 2 + 4: 4/3 of it, with block
Shapes    x (B, T, D) -> block(x) (B, T, D), the same numbers to the last bit
Omits     keeping the products and recomputing what is cheap (Korthikanti's selective one, by operator), offload
          of activations, a choice of layers by cost (Chen et al. 2016's square root of L).
Run       python recompute.py                       bytes kept and time of a step, each way, 20 s
          python recompute.py --context 512         longer texts
          python train.py --recompute block --out out/block   a training run with it
          The demo ends with "max |gradient - gradient of none| = ..."
Test      pytest tests/test_recompute.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

WAYS = ("none", "attention", "block")


# --- 1. the idea, as it reads --------------------------------------------------------------------------

class _Recompute(torch.autograd.Function):
    """function(x), of which backward keeps x alone."""

    @staticmethod
    def forward(ctx, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.random = function, torch.get_rng_state()
        with torch.no_grad():  # nothing inside is kept
            return function(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.random)  # dropout has to drop the same again
        with torch.enable_grad():
            y = ctx.function(x)
        torch.set_rng_state(now)
        y.backward(dy)  # adds the parameters' gradients, and x's
        return x.grad, None


def naive_recompute(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), with gradients for x and all parameters in the function, keeping x alone. x needs a gradient.

    ``torch.utils.checkpoint`` is the same for any arguments, devices and autocast; it needs no gradient of x, and fills
    in what backward asks for instead of running a backward of its own. ValueError if x needs none.
    """
    if torch.is_grad_enabled() and not x.requires_grad:
        raise ValueError("naive_recompute of an x without requires_grad: nothing in the function would get a gradient")
    return _Recompute.apply(x, function)


# --- 2. a model that recomputes ------------------------------------------------------------------------

def recompute(model: nn.Module, what: str) -> nn.Module:
    """Make a model of the contract recompute its blocks, or the attention in them, in place; returns it.

    Names and numbers stay as they are; without gradients (decoding, validation) nothing changes.
    Raises ValueError for a ``what`` that is not in WAYS, and for blocks with experts, which count who visits them.
    """
    if what not in WAYS:
        raise ValueError(f"what must be one of {', '.join(WAYS)}, got {what!r}")
    if what == "block" and any(hasattr(getattr(block, "mlp", None), "n_experts") for block in model.blocks):
        raise ValueError("experts would count their visits twice: recompute attention, not block")
    for block in model.blocks if what != "none" else ():
        module = getattr(block, "attention", None) if what == "attention" else block
        if module is not None and any(True for _ in module.parameters()):  # not where another stage has the block
            module.forward = _again(module.forward)
    return model


def _again(forward: Callable) -> Callable:
    def run(*arguments, **keywords):
        if not torch.is_grad_enabled():
            return forward(*arguments, **keywords)
        return checkpoint(forward, *arguments, use_reentrant=False, **keywords)
    return run


# --- 3. what is kept -----------------------------------------------------------------------------------

def values_kept(config, what: str, gated: bool) -> float:
    """Values that one layer keeps for backward per token, without dropout and with fused attention.

    config: n_heads, n_kv_heads, d_model, d_ff. gated: Llama's layer (RMSNorm, SwiGLU), else GPT's (LayerNorm, GELU).
    """
    if what not in WAYS:
        raise ValueError(f"what must be one of {', '.join(WAYS)}, got {what!r}")
    D = config.d_model
    keys = config.n_kv_heads * D // config.n_heads
    if what == "block":
        return D
    norms = 6 * D if gated else 4 * D  # what enters and leaves each; RMSNorm keeps x / rms(x), too
    hidden = 4 * config.d_ff if gated else 2 * config.d_ff  # gate, up, silu(gate) and their product; up, gelu(up)
    attention = 2 * D + 2 * keys if what == "none" else 0
    return norms + attention + hidden


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for backward while ``forward()`` runs: each storage once, parameters left out."""
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # alive to the end of the count
    del result
    return sum(storage.nbytes() for storage in storages.values())


# --- 4. demo -------------------------------------------------------------------------------------------

def main(kind: str, n_layers: int, d_model: int, context: int, repeats: int, seed: int) -> None:
    if min(n_layers, context, repeats) < 1 or d_model < 8 or d_model % 8:
        raise ValueError("--n_layers, --context and --repeats must be at least 1, --d_model a multiple of 8, got "
                         f"{n_layers}, {context}, {repeats} and {d_model}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be in 0 .. 2^32 - 1, got {seed}")
    from models import build

    sizes = {"vocab_size": 256, "context": context, "n_layers": n_layers, "n_heads": 4, "d_model": d_model}
    if kind == "llama":
        sizes |= {"n_kv_heads": 2, "d_ff": 4 * d_model}
    B, T = 4, context
    tokens = torch.randint(256, (B, T), generator=torch.Generator().manual_seed(seed))
    ways = {}
    for what in WAYS:
        ways[what] = recompute(build(kind, sizes, generator=torch.Generator().manual_seed(seed)), what)

    def step(model: nn.Module) -> Tensor:
        x = model.embed(tokens)
        for block in model.blocks:
            x = block(x)
        return x  # (B, T, D)

    times, bytes_kept, gradients = {what: [] for what in WAYS}, {}, {}
    for what, model in ways.items():
        bytes_kept[what] = saved_bytes(lambda model=model: step(model), model.parameters())
    for _ in range(repeats):
        for what, model in ways.items():
            began = time.perf_counter()
            step(model).square().mean().backward()
            times[what].append(time.perf_counter() - began)
            gradients[what] = [p.grad for p in model.blocks.parameters()]
            model.zero_grad()
    print(f"{kind}, {n_layers} layers of width {d_model}, {B} texts of {T} tokens, fp32")
    print(f"{'recompute':10} {'kept, MB':>9} {'formula':>9} {'ratio':>6} {'a step, ms':>11} {'of none':>8}   expected")
    worst = difference = 0.0
    for what, model in ways.items():
        formula = 4 * B * T * n_layers * values_kept(model.config, what, kind == "llama")
        milliseconds = {way: statistics.median(times[way]) * 1e3 for way in WAYS}
        expected = {"none": "1", "attention": "1.1", "block": "1.33"}[what]
        worst = max(worst, abs(bytes_kept[what] / formula - 1))
        pairs = zip(gradients[what], gradients["none"])
        errors = [(a - b).abs().max().item() for a, b in pairs]
        difference = torch.tensor([difference, *errors]).max().item()  # Python's max would lose a NaN
        print(f"{what:10} {bytes_kept[what] / 1e6:9.2f} {formula / 1e6:9.2f} {bytes_kept[what] / formula:6.3f} "
              f"{milliseconds[what]:11.1f} {milliseconds[what] / milliseconds['none']:8.2f}   {expected}")
    print(f"max |gradient - gradient of none| = {difference:.0e} (expected 0); bytes within {worst:.1%} of the formula "
          "(expected below 5%)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--model", dest="kind", choices=("gpt", "llama"), default="gpt",
                        help="whose blocks (default %(default)s)")
    parser.add_argument("--n_layers", type=int, default=6, help="blocks (default %(default)s)")
    parser.add_argument("--d_model", type=int, default=256,
                        help="width of the model, a multiple of 8 (default %(default)s)")
    parser.add_argument("--context", type=int, default=256, help="tokens of a text (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="steps to time (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
