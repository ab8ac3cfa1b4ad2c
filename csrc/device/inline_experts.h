// Expert rows by the CPU's kernels on the calling thread alone, with buffers of its own: what computes on
// the emulated device while the pool computes the CPU's share. The bits of ExpertKernel::rows.
#pragma once

#include <vector>

#include "cpu/activation_buffer.h"
#include "cpu/ops.h"

namespace moe {

class InlineExperts {
  public:
    void rows(const ExpertKernel& kernel, const float* hidden,  // (num_tokens, hidden_size)
              int64_t num_tokens, const ExpertPairs& pairs,
              float* out);  // (num_pairs, hidden_size)

  private:
    struct Tile;
    void multiply(const Matrix& matrix, const uint8_t* weights, const Activations& inputs, const Tile& tile,
                  float* out, int64_t stride, const float* bias);

    ActivationBuffer hidden_inputs_, down_inputs_;
    std::vector<float> gate_up_;       // (kTokenTile, 2 * intermediate_size) in stored order
    std::vector<float> intermediate_;  // (kTokenTile, intermediate_size)
};

}  // namespace moe
