// What looking ahead costs and may save, from layer step to layer step: planning/layer_pace.py natively, with
// its names and its arithmetic. Knows no clock: who measures passes seconds.
#pragma once

#include <cstdint>
#include <limits>
#include <map>
#include <optional>

namespace moe {

class LayerPace {
  public:
    static constexpr double kInfinite = std::numeric_limits<double>::infinity();

    LayerPace(double window_s, double submit_s) : window_s(window_s), submit_s(submit_s) {}

    double window_s;            // a layer's compute time; infinite: not known
    double submit_s;            // what asking for a read takes from computing
    double read_s = kInfinite;  // an expert's read, as they come
    double predict_s = 0.0;     // a prediction with planning its reads
    int64_t num_steps = 0;      // layer steps looked at

    void begin_step();
    bool rests(int64_t layer_idx, int64_t needs);
    void look(double now, double stall_s);
    bool is_worth_predicting(int64_t layer_idx) const;
    void predicted(double seconds);
    void submitted(double seconds, int64_t num_reads);
    std::optional<double> mean_needs() const;

  private:
    struct Look {
        double now, stall_s;
    };

    std::optional<Look> last_look_;
    int64_t steps_without_need_ = 0, last_layer_ = -1;
    std::map<int64_t, double> needs_;  // by layer: experts of a step that are not resident, smoothed
    std::map<int64_t, int64_t> next_layer_;
};

}  // namespace moe
