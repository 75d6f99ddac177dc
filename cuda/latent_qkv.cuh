// The attention input of a layer that keeps latents, in two launches, over weights in any format.
//
// First the rows are normed and projected down: to query latents, a latent and a key that is rotated. The block that
// comes last to those two norms, rotates and writes the cells of all rows. Then queries: the block that comes last to a
// head rotates its part of them, and takes the rest to latents by the head's part of `up_key`, so that attention is
// over latents as they are stored. Who comes last shapes nothing.
#pragma once

#include "gemv_bodies.cuh"
#include "latent.cuh"

namespace fwd::latent {

using gemv::kTile;
using gemv::kWarps;
using gemv::lane_index;
using gemv::warp_index;

constexpr int kBlock = 128;         // numbers of a latent that share a scale
constexpr int kMost = 4;            // of those blocks
constexpr float kLargest = 448.0f;  // of e4m3
constexpr int kSlab = 64;           // latents that a warp makes of a head's query at a time

// ---- rotated parts: a warp does one, of up to 64 numbers, lane i the pair (i, i + half) ----

struct Angles {
    const float* rope;  // [known][cos, sin][half]
    const int64_t* positions;
    int known, half;

    // The order is written out so that all builds round alike.
    FWD_INLINE void turn(const bf16* from, int row, uint32_t& pair) const {
        int64_t position = min(max(positions[row], int64_t{0}), int64_t{known - 1});
        const float* cos = rope + position * (2 * half) + lane_index();
        float lower = to_float(from[lane_index()]), upper = to_float(from[lane_index() + half]);
        float c = cos[0], s = cos[half];
        pair = pack_bf16(fmaf(lower, c, -(upper * s)), fmaf(upper, c, lower * s));
    }
    FWD_INLINE void put(bf16* to, uint32_t pair) const {
        to[lane_index()] = __ushort_as_bfloat16(pair & 0xFFFFu);
        to[lane_index() + half] = __ushort_as_bfloat16(pair >> 16);
    }
    FWD_INLINE bool mine() const { return lane_index() < half; }
};

// ---- what a token leaves: a warp does it whole ----

struct Records {
    const bf16* norm;
    float eps;
    Angles angles;
    const int64_t* slots;
    void* latents;  // [cells][latent], in fp8 where there are scales
    bf16* keys;     // [cells][rope]
    float* scales;  // [cells][blocks] or null
    int latent;

    FWD_INLINE int rope() const { return 2 * angles.half; }
    FWD_INLINE bool there(int block) const { return block * kBlock + lane_index() * 4 < latent; }

    // A row as it was projected: its latent, behind it the key. A slot −1 is nowhere.
    FWD_INLINE void write(const bf16* projected, int row) const {
        int64_t cell = slots[row];
        float x[kMost][4];
        load(x, projected);
        normalize(x);
        if (scales) quantize(x, cell);
        else if (cell >= 0) store(x, static_cast<bf16*>(latents) + cell * latent);
        uint32_t pair;
        if (!angles.mine() || cell < 0) return;
        angles.turn(projected + latent, row, pair);
        angles.put(keys + cell * rope(), pair);
    }
    FWD_INLINE void load(float (&x)[kMost][4], const bf16* from) const {
#pragma unroll
        for (int block = 0; block < kMost; ++block) {
            uint2 four = make_uint2(0, 0);
            if (there(block)) four = reinterpret_cast<const uint2*>(from + block * kBlock)[lane_index()];
            x[block][0] = low_bf16(four.x), x[block][1] = high_bf16(four.x);
            x[block][2] = low_bf16(four.y), x[block][3] = high_bf16(four.y);
        }
    }
    FWD_INLINE void normalize(float (&x)[kMost][4]) const {
        float sum = 0.0f, w[kMost][4];
        load(w, norm);
#pragma unroll
        for (int block = 0; block < kMost; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum = fmaf(x[block][i], x[block][i], sum);
        float factor = rsqrtf(warp_sum(sum) / latent + eps);
#pragma unroll
        for (int block = 0; block < kMost; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) x[block][i] = round_bf16(round_bf16(x[block][i] * factor) * w[block][i]);
    }
    FWD_INLINE void store(const float (&x)[kMost][4], bf16* to) const {
#pragma unroll
        for (int block = 0; block < kMost; ++block) {
            if (!there(block)) continue;
            uint2 four = make_uint2(pack_bf16(x[block][0], x[block][1]), pack_bf16(x[block][2], x[block][3]));
            reinterpret_cast<uint2*>(to + block * kBlock)[lane_index()] = four;
        }
    }
    // The rule of fwd.kernels.kv.KV for each block: x / scale in e4m3, scale = max|x| / 448, 1 where that is 0.
    FWD_INLINE void quantize(const float (&x)[kMost][4], int64_t cell) const {
        fp8* to = static_cast<fp8*>(latents) + cell * latent;
#pragma unroll
        for (int block = 0; block < kMost; ++block) {
            if (block * kBlock >= latent) break;
            float peak = 0.0f;
#pragma unroll
            for (int i = 0; i < 4; ++i) peak = fmaxf(peak, fabsf(x[block][i]));
            float scale = warp_max(peak) / kLargest;
            scale = scale == 0.0f ? 1.0f : scale;
            if (cell < 0) continue;
            if (lane_index() == 0) scales[cell * ((latent + kBlock - 1) / kBlock) + block] = scale;
            if (!there(block)) continue;
#pragma unroll
            for (int i = 0; i < 4; ++i) to[block * kBlock + lane_index() * 4 + i] = to_fp8(x[block][i] / scale);
        }
    }
};

// ---- down ----

struct Down {
    using Early = gemv::Nothing;
    bf16* narrow;     // [rows][rank]: query latents
    bf16* projected;  // [rows][latent + rope]
    int* counter;
    Records records;
    int rows, rank;

    FWD_INLINE int width() const { return records.latent + records.rope(); }
    FWD_INLINE Early early(int, int, int) const { return {}; }
    FWD_INLINE void put(int tile, int row, int m, float sum, Early) const {
        int output = tile * kTile + m;
        if (row >= rows || output >= rank + width()) return;
        if (output < rank) narrow[row * rank + output] = to_bf16(sum);
        else projected[row * width() + output - rank] = to_bf16(sum);
    }
    FWD_INLINE void end(int tile) const {
        int first = rank / kTile, tiles = (rank + width() + kTile - 1) / kTile;
        if (tile < first || !last_arriver(counter, tiles - first)) return;
        for (int row = warp_index(); row < rows; row += kWarps) records.write(projected + row * width(), row);
    }
};

// ---- queries ----

FWD_INLINE uint32_t lower_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
FWD_INLINE uint32_t upper_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

struct Query {
    using Early = gemv::Nothing;
    bf16* q;         // [rows][heads][nope + rope]
    bf16* absorbed;  // [rows][heads][latent + rope]
    const bf16* up_key;  // [heads][nope][latent]
    int* counters;       // of each head
    Angles angles;
    int rows, heads, nope, latent;

    FWD_INLINE int width() const { return nope + 2 * angles.half; }
    FWD_INLINE bf16* of(int row, int head) const { return q + (row * heads + head) * width(); }
    FWD_INLINE bf16* latent_of(int row, int head) const {
        return absorbed + (row * heads + head) * (latent + 2 * angles.half);
    }

    FWD_INLINE Early early(int, int, int) const { return {}; }
    FWD_INLINE void put(int tile, int row, int m, float sum, Early) const {
        int output = tile * kTile + m;
        if (row < rows && output < heads * width()) q[row * (heads * width()) + output] = to_bf16(sum);
    }
    // A tile may hold the end of a head and the beginning of the next.
    FWD_INLINE void end(int tile) const {
        int last = min((tile * kTile + kTile - 1) / width(), heads - 1);
        for (int head = tile * kTile / width(); head <= last; ++head) {
            int tiles = ((head + 1) * width() - 1) / kTile - head * width() / kTile + 1;
            if (last_arriver(counters + head, tiles)) finish(head);
        }
    }
    FWD_INLINE void finish(int head) const {
        for (int row = warp_index(); row < rows; row += kWarps) rotate(row, head);
        for (int slab = warp_index() * kSlab; slab < latent; slab += kWarps * kSlab)
            for (int column = 0; column * 8 < rows; ++column) absorb(head, slab, column);
    }
    FWD_INLINE void rotate(int row, int head) const {
        uint32_t pair;
        if (!angles.mine()) return;
        angles.turn(of(row, head) + nope, row, pair);
        angles.put(of(row, head) + nope, pair);
        angles.put(latent_of(row, head) + latent, pair);
    }

    // q·up_key of eight rows and 64 latents. up_key stands with latents side by side, mma wants the numbers that are
    // summed so: two rows of it are woven into each other. Of four products a lane has latents 8·group … + 7.
    FWD_INLINE void absorb(int head, int slab, int column) const {
        int group = lane_index() / 4, pair = lane_index() % 4 * 2, first = slab + 8 * group;
        const bf16* keys = up_key + int64_t{head} * nope * latent + min(first, latent - 8);
        const bf16* x = of(gemv::row_of(column, rows), head) + pair;
        float sums[4][4] = {};
#pragma unroll 4  // so many rows of sixteen are under way: what a block alone on its multiprocessor has registers for
        for (int n = 0; n < nope; n += 16) {
            bool whole = n + 8 < nope;  // there is a multiple of 8
            uint4 zero = make_uint4(0, 0, 0, 0), k[4];
            k[0] = load_stream(keys + (n + pair) * latent), k[1] = load_stream(keys + (n + pair + 1) * latent);
            k[2] = whole ? load_stream(keys + (n + pair + 8) * latent) : zero;
            k[3] = whole ? load_stream(keys + (n + pair + 9) * latent) : zero;
            const uint32_t* two = reinterpret_cast<const uint32_t*>(x + n);
            uint32_t b[2] = {two[0], whole ? two[4] : 0};
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                uint32_t low[2] = {gemv::word_of(k[0], t), gemv::word_of(k[1], t)};
                uint32_t high[2] = {gemv::word_of(k[2], t), gemv::word_of(k[3], t)};
                uint32_t a[4] = {lower_halves(low[0], low[1]), upper_halves(low[0], low[1]),
                                 lower_halves(high[0], high[1]), upper_halves(high[0], high[1])};
                mma_m16n8k16_bf16(sums[t], a, b);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int row = 8 * column + pair + i;
            if (row >= rows || first >= latent) continue;
            store_global(latent_of(row, head) + first,
                         make_uint4(pack_bf16(sums[0][i], sums[0][i + 2]), pack_bf16(sums[1][i], sums[1][i + 2]),
                                    pack_bf16(sums[2][i], sums[2][i + 2]), pack_bf16(sums[3][i], sums[3][i + 2])));
        }
    }
};

template <class Format, int kColumns, class Epilogue>
FWD_INLINE void project(const bf16* x, const bf16* norm, float eps, gemv::Packed weight, int outputs, int inputs,
                        const Epilogue& epilogue, unsigned char* shared) {
    gemv::normed<Format, kColumns>(x, norm, eps, weight, gemv::Neighbours<1>{}, (outputs + kTile - 1) / kTile,
                                   epilogue.rows, inputs, epilogue, shared);
}

}  // namespace fwd::latent

// hidden [rows, inputs]; weight [rank + latent + rope, inputs]; narrow [rows, rank]. With scales latents are fp8.
// `next`: the weights of the query.
#define FWD_LATENT_DOWN(name, Format, columns)                                                                       \
    extern "C" __global__ void __launch_bounds__(fwd::gemv::kThreads, fwd::gemv::kResident)                          \
        name(const fwd::bf16* hidden, const fwd::bf16* norm, float eps, const void* weight, const float* factors,    \
             const fwd::bf16* kv_norm, float kv_eps, const float* rope, const int64_t* positions,                    \
             const int64_t* slots, void* latents, fwd::bf16* keys, float* scales, fwd::bf16* narrow,                 \
             fwd::bf16* projected, int* counter, const void* next, int rows, int inputs, int positions_known,        \
             int rank, int latent, int half, int next_bytes) {                                                       \
        FWD_SHARED(shared);                                                                                          \
        fwd::latent::prefetch_share(next, next_bytes);                                                               \
        fwd::latent::Records records{kv_norm, kv_eps, {rope, positions, positions_known, half},                      \
                                     slots,   latents, keys, scales, latent};                                        \
        fwd::latent::Down down{narrow, projected, counter, records, rows, rank};                                     \
        fwd::latent::project<fwd::gemv::Format, columns>(hidden, norm, eps, {weight, factors}, rank + down.width(),  \
                                                         inputs, down, shared);                                      \
    }

// x [rows, inputs], which are normed; weight [heads·(nope + rope), inputs]; up_key [heads, nope, latent].
#define FWD_LATENT_QUERY(name, Format, columns)                                                                      \
    extern "C" __global__ void __launch_bounds__(fwd::gemv::kThreads, 1)                                             \
        name(const fwd::bf16* x, const fwd::bf16* norm, float eps, const void* weight, const float* factors,         \
             const fwd::bf16* up_key, const float* rope, const int64_t* positions, fwd::bf16* q,                     \
             fwd::bf16* absorbed, int* counters, int rows, int inputs, int positions_known, int heads, int nope,     \
             int latent, int half) {                                                                                 \
        FWD_SHARED(shared);                                                                                          \
        fwd::latent::prefetch_share(up_key, int64_t{heads} * nope * latent * 2);                                     \
        fwd::latent::Query query{q,    absorbed, up_key, counters, {rope, positions, positions_known, half},         \
                                 rows, heads,    nope,   latent};                                                    \
        fwd::latent::project<fwd::gemv::Format, columns>(x, norm, eps, {weight, factors}, heads * query.width(),     \
                                                         inputs, query, shared);                                     \
    }
