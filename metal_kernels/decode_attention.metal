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

    constexpr int CHUNKS = Shape<D>::CHUNKS, LANES = Shape<D>::LANES, GROUPS = Shape<D>::GROUPS;
    constexpr int KW = Packed<D, BK>::WORDS, VW = Packed<D, BV>::WORDS, WORDS = KW + VW + 1;
    constexpr int BLOCKS = (GROUP + G - 1) / G;
    threadgroup float table[32], tops[SG * G], totals[SG * G], parts[SG * G * D];
    if (thread_index_in_threadgroup < 32) table[thread_index_in_threadgroup] = tables[1 + D + thread_index_in_threadgroup];
    threadgroup_barrier(mem_flags::mem_threadgroup);

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

    const size_t head_row = size_t(b) * heads + kv_head;
    for (int step = begin + sg * GROUPS * U; step < end; step += SG * GROUPS * U) {
        float score[G][U], worth[U];
        size_t place[U];  // of a slot in words, or of an exact key in numbers
        bool from_sinks[U];
        UNROLL for (int u = 0; u < U; u++) {
            const int t = step + u * GROUPS + lane / LANES;
            const bool live = t < end;
            const int at = live ? t : end - 1;
            float key[16], scale = 1.0f;
            UNROLL for (int i = 0; i < 16; i++) key[i] = 0.0f;
            worth[u] = 1.0f;
            if (exact) {
                from_sinks[u] = at < sink_end - sink_begin;
                const int column = from_sinks[u] ? sink_begin + at : near_begin + at - (sink_end - sink_begin);
                const int ring = sizes[4] + column - (sizes[0] - sizes[3]);
                place[u] = from_sinks[u] ? size_t(column - start) : size_t(ring >= sizes[3] ? ring - sizes[3] : ring);
                const size_t row = size_t(b) * 2 * heads + kv_head;
                if (mine)
                    UNROLL for (int i = 0; i < 16; i++)
                        key[i] = from_sinks[u] ? float(sinks[(row * sizes[5] + place[u]) * D + 16 * chunk + i])
                                               : float(recent[(row * sizes[3] + place[u]) * D + 16 * chunk + i]);
            } else {
                place[u] = (head_row * sizes[2] + at) * WORDS;
                const device uint* slot = slots + place[u];
                const uint scales = slot[KW + VW];
                scale = key_scale(scales);
                worth[u] = value_scale(scales);
                if (mine) levels<D, BK>(slot, &table[0], chunk, key);
            }
            UNROLL for (int g = 0; g < G; g++) {
                float dot = 0.0f;
                UNROLL for (int i = 0; i < 16; i++) dot += query[g][i] * key[i];
                dot = group_sum<D>(dot) * scale;
                score[g][u] = live ? dot : -3e38f;
            }
        }
        UNROLL for (int g = 0; g < G; g++) {
            float highest = score[g][0];
            UNROLL for (int u = 1; u < U; u++) highest = metal::max(highest, score[g][u]);
            if (highest > top[g]) {
                const float shrink = metal::exp2(top[g] - highest);
                top[g] = highest;
                total[g] *= shrink;
                UNROLL for (int i = 0; i < 16; i++) sum[g][i] *= shrink;
            }
            UNROLL for (int u = 0; u < U; u++) {
                score[g][u] = metal::exp2(score[g][u] - top[g]);
                total[g] += score[g][u];
                score[g][u] *= worth[u];
            }
        }
        if (mine)
            UNROLL for (int u = 0; u < U; u++) {
                float value[16];
                if (exact) {
                    const size_t row = size_t(b) * 2 * heads + heads + kv_head;
                    UNROLL for (int i = 0; i < 16; i++)
                        value[i] = from_sinks[u] ? float(sinks[(row * sizes[5] + place[u]) * D + 16 * chunk + i])
                                                 : float(recent[(row * sizes[3] + place[u]) * D + 16 * chunk + i]);
                } else {
                    levels<D, BV>(slots + place[u] + KW, &table[16], chunk, value);
                }
                UNROLL for (int g = 0; g < G; g++)
                    UNROLL for (int i = 0; i < 16; i++) sum[g][i] += score[g][u] * value[i];
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
