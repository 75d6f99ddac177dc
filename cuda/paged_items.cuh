// How the keys and values of a decode step's items come to shared memory: see paged_attention.cu.
#pragma once

#include "items.cuh"

namespace fwd {

constexpr int THREADS = 128, WARPS = 4, HEADS = 16;  // HEADS: of a group, at most
constexpr int KEYS = 16;  // of a warp's tile
constexpr int MAX_PIECES = 256;

template <typename T>
struct Call : Places {
    bf16* out;
    const bf16* q;
    const T* keys;
    const T* values;
    const float* key_scales;
    const float* value_scales;
    const float* sinks;
    float* sums;  // [rows, heads, MAX_PIECES, head_dim]
    float* marks;  // [rows, heads, MAX_PIECES, 2]: maximum and total
    int* arrivals;  // [rows, kv_heads]
    int group, kv_heads;  // group: query heads of a kv head
    float scale;  // of scores, to base 2

    FWD_INLINE int64_t vector(int row, int head) const { return row * (kv_heads * group) + head; }  // of q, of out
    FWD_INLINE int64_t piece(int row, int head, int piece) const { return vector(row, head) * MAX_PIECES + piece; }
};

template <typename T, int kDim>
struct Shape {
    static constexpr int kSlots = kDim == 64 ? 4 : 3;
    static constexpr int kValues = KEYS * Tile<T, kDim>::kRow;  // bytes of the keys, behind which the values are
    static constexpr int kScales = 2 * kValues;  // of fp8: the scales of keys and values
    static constexpr int kSlot = 64 * kDim;  // bytes of a warp: two bf16 tiles, or its sum [kDim / 8][32][4] in float
    static constexpr int kTags = kSlots * WARPS * kSlot;
    static constexpr int kMarks = kTags + kSlots * WARPS * sizeof(Tag);  // float [WARPS][HEADS][2]
};

// Brings the tiles of a warp to shared memory, one after the other, item after item.
template <typename T, int kDim>
struct Loader : Walk<Cut<MAX_PIECES, 32>, WARPS, KEYS> {
    using S = Shape<T, kDim>;
    const Call<T>& call;

    FWD_INLINE Loader(const Call<T>& c) : Walk(c, c.kv_heads, 1), call(c) {}
    FWD_INLINE void load(unsigned char* shared, int slot) {
        if (lane == 0) reinterpret_cast<Tag*>(shared + S::kTags)[slot * WARPS + warp] = tag;
        if (tag.row >= 0) {
            copy(shared + (slot * WARPS + warp) * S::kSlot);
            advance();
        }
        cp_async_commit();
    }
    FWD_INLINE void copy(unsigned char* to) {
        constexpr int kChunks = Tile<T, kDim>::kChunks;
        int chunk = lane % kChunks;
#pragma unroll 4
        for (int pass = 0; pass < KEYS * kChunks / 32; ++pass) {
            int key = (pass * 32 + lane) / kChunks, from = shuffle(cell, key);
            int64_t vector = static_cast<int64_t>(from < 0 ? 0 : from) * call.kv_heads + tag.head;
            int64_t offset = vector * kDim + chunk * Tile<T, kDim>::kPer;
            int place = Tile<T, kDim>::place(key, chunk);
            cp_async_16_zfill(to + place, call.keys + offset, from >= 0);
            cp_async_16_zfill(to + S::kValues + place, call.values + offset, from >= 0);
        }
        if (sizeof(T) == 1) copy_scale(reinterpret_cast<float*>(to + S::kScales) + lane);
    }
    FWD_INLINE void copy_scale(float* to) {
        const float* scales = lane < KEYS ? call.key_scales : call.value_scales;
        int64_t vector = static_cast<int64_t>(cell < 0 ? 0 : cell) * call.kv_heads + tag.head;
        cp_async_4_zfill(to, scales + vector, cell >= 0);
    }
};

}  // namespace fwd
