// A prompt's tokens in dense layers on a card: all of a layer but its experts, launched on the stream that
// computes single tokens. States come from the host through pinned memory that kernels read, and go back so.
#pragma once

#include <memory>
#include <vector>

#include "cuda/dense_products.h"
#include "cuda/expert_rows.h"
#include "device/dense_step.h"

namespace moe::cuda {

// One thread at a time; what was launched is waited for before the next call.
class DensePrompt {
  public:
    // Its memory grows with the longest tile. `parts` outlives it.
    DensePrompt(const DenseParts& parts, cudaStream_t stream);
    ~DensePrompt();

    // Queues the tile and the way back of what it gives.
    void launch(const DenseLayer& layer, const PromptTile& tile);
    // Puts what has come back in its places.
    void bring(const DenseLayer& layer, const PromptTile& tile);

  private:
    struct Memory;
    struct Tables {
        MatrixTiles query, key, value, out, router;
    };

    Tables send(const DenseLayer& layer, const PromptTile& tile);
    void project(const DenseLayer& layer, const Tables& tables);
    void attend(const DenseLayer& layer, const Tables& tables);
    void choose(const DenseLayer& layer, const Tables& tables);
    void feed_forward(const DenseLayer& layer);
    Inputs quantized(const float* x, int64_t rows, int64_t cols, bool is_packed);
    void norm(float* x, const float* added, const float* weight, float* y, int64_t rows, int64_t width);
    void multiply(const Linear& linear, const Inputs& inputs, const MatrixTiles& tiles, float* out);

    const DenseParts& parts_;
    const cudaStream_t stream_;
    std::unique_ptr<Memory> memory_;
    ExpertRows network_{stream_, 64 << 10};                  // of layers without experts
    int64_t num_tokens_ = 0, skipped_ = 0, num_wanted_ = 0;  // of the tile
};

}  // namespace moe::cuda
