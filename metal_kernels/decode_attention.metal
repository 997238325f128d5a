// Body of `decode_attention`: one query token of every sequence over a share of its tokens.
//
// Threadgroup (split, kv_head * BLOCKS + block, sequence). The first sizes[1] splits share the coded tokens and
// leave their sums in the basis of the codes; with EXACT one more takes the exact tokens, in the model's basis.
//   q [batch, q_heads, 1, D]; slots [batch, kv_heads, capacity, WORDS]; recent, sinks [batch, 2 kv_heads, .., D]
//   tables: softmax scale times log2(e), D signs, 16 levels of keys, 16 of values
//   sizes: tokens, splits of codes, capacity, recent tokens, place of the oldest, sink tokens, first column, KV heads
//   rows [2, batch]: first column of a sequence, first column that `recent` holds
// -> sums [batch, q_heads, splits, D], stats [batch, q_heads, splits, 2]: base-2 maximum and total weight.
// D: head_dim; BK, BV: bits; GROUP: query heads a KV head; G: those of a block; U: tokens a lane takes at once;
// SG: simdgroups a threadgroup; EXACT: whether there are exact tokens.

    constexpr int CHUNKS = Lanes<D>::CHUNKS, LANES = Lanes<D>::LANES, GROUPS = Lanes<D>::GROUPS;
    constexpr int KW = Packed<D, BK>::WORDS, VW = Packed<D, BV>::WORDS, WORDS = KW + VW + 1;
    constexpr int BLOCKS = (GROUP + G - 1) / G;
    threadgroup float tops[SG * G], totals[SG * G], parts[SG * G * D];
    const int lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup, chunk = lane % LANES;
    const int split = threadgroup_position_in_grid.x, b = threadgroup_position_in_grid.z;
    const int kv_head = threadgroup_position_in_grid.y / BLOCKS, first_head = threadgroup_position_in_grid.y % BLOCKS * G;
    const int splits = sizes[1], heads = sizes[7], batch = rows_shape[1];
    const bool exact = EXACT && split == splits, mine = chunk < CHUNKS;

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

    float query[G][16], sum[G][16], top[G], total[G];
    UNROLL for (int g = 0; g < G; g++) {
        const bool real = mine && first_head + g < GROUP;
        const size_t at = (size_t(b) * heads * GROUP + kv_head * GROUP + first_head + g) * D + 16 * chunk;
        UNROLL for (int i = 0; i < 16; i++) query[g][i] = real ? float(q[at + i]) * (exact ? 1.0f : tables[1 + 16 * chunk + i]) : 0.0f;
        if (!exact) hadamard<D>(query[g], chunk);
        UNROLL for (int i = 0; i < 16; i++) {
            query[g][i] = mine ? query[g][i] * tables[0] : 0.0f;
            sum[g][i] = 0.0f;
        }
        top[g] = -1e30f;
        total[g] = 0.0f;
    }

    if (exact) {
        const int sink_count = sink_end - sink_begin;
        const size_t key_row = size_t(b) * 2 * heads + kv_head, value_row = key_row + heads;
        for (int step = begin + sg * GROUPS; step < end; step += SG * GROUPS) {
            const int t = step + lane / LANES, at = metal::min(t, end - 1);
            const bool first = at < sink_count;
            const int column = first ? sink_begin + at : near_begin + at - sink_count;
            const int ring = sizes[4] + column - (sizes[0] - sizes[3]);
            const size_t place = first ? column - start : ring >= sizes[3] ? ring - sizes[3] : ring;
            float number[16], score[G][1];
            const float worth[1] = {1.0f};
            UNROLL for (int i = 0; i < 16; i++) number[i] = 0.0f;
            if (mine)
                UNROLL for (int i = 0; i < 16; i++)
                    number[i] = first ? float(sinks[(key_row * sizes[5] + place) * D + 16 * chunk + i])
                                      : float(recent[(key_row * sizes[3] + place) * D + 16 * chunk + i]);
            dots<D, G, 1>(query, number, 1.0f, t < end, 0, score);
            soften<G, 1>(score, worth, top, total, sum);
            if (mine) {
                UNROLL for (int i = 0; i < 16; i++)
                    number[i] = first ? float(sinks[(value_row * sizes[5] + place) * D + 16 * chunk + i])
                                      : float(recent[(value_row * sizes[3] + place) * D + 16 * chunk + i]);
                add<G, 1>(score, number, 0, sum);
            }
        }
    } else {
        const device uint* row = slots + (size_t(b) * heads + kv_head) * sizes[2] * WORDS;
        const float key_level = tables[1 + D + table_place<BK>(lane)], value_level = tables[17 + D + table_place<BV>(lane)];
        for (int step = begin + sg * GROUPS * U; step < end; step += SG * GROUPS * U) {
            float score[G][U], worth[U];
            UNROLL for (int u = 0; u < U; u++) {
                const int t = step + u * GROUPS + lane / LANES;
                const device uint* slot = row + size_t(metal::min(t, end - 1)) * WORDS;
                const uint scales = slot[KW + VW];
                worth[u] = value_scale(scales);
                float level[16];
                levels<D, BK>(slot, key_level, mine ? chunk : 0, level);  // idle lanes' queries are zero
                dots<D, G, U>(query, level, key_scale(scales), t < end, u, score);
            }
            soften<G, U>(score, worth, top, total, sum);
            UNROLL for (int u = 0; u < U; u++) {
                const int t = step + u * GROUPS + lane / LANES;
                float level[16];
                levels<D, BV>(row + size_t(metal::min(t, end - 1)) * WORDS + KW, value_level, mine ? chunk : 0, level);
                add<G, U>(score, level, u, sum);
            }
        }
    }

    // The groups of a simdgroup, then the simdgroups.
    UNROLL for (int g = 0; g < G; g++) {
        float highest = top[g];
        UNROLL for (int stride = LANES; stride < 32; stride <<= 1) highest = metal::max(highest, simd_shuffle_xor(highest, ushort(stride)));
        const float shrink = metal::exp2(top[g] - highest);
        total[g] *= shrink;
        UNROLL for (int stride = LANES; stride < 32; stride <<= 1) total[g] += simd_shuffle_xor(total[g], ushort(stride));
        UNROLL for (int i = 0; i < 16; i++) {
            sum[g][i] *= shrink;
            UNROLL for (int stride = LANES; stride < 32; stride <<= 1) sum[g][i] += simd_shuffle_xor(sum[g][i], ushort(stride));
            if (lane < CHUNKS) parts[(sg * G + g) * D + 16 * chunk + i] = sum[g][i];
        }
        if (lane == 0) {
            tops[sg * G + g] = highest;
            totals[sg * G + g] = total[g];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int at = thread_index_in_threadgroup; at < G * D; at += SG * 32) {
        const int g = at / D;
        if (first_head + g >= GROUP) continue;
        float highest = tops[g], all = 0.0f, weight = 0.0f;
        for (int k = 1; k < SG; k++) highest = metal::max(highest, tops[k * G + g]);
        for (int k = 0; k < SG; k++) {
            const float shrink = metal::exp2(tops[k * G + g] - highest);
            all += parts[k * G * D + at] * shrink;
            weight += totals[k * G + g] * shrink;
        }
        const size_t row = (size_t(b) * heads * GROUP + kv_head * GROUP + first_head + g) * (splits + EXACT) + split;
        sums[row * D + at % D] = all;
        if (at % D == 0) {
            stats[2 * row] = highest;
            stats[2 * row + 1] = weight;
        }
    }
