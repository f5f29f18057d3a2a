"""Tensor and sequence parallelism: every rank holds a slice of every matrix and works on the whole batch.

Idea      Cut an MLP's first matrix by output columns and its second by input rows: every rank computes its own
          hidden units from start to end, and one sum over the ranks finishes the layer. Attention is cut the same
          way, by heads; the embedding and the head by vocabulary. Two sums forward and two backward a block.
Formula   Y = gelu(X [A_1 A_2]) [B_1; B_2] = gelu(X A_1) B_1 + gelu(X A_2) B_2        Shoeybi et al. 2019, section 3
          loss = log sum_r exp(lse_r) - logit[target],  lse_r over rank r's slice of the vocabulary
          sequence parallelism: all-reduce = reduce-scatter over T + all-gather over T; between the two live the
          norms, the dropout and the residuals, on T/P positions each                Korthikanti et al. 2022, section 4
Shapes    column: x (..., n_in) -> (..., n_out/P);  row: x (..., n_in/P) -> (..., n_out)
          logits (B, T, Vp), Vp = ceil(V/P): no rank ever holds (B, T, V)
Omits     overlap of the forward sums with computation; weights that are drawn in slices (the model is built whole, so
          that its weights are those of one process, then cut); caches under sequence parallelism; encoder-decoders.
Run       python tensor_parallel.py                                                 2 processes on the CPU, 10 s
          torchrun --standalone --nproc_per_node=2 tensor_parallel.py --sequence    with the norms' work divided too
          Ends with "max |TP - one process| = ..."
Test      pytest tests/test_tensor_parallel.py
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def rank_and_size(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """(rank r of this process in the group, number of ranks P); (0, 1) without torch.distributed.

    Raises ValueError if this process is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    rank, P = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(f"global rank {dist.get_rank()} is not in the group that it was given")
    return rank, P


# --- 1. the operators -------------------------------------------------------------------------------
#
# A tensor is either the same on every rank (whole), or each rank's own (a slice, or a term of a sum). An operator
# turns one into the other; its backward is the operator that turns the gradient back:
#
#   operator                  forward                         backward                  from -> to
#   copy_to_ranks             x                               all-reduce                whole -> used by slices
#   reduce_from_ranks         all-reduce                      dy                        terms of a sum -> whole
#   scatter_to_ranks          own slice                       all-gather                whole -> slices
#   gather_from_ranks         all-gather                      own slice                 slices -> whole
#   gather_to_terms           all-gather                      reduce-scatter            slices -> used by slices
#   reduce_scatter_terms      reduce-scatter                  all-gather                terms of a sum -> slices
#
# The last two are copy and reduce of sequence parallelism: what is whole there is kept in slices of T.

@contextmanager
def _naming(operation: str, x: Tensor, group: dist.ProcessGroup | None) -> Iterator[None]:
    """A rank that died or hangs shows on the others as an error of the backend: say which rank waited, and for what."""
    try:
        yield
    except RuntimeError as error:
        rank, P = rank_and_size(group)
        raise RuntimeError(f"tensor parallelism, rank {rank} of {P}: {operation} of {tuple(x.shape)} did not get "
                           f"through, another rank died or hangs: {error}") from None


def _all_reduce(x: Tensor, group: dist.ProcessGroup | None, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)  # gloo reads a strided tensor wrongly, and says nothing
    with _naming("all-reduce", x, group):
        dist.all_reduce(total, op, group=group)
    return total


def _own_slice(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    rank, P = rank_and_size(group)
    if x.size(dim) % P:
        raise ValueError(f"{P} ranks cannot share {x.size(dim)} entries of dimension {dim} evenly: want a multiple of "
                         f"{P}")
    return x.chunk(P, dim)[rank].contiguous()


def _all_gather(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    _, P = rank_and_size(group)
    slices = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(P)]
    with _naming("all-gather", x, group):
        dist.all_gather(slices, x.contiguous(), group=group)
    return torch.cat(slices, dim)


def _reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup | None) -> Tensor:
    _own_slice(x, dim, group)  # refuses what does not divide
    _, P = rank_and_size(group)
    terms = torch.cat(x.chunk(P, dim), 0)  # (P * size(0), ...): rank r's part is the r-th
    mine = terms.new_empty(terms.size(0) // P, *terms.shape[1:])
    # its name from torch 2.13 on, and before
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    with _naming("reduce-scatter", x, group):
        reduce_scatter(mine, terms, group=group)
    return mine


class _Operator(torch.autograd.Function):
    """One column of the table forward, the next one backward."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.conjugate = backward
        return forward(x)

    @staticmethod
    def backward(ctx, dy):
        return ctx.conjugate(dy), None, None


def _operator(x: Tensor, group: dist.ProcessGroup | None, forward: Callable, backward: Callable) -> Tensor:
    return x if rank_and_size(group)[1] == 1 else _Operator.apply(x, forward, backward)


def copy_to_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The same x (...) for every rank's slice of a layer; their gradients are summed.  Shoeybi et al. 2019: f"""
    return _operator(x, group, lambda x: x.view_as(x), lambda dy: _all_reduce(dy, group))


def reduce_from_ranks(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over ranks of x (...), which every rank then has.  Shoeybi et al. 2019: g"""
    return _operator(x, group, lambda x: _all_reduce(x, group), lambda dy: dy)


def scatter_to_ranks(x: Tensor, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's slice of x, which every rank has: (..., n, ...) -> (..., n/P, ...)."""
    return _operator(x, group, lambda x: _own_slice(x, dim, group), lambda dy: _all_gather(dy, dim, group))


def gather_from_ranks(x: Tensor, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """All ranks' slices, joined, for something that every rank then computes alike: n/P -> n along ``dim``."""
    return _operator(x, group, lambda x: _all_gather(x, dim, group), lambda dy: _own_slice(dy, dim, group))


def gather_to_terms(x: Tensor, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """All ranks' slices, joined, for every rank's slice of a layer.  Korthikanti et al. 2022: g"""
    return _operator(x, group, lambda x: _all_gather(x, dim, group), lambda dy: _reduce_scatter(dy, dim, group))


def reduce_scatter_terms(x: Tensor, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's slice of the sum over ranks: n -> n/P along ``dim``.  Korthikanti et al. 2022: g-bar"""
    return _operator(x, group, lambda x: _reduce_scatter(x, dim, group), lambda dy: _all_gather(dy, dim, group))


# --- 2. the layers ----------------------------------------------------------------------------------

@dataclass
class Cut:
    """What a rank's slice of a parameter is a slice of: ``parameter.cut``; without it a parameter is whole."""
    group: dist.ProcessGroup | None
    size: int  # of the whole along dimension ``dim``, without padding
    dim: int = 0
    copies: int = 1  # ranks r, r+1 ... that hold the same slice (key and value heads fewer than ranks)


class _Column(torch.autograd.Function):
    """x W^T with W a rank's rows, and with ``copy_to_ranks`` in it: dx travels while dW is computed."""

    @staticmethod
    def forward(ctx, x, weight, group):
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx = dy @ weight
        with _naming("all-reduce of a gradient", dx, ctx.group):
            work = dist.all_reduce(dx, group=ctx.group, async_op=True)
            dweight = dy.flatten(0, -2).t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
            work.wait()
        return dx, dweight, None


class ColumnLinear(nn.Module):
    """A slice of the outputs of a linear layer: x (..., n_in) -> (..., n_out/P).

    ``sequence``: x comes as a slice of T, (B, T/P, n_in), and is gathered first.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None, sequence: bool = False):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
        self.group, self.sequence = group, sequence

    def forward(self, x: Tensor) -> Tensor:
        if self.sequence:
            return F.linear(gather_to_terms(x, 1, self.group), self.weight, self.bias)
        if rank_and_size(self.group)[1] == 1 or not x.requires_grad or torch.is_autocast_enabled(x.device.type):
            return F.linear(copy_to_ranks(x, self.group), self.weight, self.bias)
        y = _Column.apply(x, self.weight, self.group)
        return y if self.bias is None else y + self.bias


class RowLinear(nn.Module):
    """A slice of the inputs of a linear layer, summed over the ranks: x (..., n_in/P) -> (..., n_out).

    Every rank has the whole bias and adds it once, after the sum. ``sequence``: out comes a slice of T.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None, sequence: bool = False):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
        self.group, self.sequence = group, sequence

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        y = reduce_scatter_terms(y, 1, self.group) if self.sequence else reduce_from_ranks(y, self.group)
        return y if self.bias is None else y + self.bias


class VocabularyEmbedding(nn.Module):
    """A slice of the rows of an embedding: tokens (B, T) -> (B, T, D), the same on every rank."""

    def __init__(self, weight: Tensor, group: dist.ProcessGroup | None):
        super().__init__()
        self.weight, self.group = nn.Parameter(weight), group

    def forward(self, tokens: Tensor) -> Tensor:
        first = rank_and_size(self.group)[0] * len(self.weight)
        mine = (tokens >= first) & (tokens < first + len(self.weight))
        x = F.embedding((tokens - first).where(mine, 0), self.weight)  # (B, T, D)
        return reduce_from_ranks(x * mine[..., None], self.group)  # one rank's row, zeros from the others


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, vocab_size, group):
        first = rank_and_size(group)[0] * logits.size(-1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)  # (N, Vp)
        if first + logits.size(-1) > vocab_size:  # padding, which no token has
            logits[:, max(0, vocab_size - first):] = -math.inf
        top = _all_reduce(logits.amax(-1), group, dist.ReduceOp.MAX)  # (N,): exp must not overflow on any rank
        exps = logits.sub_(top[:, None])
        mine = (targets >= first) & (targets < first + logits.size(-1))
        index = (targets - first).where(mine, 0)[:, None]  # (N, 1)
        at_target = exps.gather(1, index)[:, 0].where(mine, 0)
        sums = _all_reduce(torch.stack((exps.exp_().sum(-1), at_target)), group)  # (2, N): two sums in one message
        probabilities = exps.div_(sums[0, :, None])
        ctx.save_for_backward(probabilities, index, mine)
        return sums[0].log() - sums[1]  # (N,)

    @staticmethod
    def backward(ctx, dy):
        probabilities, index, mine = ctx.saved_tensors
        gradient = probabilities * dy[:, None]  # p - one-hot(target), times dy
        gradient.scatter_add_(1, index, -(dy * mine)[:, None])
        return gradient, None, None, None


def vocabulary_cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int,
                             group: dist.ProcessGroup | None = None) -> Tensor:
    """-log p(target) of every position, in nats, in fp32 or finer; every rank gets the same.

    logits (..., Vp), this rank's slice, Vp = ceil(V/P); targets (...) of ids below ``vocab_size`` -> (...).
    Raises ValueError for shapes that do not fit. Two messages: a maximum and two sums of every position.
    """
    _, P = rank_and_size(group)
    if logits.shape[:-1] != targets.shape or logits.size(-1) != math.ceil(vocab_size / P):
        raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit: want logits "
                         f"{(*targets.shape, math.ceil(vocab_size / P))} for a vocabulary of {vocab_size} on {P} ranks")
    if P == 1:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    losses = _VocabularyLoss.apply(logits.flatten(0, -2), targets.flatten(), vocab_size, group)
    return losses.view(targets.shape)


# --- 3. a model, cut ----------------------------------------------------------------------------------

class _SlicedDropout(TorchFunctionMode):
    """Dropout on a slice drops what one process would drop there: the mask is drawn for the whole, then sliced, over
    T with sequence parallelism, and over the heads where attention drops weights. Attention is the naive formula then,
    as torch's kernels draw masks of their own inside: one process draws the same on a CPU, but another on CUDA."""

    def __init__(self, group: dist.ProcessGroup | None, sequence: bool):
        super().__init__()
        self.group, self.sequence = group, sequence

    def _mask(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Dropout of ones, of the shape of x (B, n/P, ...): drawn as (B, n, ...)."""
        P = rank_and_size(self.group)[1]
        return _own_slice(F.dropout(x.new_ones(x.size(0), x.size(1) * P, *x.shape[2:]), *args, **kwargs), 1, self.group)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.dropout and self.sequence:
            return args[0] * self._mask(*args, **kwargs)
        if function is F.scaled_dot_product_attention and kwargs.get("dropout_p"):
            q, k, v = args  # (B, H/P, T, Dh)
            scores = q @ k.mT / math.sqrt(q.size(-1))
            if kwargs.get("attn_mask") is not None:
                scores = scores.masked_fill(~kwargs["attn_mask"], -math.inf)
            return torch.softmax(scores, -1) * self._mask(scores, kwargs["dropout_p"]) @ v
        return function(*args, **kwargs)


def _forward_under_mode(block: nn.Module, *arguments, **keywords):
    with block.mode:
        return type(block).forward(block, *arguments, **keywords)


def fitting_ranks(config) -> list[int]:
    """The numbers of ranks that can share a model of these sizes: they divide heads and hidden units, and divide, or
    are multiples of, the key and value heads."""
    H, Dff = config.n_heads, config.d_ff
    Hkv = getattr(config, "n_kv_heads", H)
    return [P for P in range(1, H + 1) if H % P == 0 and Dff % P == 0 and (Hkv % P == 0 or P % Hkv == 0)]


def _cut(module: nn.Module, kind: str, head: int | None, group: dist.ProcessGroup | None, sequence: bool) -> nn.Module:
    """This rank's slice of a linear layer or an embedding; ``head``: rows of one head, which stay together."""
    rank, P = rank_and_size(group)
    weight, bias = module.weight.detach(), None
    dim, size, copies = int(kind == "row"), module.weight.size(int(kind == "row")), 1
    if kind == "vocab":
        weight = _padded(weight, P)  # (P Vp, D)
    slices = P
    if head is not None and size // head < P:  # fewer key and value heads than ranks: each is held by several
        slices, copies = size // head, P * head // size
    own = weight.chunk(slices, dim)[rank // copies].clone()
    if getattr(module, "bias", None) is not None:
        bias = module.bias.detach().clone()
        bias = bias.chunk(slices)[rank // copies].clone() if kind == "column" else bias
    if isinstance(module, nn.Embedding):
        cut = VocabularyEmbedding(own, group)
    elif kind == "row":
        cut = RowLinear(own, bias, group, sequence)
    else:
        cut = ColumnLinear(own, bias, group, sequence)
    for p in (cut.weight, getattr(cut, "bias", None)):
        if p is not None and not (kind == "row" and p.dim() == 1):
            p.cut = Cut(group, size, dim, copies)
            if copies > 1:
                p.register_hook(lambda gradient, p=p: _sum_of_copies(gradient, p.cut))
    return cut


def _padded(weight: Tensor, P: int) -> Tensor:
    """(V, ...) -> (P * ceil(V/P), ...), zeros behind."""
    return torch.cat((weight, weight.new_zeros(-len(weight) % P, *weight.shape[1:])))


def _sum_of_copies(gradient: Tensor, cut: Cut) -> Tensor:
    """The sum of the gradients of a slice over the ranks that hold it, by a sum of all slices."""
    rank, P = rank_and_size(cut.group)
    slices = gradient.new_zeros(P // cut.copies, *gradient.shape)
    slices[rank // cut.copies] = gradient
    return _all_reduce(slices, cut.group)[rank // cut.copies]


def tensor_parallel(model: nn.Module, group: dist.ProcessGroup | None = None, sequence: bool = False) -> nn.Module:
    """Cut a model of the contract, the same on every rank, in place, by its ``tp_plan``; returns it.

    Afterwards ``model(tokens)`` gives (B, T, Vp), this rank's slice of the logits, for
    ``vocabulary_cross_entropy`` (so do BERT's logits of hidden tokens; its other results are whole on every rank);
    every rank gets the same tokens and, with dropout, the same seed. A vocabulary that P does not divide is padded
    with zeros that nothing reads. Key and value heads fewer than ranks are copied.

    Args:
        sequence: also divide norms, dropout and residuals, over T, which P must divide.

    Raises:
        ValueError: naming the size that P does not divide, and the numbers of ranks that would do.
    """
    if not hasattr(model, "tp_plan"):
        raise ValueError(f"{type(model).__name__} has no tp_plan: GPT, Llama (also of experts) and BERT can be cut")
    (rank, P), config = rank_and_size(group), model.config
    trunk = getattr(model, "bert", model)  # where the blocks are: BERT's tasks keep their encoder there
    encoder = hasattr(trunk, "pooler")  # post-norm, and what follows its blocks is whole on every rank
    qk_norm = getattr(config, "qk_norm", False)  # over all heads, which then no rank has
    if P > 1 and (qk_norm or P not in fitting_ranks(config)):
        fitting = [1] if qk_norm else fitting_ranks(config)
        raise ValueError(f"{P} ranks cannot share {config.n_heads} heads, "
                         f"{getattr(config, 'n_kv_heads', config.n_heads)} key and value heads and {config.d_ff} "
                         f"hidden units{' beside a norm over all heads' if qk_norm else ''}: "
                         f"{', '.join(map(str, fitting))} can")
    if P == 1:
        return model
    for name, p in list(model.named_parameters()):
        kind = next((kind for suffix, kind in model.tp_plan.items() if name.endswith(suffix)), None)
        path, _, child = name.removesuffix(".weight").rpartition(".")
        parent = model.get_submodule(path)
        if kind == "vocab" and getattr(parent, child) is p:  # the bias of a tied head belongs to no layer
            own = nn.Parameter(_padded(p.detach(), P).chunk(P)[rank].clone())
            own.cut = Cut(group, len(p))
            setattr(parent, child, own)
        elif kind is not None and not name.endswith("bias"):  # a bias is cut with its weight
            head = config.d_head if name.endswith(("attention.k.weight", "attention.v.weight")) else None
            setattr(parent, child, _cut(getattr(parent, child), kind, head, group, sequence))
    # What the head multiplies by a slice of the vocabulary is whole, and each rank knows a term of its gradient.
    if encoder:
        if hasattr(model, "mlm_norm"):
            model.mlm_norm.register_forward_hook(lambda module, inputs, x: copy_to_ranks(x, group))
        if sequence:
            trunk.blocks[-1].register_forward_hook(lambda module, inputs, x: gather_from_ranks(x, 1, group))
    elif sequence or "vocab" in model.tp_plan.values():
        model.norm.register_forward_hook(
            lambda module, inputs, x: gather_to_terms(x, 1, group) if sequence else copy_to_ranks(x, group))
    if sequence:
        trunk.blocks[0].register_forward_pre_hook(
            lambda module, inputs: (scatter_to_ranks(inputs[0], 1, group), *inputs[1:]))
        for module in (*trunk.blocks, *([] if encoder else [model.norm])):
            for p in module.parameters():
                if not hasattr(p, "cut"):  # a norm, or a bias behind a sum: it sees a slice of T on every rank
                    p.register_hook(lambda gradient: _all_reduce(gradient, group))
    if getattr(config, "attention_dropout", 0) or sequence and getattr(config, "dropout", 0):
        for block in trunk.blocks:  # not by hooks: what recomputes a block calls its forward alone
            block.mode, block.forward = _SlicedDropout(group, sequence), MethodType(_forward_under_mode, block)
    return model


@torch.no_grad()
def squared_norm(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None = None) -> Tensor:
    """|g|^2 in float64 over whole parameters: slices are summed over the ranks, what every rank has counts once."""
    squares = {False: 0.0, True: 0.0}  # of what is whole, of slices
    for p in parameters:
        if p.grad is not None:
            cut = getattr(p, "cut", None)
            squares[cut is not None] += p.grad.double().square().sum() / (cut.copies if cut else 1)
    if rank_and_size(group)[1] > 1:
        squares[True] = _all_reduce(torch.as_tensor(squares[True]), group)
    return torch.as_tensor(squares[False] + squares[True])


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float,
                   group: dist.ProcessGroup | None = None) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for cut parameters; returns the norm before, the same on every rank."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = squared_norm(parameters, group).sqrt()
    for p in parameters:
        p.grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0).to(p.grad.dtype))
    return norm


@torch.no_grad()
def whole(p: Tensor, cut: Cut | None = None) -> Tensor:
    """The parameter that p is a slice of, or another tensor (a gradient, a moment) cut like it: for checkpoints that
    know no layout. Every rank calls it, in the same order, and gets the whole."""
    cut = cut or getattr(p, "cut", None)
    if cut is None:
        return p.detach()
    slices = _all_gather(p.detach()[None], 0, cut.group)[::cut.copies]  # (slices, ...)
    return torch.cat(list(slices), cut.dim).narrow(cut.dim, 0, cut.size)


# --- 4. demo ----------------------------------------------------------------------------------------

def _train(model: nn.Module, options: argparse.Namespace, group, text: Tensor) -> list[float]:
    """A few AdamW steps on the text; every rank has the same batch. Returns the losses."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.steps):
        starts = torch.randint(len(text) - 65, (8, 1), generator=generator)
        batch = text[starts + torch.arange(65)]  # (8, T + 1)
        loss = vocabulary_cross_entropy(model(batch[:, :-1]), batch[:, 1:], 257, group).mean()
        loss.backward()
        clip_grad_norm(model.parameters(), 1.0, group)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _demo(rank: int, P: int, options: argparse.Namespace, rendezvous: str) -> None:
    """What every rank runs; rank 0 prints."""
    import subprocess

    from gpt import GPT, GPTConfig

    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=P)
    torch.set_num_threads(1)
    say = print if rank == 0 else lambda *words: None
    text = torch.tensor(list(subprocess.check_output([sys.executable, "-m", "this"])))  # (N,), bytes
    config = GPTConfig(vocab_size=257, context=64, n_layers=2, n_heads=4, d_model=options.d_model)

    def model():
        return GPT(config, generator=torch.Generator().manual_seed(options.seed)).double()

    alone = dist.new_group([rank], use_local_synchronization=True)
    one, cut = model(), tensor_parallel(model(), None, options.sequence)
    n, mine = (sum(p.numel() for p in m.parameters()) for m in (one, cut))
    say(f"{P} ranks, {n:,} parameters in float64, {mine:,} of them on each; logits (8, 64, "
        f"{len(cut.token_embedding.weight)}) of a vocabulary of 257")
    losses = _train(one, options, alone, text), _train(cut, options, None, text)
    say("step   one process   tensor parallel   (expected first: about ln 257 = 5.549)")
    for step in sorted({0, options.steps // 2, options.steps - 1}):
        say(f"{step:4d} {losses[0][step]:13.6f} {losses[1][step]:17.6f}")
    error = max((a - whole(b)).abs().max().item() for a, b in zip(one.parameters(), cut.parameters()))
    say(f"max |TP - one process| = {error:.1e} over all parameters after {options.steps} steps: "
        + ("OK, below 1e-10" if error < 1e-10 else "WRONG, expected below 1e-10"))
    dist.destroy_process_group()


def main(options: argparse.Namespace) -> None:
    started_by_torchrun = "RANK" in os.environ
    P = int(os.environ["WORLD_SIZE"]) if started_by_torchrun else options.ranks
    if P not in (1, 2, 4):
        raise ValueError(f"--ranks must be 1, 2 or 4, for the model has 4 heads, got {P}")
    if options.steps < 1 or options.d_model < 4 or options.d_model % 4 or not 0 <= options.seed < 2**32:
        raise ValueError("--steps must be at least 1, --d_model a multiple of 4 and --seed in 0 .. 2^32 - 1, "
                         f"got {options.steps}, {options.d_model} and {options.seed}")
    if started_by_torchrun:
        return _demo(int(os.environ["RANK"]), P, options, "env://")
    from processes import start_ranks
    with tempfile.TemporaryDirectory() as folder:  # the ranks meet through a file: no port to be taken
        start_ranks(_demo, (P, options, (Path(folder) / "ranks").as_uri()), P)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n"  # one line of all ranks, without usage
                                               if os.environ.get("RANK", "0") == "0" else None)
    parser.add_argument("--ranks", type=int, default=2,
                        help="processes to start, if not under torchrun: 1, 2 or 4 (default %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default %(default)s)")
    parser.add_argument("--d_model", type=int, default=64,
                        help="width of the model, a multiple of 4 (default %(default)s)")
    parser.add_argument("--sequence", action="store_true", help="divide the norms' work, too")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and data (default %(default)s)")
    try:
        main(parser.parse_args())
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
