// Copies to a device, or from it, asynchronous: demand before speculation, few chunks in the driver's hands,
// cancellable until issued. The sibling of io/direct_read.h, with the same life of a ticket:
// queued -> copying -> done | failed, or queued -> cancelled.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "device/event_log.h"
#include "device/link.h"
#include "io/direct_read.h"

namespace moe {

// Bytes that lie together on both sides.
struct CopySpan {
    const std::byte* from;
    std::byte* to;
    int64_t num_bytes;
};

struct CopyCounters {
    int64_t bytes_copied = 0;
    int64_t chunks = 0;
    double busy_seconds = 0;  // with at least one chunk on its way
};

class CopyQueue {
    struct Request;

  public:
    using Ticket = int64_t;
    using Handle = std::shared_ptr<const Request>;  // of a ticket, also after it was forgotten
    using CheckInterrupt = std::function<void()>;

    // At most `in_hand` chunks are with the link at once: what is not issued can still be overtaken.
    CopyQueue(std::shared_ptr<Link> link, int in_hand, EventLog& events, Lane lane);
    ~CopyQueue();
    CopyQueue(const CopyQueue&) = delete;
    CopyQueue& operator=(const CopyQueue&) = delete;

    Ticket submit(const std::vector<CopySpan>& spans, bool speculative);
    // Moves a speculative ticket behind the demands already queued; false when nothing was left to move.
    bool promote(Ticket ticket);
    // True when nothing of it had been issued: it never will be.
    bool cancel(Ticket ticket);
    TicketState state(Ticket ticket) const;
    // Waits until done, failed or cancelled; false after timeout_s. check_interrupt is called at least
    // ten times a second, without locks held, and may throw.
    bool wait(Ticket ticket, double timeout_s, const CheckInterrupt& check_interrupt) const;
    // Why a ticket failed.
    std::optional<DeviceFailure> error(Ticket ticket) const;
    bool forget(Ticket ticket);

    Handle handle(Ticket ticket) const;
    TicketState state(const Handle& handle) const;
    std::optional<DeviceFailure> error(const Handle& handle) const;
    // As wait(), for at most 100 ms and without a look at signals: for threads that are not Python's.
    bool wait_briefly(const Handle& handle) const;

    CopyCounters counters() const;

    // Cancels what is queued and waits for the chunks in flight. Idempotent.
    void close();

  private:
    struct Request {
        Ticket ticket = 0;
        std::vector<CopySpan> chunks;
        size_t next = 0;
        int in_flight = 0;
        int64_t fence = 0;  // of the link
        bool speculative = false;
        TicketState state = TicketState::kQueued;
        std::optional<DeviceFailure> error;
        bool is_finished() const { return state >= TicketState::kDone; }
    };
    using RequestPtr = std::shared_ptr<Request>;

    void work();
    RequestPtr take(CopySpan* chunk);
    void finish(Request& request, const CopySpan& chunk, std::optional<DeviceFailure> error);
    std::deque<RequestPtr>& queue_of(const Request& request);
    RequestPtr find(Ticket ticket) const;

    const std::shared_ptr<Link> link_;
    EventLog& events_;
    const Lane lane_;
    mutable std::mutex mutex_;  // guards everything below
    std::condition_variable work_added_;
    mutable std::condition_variable request_finished_;
    std::deque<RequestPtr> demand_, speculation_;  // requests with chunks not yet taken
    std::unordered_map<Ticket, RequestPtr> requests_;
    Ticket next_ticket_ = 1;
    int chunks_in_flight_ = 0;
    std::chrono::steady_clock::time_point busy_since_;
    CopyCounters counters_;
    bool closed_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace moe
