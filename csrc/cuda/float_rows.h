// Float weights (F32, F16, BF16, FP8 with a scale for 128) times one or a few tokens: lane 8 * r + c runs
// chain c of row r, element after element; four rows to a warp. Stored (cols, rows): a thread for two rows,
// all chains in its registers, neighbours reading neighbours.
#pragma once

#include "cuda/activations.h"

namespace moe::cuda {

MOE_HD uint16_t load16_anywhere(const uint8_t* p) {
    return reinterpret_cast<uintptr_t>(p) % 2 ? load16(p) : *reinterpret_cast<const uint16_t*>(p);
}

MOE_HD float load_float_anywhere(const uint8_t* p) {
    if (reinterpret_cast<uintptr_t>(p) % 4 == 0) return *reinterpret_cast<const float*>(p);
    return as_float(uint32_t(load16(p)) | uint32_t(load16(p + 2)) << 16);
}

// Element i of a row, and the bytes of `cols` elements.
struct WeightF32 {
    MOE_HD static float at(const uint8_t* row, int64_t i) { return load_float_anywhere(row + 4 * i); }
    MOE_HD static int64_t bytes(int64_t cols) { return 4 * cols; }
};

struct WeightF16 {
    MOE_HD static float at(const uint8_t* row, int64_t i) {
        return half_to_float(load16_anywhere(row + 2 * i));
    }
    MOE_HD static int64_t bytes(int64_t cols) { return 2 * cols; }
};

struct WeightBF16 {
    MOE_HD static float at(const uint8_t* row, int64_t i) {
        return as_float(uint32_t(load16_anywhere(row + 2 * i)) << 16);
    }
    MOE_HD static int64_t bytes(int64_t cols) { return 2 * cols; }
};

// e4m3 without infinities: 0x7f and 0xff are NaN.
MOE_HD float e4m3_to_float(uint8_t code) {
    const uint32_t sign = uint32_t(code & 0x80) << 24, magnitude = code & 0x7f;
    const float finite = as_float(sign | magnitude << 20) * 0x1p120f;
    return magnitude == 0x7f ? as_float(0x7fc00000u) : finite;
}

// A scale before each 128 codes; a weight is their product, rounded once.
struct WeightF8 {
    MOE_HD static float at(const uint8_t* row, int64_t i) {
        const uint8_t* block = row + i / 128 * 132;
        return e4m3_to_float(block[4 + i % 128]) * load_float_anywhere(block);
    }
    MOE_HD static int64_t bytes(int64_t cols) { return cols / 128 * 132; }
};

// Lane 8 * r + c: chain c by 4, by 2, by 1, within its row.
MOE_DEVICE float tree_of_row(float chain) {
    chain = chain + shuffle_xor(chain, 4);
    chain = chain + shuffle_xor(chain, 2);
    return chain + shuffle_xor(chain, 1);
}

template <class Weight, int kTokens>
__global__ void __launch_bounds__(kThreads) float_rows_kernel(const MatrixLaunch launch) {
    const Tile tile = launch.tiles[blockIdx.y];
    const int lane = threadIdx.x % 32, c = lane % 8, r = lane / 8;
    const int64_t pair = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * 2 + r / 2;
    const RowPlace place = row_of_pair(launch, tile, pair, r % 2);
    const int64_t cols = launch.inputs.cols;
    const uint8_t* row = place.matrix + place.row * Weight::bytes(cols);
    const float* x[kTokens];
    for (int t = 0; t < kTokens; ++t) x[t] = launch.inputs.x + input_row(launch, tile, t) * cols;
    float chain[kTokens] = {};
#pragma unroll 8
    for (int64_t i = c; i < cols; i += 8) {
        const float w = Weight::at(row, i);
        for (int t = 0; t < kTokens; ++t) chain[t] = fma_rn(w, x[t][i], chain[t]);
    }
    for (int t = 0; t < kTokens; ++t) {
        const float y = tree_of_row(chain[t]), other = shuffle_xor(y, 8);  // the pair's second row
        if (lane % 16 == 0) store_pair(launch, tile, pair, t, y, other);
    }
}

template <class Weight, int>
__global__ void __launch_bounds__(kThreads) transposed_rows_kernel(const MatrixLaunch launch) {
    const Tile tile = launch.tiles[blockIdx.y];
    const int64_t pair = int64_t(blockIdx.x) * kThreads + threadIdx.x, cols = launch.inputs.cols;
    if (pair >= row_pairs(launch)) return;
    const bool is_fused = launch.is_gate_up && launch.row_order != RowOrder::SPLIT;
    const int64_t stored_rows = launch.rows * (is_fused ? 2 : 1);
    const float* x = launch.inputs.x + input_row(launch, tile, 0) * cols;
    float y[2];
    for (int r = 0; r < 2; ++r) {
        const RowPlace place = row_of_pair(launch, tile, pair, r);
        float chain[8] = {};
        for (int64_t i = 0; i < cols; i += 8)
#pragma unroll
            for (int c = 0; c < 8; ++c)
                if (i + c < cols)
                    chain[c] = fma_rn(Weight::at(place.matrix, (i + c) * stored_rows + place.row), x[i + c],
                                      chain[c]);
        y[r] =
            ((chain[0] + chain[4]) + (chain[2] + chain[6])) + ((chain[1] + chain[5]) + (chain[3] + chain[7]));
    }
    store_pair(launch, tile, pair, 0, y[0], y[1]);
}

}  // namespace moe::cuda
