// CUDA on a CPU, in the same way: what cuda_prelude.cuh makes Metal's words of. Its PTX comes as calls (see metal_shim.py).
#pragma once
#define CUDA_SHIM
#include "metal_shim.h"

typedef half __half;
typedef bfloat16_t __nv_bfloat16;
#define __device__
#define __forceinline__ inline
#define __shared__ static __attribute__((section("threadgroup_memory")))
#undef threadgroup
#define blockIdx shim::place
#define gridDim shim::grid
#define blockDim (uint3{1, 1, 1})
#define threadIdx (uint3{shim::current->index, 0, 0})
inline uint3 make_uint3(uint x, uint y, uint z) { return {x, y, z}; }
inline void __syncthreads(LINE) { shim::meet(shim::group, shim::current->index, 0, "__syncthreads", line); }
inline void __syncwarp(LINE) { shim::in_simdgroup(false, "__syncwarp", line); }
template <class T> T __shfl_xor_sync(uint, T v, int mask, LINE) {
    return shim::value<T>(shim::in_simdgroup(v, "__shfl_xor_sync", line)[shim::current->index % 32 ^ mask]);
}
template <class T> T __shfl_sync(uint, T v, int lane, LINE) { return shim::value<T>(shim::in_simdgroup(v, "__shfl_sync", line)[lane & 31]); }
inline bool __any_sync(uint, bool v, LINE) {
    const uint64_t* all = shim::in_simdgroup(v, "__any_sync", line);
    return std::any_of(all, all + 32, [](uint64_t lane) { return shim::value<bool>(lane); });
}

inline void ex2_approx_ftz_f32(float& y, float x) { y = std::exp2(x); }
inline void prmt_b32(uint& d, uint a, uint b, uint places) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    d = 0;
    for (int i = 0; i < 4; i++) {
        const uint place = places >> (4 * i) & 15, byte = bytes >> (8 * (place & 7)) & 255;
        d |= (place & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
    }
}
inline void cvt_rn_bf16x2_f32(uint& d, float high, float low) { d = uint(bfloat16_t(high).bits) << 16 | bfloat16_t(low).bits; }
// d += a b, 16 x 8, of registers that hold PACKED numbers each: a lane has those of its place in a row of a, and of a column of b.
template <int PACKED, class Sum, class Element> void mma(Sum* const (&d)[4], const uint (&own)[6], Element element, int line) {
    uint all[32][6];
    for (int part = 0; part < 6; part++) {
        const uint64_t* given = shim::in_simdgroup(own[part], "mma", line);
        for (int lane = 0; lane < 32; lane++) all[lane][part] = uint(given[lane]);
    }
    const int lane = shim::current->index % 32;
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 8 * PACKED; k++) {
            const int row = lane / 4, column = lane % 4 * 2 + i % 2, from = k / PACKED % 4, second = k / PACKED / 4;
            *d[i] += element(all[4 * row + from][i / 2 + 2 * second], k % PACKED) * element(all[4 * column + from][4 + second], k % PACKED);
        }
}
inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(
    float& d0, float& d1, float& d2, float& d3, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1, LINE) {
    const auto element = [](uint word, int i) { return shim::value<float>(i ? word & 0xffff0000u : word << 16); };
    mma<2, float>({&d0, &d1, &d2, &d3}, {a0, a1, a2, a3, b0, b1}, element, line);
}
inline void mma_sync_aligned_m16n8k32_row_col_s32_s8_s8_s32(
    int& d0, int& d1, int& d2, int& d3, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1, LINE) {
    const auto element = [](uint word, int i) { return int(int8_t(word >> (8 * i))); };
    mma<4, int>({&d0, &d1, &d2, &d3}, {a0, a1, a2, a3, b0, b1}, element, line);
}
