// CUDA's runtime as this device uses it: errors become DeviceError, memory frees itself.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <string>
#include <utility>

#include "device/link.h"

namespace moe::cuda {

// After most errors of a kernel nothing succeeds in this process; these are the ones that say "not this".
inline DeviceFault fault_of(cudaError_t error) {
    switch (error) {
        case cudaErrorMemoryAllocation:
            return DeviceFault::kNoMemory;
        case cudaErrorInvalidValue:
        case cudaErrorInvalidConfiguration:
        case cudaErrorNotSupported:
        case cudaErrorHostMemoryAlreadyRegistered:
        case cudaErrorHostMemoryNotRegistered:
            return DeviceFault::kFailed;
        default:
            return DeviceFault::kLost;
    }
}

inline void must(int code, const char* what) {
    const auto error = static_cast<cudaError_t>(code);
    if (error == cudaSuccess) return;
    cudaGetLastError();  // so that the next check does not meet it again
    throw DeviceError(std::string(what) + ": " + cudaGetErrorString(error), fault_of(error));
}

// To the device, for kernels of any stream: cudaMemcpy may return before pageable memory's last step, and
// streams that do not block do not wait for it.
inline void copy_to_card(void* to, const void* from, size_t num_bytes, const char* what) {
    must(cudaMemcpy(to, from, num_bytes, cudaMemcpyHostToDevice), what);
    must(cudaStreamSynchronize(nullptr), what);
}

// Memory that grows; what it held is lost when it does. `on_host`: pinned, and kernels read it too.
class GrowingMemory {
  public:
    explicit GrowingMemory(bool on_host = false) : on_host_(on_host) {}
    ~GrowingMemory() { free(); }
    GrowingMemory(const GrowingMemory&) = delete;
    GrowingMemory& operator=(const GrowingMemory&) = delete;

    template <class T>
    T* at_least(int64_t count) {
        const int64_t num_bytes = count * int64_t(sizeof(T));
        if (num_bytes > num_bytes_) grow(num_bytes + std::min(num_bytes / 4, kMostSlack));
        return reinterpret_cast<T*>(data_);
    }
    int64_t num_bytes() const { return num_bytes_; }

    void free() {
        if (data_) on_host_ ? cudaFreeHost(data_) : cudaFree(data_);
        data_ = nullptr, num_bytes_ = 0;
    }

  private:
    static constexpr int64_t kMostSlack = 1 << 20;  // a budget counts what is used

    void grow(int64_t num_bytes) {
        free();
        const auto size = static_cast<size_t>((num_bytes + 4095) / 4096 * 4096);
        must(on_host_ ? cudaMallocHost(&data_, size) : cudaMalloc(&data_, size),
             on_host_ ? "pinned memory for transfers" : "memory for a launch");
        num_bytes_ = int64_t(size);
    }

    const bool on_host_;
    void* data_ = nullptr;
    int64_t num_bytes_ = 0;
};

class Event {
  public:
    explicit Event(unsigned flags = cudaEventDisableTiming) {
        must(cudaEventCreateWithFlags(&event_, flags), "an event");
    }
    ~Event() { cudaEventDestroy(event_); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    void record(cudaStream_t stream) { must(cudaEventRecord(event_, stream), "an event"); }
    double seconds_since(const Event& begin) const {
        float milliseconds = 0;
        must(cudaEventElapsedTime(&milliseconds, begin.event_, event_), "an event");
        return double(milliseconds) * 1e-3;
    }
    bool has_passed() const {
        if (cudaEventQuery(event_) == cudaSuccess) return true;
        cudaGetLastError();  // "not ready" stays there, and a launch's check would take it for its own
        return false;
    }
    operator cudaEvent_t() const { return event_; }
    void wait(const char* what) const { must(cudaEventSynchronize(event_), what); }

  private:
    cudaEvent_t event_ = nullptr;
};

class Stream {
  public:
    Stream() { must(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream"); }
    ~Stream() { cudaStreamDestroy(stream_); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    operator cudaStream_t() const { return stream_; }

  private:
    cudaStream_t stream_ = nullptr;
};

}  // namespace moe::cuda
