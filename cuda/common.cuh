// What all kernels share: number types, packing, reductions in a fixed order, the noise, the last block of a grid.
#pragma once

#include "ptx.cuh"

namespace fwd {

// ---- numbers ----

FWD_INLINE float to_float(bf16 value) { return __bfloat162float(value); }
FWD_INLINE float to_float(fp8 value) { return static_cast<float>(value); }
FWD_INLINE bf16 to_bf16(float value) { return __float2bfloat16_rn(value); }  // to nearest, ties to even
FWD_INLINE float round_bf16(float value) { return to_float(to_bf16(value)); }
FWD_INLINE fp8 to_fp8(float value) { return fp8(value); }  // to nearest, ties to even; beyond ±448: ±448

// The two bf16 of a 32-bit register, lower half first: a bf16 is the upper half of a float.
FWD_INLINE float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
FWD_INLINE float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }
FWD_INLINE uint32_t pack_bf16(float low, float high) {
    uint32_t below = __bfloat16_as_ushort(to_bf16(low));
    uint32_t above = __bfloat16_as_ushort(to_bf16(high));
    return below | above << 16;
}

FWD_INLINE void unpack8(const uint4& pack, float (&values)[8]) {
    values[0] = low_bf16(pack.x), values[1] = high_bf16(pack.x);
    values[2] = low_bf16(pack.y), values[3] = high_bf16(pack.y);
    values[4] = low_bf16(pack.z), values[5] = high_bf16(pack.z);
    values[6] = low_bf16(pack.w), values[7] = high_bf16(pack.w);
}
FWD_INLINE uint4 pack8(const float (&values)[8]) {
    return make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                      pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7]));
}

// ---- reductions, in an order that depends on nothing; every lane gets the result ----

FWD_INLINE float warp_sum(float value FWD_SITE) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask FWD_PASS);
    return value;
}
FWD_INLINE float warp_max(float value FWD_SITE) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask FWD_PASS));
    return value;
}

// `scratch` is shared memory, one float a warp; it is free again on return. Every thread gets the result.
FWD_INLINE float block_sum(float value, float* scratch FWD_SITE) {
    value = warp_sum(value FWD_PASS);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    block_barrier(FWD_ONLY_PASS);
    float total = scratch[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) total += scratch[warp];
    block_barrier(FWD_ONLY_PASS);
    return total;
}
FWD_INLINE float block_max(float value, float* scratch FWD_SITE) {
    value = warp_max(value FWD_PASS);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    block_barrier(FWD_ONLY_PASS);
    float total = scratch[0];
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) total = fmaxf(total, scratch[warp]);
    block_barrier(FWD_ONLY_PASS);
    return total;
}

// ---- the last block ----

// Reached by every thread of `expected` blocks that share a counter (0 before, 0 after). True in the block that comes
// last: what the others wrote before is visible to it. Only who combines depends on the order, never how.
FWD_INLINE bool last_arriver(int* counter, int expected FWD_SITE) {
    fence();
    block_barrier(FWD_ONLY_PASS);
    bool last = false;
    if (threadIdx.x == 0) {
        last = atomic_add(counter, 1) == expected - 1;
        if (last) *counter = 0;
    }
    last = block_any(last FWD_PASS);
    if (last) fence();
    return last;
}

// ---- noise: the rule of fwd/kernels/noise.py ----

// Philox4x32-10 (Salmon et al., SC 2011): the block of a counter under a key.
FWD_INLINE uint4 philox(uint4 counter, uint2 key) {
    for (int round = 0; round < 10; ++round) {
        uint32_t high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
        uint32_t high2 = __umulhi(0xCD9E8D57u, counter.z), low2 = 0xCD9E8D57u * counter.z;
        counter = make_uint4(high2 ^ counter.y ^ key.x, low2, high0 ^ counter.w ^ key.y, low0);
        key = make_uint2(key.x + 0x9E3779B9u, key.y + 0xBB67AE85u);
    }
    return counter;
}

// The word that the noise of a token comes from: the first of (token, position, 0, 0) under the seed.
FWD_INLINE uint32_t noise_word(unsigned long long seed, long long position, int token) {
    uint4 counter = make_uint4(static_cast<uint32_t>(token), static_cast<uint32_t>(position), 0, 0);
    uint2 key = make_uint2(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    return philox(counter, key).x;
}

// Standard Gumbel noise of a word x: −log(−log1p(−u)), u = (x + ½)·2⁻³².
FWD_INLINE double gumbel(uint32_t word) {
    double uniform = (static_cast<double>(word) + 0.5) * 0x1p-32;
    return -log(-log1p(-uniform));
}
FWD_INLINE double gumbel(unsigned long long seed, long long position, int token) {
    return gumbel(noise_word(seed, position, token));
}

}  // namespace fwd
