// Kernels for AVX2 + FMA + F16C (Haswell, Zen and later).
#if defined(__x86_64__)
#include "cpu/kernels.h"

#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c,bmi2")

namespace moe {
#define KERNELS kernels_avx2
#define KERNELS_NAME "avx2"
#include "cpu/kernels.inc"
}  // namespace moe
#endif
