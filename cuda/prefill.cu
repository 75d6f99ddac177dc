// Attention of the C rows of a prefill chunk over the paged cache.
//
// A block takes neighbouring queries of all heads of one kv head: its rows are (query, head of the group), heads
// innermost. Keys come in tiles at multiples of kKeys positions, so what a row sums does not depend on the chunk's live
// rows: a tile of which it sees nothing leaves its softmax as it was, bit for bit. What no live row sees is not read.
#include "attention.cuh"

namespace fwd {

constexpr int THREADS = 128, WARPS = 4, STEP = 32;  // STEP: keys whose scores a warp holds at once

template <typename T>
struct Call {
    bf16* out;
    const bf16* q;
    const T* keys;
    const T* values;
    const float* key_scales;
    const float* value_scales;
    const float* sinks;
    const int64_t* sequences;
    const int* tables;
    int count, start;  // rows of the chunk, position of the first
    int group, kv_heads, max_pages, page_size, window;
    float scale;  // of scores, to base 2
};

template <typename T, int kDim>
struct Shape {
    static constexpr int kTiles = kDim == 256 ? 1 : 2;  // of 16 rows, a warp's
    static constexpr int kRows = WARPS * kTiles * 16;
    static constexpr int kKeys = kDim == 256 ? 32 : 64;
    static constexpr int kTile = kKeys * kDim * 2;  // bytes of a tile of keys or values in bf16
    static constexpr int kRaw = kKeys * Tile<T, kDim>::kRow;  // … as it comes from the cache
    static constexpr int kScales = sizeof(T) == 1 ? kKeys * 4 : 0;
    static constexpr int kStage = 2 * (kRaw + kScales);  // keys, values, their scales
    static constexpr int kQuery = 2 * kStage;  // behind two stages
    static constexpr int kWide = kQuery + kRows * kDim * 2;  // fp8: the tiles that are widened
    static constexpr int kShared = kWide + (sizeof(T) == 1 ? 2 * kTile : 0);
};

// Positions: of the keys that some live row of the chunk sees, and of the block's live queries.
struct Range {
    int first_key, last_key, first_query, last_query, line;
};

// The first and the last live row of a chunk; every thread gets them. `scratch`: two integers a warp.
FWD_INLINE void live_rows(const int64_t* sequences, int count, int* scratch, int& first, int& last) {
    first = count, last = -1;
    for (int row = threadIdx.x; row < count; row += THREADS) {
        if (sequences[row] >= 0) first = row < first ? row : first, last = row;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
        int before = shuffle_xor(first, mask), after = shuffle_xor(last, mask);
        first = before < first ? before : first, last = after > last ? after : last;
    }
    int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) scratch[2 * warp] = first, scratch[2 * warp + 1] = last;
    block_barrier();
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        first = scratch[2 * w] < first ? scratch[2 * w] : first;
        last = scratch[2 * w + 1] > last ? scratch[2 * w + 1] : last;
    }
    block_barrier();
}

// A tile of keys and values on its way to a stage of shared memory; positions that are not known become zeros.
template <typename T, int kDim>
FWD_INLINE void load_tile(const Call<T>& call, const Range& range, unsigned char* stage, int begin, int head) {
    using S = Shape<T, kDim>;
    constexpr int kChunks = Tile<T, kDim>::kChunks, kStride = THREADS / kChunks;
    const int* line = call.tables + static_cast<int64_t>(range.line) * call.max_pages;
    int chunk = threadIdx.x % kChunks;
#pragma unroll 4
    for (int key = threadIdx.x / kChunks; key < S::kKeys; key += kStride) {
        int position = begin + key;
        bool known = position >= range.first_key && position <= range.last_key;
        int64_t cell = known ? paged_cell(line, call.page_size, position) : 0, vector = cell * call.kv_heads + head;
        int64_t offset = vector * kDim + chunk * Tile<T, kDim>::kPer;
        int place = Tile<T, kDim>::place(key, chunk);
        cp_async_16_zfill(stage + place, call.keys + offset, known);
        cp_async_16_zfill(stage + S::kRaw + place, call.values + offset, known);
        if (sizeof(T) == 1 && chunk < 2) {
            float* to = reinterpret_cast<float*>(stage + 2 * S::kRaw) + chunk * S::kKeys + key;
            cp_async_4_zfill(to, (chunk ? call.value_scales : call.key_scales) + vector, known);
        }
    }
}

// Widens the fp8 keys and values of a stage to the two bf16 tiles at `wide`.
template <int kDim>
FWD_INLINE void widen_tile(const unsigned char* stage, unsigned char* wide) {
    using S = Shape<fp8, kDim>;
    constexpr int kChunks = kDim / 16;
    const float* scales = reinterpret_cast<const float*>(stage + 2 * S::kRaw);
#pragma unroll 2
    for (int i = threadIdx.x; i < 2 * S::kKeys * kChunks; i += THREADS) {
        int row = i / kChunks, chunk = i % kChunks, which = row / S::kKeys, key = row % S::kKeys;
        uint4 raw = load_shared(stage + which * S::kRaw + Tile<fp8, kDim>::place(key, chunk));
        uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w}, out[8];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            float2 low = widen(words[w]), high = widen(words[w] >> 16);
            out[2 * w] = pack_bf16(low.x * scales[row], low.y * scales[row]);
            out[2 * w + 1] = pack_bf16(high.x * scales[row], high.y * scales[row]);
        }
        unsigned char* to = wide + which * S::kTile;
        store_shared(to + Tile<bf16, kDim>::place(key, 2 * chunk), make_uint4(out[0], out[1], out[2], out[3]));
        store_shared(to + Tile<bf16, kDim>::place(key, 2 * chunk + 1), make_uint4(out[4], out[5], out[6], out[7]));
    }
}

// The block's rows of q; zeros behind the chunk's last row.
template <typename T, int kDim>
FWD_INLINE void load_query(const Call<T>& call, unsigned char* query, int first_row, int head) {
    constexpr int kChunks = kDim / 8;
#pragma unroll 4
    for (int i = threadIdx.x; i < Shape<T, kDim>::kRows * kChunks; i += THREADS) {
        int row = first_row + i / kChunks, chunk = i % kChunks, at = row / call.group;
        int64_t vector = static_cast<int64_t>(at) * call.kv_heads * call.group + head * call.group + row % call.group;
        bool inside = at < call.count;
        cp_async_16_zfill(query + Tile<bf16, kDim>::place(i / kChunks, chunk),
                          call.q + (inside ? vector : 0) * kDim + chunk * 8, inside);
    }
}

// A warp's rows: of tile m, fragment rows lane / 4 and lane / 4 + 8, in [m][half].
template <int kDim, int kTiles>
struct Softmax {
    static constexpr int kRow = Tile<bf16, kDim>::kRow;
    int position[kTiles][2];
    float peak[kTiles][2], total[kTiles][2], sum[kTiles][kDim / 8][4];

    FWD_INLINE void open(int start, int first_row, int group) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                position[m][half] = start + (first_row + m * 16 + half * 8 + threadIdx.x % 32 / 4) / group;
                peak[m][half] = NOTHING, total[m][half] = 0.0f;
            }
#pragma unroll
            for (int t = 0; t < kDim / 8; ++t) sum[m][t][0] = sum[m][t][1] = sum[m][t][2] = sum[m][t][3] = 0.0f;
        }
    }
    // Takes in the STEP keys at `keys` … from position `begin`; `query` holds the warp's rows.
    FWD_INLINE void add(const unsigned char* query, const unsigned char* keys, const unsigned char* values, int key,
                        int begin, int window, float scale) {
        float scores[kTiles][STEP / 8][4] = {};
        int lane = threadIdx.x % 32;
#pragma unroll 1
        for (int pair = 0; pair < kDim / 32; ++pair) {
            score(scores, query, keys + key * kRow, Tile<bf16, kDim>::place(lane / 4, lane % 4) ^ pair << 6);
        }
        uint32_t weights[kTiles][STEP / 16][4];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) weigh(scores[m], weights[m], m, begin, window, scale);
#pragma unroll
        for (int k = 0; k < STEP / 16; ++k) {
            int place = Tile<bf16, kDim>::place(key + k * 16 + lane % 16, lane / 16);
#pragma unroll
            for (int t = 0; t < kDim / 16; ++t) {
                uint32_t r[4];
                ldmatrix_x4_trans(r, values + (place ^ t << 5));  // two chunks on
#pragma unroll
                for (int m = 0; m < kTiles; ++m) {
                    mma_m16n8k16_bf16(sum[m][2 * t], weights[m][k], {r[0], r[1]});
                    mma_m16n8k16_bf16(sum[m][2 * t + 1], weights[m][k], {r[2], r[3]});
                }
            }
        }
    }
    FWD_INLINE void score(float (&scores)[kTiles][STEP / 8][4], const unsigned char* query, const unsigned char* keys,
                          int place) {
        uint32_t even[kTiles][4], odd[kTiles][4];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
            uint4 low = load_shared(query + m * 16 * kRow + place);
            uint4 high = load_shared(query + (m * 16 + 8) * kRow + place);
            even[m][0] = low.x, even[m][1] = high.x, even[m][2] = low.y, even[m][3] = high.y;
            odd[m][0] = low.z, odd[m][1] = high.z, odd[m][2] = low.w, odd[m][3] = high.w;
        }
#pragma unroll
        for (int n = 0; n < STEP / 8; ++n) {
            uint4 vector = load_shared(keys + n * 8 * kRow + place);
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
                mma_m16n8k16_bf16(scores[m][n], even[m], {vector.x, vector.y});
                mma_m16n8k16_bf16(scores[m][n], odd[m], {vector.z, vector.w});
            }
        }
    }
    FWD_INLINE void weigh(float (&scores)[STEP / 8][4], uint32_t (&weights)[STEP / 16][4], int m, int begin, int window,
                          float scale) {
        int column = begin + threadIdx.x % 4 * 2;
        float fade[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int at = position[m][half], behind = window > 0 ? at - window : -1;
            float top = NOTHING;
#pragma unroll
            for (int i = 0; i < STEP / 4; ++i) {
                float& score = scores[i / 2][half * 2 + i % 2];
                int key = column + i / 2 * 8 + i % 2;
                score = key <= at && key > behind ? score * scale : NOTHING;
                top = fmaxf(top, score);
            }
            top = fmaxf(peak[m][half], quad_max(top));
            float base = finite_peak(top);
            fade[half] = exp2_approx(peak[m][half] - base);
            peak[m][half] = top, total[m][half] *= fade[half];
#pragma unroll
            for (int i = 0; i < STEP / 4; ++i) {
                float& score = scores[i / 2][half * 2 + i % 2];
                score = exp2_approx(score - base);
                total[m][half] += score;
            }
#pragma unroll
            for (int k = 0; k < STEP / 16; ++k) {
                weights[k][half] = pack_bf16(scores[2 * k][half * 2], scores[2 * k][half * 2 + 1]);
                weights[k][half + 2] = pack_bf16(scores[2 * k + 1][half * 2], scores[2 * k + 1][half * 2 + 1]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (fade[half] == 1.0f) continue;  // most tiles of a long context
#pragma unroll
            for (int t = 0; t < kDim / 8; ++t) sum[m][t][half * 2] *= fade[half], sum[m][t][half * 2 + 1] *= fade[half];
        }
    }
    // Writes the warp's rows, of the chunk's `rows`, from `first_row` on.
    FWD_INLINE void close(bf16* out, const float* sinks, int first_row, int rows, int group, int kv_heads, int kv_head) {
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float whole = quad_sum(total[m][half]);
                int row = first_row + m * 16 + half * 8 + threadIdx.x % 32 / 4;
                if (row >= rows) continue;
                int head = kv_head * group + row % group;
                float sink = log2_sink(sinks, head), top = finite_peak(fmaxf(peak[m][half], sink));
                float fade = exp2_approx(peak[m][half] - top);
                float part = fade * inverse(whole * fade + exp2_approx(sink - top));
                bf16* to = out + (static_cast<int64_t>(row / group) * kv_heads * group + head) * kDim;
#pragma unroll
                for (int t = 0; t < kDim / 8; ++t) {
                    uint32_t pack = pack_bf16(sum[m][t][half * 2] * part, sum[m][t][half * 2 + 1] * part);
                    *reinterpret_cast<uint32_t*>(to + t * 8 + threadIdx.x % 4 * 2) = pack;
                }
            }
        }
    }
};

// The tiles of keys of a block, one loaded while the one before is used.
template <typename T, int kDim>
FWD_INLINE void attend(const Call<T>& call, const Range& range, unsigned char* shared, int first_row, int head) {
    using S = Shape<T, kDim>;
    Softmax<kDim, S::kTiles> softmax;
    int warp = threadIdx.x / 32, mine = warp * S::kTiles * 16;
    softmax.open(call.start, first_row + mine, call.group);
    int seen = first_seen(range.first_query, call.window);
    int begin = (seen > range.first_key ? seen : range.first_key) / S::kKeys * S::kKeys;
    load_query<T, kDim>(call, shared + S::kQuery, first_row, head);
    load_tile<T, kDim>(call, range, shared, begin, head);
    cp_async_commit();
    for (int stage = 0; begin <= range.last_query; begin += S::kKeys, stage ^= 1) {
        int next = begin + S::kKeys;
        if (next <= range.last_query) load_tile<T, kDim>(call, range, shared + (stage ^ 1) * S::kStage, next, head);
        cp_async_commit();
        cp_async_wait<1>();
        block_barrier();
        const unsigned char* keys = shared + stage * S::kStage;
        if constexpr (sizeof(T) == 1) {
            widen_tile<kDim>(keys, shared + S::kWide);
            block_barrier();
            keys = shared + S::kWide;
        }
#pragma unroll 1
        for (int key = 0; key < S::kKeys; key += STEP) {
            softmax.add(shared + S::kQuery + mine * kDim * 2, keys, keys + S::kTile, key, begin + key, call.window,
                        call.scale);
        }
        block_barrier();
    }
    cp_async_wait<0>();
    softmax.close(call.out, call.sinks, first_row + mine, call.count * call.group, call.group, call.kv_heads, head);
}

template <typename T, int kDim>
FWD_INLINE void prefill_attention(const Call<T>& call, unsigned char* shared) {
    using S = Shape<T, kDim>;
    grid_dependency_trigger();
    grid_dependency_wait();
    int first_row = static_cast<int>(gridDim.x - 1 - blockIdx.x) * S::kRows;  // the longest first
    int first, last, from = first_row / call.group, to = (first_row + S::kRows - 1) / call.group;
    live_rows(call.sequences, call.count, reinterpret_cast<int*>(shared), first, last);
    from = from > first ? from : first, to = to < last ? to : last;
    Range range;
    range.first_key = first_seen(call.start + first, call.window), range.last_key = call.start + last;
    range.first_query = call.start + from, range.last_query = call.start + to;  // none: the second is less
    range.line = last < 0 ? 0 : static_cast<int>(call.sequences[last]);
    if (from > to) range.last_query = -1;
    attend<T, kDim>(call, range, shared, first_row, blockIdx.y);
}

}  // namespace fwd

#define PARAMETERS(T)                                                                                              \
    fwd::bf16 *out, const fwd::bf16 *q, const T *keys, const T *values, const float *key_scales,                   \
        const float *value_scales, const float *sinks, const int64_t *sequences, const int *tables, int count,     \
        int start, int group, int kv_heads, int max_pages, int page_size, int window, float scale
#define PREFILL(T, dim)                                                                                            \
    FWD_SHARED(shared);                                                                                            \
    fwd::prefill_attention<T, dim>({out, q, keys, values, key_scales, value_scales, sinks, sequences, tables,      \
                                    count, start, group, kv_heads, max_pages, page_size, window,                   \
                                    scale * fwd::LOG2_E},                                                          \
                                   shared)

extern "C" __global__ void __launch_bounds__(128, 2) prefill_attention_bf16_64(PARAMETERS(fwd::bf16)) {
    PREFILL(fwd::bf16, 64);
}
extern "C" __global__ void __launch_bounds__(128, 2) prefill_attention_bf16_128(PARAMETERS(fwd::bf16)) {
    PREFILL(fwd::bf16, 128);
}
extern "C" __global__ void __launch_bounds__(128, 2) prefill_attention_bf16_256(PARAMETERS(fwd::bf16)) {
    PREFILL(fwd::bf16, 256);
}
extern "C" __global__ void __launch_bounds__(128, 2) prefill_attention_fp8_64(PARAMETERS(fwd::fp8)) {
    PREFILL(fwd::fp8, 64);
}
extern "C" __global__ void __launch_bounds__(128, 2) prefill_attention_fp8_128(PARAMETERS(fwd::fp8)) {
    PREFILL(fwd::fp8, 128);
}
extern "C" __global__ void __launch_bounds__(128, 2) prefill_attention_fp8_256(PARAMETERS(fwd::fp8)) {
    PREFILL(fwd::fp8, 256);
}
