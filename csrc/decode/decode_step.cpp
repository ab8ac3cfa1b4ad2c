#include "decode/decode_step.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "common/errors.h"
#include "cpu/isa.h"
#include "cpu/matrix_checks.h"
#include "cpu/thread_pool.h"
#include "decode/packed_cache.h"
#include "decode/resident_table.h"
#include "decode/token_kernels.h"

namespace moe {

namespace {

constexpr const char* kOp = "DecodeStep";
constexpr int64_t kAloneBytes = 64 << 10;  // waking a worker costs more than reading these

void add(std::vector<float>& to, const std::vector<float>& what) {
    for (size_t i = 0; i < to.size(); ++i) to[i] = to[i] + what[i];
}

// Maxima in lanes first: a vocabulary is long, and a running maximum with its place is one value after
// another.
int64_t argmax(const float* values, int64_t count) {
    constexpr int64_t kLanes = 16;
    float lanes[kLanes];
    std::fill_n(lanes, kLanes, -std::numeric_limits<float>::infinity());
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] = values[i + j] > lanes[j] ? values[i + j] : lanes[j];
    for (; i < count; ++i) lanes[0] = values[i] > lanes[0] ? values[i] : lanes[0];
    const float* const found = std::find(values, values + count, *std::max_element(lanes, lanes + kLanes));
    return found == values + count ? 0 : found - values;
}

}  // namespace

DecodeStep::DecodeStep(const DecoderShape& shape, const Linear& embedding, const float* final_norm,
                       const Linear& head)
    : decoder_(shape, embedding, final_norm, head) {
    residual_.resize(shape.hidden_size);
    normed_.resize(shape.hidden_size);
    product_.resize(shape.hidden_size);
    query_.resize(decoder_.query_size());
    context_.resize(decoder_.query_size());
    key_.resize(decoder_.key_size());
    value_.resize(decoder_.key_size());
    rows_.resize(std::max<int64_t>(1, shape.max_top_k) * shape.hidden_size);
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

void DecodeStep::begin(int64_t token_id, const float* cos, const float* sin) {
    ThreadPool::Operation operation(ThreadPool::instance());  // for its rounding
    decoder_.embed(token_id, residual_.data());
    cos_ = cos;
    sin_ = sin;
    residual_is_away_ = false;
}

void DecodeStep::begin(const float* residual, const float* cos, const float* sin) {
    cos_ = cos;
    sin_ = sin;
    residual_is_away_ = false;
    std::copy_n(residual, residual_.size(), residual_.begin());
}

void DecodeStep::use_device(DenseStep* device, int64_t first_layer, bool has_head) {
    device_ = device;
    first_on_device_ = device ? first_layer : num_layers();
    head_on_device_ = device && has_head;
    residual_is_away_ = false;
}

void DecodeStep::attend_on_device(int64_t index, const CachedTokens& cached) {
    if (!residual_is_away_) device_->begin(residual_.data(), cos_, sin_, cached.num_tokens);
    residual_is_away_ = true;
    const Attended attended = device_->attend(index);
    const int64_t row_bytes = cached_row_bytes(decoder_.shape().cache_type, decoder_.shape().head_dim);
    for (int64_t head = 0; head < decoder_.shape().num_kv_heads; ++head) {
        const int64_t offset = (head * cached.capacity + cached.num_tokens) * row_bytes;
        std::copy_n(attended.key + head * row_bytes, row_bytes, cached.keys + offset);
        std::copy_n(attended.value + head * row_bytes, row_bytes, cached.values + offset);
    }
    if (!decoder_.layer(index).router.top_k) return;
    choice_ = *attended.choice;
    bring_rows_home();
    std::copy_n(attended.normed, normed_.size(), normed_.begin());
}

void DecodeStep::bring_rows_home() {
    sources_.assign(choice_.ids.size(), kAtHome);
    rows_left_ = 0;
}

int64_t DecodeStep::leave_rows(const std::vector<int32_t>& positions) {
    check(residual_is_away_ && rows_left_ + positions.size() <= sources_.size(), kOp,
          "a layer on a device has no place for these rows");
    const int64_t first = rows_left_;
    for (const int32_t position : positions) sources_.at(size_t(position)) = int32_t(rows_left_++);
    return first;
}

void DecodeStep::device_rows(const DeviceKernel& kernel, const std::vector<int32_t>& positions,
                             const uint64_t* addresses) {
    const TokenPairs token(ids_at(positions), addresses);
    device_->rows(kernel, token.pairs, leave_rows(positions));
}

void DecodeStep::bring_residual_home() {
    if (residual_is_away_) device_->residual(residual_.data());
    residual_is_away_ = false;
}

void DecodeStep::attend(int64_t index, const CachedTokens& cached) {
    const DecoderLayer& layer = decoder_.layer(index);
    const DecoderShape& shape = decoder_.shape();
    check(cached.num_tokens >= 0 && cached.num_tokens < cached.capacity, kOp,
          "the key/value cache is full: " + std::to_string(cached.num_tokens) + " tokens");
    if (device_ && index >= first_on_device_) return attend_on_device(index, cached);
    {
        ThreadPool::Operation operation(ThreadPool::instance());
        const TokenKernels& ops = token_kernels();
        ops.rms_norm(residual_.data(), layer.attention.norm, shape.eps, shape.hidden_size, normed_.data());
        project(layer.attention);
        store_token(shape, cached, cached.num_tokens, key_.data(), value_.data());
        attention_.attend(shape, layer.attention, cached, query_.data(), context_.data());
        multiply(context_.data(), {{&layer.attention.out, product_.data()}});
        add(residual_, product_);
        ops.rms_norm(residual_.data(), layer.attention.feed_forward_norm, shape.eps, shape.hidden_size,
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
    multiply(normed_.data(), {{&attention.query, query_.data()},
                              {&attention.key, key_.data()},
                              {&attention.value, value_.data()}});
    finish_heads(decoder_.shape(), attention, cos_, sin_, query_.data(), key_.data(), value_.data());
}

void DecodeStep::choose(const Router& router) {
    const size_t room = (router.gate.matrix.rows + 7) / 8 * 8;
    if (scores_.size() < room) scores_.resize(room);
    multiply(normed_.data(), {{&router.gate, scores_.data()}});
    choose_experts(router, scores_.data(), choice_);
}

void DecodeStep::experts(int64_t layer, const uint64_t* addresses) {
    const TokenPairs token(choice_.ids, addresses);
    if (residual_is_away_) {
        decoder_.layer(layer).kernel->rows(normed_.data(), 1, token.pairs, rows_.data());
        return add_expert_rows(layer);
    }
    decoder_.layer(layer).kernel->sum(normed_.data(), 1, token.pairs, choice_.weights.data(),
                                      residual_.data());
}

int64_t DecodeStep::run(int64_t first, const std::vector<CachedTokens>& cached,
                        const std::vector<const uint64_t*>& tables, LayerWatch* watch) {
    const int64_t num_layers = decoder_.num_layers();
    check_equal(kOp, "number of layers' caches", num_layers, int64_t(cached.size()));
    check_equal(kOp, "number of layers' tables", num_layers, int64_t(tables.size()));
    choices_.resize(num_layers);
    if (watch && first == 0) watch->begins(residual_.data());
    for (int64_t layer = first; layer < num_layers; ++layer) {
        const bool has_experts = decoder_.layer(layer).router.top_k > 0;
        check(has_experts == (tables[layer] != nullptr), kOp, "a table for each layer that has experts");
        attend(layer, cached[layer]);
        if (!has_experts) continue;
        const int64_t num_missing = find_chosen(layer, tables[layer]);
        if (watch) watch->routed(layer, choice_, num_missing);
        if (num_missing && !(watch && watch->has_arrived(layer, choice_, chosen_addresses_))) return layer;
        if (watch) watch->before_experts(layer, choice_, normed_.data());
        experts(layer, chosen_addresses_.data());
        choices_[layer] = choice_;
    }
    return num_layers;
}

// Collects the addresses of the chosen experts; returns how many are not resident.
int64_t DecodeStep::find_chosen(int64_t layer, const uint64_t* table) {
    const int64_t width = num_matrices(layer);
    int64_t num_missing = 0;
    chosen_addresses_.clear();
    for (int32_t id : choice_.ids) {
        const uint64_t* expert = table + id * width;
        num_missing += expert[0] <= kOnItsWay;
        chosen_addresses_.insert(chosen_addresses_.end(), expert, expert + width);
    }
    return num_missing;
}

void DecodeStep::expert_rows(int64_t layer, const std::vector<int32_t>& positions,
                             const uint64_t* addresses) {
    const int64_t hidden_size = decoder_.shape().hidden_size;
    const TokenPairs token(ids_at(positions), addresses);
    some_rows_.resize(positions.size() * hidden_size);
    decoder_.layer(layer).kernel->rows(normed_.data(), 1, token.pairs, some_rows_.data());
    for (size_t i = 0; i < positions.size(); ++i)
        std::copy_n(&some_rows_[i * hidden_size], hidden_size, &rows_[positions[i] * hidden_size]);
    if (residual_is_away_)
        for (const int32_t position : positions) sources_[size_t(position)] = kAtHome;
}

std::vector<int32_t> DecodeStep::ids_at(const std::vector<int32_t>& positions) const {
    std::vector<int32_t> ids;
    for (int32_t position : positions) {
        check(position >= 0 && position < int64_t(choice_.ids.size()), kOp,
              "there is no chosen expert at position " + std::to_string(position));
        ids.push_back(choice_.ids[position]);
    }
    return ids;
}

void DecodeStep::add_expert_rows(int64_t layer) {
    decoder_.layer(layer);  // checks it
    const int64_t num_rows = int64_t(choice_.ids.size());
    if (residual_is_away_)
        return device_->add_rows(rows_.data(), choice_.weights.data(), sources_.data(), num_rows);
    add_rows(rows_.data(), choice_.weights.data(), num_rows);
}

void DecodeStep::add_rows(const float* rows, const float* weights, int64_t num_rows) {
    const std::vector<int32_t> tokens(num_rows, 0);
    weighted_sum(residual_.data(), 1, decoder_.shape().hidden_size, rows, tokens.data(), weights, num_rows);
}

void DecodeStep::logits(float* out) {
    if (residual_is_away_ && head_on_device_) return device_->logits(out);
    bring_residual_home();
    ThreadPool::Operation operation(ThreadPool::instance());
    const DecoderShape& shape = decoder_.shape();
    token_kernels().rms_norm(residual_.data(), decoder_.final_norm(), shape.eps, shape.hidden_size,
                             normed_.data());
    multiply(normed_.data(), {{&decoder_.head(), out}});
}

int64_t DecodeStep::expect_next(const float* logits, LayerWatch* watch) {
    const int64_t token_id = argmax(logits, decoder_.head().matrix.rows);
    if (!watch) return token_id;
    {
        ThreadPool::Operation operation(ThreadPool::instance());  // for its rounding
        decoder_.embed(token_id, product_.data());
    }
    watch->begins(product_.data());
    return token_id;
}

}  // namespace moe
