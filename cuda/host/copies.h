// Memory as kernels reach it through ptx.cuh: checked 16-byte accesses, and copies that arrive late.
#pragma once

#include "warp.h"

namespace fwd::host {

inline std::string address(const void* pointer) {
    char text[32];
    snprintf(text, sizeof text, "%p", pointer);
    return text;
}

void trap(const char* condition, Site site) { fail("traps, ", condition, ", at ", text(site)); }

void misaligned(const void* pointer, unsigned bytes, const char* what, const Site& site) {
    fail("misaligned address ", address(pointer), " in ", at(what, site), ", which takes multiples of ", bytes);
}

void outside_shared(const void* pointer, uint32_t bytes, const char* what, const Site& site) {
    const Block& block = *self().block;
    long offset = static_cast<const char*>(pointer) - block.shared();
    fail(bytes, " bytes at ", offset, " are outside the ", block.where.shared_bytes, " bytes of shared memory, in ",
         at(what, site));
}

void prefetch(const void* pointer, uint32_t bytes, const Site& site) {
    check_aligned(pointer, 16, "prefetch_l2", site);
    if (bytes % 16 != 0) fail(bytes, " bytes are no multiple of 16 in ", at("prefetch_l2", site));
    if (bytes == 0) return;
    const volatile char* memory = static_cast<const volatile char*>(pointer);
    static_cast<void>(memory[0]), static_cast<void>(memory[bytes - 1]);
}

void ldmatrix_x4(uint32_t (&r)[4], const void* shared, bool transposed, const Site& site) {
    const char* what = transposed ? "ldmatrix_x4_trans" : "ldmatrix_x4";
    check_aligned(in_shared(shared, 16, what, site), 16, what, site);
    Rows part{r, static_cast<const uint16_t*>(shared)};
    self().warp->in[self().lane()] = reinterpret_cast<uint64_t>(&part);
    meet(0xFFFFFFFFu, what, site, [transposed](Warp& warp) { ldmatrix_of_warp(warp, transposed); });
}

// ---- cp.async: lands at the wait, or at a random moment before ----

inline void land(const Copy& copy) {
    if (copy.source)
        memcpy(copy.target, copy.source, copy.bytes);
    else
        memset(copy.target, 0, copy.bytes);
}

void cp_async(void* shared, const void* global, uint32_t bytes, bool valid, const char* what, const Site& site) {
    Thread& it = self();
    check_aligned(in_shared(shared, bytes, what, site), bytes, what, site);
    check_aligned(global, bytes, what, site);
    Copy copy{shared, valid ? global : nullptr, bytes, it.groups, nullptr};
    if (it.block->worker->random.next() % 4 == 0) return land(copy);
    it.copies.push_back(copy);
}

void cp_async_commit() { ++self().groups; }

void cp_async_wait(int pending) {
    Thread& it = self();
    size_t kept = 0;
    bool backwards = it.block->worker->random.next() % 2;
    for (size_t each = 0; each < it.copies.size(); ++each) {
        const Copy& copy = it.copies[backwards ? it.copies.size() - 1 - each : each];
        if (int(it.groups - copy.group) > pending) land(copy);
    }
    for (const Copy& copy : it.copies)
        if (int(it.groups - copy.group) <= pending) it.copies[kept++] = copy;
    it.copies.resize(kept);
}

// ---- barriers in shared memory and the bulk copies that they count ----

struct Phase {  // what is in the 8 bytes
    uint32_t parity : 1, expected : 15, pending : 16;
    int32_t bytes;
};
static_assert(sizeof(Phase) == 8, "an mbarrier has 64 bits");

inline Phase& phase_of(uint64_t* barrier, const char* what, const Site& site) {
    in_shared(barrier, 8, what, site);
    for (uint64_t* known : self().block->mbarriers)
        if (known == barrier) return *reinterpret_cast<Phase*>(barrier);
    fail("uses an mbarrier that is not initialised, in ", at(what, site));
}

void mbarrier_init(uint64_t* barrier, uint32_t arrivals, const Site& site) {
    check_aligned(in_shared(barrier, 8, "mbarrier_init", site), 8, "mbarrier_init", site);
    if (arrivals == 0 || arrivals > MAX_THREADS) fail(arrivals, " arrivals in ", at("mbarrier_init", site));
    Block& block = *self().block;
    for (const Waiter& waiter : block.waiters)
        if (waiter.barrier == barrier) fail("makes an mbarrier anew that others wait for, in ", at("mbarrier_init", site));
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

void mbarrier_arrive(uint64_t* barrier, uint32_t bytes, const Site& site) {
    Phase& phase = phase_of(barrier, "mbarrier_arrive", site);
    if (phase.pending == 0) fail("one arrival too many in ", at("mbarrier_arrive", site));
    phase.bytes += static_cast<int32_t>(bytes);
    --phase.pending;
    end_phase(*self().block, barrier);
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

void mbarrier_wait(uint64_t* barrier, uint32_t parity, const Site& site) {
    Thread& it = self();
    Phase& phase = phase_of(barrier, "mbarrier_wait", site);
    if (parity > 1) fail("a parity of ", parity, " in ", at("mbarrier_wait", site));
    if (it.block->worker->random.next() % 4 == 0) land_any(*it.block->worker);
    if (phase.parity != parity) return;
    it.block->waiters.push_back({&it, barrier, parity});
    park("mbarrier_wait", site);
}

void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, const Site& site) {
    Block& block = *self().block;
    phase_of(barrier, "bulk_copy", site);
    check_aligned(in_shared(shared, bytes, "bulk_copy", site), 16, "bulk_copy", site);
    check_aligned(global, 16, "bulk_copy", site);
    if (bytes % 16 != 0) fail(bytes, " bytes are no multiple of 16 in ", at("bulk_copy", site));
    block.copies.push_back({shared, global, bytes, 0, barrier});
    if (block.worker->random.next() % 4 == 0) land_any(*block.worker);
}

}  // namespace fwd::host
