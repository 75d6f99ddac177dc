// The attention input of a layer in one launch: norm, project, bias, norm of heads, RoPE; q out, k and v to their
// cells.
//
// A tile is the same 8 dimensions of both halves of one head: RoPE's pairs meet in it. Where a whole head is needed
// (for its norm, or the one scale of an fp8 cell) the block that comes last to it goes on, for all rows; who that is
// shapes nothing.
#pragma once

#include "gemv.cuh"

namespace fwd::gemv {

constexpr float kLargest = 448.0f;  // of e4m3
constexpr int kPairs = 4;           // of a lane: heads of up to 256 dimensions

// Where k or v of a layer go: cells of [kv_heads][head_dim]; with scales they are fp8.
struct Cache {
    void* cells;
    float* scales;
};

struct Heads {
    const bf16* bias;
    const bf16 *q_norm, *k_norm;  // both or neither
    float q_eps, k_eps;
    const float* rope;  // [positions][cos, sin][head_dim / 2]
    const int64_t *positions, *slots;
    int2* places;  // both of each row in shared memory, positions clamped to the rope's
    Cache keys, values;
    bf16 *q, *workspace;  // [rows][heads][head_dim]: of q, and of all before they are finished
    int* counters;        // of each of all heads
    int rows, positions_known, heads, kv_heads, head_dim;

    FWD_INLINE int half() const { return head_dim / 2; }
    FWD_INLINE int all() const { return heads + 2 * kv_heads; }
    FWD_INLINE unsigned tiles() const { return static_cast<unsigned>(head_dim) / kTile; }
    FWD_INLINE int head_of(unsigned tile) const { return tile / tiles(); }
    FWD_INLINE int dim_of(unsigned tile, int m) const { return tile % tiles() * 8 + m % 8 + m / 8 * half(); }
    FWD_INLINE bool is_q(int head) const { return head < heads; }
    FWD_INLINE bool is_v(int head) const { return head >= heads + kv_heads; }
    FWD_INLINE const float* angles(int row) const { return rope + int64_t{places[row].x} * head_dim; }

    FWD_INLINE void copy_places() const {
        if (int row = threadIdx.x; row < rows) {
            int64_t last = positions_known - 1, position = min(max(positions[row], int64_t{0}), last);
            places[row] = make_int2(static_cast<int>(position), static_cast<int>(slots[row]));
        }
    }
    FWD_INLINE int64_t cell_of(int slot, int head) const {
        return int64_t{slot} * kv_heads + (is_v(head) ? head - heads - kv_heads : head - heads);
    }

    // Where a head of q goes, or of k or v in bf16; null: nowhere.
    FWD_INLINE bf16* place(int row, int head) const {
        if (is_q(head)) return q + (row * heads + head) * head_dim;
        int slot = places[row].y;
        bf16* cells = static_cast<bf16*>(is_v(head) ? values.cells : keys.cells);
        return slot < 0 ? nullptr : cells + cell_of(slot, head) * head_dim;
    }

    FWD_INLINE bf16 bias_of(int tile, int m) const {
        return bias ? bias[head_of(tile) * head_dim + dim_of(tile, m)] : to_bf16(0.0f);
    }

    // x·cos ∓ other·sin; the order is written out so that all builds round alike.
    FWD_INLINE static float rotated(float x, float other, bool lower, float cos, float sin) {
        return fmaf(x, cos, lower ? -(other * sin) : other * sin);
    }
};

// No norm of heads, no fp8: a tile is all it takes.
struct Paired : Heads {
    struct Early {
        bf16 bias;
        float cos, sin;
    };

    FWD_INLINE Early early(int tile, int row, int m) const {
        Early found{bias_of(tile, m), 1.0f, 0.0f};
        if (row < rows && !is_v(head_of(tile))) {
            const float* cos = angles(row) + dim_of(tile, m % 8);
            found.cos = cos[0], found.sin = cos[half()];
        }
        return found;
    }
    FWD_INLINE void put(int tile, int row, int m, float sum, Early early) const {
        int head = head_of(tile);
        float x = round_bf16(sum + to_float(early.bias)), other = shuffle_xor(x, 8);
        bf16* to = row < rows ? place(row, head) : nullptr;
        if (!is_v(head)) x = rotated(x, other, m < 8, early.cos, early.sin);
        if (to) to[dim_of(tile, m)] = to_bf16(x);
    }
    FWD_INLINE void end(int) const {}
};

struct Whole : Heads {
    using Early = bf16;

    FWD_INLINE bf16* projected(int row, int head) const { return workspace + (row * all() + head) * head_dim; }
    FWD_INLINE Early early(int tile, int, int m) const { return bias_of(tile, m); }
    FWD_INLINE void put(int tile, int row, int m, float sum, Early bias) const {
        if (row < rows) projected(row, head_of(tile))[dim_of(tile, m)] = to_bf16(sum + to_float(bias));
    }
    FWD_INLINE void end(int tile) const {
        int head = head_of(tile);
        if (!last_arriver(counters + head, tiles())) return;
        for (int row = warp_index(); row < rows; row += kWarps) finish(row, head);
    }

    // A warp does a whole head of one row: lane i has the pairs i, i + 32, …
    FWD_INLINE int pairs_from_here() const { return half() - lane_index(); }
    template <class Number>
    FWD_INLINE Number* lower_of(Number* dims) const { return dims + lane_index(); }
    template <class Number>
    FWD_INLINE Number* upper_of(Number* dims) const { return dims + half() + lane_index(); }

    FWD_INLINE void finish(int row, int head) const {
        float x[kPairs][2];
        load(x, projected(row, head));
        if (!is_v(head)) turn(x, row, head);
        if (is_q(head) || !keys.scales)
            store(x, place(row, head));
        else
            quantize(x, is_v(head) ? values : keys, places[row].y, head);
    }

    FWD_INLINE void load(float (&x)[kPairs][2], const bf16* from) const {
        const bf16 *lower = lower_of(from), *upper = upper_of(from);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            bool there = 32 * i < pairs_from_here();
            x[i][0] = there ? to_float(lower[32 * i]) : 0.0f;
            x[i][1] = there ? to_float(upper[32 * i]) : 0.0f;
        }
    }
    FWD_INLINE void store(const float (&x)[kPairs][2], bf16* to) const {
        if (!to) return;
        bf16 *lower = lower_of(to), *upper = upper_of(to);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            if (32 * i >= pairs_from_here()) continue;
            lower[32 * i] = to_bf16(x[i][0]), upper[32 * i] = to_bf16(x[i][1]);
        }
    }

    // Norm, where there is one, and RoPE.
    FWD_INLINE void turn(float (&x)[kPairs][2], int row, int head) const {
        const bf16* weight = is_q(head) ? q_norm : k_norm;
        if (weight) normalize(x, weight, is_q(head) ? q_eps : k_eps);
        const float *cos = lower_of(angles(row)), *sin = upper_of(angles(row));
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            if (32 * i >= pairs_from_here()) continue;
            float lower = x[i][0], upper = x[i][1], c = cos[32 * i], s = sin[32 * i];
            x[i][0] = round_bf16(rotated(lower, upper, true, c, s));
            x[i][1] = round_bf16(rotated(upper, lower, false, c, s));
        }
    }
    FWD_INLINE void normalize(float (&x)[kPairs][2], const bf16* weight, float eps) const {
        float sum = 0.0f, w[kPairs][2];
        load(w, weight);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) sum = fmaf(x[i][1], x[i][1], fmaf(x[i][0], x[i][0], sum));
        float factor = rsqrtf(warp_sum(sum) / head_dim + eps);
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
#pragma unroll
            for (int j = 0; j < 2; ++j) x[i][j] = round_bf16(round_bf16(x[i][j] * factor) * w[i][j]);
    }

    // The rule of fwd.kernels.kv.KV: x / scale in e4m3, scale = max|x| / 448, 1 where that is 0.
    FWD_INLINE void quantize(const float (&x)[kPairs][2], Cache cache, int slot, int head) const {
        float peak = 0.0f;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) peak = fmaxf(peak, fmaxf(fabsf(x[i][0]), fabsf(x[i][1])));
        float scale = warp_max(peak) / kLargest;
        scale = scale == 0.0f ? 1.0f : scale;
        if (slot < 0) return;
        int64_t cell = cell_of(slot, head);
        if (lane_index() == 0) cache.scales[cell] = scale;
        fp8* numbers = static_cast<fp8*>(cache.cells) + cell * head_dim;
        fp8 *lower = lower_of(numbers), *upper = upper_of(numbers);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            if (32 * i >= pairs_from_here()) continue;
            lower[32 * i] = to_fp8(x[i][0] / scale), upper[32 * i] = to_fp8(x[i][1] / scale);
        }
    }
};

template <class Format, int kColumns, class Epilogue>
FWD_INLINE void qkv(const bf16* hidden, const bf16* norm, float eps, Packed weight, int inputs, Epilogue heads,
                    unsigned char* shared) {
    grid_dependency_trigger();
    Weights<Format, 1, HeadHalves> weights(weight, {heads.tiles()}, inputs, heads.all() * heads.tiles());
    Normed<Format> staging(hidden, norm, eps, heads.rows, inputs, shared);
    staging.prepare();
    heads.places = reinterpret_cast<int2*>(staging.behind() + 2 * kWarps * kColumns * kSums);
    grid_dependency_wait();
    heads.copy_places();
    staging.stage();
    run<kColumns>(weights, Staged<kColumns>(staging.staged, staging.pitch, heads.rows), staging.behind(), heads);
}

}  // namespace fwd::gemv

// hidden [rows, inputs]; weight [(heads + 2·kv_heads)·head_dim, inputs]; q [rows, heads, head_dim]. `bias`, the norms
// of heads and the scales (with them keys and values are fp8) may be null. A slot −1 writes no cell.
#define FWD_QKV(name, Format, columns, Epilogue)                                                                     \
    extern "C" __global__ void __launch_bounds__(fwd::gemv::kThreads, fwd::gemv::kResident)                          \
        name(const fwd::bf16* hidden, const fwd::bf16* norm, float eps, const void* weight, const float* factors,    \
             const fwd::bf16* bias, const fwd::bf16* q_norm, float q_eps, const fwd::bf16* k_norm, float k_eps,      \
             const float* rope, const int64_t* positions, const int64_t* slots, void* keys, void* values,            \
             float* key_scales, float* value_scales, fwd::bf16* q, fwd::bf16* workspace, int* counters, int rows,    \
             int inputs, int positions_known, int heads, int kv_heads, int head_dim) {                               \
        FWD_SHARED(shared);                                                                                          \
        fwd::gemv::Heads all{bias, q_norm, k_norm, q_eps, k_eps, rope, positions, slots, nullptr, {keys, key_scales}, \
                             {values, value_scales}, q, workspace, counters, rows, positions_known, heads, kv_heads, \
                             head_dim};                                                                              \
        fwd::gemv::qkv<fwd::gemv::Format, columns>(hidden, norm, eps, {weight, factors}, inputs,                     \
                                                   fwd::gemv::Epilogue{all}, shared);                                \
    }
