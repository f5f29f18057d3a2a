"""The classifier against scipy's minimum, its AUC against Mann and Whitney's statistic, its noise against the formula."""

import random
import runpy
import sys
import warnings

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

import quality_classifier
from quality_classifier import QualityClassifier, held_out_auc, roc_auc, roc_auc_naive

WORDS = ("the river and that old house have to be with all of its people near enough for long winter evenings "
         "while children play outside until their mother calls them home again").split()


def texts(n: int, share: float, seed: int) -> list[str]:
    random_ = random.Random(seed)
    return [" ".join(random_.choice(("good", "fine")) if random_.random() < share else random_.choice(WORDS) for _ in range(40))
            for _ in range(n)]


def test_roc_auc_matches_mann_whitney():
    random_ = np.random.RandomState(0)
    for a, b in ((random_.rand(50), random_.rand(70)), (random_.randint(5, size=40), random_.randint(3, 8, size=30)), ([1.0], [1.0])):
        statistic = scipy.stats.mannwhitneyu(a, b).statistic if len(a) > 1 else 0.5
        for auc in (roc_auc, roc_auc_naive):
            assert auc(np.array(a), np.array(b)) == pytest.approx(statistic / (len(a) * len(b)), abs=1e-12)
    assert roc_auc(np.array([2.0, 3.0]), np.array([1.0])) == 1
    for auc in (roc_auc, roc_auc_naive):
        with pytest.raises(ValueError, match="got 0 trusted and 1 raw"):
            auc(np.array([]), np.array([1.0]))


def test_features_are_a_bag_of_hashed_words_of_length_one():
    classifier = QualityClassifier()
    buckets, values = classifier.features("Word other word")
    assert len(buckets) == 2 and sorted((values * 5**0.5).round(6).tolist()) == [1, 2]
    again, same = QualityClassifier().features("other word WORD")
    assert np.array_equal(buckets, again) and np.array_equal(values, same)
    assert len(classifier.features("")[0]) == 0 and 0 < classifier.score("") < 1


def test_classifier_matches_scipys_minimum():
    trusted, raw = texts(30, 0.2, 0), texts(60, 0.1, 1)
    classifier = QualityClassifier(n_buckets=16, l2=1e-2).fit(trusted, raw, steps=500)
    x = np.zeros((90, 16))
    for row, text in zip(x, trusted + raw):
        buckets, values = classifier.features(text)
        row[buckets] = values
    sign = np.array([1.0] * 30 + [-1.0] * 60)
    share = np.where(sign > 0, 0.5 / 30, 0.5 / 60)

    def loss(w):
        return (share * np.logaddexp(0, -sign * (x @ w[:-1] + w[-1]))).sum() + 0.5e-2 * (w[:-1] ** 2).sum()
    best = scipy.optimize.minimize(loss, np.zeros(17))
    ours = np.append(classifier.weights, classifier.bias).astype(float)
    assert loss(ours) == pytest.approx(best.fun, abs=1e-6)  # ours is in fp32
    assert np.abs(ours - best.x).max() < 5e-3


def test_classifier_tells_the_classes_apart_and_is_deterministic(tmp_path):
    trusted, raw = texts(200, 0.2, 0), texts(200, 0.05, 1)
    assert held_out_auc(trusted, raw) > 0.9
    assert abs(held_out_auc(texts(300, 0.1, 2), texts(300, 0.1, 3)) - 0.5) < 0.15  # nothing to tell; 60 + 60 held out
    one, two = QualityClassifier().fit(trusted, raw), QualityClassifier().fit(trusted, raw)
    one.save(tmp_path / "c.npz")
    loaded = QualityClassifier.load(tmp_path / "c.npz")
    assert [one.score(t) for t in raw] == [two.score(t) for t in raw] == [loaded.score(t) for t in raw]
    for place, why in ((tmp_path / "none" / "c.npz", "No such file"), (tmp_path / "c.npz" / "c.npz", "Not a directory"),
                       (tmp_path, "directory")):
        with pytest.raises(ValueError, match=f"^{place}: cannot be written .*{why}"):
            one.save(place)
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "short.npz").write_bytes((tmp_path / "c.npz").read_bytes()[:1000])
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "other.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", a=1)
    for name in ("short.npz", "empty.npz", "other.npy", "other.npz", "none.npz"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as a classifier"):
            QualityClassifier.load(tmp_path / name)
    for wrong in ({"n_buckets": 0}, {"l2": -1.0}):
        with pytest.raises(ValueError, match="must be at least 1 and l2 at least 0"):
            QualityClassifier(**wrong)
    for classes in ((trusted, []), ([], raw)):
        with pytest.raises(ValueError, match="needs texts of both classes"):
            one.fit(*classes)
    with pytest.raises(ValueError, match="too few to hold some out"):
        held_out_auc(["a"], ["b"])


def test_pareto_noise_keeps_the_share_of_the_formula():
    classifier = QualityClassifier()
    for p in (0.05, 0.5, 0.95):
        classifier.bias = float(np.log(p / (1 - p)))
        kept = [classifier.keeps(f"document {i}") for i in range(2000)]
        expected = (2 - p) ** -9.0  # P(pareto > x) = (1 + x)^-alpha at x = 1 - p
        assert abs(np.mean(kept) - expected) < 4 * (expected * (1 - expected) / 2000) ** 0.5 + 1e-9  # 4 standard deviations
        assert kept[:200] == [classifier.keeps(f"document {i}") for i in range(200)]
    assert all(classifier.keeps(f"document {i}", alpha=1e-3) for i in range(20))  # a pareto beyond a float's range
    # numpy's pareto is the one that GPT-3's appendix calls
    assert abs(np.mean(np.random.RandomState(0).pareto(9, 10**5) > 0.5) - 1.5**-9.0) < 0.002


# --- the program ------------------------------------------------------------------------------

def run(monkeypatch, capsys, *arguments: str) -> tuple[str, str, int]:
    monkeypatch.setattr(sys, "argv", ["quality_classifier.py", *arguments])
    try:
        runpy.run_path(quality_classifier.__file__, run_name="__main__")
        code = 0
    except SystemExit as exit:
        code = exit.code
    found = capsys.readouterr()
    return found.out, found.err, code


@pytest.mark.parametrize("auc, verdict", ((0.61, "0.610: OK, above 0.6"), (0.55, "0.550: WRONG, expected above 0.6 (guessing: 0.5)")))
def test_the_verdict_and_its_words_have_one_threshold(auc, verdict, tmp_path, monkeypatch, capsys):
    for name in ("raw", "good"):
        (tmp_path / f"{name}.txt").write_text(f"a {name} text")
    monkeypatch.setattr(quality_classifier, "held_out_auc", lambda good, raw: auc)
    quality_classifier.main(f"{tmp_path}/raw.txt", f"{tmp_path}/good.txt", 9.0)
    assert capsys.readouterr().out.endswith(f"held-out ROC AUC {verdict}\n")


def test_program_reaches_its_verdict_and_every_flag_changes_something(tmp_path, monkeypatch, capsys):
    for name, share in (("raw", 0.05), ("good", 0.3), ("others", 0.1)):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{t}. A dog. A cat."}}\n' for t in texts(100, share, len(name))))
    common = ["--data", f"{tmp_path}/raw.jsonl", "--trusted", f"{tmp_path}/good.jsonl"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, _, code = run(monkeypatch, capsys, *common)
    assert code == 0 and "held-out ROC AUC 0.9" in first or "held-out ROC AUC 1.0" in first
    for more in (["--alpha", "2"], ["--data", f"{tmp_path}/others.jsonl"], ["--trusted", f"{tmp_path}/others.jsonl"]):
        assert run(monkeypatch, capsys, *common, *more)[0] != first
    for wrong, message in ((["--data", "none.txt"], "no such file"), (["--trusted", "none.txt"], "no such file"),
                           (["--data", f"{tmp_path}/good.jsonl"], "too few to hold some out"), (["--alpha", "0"], "--alpha must be"),
                           (["--alpha", "nan"], "--alpha must be"), (["-x"], "unrecognized")):
        _, error, code = run(monkeypatch, capsys, *common, *wrong)
        assert code == 2 and error.startswith("quality_classifier.py: ") and error.count("\n") == 1 and message in error
