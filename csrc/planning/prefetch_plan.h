// Which guesses are worth reading now, and in which order: planning/prefetch_plan.py's plan_reads, natively.
#pragma once

#include <cstdint>
#include <vector>

namespace moe {

// An expert that a step may need soon; windows: layers until its router speaks, from 1.
struct Guess {
    int64_t windows;
    int64_t layer_idx, expert_id;
    double probability;
    int64_t num_bytes;
};

// Returns what to read, by deadline and then the more probable first: what is at least as probable as the
// threshold, and begun within a window after ``queued_bytes`` and what goes before it.
std::vector<Guess> plan_reads(std::vector<Guess> guesses, double queued_bytes, double window_bytes,
                              double threshold);

}  // namespace moe
