#include "planning/lookahead.h"

#include <algorithm>

namespace moe {

void RouteHistory::observe(int64_t row, const std::vector<int64_t>& expert_ids,
                           const std::vector<float>& weights) {
    float* const last = previous + row * num_experts;
    float* const often = frequency + row * num_experts;
    for (int64_t i = 0; i < num_experts; ++i) {
        last[i] = 0.0f;
        often[i] *= decay;
    }
    for (size_t i = 0; i < expert_ids.size(); ++i) {
        last[expert_ids[i]] = weights[i];
        often[expert_ids[i]] += static_cast<float>(1.0 - static_cast<double>(decay));
    }
}

// A row that ends with the hidden state needs no copy.
const float* Lookahead::features(const Target& target, const float* hidden,
                                 const std::vector<int64_t>& expert_ids, const std::vector<float>& weights) {
    if (target.num_features == hidden_size_) return hidden;
    const int64_t experts = history_.num_experts;
    features_.assign(static_cast<size_t>(target.num_features), 0.0f);
    float* next = std::copy(hidden, hidden + hidden_size_, features_.data());
    if (target.num_features > hidden_size_ + 2 * experts + 1) {
        for (size_t i = 0; i < expert_ids.size(); ++i) next[expert_ids[i]] = weights[i];
        next += experts;
    }
    *next++ = 1.0f;
    const int64_t row = target.history_row * experts;
    next = std::copy(history_.previous + row, history_.previous + row + experts, next);
    std::copy(history_.frequency + row, history_.frequency + row + experts, next);
    return features_.data();
}

Lookahead::Target* Lookahead::target(int64_t layer_idx, int64_t later) {
    const auto found = targets_.find(layer_idx);
    if (found == targets_.end()) return nullptr;
    for (Target& target : found->second) {
        if (target.layer_idx == later) return &target;
    }
    return nullptr;
}

// along_ holds the hidden state along the target's directions.
const float* Lookahead::added(const Target& target, const std::vector<int64_t>& expert_ids,
                              const std::vector<float>& weights) {
    if (target.answers == nullptr) return target.bias;
    added_.assign(static_cast<size_t>(target.num_experts), 0.0f);
    if (target.bias != nullptr) std::copy(target.bias, target.bias + target.num_experts, added_.begin());
    const int64_t size = target.num_directions * target.num_experts;
    for (size_t i = 0; i < expert_ids.size(); ++i) {
        add_product(along_.data(), target.answers + expert_ids[i] * size, weights[i], target.num_directions,
                    target.num_experts, added_.data());
    }
    return added_.data();
}

// Appends what a target's chances_ name, the more probable first.
void Lookahead::find(const Target& target, int64_t windows, bool learns, float threshold,
                     std::vector<Likely>& likely) {
    const auto first = static_cast<std::ptrdiff_t>(likely.size());
    const auto slots = slots_.find(target.layer_idx);
    const Slots here = slots == slots_.end() ? Slots{} : slots->second;
    std::vector<Open>& open = open_[target.layer_idx];
    std::erase_if(open, [&](const Open& guess) { return guess.windows == windows; });
    for (int64_t i = 0; i < target.num_experts; ++i) {
        if (here.has(i)) continue;
        const float chance = learns ? rates_.rate(windows, chances_[i]) : chances_[i];
        if (chance >= threshold) likely.push_back({windows, target.layer_idx, i, chance});
        if (learns && chances_[i] >= kLeastChance) open.push_back({windows, i, chances_[i]});
    }
    std::stable_sort(likely.begin() + first, likely.end(),
                     [](const Likely& a, const Likely& b) { return a.chance > b.chance; });
}

std::vector<Lookahead::Likely> Lookahead::likely(int64_t layer_idx, int64_t depth, const float* hidden,
                                                 const std::vector<int64_t>& expert_ids,
                                                 const std::vector<float>& weights, float threshold) {
    std::vector<Likely> likely;
    const auto found = targets_.find(layer_idx);
    if (found == targets_.end()) return likely;
    int64_t windows = 0;
    const float* directions = nullptr;  // of along_
    for (const Target& target : found->second) {
        if (++windows > depth) break;
        if (target.directions != nullptr && target.directions != directions) {
            directions = target.directions;
            along_.resize(static_cast<size_t>(target.num_directions));
            products(hidden, directions, target.num_directions, hidden_size_, along_.data());
        }
        chances_.resize(static_cast<size_t>(target.num_experts));
        gate_chances(features(target, hidden, expert_ids, weights), target.weight,
                     added(target, expert_ids, weights), target.num_experts, target.num_features,
                     target.top_k, target.slope, target.offset, chances_.data());
        find(target, windows, layer_idx >= 0, threshold, likely);
    }
    return likely;
}

}  // namespace moe
