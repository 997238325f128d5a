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
#define thread
