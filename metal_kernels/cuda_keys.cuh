// Keys of codes on NVIDIA's matrix unit, in bytes: a level is a byte plus 1/2 (core.codebook), so four codes are one look-up
// and nothing has to be put together. A query is rounded to whole numbers of 16 bits, 256 times a byte plus another, which take
// rows of tiles that heads leave idle. All of it is exact but for that.

struct KeyLevels {
    uint bytes[2];  // of four bits those of positive levels
};
struct Query {  // a lane's part of a round: eight coordinates, their high bytes and the others in turn
    uint of[4];
};
struct Keys {
    uint of[2];
};
struct Products {
    int of[4];
};
struct Head {
    float factor, halves;  // of its whole numbers: what one is worth, and half of all
};
#define QUERY_TOP 32512.0f  // 256 times 127; sums of 512 products by levels stay below 2^31
template <int D> struct Planes {  // four of a vector, then its Head
    TQAI_CONSTANT WORDS = D / 8, LENGTH = D / 2 + 4;
};

template <int BITS, typename Numbers> TQAI_FN KeyLevels kept_keys(Numbers table, int) {
    KeyLevels levels = {{0, 0}};
    UNROLL for (int code = 0; code < (BITS == 2 ? 4 : BITS == 8 ? 0 : 8); code++)
        levels.bytes[code / 4] |= (uint(int(table[code] - 0.5f)) & 255u) << (8 * (code % 4));
    return levels;
}

template <int BITS, int D, int PER, typename Numbers>
TQAI_FN void put_query(float (&query)[PER], int chunk, bool mine, int row, Numbers vectors) {
    float top = 0.0f, sum = 0.0f;
    UNROLL for (int i = 0; i < PER; i++) top = metal::max(top, metal::abs(query[i]));
    top = group_max<Lanes<D, PER>::LANES>(top);
    const float more = top > 0.0f ? QUERY_TOP / top : 0.0f;
    UNROLL for (int i = 0; i < PER; i++) sum += query[i] = rintf(query[i] * more);
    sum = group_sum<Lanes<D, PER>::LANES>(sum);
    if (!mine) return;
    const Numbers own = vectors + row * Planes<D>::LENGTH;
    uint* words = reinterpret_cast<uint*>(own);
    UNROLL for (int part = 0; part < PER / 8; part++)
        UNROLL for (int k = 0; k < 2; k++) {
            uint high = 0, rest = 0;
            UNROLL for (int i = 0; i < 4; i++) {
                const int x = int(query[8 * part + order<BITS>(4 * k + i)]), over = (x + 128) >> 8;
                high |= (uint(over) & 255u) << (8 * i);
                rest |= (uint(x - 256 * over) & 255u) << (8 * i);
            }
            const int at = PER / 8 * chunk + part;
            words[2 * k * Planes<D>::WORDS + at] = high;
            words[(2 * k + 1) * Planes<D>::WORDS + at] = rest;
        }
    if (chunk == 0) {
        own[D / 2] = top / QUERY_TOP;
        own[D / 2 + 1] = 0.5f * sum * (top / QUERY_TOP);
    }
}
template <int BITS, int D, typename Numbers> TQAI_FN void read_query(Numbers vectors, int lane, int round, Query& out) {
    const uint* words = reinterpret_cast<const uint*>(vectors + tile_row(lane) * Planes<D>::LENGTH);
    const bool real = coordinate<BITS, D, 1>(round, 0, tile_column(lane)) >= 0;
    UNROLL for (int k = 0; k < 4; k++) out.of[k] = real ? words[k * Planes<D>::WORDS + own_chunk<BITS, D, 1>(lane, round)] : 0u;
}
template <int D, typename Numbers> TQAI_FN Head head_of(Numbers vectors, int lane) {
    const Numbers own = vectors + tile_row(lane) * Planes<D>::LENGTH;
    return {own[D / 2], own[D / 2 + 1]};
}

template <int BITS> TQAI_FN void unpack_keys(const uint (&share)[1][Share<BITS>::WORDS], KeyLevels levels, int c, Keys& out) {
    const uint first = share[0][0], last = share[0][Share<BITS>::WORDS - 1];
    if (BITS == 8) {
        out = {{first, last}};
    } else if (BITS == 4) {
        const uint sizes = first & 0x77777777u, even = first << 4;  // signs are top bits of `even` and of `first`
        out.of[0] = pick(levels.bytes[0], levels.bytes[1], sizes) ^ pick(even, first, 0xd9c8u);
        out.of[1] = pick(levels.bytes[0], levels.bytes[1], sizes >> 16) ^ pick(even, first, 0xfbeau);
    } else {
        const uint codes = first >> (16 * (c & 1)), signs = BITS == 3 ? last >> (16 * (c & 1) + (c & 2 ? 0 : 2)) : 0u;
        UNROLL for (int k = 0; k < 2; k++)
            out.of[k] = pick(levels.bytes[0], levels.bytes[1], (codes >> (2 * k) & 0x3333u) | (signs >> k & 0x1111u) << 2);
    }
}
TQAI_FN Products no_products() { return {}; }
TQAI_FN void multiply_keys(const Query& query, const Keys& keys, Products& products) {
    int(&d)[4] = products.of;
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(query.of[0]), "r"(query.of[1]), "r"(query.of[2]), "r"(query.of[3]), "r"(keys.of[0]), "r"(keys.of[1]));
}
TQAI_FN float product_of(Products products, int i, Head head) {
    return float(256 * products.of[i] + products.of[i + 2]) * head.factor + head.halves;
}
