"""Settings: precedence, what is derived, what is refused."""

import dataclasses
import subprocess
import sys

import pytest
from conftest import ROOT

from config import PRESETS, ConfigError, TrainConfig, derive, main, parse, refuse_meaningless


def parsed(*arguments):
    return parse(list(arguments), "")[0]


def derived(processes=1, **settings):
    return derive(TrainConfig(**settings), processes, "cpu", False)[0]


def test_flags_beat_the_preset_and_the_preset_beats_the_defaults():
    assert parsed().n_layers == TrainConfig().n_layers
    assert parsed("--preset=gpt2_124m").n_layers == 12
    assert parsed("--preset=gpt2_124m", "--n_layers=3").n_layers == 3
    assert parse(["--preset", "gpt2_124m", "--lr", "1e-4"], "")[1] == set(PRESETS["gpt2_124m"]) | {"lr"}


def test_every_field_is_a_flag_with_a_help_text_and_takes_its_type():
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["help"]
        if isinstance(field.default, bool):
            assert getattr(parsed(f"--{field.name}"), field.name) is True
            assert getattr(parsed(f"--no-{field.name}"), field.name) is False
        elif field.metadata["choices"]:
            for choice in field.metadata["choices"]:
                assert getattr(parsed(f"--{field.name}={choice}"), field.name) == choice
        elif "int" in str(field.type):
            assert getattr(parsed(f"--{field.name}=300"), field.name) == 300
        elif "float" in str(field.type):
            assert getattr(parsed(f"--{field.name}=0.5"), field.name) == 0.5
        else:
            assert getattr(parsed(f"--{field.name}=x"), field.name) == "x"


@pytest.mark.parametrize("text, value", [("1e4", 10000), ("2**19", 524288), ("512", 512)])
def test_whole_numbers_may_be_written_short(text, value):
    assert parsed(f"--batch_tokens={text}").batch_tokens == value


@pytest.mark.parametrize("arguments, message", [
    (["--lrr=3"], "unknown flag --lrr: did you mean --lr?"),
    (["--zzz"], "unknown flag --zzz: see --help"),
    (["stray"], "unknown flag stray"),
    (["--steps=1.5"], "argument --steps: '1.5' is not a whole number"),
    (["--lr=fast"], "argument --lr: invalid float value: 'fast'"),
    (["--lr"], "argument --lr: expected one argument"),
    (["--lr=nan"], "--lr must be finite, got nan"),
    (["--beta1=1"], "--beta1 must be below 1, got 1.0"),
    (["--seed=-1"], "--seed must be in 0 .. 2^32 - 1, got -1"),
    (["--seed=2**32"], "--seed must be in 0 .. 2^32 - 1, got 4294967296"),
    (["--steps=1e400"], "argument --steps: '1e400' is not a whole number"),
    (["--held_out=0"], "--held_out must be at least 0.001, got 0.0"),
    (["--vocab_size=256"], "--vocab_size must be at least 257, got 256"),
    (["--precision=fp8"], "argument --precision: invalid choice: 'fp8'"),
    (["--preset=gpt9"], "argument --preset: invalid choice: 'gpt9'")])
def test_bad_flags_are_refused(arguments, message):
    with pytest.raises(ConfigError) as caught:
        parsed(*arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments, name", [
    (["--tokenizer=gpt2", "--vocab_size=500"], "vocab_size"), (["--decay_steps=5"], "decay_steps"),
    (["--schedule=constant", "--min_lr=0"], "min_lr"), (["--samples=0", "--sample_tokens=5"], "sample_tokens"),
    (["--resume", "--overwrite"], "resume")])
def test_settings_without_a_meaning_are_refused(arguments, name):
    with pytest.raises(ConfigError, match=f"--{name} means nothing here"):
        refuse_meaningless(*parse(arguments, ""))
    refuse_meaningless(*parse(arguments[:1] if name != "decay_steps" else ["--schedule=wsd", *arguments], ""))


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_the_tokens_of_a_step_do_not_depend_on_the_processes(processes):
    c = derived(processes, batch_tokens=8192, context=128)
    accumulation = 8192 // (c.dp * c.micro_batch * c.context)
    assert c.dp == processes and c.dp * accumulation * c.micro_batch * c.context == 8192


@pytest.mark.parametrize("settings, micro_batch", [
    (dict(batch_tokens=2**19, context=1024), 16), (dict(batch_tokens=2**19, context=1024, micro_batch=4), 4),
    (dict(batch_tokens=7 * 64, context=64), 7), (dict(batch_tokens=32768 * 3, context=32768), 1)])
def test_micro_batch_divides_and_fits(settings, micro_batch):
    assert derived(**settings).micro_batch == micro_batch


@pytest.mark.parametrize("processes, settings, message", [
    (1, dict(batch_tokens=100, context=64), "no multiple of context \\* dp \\* ep = 64 \\* 1: the nearest is 128"),
    (3, dict(batch_tokens=256, context=64), "no multiple of context \\* dp \\* ep = 64 \\* 3: the nearest is 192"),
    (1, dict(batch_tokens=256, context=64, micro_batch=3), "--micro_batch=3 does not divide a process's 4 sequences"),
    (1, dict(n_heads=5), "--n_heads=5 does not divide --d_model"),
    (1, dict(min_lr=1.0), "--min_lr=1 is above --lr"),
    (1, dict(steps=10, warmup_steps=11), "do not fit into --steps=10"),
    (1, dict(steps=10, warmup_steps=5, schedule="wsd", decay_steps=6), "do not fit into --steps=10"),
    (2, dict(dp=4), "--dp=4 needs 4 processes, there are 2")])
def test_batches_that_do_not_divide_are_refused(processes, settings, message):
    with pytest.raises(ConfigError, match=message):
        derived(processes, **settings)


def test_none_is_derived_by_the_formula_that_is_printed():
    c, notes = derive(TrainConfig(steps=100, lr=1e-3), 2, "cuda", True)
    assert (c.min_lr, c.warmup_steps, c.save_every, c.eval_every) == (1e-4, 5, 20, 20)
    assert (c.device, c.precision, c.dp) == ("cuda", "bf16", 2)
    assert "min_lr = 0.0001 (lr / 10)" in notes and "warmup_steps = 5 (steps / 20)" in notes
    assert derived(min_lr=0.0, precision="bf16").min_lr == 0.0


def test_every_preset_fits_one_and_eight_processes():
    for preset in PRESETS:
        for processes in (1, 8):
            c, _ = derive(parsed(f"--preset={preset}"), processes, "cuda", True)
            assert c.d_model % c.n_heads == 0


def test_as_a_program_it_prints_every_setting_and_refuses_in_one_line(capsys):
    assert main(["--preset=gpt2_124m", "--lr=3e-4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("lr ")] == [["lr", "0.0003", "given"]]
    assert len(lines) > len(dataclasses.fields(TrainConfig))
    for flags in (["--tp=2"], ["--pp=2", "--dp=4"], ["--cp=2"], ["--preset=moe_tiny", "--ep=4"]):  # for as many processes
        assert main(flags) == 0
    assert "one step = 2048 tokens = 4 (dp * ep)" in capsys.readouterr().out
    assert main(["--lrr=1"]) == 2
    assert capsys.readouterr().err == "config.py: unknown flag --lrr: did you mean --lr?\n"


def test_help_explains_every_flag():
    found = subprocess.run([sys.executable, "config.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}" in found.stdout
