// Experts' rows on a device, asynchronous: a launch is computed by the device's own thread, expert after
// expert in the caller's order, each as soon as the copy that brings it has arrived. The caller waits once
// for all of it, and collects the rows.
//
// A launch owns its inputs and its rows: whoever gives it up (an interrupt) leaves nothing behind that
// another thread still writes to.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>
#include <vector>

#include "device/copy_queue.h"
#include "device/device.h"

namespace moe {

struct RowsLaunch {
    const DeviceKernel* kernel = nullptr;  // outlives the launch
    std::shared_ptr<DeviceInputs> inputs;
    int64_t hidden_size = 0, num_matrices = 0;
    std::vector<int32_t> expert_ids;       // (num_experts,) in the order of computing
    std::vector<uint64_t> addresses;       // (num_experts, num_matrices) on the device
    std::vector<int32_t> pair_offsets;     // (num_experts + 1,)
    std::vector<int32_t> pair_tokens;      // (num_pairs,)
    std::vector<CopyQueue::Handle> after;  // (num_experts,) the copy that brings it; null: it is there
    // Of one token behind dense layers on the device: they have the inputs and keep the rows, as
    // DenseStep::rows(); the launch is done when all are queued there, and has no rows to collect.
    DenseStep* stays_with = nullptr;
    int64_t first_row = 0;
};

struct LaunchCounters {
    int64_t launches = 0, experts = 0;
    double busy_seconds = 0;     // computing
    double waiting_seconds = 0;  // for copies
    int64_t returned_bytes = 0;  // rows
    double return_seconds = 0;   // on the link to the host; a part of busy_seconds
};

class LaunchQueue {
  public:
    using Ticket = int64_t;

    LaunchQueue(Device& device, CopyQueue& copies, EventLog& events);
    ~LaunchQueue() { close(); }
    LaunchQueue(const LaunchQueue&) = delete;
    LaunchQueue& operator=(const LaunchQueue&) = delete;

    Ticket submit(RowsLaunch launch);
    bool is_done(Ticket ticket) const;
    // As CopyQueue::wait.
    bool wait(Ticket ticket, double timeout_s, const CopyQueue::CheckInterrupt& check_interrupt) const;
    // How often somebody waited for rows to come home.
    int64_t num_waits() const { return num_waits_; }
    // Of a finished launch: why it failed; or none, and its rows are at out + places[pair] * hidden_size.
    // The ticket is forgotten.
    std::optional<DeviceFailure> collect(Ticket ticket, float* out, const std::vector<int32_t>& places);
    // Drops a launch and its rows; returns when no thread works on it, after one expert's time at most.
    void abandon(Ticket ticket);
    LaunchCounters counters() const;

    // Ends what runs, after one expert's time at most. Idempotent.
    void close();

  private:
    struct Work {
        Ticket ticket = 0;
        RowsLaunch launch;
        std::vector<float> rows;  // (num_pairs, hidden_size)
        bool running = false, done = false, abandoned = false;
        std::optional<DeviceFailure> failure;
    };
    using WorkPtr = std::shared_ptr<Work>;

    void work();
    void compute(Work& work);
    int64_t wait_for_some(const Work& work, int64_t begin);
    bool is_unwanted(const Work& work) const;
    WorkPtr find(Ticket ticket) const;

    Device& device_;
    CopyQueue& copies_;
    EventLog& events_;
    mutable std::mutex mutex_;  // guards everything below
    std::condition_variable work_added_;
    mutable std::condition_variable work_finished_;
    std::deque<WorkPtr> queue_;
    std::unordered_map<Ticket, WorkPtr> works_;
    Ticket next_ticket_ = 1;
    mutable std::atomic<int64_t> num_waits_{0};
    LaunchCounters counters_;
    bool closed_ = false;
    std::thread thread_;
};

}  // namespace moe
