#include "decode/decode_step.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/errors.h"
#include "cpu/isa.h"
#include "cpu/matrix_checks.h"
#include "cpu/thread_pool.h"
#include "decode/cached_attention.h"
#include "decode/packed_cache.h"
#include "decode/resident_table.h"
#include "decode/token_kernels.h"

namespace moe {

namespace {

constexpr const char* kOp = "DecodeStep";
constexpr int64_t kAloneBytes = 64 << 10;  // waking a worker costs more than reading these

void check_linear(const char* name, const Linear& linear, int64_t rows, int64_t cols) {
    check_matrix(kOp, name, linear.matrix);
    const std::string of = std::string(" of ") + name;
    check_equal(kOp, ("rows" + of).c_str(), rows, linear.matrix.rows);
    check_equal(kOp, ("columns" + of).c_str(), cols, linear.matrix.cols);
    check_equal(kOp, ("bytes" + of).c_str(), matrix_bytes(linear.matrix), linear.weight_bytes);
}

void add(std::vector<float>& to, const std::vector<float>& what) {
    for (size_t i = 0; i < to.size(); ++i) to[i] = to[i] + what[i];
}

void clip(std::vector<float>& values, float limit) {
    for (float& value : values) value = value > limit ? limit : (value < -limit ? -limit : value);
}

}  // namespace

DecodeStep::DecodeStep(const DecoderShape& shape, const Linear& embedding, const float* final_norm,
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
    check_linear("embedding", embedding, embedding.matrix.rows, shape.hidden_size);
    check_linear("head", head, head.matrix.rows, shape.hidden_size);
    residual_.resize(shape.hidden_size);
    normed_.resize(shape.hidden_size);
    product_.resize(shape.hidden_size);
    query_.resize(shape.num_heads * shape.head_dim);
    context_.resize(shape.num_heads * shape.head_dim);
    key_.resize(shape.num_kv_heads * shape.head_dim);
    value_.resize(shape.num_kv_heads * shape.head_dim);
    rows_.resize(std::max<int64_t>(1, shape.max_top_k) * shape.hidden_size);
}

void DecodeStep::check_attention(const AttentionLayer& attention) const {
    const int64_t hidden_size = shape_.hidden_size;
    check_linear("query", attention.query, int64_t(query_.size()), hidden_size);
    check_linear("key", attention.key, int64_t(key_.size()), hidden_size);
    check_linear("value", attention.value, int64_t(value_.size()), hidden_size);
    check_linear("out", attention.out, hidden_size, int64_t(context_.size()));
}

void DecodeStep::add_layer(Layer layer) {
    check_attention(layer.attention);
    check_equal(kOp, "hidden size of the experts", shape_.hidden_size, layer.kernel->hidden_size());
    layers_.push_back(std::move(layer));
}

void DecodeStep::add_moe_layer(const AttentionLayer& attention, const Router& router,
                               const ExpertKernel* kernel) {
    const int64_t num_experts = router.gate.matrix.rows;
    check_linear("router", router.gate, num_experts, shape_.hidden_size);
    check(router.top_k > 0 && router.top_k <= std::min(num_experts, shape_.max_top_k), kOp,
          "top_k must be between 1 and the number of experts");
    scores_.resize(std::max<int64_t>(scores_.size(), (num_experts + 7) / 8 * 8));
    add_layer({attention, router, kernel, {}});
}

void DecodeStep::add_dense_layer(const AttentionLayer& attention, const ExpertKernel* kernel,
                                 std::vector<uint64_t> addresses) {
    check_equal(kOp, "number of addresses", kernel->num_matrices(), int64_t(addresses.size()));
    add_layer({attention, {}, kernel, std::move(addresses)});
}

int64_t DecodeStep::num_matrices(int64_t layer) const {
    check(layer >= 0 && layer < num_layers(), kOp, "there is no layer " + std::to_string(layer));
    return layers_[layer].kernel->num_matrices();
}

void DecodeStep::begin(int64_t token_id, const float* cos, const float* sin) {
    const Matrix& table = embedding_.matrix;
    check(token_id >= 0 && token_id < table.rows, kOp,
          "token_id must be in [0, " + std::to_string(table.rows) + "), got " + std::to_string(token_id));
    cos_ = cos;
    sin_ = sin;
    const int64_t row_bytes = embedding_.weight_bytes / table.rows;
    ThreadPool::Operation operation(ThreadPool::instance());  // for its rounding
    kernels().dequantize[table.type](embedding_.weight + token_id * row_bytes, table.cols, residual_.data());
}

void DecodeStep::attend(int64_t index, const CachedTokens& cached) {
    check(index >= 0 && index < num_layers(), kOp, "there is no layer " + std::to_string(index));
    check(cached.num_tokens >= 0 && cached.num_tokens < cached.capacity, kOp,
          "the key/value cache is full: " + std::to_string(cached.num_tokens) + " tokens");
    const Layer& layer = layers_[index];
    {
        ThreadPool::Operation operation(ThreadPool::instance());
        const TokenKernels& ops = token_kernels();
        ops.rms_norm(residual_.data(), layer.attention.norm, shape_.eps, shape_.hidden_size, normed_.data());
        project(layer.attention);
        place_token(cached);
        attend_cached(layer.attention, cached);
        multiply(context_.data(), {{&layer.attention.out, product_.data()}});
        add(residual_, product_);
        ops.rms_norm(residual_.data(), layer.attention.feed_forward_norm, shape_.eps, shape_.hidden_size,
                     normed_.data());
        if (layer.router.top_k) return choose(layer.router);
    }
    choice_ = {{0}, {1.0f}};
    experts(index, layer.addresses.data());
}

// Several products of one input: its activations are quantized once, the rows are one job.
void DecodeStep::multiply(const float* x, std::initializer_list<Product> products) {
    bool quantized = false;
    int64_t num_tiles = 0, num_bytes = 0;
    for (const Product& product : products) {
        quantized |= !is_float(product.linear->matrix.type);
        num_tiles += (product.linear->matrix.rows + kRowTile - 1) / kRowTile;
        num_bytes += product.linear->weight_bytes;
    }
    const Activations inputs =
        inputs_.prepare(kernels(), x, 1, products.begin()->linear->matrix.cols, quantized);
    const auto tile = [&](int64_t number) {
        const Product* product = products.begin();
        for (; number * kRowTile >= product->linear->matrix.rows; ++product)
            number -= (product->linear->matrix.rows + kRowTile - 1) / kRowTile;
        const auto& [matrix, weight, bytes, bias] = *product->linear;
        const int64_t row = number * kRowTile, row_end = std::min(matrix.rows, row + kRowTile);
        const int32_t token = 0;
        float* out = product->out + row;
        rows_of(matrix)({weight, matrix.rows, matrix.cols, row, row_end, &inputs, &token, 1, out, kRowTile});
        if (bias)
            for (int64_t r = row; r < row_end; ++r) out[r - row] = out[r - row] + bias[r];
    };
    const bool alone = num_bytes < kAloneBytes;
    ThreadPool::instance().run(alone ? 1 : num_tiles, [&](int64_t chunk) {
        for (int64_t t = chunk; t < (alone ? num_tiles : chunk + 1); ++t) tile(t);
    });
}

void DecodeStep::project(const AttentionLayer& attention) {
    const TokenKernels& ops = token_kernels();
    multiply(normed_.data(), {{&attention.query, query_.data()},
                              {&attention.key, key_.data()},
                              {&attention.value, value_.data()}});
    for (auto [heads, norm] : {std::pair(&query_, attention.q_norm), std::pair(&key_, attention.k_norm)}) {
        const int64_t size = int64_t(heads->size()), width = attention.norms_heads ? shape_.head_dim : size;
        for (int64_t i = 0; norm && i < size; i += width)
            ops.rms_norm(heads->data() + i, norm, shape_.eps, width, heads->data() + i);
        if (attention.clip > 0.0f) clip(*heads, attention.clip);
        for (int64_t i = 0; i < size; i += shape_.head_dim)
            ops.rotate(heads->data() + i, cos_, sin_, shape_.rotary_dim / 2);
    }
    if (attention.clip > 0.0f) clip(value_, attention.clip);
}

void DecodeStep::place_token(const CachedTokens& cached) {
    const int64_t row_bytes = cached_row_bytes(shape_.cache_type, shape_.head_dim);
    for (int64_t head = 0; head < shape_.num_kv_heads; ++head) {
        const int64_t offset = (head * cached.capacity + cached.num_tokens) * row_bytes;
        const int64_t begin = head * shape_.head_dim;
        store_floats(shape_.cache_type, &key_[begin], shape_.head_dim, cached.keys + offset);
        store_floats(shape_.cache_type, &value_[begin], shape_.head_dim, cached.values + offset);
    }
}

// The token itself is in the cache already.
void DecodeStep::attend_cached(const AttentionLayer& attention, const CachedTokens& cached) {
    const int64_t num_tokens = cached.num_tokens + 1;
    const int64_t first =
        attention.window && num_tokens > attention.window ? num_tokens - attention.window : 0;
    for (float& value : query_) value = value * shape_.scaling;
    const int64_t num_ranges = (num_tokens - first + kRangeTokens - 1) / kRangeTokens;
    const size_t parts = shape_.num_heads * num_ranges;
    if (range_max_.size() < parts) {
        range_max_.resize(parts);
        range_sum_.resize(parts);
        range_out_.resize(parts * shape_.head_dim);
    }
    const CachedHeads heads{
        shape_,           cached, first, num_tokens, query_.data(), range_max_.data(), range_sum_.data(),
        range_out_.data()};
    const int64_t num_chunks = shape_.num_kv_heads * num_ranges;
    const bool alone = (num_tokens - first) * shape_.num_heads * shape_.head_dim * 4 < kAloneBytes;
    ThreadPool::instance().run(alone ? 1 : num_chunks, [&](int64_t chunk) {
        for (int64_t c = chunk; c < (alone ? num_chunks : chunk + 1); ++c)
            attend_range(heads, c / num_ranges, c % num_ranges);
    });
    for (int64_t head = 0; head < shape_.num_heads; ++head)
        token_kernels().combine(
            {num_ranges, shape_.head_dim, &range_max_[head * num_ranges], &range_sum_[head * num_ranges],
             &range_out_[head * num_ranges * shape_.head_dim],
             attention.sinks ? attention.sinks + head : nullptr, &context_[head * shape_.head_dim]});
}

// Ties go to the smaller id.
void DecodeStep::choose(const Router& router) {
    const int64_t num_experts = router.gate.matrix.rows;
    multiply(normed_.data(), {{&router.gate, scores_.data()}});
    if (!router.softmax_of_chosen) token_kernels().softmax(scores_.data(), num_experts);
    std::vector<int32_t>& ids = choice_.ids;
    std::vector<float>& weights = choice_.weights;
    ids.clear();
    for (int32_t id = 0; id < num_experts; ++id) {
        const bool full = int64_t(ids.size()) == router.top_k;
        if (full && !(scores_[id] > scores_[ids.back()])) continue;
        if (full) ids.pop_back();
        auto place = ids.end();
        while (place != ids.begin() && scores_[id] > scores_[place[-1]]) --place;
        ids.insert(place, id);
    }
    weights.resize((router.top_k + 7) / 8 * 8);
    for (int64_t i = 0; i < router.top_k; ++i) weights[i] = scores_[ids[i]];
    if (router.softmax_of_chosen) token_kernels().softmax(weights.data(), router.top_k);
    weights.resize(router.top_k);
    if (router.normalize) {
        const float sum = std::accumulate(weights.begin(), weights.end(), 0.0f);
        for (float& weight : weights) weight = weight / sum;
    }
    for (int64_t i = 0; i < router.top_k; ++i) scores_[ids[i]] = weights[i];
    std::sort(ids.begin(), ids.end());
    for (int64_t i = 0; i < router.top_k; ++i) weights[i] = scores_[ids[i]];
}

// One token's pairs: each expert has one.
struct DecodeStep::TokenPairs {
    std::vector<int32_t> ids, offsets, tokens;
    ExpertPairs pairs;

    TokenPairs(std::vector<int32_t> expert_ids, const uint64_t* addresses)
        : ids(std::move(expert_ids)), offsets(ids.size() + 1), tokens(ids.size(), 0) {
        std::iota(offsets.begin(), offsets.end(), 0);
        const int64_t count = int64_t(ids.size());
        pairs = {ids.data(), addresses, offsets.data(), tokens.data(), count, count};
    }
};

void DecodeStep::experts(int64_t layer, const uint64_t* addresses) {
    num_matrices(layer);  // checks it
    const TokenPairs token(choice_.ids, addresses);
    layers_[layer].kernel->sum(normed_.data(), 1, token.pairs, choice_.weights.data(), residual_.data());
}

int64_t DecodeStep::run(int64_t first, const std::vector<CachedTokens>& cached,
                        const std::vector<const uint64_t*>& tables) {
    check_equal(kOp, "number of layers' caches", num_layers(), int64_t(cached.size()));
    check_equal(kOp, "number of layers' tables", num_layers(), int64_t(tables.size()));
    choices_.resize(layers_.size());
    for (int64_t layer = first; layer < num_layers(); ++layer) {
        const bool has_experts = layers_[layer].router.top_k > 0;
        check(has_experts == (tables[layer] != nullptr), kOp, "a table for each layer that has experts");
        attend(layer, cached[layer]);
        if (!has_experts) continue;
        if (!find_chosen(layer, tables[layer])) return layer;
        experts(layer, chosen_addresses_.data());
        choices_[layer] = choice_;
    }
    return num_layers();
}

// Collects the addresses of the chosen experts; false when one is not in memory.
bool DecodeStep::find_chosen(int64_t layer, const uint64_t* table) {
    const int64_t width = num_matrices(layer);
    chosen_addresses_.clear();
    for (int32_t id : choice_.ids) {
        const uint64_t* expert = table + id * width;
        if (expert[0] <= kOnItsWay) return false;
        chosen_addresses_.insert(chosen_addresses_.end(), expert, expert + width);
    }
    return true;
}

void DecodeStep::expert_rows(int64_t layer, const std::vector<int32_t>& positions,
                             const uint64_t* addresses) {
    num_matrices(layer);
    const int64_t hidden_size = shape_.hidden_size;
    std::vector<int32_t> ids;
    for (int32_t position : positions) {
        check(position >= 0 && position < int64_t(choice_.ids.size()), kOp,
              "there is no chosen expert at position " + std::to_string(position));
        ids.push_back(choice_.ids[position]);
    }
    const TokenPairs token(std::move(ids), addresses);
    some_rows_.resize(positions.size() * hidden_size);
    layers_[layer].kernel->rows(normed_.data(), 1, token.pairs, some_rows_.data());
    for (size_t i = 0; i < positions.size(); ++i)
        std::copy_n(&some_rows_[i * hidden_size], hidden_size, &rows_[positions[i] * hidden_size]);
}

void DecodeStep::add_expert_rows(int64_t layer) {
    num_matrices(layer);
    const std::vector<int32_t> tokens(choice_.ids.size(), 0);
    weighted_sum(residual_.data(), 1, shape_.hidden_size, rows_.data(), tokens.data(), choice_.weights.data(),
                 int64_t(tokens.size()));
}

void DecodeStep::logits(float* out) {
    ThreadPool::Operation operation(ThreadPool::instance());
    token_kernels().rms_norm(residual_.data(), final_norm_, shape_.eps, shape_.hidden_size, normed_.data());
    multiply(normed_.data(), {{&head_, out}});
}

}  // namespace moe
