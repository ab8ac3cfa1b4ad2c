// Which kernels run: the best that this CPU offers, or the one that MOE_OFFLOAD_ISA names.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace moe {

std::vector<std::string> available_isas();  // worst first
const Kernels& kernels();                   // chosen at first use; ConfigError for a bad MOE_OFFLOAD_ISA
std::string amx_state();                    // how AMX fared here, or why it does not run
void force_isa(const std::string& name);    // for tests; "" chooses again

}  // namespace moe
