#include "planning/horizon.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace moe {

namespace {

// Round to nearest even; the coefficients are finite.
uint16_t to_bfloat16(float value) {
    const auto bits = std::bit_cast<uint32_t>(value);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

std::vector<uint16_t> to_bfloat16(const float* values, int64_t count) {
    std::vector<uint16_t> result(count);
    std::transform(values, values + count, result.begin(), [](float value) { return to_bfloat16(value); });
    return result;
}

void add(float* to, const uint16_t* from, int64_t count) {
    for (int64_t j = 0; j < count; ++j) to[j] += std::bit_cast<float>(uint32_t{from[j]} << 16);
}

void add(float* to, const float* from, int64_t count) {
    for (int64_t j = 0; j < count; ++j) to[j] += from[j];
}

}  // namespace

HorizonForecast::HorizonForecast(int64_t num_layers, int64_t num_experts, std::vector<float> rates,
                                 int64_t num_before, const float* own, const float* before,
                                 const float* constant)
    : num_layers_(num_layers),
      num_experts_(num_experts),
      num_rates_(static_cast<int64_t>(rates.size())),
      num_before_(num_before),
      rates_(std::move(rates)),
      gain_(num_layers * num_experts * num_rates_ * num_experts),
      before_(to_bfloat16(before, num_layers * num_before * num_experts * num_experts)),
      constant_(constant, constant + num_layers * num_experts),
      parts_(num_layers * num_rates_ * num_experts, 0.0f),
      last_chosen_(num_layers),
      sum_(num_experts) {
    // A choice raises a decayed frequency by its rate: fold that into the coefficients.
    const int64_t rows = static_cast<int64_t>(gain_.size()) / num_experts;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t j = row * num_experts; j < (row + 1) * num_experts; ++j) {
            gain_[j] = to_bfloat16(own[j] * rates_[row % num_rates_]);
        }
    }
}

void HorizonForecast::observe(int64_t position, const std::vector<int64_t>& expert_ids, double* out,
                              int64_t num_out) {
    const int64_t block = num_rates_ * num_experts_;
    float* parts = parts_.data() + position * block;
    for (int64_t rate = 0; rate < num_rates_; ++rate) {
        const float decay = 1.0f - rates_[rate];
        for (int64_t j = 0; j < num_experts_; ++j) parts[rate * num_experts_ + j] *= decay;
    }
    const uint16_t* gain = gain_.data() + position * num_experts_ * block;
    for (const int64_t expert_id : expert_ids) add(parts, gain + expert_id * block, block);

    std::copy_n(constant_.data() + position * num_experts_, num_experts_, sum_.data());
    for (int64_t rate = 0; rate < num_rates_; ++rate)
        add(sum_.data(), parts + rate * num_experts_, num_experts_);
    for (int64_t n = 0; n < num_before_; ++n) {
        const int64_t other = ((position - 1 - n) % num_layers_ + num_layers_) % num_layers_;
        const uint16_t* rows = before_.data() + (position * num_before_ + n) * num_experts_ * num_experts_;
        for (const int64_t expert_id : last_chosen_[other]) {
            add(sum_.data(), rows + expert_id * num_experts_, num_experts_);
        }
    }
    last_chosen_[position] = expert_ids;
    std::copy_n(sum_.data(), num_out, out);
}

}  // namespace moe
