// Body of `dequantize`: the first tokens of every sequence and head, in the basis of the codes.
//
// slots [rows, capacity, WORDS], tables (levels of keys, then of values, 16 each), sizes: tokens, capacity, rows
// -> keys, values [rows, tokens, D] of type T. D: head_dim; BK, BV: bits; SG: simdgroups a threadgroup.

    constexpr int CHUNKS = Shape<D>::CHUNKS, LANES = Shape<D>::LANES, GROUPS = Shape<D>::GROUPS;
    constexpr int KW = Packed<D, BK>::WORDS, VW = Packed<D, BV>::WORDS, WORDS = KW + VW + 1;
    threadgroup float table[32];
    if (thread_index_in_threadgroup < 32) table[thread_index_in_threadgroup] = tables[thread_index_in_threadgroup];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int lane = thread_index_in_simdgroup, chunk = lane % LANES, row = threadgroup_position_in_grid.y;
    const int token = (threadgroup_position_in_grid.x * SG + simdgroup_index_in_threadgroup) * GROUPS + lane / LANES;
    if (token < sizes[0] && chunk < CHUNKS) {
        const device uint* slot = slots + (size_t(row) * sizes[1] + token) * WORDS;
        const size_t at = (size_t(row) * sizes[0] + token) * D + 16 * chunk;
        const uint scales = slot[KW + VW];
        float level[16];
        levels<D, BK>(slot, &table[0], chunk, level);
        UNROLL for (int i = 0; i < 16; i++) keys[at + i] = T(level[i] * key_scale(scales));
        levels<D, BV>(slot + KW, &table[16], chunk, level);
        UNROLL for (int i = 0; i < 16; i++) values[at + i] = T(level[i] * value_scale(scales));
    }
