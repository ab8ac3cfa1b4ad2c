// Launches of arithmetic v1 on a GPU: the same bits as csrc/cpu. Plain structs and raw pointers, no torch.
#pragma once

#include <cstdint>

#include "cuda/elementwise.h"

struct CUstream_st;

namespace moe::cuda {

constexpr int kMaxGroups = 64;  // experts of one launch: their pointers travel as kernel arguments

// One matrix for some tokens: rows [0, rows) of `weights` times the activations of the group's pairs.
struct Group {
    const uint8_t* weights;  // packed rows, aligned to nothing; readable to the next 4-byte boundary
    const uint8_t* up;       // the up matrix where gate and up are apart, else null
    const float* bias;       // (rows,), or null
    const float* up_bias;    // with `up`
    int32_t first_pair;      // pairs [first_pair, first_pair + num_pairs)
    int32_t num_pairs;
};

enum class RowOrder : int { GATE_UP, INTERLEAVED, SPLIT };

struct MatrixLaunch {
    int ggml_type;          // of the weights, and of `up`
    int64_t rows, cols;     // of one output: a fused launch has 2 * rows weight rows
    const float* x;         // (N, cols), on the device
    const int32_t* x_rows;  // (P,) row of x of each pair, on the device; null: pair p reads row p
    float* out;             // (P, rows), on the device
    bool is_gate_up;        // out = act(gate row, up row)
    RowOrder row_order;
    Activation activation;
    int num_groups;
    Group groups[kMaxGroups];
};

// Whether the GPU has a kernel for the type.
bool has_kernel(int ggml_type);

// Queues one kernel on `stream`; returns the CUDA error, 0 for success.
int launch_rows(const MatrixLaunch& launch, CUstream_st* stream);

// out[token] = out[token] + weight * row, pairs in ascending order; pair_tokens ascends by expert, not token.
int launch_weighted_sum(const float* rows, const int32_t* pair_tokens, const float* pair_weights,
                        int32_t num_pairs, int64_t num_tokens, int64_t cols, float* out, CUstream_st* stream);

}  // namespace moe::cuda
