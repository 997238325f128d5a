// Shared by all kernels here; their .metal files hold bodies, which mx.fast.metal_kernel wraps in a signature.
//
// A vector lies in neighbouring lanes of a simdgroup, PER coordinates (8 or 16) a lane: chunk c holds coordinates
// PER c to PER c + PER - 1. Groups of LANES lanes work on different vectors; in a group the lanes from CHUNKS on idle.

template <int D, int PER> struct Lanes {
    static constexpr int CHUNKS = D / PER;
    static constexpr int LANES = CHUNKS <= 1 ? 1 : CHUNKS <= 2 ? 2 : CHUNKS <= 4 ? 4 : CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32;
    static constexpr int GROUPS = 32 / LANES;  // vectors a simdgroup works on at once
};

// Where codes are told apart by their BITS, those of vector values are VECTOR: bytes for four coordinates each.
template <int BITS> struct Width {
    static constexpr int OF_ONE = BITS == VECTOR ? 2 : BITS;
};

// Words of the packed codes of one vector: KVFormat.k_bytes / 4 or v_bytes / 4.
template <int D, int BITS> struct Packed {
    static constexpr int PAIRS = (D + 31) / 32;
    static constexpr int WORDS = BITS == 3 ? 3 * PAIRS : D * Width<BITS>::OF_ONE / 32;
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
template <int D, int PER> TQAI_FN void hadamard(thread float (&y)[PER], int c) {
    UNROLL for (int stride = 1; stride < PER; stride <<= 1)
        UNROLL for (int i = 0; i < PER; i++)
            if (!(i & stride)) {
                const float a = y[i], b = y[i + stride];
                y[i] = a + b;
                y[i + stride] = a - b;
            }
    const int block = hadamard_chunks(Lanes<D, PER>::CHUNKS, c);
    UNROLL for (int stride = 1; stride < Lanes<D, PER>::LANES; stride <<= 1)
        UNROLL for (int i = 0; i < PER; i++) {
            const float other = simd_shuffle_xor(y[i], ushort(stride));
            if (stride < block) y[i] = c & stride ? other - y[i] : y[i] + other;
        }
    float norm = 1.0f;  // 1 / sqrt(PER block), rounded once
    for (int size = PER * block; size > 1; size >>= 2) norm *= size == 2 ? 0.70710678118654752f : 0.5f;
    UNROLL for (int i = 0; i < PER; i++) y[i] *= norm;
}

// The sum over neighbouring lanes; every one of them gets the same bits.
template <int LANES> TQAI_FN float group_sum(float x) {
    UNROLL for (int stride = 1; stride < LANES; stride <<= 1) x += simd_shuffle_xor(x, ushort(stride));
    return x;
}

template <int LANES> TQAI_FN float group_max(float x) {
    UNROLL for (int stride = 1; stride < LANES; stride <<= 1) x = metal::max(x, simd_shuffle_xor(x, ushort(stride)));
    return x;
}

// Bit of coordinate i (0 to 15) in the sign word of its pair of chunks, for the second chunk of the pair.
TQAI_FN int sign_bit(int i) { return 8 * (i >> 2) + (i & 1) + 2 * (i & 2); }

// The words that hold the PER codes of a lane, as they lie in memory: asked for long before they are unpacked, by
// all lanes of a simdgroup at once: see Levels in the preludes.
template <int BITS, int PER> struct Share {
    static constexpr int WORDS = BITS == 3 ? 2 : (PER * Width<BITS>::OF_ONE + 31) / 32;
};
template <int BITS, int PER, int D, typename Words>
TQAI_FN void fetch(Words words, int c, thread uint (&share)[Share<BITS, PER>::WORDS]) {
    const int sixteen = c * PER / 16;
    if (BITS == 8 || BITS == 4) {
        UNROLL for (int w = 0; w < Share<BITS, PER>::WORDS; w++) share[w] = words[Share<BITS, PER>::WORDS * c + w];
    } else {
        share[0] = words[sixteen];
        if (BITS == 3) share[Share<BITS, PER>::WORDS - 1] = words[2 * Packed<D, BITS>::PAIRS + (sixteen >> 1)];
    }
}
template <int BITS, int PER>
TQAI_FN void unpack(thread const uint (&share)[Share<BITS, PER>::WORDS], Levels levels, int c, thread float (&out)[PER]) {
    const int sixteen = c * PER / 16, half_of_it = PER == 16 ? 0 : 16 * (c & 1);
    if (BITS == 8) {
        UNROLL for (int i = 0; i < PER; i++) out[i] = float(int(share[i / 4] << (24 - 8 * (i & 3))) >> 24) + 0.5f;
    } else if (BITS == 4) {
        UNROLL for (int i = 0; i < PER; i += 8) eight<BITS>(levels, share[i / 8], out + i);
    } else if (BITS == 3) {
        const uint low = share[0] >> half_of_it;
        const uint signs = share[Share<BITS, PER>::WORDS - 1] >> ((sixteen & 1 ? 0 : 2) + half_of_it);
        UNROLL for (int i = 0; i < PER; i++) out[i] = one(levels, (low >> (2 * i) & 3u) | (signs >> sign_bit(i) & 1u) << 2);
    } else if (BITS == VECTOR) {  // a level is the pattern's four magnitudes, less the one half
        UNROLL for (int i = 0; i < PER; i += 4) {
            const uint code = share[0] >> (half_of_it + 2 * i), pattern = as_type<uint>(one(levels, code));
            UNROLL for (int j = 0; j < 4; j++) {
                const float size = float(pattern >> (8 * j) & 255u) + 0.5f;
                out[i + j] = code >> (PATTERN_BITS + j) & 1u ? -size : size;
            }
        }
    } else {
        UNROLL for (int i = 0; i < PER; i += 8) eight<BITS>(levels, share[0] >> (half_of_it + 2 * i), out + i);
    }
}

// Of four sizes on a grid, the index of the closest pattern (vector_codebook.half_energies), the first of equals; what
// the pattern adds to the sums of sizes times levels and of levels times levels goes to `along` and `energy`.
template <typename Numbers>
TQAI_FN uint nearest(Numbers patterns, thread const float* size, float grid, thread float& along, thread float& energy) {
    uint found = 0u;
    float best = -3e38f, product = 0.0f, square = 0.0f;
    for (uint k = 0u; k < 1u << PATTERN_BITS; k++) {
        float dot = 0.0f, squares = 0.0f;
        UNROLL for (int j = 0; j < 4; j++) {
            const float magnitude = patterns[4 * k + j];
            dot += size[j] * magnitude;
            squares += magnitude * magnitude;
        }
        const float merit = dot - grid * (squares * 0.5f);
        if (merit > best) {
            found = k;
            best = merit;
            product = dot;
            square = squares;
        }
    }
    along += product;
    energy += square;
    return found;
}

// The float16 scales of a slot's last word, times what a level is worth.
TQAI_FN float key_scale(uint word) { return float(as_type<half>(ushort(word & 0xffffu))) * (1.0f / SCALE_DENOMINATOR); }
TQAI_FN float value_scale(uint word) { return float(as_type<half>(ushort(word >> 16))) * (1.0f / SCALE_DENOMINATOR); }

// Attention of G query heads over U tokens at once, G and U powers of two. In lane c of a group, slot j is head
// j ^ (c % G) and slot u is token u ^ (c / G % U): so lane c ends up with the score of its slots 0, 0, and slots j, u
// are in the hands of lane c ^ (j + G u). Shuffles need no selection then, and a weight is computed once.
template <int G, int U, int PER>
TQAI_FN void dots(thread const float (&query)[G][PER], thread const float (&key)[PER], int u, thread float (&score)[G][U]) {
    UNROLL for (int g = 0; g < G; g++) {
        score[g][u] = 0.0f;
        UNROLL for (int i = 0; i < PER; i++) score[g][u] += query[g][i] * key[i];
    }
}

// The lane's own score, summed over the group.
template <int G, int U, int LANES> TQAI_FN float own_score(thread float (&score)[G][U]) {
    UNROLL for (int stride = 1; stride < G; stride <<= 1)
        UNROLL for (int g = 0; g < G; g += 2 * stride)
            UNROLL for (int u = 0; u < U; u++) score[g][u] += simd_shuffle_xor(score[g + stride][u], ushort(stride));
    UNROLL for (int stride = 1; stride < U; stride <<= 1)
        UNROLL for (int u = 0; u < U; u += 2 * stride) score[0][u] += simd_shuffle_xor(score[0][u + stride], ushort(G * stride));
    UNROLL for (int stride = G * U; stride < LANES; stride <<= 1) score[0][0] += simd_shuffle_xor(score[0][0], ushort(stride));
    return score[0][0];
}

// What lane c ^ (j + G u) holds.
template <int G> TQAI_FN float of_slots(float x, int j, int u) {
    return j + G * u == 0 ? x : simd_shuffle_xor(x, ushort(j + G * u));
}

// The lane's score to its weight under the head's running base-2 maximum `top`; `total` is that of the lane's tokens.
template <int G, int U, int PER>
TQAI_FN float weigh(float score, thread float& top, thread float& total, thread float (&sum)[G][PER]) {
    float highest = score;
    UNROLL for (int stride = G; stride < G * U; stride <<= 1) highest = metal::max(highest, simd_shuffle_xor(highest, ushort(stride)));
    if (simd_any(highest > top)) {
        highest = metal::max(highest, top);
        const float shrink = metal::exp2(top - highest);
        top = highest;
        total *= shrink;
        UNROLL for (int g = 0; g < G; g++) {
            const float factor = of_slots<G>(shrink, g, 0);
            UNROLL for (int i = 0; i < PER; i++) sum[g][i] *= factor;
        }
    }
    const float weight = metal::exp2(score - top);
    total += weight;
    return weight;
}

template <int G, int PER>
TQAI_FN void add(float weight, thread const float (&value)[PER], int u, thread float (&sum)[G][PER]) {
    UNROLL for (int g = 0; g < G; g++) {
        const float share = of_slots<G>(weight, g, u);
        UNROLL for (int i = 0; i < PER; i++) sum[g][i] += share * value[i];
    }
}
