"""Every kind of language model, from the settings of a run to a model and back."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import decode
import gpt
import llama
import models
import moe
import tokenizer
from config import PRESETS, TrainConfig

TINY = {"context": 16, "n_layers": 2, "n_heads": 4, "d_model": 32}
SETTINGS = {"gpt": {"dropout": 0.1}, "llama": {"n_kv_heads": 2}, "moe": {"n_kv_heads": 2, "n_experts": 4, "d_ff": 16}}


def sizes(kind, **more):
    return models.describe(TrainConfig(model=kind, **TINY | SETTINGS[kind] | more), 50)


@pytest.mark.parametrize("kind", models.KINDS)
def test_a_model_is_built_again_from_its_sizes(kind):
    model = models.build(kind, sizes(kind), generator=torch.Generator().manual_seed(0)).eval()
    again = models.build(kind, json.loads(json.dumps(models.sizes_of(model)))).eval()
    again.load_state_dict(model.state_dict())
    tokens = torch.randint(50, (2, 9))
    assert torch.equal(model(tokens), again(tokens))


@pytest.mark.parametrize("kind", models.KINDS)
def test_parameters_are_those_of_the_model(kind):
    model = models.build(kind, sizes(kind))
    N, active, _ = models.parameters_and_flops(kind, sizes(kind))
    assert N == sum(p.numel() for p in model.parameters())
    idle = 2 * (4 - 2) * 3 * 32 * 16 if kind == "moe" else 0  # layers * idle experts * matrices
    assert active == N - idle


@pytest.mark.parametrize("kind", ("gpt", "llama"))
def test_flops_match_torchs_counter(kind):
    # torch counts no fused attention on a CPU; Llama's grouped heads are not fused there
    attention = gpt.naive_attention if kind == "gpt" else None
    model, tokens = models.build(kind, sizes(kind), attention).eval(), torch.randint(50, (2, 16))
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    forward = models.parameters_and_flops(kind, sizes(kind), 16)[2] * tokens.numel()
    assert counter.get_total_flops() == pytest.approx(forward, rel=0.05)  # the first layer's input has no gradient


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_a_model(preset):
    settings = TrainConfig(**PRESETS[preset])
    N, active, flops = models.parameters_and_flops(settings.model, models.describe(settings, 50257))
    assert 0 < active <= N and flops >= 6 * 0.8 * active


@pytest.mark.parametrize("kind, setting, value", (
    ("gpt", "d_ff", 64), ("llama", "d_ff", 64), ("llama", "n_kv_heads", 1), ("moe", "n_experts", 8),
    ("moe", "n_layers", 1), ("gpt", "n_heads", 2), ("gpt", "dropout", 0.0)))
def test_every_setting_of_a_model_changes_it(kind, setting, value):
    changed, before = sizes(kind, **{setting: value}), sizes(kind)
    assert changed != before


def test_experts_per_token_changes_what_is_computed():
    torch.manual_seed(0)
    one = models.build("moe", sizes("moe", experts_per_token=1), generator=torch.Generator().manual_seed(0))
    two = models.build("moe", sizes("moe"), generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(50, (1, 8))
    assert not torch.allclose(one(tokens), two(tokens))


def test_auxiliary_loss_is_the_balance_of_experts_and_0_for_others():
    tokens = torch.randint(50, (2, 8))
    for kind in models.KINDS:
        model = models.build(kind, sizes(kind), generator=torch.Generator().manual_seed(0))
        model(tokens)
        assert (models.balancing_loss(model) > 0) == (kind == "moe")


@pytest.mark.parametrize("kind, message", (("bert", "model must be one of gpt, llama, moe"), (None, "got None")))
def test_unknown_kinds_are_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        models.build(kind, {})


@pytest.mark.parametrize("kind, more", (
    ("gpt", {"foo": 1}), ("llama", {"experts": {}}), ("moe", {}), ("moe", {"n_kv_heads": 2, "experts": None})))
def test_sizes_of_another_kind_are_refused(kind, more):
    with pytest.raises(ValueError, match=f"these are not the sizes of a {kind}: .*(foo|experts|mapping)"):
        models.build(kind, {"vocab_size": 50, **TINY} | more)


def test_experts_read_from_files_of_olmoe_are_written_as_such_again():
    model = llama.Llama(llama.LlamaConfig(vocab_size=50, d_ff=16, n_kv_heads=2, **TINY),
                        mlp=lambda c: moe.MoE(c.d_model, c.d_ff, 4, 2, "softmax_after", like="olmoe"))
    again = models.build("moe", models.sizes_of(model))
    assert [layer.like for layer in (model.blocks[0].mlp, again.blocks[0].mlp)] == ["olmoe", "olmoe"]


@pytest.mark.parametrize("kind", ("gpt", "llama"))
def test_a_directory_is_read_by_its_model_type(kind, tmp_path):
    model = models.build(kind, {k: v for k, v in sizes(kind).items() if k != "dropout"}).eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(50, (1, 8))
    torch.testing.assert_close(models.from_pretrained(tmp_path)(tokens), model(tokens))


@pytest.mark.parametrize("text", (None, "{", "[]", '{"model_type": "bert"}', "{}"))
def test_directories_of_no_known_model_are_refused_in_one_line(text, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError) as error:
        models.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_demo_counts_as_many_parameters_as_are_made(capsys):
    models.main()
    assert capsys.readouterr().out.splitlines()[-1] == "max |counted - made| = 0 parameters (expected 0)"


def test_sizes_survive_a_checkpoints_json():
    settings = TrainConfig(model="moe", **TINY)
    assert json.loads(json.dumps(dataclasses.asdict(settings)))["model"] == "moe"


# --- a folder that somebody wrote ---

def test_loading_refuses_another_model_and_another_tokenizer(tmp_path):
    model, encoding = gpt.GPT(gpt.GPTConfig(270, 32, 1, 2, 16)), tokenizer.train(["some words to merge, some words"], 275)
    meta = {"model_type": "gpt", "model_config": vars(model.config)}
    for meta, message in ((meta, "the tokenizer has 272 ids, the model 270: it is not the one that the model was trained with"),
                          (meta | {"model_type": "bert"}, "model must be one of gpt, llama, moe, got 'bert'"),
                          (meta | {"model_type": "llama"}, "unexpected keyword argument 'dropout'")):
        checkpoint.save(tmp_path, 1, {"model": model.state_dict()}, meta,
                        lambda path: tokenizer.save(encoding, path / "tokenizer.tiktoken"))
        with pytest.raises(ValueError, match=message):
            models.load_model(tmp_path)


def test_hugging_face_directory_loads(tmp_path):
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    vocab = {chr(b): i for i, b in enumerate(shown)} | {chr(256 + i): 188 + i for i in range(len(hidden))}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"<|endoftext|>": 256}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    gpt.GPT(gpt.GPTConfig(257, 16, 1, 2, 8)).save_pretrained(tmp_path, eot=256)
    model, encoding = models.load_model(tmp_path)
    assert tokenizer.eot(encoding) == 256 and not model.training
    assert len(decode.generate(model, [tokenizer.encode(encoding, "hé")], 4)[0]) <= 4


@pytest.mark.parametrize("content, message", [(None, "holds no tokenizer that is read here: copy tokenizer.model"),
                                              (b"\n\x0e\n\x05<unk>", "is SentencePiece's .* which is not read: give Llama 3's"),
                                              (b"IQ== 0\n", "its 1 tokens lack some of the 256 single bytes")])
def test_a_folder_whose_tokenizer_cannot_be_read_is_refused_before_the_weights(content, message, tmp_path):
    (tmp_path / "config.json").write_text("no model either")
    if content:
        (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        models.load_model(tmp_path)
