"""Neighbours, analogies, labels, maps and files of vectors against gensim, numpy and brute force."""

import math
import re
import runpy
import sys

import numpy as np
import pytest
import torch

import vectors
from vectors import Vectors, letters

gensim = pytest.importorskip("gensim", reason="pip install -r tests/requirements.txt")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- queries --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def both():
    """The same random vectors as ours and as gensim's."""
    words, vectors = [f"w{i}" for i in range(50)], torch.randn(50, 8, generator=generator())
    theirs = gensim.models.KeyedVectors(8)
    theirs.add_vectors(words, vectors.numpy())
    return Vectors(words, vectors), theirs


def same(ours, theirs):
    scores = [score for _, score in theirs]
    return [item for item, _ in ours] == [item for item, _ in theirs] and \
        [score for _, score in ours] == pytest.approx(scores, abs=1e-5)  # fp32


def test_neighbours_and_analogies_match_gensim(both):
    ours, theirs = both
    assert same(ours.nearest("w3", 7), theirs.most_similar("w3", topn=7))
    assert same(ours.nearest(ours["w3"] * 2, 7), theirs.similar_by_vector(ours["w3"].numpy(), topn=7))
    assert same(ours.nearest("w3", 99), theirs.most_similar("w3", topn=49))
    assert same(ours.analogy("w1", "w2", "w3", 7), theirs.most_similar(positive=["w2", "w3"], negative=["w1"], topn=7))
    assert same(ours.analogy("w1", "w2", "w3", 7, "mul"),
                theirs.most_similar_cosmul(positive=["w2", "w3"], negative=["w1"], topn=7))


def test_projection_matches_the_eigenvectors_of_the_covariance(both):
    ours, _ = both
    points, X = ours.project().double().numpy(), ours.vectors.double().numpy()
    values, directions = np.linalg.eigh(np.cov(X.T))
    expected = (X - X.mean(0)) @ directions[:, :-3:-1]
    signs = np.sign((points * expected).sum(0))  # of an eigenvector the sign is free
    np.testing.assert_allclose(points, expected * signs, atol=1e-4)  # fp32, gaps of eigenvalues about 0.1


def test_agreement_matches_brute_force(both):
    ours, theirs = both
    labels = {f"w{i}": i % 4 for i in range(0, 30)} | {"w40": "alone", "not there": 0}
    items = [w for w in labels if w in ours.index]
    asked = [w for w in items if w != "w40"]
    nearest = [max((v for v in items if v != w), key=lambda v: theirs.similarity(w, v)) for w in asked]
    share, chance = ours.agreement(labels)
    assert share == pytest.approx(sum(labels[a] == labels[b] for a, b in zip(asked, nearest)) / len(asked))
    random = [sum(labels[v] == labels[w] for v in items if v != w) / (len(items) - 1) for w in asked]
    assert chance == pytest.approx(sum(random) / len(random))


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (1, 1)])
def test_a_map_of_one_vector_or_of_width_one_has_two_columns(shape):
    assert Vectors(list(range(shape[0])), torch.ones(shape)).project().tolist() == [[0, 0]] * shape[0]
    assert Vectors(["a"], torch.ones(1, 3)).nearest("a") == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_vectors_of_any_dtype_are_compared_in_float32_or_better(dtype):
    found = Vectors(["a", "b"], torch.tensor([[3, 4], [4, 3]], dtype=dtype))
    assert found.vectors.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.nearest("a") == [("b", pytest.approx(0.96, abs=1e-6))]


# --- files ----------------------------------------------------------------------------------

@pytest.mark.parametrize("binary", [False, True])
def test_files_match_gensims_both_ways_bit_for_bit(tmp_path, binary):
    words = ["the", "naïve", "日本", "os.path.join", "a:b"]
    ours = Vectors(words, torch.randn(5, 3, generator=generator()) * torch.tensor([1e-30, 1.0, 1e30]))
    path = str(tmp_path / "ours")
    ours.save(path, binary)
    theirs = gensim.models.KeyedVectors.load_word2vec_format(path, binary=binary)
    assert theirs.index_to_key == words and np.array_equal(theirs.vectors, ours.vectors.numpy())
    again = Vectors.load(path, binary)
    assert again.items == words and torch.equal(again.vectors, ours.vectors)
    theirs.save_word2vec_format(str(tmp_path / "theirs"), binary=binary)
    back = Vectors.load(tmp_path / "theirs", binary)
    assert back.items == words and torch.equal(back.vectors, ours.vectors)


def test_a_text_file_with_spaces_in_items_and_windows_line_ends_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"2 2\r\nNew York 1 2\r\nRome 3 4\r\n")
    found = Vectors.load(tmp_path / "a")
    assert found.items == ["New York", "Rome"] and found.vectors.tolist() == [[1, 2], [3, 4]]


BAD_FILES = {
    "no header": (b"the 1 2\n", False, "line 1: want the number of items and the width, found b'the 1 2': give a file in word2vec's format$"),
    "empty": (b"", False, "line 1: want"),
    "none": (b"0 5\n", False, "line 1: want"),
    "short": (b"3 2\na 1 2\nb 1 2\n", False, "ends after 2 of 3 items: cut short: copy it again$"),
    "cut": (b"3 2\na 1 2\nb 1", False, "line 3: want an item and 2 numbers, found b'b 1': copy it again$"),
    "narrow": (b"1 3\na 1 2\n", False, "line 2: want an item and 3 numbers"),
    "words": (b"1 2\na b c\n", False, "line 2: want an item and 2 numbers, found b'a b c'"),
    "twice": (b"2 1\na 1\na 2\n", False, r"2 items \(1 different\)"),
    "wide": (b"1 99999999999999999999\na 1\n", False, "line 1: want"),
    "huge": (b"1 1\na nan\n", False, "'a' has numbers that are not finite"),
    "latin": (b"1 1\n\xe9 1\n", False, "not UTF-8"),
    "binary cut": (b"2 1\na 1234b 12", True, "ends inside of item 2 of 2: cut short, or text: copy it again, or name it without .bin$"),
    "text as binary": (b"2 4\na 1 2 3 4\nb 1 2 3 4\n", True, "ends inside of item 2"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_with_its_name_and_place(tmp_path, name):
    content, binary, message = BAD_FILES[name]
    (tmp_path / "bad.vec").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        Vectors.load(tmp_path / "bad.vec", binary)
    assert "\n" not in str(caught.value) and "bad.vec" in str(caught.value)


def test_a_file_is_written_beside_under_a_name_that_says_so(tmp_path, monkeypatch):
    moved = []
    monkeypatch.setattr(vectors.os, "replace", lambda source, target: moved.append((source.name, str(target))))
    Vectors(["a"], torch.ones(1, 1)).save(tmp_path / "a.vec")
    assert moved == [(f"a.vec.{vectors.os.getpid()}.tmp", str(tmp_path / "a.vec"))] and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("items, message", [(["New York", "b"], "'New York' is not one word"), (["", "b"], "'' is not"),
                                            ([1, "1"], "two have one name"), (["a\n", "b"], r"'a\\n' is not")])
def test_items_that_the_format_cannot_hold_are_refused(tmp_path, items, message):
    with pytest.raises(ValueError, match=message):
        Vectors(items, torch.zeros(2, 3)).save(tmp_path / "a")


def test_a_failed_save_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "a"
    Vectors(["a"], torch.ones(1, 1)).save(path)
    with pytest.raises(ValueError, match="surrogates not allowed"):
        Vectors(["b", "\ud800"], torch.ones(2, 1)).save(path)
    with pytest.raises(ValueError, match="it is there and is not a file"):
        Vectors(["a"], torch.ones(1, 1)).save(tmp_path)
    for place, why in ((tmp_path / "none" / "b", "No such file"), (path / "b", "Not a directory")):
        with pytest.raises(ValueError, match=f"b: cannot be written .{why}"):
            Vectors(["a"], torch.ones(1, 1)).save(place)
    assert Vectors.load(path).items == ["a"] and list(tmp_path.iterdir()) == [path]


# --- bad input ------------------------------------------------------------------------------

def test_unknown_items_and_vectors_that_do_not_fit_are_refused():
    vectors = Vectors(["walk", "talk", "x"], torch.eye(3))
    with pytest.raises(ValueError, match="'walks' is not among the 3 items; close in spelling: walk, talk"):
        vectors.nearest("walks")
    with pytest.raises(ValueError, match="'q' is not among the 3 items$"):
        vectors.analogy("walk", "q", "talk")
    with pytest.raises(ValueError, match="method must be add or mul, got 'div'"):
        vectors.analogy("walk", "x", "talk", method="div")
    with pytest.raises(ValueError, match="no two of the 1 labelled items"):
        vectors.agreement({"walk": 1})
    with pytest.raises(ValueError, match=r"a query must be \(3,\), got shape \(2,\)"):
        vectors.nearest(torch.ones(2))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        vectors.nearest("x", 0)
    with pytest.raises(ValueError, match=r"2 items \(2 different\) and vectors of shape \(3, 3\)"):
        Vectors(["a", "b"], torch.eye(3))
    with pytest.raises(ValueError, match=r"0 items \(0 different\)"):
        Vectors([], torch.zeros(0, 3))
    with pytest.raises(ValueError, match="the vector of 'b' has numbers that are not finite"):
        Vectors(["a", "b"], torch.tensor([[1.0], [math.nan]]))


# --- the demo -------------------------------------------------------------------------------

def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["vectors.py", *map(str, arguments)])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    status = 0
    try:
        runpy.run_path(vectors.__file__, run_name="__main__")
    except SystemExit as exit:
        status = exit.code
    return status, *capsys.readouterr()


def test_letters_are_near_letters_of_their_alphabet_and_capitals_are_a_direction():
    found = letters()
    assert found.nearest("é", 400)[0][1] < 1 and found["a"].sum() == len("LATIN SMALL LETTER A".split())
    for method in ("add", "mul"):
        assert [found.analogy("a", "A", x, 1, method)[0][0] for x in "éñδж"] == list("ÉÑΔЖ")


def test_every_flag_of_the_demo_changes_something(tmp_path, monkeypatch, capsys):
    status, first, error = run(monkeypatch, capsys)
    assert (status, error) == (0, "") and re.search(r"a file of text or numbers gives all back: True \(expected True\)$", first.strip())
    one = tmp_path / "a.bin", tmp_path / "a.png"
    changed = run(monkeypatch, capsys, "--item", "é", "--analogy", "a", "A", "é", "--out", one[0], "--plot", one[1])[1]
    assert "a : A = é : ?  3CosAdd É" in changed and changed.splitlines()[1].startswith("  é  ")
    assert one[1].read_bytes()[:4] == b"\x89PNG"
    status, out, error = run(monkeypatch, capsys, "--vectors", one[0], "--item", "é", "--out", tmp_path / "a.vec")
    assert status == 0 and f"of them written and read again are the same: True (expected True)\n" in out and out.splitlines()[1] == changed.splitlines()[1]
    assert torch.equal(Vectors.load(tmp_path / "a.vec").vectors, letters().vectors)


def test_a_file_whose_vectors_change_on_the_way_is_not_the_same(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.vec").write_text("2 1\nking 1.25\nNew York 2\n")
    vectors.main(str(tmp_path / "a.vec"), "king", None, None, None)
    assert "2 vectors; 1 of them written and read again are the same: True (expected True)\n" in capsys.readouterr().out
    real = Vectors.save

    def rounded(found, path, binary=False):
        real(Vectors(found.items, found.vectors.round()), path, binary)

    monkeypatch.setattr(Vectors, "save", rounded)
    vectors.main(str(tmp_path / "a.vec"), "king", None, None, None)
    assert "written and read again are the same: False (expected True)\n" in capsys.readouterr().out
    (tmp_path / "a.vec").write_text("1 1\nNew York 2\n")
    vectors.main(str(tmp_path / "a.vec"), "New York", None, None, None)
    assert "1 vectors; no name of theirs can be written: nothing is compared" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["--vectors", "none"], "none: cannot be read (No such file or directory): check the path"), (["--vectors", "empty"], "empty, line 1: want"),
    (["--vectors", "nan"], "nan: the vector of 'a' has numbers that are not finite"), (["--out", "."], ".: cannot be written (Is a directory): check"),
    (["--plot", "none/a.png"], "none/a.png: cannot be drawn (No such file"), (["--item", "words"], "'words' is not among the"),
    (["--analogy", "a", "b"], "expected 3 arguments"), (["--nope"], "unrecognized arguments: --nope"),
])
def test_bad_input_of_the_program_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "empty").write_text("")
    (tmp_path / "nan").write_text("1 2\na 1e39 2\n")
    monkeypatch.chdir(tmp_path)
    status, _, error = run(monkeypatch, capsys, *arguments)
    assert status == 2 and error.count("\n") == 1 and error.startswith("vectors.py: ") and message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "nan"]


def test_plot_without_matplotlib_is_one_clear_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, error = run(monkeypatch, capsys, "--plot", "a.png")
    assert status == 2 and error == "vectors.py: --plot needs matplotlib: pip install matplotlib\n"


