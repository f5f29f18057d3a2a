"""What a GPU would refuse, found without one: tensors of two devices in one operation, a CPU's generator for a GPU.

The meta device stands in for a GPU. Everything runs as it would there, without values: a number that is read is 1 (a
whole one in a list 0), the answer to ``any`` is no, to ``all`` yes. What this cannot see is arithmetic, and what the
code does only where ``device.type`` is "cuda", under autocast, or in another thread.
"""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import alignment
import decode
import flash_attn
import gathering
import moe
import processes
import speculative
import train
import zero
from gpt import GPT, GPTConfig
from llama import Llama, LlamaConfig
from processes import World

GPU = torch.device("meta")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}  # these join devices
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
LISTS = ("tolist", "cpu", "numpy")
OF_THE_GPU = 2**63  # seeds of its generators begin here


class DeviceError(AssertionError):
    pass


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors and generators of different devices, and, on a Mac's GPU, results in float64.
    Allowed are copies, an index on the CPU, and a number (a tensor without dimensions) on the CPU that is not the result."""

    is_mac = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        elsewhere = [t for t in tensors if t.device != GPU]
        if 0 < len(elsewhere) < len(tensors) and function not in COPIES:
            if function in INDEXED:
                put = args[2] if function is not aten.index.Tensor else args[0]
                wrong = args[0].device != GPU or put.dim() and put.device != GPU
            else:
                wrong = any(t.dim() for t in elsewhere) or function._schema.is_mutable and args[0].device != GPU
            if wrong:
                raise DeviceError(f"{function} of tensors on {GPU} and the CPU")
        at = torch.device(kwargs.get("device") or (tensors[0].device if tensors else "cpu"))
        for generator in (leaf for leaf in leaves if isinstance(leaf, torch._C.Generator)):
            if (generator.initial_seed() >= OF_THE_GPU) != (at == GPU):
                raise DeviceError(f"{function} on {at} by a generator of another device")
        if function is aten.copy_.default and args[1].device == GPU != args[0].device:
            return args[0]
        if function is aten._to_copy.default and args[0].device == GPU and at.type == "cpu" and kwargs.get("device"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if function is aten.index.Tensor and at == GPU:  # taken as all True
            args = (args[0], [index for i in args[1] for index in (
                [torch.zeros(i.numel(), dtype=torch.long, device=GPU)] * i.dim()
                if i is not None and i.dtype == torch.bool else [i])])
        if function is aten.nonzero.default and at == GPU:  # called by name only to list what is wrong: nothing
            return torch.zeros(0, args[0].dim(), dtype=torch.long, device=GPU)
        if function is aten.bincount.default and at == GPU:
            return torch.zeros(args[2], dtype=torch.long, device=GPU)
        if function is aten.split_with_sizes.default and at == GPU:  # sizes that were read are made up
            return function(args[0], [args[0].size(0)] + [0] * (len(args[1]) - 1))
        result = function(*args, **kwargs)
        if function._schema.name == "aten::all" and at == GPU:
            result.all_is_well = True
        if self.is_mac and any(leaf.dtype == torch.float64 and leaf.device == GPU for leaf in tree_leaves(result)
                               if isinstance(leaf, torch.Tensor)):
            raise DeviceError(f"{function} gives float64")
        return result


class GeneratorOfTheGPU(torch._C.Generator):
    device = GPU

    def manual_seed(self, seed):
        return super().manual_seed(OF_THE_GPU + seed % 2**32)


class Generator(torch._C.Generator):
    def __new__(cls, device="cpu"):
        return GeneratorOfTheGPU().manual_seed(0) if torch.device(device) == GPU else torch._C.Generator(device)


@pytest.fixture
def gpu(monkeypatch):
    """The meta device, made to look like a GPU."""
    def with_values(name):
        method = getattr(torch.Tensor, name)

        def read(self, *args, **kwargs):
            if self.device == GPU:
                value = self.dtype.is_floating_point or self.dtype != torch.bool and name not in LISTS
                value = getattr(self, "all_is_well", value)
                self = torch.full(self.shape, value, dtype=self.dtype)
            return method(self, *args, **kwargs)
        monkeypatch.setattr(torch.Tensor, name, read)

    for name in ("item", "__int__", "__float__", "__bool__", "__index__", *LISTS):
        with_values(name)
    monkeypatch.setattr(torch, "Generator", Generator)
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, *args, **kwargs: contextlib.nullcontext() if device == "meta"
                        else autocast(device, *args, **kwargs))
    with OneDevice():
        yield GPU


def test_operations_and_generators_of_two_devices_are_noticed(gpu):
    x = torch.zeros(2, 3, device=gpu)
    for wrong in (
            lambda: x @ torch.zeros(3, 1), lambda: F.embedding(torch.tensor([0]), x), lambda: x + torch.zeros(3),
            lambda: torch.zeros(2).mul_(x[0, 0]), lambda: torch.zeros(3)[torch.zeros(2, dtype=torch.long, device=gpu)],
            lambda: x.__setitem__(torch.tensor([0]), torch.zeros(3)), lambda: x.normal_(generator=torch.Generator()),
            lambda: torch.rand(3, generator=torch.Generator(gpu))):
        with pytest.raises(DeviceError):
            wrong()
    x.normal_(generator=torch.Generator(gpu).manual_seed(3))
    assert (x + torch.tensor(1.0)).sum().item() == 1 and x.bool().all() and not x.bool().any()
    assert x[torch.tensor([0])].device == gpu


SIZES = dict(vocab_size=61, context=32, n_layers=2, d_model=32)
MODELS = {
    "gpt": lambda: GPT(GPTConfig(n_heads=2, **SIZES)),
    "gpt in tiles": lambda: GPT(GPTConfig(n_heads=2, **SIZES), attention=functools.partial(
        flash_attn.flash_attention, backend="tiled")),
    "llama": lambda: Llama(LlamaConfig(n_heads=4, n_kv_heads=2, d_ff=64, qk_norm=True, rope_factor=8.0,
                                       rope_original_context=16, **SIZES)),
    "llama with a window": lambda: Llama(LlamaConfig(n_heads=4, n_kv_heads=2, d_ff=64, window=8, **SIZES)),
    **{f"moe {router}": lambda router=router: Llama(
        LlamaConfig(n_heads=4, n_kv_heads=2, d_ff=64, **SIZES), mlp=lambda c: moe.MoE(
            c.d_model, c.d_ff, 4, 2, router, shared=1, capacity_factor=1.0 if "soft" in router else None))
       for router in moe.ROUTERS}}


@pytest.mark.parametrize("kind", MODELS)
def test_models_train_and_decode_on_one_device(kind, gpu):
    model = MODELS[kind]().to(gpu)
    tokens = torch.zeros(2, 9, dtype=torch.long, device=gpu)
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    assert {p.grad.device for p in model.parameters() if p.requires_grad and p.grad is not None} == {gpu}
    with torch.no_grad():
        cache = model.new_cache(2, 20)
        cache.padding = torch.tensor([1, 0], device=gpu)
        assert model(tokens, cache).device == model(tokens[:, :1], cache).device == gpu
        cache.select(torch.tensor([0], device=gpu))


def test_decoding_stays_on_one_device(gpu):
    model, prompts = MODELS["gpt"]().to(gpu), [[1, 2, 3], [4]]
    for options in ({"temperature": 0}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}):
        for draw in (None, torch.Generator(gpu)):
            assert list(map(len, decode.generate(model, prompts, 4, generator=draw, **options))) == [4, 4]
    assert len(decode.naive_generate(model, prompts, 2)) == 2
    assert len(list(decode.stream(model, prompts[0], 3))) == 3
    decode.beam_search(model, prompts[0], 3, 4)
    assert decode.score(model, torch.zeros(2, 5, dtype=torch.long, device=gpu), torch.tensor([5, 3])).device == gpu
    speculative.speculative(model, model, prompts[0], 4, draft_tokens=2)


def test_a_model_in_parts_is_drawn_by_a_generator_of_the_cpu(gpu):
    with gpu:
        model = GPT(GPTConfig(n_heads=2, **SIZES))
    names = dict(model.named_parameters())
    whole = dict(GPT(GPTConfig(n_heads=2, **SIZES), generator=torch.Generator().manual_seed(3)).named_parameters())
    drawn = []
    gathering.draw_values(model, [p.dtype for p in names.values()], lambda p, values: drawn.append(values.clone()),
                          lambda model: model.initialise(torch.Generator().manual_seed(3)))
    assert all(torch.equal(a, b) for a, b in zip(drawn, whole.values(), strict=True))


@pytest.fixture
def mac(gpu, monkeypatch):
    monkeypatch.setattr(OneDevice, "is_mac", True)
    assert zero.exact_dtype(torch.device("mps")) == torch.float32
    monkeypatch.setattr(zero, "exact_dtype", lambda device: torch.float32)


@pytest.fixture
def run(gpu, tmp_path, monkeypatch):
    """train.py on one process whose device is the GPU."""
    for module in (processes, train):
        monkeypatch.setattr(module, "join", lambda *_: World(device=gpu))
        monkeypatch.setattr(module, "memory", lambda device: 2**36)
        monkeypatch.setattr(module, "measure_peak", lambda *_: 1e12)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 400)

    def run(*flags):
        return train.main([
            f"--data={tmp_path / 'text.txt'}", f"--out={tmp_path / 'run'}", "--stage=pretrain", "--steps=2",
            "--vocab_size=280", "--context=32", "--n_layers=1", "--d_model=32", "--n_heads=2", "--batch_tokens=256",
            "--samples=1", "--sample_tokens=3", *flags])
    return run


@pytest.mark.parametrize("flags", [
    (), ("--precision=fp16", "--recompute=block"), ("--model=llama", "--recompute=attention"),
    ("--model=moe",), ("--zero=1", "--offload"), ("--zero=3",), ("--model=llama", "--zero=3", "--offload")],
    ids=" ".join)
def test_training_stays_on_one_device_and_resumes(flags, run, mac):
    assert run(*flags) == 0
    assert run(*flags, "--steps=3", "--resume") == 0


def test_alignment_stays_on_one_device(run, mac, tmp_path, monkeypatch):
    assert run("--context=64") == 0
    # ZeRO would take it for a model without values.
    monkeypatch.setattr(torch.Tensor, "is_meta", property(lambda self: False))
    for name, answers in (("instructions", '"response": "Fox."'),
                          ("preferences", '"chosen": "Fox.", "rejected": "Dog."')):
        lines = [f'{{"prompt": "What is {i}?", {answers}}}' for i in range(40)]
        (tmp_path / name).with_suffix(".jsonl").write_text("\n".join(lines))
    config = alignment.AlignConfig(
        stages="sft,reward,ppo,grpo",  # DPO picks by a mask, and how many these are needs values
        init=str(tmp_path / "run"), out=str(tmp_path / "out"), max_new_tokens=4, sft_epochs=1, sft_batch=8, pairs=20,
        reward_batch=4, reward_epochs=1, ppo_steps=1, ppo_batch=8, dpo_batch=4, grpo_steps=1, grpo_batch=8,
        grpo_group=4, evaluation_prompts=6, held_out=0.3, instructions=str(tmp_path / "instructions.jsonl"),
        preferences=str(tmp_path / "preferences.jsonl"))
    alignment.run_stages(config, World(device=GPU))
    assert {"sft", "reward", "ppo", "grpo"} <= {path.name for path in (tmp_path / "out").iterdir()}
