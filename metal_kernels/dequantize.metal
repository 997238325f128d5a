// Body of `dequantize`: the first tokens of every sequence and head, in the basis of the codes.
//
// slots [rows, capacity, WORDS], tables (levels of keys, then of values, 16 each), sizes: tokens, capacity, rows
// -> keys, values [rows, tokens, D] of type T. D: head_dim; BK, BV: bits, or VECTOR; SG: simdgroups a threadgroup.

    constexpr int CHUNKS = Lanes<D, 16>::CHUNKS, LANES = Lanes<D, 16>::LANES, GROUPS = Lanes<D, 16>::GROUPS;
    constexpr int KW = Packed<D, BK>::WORDS, VW = Packed<D, BV>::WORDS, WORDS = KW + VW + 1;
    const int lane = thread_index_in_simdgroup, chunk = lane % LANES, row = threadgroup_position_in_grid.y;
    const int token = (threadgroup_position_in_grid.x * SG + simdgroup_index_in_threadgroup) * GROUPS + lane / LANES;
    const bool mine = token < sizes[0] && chunk < CHUNKS;
    const device uint* slot = slots + (size_t(row) * sizes[1] + metal::min(token, sizes[0] - 1)) * WORDS;
    const size_t at = (size_t(row) * sizes[0] + token) * D + 16 * chunk;
    const uint scales = slot[KW + VW];
    const float key_worth = key_scale(scales) / SCALE_DENOMINATOR, value_worth = value_scale(scales) / SCALE_DENOMINATOR;
    const Levels key_levels = kept<BK>(tables, lane), value_levels = kept<BV>(tables + 16, lane);
    UNROLL for (int second = 0; second < 2; second++) {
        const int part = mine ? 2 * chunk + second : 0;
        uint key[1][Share<BK>::WORDS], value[1][Share<BV>::WORDS];
        UNROLL for (int w = 0; w < Share<BK>::WORDS; w++) key[0][w] = slot[word_of<BK, D>(part, w)];
        UNROLL for (int w = 0; w < Share<BV>::WORDS; w++) value[0][w] = slot[KW + word_of<BV, D>(part, w)];
        Coarse level[4];
        unpack<BK, 1>(key, key_levels, part, level);
        if (mine)
            UNROLL for (int i = 0; i < 8; i++) keys[at + 8 * second + order<BK>(i)] = T(of(level[i / 2], i % 2) * key_worth);
        unpack<BV, 1>(value, value_levels, part, level);
        if (mine)
            UNROLL for (int i = 0; i < 8; i++) values[at + 8 * second + order<BV>(i)] = T(of(level[i / 2], i % 2) * value_worth);
    }
