// Body of `store`: rotate, search the scale, quantize and pack; a group of lanes makes one slot.
//
// keys, values [batch, kv_heads, tokens, D], tables (see store.py), sizes: vectors, vectors of a sequence
// -> slots [.., WORDS]; with JOIN also joined [batch, 2 kv_heads, tokens, D]: keys, and then values, as they came.
// D: head_dim; BK, BV: bits, or VECTOR; SG: simdgroups a threadgroup.

    constexpr int CHUNKS = Lanes<D, 16>::CHUNKS, LANES = Lanes<D, 16>::LANES, GROUPS = Lanes<D, 16>::GROUPS;
    constexpr int KW = Packed<D, BK>::WORDS, VW = Packed<D, BV>::WORDS, WORDS = KW + VW + 1;
    const int lane = thread_index_in_simdgroup, chunk = lane % LANES;
    const int vector = (threadgroup_position_in_grid.x * SG + simdgroup_index_in_threadgroup) * GROUPS + lane / LANES;
    const bool live = vector < sizes[0], mine = live && chunk < CHUNKS;
    const size_t own = size_t(vector) * D + 16 * chunk;
    uint scales = 0u;
    for (int part = 0; part < 2; part++) {
        float y[16];
        UNROLL for (int i = 0; i < 16; i++)
            y[i] = mine ? (part ? float(values[own + i]) : float(keys[own + i])) * tables[16 * chunk + i] : 0.0f;
        if (JOIN && mine) {
            const int of_sequence = sizes[1], sequence = vector / of_sequence;
            const size_t to = (size_t(2 * sequence + part) * of_sequence + vector % of_sequence) * D + 16 * chunk;
            UNROLL for (int i = 0; i < 16; i++) joined[to + i] = part ? values[own + i] : keys[own + i];
        }
        hadamard<D, 16>(y, chunk);
        if (!mine)  // a block's idle lanes got sums of nothing
            UNROLL for (int i = 0; i < 16; i++) y[i] = 0.0f;
        const int bits = part ? BV : BK, book = D + 8 + 16 * part;  // unit, 8 magnitudes, 7 boundaries; or unit, 64 magnitudes
        float squares = 0.0f, top = 0.0f, size[16];
        UNROLL for (int i = 0; i < 16; i++) {
            size[i] = metal::abs(y[i]);
            squares += y[i] * y[i];
            top = metal::max(top, size[i]);
        }
        squares = group_sum<LANES>(squares);
        top = group_max<LANES>(top);
        const float rms = metal::sqrt(squares / D);
        const bool finite = (as_type<uint>(rms) & 0x7f800000u) != 0x7f800000u;
        const bool usable = finite && rms > SMALLEST_RMS;
        float best = -1.0f, won = 1.0f, worth = 0.0f;
        const int tries = bits == 8 ? 1 : 8;
        for (int k = 0; k < tries; k++) {
            float grid = bits == 8 ? top / TOP : rms * tables[D + k] * tables[book];
            grid = usable ? grid : 1.0f;
            float along = 0.0f, energy = 0.0f;
            if (bits == VECTOR) {
                if (usable && chunk < CHUNKS)
                    UNROLL for (int i = 0; i < 16; i += 4) nearest(tables + book + 1, size + i, grid, along, energy);
            } else UNROLL for (int i = 0; i < 16; i++) {
                const float scaled = usable ? size[i] / grid : 0.0f;
                float level = tables[book + 1];
                if (bits == 8)
                    level = metal::clamp(metal::ceil(scaled) - 1.0f, 0.0f, 127.0f) + 0.5f;
                else
                    for (int j = 0; j < (1 << (bits - 1)) - 1; j++)
                        level = scaled > tables[book + 9 + j] ? tables[book + 2 + j] : level;
                if (chunk < CHUNKS) {
                    along += size[i] * level;
                    energy += level * level;
                }
            }
            along = group_sum<LANES>(along);
            energy = group_sum<LANES>(energy);
            const float merit = along * along / energy;
            if (merit > best) {
                best = merit;
                won = grid;
                worth = along / energy;
            }
        }
        const half stored = half(usable ? worth * SCALE_DENOMINATOR : 0.0f);
        const bool bad = !finite || (as_type<ushort>(stored) & 0x7c00) == 0x7c00;
        scales |= uint(bad ? ushort(0x7e00) : as_type<ushort>(stored)) << (16 * part);
        // Codes of this chunk: words of fields, and for 3 bits half a word of signs.
        uint words[4] = {0u, 0u, 0u, 0u}, signs = 0u;
        if (bits == VECTOR) {
            float along = 0.0f, energy = 0.0f;
            if (mine && usable && !bad)
                UNROLL for (int i = 0; i < 16; i++) {
                    if (i % 4 == 0) words[0] |= nearest(tables + book + 1, size + i, won, along, energy) << (2 * i);
                    words[0] |= (y[i] < 0.0f ? 1u : 0u) << (i / 4 * 8 + PATTERN_BITS + i % 4);
                }
        } else UNROLL for (int i = 0; i < 16; i++) {
            const float scaled = size[i] / won;
            uint index = 0u;
            if (bits == 8)
                index = uint(metal::clamp(metal::ceil(scaled) - 1.0f, 0.0f, 127.0f));
            else
                for (int j = 0; j < (1 << (bits - 1)) - 1; j++) index += scaled > tables[book + 9 + j] ? 1u : 0u;
            const uint sign = y[i] < 0.0f ? 1u : 0u;
            if (!mine || !usable || bad) continue;
            if (bits == 8) words[i / 4] |= (sign ? 255u - index : index) << (8 * (i % 4));
            if (bits == 4) words[i / 8] |= (index | sign << 3) << (4 * (i % 8));
            if (bits == 3) {
                words[0] |= index << (2 * i);
                signs |= sign << (sign_bit(i) + (chunk & 1 ? 0 : 2));
            }
            if (bits == 2) words[0] |= (index | sign << 1) << (2 * i);
        }
        const size_t at = size_t(vector) * WORDS + (part ? KW : 0);
        if (bits == 3) {
            signs |= simd_shuffle_xor(signs, ushort(1));
            const int pairs = Packed<D, 3>::PAIRS;
            if (live && chunk < 2 * pairs) slots[at + chunk] = words[0];
            if (live && chunk < 2 * pairs && !(chunk & 1)) slots[at + 2 * pairs + chunk / 2] = signs;
        } else if (mine) {
            const int count = bits == VECTOR ? 1 : bits / 2;
            UNROLL for (int w = 0; w < count; w++) slots[at + chunk * count + w] = words[w];
        }
    }
    if (live && chunk == 0) slots[size_t(vector) * WORDS + KW + VW] = scales;
