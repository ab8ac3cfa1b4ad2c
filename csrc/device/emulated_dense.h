// Dense layers on the emulated device: the CPU's own step over weights, keys and values in the device's
// arena, with everything that crosses going over the link. It uses the pool's threads while the host waits;
// experts' rows are computed on the device's stream while it does not.
#pragma once

#include <memory>

#include "decode/decode_step.h"
#include "decode/prompt_step.h"
#include "device/dense_step.h"
#include "device/emulated_stream.h"
#include "device/inline_experts.h"
#include "device/link.h"

namespace moe {

class EmulatedDevice;

class EmulatedDense : public DenseStep {
  public:
    // The device outlives it.
    EmulatedDense(const DenseParts& parts, EmulatedDevice& device);
    ~EmulatedDense() override;

    void begin(const float* residual, const float* cos, const float* sin, int64_t num_tokens) override;
    Attended attend(int64_t layer) override;
    void rows(const DeviceKernel& kernel, const ExpertPairs& pairs, int64_t first_row) override;
    void add_rows(const float* rows, const float* weights, const int32_t* sources, int64_t num_rows) override;
    void residual(float* out) override;
    void logits(float* out) override;
    void attend_tile(int64_t layer, const PromptTile& tile) override;
    void logits_of(const float* residual, int64_t num_tokens, float* out) override;
    RowsDone take_rows_done() override { return std::exchange(done_, {}); }
    int64_t num_waits() const override { return num_waits_; }

  private:
    void upload(float* to, const float* from, int64_t count);
    void bring(float* to, const float* from, int64_t count);
    void append_token(const uint8_t* rows);
    void bring_rows(const CachedTokens& there, const CachedTokens& here, int64_t num_tokens);
    void give_up();
    void wait();

    const DenseParts parts_;
    EmulatedDevice& device_;
    const std::shared_ptr<EmulatedStream> stream_;
    const std::shared_ptr<ThrottledLink> to_device_, to_host_;
    DecodeStep step_;
    PromptStep prompt_{step_.decoder()};
    int64_t num_tokens_ = 0, num_waits_ = 0;
    InlineExperts experts_;                                 // the stream's
    RowsDone under_way_, done_;                             // the stream's until it was waited for; taken
    std::vector<float> residual_, rotary_, rows_, logits_;  // on the device
    // Of add_rows(): weights and the host's rows, here and there; added by the next wait.
    std::vector<float> sent_, arrived_, summands_;
    std::vector<int32_t> sources_;
    // What a layer's router saw, the token's key and value: there and on the host.
    std::vector<std::byte> result_, brought_;
    int64_t token_bytes_ = 0;  // of a key
    std::vector<float> tile_;  // a prompt's states on the device
    std::vector<int32_t> tile_ids_;
};

}  // namespace moe
