// A block of threads under execution, and what is said when it cannot go on.
#pragma once

#include <setjmp.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.h"
#include "runtime.h"

namespace fwd::host {

#define ALWAYS_INLINE __attribute__((always_inline)) inline

constexpr unsigned WARP = 32;
constexpr unsigned MAX_THREADS = 1024;

inline bool operator==(const Site& one, const Site& other) { return one.line == other.line && one.file == other.file; }

inline std::string text(const Site& site) {
    const char* slash = strrchr(site.file, '/');
    return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

struct Random {  // xorshift64* (Vigna 2016)
    uint64_t state = 1;

    void seed(uint64_t value) {  // splitmix64
        value += 0x9E3779B97F4A7C15u;
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9u;
        value = (value ^ value >> 27) * 0x94D049BB133111EBu;
        state = (value ^ value >> 31) | 1;
    }
    uint32_t next() {
        state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
        return static_cast<uint32_t>(state * 0x2545F4914F6CDD1Du >> 32);
    }
    uint32_t below(uint32_t bound) { return static_cast<uint32_t>(uint64_t(next()) * bound >> 32); }
    // One of the bits of a mask that is not 0: the first from a random place up to the last.
    int bit(uint32_t mask) {
        unsigned turn = below(32 - __builtin_clz(mask));
        return __builtin_ctz(mask >> turn) + turn;
    }
};

struct Copy {  // on its way to shared memory
    void* target;
    const void* source;  // null: zeros
    uint32_t bytes;
    unsigned group;  // of cp.async
    uint64_t* barrier;  // of a bulk copy
};

struct Block;
struct Warp;

struct Thread : Self {
    Context context;
    Block* block = nullptr;
    Warp* warp = nullptr;
    Stack* stack = nullptr;  // none: not started
    unsigned groups = 0;  // of cp.async that were committed
    const char* what = nullptr;  // it waits in, and where
    Site site;
    std::vector<Copy> copies;

    unsigned lane() const { return index % WARP; }
    uint32_t bit() const { return 1u << lane(); }
};

inline Thread& self() { return *static_cast<Thread*>(current); }

struct Group {  // lanes that meet in a collective of a warp
    uint32_t mask = 0;
    uint32_t pending = 0;  // lanes that are there
    const char* what = nullptr;
    Site site;
};

struct Warp {
    uint32_t runnable = 0;  // may run, and does not
    uint32_t parked = 0;  // in a collective of the warp
    uint32_t blocked = 0;  // in a barrier of the block or the grid
    uint32_t exited = 0;
    Group groups[1 + WARP];  // the first is of whole warps
    uint64_t in[WARP], out[WARP];  // what collectives exchange
    uint8_t source[WARP];
};

struct Barrier {  // of all threads of a block or a grid
    unsigned arrived = 0;
    unsigned exited = 0;
    bool any = false;
    bool result = false;  // of the last time
    const char* what = nullptr;
    Site site;
};

struct Waiter {
    Thread* thread;
    uint64_t* barrier;
    uint32_t parity;
};

struct Worker;

struct Block {
    Worker* worker = nullptr;
    Where where = {};
    unsigned threads = 0;
    unsigned alive = 0;
    uint32_t runnable = 0;  // warps that have runnable lanes
    Barrier barrier;
    std::vector<Thread> thread;
    std::vector<Warp> warp;
    std::vector<uint64_t*> mbarriers;  // that were initialised
    std::vector<Waiter> waiters;
    std::vector<Copy> copies;  // bulk

    char* shared() const { return reinterpret_cast<char*>(where.shared); }
    void wake(Thread& it) {
        it.warp->runnable |= it.bit();
        runnable |= 1u << it.index / WARP;
    }
    void release_all() {  // from a barrier of the block
        for (unsigned each = 0; each < warp.size(); ++each) release(each);
    }
    void release(unsigned each) {
        warp[each].runnable |= warp[each].blocked;
        warp[each].blocked = 0;
        if (warp[each].runnable) runnable |= 1u << each;
    }
};

struct Grid {
    const Call* call = nullptr;
    std::vector<uint32_t> order;  // of blocks
    std::atomic<uint32_t> next{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::string error;  // the first
    Barrier barrier;  // of cooperative grids, which one worker runs

    uint32_t blocks() const { return call->grid[0] * call->grid[1] * call->grid[2]; }
};

struct Worker {
    Grid* grid = nullptr;
    Context main;
    sigjmp_buf escape;  // from a fault
    Random random;
    Stacks stacks;
    std::vector<Block*> blocks;  // all that were ever resident at once
    unsigned resident = 0;
    unsigned spins = 0;  // loads in a row that only looked for another's store
    std::vector<std::vector<char>> hidden;  // contents of the regions, until all have waited for the launch before
    unsigned unwaited = 0;  // threads that have not
    std::vector<Thread*> held;  // those that have
    Stack* ended = nullptr;  // of the thread that ended last: it left it only now
};

// ---- errors ----

inline std::string describe(const Grid& grid, const Block& block) {
    char text[256];
    const uint3& place = block.where.block;
    snprintf(text, sizeof text, "kernel %s, block (%u, %u, %u)", grid.call->kernel, place.x, place.y, place.z);
    return text;
}

inline std::string describe(const Thread& thread) {
    char text[96];
    snprintf(text, sizeof text, "thread %u (warp %u, lane %u)", thread.index, thread.index / WARP, thread.lane());
    return text;
}

inline void report(Grid& grid, const std::string& error) {
    std::lock_guard<std::mutex> hold(grid.mutex);
    if (!grid.failed.exchange(true)) grid.error = error;
}

inline std::string word(const std::string& part) { return part; }
inline std::string word(const char* part) { return part; }
inline std::string word(long number) { return std::to_string(number); }

template <typename... Parts>
std::string say(const Parts&... parts) {
    std::string sentence;
    (sentence.append(word(parts)), ...);
    return sentence;
}

// Ends the launch from within a thread of the kernel; what lies on the stacks is left behind.
[[noreturn, gnu::cold]] inline void break_off(const std::string& error) {
    Thread& it = self();
    Worker& worker = *it.block->worker;
    report(*worker.grid, say(describe(*worker.grid, *it.block), ", ", describe(it), ": ", error));
    current = nullptr;
    switch_context(it.context, worker.main, true);
    __builtin_unreachable();
}

template <typename... Parts>
[[noreturn, gnu::cold]] void fail(const Parts&... parts) {
    break_off(say(parts...));
}

inline std::string at(const char* what, const Site& site) { return std::string(what) + " at " + text(site); }

}  // namespace fwd::host
