#include "device/inline_experts.h"

#include <algorithm>

#include "cpu/isa.h"
#include "cpu/matrix_checks.h"

namespace moe {

namespace {

void quantize(const Activations& inputs, const int32_t* tokens, int num_tokens) {
    if (!inputs.tiles) return;
    for (int i = 0; i < num_tokens; ++i) ActivationBuffer::quantize_row(kernels(), inputs, tokens[i]);
}

}  // namespace

// Up to kTokenTile pairs of one expert.
struct InlineExperts::Tile {
    const int32_t* tokens;  // (num_tokens,) rows of the inputs
    int num_tokens;
};

void InlineExperts::rows(const ExpertKernel& kernel, const float* hidden, int64_t num_tokens,
                         const ExpertPairs& pairs, float* out) {
    const std::vector<Matrix>& matrices = kernel.matrices();
    const int64_t num_matrices = kernel.num_matrices(), num_units = kernel.intermediate_size();
    const int64_t hidden_size = kernel.hidden_size(), width = 2 * num_units;
    const bool interleaved = kernel.row_order() == RowOrder::INTERLEAVED;
    bool quantized = false;
    for (int64_t m = 0; m + 1 < num_matrices; ++m) quantized |= !is_float(matrices[m].type);
    const Activations inputs = hidden_inputs_.reserve(hidden, num_tokens, hidden_size, quantized);
    gate_up_.resize(size_t(kTokenTile * width));
    intermediate_.resize(size_t(kTokenTile * num_units));
    int32_t own_rows[kTokenTile];
    for (int i = 0; i < kTokenTile; ++i) own_rows[i] = i;

    for (int64_t e = 0; e < pairs.num_experts; ++e) {
        const int32_t id = pairs.expert_ids[e];
        const auto weights = [&](int64_t m) {
            return reinterpret_cast<const uint8_t*>(pairs.addresses[e * num_matrices + m]);
        };
        for (int32_t p = pairs.pair_offsets[e]; p < pairs.pair_offsets[e + 1]; p += kTokenTile) {
            const int count = std::min(kTokenTile, pairs.pair_offsets[e + 1] - p);
            const Tile tile{pairs.pair_tokens + p, count};
            quantize(inputs, tile.tokens, count);
            int64_t column = 0;
            for (int64_t m = 0; m + 1 < num_matrices; column += matrices[m].rows, ++m)
                multiply(matrices[m], weights(m), inputs, tile, gate_up_.data() + column, width,
                         kernel.gate_up_bias() ? kernel.gate_up_bias() + id * width + column : nullptr);
            for (int t = 0; t < count; ++t) {
                const float* gate = gate_up_.data() + t * width;
                kernels().activate(kernel.activation(), gate, gate + (interleaved ? 1 : num_units),
                                   interleaved ? 2 : 1, intermediate_.data() + t * num_units, num_units);
            }
            const Activations down =
                down_inputs_.reserve(intermediate_.data(), count, num_units, !is_float(matrices.back().type));
            quantize(down, own_rows, count);
            multiply(matrices.back(), weights(num_matrices - 1), down, {own_rows, count},
                     out + p * hidden_size, hidden_size,
                     kernel.down_bias() ? kernel.down_bias() + id * hidden_size : nullptr);
        }
    }
}

// out[t * stride + r] = row r of the matrix times input tokens[t], for every row.
void InlineExperts::multiply(const Matrix& matrix, const uint8_t* weights, const Activations& inputs,
                             const Tile& tile, float* out, int64_t stride, const float* bias) {
    for (int64_t row = 0; row < matrix.rows; row += kRowTile) {
        const int64_t row_end = std::min(matrix.rows, row + kRowTile);
        rows_of(matrix)({weights, matrix.rows, matrix.cols, row, row_end, &inputs, tile.tokens,
                         tile.num_tokens, out + row, stride});
        if (!bias) continue;
        for (int t = 0; t < tile.num_tokens; ++t)
            for (int64_t r = row; r < row_end; ++r) out[t * stride + r] = out[t * stride + r] + bias[r];
    }
}

}  // namespace moe
