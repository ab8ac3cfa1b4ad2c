// Whether AMX serves prompts on this machine, and if not, why.
#pragma once

#include <string>

namespace moe {

struct AmxVerdict {
    bool runs = false;    // the CPU has it, the system grants it, and it gives AVX-512's bits
    bool faster = false;  // than AVX-512 on a small product
    std::string reason;
};

// Looked at once: CPUID, the tiles' state asked of the system, a product's bits and its time. Call it only
// where kernels_avx512vnni run.
const AmxVerdict& amx_verdict();

}  // namespace moe
