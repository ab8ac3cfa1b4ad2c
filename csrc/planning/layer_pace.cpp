#include "planning/layer_pace.h"

#include <algorithm>

namespace moe {

namespace {

// planning/layer_pace.py says what they are.
constexpr int64_t kRestAfterSteps = 64, kProbeEvery = 16;
constexpr double kSmoothing = 0.2, kExpectedRecall = 0.7, kLeastWindow = 1e-6;

}  // namespace

void LayerPace::begin_step() {
    last_look_.reset();
    last_layer_ = -1;
}

bool LayerPace::rests(int64_t layer_idx, int64_t needs) {
    const double now = static_cast<double>(needs);
    const auto [found, is_new] = needs_.try_emplace(layer_idx, now);
    if (!is_new) found->second += kSmoothing * (now - found->second);
    if (last_layer_ >= 0) next_layer_[last_layer_] = layer_idx;
    last_layer_ = layer_idx;
    steps_without_need_ = needs ? 0 : steps_without_need_ + 1;
    return steps_without_need_ > kRestAfterSteps;
}

void LayerPace::look(double now, double stall_s) {
    if (last_look_) {
        const double new_s = std::max(kLeastWindow, now - last_look_->now - (stall_s - last_look_->stall_s));
        window_s = window_s < kInfinite ? window_s + kSmoothing * (new_s - window_s) : new_s;
    }
    last_look_ = {now, stall_s};
    ++num_steps;
}

bool LayerPace::is_worth_predicting(int64_t layer_idx) const {
    const auto next = next_layer_.find(layer_idx);
    const auto needs = next == next_layer_.end() ? needs_.end() : needs_.find(next->second);
    if (needs == needs_.end() || num_steps % kProbeEvery == 0) return true;
    return kExpectedRecall * needs->second * (read_s - submit_s) > predict_s;
}

void LayerPace::predicted(double seconds) {
    predict_s += kSmoothing * (seconds - predict_s);
}

void LayerPace::submitted(double seconds, int64_t num_reads) {
    submit_s += kSmoothing * (seconds / static_cast<double>(num_reads) - submit_s);
}

std::optional<double> LayerPace::mean_needs() const {
    if (needs_.empty()) return std::nullopt;
    double sum = 0.0;
    for (const auto& [layer_idx, needs] : needs_) sum += needs;
    return sum / static_cast<double>(needs_.size());
}

}  // namespace moe
