// Kernels for AMX-INT8: those for AVX-512 VNNI, and tiles for more than a few tokens (Sapphire Rapids and
// later).
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/amx_tiles.h"
#include "cpu/kernels.h"
#include "cpu/scratch.h"

namespace moe {
#define MOE_AMX
#define KERNELS kernels_amx
#define KERNELS_NAME "amx"
#include "cpu/kernels.inc"
}  // namespace moe
#endif
