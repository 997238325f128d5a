// Body of `decode_attention`: one query token of every sequence over a share of its tokens.
//
// Threadgroup (split, kv_head * BLOCKS + block, sequence). The first sizes[1] splits share the coded tokens and
// leave their sums in the basis of the codes; with EXACT one more takes the exact tokens, in the model's basis.
//   q [batch, q_heads, 1, D]; slots [batch, kv_heads, capacity, WORDS]; recent, sinks [batch, 2 kv_heads, .., D]
//   tables: softmax scale times log2(e), D signs, 16 levels of keys, 16 of values
//   sizes: tokens, splits of codes, capacity, recent tokens, place of the oldest, sink tokens, first column, KV heads,
//   sequences, positions of the bias
//   rows [2, batch]: first column of a sequence, first column that `recent` holds
//   bias [batch, q_heads, positions]: what base-2 scores of codes gain by their place in a sequence, with BIAS
// -> sums [batch, q_heads, splits, D], stats [batch, q_heads, splits, 2]: base-2 maximum and total weight.
// D: head_dim; BK, BV: bits, or VECTOR; GROUP: query heads a KV head; G: those of a block; U: tokens a group of lanes takes at
// once (see dots in common.metal); PER: coordinates a lane; SG: simdgroups a threadgroup; EXACT: whether there are
// exact tokens.

    constexpr int CHUNKS = Lanes<D, PER>::CHUNKS, LANES = Lanes<D, PER>::LANES, GROUPS = Lanes<D, PER>::GROUPS;
    constexpr int KW = Packed<D, BK>::WORDS, VW = Packed<D, BV>::WORDS, WORDS = KW + VW + 1;
    constexpr int BLOCKS = (GROUP + G - 1) / G;
    threadgroup float tops[SG * G], totals[SG * G], parts[SG * G * D];
    const int lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup, chunk = lane % LANES;
    const int split = threadgroup_position_in_grid.x, b = threadgroup_position_in_grid.z;
    const int kv_head = threadgroup_position_in_grid.y / BLOCKS, first_head = threadgroup_position_in_grid.y % BLOCKS * G;
    const int splits = sizes[1], heads = sizes[7], batch = sizes[8];
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

    // The first codes are asked for before all else (for nothing by the threadgroup of exact tokens).
    const int own_head = chunk % G, own_token = chunk / G % U;
    const int part = mine ? chunk : 0, last = metal::max(end - 1, 0);  // idle lanes' queries are zero
    int place[U], step = begin + sg * GROUPS * U;  // of the tokens in this lane's slots
    UNROLL for (int u = 0; u < U; u++) place[u] = (u ^ own_token) * GROUPS + lane / LANES;
    const device uint* row = slots + (size_t(b) * heads + kv_head) * sizes[2] * WORDS;
    uint key[U][Share<BK, PER>::WORDS], value[U][Share<BV, PER>::WORDS];
    uint scales = row[size_t(metal::min(step + place[0], last)) * WORDS + KW + VW];
    UNROLL for (int u = 0; u < U; u++) {
        const device uint* slot = row + size_t(metal::min(step + place[u], last)) * WORDS;
        fetch<BK, PER, D>(slot, part, key[u]);
        fetch<BV, PER, D>(slot + KW, part, value[u]);
    }

    float query[G][PER], sum[G][PER], top = -1e30f, total = 0.0f;
    UNROLL for (int g = 0; g < G; g++) {
        const bool real = mine && first_head + g < GROUP;
        const size_t at = (size_t(b) * heads * GROUP + kv_head * GROUP + first_head + g) * D + PER * chunk;
        UNROLL for (int i = 0; i < PER; i++) query[g][i] = real ? float(q[at + i]) * (exact ? 1.0f : tables[1 + PER * chunk + i]) : 0.0f;
        if (!exact) hadamard<D, PER>(query[g], chunk);
        UNROLL for (int i = 0; i < PER; i++) {
            query[g][i] = mine ? query[g][i] * tables[0] : 0.0f;
            sum[g][i] = 0.0f;
        }
    }
    UNROLL for (int stride = 1; stride < G; stride <<= 1)  // head g to slot g ^ own_head
        UNROLL for (int g = 0; g < G; g++)
            if (!(g & stride))
                UNROLL for (int i = 0; i < PER; i++) {
                    const float a = query[g][i], b = query[g + stride][i];
                    query[g][i] = own_head & stride ? b : a;
                    query[g + stride][i] = own_head & stride ? a : b;
                }

    if (exact) {
        const int sink_count = sink_end - sink_begin;
        const size_t key_row = size_t(b) * 2 * heads + kv_head, value_row = key_row + heads;
        for (; step < end; step += SG * GROUPS * U) {
            float score[G][U], number[PER];
            UNROLL for (int i = 0; i < PER; i++) number[i] = 0.0f;
            size_t at[U];
            bool first[U];
            UNROLL for (int u = 0; u < U; u++) {
                const int t = metal::min(step + place[u], end - 1);
                first[u] = t < sink_count;
                const int column = first[u] ? sink_begin + t : near_begin + t - sink_count;
                const int ring = sizes[4] + column - (sizes[0] - sizes[3]);
                at[u] = (first[u] ? column - start : ring >= sizes[3] ? ring - sizes[3] : ring) * size_t(D) + PER * chunk;
            }
            UNROLL for (int u = 0; u < U; u++) {
                const device E* from = first[u] ? sinks + key_row * sizes[5] * D : recent + key_row * sizes[3] * D;
                if (mine)
                    UNROLL for (int i = 0; i < PER; i++) number[i] = float(from[at[u] + i]);
                dots<G, U, PER>(query, number, u, score);
            }
            const float found = own_score<G, U, LANES>(score);
            const float weight = weigh<G, U, PER>(step + place[0] < end ? found : -3e38f, top, total, sum);
            UNROLL for (int u = 0; u < U; u++) {
                const device E* from = first[u] ? sinks + value_row * sizes[5] * D : recent + value_row * sizes[3] * D;
                if (mine)
                    UNROLL for (int i = 0; i < PER; i++) number[i] = float(from[at[u] + i]);
                add<G, PER>(weight, number, u, sum);
            }
        }
    } else {
        const Levels key_levels = kept<BK>(tables + 1 + D, lane), value_levels = kept<BV>(tables + 17 + D, lane);
        while (step < end) {  // the words of the next step are asked for as soon as this one's are unpacked
            const int now = step + place[0];
            step += SG * GROUPS * U;
            const float of_key = key_scale(scales), of_value = value_scale(scales);
            scales = row[size_t(metal::min(step + place[0], last)) * WORDS + KW + VW];
            float score[G][U], level[PER];
            UNROLL for (int u = 0; u < U; u++) {
                unpack<BK, PER>(key[u], key_levels, part, level);
                fetch<BK, PER, D>(row + size_t(metal::min(step + place[u], last)) * WORDS, part, key[u]);
                dots<G, U, PER>(query, level, u, score);
            }
            float found = own_score<G, U, LANES>(score) * of_key;
            if (BIAS) {
                const size_t head = (size_t(b) * heads + kv_head) * GROUP + metal::min(first_head + own_head, GROUP - 1);
                found += bias[head * sizes[9] + metal::min(now, last) - start];
            }
            const float weight = weigh<G, U, PER>(now < end ? found : -3e38f, top, total, sum) * of_value;
            UNROLL for (int u = 0; u < U; u++) {
                unpack<BV, PER>(value[u], value_levels, part, level);
                fetch<BV, PER, D>(row + size_t(metal::min(step + place[u], last)) * WORDS + KW, part, value[u]);
                add<G, PER>(weight, level, u, sum);
            }
        }
    }

    // The tokens of a group, the groups of a simdgroup, then the simdgroups.
    UNROLL for (int stride = G; stride < G * U; stride <<= 1) total += simd_shuffle_xor(total, ushort(stride));
    float highest = top;
    UNROLL for (int stride = LANES; stride < 32; stride <<= 1) highest = metal::max(highest, simd_shuffle_xor(highest, ushort(stride)));
    const float shrink = metal::exp2(top - highest);
    total *= shrink;
    UNROLL for (int stride = LANES; stride < 32; stride <<= 1) total += simd_shuffle_xor(total, ushort(stride));
    UNROLL for (int g = 0; g < G; g++) {
        const float factor = of_slots<G>(shrink, g, 0);
        UNROLL for (int i = 0; i < PER; i++) {
            sum[g][i] *= factor;
            UNROLL for (int stride = LANES; stride < 32; stride <<= 1) sum[g][i] += simd_shuffle_xor(sum[g][i], ushort(stride));
            if (lane < CHUNKS) parts[(sg * G + (g ^ own_head)) * D + PER * chunk + i] = sum[g][i];
        }
    }
    if (lane < G) {
        tops[sg * G + lane] = highest;
        totals[sg * G + lane] = total;
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
