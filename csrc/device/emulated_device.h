// An accelerator without the hardware: a bounded arena for its memory, a throttled link, and the CPU's
// kernels on a thread of its own, so that cache, transfers and scheduling run with real concurrency where
// there is no GPU. It proves order and safety; its speed is an arithmetic of bandwidth and latency, and one
// core's at most: no GPU's.
#pragma once

#include <atomic>

#include "device/device.h"
#include "device/emulated_stream.h"
#include "device/inline_experts.h"
#include "io/arena.h"

namespace moe {

struct HostKernel : DeviceKernel {
    explicit HostKernel(const ExpertKernel& of) : kernel(of) {}
    const ExpertKernel& kernel;
};

class EmulatedDevice : public Device {
  public:
    // pinnable_bytes: how much host memory pin() grants; with the rest copies take twice the time.
    EmulatedDevice(int64_t vram_bytes, double to_device_bytes_per_s, double to_host_bytes_per_s,
                   double latency_s, int64_t pinnable_bytes)
        : memory_(vram_bytes),
          to_device_(std::make_shared<ThrottledLink>(Direction::kToDevice, to_device_bytes_per_s, latency_s)),
          to_host_(std::make_shared<ThrottledLink>(Direction::kToHost, to_host_bytes_per_s, latency_s)),
          pinnable_bytes_(pinnable_bytes) {}

    std::string name() const override { return "emulated"; }
    uint64_t address() const override { return uint64_t(memory_.address()); }
    int64_t num_bytes() const override { return memory_.num_bytes(); }
    void give_back(int64_t offset, int64_t num_bytes) override { memory_.give_back(offset, num_bytes); }
    std::shared_ptr<Link> link(Direction direction) override { return throttled(direction); }
    int64_t pin(std::byte* begin, int64_t num_bytes) override;
    void unpin(std::byte*, int64_t) override {}  // pages are never held
    bool has_kernel(const ExpertKernel&) const override { return true; }
    std::unique_ptr<DeviceKernel> make_kernel(const ExpertKernel& kernel) override;
    bool has_matrix(int) const override { return true; }
    std::unique_ptr<DenseStep> make_dense(const DenseParts& parts) override;
    std::shared_ptr<DeviceInputs> upload(const float* hidden, int64_t num_tokens,
                                         int64_t hidden_size) override;
    void rows(const DeviceKernel& kernel, const DeviceInputs& inputs, const ExpertPairs& pairs,
              int64_t first_pair, int64_t total_pairs) override;
    double finish(float* rows, int64_t total_pairs, int64_t hidden_size) override;
    void close() override;

    std::shared_ptr<ThrottledLink> throttled(Direction direction) const {
        return direction == Direction::kToDevice ? to_device_ : to_host_;
    }
    // Of dense layers; its thread begins with them.
    const std::shared_ptr<EmulatedStream>& stream();
    // What befalls a launch. Throws DeviceError.
    void pass_faults();
    // The next launches find no memory, `times` in a row.
    void inject_no_memory(int64_t times) { no_memory_times_ = times; }

  private:
    bool is_lost() const { return to_device_->is_lost() || to_host_->is_lost(); }

    Arena memory_;
    std::shared_ptr<ThrottledLink> to_device_, to_host_;
    std::shared_ptr<EmulatedStream> stream_;
    int64_t pinnable_bytes_;
    std::atomic<int64_t> no_memory_times_{0};
    // The compute thread's own.
    InlineExperts experts_;
    std::vector<float> rows_;  // (total_pairs, hidden_size)
};

}  // namespace moe
