// Kernels for AVX2 + FMA + F16C (Haswell, Zen and later).
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace moe {
#define KERNELS kernels_avx2
#define KERNELS_NAME "avx2"
#include "cpu/kernels.inc"
}  // namespace moe
#endif
