// What Python sees of csrc/device; moe_offload/residency/device.py is the only caller.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "common/errors.h"
#include "device/emulated_device.h"

namespace py = pybind11;
using moe::CopySpan;
using moe::EmulatedDevice;

namespace {

// (n, 3) int64: address on the host, address on the device, bytes.
using SpanArray = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

void check_signals() {
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// Refuses what would write beyond the device's memory: a cache that errs must not corrupt the process.
void check_target(const moe::Arena& memory, int64_t address, int64_t num_bytes) {
    const bool inside = address >= memory.address() && num_bytes >= 0 &&
                        address - memory.address() <= memory.num_bytes() - num_bytes;
    moe::check(inside, "EmulatedDevice.submit", std::to_string(num_bytes) + " bytes outside of its memory");
}

int64_t submit(EmulatedDevice& device, const SpanArray& array, bool speculative) {
    moe::check(array.ndim() == 2 && array.shape(1) == 3, "EmulatedDevice.submit",
               "spans must be (n, 3): host address, device address, bytes");
    const auto rows = array.unchecked<2>();
    std::vector<CopySpan> spans(static_cast<size_t>(rows.shape(0)));
    for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
        check_target(device.memory(), rows(i, 1), rows(i, 2));
        spans[static_cast<size_t>(i)] = {reinterpret_cast<const std::byte*>(rows(i, 0)),
                                         reinterpret_cast<std::byte*>(rows(i, 1)), rows(i, 2)};
    }
    return device.to_device().submit(spans, speculative);
}

bool wait(EmulatedDevice& device, int64_t ticket, double timeout_s) {
    py::gil_scoped_release unlocked;
    return device.to_device().wait(ticket, timeout_s, check_signals);
}

std::map<std::string, double> counters(EmulatedDevice& device) {
    const moe::CopyCounters counters = device.to_device().counters();
    return {{"bytes_copied", double(counters.bytes_copied)},
            {"chunks", double(counters.chunks)},
            {"busy_seconds", counters.busy_seconds}};
}

}  // namespace

void register_device(py::module_& m) {
    py::class_<EmulatedDevice>(m, "EmulatedDevice")
        .def(py::init<int64_t, double, double>(), py::arg("vram_bytes"), py::arg("link_bytes_per_s"),
             py::arg("latency_s"))
        .def_property_readonly("address", [](EmulatedDevice& d) { return d.memory().address(); })
        .def_property_readonly("num_bytes", [](EmulatedDevice& d) { return d.memory().num_bytes(); })
        .def("give_back",
             [](EmulatedDevice& d, int64_t offset, int64_t n) { d.memory().give_back(offset, n); })
        .def("submit", submit, py::arg("spans"), py::arg("speculative"))
        .def("promote", [](EmulatedDevice& d, int64_t ticket) { return d.to_device().promote(ticket); })
        .def("cancel", [](EmulatedDevice& d, int64_t ticket) { return d.to_device().cancel(ticket); })
        .def("state", [](EmulatedDevice& d, int64_t ticket) { return int(d.to_device().state(ticket)); })
        .def("wait", wait, py::arg("ticket"), py::arg("timeout_s"))
        .def("error", [](EmulatedDevice& d, int64_t ticket) { return d.to_device().error(ticket); })
        .def("forget", [](EmulatedDevice& d, int64_t ticket) { return d.to_device().forget(ticket); })
        .def("counters", counters)
        .def(
            "inject",
            [](EmulatedDevice& d, int64_t after, int64_t times, bool lost) {
                d.link().inject(after, times, lost);
            },
            py::arg("after"), py::arg("times") = 1, py::arg("lost") = false)
        .def("close", &EmulatedDevice::close, py::call_guard<py::gil_scoped_release>());
}
