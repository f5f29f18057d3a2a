"""FlashAttention on tensor cores: a CUDA C++ kernel, compiled at run time.   Dao 2023 (2307.08691)

Idea      A block of threads owns a tile of rows and keeps their sums in registers, while tiles of the other side
          stream through shared memory. Three walks over the T x S matrix, none of which writes it down:
            forward       owns queries, streams keys:    S = Q K^T,   O  += P V
            backward, q   owns queries, streams keys:    S, dP = dO V^T,   dQ += dS K
            backward, kv  owns keys, streams queries:    S^T, dP^T,   dV += P^T dO,   dK += dS^T Q
          The two backward walks are one kernel, with the roles of queries and keys exchanged. The published
          kernel does one walk and adds dQ atomically: 5 products for our 7, but its sums come in any order.
          Ours gives the same bits every time, and a probability never leaves the registers of one warp.
Formula   P = 2^(c S - lse log2 e), c = log2 e / sqrt(Dh);  dS = P (dP - delta), delta = rowsum(dO out) - dlse
Shapes    q (B, H, T, Dh), k and v (B, Hkv, S, Dh), Hkv | H, fp16 or bf16, Dh 64 or 128 -> out (B, H, T, Dh), lse
          (B, H, T) in fp32. The queries are the LAST T of the S positions; a group's heads read its keys uncopied.
Also      tensor cores   mma.sync m16n8k16: a warp multiplies 16 x 16 by 16 x 8 halves, sums in fp32
          registers      the result of one product has the layout that the next wants as its left factor
          shared memory  a row's 16-byte chunks are permuted ("swizzled"), so that ldmatrix, which reads the
                         same chunk of 8 rows, meets 8 different groups of banks
          latency        cp.async copies the next tile while this one is multiplied
          traffic        rows of a warp share each fragment that it loads: 32 rows halve what 16 would read
Omits     Hopper's wgmma and TMA (FlashAttention-3), windows, biases, dropout (flash_attn.py has them).
Run       python flash_attn_cuda.py     compiles for this GPU, compares and times; without one it says so;
          ends with "largest relative error against float64 = ..."
Test      pytest tests/test_flash_attn_cuda.py
"""

import argparse
import functools

import torch
from torch import Tensor


# --- 1. the instructions ------------------------------------------------------------------------
#
# Everything that only a GPU understands, one small function each; the rest of the kernel is plain C++.

INSTRUCTIONS = r"""
typedef unsigned short half_t;  // 16 bits of fp16 or bf16: only the tensor cores and `pack` look inside

__device__ __forceinline__ half_t* shared_memory() {
    extern __shared__ uint4 bytes[];
    return reinterpret_cast<half_t*>(bytes);
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, past the registers and without waiting; zeros if not valid.
__device__ __forceinline__ void copy_16(half_t* to, const half_t* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// The copies since the last commit are one group.
__device__ __forceinline__ void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all of this thread's groups but the last `pending` have arrived.
template <int pending> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(pending) : "memory");
}

// Four 8 x 8 matrices of halves; lanes 8 i .. 8 i + 7 hold the addresses of the 8 rows of matrix i. Lane 4 r + c
// receives, of each, row r, columns 2 c and 2 c + 1; transposed: column r, rows 2 c and 2 c + 1.
__device__ __forceinline__ void load_matrices(unsigned (&x)[4], const half_t* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&x)[4], const half_t* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared_address(row)) : "memory");
}

// sums (16 x 8, fp32) += a (16 x 16) b (16 x 8).
__device__ __forceinline__ void multiply_add(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if BF16
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats to two halves; the first is in the lower 16 bits.
__device__ __forceinline__ unsigned pack(float first, float second) {
    unsigned both;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
#endif
    return both;
}

__device__ __forceinline__ float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float from_lane_xor(float x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
"""


# --- 2. the kernel ------------------------------------------------------------------------------
#
# Compile-time numbers: DH; CAUSAL; BF16; WARPS of 32 threads; TILES of 16 owned rows per warp; STREAM rows per
# streamed tile; OWNS_KEYS, for the backward kernel.
#
# Who holds what, in a warp, lane = 4 r + c. Of a 16 x 8 result, sums[0..1] are row r, columns 2 c and 2 c + 1;
# sums[2..3] the same of row r + 8. A 16 x 16 left factor is four 8 x 8 matrices in the order (top left, bottom
# left, top right, bottom right), each held like this: so two neighbouring results, packed, are a left factor.

PRODUCTS = r"""
#define THREADS (32 * WARPS)
#define OWNED (16 * TILES * WARPS)
const float LOG2_E = 1.4426950408889634f;

// Where chunk number `chunk` (8 halves, 16 bytes) of a row is: 8 rows have the same chunk in 8 different places.
__device__ __forceinline__ int place(int row, int chunk) { return row * DH + ((chunk ^ (row & 7)) << 3); }

// Rows first .. first + rows - 1 of a (length, DH) matrix; zeros behind its end.
__device__ __forceinline__ void load_tile(half_t* tile, const half_t* matrix, int first, int rows, int length) {
    for (int i = threadIdx.x; i < rows * (DH / 8); i += THREADS) {
        int row = i / (DH / 8), chunk = i % (DH / 8);
        bool valid = first + row < length;
        copy_16(tile + place(row, chunk), matrix + (long long)(valid ? first + row : 0) * DH + chunk * 8, valid);
    }
}

// Left factor: rows row .. row + 15, columns 16 k .. 16 k + 15.
__device__ __forceinline__ void load_left(unsigned (&a)[4], const half_t* tile, int row, int k) {
    int lane = threadIdx.x % 32;
    load_matrices(a, tile + place(row + lane % 16, 2 * k + lane / 16));
}

// Right factor of X Y^T, from Y: its rows row .. row + 15 are 16 columns of Y^T, in two halves (0, 1) and (2, 3).
__device__ __forceinline__ void load_right_transposed(unsigned (&b)[4], const half_t* tile, int row, int k) {
    int lane = threadIdx.x % 32;
    load_matrices(b, tile + place(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
}

// Right factor of X Y, from Y: rows row .. row + 15, columns 16 n .. 16 n + 15, in two halves (0, 1) and (2, 3).
__device__ __forceinline__ void load_right(unsigned (&b)[4], const half_t* tile, int row, int n) {
    int lane = threadIdx.x % 32;
    load_matrices_transposed(b, tile + place(row + lane % 16, 2 * n + lane / 16));
}

// sums = X Y^T for this warp's rows of X and all STREAM rows of Y.
__device__ __forceinline__ void product_transposed(float (&sums)[TILES][STREAM / 8][4], const half_t* x,
                                                   const half_t* y) {
    int warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int n = 0; n < STREAM / 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) sums[i][n][e] = 0;
#pragma unroll
    for (int k = 0; k < DH / 16; k++) {
        unsigned a[TILES][4], b[4];
#pragma unroll
        for (int i = 0; i < TILES; i++) load_left(a[i], x, (warp * TILES + i) * 16, k);
#pragma unroll
        for (int n = 0; n < STREAM / 16; n++) {
            load_right_transposed(b, y, n * 16, k);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                multiply_add(sums[i][2 * n], a[i], b[0], b[1]);
                multiply_add(sums[i][2 * n + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// sums += P Y, P (this warp's rows x STREAM) as product_transposed left it, Y (STREAM x DH).
__device__ __forceinline__ void add_product(float (&sums)[TILES][DH / 8][4], const float (&p)[TILES][STREAM / 8][4],
                                            const half_t* y) {
#pragma unroll
    for (int k = 0; k < STREAM / 16; k++) {
        unsigned a[TILES][4], b[4];
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int side = 0; side < 2; side++) {  // columns 0 .. 7 and 8 .. 15 of the left factor
                a[i][2 * side] = pack(p[i][2 * k + side][0], p[i][2 * k + side][1]);
                a[i][2 * side + 1] = pack(p[i][2 * k + side][2], p[i][2 * k + side][3]);
            }
#pragma unroll
        for (int n = 0; n < DH / 16; n++) {
            load_right(b, y, k * 16, n);
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                multiply_add(sums[i][2 * n], a[i], b[0], b[1]);
                multiply_add(sums[i][2 * n + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// This warp's rows of a (length, DH) matrix, each row times its factor.
__device__ __forceinline__ void store_rows(half_t* matrix, const float (&sums)[TILES][DH / 8][4],
                                           const float (&factor)[TILES][2], int first, int length) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = first + i * 16 + half * 8 + lane / 4;
            if (row < length)
#pragma unroll
                for (int n = 0; n < DH / 8; n++)
                    *reinterpret_cast<unsigned*>(matrix + (long long)row * DH + n * 8 + lane % 4 * 2) =
                        pack(sums[i][n][2 * half] * factor[i][half], sums[i][n][2 * half + 1] * factor[i][half]);
        }
}

"""

FORWARD = r"""
const float HIDDEN = -3e38f;  // a logit that nobody sees; finite, so that no difference of two is NaN

// Grid: (tiles of queries, B H). q, out (B H, T, DH); k, v (B H / G, S, DH); lse (B H, T).
extern "C" __global__ void __launch_bounds__(THREADS)
attention_forward(const half_t* q, const half_t* k, const half_t* v, half_t* out, float* lse, int T, int S, int G,
                  double scale) {
    half_t* q_tile = shared_memory();
    half_t* k_tile = q_tile + OWNED * DH;
    half_t* v_tile = k_tile + STREAM * DH;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Later queries see more keys: the longest work first, so that no block is left alone at the end.
    int first = (gridDim.x - 1 - blockIdx.x) * OWNED, my_first = first + warp * TILES * 16;
    long long head = blockIdx.y;
    q += head * T * DH, out += head * T * DH, lse += head * T;
    k += head / G * S * DH, v += head / G * S * DH;
    int shift = S - T;  // query t is at position t + shift
    int end = CAUSAL ? min(S, min(first + OWNED, T) + shift) : S;  // keys from here on are seen by no row
    float c = (float)scale * LOG2_E;

    float o[TILES][DH / 8][4] = {}, s[TILES][STREAM / 8][4];
    float m[TILES][2], l[TILES][2];  // rows r and r + 8 of each 16; l only over this lane's columns
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) m[i][half] = -1e30f, l[i][half] = 0;

    load_tile(q_tile, q, first, OWNED, T);
    load_tile(k_tile, k, 0, STREAM, S);
    copy_commit();
    for (int begin = 0; begin < end; begin += STREAM) {
        copy_wait<0>();
        __syncthreads();  // these keys have arrived, and nobody needs the last values any more
        load_tile(v_tile, v, begin, STREAM, S);
        copy_commit();
        product_transposed(s, q_tile, k_tile);
        copy_wait<0>();
        __syncthreads();  // these values have arrived, and nobody needs these keys any more
        if (begin + STREAM < end) load_tile(k_tile, k, begin + STREAM, STREAM, S);
        copy_commit();

        if (begin + STREAM > S || (CAUSAL && begin + STREAM - 1 > my_first + shift))  // some rows miss some keys
#pragma unroll
            for (int i = 0; i < TILES; i++)
#pragma unroll
                for (int n = 0; n < STREAM / 8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int row = my_first + i * 16 + e / 2 * 8 + lane / 4;
                        int key = begin + n * 8 + lane % 4 * 2 + e % 2;
                        if (key >= S || (CAUSAL && key > row + shift)) s[i][n][e] = HIDDEN;
                    }
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float larger = m[i][half];
#pragma unroll
                for (int n = 0; n < STREAM / 8; n++)
                    larger = fmaxf(larger, fmaxf(s[i][n][2 * half], s[i][n][2 * half + 1]));
                larger = fmaxf(larger, from_lane_xor(larger, 1));  // a row's columns are with four lanes
                larger = fmaxf(larger, from_lane_xor(larger, 2));
                float shrink = power_of_2((m[i][half] - larger) * c), offset = larger * c, sum = 0;
                m[i][half] = larger;
#pragma unroll
                for (int n = 0; n < STREAM / 8; n++)
#pragma unroll
                    for (int e = 2 * half; e < 2 * half + 2; e++)
                        sum += s[i][n][e] = power_of_2(s[i][n][e] * c - offset);
                l[i][half] = l[i][half] * shrink + sum;
#pragma unroll
                for (int n = 0; n < DH / 8; n++) o[i][n][2 * half] *= shrink, o[i][n][2 * half + 1] *= shrink;
            }
        add_product(o, s, v_tile);
    }
    copy_wait<0>();

    float factor[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = l[i][half];
            sum += from_lane_xor(sum, 1);
            sum += from_lane_xor(sum, 2);
            factor[i][half] = sum == 0 ? 0 : 1 / sum;  // a query that sees nothing: zeros
            int row = my_first + i * 16 + half * 8 + lane / 4;
            if (row < T && lane % 4 == 0)
                lse[row] = sum == 0 ? -infinity() : (m[i][half] * c + log2f(sum)) / LOG2_E;
        }
    store_rows(out, o, factor, my_first, T);
}

"""

BACKWARD = r"""
// One walk of the backward pass. It owns queries (x = q, dO) and streams keys (y = k, v), or, if OWNS_KEYS, the
// reverse (x = k, v; y = q, dO) for all G query heads that share the keys.
// Grid: (tiles of owned rows, B H, or B H / G if OWNS_KEYS). Gradients: dx0 of x0 and, if OWNS_KEYS, dx1 of x1.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_backward(const half_t* x0, const half_t* x1, const half_t* y0, const half_t* y1, const float* lse,
                   const float* delta, half_t* dx0, half_t* dx1, int T, int S, int G, double scale) {
    half_t* x0_tile = shared_memory();
    half_t* x1_tile = x0_tile + OWNED * DH;
    half_t* y_tiles = x1_tile + OWNED * DH;  // two stages, each a tile of y0 and one of y1
#if OWNS_KEYS
    float* row_values = reinterpret_cast<float*>(y_tiles + 4 * STREAM * DH);  // two stages: lse, delta of queries
#endif
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int owned_length = OWNS_KEYS ? S : T, streamed_length = OWNS_KEYS ? T : S, shift = S - T;
    // The longest work first: late queries see many keys, early keys are seen by many queries.
    int first = (OWNS_KEYS ? blockIdx.x : gridDim.x - 1 - blockIdx.x) * OWNED;
    int my_first = first + warp * TILES * 16;
    long long head = blockIdx.y;
    x0 += head * owned_length * DH, x1 += head * owned_length * DH, dx0 += head * owned_length * DH;
    long long streamed_head = OWNS_KEYS ? head * G : head / G;
    y0 += streamed_head * streamed_length * DH, y1 += streamed_head * streamed_length * DH;
    lse += (OWNS_KEYS ? streamed_head : head) * T, delta += (OWNS_KEYS ? streamed_head : head) * T;
    float c = (float)scale * LOG2_E;

    // What is streamed for one head: all, or what the causal mask leaves; then the same of the group's next head.
    int begin = CAUSAL && OWNS_KEYS ? max(0, first - shift) / STREAM * STREAM : 0;
    int end = CAUSAL && !OWNS_KEYS ? min(S, min(first + OWNED, T) + shift) : streamed_length;
    int steps = max(0, (end - begin + STREAM - 1) / STREAM), all_steps = steps * (OWNS_KEYS ? G : 1);

    float ds[TILES][STREAM / 8][4], p[TILES][STREAM / 8][4], dx0_sums[TILES][DH / 8][4] = {};
#if OWNS_KEYS
    float dx1_sums[TILES][DH / 8][4] = {};
#else
    float my_lse[TILES][2], my_delta[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = my_first + i * 16 + half * 8 + lane / 4;
            float value = row < T ? lse[row] : infinity();
            my_lse[i][half] = value == -infinity() ? infinity() : value * LOG2_E;  // saw nothing: p = 2^-inf = 0
            my_delta[i][half] = row < T ? delta[row] : 0;
        }
#endif

    auto load_step = [&](int step) {
        long long member = step / steps;
        int row = begin + step % steps * STREAM, stage = step % 2;
        half_t* tile = y_tiles + 2 * stage * STREAM * DH;
        load_tile(tile, y0 + member * streamed_length * DH, row, STREAM, streamed_length);
        load_tile(tile + STREAM * DH, y1 + member * streamed_length * DH, row, STREAM, streamed_length);
#if OWNS_KEYS
        float* values = row_values + 2 * stage * STREAM;
        for (int i = threadIdx.x; i < STREAM; i += THREADS) {
            float value = row + i < T ? lse[member * T + row + i] : infinity();
            values[i] = value == -infinity() ? infinity() : value * LOG2_E;
            values[STREAM + i] = row + i < T ? delta[member * T + row + i] : 0;
        }
#endif
    };

    if (all_steps > 0) {
        load_tile(x0_tile, x0, first, OWNED, owned_length);
        load_tile(x1_tile, x1, first, OWNED, owned_length);
        load_step(0);
    }
    copy_commit();
    for (int step = 0; step < all_steps; step++) {
        if (step + 1 < all_steps) load_step(step + 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();  // this step's tiles have arrived
        const half_t* y0_tile = y_tiles + step % 2 * 2 * STREAM * DH;
        const half_t* y1_tile = y0_tile + STREAM * DH;
        int row_0 = begin + step % steps * STREAM;
        product_transposed(p, x0_tile, y0_tile);   // S, or S^T
        product_transposed(ds, x1_tile, y1_tile);  // dP, or dP^T
        int last_key = OWNS_KEYS ? my_first + TILES * 16 - 1 : row_0 + STREAM - 1;
        int first_query = OWNS_KEYS ? row_0 : my_first;
        bool all_seen = row_0 + STREAM <= streamed_length && (!CAUSAL || last_key <= first_query + shift);
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int n = 0; n < STREAM / 8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    int column = n * 8 + lane % 4 * 2 + e % 2;
#if OWNS_KEYS
                    const float* values = row_values + step % 2 * 2 * STREAM;
                    float row_lse = values[column], row_delta = values[STREAM + column];
#else
                    float row_lse = my_lse[i][e / 2], row_delta = my_delta[i][e / 2];
#endif
                    p[i][n][e] = power_of_2(p[i][n][e] * c - row_lse);
                    if (!all_seen) {
                        int own = my_first + i * 16 + e / 2 * 8 + lane / 4, other = row_0 + column;
                        int query = OWNS_KEYS ? other : own, key = OWNS_KEYS ? own : other;
                        if (key >= S || query >= T || (CAUSAL && key > query + shift)) p[i][n][e] = 0;
                    }
                    ds[i][n][e] = p[i][n][e] * (ds[i][n][e] - row_delta);
                }
#if OWNS_KEYS
        add_product(dx1_sums, p, y1_tile);  // dV += P^T dO
#endif
        add_product(dx0_sums, ds, y0_tile);  // dQ += dS K, or dK += dS^T Q
        __syncthreads();  // nobody needs this step's tiles any more
    }
    copy_wait<0>();

    float factor[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; i++) factor[i][0] = factor[i][1] = (float)scale;
    store_rows(dx0, dx0_sums, factor, my_first, owned_length);
#if OWNS_KEYS
#pragma unroll
    for (int i = 0; i < TILES; i++) factor[i][0] = factor[i][1] = 1;
    store_rows(dx1 + head * owned_length * DH, dx1_sums, factor, my_first, owned_length);
#endif
}
"""


# --- 3. compiled and launched -------------------------------------------------------------------

# (walk, Dh) -> warps, tiles of 16 owned rows per warp, rows per streamed tile. What fits 255 registers a thread.
SIZES = {("forward", 64): (4, 2, 64), ("forward", 128): (4, 2, 64),
         ("queries", 64): (4, 2, 64), ("queries", 128): (4, 1, 64),
         ("keys", 64): (4, 1, 64), ("keys", 128): (4, 1, 32)}


def source_of(walk: str, Dh: int, dtype: torch.dtype, is_causal: bool) -> str:
    """The CUDA C++ of one walk, for its numbers."""
    warps, tiles, stream = SIZES[walk, Dh]
    numbers = dict(DH=Dh, BF16=int(dtype == torch.bfloat16), CAUSAL=int(is_causal), WARPS=warps, TILES=tiles,
                   STREAM=stream, OWNS_KEYS=int(walk == "keys"))
    return "".join(f"#define {name} {value}\n" for name, value in numbers.items()) + INSTRUCTIONS + PRODUCTS + (
        FORWARD if walk == "forward" else BACKWARD)


def shared_bytes(walk: str, Dh: int) -> int:
    """Shared memory of one block: forward Q, K, V; backward two owned tiles, two stages of two, and row values."""
    warps, tiles, stream = SIZES[walk, Dh]
    owned = 16 * tiles * warps
    if walk == "forward":
        return 2 * Dh * (owned + 2 * stream)
    return 2 * Dh * (2 * owned + 4 * stream) + 4 * 4 * stream


@functools.cache
def _kernel(walk: str, Dh: int, dtype: torch.dtype, is_causal: bool, device: int):
    """Compiled for this device, which is the current one."""
    name = "attention_forward" if walk == "forward" else "attention_backward"
    kernel = torch.cuda._compile_kernel(source_of(walk, Dh, dtype, is_causal), name)
    kernel.set_shared_memory_config(shared_bytes(walk, Dh))
    return kernel


def _launch(walk: str, dtype: torch.dtype, Dh: int, is_causal: bool, rows: int, heads: int, arguments: list) -> None:
    warps, tiles, _ = SIZES[walk, Dh]
    device = arguments[0].device
    with torch.cuda.device(device):
        _kernel(walk, Dh, dtype, is_causal, device.index)(
            grid=(-(-rows // (16 * tiles * warps)), heads, 1), block=(32 * warps, 1, 1), args=arguments,
            shared_mem=shared_bytes(walk, Dh))


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    (B, H, _, Dh), Hkv = q.shape, k.size(1)
    if not (q.is_cuda and k.is_cuda and v.is_cuda):
        raise ValueError(f"the CUDA kernel needs CUDA tensors, got {q.device}, {k.device}, {v.device}")
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"the CUDA kernel needs fp16 or bf16, got {q.dtype}, {k.dtype}, {v.dtype}")
    if ("forward", Dh) not in SIZES or k.shape != v.shape or (k.size(0), k.size(3)) != (B, Dh) or H % Hkv:
        raise ValueError("the CUDA kernel needs q (B, H, T, 64 or 128), k and v (B, Hkv, S, the same), Hkv | H, "
                         f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if B * H > 65535:
        raise ValueError(f"the CUDA kernel takes up to 65535 heads in a batch, got {B} x {H}")
    if not scale > 0:
        raise ValueError(f"the CUDA kernel needs a positive scale, got {scale}")


@torch.library.custom_op("flash_attn_cuda::forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    _check(q, k, v, scale)
    (B, H, T, Dh), Hkv, S = q.shape, k.size(1), k.size(2)
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse = torch.empty_like(q), torch.empty(B, H, T, device=q.device)
    if T > 0:
        _launch("forward", q.dtype, Dh, is_causal, T, B * H, [q, k, v, out, lse, T, S, H // Hkv, scale])
    return out, lse


@torch.library.custom_op("flash_attn_cuda::backward", mutates_args=())
def _backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, is_causal: bool,
              scale: float) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, scale)
    (B, H, T, Dh), Hkv, S = q.shape, k.size(1), k.size(2)
    q, k, v, grad_out, lse, delta = (x.contiguous() for x in (q, k, v, grad_out, lse, delta))
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if T > 0:
        _launch("queries", q.dtype, Dh, is_causal, T, B * H,
                [q, grad_out, k, v, lse, delta, dq, dq, T, S, H // Hkv, scale])
    if S > 0:
        _launch("keys", q.dtype, Dh, is_causal, S, B * Hkv,
                [k, v, q, grad_out, lse, delta, dk, dv, T, S, H // Hkv, scale])
    return dq, dk, dv


@_forward.register_fake
def _(q, k, v, is_causal, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(grad_out, q, k, v, lse, delta, is_causal, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def forward(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True, scale: float | None = None
            ) -> tuple[Tensor, Tensor]:
    """q (B, H, T, Dh), k and v (B, Hkv, S, Dh), fp16 or bf16 on a GPU -> out (B, H, T, Dh), lse (B, H, T) fp32.

    Differentiable in both. Raises ValueError if the kernel lacks the shapes, the type or the device, and what
    torch raises if it cannot compile here.
    """
    return _forward(q, k, v, is_causal, q.size(-1) ** -0.5 if scale is None else float(scale))


def backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, is_causal: bool = True,
             scale: float | None = None, grad_lse: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. out and lse may be those of attention to more keys than these."""
    delta = (grad_out.float() * out).sum(-1)  # (B, H, T)
    if grad_lse is not None:  # d lse_i / d s_ij = p_ij
        delta = delta - grad_lse
    return _backward(grad_out, q, k, v, lse, delta, is_causal, q.size(-1) ** -0.5 if scale is None else float(scale))


def _save(ctx, inputs, output):
    q, k, v, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _gradients(ctx, grad_out, grad_lse):
    return *backward(grad_out, *ctx.saved_tensors, ctx.is_causal, ctx.scale, grad_lse), None, None


_forward.register_autograd(_gradients, setup_context=_save)


# --- 4. demo ------------------------------------------------------------------------------------

def main(length: int, n_heads: int, d_head: int, dtype: str) -> None:
    if min(length, n_heads) < 1 or ("forward", d_head) not in SIZES:
        raise ValueError("--length and --n_heads must be at least 1, --d_head 64 or 128, "
                         f"got {length}, {n_heads} and {d_head}")
    if not torch.cuda.is_available():
        for walk in ("forward", "queries", "keys"):
            warps, tiles, stream = SIZES[walk, d_head]
            print(f"{walk:8} {32 * warps} threads own {16 * tiles * warps} rows and stream {stream} at a time; "
                  f"{shared_bytes(walk, d_head):,} bytes of shared memory")
        print("torch finds no CUDA device: nothing was run")
        return
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad_out = (torch.randn(1, n_heads, length, d_head, generator=generator, device="cuda",
                                     dtype=getattr(torch, dtype)) for _ in range(4))
    worst = 0.0
    for is_causal in (False, True):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        exact = [x.double().requires_grad_() for x in (q, k, v)]
        out = forward(*inputs, is_causal)[0]
        expected = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=is_causal)
        found = out, *torch.autograd.grad(out, inputs, grad_out)
        wanted = expected, *torch.autograd.grad(expected, exact, grad_out.double())
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted)]
        worst = torch.tensor([worst, *errors]).max().item()  # NaN, if there is one; Python's max would lose it

        def both():
            torch.autograd.grad(forward(*inputs, is_causal)[0], inputs, grad_out)

        for name, run in (("forward", lambda: forward(q, k, v, is_causal)), ("forward + backward", both)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            run()
            start.record()
            for _ in range(10):
                run()
            end.record()
            end.synchronize()
            work = 4 * n_heads * length**2 * d_head * (0.5 if is_causal else 1) * (3.5 if "+" in name else 1)
            print(f"{'causal' if is_causal else 'full':7} {name:18} {start.elapsed_time(end) / 10:8.3f} ms  "
                  f"{work / (start.elapsed_time(end) / 10) / 1e9:6.1f} TFLOP/s")
    print(f"largest relative error against float64 = {worst:.1e}: "
          + ("OK, below 0.01" if worst < 0.01 else "WRONG, expected below 0.01"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one line, without the usage
    parser.add_argument("--length", type=int, default=2048, help="T = S (default %(default)s)")
    parser.add_argument("--n_heads", type=int, default=8, help="H (default %(default)s)")
    parser.add_argument("--d_head", type=int, default=64,
                        help="Dh, width of a head: 64 or 128 (default %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"],
                        help="of q, k and v (default %(default)s)")
    try:
        main(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        parser.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error).split("\n")[0][:200])
