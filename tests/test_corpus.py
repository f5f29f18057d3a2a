"""A corpus is its text, whoever packs it; what the tokens were is known again."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import run_ranks

import checkpoint
import corpus
import tokenizer
from config import ConfigError, TrainConfig
from processes import ProcessError, World

DOCUMENTS = [f"{word} {i}: café, naïve and more\n" * (i % 5 + 1) for i, word in enumerate(["alpha", "beta", "gamma"] * 20)]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    return TrainConfig(data=str(path), out=str(tmp_path / "out"), vocab_size=280, context=16, held_out=0.2)


def texts_of(found, tokens):
    return tokenizer.decode_bytes(found.encoding, np.asarray(tokens)).decode().split("<|endoftext|>")[:-1]


def test_every_document_is_on_one_side_and_whole(config):
    found = corpus.prepare(config, World(), None)
    sides = [texts_of(found, side.tokens) for side in (found.train, found.validation)]
    assert sorted(sides[0] + sides[1]) == sorted(set(DOCUMENTS)) and not set(sides[0]) & set(sides[1])
    assert all(sides)
    held_out_bytes = sum(len(text.encode()) for text in sides[1])
    assert found.bytes_per_token == held_out_bytes / len(found.validation.tokens)


def test_all_processes_see_the_same_and_one_packs(config, capsys):
    def prepare(rank):
        found = corpus.prepare(config, World(rank, 3, rank, 3), None)
        return found.fingerprint, len(found.train.tokens)

    assert len(set(run_ranks(3, prepare))) == 1
    assert capsys.readouterr().out.count("reading") == 1


def test_machines_that_share_a_folder_and_read_different_text_are_refused(config, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\n".join(DOCUMENTS))

    def prepare(rank):
        mine = dataclasses.replace(config, data=[config.data, str(other)][rank])
        with pytest.raises(ConfigError, match="the machines read different text"):
            corpus.prepare(mine, World(rank, 2, 0, 1), None)

    run_ranks(2, prepare)


@pytest.mark.parametrize("text, message", (
    ("", "is empty"), (" \n", "holds no text"), ("a", "too few to split"), ("ab\n", "cannot fill one window")))
def test_too_little_text_is_refused_on_every_process(config, tmp_path, text, message):
    config.data = str(tmp_path / "[odd], näme*.txt")
    Path(config.data).write_text(text)

    def prepare(rank):
        with pytest.raises(ProcessError, match=message) as error:
            corpus.prepare(config, World(rank, 3, rank, 3), None)
        assert "\n" not in str(error.value)

    run_ranks(3, prepare)


def test_one_document_is_on_both_sides_in_parts(config, tmp_path):
    config.data = str(tmp_path / "[odd], näme*.txt")
    Path(config.data).write_text("".join(DOCUMENTS))
    found = corpus.prepare(config, World(), None)
    sides = [texts_of(found, side.tokens) for side in (found.train, found.validation)]
    assert [len(side) for side in sides] == [1, 1] and sides[0][0] + sides[1][0] == "".join(DOCUMENTS)


def test_what_a_killed_process_left_is_deleted(config):
    leftover = Path(config.out) / "tokens" / "train.npy.0123.tmp"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(bytes(1000))
    corpus.prepare(config, World(), None)
    assert not leftover.exists()


def resume(config, fingerprint):
    """A checkpoint that was trained on text of this fingerprint."""
    found = corpus.prepare(config, World(), None)
    return checkpoint.save(config.out, 1, {}, {"data_fingerprint": fingerprint or found.fingerprint},
                           write_files=lambda folder: tokenizer.save(found.encoding, folder / "tokenizer.tiktoken"))


def test_a_resumed_run_packs_again_only_what_is_gone_or_damaged(config, capsys):
    path = resume(config, None)
    folder = Path(config.out) / "tokens"
    capsys.readouterr()
    first = corpus.prepare(config, World(), path)
    assert "reading" not in capsys.readouterr().out
    for harm in ((folder / "train.npy").unlink, lambda: (folder / "train.npy").write_bytes(b""),
                 lambda: os.truncate(folder / "train.npy", 300), (folder / "held_out_bytes").unlink,
                 lambda: (folder / "tokenizer.tiktoken").write_text("harm")):
        harm()
        again = corpus.prepare(config, World(), path)
        assert "reading" in capsys.readouterr().out and again.fingerprint == first.fingerprint


def test_a_checkpoint_that_cannot_be_read_is_refused_on_every_process(config):
    path = resume(config, None)
    (path / "meta.json").write_text("harm")

    def prepare(rank):
        with pytest.raises(ProcessError, match="meta.json"):
            corpus.prepare(config, World(rank, 3, rank, 3), path)

    run_ranks(3, prepare)


def test_other_text_than_that_of_the_checkpoint_is_refused(config):
    path = resume(config, "another")
    with pytest.raises(ConfigError, match="was trained on other text than .*text.jsonl is now"):
        corpus.prepare(config, World(), path)


def test_a_tokenizer_that_cannot_be_had_is_known_before_the_text_is_read(config, capsys):
    config.tokenizer = "missing"
    with pytest.raises(ProcessError, match="--tokenizer=missing"):
        corpus.prepare(config, World(), None)
    assert "reading" not in capsys.readouterr().out
    path = checkpoint.save(config.out, 1, {}, {"data_fingerprint": "any"})
    with pytest.raises(ProcessError, match="step-00000001/tokenizer.tiktoken: no such file") as error:
        corpus.prepare(config, World(), path)  # the flag is neither cause nor cure
    assert "--tokenizer" not in str(error.value)


def test_one_changed_token_changes_the_fingerprint():
    tokens = np.arange(1000, dtype=np.uint16)
    other = tokens.copy()
    other[500] += 1
    prints = {corpus._fingerprint(tokens, tokens[:5]), corpus._fingerprint(other, tokens[:5]), corpus._fingerprint(tokens, tokens[:4])}
    assert len(prints) == 3
