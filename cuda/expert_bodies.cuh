// The bodies of the kernels of experts_*.cu and chunk_experts_*.cu, generic over the format of the weights.
#pragma once

#include "experts.cuh"

namespace fwd::experts {

constexpr int kChunkColumns = 4;  // of 8 rows
constexpr float kAlpha = 1.702f, kLimit = 7.0f;  // of the clamped activation

FWD_INLINE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// What is not a number stays none.
FWD_INLINE float activated(float gate, float up, bool clamped) {
    if (!clamped) return gate * sigmoid(gate) * up;
    gate = gate > kLimit ? kLimit : gate;
    up = up > kLimit ? kLimit : up < -kLimit ? -kLimit : up;
    return gate * sigmoid(kAlpha * gate) * (up + 1.0f);
}

// What the first tiles of `expert_down` want comes into L2 while the last ones of gate and up are computed: a thread
// asks for an item's tile. In the form of `down` [experts, inputs, width], null for none.
template <class Format, class Work>
FWD_INLINE void prefetch_down(const Work& work, const void* down, int inputs, int width) {
    constexpr int kItems = 4;
    int groups = (inputs + kTile - 1) / kTile * 2, bytes = gemv::blocks_of<Format>(width) * Format::kBytes;
    int item = work.shared_items + threadIdx.x, tile = blockIdx.x;
    if (!down || threadIdx.x >= kItems || item >= work.items || 2 * tile >= groups) return;
    int64_t group = int64_t{work.item(item).expert} * groups + 2 * tile;
    prefetch_l2(static_cast<const unsigned char*>(down) + group * bytes, 2 * bytes);
}

// out [visits, width] and shared_out [rows, width]: outputs m and m ^ 8 of a tile are gate and up of one place.
struct Activate {
    bf16* out;
    bf16* shared_out;
    int width, shared_width;
    bool clamped;

    template <class Format, class Work>
    FWD_INLINE void put(const Work& work, const Unit& unit, const Parts& parts) const {
        Item item = work.item(unit.begin);
        bool own = item.expert >= 0;
        int tile = unit.tile - team_index(), tiles = (own ? width : shared_width) / 8;
        for (int at = threadIdx.x; at / 32 * 32 < kTeams * item.count * kTile; at += kThreads) {
            int place = at / kTile, m = at % kTile, which = place / item.count;
            place -= which * item.count;
            bool there = which < kTeams && tile + which < tiles;
            float gate = parts.template value<Format>(there ? which * Work::kRows + place : 0, there ? which : 0, m);
            float up = shuffle_xor(gate, 8);
            if (m >= 8 || !there) continue;
            int64_t row = own ? work.table.visit(item.first + place) : item.first + place;
            bf16* to = own ? out + row * width : shared_out + row * shared_width;
            to[(tile + which) * 8 + m] = to_bf16(activated(gate, up, own && clamped));
        }
    }
};

// products [visits, outputs] in float32, those of the shared expert [rows, outputs] behind them.
struct Apart {
    float* products;

    template <class Format, class Work>
    FWD_INLINE void put(const Work& work, const Unit& unit, const Parts& parts) const {
        Item item = work.item(unit.begin);
        int outputs = work.routed.outputs, tile = unit.tile - team_index();
        for (int at = threadIdx.x; at < kTeams * item.count * kTile; at += kThreads) {
            int place = at / kTile, m = at % kTile, which = place / item.count;
            place -= which * item.count;
            int output = (tile + which) * kTile + m, position = item.first + place;
            int64_t row = item.expert < 0 ? work.table.visits + position : work.table.visit(position);
            if (output >= outputs) continue;
            products[row * outputs + output] = parts.template value<Format>(which * Work::kRows + place, which, m);
        }
    }
};

// A unit is two tiles and one item: put(work, unit, parts) takes its sums.
template <class Format, int kColumns, class Put>
FWD_INLINE void by_items(Work<Format, kColumns, false>& work, unsigned char* shared, Put put) {
    constexpr int kPositions = kTeams * 8 * kColumns, kSums = kMembers * kPositions * kPitch;
    Stream<Format, Work<Format, kColumns, false>> stream(work);
    grid_dependency_wait();
    work.open();
    float* memory = reinterpret_cast<float*>(shared);
    Parts parts{memory, memory + kSums, kPositions};
    auto before = [](const Unit&) { return 0; };
    run<Format, kColumns, 2>(work, stream, parts, kSums + kTeams * kEarly, before,
                             [&](const Unit& unit, const Parts& parts, int) { put(unit, parts); });
}

template <class Format>
FWD_INLINE void gate_up(const bf16* x, gemv::Packed weight, const float* bias, gemv::Packed shared_weight,
                        const void* down, const int* table, const Activate& activate, int rows, int top_k, int inputs,
                        unsigned char* shared) {
    grid_dependency_trigger();
    Work<Format, 1, false> work({weight, bias, x, true, inputs, 2 * activate.width, true},
                                {shared_weight, nullptr, x, true, inputs, 2 * activate.shared_width, true},
                                {table, rows * top_k}, rows);
    by_items<Format, 1>(work, shared, [&](const Unit& unit, const Parts& parts) {
        activate.put<Format>(work, unit, parts);
    });
    prefetch_down<Format>(work, down, inputs, activate.width);
}

// How a row's visits are summed, in shared memory: of each visit where its sums stand, which item's, what they weigh.
struct Choices {
    int* positions;
    int* items;
    float* weights;

    FWD_INLINE Choices(float* memory, int visits)
        : positions(reinterpret_cast<int*>(memory)),
          items(positions + visits),
          weights(reinterpret_cast<float*>(items + visits)) {}
    template <class Work>
    FWD_INLINE void fill(const Work& work, const int* experts, const float* given, int visits) const {
        for (int visit = threadIdx.x; visit < visits; visit += kThreads) {
            bool on = experts[visit] >= 0;
            positions[visit] = on ? work.table.position(visit) + (work.shared_items ? work.rows : 0) : -1;
            items[visit] = on ? work.table.item_of(visit) + work.shared_items : 0;
            weights[visit] = given[visit];
        }
    }
};

// A row's sum of its visits, and where it goes. Where the shared expert is in another format, `beside` [rows,
// outputs] holds what it gives: made by a launch without others.
struct Total {
    bf16* residual;
    float* beside;
    Choices choices;
    int rows, top_k, outputs;
    bool routed;

    FWD_INLINE int row() const { return threadIdx.x / kTile; }
    FWD_INLINE int m() const { return threadIdx.x % kTile; }
    FWD_INLINE bool holds(const Unit& unit) const { return row() < rows && unit.tile * kTile + m() < outputs; }
    FWD_INLINE int64_t place(const Unit& unit) const { return int64_t{row()} * outputs + unit.tile * kTile + m(); }
    FWD_INLINE float early(const Unit& unit) const {
        return routed && holds(unit) ? to_float(residual[place(unit)]) : 0.0f;
    }
    template <class Format, class Work>
    FWD_INLINE void put(const Work& work, const Unit& unit, const Parts& parts, float found) const {
        if (!holds(unit)) return;
        float sum = 0.0f;
        for (int visit = row() * top_k; visit < (row() + 1) * top_k && routed; ++visit) {
            if (choices.positions[visit] < 0) break;
            float value = parts.template value<Format>(choices.positions[visit], choices.items[visit], m());
            sum += __fmul_rn(choices.weights[visit], value);
        }
        if (work.shared_items) sum += parts.template value<Format>(row(), row() / 8, m());
        if (!routed) {
            beside[place(unit)] = sum;
            return;
        }
        if (beside) sum += beside[place(unit)];
        residual[place(unit)] = to_bf16(sum + found);
    }
};

// residual [rows, outputs] += Σ weightₖ·(downₖ·activeₖ + biasₖ) + shared, in that order in float32, rounded once.
template <class Format>
FWD_INLINE void down(const bf16* active, const bf16* shared_active, gemv::Packed weight, const float* bias,
                     gemv::Packed shared_weight, const int* table, const int* experts, const float* weights,
                     bf16* residual, float* beside, int rows, int top_k, int inputs, int shared_inputs, int outputs,
                     unsigned char* shared) {
    grid_dependency_trigger();
    using Whole = Work<Format, 1, true>;
    Whole work({weight, bias, active, false, inputs, outputs, false},
               {shared_weight, nullptr, shared_active, false, shared_inputs, outputs, false}, {table, rows * top_k},
               rows);
    Stream<Format, Whole> stream(work);
    grid_dependency_wait();
    work.open();
    int visits = weight.data ? rows * top_k : 0, positions = visits + (work.shared_items ? rows : 0);
    float* memory = reinterpret_cast<float*>(shared);
    Total total{residual, beside, Choices(memory, visits), rows, top_k, outputs, weight.data != nullptr};
    Parts parts{memory + 3 * visits, memory + 3 * visits + kMembers * positions * kPitch, positions};
    total.choices.fill(work, experts, weights, visits);  // read behind the first barrier
    run<Format, 1, 1>(
        work, stream, parts, 0, [&](const Unit& unit) { return total.early(unit); },
        [&](const Unit& unit, const Parts& parts, float found) { total.put<Format>(work, unit, parts, found); });
}

// Either of both for a chunk, whose visits are too many for shared memory: down where there are `products`, which
// `combine` sums.
template <class Format, int kColumns>
FWD_INLINE void chunk(const bf16* x, const bf16* shared_x, gemv::Packed weight, const float* bias,
                      gemv::Packed shared_weight, const int* table, const Activate& activate, float* products, int rows,
                      int top_k, int inputs, int shared_inputs, int outputs, int shared_outputs,
                      unsigned char* shared) {
    grid_dependency_trigger();
    bool halves = products == nullptr;
    Work<Format, kColumns, false> work(
        {weight, bias, x, halves, inputs, outputs, halves},
        {shared_weight, nullptr, shared_x, halves, shared_inputs, shared_outputs, halves}, {table, rows * top_k}, rows);
    Apart apart{products};
    by_items<Format, kColumns>(work, shared, [&](const Unit& unit, const Parts& parts) {
        if (halves) activate.put<Format>(work, unit, parts);
        else apart.put<Format>(work, unit, parts);
    });
}

}  // namespace fwd::experts

#define FWD_EXPERT_GATE_UP(Format)                                                                                     \
    extern "C" __global__ void __launch_bounds__(fwd::experts::kThreads, fwd::experts::kResident)                      \
        expert_gate_up(const fwd::bf16* x, const void* weight, const float* factors, const float* bias,                \
                       const void* shared_weight, const float* shared_factors, const void* down, const int* table,     \
                       fwd::bf16* out, fwd::bf16* shared_out, int rows, int top_k, int inputs, int width,              \
                       int shared_width, int clamped) {                                                                \
        FWD_SHARED(shared);                                                                                            \
        fwd::experts::gate_up<fwd::gemv::Format>(x, {weight, factors}, bias, {shared_weight, shared_factors}, down,    \
                                                 table, {out, shared_out, width, shared_width, clamped != 0}, rows,    \
                                                 top_k, inputs, shared);                                               \
    }

#define FWD_EXPERT_DOWN(Format)                                                                                        \
    extern "C" __global__ void __launch_bounds__(fwd::experts::kThreads, fwd::experts::kResident)                      \
        expert_down(const fwd::bf16* active, const fwd::bf16* shared_active, const void* weight, const float* factors, \
                    const float* bias, const void* shared_weight, const float* shared_factors, const int* table,       \
                    const int* experts, const float* weights, fwd::bf16* residual, float* beside, int rows, int top_k, \
                    int inputs, int shared_inputs, int outputs) {                                                      \
        FWD_SHARED(shared);                                                                                            \
        fwd::experts::down<fwd::gemv::Format>(active, shared_active, {weight, factors}, bias,                          \
                                              {shared_weight, shared_factors}, table, experts, weights, residual,      \
                                              beside, rows, top_k, inputs, shared_inputs, outputs, shared);            \
    }

#define FWD_CHUNK(Format)                                                                                              \
    extern "C" __global__ void __launch_bounds__(fwd::experts::kThreads, 1) chunk_experts(                             \
        const fwd::bf16* x, const fwd::bf16* shared_x, const void* weight, const float* factors, const float* bias,    \
        const void* shared_weight, const float* shared_factors, const int* table, fwd::bf16* out,                      \
        fwd::bf16* shared_out, float* products, int rows, int top_k, int inputs, int shared_inputs, int outputs,       \
        int shared_outputs, int clamped) {                                                                             \
        FWD_SHARED(shared);                                                                                            \
        fwd::experts::chunk<fwd::gemv::Format, fwd::experts::kChunkColumns>(                                           \
            x, shared_x, {weight, factors}, bias, {shared_weight, shared_factors}, table,                              \
            {out, shared_out, outputs / 2, shared_outputs / 2, clamped != 0}, products, rows, top_k, inputs,           \
            shared_inputs, outputs, shared_outputs, shared);                                                           \
    }
