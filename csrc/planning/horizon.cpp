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

// One addition per element in any case: wider registers change the time only.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MOE_WIDE __attribute__((target_clones("avx2", "default")))
#else
#define MOE_WIDE
#endif

MOE_WIDE void add(float* to, const uint16_t* from, int64_t count) {
    for (int64_t j = 0; j < count; ++j) to[j] += std::bit_cast<float>(uint32_t{from[j]} << 16);
}

MOE_WIDE void add(float* to, const float* from, int64_t count) {
    for (int64_t j = 0; j < count; ++j) to[j] += from[j];
}

MOE_WIDE void scale(float* values, float factor, int64_t count) {
    for (int64_t j = 0; j < count; ++j) values[j] *= factor;
}

// An int that is ordered as the float is: integer minima are vectorized, those of floats are not.
int32_t ordered(float value) {
    const auto bits = std::bit_cast<int32_t>(value + 0.0f);  // -0 becomes 0
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

MOE_WIDE int64_t first_lowest(const int32_t* ranks, int64_t count) {
    int32_t lowest = HorizonTable::ABSENT;
    for (int64_t i = 0; i < count; ++i) lowest = std::min(lowest, ranks[i]);
    if (lowest == HorizonTable::ABSENT) return -1;
    return std::find(ranks, ranks + count, lowest) - ranks;
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

void HorizonForecast::observe(int64_t position, const ExpertIds& expert_ids, float* out, int64_t num_out) {
    const int64_t block = num_rates_ * num_experts_;
    const uint16_t* gain = gain_.data() + position * num_experts_ * block;
    for (const int64_t expert_id : expert_ids) {  // rows that no hardware foresees: ask for all at once
        for (int64_t j = 0; j < block; j += 32) __builtin_prefetch(gain + expert_id * block + j);
    }
    float* own = parts(position);
    for (int64_t rate = 0; rate < num_rates_; ++rate) {
        scale(own + rate * num_experts_, 1.0f - rates_[rate], num_experts_);
    }
    std::copy_n(constant_.data() + position * num_experts_, num_experts_, sum_.data());
    for (int64_t n = 0; n < num_before_; ++n) {
        const int64_t other = ((position - 1 - n) % num_layers_ + num_layers_) % num_layers_;
        const uint16_t* rows = before_.data() + (position * num_before_ + n) * num_experts_ * num_experts_;
        for (const int64_t expert_id : last_chosen_[other]) {
            add(sum_.data(), rows + expert_id * num_experts_, num_experts_);
        }
    }
    for (const int64_t expert_id : expert_ids) add(own, gain + expert_id * block, block);
    for (int64_t rate = 0; rate < num_rates_; ++rate)
        add(sum_.data(), own + rate * num_experts_, num_experts_);
    last_chosen_[position] = expert_ids;
    std::copy_n(sum_.data(), num_out, out);
    prefetch_before((position + 1) % num_layers_);
}

// What the next layer will add of the layers before it is known already; it waits for its router meanwhile.
void HorizonForecast::prefetch_before(int64_t position) const {
    for (int64_t n = 0; n < num_before_; ++n) {
        const int64_t other = ((position - 1 - n) % num_layers_ + num_layers_) % num_layers_;
        const uint16_t* rows = before_.data() + (position * num_before_ + n) * num_experts_ * num_experts_;
        for (const int64_t expert_id : last_chosen_[other]) {
            for (int64_t j = 0; j < num_experts_; j += 32)
                __builtin_prefetch(rows + expert_id * num_experts_ + j);
        }
    }
}

void HorizonForecast::forecast(int64_t position, float* out, int64_t num_out) const {
    std::copy_n(constant_.data() + position * num_experts_, num_out, out);
    const float* own = parts_.data() + position * num_rates_ * num_experts_;
    for (int64_t rate = 0; rate < num_rates_; ++rate) add(out, own + rate * num_experts_, num_out);
}

HorizonTable::HorizonTable(std::vector<float> rates, std::vector<float> coefficients)
    : rates_(std::move(rates)), coefficients_(std::move(coefficients)) {}

void HorizonTable::use_fit(std::shared_ptr<HorizonForecast> fit, std::vector<int64_t> fitted_layers) {
    fit_ = std::move(fit);
    fitted_layers_ = std::move(fitted_layers);
}

void HorizonTable::reach(int64_t layer_idx, int64_t expert_id) {
    if (expert_id >= num_experts_) {
        num_experts_ = expert_id + 1;
        for (Row& row : rows_) widen(row);
    }
    row_of(layer_idx);
}

HorizonTable::Row& HorizonTable::row_of(int64_t layer_idx) {
    const auto is_below = [](const Row& row, int64_t layer) { return row.layer_idx < layer; };
    auto place = std::lower_bound(rows_.begin(), rows_.end(), layer_idx, is_below);
    if (place == rows_.end() || place->layer_idx != layer_idx) {
        const auto fitted = std::find(fitted_layers_.begin(), fitted_layers_.end(), layer_idx);
        const int64_t position = fitted == fitted_layers_.end() ? -1 : fitted - fitted_layers_.begin();
        place = rows_.insert(place, Row{layer_idx, position, {}, {}, {}, {}});
        widen(*place);
    }
    return *place;
}

// New experts have no history, so their parts and forecasts are 0.
void HorizonTable::widen(Row& row) const {
    const auto before = static_cast<int64_t>(row.forecast.size());
    std::vector<float> parts(num_rates() * num_experts_, 0.0f);
    for (int64_t rate = 0; rate < num_rates(); ++rate) {
        std::copy_n(row.parts.data() + rate * before, before, parts.data() + rate * num_experts_);
    }
    row.parts = std::move(parts);
    row.forecast.resize(num_experts_, 0.0f);
    row.resident.resize(num_experts_, 0);
    row.ranks.resize(num_experts_);
    row.is_ranked = false;
}

bool HorizonTable::is_fitted(const Row& row) const {
    return row.position >= 0 && num_experts_ <= fit_->num_experts();
}

void HorizonTable::observe(int64_t layer_idx, const ExpertIds& expert_ids) {
    reach(layer_idx, *std::max_element(expert_ids.begin(), expert_ids.end()));
    Row& row = row_of(layer_idx);
    if (is_fitted(row)) {
        fit_->observe(row.position, expert_ids, row.forecast.data(), num_experts_);
    } else {
        observe_generic(row, expert_ids);
    }
    row.is_ranked = false;
}

void HorizonTable::observe_generic(Row& row, const ExpertIds& expert_ids) {
    for (int64_t rate = 0; rate < num_rates(); ++rate) {
        float* parts = row.parts.data() + rate * num_experts_;
        scale(parts, 1.0f - rates_[rate], num_experts_);
        for (const int64_t expert_id : expert_ids) parts[expert_id] += rates_[rate] * coefficients_[rate];
    }
    sum_parts(row);
}

void HorizonTable::sum_parts(Row& row) const {
    std::fill(row.forecast.begin(), row.forecast.end(), 0.0f);
    for (int64_t rate = 0; rate < num_rates(); ++rate) {
        add(row.forecast.data(), row.parts.data() + rate * num_experts_, num_experts_);
    }
}

void HorizonTable::set_resident(int64_t layer_idx, int64_t expert_id, bool resident) {
    reach(layer_idx, expert_id);
    Row& row = row_of(layer_idx);
    num_residents_ += resident - row.resident[expert_id];
    row.resident[expert_id] = resident;
    row.is_ranked = false;
}

void HorizonTable::rank(Row& row) {
    for (std::size_t i = 0; i < row.forecast.size(); ++i) {
        row.ranks[i] = row.resident[i] ? ordered(row.forecast[i]) : ABSENT;
    }
    row.lowest = first_lowest(row.ranks.data(), static_cast<int64_t>(row.ranks.size()));
    row.is_ranked = true;
}

std::vector<std::pair<int64_t, int64_t>> HorizonTable::lowest(int64_t count) {
    std::vector<std::pair<int64_t, int64_t>> found;
    std::vector<Row*> taken;
    for (Row& row : rows_) {
        if (!row.is_ranked) rank(row);
    }
    while (static_cast<int64_t>(found.size()) < count) {
        Row* best = nullptr;
        int32_t best_rank = ABSENT;
        for (Row& row : rows_) {
            if (row.lowest >= 0 && row.ranks[row.lowest] < best_rank) {
                best = &row;
                best_rank = row.ranks[row.lowest];
            }
        }
        if (best == nullptr) break;
        found.emplace_back(best->layer_idx, best->lowest);
        best->ranks[best->lowest] = ABSENT;  // out of the way for the next one
        best->lowest = first_lowest(best->ranks.data(), static_cast<int64_t>(best->ranks.size()));
        taken.push_back(best);
    }
    for (Row* row : taken) row->is_ranked = false;
    return found;
}

std::vector<int64_t> HorizonTable::layers() const {
    std::vector<int64_t> result;
    for (const Row& row : rows_) result.push_back(row.layer_idx);
    return result;
}

std::vector<float> HorizonTable::parts(int64_t index) {
    const Row& row = rows_[index];
    if (!is_fitted(row)) return row.parts;
    std::vector<float> result(num_rates() * num_experts_);
    const float* own = fit_->parts(row.position);
    for (int64_t rate = 0; rate < num_rates(); ++rate) {
        std::copy_n(own + rate * fit_->num_experts(), num_experts_, result.data() + rate * num_experts_);
    }
    return result;
}

void HorizonTable::set_parts(int64_t index, const float* parts) {
    Row& row = rows_[index];
    if (is_fitted(row)) {
        float* own = fit_->parts(row.position);
        for (int64_t rate = 0; rate < num_rates(); ++rate) {
            std::copy_n(parts + rate * num_experts_, num_experts_, own + rate * fit_->num_experts());
        }
        fit_->forecast(row.position, row.forecast.data(), num_experts_);
    } else {
        std::copy_n(parts, num_rates() * num_experts_, row.parts.data());
        sum_parts(row);
    }
    row.is_ranked = false;
}

}  // namespace moe
