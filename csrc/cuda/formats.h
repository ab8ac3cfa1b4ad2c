// ggml's block formats as a warp reads them: lane 4 * c + k holds weights 8 * k .. 8 * k + 7 of block c of
// a superblock of 8 blocks. docs/ARITHMETIC.md has the meaning of codes, scales and minimums.
#pragma once

#include "cuda/portable.h"

namespace moe::cuda {

// Eight weights of one block: weight = d * scale * code - dmin * min.
struct Eight {
    int32_t codes[2];  // int8 x 4, in order
    int32_t scale = 1;
    int32_t min = 0;
    float d = 0;
    float dmin = 0;
};

// kElements consecutive weights take kBytes bytes; kHalves: scales and mins belong to 16 weights, not 32.
struct BlockFormat {
    static constexpr int kElements = 32;
    static constexpr bool kMins = false, kHalves = false;
};

struct SuperblockFormat {
    static constexpr int kElements = 256;
    static constexpr bool kMins = false, kHalves = false;
};

// Codes of weights 8 * k ..: nibbles of 16 bytes, low ones first.
MOE_HD uint32_t nibbles_of(const uint8_t* p, int k, int half) {
    const uint32_t bytes = load32(p + k % 2 * 8 + half * 4);
    return (k < 2 ? bytes : bytes >> 4) & 0x0f0f0f0fu;
}

// 0 or ``value`` in each byte, by bits 0..3 of ``bits``.
MOE_HD uint32_t spread4(uint32_t bits, uint32_t value) {
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) bytes |= (bits >> i & 1) * value << (8 * i);
    return bytes;
}

// Sixteen int8 levels in four words.
struct Levels {
    uint32_t words[4];
    MOE_HD constexpr explicit Levels(const int8_t (&levels)[16]) : words{} {
        for (int i = 0; i < 16; ++i) words[i / 4] |= uint32_t(uint8_t(levels[i])) << (i % 4 * 8);
    }
};

// levels[nibble] in each byte, in registers: a table in memory would be read once for each nibble.
MOE_HD int32_t look_up4(const Levels& levels, uint32_t nibbles) {
    const uint32_t low3 = nibbles & 0x07070707u;
    const uint32_t selector = (low3 & 7) | (low3 >> 4 & 0x70) | (low3 >> 8 & 0x700) | (low3 >> 12 & 0x7000);
    const uint32_t upper = (nibbles >> 3 & 0x01010101u) * 255;
    return int32_t((pick_bytes(levels.words[0], levels.words[1], selector) & ~upper) |
                   (pick_bytes(levels.words[2], levels.words[3], selector) & upper));
}

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

MOE_HD int32_t nonlinear_levels(uint32_t nibbles) {
    constexpr Levels kLevels({-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113});
    return look_up4(kLevels, nibbles);
}

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

// Eight activations of the same place: int8 codes and their block's scale.
struct EightActivations {
    int32_t q[2];
    float d;
};

// What one lane adds to its block's integer sums.
struct Sums {
    int32_t sum = 0;
    int32_t min = 0;
};

template <class Format>
MOE_HD Sums multiply(const Eight& w, const EightActivations& a) {
    Sums s;
    s.sum = w.scale * dot4(w.codes[1], a.q[1], dot4(w.codes[0], a.q[0], 0));
    if constexpr (Format::kMins) s.min = w.min * dot4(0x01010101, a.q[1], dot4(0x01010101, a.q[0], 0));
    return s;
}

// A row's eight chains, each advanced block by block in ascending order.
struct Chain {
    float sum = 0;
    float min = 0;
};

// ``block`` holds the sums of all four lanes of the block.
template <class Format>
MOE_HD void advance(Chain& chain, const Sums& block, const Eight& w, float d_a) {
    chain.sum = fma_rn(float(block.sum), w.d * d_a, chain.sum);
    if constexpr (Format::kMins) chain.min = fma_rn(float(block.min), w.dmin * d_a, chain.min);
}

}  // namespace moe::cuda
