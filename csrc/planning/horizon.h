// The forecasts of planning/policies/horizon.py, kept up to date event by event.
#pragma once

#include <cstdint>
#include <vector>

namespace moe {

// L layers of E experts; R rates of decayed frequencies; N layers before that are looked at.
class HorizonForecast {
  public:
    HorizonForecast(int64_t num_layers, int64_t num_experts, std::vector<float> rates, int64_t num_before,
                    const float* own,       // (L, E, R, E): own[l][i][r][j]
                    const float* before,    // (L, N, E, E)
                    const float* constant)  // (L, E)
        ;

    // Layer `position` chose `expert_ids` (each below E); writes its forecast as of now, out[num_out],
    // num_out <= E.
    void observe(int64_t position, const std::vector<int64_t>& expert_ids, double* out, int64_t num_out);

    int64_t num_layers() const { return num_layers_; }
    int64_t num_experts() const { return num_experts_; }

  private:
    int64_t num_layers_, num_experts_, num_rates_, num_before_;
    std::vector<float> rates_;
    std::vector<uint16_t> gain_, before_;  // bfloat16: memory traffic is what an event costs
    std::vector<float> constant_;
    std::vector<float> parts_;                       // (L, R, E): each rate's contribution to the forecast
    std::vector<std::vector<int64_t>> last_chosen_;  // by layer
    std::vector<float> sum_;                         // (E): scratch
};

}  // namespace moe
