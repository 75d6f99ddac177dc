// The weights of the experts of a step on their way to the registers, and how far they are.
#pragma once

#include "expert_work.cuh"

namespace fwd::experts {

constexpr int kAlways = 1 << 30;

// Of an item, in steps of a turn counted from its first: `own` have no more blocks of this warp's, `all` no more of the
// team's, where the next item begins.
struct Steps {
    int own, all;

    FWD_INLINE void none() { own = 0, all = kAlways; }
    FWD_INLINE bool are_none() const { return all == kAlways; }  // in the first turn
    FWD_INLINE void start(int from, int blocks) {
        own = from + (blocks - member_index() + kMembers - 1u) / kMembers;
        all = from + (blocks + kMembers - 1u) / kMembers;
    }
    FWD_INLINE void turn(int depth) { own -= depth, all -= depth; }
};

// The weights on their way: always one turn of `kDepth` steps ahead of the sums, a step being a block of each warp.
template <class Format, class Work>
struct Stream {
    static constexpr int kDepth = Format::kBytes > 576 ? 3 : 4;  // as registers allow: 29 KB and more of all warps
    static constexpr int kStep = kMembers * Format::kBytes;
    typename Format::Held held[kDepth][2];
    const unsigned char* next[2];    // what step 0 would fetch of the item,
    const unsigned char* scales[2];  // with the scales from here,
    const float* cells[2];           // or from here
    Unit unit;
    int index, item;
    Steps steps;
    int there;  // of the first turn, before the wait

    // Before the wait: what is the shared expert's.
    FWD_INLINE Stream(const Work& work) {
        enter(work, blockIdx.x);
        aim(work, 0);
        there = 0;
        fill(work);
    }
    // Behind it, when the work is open: the rest of the first turn.
    FWD_INLINE void open(const Work& work) {
        if (there == 0) {
            enter(work, blockIdx.x);
            seek(work);
        } else {
            unit = work.unit(index);
        }
        if (steps.are_none()) aim(work, there);
        fill(work);
        advance(work, kDepth);
    }
    FWD_INLINE void fill(const Work& work) {
#pragma unroll
        for (int step = 0; step < kDepth; ++step) {
            if (step < there || steps.are_none()) continue;
            fetch(step);
            there = step + 1;
            if (there < kDepth) advance(work, there);
        }
    }
    FWD_INLINE void enter(const Work& work, int wanted) {
        index = wanted;
        unit = {0, 0, 0};
        if (index < work.units) unit = work.unit(index);
        item = unit.begin;
    }
    FWD_INLINE bool seek(const Work& work) {  // to a unit that this team has a part in
        bool moved = false;
        while (item >= unit.end && index < work.units) enter(work, index + gridDim.x), moved = true;
        return moved;
    }
    FWD_INLINE void aim(const Work& work, int from) {
        steps.none();
        if (item >= unit.end) return;
        const Stack<Format> stack = work.stack(item < work.shared_items);
        int expert = max(work.item(item).expert, 0);
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            int64_t place = int64_t{expert} * stack.groups + stack.group(unit.tile, which);
            int64_t block = place * stack.blocks + member_index() - from * kMembers;
            next[which] = stack.data + block * Format::kBytes + lane_index() * 16;
            scales[which] = next[which] + Format::word();
            if constexpr (Format::kCells)
                cells[which] = stack.factors + place * stack.pitch + 8 + member_index() / 2 - from * (kMembers / 2);
        }
        steps.start(from, stack.blocks);
    }
    FWD_INLINE void fetch(int step) {
        if (step >= steps.own) return;
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            held[step][which].fetch(next[which] + step * kStep, scales[which] + step * kStep);
            if constexpr (Format::kCells) held[step][which].cell = cells[which][step * (kMembers / 2)];
        }
    }
    // Behind `done` steps of a turn: to the next item where one is over, and at the end of the turn to the next unit.
    FWD_INLINE void advance(const Work& work, int done) {
        bool moved = done == steps.all, turned = done == kDepth;
        if (moved) item += kTeams;
        if (turned) {
            turn();
            if (seek(work)) moved = true;
        }
        if (moved) aim(work, turned ? 0 : done);
    }
    FWD_INLINE void turn() {
        steps.turn(kDepth);
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            next[which] += kDepth * kStep;
            scales[which] += kDepth * kStep;
            if constexpr (Format::kCells) cells[which] += kDepth * (kMembers / 2);
        }
    }
};

}  // namespace fwd::experts
