// A pool's forecasts for planning/policies/horizon.py, kept up to date event by event, and who leaves first.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "planning/horizon_forecast.h"

namespace moe {

// A pool's forecasts and residents. Layers are rows in ascending order and appear as they are used, and so do
// experts; a layer without fitted coefficients is forecast by its experts' own frequencies.
class HorizonTable {
  public:
    static constexpr int32_t ABSENT = INT32_MAX;  // above every finite forecast

    // rates, coefficients: (R) of a layer without a fit.
    HorizonTable(std::vector<float> rates, std::vector<float> coefficients);

    // Layers of `fit`, by position. To be called before any other.
    void use_fit(std::shared_ptr<HorizonForecast> fit, std::vector<int64_t> fitted_layers);

    void reach(int64_t layer_idx, int64_t expert_id);
    void observe(int64_t layer_idx, const ExpertIds& expert_ids);
    void set_resident(int64_t layer_idx, int64_t expert_id, bool resident);

    // The `count` residents of the lowest forecasts, lowest first; ties go to the smaller (layer, expert).
    std::vector<std::pair<int64_t, int64_t>> lowest(int64_t count);

    std::vector<int64_t> layers() const;
    int64_t num_experts() const { return num_experts_; }
    int64_t num_rates() const { return static_cast<int64_t>(rates_.size()); }
    int64_t num_residents() const { return num_residents_; }
    const std::vector<float>& forecast(int64_t row) const { return rows_[row].forecast; }
    // (R, experts) what each rate contributes; set_parts makes the forecast anew.
    std::vector<float> parts(int64_t row);
    void set_parts(int64_t row, const float* parts);

  private:
    struct Row {
        int64_t layer_idx;
        int64_t position;               // in the fit; -1: none
        std::vector<float> parts;       // (R, experts), without a fit
        std::vector<float> forecast;    // (experts)
        std::vector<uint8_t> resident;  // (experts)
        std::vector<int32_t> ranks;     // (experts) in the order of the forecasts; ABSENT: no resident
        int64_t lowest = -1;            // resident of the lowest rank; -1: none
        bool is_ranked = false;         // whether ranks, lowest and its place in lowest_ranks_ are up to date
    };

    Row& row_of(int64_t layer_idx);
    void widen(Row& row);
    bool is_fitted(const Row& row) const;
    void observe_generic(Row& row, const ExpertIds& expert_ids);
    void sum_parts(Row& row) const;
    void rank(Row& row);
    void find_lowest(Row& row);
    void forget_ranks(Row& row);
    // Whether resident `a` leaves before resident `b` of the same row.
    static bool comes_before(const Row& row, int64_t a, int64_t b) {
        return row.ranks[a] < row.ranks[b] || (row.ranks[a] == row.ranks[b] && a < b);
    }

    std::vector<float> rates_, coefficients_;
    std::shared_ptr<HorizonForecast> fit_;
    std::vector<int64_t> fitted_layers_;
    std::vector<Row> rows_;              // ascending layers
    std::vector<int32_t> lowest_ranks_;  // (rows) ABSENT: none
    std::vector<int64_t> not_ranked_;    // rows that are not, each once or oftener
    int64_t num_experts_ = 0, num_residents_ = 0;
};

}  // namespace moe
