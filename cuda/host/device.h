// CUDA's own words for code that g++ compiles: types from the toolkit's headers, the rest from here.
//
// Mathematical functions are libm's: they may differ from the device's in the last bits (expf, logf, rsqrtf, exp2f, …),
// as may sums of products, which nvcc fuses and g++ is told not to.
#pragma once

#include "runtime.h"

#include <vector_functions.h>

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#define FWD_SITE , ::fwd::host::Site site = ::fwd::host::Site::here()
#define FWD_ONLY_SITE ::fwd::host::Site site = ::fwd::host::Site::here()
#define FWD_PASS , site
#define FWD_ONLY_PASS site
#define FWD_SHARED(name) unsigned char* const name = ::fwd::host::current->where->shared
#define FWD_TRAP_IF(condition) \
    if (condition) ::fwd::host::trap(#condition, ::fwd::host::Site::here())

#define threadIdx (::uint3{::fwd::host::current->index, 0, 0})
#define blockIdx (::fwd::host::current->where->block)
#define blockDim (::fwd::host::current->where->threads)
#define gridDim (::fwd::host::current->where->grid)

// ---- integers ----

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t(a) * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline unsigned __brev(unsigned x) {
    unsigned y = 0;
    for (int bit = 0; bit < 32; ++bit) y |= (x >> bit & 1) << (31 - bit);
    return y;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    uint64_t bytes = uint64_t(high) << 32 | low;
    unsigned result = 0;
    for (int each = 0; each < 4; ++each) {
        unsigned choice = selector >> 4 * each & 15;
        unsigned byte = bytes >> 8 * (choice & 7) & 0xFF;
        result |= (choice & 8 ? (byte & 0x80 ? 0xFFu : 0u) : byte) << 8 * each;
    }
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((uint64_t(high) << 32 | low) >> (shift & 31));
}
template <typename T>
inline T min(T a, T b) { return b < a ? b : a; }
template <typename T>
inline T max(T a, T b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }

// ---- floating point ----

inline unsigned __float_as_uint(float x) { return fwd::host::bits<unsigned>(x); }
inline int __float_as_int(float x) { return fwd::host::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return fwd::host::bits<float>(x); }
inline float __int_as_float(int x) { return fwd::host::bits<float>(x); }
inline long long __double_as_longlong(double x) { return fwd::host::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return fwd::host::bits<double>(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return fwd::host::flushed(expf(x)); }
inline float __exp2f(float x) { return fwd::host::flushed(exp2f(x)); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

// ---- memory ----

template <typename T>
inline T __ldg(const T* address) { return *address; }
template <typename T>
inline T __ldcg(const T* address) { return *address; }
template <typename T>
inline T __ldcs(const T* address) { return *address; }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

#define FWD_ATOMIC(name, T, change) \
    inline T name(T* address, T value) { \
        return fwd::host::atomically(address, [value]([[maybe_unused]] T before) { return static_cast<T>(change); }); \
    }
#define FWD_ATOMICS(T) \
    FWD_ATOMIC(atomicAdd, T, before + value) \
    FWD_ATOMIC(atomicMax, T, before < value ? value : before) \
    FWD_ATOMIC(atomicMin, T, value < before ? value : before) \
    FWD_ATOMIC(atomicExch, T, value) \
    FWD_ATOMIC(atomicOr, T, before | value) \
    FWD_ATOMIC(atomicAnd, T, before & value)
FWD_ATOMICS(int)
FWD_ATOMICS(unsigned)
FWD_ATOMICS(unsigned long long)
FWD_ATOMIC(atomicAdd, float, before + value)
FWD_ATOMIC(atomicExch, float, value)
#undef FWD_ATOMICS
#undef FWD_ATOMIC
template <typename T>
inline T atomicCAS(T* address, T expected, T value) {
    return fwd::host::atomically(address, [=](T before) { return before == expected ? value : before; });
}

// ---- collectives, with masks ----

inline void __syncthreads(FWD_ONLY_SITE) { fwd::host::block_barrier(false, "__syncthreads", site); }
inline int __syncthreads_or(int predicate FWD_SITE) {
    return fwd::host::block_barrier(predicate != 0, "__syncthreads_or", site);
}
inline int __syncthreads_and(int predicate FWD_SITE) {
    return !fwd::host::block_barrier(predicate == 0, "__syncthreads_and", site);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu FWD_SITE) { fwd::host::ballot(false, mask, "__syncwarp", site); }
inline unsigned __ballot_sync(unsigned mask, int predicate FWD_SITE) {
    return fwd::host::ballot(predicate != 0, mask, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int predicate FWD_SITE) {
    return fwd::host::ballot(predicate != 0, mask, "__any_sync", site) != 0;
}
inline int __all_sync(unsigned mask, int predicate FWD_SITE) {
    return fwd::host::ballot(predicate != 0, mask, "__all_sync", site) == mask;
}

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int lane FWD_SITE) {
    return fwd::host::shuffle(value, mask, lane, "__shfl_sync", site);
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes FWD_SITE) {
    return fwd::host::shuffle(value, mask, int(threadIdx.x) ^ lanes, "__shfl_xor_sync", site);
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by FWD_SITE) {
    unsigned lane = threadIdx.x % 32;
    return fwd::host::shuffle(value, mask, int(lane < by ? lane : lane - by), "__shfl_up_sync", site);
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by FWD_SITE) {
    unsigned lane = threadIdx.x % 32;
    return fwd::host::shuffle(value, mask, int(lane + by > 31 ? lane : lane + by), "__shfl_down_sync", site);
}

#define FWD_REDUCE(name, T, combined) \
    inline T name(unsigned mask, T value FWD_SITE) { \
        return fwd::host::reduce(value, mask, [](T a, T b) { return static_cast<T>(combined); }, #name, site); \
    }
FWD_REDUCE(__reduce_add_sync, unsigned, a + b)
FWD_REDUCE(__reduce_add_sync, int, unsigned(a) + unsigned(b))
FWD_REDUCE(__reduce_max_sync, unsigned, a < b ? b : a)
FWD_REDUCE(__reduce_max_sync, int, a < b ? b : a)
FWD_REDUCE(__reduce_min_sync, unsigned, b < a ? b : a)
FWD_REDUCE(__reduce_min_sync, int, b < a ? b : a)
FWD_REDUCE(__reduce_or_sync, unsigned, a | b)
FWD_REDUCE(__reduce_and_sync, unsigned, a & b)
#undef FWD_REDUCE
