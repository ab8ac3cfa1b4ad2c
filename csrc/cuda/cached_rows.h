// Rows of cached keys and values, and what the kernels around them share.
#pragma once

#include "common/half.h"
#include "cuda/dense_kernels.h"
#include "cuda/grid.h"

namespace moe::cuda {

enum CacheType : int { kF32 = 0, kF16 = 1, kQ8_0 = 8, kBF16 = 30 };  // ggml's numbers

constexpr float kMinusInfinity = -__builtin_inff();

constexpr int kBlockNumbers = 32, kBlockBytes = 34;  // of kQ8_0: a half and 32 signed codes

// As csrc/decode/packed_cache.cpp: cached_row_bytes.
MOE_HD int64_t row_bytes_of(int type, int64_t head_dim) {
    if (type == kQ8_0) return head_dim / kBlockNumbers * kBlockBytes;
    return head_dim * (type == kF32 ? 4 : 2);
}

MOE_HD void store_element(int type, uint8_t* row, int64_t i, float value) {
    if (type == kF32)
        reinterpret_cast<float*>(row)[i] = value;
    else
        reinterpret_cast<uint16_t*>(row)[i] = type == kF16 ? to_half(value) : to_bfloat16(value);
}

// A half that lies where halves may lie, in one instruction.
MOE_DEVICE float aligned_half(const uint8_t* p) {
    const uint16_t bits = *reinterpret_cast<const uint16_t*>(p);
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return half_to_float(bits);
#endif
}

template <int kType>
MOE_DEVICE float load_element(const uint8_t* row, int64_t i) {
    if constexpr (kType == kF32) return reinterpret_cast<const float*>(row)[i];
    if constexpr (kType == kQ8_0) {  // exact: a half has 11 bits and a code 7
        const uint8_t* block = row + i / kBlockNumbers * kBlockBytes;
        return aligned_half(block) * float(int8_t(block[2 + i % kBlockNumbers]));
    }
    const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[i];
    return kType == kF16 ? half_to_float(bits) : as_float(uint32_t(bits) << 16);
}

// A whole block of kQ8_0 by a warp, lane i its number i: store_q8_0 of csrc/decode/packed_cache.cpp. As bits
// a NaN is the largest magnitude, as there.
MOE_DEVICE void store_block(float value, uint8_t* block) {
    uint32_t largest = as_bits(value) & 0x7fffffffu;
    for (int step = 16; step > 0; step /= 2) {
        const uint32_t other = shuffle_xor(largest, step);
        largest = other > largest ? other : largest;
    }
    const float amax = as_float(largest);
    const int lane = threadIdx.x % 32;
    block[2 + lane] = uint8_t(quantize_one(value, inverse_of(amax)));
    if (lane == 0) *reinterpret_cast<uint16_t*>(block) = to_half(divide_rn(amax, 127.0f));
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
