// Who runs next, and where all threads of a block or a grid meet.
#pragma once

#include "block.h"

namespace fwd::host {

// ---- who runs next ----

void thread_main();  // grid.h
bool land_any(Worker& worker);  // copies.h
bool reveal(Worker& worker);  // overlap.h

ALWAYS_INLINE Thread* pick(Block& block, unsigned index) {
    Warp& warp = block.warp[index];
    unsigned lane = block.worker->random.bit(warp.runnable);
    warp.runnable &= ~(1u << lane);
    if (!warp.runnable) block.runnable &= ~(1u << index);
    return &block.thread[index * WARP + lane];
}

// A runnable thread of the block or, where several are resident, of any; null if there is none.
inline Thread* choose(Worker& worker, Block& block) {
    if (worker.resident == 1) return block.runnable ? pick(block, worker.random.bit(block.runnable)) : nullptr;
    unsigned first = worker.random.below(worker.resident);
    for (unsigned each = 0; each < worker.resident; ++each) {
        Block& other = *worker.blocks[(first + each) % worker.resident];
        if (other.runnable) return pick(other, worker.random.bit(other.runnable));
    }
    return nullptr;
}

// The same; before there is none, copies that are under way arrive and the launch before ends.
inline Thread* search(Worker& worker, Block& block) {
    Thread* next = choose(worker, block);
    while (!next && (land_any(worker) || reveal(worker))) next = choose(worker, block);
    return next;
}

// Who runs next: of this warp, if any of it can.
ALWAYS_INLINE Thread* next_of(Worker& worker, Block& block, unsigned warp, bool elsewhere = false) {
    return block.warp[warp].runnable && !elsewhere ? pick(block, warp) : search(worker, block);
}

ALWAYS_INLINE void go(Worker& worker, Context& from, Thread& to, bool forever = false) {
    if (!to.stack) {
        to.stack = worker.stacks.take();
        to.context = {to.stack->start(thread_main), to.stack->bottom, STACK, nullptr};
    }
    current = &to;
    switch_context(from, to.context, forever);
}

// Lets another thread run until this one is chosen again. One switch in 16 leaves the warp.
inline void pause(bool elsewhere = false) {
    Thread& it = self();
    Worker& worker = *it.block->worker;
    elsewhere = elsewhere || (worker.random.state >> 60) == 0;
    Thread* next = next_of(worker, *it.block, it.index / WARP, elsewhere);
    if (next == &it) return;
    if (next) return go(worker, it.context, *next);
    current = nullptr;
    switch_context(it.context, worker.main);
}

// Waits until another makes it runnable.
inline void park(const char* what, const Site& site) {
    Thread& it = self();
    it.what = what, it.site = site;
    it.block->worker->spins = 0;
    pause();
}

// ---- barriers of a block or a grid ----

// The lanes that wait in a collective for this one, which goes elsewhere: an error.
inline void check_not_awaited(Thread& it, const std::string& doing) {
    for (const Group& group : it.warp->groups)
        if (group.pending && group.mask & it.bit())
            fail(doing, " while lanes of its warp wait for it in ", at(group.what, group.site));
}

inline void check_arrival(Thread& it, Barrier& barrier, const char* what, const Site& site) {
    if (it.warp->parked) check_not_awaited(it, "comes to " + at(what, site));
    if (barrier.exited)
        fail("comes to ", at(what, site), ", and ", barrier.exited, " threads have ended that would have to");
    if (barrier.arrived && (!(barrier.site == site) || (barrier.what != what && strcmp(barrier.what, what) != 0)))
        fail("comes to ", at(what, site), " while ", barrier.arrived, " threads wait in ",
             at(barrier.what, barrier.site), ": barriers are reached divergently");
    barrier.what = what, barrier.site = site;
}

// Meets all threads of the block; true for all where the predicate holds in any.
bool block_barrier(bool predicate, const char* what, const Site& site) {
    Thread& it = self();
    Block& block = *it.block;
    Barrier& barrier = block.barrier;
    check_arrival(it, barrier, what, site);
    barrier.any = (barrier.arrived++ != 0 && barrier.any) || predicate;
    it.warp->blocked |= it.bit();
    if (barrier.arrived == block.threads) {
        barrier.arrived = 0, barrier.result = barrier.any;
        block.release_all();
    }
    park(what, site);
    return barrier.result;  // the next time needs this thread
}

void grid_barrier(unsigned* state, const Site& site) {
    Thread& it = self();
    Worker& worker = *it.block->worker;
    Barrier& barrier = worker.grid->barrier;
    std::string place = at("grid_barrier", site);
    if (!worker.grid->call->cooperative) fail("comes to ", place, " in a launch that is not cooperative");
    if (*state & 0x7FFFFFFFu) fail("finds a state that is not 0 in ", place);
    check_arrival(it, barrier, "grid_barrier", site);
    it.warp->blocked |= it.bit();
    if (++barrier.arrived == worker.grid->blocks() * it.block->threads) {
        barrier.arrived = 0;
        *state ^= 0x80000000u;
        for (unsigned each = 0; each < worker.resident; ++each) worker.blocks[each]->release_all();
    }
    park("grid_barrier", site);
}

// A look at what another block may store: others go on before it.
int load_acquire(const int* address, const Site& site) {
    Thread& it = self();
    if (++it.block->worker->spins > 1u << 20) fail("waits without end for a store, in ", at("load_acquire", site));
    it.block->wake(it);
    pause(true);
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}

}  // namespace fwd::host
