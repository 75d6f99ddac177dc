// The rows of a matrix-vector product: where they stand, or normed in shared memory. A lane wants inputs
// lane % 4 · 8 … + 7 of a sub-block, of row lane / 4 of 8.
#pragma once

#include "quant.cuh"

namespace fwd::gemv {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

FWD_INLINE int warp_index() { return threadIdx.x / 32; }

// What all warps hold, one every `kSpan` floats, in the order of the warps.
template <int kSpan>
FWD_INLINE float total(const float* shared) {
    float sum = shared[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) sum += shared[warp * kSpan];
    return sum;
}

// Rows past the last read the last one: their sums go nowhere.
FWD_INLINE int row_of(int column, int rows) { return min(8 * column + group_row(), rows - 1); }

// `block` counts sub-blocks of 32 inputs. Those past the last are asked for and not used; what is read then stands in
// shared memory behind the rows.
template <int kColumns>
struct Staged {
    static constexpr int kBatch = 1;  // reads of a column that are under way at once
    const unsigned char* place[kColumns];

    FWD_INLINE Staged(const unsigned char* staged, int pitch, int rows) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) place[c] = staged + row_of(c, rows) * pitch + quarter() * 16;
    }
    FWD_INLINE uint4 at(int column, int block) const { return load_shared(place[column] + block * (2 * kInputs)); }
};

// Inputs past the last are the last 8: their weights are 0. Places count 8 inputs: an address is one instruction then.
template <int kColumns, int kReads>
struct Direct {
    static constexpr int kBatch = kReads;
    const uint4* x;
    uint32_t place[kColumns], last[kColumns];

    FWD_INLINE Direct(const bf16* first, int rows, int inputs) : x(reinterpret_cast<const uint4*>(first)) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            uint32_t row = row_of(c, rows) * (inputs / 8);
            place[c] = row + quarter(), last[c] = row + inputs / 8 - 1;
        }
    }
    FWD_INLINE uint4 at(int column, int block) const {
        return load_global(x + min(place[column] + block * (kInputs / 8), last[column]));
    }
};

// ---- rows that are normed first ----

// RMSNorm of `rows` rows as bf16 in shared memory at `staged`, `pitch` bytes each, zeros behind `inputs` to the end of
// the last block: a row begins half a cycle of banks after the one before. Each thread has the same chunks of 8
// inputs of every row, and of the norm's weight, so that most of it needs no barrier.
template <class Format>
struct Normed {
    const bf16* hidden;
    const bf16* weight;
    float eps;
    int rows, inputs, pitch;
    unsigned char* staged;   // [rows][pitch]
    unsigned char* factors;  // [pitch]: the weight
    float* partials;         // [rows][kWarps]

    FWD_INLINE Normed(const bf16* hidden, const bf16* weight, float eps, int rows, int inputs, unsigned char* shared)
        : hidden(hidden), weight(weight), eps(eps), rows(rows), inputs(inputs), pitch((chunks() * 16) | 64) {
        staged = shared;
        factors = staged + rows * pitch;
        partials = reinterpret_cast<float*>(factors + pitch);
    }
    FWD_INLINE float* behind() const { return partials + rows * kWarps; }
    FWD_INLINE int chunks() const { return blocks_of<Format>(inputs) * Format::kSub * (kInputs / 8); }

    FWD_INLINE void copy(unsigned char* target, const bf16* source) const {
        for (int chunk = threadIdx.x; chunk < chunks(); chunk += kThreads) {
            bool valid = chunk * 8 < inputs;
            cp_async_16_zfill(target + chunk * 16, source + (valid ? chunk * 8 : 0), valid);
        }
    }
    FWD_INLINE float squares(int row) const {
        float sum = 0.0f;
        for (int chunk = threadIdx.x; chunk < chunks(); chunk += kThreads) {
            float x[8];
            unpack8(load_shared(staged + row * pitch + chunk * 16), x);
#pragma unroll
            for (int i = 0; i < 8; ++i) sum = fmaf(x[i], x[i], sum);
        }
        return warp_sum(sum);
    }
    FWD_INLINE void scale(int row, float factor) const {
        for (int chunk = threadIdx.x; chunk < chunks(); chunk += kThreads) {
            float x[8], w[8];
            unpack8(load_shared(staged + row * pitch + chunk * 16), x);
            unpack8(load_shared(factors + chunk * 16), w);
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = round_bf16(x[i] * factor) * w[i];
            store_shared(staged + row * pitch + chunk * 16, pack8(x));
        }
    }

    // Before the wait: only the weight is read.
    FWD_INLINE void prepare() const { copy(factors, weight); }

    FWD_INLINE void stage() const {
        for (int row = 0; row < rows; ++row) copy(staged + row * pitch, hidden + int64_t{row} * inputs);
        cp_async_commit();
        cp_async_wait<0>();
        for (int row = 0; row < rows; ++row) {
            float sum = squares(row);
            if (lane_index() == 0) partials[row * kWarps + warp_index()] = sum;
        }
        block_barrier();
        for (int row = 0; row < rows; ++row) {
            float sum = total<1>(partials + row * kWarps);
            scale(row, rsqrtf(sum / inputs + eps));
        }
        block_barrier();
    }
};

}  // namespace fwd::gemv
