// Kernels of formats whose scales belong to 32 weights.
#include "cuda/block_formats.h"
#include "cuda/packed_kernels.h"

namespace moe::cuda {

Kernels block_kernels(int ggml_type) {
    switch (ggml_type) {
        case Q4_0:
            return packed_kernels<FormatQ4_0>();
        case Q4_1:
            return packed_kernels<FormatQ4_1>();
        case Q5_0:
            return packed_kernels<FormatQ5_0>();
        case Q5_1:
            return packed_kernels<FormatQ5_1>();
        case Q8_0:
            return packed_kernels<FormatQ8_0>();
        case IQ4_NL:
            return packed_kernels<FormatIQ4_NL>();
        case MXFP4:
            return packed_kernels<FormatMXFP4>();
        default:
            return {};
    }
}

}  // namespace moe::cuda
