// What the text of a kernel sees of the runtime (runtime.cpp): who it is, and whom it meets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "crt/host_defines.h"  // before any header of the toolkit

#include <vector_types.h>

namespace fwd::host {

// A place in the text of a kernel.
struct Site {
    const char* file = "";
    int line = 0;

    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

struct Where {  // of a block
    uint3 block, threads, grid;
    unsigned char* shared;
    uint32_t shared_bytes;
};

struct Self {  // of a thread
    const Where* where;
    unsigned index;
    bool waited;  // for the launch before
};

extern __thread Self* current __attribute__((tls_model("initial-exec")));

[[noreturn, gnu::cold]] void trap(const char* condition, Site site);

// ---- memory ----

[[noreturn, gnu::cold]] void misaligned(const void* pointer, unsigned bytes, const char* what, const Site& site);
[[noreturn, gnu::cold]] void outside_shared(const void* pointer, uint32_t bytes, const char* what, const Site& site);

inline void check_aligned(const void* pointer, unsigned bytes, const char* what, const Site& site) {
    if (__builtin_expect(reinterpret_cast<uintptr_t>(pointer) % bytes != 0, 0)) misaligned(pointer, bytes, what, site);
}

// The pointer, if `bytes` from there are in the block's shared memory.
template <typename T>
inline T* in_shared(T* pointer, uint32_t bytes, const char* what, const Site& site) {
    uint64_t offset = reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(current->where->shared);
    bool outside = offset > UINT32_MAX || offset + bytes > current->where->shared_bytes;
    if (__builtin_expect(outside, 0)) outside_shared(pointer, bytes, what, site);
    return pointer;
}

inline uint4 load16(const void* pointer, const char* what, const Site& site) {
    check_aligned(pointer, 16, what, site);
    return *static_cast<const uint4*>(pointer);
}

inline uint32_t load4(const void* pointer, const char* what, const Site& site) {
    check_aligned(pointer, 4, what, site);
    return *static_cast<const uint32_t*>(pointer);
}

inline void store16(void* pointer, uint4 value, const char* what, const Site& site) {
    check_aligned(pointer, 16, what, site);
    *static_cast<uint4*>(pointer) = value;
}

void prefetch(const void* pointer, uint32_t bytes, const Site& site);
int load_acquire(const int* address, const Site& site);

// Replaces what is at the address by change(it); returns what was there. Blocks of two workers may do so at once.
template <typename T, typename Change>
inline T atomically(T* address, Change change) {
    T before, after;
    __atomic_load(address, &before, __ATOMIC_SEQ_CST);
    do after = change(before);
    while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return before;
}

// ---- copies ----

void cp_async(void* shared, const void* global, uint32_t bytes, bool valid, const char* what, const Site& site);
void cp_async_commit();
void cp_async_wait(int pending);
void mbarrier_init(uint64_t* barrier, uint32_t arrivals, const Site& site);
void mbarrier_arrive(uint64_t* barrier, uint32_t bytes, const Site& site);
void mbarrier_wait(uint64_t* barrier, uint32_t parity, const Site& site);
void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, const Site& site);

void grid_dependency_wait(const Site& site);

// ---- meetings ----

bool block_barrier(bool predicate, const char* what, const Site& site);
void grid_barrier(unsigned* state, const Site& site);

// The lanes of `mask` meet: each gets what lane `source` gave; all that was given; the bits of the predicates.
uint64_t shuffle_bits(uint64_t value, uint32_t mask, int source, const char* what, const Site& site);
void gather(uint64_t value, uint32_t mask, uint64_t (&all)[32], const char* what, const Site& site);
uint32_t ballot(bool predicate, uint32_t mask, const char* what, const Site& site);

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site& site);
void ldmatrix_x4(uint32_t (&r)[4], const void* shared, bool transposed, const Site& site);

template <typename To, typename From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

// What libm computes as a subnormal, as the device's flushing functions give it.
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

// Products and differences of two bf16, rounded once: doubles hold them, and the subnormals that floats flush here.
inline double wide(uint32_t number) {
    if (number & 0x7F80) return bits<float>(number << 16);
    double magnitude = (number & 0x7F) * 0x1p-133;
    return number & 0x8000 ? -magnitude : magnitude;
}
inline uint32_t narrow(double value) {
    uint32_t sign = std::signbit(value) ? 0x8000 : 0;
    if (fabs(value) < 0x1p-126) return sign | static_cast<uint32_t>(nearbyint(fabs(value) * 0x1p133));
    if (std::isnan(value)) return 0x7FFF;
    uint32_t word = bits<uint32_t>(static_cast<float>(value));
    return (word + 0x7FFF + (word >> 16 & 1)) >> 16;
}
inline uint32_t multiplied(uint32_t a, uint32_t b) { return narrow(wide(a) * wide(b)); }
inline uint32_t subtracted(uint32_t a, uint32_t b) { return narrow(wide(a) - wide(b)); }

template <typename T>
inline T shuffle(T value, uint32_t mask, int source, const char* what, const Site& site) {
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof(T));
    word = shuffle_bits(word, mask, source, what, site);
    memcpy(&value, &word, sizeof(T));
    return value;
}

template <typename T, typename Combine>
inline T reduce(T value, uint32_t mask, Combine combine, const char* what, const Site& site) {
    uint64_t all[32];
    gather(bits<uint32_t>(value), mask, all, what, site);
    T total = bits<T>(static_cast<uint32_t>(all[__builtin_ctz(mask)]));
    for (uint32_t rest = mask & (mask - 1); rest; rest &= rest - 1)
        total = combine(total, bits<T>(static_cast<uint32_t>(all[__builtin_ctz(rest)])));
    return total;
}

// ---- what a library of kernels exports ----

struct Export {
    const char* name;
    const char* parameters;  // p: a pointer, w: one to write through, i: int, f: float
    void (*thunk)(const char* arguments);  // 8 bytes each
};

template <typename T>
constexpr char parameter_code() {
    static_assert(std::is_pointer_v<T> || std::is_same_v<T, int> || std::is_same_v<T, float>,
                  "parameters of kernels are pointers, int and float");
    if (std::is_pointer_v<T>) return std::is_const_v<std::remove_pointer_t<T>> ? 'p' : 'w';
    return std::is_same_v<T, int> ? 'i' : 'f';
}

template <auto kernel>
struct Entry;

template <typename... P, void (*kernel)(P...)>
struct Entry<kernel> {
    static constexpr char parameters[] = {parameter_code<P>()..., 0};

    template <size_t... each>
    static void spread([[maybe_unused]] const char* arguments, std::index_sequence<each...>) {
        kernel(*reinterpret_cast<const P*>(arguments + 8 * each)...);
    }
    static void call(const char* arguments) { spread(arguments, std::index_sequence_for<P...>()); }
};

struct Region {  // of memory that the launch before may still be writing
    char* memory;
    uint64_t bytes;
};

// A launch, as the caller describes it (fwd/kernels/host.py).
struct Call {
    const char* kernel;
    void (*thunk)(const char* arguments);
    const char* arguments;
    uint32_t grid[3];
    uint32_t threads;
    uint32_t shared;
    uint32_t cooperative;
    uint32_t workers;
    uint32_t poison;
    uint64_t seed;
    const Region* regions;
    uint64_t region_count;
};

}  // namespace fwd::host
