#include "io/direct_read.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <limits>
#include <system_error>
#include <utility>

#include "io/errors.h"

namespace moe {

namespace {

using Clock = std::chrono::steady_clock;

constexpr double kMaxWaitSeconds = 0.1;
constexpr int kMaxThreads = 64;

}  // namespace

DirectReader::DirectReader(int num_threads, const std::string& io_mode)
    : direct_(io_mode != "buffered"), owner_pid_(getpid()) {
    if (io_mode != "direct" && io_mode != "threads" && io_mode != "buffered") {
        throw ConfigError("DirectReader: io_mode must be \"direct\", \"threads\" or \"buffered\", got \"" +
                          io_mode + "\"");
    }
    if (num_threads < 1 || num_threads > kMaxThreads) {
        throw ConfigError("DirectReader: num_threads must be from 1 to " + std::to_string(kMaxThreads) +
                          ", got " + std::to_string(num_threads));
    }
    state_ = std::make_unique<State>();
    if (io_mode == "direct") {
        open_ring();
    } else {
        state_->why_no_ring = "MOE_OFFLOAD_IO=" + io_mode;
    }
    // Signals belong to the caller's thread, where Python's handlers expect them.
    sigset_t all, previous;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &previous);
    try {
        for (int i = 0; i < num_threads; ++i)
            state_->threads.emplace_back([state = state_.get()] { work(*state); });
    } catch (const std::system_error&) {  // no more threads: those that did start must be joined
        pthread_sigmask(SIG_SETMASK, &previous, nullptr);
        close();
        throw;
    }
    pthread_sigmask(SIG_SETMASK, &previous, nullptr);
}

DirectReader::~DirectReader() {
    if (getpid() != owner_pid_) {
        state_.release();
        return;
    }
    close();
}

void DirectReader::check_usable() const {
    if (getpid() == owner_pid_) return;
    throw ConfigError(
        "DirectReader: it was made in process " + std::to_string(owner_pid_) +
        " and its threads do not exist in the forked process " + std::to_string(getpid()) +
        "; load the model in the process that uses it (multiprocessing start method \"spawn\")");
}

void DirectReader::check_span(const std::string& caller, int64_t offset, int64_t num_bytes) {
    constexpr int64_t max_end = std::numeric_limits<int64_t>::max() - kAlignment;
    if (offset < 0 || num_bytes < 0 || num_bytes > max_end || offset > max_end - num_bytes) {
        throw ConfigError(caller + ": " + std::to_string(num_bytes) + " bytes at offset " +
                          std::to_string(offset));
    }
}

// Called with the lock held.
void DirectReader::check_segment(const Segment& segment) const {
    const auto num_files = static_cast<int64_t>(state_->files.size());
    if (segment.file_id < 0 || segment.file_id >= num_files) {
        throw ConfigError("DirectReader.submit: file_id " + std::to_string(segment.file_id) + " of " +
                          std::to_string(num_files) + " files");
    }
    check_span("DirectReader.submit", segment.offset, segment.num_bytes);
    if (segment.region <= 0 || segment.region % kAlignment != 0) {
        throw ConfigError("DirectReader.submit: region address " + std::to_string(segment.region) +
                          " is not a multiple of 4096");
    }
}

int64_t DirectReader::add_file(const std::string& path) {
    check_usable();
    auto file = std::make_unique<DirectFile>(state_->syscalls, path, direct_);
    std::lock_guard lock(state_->mutex);
    if (state_->closed) throw ConfigError("DirectReader.add_file: the reader is closed");
    state_->files.push_back(std::move(file));
    return static_cast<int64_t>(state_->files.size()) - 1;
}

const DirectFile& DirectReader::file(int64_t file_id) const {
    check_usable();
    std::lock_guard lock(state_->mutex);
    if (file_id < 0 || file_id >= static_cast<int64_t>(state_->files.size())) {
        throw ConfigError("DirectReader: file_id " + std::to_string(file_id) + " of " +
                          std::to_string(state_->files.size()) + " files");
    }
    return *state_->files[static_cast<size_t>(file_id)];
}

// Called with the lock held.
void DirectReader::enqueue(const RequestPtr& request) {
    if (request->is_finished()) return;
    (request->speculative ? state_->speculation : state_->demand).push_back(request);
    fill_ring(*state_);
    const bool left = state_->why_no_ring.empty() ? !state_->demand.empty() : true;
    if (!left) return;
    if (request->pieces.size() == 1) {
        state_->work_added.notify_one();
    } else {
        state_->work_added.notify_all();
    }
}

DirectReader::Ticket DirectReader::submit(const std::vector<Segment>& segments, bool speculative,
                                          std::vector<Relayout> relayouts) {
    check_usable();
    for (const Relayout& relayout : relayouts) check_relayout(relayout);
    std::lock_guard lock(state_->mutex);
    if (state_->closed) throw ConfigError("DirectReader.submit: the reader is closed");
    if (!relayouts.empty()) leave_ring(*state_, "blocks are put together by threads");
    const RequestPtr request = make_request(segments, speculative);
    request->relayouts = std::move(relayouts);
    const Ticket ticket = state_->next_ticket++;
    state_->requests.emplace(ticket, request);
    enqueue(request);
    return ticket;
}

// Called with the lock held.
DirectReader::RequestPtr DirectReader::find(Ticket ticket) const {
    const auto found = state_->requests.find(ticket);
    if (found == state_->requests.end()) {
        throw ConfigError("DirectReader: ticket " + std::to_string(ticket) + " is unknown or forgotten");
    }
    return found->second;
}

bool DirectReader::promote(Ticket ticket) {
    check_usable();
    std::lock_guard lock(state_->mutex);
    const RequestPtr request = find(ticket);
    if (std::erase(state_->speculation, request) == 0) return false;
    request->speculative = false;
    enqueue(request);
    return true;
}

bool DirectReader::cancel(Ticket ticket) {
    check_usable();
    std::lock_guard lock(state_->mutex);
    const RequestPtr request = find(ticket);
    if (request->state == TicketState::kCancelled) return true;
    if (request->state != TicketState::kQueued) return false;
    std::erase(request->speculative ? state_->speculation : state_->demand, request);
    request->state = TicketState::kCancelled;
    state_->request_finished.notify_all();
    return true;
}

TicketState DirectReader::state(Ticket ticket) const {
    check_usable();
    std::lock_guard lock(state_->mutex);
    take_finished(*state_, End::kLater);
    return find(ticket)->state;
}

bool DirectReader::is_over(Ticket ticket) const {
    check_usable();
    std::lock_guard lock(state_->mutex);
    take_finished(*state_, End::kLater);
    const auto found = state_->requests.find(ticket);
    return found == state_->requests.end() || found->second->is_finished();
}

bool DirectReader::is_read(Ticket ticket) const {
    check_usable();
    std::lock_guard lock(state_->mutex);
    take_finished(*state_, End::kLater);
    const auto found = state_->requests.find(ticket);
    return found == state_->requests.end() || found->second->state == TicketState::kDone;
}

bool DirectReader::wait(Ticket ticket, double timeout_s, const CheckInterrupt& check_interrupt) const {
    check_usable();
    std::unique_lock lock(state_->mutex);
    const RequestPtr request = find(ticket);
    lock.unlock();
    return wait_for(request, timeout_s, check_interrupt);
}

bool DirectReader::wait_for(const RequestPtr& request, double timeout_s,
                            const CheckInterrupt& check_interrupt) const {
    const auto seconds = [](double s) {
        return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(s));
    };
    const double bounded_s = std::clamp(timeout_s, 0.0, 1e9);  // NaN and infinity fit no clock
    const Clock::time_point deadline = Clock::now() + seconds(bounded_s);
    State& state = *state_;
    const auto ring_is_mine = [&] { return !state.is_ring_awaited && moves_with_ring(state, *request); };
    while (true) {
        bool looked = false;
        {
            std::unique_lock lock(state.mutex);
            take_finished(state, End::kLater);
            if (request->is_finished()) return true;
            const auto until = std::min(deadline, Clock::now() + seconds(kMaxWaitSeconds));
            if (ring_is_mine()) {
                looked =
                    wait_on_ring(state, lock, std::chrono::duration<double>(until - Clock::now()).count());
            } else {
                state.request_finished.wait_until(lock, until,
                                                  [&] { return request->is_finished() || ring_is_mine(); });
            }
            if (request->is_finished()) return true;
        }
        if (Clock::now() >= deadline) return false;
        if (!looked) check_interrupt();
    }
}

std::optional<ReadError> DirectReader::error(Ticket ticket) const {
    check_usable();
    std::lock_guard lock(state_->mutex);
    return find(ticket)->error;
}

bool DirectReader::forget(Ticket ticket) {
    check_usable();
    std::lock_guard lock(state_->mutex);
    take_finished(*state_, End::kLater);
    if (!find(ticket)->is_finished()) return false;
    state_->requests.erase(ticket);
    return true;
}

ReadCounters DirectReader::counters() const {
    check_usable();
    std::lock_guard lock(state_->mutex);
    take_finished(*state_, End::kLater);
    return state_->counters;
}

std::string DirectReader::why_no_ring() const {
    check_usable();
    std::lock_guard lock(state_->mutex);
    return state_->why_no_ring;
}

void DirectReader::inject(Fault fault) {
    {
        std::lock_guard lock(state_->mutex);
        leave_ring(*state_, "faults were injected");
    }
    state_->syscalls.inject(std::move(fault));
}

void DirectReader::close() {
    if (getpid() != owner_pid_) return;  // a forked child has no threads to join; finalizers may ask for it
    std::lock_guard close_lock(state_->close_mutex);  // nobody closes a file under a thread not yet joined
    {
        std::lock_guard lock(state_->mutex);
        state_->closed = true;
        for (auto* queue : {&state_->demand, &state_->speculation}) {
            for (const RequestPtr& request : *queue) {
                request->next_piece = request->pieces.size();
                if (request->in_flight == 0) {
                    request->state = TicketState::kCancelled;
                } else if (!request->error) {
                    const Piece& first = request->pieces.front();
                    request->error = ReadError{first.file_id, first.segment_offset, ECANCELED, kClosedText};
                }
            }
            queue->clear();
        }
        state_->work_added.notify_all();
        state_->request_finished.notify_all();
    }
    state_->syscalls.stop();
    for (std::thread& thread : state_->threads) thread.join();
    state_->threads.clear();
    std::unique_lock lock(state_->mutex);
    drain_ring(*state_, lock);
    for (auto& file : state_->files) file->close();
}

}  // namespace moe
