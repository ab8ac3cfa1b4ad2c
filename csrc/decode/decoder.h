// What a decoder of the Llama shape is made of: its matrices, norms and layers, checked against one shape.
// One token (decode_step.h) and many (prompt_step.h) go through the same description.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/ops.h"

namespace moe {

// A matrix in memory that outlives the decoder.
struct Linear {
    Matrix matrix;
    const uint8_t* weight;
    int64_t weight_bytes;
    const float* bias;  // (rows,) or nullptr
};

struct DecoderShape {
    int64_t hidden_size, num_heads, num_kv_heads, head_dim;
    int64_t rotary_dim;  // the first dimensions of a head are rotated
    float eps;
    float scaling;      // of scores
    int cache_type;     // F32, F16, BF16 or Q8_0 (head_dim a multiple of 32)
    int64_t max_top_k;  // over the layers
};

struct AttentionLayer {
    const float* norm;               // (hidden_size,)
    Linear query, key, value, out;   // bias may be absent
    const float *q_norm, *k_norm;    // nullptr: none
    bool norms_heads;                // each head apart, or all of them as one vector
    float clip;                      // of query, key and value; 0: none
    int64_t window;                  // tokens that are seen; 0: all
    const float* sinks;              // (num_heads,) or nullptr
    const float* feed_forward_norm;  // (hidden_size,)
};

struct Router {
    Linear gate;  // (num_experts, hidden_size)
    int64_t top_k;
    bool softmax_of_chosen;  // of the chosen logits (gpt-oss) rather than of all
    bool normalize;          // the chosen weights add up to 1
};

// Keys and values of one layer: (num_kv_heads, capacity, head_dim) of the cache's type, Q8_0 as blocks.
struct CachedTokens {
    uint8_t *keys, *values;
    int64_t capacity, num_tokens;
};

struct DecoderLayer {
    AttentionLayer attention;
    Router router;  // top_k 0: dense
    const ExpertKernel* kernel;
    std::vector<uint64_t> addresses;  // of the dense network's matrices
};

class Decoder {
  public:
    Decoder(const DecoderShape& shape, const Linear& embedding, const float* final_norm, const Linear& head);

    // ``kernel`` lives as long as this.
    void add_moe_layer(const AttentionLayer& attention, const Router& router, const ExpertKernel* kernel);
    // The feed-forward network as a kernel of one expert, with its matrices' addresses.
    void add_dense_layer(const AttentionLayer& attention, const ExpertKernel* kernel,
                         std::vector<uint64_t> addresses);

    const DecoderShape& shape() const { return shape_; }
    const DecoderLayer& layer(int64_t index) const;
    int64_t num_layers() const { return int64_t(layers_.size()); }
    int64_t query_size() const { return shape_.num_heads * shape_.head_dim; }
    int64_t key_size() const { return shape_.num_kv_heads * shape_.head_dim; }
    const Linear& head() const { return head_; }
    const float* final_norm() const { return final_norm_; }

    // Throws for an id without a row; where threads embed, before they do.
    void check_token(int64_t token_id) const;
    // The embedding row of a token, (hidden_size,).
    void embed(int64_t token_id, float* out) const;

  private:
    void add_layer(DecoderLayer layer);

    DecoderShape shape_;
    Linear embedding_, head_;
    const float* final_norm_;
    std::vector<DecoderLayer> layers_;
};

}  // namespace moe
