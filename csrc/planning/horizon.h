// The forecasts of planning/policies/horizon.py, kept up to date event by event, and who leaves first.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace moe {

using ExpertIds = std::vector<int64_t>;

// Coefficients fitted to a checkpoint. L layers of E experts; R rates of decayed frequencies; N layers before
// that are looked at.
class HorizonForecast {
  public:
    HorizonForecast(int64_t num_layers, int64_t num_experts, std::vector<float> rates, int64_t num_before,
                    const float* own,       // (L, E, R, E): own[l][i][r][j]
                    const float* before,    // (L, N, E, E)
                    const float* constant)  // (L, E)
        ;

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
    void fill_row(int64_t position, int64_t expert_id, const float* own, const float* before);
    float* said(int64_t position, int64_t n) {
        return said_.data() + (position * num_before_ + n) * num_experts_;
    }

    int64_t num_layers_, num_experts_, num_rates_, num_before_;
    int64_t row_size_;  // (R + N) * E, rounded up to what is summed at once
    std::vector<float> rates_;
    // (L, E, row_size / 2), two bfloat16 a word (horizon.cpp's half_of); memory traffic is what an event
    // costs: all that a choice says, of its own layer by each rate and of the N layers after it, is one
    // stretch of memory.
    std::vector<uint32_t> table_;
    std::vector<float> constant_;
    std::vector<float> parts_;           // (L, R, E): each rate's contribution to the forecast
    std::vector<float> said_;            // (L, N, E): by a layer's last choice, of the one n + 1 after it
    std::vector<float> sum_;             // (R + N, E): scratch
    std::vector<const uint32_t*> rows_;  // scratch
    std::vector<const float*> terms_;    // scratch
};

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
