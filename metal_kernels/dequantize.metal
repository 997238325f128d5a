// Body of `dequantize`: the first tokens of every sequence and head, in the basis of the codes.
//
// slots [rows, capacity, WORDS], tables (levels of keys, then of values, 16 each), sizes: tokens, capacity, rows
// -> keys, values [rows, tokens, D] of type T. D: head_dim; BK, BV: bits; SG: simdgroups a threadgroup.

    constexpr int CHUNKS = Lanes<D, 16>::CHUNKS, LANES = Lanes<D, 16>::LANES, GROUPS = Lanes<D, 16>::GROUPS;
    constexpr int KW = Packed<D, BK>::WORDS, VW = Packed<D, BV>::WORDS, WORDS = KW + VW + 1;
    const int lane = thread_index_in_simdgroup, chunk = lane % LANES, row = threadgroup_position_in_grid.y;
    const int token = (threadgroup_position_in_grid.x * SG + simdgroup_index_in_threadgroup) * GROUPS + lane / LANES;
    const bool mine = token < sizes[0] && chunk < CHUNKS;
    const device uint* slot = slots + (size_t(row) * sizes[1] + metal::min(token, sizes[0] - 1)) * WORDS;
    const size_t at = (size_t(row) * sizes[0] + token) * D + 16 * chunk;
    const uint scales = slot[KW + VW];
    float level[16];
    levels<BK, 16, D>(slot, tables[table_place<BK>(lane)], mine ? chunk : 0, level);
    if (mine)
        UNROLL for (int i = 0; i < 16; i++) keys[at + i] = T(level[i] * key_scale(scales));
    levels<BV, 16, D>(slot + KW, tables[16 + table_place<BV>(lane)], mine ? chunk : 0, level);
    if (mine)
        UNROLL for (int i = 0; i < 16; i++) values[at + i] = T(level[i] * value_scale(scales));
