// The CUDA implementation of device/device.h: slots in one allocation, inputs in pools, experts' rows by two
// matrix launches for all of a call's experts, one synchronisation per launch of the engine.
//
// Small things (inputs, tables of experts) do not go through the copy engine, where they would wait behind
// experts under way: a kernel fetches them from pinned memory.
#pragma once

#include "cuda/cuda_link.h"
#include "cuda/expert_rows.h"

namespace moe::cuda {

// What an upload holds; lives in a pool, for steps come and go.
struct UploadBuffer {
    GrowingMemory host{true};
    PackedInputs device;
    Event fetched;  // the host's memory may be written again
    int64_t num_rows = 0, cols = 0;
    bool is_fetched = false, is_packed = false;
};

struct UploadPool {
    std::mutex mutex;
    std::vector<std::unique_ptr<UploadBuffer>> free;
};

struct CudaInputs : DeviceInputs {
    CudaInputs(std::shared_ptr<UploadPool> from, std::unique_ptr<UploadBuffer> taken)
        : pool(std::move(from)), buffer(std::move(taken)) {}
    ~CudaInputs() override;
    const std::shared_ptr<UploadPool> pool;
    std::unique_ptr<UploadBuffer> buffer;
};

class CudaDevice : public Device {
  public:
    CudaDevice(int index, int64_t vram_bytes);
    ~CudaDevice() override { close(); }

    std::string name() const override { return name_; }
    uint64_t address() const override { return reinterpret_cast<uint64_t>(memory_); }
    int64_t num_bytes() const override { return num_bytes_; }
    // One allocation cannot be returned in parts.
    void give_back(int64_t, int64_t) override {}
    std::shared_ptr<Link> link(Direction direction) override {
        return direction == Direction::kToDevice ? to_device_ : to_host_;
    }
    int64_t pin(std::byte* begin, int64_t num_bytes) override { return pinned_->pin(begin, num_bytes); }
    void unpin(std::byte* begin, int64_t num_bytes) override { pinned_->unpin(begin, num_bytes); }
    bool has_kernel(const ExpertKernel& kernel) const override;
    std::unique_ptr<DeviceKernel> make_kernel(const ExpertKernel& kernel) override;
    bool has_matrix(int ggml_type) const override;
    std::unique_ptr<DenseStep> make_dense(const DenseParts& parts) override;
    std::shared_ptr<DeviceInputs> upload(const float* hidden, int64_t num_tokens,
                                         int64_t hidden_size) override;
    void rows(const DeviceKernel& kernel, const DeviceInputs& inputs, const ExpertPairs& pairs,
              int64_t first_pair, int64_t total_pairs) override;
    double finish(float* rows, int64_t total_pairs, int64_t hidden_size) override;
    void close() override;

  private:
    struct Buffers;
    void use() const;
    Inputs fetch(UploadBuffer& upload, bool packed);

    const int index_;
    std::string name_;
    int64_t num_bytes_ = 0;
    std::byte* memory_ = nullptr;
    const std::shared_ptr<PinnedMemory> pinned_ = std::make_shared<PinnedMemory>(index_);
    std::shared_ptr<RowsFence> fence_;
    std::shared_ptr<CudaLink> to_device_, to_host_;
    std::shared_ptr<UploadPool> uploads_ = std::make_shared<UploadPool>();
    std::unique_ptr<Buffers> buffers_;  // the compute thread's own
};

}  // namespace moe::cuda
