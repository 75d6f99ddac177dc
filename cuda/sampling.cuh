// What the kernels of the sampler share: how a row draws, its tempered logits, their weights and order. The twin of
// fwd/kernels/sampling.py: every number that decides has the same bits there, on a device and on the host.
#pragma once

#include "common.cuh"

namespace fwd {

// Kinds of rows (fwd/kernels/drawing.py).
constexpr int DRAWN = 1, PENALTIES = 2, BIASED = 4;
constexpr int GIVEN = 8;  // the token is `ids` of the row: only its log-probability is wanted
constexpr int MASKED = 16;

constexpr int MAX_ROWS = 16, MAX_TOPS = 20;
constexpr int IN_PROMPT = 1 << 30;  // of counts
constexpr int ID_BITS = 20;
constexpr float GREEDY_BELOW = 1e-5f, SMALLEST = 0x1p-126f, LARGEST = 0x1.fffffep127f;

// Products and sums that are never fused, so that they round as numpy rounds.
FWD_INLINE double mul_rn(double a, double b) {
#ifdef FWD_HOST
    return a * b;  // compiled with -ffp-contract=off
#else
    return __dmul_rn(a, b);
#endif
}
FWD_INLINE double add_rn(double a, double b) {
#ifdef FWD_HOST
    return a + b;
#else
    return __dadd_rn(a, b);
#endif
}

// ---- what each row draws: the buffers of fwd.kernels.drawing.Drawing and of fwd.kernels.rows.Rows ----

struct Drawing {
    const int64_t* seeds;
    const int64_t* places;
    const float* temperatures;
    const float* top_ps;
    const float* min_ps;
    const float* repetitions;
    const float* presences;
    const float* frequencies;
    const int* top_ks;
    const int* tops;
    const int* kinds;
    int* counts;  // [lines, vocab]
    const float* bias;  // [lines, vocab]
    const unsigned* masks;  // [rows, ⌈vocab/32⌉], a bit for each id that may be drawn; read by `open_row` only
};

struct Rows {
    const int64_t* ids;
    const int64_t* sequences;
    const int64_t* parents;
    const int* kinds;
    int count;

    // The rows of a sequence stand together; the first that draws is the root of its chain or tree.
    FWD_INLINE bool is_root(int row) const {
        return row == 0 || sequences[row - 1] != sequences[row] || !(kinds[row - 1] & DRAWN);
    }
    FWD_INLINE int parent(int row) const { return parents[row] < 0 ? row - 1 : static_cast<int>(parents[row]); }
};

// What a row came to. `id` and `logprob` are the draw's.
struct Result {
    double total;  // log Σ exp(logits)
    float peak;  // of the tempered logits of a row with thresholds
    float logprob;
    int id;
    int finite;
};

// ---- the logits of a row, adjusted and tempered ----

struct Row {
    const float* logits;
    const int* counts;  // null: no penalties
    const float* bias;  // null: none
    const unsigned* mask;  // null: all may be drawn
    float temperature;
    double repetition, presence, frequency;
    const int* drafts;  // shared memory: the tokens of its draft rows, which `counts` does not hold yet
    int draft_count;
    int vocab;

    FWD_INLINE bool greedy() const { return temperature < GREEDY_BELOW; }
    FWD_INLINE bool allows(int id) const { return !mask || mask[id / 32] >> id % 32 & 1; }
};

FWD_INLINE float flushed(float value) { return fabsf(value) < SMALLEST ? 0.0f : value; }

// In float64 the products of two floats are exact, so fusing them changes nothing.
FWD_INLINE double penalised(const Row& row, int id, double value) {
    int count = row.counts[id];
    bool seen = count != 0;
    count &= IN_PROMPT - 1;
    for (int draft = 0; draft < row.draft_count; ++draft) count += row.drafts[draft] == id;
    if (seen || count > 0) value = value > 0.0 ? value / row.repetition : value * row.repetition;
    return count > 0 ? value - (row.frequency * count + row.presence) : value;
}

FWD_INLINE float adjusted(const Row& row, int id, float logit) {
    if (!row.allows(id)) return -INFINITY;
    logit = flushed(logit);
    if (!row.counts && !row.bias) return logit;
    double value = static_cast<double>(logit);
    if (row.counts) value = penalised(row, id, value);
    if (row.bias) value += static_cast<double>(row.bias[id]);
    return flushed(static_cast<float>(value));
}

FWD_INLINE float tempered(float adjusted, float temperature) { return flushed(fminf(adjusted / temperature, LARGEST)); }

// All threads of the block. `drafts` is shared memory, MAX_ROWS numbers.
FWD_INLINE Row open_row(const float* logits, const Drawing& drawing, const Rows& rows, int index, int vocab,
                        int* drafts) {
    int kinds = drawing.kinds[index];
    int64_t line = rows.sequences[index] * vocab;
    Row row;
    row.logits = logits + static_cast<int64_t>(index) * vocab;
    row.counts = kinds & PENALTIES ? drawing.counts + line : nullptr;
    row.bias = kinds & BIASED ? drawing.bias + line : nullptr;
    row.mask = kinds & MASKED ? drawing.masks + static_cast<int64_t>(index) * ((vocab + 31) / 32) : nullptr;
    row.temperature = drawing.temperatures[index];
    row.repetition = static_cast<double>(drawing.repetitions[index]);
    row.presence = static_cast<double>(drawing.presences[index]);
    row.frequency = static_cast<double>(drawing.frequencies[index]);
    row.drafts = drafts;
    row.draft_count = 0;
    row.vocab = vocab;
    if (row.counts) {
        for (int draft = index; !rows.is_root(draft); draft = rows.parent(draft)) {
            if (threadIdx.x == 0) drafts[row.draft_count] = static_cast<int>(rows.ids[draft]);
            ++row.draft_count;
        }
        block_barrier();
    }
    return row;
}

// ---- order: a greater number for the greater value, among equal values for the lower id; 0 is nothing ----

FWD_INLINE uint64_t order_of(float value, int id) {
    uint32_t bits = __float_as_uint(value);
    bits ^= bits >> 31 ? 0xFFFFFFFFu : 0x80000000u;
    return static_cast<uint64_t>(bits) << ID_BITS | ((1u << ID_BITS) - 1 - static_cast<uint32_t>(id));
}
FWD_INLINE int id_of(uint64_t order) { return (1 << ID_BITS) - 1 - static_cast<int>(order & ((1u << ID_BITS) - 1)); }
FWD_INLINE float value_of(uint64_t order) {
    uint32_t bits = static_cast<uint32_t>(order >> ID_BITS);
    return __uint_as_float(bits ^ (bits >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

// ---- the best token of a row ----

struct Best {
    double score;
    int id;
};

FWD_INLINE Best none() { return {-INFINITY, 0x7FFFFFFF}; }
FWD_INLINE Best better(const Best& a, const Best& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id) ? a : b;
}

// `value` plus noise against the best so far. Noise is at most −log u: most tokens need no logarithm in double.
FWD_INLINE void consider(Best& best, unsigned long long seed, long long place, float value, int id) {
    uint32_t word = noise_word(seed, place, id);
    float reach = 0.001f - logf((static_cast<float>(word) + 0.5f) * 0x1p-32f);
    if (static_cast<double>(value) + static_cast<double>(reach) < best.score) return;
    best = better(best, {static_cast<double>(value) + gumbel(word), id});
}

// ---- joins over a block, every thread gets the result; `scratch` is shared memory, one T a warp ----

FWD_INLINE uint64_t from_lane(uint64_t value, int mask) {
    return shuffle_xor(static_cast<unsigned long long>(value), mask);
}
FWD_INLINE Best from_lane(const Best& value, int mask) {
    return {shuffle_xor(value.score, mask), shuffle_xor(value.id, mask)};
}

template <typename T, typename Join>
FWD_INLINE T block_join(T value, void* scratch, Join join) {
    T* parts = static_cast<T*>(scratch);
    for (int mask = 16; mask > 0; mask /= 2) value = join(value, from_lane(value, mask));
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    block_barrier();
    int warps = static_cast<int>(blockDim.x) / 32;  // a power of 2
    value = parts[threadIdx.x & (warps - 1)];
#pragma unroll 1
    for (int mask = warps / 2; mask > 0; mask /= 2) value = join(value, from_lane(value, mask));
    block_barrier();
    return value;
}
FWD_INLINE Best block_best(const Best& value, void* scratch) {
    return block_join(value, scratch, [](const Best& a, const Best& b) { return better(a, b); });
}
FWD_INLINE uint64_t block_greatest(uint64_t value, void* scratch) {
    return block_join(value, scratch, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}
FWD_INLINE uint64_t block_total(uint64_t value, void* scratch) {
    return block_join(value, scratch, [](uint64_t a, uint64_t b) { return a + b; });
}

}  // namespace fwd
