// Kernels beside matrices for AVX2 + FMA + F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include "decode/token_kernels.h"

namespace moe {
#define TOKEN_KERNELS token_kernels_avx2
#define TOKEN_KERNELS_NAME "avx2"
#include "decode/token_kernels.inc"
}  // namespace moe
#endif
