#include "planning/prefetch_plan.h"

#include <algorithm>

namespace moe {

std::vector<Guess> plan_reads(std::vector<Guess> guesses, double queued_bytes, double window_bytes,
                              double threshold) {
    std::erase_if(guesses, [&](const Guess& guess) { return guess.probability < threshold; });
    std::stable_sort(guesses.begin(), guesses.end(), [](const Guess& a, const Guess& b) {
        return a.windows != b.windows ? a.windows < b.windows : a.probability > b.probability;
    });
    std::vector<Guess> admitted;
    for (const Guess& guess : guesses) {
        if (queued_bytes > window_bytes) break;
        admitted.push_back(guess);
        queued_bytes += static_cast<double>(guess.num_bytes);
    }
    return admitted;
}

}  // namespace moe
