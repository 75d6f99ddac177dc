// The queries, keys and values of a prefill chunk on their way to shared memory: see prefill.cu.
#pragma once

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

}  // namespace fwd
