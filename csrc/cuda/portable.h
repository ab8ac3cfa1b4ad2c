// What the CUDA kernels' arithmetic needs, on a GPU and on a CPU: the same functions are compiled by nvcc
// into kernels and by the host compiler into a test that holds them equal to csrc/cpu, bit for bit.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MOE_HD __host__ __device__ __forceinline__
#else
#define MOE_HD inline
#endif

namespace moe::cuda {

// What a thread moves at once.
struct alignas(16) Word16 {
    uint32_t words[4];
};

MOE_HD float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

MOE_HD uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// One rounding, subnormals kept; nvcc must be told where the CPU's compiler is.
MOE_HD float fma_rn(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}

MOE_HD float divide_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

// sum + the dot product of four int8 pairs.
MOE_HD int32_t dot4(int32_t a, int32_t b, int32_t sum) {
#if defined(__CUDA_ARCH__)
    return __dp4a(a, b, sum);
#else
    for (int i = 0; i < 4; ++i) sum += int8_t(a >> (8 * i)) * int8_t(b >> (8 * i));
    return sum;
#endif
}

// Byte i of the result is byte (selector >> 4 * i & 7) of the eight bytes low, high.
MOE_HD uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(low, high, selector);
#else
    const uint64_t bytes = uint64_t(high) << 32 | low;
    uint32_t picked = 0;
    for (int i = 0; i < 4; ++i) picked |= uint32_t(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return picked;
#endif
}

// fp16 to fp32, exact, subnormals included.
MOE_HD float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000u) << 16;
    const uint32_t magnitude = uint32_t(h & 0x7fffu) << 13;
    const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000u;
    return as_float(sign | ((h & 0x7c00u) == 0x7c00u ? special : finite));
}

// Weights are aligned to nothing: a GPU reads the words around them, up to seven bytes beyond the last.
MOE_HD uint32_t load32(const uint8_t* p) {
#if defined(__CUDA_ARCH__)
    const auto address = reinterpret_cast<uintptr_t>(p);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(address & ~uintptr_t(3));
    return __funnelshift_r(words[0], words[1], unsigned(address & 3) * 8);
#else
    uint32_t value;
    memcpy(&value, p, sizeof value);
    return value;
#endif
}

MOE_HD uint16_t load16(const uint8_t* p) {
    return uint16_t(p[0] | p[1] << 8);
}

MOE_HD float load_half(const uint8_t* p) {
    return half_to_float(load16(p));
}

// Four bytes less ``offset`` each, without borrows between them; bytes and offset below 128.
MOE_HD int32_t subtract4(uint32_t bytes, uint32_t offset) {
    return int32_t((((bytes | 0x80808080u) - offset * 0x01010101u) ^ 0x80808080u));
}

}  // namespace moe::cuda
