// The dense part of decode steps on a device: norms, projections, rotary, keys and values, attention,
// router and head, with the bits of decode/decode_step.h. Weights and keys and values lie in the device's
// memory, where the caller put them.
//
//   begin(residual) ─► attend(layer) ─► add_rows ─► attend(layer + 1) ─► add_rows ... ─► logits
//
// The residual stays on the device from begin() on. attend() is the one synchronisation of a layer: it
// brings what its router chose and saw, and the token's key and value, which the host keeps as well: so a
// lost device costs a token's time and never a conversation. One thread calls at a time; every call may
// throw DeviceError, after which the token is begun anew, here or on the CPU.
#pragma once

#include <cstdint>
#include <vector>

#include "decode/decoder.h"
#include "decode/token_parts.h"

namespace moe {

// A layer as the device computes it: every address but the kernel's is the device's.
struct DenseLayer {
    AttentionLayer attention;
    Router router;                    // top_k 0: the feed-forward network is dense
    const ExpertKernel* kernel;       // of the dense network, its biases on the device
    std::vector<uint64_t> addresses;  // of its matrices
    uint8_t *keys, *values;           // (num_kv_heads, capacity, head_dim) of the cache's type
};

// The last layers of a decoder, and its head if it fits.
struct DenseParts {
    DecoderShape shape;
    int64_t first_layer;
    int64_t capacity;  // cached tokens
    std::vector<DenseLayer> layers;
    const float* final_norm;
    Linear head;  // weight nullptr: the head is the host's
};

// What a layer's attention brings to the host; valid until the next call.
struct Attended {
    const Choice* choice;        // of the router; as it was where there is none
    const float* normed;         // (hidden_size,) what the router saw
    const uint8_t *key, *value;  // (num_kv_heads, head_dim) of the cache's type
};

class DenseStep {
  public:
    virtual ~DenseStep() = default;

    // A token behind ``num_tokens`` others, whose keys and values are there; cos and sin (rotary_dim / 2,).
    virtual void begin(const float* residual, const float* cos, const float* sin, int64_t num_tokens) = 0;

    // A layer's attention and router, or the whole layer where it has no experts.
    virtual Attended attend(int64_t layer) = 0;

    // residual += weights[i] * rows[i], i ascending, two roundings.
    virtual void add_rows(const float* rows, const float* weights, int64_t num_rows) = 0;

    virtual void residual(float* out) = 0;  // (hidden_size,)
    virtual void logits(float* out) = 0;    // (vocab_size,); only with a head
};

}  // namespace moe
