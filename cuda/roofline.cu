// What a device itself can do: read its memory, launch a kernel after a kernel, let all blocks meet. For benches only.
#include "common.cuh"

namespace {

constexpr int THREADS = 512;
constexpr int IN_FLIGHT = 8;  // loads of 16 bytes that a thread waits for together: 64 KiB a block

FWD_INLINE unsigned sum(uint4 words) { return words.x + words.y + words.z + words.w; }

}  // namespace

// sums[block·16 + warp] = all 32-bit words that the warp read, modulo 2^32: so no load can be left out. `data` holds
// `vectors` times 16 bytes and is written by no kernel, so it is read before the kernel ahead is over.
extern "C" __global__ void __launch_bounds__(THREADS, 2) read_stream(const uint4* data, unsigned* sums, int vectors) {
    fwd::grid_dependency_trigger();
    unsigned total = 0;
    const int tile = THREADS * IN_FLIGHT;
    for (int64_t first = int64_t(blockIdx.x) * tile; first < vectors; first += int64_t(gridDim.x) * tile) {
        uint4 words[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) {
            int64_t at = first + i * THREADS + threadIdx.x;
            words[i] = at < vectors ? fwd::load_stream(data + at) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; ++i) total += sum(words[i]);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) total += fwd::shuffle_xor(total, mask);
    fwd::grid_dependency_wait();
    if (threadIdx.x % 32 == 0) sums[blockIdx.x * (THREADS / 32) + threadIdx.x / 32] = total;
}

// Nothing but what every kernel of a step does: the cost of one more of them.
extern "C" __global__ void __launch_bounds__(THREADS) empty_step(int* steps) {
    fwd::grid_dependency_trigger();
    fwd::grid_dependency_wait();
    if (blockIdx.x == 0 && threadIdx.x == 0) *steps += 1;
}

// A cooperative grid whose blocks meet `rounds` times: the cost of a dependency inside one kernel.
extern "C" __global__ void __launch_bounds__(THREADS) meet(unsigned* state, int* steps, int rounds) {
    fwd::grid_dependency_trigger();
    fwd::grid_dependency_wait();
    for (int round = 0; round < rounds; ++round) {
        fwd::grid_barrier(state);
        if (blockIdx.x == 0 && threadIdx.x == 0) *steps += 1;
    }
}
