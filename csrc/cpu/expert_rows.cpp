// Rows of an expert's matrices for its pairs: what one chunk of an ExpertKernel's jobs computes.
#include <algorithm>

#include "cpu/activation_buffer.h"
#include "cpu/expert_step.h"
#include "cpu/isa.h"
#include "cpu/matrix_checks.h"

namespace moe {

namespace {

constexpr int kPairTile = 128;  // pairs whose gate and up rows wait for their activation

void add_bias(float* out, int64_t stride, int num_tokens, const float* bias, int64_t num_rows) {
    for (int t = 0; t < num_tokens; ++t)
        for (int64_t r = 0; r < num_rows; ++r) out[t * stride + r] = out[t * stride + r] + bias[r];
}

}  // namespace

// Rows [first_row, first_row + kRowTile) of gate, up or both for every pair of an expert.
void ExpertKernel::gate_up_rows(const Step& step, int64_t expert, int64_t m, int64_t first_row) const {
    const ExpertPairs& pairs = step.pairs;
    const Matrix& matrix = matrices_[m];
    const int64_t last_row = std::min(matrix.rows, first_row + kRowTile), width = 2 * intermediate_size();
    const int64_t column = m * matrix.rows + first_row;
    const uint8_t* next = nullptr;
    if (last_row == matrix.rows && m + 1 < num_matrices() - 1)
        next = step.weights(expert, m + 1, num_matrices());
    else if (last_row == matrix.rows && expert + 1 < pairs.num_experts)
        next = step.weights(expert + 1, 0, num_matrices());
    const float* bias = gate_up_bias_ ? gate_up_bias_ + pairs.expert_ids[expert] * width + column : nullptr;
    const int32_t p = pairs.pair_offsets[expert];
    const int num_tokens = pairs.pair_offsets[expert + 1] - p;
    float* y = step.gate_up + p * width + column;
    rows_of(matrix)({step.weights(expert, m, num_matrices()), matrix.rows, matrix.cols, first_row, last_row,
                     &step.gate_up_inputs, pairs.pair_tokens + p, num_tokens, y, width, next});
    if (bias) add_bias(y, width, num_tokens, bias, last_row - first_row);
}

void ExpertKernel::activate_expert(const Step& step, int64_t expert) const {
    const int64_t num_units = intermediate_size();
    const bool interleaved = row_order_ == RowOrder::INTERLEAVED;
    for (int32_t p = step.pairs.pair_offsets[expert]; p < step.pairs.pair_offsets[expert + 1]; ++p) {
        const float* gate = step.gate_up + p * 2 * num_units;
        kernels().activate(activation_, gate, gate + (interleaved ? 1 : num_units), interleaved ? 2 : 1,
                           step.h + p * num_units, num_units);
        if (step.down_inputs.tiles) ActivationBuffer::quantize_row(kernels(), step.down_inputs, p);
    }
}

// h of units [first_unit, first_unit + kUnitTile) for every pair of an expert.
void ExpertKernel::gate_up_units(const Step& step, int64_t expert, int64_t first_unit) const {
    const ExpertPairs& pairs = step.pairs;
    const int64_t num_units = intermediate_size();
    const int64_t last_unit = std::min(num_units, first_unit + kUnitTile), n = last_unit - first_unit;
    const float* bias = gate_up_bias_ ? gate_up_bias_ + pairs.expert_ids[expert] * 2 * num_units : nullptr;
    const bool interleaved = row_order_ == RowOrder::INTERLEAVED;
    constexpr int64_t kWidth = 2 * kUnitTile;
    alignas(64) float y[kPairTile][kWidth];  // interleaved, or gate units then up units
    for (int32_t p = pairs.pair_offsets[expert]; p < pairs.pair_offsets[expert + 1]; p += kPairTile) {
        const int tile = std::min(kPairTile, pairs.pair_offsets[expert + 1] - p);
        const auto compute = [&](int64_t m, int64_t row, int64_t num_rows, int64_t bias_row, float* to) {
            const Matrix& matrix = matrices_[m];
            rows_of(matrix)({step.weights(expert, m, num_matrices()), matrix.rows, matrix.cols, row,
                             row + num_rows, &step.gate_up_inputs, pairs.pair_tokens + p, tile, to, kWidth});
            if (bias) add_bias(to, kWidth, tile, bias + bias_row, num_rows);
        };
        if (interleaved) {
            for (int64_t row = 2 * first_unit, end = row + 2 * n, rows; row < end; row += rows) {
                rows = std::min<int64_t>(kRowTile, end - row);
                compute(0, row, rows, row, y[0] + row - 2 * first_unit);
            }
        } else {
            const bool split = row_order_ == RowOrder::SPLIT;
            compute(0, first_unit, n, first_unit, y[0]);
            compute(split ? 1 : 0, (split ? 0 : num_units) + first_unit, n, num_units + first_unit,
                    y[0] + kUnitTile);
        }
        for (int t = 0; t < tile; ++t)
            kernels().activate(activation_, y[t], y[t] + (interleaved ? 1 : kUnitTile), interleaved ? 2 : 1,
                               step.h + (p + t) * num_units + first_unit, n);
    }
}

// Rows [first_row, first_row + kRowTile) of down for pairs [begin, end), which are one expert's.
void ExpertKernel::down_rows(const Step& step, int64_t expert, int64_t first_row, int32_t begin, int32_t end,
                             const uint8_t* next, float* out, int64_t out_stride) const {
    const ExpertPairs& pairs = step.pairs;
    const Matrix& matrix = matrices_.back();
    const int64_t last = num_matrices() - 1, last_row = std::min(matrix.rows, first_row + kRowTile);
    const float* bias = down_bias_ ? down_bias_ + pairs.expert_ids[expert] * matrix.rows : nullptr;
    for (int32_t p = begin; p < end; p += kPairTile) {
        const int tile = std::min(kPairTile, end - p);
        int32_t tokens[kPairTile];
        for (int i = 0; i < tile; ++i) tokens[i] = p + i;
        float* y = out + (p - begin) * out_stride;
        rows_of(matrix)({step.weights(expert, last, num_matrices()), matrix.rows, matrix.cols, first_row,
                         last_row, &step.down_inputs, tokens, tile, y, out_stride, next});
        if (bias) add_bias(y, out_stride, tile, bias + first_row, last_row - first_row);
    }
}

// The same, weighted and added to ``out``, (num_tokens, hidden_size).
void ExpertKernel::add_down_rows(const Step& step, int64_t expert, int64_t first_row,
                                 const float* pair_weights, float* out) const {
    const ExpertPairs& pairs = step.pairs;
    const int64_t num_rows = std::min<int64_t>(kRowTile, hidden_size() - first_row);
    const uint8_t* next = nullptr;  // the same rows of the next expert
    if (expert + 1 < pairs.num_experts)
        next = step.weights(expert + 1, num_matrices() - 1, num_matrices()) +
               matrix_bytes(matrices_.back()) / hidden_size() * first_row;
    alignas(64) float y[kPairTile][kRowTile];
    for (int32_t p = pairs.pair_offsets[expert], end; p < pairs.pair_offsets[expert + 1]; p = end) {
        end = std::min(p + kPairTile, pairs.pair_offsets[expert + 1]);
        down_rows(step, expert, first_row, p, end, next, y[0], kRowTile);
        if (num_rows == kRowTile) {
            kernels().add_weighted_rows(
                {y, pairs.pair_tokens + p, pair_weights + p, end - p, out + first_row, hidden_size()});
            continue;
        }
        for (int32_t i = p; i < end; ++i)
            kernels().add_weighted(out + pairs.pair_tokens[i] * hidden_size() + first_row, y[i - p],
                                   pair_weights[i], num_rows);
    }
}

}  // namespace moe
