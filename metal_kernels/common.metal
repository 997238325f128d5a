// Shared by all kernels here; their .metal files hold bodies, which mx.fast.metal_kernel wraps in a signature.
//
// To be rotated, a vector lies in neighbouring lanes of a simdgroup, PER coordinates a lane: chunk c holds coordinates
// PER c to PER c + PER - 1. Groups of LANES lanes work on different vectors; in a group the lanes from CHUNKS on idle.

template <int D, int PER> struct Lanes {
    TQAI_CONSTANT CHUNKS = D / PER;
    TQAI_CONSTANT LANES = CHUNKS <= 1 ? 1 : CHUNKS <= 2 ? 2 : CHUNKS <= 4 ? 4 : CHUNKS <= 8 ? 8 : CHUNKS <= 16 ? 16 : 32;
    TQAI_CONSTANT GROUPS = 32 / LANES;  // vectors a simdgroup works on at once
};

// Words of the packed codes of one vector: KVFormat.k_bytes / 4 or v_bytes / 4. Where codes are told apart by their BITS, those
// of vector values are VECTOR: bytes for four coordinates each.
template <int D, int BITS> struct Packed {
    TQAI_CONSTANT PAIRS = (D + 31) / 32;
    TQAI_CONSTANT WORDS = BITS == 3 ? 3 * PAIRS : D * (BITS == VECTOR ? 2 : BITS) / 32;
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

// Four numbers at once, as memory takes and gives them.
TQAI_FN float4 four(float x, float y, float z, float w) {
    float4 all;
    all.x = x;
    all.y = y;
    all.z = z;
    all.w = w;
    return all;
}
TQAI_FN void add(float4 more, float share, thread float* sum) {
    sum[0] += more.x * share;
    sum[1] += more.y * share;
    sum[2] += more.z * share;
    sum[3] += more.w * share;
}

// Bit of coordinate i (0 to 15) in the sign word of its pair of chunks, for the second chunk of the pair.
TQAI_FN int sign_bit(int i) { return 8 * (i >> 2) + (i & 1) + 2 * (i & 2); }

// The words that hold the eight codes of chunk c, as they lie in memory.
template <int BITS> struct Share {
    TQAI_CONSTANT WORDS = BITS == 8 || BITS == 3 ? 2 : 1;
};
// Where in a vector's codes word w of them is.
template <int BITS, int D> TQAI_FN int word_of(int c, int w) {
    return BITS == 8 ? 2 * c + w : BITS == 4 ? c : w ? 2 * Packed<D, BITS>::PAIRS + (c >> 2) : c >> 1;
}

// Element i of a fragment of a chunk's numbers: two of a token, or one of each of two.
template <int BITS, int TOKENS> TQAI_FN float element(thread const float (&numbers)[TOKENS][8], int fragment, int i) {
    return TOKENS == 1 ? numbers[0][order<BITS>(2 * fragment + i)] : numbers[i % TOKENS][order<BITS>(fragment)];
}

// Levels of chunk c of one or two tokens, by fragments. All lanes of a simdgroup at once: see Levels in the preludes.
template <int BITS, int TOKENS>
TQAI_FN void unpack(thread const uint (&share)[TOKENS][Share<BITS>::WORDS], Levels levels, int c, thread Coarse (&out)[4 * TOKENS]) {
    if (picked<BITS, TOKENS>(levels, share, c, out)) return;
    float level[TOKENS][8];
    UNROLL for (int t = 0; t < TOKENS; t++) {
        const uint first = BITS == 2 || BITS == 3 || BITS == VECTOR ? share[t][0] >> 16 * (c & 1) : share[t][0];
        const uint last = share[t][Share<BITS>::WORDS - 1];
        UNROLL for (int i = 0; i < 8; i++) {
            if (BITS == 8) {
                level[t][i] = number((i < 4 ? first : last) ^ 0x80808080u, i & 3, -127.5f);
            } else if (BITS == VECTOR) {  // a level is one of the pattern's four magnitudes, less the one half
                const uint code = first >> (i & 4) * 2, pattern = as_type<uint>(one(levels, code));
                const float size = number(pattern, i & 3, 0.5f);
                level[t][i] = code >> (PATTERN_BITS + (i & 3)) & 1u ? -size : size;
            } else if (BITS == 3) {
                const uint sign = last >> (16 * (c & 1) + (c & 2 ? 0 : 2) + sign_bit(i)) & 1u;
                level[t][i] = one(levels, (first >> (2 * i) & 3u) | sign << 2);
            } else {
                level[t][i] = one(levels, first >> (BITS * i));
            }
        }
    }
    UNROLL for (int m = 0; m < 4 * TOKENS; m++) out[m] = coarse(element<BITS>(level, m, 0), element<BITS>(level, m, 1));
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

// The float16 scales of a slot's last word: SCALE_DENOMINATOR times what a level is worth.
TQAI_FN float key_scale(uint word) { return float(as_type<half>(ushort(word & 0xffffu))); }
TQAI_FN float value_scale(uint word) { return float(as_type<half>(ushort(word >> 16))); }

// Attention on the matrix unit, by tiles of 8 query heads, 8 tokens and 8 coordinates. On the right stand keys (coordinates by
// tokens) or values (tokens by coordinates), of which a lane has two neighbours in a column, or in a row: two coordinates of
// one token, or one of two TOKENS. So it unpacks chunks of 8 coordinates, of so many tokens. Their chunks are shared by
// 4 TOKENS lanes, in rounds, each of which makes 4 TOKENS fragments: a lane's parts of tiles.
template <int TOKENS> TQAI_FN int token_of(int lane, int i) { return TOKENS == 1 ? tile_row(lane) : tile_column(lane) + i; }
// Which chunk is a round's: neighbours for neighbours among the lanes of a token, or two of one word for each, where that leaves
// none idle; the last chunk where there is no other.
template <int BITS, int D, int TOKENS> TQAI_FN int chunk_of(int neighbour, int round) {
    constexpr bool TWO = (BITS < 4 || BITS == VECTOR) && D / 8 % (8 * TOKENS) == 0;
    return TWO ? 8 * TOKENS * (round / 2) | 2 * neighbour | round % 2 : 4 * TOKENS * round + metal::min(neighbour, D / 8 - 1 - 4 * TOKENS * round);
}
template <int BITS, int D, int TOKENS> TQAI_FN int own_chunk(int lane, int round) {
    return chunk_of<BITS, D, TOKENS>(TOKENS == 1 ? tile_column(lane) / 2 : tile_row(lane), round);
}
// Which coordinate is in line k of the tile of a fragment; -1 if none.
template <int BITS, int D, int TOKENS> TQAI_FN int coordinate(int round, int fragment, int k) {
    const int neighbour = TOKENS == 1 ? k / 2 : k, i = TOKENS == 1 ? 2 * fragment + k % 2 : fragment;
    return 4 * TOKENS * round + neighbour < D / 8 ? 8 * chunk_of<BITS, D, TOKENS>(neighbour, round) + order<BITS>(i) : -1;
}

// Where coordinate c of a vector lies in threadgroup memory, so that lanes read and write different banks.
TQAI_FN int spread(int c) { return c + c / 32; }

// Vectors of heads, in rows as long as this, and as the tiles of keys meet them.
template <int D> struct Row {
    TQAI_CONSTANT LENGTH = D + D / 32;
};
template <int D, int PER, typename Numbers> TQAI_FN void put_vector(thread const float (&x)[PER], int chunk, int row, Numbers vectors) {
    UNROLL for (int i = 0; i < PER; i++) vectors[row * Row<D>::LENGTH + spread(PER * chunk + i)] = x[i];
}
template <int BITS, int D, int TOKENS, typename Numbers>
TQAI_FN void read_vectors(Numbers vectors, int lane, int round, thread Fine (&out)[4 * TOKENS]) {
    UNROLL for (int m = 0; m < 4 * TOKENS; m++) {
        float x[2];
        UNROLL for (int i = 0; i < 2; i++) {
            const int at = coordinate<BITS, D, TOKENS>(round, m, tile_column(lane) + i);
            x[i] = at >= 0 ? vectors[tile_row(lane) * Row<D>::LENGTH + spread(at)] : 0.0f;
        }
        out[m] = fine(x[0], x[1]);
    }
}
