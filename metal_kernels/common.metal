// Shared by all kernels here; their .metal files hold bodies, which mx.fast.metal_kernel wraps in a signature.
//
// A vector lies in neighbouring lanes of a simdgroup, sixteen coordinates a lane: chunk c holds coordinates
// 16 c to 16 c + 15. Groups of LANES lanes work on different vectors; in a group the lanes from CHUNKS on idle.

template <int D> struct Lanes {
    static constexpr int CHUNKS = D / 16;
    static constexpr int LANES = CHUNKS <= 1 ? 1 : CHUNKS <= 2 ? 2 : CHUNKS <= 4 ? 4 : CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32;
    static constexpr int GROUPS = 32 / LANES;  // vectors a simdgroup works on at once
};

// Words of the packed codes of one vector: KVFormat.k_bytes / 4 or v_bytes / 4.
template <int D, int BITS> struct Packed {
    static constexpr int PAIRS = (D + 31) / 32;
    static constexpr int WORDS = BITS == 3 ? 3 * PAIRS : D * BITS / 32;
};

// Number of chunks in the Hadamard block that chunk c lies in: blocks are falling powers of two.
TQAI_FN int hadamard_chunks(int chunks, int c) {
    int start = 0;
    for (int size = 32; size > 0; size >>= 1) {
        if (chunks & size) {
            if (c < start + size) return size;
            start += size;
        }
    }
    return 1;
}

// Orthonormal block Walsh-Hadamard transform, strides 1, 2, 4 ... as core.reference adds them.
template <int D> TQAI_FN void hadamard(thread float (&y)[16], int c) {
    UNROLL for (int stride = 1; stride < 16; stride <<= 1)
        UNROLL for (int i = 0; i < 16; i++)
            if (!(i & stride)) {
                const float a = y[i], b = y[i + stride];
                y[i] = a + b;
                y[i + stride] = a - b;
            }
    const int block = hadamard_chunks(Lanes<D>::CHUNKS, c);
    UNROLL for (int stride = 1; stride < Lanes<D>::LANES; stride <<= 1)
        UNROLL for (int i = 0; i < 16; i++) {
            const float other = simd_shuffle_xor(y[i], ushort(stride));
            if (stride < block) y[i] = c & stride ? other - y[i] : y[i] + other;
        }
    // 1 / sqrt(16 block), rounded once
    float norm = 0.25f;
    for (int size = block; size > 1; size >>= 2) norm *= size == 2 ? 0.70710678118654752f : 0.5f;
    UNROLL for (int i = 0; i < 16; i++) y[i] *= norm;
}

// The sum over the lanes of a group; every lane gets the same bits.
template <int D> TQAI_FN float group_sum(float x) {
    UNROLL for (int stride = 1; stride < Lanes<D>::LANES; stride <<= 1) x += simd_shuffle_xor(x, ushort(stride));
    return x;
}

template <int D> TQAI_FN float group_max(float x) {
    UNROLL for (int stride = 1; stride < Lanes<D>::LANES; stride <<= 1) x = metal::max(x, simd_shuffle_xor(x, ushort(stride)));
    return x;
}

// Bit of coordinate i (0 to 15) in the sign word of its pair of chunks, for the second chunk of the pair.
TQAI_FN int sign_bit(int i) { return 8 * (i >> 2) + (i & 1) + 2 * (i & 2); }

// A lane's share of the table of levels, of which every lane needs any: see simd_table in the preludes.
template <int BITS> TQAI_FN int table_place(int lane) { return BITS == 8 ? 0 : lane % (1 << BITS); }

// Sixteen levels of chunk c of the vector whose packed codes begin at `words`. All lanes of a simdgroup come here
// at once: `table` is tables[table_place] of each, and a look-up is a shuffle, whose index counts modulo the table.
template <int D, int BITS, typename Words>
TQAI_FN void levels(Words words, float table, int c, thread float (&out)[16]) {
    if (BITS == 8) {
        UNROLL for (int w = 0; w < 4; w++) {
            const uint word = words[4 * c + w];
            UNROLL for (int i = 0; i < 4; i++) out[4 * w + i] = float(int(word << (24 - 8 * i)) >> 24) + 0.5f;
        }
    } else if (BITS == 4) {
        UNROLL for (int w = 0; w < 2; w++) {
            const uint word = words[2 * c + w];
            UNROLL for (int i = 0; i < 8; i++) out[8 * w + i] = simd_table(table, word >> (4 * i));
        }
    } else if (BITS == 3) {
        const uint low = words[c];
        const uint signs = words[2 * Packed<D, BITS>::PAIRS + (c >> 1)] >> (c & 1 ? 0 : 2);
        UNROLL for (int i = 0; i < 16; i++) out[i] = simd_table(table, (low >> (2 * i) & 3u) | (signs >> sign_bit(i) & 1u) << 2);
    } else {
        const uint word = words[c];
        UNROLL for (int i = 0; i < 16; i++) out[i] = simd_table(table, word >> (2 * i));
    }
}

// The float16 scales of a slot's last word, times what a level is worth.
TQAI_FN float key_scale(uint word) { return float(as_type<half>(ushort(word & 0xffffu))) * (1.0f / SCALE_DENOMINATOR); }
TQAI_FN float value_scale(uint word) { return float(as_type<half>(ushort(word >> 16))) * (1.0f / SCALE_DENOMINATOR); }

// Attention of G query heads over tokens that lie one a group of lanes, U of them one after the other.
// score[g][u] = scale * query[g] . key, over all lanes of the group; nothing for a token that is not there.
template <int D, int G, int U>
TQAI_FN void dots(thread const float (&query)[G][16], thread const float (&key)[16], float scale, bool live, int u, thread float (&score)[G][U]) {
    UNROLL for (int g = 0; g < G; g++) {
        float dot = 0.0f;
        UNROLL for (int i = 0; i < 16; i++) dot += query[g][i] * key[i];
        dot = group_sum<D>(dot) * scale;
        score[g][u] = live ? dot : -3e38f;
    }
}

// Scores to weights under the running base-2 maximum `top`, times what the value's levels are worth.
template <int G, int U>
TQAI_FN void soften(thread float (&score)[G][U], thread const float (&worth)[U], thread float (&top)[G], thread float (&total)[G], thread float (&sum)[G][16]) {
    UNROLL for (int g = 0; g < G; g++) {
        float highest = score[g][0];
        UNROLL for (int u = 1; u < U; u++) highest = metal::max(highest, score[g][u]);
        if (highest > top[g]) {
            const float shrink = metal::exp2(top[g] - highest);
            top[g] = highest;
            total[g] *= shrink;
            UNROLL for (int i = 0; i < 16; i++) sum[g][i] *= shrink;
        }
        UNROLL for (int u = 0; u < U; u++) {
            score[g][u] = metal::exp2(score[g][u] - top[g]);
            total[g] += score[g][u];
            score[g][u] *= worth[u];
        }
    }
}

template <int G, int U>
TQAI_FN void add(thread const float (&weight)[G][U], thread const float (&value)[16], int u, thread float (&sum)[G][16]) {
    UNROLL for (int g = 0; g < G; g++)
        UNROLL for (int i = 0; i < 16; i++) sum[g][i] += weight[g][u] * value[i];
}
