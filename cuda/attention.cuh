// What the attention kernels share: where a key stands in the pages, how tiles of keys and values lie in shared memory,
// and how they come from there into the fragments of mma.m16n8k16.
#pragma once

#include "common.cuh"

namespace fwd {

constexpr float NOTHING = -INFINITY;  // the score of a key that is not seen
constexpr float LOG2_E = 1.4426950408889634f;

// Keys or values of one head: key after key, each in 16-byte chunks that change places by key. Then 16 bytes of two
// neighbouring keys (a quarter of a warp reads four chunks of each), and the same chunk of eight keys (a row of
// ldmatrix each), always fall on different banks.
template <typename T, int kDim>
struct Tile {
    static constexpr int kPer = 16 / sizeof(T);  // numbers of a chunk
    static constexpr int kChunks = kDim / kPer;  // of a key
    static constexpr int kRow = kDim * sizeof(T);  // bytes

    static FWD_INLINE int place(int key, int chunk) {
        int turn = ((key & 1) << 2 | (key >> 1 & 3)) & (kChunks - 1);
        return key * kRow + ((chunk ^ turn) << 4);
    }
};

// The cell of a position, by the sequence's line of the block table.
FWD_INLINE int paged_cell(const int* line, int page_size, int position) {
    int page = position / page_size;
    return line[page] * page_size + (position - page * page_size);
}

// The first position that a row at `position` sees.
FWD_INLINE int first_seen(int position, int window) {
    return window > 0 && position + 1 > window ? position + 1 - window : 0;
}

FWD_INLINE float log2_sink(const float* sinks, int head) { return sinks ? sinks[head] * LOG2_E : NOTHING; }

// Where differences of scores are taken from: a row that has seen no key yet has a maximum of −∞.
FWD_INLINE float finite_peak(float peak) { return peak == NOTHING ? 0.0f : peak; }

FWD_INLINE float inverse(float total) { return total == 0.0f ? 0.0f : 1.0f / total; }  // NaN stays NaN

// Where the two numbers of a fragment's row stand in the sum of `add_values`: dimensions of fragment t.
template <typename T>
FWD_INLINE int dimension(int t, int second) {
    int pair = threadIdx.x % 4;
    return sizeof(T) == 1 ? t / 2 * 16 + pair * 4 + second * 2 + t % 2 : t * 8 + pair * 2 + second;
}

// The maximum or the sum over the four lanes that hold a row of a fragment.
FWD_INLINE float quad_max(float value FWD_SITE) {
    value = fmaxf(value, shuffle_xor(value, 1 FWD_PASS));
    return fmaxf(value, shuffle_xor(value, 2 FWD_PASS));
}
FWD_INLINE float quad_sum(float value FWD_SITE) {
    value += shuffle_xor(value, 1 FWD_PASS);
    return value + shuffle_xor(value, 2 FWD_PASS);
}

// Two fp8 numbers of a register's lower half, each times its scale, in float32.
FWD_INLINE float2 widen(uint32_t pair) {
    __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair & 0xFFFFu), __NV_E4M3);
    return __half22float2(__half2(halves));
}

// The B fragment of the k16 step `step` of a chunk of keys. The four lanes of a key hold 4·kPer neighbouring
// dimensions, kPer each; since q comes in the same order, which of them a step takes does not matter.
template <int step>
FWD_INLINE void key_fragment(uint32_t (&b)[2], const uint4& chunk, bf16, float) {
    b[0] = step == 0 ? chunk.x : chunk.z;
    b[1] = step == 0 ? chunk.y : chunk.w;
}
template <int step>
FWD_INLINE void key_fragment(uint32_t (&b)[2], const uint4& chunk, fp8, float scale) {
    uint32_t word = step == 0 ? chunk.x : step == 1 ? chunk.y : step == 2 ? chunk.z : chunk.w;
    float2 low = widen(word), high = widen(word >> 16);
    b[0] = pack_bf16(low.x * scale, low.y * scale);
    b[1] = pack_bf16(high.x * scale, high.y * scale);
}

// Where a lane points ldmatrix.x4.trans to for 16 values of two neighbouring chunks: rows 0–7 and 8–15 of each.
template <typename T, int kDim>
FWD_INLINE int value_place(int lane, int chunk) {
    return Tile<T, kDim>::place((lane & 7) + (lane & 8), chunk + (lane >> 4));
}

// One k16 step of P·V over 16 keys: `p` is the A fragment, `values` a tile of 16 keys.
// Fragment t of the sum holds dimensions 8t …
template <int kDim>
FWD_INLINE void add_values(float (&sum)[kDim / 8][4], const uint32_t (&p)[4], const unsigned char* values, int lane,
                           const float*, bf16) {
#pragma unroll
    for (int t = 0; t < kDim / 16; ++t) {
        uint32_t r[4];
        ldmatrix_x4_trans(r, values + value_place<bf16, kDim>(lane, 2 * t));
        mma_m16n8k16_bf16(sum[2 * t], p, {r[0], r[1]});
        mma_m16n8k16_bf16(sum[2 * t + 1], p, {r[2], r[3]});
    }
}

// … and of fp8, whose 16-bit matrix elements are two dimensions: 2t the even ones of 16t …, 2t + 1 the odd ones.
FWD_INLINE void add_pairs(float (&even)[4], float (&odd)[4], const uint32_t (&p)[4], uint32_t below, uint32_t above,
                          const float (&scales)[4]) {
    float2 v0 = widen(below), v1 = widen(below >> 16), v8 = widen(above), v9 = widen(above >> 16);
    uint32_t b[2] = {pack_bf16(v0.x * scales[0], v1.x * scales[1]), pack_bf16(v8.x * scales[2], v9.x * scales[3])};
    mma_m16n8k16_bf16(even, p, b);
    b[0] = pack_bf16(v0.y * scales[0], v1.y * scales[1]), b[1] = pack_bf16(v8.y * scales[2], v9.y * scales[3]);
    mma_m16n8k16_bf16(odd, p, b);
}
template <int kDim>
FWD_INLINE void add_values(float (&sum)[kDim / 8][4], const uint32_t (&p)[4], const unsigned char* values, int lane,
                           const float* scale, fp8) {
    int key = lane % 4 * 2;
    float scales[4] = {scale[key], scale[key + 1], scale[key + 8], scale[key + 9]};
#pragma unroll
    for (int t = 0; t < kDim / 32; ++t) {
        uint32_t r[4];
        ldmatrix_x4_trans(r, values + value_place<fp8, kDim>(lane, 2 * t));
        add_pairs(sum[4 * t], sum[4 * t + 1], p, r[0], r[1], scales);
        add_pairs(sum[4 * t + 2], sum[4 * t + 3], p, r[2], r[3], scales);
    }
}

}  // namespace fwd
