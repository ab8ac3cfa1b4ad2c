// The kernels of each weight type. Those of a family of formats are compiled by themselves, at the same time.
#pragma once

#include "cuda/kernels.h"

namespace moe::cuda {

constexpr int kFewTokens = 8, kManyTokens = 32;

using Kernel = void (*)(MatrixLaunch);

// Null where there is none.
struct Kernels {
    Kernel one = nullptr, few = nullptr;               // one token; up to kFewTokens
    Kernel few_tiles = nullptr, many_tiles = nullptr;  // on tensor cores
    Kernel transposed = nullptr;                       // one token
};

// Of a type that is not in the family: none.
Kernels block_kernels(int ggml_type);       // 32 weights share a scale
Kernels superblock_kernels(int ggml_type);  // 256 weights
Kernels float_kernels(int ggml_type);

}  // namespace moe::cuda
