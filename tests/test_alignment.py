"""All stages of alignment at their smallest: on two processes as on one, resumed, entered alone, refused."""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import os
import re
import signal
import sys
from datetime import timedelta

import pytest
import torch

import alignment
import chat
import checkpoint
import decode
import labeller
import models
import packing
import processes
import rlhf
import stages
import tokenizer
import train
from alignment import AlignConfig, AlignmentError, format_table, run_stages
from conftest import run_ranks, spawn_ranks
from gpt import GPT, GPTConfig
from llama import Llama, LlamaConfig
from team import Team

WORDS = "Return the name of a list. Set every line to text. Remove common space from what is given. Get items now."
SMALL = dict(max_new_tokens=6, sft_epochs=2, sft_batch=8, pairs=40, reward_batch=8, reward_epochs=1, ppo_steps=2, ppo_batch=8,
             dpo_batch=8, grpo_steps=2, grpo_batch=8, grpo_group=4, evaluation_prompts=6, held_out=0.3, save_every=50)
POLICIES = ("sft", "ppo", "dpo", "grpo")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What pre-training leaves: a tiny model in float64, so that sums in another order draw the same tokens."""
    folder = tmp_path_factory.mktemp("base")
    encoding = tokenizer.train([WORDS], 290)
    for kind, make in (("gpt", lambda: GPT(GPTConfig(290, 64, 1, 2, 16), generator=torch.Generator().manual_seed(0))),
                       ("llama", lambda: Llama(LlamaConfig(290, 64, 1, 2, 1, 16, 32, tied=True),
                                               generator=torch.Generator().manual_seed(0)))):
        model = make().double()
        checkpoint.save(folder / kind, 1, {"model": dict(model.named_parameters())},
                        {"model_type": kind, "model_config": dataclasses.asdict(model.config)},
                        write_files=lambda place: tokenizer.save(encoding, place / "tokenizer.tiktoken"))
    return folder


@functools.cache
def few():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdlib_module_names", frozenset({"textwrap", "statistics", "fractions"}))
        return labeller.default_questions()


def ask_few_questions(patch):
    """Three modules instead of the whole library, and a labeller who decides every pair."""
    questions = few()
    patch.setattr(labeller, "default_questions", lambda: questions)
    prefers = labeller.Labeller.prefers
    patch.setattr(labeller.Labeller, "prefers", lambda *arguments: prefers(*arguments, margin=0.0))


@pytest.fixture(autouse=True)
def few_questions(monkeypatch):
    ask_few_questions(monkeypatch)


def config(base, out, kind="gpt", **settings):
    return AlignConfig(**SMALL | dict(init=str(base / kind), out=str(out)) | settings)


def parameters(folder):
    return torch.cat([p.flatten() for _, p in sorted(checkpoint.load(checkpoint.latest(folder), ("model",))["model"].items())])


@pytest.fixture(scope="module")
def done(base, tmp_path_factory):
    """The folder of a whole run on one process, and its table."""
    out = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        ask_few_questions(patch)
        return out, run_stages(config(base, out), processes.World())


# --- whole runs ---

def test_a_run_ends_with_a_table_of_all_policies_and_files_of_each(done):
    out, table = done
    assert [line["model"] for line in table] == ["base", *POLICIES]
    for line in table:
        assert {"held_out_loss", "gold", "interval", "win_rate", "kl", "length", "score"} <= line.keys()
        assert len(line["answers"]) == 3 and 1 <= line["length"] <= 6
    sft = table[1]
    assert sft["win_rate"] == 0.5 and abs(sft["kl"]) < 1e-4 and sft["held_out_loss"] < table[0]["held_out_loss"]
    assert json.loads((out / "evaluation.json").read_text())["table"] == table
    text = format_table(table)
    assert "win rate" in text and all(f"  {name}" in text for name in POLICIES)
    lines = [json.loads(line) for line in (out / "sft" / "preferences.jsonl").read_text().splitlines()]
    assert {"prompt", "chosen", "rejected", "held_out"} == lines[0].keys() and {line["held_out"] for line in lines} == {True, False}
    assert len({parameters(out / name).sum().item() for name in POLICIES}) == 4


@pytest.mark.parametrize("P, layout", [(2, dict(tp=2)), (2, dict(zero=3))], ids=str)
def test_every_layout_learns_and_judges_as_one_process(base, done, tmp_path, P, layout):
    out, table = done
    found = run_ranks(P, lambda rank: run_stages(config(base, tmp_path, **layout), processes.World(rank, P, rank, P)), timeout=100)
    assert found[0] == found[-1]
    for name in POLICIES:
        torch.testing.assert_close(parameters(tmp_path / name), parameters(out / name), rtol=0, atol=1e-5)
    for ours, theirs in zip(found[0], table):
        assert ours["answers"] == theirs["answers"]
        assert ours["gold"] == pytest.approx(theirs["gold"]) and ours["kl"] == pytest.approx(theirs["kl"], abs=1e-3)
    assert (tmp_path / "sft/preferences.jsonl").read_text() == (out / "sft/preferences.jsonl").read_text()


def test_fine_tuning_on_packed_rows_learns_what_one_conversation_a_row_teaches(learn, tmp_path, monkeypatch):
    """1e-10: the same sums in another order, in float64."""
    path, rows, pack = tmp_path / "short.jsonl", [], chat.pack_examples
    path.write_text("".join(json.dumps({"prompt": "ab " * (1 + i % 5), "response": f"{i} " * (1 + i % 3)}) + "\n"
                            for i in range(30)))
    packed = learn("sft", instructions=str(path))

    def one_to_a_row(examples, context, device):
        rows.append((len(pack(examples, context)[0]), len(examples)))
        return chat.pad(examples, device)

    monkeypatch.setattr(chat, "pack_examples", one_to_a_row)
    monkeypatch.setattr(packing, "PackedRows", lambda ids: None)
    torch.testing.assert_close(packed, learn("sft", instructions=str(path)), rtol=0, atol=1e-10)
    assert rows and all(n <= examples / 2 for n, examples in rows)


@pytest.mark.parametrize("stage", ["dpo", "ppo", "grpo"])
def test_a_stage_entered_alone_is_the_stage_of_the_whole_run(done, tmp_path, stage):
    out, table = done
    alone = AlignConfig(**SMALL | dict(init=str(out / "sft"), reward_model=str(out / "reward"), out=str(tmp_path), stages=stage))
    found = run_stages(alone, processes.World())
    assert torch.equal(parameters(tmp_path / stage), parameters(out / stage))
    assert [line["model"] for line in found] == ["sft", stage] and found[1]["gold"] == table[1 + POLICIES.index(stage)]["gold"]


def test_ppo_after_ctrl_c_is_ppo_unbroken_with_its_critic_and_its_price(done, tmp_path, monkeypatch):
    out, _ = done
    settings = SMALL | dict(init=str(out / "sft"), reward_model=str(out / "reward"), stages="ppo", ppo_steps=3)
    monkeypatch.setattr(alignment, "evaluate_policies", lambda *arguments: [])
    monkeypatch.setattr(alignment, "format_table", lambda table: "")
    world = processes.World()
    run_stages(AlignConfig(**settings, out=str(tmp_path / "a")), world)
    update, calls = rlhf.ppo_update, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*arguments)

    monkeypatch.setattr(rlhf, "ppo_update", interrupted)
    with pytest.raises(SystemExit) as left:
        run_stages(AlignConfig(**settings, out=str(tmp_path / "b")), world)
    assert left.value.code == 130 and checkpoint.latest(tmp_path / "b/ppo").name == "step-00000002"
    with pytest.raises(ValueError, match="already holds a run: --resume goes on"):
        run_stages(AlignConfig(**settings, out=str(tmp_path / "b")), world)
    run_stages(AlignConfig(**settings, out=str(tmp_path / "b"), resume=True), world)
    assert len(calls) == 3 and torch.equal(parameters(tmp_path / "a/ppo"), parameters(tmp_path / "b/ppo"))
    again = AlignConfig(**settings | dict(seed=1), out=str(tmp_path / "b"), overwrite=True)
    run_stages(again, world)
    assert not torch.equal(parameters(tmp_path / "a/ppo"), parameters(tmp_path / "b/ppo"))


def test_files_of_the_users_own_are_learnt_from_by_a_llama(base, tmp_path):
    (tmp_path / "i.jsonl").write_text("".join(json.dumps({"prompt": f"q {i}", "response": "Return it."}) + "\n" for i in range(20)))
    lines = [{"prompt": f"p {i}"} | ({"answers": ["Yes.", "Well.", "no"]} if i % 2 else {"chosen": "Yes.", "rejected": "no"})
             for i in range(30)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = dict(instructions=str(tmp_path / "i.jsonl"), preferences=str(tmp_path / "p.jsonl"))
    table = run_stages(config(base, tmp_path / "out", "llama", **files), processes.World())
    assert [line["model"] for line in table] == ["base", *POLICIES] and "gold" not in table[0] and "score" in table[0]
    assert table[1]["answers"][0][0].startswith("p ")
    assert not (tmp_path / "out/sft/preferences.jsonl").exists()
    held_out = json.loads((tmp_path / "out/reward/held_out.json").read_text())
    _, aside = chat.split_conversations([chat.Conversation(chat.ask(line["prompt"]), line) for line in lines], 0.3)
    assert held_out["pairs"] == sum(3 if "answers" in c.where else 1 for c in aside) and held_out["accuracy"] > 0.5
    only = run_stages(config(base, tmp_path / "other", "llama", instructions=files["instructions"], stages="sft"), processes.World())
    assert [line["model"] for line in only] == ["base", "sft"] and only[0]["answers"][0][0].startswith("q ")
    with pytest.raises(ValueError, match="--instructions has no labeller: give --preferences too"):
        run_stages(config(base, tmp_path / "third", "llama", instructions=files["instructions"], stages="sft,dpo"), processes.World())


# --- settings ---

CHANGES = {"sft": dict(seed=1, sft_epochs=1, sft_batch=4, sft_lr=1e-4, held_out=0.5, max_gradient=1e-6),
           "reward": dict(reward_epochs=2, reward_batch=4, reward_lr=1e-5, pairs=20),
           "ppo": dict(ppo_steps=1, ppo_batch=4, ppo_epochs=1, ppo_minibatches=1, ppo_lr=1e-5, ppo_kl=5.0, ppo_kl_target=0.0, max_new_tokens=3),
           "dpo": dict(dpo_epochs=2, dpo_batch=4, dpo_lr=1e-5, dpo_beta=1.0, dpo_kind="ipo", dpo_label_smoothing=0.2),
           "grpo": dict(grpo_steps=1, grpo_batch=4, grpo_group=2, grpo_lr=1e-5, grpo_kl=1.0,
                        grpo_advantage="mean", grpo_length=("constant", dict(grpo_batch=32, max_new_tokens=24)))}


LOADED = {}


def copied(load, directory, device="cpu", **options):
    if (load, directory) not in LOADED:
        LOADED[load, directory] = load(directory, device, **options)
    return copy.deepcopy(LOADED[load, directory])


@pytest.fixture
def learn(base, done, tmp_path, monkeypatch):
    """learn(stage, name, **settings): the weights, in one row, of a stage alone."""
    out, _ = done
    monkeypatch.setattr(alignment, "evaluate_policies", lambda *arguments: [])
    monkeypatch.setattr(alignment, "format_table", lambda table: "")
    for loader in ("load_policy", "load_reward_model"):  # read once, copied for each test
        monkeypatch.setattr(stages, loader, functools.partial(copied, getattr(stages, loader)))
    learnt = []
    monkeypatch.setattr(stages.Stage, "_save", lambda self, step, lines: learnt.append(self.parts["model"]))

    def learn(stage, **settings):
        (tmp_path / stage).mkdir(exist_ok=True)
        init = base / "gpt" if stage == "sft" else checkpoint.latest(out / "sft") if "pairs" in settings else out / "sft"
        changed = SMALL | dict(init=str(init), out=str(tmp_path), stages=stage)
        if stage in ("ppo", "grpo"):
            changed |= dict(reward_model=str(out / "reward"))
        run_stages(AlignConfig(**changed | settings), processes.World())
        if "pairs" in settings:
            (init / "preferences.jsonl").unlink()  # the step's folder had none: other pairs were made
        return torch.cat([p.detach().flatten() for _, p in sorted(learnt[-1].named_parameters())])

    return learn


@pytest.mark.parametrize("stage, name", [(stage, name) for stage, names in CHANGES.items() for name in names])
def test_each_setting_changes_what_its_stage_learns(learn, done, stage, name):
    value = CHANGES[stage][name]
    value, beside = value if isinstance(value, tuple) else (value, {})  # what it needs to be seen
    unchanged = learn(stage, **beside) if beside else parameters(done[0] / stage)
    assert not torch.equal(learn(stage, **{name: value} | beside), unchanged)


def test_kinds_of_dpo_and_of_advantages_are_all_different(learn, done):
    dpo, grpo = (parameters(done[0] / stage) for stage in ("dpo", "grpo"))
    ipo, free = (learn("dpo", dpo_kind=kind) for kind in ("ipo", "reference_free"))
    mean, rloo = (learn("grpo", grpo_advantage=kind) for kind in ("mean", "rloo"))
    assert not any(torch.equal(a, b) for a, b in ((dpo, free), (ipo, free), (grpo, rloo), (mean, rloo)))


def test_a_loss_of_pairs_refuses_rankings(learn, tmp_path):
    path = tmp_path / "rankings.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"p {i}", "answers": ["a", "b", "c"]}) + "\n" for i in range(20)))
    for settings in (dict(dpo_kind="ipo"), dict(dpo_label_smoothing=0.1)):
        with pytest.raises(ValueError, match="compare two answers, --preferences ranks 3"):
            learn("dpo", preferences=str(path), **settings)


@pytest.mark.parametrize("settings, message", [
    (dict(stages="sft,dop"), "--stages=sft,dop: choose from sft,reward,ppo,dpo,grpo"), (dict(stages=","), "choose from"),
    (dict(sft_lr=float("nan")), "--sft_lr must be"), (dict(pairs=1), "--pairs must be at least 2, got 1"),
    (dict(zero=4), "--zero must be in 0 .. 3, got 4"),
    (dict(grpo_batch=9), "--grpo_batch=9 is no multiple of --grpo_group=4"), (dict(held_out=1.0), "--held_out must be below 1"),
    (dict(resume=True, overwrite=True), "give one of them"), (dict(dpo_kind="best"), "--dpo_kind must be one of sigmoid, ipo"),
    (dict(dpo_kind="ipo", dpo_label_smoothing=0.1), "not for --dpo_kind=ipo"),
    (dict(dpo_label_smoothing=0.5), "--dpo_label_smoothing must be in 0 .. 0.49, got 0.5")])
def test_settings_that_cannot_be_are_refused(base, tmp_path, settings, message):
    with pytest.raises(AlignmentError, match=message):
        config(base, tmp_path, **settings)


def test_a_folder_that_another_run_is_writing_is_refused(base, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "sft").mkdir()
    with open(tmp_path / "sft/.lock", "a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="sft is being written by process"):
            run_stages(config(base, tmp_path), processes.World())
    assert not list((tmp_path / "sft").glob("step-*"))


def test_a_reward_model_is_no_policy(done, base, tmp_path):
    out, _ = done
    with pytest.raises(ValueError, match="a reward model, which scores texts and writes none: give the directory of a"):
        models.load_model(out / "reward")
    with pytest.raises(ValueError, match="a reward model, which scores texts"):
        run_stages(config(base, tmp_path, init=str(out / "reward"), stages="sft"), processes.World())
    assert models.load_model(out / "reward", of_reward_model=True)[0].config == models.load_model(out / "sft")[0].config


def test_what_is_missing_is_refused_before_work_begins(base, tmp_path):
    world = processes.World()
    with pytest.raises(ValueError, match="--tp=2 does not divide 1 processes: start a multiple of 2 by torchrun"):
        run_stages(config(base, tmp_path, tp=2), world)
    with pytest.raises(ValueError, match="holds no reward model: run the stage reward before"):
        run_stages(config(base, tmp_path, stages="ppo"), world)
    with pytest.raises(ValueError, match="none: no such directory"):
        run_stages(config(base, tmp_path, init=str(tmp_path / "none")), world)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": ""}\n')
    with pytest.raises(ValueError, match="bad.jsonl, line 1: \"response\" is empty"):
        run_stages(config(base, tmp_path, instructions=str(tmp_path / "bad.jsonl"), stages="sft"), world)
    (tmp_path / "long.jsonl").write_text("".join(json.dumps({"prompt": "ab " * n, "response": "x"}) + "\n" for n in (1, 2, 90)))
    for share in (0.01, 0.99):  # learnt from or held out
        with pytest.raises(ValueError, match="long.jsonl, line 3: the prompt of .* fills the context of 64"):
            run_stages(config(base, tmp_path / "o", instructions=str(tmp_path / "long.jsonl"), stages="sft", held_out=share), world)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"prompt": n * "ab ", "chosen": "x", "rejected": "y"}) + "\n" for n in (1, 90)))
    with pytest.raises(ValueError, match="pairs.jsonl, line 2: the prompt of .* fills the context of 64"):
        run_stages(config(base, tmp_path / "o", preferences=str(tmp_path / "pairs.jsonl"), stages="sft,dpo"), world)
    with pytest.raises(ValueError, match="--init=.*gpt is where the stage sft writes"):  # with --overwrite it would be deleted
        run_stages(config(base, tmp_path, init=str(tmp_path / "sft/gpt"), overwrite=True), world)
    with pytest.raises(ValueError, match="--reward_model=x is not used, as the stage reward trains one"):
        run_stages(config(base, tmp_path, reward_model="x"), world)
    assert not (tmp_path / "o").exists()  # nothing was trained
    with pytest.raises(ValueError, match="3 answers are too few for 5 processes"):
        stages.sample_answers(None, None, [1, 2, 3], None, Team(processes.World(0, 5)), (0,))


def test_default_questions_that_fill_the_context_are_left_out(base):
    encoding = chat.extend(tokenizer.train([WORDS], 290))
    every, some = (alignment.read_questions(AlignConfig(), encoding, context) for context in (200, 48))
    assert len(some.train) + len(some.held_out) < len(every.train) + len(every.held_out)
    with pytest.raises(AlignmentError, match="questions fills the model's context of 8: train one with a larger --context"):
        alignment.read_questions(AlignConfig(), encoding, 8)


# --- programs ---

def test_programs_chat_with_what_was_trained_and_refuse_in_one_line(done, monkeypatch, capsys):
    out, _ = done
    lines = iter(["What does textwrap.dedent do?\n", "\n", "And what else?\n", "/exit\n"])
    monkeypatch.setattr("sys.stdin", type("Input", (), {"readline": staticmethod(lambda: next(lines))}))
    decode.main(str(out / "ppo"), None, True, "", 5, 0.0, 1.0, 0, "cpu")
    shown = capsys.readouterr().out
    assert shown.count("Model: ") == 2 and "<|" not in shown
    lines = iter(["word " * 90 + "\n", "/exit\n"])
    decode.main(str(out / "ppo"), None, True, "", 5, 0.0, 1.0, 0, "cpu")
    shown = capsys.readouterr().out
    assert re.search("this line takes .* tokens, and .* are left for it: shorten it, or lower max_new_tokens", shown)
    for flags, message in ((["--init", "nowhere"], "nowhere: no such directory"), (["--sft_lr", "x"], "invalid float value"),
                           (["--zzz", "1"], "unknown flag --zzz: see --help"),
                           (["--sft_epoch=1"], "unknown flag --sft_epoch: did you mean --sft_epochs?"),
                           (["--lr", "1"], "did you mean --sft_lr or --reward_lr or --ppo_lr or --dpo_lr or --grpo_lr?"),
                           (["--pairs", "1.5"], "argument --pairs: '1.5' is not a whole number"),
                           (["--timeout", "1e15"], "--timeout must be in 1 .. 9999999, got 1000000000000000"),
                           (["--seed=2**32"], "--seed must be in 0 .. 2^32 - 1, got 4294967296")):
        assert alignment.main(["--out", str(out / "new"), *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and error.startswith("alignment.py: ")
        # by the stage alone, under the name that was typed
        assert train.main(["--stage=dpo", "--out", str(out / "new"), *flags]) == 2
        assert capsys.readouterr().err == error.replace("alignment.py", "train.py", 1)


def test_whole_numbers_may_be_written_short_and_the_longest_time_out_can_be_waited_for():
    config = alignment._parse(["--pairs=1e3", "--sft_batch=2**5", f"--timeout={10**7 - 1}"])
    assert (config.pairs, config.sft_batch) == (1000, 32)
    assert timedelta(seconds=config.timeout) and processes.join("cpu", config.timeout).size == 1


def test_memory_that_is_used_up_is_said_in_one_line(monkeypatch, capsys):
    def too_large(config, world):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB.\nMore of this.")

    monkeypatch.setattr(alignment, "run_stages", too_large)
    for main, flags, name in ((alignment.main, [], "alignment.py"), (train.main, ["--stage=sft"], "train.py")):
        assert main(["--device=cpu", *flags]) == 2
        assert capsys.readouterr().err == (f"{name}: rank 0: CUDA out of memory. Tried to allocate 8 GiB.: take a smaller "
                                           "batch of that stage, such as --sft_batch\n")


def test_an_error_of_ours_still_shows_its_traceback(monkeypatch):
    def bug(config, world):
        raise RuntimeError("a bug, not the user's")

    monkeypatch.setattr(alignment, "run_stages", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        alignment.main(["--device=cpu"])


def dies_in_a_step(rank, arguments):
    """What train.main returns and prints; rank 1 is killed in the second step of its first stage."""
    step, steps = Team.sum, []

    def dying(self, values):
        steps.append(values)
        if rank == 1 and len(steps) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, values)

    Team.sum = dying
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        return train.main(arguments), errors.getvalue()


def test_a_rank_that_dies_ends_the_other_with_one_line(base, tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Get item {i}.", "response": "Set text."}) + "\n" for i in range(20)))
    arguments = ["--stage=sft", f"--init={base / 'gpt'}", f"--out={tmp_path}", f"--instructions={path}", "--device=cpu",
                 "--held_out=0.3", "--timeout=6"]
    found = spawn_ranks(2, dies_in_a_step, arguments, init=False, timeout=40, return_exceptions=True)
    status, errors = found[0]
    assert status == 1 and errors.count("\n") == 1 and isinstance(found[1], ProcessLookupError)
    assert errors.startswith("train.py: rank 0 lost another process (") and errors.endswith("): start again with --resume\n")
