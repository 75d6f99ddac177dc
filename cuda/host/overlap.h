// Launches that overlap: what kernels write is poison to the next one until its threads wait for the launch before.
#pragma once

#include "copies.h"

namespace fwd::host {

// Before the first thread of the resident blocks runs.
inline void hide(Worker& worker) {
    const Call& call = *worker.grid->call;
    worker.hidden.resize(call.region_count);
    worker.held.clear();
    worker.unwaited = worker.resident * call.threads;
    for (size_t each = 0; each < call.region_count; ++each) {
        const Region& region = call.regions[each];
        worker.hidden[each].assign(region.memory, region.memory + region.bytes);
        memset(region.memory, int(call.poison), region.bytes);
    }
}

// Puts the contents back and lets those go on that wait for them; false if that was done before.
inline bool reveal(Worker& worker) {
    if (worker.hidden.empty()) return false;
    const Call& call = *worker.grid->call;
    for (size_t each = 0; each < call.region_count; ++each) {
        const Region& region = call.regions[each];
        for (size_t byte = 0; byte < region.bytes; ++byte)
            if (static_cast<unsigned char>(region.memory[byte]) != call.poison)
                report(*worker.grid,
                       say(describe(*worker.grid, *worker.blocks[0]), ": writes before grid_dependency_wait, at byte ", byte,
                           " of ", address(region.memory)));
        memcpy(region.memory, worker.hidden[each].data(), region.bytes);
    }
    worker.hidden.clear();
    for (Thread* thread : worker.held) thread->block->wake(*thread);
    return true;
}

void grid_dependency_wait(const Site& site) {
    Thread& it = self();
    Worker& worker = *it.block->worker;
    if (it.waited) return;
    it.waited = true;
    if (worker.hidden.empty()) return;
    worker.held.push_back(&it);
    if (--worker.unwaited == 0) reveal(worker);
    park("grid_dependency_wait", site);
}

}  // namespace fwd::host
