// Clean with `which` 0; else what the sanitizers are there for.
#include "common.cuh"

namespace fwd {

extern "C" __global__ void __launch_bounds__(64) sanitized(int* out, const int* in, int count, int which) {
    FWD_SHARED(shared);
    int* cells = reinterpret_cast<int*>(shared);
    grid_dependency_wait();
    int index = blockIdx.x * 64 + threadIdx.x;
    cells[threadIdx.x] = index < count ? in[index] : 0;
    block_barrier();
    int value = shuffle_xor(cells[63 - threadIdx.x], 1);
    if (which == 1 && index == 7) out[count] = value;
    if (which == 2) value += 0x7FFFFFFF;
    if (which == 3) value += static_cast<int>(reinterpret_cast<const uint4*>(in + 1)->x);
    if (which == 4 && index == 7) value += in[count];
    if (index < count) out[index] = value;
}

}  // namespace fwd
