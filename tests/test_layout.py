"""Every layout trains as one process does, in float64, and what one layout saves any other goes on with."""

import functools
import math
import re
import shutil
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import run_ranks
from run_here import run_here

import checkpoint
import layout
import models
from layout import Grid, ParallelModel
from pieces import flatten

V, T, ROWS, MICROBATCHES = 22, 8, 24, 2  # 22: no multiple of 4, so that the vocabulary is padded
GPT = ("gpt", {"vocab_size": V, "context": T, "n_layers": 4, "n_heads": 4, "d_model": 16})
SHALLOW = ("gpt", GPT[1] | {"n_layers": 2})
LLAMA = ("llama", {"vocab_size": V, "context": T, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "d_model": 16, "d_ff": 24,
                   "tied": True})
MOE = ("moe", LLAMA[1] | {"experts": {"n_experts": 4, "k": 2, "router": "softmax_before"}})
LAYOUTS = {  # name -> sizes, and the kinds that they are for
    "dp2": Grid(dp=2), "dp4": Grid(dp=4), "tp2": Grid(tp=2), "tp4": Grid(tp=4), "tp2 sequence": Grid(tp=2, sequence=True),
    "pp2": Grid(pp=2), "pp4 zb": Grid(pp=4, schedule="zb"), "pp2 gpipe": Grid(pp=2, schedule="gpipe"),
    "cp2": Grid(cp=2), "cp4": Grid(cp=4), "dp2 tp2": Grid(dp=2, tp=2), "tp2 pp2": Grid(tp=2, pp=2),
    "cp2 pp2": Grid(cp=2, pp=2), "tp2 cp2 sequence": Grid(tp=2, cp=2, sequence=True), "dp2 tp2 pp2": Grid(dp=2, tp=2, pp=2),
    "dp2 cp2 pp2": Grid(dp=2, cp=2, pp=2), "zero1": Grid(dp=3, zero=1), "zero2": Grid(dp=4, zero=2), "zero3": Grid(dp=4, zero=3),
    "zero3 tp2": Grid(dp=2, tp=2, zero=3), "zero2 pp2": Grid(dp=2, pp=2, zero=2), "zero1 offload": Grid(dp=2, zero=1, offload=True),
    "zero1 tp2 pp2": Grid(dp=2, tp=2, pp=2, zero=1), "zero1 pp4": Grid(dp=2, pp=4, zero=1),
    "zero3 cp2": Grid(dp=2, cp=2, zero=3), "all at once": Grid(dp=2, tp=2, pp=2, cp=2, zero=2), "tp2 pp2 cp2 sequence": Grid(tp=2, pp=2, cp=2, sequence=True),
}
EXPERTS = {"ep2": Grid(ep=2), "ep4": Grid(ep=4), "dp2 ep2": Grid(dp=2, ep=2), "tp2 ep2": Grid(tp=2, ep=2), "tp2": Grid(tp=2)}


MODELS = {"gpt": SHALLOW, "gpt, deep": GPT, "llama": (LLAMA[0], LLAMA[1] | {"n_layers": 2}), "llama, deep": LLAMA,
          "moe": (MOE[0], MOE[1] | {"n_layers": 2})}


def needs_depth(s):
    """Four stages need four blocks, and ZeRO's third stage has something to prefetch from three on."""
    return ", deep" if s.pp == 4 or s.zero == 3 else ""


def processes(s):
    return s.dp * s.tp * s.pp * s.cp * s.ep


def build(kind, sizes, dtype=torch.float64):
    return models.build(kind, sizes, generator=torch.Generator().manual_seed(0)).to(dtype)


def decay(name, p):
    return {"weight_decay": 0.1 if p.dim() >= 2 else 0.0}


def batch(step):
    tokens = torch.randint(V, (ROWS, T + 1), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def train(parallel, steps, clip=0.1):
    """[(loss, norm before clipping)] of these steps, the same on every process."""
    results = []
    for step in steps:
        inputs, targets = (t.chunk(parallel.sizes.parts)[parallel.part].chunk(MICROBATCHES) for t in batch(step))
        losses = parallel.gradient(list(zip(inputs, targets)), ROWS * T, models.balancing_loss)
        loss = torch.tensor([float(sum(losses)) * parallel.counts], dtype=torch.float64)
        if dist.is_initialized():
            dist.all_reduce(loss)
        results.append((loss.item(), parallel.clip(clip)))
        parallel.step(1e-2)
        parallel.zero_grad()
    return results


def parallel_model(kind, model_sizes, sizes, **options):
    return ParallelModel(build(kind, model_sizes, **options), torch.optim.AdamW, decay, sizes, MICROBATCHES)


def whole(parts):
    """Every rank's ``ParallelModel.tensors()`` -> "model/..." and "optimizer/..." -> the whole tensor, put together from
    boxes, of which every element is in one at least and all copies are the same."""
    tensors, filled = {}, {}
    for part in parts:
        for name, held in flatten(part).items():
            if name not in tensors:
                tensors[name] = torch.zeros(held.shape, dtype=held.boxes[0][1].dtype if held.boxes else torch.float32)
                filled[name] = torch.zeros(held.shape, dtype=torch.bool)
            for offsets, box in held.boxes:
                place = tuple(slice(first, first + size) for first, size in zip(offsets, box.shape))
                tensors[name] = tensors[name].to(box.dtype)
                if filled[name][place].any():
                    torch.testing.assert_close(tensors[name][place][filled[name][place]], box[filled[name][place]])
                tensors[name][place], filled[name][place] = box, True
    assert all(bool(mask.all()) for mask in filled.values())
    return tensors


@functools.cache
def one_process(model):
    """Losses and norms of two steps, and what is there after them."""
    one = parallel_model(*MODELS[model], Grid())
    results = train(one, range(2))
    assert all(norm > 0.1 for _, norm in results)  # clipping is on
    return results, whole([one.tensors()])


def assert_trains_as_one_process(name, sizes, tolerance=1e-10):
    model, (expected, states) = MODELS[name], one_process(name)

    def on_rank(rank):
        parallel = parallel_model(*model, sizes)
        return train(parallel, range(2)), parallel.tensors()

    results = run_ranks(processes(sizes), on_rank)
    for found, _ in results:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=tolerance)
    found = whole([tensors for _, tensors in results])
    assert found.keys() == states.keys()
    for name, tensor in states.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_matches_one_process(name):
    """Losses, norms, parameters and optimizer states; ten digits, the rest is left to the order of sums."""
    assert_trains_as_one_process("gpt" + needs_depth(LAYOUTS[name]), LAYOUTS[name])


@pytest.mark.parametrize("name", ("tp4", "tp2 pp2 cp2 sequence", "dp2 tp2 pp2", "zero3 tp2", "zero1 tp2 pp2"))
def test_training_of_a_llama_matches_one_process(name):
    """tp4: its two key and value heads are held twice."""
    assert_trains_as_one_process("llama" + needs_depth(LAYOUTS[name]), LAYOUTS[name])


@pytest.mark.parametrize("name", EXPERTS)
def test_training_with_experts_matches_one_process(name):
    assert_trains_as_one_process("moe", EXPERTS[name])


# --- checkpoints know no layout ---------------------------------------------------------------------

CROSS = {"one process": Grid(), "dp4": Grid(dp=4), "zero1": Grid(dp=4, zero=1), "zero2": Grid(dp=4, zero=2),
         "zero3": Grid(dp=4, zero=3), "tp2 pp2": Grid(tp=2, pp=2), "zero3 dp2 tp2": Grid(dp=2, tp=2, zero=3)}


def in_fp32(sizes):
    return parallel_model(*SHALLOW, sizes, dtype=torch.float32)


def on_ranks(sizes, fn):
    return run_ranks(processes(sizes), fn) if processes(sizes) > 1 else [fn(0)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """layout -> (a checkpoint that it wrote after two steps, its tensors); the ten losses after those, of one process."""
    written = {}
    for name, sizes in CROSS.items():
        folder = tmp_path_factory.mktemp("saved")

        def train_and_save(rank, sizes=sizes, folder=folder):
            parallel = in_fp32(sizes)
            train(parallel, range(2))
            group = dist.group.WORLD if dist.is_initialized() else None
            return checkpoint.save(folder, 2, parallel.tensors(), {}, group=group)

        path = on_ranks(sizes, train_and_save)[0]
        parts = checkpoint.load(path)
        written[name] = path, {part: parts[part] for part in ("model", "optimizer")}
    return written, train(in_fp32(Grid()), range(12))[2:]


@pytest.mark.parametrize("name", CROSS)
def test_what_any_layout_saved_any_other_goes_on_with(saved, name):
    """From every other's checkpoint the state is loaded bit for bit; so ten steps from one of them stand for all.
    In fp32, where sums in another order differ by some 1e-7 a step."""
    written, expected = saved
    names = list(CROSS)
    last = names[names.index(name) - 1]  # each layout goes on from another one's

    def resume(rank):
        group, parallel = dist.group.WORLD if dist.is_initialized() else None, in_fp32(CROSS[name])
        for source in sorted(written, key=lambda source: source == last):
            path, mine = written[source][0], parallel.tensors(checkpoint.shapes(written[source][0]))
            for held in flatten(mine).values():
                for _, box in held.boxes:
                    box.fill_(math.nan)
            checkpoint.load_into(path, mine, group)
            tensors = flatten(written[source][1])
            for key, held in flatten(mine).items():
                [(_, tensor)] = tensors[key].boxes
                for offsets, box in held.boxes:
                    expected = tensor[tuple(slice(first, first + size) for first, size in zip(offsets, box.shape))]
                    assert torch.equal(box, expected), f"{source} -> {name}: {key}"
        parallel.refresh()
        return parallel.tensors(), train(parallel, range(2, 12))

    results = on_ranks(CROSS[name], resume)
    assert whole([tensors for tensors, _ in results]).keys() == flatten(written[last][1]).keys()
    for _, losses in results:
        difference = max(abs(a - b) for (a, _), (b, _) in zip(losses, expected))
        assert difference < 1e-5, f"{last} -> {name}: losses differ by {difference:.1e}"


def test_a_damaged_piece_is_refused_on_every_rank_before_anything_changes(saved, tmp_path):
    source = saved[0]["zero3"][0]
    broken = tmp_path / source.name
    shutil.copytree(source, broken)
    file = broken / "__2_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)

    def resume(rank):
        parallel = in_fp32(CROSS["dp4"])
        before = {name: p.detach().clone() for name, p in parallel.masters.items()}
        with pytest.raises(checkpoint.CheckpointError, match="__2_0.distcp is damaged") as caught:
            checkpoint.load_into(broken, parallel.tensors(checkpoint.shapes(broken)), dist.group.WORLD)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(p, before[name]) for name, p in parallel.masters.items())

    run_ranks(4, resume)


def test_another_models_checkpoint_is_refused_on_every_rank(saved):
    def resume(rank):
        other = ParallelModel(build("gpt", SHALLOW[1] | {"n_layers": 5}), torch.optim.AdamW, decay, Grid(dp=2))
        path = saved[0]["dp4"][0]
        with pytest.raises(checkpoint.CheckpointError, match="another model: only the model has blocks.2"):
            checkpoint.load_into(path, other.tensors(checkpoint.shapes(path)), dist.group.WORLD)
        wide = ParallelModel(build("gpt", SHALLOW[1] | {"d_model": 32}), torch.optim.AdamW, decay, Grid(dp=2))
        with pytest.raises(checkpoint.CheckpointError, match=r"another model: .* is \(.*16.*\) in it, \(.*32.*\) here"):
            checkpoint.load_into(path, wide.tensors(checkpoint.shapes(path)), dist.group.WORLD)

    run_ranks(2, resume)


# --- what fits ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes, model, T, message", (
    (Grid(tp=3), GPT, 8, "--tp=3 cannot share 4 heads, 4 key and value heads and 64 hidden units: 1, 2, 4 can"),
    (Grid(tp=3), LLAMA, 8, "1, 2, 4 can"),
    (Grid(pp=5), GPT, 8, "--pp=5 stages need as many blocks, the model has 4: --pp=4 at most"),
    (Grid(cp=2), GPT, 6, "2 \\* 2 divides, got 6: 4 is one"),
    (Grid(sequence=True), GPT, 8, "--tp must be at least 2"),
    (Grid(tp=2, sequence=True), GPT, 7, "--sequence divides 7 positions"),
    (Grid(ep=2), GPT, 8, "--ep=2 does not divide 0 experts: only --model=moe has any"),
    (Grid(ep=3), MOE, 8, "--ep=3 does not divide 4 experts: 1, 2, 4 do"),
    (Grid(pp=2), MOE, 8, "a moe takes --dp, --tp, and --ep or --zero alone"),
    (Grid(ep=2, dp=2, zero=1), MOE, 8, "take one of them"),
    (Grid(dp=2, pp=2, zero=3), GPT, 8, "--zero=1 or 2 with --pp"),
    (Grid(offload=True), GPT, 8, "needs --zero=1, 2 or 3")), ids=str)
def test_layouts_that_do_not_fit_are_refused_with_what_would(sizes, model, T, message):
    with pytest.raises(ValueError, match=message):
        layout.check(sizes, *model, T)


def test_bytes_needed_by_hand():
    """16 bytes a parameter: 4 of weights, 4 of gradients, 8 of moments; ZeRO divides over dp * cp."""
    for sizes, expected in ((Grid(dp=4), 16), (Grid(dp=4, zero=1), 8 + 8 / 4), (Grid(dp=4, zero=2), 4 + 12 / 4),
                            (Grid(dp=2, cp=2, zero=3), 16 / 4), (Grid(tp=2, pp=4), 16 / 8),
                            (Grid(dp=2, tp=2, zero=3), 16 / 4), (Grid(dp=4, zero=1, offload=True), 8),
                            (Grid(dp=4, zero=3, offload=True), 8 / 4)):
        assert layout.bytes_needed(1000, sizes) == 1000 * expected
    for sizes, expected in ((Grid(tp=2), 400 / 2 + 600), (Grid(ep=4), 400 + 600 / 4), (Grid(tp=2, ep=4), 400 / 2 + 600 / 4),
                            (Grid(dp=2, tp=2, zero=3), (400 / 2 + 600) / 2)):
        assert layout.bytes_needed(1000, sizes, of_experts=600) == 16 * expected


@pytest.mark.parametrize("sizes", (Grid(), Grid(ep=2), Grid(ep=4), Grid(tp=2), Grid(tp=4), Grid(tp=2, ep=2)), ids=str)
def test_bytes_needed_of_experts_match_what_a_process_holds(sizes):
    """tp cuts no expert, ep nothing else. Not exactly: routers, norms and the padding of V stay whole under tp."""
    N = sum(p.numel() for p in build(*MOE).parameters())
    found = on_ranks(sizes, lambda rank: sum(p.numel() for p in parallel_model(*MOE, sizes).model.parameters()))
    assert len(set(found)) == 1
    needed = layout.bytes_needed(N, sizes, layout.expert_parameters(MOE[1])) / 16
    assert needed == pytest.approx(found[0], rel=0 if sizes.tp == 1 else 0.06)


def test_layouts_that_fit_are_not_refused():
    for sizes in (*LAYOUTS.values(), *CROSS.values()):
        layout.check(sizes, *GPT, T)
        layout.check(sizes, *LLAMA, T)
    for sizes in EXPERTS.values():
        layout.check(sizes, *MOE, T)


def test_evaluation_matches_one_process_and_does_not_count_what_it_should_not():
    inputs, targets = batch(0)
    targets = targets.clone()
    targets[-3:-1], targets[-1] = -1, -100  # below zero
    logits = build(*GPT)(inputs)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.where(targets >= 0, -100).flatten(), ignore_index=-100, reduction="sum").item()

    for sizes in (Grid(tp=2), Grid(pp=2), Grid(cp=2), Grid(dp=2, zero=3)):
        def on_rank(rank, sizes=sizes):
            parallel = parallel_model(*GPT, sizes)
            mine = (t.chunk(sizes.parts)[parallel.part] for t in (inputs, targets))
            total = torch.tensor(parallel.evaluate(*mine) * parallel.counts, dtype=torch.float64)
            dist.all_reduce(total)
            return total.item()

        assert run_ranks(2, on_rank) == [pytest.approx(expected, abs=1e-9)] * 2


def test_demo_says_which_file_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "config", None)  # as if the file were not there
    found = run_here(["layout.py"])
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert re.fullmatch("layout.py: .*config.*: copy that file beside this one, or install that package\n", found.stderr)


def test_demo_counts_the_experts_of_a_process():
    """16 bytes for each of 464,000 other parameters, which tp cuts, and of 1,572,864 of experts, which ep deals out."""
    found = run_here(["layout.py", "--preset=moe_tiny"])
    needed = {flags: float(number) for number, flags in re.findall(r" (\d\.\d{4})   (--.*)$", found.stdout, re.MULTILINE)}
    others, of_experts = 2_036_864 - 1_572_864, 1_572_864
    for flags, tp, ep in (("--ep 8", 1, 8), ("--ep 4", 1, 4), ("--tp 2 --ep 4", 2, 4), ("--tp 4 --ep 2", 4, 2)):
        assert needed[flags] == pytest.approx(16e-9 * (others / tp + of_experts / ep), abs=6e-5)
