// What Python sees of csrc/hybrid; moe_offload/runtime/hybrid_run.py is the only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/without_gil.h"
#include "decode/cached_addresses.h"
#include "hybrid/token_run.h"

namespace py = pybind11;
using namespace moe;

namespace {

void throw_if_interrupted() {
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw Interrupted{};
}

void set_layer(TokenRun& run, int64_t layer, const ExpertKernel* of, const DeviceKernel* on_device,
               uint64_t device_table, uint64_t ram_table) {
    SharedLayer shared;
    shared.of = of, shared.on_device = on_device;
    shared.device_table = reinterpret_cast<const uint64_t*>(device_table);
    shared.ram_table = reinterpret_cast<const uint64_t*>(ram_table);
    run.set_layer(layer, std::move(shared));
}

int64_t run_layers(TokenRun& run, int64_t first, const KeyValueAddresses& keys_values, int64_t capacity,
                   int64_t num_tokens, std::vector<std::vector<uint64_t>> free_slots, bool is_attended) {
    const std::vector<CachedTokens> cached = cached_tokens(keys_values, capacity, num_tokens);
    int64_t stopped = 0;
    without_gil(
        [&] { stopped = run.run(first, cached, std::move(free_slots), is_attended, throw_if_interrupted); });
    return stopped;
}

py::list layers_done(const TokenRun& run) {
    py::list list;
    for (const SharedLayerDone& layer : run.done())
        list.append(py::make_tuple(layer.layer, layer.choice.ids, layer.choice.weights, layer.on_device,
                                   layer.copied, layer.cpu_s, layer.stayed));
    return list;
}

// The same of all layers at once: what of it differs by layer, and sums.
py::tuple together(const TokenRun& run) {
    py::list steps, on_device;
    size_t num_there = 0, num_copied = 0, num_stayed = 0;
    double cpu_s = 0;
    for (const SharedLayerDone& layer : run.done()) {
        steps.append(py::make_tuple(layer.layer, layer.choice.ids, layer.choice.weights));
        num_there += layer.on_device.size(), num_copied += layer.copied.size();
        num_stayed += layer.stayed ? layer.on_device.size() : 0;
        cpu_s += layer.cpu_s;
    }
    if (num_there)
        for (const SharedLayerDone& layer : run.done()) on_device.append(py::cast(layer.on_device));
    return py::make_tuple(steps, on_device, num_there, num_there - num_stayed, num_copied, cpu_s);
}

}  // namespace

void register_hybrid(py::module_& m) {
    py::class_<TokenRun>(m, "TokenRun", "One token's layers on CPU and device at once")
        .def(py::init<DecodeStep&, DeviceEngine&>(), py::keep_alive<1, 2>(), py::keep_alive<1, 3>())
        .def("set_layer", set_layer, py::keep_alive<1, 3>(), py::keep_alive<1, 4>(), py::arg("layer"),
             py::arg("of"), py::arg("on_device").none(true), py::arg("device_table"), py::arg("ram_table"))
        .def("set_moves", &TokenRun::set_moves, py::arg("layer"), py::arg("moves"))
        .def("set_copies", &TokenRun::set_copies, py::arg("layer"), py::arg("pool"), py::arg("first_slot"),
             py::arg("slot_bytes"), py::arg("matrix_bytes"))
        .def("run", run_layers, py::arg("first"), py::arg("keys_values"), py::arg("capacity"),
             py::arg("num_tokens"), py::arg("free_slots"), py::arg("is_attended"),
             "The layers from one on, up to one where Python has to decide")
        .def("done", layers_done,
             "Of the last run, by layer: (layer, ids, weights, ids on the device, (id, slot) copied there, "
             "CPU seconds, whether rows "
             "stayed there)")
        .def("together", together,
             "The same of all layers: [(layer, ids, weights)], ids on the device by layer (none where it had "
             "no share), how many those are, how many of them came home and were copied, CPU seconds")
        .def_property_readonly("wait_s", &TokenRun::wait_s)
        .def_property_readonly("start_s", &TokenRun::start_s)
        .def_property_readonly("num_starts", &TokenRun::num_starts)
        .def_property_readonly("device_s", &TokenRun::device_s)
        .def_property_readonly("link_s", &TokenRun::link_s)
        .def_property_readonly("lacks_slots", &TokenRun::lacks_slots)
        .def_property_readonly("failure", &TokenRun::failure);
}
