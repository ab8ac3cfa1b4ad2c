// Kernels beside matrices for AVX-512 F, BW, DQ and VL.
#if defined(__x86_64__)
#include <immintrin.h>

#include "decode/token_kernels.h"

namespace moe {
#define TOKEN_KERNELS token_kernels_avx512
#define TOKEN_KERNELS_NAME "avx512"
#include "decode/token_kernels.inc"
}  // namespace moe
#endif
