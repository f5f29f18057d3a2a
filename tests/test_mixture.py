"""Mixtures: proportions by hand and of Llama's table; the stream against counting, on any ranks, from anywhere."""

import re
import runpy

import numpy as np
import pytest
import torch
from conftest import ROOT, run_ranks

from data import TokenWindows
from mixture import LLAMA, LLAMA_TOKENS, Mixture, draw_naive, epochs_seen, proportions, quotas
from packing import PackedContexts, pack_best_fit

SIZES = {"web": 5000, "books": 700, "code": 1300}
SHARES = {"web": 0.62, "books": 0.25, "code": 0.13}


def sources(context=8, seed=3):
    """A token says its source and its place: 100,000 s + i."""
    return {name: TokenWindows(np.arange(n) + 100_000 * s, context, seed) for s, (name, n) in enumerate(SIZES.items())}


# --- proportions --------------------------------------------------------------------------------

def test_proportions_by_hand():
    assert proportions({"a": 30, "b": 10}) == {"a": 0.75, "b": 0.25}
    assert proportions({"a": 30, "b": 10}, weights={"a": 1, "b": 4}) == {"a": 0.2, "b": 0.8}
    assert proportions({"a": 30, "b": 10}, epochs={"a": 1, "b": 3}) == {"a": 0.5, "b": 0.5}
    assert proportions({"a": 90, "b": 10}, temperature=2) == pytest.approx({"a": 0.75, "b": 0.25})
    assert proportions({"a": 90, "b": 10}, temperature=float("inf")) == {"a": 0.5, "b": 0.5}
    assert proportions({"a": 90, "b": 10}, temperature=1e-3) == pytest.approx({"a": 1.0, "b": 0.0})
    assert proportions({"a": 1e300, "b": 1e-300}, temperature=0.5)["a"] == 1.0  # neither overflows nor is NaN


def test_proportions_match_llamas_table():
    assert sum(share for share, _, _ in LLAMA.values()) == pytest.approx(1)
    tokens = {name: share * LLAMA_TOKENS / epochs for name, (share, epochs, _) in LLAMA.items()}
    by_epochs = proportions(tokens, epochs={name: epochs for name, (_, epochs, _) in LLAMA.items()})
    assert by_epochs == pytest.approx({name: share for name, (share, _, _) in LLAMA.items()})
    assert epochs_seen(tokens, by_epochs, LLAMA_TOKENS) == pytest.approx({name: e for name, (_, e, _) in LLAMA.items()})
    # What the paper does not say and must be so: a token of text has 2.5 to 4 bytes.
    assert all(2.5 < disk * 1e9 / tokens[name] < 4 for name, (_, _, disk) in LLAMA.items())


@pytest.mark.parametrize("arguments, message", [
    (dict(weights={"a": 1, "b": 1}, epochs={"a": 1, "b": 1}), "not both"), (dict(weights={"a": 1}), "weights or epochs are for a"),
    (dict(weights={"a": 1, "c": 1}), "sources are a, b; weights or epochs are for a, c"), (dict(weights={"a": 1, "b": 0}), "b: 10 tokens"),
    (dict(epochs={"a": float("nan"), "b": 1}), "a: 90 tokens"), (dict(temperature=0), "temperature must be positive, got 0"),
    (dict(tokens={}), "sources are none"), (dict(tokens={"a": 0, "b": 1}), "a: 0 tokens")])
def test_bad_proportions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        proportions(**{"tokens": {"a": 90, "b": 10}, **arguments})


def test_quotas_are_the_nearest_integers_that_add_up():
    rng = np.random.RandomState(0)
    for _ in range(200):
        shares = rng.dirichlet(np.ones(rng.randint(1, 9))) * 0.9 + 0.1 / 9
        shares /= shares.sum()
        found = quotas(shares, 100)
        assert found.sum() == 100 and np.abs(found - 100 * shares).max() < 1
    assert quotas([0.335, 0.335, 0.33], 10).tolist() == [4, 3, 3]
    with pytest.raises(ValueError, match="a share of 0.001 is less than one example in a block of 100"):
        quotas([0.999, 0.001], 100)


# --- the stream ---------------------------------------------------------------------------------

@pytest.mark.parametrize("block", [3, 10, 64, 10_000])
def test_draw_matches_counting(block):
    shares = SHARES if block > 3 else dict.fromkeys(SHARES, 1 / 3)
    mixture = Mixture(sources(), shares, seed=5, block=block)
    expected = draw_naive(mixture.quotas, 5, 300)
    for start, count in ((0, 300), (0, 1), (7, 13), (63, 2), (64, 200), (299, 1), (128, 64)):
        assert list(zip(*(x.tolist() for x in mixture.draw(start, count)))) == expected[start:start + count]
        counted = np.bincount([s for s, _ in expected[:start]], minlength=3).tolist()
        assert list(mixture.counts(start).values()) == counted


def test_batches_are_the_sources_examples_in_turn():
    mixture, parts, seen = Mixture(sources(), SHARES, seed=1, block=50), sources(), dict.fromkeys(SIZES, 0)
    inputs, targets = mixture.batch(0, 700)
    assert inputs.shape == targets.shape == (700, 8) and inputs.dtype == torch.int64
    for row, target in zip(inputs, targets):
        name = mixture.names[int(row[0]) // 100_000]
        expected = parts[name].batch(seen[name], 1)
        assert torch.equal(row, expected[0][0]) and torch.equal(target, expected[1][0])
        seen[name] += 1
    assert seen == mixture.counts(700) and seen["books"] > len(parts["books"])  # into its second epoch


def test_every_block_realises_the_proportions_exactly():
    mixture = Mixture(sources(), SHARES, block=100)
    for b in range(20):
        assert np.bincount(mixture.draw(100 * b, 100)[0]).tolist() == [62, 25, 13]
    drawn = mixture.draw(0, 2000)[0].reshape(20, 100)
    assert len({tuple(row) for row in drawn.tolist()}) == 20  # in another order each time
    far = 10**11  # as cheap as the beginning
    assert np.bincount(mixture.draw(far, 100)[0]).tolist() == [62, 25, 13]


def test_stream_is_the_same_on_any_number_of_ranks_and_from_anywhere():
    whole = Mixture(sources(), SHARES, block=30).batch(0, 240)[0]
    for P in (1, 2, 3, 4, 6):
        def run(rank):  # from step 2 on, as a resumed run would
            mixture = Mixture(sources(), SHARES, block=30)
            return [mixture.batch(24 * step + rank * (24 // P), 24 // P)[0] for step in range(2, 10)]
        parts = run_ranks(P, run)
        assert torch.equal(torch.cat([parts[rank][step] for step in range(8) for rank in range(P)]), whole[48:])
    for start in (0, 1, 29, 30, 31, 100):
        assert torch.equal(Mixture(sources(), SHARES, block=30).batch(start, 17)[0], whole[start:start + 17])
    one_by_one = Mixture(sources(), SHARES, block=30)
    assert torch.equal(torch.cat([one_by_one.batch(j, 1)[0] for j in range(240)]), whole)
    backwards = Mixture(sources(), SHARES, block=30)
    assert torch.equal(torch.cat([backwards.batch(j, 1)[0] for j in reversed(range(240))][::-1]), whole)


def test_seed_decides_the_order_of_sources():
    drawn = [Mixture(sources(), SHARES, seed=seed).draw(0, 100)[0].tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_mixture_of_packed_contexts_has_their_document_ids():
    rng = np.random.RandomState(0)
    parts = {}
    for name in ("a", "b"):
        documents = [rng.randint(0, 9, size=rng.randint(1, 9)) for _ in range(20)]
        parts[name] = PackedContexts(documents, pack_best_fit(np.array([len(d) for d in documents]), 16), 16, 9)
    batch = Mixture(parts, {"a": 0.5, "b": 0.5}, block=4).batch(3, 5)
    assert [x.shape for x in batch] == [(5, 16)] * 3


@pytest.mark.parametrize("arguments, message", [
    (dict(shares={"web": 1.0}), "shares of web: want the same names"), (dict(sources={}, shares={}), "sources none"),
    (dict(shares={**SHARES, "web": 0.5}), "a sum of 0.88"), (dict(shares={"web": 1.0, "books": 0.2, "code": -0.2}), "a least of -0.2"),
    (dict(shares={"web": 1.0, "books": float("nan"), "code": 0.1}), "a sum of nan"),
    (dict(seed=-1), "block must be at least 1 and seed"), (dict(block=0), "block must be at least 1"), (dict(block=3), "larger block")])
def test_bad_mixture_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Mixture(**{"sources": sources(), "shares": SHARES, **arguments})


def test_bad_batch_is_refused():
    for start, count in ((-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"got {start} and {count}"):
            Mixture(sources(), SHARES).batch(start, count)


# --- the program --------------------------------------------------------------------------------

def test_flags_change_what_is_drawn(tmp_path, monkeypatch, capsys):
    def run(*flags):
        monkeypatch.setattr("sys.argv", [str(word) for word in (*command, *flags)])
        try:
            runpy.run_path(str(ROOT / "mixture.py"), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text of {name} " * 300)
    command = ["mixture.py", "--data", f"a={tmp_path}/a.txt,b={tmp_path}/b.txt", "--examples", 20_000, "--context", 16, "--seed", 1]
    status, out, err = run("--weights", "a=9,b=1", "--temperature", 2)
    assert status == 0 and "resumed in the middle: True" in out, err
    assert "75.000%   75.000%" in out and "20,000 examples of 16 tokens, temperature 2.0" in out
    for flags, message in ((["--weights", "a=9,c=1", "--epochs", "a=1,b=1"], "give weights or epochs, not both"),
                           (["--weights", "a=9,b=x"], "want name=number"), (["--examples", 0], "want at least 1"),
                           (["--data", "a.txt"], "and name=files"), (["--seed", -1], "seed in"),
                           (["--weights", "a=9,b=1,a=2"], "each name once"),
                           (["--data", f"a={tmp_path}/a.txt,a={tmp_path}/b.txt"], "each name once")):
        status, out, err = run(*flags)
        assert (status, out) == (2, "") and re.fullmatch(rf"mixture\.py: .*{message}.*\n", err)  # before any table
