// Kernels for ARM's dot product of bytes (ARMv8.2 and later: Neoverse N1, Apple M1, Cortex-A76).
#if defined(__aarch64__)
#pragma GCC target("arch=armv8.2-a+dotprod")
#include <arm_neon.h>

#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace moe {
#define KERNELS kernels_dotprod
#define KERNELS_NAME "dotprod"
#include "cpu/kernels.inc"
}  // namespace moe
#endif
