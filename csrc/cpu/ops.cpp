#include "cpu/ops.h"

#include <algorithm>

#include "common/errors.h"
#include "cpu/activation_buffer.h"
#include "cpu/isa.h"
#include "cpu/matrix_checks.h"
#include "cpu/thread_pool.h"

namespace moe {

namespace {

constexpr int64_t kTokensPerChunk = 512;
ActivationBuffer linear_inputs;  // guarded by ThreadPool::Operation

int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

void add_bias(float* out, int64_t stride, int num_tokens, const float* bias, int64_t num_rows) {
    for (int t = 0; t < num_tokens; ++t)
        for (int64_t r = 0; r < num_rows; ++r) out[t * stride + r] = out[t * stride + r] + bias[r];
}

}  // namespace

namespace {

// Rows [row, row + kRowTile) of a part for tokens [first, last).
void linear_tile(const LinearPart& part, const Activations& inputs, int64_t row, int64_t first,
                 int64_t last) {
    const Matrix& matrix = part.matrix;
    const int64_t row_end = std::min(matrix.rows, row + kRowTile);
    const int num_tokens = int(last - first);
    int32_t tokens[kTokensPerChunk];
    for (int i = 0; i < num_tokens; ++i) tokens[i] = int32_t(first + i);
    float* out = part.out + first * matrix.rows + row;
    rows_of(matrix)(
        {part.weight, matrix.rows, matrix.cols, row, row_end, &inputs, tokens, num_tokens, out, matrix.rows});
    if (part.bias) add_bias(out, matrix.rows, num_tokens, part.bias + row, row_end - row);
}

}  // namespace

void linears(const float* x, int64_t num_tokens, const LinearPart* parts, int64_t num_parts) {
    if (num_parts == 0) return;
    const int64_t cols = parts[0].matrix.cols;
    bool quantized = false;
    int64_t row_tiles = 0;
    for (const LinearPart* part = parts; part < parts + num_parts; ++part) {
        check_matrix("linear", "weight", part->matrix);
        check_equal("linear", "bytes of weight", matrix_bytes(part->matrix), part->weight_bytes);
        check_equal("linear", "columns of weight", cols, part->matrix.cols);
        quantized |= !is_float(part->matrix.type);
        row_tiles += ceil_div(part->matrix.rows, kRowTile);
    }
    ThreadPool& pool = ThreadPool::instance();
    ThreadPool::Operation operation(pool);
    const Activations inputs = linear_inputs.prepare(kernels(), x, num_tokens, cols, quantized);
    pool.run(row_tiles * ceil_div(num_tokens, kTokensPerChunk), [&](int64_t chunk) {
        const LinearPart* part = parts;
        int64_t tile = chunk % row_tiles;
        for (int64_t tiles; tile >= (tiles = ceil_div(part->matrix.rows, kRowTile)); ++part) tile -= tiles;
        const int64_t first = chunk / row_tiles * kTokensPerChunk;
        linear_tile(*part, inputs, tile * kRowTile, first, std::min(num_tokens, first + kTokensPerChunk));
    });
}

void linear(const float* x, int64_t num_tokens, const uint8_t* weight, int64_t weight_bytes,
            const Matrix& matrix, const float* bias, float* out) {
    const LinearPart part{weight, weight_bytes, matrix, bias, out};
    linears(x, num_tokens, &part, 1);
}

void embedding_rows(const int64_t* ids, int64_t num_ids, const uint8_t* weight, int64_t weight_bytes,
                    const Matrix& matrix, float* out) {
    check_matrix("embedding_rows", "weight", matrix);
    check_equal("embedding_rows", "bytes of weight", matrix_bytes(matrix), weight_bytes);
    for (int64_t i = 0; i < num_ids; ++i)
        check(ids[i] >= 0 && ids[i] < matrix.rows, "embedding_rows",
              "ids[" + std::to_string(i) + "] must be in [0, " + std::to_string(matrix.rows) + "), got " +
                  std::to_string(ids[i]));
    ThreadPool& pool = ThreadPool::instance();
    ThreadPool::Operation operation(pool);
    const DequantizeFn dequantize = kernels().dequantize[matrix.type];
    const int64_t row_bytes = matrix_bytes(matrix) / matrix.rows;
    pool.run(num_ids,
             [&](int64_t i) { dequantize(weight + ids[i] * row_bytes, matrix.cols, out + i * matrix.cols); });
}

void weighted_sum(float* out, int64_t num_tokens, int64_t hidden_size, const float* rows,
                  const int32_t* pair_tokens, const float* pair_weights, int64_t num_pairs) {
    for (int64_t p = 0; p < num_pairs; ++p)
        check(pair_tokens[p] >= 0 && pair_tokens[p] < num_tokens, "weighted_sum",
              "pair_tokens[" + std::to_string(p) + "] must be in [0, " + std::to_string(num_tokens) +
                  "), got " + std::to_string(pair_tokens[p]));
    ThreadPool& pool = ThreadPool::instance();
    ThreadPool::Operation operation(pool);
    const auto add_weighted = kernels().add_weighted;
    // Columns are shared out, so that each element sees its pairs in order. Few pairs: one chunk.
    const int64_t width = num_pairs <= 32 ? hidden_size : std::max<int64_t>(64, hidden_size / 16);
    pool.run(ceil_div(hidden_size, width), [&](int64_t chunk) {
        const int64_t begin = chunk * width, n = std::min(hidden_size, begin + width) - begin;
        for (int64_t p = 0; p < num_pairs; ++p)
            add_weighted(out + pair_tokens[p] * hidden_size + begin, rows + p * hidden_size + begin,
                         pair_weights[p], n);
    });
}

}  // namespace moe
