// The items of a decode step: how contexts are cut in pieces, and a block's way through them, tile by tile.
#pragma once

#include "attention.cuh"

namespace fwd {

// Where rows are, and where what they see is kept.
struct Places {
    const int64_t* positions;
    const int64_t* sequences;  // −1: padding
    const int64_t* parents;
    const int64_t* slots;
    const int* tables;
    int rows, max_pages, page_size, window;

    FWD_INLINE int length(int row) const {  // of what the row sees; 0: padding
        if (sequences[row] < 0) return 0;
        int position = static_cast<int>(positions[row]);
        return position + 1 - first_seen(position, window);
    }
};

// A context of some keys in pieces of as many; `piece_length` of the wrappers is the same.
template <int kMost, int kSpread>
struct Cut {
    static constexpr int kShort = 256, kGrain = 64;

    static FWD_INLINE int length(int keys) {
        int spread = (keys + kSpread * kGrain - 1) / (kSpread * kGrain) * kGrain;
        if (spread <= kShort) return spread > 0 ? spread : kGrain;
        int fewest = (keys + kMost * kGrain - 1) / (kMost * kGrain) * kGrain;
        return fewest > kShort ? fewest : kShort;
    }
    static FWD_INLINE int count(int keys) { return (keys + length(keys) - 1) / length(keys); }
};

// What a tile belongs to, kept beside it until it is used.
struct Tag {
    int row, head, piece, pieces;  // row −1: there are no more items
    int begin, stop;  // positions of the block's first key and behind the item's last
    int first, last;  // of the item
};

// The order of items: pieces; of each the heads; of each the rows that have so many pieces, which share keys in L2.
struct Items {
    int pieces;  // of row `lane`
    int from, to, first;  // pieces of the level, number of its first item
    unsigned alive;  // rows with pieces from … to − 1

    FWD_INLINE void level(int begin) {
        alive = ballot(pieces > begin);
        int least = pieces > begin ? pieces : 0x7FFFFFFF;
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) {
            int other = shuffle_xor(least, mask);
            least = other < least ? other : least;
        }
        from = begin, to = least;
    }
    // The row, head and piece of an item; numbers only grow.
    FWD_INLINE void find(Tag& tag, int item, int heads) {
        int width = __popc(alive) * heads;
        while (alive && item - first >= (to - from) * width) {
            first += (to - from) * width;
            level(to);
            width = __popc(alive) * heads;
        }
        tag.row = -1;
        if (!alive) return;
        int place = item - first, each = __popc(alive);
        tag.piece = from + place / width;
        tag.head = place % width / each;
        unsigned left = alive;
        for (int skip = place % each; skip > 0; --skip) left &= left - 1;
        tag.row = __ffs(left) - 1;
        tag.pieces = shuffle(pieces, tag.row);
    }
};

// The tile that comes next, of which each warp has kKeys cells; blocks stride over the items.
template <class Pieces, int kWarps, int kKeys>
struct Walk {
    const Places& places;
    Items items;
    Tag tag;
    int item, heads, lane, warp;
    int last;  // the row's position
    const int* line;  // of the block table, the row's
    int cell;  // of key `lane` % kKeys of this warp's; −1: none

    // `heads`: items of a piece of a row. `padding`: pieces of a row that sees nothing.
    FWD_INLINE Walk(const Places& p, int heads, int padding)
        : places(p), item(blockIdx.x), heads(heads), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
        int length = lane < p.rows ? p.length(lane) : 0;
        items.pieces = length > 0 ? Pieces::count(length) : lane < p.rows ? padding : 0;
        items.first = 0;
        items.level(0);
        open();
    }
    FWD_INLINE void open() {
        items.find(tag, item, heads);
        if (tag.row < 0) return;
        int length = places.length(tag.row), piece = Pieces::length(length);
        last = static_cast<int>(places.positions[tag.row]);
        line = places.tables + places.sequences[tag.row] * places.max_pages;
        int start = first_seen(last, places.window);
        tag.begin = start + tag.piece * piece;
        tag.stop = min(tag.begin + piece, start + length);
        tag.first = 1;
        look();
    }
    FWD_INLINE void look() {
        tag.last = tag.begin + kWarps * kKeys >= tag.stop;
        int position = tag.begin + warp * kKeys + lane % kKeys;
        cell = position < tag.stop ? find(position) : -1;
    }
    // The cell in which the row finds a position: drafts on its branch stand in their own slots.
    FWD_INLINE int find(int position) const {
        int draft = tag.row, at = last;
        int64_t parent = places.parents[draft];
        for (; parent >= 0 && at > position; --at) draft = static_cast<int>(parent), parent = places.parents[draft];
        return parent < 0 ? paged_cell(line, places.page_size, position) : static_cast<int>(places.slots[draft]);
    }
    FWD_INLINE void advance() {
        tag.first = 0, tag.begin += kWarps * kKeys;
        if (!tag.last) return look();
        item += gridDim.x;
        open();
    }
};

}  // namespace fwd
