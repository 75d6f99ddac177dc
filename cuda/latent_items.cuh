// How cells of a decode step over latents come to shared memory, tile by tile: see latent_attention.cu.
#pragma once

#include "items.cuh"
#include "latent.cuh"

namespace fwd::latent {

constexpr int kThreads = 256, kWarps = 8;
constexpr int kKeys = 64;                         // cells of a tile
constexpr int kLatent = 512, kRope = 64;          // numbers of a cell at most; what a model has less are zeros
constexpr int kRow = 2 * (kLatent + kRope);       // bytes of a cell in bf16
constexpr int kPieces = 128;
using Pieces = Cut<kPieces, 64>;

template <typename T>
struct Call : Places {
    bf16* sums;    // [rows][heads][kPieces][latent]
    float* marks;  // [rows][heads][kPieces][2]: maximum and total
    const bf16* q;  // [rows][heads][latent + rope], of latents
    const T* latents;
    const bf16* keys;
    const float* scales;  // of fp8
    int heads, latent, rope;
    float scale;  // of scores, to base 2

    FWD_INLINE int64_t piece(const Tag& tag, int head) const {
        return (int64_t{tag.row} * heads + head) * kPieces + tag.piece;
    }
};

// Cells in bf16, the latent's 64 chunks of 16 bytes and the key's 8, which change places by cell: the same chunk of
// eight cells (a row of ldmatrix each) always falls on different banks.
FWD_INLINE int place(int key, int chunk) { return key * kRow + ((chunk ^ (key & 7)) << 4); }

// What lies in shared memory: two stages of tiles as they are stored (of fp8 also one in bf16), scores of the four
// parts of a cell's numbers, weights, and what heads' sums fade by. kM: sixteens of heads.
template <typename T, int kM>
struct Shape {
    static constexpr bool kFp8 = sizeof(T) == 1;
    static constexpr int kKeysAt = kKeys * kLatent, kScalesAt = kKeysAt + kKeys * kRope * 2;  // of a stage in fp8
    static constexpr int kStage = kFp8 ? kScalesAt + kKeys * 16 : kKeys * kRow;
    static constexpr int kTile = 2 * kStage;
    static constexpr int kHeads = 16 * kM;
    static constexpr int kPitch = 72;  // numbers from a head's scores, or weights, to the next one's: no bank in common
    static constexpr int kScores = kTile + (kFp8 ? kKeys * kRow : 0);
    static constexpr int kWeights = kScores + 4 * kHeads * kPitch * 4;
    static constexpr int kFades = kWeights + kHeads * kPitch * 2;
};

// Brings tiles to shared memory one after the other, item after item; a warp eight cells of each.
template <typename T, int kM>
struct Loader : Walk<Pieces, kWarps, kKeys / kWarps> {
    using S = Shape<T, kM>;
    const Call<T>& call;
    Tag loaded;  // of the tile that was asked for last

    FWD_INLINE Loader(const Call<T>& c) : Walk(c, (c.heads + S::kHeads - 1) / S::kHeads, 0), call(c) {}
    FWD_INLINE void load(unsigned char* stage) {
        loaded = tag;
        if (tag.row >= 0) {
            copy(stage);
            advance();
        }
        cp_async_commit();
    }

    // Chunk `chunk` of a vector of `width` numbers, or zeros.
    template <typename Number>
    FWD_INLINE void copy_chunk(unsigned char* to, const Number* vectors, int width, int from, int chunk) const {
        constexpr int kPer = 16 / sizeof(Number);
        bool valid = from >= 0 && chunk * kPer < width;
        cp_async_16_zfill(to, vectors + (valid ? int64_t{from} * width + chunk * kPer : 0), valid);
    }
    FWD_INLINE void copy(unsigned char* stage) const {
        constexpr int kChunks = kLatent * sizeof(T) / 16, kKeyChunks = kRope * 2 / 16;
#pragma unroll 4
        for (int pass = 0; pass < 8 * kChunks / 32; ++pass) {
            int index = pass * 32 + lane, key = index / kChunks, chunk = index % kChunks, from = shuffle(cell, key);
            int at = S::kFp8 ? (warp * 8 + key) * kLatent + chunk * 16 : place(warp * 8 + key, chunk);
            copy_chunk(stage + at, call.latents, call.latent, from, chunk);
        }
#pragma unroll
        for (int pass = 0; pass < 8 * kKeyChunks / 32; ++pass) {
            int index = pass * 32 + lane, key = index / kKeyChunks, chunk = index % kKeyChunks;
            int from = shuffle(cell, key);
            int at = S::kFp8 ? S::kKeysAt + ((warp * 8 + key) * kKeyChunks + chunk) * 16
                             : place(warp * 8 + key, kLatent / 8 + chunk);
            copy_chunk(stage + at, call.keys, call.rope, from, chunk);
        }
        if constexpr (S::kFp8) {
            int from = shuffle(cell, lane / 4), blocks = (call.latent + 127) / 128, block = lane % 4;
            bool valid = from >= 0 && block < blocks;
            cp_async_4_zfill(stage + S::kScalesAt + (warp * 32 + lane) * 4,
                             call.scales + (valid ? int64_t{from} * blocks + block : 0), valid);
        }
    }
};

// A tile in bf16, rounded as it is read: the stage itself, or what an fp8 one says.
template <typename T, int kM>
FWD_INLINE const unsigned char* in_bf16(const unsigned char* stage, unsigned char* tile) {
    using S = Shape<T, kM>;
    if constexpr (!S::kFp8) return stage;
    const float* scales = reinterpret_cast<const float*>(stage + S::kScalesAt);
#pragma unroll 4
    for (int index = threadIdx.x; index < kKeys * kLatent / 16; index += kThreads) {
        int key = index / (kLatent / 16), chunk = index % (kLatent / 16);
        uint4 numbers = load_shared(stage + index * 16), low, high;
        float scale = scales[key * 4 + chunk / 8];
        auto two = [scale](uint32_t word) {
            float2 wide = widen(word);
            return pack_bf16(wide.x * scale, wide.y * scale);
        };
        low = make_uint4(two(numbers.x), two(numbers.x >> 16), two(numbers.y), two(numbers.y >> 16));
        high = make_uint4(two(numbers.z), two(numbers.z >> 16), two(numbers.w), two(numbers.w >> 16));
        store_shared(tile + place(key, 2 * chunk), low);
        store_shared(tile + place(key, 2 * chunk + 1), high);
    }
    for (int index = threadIdx.x; index < kKeys * kRope / 8; index += kThreads) {
        uint4 numbers = load_shared(stage + S::kKeysAt + index * 16);
        store_shared(tile + place(index / (kRope / 8), kLatent / 8 + index % (kRope / 8)), numbers);
    }
    block_barrier();
    return tile;
}

}  // namespace fwd::latent
