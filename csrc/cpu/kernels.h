// What a kernel sees and what an ISA offers: shapes, blocks of activations, one table per ISA.
//
// kernels.inc is compiled once per ISA (kernels_*.cpp); every table gives the same bits.
#pragma once

#include <cstdint>

#include "common/ggml_types.h"

namespace moe {

constexpr int kBlock = 32;        // activations share a scale in blocks of 32
constexpr int kSuperblock = 256;  // 8 blocks: one step of the 8 chains
constexpr int kTokenTile = 32;    // tokens that a kernel keeps the sums of at most
constexpr int kRowTile = 32;      // rows that one call computes at most

// 256 activations in the order of the tiles: blocks 0 2 4 6, then 1 3 5 7.
struct alignas(64) ActivationTile {
    int8_t q[kSuperblock];  // [128 * c + 64 * half + 16 * i + j]: weight 16 * half + j of block 2 * i + c
    float d[8];             // [4 * c + i]
    int32_t sums[3][8];     // [which][4 * c + i], which: first half, second half, block
};

// The inputs of a matrix, by token. Quantized weights read q, d and sums, or tiles, which hold the
// same numbers; float weights read x.
struct Activations {
    const float* x = nullptr;               // (num_tokens, cols)
    const int16_t* q = nullptr;             // (num_tokens, padded_cols), int8 values, zero beyond cols
    const float* d = nullptr;               // (num_tokens, padded_cols / 32)
    const int16_t* sums = nullptr;          // (num_tokens, padded_cols / 16), sums of q, at most 16 * 127
    const ActivationTile* tiles = nullptr;  // (num_tokens, padded_cols / 256)
    int64_t cols = 0;
    int64_t padded_cols = 0;  // cols rounded up to whole superblocks
    uint64_t version =
        0;  // no others' number, so that a thread may keep what it makes of them; 0: it may not
};

struct RowsArgs {
    const uint8_t* weights;      // first byte of the matrix; aligned to nothing
    int64_t rows, cols;          // of the matrix as used; transposed ones are stored (cols, rows)
    int64_t row_begin, row_end;  // at most kRowTile
    const Activations* activations;
    const int32_t* tokens;  // (num_tokens,) which activations
    int num_tokens;
    float* out;  // out[i * out_stride + row - row_begin]
    int64_t out_stride;
    // Where the thread goes on reading after these rows, for prefetching; nullptr: right behind them.
    const uint8_t* next = nullptr;
};

enum class ActivationKind : int { SILU = 0, GELU_TANH = 1, GELU_ERF = 2, RELU = 3, GPT_OSS_SWIGLU = 4 };

struct Activation {
    ActivationKind kind;
    float alpha, limit;  // of GPT_OSS_SWIGLU
};

// Weighted rows of some pairs, in order, to be added to their tokens: kRowTile numbers each.
struct WeightedRows {
    float (*y)[kRowTile];  // (count,), free afterwards
    const int32_t* tokens;
    const float* weights;
    int count;
    float* out;  // out[tokens[i] * out_stride]
    int64_t out_stride;
};

using RowsFn = void (*)(const RowsArgs&);
using DequantizeFn = void (*)(const uint8_t* row, int64_t cols, float* out);

struct Kernels {
    const char* name;
    int block_elements[kNumTypes];  // 0 where there is no such type
    int block_bytes[kNumTypes];
    RowsFn rows[kNumTypes];             // nullptr where there is no such type
    RowsFn rows_transposed[kNumTypes];  // float types only
    DequantizeFn dequantize[kNumTypes];
    bool fast[kNumTypes];  // rows[] is made for the type; otherwise it is correct and slow
    // x (cols) -> q, d, sums and tiles of one token, zero beyond cols
    void (*quantize)(const float* x, int64_t cols, int64_t padded_cols, int16_t* q, float* d, int16_t* sums,
                     ActivationTile* tiles);
    // h[i] = act(gate[i * stride]) * up[i * stride]
    void (*activate)(const Activation&, const float* gate, const float* up, int64_t stride, float* h,
                     int64_t n);
    // out[i] = out[i] + weight * y[i], two roundings
    void (*add_weighted)(float* out, const float* y, float weight, int64_t n);
    void (*add_weighted_rows)(const WeightedRows&);  // the same of several rows
};

// Codebooks of the IQ types, set once from gguf-py: (entries, width) int8; nullptr until then.
struct Grids {
    const int8_t* of[kNumTypes] = {};
};
extern Grids grids;

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avxvnni;
extern const Kernels kernels_avx512vnni;
extern const Kernels kernels_amx;
#elif defined(__aarch64__)
extern const Kernels kernels_dotprod;
#endif

}  // namespace moe
