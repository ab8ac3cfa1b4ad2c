#include "device/link.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "common/errors.h"

namespace moe {

namespace {

// A sleeping thread wakes some 50 us late; what is left after it is spun away.
constexpr std::chrono::microseconds kSpin{100};

}  // namespace

ThrottledLink::ThrottledLink(double bytes_per_s, double latency_s)
    : bytes_per_s_(bytes_per_s), latency_s_(latency_s) {
    check(bytes_per_s > 0, "ThrottledLink", "bandwidth must be positive");
    check(latency_s >= 0 && latency_s < 10, "ThrottledLink", "latency must be from 0 to 10 s");
}

void ThrottledLink::copy(std::byte* to, const std::byte* from, int64_t num_bytes) {
    pass_faults();
    const Clock::time_point arrival = reserve(num_bytes);
    std::memcpy(to, from, static_cast<size_t>(num_bytes));
    std::this_thread::sleep_until(arrival - kSpin);
    while (Clock::now() < arrival) std::this_thread::yield();
}

// When the last byte arrives, if the wire is taken as soon as it is free.
ThrottledLink::Clock::time_point ThrottledLink::reserve(int64_t num_bytes) {
    const auto duration = [](double s) {
        return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s));
    };
    std::lock_guard lock(mutex_);
    wire_free_at_ = std::max(Clock::now(), wire_free_at_) + duration(double(num_bytes) / bytes_per_s_);
    return wire_free_at_ + duration(latency_s_);
}

void ThrottledLink::inject(int64_t after, int64_t times, bool lost) {
    std::lock_guard lock(mutex_);
    fault_after_ = after, fault_times_ = times, fault_is_loss_ = lost;
}

void ThrottledLink::pass_faults() {
    std::lock_guard lock(mutex_);
    if (is_lost_) throw LinkError("the emulated device is lost", true);
    if (fault_after_ < 0 || fault_after_-- > 0) return;
    fault_after_ = 0;
    if (fault_is_loss_) {
        is_lost_ = true;
        throw LinkError("the emulated device was lost in the middle of a copy", true);
    }
    if (fault_times_-- > 0) throw LinkError("a copy to the emulated device failed", false);
    fault_after_ = -1;
}

}  // namespace moe
