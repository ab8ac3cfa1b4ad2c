// Quantizing the inputs: a warp for a block of 32, lane i holds element i.
#pragma once

#include "cuda/grid.h"
#include "cuda/kernels.h"

namespace moe::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

struct QuantizeLaunch {
    Inputs inputs;
    int64_t num_rows;
};

template <int>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const QuantizeLaunch launch) {
    const Inputs& in = launch.inputs;
    const int lane = threadIdx.x % 32;
    const int64_t padded = padded_cols(in.cols), blocks = padded / 32;
    const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    if (i >= blocks * launch.num_rows) return;  // the whole warp
    const int64_t row = i / blocks, block = i % blocks, column = block * 32 + lane;
    const float x = column < in.cols ? in.x[row * in.cols + column] : 0.0f;
    float amax = finite_magnitude(x);
    for (int step = 16; step > 0; step /= 2) {
        const float other = shuffle_xor(amax, step);
        amax = other > amax ? other : amax;
    }
    const int8_t q = quantize_one(x, inverse_of(amax));
    int32_t sum = q;
    for (int step = 8; step > 0; step /= 2) sum += shuffle_xor(sum, step);
    in.q[row * padded + column] = q;
    if (lane % 16 == 0) in.sums[row * (padded / 16) + column / 16] = int16_t(sum);
    if (lane == 0) in.d[row * blocks + block] = divide_rn(amax, 127.0f);
}

struct FetchLaunch {
    Word16* to;
    const Word16* from;
    int64_t num_words;
};

template <int>
__global__ void __launch_bounds__(kThreads) fetch_kernel(const FetchLaunch launch) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < launch.num_words) launch.to[i] = launch.from[i];
}

struct ActivateLaunch {
    Activation activation;
    const float *gate, *up;
    int64_t n;
    float* out;
};

template <int>
__global__ void __launch_bounds__(kThreads) activate_kernel(const ActivateLaunch launch) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i < launch.n) launch.out[i] = activate(launch.activation, launch.gate[i], launch.up[i]);
}

// Row `pair` of the inputs that a tile's token reads.
MOE_DEVICE int64_t input_row(const MatrixLaunch& launch, const Tile& tile, int token) {
    const int last = tile.num_pairs - 1;  // tokens that do not exist read the last one's, and are not stored
    const int32_t pair = tile.first_pair + (token < last ? token : last);
    return launch.input_rows ? launch.input_rows[pair] : pair;
}

// Where a weight row is, and its bias.
struct RowPlace {
    const uint8_t* matrix;
    const float* bias;
    int64_t row;
};

MOE_DEVICE RowPlace gate_of(const MatrixLaunch& launch, const Tile& tile, int64_t row) {
    const bool interleaved = launch.is_gate_up && launch.row_order == RowOrder::INTERLEAVED;
    return {tile.weights, tile.bias, interleaved ? 2 * row : row};
}

MOE_DEVICE RowPlace up_of(const MatrixLaunch& launch, const Tile& tile, int64_t row) {
    if (launch.row_order == RowOrder::SPLIT) return {tile.up, tile.up_bias, row};
    const bool interleaved = launch.row_order == RowOrder::INTERLEAVED;
    return {tile.weights, tile.bias, interleaved ? 2 * row + 1 : launch.rows + row};
}

// Weight rows are computed two by two: gate and up of output i, or outputs 2 * i and 2 * i + 1.
MOE_DEVICE int64_t row_pairs(const MatrixLaunch& launch) {
    return launch.is_gate_up ? launch.rows : (launch.rows + 1) / 2;
}

// Row `which` (0, 1) of pair i; beyond the last row the last one, whose result is not stored twice.
MOE_DEVICE RowPlace row_of_pair(const MatrixLaunch& launch, const Tile& tile, int64_t i, int which) {
    const int64_t last = row_pairs(launch) - 1, pair = i < last ? i : last;
    if (launch.is_gate_up) return which == 0 ? gate_of(launch, tile, pair) : up_of(launch, tile, pair);
    const int64_t row = 2 * pair + which;
    return gate_of(launch, tile, row < launch.rows ? row : launch.rows - 1);
}

MOE_DEVICE float with_bias(float y, const RowPlace& place) {
    return place.bias ? y + place.bias[place.row] : y;
}

// Stores what the two rows of pair i gave one token.
MOE_DEVICE void store_pair(const MatrixLaunch& launch, const Tile& tile, int64_t i, int token, float first,
                           float second) {
    if (token >= tile.num_pairs || i >= row_pairs(launch)) return;
    const float y0 = with_bias(first, row_of_pair(launch, tile, i, 0));
    const float y1 = with_bias(second, row_of_pair(launch, tile, i, 1));
    float* out = launch.out + int64_t(tile.first_pair + token) * launch.rows;
    if (launch.is_gate_up) {
        out[i] = activate(launch.activation, y0, y1);
    } else {
        out[2 * i] = y0;
        if (2 * i + 1 < launch.rows) out[2 * i + 1] = y1;
    }
}

}  // namespace moe::cuda
