// What a kernel can do wrong, one case each; the tests find the lines by their comments.
#include "common.cuh"

namespace fwd {

__device__ __noinline__ int deep(volatile int* out, int depth) {
    volatile char frame[512];
    frame[depth % 512] = static_cast<char>(depth);
    return depth == 0 ? *out : deep(out, depth - 1) + frame[depth % 512];
}

extern "C" __global__ void __launch_bounds__(64) wrong(int* out, int which) {
    FWD_SHARED(shared);
    int* cells = reinterpret_cast<int*>(shared);
    uint64_t* barrier = reinterpret_cast<uint64_t*>(shared);
    int thread = threadIdx.x, lane = thread % 32;
    if (which == 0 && thread == 5) return;
    grid_dependency_wait();
    switch (which) {
        case 1:
            if (thread < 32) block_barrier();  // divergent a
            else block_barrier();  // divergent b
            break;
        case 2:
            if (thread == 40) return;
            block_barrier();  // left
            break;
        case 3:
            if (lane == 3) return;
            out[thread] = shuffle_xor(thread, 1);  // short
            break;
        case 4:
            if (lane < 16) out[thread] = shuffle_xor(thread, 1);  // half a
            else out[thread] = ballot(thread > 3);  // half b
            break;
        case 5:
            __syncwarp(0xFFFFu);  // masked
            break;
        case 6:
            if (lane == 0) block_barrier();  // apart
            warp_barrier();
            break;
        case 7:
            if (thread == 0) mbarrier_init(barrier, 2);
            block_barrier();
            if (thread == 0) mbarrier_expect(barrier, 512);
            if (lane) mbarrier_wait(barrier, 0);  // stuck
            else block_barrier();  // behind
            break;
        case 8:
            mbarrier_wait(barrier, 0);  // raw
            break;
        case 9:
            if (thread == 0) cp_async_16(shared, out);
            break;
        case 10:
            cells[25 + thread] = 1;  // 164 of 128 bytes
            break;
        case 11:
            cells[-1 - thread] = 1;
            break;
        case 12:
            out[0] = load_shared(shared + 120).x;  // beyond
            break;
        case 13:
            out[0] = load_global(out + 1).x;  // crooked
            break;
        case 14:
            out[0] = *reinterpret_cast<volatile int*>(static_cast<uintptr_t>(thread));
            break;
        case 15:
            out[0] = deep(out, 4000);
            break;
        case 16:
            out[0] = 7 / (thread - thread % 64);
            break;
        case 17:
            FWD_TRAP_IF(thread == 9);  // trapped
            break;
        case 18:
            grid_barrier(reinterpret_cast<unsigned*>(out));  // alone
            break;
        case 19:
            while (load_acquire(out) == 0) {  // forever
            }
            break;
        case 20:
            if (thread) break;
            mbarrier_init(barrier, 1);
            mbarrier_expect(barrier, 16);
            bulk_copy(shared + 16, out, 16, barrier);
            break;
        case 21:
            if (thread) break;
            mbarrier_init(barrier, 1);
            bulk_copy(shared + 16, out, 24, barrier);  // odd
            break;
        case 22:
            if (lane < 2) out[thread] = __shfl_sync(3u, thread, 2);  // outside
            break;
        case 23:
            if (blockIdx.x == 0) grid_barrier(reinterpret_cast<unsigned*>(out));  // some
            break;
        default:
            break;
    }
}

}  // namespace fwd
