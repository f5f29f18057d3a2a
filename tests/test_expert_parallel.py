"""Experts spread over a mesh against one process, in float64: ranks see different rows."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from conftest import run_ranks

import moe
import parallel
from llama import Llama, LlamaConfig

B, T, V, E = 8, 6, 20, 4


def model(router="softmax_after"):
    generator = torch.Generator().manual_seed(1)
    config = LlamaConfig(vocab_size=V, context=T, n_layers=2, n_heads=2, n_kv_heads=1, d_model=8, d_ff=12)
    return Llama(config, generator=generator, mlp=lambda c: moe.MoE(
        c.d_model, c.d_ff, E, 2, router, per_sequence=True, shared=1, balance=0.1, z=0.01, generator=generator)).double()


def batches(steps=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(V, (B, T + 1), generator=generator) for _ in range(steps)]


def is_expert(name):
    return name.endswith((".mlp.gate_up", ".mlp.down"))


def loss_of(network, batch, rows):
    """This part's share of the step's loss; of the layers' losses, which are means over its tokens, too."""
    part = batch[rows]
    loss = F.cross_entropy(network(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="sum") / (B * T)
    return loss + moe.auxiliary_loss(network) * len(part) / B


def alone(network, clip):
    optimizer, losses, norms = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1), [], []
    for batch in batches():
        loss = loss_of(network, batch, slice(None))
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(network.parameters(), clip).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {name: p.detach() for name, p in network.named_parameters()}


def on_mesh(rank, network, sizes, clip):
    """Gradients of experts are summed over ``replicas``, all others over ``data``; then the norm of the whole."""
    mesh = parallel.mesh(**sizes)
    moe.shard_experts(network, mesh.ep)
    optimizer, losses, norms = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.1), [], []
    n = B // dist.get_world_size()
    for batch in batches():
        loss = loss_of(network, batch, slice(rank * n, (rank + 1) * n))
        loss.backward()
        squares = {True: torch.zeros((), dtype=torch.float64), False: torch.zeros((), dtype=torch.float64)}
        for name, p in network.named_parameters():
            dist.all_reduce(p.grad, group=mesh.replicas if is_expert(name) else mesh.data)
            squares[is_expert(name)] += p.grad.square().sum()
        dist.all_reduce(squares[True], group=mesh.ep)
        norm = (squares[True] + squares[False]).sqrt()
        for p in network.parameters():
            p.grad.mul_((clip / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total, group=mesh.data)
        losses.append(total.item())
        norms.append(norm.item())
    return losses, norms, dist.get_rank(mesh.ep), {name: p.detach() for name, p in network.named_parameters()}


@pytest.mark.parametrize("router", ("softmax_after", "softmax_before"))
@pytest.mark.parametrize("sizes", ({"ep": 2}, {"ep": 2, "dp": 2}, {"ep": 4}), ids=str)
def test_training_matches_one_process(sizes, router):
    """Losses, norms and parameters; ten digits of float64 are left to the order of sums, which AdamW's division enlarges."""
    P, clip = sizes["ep"] * sizes.get("dp", 1), 0.1
    whole = model(router)
    copies = [copy.deepcopy(whole) for _ in range(P)]
    losses, norms, parameters = alone(whole, clip)
    assert all(norm > clip for norm in norms)  # clipping was on
    for found_losses, found_norms, ep_rank, found in run_ranks(P, lambda rank: on_mesh(rank, copies[rank], sizes, clip)):
        torch.testing.assert_close(torch.tensor([found_losses, found_norms]), torch.tensor([losses, norms]), rtol=0, atol=1e-10)
        assert found.keys() == parameters.keys()
        for name, p in found.items():
            expected = parameters[name].chunk(sizes["ep"])[ep_rank] if is_expert(name) else parameters[name]
            torch.testing.assert_close(p, expected, rtol=0, atol=1e-10, msg=lambda m: f"{name}: {m}")
