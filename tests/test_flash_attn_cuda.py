"""The CUDA kernel without a GPU: its C++ is compiled by g++ against an emulation of a block of threads, in which a
warp's instructions do exactly what the PTX ISA says of their fragments, and compared with attention in float64."""

import ctypes
import math
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT

import attention_kernels
import flash_attn_cuda
from flash_attn import flash_attention_with_lse, naive_attention_with_lse

# Threads are fibers. An instruction of a warp happens when all 32 lanes have come to the same one; a copy arrives as
# late as it may, when it is waited for. Which fiber runs next is drawn at random, to bring missing barriers to light.
EMULATION = r"""
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#define __device__
#define __global__ static
#define __forceinline__ inline
#define __launch_bounds__(threads)
typedef unsigned short half_t;
struct Index { unsigned x, y; };
struct Copy { half_t* to; const half_t* from; bool valid; int group; };
struct Fiber { jmp_buf at; bool started, done; const int* gate; int seen; Copy copies[256]; int n_copies, group; };
typedef void (*Instruction)(void**);
struct Warp { int arrived, generation; void* lanes[32]; Instruction instruction; };

const int MAX = 256;
static Fiber fibers[MAX];
static char stacks[MAX][1 << 17];
static Warp warps[MAX / 32];
alignas(128) static char shared_bytes[1 << 18];
static int n_threads, n_shared, here, barrier_arrived, barrier_generation, CAUSAL, BF16, conflicts;
static const char* failure;
static jmp_buf scheduler;
static uint64_t random_state;
static Index blockIdx, gridDim;
#define threadIdx (Index{(unsigned)here, 0})

static void leave() { if (!_setjmp(fibers[here].at)) _longjmp(scheduler, 1); }
static void fail(const char* why) { failure = why; _longjmp(scheduler, 2); }
static void wait_at(const int* gate) { fibers[here].gate = gate; fibers[here].seen = *gate; leave(); }

static void together(void* mine, Instruction instruction) {
    Warp& warp = warps[here / 32];
    if (warp.arrived && warp.instruction != instruction) fail("lanes of a warp at different instructions");
    warp.instruction = instruction;
    warp.lanes[here % 32] = mine;
    if (++warp.arrived < 32) { wait_at(&warp.generation); return; }
    instruction(warp.lanes);
    warp.arrived = 0, warp.generation++;
}

static void __syncthreads() {
    if (++barrier_arrived < n_threads) { wait_at(&barrier_generation); return; }
    barrier_arrived = 0, barrier_generation++;
}

static float to_float(half_t x) {
    if (BF16) { uint32_t bits = (uint32_t)x << 16; float y; memcpy(&y, &bits, 4); return y; }
    _Float16 y; memcpy(&y, &x, 2); return (float)y;
}
static half_t from_float(float x) {
    if (!BF16) { _Float16 y = (_Float16)x; half_t bits; memcpy(&bits, &y, 2); return bits; }
    uint32_t bits; memcpy(&bits, &x, 4);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}
static half_t* inside(const half_t* x) {
    const char* byte = (const char*)x;
    if (byte < shared_bytes || byte + 16 > shared_bytes + n_shared) fail("outside of shared memory");
    if ((byte - shared_bytes) % 16) fail("not aligned to 16 bytes");
    return (half_t*)x;
}

static half_t* shared_memory() { return (half_t*)shared_bytes; }
static void copy_16(half_t* to, const half_t* from, bool valid) {
    Fiber& f = fibers[here];
    if (f.n_copies == 256) fail("too many copies under way");
    f.copies[f.n_copies++] = Copy{inside(to), from, valid, f.group};
}
static void copy_commit() { fibers[here].group++; }
template <int pending> static void copy_wait() {
    Fiber& f = fibers[here];
    int kept = 0;
    for (int i = 0; i < f.n_copies; i++) {
        Copy& c = f.copies[i];
        if (c.group >= f.group - pending) f.copies[kept++] = c;
        else if (c.valid) memcpy(c.to, c.from, 16);
        else memset(c.to, 0, 16);
    }
    f.n_copies = kept;
}

struct Load { unsigned* x; const half_t* row; };
template <bool transposed> static void do_load(void** lanes) {
    for (int i = 0; i < 4; i++) {
        int banks = 0;
        for (int r = 0; r < 8; r++) banks |= 1 << ((const char*)inside(((Load*)lanes[8 * i + r])->row) - shared_bytes) / 16 % 8;
        conflicts += banks != 255;
        for (int lane = 0; lane < 32; lane++) {
            half_t pair[2];
            for (int e = 0; e < 2; e++) {
                int row = transposed ? lane % 4 * 2 + e : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + e;
                pair[e] = ((Load*)lanes[8 * i + row])->row[column];
            }
            ((Load*)lanes[lane])->x[i] = pair[0] | (unsigned)pair[1] << 16;
        }
    }
}
static void load_matrices(unsigned (&x)[4], const half_t* row) { Load l{x, row}; together(&l, do_load<false>); }
static void load_matrices_transposed(unsigned (&x)[4], const half_t* row) { Load l{x, row}; together(&l, do_load<true>); }

struct Multiply { float* sums; const unsigned* a; unsigned b[2]; };
static void do_multiply(void** lanes) {  // PTX ISA, "matrix fragments for mma.m16n8k16 with floating point type"
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        Multiply* m = (Multiply*)lanes[lane];
        int group = lane >> 2, in_group = lane % 4;
        for (int i = 0; i < 8; i++) {
            int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8, column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
            a[row][column] = to_float(m->a[i / 2] >> 16 * (i & 1));
        }
        for (int i = 0; i < 4; i++)
            b[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = to_float(m->b[i / 2] >> 16 * (i & 1));
    }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = lane % 4 * 2 + (i & 1);
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
            ((Multiply*)lanes[lane])->sums[i] += sum;
        }
}
static void multiply_add(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    Multiply m{sums, a, {b0, b1}};
    together(&m, do_multiply);
}

struct Exchange { float x, y; int mask; };
static void do_exchange(void** lanes) {
    for (int i = 0; i < 32; i++) ((Exchange*)lanes[i])->y = ((Exchange*)lanes[i ^ ((Exchange*)lanes[i])->mask])->x;
}
static float from_lane_xor(float x, int mask) { Exchange e{x, 0, mask}; together(&e, do_exchange); return e.y; }
static unsigned pack(float first, float second) { return from_float(first) | (unsigned)from_float(second) << 16; }
static float power_of_2(float x) { return exp2f(x); }
static float infinity() { return INFINITY; }
static int min(int a, int b) { return a < b ? a : b; }
static int max(int a, int b) { return a > b ? a : b; }
"""

LAUNCH = r"""
static void (*body)();
static void fiber_main() { body(); fibers[here].done = true; _longjmp(scheduler, 1); }

static const char* run(int tiles, int heads, int threads, int shared, int seed, void (*kernel)()) {
    n_threads = threads, n_shared = shared, body = kernel, failure = 0, conflicts = 0, random_state = seed;
    gridDim = Index{(unsigned)tiles, (unsigned)heads};
    for (unsigned y = 0; y < gridDim.y; y++) for (unsigned x = 0; x < gridDim.x; x++) {
        blockIdx = Index{x, y};
        memset(shared_bytes, 0xff, sizeof shared_bytes);  // NaN to whoever reads what was never written
        memset(warps, 0, sizeof warps);
        barrier_arrived = 0;
        for (int i = 0; i < threads; i++) fibers[i].started = fibers[i].done = false, fibers[i].gate = 0, fibers[i].n_copies = 0;
        for (int left = threads; left > 0;) {
            random_state = random_state * 6364136223846793005u + 1442695040888963407u;
            int i = (random_state >> 33) % threads, tried = 0;
            while (tried < threads && (fibers[i].done || (fibers[i].gate && *fibers[i].gate == fibers[i].seen)))
                i = (i + 1) % threads, tried++;
            if (tried == threads) return "some threads wait for others that are gone";
            here = i, fibers[i].gate = 0;
            int came_back = _setjmp(scheduler);
            if (came_back == 0) {
                if (fibers[i].started) _longjmp(fibers[i].at, 1);
                fibers[i].started = true;
                ucontext_t context;
                getcontext(&context);
                context.uc_stack.ss_sp = stacks[i], context.uc_stack.ss_size = sizeof stacks[i], context.uc_link = 0;
                makecontext(&context, fiber_main, 0);
                setcontext(&context);
            }
            if (came_back == 2) return failure;
            left -= fibers[here].done;
        }
    }
    return conflicts ? "bank conflicts" : "";
}
"""
FORWARD = r"""
static const half_t *a0, *a1, *a2; static half_t* r0; static float* r1; static int T_, S_, G_; static double scale_;
extern "C" const char* launch(int causal, int bf16, int tiles, int heads, int threads, int shared, int seed, half_t* q,
                              half_t* k, half_t* v, half_t* out, float* lse, int T, int S, int G, double scale) {
    CAUSAL = causal, BF16 = bf16, a0 = q, a1 = k, a2 = v, r0 = out, r1 = lse, T_ = T, S_ = S, G_ = G, scale_ = scale;
    return run(tiles, heads, threads, shared, seed, [] { attention_forward(a0, a1, a2, r0, r1, T_, S_, G_, scale_); });
}
"""
BACKWARD = r"""
static const half_t *a0, *a1, *a2, *a3; static const float *a4, *a5; static half_t *r0, *r1; static int T_, S_, G_;
static double scale_;
extern "C" const char* launch(int causal, int bf16, int tiles, int heads, int threads, int shared, int seed, half_t* x0,
                              half_t* x1, half_t* y0, half_t* y1, float* lse, float* delta, half_t* dx0, half_t* dx1,
                              int T, int S, int G, double scale) {
    CAUSAL = causal, BF16 = bf16, a0 = x0, a1 = x1, a2 = y0, a3 = y1, a4 = lse, a5 = delta, r0 = dx0, r1 = dx1;
    T_ = T, S_ = S, G_ = G, scale_ = scale;
    return run(tiles, heads, threads, shared, seed,
               [] { attention_backward(a0, a1, a2, a3, a4, a5, r0, r1, T_, S_, G_, scale_); });
}
"""

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ emulates the GPU, and is not installed")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """library(walk, Dh): that walk's code for that width, compiled for this processor once; mask and type at run time."""
    folder, built = tmp_path_factory.mktemp("emulated"), {}

    def build(walk, Dh, change=lambda code: code):
        key = walk, Dh, change(flash_attn_cuda.PRODUCTS + flash_attn_cuda.FORWARD + flash_attn_cuda.BACKWARD)
        if key not in built:
            code = flash_attn_cuda.source_of(walk, Dh, torch.bfloat16, True)
            numbers, rest = code.split(flash_attn_cuda.INSTRUCTIONS)
            numbers = re.sub(r"#define (CAUSAL|BF16) .*\n", "", numbers)
            file = folder / f"{walk}{Dh}_{len(built)}"
            file.with_suffix(".cpp").write_text(numbers + EMULATION + "\nnamespace {\n" + change(rest).replace('extern "C" ', "")
                                                + "\n}\n" + LAUNCH + (FORWARD if walk == "forward" else BACKWARD))
            subprocess.run(["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", str(file) + ".cpp", "-o",
                            str(file) + ".so"], check=True)
            launch = ctypes.CDLL(str(file) + ".so").launch
            launch.restype = ctypes.c_char_p
            built[key] = launch
        return built[key]
    return build


@pytest.fixture
def emulated(library, monkeypatch):
    """flash_attn_cuda as it is, on CPU tensors: only what compiles and launches is exchanged. Sets .seed and .change."""
    class Emulated:
        seed, launched = 0, []

        def change(self, code):
            return code

        def kernel(self, walk, Dh, dtype, is_causal, device):
            def launch(grid, block, args, shared_mem):
                assert shared_mem == flash_attn_cuda.shared_bytes(walk, Dh) and grid[2] == block[1] == block[2] == 1
                self.launched.append((walk, grid, block))
                values = [ctypes.c_void_p(x.data_ptr()) if torch.is_tensor(x) else
                          ctypes.c_double(x) if isinstance(x, float) else x for x in args]  # as _compile_kernel passes them
                failure = library(walk, Dh, self.change)(int(is_causal), int(dtype == torch.bfloat16), *grid[:2], block[0],
                                                         shared_mem, self.seed, *values)
                assert failure == b"", failure.decode()
            return launch

    it = Emulated()
    monkeypatch.setattr(flash_attn_cuda, "_kernel", it.kernel)
    monkeypatch.setattr(flash_attn_cuda, "_check", lambda *x: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return it


def problem(T, S, Dh, dtype, H=2, Hkv=1, B=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, T, Dh), (B, Hkv, S, Dh), (B, Hkv, S, Dh), (B, H, T, Dh)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return *inputs, torch.randn(B, H, T, generator=generator)


def everything(attention, q, k, v, grad_out, grad_lse, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, **options)
    finite = lse.masked_fill(lse == -math.inf, 0)
    return out.detach(), finite.detach(), *torch.autograd.grad((out * grad_out).sum() + (finite * grad_lse).sum(), leaves)


def assert_as_good_as_naive(found, inputs, **options):
    """No more than twice the error of the formula in the same type, but for one rounding of the result."""
    exact = everything(naive_attention_with_lse, *(x.double() for x in inputs), **options)
    naive = everything(naive_attention_with_lse, *inputs, **options)
    for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), found, naive, exact, strict=True):
        ours, theirs = ((x.double() - c).abs().max().item() for x in (a, b))
        rounding = torch.finfo(inputs[0].dtype).eps / 2 * c.abs().max().item()
        assert a.isfinite().all() and ours <= 2 * theirs + rounding, f"{name}: {ours} against {theirs}"


# one tile; ragged tiles; more keys; one query; more queries than keys; several tiles of both
@needs_compiler
@pytest.mark.parametrize("Dh, T, S, H, Hkv, is_causal, dtype", [
    (64, 64, 64, 1, 1, True, torch.bfloat16), (64, 37, 37, 2, 1, True, torch.float16),
    (64, 45, 150, 2, 1, True, torch.bfloat16), (64, 1, 70, 3, 1, False, torch.float16),
    (64, 90, 20, 1, 1, True, torch.bfloat16), (64, 150, 70, 2, 2, False, torch.float16),
    (128, 45, 150, 2, 1, True, torch.float16), (128, 90, 20, 1, 1, False, torch.bfloat16)])
def test_kernel_matches_float64_in_output_lse_and_gradients(emulated, Dh, T, S, H, Hkv, is_causal, dtype):
    inputs = problem(T, S, Dh, dtype, H, Hkv)
    found = everything(flash_attn_cuda.forward, *inputs, is_causal=is_causal)
    assert_as_good_as_naive(found, inputs, is_causal=is_causal)
    if T > S and is_causal:  # the first queries see nothing
        assert (found[0][:, :, :T - S] == 0).all() and (found[2][:, :, :T - S] == 0).all()


@needs_compiler
def test_kernel_gives_the_same_bits_in_any_order_of_threads(emulated):
    inputs, results = problem(70, 70, 64, torch.bfloat16), []
    for emulated.seed in (1, 2):
        results.append(everything(flash_attn_cuda.forward, *inputs))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@needs_compiler
@pytest.mark.parametrize("wrong, right, message", [
    ("(chunk ^ (row & 7)) << 3", "chunk << 3", "bank conflicts"),  # no swizzle: right, but slow
    ("__syncthreads();  // these keys have arrived", "// these keys have arrived", None)])
def test_emulation_finds_planted_mistakes(emulated, wrong, right, message):
    assert wrong in flash_attn_cuda.PRODUCTS + flash_attn_cuda.FORWARD
    emulated.change = lambda code: code.replace(wrong, right)
    q, k, v, *_ = problem(40, 140, 64, torch.bfloat16)
    with pytest.raises(AssertionError, match=message):
        out, _ = flash_attn_cuda.forward(q, k, v)
        torch.testing.assert_close(out, naive_attention_with_lse(q, k, v)[0], atol=0.02, rtol=0.02)


@needs_compiler
def test_flash_attention_reaches_the_kernel_by_name(emulated, monkeypatch):
    """Probed by running, then used, its lse differentiable; a cached chunk of queries is at the end of the keys."""
    _, forward, backward = attention_kernels.KERNELS["own"]
    monkeypatch.setitem(attention_kernels.KERNELS, "own", ("cpu", forward, backward))
    attention_kernels.works.cache_clear()
    inputs = problem(20, 60, 64, torch.bfloat16)
    try:
        found = everything(flash_attention_with_lse, *inputs, backend="own")
        assert {walk for walk, *_ in emulated.launched} == {"forward", "queries", "keys"}
        assert_as_good_as_naive(found, inputs)
    finally:
        attention_kernels.works.cache_clear()


def test_grid_covers_every_row_and_shared_memory_fits():
    for (walk, Dh), (warps, tiles, stream) in flash_attn_cuda.SIZES.items():
        assert stream % 16 == 0 and 16 * tiles * warps * Dh // 8 % (32 * warps) == 0
        assert flash_attn_cuda.shared_bytes(walk, Dh) <= 99 * 1024  # what a block may have on sm_86 and sm_89 too


def test_compilers_and_autograd_know_the_shapes_without_running():
    from torch._subclasses import FakeTensorMode
    with FakeTensorMode():
        q, k = (torch.empty(2, heads, length, 64, dtype=torch.bfloat16) for heads, length in ((4, 10), (2, 30)))
        leaves = [x.requires_grad_() for x in (q, k, k.clone())]
        out, lse = flash_attn_cuda.forward(*leaves)
        assert out.shape == q.shape and lse.shape == (2, 4, 10) and lse.dtype == torch.float32
        assert [x.shape for x in torch.autograd.grad(out.float().sum() + lse.sum(), leaves)] == [x.shape for x in leaves]


@pytest.mark.parametrize("change, message", [
    ({}, "needs CUDA tensors, got cpu"),
    ({"device": "cuda", "dtype": torch.float32}, "needs fp16 or bf16, got torch.float32"),
    ({"device": "cuda", "Dh": 80}, r"64 or 128.* got \(1, 2, 3, 80\)"), ({"device": "cuda", "scale": -1.0}, "positive scale, got -1.0"),
    ({"device": "cuda", "B": 40000}, "up to 65535 heads in a batch, got 40000 x 2")])
def test_what_the_kernel_lacks_is_refused(change, message):
    from torch._subclasses import FakeTensorMode
    sizes = dict(device="cpu", dtype=torch.bfloat16, Dh=64, B=1, scale=1.0) | change
    with FakeTensorMode():
        q = torch.empty(sizes["B"], 2, 3, sizes["Dh"], dtype=sizes["dtype"], device=sizes["device"])
        with pytest.raises(ValueError, match=message):
            flash_attn_cuda._check(q, q, q, sizes["scale"])


def test_demo_says_that_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["flash_attn_cuda.py", "--d_head", "128"])
    runpy.run_path(str(ROOT / "flash_attn_cuda.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "forward  128 threads own 128 rows and stream 64 at a time; 65,536 bytes" in out
    assert out.endswith("torch finds no CUDA device: nothing was run\n")
    monkeypatch.setattr(sys, "argv", ["flash_attn_cuda.py", "--d_head", "80"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "flash_attn_cuda.py"), run_name="__main__")
    assert "--d_head 64 or 128, got 2048, 8 and 80" in capsys.readouterr().err


# --- on a GPU, wherever one is at hand --------------------------------------------------------

if torch.cuda.is_available():
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("Dh", [64, 128])
    @pytest.mark.parametrize("T, S", [(1, 1), (64, 64), (300, 300), (1, 500), (100, 333), (200, 90), (1024, 1024)])
    @pytest.mark.parametrize("H, Hkv", [(2, 2), (4, 1)])
    @pytest.mark.parametrize("backend", ["own", "auto", "flash", "cudnn", "efficient", "tiled"])
    def test_every_kernel_matches_float64_on_the_gpu(backend, H, Hkv, T, S, Dh, dtype):
        device = torch.device("cuda", torch.cuda.current_device())
        for is_causal in (True, False):
            if backend in attention_kernels.KERNELS and not attention_kernels.works(backend, device, dtype, Dh, H // Hkv, is_causal):
                assert backend != "own", "our kernel does not work on this GPU"
                continue
            inputs = [x.to(device) for x in problem(T, S, Dh, dtype, H, Hkv, B=2)]
            inputs[4].zero_() if backend in ("flash", "cudnn", "efficient") else None
            found = everything(flash_attention_with_lse, *inputs, is_causal=is_causal, backend=backend)
            assert_as_good_as_naive(found, inputs, is_causal=is_causal)

    def test_own_kernel_is_compiled_into_a_graph():
        q, k, v, *_ = (x.cuda() for x in problem(130, 130, 64, torch.bfloat16))
        compiled = torch.compile(lambda q, k, v: flash_attn_cuda.forward(q, k, v)[0] * 2, fullgraph=True)
        torch.testing.assert_close(compiled(q, k, v), flash_attn_cuda.forward(q, k, v)[0] * 2)
