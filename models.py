"""Which language model is meant: from the settings of a run, or from a checkpoint, to a model.

Idea      train.py and decode.py work on any model of the contract (embed, blocks, head, new_cache). A model is named by
          its kind and its sizes; both stand in a checkpoint. This is the one place that knows the kinds.
Formula   FLOPs of a training step per token: 6 per weight that a token meets, and attention's; of experts it meets K.
Shapes    tokens (B, T) -> logits (B, T, V), for all of them
Omits     encoders (bert.py) and encoder-decoders (transformer.py, t5.py): they are no language models in this sense.
Run       python models.py    sizes of all presets; ends with "max |counted - made| = 0 parameters ..."
Test      pytest tests/test_models.py
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

KINDS = ("gpt", "llama", "moe")


# --- 1. the models ---------------------------------------------------------------------------

def describe(settings, vocab_size: int) -> dict:
    """The sizes of the model that a run's settings (config.TrainConfig) ask for, as ``build`` takes them.

    Raises ValueError for sizes that cannot be.
    """
    s = settings
    sizes = {"vocab_size": vocab_size, "context": s.context, "n_layers": s.n_layers, "n_heads": s.n_heads,
             "d_model": s.d_model, "d_ff": s.d_ff}
    if s.model == "gpt":
        sizes["dropout"] = s.dropout
    else:
        sizes |= {"n_kv_heads": s.n_kv_heads or s.n_heads, "rope_base": 1e4 if s.context <= 8192 else 5e5, "tied": True}
    if s.model == "moe":
        sizes["experts"] = {"n_experts": s.n_experts, "k": s.experts_per_token, "router": "softmax_before"}
    return sizes | {"d_ff": build(s.model, sizes, device="meta").config.d_ff}


class _NothingDrawn(TorchFunctionMode):
    """Nothing is to be drawn where there is no memory; to find that out torch would import its compiler: 1.6 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.__name__ == "normal_":  # a tensor's own, or torch.nn.init's
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def build(kind: str, sizes: dict, attention: Callable | None = None, generator: torch.Generator | None = None,
          device: str = "cpu") -> nn.Module:
    """A model of a kind and sizes, its weights drawn from the generator; on "meta" it has shapes and no weights.

    Raises ValueError for an unknown kind or sizes that cannot be.
    """
    options = {} if attention is None else {"attention": attention}
    sizes = dict(sizes)
    if kind not in KINDS:
        raise ValueError(f"model must be one of {', '.join(KINDS)}, got {kind!r}")
    try:
        with torch.device(device), _NothingDrawn() if device == "meta" else contextlib.nullcontext():
            if kind == "gpt":
                from gpt import GPT, GPTConfig
                return GPT(GPTConfig(**sizes), generator=generator, **options)
            from llama import Llama, LlamaConfig
            if kind == "moe":
                from moe import MoE
                experts = sizes.pop("experts")
                options["mlp"] = lambda c: MoE(c.d_model, c.d_ff, per_sequence=True, generator=generator, **experts)
            return Llama(LlamaConfig(**sizes), generator=generator, **options)
    except (TypeError, KeyError) as error:  # a name too many, or one too few
        raise ValueError(f"these are not the sizes of a {kind}: {error}") from error


def sizes_of(model: nn.Module) -> dict:
    """What ``build`` needs to build this model again."""
    sizes, layer = dataclasses.asdict(model.config), model.blocks[0].mlp
    if hasattr(layer, "n_experts"):
        sizes["experts"] = {"n_experts": layer.n_experts, "k": layer.k, "router": layer.kind, "like": layer.like}
    return sizes


def parameters_and_flops(kind: str, sizes: dict, context: int | None = None) -> tuple[int, int, int]:
    """(parameters, those that a token meets, FLOPs of a training step per token), without making the weights."""
    model = build(kind, sizes, device="meta")
    if kind == "gpt":
        from gpt import count_parameters, flops_per_token
        N = count_parameters(model.config)
        return N, N, flops_per_token(model.config, context)
    from moe import model_size
    size = model_size(model, context)
    return size.parameters, size.active_parameters, size.flops


def balancing_loss(model: nn.Module) -> torch.Tensor | float:
    """What a model's layers add to the loss of the last forward (the balance of experts); 0.0 for most."""
    if not hasattr(model.blocks[0].mlp, "n_experts"):
        return 0.0
    from moe import auxiliary_loss
    return auxiliary_loss(model)


def from_pretrained(directory: str | Path) -> nn.Module:
    """The model in a Hugging Face directory, by its config.json's ``model_type``, or in one of Meta's (a Llama).

    Raises ValueError if it is damaged, or no model that is here.
    """
    config = Path(directory) / "config.json"
    try:
        is_meta = not config.exists() and config.with_name("params.json").exists()
        kind = "llama" if is_meta else json.loads(config.read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{directory}: config.json: {error}") from None
    if kind == "gpt2":
        from gpt import GPT
        return GPT.from_pretrained(directory)
    if kind in ("llama", "mistral"):
        from llama import Llama
        return Llama.from_pretrained(directory)
    if kind in ("mixtral", "olmoe"):
        from llama import Llama
        from moe import experts_of
        return Llama.from_pretrained(directory, mlp=experts_of(directory))
    raise ValueError(f"{directory}: model_type is {kind!r}: gpt2, llama, mistral, mixtral and olmoe can be read")


def load_model(directory: str | Path, device: str = "cpu", of_reward_model: bool = False):
    """(model, encoding), in eval mode, of a training run's directory, one of its checkpoints, or a directory of Hugging
    Face or Meta. Raises ValueError if there is no such directory, or it does not hold both a model and the tokenizer
    that it was trained with; and if it is a reward model, which was trained to score texts and not to write them,
    unless ``of_reward_model`` asks for the model beneath its head."""
    import checkpoint
    import tokenizer
    directory = Path(directory)
    if (directory / "config.json").exists() or (directory / "params.json").exists():
        encoding = tokenizer.load(directory)  # the small part first: it may be missing
        model = from_pretrained(directory)
    elif directory.is_dir():
        path = checkpoint.latest(directory)
        saved = checkpoint.load(path, parts=("model", "head"))
        if saved["head"] and not of_reward_model:
            raise ValueError(f"{path}: a reward model, which scores texts and writes none: give the directory of a "
                             "pretrained or aligned model")
        try:
            model = build(saved["meta"].get("model_type"), saved["meta"]["model_config"], device="meta")
            model.load_state_dict(saved["model"], assign=True)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:  # the last from load_state_dict, in lines
            raise ValueError(f"{path}: {' '.join(str(error).split())[:200]}") from None
        encoding = tokenizer.load(path / "tokenizer.tiktoken")
    else:
        raise ValueError(f"{directory}: no such directory: give one that train.py, Hugging Face or Meta wrote")
    if encoding.n_vocab > model.config.vocab_size:
        raise ValueError(f"{directory}: the tokenizer has {encoding.n_vocab} ids, the model "
                         f"{model.config.vocab_size}: it is not the one that the model was trained with")
    return model.to(device).eval(), encoding


# --- 2. demo ---------------------------------------------------------------------------------

def main() -> None:
    from config import PRESETS, TrainConfig
    worst = 0.0
    print(f"{'preset':12} kind    parameters     a token meets   FLOPs per training token   over 6 N")
    for name, values in PRESETS.items():
        settings = TrainConfig(**values)
        vocab_size = {"train": settings.vocab_size, "gpt2": 50257}.get(settings.tokenizer, 100277)
        sizes = describe(settings, vocab_size)
        N, active, flops = parameters_and_flops(settings.model, sizes)
        exact = sum(p.numel() for p in build(settings.model, sizes, device="meta").parameters())
        worst = max(worst, abs(N - exact))
        print(f"{name:12} {settings.model:6} {N:>14,} {active:>15,} {flops:>18.3e} {flops / (6 * active):18.2f}")
    print(f"max |counted - made| = {worst:.0f} parameters (expected 0)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.parse_args()  # --help, and nothing to set
    try:
        main()
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
