// How bytes cross between host and device: one chunk at a time, by whichever thread asks; a link per
// direction.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "device/emulated_stream.h"

namespace moe {

// What can befall a device. After kLost nothing succeeds any more; after kNoMemory less may.
enum class DeviceFault : int { kFailed = 0, kLost = 1, kNoMemory = 2 };

struct DeviceError : std::runtime_error {
    DeviceError(const std::string& message, DeviceFault what) : std::runtime_error(message), fault(what) {}
    DeviceFault fault;
};

// Why a ticket failed.
using DeviceFailure = std::pair<std::string, DeviceFault>;

enum class Direction : int { kToDevice = 0, kToHost = 1 };

class Link {
  public:
    virtual ~Link() = default;
    // Returns when the bytes have arrived; called by several threads at once. Throws DeviceError.
    virtual void copy(std::byte* to, const std::byte* from, int64_t num_bytes) = 0;

    // To the device: what it computes from its memory while the host goes on (DenseStep::rows) may not be
    // overwritten meanwhile. Whoever queues a copy asks how far that has been queued; before the first byte
    // the copying thread lets the copy wait for as much; returns whether the thread itself has waited.
    virtual int64_t fence() const { return 0; }
    virtual bool pass(int64_t) { return false; }
};

// A link of given bandwidth and latency between two places of host memory. Copies queue for the wire;
// latencies overlap with what follows, as on a bus.
class ThrottledLink : public Link {
  public:
    ThrottledLink(Direction direction, double bytes_per_s, double latency_s);
    void copy(std::byte* to, const std::byte* from, int64_t num_bytes) override;
    // The same through memory of the device's own, which is pinned. Returns the seconds that it took.
    double copy_pinned(std::byte* to, const std::byte* from, int64_t num_bytes);

    // The next copies fail: after `after` more of them, `times` in a row; `lost`: that one and all later.
    void inject(int64_t after, int64_t times, bool lost);
    bool is_lost();

    int64_t fence() const override { return stream_ ? stream_->num_queued() : 0; }
    bool pass(int64_t fence) override { return stream_ && stream_->wait_for(fence); }
    // Whose work fence() is; set while nothing is being copied.
    void set_stream(std::shared_ptr<EmulatedStream> stream) { stream_ = std::move(stream); }

    // The host memory that takes part at full speed; elsewhere at half of it.
    void set_pinned(const std::byte* begin, int64_t num_bytes);

  private:
    using Clock = std::chrono::steady_clock;
    void pass_faults();
    bool is_pinned(const std::byte* on_host, int64_t num_bytes);
    void transfer(std::byte* to, const std::byte* from, int64_t num_bytes, bool is_pinned);
    Clock::time_point reserve(int64_t num_bytes, bool is_pinned);

    const Direction direction_;
    const double bytes_per_s_, latency_s_;
    std::shared_ptr<EmulatedStream> stream_;
    std::mutex mutex_;  // guards everything below
    Clock::time_point wire_free_at_{};
    const std::byte *pinned_begin_ = nullptr, *pinned_end_ = nullptr;
    int64_t fault_after_ = -1, fault_times_ = 0;
    bool fault_is_loss_ = false, is_lost_ = false;
};

}  // namespace moe
