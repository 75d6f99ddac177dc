// Which experts the rows of a step visit: norm and the router's product by output tile, then the choice, by the block
// that comes last of those of eight rows, a warp for each; then the table of visits, by the last of all.
#include "gemv_bodies.cuh"

namespace fwd::routing {

using gemv::kThreads;
using gemv::kWarps;
using gemv::lane_index;
using gemv::warp_index;

constexpr int kRows = 8;    // of a block
constexpr int kShare = 16;  // experts of a lane: j·32 + lane
constexpr int kMost = 32 * kShare;
constexpr int kSoftmax = 0, kTopSoftmax = 1, kSigmoid = 2;

struct Rule {
    int experts, top_k, groups, top_groups, scoring, normalize;
    float scale;
};

// Floats in the order of numbers, what is none above all; 0 is none of them. −0 is 0.
FWD_INLINE uint32_t key_of(float value) {
    uint32_t bits = __float_as_uint(value == 0.0f ? 0.0f : value);
    return value != value ? 0xFFFFFFFFu : bits >> 31 ? ~bits : bits | 0x80000000u;
}

// A row in the hands of a warp: logits to scores, and to what experts are chosen by.
struct Row {
    float scores[kShare], worth[kShare];

    FWD_INLINE void read(const float* logits, const float* bias, const Rule& rule) {
#pragma unroll
        for (int j = 0; j < kShare; ++j) {
            int expert = j * 32 + lane_index();
            bool there = expert < rule.experts;
            scores[j] = there ? logits[expert] + (bias ? bias[expert] : 0.0f) : -INFINITY;
        }
    }
    FWD_INLINE void score(const float* correction, const Rule& rule) {
        if (rule.scoring == kSoftmax) softmax();
#pragma unroll
        for (int j = 0; j < kShare; ++j) {
            int expert = j * 32 + lane_index();
            if (rule.scoring == kSigmoid) scores[j] = 1.0f / (1.0f + expf(-scores[j]));
            worth[j] = scores[j] + (correction && expert < rule.experts ? correction[expert] : 0.0f);
        }
    }
    FWD_INLINE void softmax() {
        float most = scores[0], sum = 0.0f;
#pragma unroll
        for (int j = 1; j < kShare; ++j) most = fmaxf(most, scores[j]);
        most = warp_max(most);
#pragma unroll
        for (int j = 0; j < kShare; ++j) sum += scores[j] = expf(scores[j] - most);
        sum = warp_sum(sum);
#pragma unroll
        for (int j = 0; j < kShare; ++j) scores[j] /= sum;
    }
    // −∞ to what is outside the groups whose two best sum highest. `scratch` is a float of each expert.
    FWD_INLINE void close_groups(const Rule& rule, float* scratch) {
#pragma unroll
        for (int j = 0; j < kShare; ++j) scratch[j * 32 + lane_index()] = worth[j];
        warp_barrier();
        int size = rule.experts / rule.groups;
        float best = -INFINITY, second = -INFINITY;
        for (int i = 0; i < size && lane_index() < rule.groups; ++i) {
            float value = scratch[lane_index() * size + i];
            if (key_of(value) > key_of(best)) second = best, best = value;
            else if (key_of(value) > key_of(second)) second = value;
        }
        uint32_t key = lane_index() < rule.groups ? key_of(size > 1 ? best + second : best) : 0;
        int above = 0;
        for (int group = 0; group < rule.groups; ++group) {
            uint32_t other = shuffle(key, group);
            above += other > key || (other == key && group < lane_index());
        }
        unsigned open = ballot(above < rule.top_groups);
#pragma unroll
        for (int j = 0; j < kShare; ++j)
            if (!(open >> min((j * 32 + lane_index()) / size, 31) & 1)) worth[j] = -INFINITY;
    }
    // The best first, of equals the lowest; lane i gets the i-th.
    FWD_INLINE void choose(const Rule& rule, int& expert, float& score) const {
        uint32_t keys[kShare];
#pragma unroll
        for (int j = 0; j < kShare; ++j) keys[j] = j * 32 + lane_index() < rule.experts ? key_of(worth[j]) : 0;
        for (int place = 0; place < rule.top_k; ++place) {
            uint32_t most = 0;
            int own = kMost;
#pragma unroll
            for (int j = 0; j < kShare; ++j)
                if (keys[j] > most) most = keys[j], own = j * 32 + lane_index();
            uint32_t highest = __reduce_max_sync(FULL_WARP, most);
            int first = __reduce_min_sync(FULL_WARP, most == highest ? own : kMost);
            float found = 0.0f;
#pragma unroll
            for (int j = 0; j < kShare; ++j)
                if (j * 32 + lane_index() == first) keys[j] = 0, found = scores[j];
            found = shuffle(found, first % 32);
            if (lane_index() == place) expert = first, score = found;
        }
    }
};

// Of lanes 0 … count − 1, in their order.
FWD_INLINE float ordered_sum(float value, int count) {
    float sum = shuffle(value, 0);
    for (int lane = 1; lane < count; ++lane) sum += shuffle(value, lane);
    return sum;
}

FWD_INLINE void choose(const float* logits, const float* bias, const float* correction, const Rule& rule, bool live,
                       float* scratch, int* experts, float* weights) {
    Row row;
    row.read(logits, bias, rule);
    row.score(correction, rule);
    if (rule.top_groups < rule.groups) row.close_groups(rule, scratch);
    int expert = 0;
    float weight = 0.0f;
    row.choose(rule, expert, weight);
    if (rule.scoring == kTopSoftmax) {
        weight = expf(weight - shuffle(weight, 0));
        weight /= ordered_sum(weight, rule.top_k);
    }
    if (rule.normalize) weight /= ordered_sum(weight, rule.top_k) + 1e-20f;
    if (lane_index() >= rule.top_k) return;
    experts[lane_index()] = live ? expert : -1;
    weights[lane_index()] = weight * rule.scale;
}

// Sums over the threads before this one; `all`: over every thread. `scratch` is a word of each warp.
FWD_INLINE uint32_t before(uint32_t value, uint32_t& all, uint32_t* scratch) {
    uint32_t sum = value;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        uint32_t lower = shuffle_up(sum, distance);
        if (lane_index() >= distance) sum += lower;
    }
    if (lane_index() == 31) scratch[warp_index()] = sum;
    block_barrier();
    uint32_t below = 0;
    all = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
        if (warp == warp_index()) below = all;
        all += scratch[warp];
    }
    return below + sum - value;
}

// Visits in the order of their experts, of one expert in the order of rows, in items of up to `limit`. A thread has
// some experts, the next thread the next ones.
FWD_INLINE void sort_visits(const int* experts, int visits, int top_k, int many, int limit, int* table,
                            unsigned char* shared) {
    int* found = reinterpret_cast<int*>(shared);  // [visits]
    uint32_t* scratch = reinterpret_cast<uint32_t*>(found + visits);
    for (int visit = threadIdx.x; visit < visits; visit += kThreads) found[visit] = experts[visit];
    block_barrier();
    int each = (many + kThreads - 1) / kThreads, first = threadIdx.x * each, last = min(first + each, many);
    uint32_t own = 0, all;  // visits, and items from bit 16 on
    for (int expert = first; expert < last; ++expert) {
        int count = 0;
        for (int visit = 0; visit < visits; ++visit) count += found[visit] == expert;
        own += count + ((count + limit - 1) / limit << 16);
    }
    uint32_t start = before(own, all, scratch);
    int position = start & 0xFFFF, item = start >> 16;
    int *items = table + 4, *order = items + 4 * visits, *rows = order + visits, *positions = rows + visits;
    int* item_of = positions + visits;
    if (threadIdx.x == 0) table[0] = all >> 16;
    for (int expert = first; expert < last && own; ++expert) {
        int count = 0;
        for (int visit = 0; visit < visits; ++visit) {
            if (found[visit] != expert) continue;
            if (count % limit == 0) items[4 * item] = expert, items[4 * item + 1] = position, ++item;
            items[4 * item - 2] = count % limit + 1;
            order[position] = visit, rows[position] = visit / top_k;
            positions[visit] = position, item_of[visit] = item - 1;
            ++count, ++position;
        }
    }
}

// Weights that are needed later start on their way to L2 while memory has little to do, which is behind the wait:
// before it the launch before this one streams its own. Blocks z = 1 … of all rows and tiles have `each` bytes in turn.
FWD_INLINE void fetch_ahead(const unsigned char* ahead, int bytes, int each) {
    grid_dependency_wait();
    int64_t from = int64_t{((blockIdx.z - 1) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x} * each;
    if (threadIdx.x == 0 && from < bytes)
        prefetch_l2(ahead + from, static_cast<uint32_t>(min(int64_t{each}, bytes - from)));
}

}  // namespace fwd::routing

// x [rows, inputs]: hidden, normed. experts, weights [rows, top_k]; table: see fwd.kernels.expert_kernels.Workspace.
// Blocks of part y of the grid have rows 8y … 8y + 7; counters: one of each part, and one of all. Those of z > 0 fetch
// the first `ahead_bytes` of what is at `ahead`, immutable, `ahead_each` bytes a block.
extern "C" __global__ void __launch_bounds__(fwd::gemv::kThreads, fwd::gemv::kResident)
    route(const fwd::bf16* hidden, const fwd::bf16* norm, float eps, const void* weight, const float* bias,
          const float* correction, const int64_t* sequences, fwd::bf16* x, int* experts, float* weights, int* table,
          float* logits, int* counters, int all_rows, int inputs, int many, int top_k, int groups, int top_groups,
          int scoring, int normalize, float scale, int limit, const unsigned char* ahead, int ahead_bytes,
          int ahead_each) {
    using namespace fwd;
    using gemv::Bf16, gemv::kThreads;
    FWD_SHARED(shared);
    grid_dependency_trigger();
    if (blockIdx.z > 0) return routing::fetch_ahead(ahead, ahead_bytes, ahead_each);
    int first = blockIdx.y * routing::kRows, rows = min(routing::kRows, all_rows - first);
    hidden += int64_t{first} * inputs, x += int64_t{first} * inputs, logits += int64_t{first} * many;
    gemv::Neighbours<1> tiling;
    gemv::Weights<Bf16, 1, gemv::Neighbours<1>> matrix({weight, nullptr}, tiling, inputs,
                                                       (many + gemv::kTile - 1) / gemv::kTile);
    gemv::Normed<Bf16> staging(hidden, norm, eps, rows, inputs, shared);
    staging.prepare();
    grid_dependency_wait();
    staging.stage();
    for (int at = blockIdx.x * kThreads + threadIdx.x; at < rows * (inputs / 8); at += gridDim.x * kThreads) {
        int row = at / (inputs / 8), chunk = at - row * (inputs / 8);
        uint4 eight = load_shared(staging.staged + row * staging.pitch + chunk * 16);
        store_global(x + int64_t{row} * inputs + chunk * 8, eight);
    }
    gemv::Logits epilogue{logits, rows, many};
    gemv::run<1>(matrix, gemv::Staged<1>(staging.staged, staging.pitch, rows), staging.behind(), epilogue);
    if (!last_arriver(counters + blockIdx.y, gridDim.x)) return;
    int row = gemv::warp_index();
    if (row < rows) {
        routing::Rule rule{many, top_k, groups, top_groups, scoring, normalize, scale};
        int64_t place = first + row;
        routing::choose(logits + int64_t{row} * many, bias, correction, rule, sequences[place] >= 0,
                      reinterpret_cast<float*>(shared) + row * routing::kMost, experts + place * top_k,
                      weights + place * top_k);
    }
    if (!last_arriver(counters + gridDim.y, gridDim.y)) return;
    routing::sort_visits(experts, all_rows * top_k, top_k, many, limit, table, shared);
}

// residual [rows, outputs] += Σ weightₖ·productₖ + shared, in that order in float32, rounded once: a block has a row.
// products: those of visits, and of rows behind them if `shared`.
extern "C" __global__ void __launch_bounds__(fwd::gemv::kThreads)
    combine(const float* products, const int* experts, const float* weights, fwd::bf16* residual, int rows, int top_k,
            int outputs, int shared) {
    using namespace fwd;
    grid_dependency_trigger();
    grid_dependency_wait();
    int64_t row = blockIdx.x;
    for (int output = threadIdx.x; output < outputs; output += gemv::kThreads) {
        float sum = 0.0f;
        for (int64_t visit = row * top_k; visit < (row + 1) * top_k; ++visit) {
            if (experts[visit] < 0) break;
            sum += __fmul_rn(weights[visit], products[visit * outputs + output]);
        }
        if (shared) sum += products[(int64_t{rows} * top_k + row) * outputs + output];
        bf16* place = residual + row * outputs + output;
        *place = to_bf16(sum + to_float(*place));
    }
}
