// Launches of arithmetic v1 on a GPU: the same bits as csrc/cpu. Plain structs and raw pointers, no torch.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/elementwise.h"

struct CUstream_st;

namespace moe::cuda {

// Rows of numbers to multiply with, on the device. Packed weights read q, d and sums; float ones read x.
struct Inputs {
    const float* x;    // (N, cols)
    int8_t* q;         // (N, padded), zero beyond cols; null where nothing is packed
    float* d;          // (N, padded / 32)
    int16_t* sums;     // (N, padded / 16), sums of q
    int64_t cols = 0;  // padded: rounded up to whole superblocks of 256
};

MOE_HD int64_t padded_cols(int64_t cols) {
    return (cols + 255) / 256 * 256;
}

// Bytes of q, d and sums of a row.
MOE_HD constexpr int64_t packed_input_bytes(int64_t cols) {
    const int64_t padded = (cols + 255) / 256 * 256;
    return padded + padded / 32 * 4 + padded / 16 * 2;
}

// Rows x (num_rows, cols) and where they are packed: num_rows * packed_input_bytes(cols) bytes from `packed`
// on.
inline Inputs packed_inputs(const float* x, float* packed, int64_t num_rows, int64_t cols) {
    const int64_t padded = padded_cols(cols);
    auto* sums = reinterpret_cast<int16_t*>(packed + num_rows * padded / 32);
    return {x, reinterpret_cast<int8_t*>(sums + num_rows * padded / 16), packed, sums, cols};
}

// The same without the first rows.
inline Inputs rows_from(const Inputs& inputs, int64_t first) {
    const int64_t padded = padded_cols(inputs.cols);
    return {inputs.x + first * inputs.cols, inputs.q + first * padded, inputs.d + first * (padded / 32),
            inputs.sums + first * (padded / 16), inputs.cols};
}

// One matrix for a few rows of the inputs.
struct Tile {
    const uint8_t* weights;  // packed rows, aligned to nothing; readable to the 16-byte boundaries around
    const uint8_t* up;       // the up matrix where gate and up are apart, else null
    const float* bias;       // of the matrix' rows, or null
    const float* up_bias;    // with `up`
    int32_t first_pair;      // pairs [first_pair, first_pair + num_pairs)
    int32_t num_pairs;
};

enum class RowOrder : int { GATE_UP, INTERLEAVED, SPLIT };

struct MatrixLaunch {
    int ggml_type;    // of the weights, and of `up`
    bool transposed;  // stored (cols, weight rows); float types only
    bool is_gate_up;  // out = act(gate row, up row): 2 * rows weight rows
    int64_t rows;     // of the output
    Inputs inputs;
    const int32_t*
        input_rows;  // (P,) row of the inputs of each pair, on the device; null: pair p reads row p
    float* out;      // (P, rows), on the device
    RowOrder row_order;
    Activation activation;
    const Tile* tiles;  // (num_tiles,), on the device; at most tokens_per_tile pairs each
    int num_tiles;
    int tokens_per_tile;  // what choose_tile said
};

// Whether the GPU has a kernel for the type, and for it transposed.
bool has_kernel(int ggml_type, bool transposed);

// How many pairs a tile should have at most, if the busiest matrix of a launch has `most_pairs`.
int choose_tile(int ggml_type, bool transposed, int most_pairs);

// Each queues one kernel on `stream`; returns the CUDA error, 0 for success.
int launch_quantize(const Inputs& inputs, int64_t num_rows, CUstream_st* stream);
int launch_rows(const MatrixLaunch& launch, CUstream_st* stream);
// out[i] = act(gate[i], up[i])
int launch_activate(const Activation& activation, const float* gate, const float* up, int64_t n, float* out,
                    CUstream_st* stream);
// Copies from pinned host memory by reading it; both 16-byte aligned with room to whole 16 bytes.
int launch_fetch(void* to, const void* from, int64_t num_bytes, CUstream_st* stream);

}  // namespace moe::cuda
