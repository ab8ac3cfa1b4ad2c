// Kernels for AVX-512 (F, BW, DQ, VL, VNNI: Ice Lake, Zen 4 and later).
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace moe {
#define KERNELS kernels_avx512vnni
#define KERNELS_NAME "avx512vnni"
#include "cpu/kernels.inc"
}  // namespace moe
#endif
