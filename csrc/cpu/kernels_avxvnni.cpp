// Kernels for AVX2 + AVX-VNNI (Alder Lake, Zen 5 and later).
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace moe {
#define KERNELS kernels_avxvnni
#define KERNELS_NAME "avxvnni"
#include "cpu/kernels.inc"
}  // namespace moe
#endif
