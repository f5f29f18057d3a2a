"""word2vec against brute force in float64, torch's losses, and gensim: trees, distributions, the demo."""

import itertools
import math
import re
import runpy
import sys
import sysconfig

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import word2vec
from vectors import Vectors
from word2vec import (Vocabulary, Word2Vec, Word2VecConfig, cut_tiles, draw_windows, hidden_and_targets,
                      hierarchical_softmax_loss, huffman_tree, naive_loss, negative_sampling_loss, pairs, softmax_loss,
                      standard_library_calls, train)

gensim = pytest.importorskip("gensim", reason="pip install -r tests/requirements.txt")

ARCHITECTURES = "skipgram", "cbow"
OBJECTIVES = "negative", "hierarchical", "softmax"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def zipf_sequences(n=60, V=30, seed=0, longest=12):
    """Sequences of 0 .. longest words whose frequencies fall like 1 / rank."""
    g, p = np.random.RandomState(seed), 1 / np.arange(1, V + 1)
    return [[f"w{i}" for i in g.choice(V, g.randint(longest + 1), p=p / p.sum())] for _ in range(n)]


def small_model(architecture="skipgram", objective="negative", **changes):
    """A model with random matrices in float64, and a text of several sequences with its windows."""
    sequences = zipf_sequences(6)
    config = Word2VecConfig(architecture, objective, **(dict(d_model=5, window=3, negatives=4, shared_negatives=4, tile=8,
                                                             min_count=1, step_limit=math.inf) | changes))
    model = Word2Vec(Vocabulary(sequences), config, generator(), torch.float64)
    model.W_in = torch.randn(model.W_in.shape, generator=generator(1), dtype=torch.float64)
    model.W_out = torch.randn(model.W_out.shape, generator=generator(2), dtype=torch.float64)
    tokens, sequence = model.vocabulary.encode(sequences)
    return model, tokens, *draw_windows(sequence, config.window, generator(3))


# --- the network of the lecture -------------------------------------------------------------

def test_product_with_a_one_hot_vector_is_the_lookup_of_a_column():
    W = torch.randn(4, 7, generator=generator(), dtype=torch.float64)  # (D, V), as the lecture draws it
    one_hot = torch.eye(7, dtype=torch.float64)
    for i in range(7):
        assert torch.equal(W @ one_hot[i], W[:, i])
        assert torch.equal(W.T[i], W[:, i])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fast_softmax_loss_matches_naive_one_hot_network(architecture):
    model, tokens, first, last = small_model(architecture)
    weights = [W.requires_grad_() for W in (model.W_in, model.W_out)]
    naive = naive_loss(tokens, first, last, *weights, architecture)
    hidden, targets = hidden_and_targets(tokens, first, last, model.W_in, architecture)
    fast = softmax_loss(hidden, targets, model.W_out).sum()
    # float64; some hundred terms of order 1 to 10
    torch.testing.assert_close(fast, naive, atol=1e-10, rtol=1e-12)
    for a, b in zip(torch.autograd.grad(fast, weights), torch.autograd.grad(naive, weights)):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


# --- windows, pairs, tiles ------------------------------------------------------------------

def brute_force_pairs(first, last):
    return [(i, j) for i in range(len(first)) for j in range(first[i], last[i] + 1) if i != j]


def test_windows_match_brute_force_and_stay_inside_their_sequence():
    sequence = torch.arange(400).repeat_interleave(torch.arange(400) % 9)
    first, last = draw_windows(sequence, 5, generator())
    where = sequence.tolist()
    for i, (a, b) in enumerate(zip(first.tolist(), last.tolist())):
        assert a <= i <= b and where[a] == where[b] == where[i]
        # the same b to either side, unless the sequence ends before
        assert i - a == b - i or a == 0 or where[a - 1] != where[i] or b == len(where) - 1 or where[b + 1] != where[i]
    assert pairs(first, last)[0].tolist() == [i for i, _ in brute_force_pairs(first, last)]
    assert pairs(first, last)[1].tolist() == [j for _, j in brute_force_pairs(first, last)]


def test_window_widths_are_uniform():
    first, _ = draw_windows(torch.zeros(20_000, dtype=torch.long), 4, generator())
    widths = torch.bincount((torch.arange(20_000) - first)[4:])
    assert widths[0] == 0 and len(widths) == 5
    assert ((widths[1:] - 4999).abs() < 5 * math.sqrt(5000)).all()  # five standard deviations, seed fixed


@pytest.mark.parametrize("N, T, window", [*itertools.product((0, 1, 7, 8, 9, 31), (1, 4, 8), (1, 5))])
def test_tiles_hold_every_pair_exactly_once(N, T, window):
    sequence = torch.arange(N) // 6
    tokens = 100 + torch.arange(N)
    first, last = draw_windows(sequence, window, generator(N))
    tiles, a, b = cut_tiles(tokens, first, last, T, window)
    assert tiles.shape == (max(1, math.ceil(N / T)), T + 2 * window) and a.shape == b.shape == (len(tiles), T)
    found = [(int(tiles[m, window + t]), int(tiles[m, j])) for m in range(len(tiles)) for t in range(T)
             for j in range(a[m, t], b[m, t] + 1) if j != window + t]
    assert found == [(100 + i, 100 + j) for i, j in brute_force_pairs(first, last)]


# --- objectives -----------------------------------------------------------------------------

def test_negative_sampling_loss_matches_torchs_binary_cross_entropy():
    g = generator()
    hidden, W_out = torch.randn(9, 5, generator=g, dtype=torch.float64), torch.randn(7, 5, generator=g, dtype=torch.float64)
    targets, negatives = torch.randint(7, (9,), generator=g), torch.randint(7, (9, 4), generator=g)
    words = torch.cat([targets[:, None], negatives], 1)
    scores = torch.stack([hidden[i] @ W_out[w] for i in range(9) for w in words[i]]).view(9, 5)
    labels = torch.zeros(9, 5, dtype=torch.float64).index_fill(1, torch.tensor([0]), 1)
    expected = F.binary_cross_entropy_with_logits(scores, labels, reduction="none").sum(1)
    torch.testing.assert_close(negative_sampling_loss(hidden, targets, W_out, negatives), expected)


@pytest.mark.parametrize("V", [2, 3, 17])
def test_hierarchical_softmax_is_a_distribution_and_matches_branches_multiplied(V):
    g = generator()
    path, turn = huffman_tree(torch.randint(1, 100, (V,), generator=g).tolist())
    hidden, W = torch.randn(3, 5, generator=g, dtype=torch.float64), torch.randn(V - 1, 5, generator=g, dtype=torch.float64)
    every = torch.arange(V)
    p = torch.stack([torch.exp(-hierarchical_softmax_loss(h.expand(V, 5), every, W, path, turn)) for h in hidden])
    torch.testing.assert_close(p.sum(1), torch.ones(3, dtype=torch.float64))
    for i, word in itertools.product(range(3), range(V)):
        expected = 1.0
        for node, branch in zip(path[word], turn[word]):
            if node >= 0:
                right = torch.sigmoid(-hidden[i] @ W[node])
                expected = expected * (right if branch else 1 - right)
        torch.testing.assert_close(p[i, word], expected)


@pytest.mark.parametrize("seed", range(3))
def test_huffman_tree_matches_gensims_cost_and_is_prefix_free(seed):
    sequences = zipf_sequences(200, seed=seed)
    theirs = gensim.models.Word2Vec(sequences, hs=1, negative=0, min_count=1, vector_size=2, epochs=1).wv
    vocabulary = Vocabulary(sequences)
    path, turn = huffman_tree(vocabulary.counts.tolist())
    lengths = (path >= 0).sum(1)
    # An optimal code is not unique, its cost is.
    assert (lengths * vocabulary.counts).sum() == sum(
        theirs.get_vecattr(word, "count") * len(theirs.get_vecattr(word, "code")) for word in vocabulary.items)
    codes = ["".join(map(str, row[:n].tolist())) for row, n in zip(turn, lengths)]
    assert not any(a != b and b.startswith(a) for a in codes for b in codes)
    assert sum(2.0**-n for n in lengths.tolist()) == 1
    assert set(path[path >= 0].tolist()) == set(range(len(vocabulary) - 1)) and (path[:, 0] == path[0, 0]).all()


# --- the vocabulary's distributions ---------------------------------------------------------

@pytest.mark.parametrize("subsample", [1e-3, 0.02, 0.0])
def test_vocabulary_subsampling_and_noise_match_gensims(subsample):
    sequences = zipf_sequences(300)
    theirs = gensim.models.Word2Vec(sequences, sample=subsample, min_count=3, vector_size=2, epochs=1).wv
    ours = Vocabulary(sequences, 3)
    assert ours.items[0] == "w0" and set(ours.items) == set(theirs.key_to_index)
    assert ours.counts.tolist() == [theirs.get_vecattr(word, "count") for word in ours.items]
    kept = torch.tensor([theirs.get_vecattr(word, "sample_int") / (2**32 - 1) for word in ours.items], dtype=torch.float64)
    # gensim rounds to 2^-32
    torch.testing.assert_close(ours.keep_probability(subsample), kept, atol=1e-9, rtol=0)
    table = gensim.models.Word2Vec(sequences, min_count=3, vector_size=2, epochs=1)
    chances = np.diff(table.cum_table, prepend=0) / table.cum_table[-1]
    expected = torch.tensor([chances[table.wv.key_to_index[word]] for word in ours.items])
    torch.testing.assert_close(ours.noise(), expected, atol=1e-8, rtol=0)  # gensim rounds to 2^-31


def test_negatives_follow_the_noise_distribution():
    model, *_ = small_model()
    n, p = 50_000, model.vocabulary.noise()
    drawn = torch.bincount(model.draw_negatives((n,), generator()), minlength=len(p))
    chi_square = ((drawn - n * p)**2 / (n * p)).sum()
    assert chi_square < len(p) + 5 * math.sqrt(2 * len(p))


def test_encode_leaves_out_unknown_items_and_closes_up():
    vocabulary = Vocabulary([["a", "b", "a"], ["b", "a"]])
    tokens, sequence = vocabulary.encode([["a", "x", "b"], ["x", "y"], [], ["b"]])
    assert tokens.tolist() == [0, 1, 1] and sequence.tolist() == [0, 0, 3]


# --- a step of training ---------------------------------------------------------------------

@pytest.mark.parametrize("architecture, objective", [*itertools.product(ARCHITECTURES, OBJECTIVES)])
def test_step_matches_autograd_of_the_loss_of_all_pairs(architecture, objective):
    model, tokens, first, last = small_model(architecture, objective)
    tiles, a, b = cut_tiles(tokens, first, last, 8, 3)
    negatives = model.draw_negatives((len(tiles), 4), generator(4))
    W_in, W_out = before = [W.clone().requires_grad_() for W in (model.W_in, model.W_out)]
    if objective == "softmax":
        loss = naive_loss(tokens, first, last, W_in, W_out, architecture)
    else:
        hidden, targets = hidden_and_targets(tokens, first, last, W_in, architecture)
        if objective == "hierarchical":
            loss = hierarchical_softmax_loss(hidden, targets, W_out, model.path, model.turn).sum()
        else:  # with k shared negatives each pair of a tile meets exactly these
            centre = pairs(first, last)[0] if architecture == "skipgram" else torch.arange(len(tokens))[last > first]
            loss = negative_sampling_loss(hidden, targets, W_out, negatives[centre // 8]).sum()
    gradients = torch.autograd.grad(loss, before)
    model.step(tiles, a, b, negatives, 0.1)
    for new, old, gradient in zip((model.W_in, model.W_out), before, gradients):
        torch.testing.assert_close(new, old.detach() - 0.1 * gradient, atol=1e-12, rtol=1e-12)


def test_shared_negatives_weigh_as_much_as_k_per_pair():
    """A tile's 12 negatives, each with weight k / 12, against the mean over all of them, k times a pair."""
    model, tokens, first, last = small_model(shared_negatives=12)
    tiles, a, b = cut_tiles(tokens, first, last, 8, 3)
    negatives = model.draw_negatives((len(tiles), 12), generator(4))
    before = [W.clone().requires_grad_() for W in (model.W_in, model.W_out)]
    centre, context = pairs(first, last)
    loss = 0
    for i, j in zip(centre, context):
        h = before[0][tokens[i]]
        loss = loss - F.logsigmoid(h @ before[1][tokens[j]])
        loss = loss - 4 / 12 * F.logsigmoid(-before[1][negatives[i // 8]] @ h).sum()
    gradients = torch.autograd.grad(loss, before)
    model.step(tiles, a, b, negatives, 0.1)
    for new, old, gradient in zip((model.W_in, model.W_out), before, gradients):
        torch.testing.assert_close(new, old.detach() - 0.1 * gradient, atol=1e-12, rtol=1e-12)


def test_rows_with_many_terms_take_a_shorter_step_in_the_same_direction():
    moves = {}
    for step_limit in (math.inf, 2.0):
        model, tokens, first, last = small_model(step_limit=step_limit, lr=0.1)
        before = model.W_in.clone()
        tiles, a, b = cut_tiles(tokens, first, last, 8, 3)
        model.step(tiles, a, b, model.draw_negatives((len(tiles), 4), generator(4)), 0.1)
        moves[step_limit] = model.W_in - before
    terms = torch.zeros(len(before), dtype=torch.float64).index_add(
        0, tokens[pairs(first, last)[0]], torch.full((len(pairs(first, last)[0]),), 5.0, dtype=torch.float64))
    assert (0.1 * terms > 2).any() and (0.1 * terms < 2).any()
    torch.testing.assert_close(moves[2.0], moves[math.inf] * (2 / (0.1 * terms)).clamp(max=1)[:, None])


# --- training -------------------------------------------------------------------------------

def themed_sequences(n=400, seed=0):
    """Baskets of one theme each: items 0-9 or 10-19, and an item in all."""
    g = np.random.RandomState(seed)
    return [[int(i) for i in theme * 10 + g.permutation(10)[:6]] + [99] for theme in g.randint(2, size=n)]


THEMES = {i: i // 10 for i in range(20)}
FAST = dict(d_model=10, epochs=6, tile=16, tiles_per_step=4, subsample=0.0, lr=0.1)


@pytest.mark.parametrize("architecture, objective", [*itertools.product(ARCHITECTURES, OBJECTIVES)])
def test_training_finds_the_themes_of_baskets_of_any_hashable_items(architecture, objective):
    model = train(themed_sequences(), Word2VecConfig(architecture, objective, **FAST))
    untrained = Word2Vec(model.vocabulary, model.config, generator())
    held_out = themed_sequences(100, seed=1)
    tree_cost = math.log(2) * (huffman_tree(model.vocabulary.counts.tolist())[0] >= 0).sum(1)[
        hidden_and_targets(*_windows_of(model, held_out), untrained.W_in, architecture)[1]].double().mean().item()
    expected = {"negative": 6 * math.log(2), "softmax": math.log(21), "hierarchical": tree_cost}[objective]
    assert untrained.loss(held_out) == pytest.approx(expected, abs=1e-5)  # fp32 means
    assert model.loss(held_out) < 0.9 * untrained.loss(held_out)
    share, chance = Vectors(model.vocabulary.items, model.W_in).agreement(THEMES)
    assert share == 1 and chance == pytest.approx(9 / 19)


def _windows_of(model, sequences):
    tokens, sequence = model.vocabulary.encode(sequences)
    return tokens, *draw_windows(sequence, model.config.window, generator(0))


def test_training_is_the_same_for_the_same_seed_and_changes_with_every_setting():
    sequences = zipf_sequences(100, seed=3)
    base = dict(d_model=8, epochs=2, tile=8, tiles_per_step=4, shared_negatives=6, min_count=2, subsample=0.05, step_limit=1.0)

    def result(**changes):
        return train(sequences, Word2VecConfig(**(base | changes))).W_in

    first = result()
    assert torch.equal(first, result()) and first.dtype == torch.float32
    other = dict(architecture="cbow", objective="softmax", d_model=9, window=2, negatives=3, min_count=20, subsample=0.5,
                 epochs=3, lr=0.02, min_lr=0.04, seed=1, tile=16, tiles_per_step=2, shared_negatives=7, step_limit=0.5)
    assert other.keys() == Word2VecConfig.__dataclass_fields__.keys()
    for name, value in other.items():
        assert not torch.equal(first, result(**{name: value})) if name not in ("d_model", "min_count") else \
            first.shape != result(**{name: value}).shape, name


def test_training_stays_finite_where_one_item_is_everywhere():
    sequences = [["the"] * 30 + [f"w{i % 7}"] for i in range(300)]
    model = train(sequences, Word2VecConfig(d_model=8, subsample=0.0, epochs=3))
    assert model.W_in.abs().max() < 10 and model.W_out.abs().max() < 10


def test_learning_rate_falls_linearly(monkeypatch):
    rates = []
    monkeypatch.setattr(Word2Vec, "step", lambda self, tile, first, last, negatives, lr: rates.append(lr))
    train(themed_sequences(), Word2VecConfig(**FAST | dict(min_lr=0.05)))
    steps = len(rates) // 6
    expected = [max(0.05, 0.1 * (1 - i / len(rates))) for i in range(len(rates))]
    assert len(rates) == 6 * steps and rates == pytest.approx(expected)


# --- bad input ------------------------------------------------------------------------------

@pytest.mark.parametrize("sequences, message", [
    ([], "the corpus is empty"), ([[], []], "the corpus is empty"),
    ([["a"] * 9], "1 of 1 different items occur 5 times"),
    ([["a", "b"] * 3, ["c"] * 9, ["d"]], "1 of 4 different items occur 5 times, and it takes two"),
    ([["a", "b"]], "0 of 2 different items"),
    (["hello world"], "got the string 'hello world': split it first"),
    ([1, 2], "a list of hashable items, got 1: 'int' object is not iterable"), ([[["a"]]], "got .*: unhashable type"),
    ([["a"]] * 9 + [["b"]] * 9, "nothing to predict"),
])
def test_a_corpus_with_nothing_to_learn_is_refused(sequences, message):
    with pytest.raises(ValueError, match=message):
        train(sequences)


def test_a_sentence_of_unknown_words_trains_nothing_and_has_no_loss():
    sequences = themed_sequences(50)
    with_unknown = [*sequences, ["never", "seen"], []]
    config = Word2VecConfig(**FAST)
    a, b = train(sequences, config), train(with_unknown, config)
    assert torch.equal(a.W_in, b.W_in)
    with pytest.raises(ValueError, match="nothing to predict: no sequence has two items of the vocabulary"):
        a.loss([["never", "seen"]])


@pytest.mark.parametrize("changes, message", [
    (dict(architecture="glove"), "architecture must be one of skipgram, cbow, got 'glove'"),
    (dict(objective="nce"), "objective must be one of negative, hierarchical, softmax, got 'nce'"),
    (dict(d_model=0), "d_model must be .* at least 1, got 0"), (dict(window=1.5), "window .* got 1.5"),
    (dict(epochs=0), "epochs"), (dict(min_lr=0.1), "lr 0.05 and min_lr 0.1"), (dict(lr=math.nan), "lr must be finite"),
    (dict(subsample=-1.0), "subsample must be at least 0"), (dict(step_limit=0), "step_limit above 0"), (dict(seed=-1), "seed in 0"),
    (dict(seed=1.5), "seed in 0"),
])
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Word2VecConfig(**changes)


# --- the calls of the standard library, and the demo ----------------------------------------

SOURCE = '''
import os.path
import xml.dom as d, sys
from re import compile as c
from . import relative
class A:
    def method(self, x):
        self.inner(os.path.join(len(x), d.parse(x)))
        relative(x); unknown(x)
        def nested(): return c(x).match(sys.exit())
async def other(): print(os.getcwd().strip())
def silent(): pass
'''


def test_calls_are_named_in_full_in_the_order_they_are_made(tmp_path, monkeypatch):
    (tmp_path / "json" / "test").mkdir(parents=True)
    (tmp_path / "json" / "a.py").write_text(SOURCE)
    (tmp_path / "json" / "test" / "b.py").write_text(SOURCE)
    (tmp_path / "csv.py").write_text("not python")
    (tmp_path / "foreign.py").write_text(SOURCE)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert sorted(standard_library_calls()) == [
        [], ["builtins.len", "xml.dom.parse", "os.path.join", ".inner", "re.compile", "sys.exit", ".match"],
        ["os.getcwd", ".strip", "builtins.print"]]


def fake_calls():
    g = np.random.RandomState(0)
    return [[f"{'abcd'[m]}.f{i}" for i in g.permutation(15)[:8]] + ["builtins.len"] for m in g.randint(4, size=600)]


def run_demo(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(word2vec, "standard_library_calls", fake_calls)
    flags = dict(data="calls", architecture="skipgram", objective="negative", d_model=16, epochs=10, seed=0, out=None,
                 plot=None) | dict(arguments)
    word2vec.main(**flags)
    return re.sub(r"trained in .*", "", capsys.readouterr().out)


def test_every_flag_of_the_demo_changes_something(tmp_path, monkeypatch, capsys):
    first = run_demo(monkeypatch, capsys)
    assert first == run_demo(monkeypatch, capsys) and "W^T onehot(1) is the vector of item 1: True" in first
    assert "(1 + 5) ln 2 = 4.1589" in first and "at least twice as often: True (expected True)\n" in first
    assert re.search(r"held-out loss .* -> .*, lower: True \(expected True\)$", first.strip())
    for flag in (("architecture", "cbow"), ("objective", "softmax"), ("objective", "hierarchical"), ("d_model", 8),
                 ("epochs", 2), ("seed", 1)):
        assert run_demo(monkeypatch, capsys, flag) != first, flag
    (tmp_path / "a.txt").write_text("Das ist ein Haus und das ist ein Baum.\n\n" * 30)
    assert "lower: True" in run_demo(monkeypatch, capsys, ("data", str(tmp_path / "a.txt")))
    assert first.splitlines()[-1] in run_demo(monkeypatch, capsys, ("out", str(tmp_path / "v.bin")))
    run_demo(monkeypatch, capsys, ("out", str(tmp_path / "v.txt")))
    binary, text = Vectors.load(tmp_path / "v.bin", binary=True), Vectors.load(tmp_path / "v.txt")
    assert torch.equal(binary.vectors, text.vectors) and len(text.items) == 61
    drawn = []
    monkeypatch.setattr(Vectors, "plot", lambda self, path, labels: drawn.append((path, labels["b.f3"])))
    run_demo(monkeypatch, capsys, ("plot", str(tmp_path / "a.png")))
    assert drawn == [(str(tmp_path / "a.png"), "b")]


def test_a_plot_without_matplotlib_is_refused_before_the_training(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="--plot needs matplotlib: pip install matplotlib"):
        run_demo(monkeypatch, capsys, ("plot", "a.png"))


@pytest.mark.parametrize("arguments, message", [
    (["--data", "none.txt"], "none.txt: no such file"),
    (["--data", "few.txt"], "0 of 2 different items occur 5 times"),
    (["--data", "same.txt"], "1 of 1 different items occur 5 times"),
    (["--data", "one.txt"], "one.txt: too few paragraphs to hold one out, 1: give at least two"),
    (["--objective", "nce"], "argument --objective: invalid choice: 'nce'"),
    (["--d_model", "0"], "d_model must be a whole number and at least 1, got 0"),
    (["--out", "none/a.txt"], "none/a.txt: cannot be written (No such file or directory): check the folder"),
    (["--plot", "none/a.png"], "none/a.png: cannot be drawn (No such file"),
    (["--out", "."], ".: cannot be written"), (["--nope"], "unrecognized arguments: --nope"),
])
def test_bad_input_of_the_program_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "few.txt").write_text("one two\n\n" * 4)
    (tmp_path / "same.txt").write_text("same same\n\n" * 4)
    (tmp_path / "one.txt").write_text("one two " * 9)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["word2vec.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(word2vec.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and error.startswith("word2vec.py: ") and message in error


def test_program_copied_alone_names_the_file_that_it_lacks(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vectors", None)
    monkeypatch.setattr(sys, "argv", ["word2vec.py"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(word2vec.__file__, run_name="__main__")
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and "vectors" in error and "copy that file beside this one" in error


def test_program_stops_without_a_traceback_on_ctrl_c(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(sysconfig, "get_path", interrupted)
    monkeypatch.setattr(sys, "argv", ["word2vec.py"])
    with pytest.raises(BaseException) as exit:
        runpy.run_path(word2vec.__file__, run_name="__main__")
    assert isinstance(exit.value, SystemExit) and exit.value.code == 130 and capsys.readouterr().err == ""
