// Kernels of weights that are numbers: F32, F16, BF16, FP8.
#include "common/ggml_types.h"
#include "cuda/float_rows.h"
#include "cuda/kernel_table.h"

namespace moe::cuda {
namespace {

template <class Weight>
constexpr Kernels kernels_of_floats() {
    return {float_rows_kernel<Weight, 1>, float_rows_kernel<Weight, kFewTokens>, nullptr, nullptr,
            transposed_rows_kernel<Weight, 1>};
}

}  // namespace

Kernels float_kernels(int ggml_type) {
    switch (ggml_type) {
        case F32:
            return kernels_of_floats<WeightF32>();
        case F16:
            return kernels_of_floats<WeightF16>();
        case BF16:
            return kernels_of_floats<WeightBF16>();
        case F8_E4M3: {
            Kernels kernels = kernels_of_floats<WeightF8>();
            kernels.transposed = nullptr;
            return kernels;
        }
        default:
            return {};
    }
}

}  // namespace moe::cuda
