// How often guesses come true: a predictor's chances, corrected by what routers chose since.
//
// A gate's score says who is likelier, not how likely; and of experts that are not resident, fewer are chosen
// than of all with the same chance. Guesses are counted by how many layers ahead they were made and by
// chance, those of all layers together, so that a token's layers are enough to learn from. What was predicted
// stands in for the first guesses of a kind (the mean of a Beta distribution), and what was long ago counts
// less and less.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace moe {

class UseRates {
  public:
    // The share of guesses like this that come true.
    float rate(int64_t windows, float chance) const {
        const Count count =
            windows <= int64_t(counts_.size()) ? counts_[windows - 1][bucket_of(chance)] : Count{};
        return (count.used + kPrior * chance) / (count.guessed + kPrior);
    }

    // A guess, windows (from 1) layers ahead, and whether its layer's router chose it.
    void note(int64_t windows, float chance, bool is_used) {
        if (windows > int64_t(counts_.size())) counts_.resize(windows);
        Count& count = counts_[windows - 1][bucket_of(chance)];
        count.guessed += 1.0f;
        count.used += is_used;
        if (count.guessed >= kRemembered) count = {0.5f * count.guessed, 0.5f * count.used};
    }

  private:
    static constexpr int64_t kBuckets = 20;
    static constexpr float kPrior = 8.0f, kRemembered = 512.0f;  // guesses of a kind

    struct Count {
        float guessed = 0.0f, used = 0.0f;
    };

    static int64_t bucket_of(float chance) {
        return std::clamp(static_cast<int64_t>(chance * kBuckets), int64_t{0}, kBuckets - 1);
    }

    std::vector<std::array<Count, kBuckets>> counts_;  // by windows - 1
};

}  // namespace moe
