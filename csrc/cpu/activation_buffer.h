// Quantized activations of one operation. Grown when needed, kept between operations; whoever uses
// one holds ThreadPool::Operation.
#pragma once

#include <vector>

#include "cpu/kernels.h"

namespace moe {

class ActivationBuffer {
  public:
    // x (num_tokens, cols) stays where it is; q, d, sums and tiles are made if ``quantized``.
    Activations prepare(const Kernels& kernels, const float* x, int64_t num_tokens, int64_t cols,
                        bool quantized);

    // The places of prepare() only; quantize_row() fills them token by token, on any thread.
    Activations reserve(const float* x, int64_t num_tokens, int64_t cols, bool quantized);
    static uint64_t next_version();  // for what is reserved, filled, and will not change
    static void quantize_row(const Kernels& kernels, const Activations& activations, int64_t token);

  private:
    std::vector<int16_t> q_;
    std::vector<float> d_;
    std::vector<int16_t> sums_;
    std::vector<ActivationTile> tiles_;
};

}  // namespace moe
