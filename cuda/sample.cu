// The sampler of fwd/kernels/sampling.py on a device, and verify and commit behind it: two launches, whatever is asked.
//
// `sample_scan`: every block takes a chunk of a row; the one that comes last at the row joins the chunks, in their
// order. A row without thresholds is then drawn. `sample_select`: the blocks of a row with thresholds sum the histogram
// of its levels; the one that comes last cuts and draws; the one that comes last of all rows commits.
#include "commit.cuh"
#include "selection.cuh"

namespace fwd {

constexpr int SCAN_THREADS = 256;
constexpr int CHUNK = SCAN_THREADS * EACH;  // logits of a block of the scan
constexpr float LOG2_E = 1.4426950408889634f;

// What a chunk of a row came to.
struct Partial {
    double score;
    int id;
    float top, sum;  // maximum of the logits, sum of exp(logit − maximum)
    int finite;
};

FWD_INLINE int chunks_of(int vocab) { return (vocab + CHUNK - 1) / CHUNK; }

FWD_INLINE bool has_thresholds(const Drawing& drawing, int row, int vocab) {
    if (drawing.kinds[row] & GIVEN || drawing.temperatures[row] < GREEDY_BELOW) return false;
    bool top_k = drawing.top_ks[row] > 0 && drawing.top_ks[row] < vocab;
    return top_k || drawing.top_ps[row] < 1.0f || drawing.min_ps[row] > 0.0f;
}

// Rows whose draw `sample_scan` leaves to `sample_select`. Where every token is banned there is nothing to select.
FWD_INLINE bool is_selected(const Drawing& drawing, const Results& results, int row, int vocab) {
    if (!(drawing.kinds[row] & DRAWN) || !has_thresholds(drawing, row, vocab)) return false;
    return results.rows[row].finite && results.rows[row].peak > -INFINITY;
}

// ---- scan ----

// The best token of a chunk; of a row with thresholds the greatest, and `values` [vocab] is what it is to be cut from.
FWD_INLINE Best best_of_chunk(const Row& row, const Drawing& drawing, int index, int begin, float* values) {
    unsigned long long seed = drawing.seeds[index];
    long long place = drawing.places[index];
    bool cut = has_thresholds(drawing, index, row.vocab), noisy = !row.greedy() && !cut;
    int end = begin + CHUNK < row.vocab ? begin + CHUNK : row.vocab;
    Best best = none();
#pragma unroll 1
    for (int id = begin + static_cast<int>(threadIdx.x); id < end; id += SCAN_THREADS) {
        float value = adjusted(row, id, row.logits[id]);
        if (!row.greedy()) value = tempered(value, row.temperature);
        if (noisy) {
            consider(best, seed, place, value, id);
        } else {
            best = better(best, {static_cast<double>(value), id});
        }
        if (cut) values[id] = value;
    }
    return best;
}

// The `count` greatest of what the threads hold, greatest first, written by the first thread.
template <typename Below>
FWD_INLINE void greatest(int count, uint64_t* out, void* scratch, Below greatest_below) {
    uint64_t last = ~uint64_t{0};
    for (int n = 0; n < count; ++n) {
        last = block_greatest(greatest_below(last), scratch);
        if (threadIdx.x == 0) out[n] = last;
    }
}

FWD_INLINE Partial scan_chunk(const Row& row, const Drawing& drawing, int index, int begin, float* values,
                              uint64_t* tops, void* scratch) {
    float logit[EACH];
    bool finite = true;
    float top = -INFINITY, sum = 0.0f;
    int first = begin + static_cast<int>(threadIdx.x);
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        int id = first + j * SCAN_THREADS;
        logit[j] = id < row.vocab ? row.logits[id] : -INFINITY;
        finite = finite && (id >= row.vocab || fabsf(logit[j]) <= LARGEST);
        top = fmaxf(top, logit[j]);
    }
    if (block_any(!finite)) return {0.0, 0, 0.0f, 0.0f, 0};
    top = block_max(top, static_cast<float*>(scratch));
#pragma unroll
    for (int j = 0; j < EACH; ++j) sum += exp2_approx((logit[j] - top) * LOG2_E);
    sum = block_sum(sum, static_cast<float*>(scratch));
    greatest(drawing.tops[index], tops, scratch, [&](uint64_t last) {
        uint64_t found = 0;
#pragma unroll
        for (int j = 0; j < EACH; ++j) {
            uint64_t order = order_of(flushed(logit[j]), first + j * SCAN_THREADS);
            if (order < last && order > found && first + j * SCAN_THREADS < row.vocab) found = order;
        }
        return found;
    });
    Best best = none();
    if (!(drawing.kinds[index] & GIVEN)) best = block_best(best_of_chunk(row, drawing, index, begin, values), scratch);
    return {best.score, best.id, top, sum, 1};
}

// The most likely tokens of a row from those of its chunks.
FWD_INLINE void join_tops(const Results& results, const uint64_t* tops, int row, int count, int chunks, double total,
                          unsigned char* shared) {
    uint64_t* found = reinterpret_cast<uint64_t*>(shared + REST);
    greatest(count, found, shared + SCRATCH, [&](uint64_t last) {
        uint64_t best = 0;
        for (int at = threadIdx.x; at < chunks * MAX_TOPS; at += SCAN_THREADS) {
            uint64_t order = at % MAX_TOPS < count ? tops[at] : 0;
            if (order < last && order > best) best = order;
        }
        return best;
    });
    block_barrier();
    int place = static_cast<int>(threadIdx.x);
    if (place < count) {
        results.top_ids[row * MAX_TOPS + place] = id_of(found[place]);
        results.top_logprobs[row * MAX_TOPS + place] =
            static_cast<float>(static_cast<double>(value_of(found[place])) - total);
    }
}

// One block joins the chunks of a row, in their order. Returns the row's log Σ exp.
FWD_INLINE Result join_chunks(const Row& row, const Partial* partials, int given, void* scratch) {
    int chunk = static_cast<int>(threadIdx.x);
    Partial own = {-INFINITY, 0x7FFFFFFF, -INFINITY, 0.0f, 1};
    if (chunk < chunks_of(row.vocab)) own = partials[chunk];
    if (block_any(!own.finite)) return {0.0, 0.0f, NAN, 0, 0};
    float top = block_max(own.top, static_cast<float*>(scratch));
    float sum = block_sum(own.sum * exp2_approx((own.top - top) * LOG2_E), static_cast<float*>(scratch));
    Best best = block_best({own.score, own.id}, scratch);
    int id = given >= 0 ? given : best.id;
    double total = static_cast<double>(top) + log(static_cast<double>(sum));
    float logprob = static_cast<float>(static_cast<double>(row.logits[id]) - total);
    return {total, static_cast<float>(best.score), logprob, id, 1};
}

// ---- select ----

// The block's piece of a row, added to the histogram of the row. Whole numbers add up to the same in any pieces.
FWD_INLINE void add_levels(const Selection& selection, unsigned* counts, uint64_t* masses) {
    for (int level = threadIdx.x; level < LEVELS; level += SELECT_THREADS) {
        selection.counts[level] = 0, selection.masses[level] = 0;
    }
    block_barrier();
    int piece = (selection.vocab + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
    int begin = static_cast<int>(blockIdx.x) * piece;
    int end = begin + piece < selection.vocab ? begin + piece : selection.vocab;
    visit(selection.values, selection.peak, begin, end, [&](uint64_t, const Weighed& weighed) {
        atomic_add(selection.counts + weighed.level, 1u);
        atomic_add(selection.masses + weighed.level, uint64_t{weighed.weight});
    });
    block_barrier();
    for (int level = threadIdx.x; level < LEVELS; level += SELECT_THREADS) {
        if (selection.counts[level] == 0) continue;
        atomic_add(counts + level, selection.counts[level]);
        atomic_add(masses + level, selection.masses[level]);
    }
}

// The whole histogram, from where it is left zero.
FWD_INLINE void take_levels(const Selection& selection, unsigned* counts, uint64_t* masses) {
    for (int level = threadIdx.x; level < LEVELS; level += SELECT_THREADS) {
        selection.counts[level] = counts[level], selection.masses[level] = masses[level];
        counts[level] = 0, masses[level] = 0;
    }
    block_barrier();
}

FWD_INLINE int draw_selected(Selection& selection, const Drawing& drawing, int row) {
    uint64_t cut = selection.cut(drawing.top_ks[row], drawing.top_ps[row]);
    if (cut == 0 && selection.levels(false, 0, LEVELS - 1) <= HELD) selection.view(0);
    double least = ceil(mul_rn(static_cast<double>(drawing.min_ps[row]), UNIT));
    return selection.draw(cut, least < 1.0 ? 1 : static_cast<uint32_t>(least), drawing.seeds[row], drawing.places[row]);
}

}  // namespace fwd

using namespace fwd;

// grid (chunks of a row, rows). Buffers of Rows, Drawing and `fwd.kernels.sample.Workspace`.
extern "C" __global__ void __launch_bounds__(SCAN_THREADS)
    sample_scan(const float* logits, const int64_t* ids, const int64_t* sequences, const int64_t* parents,
                const int64_t* seeds, const int64_t* places, const float* temperatures, const float* top_ps,
                const float* min_ps, const float* repetitions, const float* presences, const float* frequencies,
                const int* top_ks, const int* tops, const int* kinds, int* counts, const float* bias,
                const unsigned* masks, unsigned char* partials, uint64_t* chunk_tops, float* values,
                unsigned char* results, int* top_ids, float* top_logprobs, int* arrivals, int vocab) {
    FWD_SHARED(shared);
    grid_dependency_trigger();
    grid_dependency_wait();
    int index = static_cast<int>(blockIdx.y), chunk = static_cast<int>(blockIdx.x);
    if (!(kinds[index] & DRAWN)) return;
    Drawing drawing = {seeds,     places,      temperatures, top_ps, min_ps, repetitions, presences,
                       frequencies, top_ks, tops, kinds, counts, bias, masks};
    Rows rows = {ids, sequences, parents, kinds, static_cast<int>(gridDim.y)};
    Results out = {reinterpret_cast<Result*>(results), top_ids, top_logprobs};
    Row row = open_row(logits, drawing, rows, index, vocab, reinterpret_cast<int*>(shared + DRAFTS));
    int chunks = static_cast<int>(gridDim.x);
    Partial* parts = reinterpret_cast<Partial*>(partials) + index * chunks;
    uint64_t* row_tops = chunk_tops + static_cast<int64_t>(index) * chunks * MAX_TOPS;
    float* row_values = values + static_cast<int64_t>(index) * vocab;
    uint64_t* own_tops = row_tops + chunk * MAX_TOPS;
    Partial part = scan_chunk(row, drawing, index, chunk * CHUNK, row_values, own_tops, shared + SCRATCH);
    if (threadIdx.x == 0) parts[chunk] = part;
    if (!last_arriver(arrivals + index, chunks)) return;
    int given = kinds[index] & GIVEN ? static_cast<int>(ids[index]) : -1;
    Result result = join_chunks(row, parts, given, shared + SCRATCH);
    if (result.finite) join_tops(out, row_tops, index, tops[index], chunks, result.total, shared);
    if (threadIdx.x == 0) out.rows[index] = result;
}

// grid (pieces of a row, rows). Buffers as above, of Outcome, and next_ids [lines]; `lines` 0: nothing is committed.
extern "C" __global__ void __launch_bounds__(SELECT_THREADS, 1)
    sample_select(const float* logits, const int64_t* ids, const int64_t* sequences, const int64_t* parents,
                  const int64_t* seeds, const int64_t* places, const float* temperatures, const float* top_ps,
                  const float* min_ps, const float* repetitions, const float* presences, const float* frequencies,
                  const int* top_ks, const int* tops, const int* kinds, int* counts, const float* bias,
                  const float* values, unsigned char* results, int* top_ids, float* top_logprobs,
                  unsigned* level_counts, uint64_t* level_masses, int* arrivals, int* done, int64_t* out_ids,
                  float* out_logprobs, int* out_finite, int* out_top_ids, float* out_top_logprobs, int* out_accepted,
                  int* out_last, int64_t* out_stamp, int64_t* next_ids, const int64_t* step, int lines, int vocab) {
    FWD_SHARED(shared);
    grid_dependency_trigger();
    grid_dependency_wait();
    int index = static_cast<int>(blockIdx.y);
    Drawing drawing = {seeds,     places,      temperatures, top_ps, min_ps, repetitions, presences,
                       frequencies, top_ks, tops, kinds, counts, bias, nullptr};
    Rows rows = {ids, sequences, parents, kinds, static_cast<int>(gridDim.y)};
    Results in = {reinterpret_cast<Result*>(results), top_ids, top_logprobs};
    bool selected = is_selected(drawing, in, index, vocab);
    if (selected) {
        int64_t start = static_cast<int64_t>(index) * vocab;
        Result* result = in.rows + index;
        Selection selection = open_selection(values + start, vocab, result->peak, shared);
        unsigned* row_counts = level_counts + index * LEVELS;
        uint64_t* row_masses = level_masses + index * LEVELS;
        add_levels(selection, row_counts, row_masses);
        if (!last_arriver(arrivals + index, static_cast<int>(gridDim.x))) return;
        take_levels(selection, row_counts, row_masses);
        int id = draw_selected(selection, drawing, index);
        if (threadIdx.x == 0) {
            result->id = id;
            result->logprob = static_cast<float>(static_cast<double>(logits[start + id]) - result->total);
        }
    }
    if (!selected && blockIdx.x > 0) return;
    if (!last_arriver(done, rows.count)) return;
    Outcome outcome = {out_ids,          out_logprobs, out_finite, out_top_ids,
                       out_top_logprobs, out_accepted, out_last,   out_stamp};
    publish(outcome, in, rows, drawing, next_ids, step, lines, vocab);
}
