// The matrix-vector kernels of a decoder step but for q, k, v, and the embedding: rows 1–16, one launch each.
#include "gemv.cuh"

using fwd::bf16;
using namespace fwd::gemv;

namespace {

struct Nothing {};

// residual + x·Wᵀ + bias in float32, rounded once, in place.
struct AddTo {
    using Early = uint32_t;  // residual and bias
    bf16* residual;
    const bf16* bias;
    int rows, outputs;

    FWD_INLINE bool holds(int row, int output) const { return row < rows && output < outputs; }
    FWD_INLINE bf16* place(int row, int output) const { return residual + int64_t{row} * outputs + output; }
    FWD_INLINE Early early(int tile, int row, int m) const {
        int output = tile * kTile + m;
        if (!holds(row, output)) return 0;
        return fwd::pack_bf16(fwd::to_float(*place(row, output)), bias ? fwd::to_float(bias[output]) : 0.0f);
    }
    FWD_INLINE void put(int tile, int row, int m, float sum, Early early) const {
        int output = tile * kTile + m;
        float whole = sum + fwd::high_bf16(early) + fwd::low_bf16(early);
        if (holds(row, output)) *place(row, output) = fwd::to_bf16(whole);
    }
    FWD_INLINE void end(int) const {}
};

// silu(gate)·up: outputs m and m ^ 8 of a tile are gate and up of one place.
struct Activate {
    using Early = Nothing;
    bf16* out;
    int rows, width;

    FWD_INLINE Early early(int, int, int) const { return {}; }
    FWD_INLINE void put(int tile, int row, int m, float sum, Early) const {
        float gate = fwd::round_bf16(sum), up = fwd::shuffle_xor(gate, 8);
        float active = fwd::round_bf16(gate / (1.0f + expf(-gate)));
        if (m < 8 && row < rows) out[int64_t{row} * width + tile * 8 + m] = fwd::to_bf16(active * up);
    }
    FWD_INLINE void end(int) const {}
};

struct Logits {
    using Early = Nothing;
    float* out;
    int rows, vocab;

    FWD_INLINE Early early(int, int, int) const { return {}; }
    FWD_INLINE void put(int tile, int row, int m, float sum, Early) const {
        int output = tile * kTile + m;
        if (row < rows && output < vocab) out[int64_t{row} * vocab + output] = sum;
    }
    FWD_INLINE void end(int) const {}
};

template <int kWide, int kColumns>
FWD_INLINE void linear(const bf16* x, const bf16* weight, bf16* residual, const bf16* bias, int rows, int inputs,
                       int outputs, unsigned char* shared) {
    fwd::grid_dependency_trigger();
    constexpr int kOutputs = kWide * kTile;
    Weights<kWide, Neighbours<kWide>> weights(weight, {}, inputs, (outputs + kOutputs - 1) / kOutputs);
    fwd::grid_dependency_wait();
    Direct<kColumns, 4 / kColumns> source(x, rows, inputs);
    AddTo epilogue{residual, bias, rows, outputs};
    run<kWide, kColumns>(weights, source, reinterpret_cast<float*>(shared), epilogue);
}

// The rows normed, times a matrix.
template <int kColumns, class Tiling, class Epilogue>
FWD_INLINE void normed(const bf16* hidden, const bf16* norm, float eps, const bf16* weight, Tiling tiling, int tiles,
                       int rows, int inputs, Epilogue epilogue, unsigned char* shared) {
    fwd::grid_dependency_trigger();
    Weights<1, Tiling> weights(weight, tiling, inputs, tiles);
    Normed staging(hidden, norm, eps, rows, inputs, shared);
    staging.prepare();
    fwd::grid_dependency_wait();
    staging.stage();
    run<1, kColumns>(weights, Staged<kColumns>(staging.staged, staging.pitch, rows), staging.behind(), epilogue);
}

}  // namespace

// residual [rows, outputs] += x·Wᵀ + bias: x [rows, inputs]; bias [outputs] or null. Tiles taken at once × rows.
#define FWD_LINEAR(name, wide, columns, resident)                                                                   \
    extern "C" __global__ void __launch_bounds__(kThreads, resident)                                                \
        name(const bf16* x, const bf16* weight, bf16* residual, const bf16* bias, int rows, int inputs, int outputs) { \
        FWD_SHARED(shared);                                                                                         \
        linear<wide, columns>(x, weight, residual, bias, rows, inputs, outputs, shared);                            \
    }
FWD_LINEAR(linear_1x8, 1, 1, kResident)
FWD_LINEAR(linear_1x16, 1, 2, kResident)
FWD_LINEAR(linear_2x8, 2, 1, kResident)
FWD_LINEAR(linear_2x16, 2, 2, 1)  // two tiles of sixteen rows take more registers than half of what there are

// out [rows, width] = silu(gate)·up of the normed hidden [rows, inputs]; weight [2·width, inputs]: gate, up.
#define FWD_GATE_UP(name, columns)                                                                               \
    extern "C" __global__ void __launch_bounds__(kThreads, kResident)                                            \
        name(const bf16* hidden, const bf16* norm, float eps, const bf16* weight, bf16* out, int rows, int inputs, \
             int width) {                                                                                        \
        FWD_SHARED(shared);                                                                                      \
        normed<columns>(hidden, norm, eps, weight, Halves{width / 8}, width / 8, rows, inputs,                   \
                        Activate{out, rows, width}, shared);                                                     \
    }
FWD_GATE_UP(gate_up_8, 1)
FWD_GATE_UP(gate_up_16, 2)

// logits [rows, vocab] of the normed hidden.
#define FWD_HEAD(name, columns)                                                                                      \
    extern "C" __global__ void __launch_bounds__(kThreads, kResident)                                                \
        name(const bf16* hidden, const bf16* norm, float eps, const bf16* weight, float* logits, int rows, int inputs, \
             int vocab) {                                                                                            \
        FWD_SHARED(shared);                                                                                          \
        normed<columns>(hidden, norm, eps, weight, Neighbours<1>{}, (vocab + kTile - 1) / kTile, rows,   \
                        inputs, Logits{logits, rows, vocab}, shared);                                                \
    }
FWD_HEAD(head_8, 1)
FWD_HEAD(head_16, 2)

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
