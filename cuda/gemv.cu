// The matrix-vector kernels of a decoder step but for q, k, v, over weights in bf16; and the embedding.
#include "gemv_bodies.cuh"

using fwd::bf16;
using fwd::gemv::kInputs;
using fwd::gemv::kThreads;

FWD_LINEAR(linear_1x8, Bf16, 1, 1, 2)
FWD_LINEAR(linear_1x16, Bf16, 1, 2, 2)
FWD_LINEAR(linear_2x8, Bf16, 2, 1, 2)
FWD_LINEAR(linear_2x16, Bf16, 2, 2, 1)  // two tiles of sixteen rows take more registers than half of what there are

FWD_GATE_UP(gate_up_8, Bf16, 1)
FWD_GATE_UP(gate_up_16, Bf16, 2)

FWD_HEAD(head_8, Bf16, 1)
FWD_HEAD(head_16, Bf16, 2)

// hidden [rows, inputs]: a block copies the row of one id; an id −1−i is the token that line i drew in the step before.
// `packed`: the weight stands as `linear` streams it, else row by row.
extern "C" __global__ void __launch_bounds__(kThreads)
    embed(const int64_t* ids, const int64_t* drawn, const bf16* weight, bf16* hidden, int lines, int inputs, int vocab,
          int packed) {
    fwd::grid_dependency_trigger();
    fwd::grid_dependency_wait();
    int64_t id = ids[blockIdx.x];
    if (id < 0) id = lines > 0 ? drawn[min(-1 - id, int64_t{lines - 1})] : 0;
    id = max(int64_t{0}, min(id, int64_t{vocab - 1}));
    int64_t blocks = (inputs + kInputs - 1) / kInputs;
    const bf16* row = packed ? weight + (id / 8 * blocks * 8 + id % 8) * kInputs : weight + id * inputs;
    int step = packed ? 8 * kInputs : kInputs;  // numbers from a block of this row to the next
    for (int chunk = threadIdx.x; chunk * 8 < inputs; chunk += kThreads) {
        uint4 found = fwd::load_global(row + int64_t{chunk / 4} * step + chunk % 4 * 8);
        fwd::store_global(hidden + int64_t{blockIdx.x} * inputs + chunk * 8, found);
    }
}
