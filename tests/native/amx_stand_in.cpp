// csrc/cpu/kernels_amx.cpp over the stand-in of AMX's tiles, for tests/test_amx.py.
#define MOE_AMX_STAND_IN "amx_stand_in.h"
#include <algorithm>
#include <vector>

#include "cpu/kernels_amx.cpp"

namespace moe {
Grids grids;
}

using namespace moe;

// out (num_tokens, rows) = x weights^T; the tokens are computed in reverse order. Returns how many times the
// stand-in was asked for what a processor refuses, or -1 if a tile is still configured.
extern "C" int amx_linear(int type, const uint8_t* weights, const float* x, int64_t num_tokens, int64_t rows,
                          int64_t cols, int spoiled_bit, float* out) {
    static uint64_t version = 0;
    const int64_t padded = (cols + kSuperblock - 1) / kSuperblock * kSuperblock;
    std::vector<int16_t> q(num_tokens * padded), sums(num_tokens * padded / 16);
    std::vector<float> d(num_tokens * padded / kBlock);
    static std::vector<ActivationTile> tiles;  // at the same place again: only the version is new
    if (tiles.size() < size_t(num_tokens * padded / kSuperblock))
        tiles.resize(num_tokens * padded / kSuperblock);
    std::vector<int32_t> tokens;
    for (int64_t t = 0; t < num_tokens; ++t) {
        kernels_amx.quantize(x + t * cols, cols, padded, q.data() + t * padded,
                             d.data() + t * padded / kBlock, sums.data() + t * padded / 16,
                             tiles.data() + t * padded / kSuperblock);
        tokens.push_back(int32_t(num_tokens - 1 - t));
    }
    Activations a;
    a.q = q.data(), a.d = d.data(), a.sums = sums.data(), a.tiles = tiles.data();
    a.cols = cols, a.padded_cols = padded, a.version = ++version;
    amx::errors = 0, amx::spoiled_bit = spoiled_bit;
    std::vector<float> reversed(num_tokens * rows);
    for (int64_t row = 0; row < rows; row += kRowTile)
        kernels_amx.rows[type]({weights, rows, cols, row, std::min(rows, row + kRowTile), &a, tokens.data(),
                                int(num_tokens), reversed.data() + row, rows});
    for (int64_t t = 0; t < num_tokens; ++t)
        std::copy_n(reversed.data() + (num_tokens - 1 - t) * rows, rows, out + t * rows);
    return amx::configured ? -1 : amx::errors;
}
