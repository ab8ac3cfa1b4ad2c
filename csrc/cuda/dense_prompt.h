// A prompt's tokens in dense layers on a card: all of a layer but its experts, launched on the stream that
// computes single tokens. States come from the host through pinned memory that kernels read, and go back so.
#pragma once

#include <memory>
#include <utility>
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

    // The same for logits of up to logits_at_once() tokens, which take no more memory than a tile.
    int64_t logits_at_once() const;
    void launch_logits(const float* residual, int64_t num_tokens);
    void bring_logits(float* out);

  private:
    struct Memory;
    struct Tables {
        MatrixTiles query, key, value, out, router;
    };

    // Tiles of matrices, collected for the device.
    struct Cut {
        std::vector<Tile> tiles;
        std::vector<std::pair<MatrixTiles*, size_t>> begins;

        void add(const Linear& linear, int64_t num_rows, MatrixTiles& to);
        void place(const Tile* there, Tile* here) const;
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
