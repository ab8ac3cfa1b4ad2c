// How bytes cross to a device: one chunk at a time, by whichever thread asks.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

namespace moe {

// A copy that failed; `lost` means that the device is gone and no later copy can succeed.
struct LinkError : std::runtime_error {
    LinkError(const std::string& message, bool is_lost) : std::runtime_error(message), lost(is_lost) {}
    bool lost;
};

class Link {
  public:
    virtual ~Link() = default;
    // Returns when the bytes have arrived; called by several threads at once. Throws LinkError.
    virtual void copy(std::byte* to, const std::byte* from, int64_t num_bytes) = 0;
};

// A link of given bandwidth and latency between two places of host memory. Copies queue for the wire;
// latencies overlap with what follows, as on a bus.
class ThrottledLink : public Link {
  public:
    ThrottledLink(double bytes_per_s, double latency_s);
    void copy(std::byte* to, const std::byte* from, int64_t num_bytes) override;

    // The next copies fail: after `after` more of them, `times` in a row; `lost`: that one and all later.
    void inject(int64_t after, int64_t times, bool lost);

  private:
    using Clock = std::chrono::steady_clock;
    void pass_faults();
    Clock::time_point reserve(int64_t num_bytes);

    const double bytes_per_s_, latency_s_;
    std::mutex mutex_;  // guards everything below
    Clock::time_point wire_free_at_{};
    int64_t fault_after_ = -1, fault_times_ = 0;
    bool fault_is_loss_ = false, is_lost_ = false;
};

}  // namespace moe
