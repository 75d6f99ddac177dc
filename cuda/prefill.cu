// Attention of the C rows of a prefill chunk over the paged cache.
//
// A block takes neighbouring queries of all heads of one kv head: its rows are (query, head of the group), heads
// innermost. Keys come in tiles at multiples of kKeys positions, so what a row sums does not depend on the chunk's live
// rows: a tile of which it sees nothing leaves its softmax as it was, bit for bit. What no live row sees is not read.
#include "prefill_tiles.cuh"

namespace fwd {

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
    FWD_INLINE void close(bf16* out, const float* sinks, int first_row, int rows, int group, int kv_heads,
                          int kv_head) {
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
    if (begin <= range.last_query) load_tile<T, kDim>(call, range, shared, begin, head);
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
