#include "device/emulated_dense.h"

#include "common/errors.h"
#include "decode/packed_cache.h"

namespace moe {

namespace {

constexpr Linear kAbsent{{}, nullptr, 0, nullptr};

std::byte* bytes(void* address) {
    return static_cast<std::byte*>(address);
}

const std::byte* bytes(const void* address) {
    return static_cast<const std::byte*>(address);
}

}  // namespace

EmulatedDense::EmulatedDense(const DenseParts& parts, std::shared_ptr<ThrottledLink> to_device,
                             std::shared_ptr<ThrottledLink> to_host)
    : parts_(parts),
      to_device_(std::move(to_device)),
      to_host_(std::move(to_host)),
      step_(parts.shape, kAbsent, parts.final_norm, parts.head) {
    const int64_t hidden_size = parts.shape.hidden_size;
    for (const DenseLayer& layer : parts.layers)
        if (layer.router.top_k)
            step_.decoder().add_moe_layer(layer.attention, layer.router, layer.kernel);
        else
            step_.decoder().add_dense_layer(layer.attention, layer.kernel, layer.addresses);
    residual_.resize(hidden_size);
    normed_.resize(hidden_size);
    rotary_.resize(parts.shape.rotary_dim);
    rows_.resize(parts.shape.max_top_k * (hidden_size + 1));
    logits_.resize(parts.head.weight ? parts.head.matrix.rows : 0);
    const int64_t token_bytes =
        parts.shape.num_kv_heads * cached_row_bytes(parts.shape.cache_type, parts.shape.head_dim);
    key_.resize(token_bytes);
    value_.resize(token_bytes);
}

void EmulatedDense::upload(float* to, const float* from, int64_t count) {
    to_device_->copy_pinned(bytes(to), bytes(from), count * int64_t(sizeof(float)));
}

void EmulatedDense::bring(float* to, const float* from, int64_t count) {
    to_host_->copy_pinned(bytes(to), bytes(from), count * int64_t(sizeof(float)));
}

void EmulatedDense::begin(const float* residual, const float* cos, const float* sin, int64_t num_tokens) {
    check(num_tokens >= 0 && num_tokens < parts_.capacity, "DenseStep",
          "the device's key/value cache is full: " + std::to_string(num_tokens) + " tokens");
    const int64_t half = parts_.shape.rotary_dim / 2;
    upload(residual_.data(), residual, int64_t(residual_.size()));
    upload(rotary_.data(), cos, half);
    upload(rotary_.data() + half, sin, half);
    num_tokens_ = num_tokens;
    step_.begin(residual_.data(), rotary_.data(), rotary_.data() + half);
}

Attended EmulatedDense::attend(int64_t layer) {
    const DenseLayer& here = parts_.layers.at(size_t(layer - parts_.first_layer));
    step_.attend(layer - parts_.first_layer, {here.keys, here.values, parts_.capacity, num_tokens_});
    bring(normed_.data(), step_.router_input().data(), int64_t(normed_.size()));
    bring_token(here.keys, key_.data());
    bring_token(here.values, value_.data());
    return {&step_.choice(), normed_.data(), key_.data(), value_.data()};
}

// A token's row of each head.
void EmulatedDense::bring_token(const uint8_t* rows, uint8_t* to) {
    const int64_t row_bytes = cached_row_bytes(parts_.shape.cache_type, parts_.shape.head_dim);
    for (int64_t head = 0; head < parts_.shape.num_kv_heads; ++head)
        to_host_->copy_pinned(bytes(to + head * row_bytes),
                              bytes(rows + (head * parts_.capacity + num_tokens_) * row_bytes), row_bytes);
}

void EmulatedDense::add_rows(const float* rows, const float* weights, int64_t num_rows) {
    const int64_t count = num_rows * parts_.shape.hidden_size;
    upload(rows_.data(), rows, count);
    upload(rows_.data() + count, weights, num_rows);
    step_.add_rows(rows_.data(), rows_.data() + count, num_rows);
}

void EmulatedDense::residual(float* out) {
    bring(out, step_.residual().data(), int64_t(residual_.size()));
}

void EmulatedDense::logits(float* out) {
    step_.logits(logits_.data());
    bring(out, logits_.data(), int64_t(logits_.size()));
}

}  // namespace moe
