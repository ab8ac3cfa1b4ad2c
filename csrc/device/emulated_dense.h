// Dense layers on the emulated device: the CPU's own step over weights, keys and values in the device's
// arena, with everything that crosses going over the link. It uses the pool's threads while the host waits.
#pragma once

#include <memory>

#include "decode/decode_step.h"
#include "device/dense_step.h"
#include "device/link.h"

namespace moe {

class EmulatedDense : public DenseStep {
  public:
    EmulatedDense(const DenseParts& parts, std::shared_ptr<ThrottledLink> to_device,
                  std::shared_ptr<ThrottledLink> to_host);

    void begin(const float* residual, const float* cos, const float* sin, int64_t num_tokens) override;
    Attended attend(int64_t layer) override;
    void add_rows(const float* rows, const float* weights, int64_t num_rows) override;
    void residual(float* out) override;
    void logits(float* out) override;

  private:
    void upload(float* to, const float* from, int64_t count);
    void bring(float* to, const float* from, int64_t count);
    void bring_token(const uint8_t* rows, uint8_t* to);

    const DenseParts parts_;
    const std::shared_ptr<ThrottledLink> to_device_, to_host_;
    DecodeStep step_;
    int64_t num_tokens_ = 0;
    std::vector<float> residual_, rotary_, rows_, logits_;  // on the device
    std::vector<float> normed_;                             // on the host, as the two below
    std::vector<uint8_t> key_, value_;
};

}  // namespace moe
