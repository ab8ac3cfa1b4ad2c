// Dense layers on a card. What a layer launches between two waits of the host is captured once in a graph:
// it reads the token's position from the device's memory, so that no token needs another one.
// MOE_OFFLOAD_CUDA_GRAPHS=off launches one by one, with the same bits.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "cuda/cuda_graph.h"
#include "cuda/cuda_link.h"
#include "cuda/dense_kernels.h"
#include "cuda/dense_products.h"
#include "cuda/dense_prompt.h"
#include "cuda/expert_rows.h"
#include "device/dense_step.h"

namespace moe::cuda {

class CudaDense : public DenseStep {
  public:
    CudaDense(int device, const DenseParts& parts, std::shared_ptr<RowsFence> fence);
    ~CudaDense() override;

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
    static constexpr int64_t kTableBytes = 64 << 10;  // of a layer's experts

    struct Memory;
    const Tile* tile_of(const uint8_t* weight, const float* bias, const uint8_t* up = nullptr,
                        const float* up_bias = nullptr);
    void make_tiles();
    void use() const;
    void launch_layer(size_t index);
    void launch_pending();
    void launch_dense_network(size_t index);
    void launch_head();
    void multiply(const Linear& linear, const Inputs& inputs, const Tile* tile, float* out);
    Inputs quantized(const float* x, int64_t cols, bool is_packed);
    void norm(float* x, const float* added, const float* weight, float* y, int64_t rows, int64_t width);
    void wait();

    // By layer, on the device.
    struct LayerTiles {
        const Tile *query, *key, *value, *out, *router, *gate, *up, *down;
    };

    const int device_;
    const DenseParts parts_;
    // A call of rows() on the stream, timed there.
    struct RowsSpan {
        Event begin{cudaEventDefault}, end{cudaEventDefault};
        int64_t experts = 0;
    };

    const std::shared_ptr<RowsFence> fence_;
    Stream stream_;
    ExpertRows experts_{stream_, kTableBytes};
    std::deque<RowsSpan> spans_;  // the first spans_used_ have not been waited for
    size_t spans_used_ = 0;
    RowsDone done_;
    int64_t num_waits_ = 0;
    std::unique_ptr<Memory> memory_;
    DensePrompt prompt_{parts_, stream_};
    std::vector<Tile> tiles_;  // as they lie on the device
    std::vector<LayerTiles> layers_;
    const Tile* head_ = nullptr;
    std::vector<Graph> graphs_;  // of the layers, then of the end
    bool may_capture_ = true;
    Choice choice_;
    // What the next launches do first: bring the token, or add the rows of the layer before.
    enum class Pending { kNothing, kToken, kRows } pending_ = Pending::kNothing;
    int64_t pending_rows_ = 0;
};

}  // namespace moe::cuda
