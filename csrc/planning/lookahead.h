// What one token will probably need in the layers ahead, in one call: decoding pays for a prediction in every
// layer, and numpy's calls cost more than the product that they make.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "planning/gate_chances.h"
#include "planning/use_rates.h"

namespace moe {

// What later layers chose so far, by row: predictors/history.py owns the memory.
struct RouteHistory {
    float* previous = nullptr;   // (num_layers, num_experts) routing weights of the last token
    float* frequency = nullptr;  // (num_layers, num_experts) decayed
    int64_t num_layers = 0, num_experts = 0;
    float decay = 0.0f;

    // Takes in one token's choice.
    void observe(int64_t row, const std::vector<int64_t>& expert_ids, const std::vector<float>& weights);
};

class Lookahead {
  public:
    // How to forecast a later layer. A row of the weight is for [hidden (hidden_size)] and, where it is
    // longer, [weights of this layer's choice (E) unless there is none yet, 1, previous (E), frequency (E)].
    struct Target {
        int64_t layer_idx;
        GateWeight weight;  // (num_experts, num_features)
        const float* bias;  // (num_experts) or null
        int64_t num_experts, num_features, top_k;
        float slope, offset;
        int64_t history_row;
        // What each chosen expert adds to the scores, in proportion to its weight: a matrix from the hidden
        // state along some directions. Null where nothing is known of that.
        const float* directions;  // (num_directions, hidden_size)
        const float* answers;     // (E of the layer that routed, num_directions, num_experts)
        int64_t num_directions;
    };
    struct Likely {
        int64_t windows;  // layers ahead, from 1
        int64_t layer_idx, expert_id;
        float chance;
    };

    Lookahead(int64_t hidden_size, RouteHistory history) : hidden_size_(hidden_size), history_(history) {}

    // Targets of a layer are added nearest first; layer_idx -1: before any router has spoken.
    void add(int64_t layer_idx, const Target& target) { targets_[layer_idx].push_back(target); }

    // The target that was added for these two; null where none was.
    Target* target(int64_t layer_idx, int64_t later);

    // Returns the experts of at most ``depth`` layers that are used with at least ``threshold``: nearest
    // layer first, and the more probable first. Chances are those that guesses have had so far (UseRates),
    // but for what is asked before any router has spoken: the token may be another.
    std::vector<Likely> likely(int64_t layer_idx, int64_t depth, const float* hidden,
                               const std::vector<int64_t>& expert_ids, const std::vector<float>& weights,
                               float threshold);

    // What the layer's router chose: what ``likely`` guessed of it was right or wrong.
    template <class Id>
    void chosen(int64_t layer_idx, const std::vector<Id>& expert_ids) {
        const auto found = open_.find(layer_idx);
        if (found == open_.end()) return;
        for (const Open& guess : found->second) {
            const bool is_used =
                std::find(expert_ids.begin(), expert_ids.end(), Id(guess.expert_id)) != expert_ids.end();
            rates_.note(guess.windows, guess.chance, is_used);
        }
        found->second.clear();
    }

    // Experts of the layer whose word table[expert_id * stride] is not 0 are not returned; read in every
    // call.
    void leave_out(int64_t layer_idx, const uint64_t* table, int64_t num_experts, int64_t stride) {
        slots_[layer_idx] = {table, num_experts, stride};
    }
    void leave_out_none() { slots_.clear(); }

    RouteHistory& history() { return history_; }
    int64_t hidden_size() const { return hidden_size_; }

  private:
    const float* features(const Target& target, const float* hidden, const std::vector<int64_t>& expert_ids,
                          const std::vector<float>& weights);

    // What is added to the scores whatever the features: the bias, and what the chosen experts answer.
    const float* added(const Target& target, const std::vector<int64_t>& expert_ids,
                       const std::vector<float>& weights);

    void find(const Target& target, int64_t windows, bool learns, float threshold,
              std::vector<Likely>& likely);

    int64_t hidden_size_;
    RouteHistory history_;
    struct Slots {
        const uint64_t* table = nullptr;
        int64_t num_experts = 0, stride = 0;

        bool has(int64_t expert_id) const {
            return expert_id < num_experts && table[expert_id * stride] != 0;
        }
    };

    static constexpr float kLeastChance = 0.05f;  // what is less likely is not learned of

    struct Open {  // until its layer's router has spoken
        int64_t windows, expert_id;
        float chance;
    };

    std::map<int64_t, std::vector<Target>> targets_;
    std::map<int64_t, std::vector<Open>> open_;  // by layer
    UseRates rates_;
    std::map<int64_t, Slots> slots_;
    std::vector<float> features_, chances_, along_, added_;
};

}  // namespace moe
