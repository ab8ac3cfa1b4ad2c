// What the jobs of an ExpertKernel's operation share: expert_kernel.cpp hands them out, expert_rows.cpp
// computes.
#pragma once

#include "cpu/ops.h"

namespace moe {

constexpr int64_t kUnitTile = kRowTile;  // a unit is one gate row and one up row

struct ExpertKernel::Step {
    const ExpertPairs& pairs;
    Activations gate_up_inputs, down_inputs;
    float* h;        // (num_pairs, intermediate_size)
    float* gate_up;  // (num_pairs, 2 * intermediate_size) in stored order, where rows are streamed
    int32_t* tiles_to_do;

    const uint8_t* weights(int64_t expert, int64_t matrix, int64_t num_matrices) const {
        return reinterpret_cast<const uint8_t*>(pairs.addresses[expert * num_matrices + matrix]);
    }
};

}  // namespace moe
