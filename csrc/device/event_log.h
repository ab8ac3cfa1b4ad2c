// What the device's threads did and when, for a timeline; off unless somebody asks for it.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

namespace moe {

// kRows: a launch's rows on their way to the host; kCopyToHost: a copy there of the returns' queue.
enum class Lane : int { kCopy = 0, kCompute = 1, kRows = 2, kCopyToHost = 3 };

struct DeviceEvent {
    Lane lane;
    int64_t ticket;            // of the copy, or of the launch
    int64_t amount;            // bytes copied, or experts computed
    int64_t begin_ns, end_ns;  // of the steady clock, which is Python's time.perf_counter_ns
};

class EventLog {
  public:
    // From then on at most `capacity` events are kept; 0 stops.
    void start(int64_t capacity) { capacity_ = capacity; }

    void add(const DeviceEvent& event) {
        if (capacity_ == 0) return;
        std::lock_guard lock(mutex_);
        if (int64_t(events_.size()) < capacity_) events_.push_back(event);
    }

    // What was noted since the last call.
    std::vector<DeviceEvent> take() {
        std::lock_guard lock(mutex_);
        return std::exchange(events_, {});
    }

    static int64_t now_ns() {
        return std::chrono::duration_cast<std::chrono::nanoseconds>(
                   std::chrono::steady_clock::now().time_since_epoch())
            .count();
    }

  private:
    std::atomic<int64_t> capacity_{0};
    std::mutex mutex_;  // guards the events
    std::vector<DeviceEvent> events_;
};

}  // namespace moe
