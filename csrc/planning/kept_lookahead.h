// The look-ahead as Python holds it: with the arrays that it points into.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <map>
#include <vector>

#include "planning/lookahead.h"

namespace moe {

struct KeptLookahead {
    using Floats = pybind11::array_t<float, pybind11::array::c_style>;

    KeptLookahead(int64_t hidden_size, Floats previous, Floats frequency, float decay);

    void check_choice(const std::vector<int64_t>& expert_ids, const std::vector<float>& weights);

    Lookahead lookahead;
    int64_t hidden_size;
    std::vector<pybind11::object> kept;
    std::map<int64_t, pybind11::array> slot_tables;
};

}  // namespace moe
