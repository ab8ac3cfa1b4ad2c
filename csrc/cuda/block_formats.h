// ggml's formats whose scales belong to 32 weights (formats.h).
#pragma once

#include "cuda/formats.h"

namespace moe::cuda {

struct FormatQ4_0 : BlockFormat {
    static constexpr int kBytes = 18;
    MOE_HD static Eight load(const uint8_t* superblock, int c, int k) {
        const uint8_t* block = superblock + c * kBytes;
        Eight e;
        for (int half = 0; half < 2; ++half) e.codes[half] = subtract4(nibbles_of(block + 2, k, half), 8);
        e.d = load_half(block);
        return e;
    }
};

struct FormatQ4_1 : BlockFormat {
    static constexpr int kBytes = 20;
    static constexpr bool kMins = true;
    MOE_HD static Eight load(const uint8_t* superblock, int c, int k) {
        const uint8_t* block = superblock + c * kBytes;
        Eight e;
        for (int half = 0; half < 2; ++half) e.codes[half] = int32_t(nibbles_of(block + 4, k, half));
        e.d = load_half(block);
        e.min = 1;
        e.dmin = -load_half(block + 2);
        return e;
    }
};

// The fifth bits of weights 8 * k .. in four bytes, bit i of weight i.
MOE_HD uint32_t with_fifth_bit(uint32_t nibbles, const uint8_t* high, int k, int half) {
    return nibbles | spread4(high[k] >> (4 * half), 16);
}

struct FormatQ5_0 : BlockFormat {
    static constexpr int kBytes = 22;
    MOE_HD static Eight load(const uint8_t* superblock, int c, int k) {
        const uint8_t* block = superblock + c * kBytes;
        Eight e;
        for (int half = 0; half < 2; ++half) {
            const uint32_t nibbles = nibbles_of(block + 6, k, half);
            e.codes[half] = subtract4(with_fifth_bit(nibbles, block + 2, k, half), 16);
        }
        e.d = load_half(block);
        return e;
    }
};

struct FormatQ5_1 : BlockFormat {
    static constexpr int kBytes = 24;
    static constexpr bool kMins = true;
    MOE_HD static Eight load(const uint8_t* superblock, int c, int k) {
        const uint8_t* block = superblock + c * kBytes;
        Eight e;
        for (int half = 0; half < 2; ++half) {
            const uint32_t nibbles = nibbles_of(block + 8, k, half);
            e.codes[half] = int32_t(with_fifth_bit(nibbles, block + 4, k, half));
        }
        e.d = load_half(block);
        e.min = 1;
        e.dmin = -load_half(block + 2);
        return e;
    }
};

struct FormatQ8_0 : BlockFormat {
    static constexpr int kBytes = 34;
    MOE_HD static Eight load(const uint8_t* superblock, int c, int k) {
        const uint8_t* block = superblock + c * kBytes;
        Eight e;
        for (int half = 0; half < 2; ++half) e.codes[half] = int32_t(load32(block + 2 + 8 * k + 4 * half));
        e.d = load_half(block);
        return e;
    }
};

struct FormatIQ4_NL : BlockFormat {
    static constexpr int kBytes = 18;
    MOE_HD static Eight load(const uint8_t* superblock, int c, int k) {
        const uint8_t* block = superblock + c * kBytes;
        Eight e;
        for (int half = 0; half < 2; ++half) e.codes[half] = nonlinear_levels(nibbles_of(block + 2, k, half));
        e.d = load_half(block);
        return e;
    }
};

// Codes are doubled e2m1, so that the scale is half of e8m0's: 2^(e - 128), subnormal for e < 2.
struct FormatMXFP4 : BlockFormat {
    static constexpr int kBytes = 17;
    MOE_HD static Eight load(const uint8_t* superblock, int c, int k) {
        constexpr Levels kLevels({0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12});
        const uint8_t* block = superblock + c * kBytes;
        Eight e;
        for (int half = 0; half < 2; ++half)
            e.codes[half] = look_up4(kLevels, nibbles_of(block + 1, k, half));
        e.d = as_float(block[0] < 2 ? 0x00200000u << block[0] : uint32_t(block[0] - 1) << 23);
        return e;
    }
};

}  // namespace moe::cuda
