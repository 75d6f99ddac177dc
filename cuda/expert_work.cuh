// What the expert kernels have to do: whose weights, which rows, in which units.
#pragma once

#include "gemv.cuh"

namespace fwd::experts {

using gemv::kInputs;
using gemv::kPitch;
using gemv::kResident;
using gemv::kThreads;
using gemv::kTile;
using gemv::kWarps;
using gemv::lane_index;
using gemv::warp_index;

constexpr int kTeams = 2;          // of warps: what is done once an item is then done by half of them
constexpr int kMembers = kWarps / kTeams;
constexpr int kEarly = 2 * kTile;  // floats of an item that are there before its sums: biases, factors

FWD_INLINE int team_index() { return warp_index() / kMembers; }
FWD_INLINE int member_index() { return warp_index() % kMembers; }

// Rows `first` … of the visits in order go to `expert`; the shared one has number −1 and the rows themselves.
struct Item {
    int expert, first, count;
};

// What `route` leaves: fwd.kernels.expert_kernels.Workspace says where.
struct Table {
    const int* memory;
    int visits;  // of all rows

    FWD_INLINE int items() const { return memory[0]; }
    FWD_INLINE Item item(int index) const {
        uint4 found = load_global(memory + 4 + 4 * index);
        return {int(found.x), int(found.y), int(found.z)};
    }
    FWD_INLINE int visit(int position) const { return memory[4 + 4 * visits + position]; }
    FWD_INLINE int row(int position) const { return memory[4 + 5 * visits + position]; }
    FWD_INLINE int position(int visit) const { return memory[4 + 6 * visits + visit]; }
    FWD_INLINE int item_of(int visit) const { return memory[4 + 7 * visits + visit]; }
};

// Matrices of one shape, one after the other, and the rows they are multiplied with. A tile is two groups of 8 outputs:
// `stride`·tile and `apart` behind it.
template <class Format>
struct Stack {
    const unsigned char* data;
    const float* factors;
    const float* bias;  // [matrices, outputs] or null
    const bf16* x;
    bool by_rows;  // x has a row for each row of the step, not for each visit
    int inputs, outputs, blocks, groups, pitch, stride, apart, tiles;

    FWD_INLINE Stack(gemv::Packed packed, const float* bias, const bf16* x, bool by_rows, int inputs, int outputs,
                     bool halves)
        : data(static_cast<const unsigned char*>(packed.data)),
          factors(packed.factors),
          bias(bias),
          x(x),
          by_rows(by_rows),
          inputs(inputs),
          outputs(outputs),
          blocks(gemv::blocks_of<Format>(inputs)),
          groups((outputs + kTile - 1) / kTile * 2),
          pitch(Format::pitch(inputs)),
          stride(halves ? 1 : 2),
          apart(halves ? outputs / 16 : 1),
          tiles(halves ? outputs / 16 : groups / 2) {}
    FWD_INLINE int group(int tile, int which) const { return tile * stride + which * apart; }
    FWD_INLINE int pairs() const { return (tiles + 1) / 2; }
    FWD_INLINE int output(int tile, int m) const { return group(tile, m / 8) * 8 + m % 8; }
};

struct Unit {
    int tile, begin, end;  // of a team: every other item from begin on
};

// kWhole: a unit is a tile and all items of the union; else two tiles and one. Those of the shared expert come first.
template <class Format, int kColumns, bool kWhole>
struct Work {
    static constexpr int kRows = 8 * kColumns;
    static constexpr bool kAll = kWhole;
    Stack<Format> routed, shared;
    Table table;
    int rows, shared_items, items, units;
    uint32_t inverse, shared_inverse;  // of pairs of tiles, times 2^32: exact while units · pairs are fewer than that

    FWD_INLINE Work(const Stack<Format>& routed, const Stack<Format>& shared, Table table, int rows)
        : routed(routed), shared(shared), table(table), rows(rows) {
        inverse = 0xFFFFFFFFu / max(routed.pairs(), 1) + 1, shared_inverse = 0xFFFFFFFFu / max(shared.pairs(), 1) + 1;
        shared_items = shared.data ? (rows + kRows - 1) / kRows : 0;
        count(0);
    }
    // Behind the wait: the table is another kernel's. Before it there is only the shared expert.
    FWD_INLINE void open() { count(routed.data ? table.items() : 0); }
    FWD_INLINE void count(int found) {
        items = shared_items + found;
        units = kWhole ? routed.tiles : shared_items * shared.pairs() + found * routed.pairs();
    }
    FWD_INLINE Unit unit(int index) const {
        if (kWhole) return {index, team_index(), items};
        int before = shared_items * shared.pairs(), rest = index - before;
        bool first = rest < 0;
        int pairs = first ? shared.pairs() : routed.pairs(), place = first ? index : rest;
        int item = pairs == 1 ? place : __umulhi(place, first ? shared_inverse : inverse);  // place / pairs
        int tile = 2 * (place - item * pairs) + team_index(), begin = (first ? 0 : shared_items) + item;
        return {tile, begin, begin + (tile < (first ? shared.tiles : routed.tiles))};
    }
    FWD_INLINE Item item(int index) const {
        if (index >= shared_items) return table.item(index - shared_items);
        return {-1, index * kRows, min(kRows, rows - index * kRows)};
    }
    FWD_INLINE Stack<Format> stack(bool is_shared) const {  // field by field: no register has an address
        Stack<Format> found = routed;
        if (is_shared) found = shared;
        return found;
    }
    FWD_INLINE int blocks(int index) const { return index < shared_items ? shared.blocks : routed.blocks; }
    // Where the sums of an item stand in the parts of a warp.
    FWD_INLINE int base(const Item& item) const {
        return kWhole ? item.first + (item.expert < 0 || shared_items == 0 ? 0 : rows) : team_index() * kRows;
    }
};

}  // namespace fwd::experts
