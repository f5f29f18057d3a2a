"""Files of weights against transformers and a writer of Meta's form; memory while loading; every damaged directory."""

import ctypes
import json
import os
import runpy
import sys

import pytest
import torch
from test_llama import LONG, assert_same, random_peer, tiny, tokens_of

import weights
from llama import Llama, LlamaConfig, swiglu_width

transformers = pytest.importorskip("transformers", reason="pip install -r tests/requirements.txt")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="pip install -r tests/requirements.txt")


# --- Hugging Face's files -------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, dict(tied=True), dict(window=6), dict(d_head=10), LONG | dict(context=64)])
def test_transformers_loads_what_we_save(tmp_path, changes):
    ours = tiny(std=0.3, **changes)
    ours.save_pretrained(tmp_path, eot=60, bos=59)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert (theirs.config.eos_token_id, theirs.config.bos_token_id) == (60, 59)
    assert type(theirs).__name__ == ("MistralForCausalLM" if "window" in changes else "LlamaForCausalLM")
    x = tokens_of(2, 20)
    assert_same(ours(x), theirs.eval()(x).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_is_bit_for_bit_the_same(tmp_path, dtype):
    ours = tiny(**LONG).to(dtype)
    ours.save_pretrained(tmp_path, shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    again = Llama.from_pretrained(tmp_path)
    assert again.config == ours.config and not again.training
    assert all(torch.equal(a, b) and a.dtype == b.dtype and b.requires_grad
               for a, b in zip(ours.parameters(), again.parameters()))
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype
    assert Llama.from_pretrained(tmp_path, dtype=torch.float64).norm.gain.dtype == torch.float64
    tiny(seed=1).save_pretrained(tmp_path)  # replaces the shards and their index
    assert torch.equal(Llama.from_pretrained(tmp_path).output.weight, tiny(seed=1).output.weight)
    assert len(list(tmp_path.glob("*.safetensors*"))) == 1


def test_sharded_weights_with_an_index_are_read(tmp_path):
    theirs = random_peer(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    x = tokens_of(1, 5)
    assert_same(Llama.from_pretrained(tmp_path / "shards")(x), theirs(x).logits)


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(tmp_path):
    tiny(tied=True).save_pretrained(tmp_path)
    tensors = safetensors_torch.load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # older files have it
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(Llama.from_pretrained(tmp_path).token_embedding.weight, tensors["lm_head.weight"])
    tensors["lm_head.weight"][0] += 1
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight is unknown"):
        Llama.from_pretrained(tmp_path)


# --- Meta's files ---------------------------------------------------------------------------

def write_meta(folder, model, shards, vocabulary_cut=True, **params):
    """The model as Meta publishes it: interleaved pairs, P tensor-parallel shards, params.json without a context."""
    names = {"token_embedding.weight": "tok_embeddings.weight", "norm.gain": "norm.weight", "output.weight": "output.weight",
             "norm1.gain": "attention_norm.weight", "norm2.gain": "ffn_norm.weight", "attention.q": "attention.wq",
             "attention.k": "attention.wk", "attention.v": "attention.wv", "attention.out": "attention.wo",
             "mlp.gate": "feed_forward.w1", "mlp.down": "feed_forward.w2", "mlp.up": "feed_forward.w3", "blocks.": "layers."}
    parts = [{} for _ in range(shards)]
    for name, p in model.named_parameters():
        along = None if p.dim() == 1 else 1 if name.endswith(("out.weight", "down.weight")) else 0
        if "embedding" in name and not vocabulary_cut:
            along = 1
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        for i, part in enumerate(parts):
            part[name] = p.detach().clone() if along is None else p.detach().chunk(shards, along)[i].clone()
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(parts):
        torch.save(part | {"rope.freqs": torch.ones(4)}, folder / f"consolidated.{i:02}.pth")
    c = model.config
    (folder / "params.json").write_text(json.dumps(dict(
        dim=c.d_model, n_layers=c.n_layers, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads, vocab_size=c.vocab_size,
        multiple_of=8, norm_eps=c.norm_eps, rope_theta=c.rope_base) | params))


@pytest.mark.parametrize("shards, vocabulary_cut", [(1, True), (2, True), (2, False)])
def test_metas_files_hugging_faces_and_ours_are_one_model(tmp_path, shards, vocabulary_cut):
    ours = tiny(std=0.3, vocab_size=60, rope_base=5e5, d_ff=swiglu_width(32, 8, 1.3), context=8192)
    write_meta(tmp_path / "meta", ours, shards, vocabulary_cut, ffn_dim_multiplier=1.3)
    again, x = Llama.from_pretrained(tmp_path / "meta"), tokens_of(1, 7, 60)
    assert again.config == ours.config
    assert torch.equal(again(x), ours(x))
    again.save_pretrained(tmp_path / "theirs")
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")(x).logits, ours(x))


def test_params_that_meta_leaves_out_are_derived(tmp_path):
    ours = tiny(tied=True, d_ff=swiglu_width(32, 8))
    write_meta(tmp_path, ours, 1, vocab_size=-1, use_scaled_rope=True)
    config = Llama.from_pretrained(tmp_path).config
    assert (config.vocab_size, config.tied, config.context, config.rope_factor) == (61, True, 131072, 32.0)


def test_broken_directories_of_meta_are_refused(tmp_path):
    ours = tiny(d_ff=swiglu_width(32, 8), vocab_size=60)
    write_meta(tmp_path, ours, 2)
    part = torch.load(tmp_path / "consolidated.01.pth")
    del part["layers.1.attention.wq.weight"]
    torch.save(part | {"other": torch.ones(1)}, tmp_path / "consolidated.01.pth")
    with pytest.raises(ValueError, match=r"2 tensors.*layers.1.attention.wq.weight is \(16, 32\) in 1 of 2 files, the "
                                         r"config says \(32, 32\); other is unknown"):
        Llama.from_pretrained(tmp_path)
    whole = (tmp_path / "consolidated.01.pth").read_bytes()
    (tmp_path / "consolidated.01.pth").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="consolidated.01.pth: .*damaged or cut short"):
        Llama.from_pretrained(tmp_path)
    for file in tmp_path.glob("*.pth"):
        file.unlink()
    with pytest.raises(ValueError, match=r"no consolidated.\*.pth is there"):
        Llama.from_pretrained(tmp_path)
    write_meta(tmp_path, ours, 1)
    (tmp_path / "params.json").write_text('{"dim": 32}')
    with pytest.raises(ValueError, match="params.json: KeyError"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells a process its peak")
def test_peak_memory_of_loading_is_under_1_2_models(tmp_path):
    def status(name):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
    with torch.device("meta"):
        torch.nn.Embedding(1, 1)  # torch now imports 70 MB of its own, whatever the model's size
    model = Llama(LlamaConfig(8000, 64, 4, 8, 4, 512, 1024))  # 17M parameters, 68 MB, half of it embedding and head
    model.save_pretrained(tmp_path / "sharded", shard_bytes=30_000_000)
    write_meta(tmp_path / "meta", model, 2, multiple_of=256, ffn_dim_multiplier=0.75, rope_theta=5e5)
    size = sum(p.nbytes for p in model.parameters())
    del model
    for folder in ("sharded", "meta"):
        ctypes.CDLL(None).malloc_trim(0)  # else the model may fit into what other tests have freed
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak so far
        before = status("VmRSS")
        again = Llama.from_pretrained(tmp_path / folder)
        assert 0.9 < (status("VmHWM") - before) / size < 1.2, folder
        del again


# --- bad directories ------------------------------------------------------------------------

def test_all_tensors_that_do_not_fit_are_listed_by_name(tmp_path):
    tiny().save_pretrained(tmp_path)
    tensors = safetensors_torch.load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.2.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.ones(16, 32)
    tensors["model.layers.3.self_attn.q_proj.bias"] = torch.ones(16)
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(tmp_path)
    assert "4 tensors do not fit" in str(error.value) and "\n" not in str(error.value)
    for words in ("model.norm.weight is missing", "model.layers.2.mlp.up_proj.weight is missing",
                  "model.layers.0.self_attn.q_proj.weight is (16, 32), the config says (32, 32)",
                  "model.layers.3.self_attn.q_proj.bias is unknown"):
        assert words in str(error.value)


def test_foreign_and_broken_directories_are_refused(tmp_path):
    random_peer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, message in (({"model_type": "gpt2"}, "model_type = 'gpt2', Llama computes llama, mistral"),
                             ({"model_type": "mixtral"}, "give mlp=moe.experts_of"),
                             ({"attention_bias": True}, "attention_bias = True, Llama computes False"),
                             ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
                             ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
                             ({"rope_parameters": {"rope_type": "llama3"}}, "lacks 'factor'"),
                             ({"num_attention_heads": 3, "head_dim": None}, "n_heads must divide d_model"),
                             ({"rope_theta": "high", "rope_parameters": None}, "config.json: '>' not supported"),
                             ({"num_hidden_layers": "3"}, "config.json: n_layers must be a whole number")):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            Llama.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (whole[:1000], whole[:-4], whole + b"x", b"", b"\xff" * 100, whole[:8] + b"[" + whole[9:]):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors: .*damaged or cut short"):
            Llama.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\*.safetensors is there"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-1.safetensors"}}')
    with pytest.raises(ValueError, match="model-1-of-1.safetensors: no such file, though the index names it"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(ValueError, match="index.json: no weight_map is there"):
        Llama.from_pretrained(tmp_path)
    del config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="config.json lacks 'hidden_size': copy it again$"):
        Llama.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="Hugging Face Llama: "):
        Llama.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no model of transformers is a llama with qk_norm=True"):
        tiny(qk_norm=True).save_pretrained(tmp_path)



@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_quantised_weights_are_refused(tmp_path, name):
    tiny().save_pretrained(tmp_path)
    tensors = safetensors_torch.load_file(tmp_path / "model.safetensors")
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    safetensors_torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} is of type torch.float8_e4m3fn: quantised weights are not read"):
        Llama.from_pretrained(tmp_path)


def test_a_save_cut_short_is_no_model(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path)
    monkeypatch.setattr(safetensors_torch, "save_file", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tiny(1, rope_base=5e5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config.json: .*No such file"):
        Llama.from_pretrained(tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="pip install safetensors"):
        tiny().save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_demo_ends_on_its_verdict(capsys):
    weights.main(parts=4, seed=0)
    assert "Hugging Face True, Meta True (expected True, True)" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("flag, value", [("--parts", "3"), ("--parts", "x"), ("--seed", "-1")])
def test_bad_flags_are_one_line(flag, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["weights.py", flag, value])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(weights.__file__, run_name="__main__")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and message.startswith("weights.py: ")
    assert flag in message
