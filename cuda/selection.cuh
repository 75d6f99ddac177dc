// How a row with thresholds is cut without sorting it, by one block.
//
// Tokens stand on levels of their tempered logits (1/64 of an octave of probability). From the histogram of the levels,
// by number and by weight, comes the level in which a threshold falls; the few tokens of it are listed, and halved down
// to the last one that is let through. All of it is integer sums and one total order of the tokens: exact, whatever the
// order of threads. Where more than HELD tokens stand on one level, as in a row of equal logits, the row is gone over
// instead of the list: slower, and the same.
#pragma once

#include "sampling.cuh"

namespace fwd {

constexpr int SELECT_THREADS = 512;
constexpr int EACH = 8;  // logits of a thread at a time
constexpr int LEVELS = 2048;  // a power of 2
constexpr int HELD = 1984;  // tokens of a list
constexpr double UNIT = 1073741824.0;

// Shared memory, in bytes.
constexpr int SCRATCH = 0, DRAFTS = 512, HELD_COUNT = 576, REST = 640;
constexpr int MASSES = REST, ORDERS = MASSES + 8 * LEVELS, COUNTS = ORDERS + 8 * HELD, WEIGHTS = COUNTS + 4 * LEVELS;
constexpr int SELECT_SHARED = WEIGHTS + 4 * HELD;
static_assert(SELECT_SHARED <= 48 * 1024, "no launch has to ask for more");

struct Weighed {
    uint32_t weight;  // ⌊exp(value − peak)·2³⁰⌋
    int level;  // rises with the value
};

// 2^f = Σ (ln 2)ⁿ / n! · fⁿ, each step rounded, never fused.
FWD_INLINE double power_of_2(double fraction) {
    double power = 7.054911620801121e-09;
    power = add_rn(mul_rn(power, fraction), 1.01780860092397e-07);
    power = add_rn(mul_rn(power, fraction), 1.3215486790144307e-06);
    power = add_rn(mul_rn(power, fraction), 1.525273380405984e-05);
    power = add_rn(mul_rn(power, fraction), 0.0001540353039338161);
    power = add_rn(mul_rn(power, fraction), 0.0013333558146428443);
    power = add_rn(mul_rn(power, fraction), 0.009618129107628477);
    power = add_rn(mul_rn(power, fraction), 0.05550410866482158);
    power = add_rn(mul_rn(power, fraction), 0.24022650695910072);
    power = add_rn(mul_rn(power, fraction), 0.6931471805599453);
    return add_rn(mul_rn(power, fraction), 1.0);
}

// Of a value at most `peak`. 2⁻³⁰·⁵ has no weight, and nothing below it.
FWD_INLINE Weighed weigh(float value, float peak) {
    double exponent = mul_rn(static_cast<double>(value) - static_cast<double>(peak), 1.4426950408889634);
    if (exponent < -30.5) return {0, 0};
    double whole = floor(add_rn(exponent, 0.5));
    double power = power_of_2(add_rn(exponent, -whole));
    uint32_t weight = static_cast<uint32_t>(mul_rn(power, UNIT)) >> static_cast<int>(-whole);
    return {weight, LEVELS - 1 - static_cast<int>(exponent * -64.0)};
}

// f(order, weighed) of every token from `begin` to `end` that has a weight: values [vocab] are tempered logits.
template <typename F>
FWD_INLINE void visit(const float* values, float peak, int begin, int end, F f) {
    float floor = peak - 21.0f;  // exp(−21)·2³⁰ < 1
    int stride = static_cast<int>(blockDim.x);
    for (int first = begin + static_cast<int>(threadIdx.x); first < end; first += EACH * stride) {
        unsigned near = 0;
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            int id = first + j * stride;
            if (id < end && values[id] >= floor) near |= 1u << j;
        }
#pragma unroll 1
        for (int id = first; near != 0; near >>= 1, id += stride) {
            if (!(near & 1)) continue;
            Weighed weighed = weigh(values[id], peak);
            if (weighed.weight > 0) f(order_of(values[id], id), weighed);
        }
    }
}

// Of tokens: the sum of those at a probe or above, the greatest order below it, the least at it or above.
struct Split {
    uint64_t sum, below, above;
};

FWD_INLINE Split from_lane(const Split& value, int mask) {
    return {from_lane(value.sum, mask), from_lane(value.below, mask), from_lane(value.above, mask)};
}
FWD_INLINE Split joined(const Split& a, const Split& b) {
    return {a.sum + b.sum, a.below > b.below ? a.below : b.below, a.above < b.above ? a.above : b.above};
}

// A row with thresholds, in the hands of one block. In view are the tokens of levels low … high.
struct Selection {
    const float* values;  // [vocab], tempered
    int vocab;
    float peak;
    unsigned* counts;  // of tokens, by level
    uint64_t* masses;  // of their weights
    uint64_t* orders;  // the list
    uint32_t* weights;
    unsigned* held;  // how many stand in it
    void* scratch;
    int low, high;  // none at first: low > high
    bool listed;  // what is in view stands in the list
    uint64_t count_above, mass_above;  // of the tokens above the view

    // Of the tokens on some levels: their number, or their weight.
    FWD_INLINE uint64_t levels(bool mass, int first, int last) const {
        uint64_t sum = 0;
#pragma unroll 1
        for (int level = first + static_cast<int>(threadIdx.x); level <= last; level += SELECT_THREADS) {
            sum += mass ? masses[level] : counts[level];
        }
        return block_total(sum, scratch);
    }

    template <typename F>
    FWD_INLINE void each(F f) const {
        if (listed) {
#pragma unroll 1
            for (unsigned at = threadIdx.x; at < *held; at += SELECT_THREADS) f(orders[at], weights[at]);
        } else {
            visit(values, peak, 0, vocab, [&](uint64_t order, const Weighed& weighed) {
                if (low <= weighed.level && weighed.level <= high) f(order, weighed.weight);
            });
        }
    }

    // The tokens in view; the sum is of their number or their weight, with those above the view.
    FWD_INLINE Split split(bool mass, uint64_t probe) const {
        Split own = {0, 0, ~uint64_t{0}};
        each([&](uint64_t order, uint32_t weight) {
            uint64_t part = mass ? weight : 1;
            own = joined(own, order < probe ? Split{0, order, ~uint64_t{0}} : Split{part, 0, order});
        });
        Split all = block_join(own, scratch, [](const Split& a, const Split& b) { return joined(a, b); });
        all.sum += mass ? mass_above : count_above;
        return all;
    }

    FWD_INLINE void list() {
        listed = false;
        block_barrier();
        if (threadIdx.x == 0) *held = 0;
        block_barrier();
        each([&](uint64_t order, uint32_t weight) {
            unsigned at = atomic_add(held, 1u);
            orders[at] = order, weights[at] = weight;
        });
        block_barrier();
        listed = true;
    }

    // Brings the tokens of a level into view: with all above it where a list holds them.
    FWD_INLINE void view(int level) {
        if (low <= level && level <= high) return;
        low = level, high = levels(false, level, LEVELS - 1) <= HELD ? LEVELS - 1 : level;
        count_above = levels(false, high + 1, LEVELS - 1), mass_above = levels(true, high + 1, LEVELS - 1);
        listed = false;
        if (levels(false, low, high) <= HELD) list();
    }

    // The highest level at or above which there is `limit`.
    FWD_INLINE int border_level(bool mass, uint64_t limit) const {
        int level = 0;
#pragma unroll 1
        for (int bit = LEVELS / 2; bit > 0; bit /= 2) {
            if (levels(mass, level + bit, LEVELS - 1) >= limit) level += bit;
        }
        return level;
    }

    // The last token, in the order, that is needed for `limit` tokens or so much weight. Every step halves what is
    // left, to where tokens are.
    FWD_INLINE uint64_t border(bool mass, uint64_t limit) {
        view(border_level(mass, limit));
        uint64_t low = 0, high = ~uint64_t{0};
#pragma unroll 1
        while (low < high) {
            Split found = split(mass, low + (high - low) / 2 + 1);
            if (found.sum >= limit) low = found.above;
            if (found.sum <= limit) high = found.sum == limit ? low : found.below;
        }
        return low;
    }

    // The last token that top-k and then top-p let through; 0: all.
    FWD_INLINE uint64_t cut(int top_k, float top_p) {
        uint64_t cut = 0, total = levels(true, 0, LEVELS - 1);
        bool by_number = top_k > 0 && static_cast<uint64_t>(top_k) < levels(false, 0, LEVELS - 1);
#pragma unroll 1
        for (int mass = !by_number; mass < 1 + (top_p < 1.0f); ++mass) {
            double share = ceil(mul_rn(static_cast<double>(top_p), static_cast<double>(total)));
            uint64_t limit = mass ? static_cast<uint64_t>(share) : top_k;
            cut = border(mass, limit > 0 ? limit : 1);
            if (!mass) total = split(true, cut).sum;
        }
        return cut;
    }

    FWD_INLINE int draw(uint64_t cut, uint32_t least, unsigned long long seed, long long place) {
        if (!listed || high < LEVELS - 1) low = 0, high = LEVELS - 1, listed = false;
        Best best = none();
        each([&](uint64_t order, uint32_t weight) {
            if (order >= cut && weight >= least) consider(best, seed, place, value_of(order), id_of(order));
        });
        return block_best(best, scratch).id;
    }
};

FWD_INLINE Selection open_selection(const float* values, int vocab, float peak, unsigned char* shared) {
    Selection selection;
    selection.values = values, selection.vocab = vocab, selection.peak = peak;
    selection.counts = reinterpret_cast<unsigned*>(shared + COUNTS);
    selection.masses = reinterpret_cast<uint64_t*>(shared + MASSES);
    selection.orders = reinterpret_cast<uint64_t*>(shared + ORDERS);
    selection.weights = reinterpret_cast<uint32_t*>(shared + WEIGHTS);
    selection.held = reinterpret_cast<unsigned*>(shared + HELD_COUNT);
    selection.scratch = shared + SCRATCH;
    selection.low = LEVELS, selection.high = -1, selection.listed = false;
    selection.count_above = selection.mass_above = 0;
    return selection;
}

}  // namespace fwd
