// Experts' rows on a stream: two matrix launches for all experts of a call, over tables of slot pointers that
// a kernel fetches from pinned memory.
#pragma once

#include "cuda/kernels.h"
#include "cuda/runtime.h"
#include "device/device.h"

namespace moe::cuda {

// A layer's experts: formats, and biases on the device.
struct CudaKernel : DeviceKernel {
    explicit CudaKernel(const ExpertKernel& kernel) : of(kernel) {}
    bool reads_packed() const;  // gate or up

    const ExpertKernel& of;
    GrowingMemory biases;
    const float* gate_up_bias = nullptr;  // (num_experts, 2 * intermediate_size)
    const float* down_bias = nullptr;     // (num_experts, hidden_size)
};

// Rows of numbers on the device, and packed where packed weights read them.
class PackedInputs {
  public:
    // The rows' memory; valid until the next call.
    float* reserve(int64_t num_rows, int64_t cols) { return rows_.at_least<float>(num_rows * cols); }
    Inputs inputs(int64_t num_rows, int64_t cols);

  private:
    GrowingMemory rows_, packed_;
};

// One thread at a time.
class ExpertRows {
  public:
    // table_bytes: of calls that may be queued before one waits for those before it.
    ExpertRows(cudaStream_t stream, int64_t table_bytes) : stream_(stream), table_bytes_(table_bytes) {}

    // Queues out (num_pairs, hidden_size), on the device, from inputs that are there: packed ones where
    // kernel.reads_packed().
    void compute(const CudaKernel& kernel, const Inputs& inputs, const ExpertPairs& pairs, float* out);
    // What was queued has been waited for.
    void are_done() { used_bytes_ = 0; }

  private:
    struct Tables;
    Tables upload_tables(const CudaKernel& kernel, const ExpertPairs& pairs);

    const cudaStream_t stream_;
    const int64_t table_bytes_;
    GrowingMemory host_tables_{true}, tables_;
    int64_t used_bytes_ = 0;  // of both, by calls that may not be finished
    PackedInputs intermediate_;
    GrowingMemory gate_, up_;  // (num_pairs, intermediate_size) where they are of two formats
};

}  // namespace moe::cuda
