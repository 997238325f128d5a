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
    const int part = mine ? chunk : 0;
    uint key[Share<BK, 16>::WORDS], value[Share<BV, 16>::WORDS];
    fetch<BK, 16, D>(slot, part, key);
    fetch<BV, 16, D>(slot + KW, part, value);
    const Levels key_levels = kept<BK>(tables, lane), value_levels = kept<BV>(tables + 16, lane);
    float level[16];
    unpack<BK, 16>(key, key_levels, part, level);
    if (mine)
        UNROLL for (int i = 0; i < 16; i++) keys[at + i] = T(level[i] * key_scale(scales));
    unpack<BV, 16>(value, value_levels, part, level);
    if (mine)
        UNROLL for (int i = 0; i < 16; i++) values[at + i] = T(level[i] * value_scale(scales));
