// Launches of what tokens need besides matrices: csrc/decode/token_kernels.inc on a GPU, the same bits.
// Everything that changes from token to token lies in the device's memory (TokenState), so that a layer's
// launches are always the same and can be captured in a graph.
#pragma once

#include <cstdint>

#include "cuda/kernels.h"

namespace moe::cuda {

constexpr int kRangeTokens = 256;  // csrc/decode/token_kernels.h

// Of the token under way; written by the host in one piece, with the residual, cosines and sines behind it.
struct TokenState {
    int64_t num_tokens;  // before it
    int64_t unused;      // to 16 bytes
};

// x = x + added (where there is one); then y = rms norm of each row of x.
struct NormLaunch {
    float* x;            // (rows, width); y may be x
    const float* added;  // (rows, width) or null
    const float* weight;
    float* y;
    int64_t rows, width;
    float eps;
};

// Query, key and value after their projections and norms: clip, rotary, scale, append to the cache. T tokens
// behind `token`'s, of which the first first_query have no query: so Q = T - first_query.
struct PlaceLaunch {
    const TokenState* token;
    const float *cos, *sin;            // (T, rotary_dim / 2)
    float *query, *key, *value;        // (Q, num_heads, head_dim), (T, num_kv_heads, head_dim) both
    uint8_t *keys, *values;            // (num_kv_heads, capacity, head_dim) of the cache's type
    uint8_t *token_key, *token_value;  // (T, num_kv_heads, head_dim): the same rows once more, for the host
    int cache_type;                    // ggml's F32, F16, BF16 or Q8_0
    int64_t num_heads, num_kv_heads, head_dim, rotary_dim, capacity;
    float clip, scaling;
    int64_t num_tokens = 1, first_query = 0;
};

// The scores of each head in ranges of cached tokens, and their weighted values.
struct AttendLaunch {
    const TokenState* token;
    const float* query;  // (num_heads, head_dim), scaled
    const uint8_t *keys, *values;
    int cache_type;
    int64_t num_heads, num_kv_heads, head_dim, capacity, window;
    int64_t max_ranges;  // of any token
    float *max, *sum;    // (num_heads, max_ranges)
    float* parts;        // (num_heads, max_ranges, head_dim)
    const float* sinks;  // (num_heads,) or null
    float* out;          // (num_heads, head_dim)
};

// Of tokens of a prompt, each of which sees those before it; their keys and values are cached.
struct AttendPromptLaunch {
    const TokenState* token;           // the first of the tile
    int64_t first_query, num_queries;  // tokens [first_query, first_query + num_queries) of the tile
    const float* query;                // (num_queries, num_heads, head_dim), scaled
    const uint8_t *keys, *values;
    int cache_type;
    int64_t num_heads, num_kv_heads, head_dim, capacity, window;
    const float* sinks;  // (num_heads,) or null
    float* out;          // (num_queries, num_heads, head_dim)
};

struct ChooseLaunch {
    float* scores;  // (num_tokens, num_experts); overwritten
    int64_t num_experts, top_k;
    bool softmax_of_chosen, normalize;
    int32_t* ids;    // (num_tokens, top_k), ascending
    float* weights;  // likewise
    int64_t num_tokens = 1;
};

// residual += weights[p] * row p, p ascending: rows[p], or there[sources[p]] where that is not negative.
// All but `there` may be pinned memory of the host.
struct AddRowsLaunch {
    float* residual;
    const float *rows, *weights;
    int64_t num_rows, width;
    const float* there = nullptr;
    const int32_t* sources = nullptr;  // null: all are rows[p]
};

constexpr int64_t kMostTopK = 64;

int launch_norm(const NormLaunch& launch, CUstream_st* stream);
int launch_place(const PlaceLaunch& launch, CUstream_st* stream);
int launch_attend(const AttendLaunch& launch, CUstream_st* stream);  // two kernels
int launch_attend_prompt(const AttendPromptLaunch& launch, CUstream_st* stream);
int launch_choose(const ChooseLaunch& launch, CUstream_st* stream);
int launch_add_rows(const AddRowsLaunch& launch, CUstream_st* stream);

}  // namespace moe::cuda
