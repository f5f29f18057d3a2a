"""Experts against transformers' Mixtral, OLMoE and DeepSeek-V3, three ways against each other, routing by brute force."""

import copy
import dataclasses
import json
import math
import runpy
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import run_ranks
from torch.utils.flop_counter import FlopCounterMode

import decode
import few_rows
import moe
from llama import Llama, LlamaConfig, naive_attention, next_token_loss
from moe import (ROUTERS, Assignments, MoE, auxiliary_loss, choose, expert_counts, experts_of, grouped_experts,
                 load_balancing_loss, model_size, naive_experts, router_z_loss, shard_experts,
                 update_biases)
from parallel import DataParallel

transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TINY = LlamaConfig(61, 64, 2, 4, 2, 32, 24, rope_base=1e4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(router="softmax_after", k=2, E=6, D=8, Dff=12, std=0.4, **options):
    module = MoE(D, Dff, E, k, router, **options).double()
    for p in module.parameters():
        p.data.normal_(0, std, generator=generator())
    return module


def tiny(seed=0, config=TINY, E=4, k=2, **options):
    return Llama(config, mlp=lambda c: MoE(c.d_model, c.d_ff, E, k, **options), generator=generator(seed))


def tokens_of(batch, length, seed=1):
    return torch.randint(61, (batch, length), generator=generator(seed))


def gradients(module, x):
    """Output and the gradients of input, router and all other parameters that have one."""
    x = x.clone().requires_grad_()
    y = module(x)
    module.zero_grad()
    (y * torch.randn(y.shape, dtype=y.dtype, generator=generator(3))).sum().backward()
    router = (module.router if isinstance(module, MoE) else module.gate).weight
    return [y, x.grad, router.grad] + [p.grad for p in module.parameters() if p is not router and p.requires_grad]


def assert_same(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- against transformers -------------------------------------------------------------------

def random_peer(folder, kind, **changes):
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, max_position_embeddings=64, num_experts_per_tok=2)
    sizes["num_local_experts" if kind == "Mixtral" else "num_experts"] = 5
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind, changes", [
    ("Mixtral", {}), ("Mixtral", dict(num_experts_per_tok=3, sliding_window=5)), ("Olmoe", {}),
    ("Olmoe", dict(num_experts_per_tok=1, num_key_value_heads=4)), ("Olmoe", dict(norm_topk_prob=True))])
def test_llama_of_experts_matches_transformers_both_ways(tmp_path, kind, changes):
    theirs, x = random_peer(tmp_path / "theirs", kind, **changes), tokens_of(2, 15)
    ours = Llama.from_pretrained(tmp_path / "theirs", mlp=experts_of(tmp_path / "theirs"))
    a, b = ours(x), theirs(x).logits
    assert_same(a, b)
    next_token_loss(a[:, :-1], x[:, 1:]).backward()
    theirs(x, labels=x).loss.backward()
    experts = theirs.model.layers[0].mlp
    assert_same(ours.blocks[0].mlp.gate_up.grad, experts.experts.gate_up_proj.grad)
    assert_same(ours.blocks[0].mlp.down.grad, experts.experts.down_proj.grad)
    assert_same(ours.blocks[0].mlp.router.weight.grad, experts.gate.weight.grad)
    ours.save_pretrained(tmp_path / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and type(again) is type(theirs)
    assert all(torch.equal(p, q) for p, q in zip(theirs.state_dict().values(), again.state_dict().values()))
    expected = theirs.generate(x[:1], attention_mask=torch.ones_like(x[:1]), max_new_tokens=12, do_sample=False,
                               eos_token_id=None, pad_token_id=0)[0, 15:].tolist()
    assert decode.generate(ours, x[:1], 12, temperature=0) == [expected]


def test_deepseek_routing_with_shared_experts_matches_transformers():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE
    config = DeepseekV3Config(hidden_size=16, moe_intermediate_size=12, n_routed_experts=6, num_experts_per_tok=3,
                              n_shared_experts=2, n_group=1, topk_group=1, routed_scaling_factor=2.5, norm_topk_prob=True)
    theirs = DeepseekV3MoE(config)
    ours = MoE(16, 12, 6, 3, "sigmoid", shared=2, scale=2.5)
    shared = theirs.shared_experts
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.4, generator=generator())
        theirs.gate.e_score_correction_bias.normal_(0, 0.3, generator=generator())
        for mine, other in ((ours.router.weight, theirs.gate.weight), (ours.bias, theirs.gate.e_score_correction_bias),
                            (ours.gate_up, theirs.experts.gate_up_proj), (ours.down, theirs.experts.down_proj),
                            (ours.shared.gate_up.weight, torch.cat((shared.gate_proj.weight, shared.up_proj.weight))),
                            (ours.shared.down.weight, shared.down_proj.weight)):
            mine.copy_(other)
    x = torch.randn(2, 9, 16, generator=generator(1))
    for a, b in zip(gradients(ours, x)[:3], gradients(theirs, x)[:3]):  # output, input, router
        assert_same(a, b)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_losses_match_transformers_and_torch(k):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
    logits = torch.randn(20, 5, dtype=torch.float64, generator=generator(), requires_grad=True)
    _, p, chosen = choose(logits, k, "softmax_before")
    ours, theirs = load_balancing_loss(p, chosen), load_balancing_loss_func((logits,), 5, k)
    assert_same(ours, theirs.double(), 1e-6)  # theirs sums in fp32
    assert_same(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(theirs, logits)[0], 1e-6)
    by_sequence = load_balancing_loss(p.view(4, 5, 5), chosen.view(4, 5, k))
    alone = [load_balancing_loss(*choose(part, k, "softmax_before")[1:]) for part in logits.split(5)]
    assert_same(by_sequence, sum(alone) / 4, 1e-12)
    expected = torch.stack([row.exp().sum().log() ** 2 for row in logits]).mean()
    assert_same(router_z_loss(logits), expected, 1e-12)


def test_balancing_loss_is_k_when_even_and_e_when_one_expert_takes_all():
    even = torch.eye(4).repeat(3, 1) * 0 + 0.25, torch.tensor([[0, 1], [2, 3]] * 6)
    assert load_balancing_loss(*even).item() == pytest.approx(2)
    one = F.one_hot(torch.zeros(9, dtype=torch.long), 4).float(), torch.zeros(9, 1, dtype=torch.long)
    assert load_balancing_loss(*one).item() == pytest.approx(4)


# --- routing --------------------------------------------------------------------------------

@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("k", [1, 2])
def test_routing_matches_brute_force(router, k):
    N, E = 10, 4
    logits = torch.randn(N, E, dtype=torch.float64, generator=generator())
    bias = torch.tensor([0.5, -0.5, 0.0, 0.2], dtype=torch.float64) if router == "sigmoid" else None
    assigned, p, _ = choose(logits, k, router, bias, scale=2.0)
    expected = {}
    for n in range(N):
        s = logits[n].tolist()
        softmax = [math.exp(v) / sum(map(math.exp, s)) for v in s]
        sigmoid = [1 / (1 + math.exp(-v)) for v in s]
        ranking = sorted(range(E), key=lambda e: -(sigmoid[e] + bias[e].item() if router == "sigmoid" else s[e]))[:k]
        if router == "softmax_after":
            total = sum(math.exp(s[e]) for e in ranking)
            expected |= {(n, e): math.exp(s[e]) / total if k > 1 else softmax[e] for e in ranking}
        elif router == "softmax_before":
            expected |= {(n, e): softmax[e] for e in ranking}
        elif router == "sigmoid":
            total = sum(sigmoid[e] for e in ranking) if k > 1 else 1
            expected |= {(n, e): 2 * sigmoid[e] / total for e in ranking}
        elif router == "dense":
            expected |= {(n, e): softmax[e] for e in range(E)}
    if router == "expert_choice":
        p_all = torch.softmax(logits, -1)
        for e in range(E):
            best = sorted(range(N), key=lambda n: -p_all[n, e].item())[:math.ceil(N * k / E)]
            expected |= {(n, e): p_all[n, e].item() for n in best}
    found = {(n, e): w for n, e, w in zip(*(a.tolist() for a in assigned))}
    assert found.keys() == expected.keys() and len(assigned.token) == len(expected)
    assert all(found[key] == pytest.approx(expected[key], abs=1e-12) for key in expected)
    assert_same(p.sum(-1), torch.ones(N, dtype=p.dtype), 1e-12)


@pytest.mark.parametrize("capacity_factor", [0.3, 0.8, 1.0, 1.7, 10.0])
def test_full_experts_drop_second_choices_and_later_tokens_first(capacity_factor):
    logits = torch.randn(13, 4, generator=generator()) + torch.tensor([1.0, 0, 0, 0])
    whole, _, chosen = choose(logits, 2, "softmax_after")
    kept, _, _ = choose(logits, 2, "softmax_after", capacity_factor=capacity_factor)
    capacity, load, expected = math.ceil(capacity_factor * 13 * 2 / 4), [0] * 4, set()
    for choice in range(2):
        for n in range(13):
            e = chosen[n, choice].item()
            if load[e] < capacity:
                load[e] += 1
                expected.add((n, e))
    weights = dict(zip(zip(whole.token.tolist(), whole.expert.tolist()), whole.weight.tolist()))
    assert {(n, e): w for n, e, w in zip(*(a.tolist() for a in kept))} == {key: weights[key] for key in expected}
    assert (len(expected) == 26) == (capacity_factor > 1.5)


def test_dropping_is_for_training_only_and_dropless_drops_nothing():
    module, x = layer(capacity_factor=0.5), torch.randn(1, 12, 8, dtype=torch.float64, generator=generator())
    dropless = copy.deepcopy(module)
    dropless.capacity_factor = None
    assert not torch.allclose(module(x), dropless(x))
    assert module.counts.sum() < dropless.counts.sum() == 24
    assert torch.equal(module.eval()(x), dropless.eval()(x))


# --- three implementations ------------------------------------------------------------------

@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("k, options", [(1, {}), (2, {}), (2, dict(shared=1)), (2, dict(capacity_factor=0.6)), (6, {})])
def test_grouped_matches_naive_with_gradients(router, k, options):
    if "capacity_factor" in options and router in ("dense", "expert_choice"):
        options = {}
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=generator())
    results = [gradients(layer(router, k, compute=compute, **options), x) for compute in (naive_experts, grouped_experts)]
    for a, b in zip(*results):
        assert_same(a, b, 1e-12)


@pytest.mark.parametrize("router", [r for r in ROUTERS if r != "expert_choice"])
def test_a_token_alone_gets_what_it_gets_in_a_batch_with_gradients(router):
    module = layer(router, shared=1, balance=0.0, z=0.0)
    x, weights = torch.randn(2, 5, 8, dtype=torch.float64, generator=generator())
    results = []
    for parts in ((x,), x.split(1)):  # a token alone is not sorted by expert
        inputs = [part.clone().requires_grad_() for part in parts]
        y = torch.cat([module(part) for part in inputs])
        module.zero_grad()
        (y * weights).sum().backward()
        gradients = [p.grad for p in module.parameters() if p.requires_grad]
        results.append([y, torch.cat([part.grad for part in inputs]), *gradients])
    for a, b in zip(*results):
        assert_same(a, b, 1e-12)


def test_decoding_by_columns_keeps_the_values_of_the_experts():
    model, tokens = tiny().eval(), tokens_of(1, 9)
    before, expected = {name: p.clone() for name, p in model.state_dict().items()}, model(tokens)
    written = decode.generate(model, tokens, 6, temperature=0)
    few_rows.one_row_layout(model)
    assert model.blocks[0].mlp.gate_up.stride() == (48 * 32, 1, 48)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert_same(model(tokens), expected)
    assert decode.generate(model, tokens, 6, temperature=0) == written


def test_decoding_on_several_cores_gives_experts_to_all_of_them_and_leaves_the_model_as_it_was(monkeypatch):
    # 2^18 numbers are the least matrix that is cut
    model = tiny(config=dataclasses.replace(TINY, d_model=256, d_ff=1024)).eval()
    expected, cut = decode.generate(model, tokens_of(1, 9), 6, temperature=0), []
    in_parts = few_rows.row_in_parts
    monkeypatch.setattr(few_rows, "_leaves_rows_to_one_core", lambda: True)
    monkeypatch.setattr(few_rows, "row_in_parts", lambda w, bias: cut.append(w.shape) or in_parts(w, bias))
    torch.set_num_threads(2)
    try:
        assert decode.generate(model, tokens_of(1, 9), 6, temperature=0) == expected
    finally:
        torch.set_num_threads(1)
    assert cut.count((2048, 256)) == cut.count((256, 1024)) == 5 * 2 * model.config.n_layers  # steps behind the prompt, k
    assert all(block.mlp.linear is F.linear for block in model.blocks)


@pytest.mark.parametrize("D, Dff", [(8, 12), (7, 5)])  # torch's grouped product takes the first, a loop the second
def test_grouped_matches_naive_in_fp32(D, Dff):
    x = torch.randn(30, D, generator=generator())
    for a, b in zip(*(gradients(layer(D=D, Dff=Dff, E=9, compute=f).float(), x) for f in (naive_experts, grouped_experts))):
        assert_same(a, b)


def test_experts_that_nobody_visits_get_zero_gradients_and_no_visit_at_all_is_zero():
    x, module = torch.randn(1, 3, 8, dtype=torch.float64, generator=generator()), layer(E=6, k=1)
    _, _, _, gate_up, down = gradients(module, x)
    idle = module.counts == 0
    assert idle.any() and not gate_up[idle].any() and not down[idle].any() and gate_up[~idle].any()
    none = Assignments(*(torch.zeros(0, dtype=dtype) for dtype in (torch.long, torch.long, torch.float64)))
    for compute in (naive_experts, grouped_experts):
        assert not compute(x[0], none, module.gate_up, module.down).any()


@pytest.mark.parametrize("router", [r for r in ROUTERS if r != "expert_choice"])
@pytest.mark.parametrize("k", [1, 2])
def test_router_learns_from_the_task_loss_for_every_k(router, k):
    x = torch.randn(4, 8, dtype=torch.float64, generator=generator())
    module = layer(router, k, balance=0.0, z=0.0)
    gradient = gradients(module, x)[2]
    assert gradient.abs().max() > 1e-3

    def loss_at(w):  # the choice is piecewise constant, so differences see what autograd sees
        return torch.func.functional_call(module, {"router.weight": w}, x)
    w = module.router.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss_at, w, eps=1e-7, atol=1e-5)


def on_ranks(rank, whole, inputs, weights):
    """One rank of expert parallelism: its own tokens, its share of the experts; the loss is summed over ranks."""
    module = copy.deepcopy(whole)
    shard_experts(module)
    x = inputs[rank].clone().requires_grad_()
    y = module(x)
    (y * weights[rank]).sum().backward()
    return y.detach(), x.grad, module.router.weight.grad, module.gate_up.grad, module.down.grad, module.gate_up.size(0)


@pytest.mark.parametrize("P, router, lengths", [(2, "softmax_after", (3, 9)), (4, "softmax_before", (5, 0, 1, 7)),
                                                (3, "sigmoid", (4, 4, 4)), (1, "dense", (6,))])
def test_expert_parallel_matches_one_process(P, router, lengths):
    whole = layer(router, 2, E=12)
    x = torch.randn(sum(lengths), 8, dtype=torch.float64, generator=generator())
    w = torch.randn(x.shape, dtype=x.dtype, generator=generator(1))
    one = copy.deepcopy(whole)
    rows = x.clone().requires_grad_()
    y = one(rows)
    (y * w).sum().backward()
    found = run_ranks(P, on_ranks, whole, x.split(lengths), w.split(lengths))
    assert all(result[5] == 12 // P for result in found)
    assert_same(torch.cat([result[0] for result in found]), y.detach(), 1e-12)
    assert_same(torch.cat([result[1] for result in found]), rows.grad, 1e-12)
    assert_same(sum(result[2] for result in found), one.router.weight.grad, 1e-12)  # a parameter that all share
    assert_same(torch.cat([result[3] for result in found]), one.gate_up.grad, 1e-12)
    assert_same(torch.cat([result[4] for result in found]), one.down.grad, 1e-12)


def train_expert_parallel(rank, state, batches):
    """Three steps of a Llama of experts on a part of each batch; returns its losses summed over ranks."""
    model, P = tiny(balance=0.05, z=0.01, per_sequence=True), dist.get_world_size()
    model.load_state_dict(state)
    shard_experts(model)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    own = [p for name, p in model.named_parameters() if not name.endswith(("gate_up", "mlp.down"))]
    for batch in batches:
        part = batch.chunk(P)[rank]
        loss = (next_token_loss(model(part[:, :-1]), part[:, 1:]) + auxiliary_loss(model)) / P
        loss.backward()
        for p in own:
            dist.all_reduce(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_expert_parallel_training_matches_one_process():
    one, batches = tiny(balance=0.05, z=0.01, per_sequence=True), [tokens_of(4, 9, seed) for seed in range(3)]
    found = run_ranks(2, train_expert_parallel, one.state_dict(), batches)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
    for step, batch in enumerate(batches):
        loss = next_token_loss(one(batch[:, :-1]), batch[:, 1:]) + auxiliary_loss(one)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert sum(losses[step] for losses in found) == pytest.approx(loss.item(), abs=1e-5)


def spread_twice(rank):
    module = layer()
    shard_experts(module)
    shard_experts(module)


def test_too_many_ranks_for_the_experts_are_refused():
    with pytest.raises(ValueError, match="2 ranks must divide n_experts, got 6, and find them whole"):
        run_ranks(2, spread_twice)
    with pytest.raises(ValueError, match="2 ranks must divide n_experts, got 5"):
        run_ranks(2, lambda rank: shard_experts(layer(E=5)))


# --- in a language model --------------------------------------------------------------------

def gradient_of(model, batch, tokens_of_the_step, group=None):
    loss = next_token_loss(model(batch[:, :-1]), batch[:, 1:]) * batch[:, 1:].numel()
    share = batch[:, 1:].numel() / tokens_of_the_step
    (loss / tokens_of_the_step + auxiliary_loss(model) * share).backward()


@pytest.mark.parametrize("P, micro_batch", [(1, 2), (2, 2), (2, 1)])
def test_auxiliary_losses_are_the_same_under_accumulation_and_data_parallelism(P, micro_batch):
    whole, batch = tiny(balance=0.5, z=0.1, per_sequence=True).double(), tokens_of(4, 9)
    one = copy.deepcopy(whole)
    gradient_of(one, batch, 32)

    def part(rank):
        model = copy.deepcopy(whole)
        dp = DataParallel(model, reduction="sum")
        mine = batch.chunk(P)[rank].split(micro_batch)
        for i, piece in enumerate(mine):
            if i < len(mine) - 1:
                with dp.no_sync():
                    gradient_of(model, piece, 32)
            else:
                gradient_of(model, piece, 32)
        dp.finish()
        return [p.grad.clone() for p in model.parameters()], expert_counts(model)
    expected = expert_counts(one)
    assert expected.sum() == 2 * 2 * 32  # layers, experts per token, tokens
    for found, counts in run_ranks(P, part):
        for a, b in zip(found, one.parameters()):
            assert_same(a, b.grad, 1e-6)  # RMSNorm's statistics are fp32
        assert torch.equal(counts, expected)


def test_auxiliary_loss_is_taken_once_and_left_by_training_only():
    model, x = tiny(balance=0.02, z=0.01), tokens_of(2, 8)
    assert auxiliary_loss(model) == 0.0
    model(x)
    first = auxiliary_loss(model)
    assert first.item() > 2 * 0.02 * 2 * 0.9  # two layers, K = 2: at least about K each
    assert auxiliary_loss(model) == 0.0
    model.eval()(x)
    assert auxiliary_loss(model) == 0.0 and expert_counts(model).sum() == 2 * 2 * 16
    assert expert_counts(model).sum() == 0
    for options in (dict(balance=0.0, z=0.0), dict(router="dense", z=0.0), dict(router="expert_choice", z=0.0)):
        silent = tiny(**options)
        silent(x)
        assert auxiliary_loss(silent) == 0.0
    copy.deepcopy(model)


def test_no_tokens_and_logits_far_below_zero_leave_no_nan():
    module = layer()
    assert module(torch.zeros(1, 0, 8, dtype=torch.float64)).shape == (1, 0, 8) and auxiliary_loss(module) == 0.0
    assigned, p, _ = choose(torch.full((3, 4), -200.0), 2, "sigmoid")
    assert torch.isfinite(p).all() and torch.isfinite(assigned.weight).all()


def test_bias_update_makes_busy_experts_harder_to_choose_and_is_no_gradient():
    model, x = tiny(router="sigmoid", balance=0.0), tokens_of(4, 20)
    bias = model.blocks[0].mlp.bias
    assert not bias.requires_grad and "blocks.0.mlp.bias" in dict(model.named_parameters()) and not bias.any()
    model(x)
    counts = update_biases(model, rate=0.25)[0].float()
    assert torch.equal(bias.detach(), 0.25 * torch.sign(counts.mean() - counts))
    for block in model.blocks:
        block.mlp.bias.data.zero_()
    spread = []
    for _ in range(100):
        model(x)
        counts = update_biases(model, rate=0.001).float()
        spread.append((counts.amax(-1) / counts.mean(-1)).mean().item())
    assert spread[-1] < 1.05 < 1.1 < spread[0]  # the busiest expert's load over the mean


def test_decode_works_on_experts():
    model = tiny().eval()
    prompts = [tokens_of(1, n, seed=n)[0].tolist() for n in (3, 9)]
    expected = decode.naive_generate(model, prompts, 6, temperature=0)
    assert decode.generate(model, prompts, 6, temperature=0) == expected


def test_bfloat16_and_autocast_work():
    model, x = tiny(balance=0.01), tokens_of(2, 8)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    next_token_loss(logits, x).backward()
    assert (logits - expected).abs().max() < 0.05
    copied = copy.deepcopy(tiny(balance=0.01)).bfloat16()
    next_token_loss(copied(x), x).backward()
    assert (copied(x) - expected).abs().max() < 0.05 and auxiliary_loss(copied).dtype == torch.float32


@pytest.mark.parametrize("config", [TINY, LlamaConfig(61, 16, 3, 2, 2, 16, 8, tied=True)])
@pytest.mark.parametrize("options", [dict(k=1), dict(k=3), dict(k=2, shared=1), dict(router="dense")])
def test_sizes_match_the_model_and_torchs_counter(config, options):
    def expanded(q, k, v, is_causal=True):
        return naive_attention(q, *(y.repeat_interleave(q.size(1) // y.size(1), 1) for y in (k, v)), is_causal)
    options = {"balance": 0.0, "z": 0.0, "compute": grouped_experts, "k": 2} | options
    model = Llama(config, expanded, lambda c: MoE(c.d_model, c.d_ff, 4, **options)).double()  # double: a plain loop
    size, x = model_size(model), tokens_of(2, config.context)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert counter.get_total_flops() == size.flops * x.numel()
    idle = 0 if options.get("router") == "dense" else 4 - options["k"]
    per_expert = 3 * config.d_model * config.d_ff * config.n_layers
    assert size.parameters == sum(p.numel() for p in model.parameters()) == size.active_parameters + idle * per_expert
    assert size.flops_if_dense == size.flops + 6 * idle * per_expert
    assert model_size(model, 5).flops < size.flops


def test_mixtrals_published_sizes():
    config = LlamaConfig(32000, 32768, 32, 32, 8, 4096, 14336, rope_base=1e6)
    with torch.device("meta"):
        size = model_size(Llama(config, mlp=lambda c: MoE(c.d_model, c.d_ff, 8, 2)))
    assert size.parameters == 46_702_792_704 and round(size.active_parameters / 1e9, 1) == 12.9


# --- bad input ------------------------------------------------------------------------------

@pytest.mark.parametrize("bad, message", [
    (dict(k=9), "k must be in 1 .. n_experts, got 9 of 8"), (dict(like="gpt"), "like must be .* got 'gpt'"), (dict(k=0), "k must be .* at least 1, got 0"),
    (dict(n_experts=0), "n_experts must be .* at least 1, got 0"), (dict(shared=-1), "shared must be .* at least 0, got -1"),
    (dict(router="best"), "router must be one of softmax_after, .* got 'best'"),
    (dict(capacity_factor=0.0), "capacity_factor must be positive"), (dict(z=-1.0), "balance and z must be at least 0"),
    (dict(capacity_factor=1.0, router="dense"), "tokens must choose some of the experts, got 1.0 with 'dense'")])
def test_impossible_layers_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        MoE(8, 12, **bad)


@pytest.mark.parametrize("k, router, message", [(5, "dense", "k must be .* got 5 of 4"), (2, "best", "got 'best'")])
def test_impossible_choices_are_refused(k, router, message):
    with pytest.raises(ValueError, match=message):
        choose(torch.zeros(3, 4), k, router)


def test_tokens_without_a_batch_are_balanced_as_one_sequence():
    x = torch.randn(10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = []
    for tokens in (x, x[None]):
        one = layer(balance=0.5, per_sequence=True).train()
        one(tokens)
        losses.append(one.auxiliary_loss.item())
    assert losses[0] == losses[1]


def test_input_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"MoE of width 8 got x of shape \(2, 7\)"):
        layer()(torch.zeros(2, 7))


def test_foreign_directories_and_unwritable_experts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a Mixtral nor an OLMoE: config.json: .*No such file"):
        experts_of(tmp_path)
    for content, message in (({"model_type": "llama", "num_experts_per_tok": 2}, "config.json: KeyError"),
                             ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1}, "weight 1")):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            experts_of(tmp_path)
    for options in (dict(router="sigmoid"), dict(shared=1), dict(router="dense"), dict(k=1),
                    dict(router="softmax_before", like="mixtral"), dict(router="dense", like="olmoe")):
        with pytest.raises(ValueError, match="files of Mixtral or OLMoE hold no experts with router"):
            tiny(**options).save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="no model of transformers is a olmoe with qk_norm=False"):
        tiny(router="softmax_before").save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    random_peer(tmp_path / "theirs", "Mixtral")
    with pytest.raises(ValueError, match=r"block_sparse_moe.gate.weight is \(5, 32\), the config says \(4, 32\)"):
        Llama.from_pretrained(tmp_path / "theirs", mlp=lambda c: MoE(c.d_model, c.d_ff, 4, 2))


def test_demo_ends_on_its_verdict(capsys):
    moe.main(steps=2, n_experts=4, k=1, seed=0)
    assert "z-loss keeps the logits small: " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("missing, message", [(None, "no/x.png: cannot be drawn .No such file"), ("matplotlib.figure", "pip install matplotlib")])
def test_what_cannot_be_drawn_is_said_before_the_training(missing, message, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing or "unused", None)
    with pytest.raises(ValueError, match=message):
        moe.main(steps=1, n_experts=4, k=1, seed=0, plot="no/x.png")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("flag, value", [("--steps", "0"), ("--experts_per_token", "9"), ("--seed", "-1")])
def test_bad_flags_are_one_line(flag, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["moe.py", flag, value])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(moe.__file__, run_name="__main__")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and message.startswith("moe.py: ")
    assert flag.strip("-") in message
