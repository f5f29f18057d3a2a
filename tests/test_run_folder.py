"""Begin, go on, start again or refuse: what a folder holds and what is asked decide it, and nothing is lost by a guess.

train.py's own use of it, with real runs, is in test_train.py.
"""

import dataclasses
import errno
import fcntl
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import checkpoint
import run_folder
from config import ConfigError, TrainConfig


@pytest.fixture(autouse=True)
def unlocked():
    yield
    run_folder.unlock()


def decide(out, **flags):
    return run_folder.decide(TrainConfig(out=str(out), **flags), set(flags))


def a_run(out, step=20, **settings):
    return checkpoint.save(out, step, {}, {"train_config": dataclasses.asdict(TrainConfig(out=str(out), **settings))})


def test_an_empty_folder_begins(tmp_path, capsys):
    assert decide(tmp_path / "a")[1] is None and capsys.readouterr().out == ""
    assert decide(tmp_path / "b", resume=True)[1] is None
    assert "nothing to resume" in capsys.readouterr().out


def test_a_run_is_neither_continued_nor_overwritten_unasked(tmp_path):
    a_run(tmp_path)
    with pytest.raises(ConfigError, match=r"already holds a run \(step-00000020\): --resume"):
        decide(tmp_path)


def test_settings_of_the_checkpoint_hold_under_what_is_given_now(tmp_path):
    path = a_run(tmp_path, lr=1e-3, steps=40, micro_batch=2, stage="pretrain")
    settings, found = decide(tmp_path, resume=True, steps=60)
    assert found == path and (settings.lr, settings.steps, settings.stage) == (1e-3, 60, "pretrain")
    assert settings.micro_batch is None  # of the machine, not of the run
    for flag, value in {"d_model": 64, "seed": 3}.items():
        run_folder.unlock()
        with pytest.raises(ConfigError, match=f"was trained with --{flag}="):
            decide(tmp_path, resume=True, **{flag: value})


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    a_run(tmp_path)
    with pytest.raises(ConfigError, match="has done 20 steps already, --steps=10 is less"):
        decide(tmp_path, resume=True, steps=10)


def test_overwriting_deletes_only_when_nothing_can_be_refused_any_more(tmp_path):
    path = a_run(tmp_path)
    assert decide(tmp_path, overwrite=True)[1] is None and path.exists()
    run_folder.begin(tmp_path, None)
    assert not path.exists()


def test_a_restart_of_this_torchrun_goes_on_and_of_another_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    run_folder.begin(tmp_path, None)
    path = a_run(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for flags in ({}, {"overwrite": True}):
        assert decide(tmp_path, **flags)[1] == path
        run_folder.unlock()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "8")
    with pytest.raises(ConfigError, match="already holds a run"):
        decide(tmp_path)


def test_stages_behind_a_run_are_not_overwritten_by_a_new_one(tmp_path):
    a_run(tmp_path / "sft")
    with pytest.raises(ConfigError, match="sft already holds a run: --overwrite deletes it, --stage=pretrain"):
        decide(tmp_path / "pretrain")
    assert decide(tmp_path / "pretrain", stage="pretrain")[1] is None
    run_folder.unlock()
    for flags in ({"stage": "all", "data": "my.txt"}, {"resume": True}):  # alignment would refuse them after days
        with pytest.raises(ConfigError, match="sft already holds a run"):
            decide(tmp_path / "pretrain", **flags)
    for flags in ({"context": 64}, {"data": "my.txt"}, {"overwrite": True}):  # these end before it, or delete it
        assert decide(tmp_path / "pretrain", **flags)[1] is None
        run_folder.unlock()
    assert run_folder.home(tmp_path / "pretrain") == tmp_path and run_folder.home(tmp_path / "x") == tmp_path / "x"


def test_what_is_no_checkpoint_is_no_run_and_is_not_deleted(tmp_path):
    (tmp_path / "step-by-step").mkdir()
    (tmp_path / "step-1.txt").touch()
    assert decide(tmp_path)[1] is None
    run_folder.begin(tmp_path, None)
    assert (tmp_path / "step-by-step").exists() and (tmp_path / "step-1.txt").exists()


def test_one_checkpoint_is_not_a_folder_to_write_to(tmp_path):
    path = a_run(tmp_path)
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ConfigError, match=f"is one checkpoint of a run, not its folder: give --out={tmp_path}$"):
            decide(path, **flags)


def test_a_checkpoint_that_is_not_train_pys_is_refused(tmp_path):
    checkpoint.save(tmp_path, 3, {}, {"stage": "sft"})
    with pytest.raises(ConfigError, match="step-00000003 was not written by train.py: --out=DIR"):
        decide(tmp_path, resume=True)


def test_a_folder_that_cannot_be_written_to_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(ConfigError, match=f"^{out}: cannot be written .*another --out$"):
            decide(out)


def test_where_there_are_no_locks_a_run_begins_with_a_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")  # Lustre without -o flock

    monkeypatch.setattr(fcntl, "flock", flock)
    assert decide(tmp_path / "out")[1] is None
    assert "cannot be locked ([Errno 38] Function not implemented)" in capsys.readouterr().out


def test_what_was_written_while_another_had_the_lock_is_seen(tmp_path, monkeypatch):
    lock = run_folder.lock
    monkeypatch.setattr(run_folder, "lock", lambda out: (a_run(out), lock(out)))
    with pytest.raises(ConfigError, match="already holds a run"):
        decide(tmp_path)


def test_a_lock_ends_with_its_process_even_by_kill(tmp_path):
    code = "import pathlib, sys, run_folder; run_folder.lock(pathlib.Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(ConfigError, match=f"is being written by process {other.pid}"):
        run_folder.lock(tmp_path)
    other.kill()
    other.communicate()
    run_folder.lock(tmp_path)
    assert (tmp_path / ".lock").read_text() == str(os.getpid())
