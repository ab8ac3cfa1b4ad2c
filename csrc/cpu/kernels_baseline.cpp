// Kernels for the compiler's default ISA: SSE2 on x86-64, NEON on aarch64.
#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace moe {
#define KERNELS kernels_baseline
#define KERNELS_NAME "baseline"
#include "cpu/kernels.inc"
}  // namespace moe
