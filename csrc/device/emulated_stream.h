// The emulated device's stream: work in order, on a thread of its own.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace moe {

class EmulatedStream {
  public:
    EmulatedStream();
    ~EmulatedStream() { close(); }
    EmulatedStream(const EmulatedStream&) = delete;
    EmulatedStream& operator=(const EmulatedStream&) = delete;

    void queue(std::function<void()> work);
    int64_t num_queued() const;
    // Until so many are done, well or not; returns whether they were not before.
    bool wait_for(int64_t num_done);
    // Until all of it is done. Throws what the first to fail threw; work behind it is left out.
    void wait();
    // Does what is queued first. Idempotent.
    void close();

  private:
    void work();

    mutable std::mutex mutex_;  // guards everything below
    std::condition_variable added_, finished_;
    std::deque<std::function<void()>> queue_;
    std::exception_ptr failure_;
    int64_t num_queued_ = 0, num_done_ = 0;
    bool is_working_ = false, is_closed_ = false;
    std::thread thread_;
};

}  // namespace moe
