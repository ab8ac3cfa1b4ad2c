// Kernels beside matrices for the compiler's default ISA: SSE2 on x86-64, NEON on aarch64.
#include <cstring>

#include "cpu/isa.h"
#include "decode/token_kernels.h"

namespace moe {
#define TOKEN_KERNELS token_kernels_baseline
#define TOKEN_KERNELS_NAME "baseline"
#include "decode/token_kernels.inc"

const TokenKernels& token_kernels() {
#if defined(__x86_64__)
    const char* isa = kernels().name;
    for (const Kernels* table : {&kernels_avx512vnni, &kernels_amx})
        if (std::strcmp(isa, table->name) == 0) return token_kernels_avx512;
    if (std::strcmp(isa, kernels_baseline.name) != 0) return token_kernels_avx2;
#endif
    return token_kernels_baseline;
}

const CacheKernels& cache_kernels(int type) {
    const TokenKernels& table = token_kernels();
    if (type == F16) return table.f16;
    if (type == BF16) return table.bf16;
    return type == Q8_0 ? table.q8_0 : table.f32;
}
}  // namespace moe
