#include "planning/gate_chances.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <vector>

namespace moe {

namespace {

// For functions of this file alone, as planning/wide.h says.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MOE_WIDE __attribute__((target_clones("avx2", "default")))
#else
#define MOE_WIDE
#endif

constexpr int64_t kLanes = 32;  // sums of their own, so that the compiler may keep them side by side

inline float widened(float value) {
    return value;
}
inline float widened(uint16_t bfloat16) {
    return std::bit_cast<float>(uint32_t{bfloat16} << 16);
}

template <class Weight>
inline __attribute__((always_inline)) float dot_of(const float* a, const Weight* b, int64_t count) {
    float sums[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * widened(b[i + lane]);
    }
    float sum = 0.0f;
    for (const float lane : sums) sum += lane;
    for (; i < count; ++i) sum += a[i] * widened(b[i]);
    return sum;
}

MOE_WIDE float dot(const float* a, const float* b, int64_t count) {
    return dot_of(a, b, count);
}
MOE_WIDE float dot_bfloat16(const float* a, const uint16_t* b, int64_t count) {
    return dot_of(a, b, count);
}
MOE_WIDE void add_rows(const float* a, const float* rows, float scale, int64_t num_rows, int64_t num_columns,
                       float* out) {
    for (int64_t i = 0; i < num_rows; ++i) {
        const float factor = scale * a[i];
        const float* const row = rows + i * num_columns;
        for (int64_t j = 0; j < num_columns; ++j) out[j] += factor * row[j];
    }
}

}  // namespace

void products(const float* hidden, const float* rows, int64_t num_rows, int64_t hidden_size, float* out) {
    for (int64_t i = 0; i < num_rows; ++i) out[i] = dot(hidden, rows + i * hidden_size, hidden_size);
}

void add_product(const float* a, const float* rows, float scale, int64_t num_rows, int64_t num_columns,
                 float* out) {
    add_rows(a, rows, scale, num_rows, num_columns, out);
}

void gate_chances(const float* hidden, const GateWeight& weight, const float* bias, int64_t num_experts,
                  int64_t hidden_size, int64_t top_k, float slope, float offset, float* out) {
    double sum = 0.0, squares = 0.0;
    for (int64_t i = 0; i < num_experts; ++i) {
        const int64_t row = i * hidden_size;
        out[i] = weight.floats != nullptr ? dot(hidden, weight.floats + row, hidden_size)
                                          : dot_bfloat16(hidden, weight.bfloat16s + row, hidden_size);
        if (bias != nullptr) out[i] += bias[i];
        sum += out[i];
    }
    const double mean = sum / static_cast<double>(num_experts);
    for (int64_t i = 0; i < num_experts; ++i) squares += (out[i] - mean) * (out[i] - mean);
    const double spread = std::sqrt(squares / static_cast<double>(num_experts)) + 1e-9;
    std::vector<float> sorted(out, out + num_experts);
    std::nth_element(sorted.begin(), sorted.begin() + top_k, sorted.end(), std::greater<>());
    const float lowest_chosen = *std::min_element(sorted.begin(), sorted.begin() + top_k);
    const float middle = 0.5f * (lowest_chosen + sorted[top_k]);
    for (int64_t i = 0; i < num_experts; ++i) {
        const auto far = static_cast<float>((out[i] - middle) / spread);
        out[i] = 1.0f / (1.0f + std::exp(-(slope * far + offset)));
    }
}

}  // namespace moe
