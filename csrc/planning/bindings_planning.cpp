// What Python sees of csrc/planning; moe_offload/planning/policies/horizon.py is the only caller.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>

#include "planning/horizon.h"

namespace py = pybind11;
using moe::HorizonForecast;

namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;

std::unique_ptr<HorizonForecast> make_horizon_forecast(const Floats& own, std::vector<float> rates,
                                                       const Floats& before, const Floats& constant) {
    if (own.ndim() != 4 || before.ndim() != 4 || constant.ndim() != 2) {
        throw py::value_error(
            "HorizonForecast: own (L, E, R, E), before (L, N, E, E), constant (L, E) wanted");
    }
    const int64_t layers = constant.shape(0), experts = constant.shape(1);
    const bool fits = own.shape(0) == layers && own.shape(1) == experts && own.shape(3) == experts &&
                      own.shape(2) == static_cast<int64_t>(rates.size()) && before.shape(0) == layers &&
                      before.shape(2) == experts && before.shape(3) == experts;
    if (!fits) throw py::value_error("HorizonForecast: the shapes of own, before and constant do not agree");
    return std::make_unique<HorizonForecast>(layers, experts, std::move(rates), before.shape(1), own.data(),
                                             before.data(), constant.data());
}

void observe(HorizonForecast& forecast, int64_t position, const std::vector<int64_t>& expert_ids,
             Doubles& out) {
    const bool known = std::all_of(expert_ids.begin(), expert_ids.end(), [&](int64_t expert_id) {
        return 0 <= expert_id && expert_id < forecast.num_experts();
    });
    if (position < 0 || position >= forecast.num_layers() || !known || out.ndim() != 1 ||
        out.shape(0) > forecast.num_experts()) {
        throw py::value_error("HorizonForecast.observe: layer, expert id or length of out out of range");
    }
    forecast.observe(position, expert_ids, out.mutable_data(), out.shape(0));
}

}  // namespace

void register_planning(py::module_& m) {
    py::class_<HorizonForecast>(m, "HorizonForecast")
        .def(py::init(&make_horizon_forecast), py::arg("own"), py::arg("rates"), py::arg("before"),
             py::arg("constant"))
        .def("observe", &observe, py::arg("position"), py::arg("expert_ids"), py::arg("out").noconvert());
}
