#include "device/copy_queue.h"

#include <algorithm>
#include <csignal>

#include "common/errors.h"

namespace moe {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kMaxChunkBytes = 1 << 20;  // 87 us at 12 GB/s: what a demand may have to wait for
constexpr double kMaxWaitSeconds = 0.1;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

CopyQueue::CopyQueue(std::shared_ptr<Link> link, int in_hand, EventLog& events, Lane lane)
    : link_(std::move(link)), events_(events), lane_(lane) {
    check(in_hand >= 1 && in_hand <= 8, "CopyQueue", "in_hand must be from 1 to 8");
    // Signals belong to the caller's thread, where Python's handlers expect them.
    sigset_t all, previous;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous);
    for (int i = 0; i < in_hand; ++i) threads_.emplace_back([this] { work(); });
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
}

CopyQueue::~CopyQueue() {
    close();
}

std::deque<CopyQueue::RequestPtr>& CopyQueue::queue_of(const Request& request) {
    return request.speculative ? speculation_ : demand_;
}

CopyQueue::Ticket CopyQueue::submit(const std::vector<CopySpan>& spans, bool speculative) {
    auto request = std::make_shared<Request>();
    request->speculative = speculative;
    for (const CopySpan& span : spans) {
        check(span.num_bytes >= 0 && span.from && span.to, "CopyQueue.submit", "a span without bytes");
        for (int64_t begin = 0; begin < span.num_bytes; begin += kMaxChunkBytes)
            request->chunks.push_back(
                {span.from + begin, span.to + begin, std::min(kMaxChunkBytes, span.num_bytes - begin)});
    }
    request->fence = link_->fence();
    std::lock_guard lock(mutex_);
    check(!closed_, "CopyQueue.submit", "the queue is closed");
    request->ticket = next_ticket_;
    if (request->chunks.empty()) {
        request->state = TicketState::kDone;
    } else {
        queue_of(*request).push_back(request);
        work_added_.notify_all();
    }
    requests_.emplace(next_ticket_, request);
    return next_ticket_++;
}

// Called with the lock held.
CopyQueue::RequestPtr CopyQueue::find(Ticket ticket) const {
    const auto found = requests_.find(ticket);
    check(found != requests_.end(), "CopyQueue", "ticket " + std::to_string(ticket) + " is unknown");
    return found->second;
}

bool CopyQueue::promote(Ticket ticket) {
    std::lock_guard lock(mutex_);
    const RequestPtr request = find(ticket);
    if (std::erase(speculation_, request) == 0) return false;
    request->speculative = false;
    demand_.push_back(request);
    return true;
}

bool CopyQueue::cancel(Ticket ticket) {
    std::lock_guard lock(mutex_);
    const RequestPtr request = find(ticket);
    if (request->state == TicketState::kQueued) {
        std::erase(queue_of(*request), request);
        request->state = TicketState::kCancelled;
        request_finished_.notify_all();
    }
    return request->state == TicketState::kCancelled;
}

TicketState CopyQueue::state(Ticket ticket) const {
    std::lock_guard lock(mutex_);
    return find(ticket)->state;
}

bool CopyQueue::wait(Ticket ticket, double timeout_s, const CheckInterrupt& check_interrupt) const {
    const auto started = Clock::now();
    std::unique_lock lock(mutex_);
    const RequestPtr request = find(ticket);
    while (!request->is_finished()) {
        const double left_s = std::clamp(timeout_s, 0.0, 1e9) - seconds_since(started);
        if (left_s <= 0) return false;
        request_finished_.wait_for(lock, std::chrono::duration<double>(std::min(left_s, kMaxWaitSeconds)));
        if (request->is_finished()) break;
        lock.unlock();
        check_interrupt();
        lock.lock();
    }
    return true;
}

std::optional<DeviceFailure> CopyQueue::error(Ticket ticket) const {
    std::lock_guard lock(mutex_);
    return find(ticket)->error;
}

bool CopyQueue::forget(Ticket ticket) {
    std::lock_guard lock(mutex_);
    if (!find(ticket)->is_finished()) return false;
    requests_.erase(ticket);
    return true;
}

CopyQueue::Handle CopyQueue::handle(Ticket ticket) const {
    std::lock_guard lock(mutex_);
    return find(ticket);
}

TicketState CopyQueue::state(const Handle& handle) const {
    std::lock_guard lock(mutex_);
    return handle->state;
}

std::optional<DeviceFailure> CopyQueue::error(const Handle& handle) const {
    std::lock_guard lock(mutex_);
    return handle->error;
}

bool CopyQueue::wait_briefly(const Handle& handle) const {
    std::unique_lock lock(mutex_);
    return request_finished_.wait_for(lock, std::chrono::duration<double>(kMaxWaitSeconds),
                                      [&] { return handle->is_finished(); });
}

CopyCounters CopyQueue::counters() const {
    std::lock_guard lock(mutex_);
    CopyCounters counters = counters_;
    if (chunks_in_flight_ > 0) counters.busy_seconds += seconds_since(busy_since_);
    return counters;
}

void CopyQueue::work() {
    CopySpan chunk;
    while (const RequestPtr request = take(&chunk)) {
        std::optional<DeviceFailure> error;
        int64_t begin_ns = EventLog::now_ns();
        try {
            if (link_->pass(request->fence)) {  // so long the link was not busy
                std::lock_guard lock(mutex_);
                if (chunks_in_flight_ == 1) busy_since_ = Clock::now();
                begin_ns = EventLog::now_ns();
            }
            link_->copy(chunk.to, chunk.from, chunk.num_bytes);
        } catch (const DeviceError& failure) {
            error = {failure.what(), failure.fault};
        }
        events_.add({lane_, request->ticket, chunk.num_bytes, begin_ns, EventLog::now_ns()});
        std::lock_guard lock(mutex_);
        finish(*request, chunk, std::move(error));
    }
}

// Waits for a chunk; null when the queue closes.
CopyQueue::RequestPtr CopyQueue::take(CopySpan* chunk) {
    std::unique_lock lock(mutex_);
    work_added_.wait(lock, [&] { return closed_ || !demand_.empty() || !speculation_.empty(); });
    if (closed_) return nullptr;
    auto& queue = demand_.empty() ? speculation_ : demand_;
    const RequestPtr request = queue.front();
    *chunk = request->chunks[request->next++];
    request->state = TicketState::kReading;
    ++request->in_flight;
    if (request->next == request->chunks.size()) queue.pop_front();
    if (chunks_in_flight_++ == 0) busy_since_ = Clock::now();
    return request;
}

// Called with the lock held.
void CopyQueue::finish(Request& request, const CopySpan& chunk, std::optional<DeviceFailure> error) {
    if (--chunks_in_flight_ == 0) counters_.busy_seconds += seconds_since(busy_since_);
    --request.in_flight;
    if (error) {
        request.error = request.error ? request.error : std::move(error);
        if (request.next < request.chunks.size()) {  // the rest of a failed expert is of no use
            std::erase_if(queue_of(request), [&](const RequestPtr& r) { return r.get() == &request; });
            request.next = request.chunks.size();
        }
    } else {
        counters_.bytes_copied += chunk.num_bytes;
        ++counters_.chunks;
    }
    if (request.in_flight > 0 || request.next < request.chunks.size()) return;
    request.state = request.error ? TicketState::kFailed : TicketState::kDone;
    request_finished_.notify_all();
}

void CopyQueue::close() {
    {
        std::lock_guard lock(mutex_);
        closed_ = true;
        for (auto* queue : {&demand_, &speculation_}) {
            for (const RequestPtr& request : *queue) {
                request->next = request->chunks.size();
                if (request->in_flight == 0) request->state = TicketState::kCancelled;
                if (request->in_flight > 0 && !request->error)
                    request->error = {"the device was closed before the copy was finished",
                                      DeviceFault::kFailed};
            }
            queue->clear();
        }
        work_added_.notify_all();
        request_finished_.notify_all();
    }
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

}  // namespace moe
