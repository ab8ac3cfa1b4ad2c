// Rows of cached keys and values, and what the kernels around them share.
#pragma once

#include "common/half.h"
#include "cuda/dense_kernels.h"
#include "cuda/grid.h"

namespace moe::cuda {

enum CacheType : int { kF32 = 0, kF16 = 1, kBF16 = 30 };  // ggml's numbers

constexpr float kMinusInfinity = -__builtin_inff();

MOE_HD int64_t element_bytes(int type) {
    return type == kF32 ? 4 : 2;
}

MOE_HD void store_element(int type, uint8_t* row, int64_t i, float value) {
    if (type == kF32)
        reinterpret_cast<float*>(row)[i] = value;
    else
        reinterpret_cast<uint16_t*>(row)[i] = type == kF16 ? to_half(value) : to_bfloat16(value);
}

template <int kType>
MOE_HD float load_element(const uint8_t* row, int64_t i) {
    if constexpr (kType == kF32) return reinterpret_cast<const float*>(row)[i];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[i];
    return kType == kF16 ? half_to_float(bits) : as_float(uint32_t(bits) << 16);
}

// The largest of a warp's values, in every lane.
MOE_DEVICE float largest_of_warp(float value) {
    for (int step = 16; step > 0; step /= 2) {
        const float other = shuffle_xor(value, step);
        value = other > value ? other : value;
    }
    return value;
}

}  // namespace moe::cuda
