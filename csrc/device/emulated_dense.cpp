#include "device/emulated_dense.h"

#include <algorithm>
#include <chrono>

#include "common/errors.h"
#include "decode/packed_cache.h"
#include "device/emulated_device.h"

namespace moe {

namespace {

constexpr Linear kAbsent{{}, nullptr, 0, nullptr};
constexpr int64_t kLogitsAtOnce = 32;

std::byte* bytes(void* address) {
    return static_cast<std::byte*>(address);
}

const std::byte* bytes(const void* address) {
    return static_cast<const std::byte*>(address);
}

}  // namespace

EmulatedDense::EmulatedDense(const DenseParts& parts, EmulatedDevice& device)
    : parts_(parts),
      device_(device),
      stream_(device.stream()),
      to_device_(device.throttled(Direction::kToDevice)),
      to_host_(device.throttled(Direction::kToHost)),
      step_(parts.shape, kAbsent, parts.final_norm, parts.head) {
    const int64_t hidden_size = parts.shape.hidden_size;
    for (const DenseLayer& layer : parts.layers)
        if (layer.router.top_k)
            step_.decoder().add_moe_layer(layer.attention, layer.router, layer.kernel);
        else
            step_.decoder().add_dense_layer(layer.attention, layer.kernel, layer.addresses);
    residual_.resize(hidden_size);
    rotary_.resize(parts.shape.rotary_dim);
    rows_.resize(parts.shape.max_top_k * hidden_size);
    summands_.resize(rows_.size());
    logits_.resize(parts.head.weight ? parts.head.matrix.rows : 0);
    token_bytes_ = parts.shape.num_kv_heads * cached_row_bytes(parts.shape.cache_type, parts.shape.head_dim);
}

EmulatedDense::~EmulatedDense() {
    try {
        stream_->wait();
    } catch (...) {  // of a token that was given up
    }
}

// Until all that was queued is done, and the rows of the layer before are added.
void EmulatedDense::wait() {
    ++num_waits_;
    stream_->wait();
    done_.experts += under_way_.experts;
    done_.seconds += under_way_.seconds;
    under_way_ = {};
    if (sources_.empty()) return;
    const int64_t hidden_size = parts_.shape.hidden_size;
    const float* from_host = arrived_.data() + sources_.size();
    for (size_t i = 0; i < sources_.size(); ++i) {
        const float* row = from_host;
        if (sources_[i] == kAtHome)
            from_host += hidden_size;
        else
            row = &rows_[sources_[i] * hidden_size];
        std::copy_n(row, hidden_size, &summands_[int64_t(i) * hidden_size]);
    }
    step_.add_rows(summands_.data(), arrived_.data(), int64_t(sources_.size()));
    sources_.clear();
}

// The token under way, if there is one.
void EmulatedDense::give_up() {
    sources_.clear();
    wait();
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
    give_up();
    upload(residual_.data(), residual, int64_t(residual_.size()));
    upload(rotary_.data(), cos, half);
    upload(rotary_.data() + half, sin, half);
    num_tokens_ = num_tokens;
    step_.begin(residual_.data(), rotary_.data(), rotary_.data() + half);
}

Attended EmulatedDense::attend(int64_t layer) {
    const DenseLayer& here = parts_.layers.at(size_t(layer - parts_.first_layer));
    wait();
    step_.attend(layer - parts_.first_layer, {here.keys, here.values, parts_.capacity, num_tokens_});
    const float* normed = step_.router_input().data();
    result_.assign(bytes(normed), bytes(normed + parts_.shape.hidden_size));
    append_token(here.keys);
    append_token(here.values);
    brought_.resize(result_.size());
    to_host_->copy_pinned(brought_.data(), result_.data(), int64_t(result_.size()));
    const auto* key =
        reinterpret_cast<const uint8_t*>(brought_.data() + parts_.shape.hidden_size * int64_t(sizeof(float)));
    return {&step_.choice(), reinterpret_cast<const float*>(brought_.data()), key, key + token_bytes_};
}

// A token's row of each head, to what goes to the host in one piece.
void EmulatedDense::append_token(const uint8_t* rows) {
    const int64_t row_bytes = token_bytes_ / parts_.shape.num_kv_heads;
    for (int64_t head = 0; head < parts_.shape.num_kv_heads; ++head) {
        const std::byte* row = bytes(rows + (head * parts_.capacity + num_tokens_) * row_bytes);
        result_.insert(result_.end(), row, row + row_bytes);
    }
}

void EmulatedDense::rows(const DeviceKernel& kernel, const ExpertPairs& pairs, int64_t first_row) {
    struct Owned {
        std::vector<int32_t> ids, offsets, tokens;
        std::vector<uint64_t> addresses;
    };
    device_.pass_faults();
    const ExpertKernel& of = static_cast<const HostKernel&>(kernel).kernel;
    const Owned owned{{pairs.expert_ids, pairs.expert_ids + pairs.num_experts},
                      {pairs.pair_offsets, pairs.pair_offsets + pairs.num_experts + 1},
                      {pairs.pair_tokens, pairs.pair_tokens + pairs.num_pairs},
                      {pairs.addresses, pairs.addresses + pairs.num_experts * of.num_matrices()}};
    const int64_t hidden_size = parts_.shape.hidden_size;
    check(first_row >= 0 && (first_row + pairs.num_pairs) * hidden_size <= int64_t(rows_.size()), "DenseStep",
          "there is no room for so many rows");
    stream_->queue([this, &of, owned, first_row, hidden_size] {
        const auto begin = std::chrono::steady_clock::now();
        experts_.rows(of, step_.router_input().data(), 1,
                      {owned.ids.data(), owned.addresses.data(), owned.offsets.data(), owned.tokens.data(),
                       int64_t(owned.ids.size()), int64_t(owned.tokens.size())},
                      rows_.data() + first_row * hidden_size);
        under_way_.experts += int64_t(owned.ids.size());
        under_way_.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    });
}

void EmulatedDense::add_rows(const float* rows, const float* weights, const int32_t* sources,
                             int64_t num_rows) {
    const int64_t hidden_size = parts_.shape.hidden_size;
    sent_.assign(weights, weights + num_rows);
    for (int64_t i = 0; i < num_rows; ++i)
        if (sources[i] == kAtHome)
            sent_.insert(sent_.end(), rows + i * hidden_size, rows + (i + 1) * hidden_size);
    arrived_.resize(sent_.size());
    upload(arrived_.data(), sent_.data(), int64_t(sent_.size()));
    sources_.assign(sources, sources + num_rows);
}

void EmulatedDense::residual(float* out) {
    wait();
    bring(out, step_.residual().data(), int64_t(residual_.size()));
}

void EmulatedDense::logits(float* out) {
    wait();
    step_.logits(logits_.data());
    bring(out, logits_.data(), int64_t(logits_.size()));
}

void EmulatedDense::logits_of(const float* residual, int64_t num_tokens, float* out) {
    const int64_t hidden_size = parts_.shape.hidden_size, vocab_size = parts_.head.matrix.rows;
    give_up();
    for (int64_t first = 0; first < num_tokens; first += kLogitsAtOnce) {
        const int64_t count = std::min(kLogitsAtOnce, num_tokens - first), hidden = count * hidden_size;
        tile_.resize(size_t(2 * hidden + count * vocab_size));
        float *there = tile_.data(), *normed = there + hidden, *logits = normed + hidden;
        upload(there, residual + first * hidden_size, hidden);
        prompt_.begin(count, {there, normed, nullptr, nullptr, nullptr, nullptr});
        prompt_.logits(0, logits);
        bring(out + first * vocab_size, logits, count * vocab_size);
    }
}

void EmulatedDense::attend_tile(int64_t layer, const PromptTile& tile) {
    const DenseLayer& here = parts_.layers.at(size_t(layer - parts_.first_layer));
    const int64_t num_tokens = tile.num_tokens, hidden = num_tokens * parts_.shape.hidden_size;
    const int64_t angles = num_tokens * (parts_.shape.rotary_dim / 2),
                  choices = num_tokens * here.router.top_k;
    const CachedTokens there{here.keys, here.values, parts_.capacity, tile.cached.num_tokens};
    give_up();
    tile_.resize(size_t(2 * hidden + 2 * angles + choices));
    tile_ids_.resize(size_t(choices));
    float *residual = tile_.data(), *normed = residual + hidden, *cos = normed + hidden, *sin = cos + angles;
    float* weights = sin + angles;
    upload(residual, tile.states.residual, hidden);
    upload(cos, tile.states.cos, angles);
    upload(sin, tile.states.sin, angles);
    prompt_.begin(num_tokens, {residual, normed, tile_ids_.data(), weights, cos, sin});
    prompt_.attend(layer - parts_.first_layer, there, 0, num_tokens, tile.skipped);
    bring(tile.states.residual, residual, hidden);
    bring(tile.states.normed, normed, hidden);
    if (choices) {  // a layer without a router has none
        bring(reinterpret_cast<float*>(tile.states.ids), reinterpret_cast<const float*>(tile_ids_.data()),
              choices);
        bring(tile.states.weights, weights, choices);
    }
    bring_rows(there, tile.cached, num_tokens);
}

// Keys and values of a tile; every head's lie together.
void EmulatedDense::bring_rows(const CachedTokens& there, const CachedTokens& here, int64_t num_tokens) {
    const int64_t row_bytes = token_bytes_ / parts_.shape.num_kv_heads;
    for (int64_t head = 0; head < parts_.shape.num_kv_heads; ++head) {
        const int64_t from = (head * there.capacity + there.num_tokens) * row_bytes;
        const int64_t to = (head * here.capacity + here.num_tokens) * row_bytes;
        to_host_->copy_pinned(bytes(here.keys) + to, bytes(there.keys) + from, num_tokens * row_bytes);
        to_host_->copy_pinned(bytes(here.values) + to, bytes(there.values) + from, num_tokens * row_bytes);
    }
}

}  // namespace moe
