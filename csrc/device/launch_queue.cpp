#include "device/launch_queue.h"

#include <algorithm>
#include <csignal>

#include "common/errors.h"
#include "cpu/thread_pool.h"

namespace moe {

namespace {

constexpr const char* kOp = "LaunchQueue";
constexpr double kMaxWaitSeconds = 0.1;

double seconds(int64_t begin_ns, int64_t end_ns) {
    return double(end_ns - begin_ns) * 1e-9;
}

void check_launch(const RowsLaunch& launch) {
    const int64_t num_experts = int64_t(launch.expert_ids.size());
    check(launch.kernel && (launch.inputs || launch.stays_with) && num_experts > 0, kOp,
          "a launch without kernel, inputs or experts");
    check_equal(kOp, "size of addresses", num_experts * launch.num_matrices,
                int64_t(launch.addresses.size()));
    check_equal(kOp, "length of pair_offsets", num_experts + 1, int64_t(launch.pair_offsets.size()));
    check_equal(kOp, "length of after", num_experts, int64_t(launch.after.size()));
    check_equal(kOp, "last of pair_offsets", int64_t(launch.pair_tokens.size()), launch.pair_offsets.back());
    check(
        launch.pair_offsets[0] == 0 && std::is_sorted(launch.pair_offsets.begin(), launch.pair_offsets.end()),
        kOp, "pair_offsets must begin with 0 and not decrease");
}

}  // namespace

LaunchQueue::LaunchQueue(Device& device, CopyQueue& copies, EventLog& events)
    : device_(device), copies_(copies), events_(events) {
    sigset_t all, previous;  // signals belong to the caller's thread
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous);
    thread_ = std::thread([this] { work(); });
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
}

LaunchQueue::Ticket LaunchQueue::submit(RowsLaunch launch) {
    check_launch(launch);
    auto work = std::make_shared<Work>();
    if (!launch.stays_with) work->rows.resize(launch.pair_tokens.size() * size_t(launch.hidden_size));
    work->launch = std::move(launch);
    std::lock_guard lock(mutex_);
    check(!closed_, kOp, "the device is closed");
    work->ticket = next_ticket_++;
    works_.emplace(work->ticket, work);
    queue_.push_back(work);
    work_added_.notify_one();
    return work->ticket;
}

// Called with the lock held.
LaunchQueue::WorkPtr LaunchQueue::find(Ticket ticket) const {
    const auto found = works_.find(ticket);
    check(found != works_.end(), kOp, "launch " + std::to_string(ticket) + " is unknown");
    return found->second;
}

bool LaunchQueue::is_done(Ticket ticket) const {
    std::lock_guard lock(mutex_);
    return find(ticket)->done;
}

bool LaunchQueue::wait(Ticket ticket, double timeout_s,
                       const CopyQueue::CheckInterrupt& check_interrupt) const {
    const int64_t started_ns = EventLog::now_ns();
    std::unique_lock lock(mutex_);
    const WorkPtr work = find(ticket);
    num_waits_ += !work->launch.stays_with;
    while (!work->done) {
        const double left_s = std::clamp(timeout_s, 0.0, 1e9) - seconds(started_ns, EventLog::now_ns());
        if (left_s <= 0) return false;
        work_finished_.wait_for(lock, std::chrono::duration<double>(std::min(left_s, kMaxWaitSeconds)));
        if (work->done) break;
        lock.unlock();
        check_interrupt();
        lock.lock();
    }
    return true;
}

std::optional<DeviceFailure> LaunchQueue::collect(Ticket ticket, float* out,
                                                  const std::vector<int32_t>& places) {
    WorkPtr work;
    {
        std::lock_guard lock(mutex_);
        work = find(ticket);
        check(work->done, kOp, "launch " + std::to_string(ticket) + " is not finished");
        check_equal(kOp, "length of places", int64_t(work->launch.pair_tokens.size()),
                    int64_t(places.size()));
        works_.erase(ticket);
    }
    if (work->failure || work->launch.stays_with) return work->failure;
    const int64_t hidden_size = work->launch.hidden_size;
    for (size_t pair = 0; pair < places.size(); ++pair)
        std::copy_n(&work->rows[pair * hidden_size], hidden_size, out + places[pair] * hidden_size);
    return std::nullopt;
}

void LaunchQueue::abandon(Ticket ticket) {
    std::unique_lock lock(mutex_);
    const WorkPtr work = find(ticket);
    work->abandoned = true;
    std::erase(queue_, work);
    work_finished_.wait(lock, [&] { return !work->running; });
    works_.erase(ticket);
}

LaunchCounters LaunchQueue::counters() const {
    std::lock_guard lock(mutex_);
    return counters_;
}

bool LaunchQueue::is_unwanted(const Work& work) const {
    std::lock_guard lock(mutex_);
    return work.abandoned || closed_;
}

void LaunchQueue::work() {
    const FloatEnvironment environment;
    while (true) {
        WorkPtr work;
        {
            std::unique_lock lock(mutex_);
            work_added_.wait(lock, [&] { return closed_ || !queue_.empty(); });
            if (closed_) return;
            work = queue_.front();
            queue_.pop_front();
            work->running = true;
        }
        std::optional<DeviceFailure> failure;
        try {
            compute(*work);
        } catch (const DeviceError& error) {
            failure = {error.what(), error.fault};
        } catch (const std::bad_alloc&) {
            failure = {"no memory for a launch's rows", DeviceFault::kNoMemory};
        }
        std::lock_guard lock(mutex_);
        work->failure = std::move(failure);
        work->running = false;
        work->done = true;
        ++counters_.launches;
        work_finished_.notify_all();
    }
}

void LaunchQueue::compute(Work& work) {
    const RowsLaunch& launch = work.launch;
    const int64_t num_experts = int64_t(launch.expert_ids.size());
    const int64_t total_pairs = int64_t(launch.pair_tokens.size());
    for (int64_t begin = 0, end; begin < num_experts; begin = end) {
        const int64_t asked_ns = EventLog::now_ns();
        end = wait_for_some(work, begin);
        const int64_t begin_ns = EventLog::now_ns();
        const int32_t first = launch.pair_offsets[begin];
        std::vector<int32_t> offsets;
        for (int64_t i = begin; i <= end; ++i) offsets.push_back(launch.pair_offsets[i] - first);
        const ExpertPairs pairs{launch.expert_ids.data() + begin,
                                launch.addresses.data() + begin * launch.num_matrices,
                                offsets.data(),
                                launch.pair_tokens.data() + first,
                                end - begin,
                                offsets.back()};
        if (launch.stays_with) {
            launch.stays_with->rows(*launch.kernel, pairs, launch.first_row + first);
            std::lock_guard lock(mutex_);
            counters_.experts += end - begin;
            counters_.waiting_seconds += seconds(asked_ns, begin_ns);
            continue;
        }
        device_.rows(*launch.kernel, *launch.inputs, pairs, first, total_pairs);
        const double return_s =
            end == num_experts ? device_.finish(work.rows.data(), total_pairs, launch.hidden_size) : 0.0;
        const int64_t end_ns = EventLog::now_ns(), computed_ns = end_ns - int64_t(return_s * 1e9);
        events_.add({Lane::kCompute, work.ticket, end - begin, begin_ns, computed_ns});
        std::lock_guard lock(mutex_);
        if (end == num_experts) {
            const int64_t num_bytes = int64_t(work.rows.size() * sizeof(float));
            events_.add({Lane::kRows, work.ticket, num_bytes, computed_ns, end_ns});
            counters_.returned_bytes += num_bytes;
            counters_.return_seconds += return_s;
        }
        counters_.experts += end - begin;
        counters_.busy_seconds += seconds(begin_ns, end_ns);
        counters_.waiting_seconds += seconds(asked_ns, begin_ns);
    }
}

// Waits for expert `begin`; returns the end of those that have arrived with it.
int64_t LaunchQueue::wait_for_some(const Work& work, int64_t begin) {
    const std::vector<CopyQueue::Handle>& after = work.launch.after;
    int64_t end = begin;
    for (; end < int64_t(after.size()); ++end) {
        if (!after[end]) continue;
        if (end > begin && copies_.state(after[end]) < TicketState::kDone) break;
        while (!copies_.wait_briefly(after[end]))
            if (is_unwanted(work)) throw DeviceError("the launch was given up", DeviceFault::kFailed);
        if (const auto error = copies_.error(after[end])) throw DeviceError(error->first, error->second);
        if (copies_.state(after[end]) != TicketState::kDone)
            throw DeviceError("the copy of an expert was cancelled", DeviceFault::kFailed);
    }
    if (is_unwanted(work)) throw DeviceError("the launch was given up", DeviceFault::kFailed);
    return end;
}

void LaunchQueue::close() {
    {
        std::lock_guard lock(mutex_);
        closed_ = true;
        for (const WorkPtr& work : queue_) {
            work->failure = {"the device was closed before the launch", DeviceFault::kFailed};
            work->done = true;
        }
        queue_.clear();
        work_added_.notify_all();
        work_finished_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
}

}  // namespace moe
