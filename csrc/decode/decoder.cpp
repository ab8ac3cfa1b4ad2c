#include "decode/decoder.h"

#include <algorithm>

#include "common/errors.h"
#include "cpu/isa.h"
#include "cpu/matrix_checks.h"

namespace moe {

namespace {

constexpr const char* kOp = "DecodeStep";

void check_linear(const char* name, const Linear& linear, int64_t rows, int64_t cols) {
    check_matrix(kOp, name, linear.matrix);
    const std::string of = std::string(" of ") + name;
    check_equal(kOp, ("rows" + of).c_str(), rows, linear.matrix.rows);
    check_equal(kOp, ("columns" + of).c_str(), cols, linear.matrix.cols);
    check_equal(kOp, ("bytes" + of).c_str(), matrix_bytes(linear.matrix), linear.weight_bytes);
}

}  // namespace

Decoder::Decoder(const DecoderShape& shape, const Linear& embedding, const float* final_norm,
                 const Linear& head)
    : shape_(shape), embedding_(embedding), head_(head), final_norm_(final_norm) {
    check(shape.head_dim > 0 && shape.head_dim % 8 == 0, kOp,
          "head_dim must be a positive multiple of 8, got " + std::to_string(shape.head_dim));
    check(shape.num_kv_heads > 0 && shape.num_heads % shape.num_kv_heads == 0, kOp,
          "num_heads must be a multiple of num_kv_heads");
    check(shape.rotary_dim % 2 == 0 && shape.rotary_dim <= shape.head_dim, kOp,
          "rotary_dim must be even and at most head_dim");
    check(is_float(shape.cache_type) || (shape.cache_type == Q8_0 && shape.head_dim % 32 == 0), kOp,
          "the cache must be F32, F16 or BF16, or Q8_0 with a head_dim that is a multiple of 32");
    if (embedding.weight) check_linear("embedding", embedding, embedding.matrix.rows, shape.hidden_size);
    if (head.weight) check_linear("head", head, head.matrix.rows, shape.hidden_size);
}

void Decoder::add_layer(DecoderLayer layer) {
    const AttentionLayer& attention = layer.attention;
    check_linear("query", attention.query, query_size(), shape_.hidden_size);
    check_linear("key", attention.key, key_size(), shape_.hidden_size);
    check_linear("value", attention.value, key_size(), shape_.hidden_size);
    check_linear("out", attention.out, shape_.hidden_size, query_size());
    check_equal(kOp, "hidden size of the experts", shape_.hidden_size, layer.kernel->hidden_size());
    layers_.push_back(std::move(layer));
}

void Decoder::add_moe_layer(const AttentionLayer& attention, const Router& router,
                            const ExpertKernel* kernel) {
    const int64_t num_experts = router.gate.matrix.rows;
    check_linear("router", router.gate, num_experts, shape_.hidden_size);
    check(router.top_k > 0 && router.top_k <= std::min(num_experts, shape_.max_top_k), kOp,
          "top_k must be between 1 and the number of experts");
    add_layer({attention, router, kernel, {}});
}

void Decoder::add_dense_layer(const AttentionLayer& attention, const ExpertKernel* kernel,
                              std::vector<uint64_t> addresses) {
    check_equal(kOp, "number of addresses", kernel->num_matrices(), int64_t(addresses.size()));
    add_layer({attention, {}, kernel, std::move(addresses)});
}

const DecoderLayer& Decoder::layer(int64_t index) const {
    check(index >= 0 && index < num_layers(), kOp, "there is no layer " + std::to_string(index));
    return layers_[index];
}

void Decoder::check_token(int64_t token_id) const {
    const int64_t rows = embedding_.matrix.rows;
    check(token_id >= 0 && token_id < rows, kOp,
          "token_id must be in [0, " + std::to_string(rows) + "), got " + std::to_string(token_id));
}

void Decoder::embed(int64_t token_id, float* out) const {
    check_token(token_id);
    const Matrix& table = embedding_.matrix;
    const int64_t row_bytes = embedding_.weight_bytes / table.rows;
    kernels().dequantize[table.type](embedding_.weight + token_id * row_bytes, table.cols, out);
}

}  // namespace moe
