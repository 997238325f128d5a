// Body of `merge`: the splits of one query head, those of codes rotated back.
//
// Threadgroup (query head, sequence). sums [batch, q_heads, splits, D], stats [.., 2]; tables: as decode_attention has them;
// extra [q_heads]: logits without a value, times log2(e), of which SINKS says whether they count; sizes: splits of codes
// -> out [batch, q_heads, 1, D] of type T. D: head_dim; SG: simdgroups; EXACT: whether the last split is of exact tokens.

    constexpr int PER = D <= 128 ? 4 : D <= 256 ? 8 : 16;  // as many lanes as there are: all of it is waiting for memory
    constexpr int CHUNKS = Lanes<D, PER>::CHUNKS, LANES = Lanes<D, PER>::LANES, GROUPS = Lanes<D, PER>::GROUPS;
    threadgroup float tops[SG], totals[SG];
    threadgroup float4 parts[SG * D / 4];
    const int lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
    const int chunk = metal::min(lane % LANES, CHUNKS - 1), splits = sizes[0], all = splits + EXACT;
    const size_t head = size_t(threadgroup_position_in_grid.y) * threadgroups_per_grid.x + threadgroup_position_in_grid.x;

    // What the end needs, asked for before all else.
    const size_t last = head * all + splits;
    float4 exact[PER / 4];
    float signs[PER], last_top = -1e30f, last_total = 0.0f;
    if (sg == 0) {
        UNROLL for (int i = 0; i < PER; i++) signs[i] = tables[1 + PER * chunk + i];
        if (EXACT) {
            UNROLL for (int i = 0; i < PER / 4; i++) exact[i] = ((const device float4*)(sums + last * D + PER * chunk))[i];
            last_top = stats[2 * last];
            last_total = stats[2 * last + 1];
        }
    }

    // A lane asks for all its splits of AT_ONCE before it adds one, and every group of lanes has a maximum of its own: no load waits.
    constexpr int MOST = 64 / (SG * GROUPS), AT_ONCE = MOST < 1 ? 1 : MOST < 32 / PER ? MOST : 32 / PER;
    float top = -1e30f, total = 0.0f, sum[PER];
    UNROLL for (int i = 0; i < PER; i++) sum[i] = 0.0f;
    for (int first = sg * GROUPS + lane / LANES; first < splits; first += AT_ONCE * SG * GROUPS) {
        float4 row[AT_ONCE][PER / 4];
        float high[AT_ONCE], weight[AT_ONCE], highest = top;
        UNROLL for (int k = 0; k < AT_ONCE; k++) {
            const int s = first + k * SG * GROUPS;
            const size_t part = head * all + metal::min(s, splits - 1);
            UNROLL for (int i = 0; i < PER / 4; i++) row[k][i] = ((const device float4*)(sums + part * D + PER * chunk))[i];
            high[k] = s < splits ? stats[2 * part] : -1e30f;
            weight[k] = stats[2 * part + 1];
            highest = metal::max(highest, high[k]);
        }
        const float shrink = metal::exp2(top - highest);
        top = highest;
        total *= shrink;
        UNROLL for (int i = 0; i < PER; i++) sum[i] *= shrink;
        UNROLL for (int k = 0; k < AT_ONCE; k++) {
            const float share = first + k * SG * GROUPS < splits ? metal::exp2(high[k] - highest) : 0.0f;
            total += weight[k] * share;
            UNROLL for (int i = 0; i < PER; i += 4) add(row[k][i / 4], share, sum + i);
        }
    }
    float highest = top;
    UNROLL for (int stride = LANES; stride < 32; stride <<= 1) highest = metal::max(highest, simd_shuffle_xor(highest, ushort(stride)));
    const float shrink = metal::exp2(top - highest);
    total *= shrink;
    UNROLL for (int stride = LANES; stride < 32; stride <<= 1) total += simd_shuffle_xor(total, ushort(stride));
    UNROLL for (int i = 0; i < PER; i++) {
        sum[i] *= shrink;
        UNROLL for (int stride = LANES; stride < 32; stride <<= 1) sum[i] += simd_shuffle_xor(sum[i], ushort(stride));
    }
    if (lane < CHUNKS)
        UNROLL for (int i = 0; i < PER; i += 4) parts[(sg * D + PER * chunk + i) / 4] = four(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
    if (lane == 0) {
        tops[sg] = highest;
        totals[sg] = total;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sg == 0) {
        const float own_top = lane < SG ? tops[lane] : -1e30f;
        const float logit = SINKS ? extra[threadgroup_position_in_grid.x] : -1e30f;
        const float highest = metal::max(simd_max(own_top), metal::max(last_top, logit));
        const float weight = metal::exp2(own_top - highest), last_weight = EXACT ? metal::exp2(last_top - highest) : 0.0f;
        float total = simd_sum(lane < SG ? totals[lane] * weight : 0.0f);
        if (EXACT) total += last_total * last_weight;
        if (SINKS) total += metal::exp2(logit - highest);
        UNROLL for (int i = 0; i < PER; i++) sum[i] = 0.0f;
        UNROLL for (int k = 0; k < SG; k++) {
            const float share = simd_table(weight, k);
            UNROLL for (int i = 0; i < PER; i += 4) add(parts[(k * D + PER * chunk + i) / 4], share, sum + i);
        }
        hadamard<D, PER>(sum, chunk);
        UNROLL for (int i = 0; i < PER; i++) sum[i] *= signs[i];
        if (EXACT)
            UNROLL for (int i = 0; i < PER; i += 4) add(exact[i / 4], last_weight, sum + i);
        if (lane < CHUNKS)
            UNROLL for (int i = 0; i < PER; i++) out[head * D + PER * chunk + i] = T(total == 0.0f ? 0.0f : sum[i] / total);
    }
