// What comes between the projection of a prefill chunk and its attention: head norms, RoPE, and the write to the cache.
//
// A block is a row, a warp a head. A lane holds neighbouring dimensions of the first half and their partners of the
// second. Values are rounded to bf16 after each step, as the reference rounds them.
#include "common.cuh"

namespace fwd {

constexpr int WARPS = 4;
constexpr float FP8_MAX = 448.0f;

// A head of a row: dimensions lane·kPairs + i in low[i], those plus kDim / 2 in high[i].
template <int kDim>
struct Head {
    static constexpr int kPairs = kDim / 64;
    float low[kPairs], high[kPairs];

    FWD_INLINE void load(const bf16* from) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            low[i] = to_float(from[lane * kPairs + i]), high[i] = to_float(from[kDim / 2 + lane * kPairs + i]);
        }
    }
    FWD_INLINE void norm(const bf16* weight, float eps) {
        int lane = threadIdx.x % 32;
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) squares += low[i] * low[i] + high[i] * high[i];
        float factor = rsqrtf(warp_sum(squares) / kDim + eps);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            low[i] = round_bf16(round_bf16(low[i] * factor) * to_float(weight[lane * kPairs + i]));
            high[i] = round_bf16(round_bf16(high[i] * factor) * to_float(weight[kDim / 2 + lane * kPairs + i]));
        }
    }
    FWD_INLINE void rotate(const float* angles) {  // cosines, then sines
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            float cosine = angles[lane * kPairs + i], sine = angles[kDim / 2 + lane * kPairs + i], before = low[i];
            low[i] = round_bf16(before * cosine - high[i] * sine);
            high[i] = round_bf16(high[i] * cosine + before * sine);
        }
    }
    template <typename T>
    FWD_INLINE void store(T* to, float scale) const {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            put(to + lane * kPairs + i, low[i], scale);
            put(to + kDim / 2 + lane * kPairs + i, high[i], scale);
        }
    }
    static FWD_INLINE void put(bf16* to, float value, float) { *to = to_bf16(value); }
    static FWD_INLINE void put(fp8* to, float value, float scale) { *to = to_fp8(value / scale); }

    // Writes a vector to its cell; fp8 with its scale, by the rule of `fwd.kernels.kv.KV`.
    FWD_INLINE void write(bf16* cache, float*, int64_t vector) const { store(cache + vector * kDim, 1.0f); }
    FWD_INLINE void write(fp8* cache, float* scales, int64_t vector) const {
        float top = 0.0f;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) top = fmaxf(top, fmaxf(fabsf(low[i]), fabsf(high[i])));
        float scale = warp_max(top) / FP8_MAX;
        if (scale == 0.0f) scale = 1.0f;
        store(cache + vector * kDim, scale);
        if (threadIdx.x % 32 == 0) scales[vector] = scale;
    }
};

template <typename T>
struct Call {
    bf16* q;
    T* keys;
    T* values;
    float* key_scales;
    float* value_scales;
    const bf16* fused;
    const bf16* q_norm;
    const bf16* k_norm;
    const float* rope;
    const int64_t* positions;
    const int64_t* slots;
    int heads, kv_heads, angles;
    float q_eps, k_eps;
};

template <typename T, int kDim>
FWD_INLINE void one_head(const Call<T>& call, int head, const float* angles) {
    Head<kDim> vector;
    int64_t row = blockIdx.x, slot = call.slots[row];
    int key = head - call.heads;  // below 0: a query head; from kv_heads on: a value
    vector.load(call.fused + (row * (call.heads + 2 * call.kv_heads) + head) * kDim);
    if (key < 0) {
        if (call.q_norm) vector.norm(call.q_norm, call.q_eps);
        vector.rotate(angles);
        vector.store(call.q + (row * call.heads + head) * kDim, 1.0f);
    } else if (slot >= 0 && key < call.kv_heads) {
        if (call.k_norm) vector.norm(call.k_norm, call.k_eps);
        vector.rotate(angles);
        vector.write(call.keys, call.key_scales, slot * call.kv_heads + key);
    } else if (slot >= 0) {
        vector.write(call.values, call.value_scales, slot * call.kv_heads + key - call.kv_heads);
    }
}

template <typename T, int kDim>
FWD_INLINE void prefill_kv(const Call<T>& call) {
    grid_dependency_trigger();
    grid_dependency_wait();
    int64_t position = call.positions[blockIdx.x];
    position = position < 0 ? 0 : position < call.angles ? position : call.angles - 1;
    const float* angles = call.rope + position * kDim;
    for (int head = threadIdx.x / 32; head < call.heads + 2 * call.kv_heads; head += WARPS) {
        one_head<T, kDim>(call, head, angles);
    }
}

}  // namespace fwd

#define PARAMETERS(T)                                                                                             \
    fwd::bf16 *q, T *keys, T *values, float *key_scales, float *value_scales, const fwd::bf16 *fused,             \
        const fwd::bf16 *q_norm, const fwd::bf16 *k_norm, const float *rope, const int64_t *positions,            \
        const int64_t *slots, int heads, int kv_heads, int angles, float q_eps, float k_eps
#define PREFILL_KV(T, dim)                                                                                        \
    fwd::prefill_kv<T, dim>({q, keys, values, key_scales, value_scales, fused, q_norm, k_norm, rope, positions,   \
                             slots, heads, kv_heads, angles, q_eps, k_eps})

extern "C" __global__ void __launch_bounds__(128) prefill_kv_bf16_64(PARAMETERS(fwd::bf16)) {
    PREFILL_KV(fwd::bf16, 64);
}
extern "C" __global__ void __launch_bounds__(128) prefill_kv_bf16_128(PARAMETERS(fwd::bf16)) {
    PREFILL_KV(fwd::bf16, 128);
}
extern "C" __global__ void __launch_bounds__(128) prefill_kv_bf16_256(PARAMETERS(fwd::bf16)) {
    PREFILL_KV(fwd::bf16, 256);
}
extern "C" __global__ void __launch_bounds__(128) prefill_kv_fp8_64(PARAMETERS(fwd::fp8)) {
    PREFILL_KV(fwd::fp8, 64);
}
extern "C" __global__ void __launch_bounds__(128) prefill_kv_fp8_128(PARAMETERS(fwd::fp8)) {
    PREFILL_KV(fwd::fp8, 128);
}
extern "C" __global__ void __launch_bounds__(128) prefill_kv_fp8_256(PARAMETERS(fwd::fp8)) {
    PREFILL_KV(fwd::fp8, 256);
}
