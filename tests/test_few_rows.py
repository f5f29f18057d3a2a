"""Products of few rows against torch's, at every number of rows, in every layout; models that decode with them."""

import runpy
import sys
import threading
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import run_program
from test_decode import tiny
from torch.nn.utils import prune, weight_norm

import decode
import few_rows
from decode import generate
from few_rows import FastLinear, fast_layers, one_row_layout, packed_weights, row_in_parts, row_product
from gpt import GPT, GPTConfig

has_bf16 = "AVX512" in torch.backends.cpu.get_cpu_capability()
has_onednn = torch.backends.mkldnn.is_available()


@pytest.fixture
def threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 0), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@torch.inference_mode()
def test_fast_linear_matches_torch_at_every_number_of_rows(dtype, tolerance, capability, monkeypatch):
    # Sums of 24 products of order one, in another order: a few roundings of each format.
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(few_rows, "_leaves_rows_to_one_core", lambda: capability == "AVX2")
    weight, bias = torch.randn(40, 24).to(dtype), torch.randn(40).to(dtype)
    for shape in ((24,), (0, 24), (1, 1, 24), (2, 3, 24), (8, 24), (9, 24), (33, 24)):
        x = torch.randn(shape).to(dtype)
        for arguments in ((x, weight), (x, weight, bias)):
            expected = torch.nn.functional.linear(*arguments)
            with FastLinear():
                got = torch.nn.functional.linear(*arguments)
            assert got.dtype == dtype and got.is_contiguous()
            torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("P", [1, 2])
@torch.inference_mode()
def test_what_linear_refuses_is_refused_and_what_it_converts_converted(P, threads, monkeypatch):
    """Also where a weight is cut and no product would notice: 600 numbers for a width of 512, or one."""
    monkeypatch.setattr(few_rows, "_leaves_rows_to_one_core", lambda: True)
    threads(P)
    weight, bias = torch.randn(512, 512), torch.randn(512)
    for layout in (weight, weight.t().contiguous().t()):
        for x, w, b in ((torch.randn(1, 600), layout, bias), (torch.randn(1, 1), layout, bias), (torch.randn(3, 600), layout, None),
                        (torch.randn(1, 512, dtype=torch.float64), layout, bias), (torch.tensor(1.0), layout, None),
                        (torch.randn(1, 512), layout, bias.double()), (torch.randn(1, 512), layout, torch.randn(3, 512))):
            with pytest.raises(RuntimeError):
                FastLinear.linear(x, w, b)
        for x in (torch.randn(1, 512), torch.randn(2, 512)):
            with torch.autocast("cpu", torch.bfloat16):
                y = FastLinear.linear(x, layout, bias)
                assert y.dtype == torch.bfloat16 and torch.equal(y, F.linear(x, layout, bias))
        for x in (torch.randn(1, 512), torch.randn(2, 512), torch.randn(9, 512)):  # one bias for all
            for b in (torch.ones(1), torch.tensor(1.0)):
                torch.testing.assert_close(FastLinear.linear(x, layout, b), F.linear(x, layout, b))
    assert FastLinear.linear(torch.randn(1, 4), torch.randn(4)).shape == (1,)
    with warnings.catch_warnings():  # torch's own, that sparse tensors may change
        warnings.simplefilter("ignore")
        sparse = nn.Linear(512, 512, bias=False)
        sparse.weight = nn.Parameter(weight.to_sparse_csr(), requires_grad=False)
        with fast_layers(sparse):
            torch.testing.assert_close(sparse(torch.ones(1, 512)), F.linear(torch.ones(1, 512), weight), atol=1e-4, rtol=1e-4)


def test_decoding_leaves_linear_alone_for_everyone_else(monkeypatch):
    """Another library's replacement of F.linear survives, and another thread never meets ours."""
    original, seen = torch.nn.functional.linear, []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: original(*args))
    replaced, fast = torch.nn.functional.linear, FastLinear.linear
    generate(tiny().float(), [[1, 2]], 3)
    assert torch.nn.functional.linear is replaced
    monkeypatch.undo()
    monkeypatch.setattr(FastLinear, "linear",
                        staticmethod(lambda *args: seen.append(threading.get_ident()) or fast(*args)))
    with torch.no_grad(), FastLinear():
        other = threading.Thread(target=lambda: original(torch.ones(2, 3), torch.ones(4, 3)))
        other.start()
        other.join()
        assert not seen
        original(torch.ones(2, 3), torch.ones(4, 3))
    assert seen == [threading.get_ident()]


@pytest.mark.parametrize("P", [1, 2, 3])
@pytest.mark.parametrize("out, width", [(7, 5), (12, 6), (1, 9), (9, 1), (50, 33)])
def test_a_row_in_parts_matches_torch(P, out, width, threads):
    threads(P)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((width,), (out, width)))
    bias = torch.randn(out, dtype=torch.float64, generator=generator)
    for layout in (weight, weight.t().contiguous().t(), weight.repeat(2, 2)[::2, :width]):
        for b in (None, bias):
            expected = torch.nn.functional.linear(x, layout, b)
            torch.testing.assert_close(row_in_parts(layout, b)(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("columns", [False, True])
def test_generation_on_several_cores_matches_one(columns, threads, monkeypatch):
    monkeypatch.setattr(few_rows, "_leaves_rows_to_one_core", lambda: True)
    # 512 x 512 is the least matrix that is cut
    model, took = GPT(GPTConfig(1001, 32, 1, 2, 512), generator=torch.Generator().manual_seed(0)).eval(), []
    if columns:
        one_row_layout(model)
    for P in (1, 2):
        threads(P)
        took.append(generate(model, [[1, 2, 3]], 8, temperature=0))
    assert took[0] == took[1]
    assert not any("forward" in module.__dict__ for module in model.modules())  # as it was


def test_one_row_layout_keeps_the_values():
    model, tokens = tiny().float(), torch.randint(11, (1, 8))
    before, state = model(tokens), {name: p.clone() for name, p in model.state_dict().items()}
    one_row_layout(model)
    assert model.blocks[0].mlp.up.weight.stride() == (1, 64)
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    torch.testing.assert_close(model(tokens), before, atol=1e-4, rtol=1e-4)  # fp32 sums in another order


# --- one row ---

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("P", [1, 2])
def test_a_row_product_matches_torch(dtype, tolerance, capability, P, threads, monkeypatch):
    """On both sides of the size from which a product is cut, 2^18 numbers; a matrix by rows, by columns, and a part of one."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(few_rows, "_leaves_rows_to_one_core", lambda: capability == "AVX2")
    threads(P)
    generator = torch.Generator().manual_seed(0)
    for out, width in ((40, 24), (600, 500)):
        x, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((width,), (out,)))
        weight = (torch.randn(out, width, generator=generator) / width**0.5).to(dtype)
        for layout in (weight, weight.t().contiguous().t(), weight[:, ::2]):
            for b in (None, bias):
                row = x[:layout.size(1)]
                y = row_product(layout, b)(row)
                assert y.dtype == dtype and y.shape == (out,)
                torch.testing.assert_close(y, F.linear(row, layout, b), atol=tolerance, rtol=tolerance)


# --- packed weights ---

def wide(dtype=torch.float32, seed=0):
    """Its five matrices, 512 x 512 the least and 1001 x 512 both embedding and head, are large enough to be packed."""
    model = GPT(GPTConfig(1001, 32, 1, 2, 512), generator=torch.Generator().manual_seed(seed)).eval()
    return model.to(dtype)


@pytest.mark.skipif(not has_onednn, reason="torch without oneDNN packs nothing")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_packed_weights_multiply_as_the_plain_ones(dtype, rows, monkeypatch):
    if dtype == torch.bfloat16 and not has_bf16:
        pytest.skip("bf16 is packed where the CPU has AVX-512")
    model, packed = wide(dtype), []
    product = few_rows._packed_product
    monkeypatch.setattr(few_rows, "_packed_product", lambda x, found, b: packed.append(len(x)) or product(x, found, b))
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    up = model.blocks[0].mlp.up
    exact = F.linear(x.double(), up.weight.double(), up.bias.double())
    with packed_weights(model, rows), torch.inference_mode(), fast_layers(model):
        found = up(x)
        model.head(x[:, None])
    assert len(packed) == (0 if (dtype, rows) == (torch.float32, 1) else 1)  # the head is a function: FastLinear's
    assert not few_rows._packed
    bound = {torch.float32: 1e-6, torch.bfloat16: 2 ** -8}[dtype]  # of sums of 512 products
    assert found.dtype == dtype and (found - exact).abs().max() <= bound * max(1, exact.abs().max())


@pytest.mark.skipif(not has_onednn, reason="torch without oneDNN packs nothing")
def test_generation_with_packed_weights_writes_the_same_and_leaves_no_trace(monkeypatch):
    model, prompts, products = wide(), [[1, 2, 3], [4, 5], [6]], []
    expected = generate(model, prompts, 8, temperature=0)
    product = few_rows._packed_product
    monkeypatch.setattr(few_rows, "_packed_product", lambda x, found, b: products.append(found[0].shape) or product(x, found, b))
    with packed_weights(model, 3):
        with packed_weights(model, 3):  # the inner one has nothing left to do, and takes nothing away
            pass
        assert generate(model, prompts, 8, temperature=0) == expected
        assert {tuple(shape) for shape in products} == {(1001, 512), (1536, 512), (512, 512), (2048, 512), (512, 2048)}
        count = len(products)
        loss = model(torch.tensor([[1, 2, 3]])).square().mean()  # gradients do not go through copies
        loss.backward()
        assert len(products) == count and model.blocks[0].mlp.up.weight.grad.abs().sum() > 0
    assert not few_rows._packed and generate(model, prompts, 8, temperature=0) == expected and len(products) == count


@pytest.mark.skipif(not has_onednn, reason="torch without oneDNN packs nothing")
def test_packed_weights_that_lie_by_columns_or_go_through_autocast_are_right():
    model, prompts = wide(), [[1, 2], [3]]
    expected = generate(model, prompts, 6, temperature=0)
    one_row_layout(model)
    with packed_weights(model, 2):
        assert generate(model, prompts, 6, temperature=0) == expected
        with torch.autocast("cpu", torch.bfloat16):  # plain weights
            found = generate(model, prompts, 6, temperature=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert found == generate(model, prompts, 6, temperature=0)


@pytest.mark.parametrize("wrapped", [False, True])
def test_compiled_blocks_decode_the_same_and_are_compiled_no_more_often_than_without_this_file(wrapped, monkeypatch):
    model, prompts, counts = wide(), [[1, 2], [3]], []
    expected = [generate(model, rows, 6, temperature=0) for rows in (prompts, prompts[:1])]
    for helper in (few_rows, None):
        monkeypatch.setattr(decode, "_few_rows", lambda: helper)
        torch._dynamo.reset()
        model, graphs = wide(), []
        for i, block in enumerate(model.blocks):
            backend = lambda graph, example: graphs.append(graph) or graph.forward
            if wrapped:
                model.blocks[i] = torch.compile(block, backend=backend)
            else:
                block.compile(backend=backend)
        for _ in range(3):
            assert [generate(model, rows, 6, temperature=0) for rows in (prompts, prompts[:1])] == expected
        counts.append(len(graphs))
    assert counts[0] == counts[1] > 0


@pytest.mark.skipif(not has_onednn, reason="torch without oneDNN packs nothing")
def test_copies_are_dropped_where_packing_is_interrupted_and_where_two_threads_pack_one_model(monkeypatch):
    model, pack, calls = wide(), torch.ops.mkldnn._reorder_linear_weight, []

    def interrupted(weight, rows):
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pack(weight, rows)

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", interrupted)
    with pytest.raises(KeyboardInterrupt), packed_weights(model, 2):
        pass
    assert len(calls) == 3 and not few_rows._packed
    monkeypatch.undo()
    errors = []

    def run():
        try:
            for _ in range(5):
                with packed_weights(model, 2):
                    generate(model, [[1], [2]], 2)
        except BaseException as error:
            errors.append(error)

    both = [threading.Thread(target=run) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert not errors and not few_rows._packed


@pytest.mark.parametrize("P", [1, 2])
def test_a_model_in_mid_stream_can_be_trained_and_keeps_a_forward_of_its_own(P, threads, monkeypatch):
    monkeypatch.setattr(few_rows, "_leaves_rows_to_one_core", lambda: True)
    threads(P)
    model, calls = wide(), []
    up = model.blocks[0].mlp.up
    plain = up.forward
    up.forward = lambda x: calls.append(len(x)) or plain(x)  # as hooks of other libraries are made
    pieces = decode.stream(model, [1, 2], 4)
    next(pieces)
    model(torch.tensor([[5]])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    list(pieces)
    assert len(calls) == 5 and "forward" in vars(up)
    assert not any("forward" in vars(m) for m in model.modules() if m is not up)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_torchs_to_the_bit(options, dtype):
    norm = nn.LayerNorm((2, 16), eps=0.1, dtype=dtype, **options)
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_()
    x = torch.randn(3, 2, 16, dtype=dtype)
    expected = norm(x)
    with fast_layers(norm):
        assert ("forward" in vars(norm)) == ("elementwise_affine" not in options)
        assert torch.equal(norm(x), expected)
    assert "forward" not in vars(norm) and torch.equal(norm(x), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("remake", [lambda m: prune.identity(m, "weight"), weight_norm], ids=["pruned", "weight_norm"])
@pytest.mark.parametrize("kind", [nn.Linear, nn.LayerNorm])
def test_a_weight_that_is_made_anew_at_every_call_is_not_kept(kind, remake):
    layer = nn.Linear(16, 16) if kind is nn.Linear else nn.LayerNorm((16, 16))
    remake(layer)
    layer(torch.ones(16, 16))
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2)
    with fast_layers(layer), torch.inference_mode():
        found = layer(torch.ones(1, 16, 16))
    assert torch.equal(found, layer(torch.ones(1, 16, 16)))


def test_layers_are_as_they_were_after_an_interruption(monkeypatch):
    model, made = wide(), []
    monkeypatch.setattr(few_rows, "row_product", lambda w, b: 1 / 0 if len(made) == 2 else made.append(w))
    with pytest.raises(ZeroDivisionError), fast_layers(model):
        pass
    assert len(made) == 2 and not any("forward" in vars(m) for m in model.modules())


@pytest.mark.skipif(not has_onednn, reason="torch without oneDNN packs nothing")
def test_a_weight_that_changes_while_it_is_packed_is_noticed():
    model, other = wide(), wide(seed=1)
    with packed_weights(model, 2):
        generate(model, [[1], [2]], 2)
        model.load_state_dict(other.state_dict())
        with pytest.raises(RuntimeError, match="changed inside packed_weights"):
            generate(model, [[1], [2]], 2)
    with packed_weights(model, 2):
        assert generate(model, [[1], [2]], 4, temperature=0) == generate(other, [[1], [2]], 4, temperature=0)
    with packed_weights(model, 2), pytest.raises(RuntimeError, match="changed inside packed_weights"):
        generate(model.double(), [[1], [2]], 2)
    with packed_weights(model.float(), 2), torch.inference_mode(), fast_layers(model):  # a bias for all, as F.linear takes it
        x, head = torch.ones(2, 512), model.token_embedding.weight
        torch.testing.assert_close(FastLinear.linear(x, head, torch.ones(1)), F.linear(x, head, torch.ones(1)))
    with pytest.raises(ValueError, match="rows must be at least 1"), packed_weights(model, 0):
        pass


def test_where_nothing_can_be_packed_nothing_is(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    for model in (wide(), wide(torch.bfloat16), wide(torch.float64), tiny()):
        with packed_weights(model, 4):
            assert not few_rows._packed
            assert len(generate(model, [[1], [2]], 2)) == 2
    monkeypatch.undo()
    for model in (wide(torch.float64), tiny()):  # float64; small
        with packed_weights(model, 4):
            assert not few_rows._packed


def test_decoding_works_without_this_file(monkeypatch):
    model, prompts = tiny(), [[1, 2, 3], [4]]
    expected = generate(model, prompts, 6, temperature=0)
    monkeypatch.setitem(sys.modules, "few_rows", None)
    decode._few_rows.cache_clear()
    try:
        assert decode._few_rows() is None and generate(model, prompts, 6, temperature=0) == expected
    finally:
        decode._few_rows.cache_clear()


# --- the program ---

def test_a_nan_is_no_ok(monkeypatch, capsys):
    product = FastLinear.linear
    monkeypatch.setattr(FastLinear, "linear", staticmethod(lambda *args, **named: product(*args, **named) * float("nan")))
    few_rows.main(d_model=32, dtype="float32", megabytes=1, repeats=1)
    assert "WRONG" in capsys.readouterr().out


def test_demo_prints_its_verdict(capsys, monkeypatch):
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr(sys, "argv", f"few_rows.py --d_model 256 --megabytes 4 --repeats 1 --dtype {dtype}".split())
        runpy.run_path(few_rows.__file__, run_name="__main__")
        out = capsys.readouterr().out
        assert ": OK, below" in out.splitlines()[-1] and len(out.splitlines()) == 7


@pytest.mark.parametrize("flags, message", (
    (["--d_model", "0"], "--d_model, --megabytes and --repeats must be at least 1, got 0, 400 and 5"),
    (["--d_model", "1000000"], "2 matrices of --d_model 1000000 take 32,000 GB: lower --d_model or --megabytes")))
def test_what_cannot_be_measured_is_refused_in_one_line(flags, message):
    done = run_program(["few_rows.py", *flags])
    assert done.returncode == 2 and done.stderr == f"few_rows.py: {message}\n"
