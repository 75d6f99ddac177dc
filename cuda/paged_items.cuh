// The items of a decode step, and how their keys and values come to shared memory: see paged_attention.cu.
#pragma once

#include "attention.cuh"

namespace fwd {

constexpr int THREADS = 128, WARPS = 4, HEADS = 16;  // HEADS: of a group, at most
constexpr int KEYS = 16, ROUND = WARPS * KEYS;  // of a warp's tile, of the block's
constexpr int MAX_PIECES = 256, SPREAD = 32, SHORT = 256, GRAIN = 64;

// `fwd.kernels.paged_attention.piece_length` is the same.
FWD_INLINE int piece_length(int length) {
    int spread = (length + SPREAD * GRAIN - 1) / (SPREAD * GRAIN) * GRAIN;
    if (spread <= SHORT) return spread > 0 ? spread : GRAIN;
    int fewest = (length + MAX_PIECES * GRAIN - 1) / (MAX_PIECES * GRAIN) * GRAIN;
    return fewest > SHORT ? fewest : SHORT;
}

template <typename T>
struct Call {
    bf16* out;
    const bf16* q;
    const T* keys;
    const T* values;
    const float* key_scales;
    const float* value_scales;
    const float* sinks;
    const int64_t* positions;
    const int64_t* sequences;
    const int64_t* parents;
    const int64_t* slots;
    const int* tables;
    float* sums;  // [rows, heads, MAX_PIECES, head_dim]
    float* marks;  // [rows, heads, MAX_PIECES, 2]: maximum and total
    int* arrivals;  // [rows, kv_heads]
    int rows, group, kv_heads, max_pages, page_size, window;  // group: query heads of a kv head
    float scale;  // of scores, to base 2

    FWD_INLINE int64_t vector(int row, int head) const { return row * (kv_heads * group) + head; }  // of q, of out
    FWD_INLINE int64_t piece(int row, int head, int piece) const { return vector(row, head) * MAX_PIECES + piece; }
    FWD_INLINE int length(int row) const {  // of what the row sees; 0: padding
        if (sequences[row] < 0) return 0;
        int position = static_cast<int>(positions[row]);
        return position + 1 - first_seen(position, window);
    }
};

// What a tile belongs to, kept beside it until it is used.
struct Tag {
    int row, head, piece, pieces;  // row −1: there are no more items
    int begin, stop;  // positions of the warp's first key and behind the item's last
    int first, last;  // of the item
};

template <typename T, int kDim>
struct Shape {
    static constexpr int kSlots = kDim == 64 ? 4 : 3;
    static constexpr int kValues = KEYS * Tile<T, kDim>::kRow;  // bytes of the keys, behind which the values are
    static constexpr int kScales = 2 * kValues;  // of fp8: the scales of keys and values
    static constexpr int kSlot = 64 * kDim;  // bytes of a warp: two bf16 tiles, or its sum [kDim / 8][32][4] in float
    static constexpr int kTags = kSlots * WARPS * kSlot;
    static constexpr int kMarks = kTags + kSlots * WARPS * sizeof(Tag);  // float [WARPS][HEADS][2]
};

// The order of items: pieces; of each the kv heads; of each the rows that have so many pieces, which share keys in L2.
struct Items {
    int pieces;  // of row `lane`
    int from, to, first;  // pieces of the level, number of its first item
    unsigned alive;  // rows with pieces from … to − 1

    FWD_INLINE void level(int begin) {
        alive = ballot(pieces > begin);
        int least = pieces > begin ? pieces : MAX_PIECES;
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) {
            int other = shuffle_xor(least, mask);
            least = other < least ? other : least;
        }
        from = begin, to = least;
    }
    // The row, kv head and piece of an item; numbers only grow.
    FWD_INLINE void find(Tag& tag, int item, int kv_heads) {
        int width = __popc(alive) * kv_heads;
        while (alive && item - first >= (to - from) * width) {
            first += (to - from) * width;
            level(to);
            width = __popc(alive) * kv_heads;
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

// Brings the tiles of a warp to shared memory, one after the other, item after item.
template <typename T, int kDim>
struct Loader {
    using S = Shape<T, kDim>;
    const Call<T>& call;
    Items items;
    Tag tag;
    int item, lane, warp;
    int last;  // the row's position
    const int* line;  // of the block table, the row's
    int cell;  // of key `lane` % 16 of the next tile; −1: none

    FWD_INLINE Loader(const Call<T>& c) : call(c), item(blockIdx.x), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
        int length = lane < call.rows ? call.length(lane) : 0;
        int piece = piece_length(length);
        items.pieces = lane >= call.rows ? 0 : length ? (length + piece - 1) / piece : 1;
        items.first = 0;
        items.level(0);
        open();
    }
    FWD_INLINE void open() {
        items.find(tag, item, call.kv_heads);
        if (tag.row < 0) return;
        int length = call.length(tag.row), piece = piece_length(length);
        last = static_cast<int>(call.positions[tag.row]);
        line = call.tables + call.sequences[tag.row] * call.max_pages;
        int start = first_seen(last, call.window);
        tag.begin = start + tag.piece * piece;
        tag.stop = start + (tag.piece + 1 < tag.pieces ? (tag.piece + 1) * piece : length);
        tag.first = 1;
        look();
    }
    FWD_INLINE void look() {
        tag.last = tag.begin + ROUND >= tag.stop;
        int position = tag.begin + warp * KEYS + lane % KEYS;
        cell = position < tag.stop ? find(position) : -1;
    }
    // The cell in which the row finds a position: drafts on its branch stand in their own slots.
    FWD_INLINE int find(int position) const {
        int draft = tag.row, at = last;
        int64_t parent = call.parents[draft];
        for (; parent >= 0 && at > position; --at) draft = static_cast<int>(parent), parent = call.parents[draft];
        return parent < 0 ? paged_cell(line, call.page_size, position) : static_cast<int>(call.slots[draft]);
    }
    FWD_INLINE void advance() {
        tag.first = 0, tag.begin += ROUND;
        if (!tag.last) return look();
        item += gridDim.x;
        open();
    }
    FWD_INLINE void load(unsigned char* shared, int slot) {
        if (lane == 0) reinterpret_cast<Tag*>(shared + S::kTags)[slot * WARPS + warp] = tag;
        if (tag.row >= 0) {
            copy(shared + (slot * WARPS + warp) * S::kSlot);
            advance();
        }
        cp_async_commit();
    }
    FWD_INLINE void copy(unsigned char* to) {
        constexpr int kChunks = Tile<T, kDim>::kChunks;
        int chunk = lane % kChunks;
#pragma unroll 4
        for (int pass = 0; pass < KEYS * kChunks / 32; ++pass) {
            int key = (pass * 32 + lane) / kChunks, from = shuffle(cell, key);
            int64_t vector = static_cast<int64_t>(from < 0 ? 0 : from) * call.kv_heads + tag.head;
            int64_t offset = vector * kDim + chunk * Tile<T, kDim>::kPer;
            int place = Tile<T, kDim>::place(key, chunk);
            cp_async_16_zfill(to + place, call.keys + offset, from >= 0);
            cp_async_16_zfill(to + S::kValues + place, call.values + offset, from >= 0);
        }
        if (sizeof(T) == 1) copy_scale(reinterpret_cast<float*>(to + S::kScales) + lane);
    }
    FWD_INLINE void copy_scale(float* to) {
        const float* scales = lane < KEYS ? call.key_scales : call.value_scales;
        int64_t vector = static_cast<int64_t>(cell < 0 ? 0 : cell) * call.kv_heads + tag.head;
        cp_async_4_zfill(to, scales + vector, cell >= 0);
    }
};

}  // namespace fwd
