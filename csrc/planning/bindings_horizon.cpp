// What planning/policies/horizon.py sees of csrc/planning.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>

#include "planning/horizon.h"
#include "planning/horizon_forecast.h"

namespace py = pybind11;
using moe::ExpertIds;
using moe::HorizonCoefficients;
using moe::HorizonForecast;
using moe::HorizonTable;

namespace {

constexpr int64_t MAX_EXPERTS = 1 << 16;  // of a layer; the expert ids of a trace are uint16

using Floats = py::array_t<float, py::array::c_style>;

std::shared_ptr<HorizonCoefficients> make_coefficients(const Floats& own, std::vector<float> rates,
                                                       const Floats& before, const Floats& constant) {
    if (own.ndim() != 4 || before.ndim() != 4 || constant.ndim() != 2) {
        throw py::value_error(
            "HorizonCoefficients: own (L, E, R, E), before (L, N, E, E), constant (L, E) wanted");
    }
    const int64_t layers = constant.shape(0), experts = constant.shape(1);
    const bool fits = own.shape(0) == layers && own.shape(1) == experts && own.shape(3) == experts &&
                      own.shape(2) == static_cast<int64_t>(rates.size()) && before.shape(0) == layers &&
                      before.shape(2) == experts && before.shape(3) == experts;
    if (!fits)
        throw py::value_error("HorizonCoefficients: the shapes of own, before and constant do not agree");
    return std::make_shared<HorizonCoefficients>(layers, experts, std::move(rates), before.shape(1),
                                                 own.data(), before.data(), constant.data());
}

void check_expert_id(const char* op, int64_t expert_id) {
    if (expert_id < 0 || expert_id >= MAX_EXPERTS) {
        throw py::value_error(std::string(op) + ": expert id " + std::to_string(expert_id) + " out of range");
    }
}

void observe(HorizonForecast& forecast, int64_t position, const ExpertIds& expert_ids, Floats& out) {
    const bool known = std::all_of(expert_ids.begin(), expert_ids.end(), [&](int64_t expert_id) {
        return 0 <= expert_id && expert_id < forecast.num_experts();
    });
    if (position < 0 || position >= forecast.num_layers() || !known || out.ndim() != 1 ||
        out.shape(0) > forecast.num_experts()) {
        throw py::value_error("HorizonForecast.observe: layer, expert id or length of out out of range");
    }
    forecast.observe(position, expert_ids, out.mutable_data(), out.shape(0));
}

// expert_ids: ints. Taken item by item: a list of 8 through pybind11's own conversion costs as much as half
// of what is done with it.
void observe_layer(HorizonTable& table, int64_t layer_idx, const py::object& expert_ids) {
    const auto items = py::reinterpret_steal<py::object>(
        PySequence_Fast(expert_ids.ptr(), "HorizonTable.observe: a sequence of expert ids wanted"));
    if (!items) throw py::error_already_set();
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(items.ptr());
    if (count == 0) throw py::value_error("HorizonTable.observe: no expert ids");
    ExpertIds ids(static_cast<std::size_t>(count));
    for (Py_ssize_t i = 0; i < count; ++i) {
        ids[i] = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(items.ptr(), i));
        if (ids[i] == -1 && PyErr_Occurred()) throw py::error_already_set();
        check_expert_id("HorizonTable.observe", ids[i]);
    }
    table.observe(layer_idx, ids);
}

// steps: (layer_idx, expert_ids, weights), in their order.
void observe_steps(HorizonTable& table, const py::list& steps) {
    for (const py::handle step : steps) {
        if (!PyTuple_Check(step.ptr()) || PyTuple_GET_SIZE(step.ptr()) < 2)
            throw py::value_error("HorizonTable.observe_steps: (layer_idx, expert_ids, ...) wanted");
        const int64_t layer_idx = PyLong_AsLongLong(PyTuple_GET_ITEM(step.ptr(), 0));
        if (layer_idx == -1 && PyErr_Occurred()) throw py::error_already_set();
        observe_layer(table, layer_idx, py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(step.ptr(), 1)));
    }
}

// expert_ids: (L, K), a row for each of the table's layers.
void observe_layers(HorizonTable& table, const py::array_t<int64_t, py::array::c_style>& expert_ids) {
    const std::vector<int64_t> layers = table.layers();
    if (expert_ids.ndim() != 2 || expert_ids.shape(0) != static_cast<int64_t>(layers.size()) ||
        expert_ids.shape(1) == 0) {
        throw py::value_error("HorizonTable.observe_layers: expert ids (layers, K) wanted");
    }
    const int64_t top_k = expert_ids.shape(1);
    for (int64_t i = 0; i < expert_ids.size(); ++i) {
        check_expert_id("HorizonTable.observe_layers", expert_ids.data()[i]);
    }
    for (std::size_t row = 0; row < layers.size(); ++row) {
        const int64_t* ids = expert_ids.data(static_cast<int64_t>(row), 0);
        table.observe(layers[row], ExpertIds(ids, ids + top_k));
    }
}

void reach(HorizonTable& table, int64_t layer_idx, int64_t expert_id) {
    check_expert_id("HorizonTable.reach", expert_id);
    table.reach(layer_idx, expert_id);
}

// keys: (layer_idx, expert_id) tuples, the residents' own objects.
void set_residents(HorizonTable& table, const py::list& keys, bool resident) {
    for (const py::handle key : keys) {
        if (!PyTuple_Check(key.ptr()) || PyTuple_GET_SIZE(key.ptr()) != 2) {
            throw py::value_error("HorizonTable: (layer_idx, expert_id) wanted");
        }
        const int64_t layer_idx = PyLong_AsLongLong(PyTuple_GET_ITEM(key.ptr(), 0));
        const int64_t expert_id = PyLong_AsLongLong(PyTuple_GET_ITEM(key.ptr(), 1));
        if (PyErr_Occurred()) throw py::error_already_set();
        check_expert_id("HorizonTable.lowest", expert_id);
        table.set_resident(layer_idx, expert_id, resident);
    }
}

// A new object of `type`, a tuple's subclass: what Python's own constructor would make, sooner.
py::object make_key(PyTypeObject* type, int64_t layer_idx, int64_t expert_id) {
    auto key = py::reinterpret_steal<py::object>(type->tp_alloc(type, 2));
    if (!key) throw py::error_already_set();
    PyTuple_SET_ITEM(key.ptr(), 0, PyLong_FromLongLong(layer_idx));
    PyTuple_SET_ITEM(key.ptr(), 1, PyLong_FromLongLong(expert_id));
    return key;
}

// Tells the table who left and who came since (both lists are emptied), then asks for the residents of the
// lowest forecasts: `count`, or fewer where there are fewer, and as many more as are no candidates.
py::list lowest(HorizonTable& table, py::list& evicted, py::list& inserted, int64_t count,
                int64_t num_candidates, const py::type& key_class) {
    auto* type = reinterpret_cast<PyTypeObject*>(key_class.ptr());
    if (!PyType_IsSubtype(type, &PyTuple_Type))
        throw py::type_error("HorizonTable.lowest: no tuple's subclass");
    for (py::list* keys : {&evicted, &inserted}) {
        set_residents(table, *keys, keys == &inserted);
        PyList_SetSlice(keys->ptr(), 0, PyList_GET_SIZE(keys->ptr()), nullptr);
    }
    const int64_t others = table.num_residents() - num_candidates;
    const auto found = table.lowest(std::min(count, num_candidates) + others);
    py::list keys(found.size());
    for (std::size_t i = 0; i < found.size(); ++i) {
        PyList_SET_ITEM(keys.ptr(), static_cast<Py_ssize_t>(i),
                        make_key(type, found[i].first, found[i].second).release().ptr());
    }
    return keys;
}

void use_fit(HorizonTable& table, std::shared_ptr<HorizonForecast> fit, std::vector<int64_t> layers) {
    if (static_cast<int64_t>(layers.size()) != fit->num_layers() || fit->num_rates() != table.num_rates()) {
        throw py::value_error("HorizonTable.use_fit: layers or rates do not agree with the fit's");
    }
    table.use_fit(std::move(fit), std::move(layers));
}

Floats forecasts(const HorizonTable& table) {
    const auto num_rows = static_cast<int64_t>(table.layers().size());
    Floats out({num_rows, table.num_experts()});
    for (int64_t row = 0; row < num_rows; ++row) {
        std::copy_n(table.forecast(row).data(), table.num_experts(), out.mutable_data(row, 0));
    }
    return out;
}

Floats parts(HorizonTable& table) {
    const auto num_rows = static_cast<int64_t>(table.layers().size());
    Floats out({num_rows, table.num_rates(), table.num_experts()});
    for (int64_t row = 0; row < num_rows; ++row) {
        const std::vector<float> values = table.parts(row);
        std::copy(values.begin(), values.end(), out.mutable_data(row, 0, 0));
    }
    return out;
}

void set_parts(HorizonTable& table, const std::vector<int64_t>& layers, const Floats& values) {
    const bool fits = values.ndim() == 3 && values.shape(0) == static_cast<int64_t>(layers.size()) &&
                      values.shape(1) == table.num_rates() && 0 < values.shape(2) &&
                      values.shape(2) <= MAX_EXPERTS;
    if (!fits) throw py::value_error("HorizonTable.set_parts: (layers, rates, experts) wanted");
    for (const int64_t layer_idx : layers) table.reach(layer_idx, values.shape(2) - 1);
    const std::vector<int64_t> rows = table.layers();
    if (table.num_experts() != values.shape(2)) {
        throw py::value_error("HorizonTable.set_parts: more experts were seen already");
    }
    for (std::size_t i = 0; i < layers.size(); ++i) {
        const auto row = std::lower_bound(rows.begin(), rows.end(), layers[i]) - rows.begin();
        table.set_parts(row, values.data(static_cast<int64_t>(i), 0, 0));
    }
}

}  // namespace

void register_horizon(py::module_& m) {
    py::class_<HorizonCoefficients, std::shared_ptr<HorizonCoefficients>>(m, "HorizonCoefficients")
        .def(py::init(&make_coefficients), py::arg("own"), py::arg("rates"), py::arg("before"),
             py::arg("constant"));
    py::class_<HorizonForecast, std::shared_ptr<HorizonForecast>>(m, "HorizonForecast")
        .def(py::init([](std::shared_ptr<HorizonCoefficients> coefficients) {
                 return std::make_shared<HorizonForecast>(std::move(coefficients));
             }),
             py::arg("coefficients"))
        .def("observe", &observe, py::arg("position"), py::arg("expert_ids"), py::arg("out").noconvert());
    py::class_<HorizonTable>(m, "HorizonTable")
        .def(py::init<std::vector<float>, std::vector<float>>(), py::arg("rates"), py::arg("coefficients"))
        .def("use_fit", &use_fit, py::arg("fit"), py::arg("layers"))
        .def("reach", &reach, py::arg("layer_idx"), py::arg("expert_id"))
        .def("observe", &observe_layer, py::arg("layer_idx"), py::arg("expert_ids"))
        .def("observe_steps", &observe_steps, py::arg("steps"))
        .def("observe_layers", &observe_layers, py::arg("expert_ids"))
        .def("lowest", &lowest, py::arg("evicted"), py::arg("inserted"), py::arg("count"),
             py::arg("num_candidates"), py::arg("key_class"))
        .def("layers", &HorizonTable::layers)
        .def("forecasts", &forecasts)
        .def("parts", &parts)
        .def("set_parts", &set_parts, py::arg("layers"), py::arg("values"));
}
