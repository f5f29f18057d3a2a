"""What tiles move: counted in a run, and by formula; memory as it was asked for; the demo, from both files that start it."""

import re
import sys

import pytest
import torch
from run_here import run_here

from attention_traffic import naive_traffic, peak_extra_bytes, tile_size, tiled_traffic
from flash_attn import Options, tiled_forward


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("T, S, tile", [(64, 64, (16, 16)), (50, 70, (16, 8)), (1, 33, (16, 16)), (70, 50, (16, 32))])
def test_counted_traffic_equals_the_formula(T, S, tile, is_causal):
    q, k, v = (torch.randn(1, 1, length, 8) for length in (T, S, S))
    traffic = []
    tiled_forward(q, k, v, Options(is_causal), tile, traffic)
    assert sum(traffic) == tiled_traffic(T, S, 8, tile, is_causal)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_counted_traffic_equals_the_formula_in_every_type(dtype):
    q, k, v = torch.randn(3, 1, 1, 40, 8, dtype=dtype)
    traffic = []
    tiled_forward(q, k, v, Options(), (16, 16), traffic)
    assert sum(traffic) == tiled_traffic(40, 40, 8, (16, 16), itemsize=dtype.itemsize)


def test_traffic_is_quadratic_naively_and_falls_with_fast_memory():
    assert naive_traffic(2048, 2048, 64) / naive_traffic(1024, 1024, 64) == pytest.approx(4, rel=0.1)
    moved = [tiled_traffic(4096, 4096, 64, (tile_size(M, 64),) * 2, False) for M in (64 * 1024, 256 * 1024)]
    assert naive_traffic(4096, 4096, 64) > 1.4 * moved[0] and moved[0] > 2 * moved[1]


@pytest.mark.parametrize("M, Dh", [(48 * 1024, 64), (192 * 1024, 64), (192 * 1024, 128), (10**6, 16)])
def test_tile_size_is_the_largest_that_fits(M, Dh):
    rows = tile_size(M, Dh)
    assert rows % 16 == 0
    assert 4 * (4 * rows * Dh + rows * rows) <= M < 4 * (4 * (rows + 16) * Dh + (rows + 16) ** 2)


def test_tile_size_refuses_what_holds_no_tile():
    with pytest.raises(ValueError, match="1000 bytes hold no tile of 16 rows of width .*: take a narrower head"):
        tile_size(1000, 64)


def test_peak_extra_bytes_is_what_is_held_at_once():
    before = torch.zeros(5000)

    def run():
        for _ in range(3):
            torch.empty(1000)  # given back at once
        kept = torch.empty(2000)
        return kept, torch.empty(500, dtype=torch.float64), before

    assert peak_extra_bytes(run, "cpu") == 4 * 2000 + 8 * 500


# --- the program ----------------------------------------------------------------------------

@pytest.mark.parametrize("program", ["attention_traffic.py", "flash_attn.py"])
def test_demo_counts_compares_and_draws(program, tmp_path):
    picture = tmp_path / "attention.png"
    found = run_here([program, "--lengths", 32, 64, "--plot", picture, "--n_heads", 3, "--d_head", 16, "--dtype", "bfloat16"])
    last = found.stdout.splitlines()[-1]
    assert re.search(r"counted = formula: True;   max \|tiled - torch\| = \S+ of the largest: OK", last)
    assert picture.stat().st_size > 1000 and "(1, 3, T, 16), causal, bfloat16" in found.stdout


def test_demo_judges_one_key_by_the_largest_number():
    found = run_here(["attention_traffic.py", "--lengths", 1])  # dq and dk are 0 up to rounding
    assert re.search(r"counted = formula: True; .* of the largest: OK", found.stdout.splitlines()[-1])


@pytest.mark.parametrize("program", ["attention_traffic.py", "flash_attn.py"])
@pytest.mark.parametrize("arguments, message", [
    (["--n_heads", "0"], "--lengths, --n_heads and --d_head must be at least 1"), (["--d_head", "x"], "invalid int"),
    (["--d_head", "5000"], "hold no tile of 16 rows of width 5000: take a narrower head")])
def test_demo_refuses_in_one_line(program, arguments, message):
    found = run_here([program, "--lengths", 32, 64, *arguments])
    assert found.returncode == 2 and found.stderr.startswith(f"{program}: ")
    assert message in found.stderr and found.stderr.count("\n") == 1


def test_demo_says_which_file_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if the file were not there
    found = run_here(["attention_traffic.py", "--lengths", 32])
    assert found.returncode == 2 and "flash_attn" in found.stderr and found.stderr.endswith(": copy that file beside this one, or install that package\n")
