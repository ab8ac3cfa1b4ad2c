// What tokens need besides matrices: norms, rotary, attention over the cache, softmax.
//
// token_kernels.inc is compiled once per instruction set, and like the kernels of arithmetic v1 every
// table gives the same bits: 8 chains by element mod 8, explicit fma, one order of summation.
#pragma once

#include <cstdint>

namespace moe {

constexpr int64_t kRangeTokens = 256;  // cached tokens that one call of attend serves at most

// Attention of one token's heads that share a key/value head over a range of cached tokens.
struct RangeArgs {
    const uint8_t *keys, *values;  // (num_tokens, head_dim) of the cache's type
    const uint8_t* next_keys;      // that this thread probably reads after them, or nullptr
    int64_t row_bytes;             // of a key or a value
    int64_t num_masked;            // of the first tokens, less than 8, that are not seen
    int64_t num_tokens;            // at least 1, at most kRangeTokens
    int64_t head_dim;              // a multiple of 8, of Q8_0 a multiple of 32
    int64_t num_heads;
    const float* query;  // (num_heads, head_dim), scaled
    float* packed;       // (num_heads + 1, head_dim) to work in, and:
    float* scores;       // (num_heads + 1, kRangeTokens)
    int64_t num_ranges;  // max and sum of two heads are so far apart
    int64_t out_stride;  // between out of two heads
    float* max;          // of the range's scores
    float* sum;          // of e^(score - max)
    float* out;          // (head_dim,), sum of e^(score - max) * value
};

// The ranges of one head become one, one after the other: with m = max(max_a, max_b),
// out = e^(max_a - m) out_a + e^(max_b - m) out_b, sum likewise; at the end out / sum.
struct CombineArgs {
    int64_t num_ranges, head_dim;
    const float *max, *sum;  // (num_ranges,)
    const float* parts;      // (num_ranges, head_dim)
    const float* sink;       // a score without a value (gpt-oss), or nullptr
    float* out;              // (head_dim,)
};

constexpr int kRowsAtOnce = 4;      // queries that share what is loaded of keys and values
constexpr int kMaxBlockRows = 128;  // queries of a block

// Tokens [first, end) of a range.
struct Seen {
    int32_t first, end;
};

// Queries of one key/value head, of one or several tokens, take in a range of cached tokens.
struct QueryBlock {
    int64_t num_rows;           // a multiple of kRowsAtOnce, at most kMaxBlockRows
    int64_t head_dim;           // a multiple of 8
    int64_t padded_dim;         // head_dim rounded up to 16
    const float* const* query;  // (num_rows,) each (head_dim,), scaled
    const Seen *rows, *tiles;   // what each row sees; what any of kRowsAtOnce rows sees
    const float* keys;          // [token / 8][i / 8][token % 8][i % 8], zeros behind the last token
    const float* values;        // (tokens, padded_dim)
    float *scores, *part;       // (num_rows, kRangeTokens), (num_rows, padded_dim) to work in
    float *max, *sum, *out;     // (num_rows,), (num_rows,), (num_rows, padded_dim): of the ranges before
};

using UnpackFn = void (*)(const uint8_t* from_keys, const uint8_t* from_values, int64_t row_bytes,
                          int64_t num_tokens, int64_t head_dim, int64_t padded_dim, float* keys,
                          float* values);
using RangeFn = void (*)(const RangeArgs&);

// By the type of the cache.
struct CacheKernels {
    RangeFn attend;
    UnpackFn unpack;  // a range for attend_block
};

struct TokenKernels {
    const char* name;
    // y = x / sqrt(mean(x^2) + eps) * weight
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* y);
    // Rotates (x[i], x[half + i]) by the angle whose cosine and sine are given.
    void (*rotate)(float* x, const float* cos, const float* sin, int64_t half);
    void (*combine)(const CombineArgs&);
    // In place; x has room for n rounded up to 8.
    void (*softmax)(float* x, int64_t n);
    void (*attend_block)(const QueryBlock&);
    CacheKernels f32, f16, bf16, q8_0;
};

extern const TokenKernels token_kernels_baseline;
#if defined(__x86_64__)
extern const TokenKernels token_kernels_avx2;
extern const TokenKernels token_kernels_avx512;
#endif

// The kernels of a cache of ggml's ``type``.
const CacheKernels& cache_kernels(int type);

// The table that fits the instruction set in use (cpu/isa.h).
const TokenKernels& token_kernels();

}  // namespace moe
