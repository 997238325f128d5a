// Body of `decode_attention`: one query token of every sequence over a share of its tokens.
//
// Threadgroup (split, kv_head * BLOCKS + block, sequence). The first sizes[1] splits share the coded tokens and
// leave their sums in the basis of the codes; with EXACT one more takes the exact tokens, in the model's basis.
//   q [batch, q_heads, 1, D]; slots [batch, kv_heads, capacity, WORDS]; recent, sinks [batch, 2 kv_heads, .., D]
//   tables: softmax scale times log2(e), D signs, 16 levels of keys, 16 of values
//   sizes: tokens, splits of codes, capacity, recent tokens, place of the oldest, sink tokens, first column, positions of
//   the bias
//   rows [2 or more, batch]: first column of a sequence, first column that `recent` holds
//   bias [batch, q_heads, positions]: what base-2 scores of codes gain by their place in a sequence, with BIAS
// -> sums [batch, q_heads, splits, D], stats [batch, q_heads, splits, 2]: base-2 maximum and total weight.
// D: head_dim; BK, BV: bits, or VECTOR; GROUP: query heads a KV head, in BLOCKS; SG: simdgroups a threadgroup; EXACT: whether
// there are exact tokens.

    typedef Work<D, BK, BV, const device uint*, const device E*, const device float*> Mine;
    constexpr int BLOCKS = (GROUP + TILE - 1) / TILE, STEP = 2 * TILE;  // tokens of a simdgroup's step
    constexpr int VT = Mine::VT, VR = Mine::VR, STRIDE = Row<D>::LENGTH;
    // Sums of a simdgroup, of which as many lie side by side as 31 KiB hold: Metal has 32.
    constexpr int HEADS = GROUP < TILE ? GROUP : TILE, MOST = 7936 / (HEADS * STRIDE), COPIES = MOST < SG ? MOST : SG;
    constexpr int ROOM = (COPIES * HEADS > TILE ? COPIES * HEADS : TILE) * STRIDE;
    threadgroup float vectors[ROOM], tops[SG * TILE], totals[SG * TILE];  // vectors: queries, later sums
    const int lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    const int split = threadgroup_position_in_grid.x, b = threadgroup_position_in_grid.z;
    const int kv_head = threadgroup_position_in_grid.y / BLOCKS, first_head = threadgroup_position_in_grid.y % BLOCKS * TILE;
    const int splits = sizes[1], heads = threadgroups_per_grid.y / BLOCKS, batch = threadgroups_per_grid.z;
    const size_t q_head = (size_t(b) * heads + kv_head) * GROUP + first_head;
    const bool exact = EXACT && split == splits;
    const float worth = exact ? 1.0f : 1.0f / SCALE_DENOMINATOR;  // of a score or a value, until queries and sums have it

    // Columns: sinks from `start`, then codes from `coded` to `near`, then recent ones to sizes[0].
    const int start = rows[b], coded = start + sizes[5];
    const int near = metal::max(coded, metal::max(int(rows[batch + b]), sizes[0] - sizes[3]));
    const int sink_end = metal::min(coded, sizes[0]), sink_begin = metal::min(metal::max(start, sizes[6]), sink_end);
    const int near_begin = metal::min(metal::max(near, sizes[6]), sizes[0]);
    int begin, end;
    if (exact) {  // counted from 0: first the sinks, then the recent tokens
        begin = 0;
        end = sink_end - sink_begin + sizes[0] - near_begin;
    } else {
        const int from = metal::max(coded, sizes[6]), share = metal::max(0, (metal::min(near, sizes[0]) - from + splits - 1) / splits);
        begin = from + split * share;
        end = metal::min(begin + share, metal::min(near, sizes[0]));
    }

    // The first codes are asked for before all else.
    Mine its;
    its.lane = lane;
    its.last = end - 1;
    const int step = begin + sg * STEP;
    its.slots = slots + ((size_t(b) * heads + kv_head) * sizes[2] + step) * Mine::WORDS;
    if (!exact && step < end) {
        ask_keys(its, step);
        ask_values(its, step);
    }

    its.key_levels = kept_keys<BK>(tables + 1 + D, lane);
    its.value_levels = kept<BV>(tables + 17 + D, lane);
    {  // queries, rotated to meet codes
        constexpr int PER = D <= 256 ? 8 : 16;
        constexpr int CHUNKS = Lanes<D, PER>::CHUNKS, LANES = Lanes<D, PER>::LANES, GROUPS = Lanes<D, PER>::GROUPS;
        const int chunk = lane % LANES;
        for (int first = sg * GROUPS; first < TILE; first += SG * GROUPS) {
            const int g = first + lane / LANES;
            const bool mine = g < TILE && chunk < CHUNKS, real = mine && first_head + g < GROUP;
            float query[PER];
            UNROLL for (int i = 0; i < PER; i++)
                query[i] = real ? float(q[(q_head + g) * D + PER * chunk + i]) * (exact ? 1.0f : tables[1 + PER * chunk + i]) : 0.0f;
            if (!exact) hadamard<D, PER>(query, chunk);
            UNROLL for (int i = 0; i < PER; i++) query[i] *= tables[0] * worth;
            if (!exact) put_query<BK, D, PER>(query, chunk, mine, g, vectors);
            if (exact && mine) put_vector<D>(query, chunk, g, vectors);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    its.top = -1e30f;
    its.total = 0.0f;
    UNROLL for (int r = 0; r < VR; r++)
        UNROLL for (int m = 0; m < 4 * VT; m++) its.sum[r][m] = pair(0.0f, 0.0f);
    if (exact) {
        UNROLL for (int part = 0; part < 2; part++) {
            const size_t head = (size_t(b) * 2 + part) * heads + kv_head;
            its.sinks[part] = sinks + (head * sizes[5] + sink_begin - start) * D;
            its.ring[part] = recent + head * sizes[3] * D;
        }
        its.count = sink_end - sink_begin;
        its.oldest = sizes[4] + near_begin - (sizes[0] - sizes[3]);
        its.room = sizes[3];
        attend<true, BIAS>(its, vectors, step, SG * STEP);
    } else {
        its.head = head_of<D>(vectors, lane);
        its.bias = bias + (q_head + metal::min(tile_row(lane), GROUP - 1 - first_head)) * sizes[7] - start;
        attend<false, BIAS>(its, vectors, step, SG * STEP);
    }

    // Simdgroups add their sums up, under the highest maximum of all.
    const float total = row_sum(its.total);
    const int line = tile_row(lane);
    if (tile_column(lane) == 0) {
        tops[sg * TILE + line] = its.top;
        totals[sg * TILE + line] = total;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float highest = tops[line];
    for (int k = 1; k < SG; k++) highest = metal::max(highest, tops[k * TILE + line]);
    const Pair shares = by_heads(metal::exp2(its.top - highest) * worth, lane);
    for (int k = 0; k < SG; k += COPIES) {
        if (k <= sg && sg < k + COPIES)
            UNROLL for (int r = 0; r < VR; r++)
                UNROLL for (int m = 0; m < 4 * VT; m++)
                    UNROLL for (int i = 0; i < 2; i++) {
                        const int c = coordinate<BV, D, VT>(r, m, sum_line(lane, i)), head = sum_head(lane, i);
                        const int at = ((sg - k) * HEADS + head) * STRIDE + spread(c);
                        if (c >= 0 && first_head + head < GROUP) vectors[at] = of(its.sum[r][m], i) * of(shares, i) + (k ? vectors[at] : 0.0f);
                    }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    const int own = thread_index_in_threadgroup;
    if (own < HEADS && first_head + own < GROUP) {  // a head each
        float highest = tops[own], weight = 0.0f;
        UNROLL for (int k = 1; k < SG; k++) highest = metal::max(highest, tops[k * TILE + own]);
        UNROLL for (int k = 0; k < SG; k++) weight += totals[k * TILE + own] * metal::exp2(tops[k * TILE + own] - highest);
        const size_t out = (q_head + own) * (splits + EXACT) + split;
        stats[2 * out] = highest;
        stats[2 * out + 1] = weight;
    }
    UNROLL for (int from = 0; from < HEADS * D / 4; from += SG * 32) {  // four coordinates each
        const int g = (from + own) / (D / 4), c = (from + own) % (D / 4) * 4;
        if (g >= HEADS || first_head + g >= GROUP) break;
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        UNROLL for (int k = 0; k < COPIES; k++)
            UNROLL for (int i = 0; i < 4; i++) sum[i] += vectors[(k * HEADS + g) * STRIDE + spread(c) + i];
        *(device float4*)(sums + ((q_head + g) * (splits + EXACT) + split) * D + c) = four(sum[0], sum[1], sum[2], sum[3]);
    }
