// The pool of arithmetic v1: the calling thread and N - 1 workers share out chunks of rows.
//
// One operation at a time. Workers spin briefly after an operation, then sleep. Not fork-safe: an
// operation in a forked child raises ConfigError, since the workers did not come along.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "common/errors.h"

namespace moe {

// Threads clear FTZ and DAZ and round to nearest; the caller gets its own state back.
class FloatEnvironment {
  public:
    FloatEnvironment();
    ~FloatEnvironment();
    FloatEnvironment(const FloatEnvironment&) = delete;
    FloatEnvironment& operator=(const FloatEnvironment&) = delete;

  private:
    uint64_t saved_;
};

class ThreadPool {
  public:
    using Chunk = std::function<void(int64_t)>;
    using InterruptCheck = bool (*)();  // true: stop, a Python exception is set

    static ThreadPool& instance();

    void set_num_threads(int num_threads);
    int num_threads();
    void set_interrupt_check(InterruptCheck check) { interrupted_ = check; }

    // Run chunk(0) .. chunk(num_chunks - 1), in any order, on any thread. The calling thread checks
    // for signals between chunks; Interrupted is thrown after every worker has stopped.
    void run(int64_t num_chunks, const Chunk& chunk);

    // Joins the workers; the next operation starts them again.
    void shutdown();

    // Holds the pool for one operation of several run() calls. A thread that holds one may open more
    // inside of it: an operation made of operations.
    class Operation {
      public:
        explicit Operation(ThreadPool& pool);
        ~Operation() { --pool_.depth_; }

      private:
        ThreadPool& pool_;
        std::unique_lock<std::recursive_timed_mutex> lock_;
        FloatEnvironment environment_;
    };

  private:
    // Chunks [begin, end) that a participant has not begun, begin in the lower half: one word, so that its
    // owner takes from the front while others take from the back.
    struct alignas(64) Share {
        std::atomic<uint64_t> range{0};
    };

    void start_workers();
    void stop_workers();
    void work(int participant, uint64_t seen);
    void finish_job();
    bool join_job();
    void leave_job();
    void share_out(int64_t num_chunks, int num_shares);
    void take_chunks(int participant);
    bool take(int participant, int64_t& chunk);
    bool steal(int participant);
    void poll_signals();

    std::recursive_timed_mutex operation_;
    int depth_ = 0;  // operations inside each other, under operation_
    std::vector<std::thread> workers_;
    int num_threads_ = 0;            // 0: not decided yet
    std::atomic<int> owner_pid_{0};  // read before the lock is held
    InterruptCheck interrupted_ = nullptr;
    int64_t last_poll_ns_ = 0;

    // The job. A worker takes part only between join_job and leave_job, so a worker that wakes late
    // delays nobody and never sees a job that has ended.
    const Chunk* chunk_ = nullptr;
    std::vector<Share> shares_;  // the caller's, then the workers'
    bool job_open_ = false;      // under sleep_
    std::atomic<int> active_workers_{0};
    std::atomic<bool> cancelled_{false};
    std::atomic<uint64_t> generation_{0};
    std::atomic<bool> stopping_{false};
    std::mutex sleep_;
    std::condition_variable wake_, done_;
};

}  // namespace moe
