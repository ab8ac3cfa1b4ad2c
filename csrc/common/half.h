// Floats as halves and bfloat16, rounded to nearest even: the same for the CPU and for CUDA's kernels.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MOE_BOTH __host__ __device__ __forceinline__
#else
#define MOE_BOTH inline
#endif

namespace moe {

MOE_BOTH uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Adding 2^(e - 10 + 23) leaves the 10 bits of a half, rounded to nearest even; see IEEE 754.
MOE_BOTH uint16_t to_half(float value) {
    const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds beyond 65504
    if (magnitude < 0x38800000u) {                                  // subnormal half: steps of 2^-24
        const float shifted = (value < 0 ? -value : value) + 0.5f;
        return uint16_t(sign | (bits_of(shifted) - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
    return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}

MOE_BOTH uint16_t to_bfloat16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);  // NaN stays NaN
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

}  // namespace moe
