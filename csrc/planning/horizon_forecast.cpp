#include "planning/horizon_forecast.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "common/half.h"
#include "planning/wide.h"

namespace moe {

namespace {

constexpr int64_t kLanes = 16, kParts = 2;
constexpr int64_t kPair = 2 * kLanes;       // values in a vector of words
constexpr int64_t kBlock = kParts * kPair;  // sums that stay in registers

// A row's element j is one half of a word: two vectors of floats come of one of words by a shift and a mask,
// where widening 16 bits to 32 costs more than adding.
struct Half {
    int64_t word;
    int shift;
};
Half half_of(int64_t j) {
    const int64_t within = j % kPair;
    return {j / kPair * kLanes + within % kLanes, within < kLanes ? 0 : 16};
}

// sum[j] = the rows' elements j, in the rows' order; count is a multiple of kBlock.
MOE_WIDE void sum_rows(float* sum, const uint32_t* const* rows, int64_t num_rows, int64_t count) {
    using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
    using Floats = float __attribute__((vector_size(4 * kLanes)));
    for (int64_t first = 0; first < count; first += kBlock) {
        Floats acc[2 * kParts] = {};
        for (int64_t row = 0; row < num_rows; ++row) {
            const uint32_t* from = rows[row] + first / 2;
#pragma GCC unroll 2
            for (int64_t part = 0; part < kParts; ++part) {
                Words words;
                std::memcpy(&words, from + part * kLanes, sizeof words);
                acc[2 * part] += std::bit_cast<Floats>(words << 16);
                acc[2 * part + 1] += std::bit_cast<Floats>(words & 0xffff0000u);
            }
        }
        std::memcpy(sum + first, acc, sizeof acc);
    }
}

// out[j] = the terms' elements j, in the terms' order, of at least one term.
MOE_WIDE void sum_terms(float* out, const float* const* terms, int64_t num_terms, int64_t count) {
    using Floats = float __attribute__((vector_size(4 * kLanes)));
    int64_t first = 0;
    for (; first + kLanes <= count; first += kLanes) {
        Floats acc, term;
        std::memcpy(&acc, terms[0] + first, sizeof acc);
        for (int64_t i = 1; i < num_terms; ++i) {
            std::memcpy(&term, terms[i] + first, sizeof term);
            acc += term;
        }
        std::memcpy(out + first, &acc, sizeof acc);
    }
    for (; first < count; ++first) {
        float acc = terms[0][first];
        for (int64_t i = 1; i < num_terms; ++i) acc += terms[i][first];
        out[first] = acc;
    }
}

MOE_WIDE void scale_and_add(float* values, float factor, const float* from, int64_t count) {
    for (int64_t j = 0; j < count; ++j) values[j] = values[j] * factor + from[j];
}

}  // namespace

HorizonCoefficients::HorizonCoefficients(int64_t num_layers, int64_t num_experts, std::vector<float> rates,
                                         int64_t num_before, const float* own, const float* before,
                                         const float* constant)
    : num_layers_(num_layers),
      num_experts_(num_experts),
      num_before_(num_before),
      rates_(std::move(rates)),
      row_size_(((num_rates() + num_before) * num_experts + kBlock - 1) / kBlock * kBlock),
      table_(num_layers * num_experts * row_size_ / 2),
      constant_(constant, constant + num_layers * num_experts) {
    for (int64_t position = 0; position < num_layers; ++position) {
        for (int64_t expert_id = 0; expert_id < num_experts; ++expert_id) {
            fill_row(position, expert_id, own, before);
        }
    }
}

void HorizonCoefficients::fill_row(int64_t position, int64_t expert_id, const float* own,
                                   const float* before) {
    uint32_t* row = table_.data() + (position * num_experts_ + expert_id) * row_size_ / 2;
    int64_t j = 0;
    const auto append = [&](float value) {
        const Half half = half_of(j++);
        row[half.word] |= uint32_t(to_bfloat16(value)) << half.shift;
    };
    const float* from = own + (position * num_experts_ + expert_id) * num_rates() * num_experts_;
    for (int64_t rate = 0; rate < num_rates(); ++rate) {  // a choice raises a decayed frequency by its rate
        for (int64_t i = 0; i < num_experts_; ++i) append(*from++ * rates_[rate]);
    }
    for (int64_t n = 0; n < num_before_; ++n) {
        const int64_t later = (position + 1 + n) % num_layers_;
        from = before + ((later * num_before_ + n) * num_experts_ + expert_id) * num_experts_;
        for (int64_t i = 0; i < num_experts_; ++i) append(*from++);
    }
}

HorizonForecast::HorizonForecast(std::shared_ptr<const HorizonCoefficients> coefficients)
    : coefficients_(std::move(coefficients)),
      num_layers_(coefficients_->num_layers()),
      num_experts_(coefficients_->num_experts()),
      num_rates_(coefficients_->num_rates()),
      num_before_(coefficients_->num_before()),
      parts_(num_layers_ * num_rates_ * num_experts_, 0.0f),
      said_(num_layers_ * num_before_ * num_experts_, 0.0f),
      sum_(coefficients_->row_size()) {}

void HorizonForecast::observe(int64_t position, const ExpertIds& expert_ids, float* out, int64_t num_out) {
    rows_.clear();
    for (const int64_t expert_id : expert_ids) {
        rows_.push_back(coefficients_->row(position, expert_id));
    }
    sum_rows(sum_.data(), rows_.data(), static_cast<int64_t>(rows_.size()), coefficients_->row_size());
    float* own = parts(position);
    const float* sum = sum_.data();
    for (int64_t rate = 0; rate < num_rates_; ++rate) {
        scale_and_add(own + rate * num_experts_, 1.0f - coefficients_->rate(rate), sum, num_experts_);
        sum += num_experts_;
    }
    std::copy_n(sum, num_before_ * num_experts_, said(position, 0));
    terms_.assign(1, coefficients_->constant(position));
    for (int64_t n = 0; n < num_before_; ++n) {
        const int64_t other = ((position - 1 - n) % num_layers_ + num_layers_) % num_layers_;
        terms_.push_back(said(other, n));
    }
    for (int64_t rate = 0; rate < num_rates_; ++rate) terms_.push_back(own + rate * num_experts_);
    sum_terms(out, terms_.data(), static_cast<int64_t>(terms_.size()), num_out);
}

void HorizonForecast::forecast(int64_t position, float* out, int64_t num_out) const {
    std::vector<const float*> terms = {coefficients_->constant(position)};
    const float* own = parts_.data() + position * num_rates_ * num_experts_;
    for (int64_t rate = 0; rate < num_rates_; ++rate) terms.push_back(own + rate * num_experts_);
    sum_terms(out, terms.data(), static_cast<int64_t>(terms.size()), num_out);
}

}  // namespace moe
