// An accelerator: memory of its own, a link to it, expert kernels on it. What an implementation supplies;
// engine.h makes queues, waits, faults and a timeline of it, the same for all of them.
//
// Two implementations: EmulatedDevice (host memory, a throttled link, the CPU's kernels on a thread of its
// own) and CUDA's. Addresses "on the device" are as its kernels see them; the host never follows them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "cpu/ops.h"
#include "device/dense_step.h"
#include "device/link.h"

namespace moe {

// One layer's experts as the device computes them (biases uploaded, formats chosen); made at load.
class DeviceKernel {
  public:
    virtual ~DeviceKernel() = default;
};

// The inputs of a step, on the device: uploaded once, used by every launch of the step.
class DeviceInputs {
  public:
    virtual ~DeviceInputs() = default;
};

class Device {
  public:
    virtual ~Device() = default;

    virtual std::string name() const = 0;

    // The memory for slots: one piece.
    virtual uint64_t address() const = 0;
    virtual int64_t num_bytes() const = 0;
    // Returns what it can of [offset, offset + num_bytes) to the system; nobody uses it from then on.
    virtual void give_back(int64_t offset, int64_t num_bytes) = 0;

    // Copies to or from the device by Link::copy, for which two threads of the engine call at once. The two
    // directions do not wait for each other.
    virtual std::shared_ptr<Link> link(Direction direction) = 0;

    // Makes host memory quick to copy from and to (pinned); returns how many bytes from `begin` on the system
    // granted. Copies from the rest work, slower. Undone by close().
    virtual int64_t pin(std::byte* begin, int64_t num_bytes) = 0;
    // Lets go of the whole pages of this memory, which the system could not take back else; copies under way
    // from what was pinned with it end first.
    virtual void unpin(std::byte* begin, int64_t num_bytes) = 0;

    // Whether the device can compute experts of these formats.
    virtual bool has_kernel(const ExpertKernel& kernel) const = 0;
    // `kernel` and its biases (on the host) outlive what is returned.
    virtual std::unique_ptr<DeviceKernel> make_kernel(const ExpertKernel& kernel) = 0;

    // Whether the device can multiply by matrices of this type.
    virtual bool has_matrix(int ggml_type) const = 0;
    // The dense part of decode steps; what `parts` points to on the device stays there, kernels outlive it.
    virtual std::unique_ptr<DenseStep> make_dense(const DenseParts& parts) = 0;

    // The caller's thread: `hidden` (num_tokens, hidden_size) may change as soon as this returns. Any
    // number of them may be alive; of destroyed ones the memory is used again.
    virtual std::shared_ptr<DeviceInputs> upload(const float* hidden, int64_t num_tokens,
                                                 int64_t hidden_size) = 0;

    // The engine's compute thread alone calls these two, rows() at least once before finish().
    // Computes, or queues on the device, the unweighted rows of `pairs` (addresses on the device) as rows
    // [first_pair, first_pair + pairs.num_pairs) of a launch of `total_pairs`. Throws DeviceError.
    virtual void rows(const DeviceKernel& kernel, const DeviceInputs& inputs, const ExpertPairs& pairs,
                      int64_t first_pair, int64_t total_pairs) = 0;
    // Waits for them and brings all the launch's rows to the host over the link in that direction. It is this
    // thread that copies: a queue's would have to be woken once a layer, between the last row and the caller.
    // Returns the seconds on the link. Throws DeviceError.
    virtual double finish(float* rows,  // (total_pairs, hidden_size)
                          int64_t total_pairs, int64_t hidden_size) = 0;

    // Frees everything; the engine has joined its threads. Idempotent.
    virtual void close() = 0;
};

}  // namespace moe
