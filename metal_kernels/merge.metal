// Body of `merge`: the splits of one query head, those of codes rotated back.
//
// Threadgroup (query head, sequence). sums [batch, q_heads, splits, D], stats [.., 2]; tables: as decode_attention has them;
// extra [q_heads]: logits without a value, times log2(e), of which SINKS says whether they count; sizes: splits of codes
// -> out [batch, q_heads, 1, D] of type T. D: head_dim; SG: simdgroups; EXACT: whether the last split is of exact tokens.

    constexpr int CHUNKS = Lanes<D, 16>::CHUNKS, LANES = Lanes<D, 16>::LANES, GROUPS = Lanes<D, 16>::GROUPS;
    threadgroup float parts[SG * D];
    const int lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup, chunk = lane % LANES;
    const int splits = sizes[0], all = splits + EXACT;
    const size_t head = size_t(threadgroup_position_in_grid.y) * sums_shape[1] + threadgroup_position_in_grid.x;

    float top = SINKS ? extra[threadgroup_position_in_grid.x] : -1e30f;
    for (int s = lane; s < all; s += 32) top = metal::max(top, stats[2 * (head * all + s)]);
    top = simd_max(top);
    float total = 0.0f;
    for (int s = lane; s < all; s += 32) total += stats[2 * (head * all + s) + 1] * metal::exp2(stats[2 * (head * all + s)] - top);
    total = simd_sum(total);
    if (SINKS) total += metal::exp2(extra[threadgroup_position_in_grid.x] - top);

    float sum[16];
    UNROLL for (int i = 0; i < 16; i++) sum[i] = 0.0f;
    for (int s = sg * GROUPS + lane / LANES; s < splits; s += SG * GROUPS) {
        const float weight = metal::exp2(stats[2 * (head * all + s)] - top);
        if (chunk < CHUNKS)
            UNROLL for (int i = 0; i < 16; i++) sum[i] += weight * sums[(head * all + s) * D + 16 * chunk + i];
    }
    UNROLL for (int i = 0; i < 16; i++) {
        UNROLL for (int stride = LANES; stride < 32; stride <<= 1) sum[i] += simd_shuffle_xor(sum[i], ushort(stride));
        if (lane < CHUNKS) parts[sg * D + 16 * chunk + i] = sum[i];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (sg == 0) {
        UNROLL for (int i = 0; i < 16; i++) {
            sum[i] = 0.0f;
            if (chunk < CHUNKS)
                for (int k = 0; k < SG; k++) sum[i] += parts[k * D + 16 * chunk + i];
        }
        hadamard<D, 16>(sum, chunk);
        if (lane < CHUNKS) {
            const float last = EXACT ? metal::exp2(stats[2 * (head * all + splits)] - top) : 0.0f;
            UNROLL for (int i = 0; i < 16; i++) {
                float value = sum[i] * tables[1 + 16 * chunk + i];
                if (EXACT) value += last * sums[(head * all + splits) * D + 16 * chunk + i];
                out[head * D + 16 * chunk + i] = T(total > 0.0f ? value / total : 0.0f);
            }
        }
    }
