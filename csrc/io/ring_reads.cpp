// DirectReader's side of the ring: what goes there, and what becomes of it.
#include <algorithm>
#include <cerrno>
#include <utility>

#include "io/direct_read.h"

namespace moe {

namespace {

// At a time: speculation leaves places free, so that a demand is issued at once and waits for few bytes.
constexpr int kMostDemands = 8, kMostSpeculations = 4;

}  // namespace

void DirectReader::open_ring() {
    state_->ring = ReadRing::open(kMostDemands, &state_->why_no_ring);
    state_->in_ring.resize(kMostDemands);
}

// From now on threads read; what the ring has been given it reads to its end.
void DirectReader::leave_ring(State& state, const std::string& reason) {
    if (!state.why_no_ring.empty()) return;
    state.why_no_ring = reason;
    state.work_added.notify_all();
    state.request_finished.notify_all();
}

// Issues what waits, as far as the ring takes it.
void DirectReader::fill_ring(State& state) {
    while (state.why_no_ring.empty() && !state.closed) {
        auto& queue = state.demand.empty() ? state.speculation : state.demand;
        if (queue.empty() || state.num_in_ring >= (state.demand.empty() ? kMostSpeculations : kMostDemands))
            return;
        const RequestPtr request = queue.front();
        const Piece& next = request->pieces[request->next_piece];
        if (!next.file->is_direct()) return leave_ring(state, "files are read through the page cache");
        const auto place =
            std::ranges::find_if(state.in_ring, [](const Issued& issued) { return !issued.request; });
        const int64_t begin = floor_aligned(next.window.begin), end = ceil_aligned(next.window.end);
        if (!state.ring->start(next.file->descriptor(), next.window.window, static_cast<size_t>(end - begin),
                               begin, static_cast<uint64_t>(place - state.in_ring.begin())))
            return leave_ring(state, "io_uring refuses reads");
        *place = {request, issue_next(state, queue)};
        ++request->in_ring;
        ++state.num_in_ring;
    }
}

// Books what the ring has finished, unless somebody else waits for it, and refills it. True if there was any.
bool DirectReader::take_finished(State& state, End end) {
    if (state.num_in_ring == 0 || (state.is_ring_awaited && end == End::kLater)) return false;
    ReadRing::Completion completion;
    bool any = false;
    while (state.ring->pop(&completion)) {
        any = true;
        Issued issued = std::exchange(state.in_ring[completion.tag], {});
        --state.num_in_ring;
        --issued.request->in_ring;
        const Window& window = issued.piece.window;
        if (completion.result < window.end - floor_aligned(window.begin)) {  // threads know what to do
            state.again.push_back(std::move(issued));
            state.work_added.notify_one();
            continue;
        }
        state.counters.disk_bytes += completion.result;
        ++state.counters.requests;
        finish_piece(state, *issued.request, issued.piece, std::nullopt, end);
    }
    if (any) fill_ring(state);
    return any;
}

// Sleeps, without the lock, until the ring has finished something. True if it has.
bool DirectReader::wait_on_ring(State& state, std::unique_lock<std::mutex>& lock, double seconds) {
    state.is_ring_awaited = true;
    lock.unlock();
    state.ring->wait(std::max(0.0, seconds));
    lock.lock();
    const bool any = take_finished(state, End::kSeen);
    state.is_ring_awaited = false;
    state.request_finished.notify_all();  // another may wait on it now
    return any;
}

// Whether a request that is not finished comes nearer to it by what the ring does next.
bool DirectReader::moves_with_ring(const State& state, const Request& request) {
    const bool waits_for_place = state.why_no_ring.empty() && request.speculative &&
                                 request.next_piece < request.pieces.size() && state.num_in_ring > 0;
    return request.in_ring > 0 || waits_for_place;
}

// Waits for what the ring was given, when the reader closes: it writes to memory that is not ours.
void DirectReader::drain_ring(State& state, std::unique_lock<std::mutex>& lock) {
    while (state.num_in_ring > 0) {
        if (state.is_ring_awaited) {
            state.request_finished.wait_for(lock, std::chrono::milliseconds(10));
        } else {
            wait_on_ring(state, lock, 0.1);
        }
    }
    for (const Issued& issued : std::exchange(state.again, {})) {
        const Piece& piece = issued.piece;
        finish_piece(state, *issued.request, piece,
                     ReadError{piece.file_id, piece.segment_offset, ECANCELED, kClosedText}, End::kSeen);
    }
    state.ring.reset();
}

}  // namespace moe
