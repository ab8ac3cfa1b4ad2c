// DirectReader's pieces: what a request is cut into, who reads them, and what becomes of their request.
#include <algorithm>
#include <cerrno>
#include <new>
#include <utility>

#include "io/direct_read.h"
#include "io/errors.h"

namespace moe {

namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kMaxPieceBytes = 1 << 20;

}  // namespace

// Cuts segments into pieces of equal size, on page boundaries of the file. Called with the lock held.
DirectReader::RequestPtr DirectReader::make_request(const std::vector<Segment>& segments, bool speculative) {
    auto request = std::make_shared<Request>();
    request->speculative = speculative;
    request->pieces.reserve(segments.size());
    for (const Segment& segment : segments) {
        check_segment(segment);
        if (segment.num_bytes == 0) continue;
        DirectFile* const file = state_->files[static_cast<size_t>(segment.file_id)].get();
        std::byte* const region = reinterpret_cast<std::byte*>(segment.region);
        const int64_t first = floor_aligned(segment.offset), end = segment.offset + segment.num_bytes;
        const int64_t num_pieces = (end - first + kMaxPieceBytes - 1) / kMaxPieceBytes;
        const int64_t step = ceil_aligned((end - first + num_pieces - 1) / num_pieces);
        for (int64_t begin = first; begin < end; begin += step) {
            const Window window{std::max(begin, segment.offset), std::min(begin + step, end),
                                region + (begin - first)};
            request->pieces.push_back({file, window, segment.file_id, segment.offset});
        }
    }
    if (request->pieces.empty()) request->state = TicketState::kDone;
    return request;
}

void DirectReader::work(State& state) {
    while (true) {
        Piece piece;
        const RequestPtr request = take_piece(state, &piece);
        if (!request) return;
        std::optional<ReadError> error;
        int64_t disk_bytes = 0, requests = 0;
        try {
            disk_bytes = piece.file->read(piece.window, &requests);
        } catch (const FileError& failure) {
            error = ReadError{piece.file_id, piece.segment_offset, failure.error_number, failure.what()};
        }
        std::unique_lock lock(state.mutex);
        state.counters.disk_bytes += disk_bytes;
        state.counters.requests += requests;
        if (!error && is_last_piece(*request)) {  // nobody else touches the request's memory now
            lock.unlock();
            try {
                for (const Relayout& relayout : request->relayouts) run_relayout(relayout);
            } catch (const std::bad_alloc&) {
                error = ReadError{piece.file_id, piece.segment_offset, ENOMEM, "no memory for its scales"};
            }
            lock.lock();
        }
        finish_piece(state, *request, piece, std::move(error), End::kSeen);
    }
}

// Whether all other pieces are in memory. Called with the lock held.
bool DirectReader::is_last_piece(const Request& request) {
    return request.in_flight == 1 && request.next_piece == request.pieces.size() && !request.error &&
           !request.relayouts.empty();
}

// Waits for a piece; null when the reader closes.
DirectReader::RequestPtr DirectReader::take_piece(State& state, Piece* piece) {
    std::unique_lock lock(state.mutex);
    state.work_added.wait(lock, [&] {
        const bool is_speculation_mine = !state.why_no_ring.empty() && !state.speculation.empty();
        return state.closed || !state.again.empty() || !state.demand.empty() || is_speculation_mine;
    });
    if (state.closed) return nullptr;
    if (!state.again.empty()) {
        const Issued issued = std::move(state.again.front());
        state.again.pop_front();
        *piece = issued.piece;
        return issued.request;
    }
    auto& queue = state.demand.empty() ? state.speculation : state.demand;
    const RequestPtr request = queue.front();
    *piece = issue_next(state, queue);
    return request;
}

// Takes the first request's next piece. Called with the lock held.
DirectReader::Piece DirectReader::issue_next(State& state, std::deque<RequestPtr>& queue) {
    const RequestPtr request = queue.front();
    request->state = TicketState::kReading;
    ++request->in_flight;
    const Piece piece = request->pieces[request->next_piece++];
    if (request->next_piece == request->pieces.size()) queue.pop_front();
    if (state.pieces_in_flight++ == 0) {
        state.busy_since = Clock::now();
        state.untimed_bytes = 0;
    }
    return piece;
}

// Called with the lock held.
void DirectReader::finish_piece(State& state, Request& request, const Piece& piece,
                                std::optional<ReadError> error, End end) {
    --state.pieces_in_flight;
    --request.in_flight;
    if (error) {
        if (!request.error) request.error = std::move(error);
        if (request.next_piece < request.pieces.size()) {  // the rest of a failed expert is of no use
            std::erase_if(request.speculative ? state.speculation : state.demand,
                          [&](const RequestPtr& queued) { return queued.get() == &request; });
            request.next_piece = request.pieces.size();
        }
    } else {
        state.counters.bytes_read += piece.window.end - piece.window.begin;
        state.untimed_bytes += piece.window.end - piece.window.begin;
    }
    if (end == End::kSeen) {
        const Clock::time_point now = Clock::now();
        state.counters.busy_seconds += std::chrono::duration<double>(now - state.busy_since).count();
        state.counters.timed_bytes += state.untimed_bytes;
        state.busy_since = now;
        state.untimed_bytes = 0;
    }
    if (request.in_flight > 0 || request.next_piece < request.pieces.size()) return;
    request.state = request.error ? TicketState::kFailed : TicketState::kDone;
    state.request_finished.notify_all();
}

}  // namespace moe
