#include "device/emulated_device.h"

#include <algorithm>

#include "device/emulated_dense.h"

namespace moe {

namespace {

struct HostInputs : DeviceInputs {
    HostInputs(const float* from, int64_t tokens, int64_t hidden_size)
        : hidden(from, from + tokens * hidden_size), num_tokens(tokens) {}
    std::vector<float> hidden;  // (num_tokens, hidden_size)
    int64_t num_tokens;
};

}  // namespace

int64_t EmulatedDevice::pin(std::byte* begin, int64_t num_bytes) {
    const int64_t granted = std::clamp<int64_t>(pinnable_bytes_, 0, num_bytes);
    pinnable_bytes_ -= granted;
    to_device_->set_pinned(begin, granted);
    to_host_->set_pinned(begin, granted);
    return granted;
}

std::unique_ptr<DeviceKernel> EmulatedDevice::make_kernel(const ExpertKernel& kernel) {
    return std::make_unique<HostKernel>(kernel);
}

std::unique_ptr<DenseStep> EmulatedDevice::make_dense(const DenseParts& parts) {
    return std::make_unique<EmulatedDense>(parts, *this);
}

std::shared_ptr<DeviceInputs> EmulatedDevice::upload(const float* hidden, int64_t num_tokens,
                                                     int64_t hidden_size) {
    return std::make_shared<HostInputs>(hidden, num_tokens, hidden_size);
}

const std::shared_ptr<EmulatedStream>& EmulatedDevice::stream() {
    if (!stream_) {
        stream_ = std::make_shared<EmulatedStream>();
        to_device_->set_stream(stream_);
    }
    return stream_;
}

void EmulatedDevice::pass_faults() {
    if (is_lost()) throw DeviceError("the emulated device is lost", DeviceFault::kLost);
    if (no_memory_times_ > 0) {
        --no_memory_times_;
        throw DeviceError("the emulated device has no memory for a launch", DeviceFault::kNoMemory);
    }
}

void EmulatedDevice::close() {
    if (stream_) stream_->close();
    memory_.close();
}

void EmulatedDevice::rows(const DeviceKernel& kernel, const DeviceInputs& inputs, const ExpertPairs& pairs,
                          int64_t first_pair, int64_t total_pairs) {
    pass_faults();
    const ExpertKernel& expert_kernel = static_cast<const HostKernel&>(kernel).kernel;
    const auto& host = static_cast<const HostInputs&>(inputs);
    const int64_t hidden_size = expert_kernel.hidden_size();
    rows_.resize(std::max(rows_.size(), size_t(total_pairs * hidden_size)));
    experts_.rows(expert_kernel, host.hidden.data(), host.num_tokens, pairs,
                  rows_.data() + first_pair * hidden_size);
}

double EmulatedDevice::finish(float* rows, int64_t total_pairs, int64_t hidden_size) {
    return to_host_->copy_pinned(reinterpret_cast<std::byte*>(rows),
                                 reinterpret_cast<const std::byte*>(rows_.data()),
                                 total_pairs * hidden_size * int64_t(sizeof(float)));
}

}  // namespace moe
