// Memory as kernels reach it through ptx.cuh: checked 16-byte accesses, and copies that arrive late.
#pragma once

#include "warp.h"

namespace fwd::host {

inline std::string address(const void* pointer) {
    char text[32];
    snprintf(text, sizeof text, "%p", pointer);
    return text;
}

inline void check_aligned(const void* pointer, unsigned bytes, const char* what, const Site& site) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
        fail("misaligned address " + address(pointer) + " in " + at(what, site) + ", which takes multiples of " + std::to_string(bytes));
}

// The pointer, if `bytes` from there are in the block's shared memory.
template <typename T>
inline T* in_shared(T* pointer, uint32_t bytes, const char* what, const Site& site) {
    const Block& block = *current->block;
    long offset = reinterpret_cast<const char*>(pointer) - block.shared;
    if (offset < 0 || offset + long(bytes) > long(block.shared_bytes))
        fail(std::to_string(bytes) + " bytes at " + std::to_string(offset) + " are outside the " + std::to_string(block.shared_bytes) +
             " bytes of shared memory, in " + at(what, site));
    return pointer;
}

inline uint4 load16(const void* pointer, const char* what, const Site& site) {
    check_aligned(pointer, 16, what, site);
    return *static_cast<const uint4*>(pointer);
}

inline void store16(void* pointer, uint4 value, const char* what, const Site& site) {
    check_aligned(pointer, 16, what, site);
    *static_cast<uint4*>(pointer) = value;
}

inline void prefetch(const void* pointer, uint32_t bytes, const Site& site) {
    check_aligned(pointer, 16, "prefetch_l2", site);
    if (bytes % 16 != 0) fail(std::to_string(bytes) + " bytes are no multiple of 16 in " + at("prefetch_l2", site));
    if (bytes == 0) return;
    const volatile char* memory = static_cast<const volatile char*>(pointer);
    static_cast<void>(memory[0]), static_cast<void>(memory[bytes - 1]);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared, bool transposed, const Site& site) {
    const char* what = transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4";
    check_aligned(in_shared(shared, 16, what, site), 16, what, site);
    Rows part{r, static_cast<const uint16_t*>(shared)};
    current->warp->in[current->lane()] = reinterpret_cast<uint64_t>(&part);
    meet(0xFFFFFFFFu, what, site, [transposed](Warp& warp) { ldmatrix_of_warp(warp, transposed); });
}

// ---- cp.async: lands at the wait, or at a random moment before ----

inline void land(const Copy& copy) {
    if (copy.source)
        memcpy(copy.target, copy.source, copy.bytes);
    else
        memset(copy.target, 0, copy.bytes);
}

inline void cp_async(void* shared, const void* global, uint32_t bytes, bool valid, const char* what, const Site& site) {
    Thread& self = *current;
    check_aligned(in_shared(shared, bytes, what, site), bytes, what, site);
    check_aligned(global, bytes, what, site);
    Copy copy{shared, valid ? global : nullptr, bytes, self.groups, nullptr};
    if (self.block->worker->random.next() % 4 == 0) return land(copy);
    self.copies.push_back(copy);
}

inline void cp_async_commit() { ++current->groups; }

inline void cp_async_wait(int pending) {
    Thread& self = *current;
    size_t kept = 0;
    bool backwards = self.block->worker->random.next() % 2;
    for (size_t each = 0; each < self.copies.size(); ++each) {
        const Copy& copy = self.copies[backwards ? self.copies.size() - 1 - each : each];
        if (int(self.groups - copy.group) > pending) land(copy);
    }
    for (const Copy& copy : self.copies)
        if (int(self.groups - copy.group) <= pending) self.copies[kept++] = copy;
    self.copies.resize(kept);
}

// ---- barriers in shared memory and the bulk copies that they count ----

struct Phase {  // what is in the 8 bytes
    uint32_t parity : 1, expected : 15, pending : 16;
    int32_t bytes;
};
static_assert(sizeof(Phase) == 8, "an mbarrier has 64 bits");

inline Phase& phase_of(uint64_t* barrier, const char* what, const Site& site) {
    in_shared(barrier, 8, what, site);
    for (uint64_t* known : current->block->mbarriers)
        if (known == barrier) return *reinterpret_cast<Phase*>(barrier);
    fail("uses an mbarrier that is not initialised, in " + at(what, site));
}

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals, const Site& site) {
    check_aligned(in_shared(barrier, 8, "mbarrier_init", site), 8, "mbarrier_init", site);
    if (arrivals == 0 || arrivals > MAX_THREADS) fail(std::to_string(arrivals) + " arrivals in " + at("mbarrier_init", site));
    Block& block = *current->block;
    for (const Waiter& waiter : block.waiters)
        if (waiter.barrier == barrier) fail("initialises an mbarrier that threads wait for, in " + at("mbarrier_init", site));
    *reinterpret_cast<Phase*>(barrier) = {0, arrivals, arrivals, 0};
    bool known = false;
    for (uint64_t* each : block.mbarriers) known = known || each == barrier;
    if (!known) block.mbarriers.push_back(barrier);
}

inline void end_phase(Block& block, uint64_t* barrier) {
    Phase& phase = *reinterpret_cast<Phase*>(barrier);
    if (phase.pending != 0 || phase.bytes != 0) return;
    phase.parity ^= 1;
    phase.pending = phase.expected;
    size_t kept = 0;
    for (const Waiter& waiter : block.waiters) {
        if (waiter.barrier == barrier && waiter.parity != phase.parity)
            block.wake(*waiter.thread);
        else
            block.waiters[kept++] = waiter;
    }
    block.waiters.resize(kept);
}

inline void mbarrier_arrive(uint64_t* barrier, uint32_t bytes, const Site& site) {
    Phase& phase = phase_of(barrier, "mbarrier_arrive", site);
    if (phase.pending == 0) fail("one arrival too many in " + at("mbarrier_arrive", site));
    phase.bytes += static_cast<int32_t>(bytes);
    --phase.pending;
    end_phase(*current->block, barrier);
}

inline void land_bulk(Block& block, size_t index) {
    Copy copy = block.copies[index];
    block.copies.erase(block.copies.begin() + long(index));
    memcpy(copy.target, copy.source, copy.bytes);
    reinterpret_cast<Phase*>(copy.barrier)->bytes -= static_cast<int32_t>(copy.bytes);
    end_phase(block, copy.barrier);
}

// Lets one bulk copy arrive, if any is under way in a resident block.
inline bool land_any(Worker& worker) {
    for (unsigned each = 0; each < worker.resident; ++each) {
        Block& block = *worker.blocks[each];
        if (block.copies.empty()) continue;
        land_bulk(block, worker.random.below(uint32_t(block.copies.size())));
        return true;
    }
    return false;
}

inline void mbarrier_wait(uint64_t* barrier, uint32_t parity, const Site& site) {
    Thread& self = *current;
    Phase& phase = phase_of(barrier, "mbarrier_wait", site);
    if (parity > 1) fail("a parity of " + std::to_string(parity) + " in " + at("mbarrier_wait", site));
    if (self.block->worker->random.next() % 4 == 0) land_any(*self.block->worker);
    if (phase.parity != parity) return;
    self.block->waiters.push_back({&self, barrier, parity});
    park("mbarrier_wait", site);
}

inline void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, const Site& site) {
    Block& block = *current->block;
    phase_of(barrier, "bulk_copy", site);
    check_aligned(in_shared(shared, bytes, "bulk_copy", site), 16, "bulk_copy", site);
    check_aligned(global, 16, "bulk_copy", site);
    if (bytes % 16 != 0) fail(std::to_string(bytes) + " bytes are no multiple of 16 in " + at("bulk_copy", site));
    block.copies.push_back({shared, global, bytes, 0, barrier});
    if (block.worker->random.next() % 4 == 0) land_any(*block.worker);
}

inline void grid_dependency_wait() { current->waited = true; }

}  // namespace fwd::host
