// The arithmetic of csrc/cuda on the CPU: a warp's lanes one after the other, its shuffles as loops.
// tests/test_cuda_arithmetic.py loads it and holds it to the golden vectors; indices into grids and shared
// memory, and shuffles themselves, are left for a card.
#include <cmath>
#include <cstdint>
#include <vector>

#include "cuda/block_formats.h"
#include "cuda/elementwise.h"
#include "cuda/superblock_formats.h"

using namespace moe::cuda;

namespace {

struct Quantized {
    std::vector<int8_t> q;
    std::vector<float> d;
};

Quantized quantize(const float* x, int64_t cols) {
    Quantized a{std::vector<int8_t>(cols), std::vector<float>(cols / 32)};
    for (int64_t block = 0; block < cols / 32; ++block) {
        float amax = 0;
        for (int i = 0; i < 32; ++i) amax = std::fmax(amax, finite_magnitude(x[block * 32 + i]));
        for (int i = 0; i < 32; ++i) a.q[block * 32 + i] = quantize_one(x[block * 32 + i], inverse_of(amax));
        a.d[block] = divide_rn(amax, 127.0f);
    }
    return a;
}

float tree(const Chain (&chains)[8], float Chain::* part) {
    const auto c = [&](int i) { return chains[i].*part; };
    return ((c(0) + c(4)) + (c(2) + c(6))) + ((c(1) + c(5)) + (c(3) + c(7)));
}

template <class Format>
float row_product(const uint8_t* row, int64_t cols, const Quantized& a) {
    Chain chains[8];
    for (int64_t block = 0; block < cols / 32; ++block) {
        const int c = int(block % 8);
        const uint8_t* superblock = row + block / 8 * (256 / Format::kElements * Format::kBytes);
        Sums quad;
        Eight w;
        for (int k = 0; k < 4; ++k) {
            w = Format::load(superblock, c, k);
            EightActivations activations{{0, 0}, 0};
            memcpy(activations.q, a.q.data() + block * 32 + 8 * k, 8);
            const Sums lane = multiply<Format>(w, activations);
            quad.sum += lane.sum;
            quad.min += lane.min;
        }
        advance<Format>(chains[c], quad, w, a.d[block]);
    }
    const float y = tree(chains, &Chain::sum);
    if constexpr (Format::kMins) return y - tree(chains, &Chain::min);
    return y;
}

template <class Format>
void rows(const uint8_t* packed, const float* x, int64_t tokens, int64_t num_rows, int64_t cols, float* out) {
    const int64_t row_bytes = cols / Format::kElements * Format::kBytes;
    for (int64_t t = 0; t < tokens; ++t) {
        const Quantized a = quantize(x + t * cols, cols);
        for (int64_t r = 0; r < num_rows; ++r)
            out[t * num_rows + r] = row_product<Format>(packed + r * row_bytes, cols, a);
    }
}

}  // namespace

// Returns 0, or 1 for a type without a kernel.
extern "C" int cuda_linear(int type, const uint8_t* packed, const float* x, int64_t tokens, int64_t num_rows,
                           int64_t cols, float* out) {
    const auto run = [&](auto rows_of_format) {
        rows_of_format(packed, x, tokens, num_rows, cols, out);
        return 0;
    };
    switch (type) {
        case 2:
            return run(rows<FormatQ4_0>);
        case 3:
            return run(rows<FormatQ4_1>);
        case 6:
            return run(rows<FormatQ5_0>);
        case 7:
            return run(rows<FormatQ5_1>);
        case 8:
            return run(rows<FormatQ8_0>);
        case 12:
            return run(rows<FormatQ4_K>);
        case 13:
            return run(rows<FormatQ5_K>);
        case 14:
            return run(rows<FormatQ6_K>);
        case 20:
            return run(rows<FormatIQ4_NL>);
        case 10:
            return run(rows<FormatQ2_K>);
        case 11:
            return run(rows<FormatQ3_K>);
        case 23:
            return run(rows<FormatIQ4_XS>);
        case 39:
            return run(rows<FormatMXFP4>);
        default:
            return 1;
    }
}

extern "C" void cuda_activate(int kind, float alpha, float limit, const float* gate, const float* up,
                              int64_t n, float* out) {
    const Activation activation{ActivationKind(kind), alpha, limit};
    for (int64_t i = 0; i < n; ++i) out[i] = activate(activation, gate[i], up[i]);
}
