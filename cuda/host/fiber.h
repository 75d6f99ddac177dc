// Fibers: stacks that are used again, and the switch from one to another (x86-64, System V ABI).
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#ifdef FWD_SANITIZE
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "kernels are executed by the CPU on x86-64 only: the switch between fibers is written for it"
#endif

namespace fwd::host {

constexpr size_t PAGE = 4096;
#ifdef FWD_SANITIZE
constexpr size_t STACK = 256 * 1024;
#else
constexpr size_t STACK = 64 * 1024;
#endif

extern "C" {
// Saves the registers that a call keeps on this stack, its pointer in *from, and goes on where `to` was saved so.
__attribute__((visibility("hidden"))) void fwd_host_swap(void** from, void* to);
}
asm(R"(
    .text
    .p2align 4
    .hidden fwd_host_swap
    .globl fwd_host_swap
    .type fwd_host_swap, @function
fwd_host_swap:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size fwd_host_swap, .-fwd_host_swap
)");

inline void* map(size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

struct Stack {
    char* bottom;  // a page that nobody may touch lies below
    int color;

    // A context that enters `entry` when it is switched to. Tops are spread over the sets of the caches.
    void** start(void (*entry)()) const {
#ifdef FWD_SANITIZE
        __asan_unpoison_memory_region(bottom, STACK);
#endif
        void** top = reinterpret_cast<void**>(bottom + STACK - size_t(color % 64) * 192);
        *--top = nullptr;  // where `entry` would return to
        *--top = reinterpret_cast<void*>(entry);
        for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
        return top;
    }
};

// The stacks of one worker; the one given back last is taken first.
class Stacks {
  public:
    Stack* take() {
        if (free_.empty()) grow();
        Stack* stack = free_.back();
        free_.pop_back();
        return stack;
    }
    void give(Stack* stack) { free_.push_back(stack); }

    // After a launch that was broken off: all are free again.
    void reset() {
        free_.clear();
        for (Stack* stack : all_) free_.push_back(stack);
    }

    // Whether the address is in the page below a stack.
    bool overflowed(const char* address) const {
        for (const Stack* stack : all_)
            if (address < stack->bottom && address >= stack->bottom - PAGE) return true;
        return false;
    }

  private:
    void grow() {
        void* memory = map(PAGE + STACK);
        if (memory == MAP_FAILED || mprotect(memory, PAGE, PROT_NONE) != 0) abort();
        all_.push_back(new Stack{static_cast<char*>(memory) + PAGE, int(all_.size())});
        free_.push_back(all_.back());
    }

    std::vector<Stack*> all_, free_;
};

// Where a fiber, or the worker itself, goes on.
struct Context {
    void* pointer = nullptr;
    const void* bottom = nullptr;  // of its stack, for the address sanitizer
    size_t size = 0;
    void* fake = nullptr;
};

#ifdef FWD_SANITIZE
// To be called first in a context that was switched to.
inline void arrive(Context& here) { __sanitizer_finish_switch_fiber(here.fake, nullptr, nullptr); }

inline void switch_context(Context& from, Context& to, bool forever = false) {
    __sanitizer_start_switch_fiber(forever ? nullptr : &from.fake, to.bottom, to.size);
    fwd_host_swap(&from.pointer, to.pointer);
    arrive(from);
}
#else
inline void arrive(Context&) {}
inline void switch_context(Context& from, Context& to, bool = false) { fwd_host_swap(&from.pointer, to.pointer); }
#endif

}  // namespace fwd::host
