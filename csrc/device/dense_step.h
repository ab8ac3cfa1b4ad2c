// The dense part of forwards on a device: norms, projections, rotary, keys and values, attention, router and
// head, with the bits of decode/decode_step.h. Weights and keys and values lie in the device's memory, where
// the caller put them. One token:
//
//   begin(residual) ─► attend(layer) ─► rows ─► add_rows ─► attend(layer + 1) ─► rows ... ─► logits
//
// The residual stays on the device from begin() on, and so do the rows of experts that it computes. attend()
// is the one synchronisation of a layer: it brings what its router chose and saw, and the token's key and
// value, which the host keeps as well: so a lost device costs a token's time and never a conversation. One
// thread calls at a time; every call may throw DeviceError, after which the token is begun anew, here or on
// the CPU.
//
// Many tokens of a prompt: attend_tile(layer) is all of a layer but its experts, whose rows the host adds for
// a whole chunk of tiles. So states go there and come back, a token's keys and values as above.
#pragma once

#include <cstdint>
#include <vector>

#include "decode/decoder.h"
#include "decode/prompt_states.h"
#include "decode/token_parts.h"

namespace moe {

class DeviceKernel;

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

// Instead of the number of a row that is on the device: the host has it.
constexpr int32_t kAtHome = -1;

// Experts whose rows the device has computed, and in what time.
struct RowsDone {
    int64_t experts = 0;
    double seconds = 0;
};

class DenseStep {
  public:
    virtual ~DenseStep() = default;

    // A token behind ``num_tokens`` others, whose keys and values are there; cos and sin (rotary_dim / 2,).
    virtual void begin(const float* residual, const float* cos, const float* sin, int64_t num_tokens) = 0;

    // A layer's attention and router, or the whole layer where it has no experts.
    virtual Attended attend(int64_t layer) = 0;

    // Queues the unweighted rows of experts (addresses on the device), of what the last attend()'s router
    // saw, and returns: they are the device's rows from ``first_row`` on, of which there are max_top_k.
    virtual void rows(const DeviceKernel& kernel, const ExpertPairs& pairs, int64_t first_row) = 0;

    // residual += weights[i] * row i, i ascending, two roundings. Row i is the device's row sources[i], or
    // rows[i] where that is kAtHome.
    virtual void add_rows(const float* rows, const float* weights, const int32_t* sources,
                          int64_t num_rows) = 0;

    virtual void residual(float* out) = 0;  // (hidden_size,)
    virtual void logits(float* out) = 0;    // (vocab_size,); only with a head

    // A layer of a prompt's tile behind the tokens that are cached here and there, as PromptStep::attend();
    // then its states, keys and values are the host's, too. Gives up what begin() began.
    virtual void attend_tile(int64_t layer, const PromptTile& tile) = 0;
    // Logits (num_tokens, vocab_size) of what the layers have made of tokens, (num_tokens, hidden_size); only
    // with a head.
    virtual void logits_of(const float* residual, int64_t num_tokens, float* out) = 0;

    // What rows() was asked for, of what has been waited for and was not taken before.
    virtual RowsDone take_rows_done() = 0;
    // How many times the host has waited for the device.
    virtual int64_t num_waits() const = 0;
};

}  // namespace moe
