// The experts of a step over the union of what its rows visit: an expert's weights are read once for up to 8·kColumns
// rows, which are the columns of the tensor cores' products.
//
// Work comes in units, which the blocks of a grid of any size take in turn: an output tile and all items of the union,
// or two tiles and one item. The two halves of a block's warps take every other item, or a tile each; of those a warp
// has every fourth block of inputs. All its weights pass through the same registers, which are filled again as soon as
// they are used. A visit's sum depends on the row, the expert and nothing else: the parts of the warps are kept apart
// and added in the order of the warps.
#pragma once

#include "expert_stream.cuh"

namespace fwd::experts {

// The rows that visit an item; past the last one, that one: its sums go nowhere. Inputs past the last: weights are 0.
template <int kColumns>
struct Visitors {
    const uint4* x;
    uint32_t place[kColumns], last[kColumns];  // of 8 inputs

    template <class Work>
    FWD_INLINE void aim(const Work& work, const Item& item, int first) {  // sub-block of a turn's step 0
        const auto stack = work.stack(item.expert < 0);
        x = reinterpret_cast<const uint4*>(stack.x);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            int position = item.first + min(8 * c + gemv::group_row(), item.count - 1);
            uint32_t row = position;
            if (item.expert >= 0) row = stack.by_rows ? work.table.row(position) : work.table.visit(position);
            row *= stack.inputs / 8;
            place[c] = row + gemv::quarter() + first * (kInputs / 8), last[c] = row + stack.inputs / 8 - 1;
        }
    }
    FWD_INLINE void move(int subs) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) place[c] += subs * (kInputs / 8);
    }
    FWD_INLINE uint4 at(int column, int sub) const {
        return load_global(x + min(place[column] + sub * (kInputs / 8), last[column]));
    }
};

// A warp's block of one item: that of a step.
template <class Format, int kColumns>
FWD_INLINE void multiply(float (&sums)[kColumns][4], const typename Format::Held (&held)[2],
                         const Visitors<kColumns>& rows, int count, int step) {
    constexpr int kSub = Format::kSub;
    float span[kColumns][4];
    uint4 x[kSub][kColumns];  // all reads are under way at once
#pragma unroll
    for (int sub = 0; sub < kSub; ++sub)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            x[sub][c] = make_uint4(0, 0, 0, 0);
            if (c == 0 || 8 * c < count) x[sub][c] = rows.at(c, step * kMembers * kSub + sub);
        }
#pragma unroll
    for (int sub = 0; sub < kSub; ++sub) gemv::accumulate<Format>(sums, span, held[0], held[1], sub, x[sub]);
}

// The sums of `count` visits where all warps find them: own [visits][kPitch].
template <int kColumns>
FWD_INLINE void store_sums(float* own, const float (&sums)[kColumns][4], int count) {
    int group = gemv::group_row(), pair = gemv::quarter() * 2;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        float* to = own + (8 * c + pair) * kPitch + group;
        if (8 * c + pair < count) to[0] = sums[c][0], to[8] = sums[c][2];
        if (8 * c + pair + 1 < count) to[kPitch] = sums[c][1], to[kPitch + 8] = sums[c][3];
    }
}

// Parts of sums, biases and factors of a unit: floats of shared memory.
struct Parts {
    float* sums;   // [kMembers][positions][kPitch]
    float* early;  // [items or tiles][kEarly]
    int positions;

    FWD_INLINE float* of(int member, int position) const { return sums + (member * positions + position) * kPitch; }
    // Output m of a visit, with its bias; `item` counts what is early.
    template <class Format>
    FWD_INLINE float value(int position, int item, int m) const {
        float sum = of(0, position)[m];
#pragma unroll
        for (int member = 1; member < kMembers; ++member) sum += of(member, position)[m];
        if constexpr (Format::kFactors) sum = __fmul_rn(sum, early[item * kEarly + kTile + m]);
        if constexpr (Format::kScaled && !Format::kFactors) sum = __fmul_rn(sum, Format::kFactor);
        return sum + early[item * kEarly + m];
    }
};

// Biases and factors of a unit start on their way.
template <class Format, class Work>
FWD_INLINE void fetch_early(const Work& work, const Unit& unit, const Parts& parts) {
    int tile = unit.tile - (Work::kAll ? 0 : team_index());
    for (int at = threadIdx.x; at < (Work::kAll ? work.items : kTeams) * kTile; at += kThreads) {
        int place = at / kTile, m = at % kTile, index = Work::kAll ? place : unit.begin;
        const Stack<Format> stack = work.stack(index < work.shared_items);
        if (!Work::kAll) tile = unit.tile - team_index() + place;
        if (tile >= stack.tiles) continue;
        int64_t expert = max(work.item(index).expert, 0);
        int output = stack.output(tile, m);
        bool biased = stack.bias && output < stack.outputs;
        float* to = parts.early + place * kEarly + m;
        const void* from = biased ? static_cast<const void*>(stack.bias + expert * stack.outputs + output) : stack.data;
        cp_async_4_zfill(to, from, biased);
        if constexpr (Format::kFactors) {
            int64_t group = expert * stack.groups + stack.group(tile, m / 8);
            cp_async_4_zfill(to + kTile, stack.factors + group * stack.pitch + m % 8, true);
        }
    }
    cp_async_commit();
}

// Where a team is in a unit, and a warp's sums there.
template <class Format, int kColumns>
struct Team {
    static constexpr int kSubs = kMembers * Format::kSub;  // of a step
    Visitors<kColumns> rows;
    float sums[kColumns][4];
    Item item{};
    int at;
    Steps steps;

    // To item `at`, whose first step is `from` of a turn.
    template <class Work>
    FWD_INLINE void aim(const Work& work, const Unit& unit, int from) {
        gemv::clear(sums);
        steps.none();
        if (at >= unit.end) return;
        item = work.item(at);
        steps.start(from, work.blocks(at));
        rows.aim(work, item, member_index() * Format::kSub - from * kSubs);
    }
    // A unit's sums to `parts`, step by step until an item is over here or in the stream: what follows stands in the
    // code once.
    template <class Work>
    FWD_INLINE void sum(const Work& work, Stream<Format, Work>& stream, const Unit& unit, const Parts& parts) {
        constexpr int kDepth = Stream<Format, Work>::kDepth;
        at = unit.begin;
        aim(work, unit, 0);
        for (int done = 0; at < unit.end || done != 0;) {
            int until = min(min(steps.all, stream.steps.all), kDepth);
#pragma unroll
            for (int step = 0; step < kDepth; ++step) {
                if (step < done || step >= until) continue;
                if (step < steps.own) multiply<Format>(sums, stream.held[step], rows, item.count, step);
                stream.fetch(step);
            }
            done = until;
            if (done == steps.all) {
                store_sums(parts.of(member_index(), work.base(item)), sums, item.count);
                at += kTeams;
                aim(work, unit, done);
            }
            stream.advance(work, done);
            if (done == kDepth) done = 0, steps.turn(kDepth), rows.move(kDepth * kSubs);
        }
    }
};

// All units of this block, behind the wait: what `before(unit)` found early goes to put(unit, parts, found) when the
// parts are there. `kTurns` parts take turns, `floats` apart.
template <class Format, int kColumns, int kTurns, class Work, class Before, class Put>
FWD_INLINE void run(const Work& work, Stream<Format, Work>& stream, Parts parts, int floats, Before before, Put put) {
    stream.open(work);
    Team<Format, kColumns> team;
    int turn = 0;
    for (int index = blockIdx.x; index < work.units; index += gridDim.x) {
        Unit unit = work.unit(index);
        Parts own{parts.sums + turn * floats, parts.early + turn * floats, parts.positions};
        fetch_early<Format>(work, unit, own);
        auto found = before(unit);
        team.sum(work, stream, unit, own);
        cp_async_wait<0>();
        block_barrier();
        put(unit, own, found);
        if (kTurns == 1) block_barrier();
        if (kTurns == 2) turn = 1 - turn;
    }
}

}  // namespace fwd::experts
