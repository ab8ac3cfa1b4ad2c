// A small pool of threads that reads spans of files into memory: demand before speculation, several in
// flight, cancellable until issued. Knows files, offsets and addresses; nothing of experts or Python.
//
// Life of a ticket: queued -> reading -> done | failed, or queued -> cancelled. A ticket's segments are
// cut into pieces; it is "reading" from the moment that a thread takes its first piece.
#pragma once

#include <chrono>
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

#include "io/arena.h"
#include "io/direct_file.h"
#include "io/relayout.h"
#include "io/syscalls.h"

namespace moe {

enum class TicketState : int { kQueued = 0, kReading = 1, kDone = 2, kFailed = 3, kCancelled = 4 };

// num_bytes at offset of a file; region is 4096-aligned and has ceil4096(num_bytes) + 4096 bytes. The
// first byte lands at region + offset % 4096.
struct Segment {
    int64_t file_id;
    int64_t offset;
    int64_t num_bytes;
    int64_t region;
};

struct ReadError {
    int64_t file_id;
    int64_t offset;  // of the segment
    int error_number;
    std::string message;
};

struct ReadCounters {
    int64_t bytes_read = 0;   // of spans, done
    int64_t disk_bytes = 0;   // with the padding to whole pages
    int64_t requests = 0;     // preads
    double busy_seconds = 0;  // with at least one piece in flight
};

class DirectReader {
  public:
    using Ticket = int64_t;
    // Called between waits of at most 100 ms, without locks held; may throw to abandon the wait.
    using CheckInterrupt = std::function<void()>;

    // io_mode: "direct" or "buffered".
    DirectReader(int num_threads, const std::string& io_mode);
    ~DirectReader();
    DirectReader(const DirectReader&) = delete;
    DirectReader& operator=(const DirectReader&) = delete;

    int64_t add_file(const std::string& path);  // throws FileError
    const DirectFile& file(int64_t file_id) const;

    // Relayouts run on the thread that reads the last piece, before the ticket is done.
    Ticket submit(const std::vector<Segment>& segments, bool speculative,
                  std::vector<Relayout> relayouts = {});
    // Moves a speculative ticket (what is left of it) behind the demands already queued. False when
    // there was nothing left to move.
    bool promote(Ticket ticket);
    // True when nothing of it had been issued: it never will be. Otherwise it runs to its end.
    bool cancel(Ticket ticket);
    TicketState state(Ticket ticket) const;
    // Waits until done, failed or cancelled; false after timeout_s.
    bool wait(Ticket ticket, double timeout_s, const CheckInterrupt& check_interrupt) const;
    std::optional<ReadError> error(Ticket ticket) const;
    // Drops the record of a finished ticket; false, and nothing happens, while it is not finished.
    bool forget(Ticket ticket);

    // Reads into memory of any alignment through buffers of the reader's own, so that an interrupted
    // caller may free its memory at once. Throws FileError, and what check_interrupt throws.
    void read_into(int64_t file_id, int64_t offset, int64_t num_bytes, std::byte* out,
                   const CheckInterrupt& check_interrupt);

    ReadCounters counters() const;
    Syscalls& syscalls() { return state_->syscalls; }

    // Cancels what is queued, waits for the pieces in flight, closes the files. Idempotent; nothing in a
    // forked child.
    void close();

  private:
    struct Piece {
        DirectFile* file;
        Window window;
        int64_t file_id;
        int64_t segment_offset;
    };
    struct Request {
        std::vector<Piece> pieces;
        size_t next_piece = 0;
        int in_flight = 0;
        bool speculative = false;
        TicketState state = TicketState::kQueued;
        std::optional<ReadError> error;
        std::vector<Relayout> relayouts;
        std::shared_ptr<Arena> keep_alive;  // of read_into: the memory that the pieces are read to
        bool is_finished() const { return state >= TicketState::kDone; }
    };
    using RequestPtr = std::shared_ptr<Request>;
    struct State {
        Syscalls syscalls;
        mutable std::mutex mutex;  // guards everything below
        std::condition_variable work_added;
        mutable std::condition_variable request_finished;
        std::vector<std::unique_ptr<DirectFile>> files;
        std::deque<RequestPtr> demand, speculation;  // requests with pieces not yet taken
        std::unordered_map<Ticket, RequestPtr> requests;
        Ticket next_ticket = 1;
        int pieces_in_flight = 0;
        std::chrono::steady_clock::time_point busy_since;
        ReadCounters counters;
        bool closed = false;

        std::vector<std::thread> threads;
        std::mutex close_mutex;
        std::mutex bounce_mutex;  // one read_into at a time
        std::shared_ptr<Arena> bounce;
    };

    struct Chunk {  // of a read_into
        RequestPtr request;
        Segment segment;
    };

    void check_usable() const;  // not forked
    static void check_span(const std::string& caller, int64_t offset, int64_t num_bytes);
    void check_segment(const Segment& segment) const;
    Chunk submit_chunk(const std::shared_ptr<Arena>& bounce, int64_t buffer, Segment segment);
    void copy_chunk(const Chunk& chunk, std::byte* out, const CheckInterrupt& check_interrupt) const;
    RequestPtr find(Ticket ticket) const;
    RequestPtr make_request(const std::vector<Segment>& segments, bool speculative);
    void enqueue(const RequestPtr& request);
    bool wait_for(const RequestPtr& request, double timeout_s, const CheckInterrupt& check_interrupt) const;
    static void work(State& state);
    static RequestPtr take_piece(State& state, Piece* piece);
    static bool is_last_piece(const Request& request);
    static void finish_piece(State& state, Request& request, const Piece& piece,
                             std::optional<ReadError> error);

    std::unique_ptr<State> state_;  // leaked in a forked child: its mutexes belong to threads that are gone
    const bool direct_;
    const int owner_pid_;
};

inline constexpr const char* kClosedText = "the reader was closed before the read was finished";

// Bytes of the buffers that read_into keeps while a reader is open; part of a budget's workspace.
inline constexpr int64_t kBounceBytes = 8 << 20;

}  // namespace moe
