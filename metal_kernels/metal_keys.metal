// Keys of codes on Apple's matrix unit: their levels, by queries as they are. cuda_keys.cuh does the same for NVIDIA's.

typedef Levels KeyLevels;
typedef Sums Products;
struct Query {  // a lane's part of a round
    Fine of[4 * KEY_TOKENS];
};
struct Keys {
    Coarse of[4 * KEY_TOKENS];
};
typedef int Head;  // what a lane needs to know of its head to tell scores: nothing
template <int BITS, typename Numbers> TQAI_FN KeyLevels kept_keys(Numbers table, int lane) { return kept<BITS>(table, lane); }
template <int BITS, int D, int PER, typename Numbers>
TQAI_FN void put_query(thread float (&query)[PER], int chunk, bool mine, int row, Numbers vectors) {
    if (mine) put_vector<D>(query, chunk, row, vectors);
}
template <int BITS, int D, typename Numbers> TQAI_FN void read_query(Numbers vectors, int lane, int round, thread Query& out) {
    read_vectors<BITS, D, KEY_TOKENS>(vectors, lane, round, out.of);
}
template <int D, typename Numbers> TQAI_FN Head head_of(Numbers, int) { return 0; }
template <int BITS>
TQAI_FN void unpack_keys(thread const uint (&share)[KEY_TOKENS][Share<BITS>::WORDS], KeyLevels levels, int c, thread Keys& out) {
    unpack<BITS, KEY_TOKENS>(share, levels, c, out.of);
}
TQAI_FN Products no_products() { return nothing(); }
TQAI_FN void multiply_keys(thread const Query& query, thread const Keys& keys, thread Products& products) {
    UNROLL for (int m = 0; m < 4 * KEY_TOKENS; m += 2)
        multiply_add(query.of[m], query.of[m + 1], keys.of[m], keys.of[m + 1], products);
}
TQAI_FN float product_of(Products products, int i, Head) { return of(products, i); }
