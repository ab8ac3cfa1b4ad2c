// Copies to the card: one stream, an event per copy. Order, cancelling and how many copies are under way are
// device/copy_queue.h's, the same code as the emulated link's.
#pragma once

#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/runtime.h"

namespace moe::cuda {

class CudaLink : public Link {
  public:
    // MOE_OFFLOAD_LINK_LIMIT (bytes per second, for bench/gpu.py) makes it as slow as a laptop's.
    explicit CudaLink(int device);

    void copy(std::byte* to, const std::byte* from, int64_t num_bytes) override;

    // Registers host memory in pieces, until the system refuses; returns how much from `begin` on it granted.
    int64_t pin(std::byte* begin, int64_t num_bytes);

    // Unregisters; no copy is under way.
    void close();

  private:
    static constexpr int64_t kBounceBytes = 1 << 20;
    // What one copy under way needs; there are as many as callers at once.
    struct Lane {
        Event event{cudaEventDisableTiming | cudaEventBlockingSync};
        GrowingMemory bounce{true};
    };

    std::unique_ptr<Lane> take_lane();
    void wait_for(const Event& event) const;
    void pace(int64_t num_bytes);
    int64_t pinned_run(const std::byte* from, int64_t num_bytes, bool* pinned) const;

    using Clock = std::chrono::steady_clock;

    const int device_;
    double limit_bytes_per_s_ = 0;  // 0: none
    Stream stream_;
    mutable std::mutex mutex_;  // guards everything below
    std::vector<std::unique_ptr<Lane>> free_lanes_;
    std::map<const std::byte*, int64_t> pieces_;  // registered memory: begin, bytes
    Clock::time_point wire_free_at_{};            // of a limited link
};

}  // namespace moe::cuda
