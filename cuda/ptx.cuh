// One instruction of PTX = one function, its twin for host execution beside it (cuda/host/). No other file holds `asm`.
//
// Twins know the line they are called from: FWD_SITE is their last parameter there, and nothing in a device build.
#pragma once

#ifdef FWD_HOST
#include "host/device.h"
#else
#ifdef __CUDACC_RTC__
using uint8_t = unsigned char;
using int8_t = signed char;
using uint16_t = unsigned short;
using int16_t = short;
using uint32_t = unsigned int;
using int32_t = int;
using uint64_t = unsigned long;
using int64_t = long;
#define INFINITY __builtin_bit_cast(float, 0x7F800000u)  // NVRTC has no math.h
#define NAN __builtin_bit_cast(float, 0x7FC00000u)
#else
#include <math.h>
#include <stdint.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp8.h>

#define FWD_SITE
#define FWD_ONLY_SITE
#define FWD_PASS
#define FWD_ONLY_PASS
#define FWD_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#ifdef FWD_DEBUG
#define FWD_TRAP_IF(condition) \
    if (condition) __trap()
#else
#define FWD_TRAP_IF(condition) static_cast<void>(sizeof(condition))
#endif
#endif

#define FWD_INLINE __device__ __forceinline__

namespace fwd {

using bf16 = __nv_bfloat16;
using fp8 = __nv_fp8_e4m3;
using Pack16 = uint4;  // 16 bytes: what one load brings

constexpr unsigned FULL_WARP = 0xFFFFFFFFu;

#ifndef FWD_HOST
// The policy "first to leave L2" as an operand: 16-byte loads take no `.L2::evict_first` of their own. For sm_100a it
// is the number that `createpolicy` gives: there ptxas makes it anew in six instructions for every load.
FWD_INLINE uint64_t evict_first() {
#if __CUDA_ARCH__ >= 1000
    return 0x12F0000000000000u;
#else
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
#endif
}
FWD_INLINE uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
FWD_INLINE uint64_t global_address(const void* global) { return __cvta_generic_to_global(global); }
#endif

// ---- loads and stores of 16 bytes, at 16 bytes ----

// Weights: read once a step, past L1, first to leave L2. Never for what a kernel of the same step wrote.
FWD_INLINE uint4 load_stream(const void* global FWD_SITE) {
#ifdef FWD_HOST
    return host::load16(global, "load_stream", site);
#else
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(global_address(global)), "l"(evict_first()));
    return value;
#endif
}

// The same for 4 bytes at 4 bytes.
FWD_INLINE uint32_t load_stream_4(const void* global FWD_SITE) {
#ifdef FWD_HOST
    return host::load4(global, "load_stream_4", site);
#else
    uint32_t value;
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;"
                 : "=r"(value)
                 : "l"(global_address(global)), "l"(evict_first()));
    return value;
#endif
}

FWD_INLINE uint4 load_global(const void* global FWD_SITE) {
#ifdef FWD_HOST
    return host::load16(global, "load_global", site);
#else
    uint4 value;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(global_address(global))
                 : "memory");
    return value;
#endif
}

FWD_INLINE void store_global(void* global, uint4 value FWD_SITE) {
#ifdef FWD_HOST
    host::store16(global, value, "store_global", site);
#else
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global_address(global)), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
#endif
}

FWD_INLINE uint4 load_shared(const void* shared FWD_SITE) {
#ifdef FWD_HOST
    return host::load16(host::in_shared(shared, 16, "load_shared", site), "load_shared", site);
#else
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(shared_address(shared))
                 : "memory");
    return value;
#endif
}

FWD_INLINE void store_shared(void* shared, uint4 value FWD_SITE) {
#ifdef FWD_HOST
    host::store16(host::in_shared(shared, 16, "store_shared", site), value, "store_shared", site);
#else
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
#endif
}

// Asks for `bytes` (a multiple of 16) at `global` (at 16 bytes) to be in L2 soon; one thread calls it for a range.
FWD_INLINE void prefetch_l2(const void* global, uint32_t bytes FWD_SITE) {
#ifdef FWD_HOST
    host::prefetch(global, bytes, site);
#else
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global_address(global)), "r"(bytes));
#endif
}

// ---- tensor cores ----

// d += a·b: a [16, 16] by rows, b [16, 8] by columns, d [16, 8] in fp32. With group = lane / 4, pair = lane % 4 · 2, a
// lane holds a[group (+8: registers 1, 3)][pair, pair + 1 (+8: registers 2, 3)], d[group (+8: 2, 3)][pair, pair + 1],
// b[pair, pair + 1 (+8: register 1)][group]. (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type".)
FWD_INLINE void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] FWD_SITE) {
#ifdef FWD_HOST
    host::mma_m16n8k16_bf16(d, a, b, site);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8×8 matrices of 16-bit numbers. Lane 8m + i gives the address of row i of matrix m (16 bytes, at 16 bytes); r[m]
// of a lane is matrix m, row lane / 4, columns lane % 4 · 2 and the next. `trans`: rows and columns exchanged.
FWD_INLINE void ldmatrix_x4(uint32_t (&r)[4], const void* shared FWD_SITE) {
#ifdef FWD_HOST
    host::ldmatrix_x4(r, shared, false, site);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
#endif
}

FWD_INLINE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared FWD_SITE) {
#ifdef FWD_HOST
    host::ldmatrix_x4(r, shared, true, site);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
#endif
}

// ---- copies that a thread waits for ----

// 16 bytes, past L1. The bytes are there for this thread after cp_async_wait, for others after a barrier behind that.
FWD_INLINE void cp_async_16(void* shared, const void* global FWD_SITE) {
#ifdef FWD_HOST
    host::cp_async(shared, global, 16, true, "cp_async_16", site);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global_address(global))
                 : "memory");
#endif
}

// The same, or 16 zero bytes; `global` is not read where not valid.
FWD_INLINE void cp_async_16_zfill(void* shared, const void* global, bool valid FWD_SITE) {
#ifdef FWD_HOST
    host::cp_async(shared, global, 16, valid, "cp_async_16_zfill", site);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global_address(global)), "r"(valid ? 16 : 0)
                 : "memory");
#endif
}

// The same for 4 bytes at 4 bytes, by way of L1.
FWD_INLINE void cp_async_4_zfill(void* shared, const void* global, bool valid FWD_SITE) {
#ifdef FWD_HOST
    host::cp_async(shared, global, 4, valid, "cp_async_4_zfill", site);
#else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
                 "l"(global_address(global)), "r"(valid ? 4 : 0)
                 : "memory");
#endif
}

FWD_INLINE void cp_async_commit() {
#ifdef FWD_HOST
    host::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `pending` of this thread's latest groups are still under way.
template <int pending>
FWD_INLINE void cp_async_wait() {
    static_assert(pending >= 0, "a number of groups");
#ifdef FWD_HOST
    host::cp_async_wait(pending);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// ---- bulk copies, counted by a barrier in shared memory (8 bytes, at 8 bytes) ----

// One thread, before all use; others may touch the barrier after mbarrier_fence (same thread) and block_barrier.
FWD_INLINE void mbarrier_init(uint64_t* barrier, uint32_t arrivals FWD_SITE) {
#ifdef FWD_HOST
    host::mbarrier_init(barrier, arrivals, site);
#else
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

FWD_INLINE void mbarrier_fence() {
#ifndef FWD_HOST
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// One arrival that also announces `bytes` of bulk copies, before they are started.
FWD_INLINE void mbarrier_expect(uint64_t* barrier, uint32_t bytes FWD_SITE) {
#ifdef FWD_HOST
    host::mbarrier_arrive(barrier, bytes, site);
#else
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

FWD_INLINE void mbarrier_arrive(uint64_t* barrier FWD_SITE) {
#ifdef FWD_HOST
    host::mbarrier_arrive(barrier, 0, site);
#else
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

#ifndef FWD_HOST
FWD_INLINE bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}
#endif

// Waits for the end of the phase of this parity: 0 for the first, then 1, 0, … in turn.
FWD_INLINE void mbarrier_wait(uint64_t* barrier, uint32_t parity FWD_SITE) {
#ifdef FWD_HOST
    host::mbarrier_wait(barrier, parity, site);
#else
    while (!mbarrier_try_wait(barrier, parity)) {
    }
#endif
}

// One thread: `bytes` (a multiple of 16) from global to shared memory, both at 16 bytes, counted by `barrier`.
FWD_INLINE void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier FWD_SITE) {
#ifdef FWD_HOST
    host::bulk_copy(shared, global, bytes, barrier, site);
#else
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(shared)),
        "l"(global_address(global)), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
#endif
}

// Between this thread's own reads or writes of shared memory and bulk copies into it.
FWD_INLINE void async_proxy_fence() {
#ifndef FWD_HOST
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- launches that overlap ----

// Until here only what no kernel writes may be read, and nothing written. Every thread of every kernel comes here.
FWD_INLINE void grid_dependency_wait(FWD_ONLY_SITE) {
#ifdef FWD_HOST
    host::grid_dependency_wait(site);
#else
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

FWD_INLINE void grid_dependency_trigger() {
#ifndef FWD_HOST
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- within a warp: all 32 lanes, at the same place ----

template <typename T>
FWD_INLINE T shuffle_xor(T value, int mask FWD_SITE) {
#ifdef FWD_HOST
    return host::shuffle(value, FULL_WARP, int(threadIdx.x) ^ mask, "shuffle_xor", site);
#else
    return __shfl_xor_sync(FULL_WARP, value, mask);
#endif
}

template <typename T>
FWD_INLINE T shuffle(T value, int lane FWD_SITE) {
#ifdef FWD_HOST
    return host::shuffle(value, FULL_WARP, lane, "shuffle", site);
#else
    return __shfl_sync(FULL_WARP, value, lane);
#endif
}

// From the lane `distance` below or above; its own value where there is none.
template <typename T>
FWD_INLINE T shuffle_up(T value, int distance FWD_SITE) {
#ifdef FWD_HOST
    int lane = threadIdx.x % 32;
    return host::shuffle(value, FULL_WARP, lane < distance ? lane : lane - distance, "shuffle_up", site);
#else
    return __shfl_up_sync(FULL_WARP, value, distance);
#endif
}

template <typename T>
FWD_INLINE T shuffle_down(T value, int distance FWD_SITE) {
#ifdef FWD_HOST
    int lane = threadIdx.x % 32;
    return host::shuffle(value, FULL_WARP, lane + distance > 31 ? lane : lane + distance, "shuffle_down", site);
#else
    return __shfl_down_sync(FULL_WARP, value, distance);
#endif
}

FWD_INLINE unsigned ballot(bool predicate FWD_SITE) {
#ifdef FWD_HOST
    return host::ballot(predicate, FULL_WARP, "ballot", site);
#else
    return __ballot_sync(FULL_WARP, predicate);
#endif
}

FWD_INLINE void warp_barrier(FWD_ONLY_SITE) {
#ifdef FWD_HOST
    host::ballot(false, FULL_WARP, "warp_barrier", site);
#else
    __syncwarp();
#endif
}

// ---- within a block: all threads, at the same place ----

FWD_INLINE void block_barrier(FWD_ONLY_SITE) {
#ifdef FWD_HOST
    host::block_barrier(false, "block_barrier", site);
#else
    __syncthreads();
#endif
}

// A barrier that tells every thread whether the predicate holds in any.
FWD_INLINE bool block_any(bool predicate FWD_SITE) {
#ifdef FWD_HOST
    return host::block_barrier(predicate, "block_any", site);
#else
    return __syncthreads_or(predicate) != 0;
#endif
}

// ---- memory that blocks share ----

FWD_INLINE void fence() {
#ifdef FWD_HOST
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#else
    __threadfence();
#endif
}

FWD_INLINE int load_acquire(const int* address FWD_SITE) {
#ifdef FWD_HOST
    return host::load_acquire(address, site);
#else
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(global_address(address)) : "memory");
    return value;
#endif
}

FWD_INLINE void store_release(int* address, int value) {
#ifdef FWD_HOST
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);
#else
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(global_address(address)), "r"(value) : "memory");
#endif
}

// Seen by the host, which polls pinned memory, after all that this thread has written or seen written.
FWD_INLINE void store_release_system(int64_t* address, int64_t value) {
#ifdef FWD_HOST
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);
#else
    asm volatile("st.release.sys.global.s64 [%0], %1;" ::"l"(global_address(address)), "l"(value) : "memory");
#endif
}

// Atomics return the value before. A sum of floats in arrival order does not repeat: that one is for statistics alone.
FWD_INLINE int atomic_add(int* address, int value) { return atomicAdd(address, value); }
FWD_INLINE unsigned atomic_add(unsigned* address, unsigned value) { return atomicAdd(address, value); }
FWD_INLINE uint64_t atomic_add(uint64_t* address, uint64_t value) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(address), static_cast<unsigned long long>(value));
}
FWD_INLINE float atomic_add(float* address, float value) { return atomicAdd(address, value); }
FWD_INLINE int atomic_max(int* address, int value) { return atomicMax(address, value); }
FWD_INLINE unsigned atomic_max(unsigned* address, unsigned value) { return atomicMax(address, value); }
FWD_INLINE unsigned long long atomic_max(unsigned long long* address, unsigned long long value) {
    return atomicMax(address, value);
}

// All threads of a cooperative grid meet. `state` is 0 before the first use; its lowest 31 bits are 0 after each, the
// highest changes sides, so that it serves again without being reset.
FWD_INLINE void grid_barrier(unsigned* state FWD_SITE) {
#ifdef FWD_HOST
    host::grid_barrier(state, site);
#else
    fence();
    block_barrier();
    if (threadIdx.x == 0) {
        unsigned others = gridDim.x * gridDim.y * gridDim.z - 1;
        bool first = (blockIdx.x | blockIdx.y | blockIdx.z) == 0;
        unsigned before = atomicAdd(state, first ? 0x80000000u - others : 1u);
        while (((before ^ static_cast<unsigned>(load_acquire(reinterpret_cast<int*>(state)))) & 0x80000000u) == 0) {
        }
        fence();
    }
    block_barrier();
#endif
}

// ---- arithmetic ----

// (a & mask) | more: one instruction also where both are constants.
FWD_INLINE uint32_t and_or(uint32_t a, uint32_t mask, uint32_t more) {
#ifdef FWD_HOST
    return (a & mask) | more;
#else
    uint32_t value;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(value) : "r"(a), "r"(mask), "r"(more));
    return value;
#endif
}

// Two bf16 at once, each rounded to nearest; subnormals count, whatever is done to those of floats.
FWD_INLINE uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
#ifdef FWD_HOST
    return host::multiplied(a & 0xFFFF, b & 0xFFFF) | host::multiplied(a >> 16, b >> 16) << 16;
#else
    uint32_t value;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(value) : "r"(a), "r"(b));
    return value;
#endif
}

// The same by the lower half of b, or the upper: an operand's choice of the instruction.
FWD_INLINE uint32_t mul_bf16x2_low(uint32_t a, uint32_t b) {
#ifdef FWD_HOST
    return mul_bf16x2(a, (b & 0xFFFF) | b << 16);
#else
    uint32_t value;
    asm("{\n.reg .b16 low, high;\n.reg .b32 pair;\n"
        "mov.b32 {low, high}, %2;\n"
        "mov.b32 pair, {low, low};\n"
        "mul.rn.bf16x2 %0, %1, pair;\n}"
        : "=r"(value)
        : "r"(a), "r"(b));
    return value;
#endif
}
FWD_INLINE uint32_t mul_bf16x2_high(uint32_t a, uint32_t b) {
#ifdef FWD_HOST
    return mul_bf16x2(a, b >> 16 | (b & 0xFFFF0000));
#else
    uint32_t value;
    asm("{\n.reg .b16 low, high;\n.reg .b32 pair;\n"
        "mov.b32 {low, high}, %2;\n"
        "mov.b32 pair, {high, high};\n"
        "mul.rn.bf16x2 %0, %1, pair;\n}"
        : "=r"(value)
        : "r"(a), "r"(b));
    return value;
#endif
}

// Differences of two bf16 and the lower half of b, or the upper.
FWD_INLINE uint32_t sub_bf16x2_low(uint32_t a, uint32_t b) {
#ifdef FWD_HOST
    return host::subtracted(a & 0xFFFF, b & 0xFFFF) | host::subtracted(a >> 16, b & 0xFFFF) << 16;
#else
    uint32_t value;
    asm("{\n.reg .b16 low, high;\n.reg .b32 pair;\n"
        "mov.b32 {low, high}, %2;\n"
        "mov.b32 pair, {low, low};\n"
        "sub.rn.bf16x2 %0, %1, pair;\n}"
        : "=r"(value)
        : "r"(a), "r"(b));
    return value;
#endif
}
FWD_INLINE uint32_t sub_bf16x2_high(uint32_t a, uint32_t b) {
#ifdef FWD_HOST
    return host::subtracted(a & 0xFFFF, b >> 16) | host::subtracted(a >> 16, b >> 16) << 16;
#else
    uint32_t value;
    asm("{\n.reg .b16 low, high;\n.reg .b32 pair;\n"
        "mov.b32 {low, high}, %2;\n"
        "mov.b32 pair, {high, high};\n"
        "sub.rn.bf16x2 %0, %1, pair;\n}"
        : "=r"(value)
        : "r"(a), "r"(b));
    return value;
#endif
}

// a·b + c in one instruction, where a compiler would make shifts and masks of it.
FWD_INLINE uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
#ifdef FWD_HOST
    return a * b + c;
#else
    uint32_t value;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(value) : "r"(a), "r"(b), "r"(c));
    return value;
#endif
}

// 2^x to about 2 units in the last place, subnormal results flushed; the host's is libm's, so the last bits may differ.
FWD_INLINE float exp2_approx(float x) {
#ifdef FWD_HOST
    return host::flushed(exp2f(x));
#else
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
#endif
}

}  // namespace fwd
