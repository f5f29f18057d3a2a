"""Packing: plans against brute force, and attention inside a document against documents alone."""

import itertools
import re
import runpy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import recompute
from gpt import GPT, GPTConfig, attention, naive_attention
from llama import Llama, LlamaConfig
from packing import (IGNORE, PackedContexts, PackedRows, block_diagonal_mask, pack_best_fit, pack_best_fit_naive,
                     pack_crossing, pack_in_order, pack_padded, torn, waste)
from shards import open_shard, write_shard

WAYS = [pack_crossing, pack_padded, pack_in_order, pack_best_fit]


def random_documents(seed=0, n=50, vocab=300, longest=40):
    rng = np.random.RandomState(seed)
    return [rng.randint(0, vocab, size=rng.randint(1, longest)) for _ in range(n)]


# --- plans --------------------------------------------------------------------------------------

@pytest.mark.parametrize("way", WAYS)
def test_plan_holds_every_token_once(way):
    rng = np.random.RandomState(0)
    for context in (1, 2, 7, 16, 100):
        for _ in range(20):
            lengths = rng.randint(1, 40, size=rng.randint(1, 30))
            plan = way(lengths, context)
            held = [[] for _ in lengths]
            for _, document, start, n in plan.tolist():
                assert n >= 1
                held[document] += range(start, start + n)
            assert [sorted(tokens) for tokens in held] == [list(range(n)) for n in lengths]
            rows = plan[:, 0].tolist()
            assert rows == sorted(rows) and set(rows) == set(range(rows[-1] + 1))
            assert np.bincount(plan[:, 0], plan[:, 3]).max() <= context
            assert 0 <= waste(plan, context) < 1
            if way is not pack_crossing:
                assert torn(plan, lengths, context) == 0


def test_best_fit_matches_naive():
    rng = np.random.RandomState(1)
    for context in (1, 2, 5, 16, 64, 300):
        for _ in range(15):
            lengths = rng.randint(1, rng.randint(2, 2 * context + 2), size=rng.randint(1, 120))
            np.testing.assert_array_equal(pack_best_fit(lengths, context), pack_best_fit_naive(lengths, context))


def fewest_contexts(lengths, context, spaces=()):
    """Brute force: the first document into every context that has room, and into a new one; then the others."""
    if not lengths:
        return len(spaces)
    n, *rest = lengths
    return min(fewest_contexts(rest, context, (*spaces[:k], space - n, *spaces[k + 1:]))
               for k, space in enumerate((*spaces, context)) if space >= n)


def test_best_fit_is_within_its_bound_of_the_optimum():
    """Best-fit decreasing uses at most 11/9 of the optimum + 6/9 contexts (Doesa 2007, for FFD; the same for BFD)."""
    rng, extra = np.random.RandomState(2), 0
    for _ in range(60):
        lengths = rng.randint(1, 11, size=6)
        best, used = fewest_contexts(lengths.tolist(), 10), pack_best_fit(lengths, 10)[-1, 0] + 1
        assert best <= used <= 11 / 9 * best + 6 / 9
        assert used <= pack_in_order(lengths, 10)[-1, 0] + 1 <= pack_padded(lengths, 10)[-1, 0] + 1
        extra += used - best
    assert extra <= 3  # and nearly always the optimum itself


def test_plans_by_hand():
    lengths = np.array([3, 5, 2])
    assert pack_crossing(lengths, 4).tolist() == [[0, 0, 0, 3], [0, 1, 0, 1], [1, 1, 1, 4], [2, 2, 0, 2]]
    assert pack_in_order(lengths, 4).tolist() == [[0, 0, 0, 3], [1, 1, 0, 4], [2, 1, 4, 1], [2, 2, 0, 2]]
    assert pack_best_fit(lengths, 4).tolist() == [[0, 1, 0, 4], [1, 0, 0, 3], [1, 1, 4, 1], [2, 2, 0, 2]]
    assert torn(pack_crossing(np.array([3, 3]), 4), np.array([3, 3]), 4) == 1
    assert waste(pack_padded(lengths, 4), 4) == 1 - 10 / 16


@pytest.mark.parametrize("lengths, context", [([], 4), ([1, 0], 4), ([1], 0), ([[1]], 4), ([1.5], 4)])
def test_plan_refuses_bad_lengths(lengths, context):
    for way in (*WAYS, pack_best_fit_naive):
        with pytest.raises(ValueError, match="context must be at least 1 and lengths"):
            way(np.array(lengths), context)


# --- batches and attention ----------------------------------------------------------------------

@pytest.mark.parametrize("way", WAYS)
def test_batches_give_every_token_as_a_target_after_its_predecessor(way):
    documents = random_documents(longest=30)
    contexts = PackedContexts(documents, way(np.array([len(d) for d in documents]), 16), 16, eot=299, seed=3)
    pairs = []
    for j in range(len(contexts)):
        inputs, targets, ids = contexts.batch(j, 1)
        assert inputs.shape == targets.shape == ids.shape == (1, 16)
        assert ((targets == IGNORE) == (ids == -1)).all()
        pairs += [(i, t) for i, t in zip(inputs.flatten().tolist(), targets.flatten().tolist()) if t != IGNORE]
    expected = [(int(a), int(b)) for d in documents for a, b in zip([299, *d[:-1]], d)]
    assert sorted(pairs) == sorted(expected)


def test_order_is_drawn_from_the_seed_and_resumes_anywhere():
    documents = random_documents()
    plan = pack_best_fit(np.array([len(d) for d in documents]), 64)

    def stream(start, count, **options):
        return PackedContexts(documents, plan, 64, 0, **options).batch(start, count)[1]

    n, whole = len(PackedContexts(documents, plan, 64, 0)), stream(0, 100)
    assert torch.equal(whole[37:60], stream(37, 23)) and n < 50
    assert not torch.equal(whole[:n], whole[n:2 * n]) and not torch.equal(whole, stream(0, 100, seed=1))
    assert sorted(whole[:n].tolist()) == sorted(whole[n:2 * n].tolist())
    plain = stream(0, 2 * n, shuffle=False)
    assert torch.equal(plain[:n], plain[n:]) and plain[0, :3].tolist() == documents[plan[0, 1]][:3].tolist()


def gpt(attention=attention, dropout=0.0):
    return GPT(GPTConfig(13, 16, 2, 2, 8, dropout=dropout), attention, torch.Generator().manual_seed(0)).double()


def llama(n_kv_heads=1, window=None):
    sizes = LlamaConfig(13, 16, 2, 2, n_kv_heads, 8, 16, rope_base=1e4, window=window)
    return Llama(sizes, generator=torch.Generator().manual_seed(0)).double()


# 1e-7: Llama's norms and angles are in fp32. GPT is in float64 throughout.
MODELS = {"gpt": (gpt, 1e-12), "gpt, naive attention alone": (lambda: gpt(naive_attention), 1e-12),
          "llama, one head": (llama, 1e-7), "llama": (lambda: llama(2), 1e-7),
          "llama, window": (lambda: llama(window=4), 1e-7)}


@pytest.mark.parametrize("way", [pack_in_order, pack_best_fit])
@pytest.mark.parametrize("name", MODELS)
def test_packed_losses_and_gradients_match_documents_alone(way, name):
    make, tolerance = MODELS[name]
    documents, model = random_documents(n=6, vocab=13, longest=12), make()
    contexts = PackedContexts(documents, way(np.array([len(d) for d in documents]), 15), 16, eot=12, shuffle=False)
    inputs, targets, ids = contexts.batch(0, len(contexts))
    assert ids.max() >= 1 and (ids == -1).any()
    logits = model(inputs, PackedRows(ids))  # (B, T, V)
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    expected = 0.0
    for document in documents:
        row = torch.from_numpy(document)[None]
        found = model(torch.cat((torch.tensor([[12]]), row[:, :-1]), 1))
        expected = expected + F.cross_entropy(found[0], row[0], reduction="sum")
    torch.testing.assert_close(total, expected, atol=0, rtol=tolerance)
    leaking = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    assert abs(leaking - expected) > 1e-4  # the check can tell
    for ours, theirs in zip(torch.autograd.grad(total, list(model.parameters())),
                            torch.autograd.grad(expected, list(model.parameters()))):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("make", [gpt, llama])
def test_no_token_of_one_document_changes_another(make):
    ids = torch.tensor([[0] * 3 + [1] * 1 + [0] * 6, [0] * 7 + [-1] * 3])  # 0 again: another document
    tokens, model = torch.randint(13, (2, 10), generator=torch.Generator().manual_seed(0)), make().eval()
    with torch.no_grad():
        before = model(tokens, PackedRows(ids))
        for b, t in itertools.product(range(2), range(10)):
            other = tokens.clone()
            other[b, t] = (other[b, t] + 1) % 13
            changed = (model(other, PackedRows(ids)) != before).any(-1)  # (2, 10)
            allowed = torch.zeros_like(changed)
            end = {0: 3 if t < 3 else 4 if t < 4 else 10, 1: 7 if t < 7 else 10}[b]
            allowed[b, t:end] = True
            assert changed[b, t] and not (changed & ~allowed).any()


def test_rows_may_be_used_anew_before_the_backward_of_an_earlier_call():
    """With blocks that are computed again in backward: each call's mask is its own."""
    ids, tokens = torch.tensor([[0, 0, 1, 1, 1, 2]]), torch.arange(6)[None]
    gradients = []
    for what in ("none", "block"):
        model, rows = recompute.recompute(llama(), what), PackedRows(ids)
        first = model(tokens, rows).square().sum()
        (first + model(tokens[:, :4], rows).square().sum()).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_positions_begin_anew_with_each_document():
    rows = PackedRows(torch.tensor([[0, 0, 0, 1, 2, 2], [5, 5, -1, -1, -1, -1]]))
    assert (rows.begin(6) + torch.arange(6)).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]
    assert (rows.begin(4) + torch.arange(4)).tolist() == [[0, 1, 2, 0], [0, 1, 0, 1]]


def test_mask_is_block_diagonal_and_causal():
    mask = block_diagonal_mask(torch.tensor([[0, 0, 1, 1, 1, -1]]))[0, 0]
    expected = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3), torch.ones(1, 1)).tril().bool()
    assert torch.equal(mask, expected) and mask.any(1).all()


@pytest.mark.parametrize("make", [gpt, llama])
def test_packed_rows_refuse_other_shapes(make):
    rows, model = PackedRows(torch.zeros(1, 8, dtype=torch.long)), make()
    assert model(torch.zeros(1, 8, dtype=torch.long), rows).shape == (1, 8, 13)
    for tokens, ids in ((2, 1), (1, 2), (2, 3)):
        with pytest.raises(ValueError, match=f"{tokens} rows of tokens have positions or document_ids for {ids}"):
            model(torch.zeros(tokens, 8, dtype=torch.long), PackedRows(torch.zeros(ids, 8, dtype=torch.long)))
    with pytest.raises(ValueError, match="rows of 9 tokens have document_ids for 8"):
        model(torch.zeros(1, 9, dtype=torch.long), rows)
    with pytest.raises(ValueError, match=r"must be \(B, T\), got shape \(8,\)"):
        PackedRows(torch.zeros(8, dtype=torch.long))


def test_contexts_refuse_plans_that_do_not_fit():
    documents, plan = [np.arange(5)], pack_padded(np.array([5]), 8)
    with pytest.raises(ValueError, match="rows of 5 tokens .* got 4, 1 and 0"):
        PackedContexts(documents, plan, 4, 0)
    with pytest.raises(ValueError, match=r"\(pieces, 4\)"):
        PackedContexts(documents, plan[:, :3], 8, 0)
    with pytest.raises(ValueError, match="1 documents"):
        PackedContexts([], plan, 8, 0)
    for bad in ([[1, 0, 0, 2], [0, 0, 2, 3]], [[0, -1, 0, 4]]):
        with pytest.raises(ValueError, match="a plan's numbers must be at least 0, its contexts in order"):
            PackedContexts(documents, np.array(bad), 8, 0)
    for start, count in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match="start must be at least 0 and count at least 1"):
            PackedContexts(documents, plan, 8, 0).batch(start, count)


@pytest.mark.parametrize("on_disk", [False, True])
def test_contexts_refuse_pieces_that_are_not_inside_their_document(on_disk, tmp_path):
    """Of (1, 4, 7) numpy would repeat the one token that is there, in silence."""
    documents = [np.arange(3), np.arange(5)]
    if on_disk:
        documents = write_shard(tmp_path / "a.tokens", documents, 8)
    for document, start, stop in ((1, 4, 7), (0, 0, 5), (1, 5, 6), (1, 9, 10), (0, 2, 2)):
        plan = np.array([[0, 1, 0, 3], [1, document, start, stop - start]])
        with pytest.raises(ValueError, match=rf"^piece 1 of the plan, tokens \[{start}, {stop}\) of document {document}, is empty or "
                                             f"ends behind the document, which has {len(documents[document])}: make the plan"):
            PackedContexts(documents, plan, 8, 0)
    assert len(PackedContexts(documents, np.array([[0, 1, 4, 1], [0, 0, 0, 3]]), 8, 0)) == 1


# --- the program --------------------------------------------------------------------------------

def test_flags_change_what_is_written(tmp_path, monkeypatch, capsys):
    def run(*flags):
        monkeypatch.setattr("sys.argv", ["packing.py", "--data", f"{tmp_path}/*.txt", *map(str, flags)])
        try:
            runpy.run_path(str(ROOT / "packing.py"), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"text number {i} " * (i + 1))
    out = tmp_path / "out"
    for flags, message in ((("--context", 0), "--context must be"), (("--context", 10**10), "--context must be"), (("--seed", -1), "--seed in"),
                           (("--held_out", 1), "held_out must be"), (("--held_out", 1e-12), "0 held out")):
        status, printed, error = run(*flags, "--out", out)
        assert (status, printed, out.exists()) == (2, "", False) and re.fullmatch(rf"packing\.py: .*{message}.*\n", error)
    status, printed, error = run("--context", 64, "--held_out", 0.3, "--seed", 1, "--out", out)
    assert status == 0 and "exactly once: True; a flipped bit is refused by name: True (expected True, True)" in printed, error
    assert "context 64" in printed and "naive = fast: True" in printed
    assert len(open_shard(out / "train.tokens")) + len(open_shard(out / "validation.tokens")) == 30
    status, printed, error = run("--out", out)
    assert (status, printed) == (2, "") and re.fullmatch(r"packing\.py: .*is there already.*\n", error)
    status, printed, _ = run("--context", 10**6, "--held_out", 0.3)  # no mask of 10^12
    assert status == 0 and "context 1000000" in printed
