// From what attention summed of latents to values: the pieces of a row are summed in their order, and each head's sum
// goes through its part of `up_value`.
//
// A block has 128 values of one head for up to 8 rows, each of its warps 16, with all their weights in registers before
// it waits; rows are the columns of the products, so a row's bits do not depend on those beside it.
#include "latent_items.cuh"

namespace fwd::latent {

constexpr int kBlocks = kLatent / 32;        // 32 numbers of latents: two k16 steps
constexpr int kPitch = kLatent * 2 | 64;     // bytes from a row's latents to the next: half a cycle of banks
constexpr int kValues = 16 * kWarps;         // of a block
constexpr int kColumn = 8;

struct Up {
    bf16* out;          // [rows][heads · value]
    const bf16* sums;   // as latent_attention.cu leaves them
    const float* marks;
    const bf16* up_value;  // [heads][value][latent]
    const int64_t *positions, *sequences;
    int rows, at_once, heads, latent, value;

    FWD_INLINE int parts() const { return (value + kValues - 1) / kValues; }
    FWD_INLINE int head() const { return blockIdx.x / parts(); }
    FWD_INLINE int first() const { return blockIdx.x % parts() * kValues + threadIdx.x / 32 * 16; }  // of this warp
    FWD_INLINE int row() const { return blockIdx.y * at_once; }
    FWD_INLINE int count() const { return min(at_once, rows - row()); }
    FWD_INLINE int64_t piece(int row) const { return (int64_t{row} * heads + head()) * kPieces; }
    FWD_INLINE int pieces(int row) const {
        return sequences[row] < 0 ? 0 : Pieces::count(static_cast<int>(positions[row]) + 1);
    }

    // The share of each piece in a row, by a warp.
    FWD_INLINE void share(int row, float* shares) const {
        const float* mark = marks + piece(row) * 2;
        int lane = threadIdx.x % 32, count = pieces(row);
        float peak = NOTHING, total = 0.0f;
        for (int i = lane; i < count; i += 32) peak = fmaxf(peak, mark[2 * i]);
        peak = finite_peak(warp_max(peak));
        for (int i = lane; i < count; i += 32) total += mark[2 * i + 1] * exp2_approx(mark[2 * i] - peak);
        float part = inverse(warp_sum(total));
        for (int i = lane; i < count; i += 32) shares[i] = exp2_approx(mark[2 * i] - peak) * part;
    }
    // Four numbers of a row's latent, to bf16 at `to`.
    FWD_INLINE void combine(int row, int number, const float* shares, unsigned char* to) const {
        float sum[4] = {};
        const bf16* from = sums + piece(row) * latent + number;
        int count = number < latent ? pieces(row) : 0;
#pragma unroll 8
        for (int i = 0; i < count; ++i) {
            uint2 four = *reinterpret_cast<const uint2*>(from + i * latent);
            float part = shares[i];
            sum[0] = fmaf(low_bf16(four.x), part, sum[0]), sum[1] = fmaf(high_bf16(four.x), part, sum[1]);
            sum[2] = fmaf(low_bf16(four.y), part, sum[2]), sum[3] = fmaf(high_bf16(four.y), part, sum[3]);
        }
        *reinterpret_cast<uint2*>(to + number * 2) = make_uint2(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]));
    }

    FWD_INLINE void run(unsigned char* shared) const {
        grid_dependency_trigger();
        uint4 weights[kBlocks][2];
        load(weights);
        grid_dependency_wait();
        float* shares = reinterpret_cast<float*>(shared + kColumn * kPitch);
        for (int i = threadIdx.x / 32; i < count(); i += kWarps) share(row() + i, shares + i * kPieces);
        block_barrier();
        for (int i = threadIdx.x; i < count() * (kLatent / 4); i += kThreads) {
            int mine = i / (kLatent / 4), number = i % (kLatent / 4) * 4;
            combine(row() + mine, number, shares + mine * kPieces, shared + mine * kPitch);
        }
        block_barrier();
        multiply(weights, shared);
    }
    // What is past the last value, or the last number, is not used, or zero.
    FWD_INLINE void load(uint4 (&weights)[kBlocks][2]) const {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int mine = min(first() + half * 8 + lane / 4, value - 1);
            const bf16* from = up_value + (int64_t{head()} * value + mine) * latent;
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                int number = block * 32 + lane % 4 * 8;
                weights[block][half] = number < latent ? load_stream(from + number) : make_uint4(0, 0, 0, 0);
            }
        }
    }
    // Eight numbers of a lane are two steps of 16, in the same order of weights and rows.
    FWD_INLINE void multiply(const uint4 (&weights)[kBlocks][2], const unsigned char* mixed) const {
        int lane = threadIdx.x % 32;
        const unsigned char* x = mixed + min(lane / 4, count() - 1) * kPitch + lane % 4 * 16;
        float sum[4] = {};
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
            const uint4 &low = weights[block][0], &high = weights[block][1];
            uint4 two = load_shared(x + block * 64);
            mma_m16n8k16_bf16(sum, {low.x, high.x, low.y, high.y}, {two.x, two.y});
            mma_m16n8k16_bf16(sum, {low.z, high.z, low.w, high.w}, {two.z, two.w});
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int mine = first() + i / 2 * 8 + lane / 4, column = lane % 4 * 2 + i % 2;
            if (mine >= value || column >= count()) continue;
            out[(int64_t{row() + column} * heads + head()) * value + mine] = to_bf16(sum[i]);
        }
    }
};

}  // namespace fwd::latent

// Blocks: parts of 128 values of each head × parts of `at_once` rows. A row without a sequence gives zeros.
extern "C" __global__ void __launch_bounds__(256, 1)
    latent_value(fwd::bf16* out, const fwd::bf16* sums, const float* marks, const fwd::bf16* up_value,
                 const int64_t* positions, const int64_t* sequences, int rows, int at_once, int heads, int latent,
                 int value) {
    FWD_SHARED(shared);
    fwd::latent::Up{out, sums, marks, up_value, positions, sequences, rows, at_once, heads, latent, value}.run(shared);
}
