// A chunk of a prompt through a decoder, layer by layer: DecodeStep for many tokens of one sequence.
//
//   begin ─► attend(0), tile by tile ─► experts by the caller ─► attend(1) ... ─► logits
//
// Every token gets the bits that DecodeStep would give it after the tokens before it, so neither the size
// of a chunk nor what is computed beside a token changes it. The caller serializes calls.
//
// A chunk is as long as it likes: what exists for all of its tokens is the caller's (PromptStates), queries,
// keys, values, products and scores only for those of a tile.
#pragma once

#include <cstdint>
#include <vector>

#include "decode/decoder.h"
#include "decode/prompt_states.h"
#include "device/dense_step.h"

namespace moe {

class PromptStep {
  public:
    // ``decoder`` lives as long as this.
    explicit PromptStep(const Decoder& decoder) : decoder_(decoder) {}

    // As DecodeStep::use_device(), between chunks.
    void use_device(DenseStep* device, int64_t first_layer, bool has_head);

    // The tokens' embeddings.
    void begin(const int64_t* token_ids, int64_t num_tokens, const PromptStates& states);
    // The same from what the layers before have made of them.
    void begin(int64_t num_tokens, const PromptStates& states);

    // Of tokens [first, first + num_tokens) of the chunk, those before them done: attention and its residual,
    // then the router's choices, whose weighted experts the caller adds to the residual when all tiles are
    // done, or the whole dense feed-forward network. The chunk's keys and values go behind
    // ``cached.num_tokens``. Tokens before ``wanted`` of the chunk get these only: in the last layer nothing
    // else of them is seen, unless their logits are asked for.
    void attend(int64_t layer, const CachedTokens& cached, int64_t first, int64_t num_tokens,
                int64_t wanted = 0);

    // Of the tokens from ``first`` on, (num_tokens - first, vocab_size).
    void logits(int64_t first, float* out);

  private:
    struct Place {
        const Linear* linear;
        float* out;
    };
    PromptStates tile(int64_t first, int64_t top_k) const;
    void multiply(const float* x, int64_t num_tokens, std::initializer_list<Place> products) const;
    void project(const AttentionLayer& attention, const CachedTokens& cached, const PromptStates& tile,
                 int64_t num_tokens, int64_t skipped);
    void add_attention(const DecoderLayer& layer, const CachedTokens& cached, const PromptStates& tile,
                       int64_t num_tokens);
    void choose(const Router& router, const PromptStates& tile, int64_t num_tokens);
    void feed_forward(const DecoderLayer& layer, const PromptStates& tile, int64_t num_tokens);

    const Decoder& decoder_;
    DenseStep* device_ = nullptr;
    int64_t first_on_device_ = 0;
    bool head_on_device_ = false;
    int64_t num_tokens_ = 0;
    PromptStates states_{};
    std::vector<float> query_, key_, value_, product_;  // (tokens of a tile, ...)
    std::vector<float> scores_;                         // (tokens of a tile, num_experts)
    std::vector<int32_t> tokens_;                       // 0, 1, ... of a dense network's pairs
    std::vector<float> ones_;
};

}  // namespace moe
