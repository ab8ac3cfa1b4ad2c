// What Python sees of csrc/io. Types and one line each; the contracts stand in the headers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cstring>
#include <map>
#include <optional>

#include "io/arena.h"
#include "io/direct_read.h"
#include "io/errors.h"

namespace py = pybind11;
using moe::Arena;
using moe::ConfigError;
using moe::DirectReader;
using moe::Fault;
using moe::FileError;
using moe::Relayout;
using moe::Segment;

namespace {

// (n, 4) int64: file_id, offset, num_bytes, region; base_address is added to each region.
using SegmentArray = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

void check_signals() {
    py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// (n, 6) int64: kind, scales, codes, blocks, rows, cols; base_address is added to the three addresses.
std::vector<Relayout> relayouts_of(const SegmentArray& array, int64_t base_address) {
    if (array.ndim() != 2 || array.shape(1) != 6) {
        throw ConfigError("DirectReader.submit: relayouts must be (n, 6): kind, scales, codes, blocks, ...");
    }
    const auto rows = array.unchecked<2>();
    std::vector<Relayout> relayouts(static_cast<size_t>(rows.shape(0)));
    for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
        relayouts[static_cast<size_t>(i)] = {rows(i, 0),
                                             rows(i, 1) + base_address,
                                             rows(i, 2) + base_address,
                                             rows(i, 3) + base_address,
                                             rows(i, 4),
                                             rows(i, 5)};
    }
    return relayouts;
}

int64_t submit(DirectReader& reader, const SegmentArray& array, bool speculative, int64_t base_address,
               const std::optional<SegmentArray>& relayouts) {
    if (array.ndim() != 2 || array.shape(1) != 4) {
        throw ConfigError("DirectReader.submit: segments must be (n, 4): file_id, offset, num_bytes, region");
    }
    const auto rows = array.unchecked<2>();
    std::vector<Segment> segments(static_cast<size_t>(rows.shape(0)));
    for (py::ssize_t i = 0; i < rows.shape(0); ++i) {
        segments[static_cast<size_t>(i)] = {rows(i, 0), rows(i, 1), rows(i, 2), rows(i, 3) + base_address};
    }
    return reader.submit(segments, speculative,
                         relayouts ? relayouts_of(*relayouts, base_address) : std::vector<Relayout>());
}

bool wait(const DirectReader& reader, int64_t ticket, double timeout_s) {
    py::gil_scoped_release unlocked;
    return reader.wait(ticket, timeout_s, check_signals);
}

py::object error(const DirectReader& reader, int64_t ticket) {
    const auto error = reader.error(ticket);
    if (!error) return py::none();
    return py::make_tuple(error->file_id, error->offset, error->error_number, error->message);
}

void read_into(DirectReader& reader, int64_t file_id, int64_t offset, int64_t num_bytes, int64_t address) {
    py::gil_scoped_release unlocked;
    reader.read_into(file_id, offset, num_bytes, reinterpret_cast<std::byte*>(address), check_signals);
}

py::tuple file_mode(const DirectReader& reader, int64_t file_id) {
    const auto& file = reader.file(file_id);
    return py::make_tuple(file.is_direct() ? "direct" : "buffered", file.mode_reason());
}

py::dict counters(const DirectReader& reader) {
    const auto counters = reader.counters();
    py::dict out;
    out["bytes_read"] = counters.bytes_read;
    out["disk_bytes"] = counters.disk_bytes;
    out["requests"] = counters.requests;
    out["busy_seconds"] = counters.busy_seconds;
    out["timed_bytes"] = counters.timed_bytes;
    return out;
}

void inject(DirectReader& reader, const std::string& kind, int64_t after_reads, int64_t times,
            int error_number, double delay_s, int64_t num_bytes, const std::string& path_substring) {
    static const std::map<std::string, Fault::Kind> kinds = {
        {"error", Fault::Kind::kError},
        {"open_error", Fault::Kind::kOpenError},
        {"open_direct", Fault::Kind::kOpenDirect},
        {"einval_direct", Fault::Kind::kPreadDirect},
        {"short", Fault::Kind::kShort},
        {"eof", Fault::Kind::kEof},
        {"delay", Fault::Kind::kDelay},
        {"hang", Fault::Kind::kHang},
    };
    const auto found = kinds.find(kind);
    if (found == kinds.end()) throw ConfigError("DirectReader.inject: unknown kind \"" + kind + "\"");
    const bool direct_only =
        found->second == Fault::Kind::kPreadDirect || found->second == Fault::Kind::kOpenDirect;
    if (error_number == 0) error_number = direct_only ? EINVAL : EIO;
    reader.inject({found->second, after_reads, times, error_number, delay_s, num_bytes, path_substring});
}

// ConfigError has its translator in register_ops.
void translate_file_error(std::exception_ptr pointer) {
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const FileError& error) {
        const py::tuple arguments = py::make_tuple(error.error_number, error.what());
        PyErr_SetObject(PyExc_OSError, arguments.ptr());
    }
}

void register_arena(py::module_& m) {
    py::class_<Arena>(m, "Arena", "Page-aligned anonymous memory; costs RAM where it was touched.")
        .def(py::init<int64_t>(), py::arg("num_bytes"))
        .def_property_readonly("address", &Arena::address)
        .def_property_readonly("num_bytes", &Arena::num_bytes)
        .def("give_back", &Arena::give_back, py::arg("offset"), py::arg("num_bytes"),
             py::call_guard<py::gil_scoped_release>(), "Return the whole pages inside to the system.")
        .def("gather", &Arena::gather, py::arg("offset"), py::call_guard<py::gil_scoped_release>(),
             "Make one huge page of 2 MiB that are there; 0, NOT_FILLED or an errno.")
        .def("close", &Arena::close, py::call_guard<py::gil_scoped_release>(),
             "Unmap; no read may be in flight.");
}

void register_reader(py::module_& m) {
    const py::call_guard<py::gil_scoped_release> unlocked;
    py::class_<DirectReader>(m, "DirectReader", "Reads spans of files into memory, demand first.")
        .def(py::init<int, const std::string&>(), py::arg("num_threads"), py::arg("io_mode"))
        .def("add_file", &DirectReader::add_file, py::arg("path"), unlocked,
             "Open a file; returns its file_id.")
        .def("file_mode", &file_mode, py::arg("file_id"), "(\"direct\" | \"buffered\", why).")
        .def("why_no_ring", &DirectReader::why_no_ring, "Why threads read; empty: the system's ring does.")
        .def(
            "file_bytes", [](const DirectReader& r, int64_t id) { return r.file(id).num_bytes(); },
            py::arg("file_id"), "Size when it was opened.")
        .def(
            "submit", &submit, py::arg("segments"), py::arg("speculative"), py::arg("base_address") = 0,
            py::arg("relayouts") = py::none(),
            "Queue reads of (n, 4) int64 file_id, offset, num_bytes, region, and (m, 6) relayouts; returns a "
            "ticket.")
        .def("promote", &DirectReader::promote, py::arg("ticket"),
             "Make a queued speculative ticket a demand.")
        .def("cancel", &DirectReader::cancel, py::arg("ticket"), "True when nothing of it was issued.")
        .def(
            "state", [](const DirectReader& r, int64_t ticket) { return static_cast<int>(r.state(ticket)); },
            py::arg("ticket"), "QUEUED, READING, DONE, FAILED or CANCELLED.")
        .def("wait", &wait, py::arg("ticket"), py::arg("timeout_s"), "False if not finished after timeout_s.")
        .def("error", &error, py::arg("ticket"), "(file_id, offset, errno, message) or None.")
        .def("forget", &DirectReader::forget, py::arg("ticket"),
             "Drop a finished ticket; False if it is not.")
        .def("read_into", &read_into, py::arg("file_id"), py::arg("offset"), py::arg("num_bytes"),
             py::arg("address"), "Read now, into memory of any alignment.")
        .def("counters", &counters, "bytes_read, disk_bytes, requests, busy_seconds, timed_bytes.")
        .def("inject", &inject, py::arg("kind"), py::kw_only(), py::arg("after_reads") = 0,
             py::arg("times") = -1, py::arg("error_number") = 0, py::arg("delay_s") = 0.0,
             py::arg("num_bytes") = 0, py::arg("path_substring") = "",
             "Tests: add a fault to open or pread (csrc/io/syscalls.h).")
        .def(
            "release", [](DirectReader& r, int64_t reads) { r.syscalls().release(reads); }, py::arg("reads"),
            "Tests: let that many hanging reads go on.")
        .def("close", &DirectReader::close, unlocked,
             "Cancel what is queued, join the threads, close the files.");
    m.attr("QUEUED") = static_cast<int>(moe::TicketState::kQueued);
    m.attr("READING") = static_cast<int>(moe::TicketState::kReading);
    m.attr("DONE") = static_cast<int>(moe::TicketState::kDone);
    m.attr("FAILED") = static_cast<int>(moe::TicketState::kFailed);
    m.attr("CANCELLED") = static_cast<int>(moe::TicketState::kCancelled);
    m.attr("HUGE_PAGE_BYTES") = moe::kHugePageBytes;
    m.attr("NOT_FILLED") = moe::kNotFilled;
    m.attr("BOUNCE_BYTES") = moe::kBounceBytes;
}

}  // namespace

void register_io(py::module_& m) {
    m.def(
        "relayout",
        [](int64_t kind, int64_t scales, int64_t codes, int64_t blocks, int64_t rows, int64_t cols) {
            const Relayout relayout{kind, scales, codes, blocks, rows, cols};
            moe::check_relayout(relayout);
            moe::run_relayout(relayout);
        },
        py::arg("kind"), py::arg("scales"), py::arg("codes"), py::arg("blocks"), py::arg("rows"),
        py::arg("cols"), py::call_guard<py::gil_scoped_release>(),
        "Put codes and their scales, by address, together in blocks (csrc/io/relayout.h).");
    py::register_local_exception_translator(translate_file_error);
    register_arena(m);
    register_reader(m);
}
