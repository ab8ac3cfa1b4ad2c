// Kernels of formats of 256 weights with scales of scales.
#include "cuda/packed_kernels.h"
#include "cuda/superblock_formats.h"

namespace moe::cuda {

Kernels superblock_kernels(int ggml_type) {
    switch (ggml_type) {
        case Q2_K:
            return packed_kernels<FormatQ2_K>();
        case Q3_K:
            return packed_kernels<FormatQ3_K>();
        case Q4_K:
            return packed_kernels<FormatQ4_K>();
        case Q5_K:
            return packed_kernels<FormatQ5_K>();
        case Q6_K:
            return packed_kernels<FormatQ6_K>();
        case IQ4_XS:
            return packed_kernels<FormatIQ4_XS>();
        default:
            return {};
    }
}

}  // namespace moe::cuda
