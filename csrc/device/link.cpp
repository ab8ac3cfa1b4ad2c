#include "device/link.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "common/errors.h"

namespace moe {

namespace {

// A sleeping thread wakes some 50 us late; what is left after it is spun away.
constexpr std::chrono::microseconds kSpin{100};

// Drivers copy pageable memory through a pinned buffer of their own.
constexpr double kPageableShare = 0.5;

}  // namespace

ThrottledLink::ThrottledLink(Direction direction, double bytes_per_s, double latency_s)
    : direction_(direction), bytes_per_s_(bytes_per_s), latency_s_(latency_s) {
    check(bytes_per_s > 0, "ThrottledLink", "bandwidth must be positive");
    check(latency_s >= 0 && latency_s < 10, "ThrottledLink", "latency must be from 0 to 10 s");
}

void ThrottledLink::copy(std::byte* to, const std::byte* from, int64_t num_bytes) {
    transfer(to, from, num_bytes, is_pinned(direction_ == Direction::kToDevice ? from : to, num_bytes));
}

double ThrottledLink::copy_pinned(std::byte* to, const std::byte* from, int64_t num_bytes) {
    const Clock::time_point started = Clock::now();
    transfer(to, from, num_bytes, true);
    return std::chrono::duration<double>(Clock::now() - started).count();
}

void ThrottledLink::transfer(std::byte* to, const std::byte* from, int64_t num_bytes, bool is_pinned) {
    pass_faults();
    const Clock::time_point arrival = reserve(num_bytes, is_pinned);
    std::memcpy(to, from, static_cast<size_t>(num_bytes));
    std::this_thread::sleep_until(arrival - kSpin);
    while (Clock::now() < arrival) std::this_thread::yield();
}

bool ThrottledLink::is_pinned(const std::byte* on_host, int64_t num_bytes) {
    std::lock_guard lock(mutex_);
    return pinned_begin_ <= on_host && on_host + num_bytes <= pinned_end_;
}

// When the last byte arrives, if the wire is taken as soon as it is free.
ThrottledLink::Clock::time_point ThrottledLink::reserve(int64_t num_bytes, bool is_pinned) {
    const auto duration = [](double s) {
        return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s));
    };
    std::lock_guard lock(mutex_);
    const double bytes_per_s = is_pinned ? bytes_per_s_ : kPageableShare * bytes_per_s_;
    wire_free_at_ = std::max(Clock::now(), wire_free_at_) + duration(double(num_bytes) / bytes_per_s);
    return wire_free_at_ + duration(latency_s_);
}

void ThrottledLink::inject(int64_t after, int64_t times, bool lost) {
    std::lock_guard lock(mutex_);
    fault_after_ = after, fault_times_ = times, fault_is_loss_ = lost;
}

void ThrottledLink::set_pinned(const std::byte* begin, int64_t num_bytes) {
    std::lock_guard lock(mutex_);
    pinned_begin_ = begin, pinned_end_ = begin + num_bytes;
}

bool ThrottledLink::is_lost() {
    std::lock_guard lock(mutex_);
    return is_lost_;
}

void ThrottledLink::pass_faults() {
    std::lock_guard lock(mutex_);
    if (is_lost_) throw DeviceError("the emulated device is lost", DeviceFault::kLost);
    if (fault_after_ < 0 || fault_after_-- > 0) return;
    fault_after_ = 0;
    if (fault_is_loss_) {
        is_lost_ = true;
        throw DeviceError("the emulated device was lost in the middle of a copy", DeviceFault::kLost);
    }
    if (fault_times_-- > 0) throw DeviceError("a copy to the emulated device failed", DeviceFault::kFailed);
    fault_after_ = -1;
}

}  // namespace moe
