// A later layer's router asked early: probabilities instead of a choice (predictors/routers.py has the
// formula).
#pragma once

#include <cstdint>

namespace moe {

// (num_experts, hidden_size): one of the two.
struct GateWeight {
    const float* floats = nullptr;
    const uint16_t* bfloat16s = nullptr;
};

// out[i] = hidden . rows[i]
void products(const float* hidden, const float* rows, int64_t num_rows, int64_t hidden_size, float* out);

// out[j] += scale * sum over i of a[i] * rows[i][j]
void add_product(const float* a, const float* rows, float scale, int64_t num_rows, int64_t num_columns,
                 float* out);

// 1 / (1 + exp(-(slope * far + offset))), where far is how many standard deviations of the scores an expert's
// score is above the middle between the top_k-th and the next one.
void gate_chances(const float* hidden,  // (hidden_size)
                  const GateWeight& weight,
                  const float* bias,  // (num_experts) or null
                  int64_t num_experts, int64_t hidden_size, int64_t top_k, float slope, float offset,
                  float* out);  // (num_experts)

}  // namespace moe
