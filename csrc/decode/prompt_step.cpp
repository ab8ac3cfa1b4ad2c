#include "decode/prompt_step.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include "common/errors.h"
#include "cpu/thread_pool.h"
#include "decode/prompt_attention.h"
#include "decode/token_kernels.h"
#include "decode/token_parts.h"

namespace moe {

namespace {

constexpr int64_t kTokensPerChunk = 8;

// Calls ``work`` for each token, on any thread.
template <class Work>
void for_each_token(int64_t num_tokens, const Work& work) {
    ThreadPool::instance().run((num_tokens + kTokensPerChunk - 1) / kTokensPerChunk, [&](int64_t chunk) {
        const int64_t end = std::min(num_tokens, (chunk + 1) * kTokensPerChunk);
        for (int64_t token = chunk * kTokensPerChunk; token < end; ++token) work(token);
    });
}

float* at_least(std::vector<float>& buffer, int64_t size) {
    if (int64_t(buffer.size()) < size) buffer.resize(size);
    return buffer.data();
}

}  // namespace

void PromptStep::use_device(DenseStep* device, int64_t first_layer, bool has_head) {
    device_ = device;
    first_on_device_ = first_layer;
    head_on_device_ = device && has_head;
}

void PromptStep::begin(int64_t num_tokens, const PromptStates& states) {
    num_tokens_ = num_tokens;
    states_ = states;
}

void PromptStep::begin(const int64_t* token_ids, int64_t num_tokens, const PromptStates& states) {
    for (int64_t token = 0; token < num_tokens; ++token) decoder_.check_token(token_ids[token]);
    ThreadPool::Operation operation(ThreadPool::instance());
    begin(num_tokens, states);
    const int64_t hidden_size = decoder_.shape().hidden_size;
    for_each_token(num_tokens, [&](int64_t token) {
        decoder_.embed(token_ids[token], states.residual + token * hidden_size);
    });
}

void PromptStep::multiply(const float* x, int64_t num_tokens, std::initializer_list<Place> products) const {
    LinearPart parts[3];
    int64_t num_parts = 0;
    for (const auto& [linear, out] : products)
        parts[num_parts++] = {linear->weight, linear->weight_bytes, linear->matrix, linear->bias, out};
    linears(x, num_tokens, parts, num_parts);
}

// Where the states of the tokens from ``first`` on are.
PromptStates PromptStep::tile(int64_t first, int64_t top_k) const {
    const DecoderShape& shape = decoder_.shape();
    const int64_t hidden = first * shape.hidden_size, angles = first * (shape.rotary_dim / 2);
    PromptStates tile = states_;
    tile.residual += hidden;
    tile.normed += hidden;
    tile.ids += first * top_k;
    tile.weights += first * top_k;
    tile.cos += angles;
    tile.sin += angles;
    return tile;
}

void PromptStep::attend(int64_t index, const CachedTokens& before_chunk, int64_t first, int64_t num_tokens,
                        int64_t wanted) {
    check(first >= 0 && num_tokens >= 0 && first + num_tokens <= num_tokens_, "PromptStep",
          "tokens " + std::to_string(first) + " to " + std::to_string(first + num_tokens) +
              " are not in a chunk of " + std::to_string(num_tokens_));
    check(before_chunk.num_tokens >= 0 && before_chunk.num_tokens + num_tokens_ <= before_chunk.capacity,
          "PromptStep",
          "the key/value cache has no room for " + std::to_string(num_tokens_) + " tokens behind " +
              std::to_string(before_chunk.num_tokens));
    const DecoderLayer& layer = decoder_.layer(index);
    CachedTokens cached = before_chunk;
    cached.num_tokens += first;
    const int64_t skipped = std::clamp<int64_t>(wanted - first, 0, num_tokens), top_k = layer.router.top_k;
    if (device_ && index >= first_on_device_)
        return device_->attend_tile(index, {tile(first, top_k), cached, num_tokens, skipped});
    ThreadPool::Operation operation(ThreadPool::instance());
    project(layer.attention, cached, tile(first, top_k), num_tokens, skipped);
    if (skipped == num_tokens) return;
    cached.num_tokens += skipped;
    const PromptStates states = tile(first + skipped, top_k);
    add_attention(layer, cached, states, num_tokens - skipped);
    if (layer.router.top_k)
        choose(layer.router, states, num_tokens - skipped);
    else
        feed_forward(layer, states, num_tokens - skipped);
}

// Keys and values of all tokens into the cache; queries of all but the first ``skipped``.
void PromptStep::project(const AttentionLayer& attention, const CachedTokens& cached,
                         const PromptStates& tile, int64_t num_tokens, int64_t skipped) {
    const DecoderShape& shape = decoder_.shape();
    const int64_t hidden_size = shape.hidden_size;
    const int64_t query_size = decoder_.query_size(), key_size = decoder_.key_size();
    for_each_token(num_tokens, [&](int64_t token) {
        const int64_t at = token * hidden_size;
        token_kernels().rms_norm(tile.residual + at, attention.norm, shape.eps, hidden_size,
                                 tile.normed + at);
    });
    float* query = at_least(query_, num_tokens * std::max(hidden_size, query_size));
    float *key = at_least(key_, num_tokens * key_size), *value = at_least(value_, num_tokens * key_size);
    if (skipped) {
        multiply(tile.normed, num_tokens, {{&attention.key, key}, {&attention.value, value}});
        multiply(tile.normed + skipped * hidden_size, num_tokens - skipped, {{&attention.query, query}});
    } else {
        multiply(tile.normed, num_tokens,
                 {{&attention.query, query}, {&attention.key, key}, {&attention.value, value}});
    }
    const int64_t half = shape.rotary_dim / 2;
    for_each_token(num_tokens, [&](int64_t token) {
        float* of_token = token < skipped ? nullptr : query + (token - skipped) * query_size;
        finish_heads(shape, attention, tile.cos + token * half, tile.sin + token * half, of_token,
                     key + token * key_size, value + token * key_size);
        store_token(shape, cached, cached.num_tokens + token, key + token * key_size,
                    value + token * key_size);
    });
}

// Attention of projected tokens, its residual, and what the feed-forward network sees.
void PromptStep::add_attention(const DecoderLayer& layer, const CachedTokens& cached,
                               const PromptStates& tile, int64_t num_tokens) {
    const DecoderShape& shape = decoder_.shape();
    const int64_t hidden_size = shape.hidden_size;
    float* context = at_least(product_, num_tokens * std::max(hidden_size, decoder_.query_size()));
    attend_prompt(shape, layer.attention, cached, num_tokens, query_.data(), context);
    float* product = query_.data();  // as large, and read
    multiply(context, num_tokens, {{&layer.attention.out, product}});
    for_each_token(num_tokens, [&](int64_t token) {
        float* residual = tile.residual + token * hidden_size;
        const float* added = product + token * hidden_size;
        for (int64_t i = 0; i < hidden_size; ++i) residual[i] = residual[i] + added[i];
        token_kernels().rms_norm(residual, layer.attention.feed_forward_norm, shape.eps, hidden_size,
                                 tile.normed + token * hidden_size);
    });
}

void PromptStep::choose(const Router& router, const PromptStates& tile, int64_t num_tokens) {
    const int64_t num_experts = router.gate.matrix.rows, top_k = router.top_k;
    float* scores = at_least(scores_, num_tokens * num_experts);
    multiply(tile.normed, num_tokens, {{&router.gate, scores}});
    for_each_token(num_tokens, [&](int64_t token) {
        thread_local std::vector<float> padded;
        thread_local Choice choice;
        padded.assign(scores + token * num_experts, scores + (token + 1) * num_experts);
        padded.resize((num_experts + 7) / 8 * 8);
        choose_experts(router, padded.data(), choice);
        std::copy_n(choice.ids.data(), top_k, tile.ids + token * top_k);
        std::copy_n(choice.weights.data(), top_k, tile.weights + token * top_k);
    });
}

// A kernel of one expert that every token goes to.
void PromptStep::feed_forward(const DecoderLayer& layer, const PromptStates& tile, int64_t num_tokens) {
    tokens_.resize(num_tokens);
    std::iota(tokens_.begin(), tokens_.end(), 0);
    ones_.assign(num_tokens, 1.0f);
    const int32_t id = 0, offsets[] = {0, int32_t(num_tokens)};
    const ExpertPairs pairs{&id, layer.addresses.data(), offsets, tokens_.data(), 1, num_tokens};
    layer.kernel->sum(tile.normed, num_tokens, pairs, ones_.data(), tile.residual);
}

void PromptStep::logits(int64_t first, float* out) {
    const DecoderShape& shape = decoder_.shape();
    check(first >= 0 && first <= num_tokens_, "PromptStep",
          "there are no tokens from " + std::to_string(first));
    if (head_on_device_)
        return device_->logits_of(states_.residual + first * shape.hidden_size, num_tokens_ - first, out);
    ThreadPool::Operation operation(ThreadPool::instance());
    for_each_token(num_tokens_ - first, [&](int64_t token) {
        const int64_t at = (first + token) * shape.hidden_size;
        token_kernels().rms_norm(states_.residual + at, decoder_.final_norm(), shape.eps, shape.hidden_size,
                                 states_.normed + at);
    });
    multiply(states_.normed + first * shape.hidden_size, num_tokens_ - first, {{&decoder_.head(), out}});
}

}  // namespace moe
