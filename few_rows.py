"""Products of few rows: decoding reads every weight for every token, and waits for that.

Idea      A decoding step multiplies one row, or a few, by every matrix of the model. Each weight is read from
          memory and used once a row, so memory sets the pace and not arithmetic (the roofline of Williams et al.
          2009). torch's own product may then read at a fraction of memory's speed, by one core of several, or
          because it converts every bf16 weight to fp32 on the way. Here are the products that read fastest on
          CPUs, behind F.linear's interface; a GPU's F.linear is left as it is.
Formula   y = x W^T + b: 2 * R * in * out operations on s * in * out bytes of weights (s bytes each): 2 R / s a byte.
          seconds >= s * in * out / bandwidth: where a token reads N parameters, at most bandwidth / (N s) tokens/s
          P cores read at once: P blocks of outputs, y = [W_1 x; ...; W_P x], or of inputs, y = W_1 x_1 + ... + W_P x_P
Shapes    x (..., in), W (out, in), b (out,) -> y (..., out); R is the product of the sizes in ...
Also      THP_MEM_ALLOC_ENABLE=1 in the environment before torch's first tensor: on Linux large tensors then lie in
          pages of 2 MB instead of 4 KB, and weights are read 3 to 8% faster. `python decode.py` sets it for itself.
Omits     quantised weights (fewer bytes, another model), products in a GPU's kernels.
Run       python few_rows.py               GB/s of every way at 1, 2, 8, 32 rows, beside a plain sum's: 20 s;
                                           ends with "max |fast - x W^T| = ...: OK"
          python few_rows.py --dtype bfloat16 --d_model 1024
Test      pytest tests/test_few_rows.py
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


# --- 1. one row ------------------------------------------------------------------------------

def row_product(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """A function from one row x (in,) to W x + b (out,): the product that was measured fastest for a weight (out, in)
    of this type and size on such a CPU, with torch's number of threads now. For inference: it keeps views of the
    weight, and knows nothing of one that is put in its place later."""
    # torch's matrix times vector: reads bf16 up to 1.5 times as fast as its product of two matrices; fp32 not where
    # MKL does both.
    if weight.dtype == torch.bfloat16:
        by_vector = _has_avx512() and weight.is_contiguous()
    else:
        by_vector = weight.dtype == torch.float32 and not _leaves_rows_to_one_core()
    if by_vector:
        return lambda x: torch.mv(weight, x) if bias is None else torch.addmv(bias, weight, x)
    # Below 1 MB another core brings less than it costs to wake it.
    is_cut = weight.dtype == torch.float32 and weight.numel() >= 2**18 and torch.get_num_threads() > 1
    return row_in_parts(weight, bias) if is_cut else lambda x: F.linear(x, weight, bias)


def row_in_parts(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """``row_product`` in as many parts at once as torch has threads: a product of one row may be left to one core,
    which cannot read W as fast as memory gives it. Of a batch of products, bmm, each is given to a core of its own.
    All wait for the slowest part: beside other work on all cores OMP_NUM_THREADS=1 is faster."""
    P, (out, width) = torch.get_num_threads(), weight.shape
    if weight.is_contiguous():
        share = out // P  # each part makes some of the outputs
        parts, rest = weight[:P * share].view(P, share, width).mT, weight[P * share:]  # (P, in, share)

        def by_outputs(x: Tensor) -> Tensor:
            y = torch.bmm(x.expand(P, 1, width), parts).view(P * share)  # one matrix for each core
            y = y if P * share == out else torch.cat((y, F.linear(x, rest)))  # (out,)
            return y if bias is None else y + bias
        return by_outputs
    if weight.mT.is_contiguous():
        share, columns = width // P, weight.mT  # each takes some of the inputs
        parts, rest = columns[:P * share].view(P, share, out), columns[P * share:]

        def by_inputs(x: Tensor) -> Tensor:
            terms = torch.bmm(x[:P * share].view(P, 1, share), parts)[:, 0].unbind()  # P of (out,)
            y = functools.reduce(torch.add, terms if bias is None else (bias, *terms))
            return y if P * share == width else y + x[P * share:] @ rest
        return by_inputs
    return lambda x: F.linear(x, weight, bias)


def _has_avx512() -> bool:
    """Whether torch uses AVX-512 here: without it, it converts bf16 one product at a time."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def _leaves_rows_to_one_core() -> bool:
    """Whether products of few rows are left to one core: torch cannot say; taken from whether the processor has AMX,
    without which MKL did so where it was measured."""
    return not torch.cpu._is_amx_tile_supported()


def one_row_layout(model: nn.Module) -> None:
    """Make decoding one row on a CPU in fp32 faster: a matrix (out, in) with out > in is read 1.1 to 1.8 times as fast
    if it is stored by columns, so store it so, in place, experts' too; the values stay. For bf16, for several rows
    and for training plain weights are better: ``p.data = p.data.contiguous()`` of every parameter p undoes it."""
    for p in model.parameters():
        if p.dim() >= 2 and p.size(-2) > p.size(-1) and p.dtype == torch.float32 and p.device.type == "cpu":
            p.data = p.data.mT.contiguous().mT


# --- 2. several rows: weights in blocks, as the library's inner loop reads them ---------------

# id of a weight -> the weight, its version when it was copied, and the copy; inside packed_weights
_packed: dict[int, tuple[Tensor, int, Tensor]] = {}


@contextlib.contextmanager
def packed_weights(model: nn.Module, rows: int) -> Iterator[None]:
    """Inside, decode.py's ``generate`` and ``stream``, and all else that runs in ``FastLinear`` or ``fast_layers``,
    multiply on a CPU by copies of the large weights, packed into the blocks that oneDNN (torch's library for bf16)
    works on: matrices of 2^18 numbers or more, of bf16 where there is AVX-512, of fp32 from two rows up. Up to twice
    as fast.

        from few_rows import packed_weights
        with packed_weights(model, 8):
            for prompts in batches_of_8:
                generate(model, prompts, 100)

    ``rows``: how many there mostly are, for which the copies are tuned. It costs the weights' memory once more and as
    much time as some tens of tokens take. Where torch has no oneDNN, in autocast and where gradients are recorded,
    plain weights are used. Do not train inside: RuntimeError where torch knows that a weight was changed after it was
    copied, but it does not know of fused optimizers' steps and of changes of ``p.data``.
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    kinds = {torch.float32} if rows > 1 else set()  # at one row fp32 is faster as it lies
    kinds |= {torch.bfloat16} if _has_avx512() else set()
    mine, pack = [], getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    if pack is None or not torch.backends.mkldnn.is_available():
        kinds = set()
    try:
        for p in model.parameters():
            is_large = p.dim() == 2 and p.numel() >= 2**18
            if is_large and p.dtype in kinds and p.device.type == "cpu" and id(p) not in _packed:
                _packed[id(p)] = p, _version(p), pack(p.detach().contiguous(), rows)
                mine.append(id(p))
        yield
    finally:
        for key in mine:
            _packed.pop(key, None)  # another thread, with the same model, may have been here


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version  # how many changes torch has counted


def _packed_product(input: Tensor, found: tuple[Tensor, int, Tensor], bias: Tensor | None) -> Tensor:
    weight, version, copy = found
    if version != _version(weight) or copy.dtype != weight.dtype:
        raise RuntimeError("a weight was changed inside packed_weights, which multiplies by copies: leave it, and "
                           "enter it anew")
    return torch.ops.mkldnn._linear_pointwise.default(input, copy, bias, "none", [], "")


# --- 3. the same for a whole model ------------------------------------------------------------

def _is_known(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the products above can take them: (out, in) and (out,) on a CPU, not sparse, nor of a type of its own."""
    return (weight.dim() == 2 and weight.is_cpu and type(weight) in (nn.Parameter, Tensor)
            and weight.layout == torch.strided
            and (bias is None or bias.dtype == weight.dtype and bias.shape == weight.shape[:1]))


class FastLinear(TorchFunctionMode):
    """Inside, and in this thread only, every F.linear of a model on a CPU (its tied head's too) is ``linear``. Not for
    training: where gradients are recorded, and in autocast, it is torch's own."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (FastLinear.linear if function is F.linear else function)(*args, **(kwargs or {}))

    @staticmethod
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None, row: Callable | None = None) -> Tensor:
        """F.linear, input (..., in) -> (..., out), by the product that was measured fastest for so many rows:

            rows   fp32                                           bf16
            1      row_product                                    packed, or row_product
            2-8    packed, or W x^T where few rows get one core   packed, or F.linear
            more   packed, or F.linear                            packed, or F.linear; without AVX-512 of W in fp32

        ``row``: row_product(weight, bias), from a caller that keeps it; None: it is made anew for one row.
        """
        is_known = ((row or _is_known(weight, bias)) and input.dtype == weight.dtype and input.layout == torch.strided
                    and input.shape[-1:] == weight.shape[1:])
        if not is_known or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return F.linear(input, weight, bias)  # and its errors
        rows = input.shape[:-1].numel()
        found = _packed.get(id(weight))
        if found and (rows > 1 or rows == 1 and weight.dtype == torch.bfloat16):
            return _packed_product(input, found, bias)
        if rows == 1:
            y = (row or row_product(weight, bias))(input.reshape(-1))  # (out,)
            return y.view(1, 1, -1) if input.dim() == 3 else y.view(*input.shape[:-1], -1)  # the first is the faster
        if weight.dtype == torch.float32 and 1 < rows <= 8 and weight.is_contiguous() and _leaves_rows_to_one_core():
            x = input.reshape(rows, -1).t()  # (in, rows): W x^T takes down to a third of x W^T's time on two cores
            y = weight @ x if bias is None else torch.addmm(bias[:, None], weight, x)  # (out, rows)
            return y.t().contiguous().view(*input.shape[:-1], -1)
        if weight.dtype == torch.bfloat16 and rows > 8 and not _has_avx512():
            # A copy of W in fp32, made and dropped here, costs less than its conversion for every row: a half to an
            # eighth of the time.
            bias = None if bias is None else bias.float()
            return F.linear(input.float(), weight.float(), bias).to(input.dtype)
        return F.linear(input, weight, bias)


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has had to do with any part of it."""
    return any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules())


@contextlib.contextmanager
def fast_layers(model: nn.Module) -> Iterator[None]:
    """Inside, and for every thread, a model's linear layers on a CPU, and its experts at one token, multiply by
    ``FastLinear.linear``; its LayerNorms have their weights at hand: for one row, to look them up on the module takes
    longer than the norm. Do not replace, move or copy the model's weights inside, nor call it by functional_call.
    (Under the mode FastLinear Python looks at every call of torch, which takes longer than it saves where all products
    are of one row.) A model with compiled parts keeps its layers: torch.compile would compile them anew each time."""
    # A weight that is no parameter (pruned, weight_norm) is made anew by a hook at every call.
    plain = [] if is_compiled(model) else [m for m in model.modules() if "forward" not in vars(m)
                                           and m._parameters.keys() >= {"weight", "bias"}]
    layers = [m for m in plain if type(m) is nn.Linear and _is_known(m.weight, m.bias)]
    norms = [m for m in plain if type(m) is nn.LayerNorm and m.weight is not None and m.weight.is_cpu]
    experts = [m for m in model.modules() if getattr(m, "linear", None) is F.linear]  # moe.py's MoE
    try:
        for m in layers:
            row = row_product(m.weight, m.bias)
            m.forward = functools.partial(FastLinear.linear, weight=m.weight, bias=m.bias, row=row)
        for m in norms:
            m.forward = functools.partial(torch.layer_norm, normalized_shape=m.normalized_shape, weight=m.weight,
                                          bias=m.bias, eps=m.eps)
        for m in experts:
            m.linear = FastLinear.linear
        yield
    finally:
        for m in layers + norms:
            m.__dict__.pop("forward", None)  # another thread, with the same model, may have been here
        for m in experts:
            m.linear = F.linear


# --- 4. demo ----------------------------------------------------------------------------------

def _gigabytes_per_second(product: Callable[[nn.Linear], Tensor], layers: list[nn.Linear], repeats: int) -> float:
    """GB of weights read in a second: the median of ``repeats`` rounds over more of them than a cache holds."""
    rounds = []
    for _ in range(repeats):
        began = time.perf_counter()
        for layer in layers:
            product(layer)
        rounds.append(time.perf_counter() - began)
    weight = layers[0].weight
    return len(layers) * weight.numel() * weight.element_size() / statistics.median(rounds) / 1e9


@torch.inference_mode()
def main(d_model: int, dtype: str, megabytes: int, repeats: int) -> None:
    if min(d_model, megabytes, repeats) < 1:
        raise ValueError(f"--d_model, --megabytes and --repeats must be at least 1, got {d_model}, {megabytes} and "
                         f"{repeats}")
    kind, generator = getattr(torch, dtype), torch.Generator().manual_seed(0)
    shape, per_layer = (4 * d_model, d_model), 4 * d_model**2 * kind.itemsize
    count = max(2, min(10_000, megabytes * 10**6 // per_layer))
    if count * per_layer > 2**33:
        raise ValueError(f"{count} matrices of --d_model {d_model} take {count * per_layer / 1e9:,.0f} GB: lower "
                         "--d_model or --megabytes")
    layers = []
    for _ in range(count):
        layer = nn.Linear(d_model, 4 * d_model, dtype=kind)
        layer.weight.copy_(torch.randn(shape, generator=generator) / d_model**0.5)
        layers.append(layer)
    model, errors = nn.ModuleList(layers), []
    print(f"{count} matrices {shape} of {dtype}, {count * per_layer / 1e6:,.0f} MB, {torch.get_num_threads()} threads; "
          f"weights read, GB/s; a sum reads {_gigabytes_per_second(lambda m: m.weight.sum(), layers, repeats):.1f}")
    print(f"{'rows':>5}{'F.linear':>10}{'fast':>10}{'packed':>10}")  # fp32 is not packed for one row
    for rows in (1, 2, 8, 32):
        x = torch.randn(rows, d_model, generator=generator).to(kind)
        speeds = [_gigabytes_per_second(lambda m: F.linear(x, m.weight, m.bias), layers, repeats)]
        exact = F.linear(x.double(), layers[0].weight.double(), layers[0].bias.double())
        with fast_layers(model):
            ways = [contextlib.nullcontext(), packed_weights(model, rows)]
            for context in ways[:1 if rows == 1 and kind == torch.float32 else 2]:
                with context:
                    speeds.append(_gigabytes_per_second(lambda m: m(x), layers, repeats))
                    errors.append((layers[0](x) - exact).abs().max().item())
        print(f"{rows:5}" + "".join(f"{speed:10.1f}" for speed in speeds), flush=True)
    bound = {torch.float32: 1e-5, torch.bfloat16: 0.05}[kind]  # a few roundings of values of order one
    is_right = all(error < bound for error in errors)
    print(f"max |fast - x W^T| = {max(errors):.1e}: {'OK, below' if is_right else 'WRONG, expected below'} {bound:.0e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--d_model", type=int, default=768,
                        help="width; matrices are (4 width, width) (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"],
                        help="of weights (default %(default)s)")
    parser.add_argument("--megabytes", type=int, default=400,
                        help="of weights, more than caches hold (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5,
                        help="rounds over all of them (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error).split("\n")[0][:200])
