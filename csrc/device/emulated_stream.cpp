#include "device/emulated_stream.h"

#include <csignal>
#include <utility>

#include "common/errors.h"
#include "cpu/thread_pool.h"

namespace moe {

EmulatedStream::EmulatedStream() {
    sigset_t all, previous;  // signals belong to the caller's thread
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous);
    thread_ = std::thread([this] { work(); });
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
}

void EmulatedStream::queue(std::function<void()> work) {
    std::lock_guard lock(mutex_);
    check(!is_closed_, "EmulatedStream", "the device is closed");
    queue_.push_back(std::move(work));
    ++num_queued_;
    added_.notify_one();
}

int64_t EmulatedStream::num_queued() const {
    std::lock_guard lock(mutex_);
    return num_queued_;
}

bool EmulatedStream::wait_for(int64_t num_done) {
    std::unique_lock lock(mutex_);
    if (num_done_ >= num_done) return false;
    finished_.wait(lock, [&] { return num_done_ >= num_done; });
    return true;
}

void EmulatedStream::wait() {
    std::unique_lock lock(mutex_);
    finished_.wait(lock, [&] { return queue_.empty() && !is_working_; });
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void EmulatedStream::work() {
    const FloatEnvironment environment;
    std::unique_lock lock(mutex_);
    while (true) {
        added_.wait(lock, [&] { return is_closed_ || !queue_.empty(); });
        if (queue_.empty()) return;
        const std::function<void()> work = std::move(queue_.front());
        queue_.pop_front();
        if (!failure_) {
            is_working_ = true;
            lock.unlock();
            std::exception_ptr failure;
            try {
                work();
            } catch (...) {
                failure = std::current_exception();
            }
            lock.lock();
            failure_ = failure;
            is_working_ = false;
        }
        ++num_done_;
        finished_.notify_all();
    }
}

void EmulatedStream::close() {
    {
        std::lock_guard lock(mutex_);
        is_closed_ = true;
        added_.notify_one();
    }
    if (thread_.joinable()) thread_.join();
}

}  // namespace moe
