// What Python sees of the scheduler; moe_offload/planning/scheduler.py is the only caller.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "planning/scheduler.h"
#include "planning/token_division.h"

namespace py = pybind11;

namespace {

using Seconds = py::array_t<double, py::array::c_style>;
using Flags = py::array_t<bool, py::array::c_style>;

template <class T, class Array>
std::vector<T> vector_of(const char* argument, const Array& array, py::ssize_t length) {
    if (array.ndim() != 1 || array.shape(0) != length)
        throw py::value_error(std::string("schedule_layer: ") + argument + " must have one entry per expert");
    return std::vector<T>(array.data(), array.data() + length);
}

py::tuple schedule_layer(const Seconds& cpu_s, const Seconds& gpu_s, const Flags& on_gpu, const Flags& in_ram,
                         double copy_s, double cpu_start_s, double gpu_start_s) {
    const py::ssize_t n = cpu_s.ndim() == 1 ? cpu_s.shape(0) : -1;
    const moe::LayerWork work{vector_of<double>("cpu_s", cpu_s, n),
                              vector_of<double>("gpu_s", gpu_s, n),
                              vector_of<uint8_t>("on_gpu", on_gpu, n),
                              vector_of<uint8_t>("in_ram", in_ram, n),
                              copy_s,
                              cpu_start_s,
                              gpu_start_s};
    const moe::Schedule schedule = moe::schedule_layer(work);
    Flags chosen(n);
    std::copy(schedule.on_gpu.begin(), schedule.on_gpu.end(), chosen.mutable_data());
    return py::make_tuple(chosen, schedule.finish_s);
}

py::tuple divide_token(const std::vector<uint8_t>& there, const std::vector<uint8_t>& in_ram,
                       const std::vector<int32_t>& moves) {
    moe::TokenDivision division;
    moe::divide_token(there, in_ram, moves, division);
    return py::make_tuple(division.on_device, division.copied, division.on_cpu);
}

// schedule_layer of one token's `count` experts, in RAM all of them, where the device has 0 to count of them:
// how many more it copies there, or below zero leaves to the CPU; and when the later side finishes.
py::tuple schedule_token(int64_t count, double cpu_s, double gpu_s, double copy_s, double gpu_start_s) {
    std::vector<int32_t> moves;
    std::vector<double> finish_s;
    moe::LayerWork work{std::vector<double>(size_t(count), cpu_s),
                        std::vector<double>(size_t(count), gpu_s),
                        std::vector<uint8_t>(size_t(count), 0),
                        std::vector<uint8_t>(size_t(count), 1),
                        copy_s,
                        0.0,
                        gpu_start_s};
    for (int64_t residents = 0; residents <= count; ++residents) {
        if (residents) work.on_gpu[size_t(residents - 1)] = 1;
        const moe::Schedule schedule = moe::schedule_layer(work);
        int32_t there = 0, copied = 0;
        for (int64_t i = 0; i < count; ++i)
            (i < residents ? there : copied) += schedule.on_gpu[size_t(i)] != 0;
        moves.push_back(copied ? copied : there - int32_t(residents));
        finish_s.push_back(schedule.finish_s);
    }
    return py::make_tuple(moves, finish_s);
}

}  // namespace

void register_scheduler(py::module_& m) {
    m.def("schedule_layer", schedule_layer, py::arg("cpu_s"), py::arg("gpu_s"), py::arg("on_gpu"),
          py::arg("in_ram"), py::arg("copy_s"), py::arg("cpu_start_s"), py::arg("gpu_start_s"),
          "Which experts run on the GPU, and when the later side finishes");
    m.def("schedule_token", schedule_token, py::arg("count"), py::arg("cpu_s"), py::arg("gpu_s"),
          py::arg("copy_s"), py::arg("gpu_start_s") = 0.0,
          "The same for one token, by how many of its experts the device has");
    m.def("divide_token", divide_token, py::arg("there"), py::arg("in_ram"), py::arg("moves"),
          "Which of one token's experts, by position, run on the device, are copied there, run on the CPU");
}
