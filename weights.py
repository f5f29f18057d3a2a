"""Published weights: how Hugging Face and Meta store one and the same Llama.

Idea      Weights are published as named tensors in files that are mapped into memory, so that a few rows can be read
          without the rest. Hugging Face: config.json and safetensors files (a table of names, types and places, then
          the bytes), several with an index when the model is large. Meta: params.json and consolidated.NN.pth, one
          for each of the P GPUs of its tensor parallelism, holding that GPU's part of every tensor. They differ in
          names, and in the order of the rows of W_q and W_k, for their RoPEs turn other pairs. Peak memory of
          loading is 1.05 models: a twentieth of the model is read at a time.
Formula   Meta turns (x_2j, x_2j+1), Hugging Face (x_j, x_j+Dh/2):
          row 2j + i of a head's W_q and W_k is row i Dh/2 + j in Hugging Face's files, i = 0 or 1, j < Dh/2
Shapes    W (out, in);   in Meta's files (out/P, in), W_o and W_down (out, in/P), gains (D,) whole in each
Omits     quantised weights, pickled pytorch_model.bin, writing Meta's files. To convert Meta's to Hugging Face's:
          Llama.from_pretrained("meta").save_pretrained("hugging_face")
Run       python weights.py    a small Llama is stored in both ways and read again: 3 s
          Ends with "read again bit for bit: ..."
Test      pytest tests/test_weights.py
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor


# --- 1. names, and the order of rows --------------------------------------------------------

OUTSIDE = {  # module of Llama -> Hugging Face's, Meta's; behind each comes ".weight"
    "token_embedding": ("model.embed_tokens", "tok_embeddings"),
    "norm": ("model.norm", "norm"),
    "output": ("lm_head", "output")}
IN_LAYER = {  # the same in a layer: behind "model.layers.{i}." and "layers.{i}."
    "norm1": ("input_layernorm", "attention_norm"),
    "attention.q": ("self_attn.q_proj", "attention.wq"),
    "attention.k": ("self_attn.k_proj", "attention.wk"),
    "attention.v": ("self_attn.v_proj", "attention.wv"),
    "attention.q_norm": ("self_attn.q_norm", None),
    "attention.k_norm": ("self_attn.k_norm", None),
    "attention.out": ("self_attn.o_proj", "attention.wo"),
    "norm2": ("post_attention_layernorm", "ffn_norm"),
    "mlp.gate": (None, "feed_forward.w1"),  # Hugging Face's have many forms: ``mlp.hugging_face_tensors``
    "mlp.down": (None, "feed_forward.w2"),
    "mlp.up": (None, "feed_forward.w3")}
TURNED = ("attention.q", "attention.k", "attention.q_norm", "attention.k_norm")  # their rows meet RoPE
COMPUTED = ("rotary_emb.inv_freq", "rope.freqs")  # stored by some, though the config says it


def halves(w: Tensor, d_head: int) -> Tensor:
    """Rows (H Dh, ...), pairs side by side, seen in Hugging Face's order: a view (H, 2, Dh/2, ...)."""
    return w.unflatten(0, (-1, d_head // 2, 2)).transpose(1, 2)


def rope_halves(x: Tensor, rotation: Tensor) -> Tensor:
    """Hugging Face's RoPE, whose pairs are (x_j, x_{j + Dh/2}), the two halves of a head.

    x (B, H, T, Dh), rotation e^(i t theta_j), complex (T, Dh/2). With W_q and W_k in its order the scores are those
    of ``llama.rope``: a permutation of q and k alike.
    """
    a, b = x.chunk(2, -1)  # (B, H, T, Dh/2)
    return torch.cat((a * rotation.real - b * rotation.imag, a * rotation.imag + b * rotation.real), -1)


def tensors_of(model: nn.Module, meta: bool = False) -> dict[str, Tensor]:
    """Name in the files -> the Llama's own memory that belongs to it, seen in the order of the file's rows."""
    tensors = {}
    parts = [(model, OUTSIDE, "")]
    parts += [(block, IN_LAYER, f"{'' if meta else 'model.'}layers.{i}.") for i, block in enumerate(model.blocks)]
    for part, names, prefix in parts:
        modules = dict(part.named_modules())
        for ours, theirs in names.items():
            if ours in modules and theirs[meta] is not None:  # a tied model has no head, most have no norm of q and k
                w, = modules[ours].parameters(recurse=False)
                w = halves(w, model.config.d_head) if ours in TURNED and not meta else w
                tensors[f"{prefix}{theirs[meta]}.weight"] = w
        if part is not model and not meta:
            tensors |= {prefix + name: w for name, w in part.mlp.hugging_face_tensors().items()}
    return {name: w.detach() for name, w in tensors.items()}


def file_shape(w: Tensor) -> tuple[int, ...]:
    """The shape in a file of a tensor from ``tensors_of``: (H, 2, Dh/2, ...) is stored as (H Dh, ...)."""
    return tuple(w.shape) if w.dim() <= 2 else (math.prod(w.shape[:3]), *w.shape[3:])


# --- 2. the configuration -------------------------------------------------------------------

SIZES = {"vocab_size": "vocab_size", "max_position_embeddings": "context", "hidden_size": "d_model",
         "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads", "intermediate_size": "d_ff",
         "num_key_value_heads": "n_kv_heads", "head_dim": "d_head", "rms_norm_eps": "norm_eps",
         "tie_word_embeddings": "tied"}
SCALING = {"factor": "rope_factor", "low_freq_factor": "rope_low_frequency", "high_freq_factor": "rope_high_frequency",
           "original_max_position_embeddings": "rope_original_context"}
FORM = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "clip_qkv": None}  # nothing else is computed
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
                 "olmoe": "OlmoeForCausalLM"}
WITH_QK_NORM, WITHOUT_WINDOW = ("olmoe",), ("llama", "olmoe")


def read_config(directory: Path) -> tuple[str, dict]:
    """Hugging Face's config.json: its ``model_type``, and the arguments of LlamaConfig.

    Raises ValueError for a model that Llama does not compute.
    """
    theirs = _json(directory / "config.json", "Hugging Face Llama")
    kind = theirs.get("model_type")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{directory}: config.json has model_type = {kind!r}, Llama computes "
                         f"{', '.join(ARCHITECTURES)}")
    for key, value in FORM.items():
        if theirs.get(key, value) != value:
            raise ValueError(f"{directory}: config.json has {key} = {theirs[key]!r}, Llama computes {value!r}")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"{directory}: config.json has rope_type = {rope_type!r}, Llama computes 'default' and "
                         "'llama3'")
    # What transformers takes where a key is missing.
    theirs = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
              "rope_theta": 1e4, "sliding_window": 4096 if kind == "mistral" else None} | theirs
    try:
        sizes = {ours: theirs[key] for key, ours in SIZES.items()}
        if rope_type == "llama3":
            sizes |= {ours: rope[key] for key, ours in SCALING.items()}
    except KeyError as error:
        raise ValueError(f"{directory}: config.json lacks {error}: copy it again") from None
    return kind, sizes | {"rope_base": rope.get("rope_theta", theirs["rope_theta"]), "qk_norm": kind in WITH_QK_NORM,
                          "window": None if kind in WITHOUT_WINDOW else theirs["sliding_window"]}


def read_params(directory: Path, stored: dict[str, list["Part"]]) -> dict:
    """Meta's params.json as arguments of LlamaConfig. It says neither vocabulary (Llama 1 and 2) nor context nor by
    how much positions are scaled: these follow from the tensors and from what Meta has published."""
    theirs = _json(directory / "params.json", "directory of Meta's Llama")
    embedding = stored.get("tok_embeddings.weight")
    try:
        D, V = theirs["dim"], theirs["vocab_size"]
        if V < 0:  # "that of the tokenizer": Llama 1 and 2, whose embedding is cut by columns
            V = embedding[0].shape[0] if embedding else 32000
        scaled, base = bool(theirs.get("use_scaled_rope")), theirs.get("rope_theta", 1e4)
        d_ff = swiglu_width(D, theirs["multiple_of"], theirs.get("ffn_dim_multiplier") or 1.0)
        return {"vocab_size": V, "context": 131072 if scaled else 8192 if base > 1e4 else 4096, "d_model": D,
                "n_layers": theirs["n_layers"], "n_heads": theirs["n_heads"], "n_kv_heads": theirs.get("n_kv_heads"),
                "d_ff": d_ff, "rope_base": base, "norm_eps": theirs["norm_eps"], "tied": "output.weight" not in stored,
                "rope_factor": (32.0 if D <= 3072 else 8.0) if scaled else None}  # Llama 3.2's 1B and 3B; 3.1 and 3.3
    except (TypeError, KeyError, ZeroDivisionError) as error:
        raise ValueError(f"{directory} is no directory of Meta's Llama: params.json: {error!r}") from None


def swiglu_width(d_model: int, multiple_of: int = 256, multiplier: float = 1.0) -> int:
    """Llama's rule for Dff: three matrices of 2/3 4D are as large as two of 4D; rounded up to a multiple."""
    return -(-int(multiplier * int(8 * d_model / 3)) // multiple_of) * multiple_of


def _json(path: Path, what: str) -> dict:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a table")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.parent} is no {what}: {path.name}: {error}") from None
    return content


# --- 3. the tensors -------------------------------------------------------------------------

class Part(NamedTuple):
    """A tensor in a file, or one GPU's share of it."""
    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self, rows: slice = slice(None)) -> Tensor:
        """These rows. The file is mapped anew each time: what stayed mapped would add up to the whole file."""
        if self.file.suffix == ".pth":
            w = _load_pth(self.file)[self.name][rows]
        else:
            with _safetensors().safe_open(self.file, "pt") as opened:
                w = opened.get_slice(self.name)[rows]
        if w.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{self.file}: {self.name} is of type {w.dtype}: quantised weights are not read")
        return w


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("this needs the safetensors package: pip install safetensors") from None
    return safetensors


def _load_pth(file: Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def safetensors_parts(directory: Path) -> dict[str, list[Part]]:
    """The tensors of model.safetensors, or of the files that its index names."""
    safetensors, parts = _safetensors(), {}
    index, files = directory / "model.safetensors.index.json", [directory / "model.safetensors"]
    if not files[0].exists():
        files = sorted(directory.glob("model-*.safetensors"))
        if index.exists():
            listed = _json(index, "Hugging Face Llama").get("weight_map")
            if not isinstance(listed, dict):
                raise ValueError(f"{index}: no weight_map is there: damaged, copy it again")
            files = [directory / str(name) for name in sorted(set(listed.values()))]
    if not files:
        raise ValueError(f"{directory}: no model*.safetensors is there: copy it beside config.json")
    for file in files:
        try:
            with safetensors.safe_open(file, "pt") as opened:
                for name in opened.keys():
                    parts[name] = [Part(file, name, tuple(opened.get_slice(name).get_shape()))]
        except FileNotFoundError:
            raise ValueError(f"{file}: no such file, though the index names it: copy it again") from None
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{file}: {error}: damaged or cut short, copy it again") from None
    return parts


def meta_parts(directory: Path) -> dict[str, list[Part]]:
    """The tensors of consolidated.00.pth, ...: a whole one in each, or each GPU's part."""
    files, parts = sorted(directory.glob("consolidated.*.pth")), {}
    if not files:
        raise ValueError(f"{directory}: no consolidated.*.pth is there: copy them beside params.json")
    for file in files:
        try:
            for name, w in _load_pth(file).items():
                parts.setdefault(name, []).append(Part(file, name, tuple(w.shape)))
        except Exception as error:  # zip, pickle and torch each have their own
            reason = str(error).split("\n")[0][:100]
            raise ValueError(f"{file}: {reason}: damaged or cut short, copy it again") from None
    return parts


def cut_axes(directory: Path, wanted: dict[str, tuple[int, ...]],
             stored: dict[str, list[Part]]) -> dict[str, int | None]:
    """The axis along which the parts of each wanted tensor make the whole, None where each part is the whole.

    Raises ValueError that names every tensor that is missing, misshapen or unknown.
    """
    P, axes, wrong = max(map(len, stored.values()), default=1), {}, []
    for name, shape in wanted.items():
        parts = stored.get(name, [])
        shapes = {part.shape for part in parts}
        wholes = {axis: {tuple(n * P if d == axis else n for d, n in enumerate(s)) for s in shapes}
                  for axis in (None, *range(len(shape)))}
        fitting = [axis for axis, whole in wholes.items() if whole == {shape} and len(parts) == P]
        if not parts:
            wrong.append(f"{name} is missing")
        elif not fitting:
            of = f" in {len(parts)} of {P} files" if P > 1 else ""
            wrong.append(f"{name} is {', '.join(map(str, sorted(shapes)))}{of}, the config says {shape}")
        else:
            axes[name] = fitting[0]
    wrong += [f"{name} is unknown" for name in stored if name not in wanted and not name.endswith(COMPUTED)]
    if wrong:
        raise ValueError(f"{directory}: {len(wrong)} tensors do not fit the config: " + "; ".join(wrong))
    return axes


# --- 4. reading and writing a model ---------------------------------------------------------

@torch.no_grad()
def load(directory: str | Path, make: Callable[[dict], nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
    """The Llama in a directory of Hugging Face's or Meta's, in evaluation mode: what ``Llama.from_pretrained`` calls.

    ``make`` builds it from LlamaConfig's arguments; ``dtype`` None: that of the stored embedding.

    Raises ValueError if the directory is not of a model computed here, if a file is cut short, or, all by name,
    for tensors that are missing, of another shape, or unknown.
    """
    directory = Path(directory)
    meta = not (directory / "config.json").exists() and (directory / "params.json").exists()
    if meta:
        stored = meta_parts(directory)
        kind, sizes = "llama", read_params(directory, stored)  # which says less than the tensors do
    else:
        kind, sizes = read_config(directory)
        stored = safetensors_parts(directory)
    try:
        with torch.device("meta"):  # nothing is drawn at random only to be overwritten
            model = make(sizes)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{directory}: {'params' if meta else 'config'}.json: {error}") from error
    theirs = getattr(model.blocks[0].mlp, "hugging_face_config", dict)()
    expected = theirs.get("model_type", kind if kind in ("llama", "mistral") else "llama")
    if kind != expected:
        raise ValueError(f"{directory}: config.json has model_type = {kind!r}, mlp= makes {expected!r}: for mixtures "
                         "of experts give mlp=moe.experts_of(directory), for others no mlp")
    embedding, head = (OUTSIDE[name][meta] + ".weight" for name in ("token_embedding", "output"))
    if model.config.tied and embedding in stored and head in stored and torch.equal(
            stored[head][0].read(), stored[embedding][0].read()):
        del stored[head]  # some store a tied head too
    axes = cut_axes(directory, {name: file_shape(w) for name, w in tensors_of(model, meta).items()}, stored)
    dtype = dtype or stored[embedding][0].read(slice(1)).dtype
    model = model.to(dtype).to_empty(device="cpu")
    most = max(2**16, sum(p.numel() for p in model.parameters()) // 20)  # values that are mapped at a time
    for name, w in tensors_of(model, meta).items():
        parts, axis = stored[name], axes[name]
        for part, into in [(parts[0], w)] if axis is None else zip(parts, w.chunk(len(parts), axis)):
            stored_rows = part.shape[0] // len(into)  # a row of ``into`` may be a whole head
            step = max(1, most // into[0].numel())
            for a in range(0, len(into), step):
                rows = into[a:a + step]
                rows.copy_(part.read(slice(a * stored_rows, (a + len(rows)) * stored_rows)).view(rows.shape))
    return model.eval()


@torch.no_grad()
def save(model: nn.Module, directory: str | Path, eot: int | None = None, bos: int | None = None,
         shard_bytes: int = 5 * 10**9) -> None:
    """Write a Llama as transformers reads it, see ``Llama.save_pretrained``, in place of the one that is there."""
    save_file, directory, config = _safetensors().torch.save_file, Path(directory), model.config
    theirs = {"model_type": "llama"}
    if config.window is not None:
        theirs = {"model_type": "mistral", "sliding_window": config.window}
    if hasattr(model.blocks[0].mlp, "hugging_face_config"):
        theirs |= model.blocks[0].mlp.hugging_face_config()
    kind = theirs["model_type"]
    if config.qk_norm != (kind in WITH_QK_NORM) or config.window is not None and kind in WITHOUT_WINDOW:
        raise ValueError(f"no model of transformers is a {kind} with qk_norm={config.qk_norm} and "
                         f"window={config.window}")
    tensors, shards, size = tensors_of(model), [[]], 0
    for name, w in tensors.items():
        if shards[-1] and size + w.nbytes > shard_bytes:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += w.nbytes
    n, index = len(shards), {}
    directory.mkdir(parents=True, exist_ok=True)
    for old in ("config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"):
        for file in directory.glob(old):  # without config.json, which comes last, no half of a model can be loaded
            file.unlink()
    for i, names in enumerate(shards):
        file = "model.safetensors" if n == 1 else f"model-{i + 1:05}-of-{n:05}.safetensors"
        index |= dict.fromkeys(names, file)
        save_file({name: tensors[name].reshape(file_shape(tensors[name])).contiguous().cpu() for name in names},
                  directory / file, metadata={"format": "pt"})
    if n > 1:
        index = {"metadata": {"total_size": sum(w.nbytes for w in tensors.values())}, "weight_map": index}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    rope = {"rope_type": "default", "rope_theta": config.rope_base}
    if config.rope_factor is not None:
        rope |= {"rope_type": "llama3"} | {key: getattr(config, ours) for key, ours in SCALING.items()}
    theirs = FORM | {key: getattr(config, ours) for key, ours in SIZES.items()} | {
        "architectures": [ARCHITECTURES[kind]], "bos_token_id": bos, "eos_token_id": eot,
        "rope_parameters": rope, "rope_theta": config.rope_base,  # the latter two for transformers before 5
        "rope_scaling": rope if config.rope_factor is not None else None,
        "torch_dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch.")} | theirs
    (directory / "config.json").write_text(json.dumps(theirs, indent=2) + "\n")


# --- 5. demo --------------------------------------------------------------------------------

def save_as_meta(model: nn.Module, directory: Path, P: int) -> None:
    """The model as Meta publishes it, for P GPUs: W_o and W_down are cut by input, gains not, the rest by output."""
    tensors = tensors_of(model, meta=True)
    for i in range(P):
        torch.save({name: (w if w.dim() == 1 else w.chunk(P, int(name.endswith(("wo.weight", "w2.weight"))))[i]).clone()
                    for name, w in tensors.items()}, directory / f"consolidated.{i:02}.pth")
    c = model.config
    (directory / "params.json").write_text(json.dumps({
        "dim": c.d_model, "n_layers": c.n_layers, "n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads,
        "vocab_size": c.vocab_size, "multiple_of": 256, "norm_eps": c.norm_eps, "rope_theta": c.rope_base}))


def main(parts: int, seed: int) -> None:
    if parts not in (1, 2, 4, 8) or not 0 <= seed < 2**32:
        raise ValueError(f"--parts must be 1, 2, 4 or 8 and --seed in 0 .. 2^32 - 1, got {parts} and {seed}")
    from llama import Llama, LlamaConfig, Rotations, rope

    config = LlamaConfig(1024, 8192, 2, 8, 8, 256, None)
    model = Llama(config, generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as folder:
        same = {}
        for form in ("Hugging Face", "Meta"):
            directory = Path(folder, form)
            directory.mkdir()
            if form == "Meta":
                save_as_meta(model, directory, parts)
            else:
                model.save_pretrained(directory, shard_bytes=3 * 10**6)
            print(f"{form}: " + ", ".join(f"{file.name} {file.stat().st_size / 1e6:.1f} MB"
                                          for file in sorted(directory.iterdir())))
            stored = meta_parts(directory) if form == "Meta" else safetensors_parts(directory)
            for name in list(tensors_of(model, form == "Meta"))[:10]:
                print(f"    {name:48} {' + '.join(str(part.shape) for part in stored[name])}")
            again = Llama.from_pretrained(directory)
            same[form] = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))

    x = torch.randn(1, 1, 5, config.d_model, generator=torch.Generator().manual_seed(seed))
    rotation, d_head = Rotations(config)(1000, 5, x.device), config.d_head
    q, k = (getattr(model.blocks[0].attention, name).weight[:d_head].detach() for name in "qk")  # of the first head
    ours = rope(x @ q.T, rotation) @ rope(x @ k.T, rotation).mT  # (1, 1, 5, 5)
    q, k = (halves(w, d_head).reshape(w.shape) for w in (q, k))
    error = (rope_halves(x @ q.T, rotation) @ rope_halves(x @ k.T, rotation).mT - ours).abs().max()
    print(f"\nscores by either RoPE, each with its order of rows: max |difference| = {error:.1e} (expected below 1e-5)")
    print("read again bit for bit: " + ", ".join(f"{form} {found}" for form, found in same.items())
          + " (expected True, True)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--parts", type=int, default=2,
                        help="files of Meta's, one a GPU: 1, 2, 4 or 8 (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f"{error}: copy that file beside this one, or install that package")
