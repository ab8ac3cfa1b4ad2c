// Which of a layer's experts run on the GPU, which on the CPU: the later of the two shall finish early.
//
// The model (HybriMoE, arXiv 2504.05897, section 4; two-machine flow shop for the copies): the CPU runs its
// experts one after the other. The GPU runs those that are resident, then those that are copied, in the
// order of their arrival; copies follow one another on the link. With one copy time for all, Johnson's rule
// makes "longest GPU time first" the best order of copies. moe_offload/planning/scheduler.py is the readable
// twin, held equal by tests.
#pragma once

#include <cstdint>
#include <vector>

namespace moe {

struct LayerWork {
    std::vector<double> cpu_s;    // by expert
    std::vector<double> gpu_s;    // by expert
    std::vector<uint8_t> on_gpu;  // resident there
    std::vector<uint8_t> in_ram;  // the CPU can run it, and a copy can start
    double copy_s = 0;            // of one expert over the link
    double cpu_start_s = 0;       // once, when the CPU runs any
    double gpu_start_s = 0;       // once, when the GPU runs any
};

struct Schedule {
    std::vector<uint8_t> on_gpu;  // by expert: 1 runs on the GPU, after a copy unless resident there
    double finish_s = 0;
};

// Exact for equal loads. Otherwise within kGridStep of the best per expert: 1.4% for 14 experts at worst;
// above 16 experts within 1.4% (128) to 3.1% (256) of that grid's in 40 layers of prompts each.
Schedule schedule_layer(const LayerWork& work);

// The finishing time of a choice, copies in the best order.
double finish_of(const LayerWork& work, const std::vector<uint8_t>& on_gpu);

}  // namespace moe
