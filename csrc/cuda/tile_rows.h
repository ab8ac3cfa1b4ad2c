// Packed weights times many tokens on the int8 tensor cores (sm_80 and later), in the same arithmetic: a
// block computes 32 weight rows by kTokens tokens, and each of its four warps runs two of the eight chains,
// so that a chain stays in registers from the first block of 32 weights to the last. Lane 4 * g + t of a warp
// has the weights 8 * t .. of rows g and g + 8, which is what a tile wants (grid.h) once both sides agree on
// an order of the 32 places.
#pragma once

#include "cuda/packed_rows.h"

namespace moe::cuda {

constexpr int kTileRows = 32;        // 16 pairs of rows
constexpr int kTileSuperblocks = 2;  // of each row, staged at once

// The integer sums of a block for rows g (0, 1) and g + 8 (2, 3), columns 2 t and 2 t + 1.
template <class Format>
MOE_DEVICE void block_sums(const Eight (&w)[2], const EightActivations& a, int t, int32_t (&sums)[4]) {
    const int32_t codes[4] = {w[0].codes[0], w[1].codes[0], w[0].codes[1], w[1].codes[1]};
    int32_t whole[4] = {};
    multiply_tiles(whole, codes, a.q);
    if constexpr (!Format::kHalves) {
        for (int i = 0; i < 4; ++i) sums[i] = w[i / 2].scale * whole[i];
    } else {  // lanes t < 2 hold the first 16 weights: once more with the others left out
        const int32_t mask = t < 2 ? -1 : 0;
        const int32_t first_codes[4] = {codes[0] & mask, codes[1] & mask, codes[2] & mask, codes[3] & mask};
        int32_t first[4] = {};
        multiply_tiles(first, first_codes, a.q);
        for (int r = 0; r < 2; ++r) {
            const int32_t other = shuffle_xor(w[r].scale, 2);
            const int32_t scales[2] = {t < 2 ? w[r].scale : other, t < 2 ? other : w[r].scale};
            for (int i = 2 * r; i < 2 * r + 2; ++i)
                sums[i] = scales[0] * first[i] + scales[1] * (whole[i] - first[i]);
        }
    }
}

// Minimums of a block times the sums of a token's activations.
template <class Format>
MOE_DEVICE int32_t min_sum(const Eight& w, int t, const int16_t* sums) {
    if constexpr (!Format::kHalves) return w.min * (sums[0] + sums[1]);
    const int32_t other = shuffle_xor(w.min, 2);
    return (t < 2 ? w.min : other) * sums[0] + (t < 2 ? other : w.min) * sums[1];
}

template <class Format, int kTokens>
MOE_HD constexpr int tile_shared_bytes() {
    const int staged = kTileRows * staged_bytes(kTileSuperblocks * kSuperblockBytes<Format>);
    const int chains = 8 * kTileRows * kTokens * int(sizeof(float));
    return staged > chains ? staged : chains;
}

// y of one place from the eight chains that the warps left in shared memory.
template <int kTokens>
MOE_DEVICE float tree_of_shared(const float* chains, int row, int token) {
    const auto c = [&](int i) { return chains[(i * kTileRows + row) * kTokens + token]; };
    return ((c(0) + c(4)) + (c(2) + c(6))) + ((c(1) + c(5)) + (c(3) + c(7)));
}

// Weight row 16 * m + 8 * which + g of a tile is row `which` of its pair 8 * m + g.
MOE_DEVICE RowPlace tile_row(const MatrixLaunch& launch, const Tile& tile, int64_t first_pair, int row) {
    return row_of_pair(launch, tile, first_pair + row / 16 * 8 + row % 8, row / 8 % 2);
}

// The warps' chains meet in shared memory; each thread sums the trees of its places, in pairs of rows: the
// first row of a pair, then the second.
template <int kTokens>
MOE_DEVICE void sum_over_warps(const float (&chains)[2][2][kTokens / 8][4], float* shared,
                               float (&y)[kTileRows * kTokens / kThreads]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    sync_block();
#pragma unroll
    for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < kTokens / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = 16 * m + 8 * (i / 2) + g, token = 8 * n + 2 * t + i % 2;
                    shared[((2 * warp + b) * kTileRows + row) * kTokens + token] = chains[b][m][n][i];
                }
    sync_block();
    for (int p = 0; p < kTileRows * kTokens / kThreads; ++p) {
        const int place = p / 2 * kThreads + threadIdx.x, pair = place / kTokens;
        y[p] = tree_of_shared<kTokens>(shared, pair / 8 * 16 + p % 2 * 8 + pair % 8, place % kTokens);
    }
}

template <class Format, int kTokens>
MOE_DEVICE void tile_rows(const MatrixLaunch& launch) {
    constexpr int kColumns = kTokens / 8;  // tiles of eight tokens
    constexpr int kPlaces = kTileRows * kTokens / kThreads;
    constexpr int kStaged = staged_bytes(kTileSuperblocks * kSuperblockBytes<Format>);
    __shared__ __align__(16) uint8_t memory[tile_shared_bytes<Format, kTokens>()];
    const Tile tile = launch.tiles[blockIdx.y];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int64_t first_pair = int64_t(blockIdx.x) * (kTileRows / 2);
    const int64_t cols = launch.inputs.cols, padded = padded_cols(cols), blocks = cols / 32;
    const int64_t row_bytes = cols / Format::kElements * Format::kBytes;
    int64_t own_input[kColumns], out_inputs[kColumns][2];  // of column g; of columns 2 t, 2 t + 1
    for (int n = 0; n < kColumns; ++n) {
        own_input[n] = input_row(launch, tile, 8 * n + g);
        for (int j = 0; j < 2; ++j) out_inputs[n][j] = input_row(launch, tile, 8 * n + 2 * t + j);
    }

    float sums[2][2][kColumns][4] = {};  // chain 2 * warp + b, rows 16 * m .., tokens 8 * n ..
    float mins[2][2][kColumns][4] = {};
    for (int64_t first = 0; first < cols; first += kTileSuperblocks * 256) {
        const int64_t left = cols - first;
        const int elements = int(left < kTileSuperblocks * 256 ? left : kTileSuperblocks * 256);
        const int64_t offset = first / Format::kElements * Format::kBytes;
        const int num_bytes = elements / Format::kElements * Format::kBytes;
        sync_block();
        for (int row = warp; row < kTileRows; row += kWarps) {
            const RowPlace place = tile_row(launch, tile, first_pair, row);
            stage(place.matrix + place.row * row_bytes + offset, num_bytes, memory + row * kStaged, lane, 32);
        }
        const uint8_t* bytes[2][2];  // of rows g and g + 8, 16 + g and 24 + g
        for (int m = 0; m < 2; ++m)
            for (int r = 0; r < 2; ++r) {
                const int row = 16 * m + 8 * r + g;
                const RowPlace place = tile_row(launch, tile, first_pair, row);
                const auto begin = reinterpret_cast<uintptr_t>(place.matrix) + place.row * row_bytes;
                bytes[m][r] = memory + row * kStaged + (begin + offset) % 16;
            }
        sync_block();
        for (int s = 0; s * 256 < elements; ++s) {
#pragma unroll
            for (int b = 0; b < 2; ++b) {
                const int c = 2 * warp + b;
                const int64_t block = first / 32 + s * 8 + c;
                if (block >= blocks) continue;  // the whole warp
                EightActivations a[kColumns];
                for (int n = 0; n < kColumns; ++n)
                    a[n] = load_eight(launch.inputs.q + own_input[n] * padded + block * 32 + 8 * t, 0.0f);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    Eight w[2];
                    for (int r = 0; r < 2; ++r)
                        w[r] = Format::load(bytes[m][r] + s * kSuperblockBytes<Format>, c, t);
#pragma unroll
                    for (int n = 0; n < kColumns; ++n) {
                        int32_t block_sum[4];
                        block_sums<Format>(w, a[n], t, block_sum);
                        for (int i = 0; i < 4; ++i) {
                            const int64_t input = out_inputs[n][i % 2];
                            const float d_a = launch.inputs.d[input * (padded / 32) + block];
                            Chain chain{sums[b][m][n][i], mins[b][m][n][i]};
                            Sums total{block_sum[i], 0};
                            if constexpr (Format::kMins)
                                total.min = min_sum<Format>(
                                    w[i / 2], t, launch.inputs.sums + input * (padded / 16) + 2 * block);
                            advance<Format>(chain, total, w[i / 2], d_a);
                            sums[b][m][n][i] = chain.sum;
                            mins[b][m][n][i] = chain.min;
                        }
                    }
                }
            }
        }
    }

    float* shared = reinterpret_cast<float*>(memory);
    float y[kPlaces], y_min[kPlaces] = {};
    sum_over_warps<kTokens>(sums, shared, y);
    if constexpr (Format::kMins) {
        sum_over_warps<kTokens>(mins, shared, y_min);
        for (int p = 0; p < kPlaces; ++p) y[p] = y[p] - y_min[p];
    }
    for (int p = 0; p < kPlaces; p += 2) {
        const int place = p / 2 * kThreads + threadIdx.x;
        store_pair(launch, tile, first_pair + place / kTokens, place % kTokens, y[p], y[p + 1]);
    }
}

template <class Format, int kTokens>
__global__ void __launch_bounds__(kThreads) tile_rows_kernel(const MatrixLaunch launch) {
    if constexpr (kHasTiles) tile_rows<Format, kTokens>(launch);
}

}  // namespace moe::cuda
