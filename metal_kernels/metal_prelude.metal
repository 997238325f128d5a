// What GPUs say in words of their own, in Metal's; cuda_prelude.cuh says the same in CUDA.
#define TQAI_FN inline
#define TQAI_CONSTANT static constant constexpr const int  // of a struct
#define UNROLL _Pragma("unroll")
// The value of lane `index` modulo 32.
TQAI_FN float simd_table(float v, uint index) { return metal::simd_shuffle(v, ushort(index & 31u)); }
// What was asked for is asked for here: a compiler may put that off until it is needed, as NVIDIA's does.
TQAI_FN void no_later() {}
// Byte i of a word, plus half a whole number.
TQAI_FN float number(uint word, int i, float more) { return float(word >> (8 * i) & 255u) + more; }
template <typename Row> TQAI_FN void load(Row row, thread float (&out)[8]) { UNROLL for (int i = 0; i < 8; i++) out[i] = float(row[i]); }

// Tiles of the matrix unit, 8 x 8. Of each, a lane has two neighbours of a row, where MLX's own kernels (BaseMMAFrag in its
// steel/gemm/mma.h) take Apple's simdgroup_matrix to have them: Fine of left factors, Coarse of right ones, Sums of products.
typedef float2 Fine, Coarse, Sums, Pair;
#define KEY_TOKENS 2  // of a tile, whose keys a lane has: see common.metal
#define VALUE_TOKENS 1
#define ROW_LANES 9  // bits that tell the lanes of a row apart
TQAI_FN int tile_row(int lane) { return (lane >> 2 & 4) | (lane >> 1 & 3); }
TQAI_FN int tile_column(int lane) { return (lane >> 1 & 4) | (lane & 1) << 1; }
TQAI_FN float2 coarse(float x, float y) {
    float2 pair;
    pair.x = x;
    pair.y = y;
    return pair;
}
TQAI_FN float2 fine(float x, float y) { return coarse(x, y); }
TQAI_FN Sums nothing() { return coarse(0.0f, 0.0f); }
TQAI_FN float of(float2 pair, int i) { return i ? pair.y : pair.x; }
TQAI_FN void fill(thread simdgroup_float8x8& tile, float2 pair) {
    tile.thread_elements()[0] = pair.x;
    tile.thread_elements()[1] = pair.y;
}
// sums += a b
TQAI_FN void multiply_add(Fine a, Fine b, thread Sums& sums) {
    simdgroup_float8x8 left, right, tile;
    fill(left, a);
    fill(right, b);
    fill(tile, sums);
    simdgroup_multiply_accumulate(tile, left, right, tile);
    sums = coarse(tile.thread_elements()[0], tile.thread_elements()[1]);
}
// sums += a0 b0 + a1 b1
TQAI_FN void multiply_add(Fine a0, Fine a1, Coarse b0, Coarse b1, thread Sums& sums) {
    multiply_add(a0, b0, sums);
    multiply_add(a1, b1, sums);
}
// Sums of values, of which a lane has two of a head; those of two fragments, a and b, grow by w0 a0 + w1 a1 and w0 b0 + w1 b1.
TQAI_FN Pair pair(float x, float y) { return coarse(x, y); }
TQAI_FN int sum_head(int lane, int) { return tile_row(lane); }
TQAI_FN int sum_line(int lane, int i) { return tile_column(lane) + i; }
// What a lane needs of its head's number x, to scale its sums.
TQAI_FN Pair by_heads(float x, int) { return pair(x, x); }
TQAI_FN void scale(thread Pair& sums, Pair factors) { sums = pair(sums.x * factors.x, sums.y * factors.y); }
TQAI_FN void multiply_values(Fine w0, Fine w1, Coarse a0, Coarse b0, Coarse a1, Coarse b1, thread Pair& a, thread Pair& b) {
    multiply_add(w0, w1, a0, a1, a);
    multiply_add(w0, w1, b0, b1, b);
}
TQAI_FN void multiply_values(Fine w, Fine a0, Fine b0, thread Pair& a, thread Pair& b) {
    multiply_add(w, a0, a);
    multiply_add(w, b0, b);
}

// Levels by their codes: a lane keeps one, and a look-up is a shuffle, whose index counts modulo the table.
typedef float Levels;
template <int BITS, typename Numbers> TQAI_FN Levels kept(Numbers table, int lane) { return table[lane % (1 << BITS) % 16]; }
TQAI_FN float one(Levels levels, uint code) { return simd_table(levels, code); }
// The order in which fragments take the coordinates of a chunk: NVIDIA's finds levels of narrow codes out of turn.
template <int BITS> TQAI_FN int order(int i) { return i; }
template <int BITS, int TOKENS, typename Share> TQAI_FN bool picked(Levels, Share, int, thread Coarse*) { return false; }
