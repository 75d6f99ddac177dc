// A packed matrix times a few rows: weights are the A operand of mma.m16n8k16 and are streamed once, rows are its B.
//
// Packed (fwd/kernels/packing.py): groups of 8 outputs, each of blocks of 8 × 32·kSub numbers, 512 bytes, 16 a lane,
// and their scales; quant.cuh makes bf16 of them. Two groups are a tile of 16 outputs. A block of 8 warps takes tiles
// in turn: warp w sums their blocks w, w + 8, … in order, then the sums of the warps are added in the order of the
// warps. So what comes out depends on the row and the weights alone: not on the rows beside it, how many tiles a
// block takes at once, or how many blocks there are.
#pragma once

#include "gemv_rows.cuh"

namespace fwd::gemv {

constexpr int kResident = 2;       // blocks that share a multiprocessor's registers
constexpr int kTile = 16;          // outputs
constexpr int kPitch = 20;         // floats from a row of sums to the next: no two lanes in one bank
constexpr int kSums = 8 * kPitch;  // floats of a warp's sums of one tile and eight rows

// ---- which groups are a tile: from `first`, every `stride`-th ----

template <int kWide>
struct Neighbours {
    FWD_INLINE int first(int tile) const { return tile * (2 * kWide); }
    FWD_INLINE int stride() const { return 1; }
};

// The same group of both halves of a matrix.
struct Halves {
    int half;  // groups
    FWD_INLINE int first(int tile) const { return tile; }
    FWD_INLINE int stride() const { return half; }
};

// The same group of both halves of a head.
struct HeadHalves {
    unsigned half;  // groups
    FWD_INLINE int first(unsigned tile) const { return tile + tile / half * half; }
    FWD_INLINE int stride() const { return half; }
};

// ---- products ----

// A tile's sub-block. Eight inputs of a lane are two steps of 16: any order of inputs will do that weights and rows
// share. `span` are the sums of inputs that have a scale in common, where products are scaled and not weights.
template <class Format, int kColumns>
FWD_INLINE void accumulate(float (&sums)[kColumns][4], float (&span)[kColumns][4], const typename Format::Held& first,
                           const typename Format::Held& second, int sub, const uint4 (&x)[kColumns]) {
    uint32_t low[4], high[4];
    first.numbers_of(sub, low), second.numbers_of(sub, high);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        float(&to)[4] = Format::kSpan ? span[c] : sums[c];
        if (Format::kSpan && sub % Format::kSpan == 0) to[0] = to[1] = to[2] = to[3] = 0.0f;
        mma_m16n8k16_bf16(to, {low[0], high[0], low[1], high[1]}, {x[c].x, x[c].y});
        mma_m16n8k16_bf16(to, {low[2], high[2], low[3], high[3]}, {x[c].z, x[c].w});
        if constexpr (Format::kSpan > 0) {
            if (sub % Format::kSpan != Format::kSpan - 1) continue;
            float lower = first.scale_of(sub), upper = second.scale_of(sub), *all = sums[c];
            all[0] = fmaf(to[0], lower, all[0]), all[1] = fmaf(to[1], lower, all[1]);
            all[2] = fmaf(to[2], upper, all[2]), all[3] = fmaf(to[3], upper, all[3]);
        }
    }
}

// ---- the weights: registers that are filled again as soon as they are used, across tiles ----

// A packed matrix, or a stack of them one after the other: groups are counted on.
struct Packed {
    const void* data;
    const float* factors;  // of each group, as its format says; null where it has none
};

template <class Format, int kWide, class Tiling>
struct Weights {
    static constexpr int kDepth = Format::kSteps / kWide, kGroups = 2 * kWide, kSub = Format::kSub;
    static constexpr int kBlockBytes = Format::kBytes;

    const unsigned char* data;  // of this lane
    const float* factors;
    Tiling tiling;
    int blocks, tiles, pitch;
    int tile;                              // what is fetched next: of this one,
    const unsigned char* next[kGroups];    // from here,
    const unsigned char* scales[kGroups];  // with the scales from here,
    const float* cells[kGroups];           // or from here,
    int left;                              // as many blocks and those between them, which are other warps'
    typename Format::Held held[kDepth][kGroups];

    FWD_INLINE Weights(Packed matrix, Tiling tiling, int inputs, int tiles)
        : data(static_cast<const unsigned char*>(matrix.data) + lane_index() * 16 + warp_index() * kBlockBytes),
          factors(matrix.factors),
          tiling(tiling),
          blocks(blocks_of<Format>(inputs)),
          tiles(tiles),
          pitch(Format::pitch(inputs)) {
        aim(blockIdx.x);
#pragma unroll
        for (int step = 0; step < kDepth; ++step) fetch(step);
        advance();
    }
    FWD_INLINE void aim(int wanted) {
        tile = wanted;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            int place = tiling.first(tile) + group * tiling.stride();
            next[group] = data + int64_t{place} * (blocks * kBlockBytes);
            scales[group] = next[group] + Format::word();
            if constexpr (Format::kCells) cells[group] = factors + int64_t{place} * pitch + 8 + warp_index() / 2;
        }
        left = tile < tiles ? blocks - warp_index() : 0;
    }
    FWD_INLINE void fetch(int step) {
        if (step * kWarps >= left) return;
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            int apart = step * (kWarps * kBlockBytes);
            held[step][group].fetch(next[group] + apart, scales[group] + apart);
            if constexpr (Format::kCells) held[step][group].cell = cells[group][step * (kWarps / 2)];
        }
    }
    template <int kColumns>
    FWD_INLINE void accumulate(float (&sums)[kWide][kColumns][4], float (&span)[kWide][kColumns][4], int step, int sub,
                               const uint4 (&x)[kColumns]) const {
#pragma unroll
        for (int w = 0; w < kWide; ++w)
            gemv::accumulate<Format>(sums[w], span[w], held[step][2 * w], held[step][2 * w + 1], sub, x);
    }
    FWD_INLINE void advance() {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
            next[group] += kDepth * kWarps * kBlockBytes;
            scales[group] += kDepth * kWarps * kBlockBytes;
            if constexpr (Format::kCells) cells[group] += kDepth * (kWarps / 2);
        }
        left -= kDepth * kWarps;
        if (left <= 0) aim(tile + gridDim.x);
    }
    // What the sum of output m of a tile's `place`-th 16 is multiplied by: nothing that another kernel writes.
    FWD_INLINE float factor(int wanted, int place, int m) const {
        if constexpr (!Format::kFactors) return Format::kFactor;
        int group = tiling.first(wanted) + (2 * place + m / 8) * tiling.stride();
        return factors[int64_t{group} * pitch + m % 8];
    }
};

template <int kColumns>
FWD_INLINE void clear(float (&sums)[kColumns][4]) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sums[c][0] = sums[c][1] = sums[c][2] = sums[c][3] = 0.0f;
}

// This warp's part of `kWide` tiles. Reads of rows are under way in batches: of several blocks, or within one.
template <int kColumns, class Format, int kWide, class Tiling, class Rows>
FWD_INLINE void multiply(float (&sums)[kWide][kColumns][4], Weights<Format, kWide, Tiling>& weights, const Rows& rows) {
    constexpr int kSub = Format::kSub, kBatch = Rows::kBatch, kAhead = kBatch > kSub ? kBatch / kSub : 1;
    constexpr int kReads = kBatch < kSub ? kBatch : kSub;
    float span[kWide][kColumns][4];
#pragma unroll
    for (int w = 0; w < kWide; ++w) clear(sums[w]);
    int block = warp_index();
    do {
        int there = weights.blocks - block;
#pragma unroll
        for (int first = 0; first < weights.kDepth; first += kAhead) {
            uint4 x[kAhead][kReads][kColumns];
            auto read = [&](int ahead, int sub) {
#pragma unroll
                for (int j = 0; j < kReads; ++j)
#pragma unroll
                    for (int c = 0; c < kColumns; ++c)
                        x[ahead][j][c] = rows.at(c, (block + (first + ahead) * kWarps) * kSub + sub + j);
            };
            if constexpr (kReads == kSub) {
#pragma unroll
                for (int i = 0; i < kAhead; ++i) read(i, 0);
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if ((first + i) * kWarps < there) {
#pragma unroll
                    for (int sub = 0; sub < kSub; ++sub) {
                        if (kReads < kSub && sub % kReads == 0) read(0, sub);
                        weights.accumulate(sums, span, first + i, sub, x[i][sub % kReads]);
                    }
                }
                weights.fetch(first + i);
            }
        }
        weights.advance();
        block += weights.kDepth * kWarps;
    } while (block < weights.blocks);
}

// A warp's sums as [tile][row][output], where all warps find them.
template <int kWide, int kColumns>
FWD_INLINE void store_sums(float* shared, const float (&sums)[kWide][kColumns][4]) {
    int group = group_row(), pair = quarter() * 2;
#pragma unroll
    for (int w = 0; w < kWide; ++w)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            float* own = shared + ((warp_index() * kWide + w) * kColumns + c) * kSums + pair * kPitch + group;
            own[0] = sums[w][c][0], own[kPitch] = sums[w][c][1];
            own[8] = sums[w][c][2], own[kPitch + 8] = sums[w][c][3];
        }
}

// All tiles of this block. For each output of each row the epilogue is asked early for what it will need, then given
// the sum; both by whole warps, whose lanes hold outputs m and m ^ 8 of a tile 8 apart. `end` comes after a tile's
// last. `shared` holds 2·kWarps·kWide·kColumns·kSums floats: a tile's sums are read while the next one's are written.
template <int kColumns, class Format, int kWide, class Tiling, class Rows, class Epilogue>
FWD_INLINE void run(Weights<Format, kWide, Tiling>& weights, const Rows& rows, float* shared, Epilogue& epilogue) {
    constexpr int kSpan = kWide * kColumns * kSums, kOutputs = kWide * kColumns * 8 * kTile;
    constexpr int kShare = (kOutputs + kThreads - 1) / kThreads;  // of a thread
    bool busy = threadIdx.x < kOutputs;
    int m = threadIdx.x % kTile, place = threadIdx.x / kTile;  // [kWide][8·kColumns]
    float* turn = shared;
    for (int tile = blockIdx.x; tile < weights.tiles; tile += gridDim.x) {
        typename Epilogue::Early early[kShare];
        float factor[kShare];
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
            int at = place + i * (kThreads / kTile);
            if (!busy) break;
            early[i] = epilogue.early(tile * kWide + at / (8 * kColumns), at % (8 * kColumns), m);
            factor[i] = weights.factor(tile, at / (8 * kColumns), m);
        }
        float sums[kWide][kColumns][4];
        multiply(sums, weights, rows);
        store_sums(turn, sums);
        block_barrier();
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
            if (!busy) break;
            int at = place + i * (kThreads / kTile);
            float sum = total<kSpan>(turn + at * kPitch + m);
            if constexpr (Format::kScaled) sum = __fmul_rn(sum, factor[i]);  // apart from a bias in every build
            epilogue.put(tile * kWide + at / (8 * kColumns), at % (8 * kColumns), m, sum, early[i]);
        }
        epilogue.end(tile);
        turn = turn == shared ? shared + kWarps * kSpan : shared;
    }
}

}  // namespace fwd::gemv
