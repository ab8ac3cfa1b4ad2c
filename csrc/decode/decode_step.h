// One token through a decoder of the Llama shape (RMS norm, grouped-query attention with rotary
// positions, gated feed-forward or experts), without leaving native code inside a layer.
//
//   begin(token) ─► attend(0) ─► experts(0) ─► attend(1) ─► experts(1) ... ─► logits
//
// attend() ends with the router's choice, so that Python can decide what is read before experts().
// Everything between two matrices is fp32. Nothing is kept of a token but its keys and values, written
// behind those of the tokens before it. The caller serializes calls.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/activation_buffer.h"
#include "cpu/ops.h"
#include "decode/cached_attention.h"
#include "decode/decoder.h"
#include "decode/layer_watch.h"
#include "decode/token_parts.h"
#include "device/dense_step.h"

namespace moe {

class DecodeStep {
  public:
    DecodeStep(const DecoderShape& shape, const Linear& embedding, const float* final_norm,
               const Linear& head);

    Decoder& decoder() { return decoder_; }

    // From now on the layers from ``first_layer`` on, and the head where ``has_head``, run on a device, which
    // holds the tokens that the host's caches hold; nullptr: nothing does. Between tokens.
    void use_device(DenseStep* device, int64_t first_layer, bool has_head);

    // The token's embedding; cos and sin (rotary_dim / 2,) of its position stay until logits().
    void begin(int64_t token_id, const float* cos, const float* sin);

    // The same from what the layers before have made of it, (hidden_size,).
    void begin(const float* residual, const float* cos, const float* sin);

    // Attention and its residual, then the router's choice, or the whole dense feed-forward network.
    void attend(int64_t layer, const CachedTokens& cached);

    const Choice& choice() const { return choice_; }
    const std::vector<float>& router_input() const { return normed_; }

    // The layer's chosen experts, from where they are: (top_k, number of matrices) addresses.
    void experts(int64_t layer, const uint64_t* addresses);

    // The same in parts: rows of some of them, by position in choice(), then their weighted sum.
    void expert_rows(int64_t layer, const std::vector<int32_t>& positions, const uint64_t* addresses);
    void add_expert_rows(int64_t layer);
    void add_rows(const float* rows, const float* weights, int64_t num_rows);

    // Who has the residual and keeps the rows of experts that it computes; nullptr: the host.
    DenseStep* away() const { return residual_is_away_ ? device_ : nullptr; }
    // Of some of the chosen experts, by position, that add_expert_rows() takes from the device: returns the
    // first of their rows there. What expert_rows() computes after all is taken from here.
    int64_t leave_rows(const std::vector<int32_t>& positions);
    void bring_rows_home();  // none of them
    // leave_rows() and DenseStep::rows(), of experts that are there.
    void device_rows(const DeviceKernel& kernel, const std::vector<int32_t>& positions,
                     const uint64_t* addresses);
    float* expert_rows_data() { return rows_.data(); }  // (max_top_k, hidden_size)

    // attend() and experts() of the layers from ``first`` on, as far as nothing has to be read. ``tables``
    // has, for each layer with experts, its resident table (resident_table.h); nullptr for other layers.
    // Returns the layer whose router chose what is not in memory, its experts() still to be called, or
    // num_layers(). ``watch``, where there is one, has heard of that layer's choice then.
    int64_t run(int64_t first, const std::vector<CachedTokens>& cached,
                const std::vector<const uint64_t*>& tables, LayerWatch* watch = nullptr);

    // What the last run() chose, by layer.
    const std::vector<Choice>& choices() const { return choices_; }

    void logits(float* out);  // (vocab_size,)

    // The most likely next token by the logits (vocab_size,), the lowest of several; 0 where all are NaN.
    // ``watch``, where there is one, hears of it as if its layers began. Between tokens.
    int64_t expect_next(const float* logits, LayerWatch* watch);

    const std::vector<float>& residual() const { return residual_; }

    int64_t num_layers() const { return decoder_.num_layers(); }
    int64_t num_matrices(int64_t layer) const { return decoder_.layer(layer).kernel->num_matrices(); }

  private:
    struct TokenPairs;
    int64_t find_chosen(int64_t layer, const uint64_t* table);
    struct Product {
        const Linear* linear;
        float* out;
    };

    std::vector<int32_t> ids_at(const std::vector<int32_t>& positions) const;
    void attend_on_device(int64_t layer, const CachedTokens& cached);
    void bring_residual_home();
    void multiply(const float* x, std::initializer_list<Product> products);
    void project(const AttentionLayer& attention);
    void choose(const Router& router);

    Decoder decoder_;
    const float *cos_ = nullptr, *sin_ = nullptr;
    DenseStep* device_ = nullptr;
    int64_t first_on_device_ = 0;
    bool head_on_device_ = false, residual_is_away_ = false;
    std::vector<int32_t> sources_;  // by position, of the chosen experts' rows: kAtHome or the device's
    int64_t rows_left_ = 0;

    ActivationBuffer inputs_;
    CachedAttention attention_;
    std::vector<float> residual_, normed_, query_, key_, value_, context_, product_;
    std::vector<float> scores_;            // of the router, padded to 8
    std::vector<float> rows_, some_rows_;  // (top_k, hidden_size)
    Choice choice_;
    std::vector<Choice> choices_;
    std::vector<uint64_t> chosen_addresses_;
};

}  // namespace moe
