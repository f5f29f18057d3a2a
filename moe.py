"""Mixture of experts: many feed-forward layers, of which each token visits a few.   Shazeer et al. 2017 (1701.06538)

Idea      A router scores E experts for every token and sends it to the best K: parameters grow with E, the cost of a
          token with K. Left alone, routers send everything to a few experts (those that are used learn, and are used
          more), and their logits grow until fp16 or bf16 cannot tell them apart. Two losses, or a bias, prevent that.
Formula   y = sum over the K chosen experts e of  w_e Expert_e(x) + Shared(x),   Expert(x) = W_2 (silu(W_1 x) * W_3 x)
          "softmax_after"   choose by s = W_r x,           w = softmax of the K chosen s             Mixtral 2401.04088
          "softmax_before"  choose by p = softmax(s),      w = the K chosen p                        OLMoE 2409.02060
          "sigmoid"         choose by sigmoid(s) + bias,   w = the chosen sigmoid(s), sum 1   DeepSeek-V3 2412.19437
          "dense"           every expert,                  w = softmax(s)                            Jacobs et al. 1991
          "expert_choice"   each expert takes the NK/E tokens with the largest p,  w = p             2202.09368
          For K = 1 weights that sum to 1 would all be 1, and the router could not learn: there w = p (or sigmoid(s)).
          balance  E sum_e f_e P_e     f_e: choices of e per token, P_e: mean p_e; K if even   Switch 2101.03961, eq. 4
          z-loss   mean over tokens of (log sum_e exp s_e)^2                                   ST-MoE 2202.08906, eq. 5
          bias     b_e += rate * sign(mean load - load_e) after every step: balance without a loss      2408.15664
Shapes    x (B, T, D) -> N = B T tokens -> A = N K assignments (token, expert, weight) -> y (B, T, D)
Omits     choice limited to a few nodes (DeepSeek's groups), jitter of the router's input, experts cut in parts.
Run       python moe.py    what each loss prevents, on a small Llama of experts: about 20 s
          python moe.py --plot experts.png    how often each expert is visited, as a picture
          Ends with "balancing loss and bias spread the visits: ..."
Test      pytest tests/test_moe.py
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ROUTERS = ("softmax_after", "softmax_before", "sigmoid", "dense", "expert_choice")


# --- 1. the router: which token goes where --------------------------------------------------

class Assignments(NamedTuple):
    """A visits of tokens to experts: y[token] += weight * Expert_expert(x[token]). Every kind of routing is one."""
    token: Tensor  # (A,) in 0 .. N - 1
    expert: Tensor  # (A,) in 0 .. E - 1
    weight: Tensor  # (A,)


def choose(logits: Tensor, k: int, router: str, bias: Tensor | None = None,
           capacity_factor: float | None = None, scale: float = 1.0) -> tuple[Assignments, Tensor, Tensor | None]:
    """Router logits (N, E) -> the assignments; each token's probabilities of the experts (N, E); and the experts (N, K)
    that it chose, the full ones too, None if experts choose.

    Args:
        k: experts per token; with "expert_choice" on average, with "dense" all of them, whatever k.
        router: see the formulas above.
        bias: (E,), added to sigmoid scores for the choice alone.
        capacity_factor: an expert takes at most ceil(capacity_factor N k / E) tokens, first choices before second
            ones, then earlier tokens before later ones; the visits of others are dropped. None: all are taken.
        scale: factor of sigmoid weights (DeepSeek-V3: 2.5).

    Raises ValueError for an unknown router, or k not in 1 .. E.
    """
    N, E = logits.shape
    _check_router(router, k, E)
    if router == "sigmoid":
        scores = torch.sigmoid(logits)  # (N, E)
        p = scores / (scores.sum(-1, keepdim=True) + 1e-20)  # all can be 0: their exponent ends before the logits'
    else:
        scores = p = torch.softmax(logits, -1)  # (N, E)
    if router == "expert_choice":
        weight, token = p.topk(min(N, math.ceil(N * k / E)), dim=0)  # (C, E)
        expert = torch.arange(E, device=logits.device).expand_as(token)
        return Assignments(token.flatten(), expert.flatten(), weight.flatten()), p, None
    k = E if router == "dense" else k
    chosen = (scores if bias is None else scores + bias).topk(k, dim=-1).indices  # (N, K)
    weight = scores.gather(-1, chosen)  # (N, K)
    if router in ("softmax_after", "sigmoid") and k > 1:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)  # for softmax that of the chosen logits
    if router == "sigmoid":
        weight = weight * scale
    token = torch.arange(N, device=logits.device)[:, None].expand_as(chosen)  # (N, K)
    assigned = Assignments(token.flatten(), chosen.flatten(), weight.flatten())
    if capacity_factor is not None:
        kept = _within_capacity(chosen, E, math.ceil(capacity_factor * N * k / E))
        assigned = Assignments(*(a[kept] for a in assigned))
    return assigned, p, chosen


def _check_router(router: str, k: int, E: int) -> None:
    if router not in ROUTERS:
        raise ValueError(f"router must be one of {', '.join(ROUTERS)}, got {router!r}")
    if not 1 <= k <= E:
        raise ValueError(f"k must be in 1 .. n_experts, got {k} of {E}")


def _within_capacity(chosen: Tensor, E: int, capacity: int) -> Tensor:
    """Experts (N, K) -> the flat indices, ascending, of the visits that find a free place."""
    N, K = chosen.shape
    by_choice = chosen.t().flatten()  # (K N,): all first choices, then all second ones
    order = by_choice.argsort(stable=True)
    starts = F.pad(torch.bincount(by_choice, minlength=E).cumsum(0), (1, 0))[:-1]  # (E,)
    place = torch.arange(N * K, device=chosen.device) - starts[by_choice[order]]  # in its expert's queue
    visits = order[place < capacity]
    return (visits % N * K + visits // N).sort().values


# --- 2. the experts: three ways to compute the same -----------------------------------------
#
# All take x (N, D), the assignments, gate_up (E, 2 Dff, D), W_1 above W_3, and down (E, D, Dff); all return y (N, D).

def naive_experts(x: Tensor, assigned: Assignments, gate_up: Tensor, down: Tensor,
                  linear: Callable[[Tensor, Tensor], Tensor] = F.linear) -> Tensor:
    """The formula, one visit at a time. ``linear``(x (in,), W (out, in)) is W x (out,)."""
    gate_up, down = gate_up.unbind(), down.unbind()  # E matrices each
    y = [torch.zeros_like(row) for row in x]
    for token, expert, weight in zip(assigned.token.tolist(), assigned.expert.tolist(), assigned.weight):
        gate, up = linear(x[token], gate_up[expert]).chunk(2)  # (Dff,) twice
        y[token] = y[token] + (weight * linear(F.silu(gate) * up, down[expert])).type_as(x)
    return torch.stack(y)  # (N, D)


def grouped_experts(x: Tensor, assigned: Assignments, gate_up: Tensor, down: Tensor) -> Tensor:
    """``naive_experts``, sorted by expert: then each expert is two matrix products, and no expert runs in vain."""
    order = assigned.expert.argsort(stable=True)
    token = assigned.token[order]
    # index_select: its backward adds rows, where x[token]'s adds numbers
    y = _run(x.index_select(0, token), torch.bincount(assigned.expert, minlength=len(down)), gate_up, down)  # (A, D)
    y = (y * assigned.weight[order, None]).type_as(x)
    return torch.zeros_like(x).index_add(0, token, y)  # (N, D)


def _run(rows: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """rows (A, D), the first counts[0] of expert 0, the next of expert 1, ...: each through its expert -> (A, D)."""
    gate, up = _grouped_product(rows, gate_up, counts).chunk(2, -1)  # (A, Dff) twice
    return _grouped_product(F.silu(gate) * up, down, counts)


def _grouped_product(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """rows (A, in) in E groups, weights (E, out, in) -> (A, out): each group by the transpose of its own matrix."""
    dtypes = {"cuda": (torch.bfloat16,), "cpu": (torch.bfloat16, torch.float32)}.get(rows.device.type, ())
    aligned = not any(size * rows.element_size() % 16 for size in weights.shape[1:])  # else it raises
    if hasattr(F, "grouped_mm") and aligned and rows.dtype == weights.dtype in dtypes and len(rows):
        return F.grouped_mm(rows, weights.mT, offs=counts.cumsum(0, dtype=torch.int32))  # torch 2.10 and later
    # unbind: its backward stacks E gradients once, where indexing would fill E tensors of E matrices with zeros.
    groups = [(group, weight) for group, weight in zip(rows.split(counts.tolist()), weights.unbind()) if len(group)]
    return torch.cat([F.linear(group, weight) for group, weight in groups or [(rows, weights[0])]])  # (A, out)


def parallel_experts(x: Tensor, assigned: Assignments, gate_up: Tensor, down: Tensor,
                     group: dist.ProcessGroup | None = None) -> Tensor:
    """``grouped_experts`` with E/P experts on each of the group's P ranks (rank r has r E/P ...), tokens anywhere.

        1  every rank sorts its visits by expert, and so by rank, and tells each rank how many come for each expert
        2  all-to-all: rows go to their experts
        3  every rank runs its own experts on what came
        4  all-to-all: results go back, are weighted, and added up where the token lives

    gate_up (E/P, 2 Dff, D) and down (E/P, D, Dff) are the rank's own. All ranks must call it, one without tokens too.
    Their gradients are of the SUM of the ranks' losses.   Lepikhin et al. 2020 (GShard, 2006.16668)
    """
    P, local = dist.get_world_size(group), len(down)
    order = assigned.expert.argsort(stable=True)
    token = assigned.token[order]
    outgoing = torch.bincount(assigned.expert, minlength=P * local)  # (E,)
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=group)  # (P, E/P): from each rank, for each expert here
    send, receive = (n.view(P, local).sum(1).tolist() for n in (outgoing, incoming))
    rows = _AllToAll.apply(x.index_select(0, token), receive, send, group)  # (R, D)
    expert = torch.arange(local, device=x.device).repeat(P).repeat_interleave(incoming, output_size=len(rows))  # (R,)
    order_here = expert.argsort(stable=True)
    y = _run(rows[order_here], torch.bincount(expert, minlength=local), gate_up, down)  # (R, D)
    y = _AllToAll.apply(y[order_here.argsort()], send, receive, group)  # (A, D)
    y = (y * assigned.weight[order, None]).type_as(x)
    return torch.zeros_like(x).index_add(0, token, y)  # (N, D)


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks in order, ``send[r]`` of them to rank r; the gradient goes the same way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.receive, ctx.send, ctx.group = receive, send, group
        arrived = rows.new_empty(sum(receive), rows.size(1))
        dist.all_to_all_single(arrived, rows.contiguous(), receive, send, group=group)
        return arrived

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _AllToAll.forward(ctx, gradient, ctx.send, ctx.receive, ctx.group), None, None, None


# --- 3. losses ------------------------------------------------------------------------------

def load_balancing_loss(p: Tensor, expert: Tensor) -> Tensor:
    """E sum_e f_e P_e: probabilities p (..., N, E) and chosen experts (..., N, K) -> scalar, the mean over ``...``.

    K if all experts are used alike, up to E if the router knows one only. The f_e have no gradient, the P_e lead the
    router away from experts that are chosen often.   Fedus et al. 2021, equations 4-6
    """
    E = p.size(-1)
    f = torch.zeros_like(p).scatter(-1, expert, 1.0).mean(-2)  # (..., E)
    return E * (f * p.mean(-2)).sum(-1).mean()


def router_z_loss(logits: Tensor) -> Tensor:
    """Mean of (log sum exp)^2 over all rows: logits (..., E) -> scalar.   Zoph et al. 2022, equation 5"""
    return logits.logsumexp(-1).square().mean()


def auxiliary_loss(model: nn.Module) -> Tensor | float:
    """The weighted balancing and z-losses of the model's last forward, summed over its layers; 0.0 if it has none.

    Every MoE in training mode leaves its own; reading takes it away. It is a MEAN over the tokens of that forward, so
    a step of several microbatches, on one process or many, adds auxiliary_loss(model) * tokens_of_this_forward /
    tokens_of_the_step to each. With ``per_sequence`` balancing the sum is the same however the step is cut; without,
    each microbatch is balanced by itself, and the cut matters a little.
    """
    total = 0.0
    for layer in _layers(model):
        if layer.auxiliary_loss is not None:
            total, layer.auxiliary_loss = total + layer.auxiliary_loss, None
    return total


# --- 4. the layer ---------------------------------------------------------------------------

class MoE(nn.Module):
    """A layer of experts in the place of a feed-forward layer, (B, T, D) or (N, D) -> the same.

        Llama(config, mlp=lambda c: MoE(c.d_model, c.d_ff, n_experts=8, k=2))

    Args:
        d_model, d_ff, n_experts, k: D, Dff, E and experts per token; each expert is a SwiGLU of its own.
        router: one of ROUTERS. "expert_choice" looks at later tokens too: no model that writes may use it.
        shared: so many experts more, which every token visits (DeepSeekMoE, 2401.06066).
        capacity_factor: see ``choose``; in training only, for what a text becomes must not depend on its neighbours.
        balance, z: weights of the two losses, to be had from ``auxiliary_loss``.
        per_sequence: balance within each of the B sequences (DeepSeek-V2) instead of over all tokens at once.
        scale: factor of sigmoid weights.
        compute: naive_experts or grouped_experts; a single token on a CPU is always naive_experts'.
        like: names of its tensors in files, "mixtral" or "olmoe"; None: by the router.

    Raises ValueError for sizes that cannot be, an unknown router, input of another width.
    """

    def __init__(self, d_model: int, d_ff: int, n_experts: int = 8, k: int = 2, router: str = "softmax_after", *,
                 shared: int = 0, capacity_factor: float | None = None, balance: float = 0.01, z: float = 0.001,
                 per_sequence: bool = False, scale: float = 1.0, compute: Callable = grouped_experts,
                 like: str | None = None, generator: torch.Generator | None = None):
        super().__init__()
        for name, size in {"d_model": d_model, "d_ff": d_ff, "n_experts": n_experts, "k": k, "shared": shared}.items():
            if not isinstance(size, int) or size < (name != "shared"):
                raise ValueError(f"{name} must be a whole number and at least {int(name != 'shared')}, got {size!r}")
        _check_router(router, k, n_experts)
        if like not in (None, "mixtral", "olmoe"):
            raise ValueError(f"like must be 'mixtral', 'olmoe' or None, got {like!r}")
        if capacity_factor is not None and not (capacity_factor > 0 and router not in ("dense", "expert_choice")):
            raise ValueError("capacity_factor must be positive, and tokens must choose some of the experts, got "
                             f"{capacity_factor} with {router!r}")
        if min(balance, z) < 0:
            raise ValueError(f"balance and z must be at least 0, got {balance} and {z}")
        self.n_experts, self.k, self.kind, self.scale = n_experts, k, router, scale
        self.capacity_factor, self.balance, self.z, self.per_sequence = capacity_factor, balance, z, per_sequence
        self.compute, self.group = compute, None
        self.linear = F.linear  # of an expert, for one token on a CPU; decode.py puts a faster one here for a while
        self.like = like or {"softmax_after": "mixtral", "softmax_before": "olmoe"}.get(router)
        self.router = nn.Linear(d_model, n_experts, bias=False)
        # A parameter, to be saved and loaded like all others, but not the optimizer's: see ``update_biases``.
        self.bias = nn.Parameter(torch.zeros(n_experts), requires_grad=False) if router == "sigmoid" else None
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * d_ff, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_ff))
        self.shared = _SharedExperts(d_model, shared * d_ff) if shared else None
        self.auxiliary_loss: Tensor | None = None  # of the last forward in training
        self.counts: Tensor | None = None  # (E,), visits in training since ``expert_counts`` was asked
        with torch.no_grad():
            for p in self.parameters():
                if p is not self.bias:
                    p.normal_(0.0, 0.02, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) or (N, D) -> y of the same shape."""
        if x.size(-1) != (D := self.router.in_features):
            raise ValueError(f"MoE of width {D} got x of shape {tuple(x.shape)}")
        flat = x.flatten(0, -2)  # (N, D)
        with torch.autocast(x.device.type, enabled=False):  # exponentials of rounded logits: Switch, section 2.4
            finest = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(flat.to(finest), self.router.weight.to(finest))  # (N, E)
        dropping = self.capacity_factor if self.training else None
        assigned, p, chosen = choose(logits, self.k, self.kind, self.bias, dropping, self.scale)
        if self.training:
            self._account(logits, p, assigned, chosen, len(x) if x.dim() == 3 else 1)
        experts = (flat, assigned, self.gate_up, self.down)
        if self.group is not None:
            y = parallel_experts(*experts, self.group)
        elif len(flat) == 1 and flat.device.type == "cpu":  # decoding: no expert is visited twice, nothing to sort
            y = naive_experts(*experts, self.linear)
        else:
            y = self.compute(*experts)
        return y.view_as(x) if self.shared is None else y.view_as(x) + self.shared(x)

    def _account(self, logits: Tensor, p: Tensor, assigned: Assignments, chosen: Tensor | None, B: int) -> None:
        """Count the visits, and leave the losses where ``auxiliary_loss`` finds them."""
        visits = torch.bincount(assigned.expert, minlength=self.n_experts)  # (E,)
        self.counts = visits if self.counts is None else self.counts + visits
        losses = []
        if self.z and len(logits):  # a rank may have no tokens, and the mean of nothing is NaN
            losses.append(self.z * router_z_loss(logits))
        if self.balance and len(logits) and chosen is not None and self.kind != "dense":
            rows = (B if self.per_sequence else 1, -1)
            losses.append(self.balance * load_balancing_loss(p.unflatten(0, rows), chosen.unflatten(0, rows)))
        self.auxiliary_loss = sum(losses) if losses else None

    def hugging_face_tensors(self) -> dict[str, Tensor]:
        """Name in a file, within the layer -> where it goes."""
        block, gate, up, down = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2"), "olmoe": (
            "mlp", "gate_proj", "up_proj", "down_proj")}[self.hugging_face_config()["model_type"]]
        tensors, d_ff = {f"{block}.gate.weight": self.router.weight}, self.down.size(-1)
        for e in range(self.n_experts):
            for name, w in ((gate, self.gate_up[e, :d_ff]), (up, self.gate_up[e, d_ff:]), (down, self.down[e])):
                tensors[f"{block}.experts.{e}.{name}.weight"] = w
        return tensors

    def hugging_face_config(self) -> dict:
        """What ``config.json`` says about the experts; ValueError if transformers has none like these."""
        kinds = {"mixtral": ("softmax_after",), "olmoe": ("softmax_after", "softmax_before")}.get(self.like, ())
        alone = self.k == 1 and self.kind == "softmax_after"  # there its weight is p, in transformers 1
        if self.kind not in kinds or alone or self.shared is not None or self.group is not None:
            raise ValueError(f"files of Mixtral or OLMoE hold no experts with router {self.kind!r} and k {self.k} for "
                             f"like={self.like!r}, no shared ones, and not a part of them on this process")
        theirs = {"model_type": self.like, "num_experts_per_tok": self.k, "router_aux_loss_coef": self.balance}
        if self.like == "mixtral":
            return theirs | {"num_local_experts": self.n_experts}
        return theirs | {"num_experts": self.n_experts, "norm_topk_prob": self.kind == "softmax_after"}


class _SharedExperts(nn.Module):
    """All as one SwiGLU: side by side they are a wider one."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def experts_of(directory: str | Path) -> Callable[..., MoE]:
    """The ``mlp`` with which Llama.from_pretrained(directory, mlp=...) reads a Mixtral or an OLMoE.

    Raises ValueError if config.json is of neither, or gives a token's one expert the weight 1.
    """
    try:
        theirs = json.loads((Path(directory) / "config.json").read_text())
        like, k = theirs["model_type"], theirs["num_experts_per_tok"]
        n_experts = {"mixtral": theirs.get("num_local_experts"), "olmoe": theirs.get("num_experts")}[like]
        router = "softmax_after" if like == "mixtral" or theirs.get("norm_topk_prob", False) else "softmax_before"
        balance = theirs.get("router_aux_loss_coef", 0.001 if like == "mixtral" else 0.01)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{directory} is neither a Mixtral nor an OLMoE: config.json: {error!r}") from None
    if k == 1 and router == "softmax_after":
        raise ValueError(f"{directory}: one expert per token with weight 1 leaves its router without gradient: "
                         "not computed here")
    return lambda c: MoE(c.d_model, c.d_ff, n_experts, k, router, balance=balance, z=0.0, like=like)


# --- 5. a model of such layers --------------------------------------------------------------

def _layers(model: nn.Module) -> list[MoE]:
    return [layer for layer in model.modules() if isinstance(layer, MoE)]


def expert_counts(model: nn.Module, group: dist.ProcessGroup | None = None) -> Tensor:
    """Visits to each expert in training since this was last asked, over all the group's ranks: (layers, E)."""
    if not (layers := _layers(model)):
        raise ValueError(f"{type(model).__name__} has no layer of experts")
    zeros = torch.zeros(layers[0].n_experts, dtype=torch.long, device=layers[0].router.weight.device)
    counts = torch.stack([zeros if layer.counts is None else layer.counts for layer in layers])
    for layer in layers:
        layer.counts = None
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts, group=group)
    return counts


def update_biases(model: nn.Module, rate: float = 0.001, group: dist.ProcessGroup | None = None) -> Tensor:
    """Loss-free balancing, after every optimizer step: experts with more than their share become harder to choose.

    ``group``: the ranks that see different data. Returns the ``expert_counts``.   Wang et al. 2024, algorithm 1
    """
    counts = expert_counts(model, group)  # (layers, E)
    with torch.no_grad():
        for layer, load in zip(_layers(model), counts.to(torch.float32)):
            if layer.bias is not None:
                layer.bias += rate * torch.sign(load.mean() - load)
    return counts


def shard_experts(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Make a whole model expert-parallel, in place: of every layer's E experts this rank keeps its E/P.

    Losses of the ranks are then summed (divide each by the tokens of all): the gradients of experts are complete,
    those of all other parameters are to be summed over the group.
    """
    rank, P = dist.get_rank(group), dist.get_world_size(group)
    for layer in _layers(model):
        if layer.group is not None or layer.n_experts % P:
            raise ValueError(f"{P} ranks must divide n_experts, got {layer.n_experts}, and find them whole")
        layer.group = dist.group.WORLD if group is None else group
        for name in ("gate_up", "down"):
            setattr(layer, name, nn.Parameter(getattr(layer, name).detach().chunk(P)[rank].clone()))


class Size(NamedTuple):
    """Parameters, and FLOPs of a training step per token: in all, and what one token meets."""
    parameters: int
    active_parameters: int
    flops_if_dense: int
    flops: int


def model_size(model: nn.Module, context: int | None = None) -> Size:
    """Of a Llama with experts, on the meta device too; a text of length ``context`` (None: the model's).

    Forward 2 FLOPs per weight and token, none for the embedding, and 4 T H Dh a layer for attention; backward twice.
    """
    c = model.config
    total = sum(p.numel() for p in model.parameters())
    idle = sum((layer.n_experts - layer.k) * (layer.gate_up[0].numel() + layer.down[0].numel())
               for layer in _layers(model) if layer.kind != "dense")
    products = sum(p.numel() for p in model.parameters() if p.dim() >= 2)
    products -= 0 if c.tied else model.token_embedding.weight.numel()
    attention = 4 * c.n_layers * (context or c.context) * c.n_heads * c.d_head
    return Size(total, total - idle, 3 * (2 * products + attention), 3 * (2 * (products - idle) + attention))


# --- 6. demo --------------------------------------------------------------------------------

def new_figure(path: str | None, width: float, height: float):
    """A matplotlib figure to be saved under ``path``, None without one. ValueError without matplotlib, and for what
    cannot be drawn there: now, not after the work."""
    if path is None:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    try:
        if str(path).rpartition(".")[2].lower() not in figure.canvas.get_supported_filetypes():
            raise OSError(None, "no format of pictures has that name")
        is_new = not os.path.exists(path)
        open(path, "ab").close()  # keeps a picture that is there
        if is_new:
            os.remove(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be drawn ({error.strerror}): name a picture in a folder that is "
                         "there") from None
    return figure


def _draw(figure, shares: dict[str, Tensor]) -> None:
    """Shares of the visits to each expert over training, (steps, E), as stacked areas."""
    window = 1 + min(map(len, shares.values())) // 12
    for axes, (way, share) in zip(figure.subplots(1, len(shares), sharey=True), shares.items()):
        share = share.unfold(0, window, 1).mean(-1)  # over some steps: a batch is small
        axes.stackplot(range(window, window + len(share)), share.T.numpy())
        axes.set(title=f"with {way}", xlabel=f"step (means of {window})", ylim=(0, 1), xmargin=0)
    figure.axes[0].set_ylabel("share of the visits to each expert, layer 1")


def main(steps: int, n_experts: int, k: int, seed: int, plot: str | None = None) -> None:
    if steps < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"--steps must be at least 1 and --seed in 0 .. 2^32 - 1, got {steps} and {seed}")
    from llama import Llama, LlamaConfig, next_token_loss

    figure = new_figure(plot, 12.8, 3.2)
    text = torch.tensor(list(subprocess.check_output([sys.executable, "-m", "this"])))  # (857,) bytes
    config = LlamaConfig(128, 32, 2, 4, 4, 64, 64, rope_base=1e4, tied=True)
    ways = {"nothing": {}, "balancing loss": {"balance": 0.05}, "bias": {"router": "sigmoid"}, "z-loss": {"z": 0.01}}
    busiest, largest, drawn = {}, {}, {}
    for way, options in ways.items():
        generator = torch.Generator().manual_seed(seed)
        options = {"router": "softmax_after", "balance": 0.0, "z": 0.0} | options
        model = Llama(config, mlp=lambda c: MoE(c.d_model, c.d_ff, n_experts, k, **options), generator=generator)
        if way == "nothing":
            size = model_size(model)
            print(f"{size.parameters:,} parameters, {size.active_parameters:,} active for a token;   FLOPs per "
                  f"training token: {size.flops_if_dense:.2e} if all experts ran, {size.flops:.2e} with {k} of "
                  f"{n_experts}\n\nlayer 1, with   step    loss   |log sum exp| of logits   visits per expert, in %")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, betas=(0.9, 0.99))
        seen = {}  # what the router of layer 1 made of the last batch
        model.blocks[0].mlp.register_forward_hook(lambda layer, x, y: seen.update(logits=layer.router(x[0]).detach()))
        for step in range(steps):
            starts = torch.randint(len(text) - config.context, (16, 1), generator=generator)
            batch = text[starts + torch.arange(config.context + 1)]  # (16, T + 1)
            loss = next_token_loss(model(batch[:, :-1]), batch[:, 1:])
            (loss + auxiliary_loss(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
            counts = update_biases(model, rate=0.01) if way == "bias" else expert_counts(model)  # (L, E)
            drawn.setdefault(way, []).append(counts[0] / counts[0].sum())
            if step in (0, steps // 4, steps // 2, steps - 1):
                share = counts / counts.sum(-1, keepdim=True)
                shown = " ".join(f"{100 * s:3.0f}" for s in sorted(share[0].tolist()))
                largest[way] = router_z_loss(seen["logits"]).sqrt().item()
                print(f"{way:15} {step + 1:4}   {loss:5.2f}   {largest[way]:23.2f}   {shown}")
        busiest[way] = share.amax().item() * n_experts
    if figure is not None:
        _draw(figure, {way: torch.stack(shares).cpu() for way, shares in drawn.items()})
        figure.savefig(plot, dpi=100)
        print(f"drawn: {plot}")
    print("busiest expert, times its fair share: " + ", ".join(f"{way} {busiest[way]:.2f}" for way in ways))
    balanced = max(busiest["balancing loss"], busiest["bias"]) < busiest["nothing"]
    print(f"balancing loss and bias spread the visits: {balanced} (expected True);   z-loss keeps the logits small: "
          f"{largest['z-loss'] < largest['nothing']} (expected True)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--steps", type=int, default=200,
                        help="training steps of each of four models (default %(default)s)")
    parser.add_argument("--n_experts", type=int, default=8, help="experts per layer (default %(default)s)")
    parser.add_argument("--experts_per_token", dest="k", metavar="K", type=int, default=1,
                        help="of them, those that a token visits (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and batches (default %(default)s)")
    parser.add_argument("--plot", metavar="FILE.png",
                        help="draw how often each expert is visited (needs matplotlib)")
    options = parser.parse_args()
    if not 1 <= options.k <= options.n_experts:
        parser.error(f"--experts_per_token must be in 1 .. --n_experts, got {options.k} of {options.n_experts}")
    try:
        main(**vars(options))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
