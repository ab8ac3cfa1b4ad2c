// Forecasts with coefficients fitted to a checkpoint, for planning/policies/horizon.py.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace moe {

using ExpertIds = std::vector<int64_t>;

// What was fitted; the pools of a run share it. L layers of E experts; R rates of decayed frequencies; N
// layers before that are looked at.
class HorizonCoefficients {
  public:
    HorizonCoefficients(int64_t num_layers, int64_t num_experts, std::vector<float> rates, int64_t num_before,
                        const float* own,       // (L, E, R, E): own[l][i][r][j]
                        const float* before,    // (L, N, E, E)
                        const float* constant)  // (L, E)
        ;

    int64_t num_layers() const { return num_layers_; }
    int64_t num_experts() const { return num_experts_; }
    int64_t num_rates() const { return static_cast<int64_t>(rates_.size()); }
    int64_t num_before() const { return num_before_; }
    int64_t row_size() const { return row_size_; }
    float rate(int64_t index) const { return rates_[index]; }
    const float* constant(int64_t position) const { return constant_.data() + position * num_experts_; }
    const uint32_t* row(int64_t position, int64_t expert_id) const {
        return table_.data() + (position * num_experts_ + expert_id) * row_size_ / 2;
    }

  private:
    void fill_row(int64_t position, int64_t expert_id, const float* own, const float* before);

    int64_t num_layers_, num_experts_, num_before_;
    std::vector<float> rates_;
    int64_t row_size_;  // (R + N) * E, rounded up to what is summed at once
    // (L, E, row_size / 2), two bfloat16 a word (horizon_forecast.cpp's half_of); memory traffic is what an
    // event costs: all that a choice says, of its own layer by each rate and of the N layers after it, is one
    // stretch of memory.
    std::vector<uint32_t> table_;
    std::vector<float> constant_;
};

class HorizonForecast {
  public:
    explicit HorizonForecast(std::shared_ptr<const HorizonCoefficients> coefficients);

    // Layer `position` chose `expert_ids` (each below E); writes its forecast as of now, out[num_out],
    // num_out <= E.
    void observe(int64_t position, const ExpertIds& expert_ids, float* out, int64_t num_out);

    // Writes the forecast of a layer as of its last event; what other layers chose since does not count.
    void forecast(int64_t position, float* out, int64_t num_out) const;

    float* parts(int64_t position) { return parts_.data() + position * num_rates_ * num_experts_; }
    int64_t num_layers() const { return num_layers_; }
    int64_t num_experts() const { return num_experts_; }
    int64_t num_rates() const { return num_rates_; }

  private:
    float* said(int64_t position, int64_t n) {
        return said_.data() + (position * num_before_ + n) * num_experts_;
    }

    std::shared_ptr<const HorizonCoefficients> coefficients_;
    int64_t num_layers_, num_experts_, num_rates_, num_before_;
    std::vector<float> parts_;           // (L, R, E): each rate's contribution to the forecast
    std::vector<float> said_;            // (L, N, E): by a layer's last choice, of the one n + 1 after it
    std::vector<float> sum_;             // (R + N, E): scratch
    std::vector<const uint32_t*> rows_;  // scratch
    std::vector<const float*> terms_;    // scratch
};

}  // namespace moe
