// Metal Shading Language on a CPU: enough to compile and run, as C++, the text that MLX generates for Metal.
//
// Every thread of a threadgroup is a fiber. It runs until an operation that it shares with its simdgroup or
// threadgroup, and goes on when all of them are there; the order is shuffled by a seed. Found, and
// reported with the line: shared operations that not all threads reach, different ones that meet. Threadgroup
// memory starts as NaN, so that a missing barrier shows as NaN or as results that differ between seeds.
#pragma once
#include <algorithm>
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <ucontext.h>
#include <vector>

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef _Float16 half;
typedef half float16_t;
struct bfloat16_t {
    uint16_t bits;
    bfloat16_t() = default;
    explicit bfloat16_t(float x) {
        uint32_t u;
        memcpy(&u, &x, 4);
        bits = (u + 0x7fff + (u >> 16 & 1)) >> 16;  // to nearest even
    }
    operator float() const {
        uint32_t u = uint32_t(bits) << 16;
        float x;
        memcpy(&x, &u, 4);
        return x;
    }
};
struct uint3 {
    uint x, y, z;
};
struct float2 {
    float x, y;
    float2() = default;
    float2(float x, float y) : x(x), y(y) {}
    float2 operator*(float factor) const { return {x * factor, y * factor}; }
};
struct float4 {
    float x, y, z, w;
};
#define device
#define constant
#define thread
#define threadgroup static __attribute__((section("threadgroup_memory")))
extern "C" char __start_threadgroup_memory[] __attribute__((weak)), __stop_threadgroup_memory[] __attribute__((weak));

namespace shim {
struct Meeting {  // of a simdgroup, or of a threadgroup
    uint size = 0, here = 0, gone = 0;
    unsigned long round = 0;
    int line = 0;
    const char* what = "";
    std::vector<uint64_t> given[2];
};
struct Fiber {
    jmp_buf at;
    ucontext_t start;
    std::vector<char> stack;
    bool begun = false, done = false;
    uint index = 0;
    Meeting* waits_for = nullptr;
    unsigned long round = 0;
};
inline std::vector<Fiber> fibers;
inline std::vector<Meeting> simdgroups;
inline Meeting group;
inline Fiber* current;
inline jmp_buf scheduler;
inline std::function<void(uint)> body;
inline std::string error;
inline uint3 place, grid;  // of the threadgroup; of all

[[noreturn]] inline void fail(const std::string& message) {
    error = message;
    _longjmp(scheduler, 2);
}
inline void pause() {
    if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}
// Wait for all members; returns what each has given.
inline const uint64_t* meet(Meeting& m, uint member, uint64_t value, const char* what, int line) {
    if (m.gone) fail(std::string(what) + " on line " + std::to_string(line) + " after a thread has ended");
    if (!m.here) m.what = what, m.line = line;
    if (m.line != line || m.what != what)
        fail(std::string("divergent: ") + m.what + " on line " + std::to_string(m.line) + " meets " + what + " on line " + std::to_string(line));
    const unsigned long round = m.round;
    m.given[round & 1][member] = value;
    if (++m.here == m.size) {
        m.here = 0;
        m.round++;
    } else {
        current->waits_for = &m;
        current->round = round;
        pause();
    }
    return m.given[round & 1].data();
}
template <class T> uint64_t bits(T v) {
    uint64_t u = 0;
    memcpy(&u, &v, sizeof v);
    return u;
}
template <class T> T value(uint64_t u) {
    T v;
    memcpy(&v, &u, sizeof v);
    return v;
}
template <class T> const uint64_t* in_simdgroup(T v, const char* what, int line) {
    return meet(simdgroups[current->index / 32], current->index % 32, bits(v), what, line);
}
inline void run_fiber() {
    body(current->index);
    current->done = true;
    simdgroups[current->index / 32].gone++;
    group.gone++;
    _longjmp(scheduler, 1);
}
inline void run_threadgroup(uint threads, uint seed) {
    if (__start_threadgroup_memory) memset(__start_threadgroup_memory, 0xff, __stop_threadgroup_memory - __start_threadgroup_memory);
    fibers.resize(std::max<size_t>(threads, fibers.size()));
    simdgroups.assign((threads + 31) / 32, Meeting());
    group = Meeting();
    group.size = threads;
    std::vector<uint> order(threads);
    for (uint i = 0; i < threads; i++) {
        order[i] = i;
        fibers[i].begun = fibers[i].done = false;
        fibers[i].index = i;
        fibers[i].waits_for = nullptr;
        fibers[i].stack.resize(128 << 10);
        simdgroups[i / 32].size++;
    }
    for (auto* m : {&group})
        for (auto& g : m->given) g.resize(threads);
    for (auto& m : simdgroups)
        for (auto& g : m.given) g.resize(32);
    std::mt19937 random(seed);
    volatile uint alive = threads;
    while (alive) {
        // With a seed every simdgroup in turn, in any order, goes as far as it can: the worst that a GPU may do.
        if (seed) std::shuffle(order.begin(), order.end(), random);
        const uint first = seed ? order[0] / 32 : 0, parts = seed ? simdgroups.size() : 1;
        bool moved = false;
        for (uint part = 0; part < parts; part++) {
            const uint only = (first + part) % simdgroups.size();
            bool again = true;
            while (again) {
                again = false;
                for (uint i : order) {
                    Fiber& f = fibers[i];
                    if (seed && i / 32 != only) continue;
                    if (f.done || (f.waits_for && f.waits_for->round == f.round)) continue;
                    moved = again = true;
                    f.waits_for = nullptr;
                    current = &f;
                    const int back = _setjmp(scheduler);
                    if (back == 0) {
                        if (f.begun) _longjmp(f.at, 1);
                        f.begun = true;
                        getcontext(&f.start);
                        f.start.uc_stack.ss_sp = f.stack.data();
                        f.start.uc_stack.ss_size = f.stack.size();
                        f.start.uc_link = nullptr;
                        makecontext(&f.start, run_fiber, 0);
                        setcontext(&f.start);
                    }
                    if (back == 2) return;
                    if (current->done) alive = alive - 1;
                }
            }
        }
        if (!moved) {
            for (auto& m : simdgroups)
                if (m.here) { error = std::string("deadlock: ") + m.what + " on line " + std::to_string(m.line) + " is not reached by all threads"; return; }
            error = std::string("deadlock: ") + group.what + " on line " + std::to_string(group.line) + " is not reached by all threads";
            return;
        }
    }
}
}  // namespace shim

#define LINE int line = __builtin_LINE()
#ifndef CUDA_SHIM
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void threadgroup_barrier(mem_flags, LINE) { shim::meet(shim::group, shim::current->index, 0, "threadgroup_barrier", line); }
namespace metal {
template <class T> T simd_shuffle_xor(T v, ushort mask, LINE) {
    return shim::value<T>(shim::in_simdgroup(v, "simd_shuffle_xor", line)[shim::current->index % 32 ^ mask]);
}
template <class T> T simd_shuffle(T v, ushort lane, LINE) {
    return shim::value<T>(shim::in_simdgroup(v, "simd_shuffle", line)[lane]);
}
inline bool simd_any(bool v, LINE) {
    const uint64_t* all = shim::in_simdgroup(v, "simd_any", line);
    bool any = false;
    for (int i = 0; i < 32; i++) any |= shim::value<bool>(all[i]);
    return any;
}
template <class T> T simd_sum(T v, LINE) {
    const uint64_t* all = shim::in_simdgroup(v, "simd_sum", line);
    T sum = shim::value<T>(all[0]);
    for (int i = 1; i < 32; i++) sum += shim::value<T>(all[i]);
    return sum;
}
template <class T> T simd_max(T v, LINE) {
    const uint64_t* all = shim::in_simdgroup(v, "simd_max", line);
    T top = shim::value<T>(all[0]);
    for (int i = 1; i < 32; i++) top = std::max(top, shim::value<T>(all[i]));
    return top;
}
// Apple leaves open where an element lies; MLX's own kernels rely on this.
inline int row_of(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
inline int column_of(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
struct simdgroup_float8x8 {
    float own[2];
    float (&thread_elements())[2] { return own; }
};
struct Tile {
    float at[8][8];
    Tile(const simdgroup_float8x8& m, const char* what, int line) {
        const uint64_t* all = shim::in_simdgroup(m, what, line);
        for (uint lane = 0; lane < 32; lane++) {
            const auto pair = shim::value<simdgroup_float8x8>(all[lane]);
            for (int i = 0; i < 2; i++) at[row_of(lane)][column_of(lane) + i] = pair.own[i];
        }
    }
};
inline void simdgroup_multiply_accumulate(simdgroup_float8x8& d, simdgroup_float8x8 a, simdgroup_float8x8 b, simdgroup_float8x8 c, LINE) {
    const Tile left(a, "simdgroup_multiply_accumulate", line), right(b, "simdgroup_multiply_accumulate", line);
    const uint lane = shim::current->index % 32;
    d = c;
    for (int i = 0; i < 2; i++)
        for (int k = 0; k < 8; k++) d.own[i] += left.at[row_of(lane)][k] * right.at[k][column_of(lane) + i];
}
inline float exp2(float x) { return std::exp2(x); }
inline float sqrt(float x) { return std::sqrt(x); }
inline float abs(float x) { return std::fabs(x); }
inline float ceil(float x) { return std::ceil(x); }
template <class T> T max(T a, T b) { return a > b ? a : b; }
template <class T> T min(T a, T b) { return a < b ? a : b; }
template <class T> T clamp(T v, T low, T high) { return min(max(v, low), high); }
template <class T, class U> T as_type_(U from) {
    static_assert(sizeof(T) == sizeof(U), "as_type between sizes");
    return shim::value<T>(shim::bits(from));
}
}  // namespace metal
#define as_type metal::as_type_
using namespace metal;
#endif
