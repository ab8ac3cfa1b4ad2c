// ggml's formats of 256 weights with scales of scales (formats.h).
#pragma once

#include "cuda/formats.h"

namespace moe::cuda {

struct FormatIQ4_XS : SuperblockFormat {
    static constexpr int kBytes = 136;  // d, 8 x 2 high scale bits, 8 x 4 low ones, codes[128]
    MOE_HD static Eight load(const uint8_t* p, int c, int k) {
        Eight e;
        for (int half = 0; half < 2; ++half)
            e.codes[half] = nonlinear_levels(nibbles_of(p + 8 + 16 * c, k, half));
        const int low = p[4 + c / 2] >> (c % 2 * 4) & 15, high = load16(p + 2) >> (2 * c) & 3;
        e.scale = (low | high << 4) - 32;
        e.d = load_half(p);
        return e;
    }
};

// Two bits of weights 8 * k .. of block c: 32 bytes hold those of four blocks, lowest bits first.
MOE_HD uint32_t two_bits_of(const uint8_t* p, int c, int k, int half) {
    return load32(p + c / 4 * 32 + 8 * k + 4 * half) >> (2 * (c % 4)) & 0x03030303u;
}

struct FormatQ2_K : SuperblockFormat {
    static constexpr int kBytes = 84;  // scales and mins[16], codes[64], d, dmin
    static constexpr bool kMins = true, kHalves = true;
    MOE_HD static Eight load(const uint8_t* p, int c, int k) {
        Eight e;
        for (int half = 0; half < 2; ++half) e.codes[half] = int32_t(two_bits_of(p + 16, c, k, half));
        e.scale = p[2 * c + k / 2] & 15;
        e.min = p[2 * c + k / 2] >> 4;
        e.d = load_half(p + 80);
        e.dmin = load_half(p + 82);
        return e;
    }
};

struct FormatQ3_K : SuperblockFormat {
    static constexpr int kBytes = 110;  // high bits[32], codes[64], scales[12], d
    static constexpr bool kHalves = true;
    MOE_HD static Eight load(const uint8_t* p, int c, int k) {
        Eight e;
        for (int half = 0; half < 2; ++half) {
            const uint32_t high = load32(p + 8 * k + 4 * half) >> c & 0x01010101u;
            e.codes[half] = subtract4(two_bits_of(p + 32, c, k, half) | high << 2, 4);
        }
        const int j = 2 * c + k / 2;  // of 16 scales: low nibbles first, then two bits of each
        const int low = p[96 + j % 8] >> (j / 8 * 4) & 15, high = p[104 + j % 4] >> (2 * (j / 4)) & 3;
        e.scale = (low | high << 4) - 32;
        e.d = load_half(p + 108);
        return e;
    }
};

// Scale and minimum j of 8, 6 bits each in 12 bytes: four whole, the others' upper bits beside them.
MOE_HD void scale_and_min(const uint8_t* p, int j, Eight& e) {
    if (j < 4) {
        e.scale = p[j] & 63;
        e.min = p[j + 4] & 63;
    } else {
        e.scale = (p[j + 4] & 15) | p[j - 4] >> 6 << 4;
        e.min = p[j + 4] >> 4 | p[j] >> 6 << 4;
    }
}

// Weights 8 * k .. of block c where 32 bytes hold the nibbles of two blocks, low ones first.
MOE_HD uint32_t wide_nibbles_of(const uint8_t* p, int c, int k, int half) {
    const uint32_t bytes = load32(p + c / 2 * 32 + 8 * k + 4 * half);
    return (c % 2 ? bytes >> 4 : bytes) & 0x0f0f0f0fu;
}

struct FormatQ4_K : SuperblockFormat {
    static constexpr int kBytes = 144;  // d, dmin, scales and mins[12], codes[128]
    static constexpr bool kMins = true;
    MOE_HD static Eight load(const uint8_t* p, int c, int k) {
        Eight e;
        for (int half = 0; half < 2; ++half) e.codes[half] = int32_t(wide_nibbles_of(p + 16, c, k, half));
        scale_and_min(p + 4, c, e);
        e.d = load_half(p);
        e.dmin = load_half(p + 2);
        return e;
    }
};

struct FormatQ5_K : SuperblockFormat {
    static constexpr int kBytes = 176;  // d, dmin, scales and mins[12], high bits[32], codes[128]
    static constexpr bool kMins = true;
    MOE_HD static Eight load(const uint8_t* p, int c, int k) {
        Eight e;
        for (int half = 0; half < 2; ++half) {
            const uint32_t high = load32(p + 16 + 8 * k + 4 * half) >> c & 0x01010101u;
            e.codes[half] = int32_t(wide_nibbles_of(p + 48, c, k, half) | high << 4);
        }
        scale_and_min(p + 4, c, e);
        e.d = load_half(p);
        e.dmin = load_half(p + 2);
        return e;
    }
};

struct FormatQ6_K : SuperblockFormat {
    static constexpr int kBytes = 210;  // low nibbles[128], high bits[64], scales[16], d
    static constexpr bool kHalves = true;
    MOE_HD static Eight load(const uint8_t* p, int c, int k) {
        const int upper = c / 4, part = c % 4;  // 128 weights each, in four parts of 32
        Eight e;
        for (int half = 0; half < 2; ++half) {
            const int i = 8 * k + 4 * half;
            const uint32_t low = load32(p + 64 * upper + part % 2 * 32 + i) >> (part / 2 * 4) & 0x0f0f0f0fu;
            const uint32_t high = load32(p + 128 + 32 * upper + i) >> (2 * part) & 0x03030303u;
            e.codes[half] = subtract4(low | high << 4, 32);
        }
        e.scale = int8_t(p[192 + 2 * c + k / 2]);
        e.d = load_half(p + 208);
        return e;
    }
};

}  // namespace moe::cuda
