// Attention of decode rows over a paged cache of latents (MLA, DeepSeek-V2 2024), absorbed: all heads read the same.
//
// An item is one piece of one row for up to 32 heads, which are the rows of the products. Blocks stride over the items
// as in paged_attention.cu. Of 64 cells each of the eight warps scores a half, by a quarter of their numbers, whose
// query it holds in registers; the quarters meet in shared memory in their order, where the block keeps one softmax.
// Then each warp sums 64 numbers of the latents. Pieces are summed by latent_value.cu, in their order. Nothing that a
// row's bits come from depends on other rows or the grid.
#include "latent_items.cuh"

namespace fwd::latent {

constexpr int kSteps = (kLatent + kRope) / 4 / 16;  // k16 steps of a quarter of a cell's numbers

FWD_INLINE int lane_of() { return threadIdx.x % 32; }
FWD_INLINE int warp_of() { return threadIdx.x / 32; }

// The A fragments of this warp's quarter of the queries.
template <int kM>
struct Query {
    uint32_t held[kM][kSteps][4];

    template <typename T>
    FWD_INLINE void open(const Call<T>& call, const Tag& tag) {
        int depth = warp_of() % 4 * (kSteps * 16) + lane_of() % 4 * 2;
#pragma unroll
        for (int g = 0; g < kM; ++g)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int head = (tag.head * kM + g) * 16 + half * 8 + lane_of() / 4;
                bool there = head < call.heads;
                int64_t vector = int64_t{tag.row} * call.heads + (there ? head : 0);
                const bf16* q = call.q + vector * (call.latent + call.rope);
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    held[g][step][half] = there ? two_of(call, q, depth + step * 16) : 0;
                    held[g][step][half + 2] = there ? two_of(call, q, depth + step * 16 + 8) : 0;
                }
            }
    }
    template <typename T>
    FWD_INLINE static uint32_t two_of(const Call<T>& call, const bf16* q, int depth) {
        bool rotated = depth >= kLatent;
        int place = rotated ? depth - kLatent : depth;
        if (place >= (rotated ? call.rope : call.latent)) return 0;
        return *reinterpret_cast<const uint32_t*>(q + place + (rotated ? call.latent : 0));
    }
};

// This warp's quarter of the scores of its half of a tile, to `parts` [4][heads][pitch].
template <typename T, int kM>
FWD_INLINE void score(const Query<kM>& query, const unsigned char* tile, float* parts) {
    using S = Shape<T, kM>;
    int lane = lane_of(), quarter = warp_of() % 4, half = warp_of() / 4 * 32;
#pragma unroll 1  // 32 keys at once take more registers than there are on sm_100a
    for (int first = half; first < half + 32; first += 16) {
        float sums[kM][2][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            int key = first + lane / 16 * 8 + lane % 8, chunk = (quarter * kSteps + step) * 2 + lane / 8 % 2;
            uint32_t r[4];
            ldmatrix_x4(r, tile + place(key, chunk));
#pragma unroll
            for (int g = 0; g < kM; ++g) {
                mma_m16n8k16_bf16(sums[g][0], query.held[g][step], {r[0], r[1]});
                mma_m16n8k16_bf16(sums[g][1], query.held[g][step], {r[2], r[3]});
            }
        }
#pragma unroll
        for (int g = 0; g < kM; ++g)
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                int head = quarter * S::kHeads + g * 16 + lane / 4;
                float* to = parts + head * S::kPitch + first + t * 8 + lane % 4 * 2;
                *reinterpret_cast<float2*>(to) = make_float2(sums[g][t][0], sums[g][t][1]);
                *reinterpret_cast<float2*>(to + 8 * S::kPitch) = make_float2(sums[g][t][2], sums[g][t][3]);
            }
    }
}

// The softmax of a head: 16 / kM neighbouring lanes have its maximum and each a share of its total.
template <typename T, int kM>
struct Softmax {
    using S = Shape<T, kM>;
    static constexpr int kLanes = 16 / kM;
    float peak, total;

    FWD_INLINE static int head() { return threadIdx.x / kLanes; }
    FWD_INLINE static int key(int i) { return (i * kLanes + threadIdx.x % kLanes) * 4; }
    FWD_INLINE void open() { peak = NOTHING, total = 0.0f; }

    // Weights of the first `seen` cells of a tile, as they are summed; and what was summed before fades by.
    FWD_INLINE void weigh(const float* parts, unsigned char* shared, int seen, float scale) {
        float scores[kM][4], top = peak;
#pragma unroll
        for (int i = 0; i < kM; ++i) {
            gather(scores[i], parts + head() * S::kPitch + key(i));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                scores[i][j] = key(i) + j < seen ? scores[i][j] * scale : NOTHING;
                top = fmaxf(top, scores[i][j]);
            }
        }
#pragma unroll
        for (int mask = kLanes / 2; mask > 0; mask /= 2) top = fmaxf(top, shuffle_xor(top, mask));
        float base = finite_peak(top), fade = exp2_approx(peak - base);
        peak = top, total *= fade;
        bf16* weights = reinterpret_cast<bf16*>(shared + S::kWeights) + head() * S::kPitch;
#pragma unroll
        for (int i = 0; i < kM; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) scores[i][j] = exp2_approx(scores[i][j] - base), total += scores[i][j];
            uint2 four = make_uint2(pack_bf16(scores[i][0], scores[i][1]), pack_bf16(scores[i][2], scores[i][3]));
            *reinterpret_cast<uint2*>(weights + key(i)) = four;
        }
        if (threadIdx.x % kLanes == 0) reinterpret_cast<float*>(shared + S::kFades)[head()] = fade;
    }
    FWD_INLINE static void gather(float (&sum)[4], const float* parts) {
        sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            float4 part = *reinterpret_cast<const float4*>(parts + quarter * S::kHeads * S::kPitch);
            sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
        }
    }
    FWD_INLINE void put(const Call<T>& call, const Tag& tag) {
#pragma unroll
        for (int mask = kLanes / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
        int mine = tag.head * S::kHeads + head();
        if (threadIdx.x % kLanes != 0 || mine >= call.heads) return;
        float* mark = call.marks + call.piece(tag, mine) * 2;
        mark[0] = peak, mark[1] = total;
    }
};

// The weighted sum of 64 numbers of the latents: of heads lane / 4 and lane / 4 + 8 of each sixteen.
template <typename T, int kM>
struct Sum {
    using S = Shape<T, kM>;
    float sum[kM][8][4];

    FWD_INLINE void open() {
#pragma unroll
        for (int g = 0; g < kM; ++g)
#pragma unroll
            for (int t = 0; t < 8; ++t) sum[g][t][0] = sum[g][t][1] = sum[g][t][2] = sum[g][t][3] = 0.0f;
    }
    FWD_INLINE void fade(const float* fades) {
#pragma unroll
        for (int g = 0; g < kM; ++g) {
            float upper = fades[g * 16 + lane_of() / 4], lower = fades[g * 16 + 8 + lane_of() / 4];
            if (upper == 1.0f && lower == 1.0f) continue;  // most tiles of a long context
#pragma unroll
            for (int t = 0; t < 8; ++t) {
                sum[g][t][0] *= upper, sum[g][t][1] *= upper;
                sum[g][t][2] *= lower, sum[g][t][3] *= lower;
            }
        }
    }
    FWD_INLINE void add(const unsigned char* weights, const unsigned char* tile, int seen) {
        int lane = lane_of();
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step) {
            if (step * 16 >= seen) break;
            uint32_t p[kM][4], r[4];
#pragma unroll
            for (int g = 0; g < kM; ++g)
                ldmatrix_x4(p[g], weights + (g * 16 + lane % 16) * (S::kPitch * 2) + step * 32 + lane / 16 * 16);
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                ldmatrix_x4_trans(r, tile + place(step * 16 + lane % 16, warp_of() * 8 + 2 * t + lane / 16));
#pragma unroll
                for (int g = 0; g < kM; ++g) {
                    mma_m16n8k16_bf16(sum[g][2 * t], p[g], {r[0], r[1]});
                    mma_m16n8k16_bf16(sum[g][2 * t + 1], p[g], {r[2], r[3]});
                }
            }
        }
    }
    FWD_INLINE void put(const Call<T>& call, const Tag& tag) const {
#pragma unroll
        for (int g = 0; g < kM; ++g)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int head = tag.head * S::kHeads + g * 16 + half * 8 + lane_of() / 4;
                if (head >= call.heads) continue;
                bf16* to = call.sums + call.piece(tag, head) * call.latent;
#pragma unroll
                for (int t = 0; t < 8; ++t) {
                    int number = warp_of() * 64 + t * 8 + lane_of() % 4 * 2;
                    if (number >= call.latent) break;
                    uint32_t two = pack_bf16(sum[g][t][half * 2], sum[g][t][half * 2 + 1]);
                    *reinterpret_cast<uint32_t*>(to + number) = two;
                }
            }
    }
};

template <typename T, int kM>
FWD_INLINE void attend(const Call<T>& call, unsigned char* shared) {
    using S = Shape<T, kM>;
    grid_dependency_trigger();
    grid_dependency_wait();
    Loader<T, kM> loader(call);
    Query<kM> query;
    Softmax<T, kM> softmax;
    Sum<T, kM> sum;
    float* parts = reinterpret_cast<float*>(shared + S::kScores);
    loader.load(shared);
    for (int stage = 0; loader.loaded.row >= 0; stage ^= 1) {
        Tag tag = loader.loaded;
        cp_async_wait<0>();
        block_barrier();  // the tile is there for all, and all have left the one that is replaced now
        loader.load(shared + (stage ^ 1) * S::kStage);
        const unsigned char* tile = in_bf16<T, kM>(shared + stage * S::kStage, shared + S::kTile);
        if (tag.first) query.open(call, tag), softmax.open(), sum.open();
        score<T, kM>(query, tile, parts);
        block_barrier();
        softmax.weigh(parts, shared, tag.stop - tag.begin, call.scale);
        block_barrier();
        sum.fade(reinterpret_cast<const float*>(shared + S::kFades));
        if (warp_of() * 64 < call.latent) sum.add(shared + S::kWeights, tile, tag.stop - tag.begin);
        if (tag.last) softmax.put(call, tag), sum.put(call, tag);
    }
}

}  // namespace fwd::latent

// At most 16 rows; `latents` and `keys` are [cells, …], of fp8 with `scales`. `next`: the weights of latent_value.
#define LATENT_ATTENTION(name, T, sixteens)                                                                          \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                             \
        name(fwd::bf16* sums, float* marks, const fwd::bf16* q, const T* latents, const fwd::bf16* keys,             \
             const float* scales, const int64_t* positions, const int64_t* sequences, const int64_t* parents,        \
             const int64_t* slots, const int* tables, const void* next, int rows, int heads, int latent, int rope,   \
             int max_pages, int page_size, int next_bytes, float scale) {                                            \
        FWD_SHARED(shared);                                                                                          \
        fwd::latent::prefetch_share(next, next_bytes);                                                               \
        fwd::Places places{positions, sequences, parents, slots, tables, rows, max_pages, page_size, 0};             \
        fwd::latent::attend<T, sixteens>({places, sums, marks, q, latents, keys, scales, heads, latent, rope,        \
                                          scale * fwd::LOG2_E},                                                      \
                                         shared);                                                                    \
    }
LATENT_ATTENTION(latent_attention_bf16_16, fwd::bf16, 1)
LATENT_ATTENTION(latent_attention_bf16_32, fwd::bf16, 2)
LATENT_ATTENTION(latent_attention_fp8_16, fwd::fp8, 1)
LATENT_ATTENTION(latent_attention_fp8_32, fwd::fp8, 2)
