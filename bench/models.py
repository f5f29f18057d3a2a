"""Our models beside transformers' same models with the same weights: a training step, and greedy cached decoding at batch 1.

    python bench/models.py                       all four, on this machine's best device
    python bench/models.py --models gpt2 llama   some of them; --only training, or --only decoding
    python bench/models.py --device cpu --batch 4 --length 128

Claims: a training step at least as fast (ratio >= 1.0), decoding at least twice as fast (ratio >= 2); a ratio is their median
time over ours. Both sides do the same in turn, every other round in the other order: forward, mean cross-entropy, backward,
clipping, torch's fused AdamW; no dropout; fp32 on a CPU, bf16 autocast on a GPU. Decoding is ours by decode.generate, theirs by
model.generate, both with a cache, in fp32 and in bf16; the floor is the time in which torch multiplies one row by every weight
matrix in fp32 and does nothing else (MKL, on an AMD, uses one core for it, whatever the threads). The line of bf16 against fp32
compares our rounded weights with their exact ones.
"""

import argparse
import contextlib
import copy
import gc
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# This file's neighbours have the names of the files that they measure, so this folder must not come first.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.nn as nn
import torch.nn.functional as F

try:
    import transformers
except ImportError as error:
    print(f"{sys.argv[0]}: needs {error.name}: pip install -r tests/requirements.txt", file=sys.stderr)
    sys.exit(2)

from decode import generate
from few_rows import one_row_layout, packed_weights
from processes import keep_freed_memory


class Case(NamedTuple):
    title: str
    ours: nn.Module
    theirs: nn.Module  # with the same weights
    our_loss: Callable[[nn.Module], torch.Tensor]
    their_loss: Callable[[nn.Module], torch.Tensor]
    decodes: bool = True


# --- the models: theirs is made and saved, ours read from what was saved ----------------------

def language_model(title: str, ours: nn.Module, theirs: nn.Module, batch: int, length: int) -> Case:
    tokens = torch.randint(ours.config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))

    def loss_of(logits_of: Callable) -> Callable:
        def loss(model: nn.Module) -> torch.Tensor:
            x = tokens.to(next(model.parameters()).device)
            return F.cross_entropy(logits_of(model, x[:, :-1]).flatten(0, 1).float(), x[:, 1:].flatten())
        return loss

    return Case(title, ours, theirs, loss_of(lambda model, x: model(x)), loss_of(lambda model, x: model(x, use_cache=False).logits))


def gpt2(folder: str, batch: int, length: int) -> Case:
    from gpt import GPT
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    theirs.save_pretrained(folder)
    return language_model("GPT-2 small", GPT.from_pretrained(folder), theirs, batch, length)


def llama(folder: str, batch: int, length: int) -> Case:
    from llama import Llama
    config = transformers.LlamaConfig(vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4,
                                      num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=2048)
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(folder)
    return language_model("Llama, 4 layers of 1024", Llama.from_pretrained(folder), theirs, batch, length)


def mixtral(folder: str, batch: int, length: int) -> Case:
    from llama import Llama
    from moe import experts_of
    config = transformers.MixtralConfig(vocab_size=32000, hidden_size=512, intermediate_size=1792, num_hidden_layers=4,
                                        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=2048,
                                        num_local_experts=8, num_experts_per_tok=2)
    theirs = transformers.MixtralForCausalLM(config)
    theirs.save_pretrained(folder)
    ours = Llama.from_pretrained(folder, mlp=experts_of(folder))
    return language_model("Mixtral, 4 layers of 512, 2 of 8 experts", ours, theirs, batch, length)


def bert(folder: str, batch: int, length: int) -> Case:
    """Both tasks of pre-training, 15% of the tokens hidden: ours computes logits at these alone, theirs cannot."""
    from bert import BERTForPretraining
    from masked_lm import pretraining_loss
    config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    theirs = transformers.BertForPreTraining(config)
    theirs.save_pretrained(folder)
    ours = BERTForPretraining.from_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, config.vocab_size, (batch, length), generator=generator)
    segments = (torch.arange(length) >= length // 2).long().expand(batch, -1).contiguous()
    hidden = torch.rand(batch, length, generator=generator) < 0.15
    targets, labels = tokens.masked_fill(~hidden, -100), torch.arange(batch) % 2

    def on(model: nn.Module) -> list[torch.Tensor]:
        return [x.to(next(model.parameters()).device) for x in (tokens, segments, hidden, targets, labels)]

    def our_loss(model: nn.Module) -> torch.Tensor:
        tokens, segments, hidden, targets, labels = on(model)
        masked, following = model(tokens, segments, hidden=hidden)
        return pretraining_loss(masked, targets, following, labels)

    def their_loss(model: nn.Module) -> torch.Tensor:
        tokens, segments, _, targets, labels = on(model)
        return model(input_ids=tokens, token_type_ids=segments, labels=targets, next_sentence_label=labels).loss

    return Case("BERT-base", ours, theirs, our_loss, their_loss, decodes=False)


MODELS = {"bert": bert, "gpt2": gpt2, "llama": llama, "mixtral": mixtral}


# --- measuring --------------------------------------------------------------------------------

def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def interleaved(runs: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each run; all of them in turn, every other round backwards, the first round for warming up."""
    seconds = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in list(runs.items())[::1 if i % 2 else -1]:
            synchronize(device)
            began = time.perf_counter()
            run()
            synchronize(device)
            if i:
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def trainer(model: nn.Module, loss_of: Callable) -> Callable:
    """One training step of a model, as a function that returns its loss."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    on_gpu = next(model.parameters()).is_cuda

    def step() -> float:
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def compare_training(case: Case, shape: str, rounds: int) -> None:
    losses = {"ours": [], "theirs": []}
    steps = {"ours": trainer(case.ours, case.our_loss), "theirs": trainer(case.theirs, case.their_loss)}
    runs = {who: lambda who=who: losses[who].append(steps[who]()) for who in steps}
    medians = interleaved(runs, rounds, next(case.ours.parameters()).device)
    apart = max(abs(a - b) for a, b in zip(*losses.values()))
    print(f"  training step, {shape} tokens: ours {1000 * medians['ours']:.0f} ms, theirs {1000 * medians['theirs']:.0f} ms; "
          f"ratio {medians['theirs'] / medians['ours']:.2f} (claim >= 1.0); losses at most {apart:.1e} apart", flush=True)


def floor_of(model: nn.Module, experts: int = 2) -> Callable:
    """One row times every matrix that a decoded token needs: not the embedding, unless it is the head, and 2 experts."""
    named = dict(model.named_parameters())
    matrices = [p.detach() for name, p in named.items() if p.dim() == 2 and "embedding" not in name]
    matrices += [w.detach() for p in named.values() if p.dim() == 3 for w in p[:experts]]
    matrices += [] if "output.weight" in named else [named["token_embedding.weight"].detach()]
    rows = [torch.randn(1, p.size(1), device=p.device) for p in matrices]

    @torch.inference_mode()
    def run() -> None:
        for x, p in zip(rows, matrices):
            F.linear(x, p)
    return run


def compare_decoding(case: Case, new_tokens: int, rounds: int) -> None:
    ours, theirs = case.ours.eval(), case.theirs.eval()
    device = next(ours.parameters()).device
    prompt = torch.randint(ours.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(1)).to(device)
    halves = copy.deepcopy(ours).bfloat16(), copy.deepcopy(theirs).bfloat16()
    one_row_layout(ours)
    tokens = {}

    def our_run(label: str, model: nn.Module) -> Callable:
        return lambda: tokens.update({label: generate(model, prompt, new_tokens, temperature=0)})

    def their_run(label: str, model: nn.Module) -> Callable:
        def run() -> None:
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=True,
                                 max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0)
            tokens[label] = out[:, prompt.size(1):].tolist()
        return run

    runs = {"ours fp32": our_run("ours fp32", ours), "theirs fp32": their_run("theirs fp32", theirs),
            "ours bf16": our_run("ours bf16", halves[0]), "theirs bf16": their_run("theirs bf16", halves[1])}
    packed = copy.deepcopy(halves[0])
    with packed_weights(packed, 1):
        medians = interleaved(runs | {"ours bf16, packed": our_run("ours bf16, packed", packed)}, rounds, device)
    floor = interleaved({"floor": floor_of(ours)}, 5 * rounds, device)["floor"]
    same = tokens["ours fp32"] == tokens["theirs fp32"]
    print(f"  greedy decoding, batch 1, 32 + {new_tokens} tokens; the same tokens in fp32: {same}")
    for mine, peer in (("ours fp32", "theirs fp32"), ("ours bf16", "theirs bf16"), ("ours bf16, packed", "theirs bf16"),
                       ("ours bf16", "theirs fp32"), ("ours bf16, packed", "theirs fp32")):
        print(f"    {mine} {new_tokens / medians[mine]:7.1f} tokens/s, {peer} {new_tokens / medians[peer]:7.1f}; "
              f"ratio {medians[peer] / medians[mine]:.2f} (claim >= 2)")
    per_token = medians["theirs fp32"] / new_tokens
    print(f"    floor in fp32 {1000 * floor:.1f} ms of their {1000 * per_token:.1f} ms per token: "
          f"one row times every weight alone allows a ratio of {per_token / floor:.2f}", flush=True)


def main(models: list[str], only: str | None, device: str, batch: int, length: int, new_tokens: int, rounds: int,
         threads: int | None) -> None:
    if only == "decoding":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as decode.py sets it; both sides' weights lie in large pages
    if threads:
        torch.set_num_threads(threads)
    device = torch.device(device)
    if device.type == "cpu":
        keep_freed_memory()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = platform.processor() or platform.machine() if device.type == "cpu" else torch.cuda.get_device_name()
    if device.type == "cpu" and Path("/proc/cpuinfo").exists():
        where = next(line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    print(f"{where}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
          f"torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    for name in models:
        for part in [only] if only else ["training", "decoding"]:
            torch.manual_seed(0)
            with tempfile.TemporaryDirectory() as folder:
                case = MODELS[name](folder, batch, length)
            case = case._replace(ours=case.ours.float().to(device), theirs=case.theirs.float().to(device))
            print(f"{case.title}: {sum(p.numel() for p in case.ours.parameters()) / 1e6:.0f}M parameters", flush=True)
            if part == "training":
                compare_training(case, f"{batch} x {length}", rounds)
            elif case.decodes:
                compare_decoding(case, new_tokens, rounds)
            else:
                print("  decodes nothing")
            del case
            gc.collect()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which (default all)")
    parser.add_argument("--only", choices=["training", "decoding"], help="one of the two (default both)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda (default the best here)")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a training step (default %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of each (default %(default)s)")
    parser.add_argument("--max_new_tokens", dest="new_tokens", type=int, default=48, help="decoded after 32 of prompt (default %(default)s)")
    parser.add_argument("--repeats", dest="rounds", type=int, default=5, help="measured runs of each side (default %(default)s)")
    parser.add_argument("--threads", type=int, help="torch's threads (default its own choice)")
    arguments = parser.parse_args()
    if min(arguments.batch, arguments.length, arguments.new_tokens, arguments.rounds, arguments.threads or 1) < 1:
        parser.error("every number must be at least 1")
    try:
        main(**vars(arguments))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error).splitlines()[0])
