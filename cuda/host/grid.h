// Runs a launch: its blocks in random order on two workers, or all at once on one, and says what went wrong.
#pragma once

#include <signal.h>

#include <thread>
#include <utility>

#include "overlap.h"

namespace fwd::host {

constexpr uint32_t CANARY = 128;  // bytes before the shared memory of a block; more may follow up to the guard page
constexpr size_t GUARD = 1 << 20;
constexpr uint32_t SHARED_LIMIT = 227 * 1024;
constexpr unsigned MAX_RESIDENT = 16384;  // threads

// ---- one thread ----

inline void check_end(Thread& it) {
    Block& block = *it.block;
    if (!it.waited) fail("ends and has not come to grid_dependency_wait");
    if (!it.copies.empty()) fail("ends with cp.async under way that nobody waited for: ", it.copies.size());
    if (block.alive == 1 && !block.copies.empty()) fail("ends, the last of its block, with bulk copies under way");
    if (it.warp->parked) check_not_awaited(it, "ends");
    for (const Barrier* barrier : {&block.barrier, &block.worker->grid->barrier})
        if (barrier->arrived)
            fail("ends while ", barrier->arrived, " threads wait for it in ", at(barrier->what, barrier->site));
}

[[noreturn]] inline void end_thread() {
    Thread& it = self();
    Block& block = *it.block;
    Worker& worker = *block.worker;
    check_end(it);
    it.warp->exited |= it.bit();
    ++block.barrier.exited, --block.alive;
    if (worker.grid->call->cooperative) ++worker.grid->barrier.exited;
    worker.spins = 0;
    if (worker.ended) worker.stacks.give(worker.ended);
    worker.ended = it.stack;
    if (Thread* next = next_of(worker, block, it.index / WARP)) {
        go(worker, it.context, *next, true);
    } else {
        current = nullptr;
        switch_context(it.context, worker.main, true);
    }
    __builtin_unreachable();
}

inline void thread_main() {
    arrive(self().context);
    const Call& call = *self().block->worker->grid->call;
    call.thunk(call.arguments);
    end_thread();
}

// ---- one block, or those of a cooperative grid ----

// Shared memory ends where pages begin that nobody may touch.
inline char* map_shared() {
    size_t room = (CANARY + SHARED_LIMIT + PAGE) / PAGE * PAGE;
    void* memory = map(room + GUARD);
    char* end = static_cast<char*>(memory) + room;
    if (memory == MAP_FAILED || mprotect(end, GUARD, PROT_NONE) != 0) abort();
    return end;
}

// What lies around shared memory: it changes with the poison, so that who reads there has other results.
inline unsigned char canary(const Call& call) { return static_cast<unsigned char>(call.poison ^ 0x5Cu); }
inline uint32_t aligned_shared(const Block& block) { return (block.where.shared_bytes + 127) / 128 * 128; }

inline void prepare(Worker& worker, Block& block, uint32_t index) {
    const Call& call = *worker.grid->call;
    char* end = block.where.shared ? block.shared() + aligned_shared(block) : map_shared();
    block.where.shared_bytes = call.shared;
    char* shared = end - aligned_shared(block);
    memset(shared - CANARY, canary(call), CANARY);
    memset(shared, int(call.poison), call.shared);
    memset(shared + call.shared, canary(call), aligned_shared(block) - call.shared);
    block.where.shared = reinterpret_cast<unsigned char*>(shared);
    uint32_t line = index / call.grid[0];
    block.where.block = {index % call.grid[0], line % call.grid[1], line / call.grid[1]};
    block.where.threads = {call.threads, 1, 1};
    block.where.grid = {call.grid[0], call.grid[1], call.grid[2]};
    block.worker = &worker;
    block.threads = block.alive = call.threads;
    block.barrier = {};
    block.mbarriers.clear(), block.waiters.clear(), block.copies.clear();
    block.warp.resize(call.threads / WARP);
    block.thread.resize(call.threads);
    for (Warp& warp : block.warp) {
        warp.runnable = 0xFFFFFFFFu;
        warp.parked = warp.blocked = warp.exited = 0;
        for (Group& group : warp.groups) group.pending = 0;
    }
    block.runnable = 0xFFFFFFFFu >> (WARP - block.warp.size());
    for (unsigned each = 0; each < call.threads; ++each) {
        Thread& thread = block.thread[each];
        thread.where = &block.where, thread.block = &block, thread.warp = &block.warp[each / WARP], thread.index = each;
        thread.stack = nullptr, thread.groups = 0, thread.waited = false, thread.what = nullptr;
        thread.copies.clear();
    }
}

inline void check_canaries(Grid& grid, const Block& block) {
    long bytes = block.where.shared_bytes;
    for (long offset = -long(CANARY); offset < long(aligned_shared(block)); ++offset)
        if ((offset < 0 || offset >= bytes) && block.where.shared[offset] != canary(*grid.call))
            return report(grid, say(describe(grid, block), ": wrote at ", offset, ", outside its ", bytes,
                                    " bytes of shared memory"));
}

// What a thread waits in, and of an mbarrier what is missing.
inline std::string place_of(const Thread& thread) {
    if (!thread.what) return "nothing";
    std::string place = at(thread.what, thread.site);
    for (const Waiter& waiter : thread.block->waiters)
        if (waiter.thread == &thread) {
            const Phase& phase = *reinterpret_cast<const Phase*>(waiter.barrier);
            place += say(" (", phase.pending, " arrivals and ", phase.bytes, " bytes are missing)");
        }
    return place;
}

// "3 threads (0, 1, 5) wait in …", one for each place that threads of the block wait at.
inline std::string waiting(const Block& block) {
    std::vector<std::pair<std::string, std::vector<unsigned>>> places;
    for (const Thread& thread : block.thread) {
        if (thread.warp->exited & thread.bit()) continue;
        std::string place = place_of(thread);
        size_t each = 0;
        while (each < places.size() && places[each].first != place) ++each;
        if (each == places.size()) places.push_back({place, {}});
        places[each].second.push_back(thread.index);
    }
    std::string text;
    for (const auto& [place, threads] : places) {
        bool one = threads.size() == 1;
        text += say(text.empty() ? "" : "; ", threads.size(), one ? " thread (" : " threads (");
        for (size_t each = 0; each < threads.size() && each < 4; ++each) text += say(each ? ", " : "", threads[each]);
        text += say(threads.size() > 4 ? ", …) " : ") ", one ? "waits in " : "wait in ", place);
    }
    return text;
}

// Runs the blocks that are prepared until all their threads have ended or none can go on.
inline void run_resident(Worker& worker) {
    Grid& grid = *worker.grid;
    hide(worker);
    Block& first = *worker.blocks[worker.random.below(worker.resident)];
    if (sigsetjmp(worker.escape, 0) == 0) go(worker, worker.main, *pick(first, worker.random.bit(first.runnable)));
    if (worker.ended) worker.stacks.give(worker.ended);
    worker.ended = nullptr;
    reveal(worker);
    for (unsigned each = 0; each < worker.resident && !grid.failed; ++each) {
        Block& block = *worker.blocks[each];
        if (block.alive) report(grid, say(describe(grid, block), ": deadlock: ", waiting(block)));
        check_canaries(grid, block);
    }
}

inline void admit(Worker& worker, unsigned slot, uint32_t index) {
    while (worker.blocks.size() <= slot) worker.blocks.push_back(new Block);
    prepare(worker, *worker.blocks[slot], index);
}

inline void work(Worker& worker) {
    Grid& grid = *worker.grid;
    unsigned control = _mm_getcsr();
    _mm_setcsr(control | 0x8040u);  // flush to zero, denormals are zero: -ftz=true
    if (grid.call->cooperative) {
        worker.random.seed(grid.call->seed);
        worker.resident = grid.blocks();
        for (unsigned each = 0; each < worker.resident; ++each) admit(worker, each, each);
        run_resident(worker);
    } else {
        worker.resident = 1;
        for (uint32_t each; !grid.failed && (each = grid.next++) < grid.order.size();) {
            worker.random.seed(grid.call->seed * 0xD1342543DE82EF95u + grid.order[each]);
            admit(worker, 0, grid.order[each]);
            run_resident(worker);
        }
    }
    if (grid.failed) worker.stacks.reset();
    _mm_setcsr(control);
}

// ---- faults ----

#ifndef FWD_SANITIZE
constexpr int FAULTS[] = {SIGSEGV, SIGBUS, SIGFPE};
static struct sigaction before[3];

inline std::string fault_text(int signal, const char* place) {
    const Block& block = *self().block;
    if (signal == SIGFPE) return "divides an integer by zero";
    long offset = place - block.shared();
    if (offset >= 0 && offset < long(aligned_shared(block) + GUARD))
        return say("reaches byte ", offset, " of its ", block.where.shared_bytes, " bytes of shared memory");
    if (block.worker->stacks.overflowed(place)) return say("needs a stack of more than ", STACK / 1024, " KiB");
    if (!place) return "reads or writes a null or misaligned address";
    return say("reads or writes at ", address(place), ", where nothing is");
}

static void on_fault(int signal, siginfo_t* info, void*) {
    if (!current) {  // not a kernel's: as if this handler were not there
        for (int each = 0; each < 3; ++each) sigaction(FAULTS[each], &before[each], nullptr);
        return;
    }
    Worker& worker = *self().block->worker;
    std::string error = fault_text(signal, static_cast<const char*>(info->si_addr));
    report(*worker.grid, say(describe(*worker.grid, *self().block), ", ", describe(self()), ": ", error));
    current = nullptr;
    siglongjmp(worker.escape, 1);
}

struct Faults {  // are errors of the launch while this lives
    Faults() {
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int each = 0; each < 3; ++each) sigaction(FAULTS[each], &action, &before[each]);
    }
    ~Faults() {
        for (int each = 0; each < 3; ++each) sigaction(FAULTS[each], &before[each], nullptr);
    }
};

struct SignalStack {  // of this system thread: a fiber's may be what overflowed
    stack_t old;
    char* memory = new char[64 * 1024];
    SignalStack() {
        stack_t own = {};
        own.ss_sp = memory, own.ss_size = 64 * 1024;
        sigaltstack(&own, &old);
    }
    ~SignalStack() {
        sigaltstack(&old, nullptr);
        delete[] memory;
    }
};
#else
struct Faults {
    ~Faults() {}
};
struct SignalStack {
    ~SignalStack() {}
};
#endif

// ---- the launch ----

constexpr unsigned MAX_WORKERS = 2;

inline void run(Grid& grid, Worker& worker) {
    SignalStack stack;
    worker.grid = &grid;
#ifdef FWD_SANITIZE
    pthread_attr_t attributes;
    void* bottom;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &worker.main.size);
    pthread_attr_destroy(&attributes);
    worker.main.bottom = bottom;
#endif
    work(worker);
}

inline void launch(Grid& grid) {
    static Worker workers[MAX_WORKERS];
    const Call& call = *grid.call;
    Random random;
    random.seed(call.seed);
    if (!call.cooperative) {
        grid.order.resize(grid.blocks());
        for (uint32_t each = 0; each < grid.order.size(); ++each) grid.order[each] = each;
        for (uint32_t each = grid.order.size(); each > 1; --each)
            std::swap(grid.order[each - 1], grid.order[random.below(each)]);
    }
    Faults faults;
    if (call.workers < 2 || call.cooperative || grid.blocks() == 1) return run(grid, workers[0]);
    std::thread second([&grid] { run(grid, workers[1]); });
    run(grid, workers[0]);
    second.join();
}

}  // namespace fwd::host

// Returns 0, or 1 and the error in `message`.
extern "C" int fwd_host_launch(const fwd::host::Call* call, char* message, size_t room) {
    fwd::host::Grid grid;
    grid.call = call;
    if (call->cooperative && uint64_t(grid.blocks()) * call->threads > fwd::host::MAX_RESIDENT)
        grid.error = fwd::host::say("a cooperative grid of more than ", fwd::host::MAX_RESIDENT, " threads");
    else
        fwd::host::launch(grid);
    snprintf(message, room, "%s", grid.error.c_str());
    return !grid.error.empty();
}
