"""Checkpoints: what is saved comes back, whatever is killed, cut, flipped, full or foreign."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import resource
import runpy
import shutil
import signal
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn as nn

import checkpoint
import config
import models
import pieces
import tokenizer
from checkpoint import CheckpointError, latest, load, load_states, optimizer_state, save


def net(seed=0, width=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))


def optimizer_of(model):
    decayed, others = [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}], lr=0.05, fused=True)


def step(model, optimizer, seed):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def states(model, optimizer):
    return {"model": dict(model.named_parameters()), "optimizer": optimizer_state(model, optimizer)}


def saved_run(folder, steps=3, **arguments):
    model = net()
    optimizer = optimizer_of(model)
    for i in range(steps):
        step(model, optimizer, i)
        path = save(folder, i + 1, states(model, optimizer), {"note": "π"}, **arguments)
    return model, optimizer, path


def test_resumed_training_is_bit_for_bit_the_unbroken_one(tmp_path):
    model, optimizer, path = saved_run(tmp_path)
    other = net(seed=9)
    other_optimizer = optimizer_of(other)
    found = load(latest(tmp_path))
    assert found["meta"] == {"step": 3, "note": "π"}
    load_states(other, other_optimizer, found)
    for i in range(3, 6):
        step(model, optimizer, i)
        step(other, other_optimizer, i)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    assert all(torch.equal(a[key], b[key]) for (a, b) in zip(optimizer.state.values(), other_optimizer.state.values())
               for key in a)


def test_optimizer_states_match_torchs_own_state_dict(tmp_path):
    model, optimizer, _ = saved_run(tmp_path)
    other = net(seed=9)
    other_optimizer = optimizer_of(other)
    load_states(other, other_optimizer, load(latest(tmp_path)))
    a, b = optimizer.state_dict(), other_optimizer.state_dict()
    assert a["param_groups"] == b["param_groups"]
    torch.testing.assert_close(a["state"], b["state"], atol=0, rtol=0)


def test_files_of_the_caller_and_parts_on_their_own(tmp_path):
    *_, path = saved_run(tmp_path, write_files=lambda folder: (folder / "words.txt").write_text("abc"))
    assert (path / "words.txt").read_text() == "abc"
    assert set(load(path, parts=("model",))) == {"meta", "model"}
    assert set(load(path, parts=())) == {"meta"}
    (path / "words.txt").write_text("abd")
    with pytest.raises(CheckpointError, match="words.txt is damaged"):
        load(path)


@pytest.mark.parametrize("keep, names", [(1, [3]), (2, [2, 3]), (None, [1, 2, 3])])
def test_keep_bounds_what_remains(tmp_path, keep, names):
    saved_run(tmp_path, keep=keep)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{i:08d}" for i in names]


def test_arguments_that_would_lose_a_checkpoint_are_refused(tmp_path):
    for arguments in (dict(step=-1), dict(step=1, keep=0), dict(step=1, keep=-1)):
        with pytest.raises(ValueError, match="step must be at least 0 and keep at least 1"):
            save(tmp_path, tensors={"model": {}, "optimizer": {}}, meta={}, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_users_copies_beside_the_checkpoints_are_left_alone(tmp_path):
    saved_run(tmp_path, steps=2)
    for name in ("step-00000002-best", "step-00000009.copy", "step-by-step"):
        shutil.copytree(tmp_path / "step-00000002", tmp_path / name)
    assert latest(tmp_path).name == "step-00000002"
    saved_run(tmp_path, steps=3, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002-best", "step-00000003", "step-00000009.copy",
                                                          "step-by-step"]


def test_the_same_step_can_be_saved_again(tmp_path):
    saved_run(tmp_path, steps=2)
    model, _, path = saved_run(tmp_path, steps=2)
    assert torch.equal(load(path)["model"]["0.weight"], model[0].weight)


def test_a_later_step_sorts_later_beyond_eight_digits(tmp_path):
    for number in (99_999_999, 100_000_000):
        save(tmp_path, number, {"model": {}, "optimizer": {}}, {})
    assert load(latest(tmp_path))["meta"]["step"] == 100_000_000


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.json", "manifest.json"])
def test_missing_truncated_and_flipped_files_are_refused_by_name(tmp_path, name):
    *_, path = saved_run(tmp_path, keep=2)
    file, good = path / name, (path / name).read_bytes()
    generator = torch.Generator().manual_seed(0)
    for place in [0, len(good) - 2, *torch.randint(len(good) - 2, (20,), generator=generator).tolist()]:
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        file.write_bytes(bad)
        if name == "manifest.json" and bad.decode("utf-8", "replace").split() == good.decode().split():
            continue  # white space between two entries says nothing
        with pytest.raises(CheckpointError, match=r"(damaged|missing|bytes of|not readable).*go on from .*step-00000002"):
            load(path)
    for length in (0, 1, len(good) // 2, len(good) - 2):
        file.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match="bytes of|not readable"):
            load(path)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing|not readable"):
        load(path)
    file.write_bytes(good)
    load(path)


def test_every_message_is_one_line(tmp_path):
    *_, path = saved_run(tmp_path)
    (path / "manifest.json").write_text('{"__0_0.distcp": 3}')
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_no_checkpoint_is_said_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        latest(tmp_path)
    with pytest.raises(CheckpointError, match="is not a directory"):
        latest(tmp_path / "nowhere")


def test_another_models_checkpoint_is_refused_and_touches_nothing(tmp_path):
    saved_run(tmp_path)
    found = load(latest(tmp_path))
    wide = net(width=5)
    before = [p.clone() for p in wide.parameters()]
    with pytest.raises(CheckpointError, match=r"another model: 0.weight is \(4, 3\) in it, \(5, 3\) here"):
        load_states(wide, None, found)
    with pytest.raises(CheckpointError, match="another model: only the model has 3.bias"):
        load_states(nn.Sequential(*net(), nn.Linear(1, 1)), None, found)
    with pytest.raises(CheckpointError, match="another model: only the checkpoint has 2.bias"):
        load_states(net()[:2], None, found)
    model, found["model"]["0.weight"] = net(), net(seed=5)[0].weight
    with pytest.raises(CheckpointError, match="another model: only the checkpoint has 7.weight"):
        load_states(model, optimizer_of(model), found | {"optimizer": {"7.weight": {}}})
    with pytest.raises(CheckpointError, match="loaded without its part 'optimizer'"):
        load_states(model, optimizer_of(model), {"meta": {}, "model": found["model"]})
    with pytest.raises(ValueError, match="the optimizer has a parameter that is not the model's"):
        load_states(model, optimizer_of(net()), found)
    with pytest.raises(ValueError, match="the optimizer has a parameter that is not the model's"):
        optimizer_state(model, optimizer_of(net()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net().parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, wide.parameters()))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = save(tmp_path, 1, {"model": {"w": torch.ones(3)}, "optimizer": {}}, {})
    (path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest[".metadata"] = checkpoint._fingerprint(path / ".metadata")  # whoever made it made the manifest, too
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="could run code"):
        load(path)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(ValueError, match="holds tensors, model/w is a Bomb"):
        save(tmp_path, 2, {"model": {"w": Bomb()}}, {})


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    save(tmp_path, 1, {"model": {"w": torch.ones(10)}, "optimizer": {}}, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # a disk with room for 100 KB more
    try:
        with pytest.raises(CheckpointError) as caught:
            save(tmp_path, 2, {"model": {"w": torch.ones(100_000)}, "optimizer": {}}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = str(caught.value)
    assert "could not save" in message and "step-00000001 stays as it was: see that it has room" in message
    assert "\n" not in message
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert load(latest(tmp_path))["meta"]["step"] == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not save .*none before it"):
        save(tmp_path / "file", 1, {"model": {}, "optimizer": {}}, {})


def test_the_process_that_the_demo_kills_ends_when_the_demo_is_killed(tmp_path, monkeypatch):
    save(tmp_path, 0, {"model": {}, "optimizer": {}}, {})
    parents = iter([7, 7, 7, 1])  # process 1 inherits what is left by one that died
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    here, there = multiprocessing.Pipe(duplex=False)
    checkpoint._save_for_ever(str(tmp_path), there)
    assert here.recv() == "" and latest(tmp_path).name == "step-00000002"


def test_export_of_what_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    model = models.build("gpt", {"vocab_size": 5, "context": 4, "n_layers": 1, "n_heads": 1, "d_model": 4})
    meta = {"model_type": "gpt", "model_config": dataclasses.asdict(model.config)}
    save(tmp_path, 1, {"model": dict(model.named_parameters())}, meta)
    (tmp_path / "file").write_text("")
    for to, message in (("file", "file"), ("hf", "tokenizer.tiktoken")):
        monkeypatch.setattr(sys, "argv", ["checkpoint.py", "--export", str(tmp_path), "--to", str(tmp_path / to)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(checkpoint.__file__, run_name="__main__")
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1 and error.startswith("checkpoint.py: ")


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_transformers_opens_an_export_and_so_do_we(kind, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    encoding = tokenizer.train(["to be or not to be, that is the question"], 280, special_tokens=("<|endoftext|>", "<|user|>"))
    settings = config.TrainConfig(model=kind, context=16, n_layers=2, n_heads=2, d_model=8)
    sizes = models.describe(settings, encoding.n_vocab)
    model = models.build(kind, sizes, generator=torch.Generator().manual_seed(0)).eval()
    meta = {"model_type": kind, "model_config": models.sizes_of(model)}
    save(tmp_path, 1, {"model": dict(model.named_parameters())}, meta,
         write_files=lambda folder: tokenizer.save(encoding, folder / "tokenizer.tiktoken"))
    checkpoint.export(tmp_path, tmp_path / "hf")
    theirs, words = (auto.from_pretrained(tmp_path / "hf") for auto in (AutoModelForCausalLM, AutoTokenizer))
    ours, same = models.load_model(tmp_path / "hf")
    ids = tokenizer.encode(encoding, "<|user|>to be, or?<|endoftext|>", allow_special=True)
    assert ids == words("<|user|>to be, or?<|endoftext|>")["input_ids"]
    assert ids == tokenizer.encode(same, "<|user|>to be, or?<|endoftext|>", allow_special=True)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))
        assert (theirs(torch.tensor([ids])).logits - expected).abs().max() < 1e-5  # fp32
        assert torch.equal(ours(torch.tensor([ids])), expected)
    assert theirs.generation_config.eos_token_id == tokenizer.eot(encoding)


def test_meta_that_is_not_for_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        save(tmp_path, 1, {"model": {}}, {"what": {1, 2}})
    assert not list(tmp_path.iterdir())


def test_saving_beside_raises_what_save_raises_and_keeps_what_was_there_when_it_began(tmp_path):
    weight = torch.ones(3)
    saving = checkpoint.Saving(tmp_path, 1, {"model": {"w": weight}}, {})
    weight.zero_()
    assert saving.wait() == tmp_path / "step-00000001" and not saving.failed
    assert load(tmp_path / "step-00000001", ("model",))["model"]["w"].tolist() == [1, 1, 1]
    (tmp_path / "file").write_text("")
    saving = checkpoint.Saving(tmp_path / "file", 1, {"model": {"w": weight}}, {})
    saving.join()
    assert saving.failed
    with pytest.raises(CheckpointError, match="could not save"):
        saving.wait()


def test_starting_without_a_checkpoint_imports_no_torch_distributed_checkpoint():
    """It takes a second, which the start of every program would pay. A module knows what it imported."""
    for module in (checkpoint, pieces):
        names = {value.__name__ for value in vars(module).values() if isinstance(value, types.ModuleType)}
        names |= {getattr(value, "__module__", None) or "" for value in vars(module).values()}
        assert not any(name.startswith("torch.distributed.checkpoint") for name in names)


@pytest.mark.parametrize("flag, value", [("--kills", "0"), ("--kills", "x"), ("--seed", "-1")])
def test_bad_flags_are_one_line(flag, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", flag, value])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(checkpoint.__file__, run_name="__main__")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("checkpoint.py: ") and message.count("\n") == 1
    assert flag in message


@pytest.mark.parametrize("steps", [(1, 2), (1, 1)], ids=["next step", "same step again"])
def test_a_kill_between_any_two_file_operations_leaves_a_whole_checkpoint(tmp_path, monkeypatch, steps):
    """Stop the second save at its k-th operation on the file system, for every k that there is."""
    class Killed(BaseException):
        pass

    def save_value(folder, step, value):
        save(folder, step, {"model": {"w": torch.full((3,), value)}, "optimizer": {}}, {"value": value}, keep=1)

    for k in range(1000):
        folder, left = tmp_path / str(k), [k]
        save_value(folder, steps[0], 1.0)

        def stopping(function):
            def wrapper(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return function(*args, **kwargs)
            return wrapper

        with monkeypatch.context() as patch:
            for owner, name in ((torch, "save"), (os, "fsync"), (os, "rmdir"), (os, "unlink"), (Path, "rename"),
                                (Path, "write_text"), (Path, "mkdir")):
                patch.setattr(owner, name, stopping(getattr(owner, name)))
            try:
                save_value(folder, steps[1], 2.0)
                finished = True
            except (Killed, CheckpointError):  # a kill inside torch.distributed.checkpoint comes out as its own error
                finished = False
        found = load(latest(folder))
        assert (found["model"]["w"] == found["meta"]["value"]).all()
        save_value(folder, 3, 3.0)
        assert [path.name for path in folder.iterdir()] == ["step-00000003"], "leftovers are cleared away"
        if finished:
            break
    assert finished and k > 15
