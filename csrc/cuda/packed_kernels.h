// The four kernels of a packed format.
#pragma once

#include "common/ggml_types.h"
#include "cuda/kernel_table.h"
#include "cuda/packed_rows.h"
#include "cuda/tile_rows.h"

namespace moe::cuda {

template <class Format>
constexpr Kernels packed_kernels() {
    return {packed_rows_kernel<Format, 1>, packed_rows_kernel<Format, kFewTokens>,
            tile_rows_kernel<Format, kFewTokens>, tile_rows_kernel<Format, kManyTokens>, nullptr};
}

}  // namespace moe::cuda
