// Verify and commit: which drafts of each line hold, what the next step starts from, and what the host is told.
#pragma once

#include "sampling.cuh"

namespace fwd {

// The buffers of fwd.kernels.drawing.Outcome, which may lie in pinned memory of the host: written, never read.
struct Outcome {
    int64_t* ids;
    float* logprobs;
    int* finite;
    int* top_ids;  // [rows, MAX_TOPS]
    float* top_logprobs;
    int* accepted;  // [lines]
    int* last;
    int64_t* stamp;
};

// What the rows came to, in memory of the device.
struct Results {
    Result* rows;
    int* top_ids;  // [rows, MAX_TOPS]
    float* top_logprobs;
};

FWD_INLINE void publish_row(const Outcome& outcome, const Results& results, int row, int tops) {
    Result result = results.rows[row];
    outcome.ids[row] = result.id;
    outcome.logprobs[row] = result.logprob;
    outcome.finite[row] = result.finite;
    for (int place = row * MAX_TOPS; place < row * MAX_TOPS + tops; ++place) {
        outcome.top_ids[place] = results.top_ids[place];
        outcome.top_logprobs[place] = results.top_logprobs[place];
    }
}

FWD_INLINE int root_of(const Rows& rows, int line) {
    for (int row = 0; row < rows.count; ++row) {
        if (rows.sequences[row] == line && rows.kinds[row] & DRAWN) return row;
    }
    return -1;
}

// The draft below `row` that is what the row drew; −1: none.
FWD_INLINE int accepted_draft(const Rows& rows, int row, int token) {
    for (int draft = row + 1; draft < rows.count && rows.sequences[draft] == rows.sequences[row]; ++draft) {
        if (rows.kinds[draft] & DRAWN && rows.parent(draft) == row && rows.ids[draft] == token) return draft;
    }
    return -1;
}

// One thread walks down a line from its root while drafts equal what was drawn. A row that is not finite ends the walk
// before its own token: a root commits nothing, and the host reads `finite`.
FWD_INLINE void commit_line(const Outcome& outcome, const Results& results, const Rows& rows, const Drawing& drawing,
                            int64_t* next_ids, int line, int vocab) {
    int accepted = 0, last = -1;
    for (int row = root_of(rows, line); row >= 0 && results.rows[row].finite;) {
        int token = results.rows[row].id;
        ++accepted, last = row;
        if (rows.kinds[row] & PENALTIES) ++drawing.counts[static_cast<int64_t>(line) * vocab + token];
        row = accepted_draft(rows, row, token);
    }
    outcome.accepted[line] = accepted;
    outcome.last[line] = last;
    if (accepted > 0) next_ids[line] = results.rows[last].id;
}

// One block, after all rows have their results. `lines` 0: nothing is committed.
FWD_INLINE void publish(const Outcome& outcome, const Results& results, const Rows& rows, const Drawing& drawing,
                        int64_t* next_ids, const int64_t* step, int lines, int vocab) {
    int thread = static_cast<int>(threadIdx.x);
    if (thread < rows.count && rows.kinds[thread] & DRAWN) publish_row(outcome, results, thread, drawing.tops[thread]);
    if (thread < lines) commit_line(outcome, results, rows, drawing, next_ids, thread, vocab);
    block_barrier();
    if (thread == 0 && outcome.stamp) store_release_system(outcome.stamp, *step);
}

}  // namespace fwd
