// Attention of decode rows over a paged cache, the context split in pieces.
//
// An item is one piece of one row and kv head. Blocks stride over the items, which they find from the positions, so
// that the grid of a captured graph fits any context. Of 64 keys each of the four warps takes 16: it copies them to its
// own slots of shared memory, several tiles ahead and across items, and keeps its own softmax; the query heads of the
// group are the 16 rows of the products. At the end of an item the warps are summed in their order; the block that
// comes last at a row and kv head sums the pieces in theirs. Nothing that a row's bits come from depends on other rows
// or the grid.
#include "paged_items.cuh"

namespace fwd {

// The A fragments of the query heads of a group, dimensions in the order of `key_fragment`. Wide heads do not fit in
// registers beside their sum: they are read again for every tile.
template <typename T, int kDim>
struct Query {
    static constexpr bool kHeld = kDim <= 128;
    static constexpr int kPer = Tile<T, kDim>::kPer;
    uint32_t held[kHeld ? kDim / 16 : 1][4];
    const bf16* from;
    int group;

    FWD_INLINE void open(const Call<T>& call, const Tag& tag) {
        group = call.group;
        from = call.q + call.vector(tag.row, tag.head * call.group) * kDim;
        if constexpr (kHeld) {
#pragma unroll
            for (int pair = 0; pair < kDim / 32; ++pair) read(held[2 * pair], held[2 * pair + 1], pair);
        }
    }
    // Steps 2·pair and 2·pair + 1: 8 dimensions a lane.
    FWD_INLINE void read(uint32_t (&even)[4], uint32_t (&odd)[4], int pair) const {
        constexpr int kPairs = kPer / 8;  // of a chunk
        int lane = threadIdx.x % 32, head = lane / 4;
        int dim = (pair / kPairs * 4 + lane % 4) * kPer + pair % kPairs * 8;
        uint4 low = make_uint4(0, 0, 0, 0), high = low;
        if (head < group) low = load_global(from + head * kDim + dim);
        if (head + 8 < group) high = load_global(from + (head + 8) * kDim + dim);
        even[0] = low.x, even[1] = high.x, even[2] = low.y, even[3] = high.y;
        odd[0] = low.z, odd[1] = high.z, odd[2] = low.w, odd[3] = high.w;
    }
};

// The softmax of a warp over its keys of an item: of heads lane / 4 and lane / 4 + 8 their maximum, this lane's share
// of their total, and the weighted values.
template <typename T, int kDim>
struct Softmax {
    using S = Shape<T, kDim>;
    float peak[2], total[2], sum[kDim / 8][4];

    FWD_INLINE void open() {
        peak[0] = peak[1] = NOTHING, total[0] = total[1] = 0.0f;
#pragma unroll
        for (int t = 0; t < kDim / 8; ++t) sum[t][0] = sum[t][1] = sum[t][2] = sum[t][3] = 0.0f;
    }
    FWD_INLINE void add(const Query<T, kDim>& query, const unsigned char* slot, int seen, float scale) {
        float scores[2][4] = {};
        const float* scales = reinterpret_cast<const float*>(slot + S::kScales);
#pragma unroll Query<T, kDim>::kHeld ? kDim / 32 : Query<T, kDim>::kPer / 8
        for (int pair = 0; pair < kDim / 32; ++pair) score<Query<T, kDim>::kPer / 8>(scores, query, slot, scales, pair);
        uint32_t weights[4];
        weigh(scores, weights, seen, scale);
        add_values<kDim>(sum, weights, slot + S::kValues, threadIdx.x % 32, scales + KEYS, T());
    }
    template <int kPairs>
    FWD_INLINE void score(float (&scores)[2][4], const Query<T, kDim>& query, const unsigned char* slot,
                          const float* scales, int pair) {
        int lane = threadIdx.x % 32, chunk = pair / kPairs * 4 + lane % 4;
        uint32_t fresh[2][4];
        if constexpr (!Query<T, kDim>::kHeld) query.read(fresh[0], fresh[1], pair);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            int key = n * 8 + lane / 4;
            uint4 vector = load_shared(slot + Tile<T, kDim>::place(key, chunk));
            float scale = sizeof(T) == 1 ? scales[key] : 1.0f;
            uint32_t even[2], odd[2];
            if (pair % kPairs == 0) key_fragment<0>(even, vector, T(), scale), key_fragment<1>(odd, vector, T(), scale);
            else key_fragment<2>(even, vector, T(), scale), key_fragment<3>(odd, vector, T(), scale);
            if constexpr (Query<T, kDim>::kHeld) {
                mma_m16n8k16_bf16(scores[n], query.held[2 * pair], even);
                mma_m16n8k16_bf16(scores[n], query.held[2 * pair + 1], odd);
            } else {
                mma_m16n8k16_bf16(scores[n], fresh[0], even);
                mma_m16n8k16_bf16(scores[n], fresh[1], odd);
            }
        }
    }
    // The weights of the first `seen` keys as an A fragment; what was summed before is rescaled.
    FWD_INLINE void weigh(float (&scores)[2][4], uint32_t (&weights)[4], int seen, float scale) {
        int column = threadIdx.x % 4 * 2;
        float fade[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = NOTHING;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& score = scores[i / 2][half * 2 + i % 2];
                score = i / 2 * 8 + column + i % 2 < seen ? score * scale : NOTHING;
                top = fmaxf(top, score);
            }
            top = fmaxf(peak[half], quad_max(top));
            float base = finite_peak(top);
            fade[half] = exp2_approx(peak[half] - base);
            peak[half] = top, total[half] *= fade[half];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& score = scores[i / 2][half * 2 + i % 2];
                score = exp2_approx(score - base);
                total[half] += score;
            }
            weights[half] = pack_bf16(scores[0][half * 2], scores[0][half * 2 + 1]);
            weights[half + 2] = pack_bf16(scores[1][half * 2], scores[1][half * 2 + 1]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (fade[half] == 1.0f) continue;  // most tiles of a long context
#pragma unroll
            for (int t = 0; t < kDim / 8; ++t) sum[t][half * 2] *= fade[half], sum[t][half * 2 + 1] *= fade[half];
        }
    }
};

// What an item gives its row: to the output if the row has no other piece, else to those that are summed at last.
template <typename T, int kDim>
FWD_INLINE void give(const Call<T>& call, const Tag& tag, int head, int dim, float value, float total) {
    if (tag.pieces > 1) {
        call.sums[call.piece(tag.row, head, tag.piece) * kDim + dim] = value;
    } else {
        call.out[call.vector(tag.row, head) * kDim + dim] = to_bf16(value * inverse(total));
    }
}

// Sums the warps of an item in their order, whose sums lie in `dumps` and maxima and totals in `marks`.
template <typename T, int kDim>
FWD_INLINE void merge(const Call<T>& call, const Tag& tag, const unsigned char* dumps, const float* marks, int half) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = lane / 4 + half * 8;
    if (head >= call.group) return;
    float fades[WARPS], peak = NOTHING, total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) peak = fmaxf(peak, marks[(w * HEADS + head) * 2]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        fades[w] = exp2_approx(marks[(w * HEADS + head) * 2] - finite_peak(peak));
        total += marks[(w * HEADS + head) * 2 + 1] * fades[w];
    }
    head += tag.head * call.group;
    if (tag.pieces > 1 && threadIdx.x % 4 == 0 && warp == 0) {
        float* mark = call.marks + call.piece(tag.row, head, tag.piece) * 2;
        mark[0] = peak, mark[1] = total;
    }
    float sink = log2_sink(call.sinks, head), top = fmaxf(peak, sink);
    float fade = tag.pieces > 1 ? 1.0f : exp2_approx(peak - finite_peak(top));
    total = total * fade + exp2_approx(sink - finite_peak(top));
#pragma unroll
    for (int t = warp; t < kDim / 8; t += WARPS) {
        float first = 0.0f, second = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float* sum = reinterpret_cast<const float*>(dumps + w * Shape<T, kDim>::kSlot) + (t * 32 + lane) * 4;
            first += sum[half * 2] * fades[w], second += sum[half * 2 + 1] * fades[w];
        }
        give<T, kDim>(call, tag, head, dimension<T>(t, 0), first * fade, total);
        give<T, kDim>(call, tag, head, dimension<T>(t, 1), second * fade, total);
    }
}

// The share of each piece in each head of the group, float [group][pieces].
template <typename T>
FWD_INLINE void share(const Call<T>& call, const Tag& tag, float* shares) {
    int lane = threadIdx.x % 32;
    for (int index = threadIdx.x / 32; index < call.group; index += WARPS) {
        int head = tag.head * call.group + index;
        const float* marks = call.marks + call.piece(tag.row, head, 0) * 2;
        float sink = log2_sink(call.sinks, head), peak = sink, total = 0.0f;
        for (int i = lane; i < tag.pieces; i += 32) peak = fmaxf(peak, marks[2 * i]);
        peak = finite_peak(warp_max(peak));
        for (int i = lane; i < tag.pieces; i += 32) total += marks[2 * i + 1] * exp2_approx(marks[2 * i] - peak);
        float part = inverse(warp_sum(total) + exp2_approx(sink - peak));
        for (int i = lane; i < tag.pieces; i += 32) {
            shares[index * tag.pieces + i] = exp2_approx(marks[2 * i] - peak) * part;
        }
    }
}

// Sums the pieces of a row and kv head in their order.
template <typename T, int kDim>
FWD_INLINE void combine(const Call<T>& call, const Tag& tag, float* shares) {
    share(call, tag, shares);
    block_barrier();
    for (int place = threadIdx.x * 4; place < call.group * kDim; place += THREADS * 4) {
        int index = place / kDim, head = tag.head * call.group + index, dim = place % kDim;
        const float* sums = call.sums + call.piece(tag.row, head, 0) * kDim + dim;
        float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll kDim == 256 ? 4 : 8
        for (int i = 0; i < tag.pieces; ++i) {
            uint4 sum = load_global(sums + i * kDim);
            float part = shares[index * tag.pieces + i];
            value.x += __uint_as_float(sum.x) * part, value.y += __uint_as_float(sum.y) * part;
            value.z += __uint_as_float(sum.z) * part, value.w += __uint_as_float(sum.w) * part;
        }
        uint2 pack = make_uint2(pack_bf16(value.x, value.y), pack_bf16(value.z, value.w));
        *reinterpret_cast<uint2*>(call.out + call.vector(tag.row, head) * kDim + dim) = pack;
    }
}

// The end of an item: `slots` are those of the four warps that its last tiles were in.
template <typename T, int kDim>
FWD_INLINE void finish(const Call<T>& call, const Tag& tag, Softmax<T, kDim>& softmax, unsigned char* slots,
                       float* marks) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    warp_barrier();
    float4* dump = reinterpret_cast<float4*>(slots + warp * Shape<T, kDim>::kSlot) + lane;
#pragma unroll
    for (int t = 0; t < kDim / 8; ++t) {
        dump[t * 32] = make_float4(softmax.sum[t][0], softmax.sum[t][1], softmax.sum[t][2], softmax.sum[t][3]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float total = quad_sum(softmax.total[half]), *mark = marks + (warp * HEADS + half * 8 + lane / 4) * 2;
        if (lane % 4 == 0) mark[0] = softmax.peak[half], mark[1] = total;
    }
    block_barrier();
    merge<T, kDim>(call, tag, slots, marks, 0);
    if (call.group > 8) merge<T, kDim>(call, tag, slots, marks, 1);
    if (tag.pieces > 1 && last_arriver(call.arrivals + tag.row * call.kv_heads + tag.head, tag.pieces)) {
        static_assert(WARPS * Shape<T, kDim>::kSlot >= HEADS * MAX_PIECES * 4, "the shares fit");
        combine<T, kDim>(call, tag, reinterpret_cast<float*>(slots));
    }
    block_barrier();
}

template <typename T, int kDim>
FWD_INLINE void decode_attention(const Call<T>& call, unsigned char* shared) {
    using S = Shape<T, kDim>;
    grid_dependency_trigger();
    grid_dependency_wait();
    Loader<T, kDim> loader(call);
    Query<T, kDim> query;
    Softmax<T, kDim> softmax;
    for (int slot = 0; slot < S::kSlots - 1; ++slot) loader.load(shared, slot);
    for (int slot = 0;; slot = (slot + 1) % S::kSlots) {
        cp_async_wait<S::kSlots - 2>();
        warp_barrier();  // the tile is there for all lanes, and all have left the one that is replaced now
        loader.load(shared, (slot + S::kSlots - 1) % S::kSlots);
        const Tag& tag = reinterpret_cast<const Tag*>(shared + S::kTags)[slot * WARPS + loader.warp];
        if (tag.row < 0) return;
        if (tag.first) query.open(call, tag), softmax.open();
        unsigned char* slots = shared + slot * WARPS * S::kSlot;
        softmax.add(query, slots + loader.warp * S::kSlot, tag.stop - tag.begin - loader.warp * KEYS, call.scale);
        if (tag.last) finish<T, kDim>(call, tag, softmax, slots, reinterpret_cast<float*>(shared + S::kMarks));
    }
}

}  // namespace fwd

#define PARAMETERS(T)                                                                                                \
    fwd::bf16 *out, const fwd::bf16 *q, const T *keys, const T *values, const float *key_scales,                     \
        const float *value_scales, const float *sinks, const int64_t *positions, const int64_t *sequences,           \
        const int64_t *parents, const int64_t *slots, const int *tables, float *sums, float *marks, int *arrivals,   \
        int rows, int group, int kv_heads, int max_pages, int page_size, int window, float scale
#define DECODE(T, dim)                                                                                               \
    FWD_SHARED(shared);                                                                                              \
    fwd::Places places{positions, sequences, parents, slots, tables, rows, max_pages, page_size, window};            \
    fwd::decode_attention<T, dim>({places, out, q, keys, values, key_scales, value_scales, sinks, sums, marks,       \
                                   arrivals, group, kv_heads, scale * fwd::LOG2_E},                                  \
                                  shared)

extern "C" __global__ void __launch_bounds__(128, 3) decode_attention_bf16_64(PARAMETERS(fwd::bf16)) {
    DECODE(fwd::bf16, 64);
}
extern "C" __global__ void __launch_bounds__(128, 2) decode_attention_bf16_128(PARAMETERS(fwd::bf16)) {
    DECODE(fwd::bf16, 128);
}
extern "C" __global__ void __launch_bounds__(128, 1) decode_attention_bf16_256(PARAMETERS(fwd::bf16)) {
    DECODE(fwd::bf16, 256);
}
extern "C" __global__ void __launch_bounds__(128, 3) decode_attention_fp8_64(PARAMETERS(fwd::fp8)) {
    DECODE(fwd::fp8, 64);
}
extern "C" __global__ void __launch_bounds__(128, 2) decode_attention_fp8_128(PARAMETERS(fwd::fp8)) {
    DECODE(fwd::fp8, 128);
}
extern "C" __global__ void __launch_bounds__(128, 1) decode_attention_fp8_256(PARAMETERS(fwd::fp8)) {
    DECODE(fwd::fp8, 256);
}
