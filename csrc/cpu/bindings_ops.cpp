// What Python sees of arithmetic v1. Pointers cross as integers; moe_offload/ops.py is the only caller.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>

#include "common/errors.h"
#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"
#include "cpu/usable_cores.h"

namespace py = pybind11;
using namespace moe;

namespace {

using Ints = py::array_t<int32_t, py::array::c_style>;
using Addresses = py::array_t<uint64_t, py::array::c_style>;
using Floats = py::array_t<float, py::array::c_style>;

template <class T>
T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

bool python_signal_pending() {
    py::gil_scoped_acquire gil;
    return PyErr_CheckSignals() != 0;
}

// Runs without the GIL; a KeyboardInterrupt found on the way is raised after the workers stopped.
template <class Body>
void without_gil(Body body) {
    try {
        py::gil_scoped_release release;
        body();
    } catch (const Interrupted&) {
        throw py::error_already_set();
    }
}

void py_linear(uint64_t x, int64_t num_tokens, uint64_t weight, int64_t weight_bytes, int type, int64_t rows,
               int64_t cols, bool transposed, uint64_t bias, uint64_t out) {
    without_gil([&] {
        linear(pointer<float>(x), num_tokens, pointer<uint8_t>(weight), weight_bytes,
               {type, rows, cols, transposed}, pointer<float>(bias), pointer<float>(out));
    });
}

void py_embedding_rows(uint64_t ids, int64_t num_ids, uint64_t weight, int64_t weight_bytes, int type,
                       int64_t rows, int64_t cols, uint64_t out) {
    without_gil([&] {
        embedding_rows(pointer<int64_t>(ids), num_ids, pointer<uint8_t>(weight), weight_bytes,
                       {type, rows, cols, false}, pointer<float>(out));
    });
}

void py_weighted_sum(uint64_t out, int64_t num_tokens, int64_t hidden_size, uint64_t rows,
                     const Ints& pair_tokens, const Floats& pair_weights) {
    check_equal("weighted_sum", "length of pair_weights", pair_tokens.size(), pair_weights.size());
    without_gil([&] {
        weighted_sum(pointer<float>(out), num_tokens, hidden_size, pointer<float>(rows), pair_tokens.data(),
                     pair_weights.data(), pair_tokens.size());
    });
}

std::unique_ptr<ExpertKernel> make_expert_kernel(
    const std::vector<std::tuple<int, int64_t, int64_t, bool>>& matrices, int row_order, int64_t num_experts,
    int kind, float alpha, float limit, uint64_t gate_up_bias, uint64_t down_bias) {
    std::vector<Matrix> converted;
    for (const auto& [type, rows, cols, transposed] : matrices)
        converted.push_back({type, rows, cols, transposed});
    check(row_order >= 0 && row_order <= 2, "ExpertKernel", "row_order must be 0, 1 or 2");
    check(kind >= 0 && kind <= 4, "ExpertKernel", "activation kind must be in [0, 4]");
    return std::make_unique<ExpertKernel>(std::move(converted), RowOrder(row_order), num_experts,
                                          Activation{ActivationKind(kind), alpha, limit},
                                          pointer<float>(gate_up_bias), pointer<float>(down_bias));
}

ExpertPairs pairs_of(const ExpertKernel& kernel, const Ints& expert_ids, const Addresses& addresses,
                     const Ints& pair_offsets, const Ints& pair_tokens) {
    const int64_t num_experts = expert_ids.size();
    check_equal("ExpertKernel", "size of addresses", num_experts * kernel.num_matrices(), addresses.size());
    check_equal("ExpertKernel", "length of pair_offsets", num_experts + 1, pair_offsets.size());
    return {expert_ids.data(),  addresses.data(), pair_offsets.data(),
            pair_tokens.data(), num_experts,      pair_tokens.size()};
}

void py_expert_rows(const ExpertKernel& kernel, uint64_t hidden, int64_t num_tokens, const Ints& expert_ids,
                    const Addresses& addresses, const Ints& pair_offsets, const Ints& pair_tokens,
                    uint64_t out) {
    const ExpertPairs pairs = pairs_of(kernel, expert_ids, addresses, pair_offsets, pair_tokens);
    without_gil([&] { kernel.rows(pointer<float>(hidden), num_tokens, pairs, pointer<float>(out)); });
}

void py_expert_sum(const ExpertKernel& kernel, uint64_t hidden, int64_t num_tokens, const Ints& expert_ids,
                   const Addresses& addresses, const Ints& pair_offsets, const Ints& pair_tokens,
                   const Floats& pair_weights, uint64_t out) {
    const ExpertPairs pairs = pairs_of(kernel, expert_ids, addresses, pair_offsets, pair_tokens);
    check_equal("ExpertKernel", "length of pair_weights", pairs.num_pairs, pair_weights.size());
    without_gil([&] {
        kernel.sum(pointer<float>(hidden), num_tokens, pairs, pair_weights.data(), pointer<float>(out));
    });
}

double py_read_bandwidth(uint64_t data, int64_t num_bytes) {
    double bytes_per_s = 0;
    without_gil([&] { bytes_per_s = read_bandwidth(pointer<uint8_t>(data), num_bytes); });
    return bytes_per_s;
}

// The array is copied and stays for the life of the process.
void set_grid(int type, const py::array_t<int8_t, py::array::c_style>& grid) {
    check(type >= 0 && type < kNumTypes, "set_grid", "unknown ggml type " + std::to_string(type));
    if (grids.of[type]) return;
    auto* copy = new int8_t[size_t(grid.size())];
    std::memcpy(copy, grid.data(), size_t(grid.size()));
    grids.of[type] = copy;
}

void translate_config_error(std::exception_ptr error) {
    try {
        if (error) std::rethrow_exception(error);
    } catch (const ConfigError& e) {
        py::set_error(py::module_::import("moe_offload.errors").attr("ConfigError"), e.what());
    }
}

}  // namespace

void register_ops(py::module_& m) {
    py::register_local_exception_translator(translate_config_error);
    ThreadPool::instance().set_interrupt_check(python_signal_pending);
    py::module_::import("atexit").attr("register")(
        py::cpp_function([] { ThreadPool::instance().shutdown(); }));

    m.def("linear", py_linear, "out = x @ weight.T + bias, arithmetic v1");
    m.def("embedding_rows", py_embedding_rows, "Dequantize rows by id, bit for bit as gguf-py does");
    m.def("weighted_sum", py_weighted_sum, py::arg(), py::arg(), py::arg(), py::arg(), py::arg().noconvert(),
          py::arg().noconvert(), "out[token] += weight * row, pairs in order, no fma");
    m.def("read_bandwidth", py_read_bandwidth, "Bytes per second that the pool's threads read together");
    m.def("set_grid", set_grid, "Hand over the codebook of an IQ type, (entries, width) int8");
    m.def(
        "set_num_threads", [](int n) { without_gil([n] { ThreadPool::instance().set_num_threads(n); }); },
        "Threads of the pool, the calling one included");
    m.def("num_threads", [] { return ThreadPool::instance().num_threads(); });
    m.def("usable_cores", usable_cores, "Affinity, cgroup quota and physical cores, whichever is least");
    m.def(
        "has_fast_kernel", [](int type) { return type >= 0 && type < kNumTypes && kernels().fast[type]; },
        "Whether the instruction set in use has a kernel of its own for a ggml type");
    m.def("isa", [] { return kernels().name; }, "The instruction set in use");
    m.def("amx_state", amx_state, "How AMX fared on this machine, or why it does not run");
    m.def("available_isas", available_isas, "What this CPU offers, worst first");
    m.def("force_isa", force_isa, "Use one instruction set from now on; empty: choose again");

    py::class_<ExpertKernel>(m, "ExpertKernel", "Gate, up, activation and down of one layer's experts")
        .def(py::init(&make_expert_kernel))
        .def("rows", py_expert_rows, py::arg(), py::arg(), py::arg().noconvert(), py::arg().noconvert(),
             py::arg().noconvert(), py::arg().noconvert(), py::arg(), "Unweighted rows, one per pair")
        .def("sum", py_expert_sum, py::arg(), py::arg(), py::arg().noconvert(), py::arg().noconvert(),
             py::arg().noconvert(), py::arg().noconvert(), py::arg().noconvert(), py::arg(),
             "out[token] += weight * row, pairs in order, no fma");
}
