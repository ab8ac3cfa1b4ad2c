#include "planning/horizon.h"

#include <algorithm>
#include <bit>
#include <utility>

#include "planning/wide.h"

namespace moe {

namespace {

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

MOE_WIDE void rank_residents(const float* forecast, const uint8_t* resident, int64_t count, int32_t* ranks) {
    for (int64_t i = 0; i < count; ++i) {
        const int32_t rank = ordered(forecast[i]);
        ranks[i] = resident[i] != 0 ? rank : HorizonTable::ABSENT;
    }
}

MOE_WIDE int64_t first_lowest(const int32_t* ranks, int64_t count) {
    int32_t lowest = HorizonTable::ABSENT;
    for (int64_t i = 0; i < count; ++i) lowest = std::min(lowest, ranks[i]);
    if (lowest == HorizonTable::ABSENT) return -1;
    return std::find(ranks, ranks + count, lowest) - ranks;
}

}  // namespace

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
        lowest_ranks_.assign(rows_.size(), ABSENT);
        not_ranked_.clear();
        for (std::size_t i = 0; i < rows_.size(); ++i) {  // rows have moved
            rows_[i].is_ranked = false;
            not_ranked_.push_back(static_cast<int64_t>(i));
        }
    }
    return *place;
}

// New experts have no history, so their parts and forecasts are 0.
void HorizonTable::widen(Row& row) {
    const auto before = static_cast<int64_t>(row.forecast.size());
    std::vector<float> parts(num_rates() * num_experts_, 0.0f);
    for (int64_t rate = 0; rate < num_rates(); ++rate) {
        std::copy_n(row.parts.data() + rate * before, before, parts.data() + rate * num_experts_);
    }
    row.parts = std::move(parts);
    row.forecast.resize(num_experts_, 0.0f);
    row.resident.resize(num_experts_, 0);
    row.ranks.resize(num_experts_);
    forget_ranks(row);
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
    forget_ranks(row);
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
    if (!row.is_ranked) return;
    row.ranks[expert_id] = resident ? ordered(row.forecast[expert_id]) : ABSENT;
    const bool is_lowest = resident && (row.lowest < 0 || comes_before(row, expert_id, row.lowest));
    if (is_lowest) {
        row.lowest = expert_id;
        lowest_ranks_[&row - rows_.data()] = row.ranks[expert_id];
    } else if (expert_id == row.lowest) {
        find_lowest(row);
    }
}

void HorizonTable::forget_ranks(Row& row) {
    if (row.is_ranked) not_ranked_.push_back(&row - rows_.data());
    row.is_ranked = false;
}

void HorizonTable::rank(Row& row) {
    if (row.is_ranked) return;
    rank_residents(row.forecast.data(), row.resident.data(), static_cast<int64_t>(row.forecast.size()),
                   row.ranks.data());
    find_lowest(row);
    row.is_ranked = true;
}

void HorizonTable::find_lowest(Row& row) {
    row.lowest = first_lowest(row.ranks.data(), static_cast<int64_t>(row.ranks.size()));
    lowest_ranks_[&row - rows_.data()] = row.lowest < 0 ? ABSENT : row.ranks[row.lowest];
}

std::vector<std::pair<int64_t, int64_t>> HorizonTable::lowest(int64_t count) {
    for (const int64_t index : not_ranked_) rank(rows_[index]);
    not_ranked_.clear();
    std::vector<std::pair<int64_t, int64_t>> found;  // (row, expert) at first
    while (static_cast<int64_t>(found.size()) < count) {
        const int64_t best = first_lowest(lowest_ranks_.data(), static_cast<int64_t>(lowest_ranks_.size()));
        if (best < 0) break;
        Row& row = rows_[best];
        found.emplace_back(best, row.lowest);
        row.ranks[row.lowest] = ABSENT;  // out of the way for the next one
        find_lowest(row);
    }
    for (auto pair = found.rbegin(); pair != found.rend(); ++pair) {  // back again, the lowest last
        Row& row = rows_[pair->first];
        row.lowest = pair->second;
        lowest_ranks_[pair->first] = row.ranks[row.lowest] = ordered(row.forecast[row.lowest]);
        pair->first = row.layer_idx;
    }
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
    forget_ranks(row);
}

}  // namespace moe
