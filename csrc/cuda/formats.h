// ggml's block formats as a warp reads them: lane 4 * c + k holds weights 8 * k .. 8 * k + 7 of block c of
// a superblock of 8 blocks. docs/ARITHMETIC.md has the meaning of codes, scales and minimums. Here is what
// they share; the formats are in block_formats.h and superblock_formats.h.
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

MOE_HD int32_t nonlinear_levels(uint32_t nibbles) {
    constexpr Levels kLevels({-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113});
    return look_up4(kLevels, nibbles);
}

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
