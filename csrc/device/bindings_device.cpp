// What Python sees of csrc/device; moe_offload/residency/accelerator.py is the only caller.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "common/errors.h"
#include "device/cuda_library.h"
#include "device/emulated_device.h"
#include "device/engine.h"

namespace py = pybind11;
using namespace moe;

namespace {

// (n, 3) int64: address on the host, address on the device, bytes; whichever way they go.
using SpanArray = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Ints = std::vector<int32_t>;

constexpr double kPatienceS = 3600;  // of one wait, which looks for signals itself

class EmulatedEngine : public DeviceEngine {
  public:
    EmulatedEngine(int64_t vram_bytes, double to_device_bytes_per_s, double latency_s, int64_t pinnable_bytes,
                   std::optional<double> to_host_bytes_per_s)
        : DeviceEngine(std::make_unique<EmulatedDevice>(vram_bytes, to_device_bytes_per_s,
                                                        to_host_bytes_per_s.value_or(to_device_bytes_per_s),
                                                        latency_s, pinnable_bytes)) {}
    EmulatedDevice& emulated() { return static_cast<EmulatedDevice&>(device()); }
};

class CudaEngine : public DeviceEngine {
  public:
    CudaEngine(const std::string& library, int index, int64_t vram_bytes)
        : DeviceEngine(open_cuda_device(library, index, vram_bytes)) {}
};

void check_signals() {
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// Refuses what lies beyond the device's memory: a cache that errs must not corrupt the process.
void check_on_device(const Device& device, int64_t address, int64_t num_bytes) {
    const int64_t offset = address - int64_t(device.address());
    check(num_bytes >= 0 && offset >= 0 && offset <= device.num_bytes() - num_bytes, "Device.submit",
          std::to_string(num_bytes) + " bytes outside of its memory");
}

std::vector<CopySpan> spans_of(const Device& device, const SpanArray& array, Direction direction) {
    check(array.ndim() == 2 && array.shape(1) == 3, "Device.submit",
          "spans must be (n, 3): host address, device address, bytes");
    const auto rows = array.unchecked<2>();
    std::vector<CopySpan> spans(static_cast<size_t>(rows.shape(0)));
    for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
        check_on_device(device, rows(i, 1), rows(i, 2));
        const int from = direction == Direction::kToDevice ? 0 : 1;
        spans[static_cast<size_t>(i)] = {reinterpret_cast<const std::byte*>(rows(i, from)),
                                         reinterpret_cast<std::byte*>(rows(i, 1 - from)), rows(i, 2)};
    }
    return spans;
}

int64_t submit(DeviceEngine& engine, const SpanArray& array, bool speculative) {
    return engine.copies().submit(spans_of(engine.device(), array, Direction::kToDevice), speculative);
}

// Brings bytes to the host and waits for them; returns the seconds that the link was busy with them.
double copy_to_host(DeviceEngine& engine, const SpanArray& array) {
    const std::vector<CopySpan> spans = spans_of(engine.device(), array, Direction::kToHost);
    py::gil_scoped_release unlocked;
    CopyQueue& queue = engine.returns();
    const double before = queue.counters().busy_seconds;
    const CopyQueue::Ticket ticket = queue.submit(spans, false);
    try {
        while (!queue.wait(ticket, kPatienceS, check_signals)) {
        }
    } catch (...) {  // Ctrl-C: nothing may still write to the caller's memory
        queue.cancel(ticket);
        queue.wait(ticket, kPatienceS, [] {});
        queue.forget(ticket);
        throw;
    }
    const auto failure = queue.error(ticket);
    queue.forget(ticket);
    if (failure) throw DeviceError(failure->first, failure->second);
    return queue.counters().busy_seconds - before;
}

int64_t launch(DeviceEngine& engine, const DeviceKernel& kernel, const ExpertKernel& of,
               std::shared_ptr<DeviceInputs> inputs, Ints expert_ids, std::vector<uint64_t> addresses,
               Ints pair_offsets, Ints pair_tokens, const std::vector<int64_t>& after, DenseStep* stays_with,
               int64_t first_row) {
    RowsLaunch launch{&kernel,
                      std::move(inputs),
                      of.hidden_size(),
                      of.num_matrices(),
                      std::move(expert_ids),
                      std::move(addresses),
                      std::move(pair_offsets),
                      std::move(pair_tokens),
                      {},
                      stays_with,
                      first_row};
    for (const int64_t ticket : after)
        launch.after.push_back(ticket ? engine.copies().handle(ticket) : nullptr);
    return engine.launches().submit(std::move(launch));
}

// None, or why it failed: (message, fault).
std::optional<DeviceFailure> collect(DeviceEngine& engine, int64_t ticket, uint64_t out, const Ints& places) {
    py::gil_scoped_release unlocked;
    return engine.launches().collect(ticket, reinterpret_cast<float*>(out), places);
}

std::shared_ptr<DeviceInputs> upload(DeviceEngine& engine, uint64_t hidden, int64_t num_tokens,
                                     int64_t hidden_size) {
    py::gil_scoped_release unlocked;
    return engine.device().upload(reinterpret_cast<const float*>(hidden), num_tokens, hidden_size);
}

std::map<std::string, double> counters(DeviceEngine& engine) {
    const CopyCounters copies = engine.copies().counters();
    const LaunchCounters launches = engine.launches().counters();
    return {
        {"bytes_copied", double(copies.bytes_copied)}, {"chunks", double(copies.chunks)},
        {"busy_seconds", copies.busy_seconds},         {"launches", double(launches.launches)},
        {"experts", double(launches.experts)},         {"compute_seconds", launches.busy_seconds},
        {"waiting_seconds", launches.waiting_seconds}, {"returned_bytes", double(launches.returned_bytes)},
        {"return_seconds", launches.return_seconds},   {"waits", double(engine.launches().num_waits())}};
}

// (lane, ticket, amount, begin, end) of each event; lanes are event_log.h's.
std::vector<std::tuple<int, int64_t, int64_t, int64_t, int64_t>> take_events(DeviceEngine& engine) {
    std::vector<std::tuple<int, int64_t, int64_t, int64_t, int64_t>> events;
    for (const DeviceEvent& e : engine.events().take())
        events.emplace_back(int(e.lane), e.ticket, e.amount, e.begin_ns, e.end_ns);
    return events;
}

// What becomes moe_offload.errors.DeviceError; the other calls report a failure with its ticket.
void translate_device_error(std::exception_ptr error) {
    try {
        if (error) std::rethrow_exception(error);
    } catch (const DeviceError& e) {
        const py::object type = py::module_::import("moe_offload.errors").attr("DeviceError");
        py::set_error(type, type(e.what(), int(e.fault)));
    }
}

}  // namespace

void register_device(py::module_& m) {
    py::register_local_exception_translator(translate_device_error);
    py::enum_<DeviceFault>(m, "DeviceFault", py::arithmetic())
        .value("FAILED", DeviceFault::kFailed)
        .value("LOST", DeviceFault::kLost)
        .value("NO_MEMORY", DeviceFault::kNoMemory);
    py::class_<DeviceKernel>(m, "DeviceKernel");
    py::class_<DeviceInputs, std::shared_ptr<DeviceInputs>>(m, "DeviceInputs");
    py::class_<DeviceEngine>(m, "Device")
        .def_property_readonly("name", [](DeviceEngine& e) { return e.device().name(); })
        .def_property_readonly("address", [](DeviceEngine& e) { return e.device().address(); })
        .def_property_readonly("num_bytes", [](DeviceEngine& e) { return e.device().num_bytes(); })
        .def("give_back", [](DeviceEngine& e, int64_t offset, int64_t n) { e.device().give_back(offset, n); })
        .def(
            "pin",
            [](DeviceEngine& e, uint64_t begin, int64_t n) {
                py::gil_scoped_release unlocked;
                return e.device().pin(reinterpret_cast<std::byte*>(begin), n);
            },
            py::arg("address"), py::arg("num_bytes"))
        .def(
            "unpin",
            [](DeviceEngine& e, uint64_t begin, int64_t n) {
                py::gil_scoped_release unlocked;
                e.device().unpin(reinterpret_cast<std::byte*>(begin), n);
            },
            py::arg("address"), py::arg("num_bytes"))
        .def("submit", submit, py::arg("spans"), py::arg("speculative"))
        .def("copy_to_host", copy_to_host, py::arg("spans"))
        .def("promote", [](DeviceEngine& e, int64_t ticket) { return e.copies().promote(ticket); })
        .def("cancel", [](DeviceEngine& e, int64_t ticket) { return e.copies().cancel(ticket); })
        .def("state", [](DeviceEngine& e, int64_t ticket) { return int(e.copies().state(ticket)); })
        .def(
            "wait",
            [](DeviceEngine& e, int64_t ticket, double timeout_s) {
                py::gil_scoped_release unlocked;
                return e.copies().wait(ticket, timeout_s, check_signals);
            },
            py::arg("ticket"), py::arg("timeout_s"))
        .def("error", [](DeviceEngine& e, int64_t ticket) { return e.copies().error(ticket); })
        .def("forget", [](DeviceEngine& e, int64_t ticket) { return e.copies().forget(ticket); })
        .def("has_matrix", [](DeviceEngine& e, int ggml_type) { return e.device().has_matrix(ggml_type); })
        .def("has_kernel", [](DeviceEngine& e, const ExpertKernel& of) { return e.device().has_kernel(of); })
        .def(
            "make_kernel", [](DeviceEngine& e, const ExpertKernel& of) { return e.device().make_kernel(of); },
            py::keep_alive<0, 2>())
        .def("upload", upload, py::arg("hidden"), py::arg("num_tokens"), py::arg("hidden_size"))
        .def("launch", launch, py::arg("kernel"), py::arg("of"), py::arg("inputs"), py::arg("expert_ids"),
             py::arg("addresses"), py::arg("pair_offsets"), py::arg("pair_tokens"), py::arg("after"),
             py::arg("stays_with").none(true) = nullptr, py::arg("first_row") = 0)
        .def("launch_is_done", [](DeviceEngine& e, int64_t ticket) { return e.launches().is_done(ticket); })
        .def(
            "wait_launch",
            [](DeviceEngine& e, int64_t ticket, double timeout_s) {
                py::gil_scoped_release unlocked;
                return e.launches().wait(ticket, timeout_s, check_signals);
            },
            py::arg("ticket"), py::arg("timeout_s"))
        .def("collect", collect, py::arg("ticket"), py::arg("out"), py::arg("places"))
        .def(
            "abandon", [](DeviceEngine& e, int64_t ticket) { e.launches().abandon(ticket); },
            py::call_guard<py::gil_scoped_release>())
        .def("counters", counters)
        .def("record_events", [](DeviceEngine& e, int64_t capacity) { e.events().start(capacity); })
        .def("take_events", take_events)
        .def("close", &DeviceEngine::close, py::call_guard<py::gil_scoped_release>());
    py::class_<CudaEngine, DeviceEngine>(m, "CudaDevice")
        .def(py::init<const std::string&, int, int64_t>(), py::arg("library"), py::arg("index"),
             py::arg("vram_bytes"));
    py::class_<EmulatedEngine, DeviceEngine>(m, "EmulatedDevice")
        .def(py::init<int64_t, double, double, int64_t, std::optional<double>>(), py::arg("vram_bytes"),
             py::arg("link_bytes_per_s"), py::arg("latency_s"), py::arg("pinnable_bytes") = int64_t(1) << 62,
             py::arg("to_host_bytes_per_s") = py::none())
        .def(
            "inject",
            [](EmulatedEngine& e, int64_t after, int64_t times, bool lost, bool to_host) {
                const Direction direction = to_host ? Direction::kToHost : Direction::kToDevice;
                e.emulated().throttled(direction)->inject(after, times, lost);
            },
            py::arg("after"), py::arg("times") = 1, py::arg("lost") = false, py::arg("to_host") = false)
        .def("inject_no_memory",
             [](EmulatedEngine& e, int64_t times) { e.emulated().inject_no_memory(times); });
}
