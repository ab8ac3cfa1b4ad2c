// What predictors/native_gate.py sees of csrc/planning.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "planning/gate_chances.h"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float, py::array::c_style>;

// hidden: the address of (hidden_size) floats; weight: float32, or bfloat16 as uint16.
Floats gate_chances(uintptr_t hidden, const py::array& weight, const std::optional<Floats>& bias,
                    int64_t top_k, float slope, float offset) {
    using Bfloat16s = py::array_t<uint16_t, py::array::c_style>;
    moe::GateWeight rows;
    if (py::isinstance<Floats>(weight)) {
        rows.floats = static_cast<const float*>(weight.data());
    } else if (py::isinstance<Bfloat16s>(weight)) {
        rows.bfloat16s = static_cast<const uint16_t*>(weight.data());
    } else {
        throw py::value_error("gate_chances: weight float32, or bfloat16 as uint16, in rows wanted");
    }
    if (weight.ndim() != 2 || top_k < 1 || top_k >= weight.shape(0) ||
        (bias && (bias->ndim() != 1 || bias->shape(0) != weight.shape(0)))) {
        throw py::value_error("gate_chances: weight (E, H), bias (E) or None, 1 <= top_k < E wanted");
    }
    Floats out(weight.shape(0));
    moe::gate_chances(reinterpret_cast<const float*>(hidden), rows, bias ? bias->data() : nullptr,
                      weight.shape(0), weight.shape(1), top_k, slope, offset, out.mutable_data());
    return out;
}

}  // namespace

void register_gate_chances(py::module_& m) {
    m.def("gate_chances", &gate_chances, py::arg("hidden"), py::arg("weight"), py::arg("bias"),
          py::arg("top_k"), py::arg("slope"), py::arg("offset"),
          "Probabilities (E) that a router chooses each expert for one token.");
}
