// Metal's words in CUDA: with this before them, mx.fast.cuda_kernel compiles the bodies of the .metal files.
typedef unsigned int uint;
typedef unsigned short ushort;
typedef __half half;
#define TQAI_FN static __device__ __forceinline__
#define TQAI_CONSTANT static constexpr int
#define UNROLL _Pragma("unroll")
#define threadgroup __shared__
#define threadgroup_position_in_grid (make_uint3(blockIdx.x, blockIdx.y, blockIdx.z))
#define threadgroups_per_grid (make_uint3(gridDim.x, gridDim.y, gridDim.z))
#define thread_index_in_threadgroup (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))
#define thread_index_in_simdgroup (thread_index_in_threadgroup & 31u)
#define simdgroup_index_in_threadgroup (thread_index_in_threadgroup >> 5)
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
TQAI_FN void threadgroup_barrier(mem_flags) { __syncthreads(); }
template <class T, class U> TQAI_FN T as_type(U from) { return *reinterpret_cast<T*>(&from); }
template <class T> TQAI_FN T simd_shuffle_xor(T v, ushort mask) { return __shfl_xor_sync(~0u, v, mask); }
// The value of lane `index` modulo 32.
TQAI_FN float simd_table(float v, uint index) { return __shfl_sync(~0u, v, index); }
TQAI_FN bool simd_any(bool v) { return __any_sync(~0u, v); }
// What was asked for is asked for here: no load moves past a barrier, and the compiler would put it off until it is needed.
TQAI_FN void no_later() { __syncwarp(); }
template <class T> TQAI_FN T simd_sum(T v) {
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    return v;
}
template <class T> TQAI_FN T simd_max(T v) {
    for (int o = 16; o; o >>= 1) {
        const T other = __shfl_xor_sync(~0u, v, o);
        v = other > v ? other : v;
    }
    return v;
}
namespace metal {
TQAI_FN float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
TQAI_FN float sqrt(float x) { return sqrtf(x); }
TQAI_FN float abs(float x) { return fabsf(x); }
TQAI_FN float ceil(float x) { return ceilf(x); }
template <class T> TQAI_FN T max(T a, T b) { return a > b ? a : b; }
TQAI_FN float max(float a, float b) { return fmaxf(a, b); }
template <class T> TQAI_FN T min(T a, T b) { return a < b ? a : b; }
template <class T> TQAI_FN T clamp(T v, T low, T high) { return min(max(v, low), high); }
}
TQAI_FN uint pick(uint first, uint second, uint places) {
    uint bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(first), "r"(second), "r"(places));
    return bytes;
}
// By way of 2^15 + x, as conversions of whole numbers are slow.
TQAI_FN float number(uint word, int i, float more) {
    return as_type<float>(pick(word, 0x47000000u, 0x7504u + 0x10u * i)) + (more - 32768.0f);
}
template <class E> TQAI_FN void load(const E* row, float (&out)[8]) {  // at once
    struct alignas(16) Chunk {
        E of[8];
    };
    const Chunk chunk = *reinterpret_cast<const Chunk*>(row);
    UNROLL for (int i = 0; i < 8; i++) out[i] = float(chunk.of[i]);
}

// The matrix unit's tiles as mma.m16n8k16 has them. Its factors are bfloat16, exact for levels: Coarse. Fine numbers are two
// of them. For scores of exact keys (codes: cuda_keys.cuh) the instruction takes the second ones as 8 more rows, which heads leave
// idle; for values it takes the coordinates of two tiles as its rows and heads as columns, where a lane has them anyway, and so half
// the sums, twice.
typedef uint Coarse;
struct Fine {
    Coarse high, rest;
};
struct Sums {
    float of[4];
};
struct Pair {
    float of[2];
};
#define KEY_TOKENS 1  // of a tile, whose keys a lane has: see common.metal
#define VALUE_TOKENS 2
#define ROW_LANES 3
TQAI_FN int tile_row(int lane) { return lane / 4; }
TQAI_FN int tile_column(int lane) { return lane % 4 * 2; }
TQAI_FN Sums nothing() { return {}; }
TQAI_FN Coarse coarse(float x, float y) {
    Coarse pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
}
TQAI_FN float of(Coarse pair, int i) { return as_type<float>(i ? pair & 0xffff0000u : pair << 16); }
TQAI_FN Fine fine(float x, float y) {
    const Coarse high = coarse(x, y);
    return {high, coarse(x - of(high, 0), y - of(high, 1))};
}
TQAI_FN float of(Sums sums, int i) { return sums.of[i] + sums.of[i + 2]; }
TQAI_FN void mma(float& d0, float& d1, float& d2, float& d3, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
TQAI_FN void multiply_add(Fine a, Fine b, Sums& sums) {
    mma(sums.of[0], sums.of[1], sums.of[2], sums.of[3], a.high, a.rest, a.high, a.rest, b.high, b.rest);
}
TQAI_FN Pair pair(float x, float y) { return {{x, y}}; }
TQAI_FN float of(Pair sums, int i) { return sums.of[i]; }
TQAI_FN int sum_head(int lane, int i) { return tile_column(lane) + i; }
TQAI_FN int sum_line(int lane, int) { return tile_row(lane); }
TQAI_FN Pair by_heads(float x, int lane) { return pair(simd_table(x, 4 * tile_column(lane)), simd_table(x, 4 * tile_column(lane) + 4)); }
TQAI_FN void scale(Pair& sums, Pair factors) { UNROLL for (int i = 0; i < 2; i++) sums.of[i] *= factors.of[i]; }
TQAI_FN void multiply_values(Fine w0, Fine w1, Coarse a0, Coarse b0, Coarse a1, Coarse b1, Pair& a, Pair& b) {
    mma(a.of[0], a.of[1], b.of[0], b.of[1], a0, b0, a1, b1, w0.high, w1.high);
    mma(a.of[0], a.of[1], b.of[0], b.of[1], a0, b0, a1, b1, w0.rest, w1.rest);
}
TQAI_FN void multiply_values(Fine w, Fine a0, Fine b0, Pair& a, Pair& b) {
    multiply_values(w, w, a0.high, b0.high, a0.rest, b0.rest, a, b);
}

// Levels by their codes. Up to four bits, an instruction that picks bytes finds four at once in tables of eight, one of the
// levels' upper bytes and one of their lower; of four bits in those of negative levels, whose sign is then taken away.
// Others are kept by one lane each, and looked up by a shuffle, whose index counts modulo the table.
struct Levels {
    float mine;
    uint high[2], low[2], ones;  // ones: of four bits, a 1 in each byte, for it is a register that the compiler leaves alone
};
template <int BITS, typename Numbers> TQAI_FN Levels kept(Numbers table, int lane) {
    Levels levels = {table[lane % (1 << BITS) % 16], {0, 0}, {0, 0}, 0};
    UNROLL for (int code = 0; code < 8; code++) {
        const uint bits = as_type<uint>(table[BITS == 4 ? code + 8 : code]);
        levels.high[code / 4] |= (bits >> 24) << (8 * (code % 4));
        levels.low[code / 4] |= (bits >> 16 & 255u) << (8 * (code % 4));
        levels.ones |= (bits >> 31) << (8 * (code % 4));
    }
    return levels;
}
TQAI_FN float one(Levels levels, uint code) { return simd_table(levels.mine, code); }
template <int BITS> TQAI_FN int order(int i) { return BITS < 4 ? 2 * (i % 4) + i / 4 : i; }
template <int BITS, int TOKENS, int WORDS>
TQAI_FN bool picked(Levels levels, const uint (&share)[TOKENS][WORDS], int c, Coarse* out) {
    if (BITS > 4) return false;
    const uint* first = share[0];
    const uint* second = share[TOKENS - 1];
    // Codes to the nibbles that pick, of two tokens in turn.
    const uint half = (TOKENS == 1 ? 0x10u : 0x5140u) + 0x2222u * (c & 1);
    uint places[2];
    UNROLL for (int k = 0; k < 2; k++) {
        if (BITS == 4) {
            places[k] = TOKENS == 1 ? first[0] >> (16 * k) : pick(first[0], second[0], 0x5140u + 0x2222u * k);
        } else {
            places[k] = pick(first[0], second[0], half) >> (2 * k) & 0x33333333u;
            if (BITS == 3) {
                const uint signs = pick(first[WORDS - 1], second[WORDS - 1], half) >> (c & 2 ? 0 : 2);
                places[k] |= (signs >> k & 0x11111111u) << 2;
            }
        }
    }
    UNROLL for (int k = 0; k < 2 * TOKENS; k++) {
        const uint codes = places[k / TOKENS] >> (16 * (k % TOKENS));
        const uint at = BITS == 4 ? (places[k / TOKENS] & 0x77777777u) >> (16 * (k % TOKENS)) : codes;
        uint high = pick(levels.high[0], levels.high[1], at), low = pick(levels.low[0], levels.low[1], at);
        if (BITS == 4) high -= 128u * pick(levels.ones, levels.ones, codes);  // 0 where the nibble's fourth bit is set
        out[2 * k] = pick(low, high, TOKENS == 1 ? 0x5140u : 0x6240u);
        out[2 * k + 1] = pick(low, high, TOKENS == 1 ? 0x7362u : 0x7351u);
    }
    return true;
}
#define thread
