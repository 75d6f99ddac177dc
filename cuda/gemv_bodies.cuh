// The bodies of the kernels of gemv*.cu, generic over the format of the weights: rows 1–16, one launch each.
#pragma once

#include "gemv.cuh"

namespace fwd::gemv {

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
        return pack_bf16(to_float(*place(row, output)), bias ? to_float(bias[output]) : 0.0f);
    }
    FWD_INLINE void put(int tile, int row, int m, float sum, Early early) const {
        int output = tile * kTile + m;
        float whole = sum + high_bf16(early) + low_bf16(early);
        if (holds(row, output)) *place(row, output) = to_bf16(whole);
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
        float gate = round_bf16(sum), up = shuffle_xor(gate, 8);
        float active = round_bf16(gate / (1.0f + expf(-gate)));
        if (m < 8 && row < rows) out[int64_t{row} * width + tile * 8 + m] = to_bf16(active * up);
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

template <class Format, int kWide, int kColumns>
FWD_INLINE void linear(const bf16* x, Packed weight, bf16* residual, const bf16* bias, int rows, int inputs,
                       int outputs, unsigned char* shared) {
    grid_dependency_trigger();
    constexpr int kOutputs = kWide * kTile;
    Weights<Format, kWide, Neighbours<kWide>> weights(weight, {}, inputs, (outputs + kOutputs - 1) / kOutputs);
    grid_dependency_wait();
    Direct<kColumns, 4 / kColumns> source(x, rows, inputs);
    AddTo epilogue{residual, bias, rows, outputs};
    run<kColumns>(weights, source, reinterpret_cast<float*>(shared), epilogue);
}

// The rows normed, times a matrix.
template <class Format, int kColumns, class Tiling, class Epilogue>
FWD_INLINE void normed(const bf16* hidden, const bf16* norm, float eps, Packed weight, Tiling tiling, int tiles,
                       int rows, int inputs, Epilogue epilogue, unsigned char* shared) {
    grid_dependency_trigger();
    Weights<Format, 1, Tiling> weights(weight, tiling, inputs, tiles);
    Normed<Format> staging(hidden, norm, eps, rows, inputs, shared);
    staging.prepare();
    grid_dependency_wait();
    staging.stage();
    run<kColumns>(weights, Staged<kColumns>(staging.staged, staging.pitch, rows), staging.behind(), epilogue);
}

}  // namespace fwd::gemv

// residual [rows, outputs] += x·Wᵀ + bias: x [rows, inputs]; bias [outputs] or null. Tiles taken at once × rows.
#define FWD_LINEAR(name, Format, wide, columns, resident)                                                              \
    extern "C" __global__ void __launch_bounds__(fwd::gemv::kThreads, resident)                                        \
        name(const fwd::bf16* x, const void* weight, const float* factors, fwd::bf16* residual, const fwd::bf16* bias, \
             int rows, int inputs, int outputs) {                                                                      \
        FWD_SHARED(shared);                                                                                            \
        fwd::gemv::linear<fwd::gemv::Format, wide, columns>(x, {weight, factors}, residual, bias, rows, inputs,        \
                                                            outputs, shared);                                          \
    }

// out [rows, width] = silu(gate)·up of the normed hidden [rows, inputs]; weight [2·width, inputs]: gate, up.
#define FWD_GATE_UP(name, Format, columns)                                                                          \
    extern "C" __global__ void __launch_bounds__(fwd::gemv::kThreads, fwd::gemv::kResident)                         \
        name(const fwd::bf16* hidden, const fwd::bf16* norm, float eps, const void* weight, const float* factors,   \
             fwd::bf16* out, int rows, int inputs, int width) {                                                     \
        FWD_SHARED(shared);                                                                                         \
        fwd::gemv::normed<fwd::gemv::Format, columns>(hidden, norm, eps, {weight, factors},                         \
                                                      fwd::gemv::Halves{width / 8}, width / 8, rows, inputs,        \
                                                      fwd::gemv::Activate{out, rows, width}, shared);               \
    }

// logits [rows, vocab] of the normed hidden.
#define FWD_HEAD(name, Format, columns)                                                                             \
    extern "C" __global__ void __launch_bounds__(fwd::gemv::kThreads, fwd::gemv::kResident)                         \
        name(const fwd::bf16* hidden, const fwd::bf16* norm, float eps, const void* weight, const float* factors,   \
             float* logits, int rows, int inputs, int vocab) {                                                      \
        FWD_SHARED(shared);                                                                                         \
        fwd::gemv::normed<fwd::gemv::Format, columns>(                                                              \
            hidden, norm, eps, {weight, factors}, fwd::gemv::Neighbours<1>{},                                       \
            (vocab + fwd::gemv::kTile - 1) / fwd::gemv::kTile, rows, inputs,                                        \
            fwd::gemv::Logits{logits, rows, vocab}, shared);                                                        \
    }
