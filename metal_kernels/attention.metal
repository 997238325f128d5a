// Attention of a simdgroup, after common.metal and what the GPU does with keys of codes (metal_keys.metal, cuda_keys.cuh).

// Reductions over the lanes of a row.
TQAI_FN float row_max(float x) {
    x = metal::max(x, simd_shuffle_xor(x, ushort(1)));
    return metal::max(x, simd_shuffle_xor(x, ushort(ROW_LANES - 1)));
}
TQAI_FN float row_sum(float x) {
    x += simd_shuffle_xor(x, ushort(1));
    return x + simd_shuffle_xor(x, ushort(ROW_LANES - 1));
}

// What a lane has of its simdgroup's work on a KV head's tokens up to `last`: words of two tiles of codes, asked for long before
// they are unpacked, exact tokens, and what came of them under the head's running base-2 maximum `top`; `total` is of
// the lane's tokens only.
template <int HEAD_DIM, int KEY_BITS, int VALUE_BITS, typename Words, typename Rows, typename Numbers> struct Work {
    TQAI_CONSTANT D = HEAD_DIM, BK = KEY_BITS, BV = VALUE_BITS, KT = KEY_TOKENS, VT = VALUE_TOKENS;
    TQAI_CONSTANT KR = (D / 8 + 4 * KT - 1) / (4 * KT), VR = (D / 8 + 4 * VT - 1) / (4 * VT);  // rounds
    TQAI_CONSTANT KW = Packed<D, BK>::WORDS, WORDS = KW + Packed<D, BV>::WORDS + 1;
    TQAI_CONSTANT KEPT = D <= 128;  // queries, in registers
    typedef Words Slots;
    int lane, last;
    Slots slots;
    KeyLevels key_levels;
    Levels value_levels;
    Head head;
    uint key[2][KR][KT][Share<BK>::WORDS], value[2][VR][VT][Share<BV>::WORDS], scales[2][2];
    Numbers bias;  // what scores of codes gain by their tokens
    Rows sinks[2], ring[2];  // exact keys and values: of `count` sinks, and then from `oldest` on of a ring with `room`
    int count, oldest, room;
    float top, total;
    Pair sum[VR][4 * VT];
};

// Ask for words of the two tiles whose first token's are at `from`, or for the last token's, `left` tokens later.
template <int BITS, int TOKENS, int ROUNDS, typename Work>
TQAI_FN void ask(thread const Work& its, typename Work::Slots from, int left, thread uint (&share)[2][ROUNDS][TOKENS][Share<BITS>::WORDS]) {
    UNROLL for (int tile = 0; tile < 2; tile++)
        UNROLL for (int t = 0; t < TOKENS; t++) {
            const int at = metal::min(TILE * tile + token_of<TOKENS>(its.lane, t), left) * Work::WORDS;
            UNROLL for (int r = 0; r < ROUNDS; r++)
                UNROLL for (int w = 0; w < Share<BITS>::WORDS; w++)
                    share[tile][r][t][w] = from[at + word_of<BITS, Work::D>(own_chunk<BITS, Work::D, TOKENS>(its.lane, r), w)];
        }
}
// Keys, or values and scales, of the step at token `first`, whose slots these are.
template <typename Work> TQAI_FN void ask_keys(thread Work& its, int first) { ask<Work::BK>(its, its.slots, its.last - first, its.key); }
template <typename Work> TQAI_FN void ask_values(thread Work& its, int first) {
    ask<Work::BV>(its, its.slots + Work::KW, its.last - first, its.value);
    UNROLL for (int tile = 0; tile < 2; tile++)
        UNROLL for (int i = 0; i < 2; i++)  // of the tokens that scores are of
            its.scales[tile][i] = (its.slots + Work::WORDS - 1)[metal::min(TILE * tile + token_of<2>(its.lane, i), its.last - first) * Work::WORDS];
}

// Fragments of a tile of exact tokens as they are, from token `first` on.
template <int BITS, int TOKENS, typename Work>
TQAI_FN void read(thread const Work& its, int part, int first, int r, thread Fine (&out)[4 * TOKENS]) {
    float numbers[TOKENS][8];
    UNROLL for (int t = 0; t < TOKENS; t++) {
        const int token = metal::min(first + token_of<TOKENS>(its.lane, t), its.last), at = its.oldest + token - its.count;
        const size_t row = token < its.count ? token : at < its.room ? at : at - its.room;
        load((token < its.count ? its.sinks[part] : its.ring[part]) + row * Work::D + 8 * own_chunk<BITS, Work::D, TOKENS>(its.lane, r), numbers[t]);
    }
    UNROLL for (int m = 0; m < 4 * TOKENS; m++) out[m] = fine(element<BITS>(numbers, m, 0), element<BITS>(numbers, m, 1));
}

// Steps of two tiles, of codes or of exact tokens: a loop for each, or the registers of one would be kept from the other. The
// words of the next step are asked for as soon as this one's are unpacked.
template <bool EXACTLY, bool BIASED, typename Work, typename Numbers>
TQAI_FN void attend(thread Work& its, Numbers queries, int step, int steps) {
    constexpr int D = Work::D, BK = Work::BK, BV = Work::BV, KT = Work::KT, VT = Work::VT;
    Query query[Work::KR];
    if (!EXACTLY && Work::KEPT)
        UNROLL for (int r = 0; r < Work::KR; r++) read_query<BK, D>(queries, its.lane, r, query[r]);
    for (; step <= its.last; step += steps) {
        its.slots += steps * Work::WORDS;  // to the next step's
        Sums sums[2] = {nothing(), nothing()};  // of exact keys, or
        Products products[2] = {no_products(), no_products()};
        UNROLL for (int r = 0; r < Work::KR; r++) {
            Fine vector[4 * KT];
            if (EXACTLY) read_vectors<BK, D, KT>(queries, its.lane, r, vector);
            if (!EXACTLY && !Work::KEPT) read_query<BK, D>(queries, its.lane, r, query[r]);
            UNROLL for (int tile = 0; tile < 2; tile++) {
                const int first = step + TILE * tile;
                if (EXACTLY) {
                    Fine key[4 * KT];
                    read<BK, KT>(its, 0, first, r, key);
                    UNROLL for (int m = 0; m < 4 * KT; m++) multiply_add(vector[m], key[m], sums[tile]);
                } else {
                    Keys keys;
                    unpack_keys<BK>(its.key[tile][r], its.key_levels, own_chunk<BK, D, KT>(its.lane, r), keys);
                    multiply_keys(query[r], keys, products[tile]);
                }
            }
        }
        if (!EXACTLY) ask_keys(its, step + steps);
        no_later();
        float score[2][2], highest = its.top;
        UNROLL for (int tile = 0; tile < 2; tile++)
            UNROLL for (int i = 0; i < 2; i++) {
                const int token = step + TILE * tile + token_of<2>(its.lane, i);
                score[tile][i] = EXACTLY ? of(sums[tile], i) : product_of(products[tile], i, its.head) * key_scale(its.scales[tile][i]);
                if (!EXACTLY && BIASED) score[tile][i] += its.bias[metal::min(token, its.last)];
                if (token > its.last) score[tile][i] = -3e38f;
                highest = metal::max(highest, score[tile][i]);
            }
        if (simd_any(highest > its.top)) {
            highest = row_max(highest);
            const float shrink = metal::exp2(its.top - highest);
            its.top = highest;
            its.total *= shrink;
            const Pair factors = by_heads(shrink, its.lane);
            UNROLL for (int r = 0; r < Work::VR; r++)
                UNROLL for (int m = 0; m < 4 * VT; m++) scale(its.sum[r][m], factors);
        }
        Fine weight[2];
        UNROLL for (int tile = 0; tile < 2; tile++) {
            UNROLL for (int i = 0; i < 2; i++) {
                score[tile][i] = metal::exp2(score[tile][i] - its.top);
                its.total += score[tile][i];
                if (!EXACTLY) score[tile][i] *= value_scale(its.scales[tile][i]);
            }
            weight[tile] = fine(score[tile][0], score[tile][1]);
        }
        UNROLL for (int r = 0; r < Work::VR; r++) {
            if (EXACTLY) {
                UNROLL for (int tile = 0; tile < 2; tile++) {
                    Fine value[4 * VT];
                    read<BV, VT>(its, 1, step + TILE * tile, r, value);
                    UNROLL for (int m = 0; m < 4 * VT; m += 2)
                        multiply_values(weight[tile], value[m], value[m + 1], its.sum[r][m], its.sum[r][m + 1]);
                }
            } else {
                Coarse value[2][4 * VT];
                UNROLL for (int tile = 0; tile < 2; tile++)
                    unpack<BV, VT>(its.value[tile][r], its.value_levels, own_chunk<BV, D, VT>(its.lane, r), value[tile]);
                UNROLL for (int m = 0; m < 4 * VT; m += 2)
                    multiply_values(weight[0], weight[1], value[0][m], value[0][m + 1], value[1][m], value[1][m + 1], its.sum[r][m], its.sum[r][m + 1]);
            }
        }
        if (!EXACTLY) ask_values(its, step + steps);
        no_later();
    }
}
