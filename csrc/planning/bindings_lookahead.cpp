// What Python sees of the look-ahead for one token; predictors/one_token.py is the only caller.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <optional>

#include "planning/kept_lookahead.h"
#include "planning/layer_pace.h"
#include "planning/prefetch_plan.h"

namespace py = pybind11;
using moe::KeptLookahead;
using moe::LayerPace;
using moe::Lookahead;

namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Bfloat16s = py::array_t<uint16_t, py::array::c_style>;

moe::RouteHistory history_of(Floats& previous, Floats& frequency, float decay) {
    const bool agree = previous.ndim() == 2 && frequency.ndim() == 2 &&
                       previous.shape(0) == frequency.shape(0) && previous.shape(1) == frequency.shape(1);
    if (!agree) throw py::value_error("Lookahead: previous and frequency must both be (L, E)");
    return {previous.mutable_data(), frequency.mutable_data(), previous.shape(0), previous.shape(1), decay};
}

void add(KeptLookahead& self, int64_t layer_idx, int64_t later, const py::array& weight,
         const std::optional<Floats>& bias, int64_t top_k, float slope, float offset, int64_t history_row) {
    Lookahead::Target target{};
    if (py::isinstance<Floats>(weight)) {
        target.weight.floats = static_cast<const float*>(weight.data());
    } else if (py::isinstance<Bfloat16s>(weight)) {
        target.weight.bfloat16s = static_cast<const uint16_t*>(weight.data());
    } else {
        throw py::value_error("Lookahead.add: weight float32, or bfloat16 as uint16, in rows wanted");
    }
    const moe::RouteHistory& history = self.lookahead.history();
    const int64_t experts = weight.ndim() == 2 ? weight.shape(0) : 0;
    const int64_t features = weight.ndim() == 2 ? weight.shape(1) : 0;
    const int64_t past = 2 * history.num_experts + 1, extra = features - self.hidden_size;
    const bool fits = extra == 0 || extra == past || extra == past + history.num_experts;
    const bool has_row = 0 <= history_row && history_row < history.num_layers;
    if (!fits || !has_row || experts > history.num_experts || top_k < 1 || top_k >= experts ||
        (bias && (bias->ndim() != 1 || bias->shape(0) != experts)))
        throw py::value_error("Lookahead.add: the shapes, top_k or history_row do not fit");
    target.layer_idx = later;
    target.bias = bias ? bias->data() : nullptr;
    target.num_experts = experts;
    target.num_features = features;
    target.top_k = top_k;
    target.slope = slope;
    target.offset = offset;
    target.history_row = history_row;
    self.lookahead.add(layer_idx, target);
    self.kept.push_back(weight);
    if (bias) self.kept.push_back(*bias);
}

void add_answers(KeptLookahead& self, int64_t layer_idx, int64_t later, const Floats& directions,
                 const Floats& answers) {
    Lookahead::Target* const target = self.lookahead.target(layer_idx, later);
    if (target == nullptr) throw py::value_error("Lookahead.add_answers: there is no such forecast");
    const bool fits = directions.ndim() == 2 && directions.shape(1) == self.hidden_size &&
                      answers.ndim() == 3 && answers.shape(0) == self.lookahead.history().num_experts &&
                      answers.shape(1) == directions.shape(0) && answers.shape(2) == target->num_experts;
    if (!fits) throw py::value_error("Lookahead.add_answers: directions (D, H), answers (E, D, E) wanted");
    target->directions = directions.data();
    target->answers = answers.data();
    target->num_directions = directions.shape(0);
    self.kept.push_back(directions);
    self.kept.push_back(answers);
}

using SlotTable = py::array_t<uint64_t, py::array::c_style>;

void leave_out(KeptLookahead& self, const std::map<int64_t, py::array>& slot_tables) {
    for (const auto& [layer_idx, table] : slot_tables) {
        if (!py::isinstance<SlotTable>(table) || table.ndim() != 2)
            throw py::value_error("Lookahead.leave_out: tables (E, n) of uint64 in rows wanted");
    }
    self.lookahead.leave_out_none();
    self.slot_tables = slot_tables;
    for (const auto& [layer_idx, table] : slot_tables) {
        self.lookahead.leave_out(layer_idx, static_cast<const uint64_t*>(table.data()), table.shape(0),
                                 table.shape(1));
    }
}

// hidden: the address of (hidden_size) floats.
py::list likely(KeptLookahead& self, int64_t layer_idx, int64_t depth, uintptr_t hidden,
                const std::vector<int64_t>& expert_ids, const std::vector<float>& weights, float threshold) {
    self.check_choice(expert_ids, weights);
    const auto found = self.lookahead.likely(layer_idx, depth, reinterpret_cast<const float*>(hidden),
                                             expert_ids, weights, threshold);
    py::list out(found.size());
    for (size_t i = 0; i < found.size(); ++i)
        out[i] = py::make_tuple(found[i].windows, found[i].layer_idx, found[i].expert_id, found[i].chance);
    return out;
}

using GuessTuple = std::tuple<int64_t, int64_t, int64_t, double, int64_t>;

std::vector<std::pair<int64_t, int64_t>> plan_reads(const std::vector<GuessTuple>& guesses,
                                                    double queued_bytes, double window_bytes,
                                                    double threshold) {
    std::vector<moe::Guess> wanted;
    for (const auto& [windows, layer_idx, expert_id, probability, num_bytes] : guesses)
        wanted.push_back({windows, layer_idx, expert_id, probability, num_bytes});
    std::vector<std::pair<int64_t, int64_t>> plan;
    for (const moe::Guess& guess : moe::plan_reads(std::move(wanted), queued_bytes, window_bytes, threshold))
        plan.emplace_back(guess.layer_idx, guess.expert_id);
    return plan;
}

void register_layer_pace(py::module_& m) {
    py::class_<LayerPace>(m, "LayerPace", "What looking ahead costs and may save; planning/layer_pace.py.")
        .def(py::init<double, double>(), py::arg("window_s"), py::arg("submit_s"))
        .def_readwrite("window_s", &LayerPace::window_s)
        .def_readwrite("submit_s", &LayerPace::submit_s)
        .def_readwrite("read_s", &LayerPace::read_s)
        .def_readwrite("predict_s", &LayerPace::predict_s)
        .def_readonly("num_steps", &LayerPace::num_steps)
        .def("begin_step", &LayerPace::begin_step, "Forget where the last forward pass ended.")
        .def("rests", &LayerPace::rests, py::arg("layer_idx"), py::arg("needs"),
             "Note what a layer needed; whether for long no layer needed what was not resident.")
        .def("look", &LayerPace::look, py::arg("now"), py::arg("stall_s"), "Measure the window.")
        .def("is_worth_predicting", &LayerPace::is_worth_predicting, py::arg("layer_idx"),
             "Whether what a prediction may save is above what it takes.")
        .def("predicted", &LayerPace::predicted, py::arg("seconds"), "Note what a prediction took.")
        .def("submitted", &LayerPace::submitted, py::arg("seconds"), py::arg("num_reads"),
             "Note what asking for reads took.")
        .def("mean_needs", &LayerPace::mean_needs, "Of all layers, smoothed; None before any step.");
}

void observe_choice(KeptLookahead& self, int64_t row, const std::vector<int64_t>& expert_ids,
                    const std::vector<float>& weights) {
    self.check_choice(expert_ids, weights);
    if (row < 0 || row >= self.lookahead.history().num_layers)
        throw py::value_error("Lookahead.observe: there is no row " + std::to_string(row));
    self.lookahead.history().observe(row, expert_ids, weights);
}

}  // namespace

namespace moe {

KeptLookahead::KeptLookahead(int64_t hidden_size, Floats previous, Floats frequency, float decay)
    : lookahead(hidden_size, history_of(previous, frequency, decay)),
      hidden_size(hidden_size),
      kept{std::move(previous), std::move(frequency)} {}

void KeptLookahead::check_choice(const std::vector<int64_t>& expert_ids, const std::vector<float>& weights) {
    const int64_t experts = lookahead.history().num_experts;
    const bool known = std::all_of(expert_ids.begin(), expert_ids.end(),
                                   [&](int64_t id) { return 0 <= id && id < experts; });
    if (!known || expert_ids.size() != weights.size())
        throw py::value_error("Lookahead: an expert id is out of range, or there is not a weight for each");
}

}  // namespace moe

void register_lookahead(py::module_& m) {
    register_layer_pace(m);
    m.def("plan_reads", &plan_reads, py::arg("guesses"), py::arg("queued_bytes"), py::arg("window_bytes"),
          py::arg("threshold"),
          "Of (windows, layer_idx, expert_id, probability, num_bytes) what to read now, (layer_idx, "
          "expert_id), "
          "in order.");
    py::class_<KeptLookahead>(m, "Lookahead",
                              "Forecasts for one token, and what they remember of earlier ones.")
        .def(py::init<int64_t, Floats, Floats, float>(), py::arg("hidden_size"),
             py::arg("previous").noconvert(), py::arg("frequency").noconvert(), py::arg("decay"))
        .def("add", &add, py::arg("layer_idx"), py::arg("later"), py::arg("weight"), py::arg("bias"),
             py::arg("top_k"), py::arg("slope"), py::arg("offset"), py::arg("history_row"),
             "Forecast a later layer after layer_idx has routed; nearest first.")
        .def("add_answers", &add_answers, py::arg("layer_idx"), py::arg("later"),
             py::arg("directions").noconvert(), py::arg("answers").noconvert(),
             "Let a forecast count what each chosen expert adds.")
        .def("leave_out", &leave_out, py::arg("slot_tables"),
             "Return no expert that has a slot: whose row of its layer's table does not begin with 0.")
        .def("likely", &likely, py::arg("layer_idx"), py::arg("depth"), py::arg("hidden"),
             py::arg("expert_ids"), py::arg("weights"), py::arg("threshold"),
             "(layers ahead, layer_idx, expert_id, probability), nearest layer and most probable first.")
        .def(
            "chosen",
            [](KeptLookahead& self, int64_t layer_idx, const std::vector<int64_t>& expert_ids) {
                self.lookahead.chosen(layer_idx, expert_ids);
            },
            py::arg("layer_idx"), py::arg("expert_ids"), "Learn how often guesses of a layer come true.")
        .def("observe", &observe_choice, py::arg("row"), py::arg("expert_ids"), py::arg("weights"),
             "Take in one token's choice.");
}
