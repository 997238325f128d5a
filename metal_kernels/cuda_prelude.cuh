// Metal's words in CUDA: with this before them, mx.fast.cuda_kernel compiles the bodies of the .metal files.
typedef unsigned int uint;
typedef unsigned short ushort;
typedef __half half;
#define TQAI_FN static __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define threadgroup __shared__
#define threadgroup_position_in_grid (make_uint3(blockIdx.x, blockIdx.y, blockIdx.z))
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
template <class T> TQAI_FN T min(T a, T b) { return a < b ? a : b; }
template <class T> TQAI_FN T clamp(T v, T low, T high) { return min(max(v, low), high); }
}
TQAI_FN uint pick(uint first, uint second, uint places) {
    uint bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(first), "r"(second), "r"(places));
    return bytes;
}
// Levels by their codes: a lane keeps one, and a look-up is a shuffle, whose index counts modulo the table. For two bits
// an instruction that picks bytes finds four at once, which shuffles are too scarce for. A level fits into the upper
// half of a float: its two bytes come from two tables, and the lower half repeats the sign, so that the table holds a
// negative level's bits less one.
struct Levels {
    float mine;
    uint high, low;
};
template <int BITS, typename Numbers> TQAI_FN Levels kept(Numbers table, int lane) {
    Levels levels = {table[lane % (1 << BITS) % 16], 0, 0};
    UNROLL for (int code = 0; code < 4; code++) {
        const uint bits = as_type<uint>(table[code]) - (table[code] < 0.0f);
        levels.high |= (bits >> 24) << (8 * code);
        levels.low |= (bits >> 16 & 255u) << (8 * code);
    }
    return levels;
}
TQAI_FN float one(Levels levels, uint code) { return simd_table(levels.mine, code); }
template <int BITS> TQAI_FN void eight(Levels levels, uint codes, float* out) {
    if (BITS == 2) {
        UNROLL for (int odd = 0; odd < 2; odd++) {
            const uint places = codes >> (2 * odd) & 0x3333u;
            const uint high = pick(levels.high, 0, places), low = pick(levels.low, 0, places);
            UNROLL for (int i = 0; i < 4; i++) out[2 * i + odd] = as_type<float>(pick(low, high, 0x40cc + 0x1111 * i));
        }
    } else {
        UNROLL for (int i = 0; i < 8; i++) out[i] = one(levels, codes >> (BITS * i));
    }
}
#define thread
