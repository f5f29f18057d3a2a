"""The fused attention kernels that torch ships, each with its log-sum-exp, behind one interface.

Idea      F.scaled_dot_product_attention picks one of several kernels and throws the log-sum-exp of the logits
          away. Whoever joins partial results (ring attention, split-KV decoding) needs it. The operators
          underneath return it, but each in a shape of its own, each wants other things back for its backward
          pass, and all align the causal mask to the FIRST key: wrong for new queries behind cached keys.
          Here they take and give the same. Which of them a machine has is found by running each against the
          formula, never by version or name; which is fastest, by timing them.
Formula   s = scale q k^T;   lse_i = log sum_j e^(s_ij);   out_i = sum_j e^(s_ij - lse_i) v_j
          backward: dv_j = sum_i p_ij do_i;  ds_ij = p_ij (do_i . v_j - do_i . out_i), p_ij = e^(s_ij - lse_i);
                    dq_i = scale sum_j ds_ij k_j;  dk_j = scale sum_i ds_ij q_i
          merged:    lse = log(e^lse1 + e^lse2),   out = e^(lse1 - lse) out1 + e^(lse2 - lse) out2
Shapes    q (B, H, T, Dh), k and v (B, Hkv, S, Dh), Hkv | H -> out (B, H, T, Dh), lse (B, H, T). The queries are
          the LAST T of the S positions.
Omits     windows, documents, biases, dropout and the gradient of lse, which flash_attn.py's tiles have.
Run       python attention_kernels.py                   every kernel that works here beside the formula, a second
          python attention_kernels.py --dtype bfloat16    the same in another type; --device cuda on a GPU
          Ends with "max |kernel - formula| of ... kernels ..."
Test      pytest tests/test_attention_kernels.py
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor


# --- 1. the formula -------------------------------------------------------------------------

def formula_forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True, scale: float | None = None
                    ) -> tuple[Tensor, Tensor]:
    """out (B, H, T, Dh), lse (B, H, T): what every kernel must compute."""
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))  # (B, H, S, Dh)
    s = _logits(q, k, is_causal, scale)
    lse = torch.logsumexp(s, -1)
    return torch.exp(s - lse.masked_fill(lse == -math.inf, 0)[..., None]) @ v, lse  # a query that sees nothing: 0


def formula_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                     is_causal: bool = True, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. Written out: autograd would hand its tensors to whatever hooks the caller has set."""
    scale, Hkv, G = q.size(-1) ** -0.5 if scale is None else scale, k.size(1), q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(G, 1) for x in (k, v))  # (B, H, S, Dh)
    p = torch.exp(_logits(q, k, is_causal, scale) - lse.masked_fill(lse == -math.inf, 0)[..., None])  # (B, H, T, S)
    ds = p * (grad_out @ v.mT - (grad_out * out).sum(-1, keepdim=True)) * scale
    dk, dv = ((x.mT @ y).unflatten(1, (Hkv, G)).sum(2) for x, y in ((ds, q), (p, grad_out)))  # (B, Hkv, S, Dh)
    return ds @ k, dk, dv


def _logits(q: Tensor, k: Tensor, is_causal: bool, scale: float | None) -> Tensor:
    s = q @ k.mT * (q.size(-1) ** -0.5 if scale is None else scale)  # (B, H, T, S)
    T, S = s.shape[2:]
    hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)  # query t is at position S - T + t
    return s.masked_fill(hidden, -math.inf) if is_causal else s


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of keys, from the results on each: (o, lse) twice -> (o, lse) on both together. Exact.

    o (..., Dh), lse (...). This is all that ring attention and split-KV decoding need to know.
    """
    if o1.shape != o2.shape or lse1.shape != lse2.shape or o1.shape[:-1] != lse1.shape:
        raise ValueError("merge needs two outputs (..., Dh) and two log-sum-exps (...), got "
                         f"{tuple(o1.shape)}, {tuple(lse1.shape)} and {tuple(o2.shape)}, {tuple(lse2.shape)}")
    m = torch.maximum(lse1, lse2).detach()
    m = m.masked_fill(m == -math.inf, 0)  # both saw nothing: weights 0, not e^(inf - inf)
    w1, w2 = torch.exp(lse1 - m), torch.exp(lse2 - m)
    nothing = (w1 + w2) == 0
    total = (w1 + w2).masked_fill(nothing, 1)
    o = (o1 * (w1 / total)[..., None] + o2 * (w2 / total)[..., None]).to(o1.dtype)
    return o, (m + torch.log(total)).masked_fill(nothing, -math.inf)


# --- 2. one adapter per kernel -------------------------------------------------------------
#
# forward(q, k, v, causal, scale) -> out, lse (B, H, T), what else backward wants; backward -> dq, dk, dv.
# In ATen's names `flash` is FlashAttention-2 and `efficient` the memory-efficient kernel of xFormers.

_aten = torch.ops.aten


def _flash_forward(q, k, v, causal, scale):
    out, lse, *rest, _ = _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse[..., :q.size(2)], rest


def _flash_backward(grad_out, q, k, v, out, lse, rest, causal, scale):
    return _aten._scaled_dot_product_flash_attention_backward(
        grad_out, q, k, v, out, lse.contiguous(), *rest[:4], 0.0, causal, *rest[4:], scale=scale)


def _cudnn_forward(q, k, v, causal, scale):
    out, lse, *rest, _ = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.flatten(2), (lse.shape, *rest)  # its lse is (B, H, T, 1)


def _cudnn_backward(grad_out, q, k, v, out, lse, rest, causal, scale):
    shape, *lengths, seed, offset = rest
    return _aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, q, k, v, out, lse.reshape(shape), seed, offset, None, *lengths, 0.0, causal, scale=scale)


def _efficient_forward(q, k, v, causal, scale):
    out, lse, seed, offset = _aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., :q.size(2)], (lse.size(2), seed, offset)  # lse comes padded to a multiple of 32


def _efficient_backward(grad_out, q, k, v, out, lse, rest, causal, scale):
    padded = F.pad(lse, (0, rest[0] - lse.size(2)), value=math.inf)
    return _aten._scaled_dot_product_efficient_attention_backward(
        grad_out, q, k, v, None, out, padded, *rest[1:], 0.0, [True, True, True, False], causal, scale=scale)[:3]


def _cpu_forward(q, k, v, causal, scale):
    return *_aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale), ()


def _cpu_backward(grad_out, q, k, v, out, lse, rest, causal, scale):
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, scale=scale)


def _own_forward(q, k, v, causal, scale):
    import flash_attn_cuda
    return *flash_attn_cuda.forward(q, k, v, causal, scale), ()


def _own_backward(grad_out, q, k, v, out, lse, rest, causal, scale):
    import flash_attn_cuda
    return flash_attn_cuda.backward(grad_out, q, k, v, out, lse, causal, scale)


# name -> device, forward, backward. The order is that of preference where nothing can be timed.
KERNELS = {"cudnn": ("cuda", _cudnn_forward, _cudnn_backward), "flash": ("cuda", _flash_forward, _flash_backward),
           "efficient": ("cuda", _efficient_forward, _efficient_backward),
           "cpu": ("cpu", _cpu_forward, _cpu_backward), "own": ("cuda", _own_forward, _own_backward)}


# --- 3. queries at the end of the keys ------------------------------------------------------

def _parts(name: str, T: int, S: int, is_causal: bool) -> list[tuple[slice, slice, bool]]:
    """(queries, keys, causal) of the calls, causal from the first key on, that together are causal to the last.

    The last T of S queries see the first S - T keys whole and the last T as a square.
    """
    if not is_causal or T == S or T == 1:  # one query sees all keys
        return [(slice(T), slice(S), is_causal and T == S)]
    if name == "own":  # has the queries at the end itself
        return [(slice(T), slice(S), True)]
    if T > S:  # the first T - S queries see nothing
        return [(slice(T - S, T), slice(S), True)]
    return [(slice(T), slice(S - T), False), (slice(T), slice(S - T, S), True)]


def _dense_rows(x: Tensor) -> Tensor:
    """Kernels read a row's numbers one behind the other, whatever the stride says: where it is not 1, a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def kernel_forward(name: str, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True, scale: float | None = None
                   ) -> tuple[Tensor, Tensor, list]:
    """out (B, H, T, Dh), lse (B, H, T) and what kernel_backward wants back, by one of KERNELS."""
    T, S, results = q.size(2), k.size(2), []
    q, k, v = (_dense_rows(x) for x in (q, k, v))
    for rows, keys, causal in _parts(name, T, S, is_causal):
        results.append(KERNELS[name][1](q[:, :, rows], k[:, :, keys], v[:, :, keys], causal, scale))
    (out, lse, *_), *others = results
    for o, s, _ in others:
        out, lse = merge(out, lse, o, s)
    if out.size(2) < T:
        out, lse = F.pad(out, (0, 0, T - S, 0)), F.pad(lse, (T - S, 0), value=-math.inf)
    return out, lse, [rest for *_, rest in results]


def kernel_backward(name: str, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                    rest: list, is_causal: bool = True, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v. Each part's, computed with the out and lse of the whole, are its share of them."""
    parts = _parts(name, q.size(2), k.size(2), is_causal)
    grad_out, q, k, v = (_dense_rows(x) for x in (grad_out, q, k, v))
    whole = None
    for (rows, keys, causal), extra in zip(parts, rest):
        grads = KERNELS[name][2](grad_out[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys],
                                 out[:, :, rows], lse[:, :, rows], extra, causal, scale)
        if all(grad.shape == x.shape for grad, x in zip(grads, (q, k, v))):  # the only part
            return grads
        whole = whole or [torch.zeros_like(x) for x in (q, k, v)]
        for x, grad, place in zip(whole, grads, (rows, keys, keys)):
            x[:, :, place] += grad
    return tuple(whole)


# --- 4. which of them work here, and which is fastest ---------------------------------------

def largest_error(name: str, device: torch.device, dtype: torch.dtype, Dh: int, G: int = 1, is_causal: bool = True,
                  T: int = 80, S: int = 80) -> float:
    """The worst of out, lse, dq, dk, dv by this kernel, against the formula in fp32 or finer, over the largest value.

    G: query heads per key head. Raises what the kernel raises where it cannot run.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, heads, length, Dh, generator=generator).to(device, dtype)
              for heads, length in ((2 * G, T), (2, S), (2, S), (2 * G, T))]
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        *qkv, grad_out = inputs
        out, lse, rest = kernel_forward(name, *qkv, is_causal)
        found = out, lse, *kernel_backward(name, grad_out, *qkv, out, lse, rest, is_causal)
        *qkv, grad_out = (x.to(torch.promote_types(dtype, torch.float32)) for x in inputs)
        out, lse = formula_forward(*qkv, is_causal)
        expected = out, lse, *formula_backward(grad_out, *qkv, out, lse, is_causal)
    if any(a.shape != b.shape for a, b in zip(found, expected)):
        return math.inf
    seen = [b.isfinite() for b in expected]  # lse is -inf where no key is seen
    errors = [((a - b)[s].abs().max() / b[s].abs().max()).double() for a, b, s in zip(found, expected, seen)]
    return torch.stack(errors).max().item()  # NaN if one is


def why_not(name: str, device: torch.device, dtype: torch.dtype, Dh: int, G: int = 1, is_causal: bool = True) -> str:
    """Why this kernel cannot be used here, found by running it once; empty if it can."""
    if KERNELS[name][0] != device.type:
        return f"it runs on {KERNELS[name][0]}"
    try:
        error = largest_error(name, device, dtype, Dh, G, is_causal)
    except (RuntimeError, ImportError, OSError, AttributeError, ValueError) as reason:
        return f"{type(reason).__name__}: {reason}"
    # bf16 rounds to 2^-8; a wrong mask or head is off by 1.
    return "" if error <= 0.05 else "it computes something else"


@functools.cache
def works(name: str, device: torch.device, dtype: torch.dtype, Dh: int, G: int = 1, is_causal: bool = True) -> bool:
    """Whether this kernel runs here, forward and backward, and computes attention: tried once."""
    reason = why_not(name, device, dtype, Dh, G, is_causal)
    if reason and name == "own":  # it is used only where asked for by name
        warnings.warn(f"our CUDA kernel is not used on {device} for {dtype}, Dh = {Dh}, but torch's: {reason}")
    return not reason


@functools.cache
def fastest(device: torch.device, dtype: torch.dtype, B: int, H: int, Hkv: int, T: int, S: int, Dh: int,
            is_causal: bool, with_backward: bool) -> str | None:
    """Name of the fastest of torch's kernels that work for these sizes, timed once; None if none works."""
    names = [name for name in KERNELS if name != "own" and works(name, device, dtype, Dh, H // Hkv, is_causal)]
    if len(names) < 2 or torch.cuda.is_current_stream_capturing():
        return names[0] if names else None
    milliseconds: dict[str, list[float]] = {name: [] for name in names}
    generator = torch.Generator(device).manual_seed(0)  # the caller's random numbers stay as they are
    q, grad_out, k, v = (torch.randn(B, heads, length, Dh, generator=generator, device=device, dtype=dtype)
                         for heads, length in ((H, T), (H, T), (Hkv, S), (Hkv, S)))
    for repeat in range(6):
        for name in names:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out, lse, rest = kernel_forward(name, q, k, v, is_causal)
            if with_backward:
                kernel_backward(name, grad_out, q, k, v, out, lse, rest, is_causal)
            end.record()
            end.synchronize()
            if repeat:
                milliseconds[name].append(start.elapsed_time(end))
    return min(names, key=lambda name: statistics.median(milliseconds[name]))


def chosen_kernel(backend: str, device: torch.device, dtype: torch.dtype, B: int, H: int, Hkv: int, T: int, S: int,
                  Dh: int, is_causal: bool, with_backward: bool) -> str | None:
    """Name of the kernel for these sizes: ``backend`` if it is a name, for "auto" the fastest; None if none works.

    Raises ValueError for a name that is unknown or does not work here, but for "own", whose place torch's take.
    """
    if backend not in ("auto", *KERNELS):
        raise ValueError(f"backend must be one of auto, tiled, {', '.join(KERNELS)}, got {backend!r}")
    if backend != "auto":
        if works(backend, device, dtype, Dh, H // Hkv, is_causal):
            return backend
        if backend != "own":  # of which ``works`` has warned
            raise ValueError(f"backend {backend!r} does not work here for {dtype}, Dh = {Dh} on {device}: "
                             "use 'tiled' or 'auto'")
    # Timed once for all lengths between two powers of two.
    T, S = (1 << n.bit_length() - 1 for n in (T, S))
    return fastest(device, dtype, B, H, Hkv, T, S, Dh, is_causal, with_backward)


# --- 5. demo --------------------------------------------------------------------------------

def main(length: int, d_head: int, dtype: str, device: str) -> None:
    if min(length, d_head) < 1:
        raise ValueError(f"--length and --d_head must be at least 1, got {length} and {d_head}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device: leave it out to run on the CPU")
    place, kind = torch.device(device), getattr(torch, dtype)
    bound = {torch.float64: 1e-12, torch.float32: 1e-4}.get(kind, 0.05)
    print(f"largest error of out, lse, dq, dk, dv against the formula in {dtype} on {device}, Dh = {d_head}, "
          f"2 query heads per key head,\nfor (T, S) = square, new queries behind cached keys, one new query; "
          "and milliseconds of a square forward")
    largest = 0.0
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, length, d_head, generator=generator).to(place, kind) for _ in range(3))
    used = []
    for name in KERNELS:
        reason = why_not(name, place, kind, d_head, 2)
        if reason:
            print(f"  {name:10} not here: {reason.splitlines()[0][:90]}")
            continue
        sizes = (length, length), (max(1, length // 3), length), (1, length)
        errors = [largest_error(name, place, kind, d_head, 2, True, T, S) for T, S in sizes]
        times = []
        for _ in range(4):
            began = time.perf_counter()
            kernel_forward(name, q, k, v)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
        print(f"  {name:10} " + "  ".join(f"{error:.1e}" for error in errors) + f"  {min(times):9.3f} ms")
        used.append(name)
        largest = torch.tensor([largest, *errors]).max().item()  # NaN, if there is one; Python's max would lose it
    if not used:
        raise ValueError(f"no kernel works here with --dtype {dtype} and --d_head {d_head}: choose others")
    print(f"max |kernel - formula| of {len(used)} kernels ({', '.join(used)}) = {largest:.1e} of the largest: "
          f"{'OK, below' if largest < bound else 'WRONG, expected below'} {bound:.0e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--length", type=int, default=512,
                        help="S; T is S, a third of it, and 1 (default %(default)s)")
    parser.add_argument("--d_head", type=int, default=64, help="Dh, width of a head (default %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"],
                        help="of q, k and v (default %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error).split("\n")[0][:200])
