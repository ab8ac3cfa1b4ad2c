// Reads spans of files into memory: demand before speculation, several in flight, cancellable until issued.
// Knows files, offsets and addresses; nothing of experts or Python.
//
// Life of a ticket: queued -> reading -> done | failed, or queued -> cancelled. A ticket's segments are
// cut into pieces; it is "reading" from the moment that its first piece is issued.
//
// A piece goes to the system's ring (read_ring.h), which takes a few at a time, from the thread that submits
// it; whoever asks about a ticket takes what the ring has finished. A small pool of threads reads where there
// is no ring, demands beyond what it takes, and again what it did not read whole.
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
#include "io/read_ring.h"
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
    double busy_seconds = 0;  // with at least one piece in flight, where the end of a piece was seen
    int64_t timed_bytes = 0;  // of spans, read in these
};

class DirectReader {
  public:
    using Ticket = int64_t;
    // Called between waits of at most 100 ms, without locks held; may throw to abandon the wait.
    using CheckInterrupt = std::function<void()>;

    // io_mode: "direct", "threads" (direct, without the ring) or "buffered".
    DirectReader(int num_threads, const std::string& io_mode);
    ~DirectReader();
    DirectReader(const DirectReader&) = delete;
    DirectReader& operator=(const DirectReader&) = delete;

    int64_t add_file(const std::string& path);  // throws FileError
    const DirectFile& file(int64_t file_id) const;
    std::string why_no_ring() const;  // empty: it is in use

    // Relayouts run on the thread that reads the last piece, before the ticket is done.
    Ticket submit(const std::vector<Segment>& segments, bool speculative,
                  std::vector<Relayout> relayouts = {});
    // Moves a speculative ticket (what is left of it) behind the demands already queued. False when
    // there was nothing left to move.
    bool promote(Ticket ticket);
    // True when nothing of it had been issued: it never will be. Otherwise it runs to its end.
    bool cancel(Ticket ticket);
    TicketState state(Ticket ticket) const;
    // Whether the read is finished or its record was dropped.
    bool is_over(Ticket ticket) const;
    // Whether it was read without an error, or its record was dropped.
    bool is_read(Ticket ticket) const;
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
    void inject(Fault fault);  // into open and pread: no ring from then on

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
        int in_ring = 0;  // of these
        bool speculative = false;
        TicketState state = TicketState::kQueued;
        std::optional<ReadError> error;
        std::vector<Relayout> relayouts;
        std::shared_ptr<Arena> keep_alive;  // of read_into: the memory that the pieces are read to
        bool is_finished() const { return state >= TicketState::kDone; }
    };
    using RequestPtr = std::shared_ptr<Request>;
    struct Issued {
        RequestPtr request;
        Piece piece;
    };
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
        std::chrono::steady_clock::time_point busy_since;  // or since an end was seen
        int64_t untimed_bytes = 0;                         // read since then
        ReadCounters counters;
        bool closed = false;

        std::unique_ptr<ReadRing> ring;  // null: never
        std::string why_no_ring;         // empty: pieces go there
        std::vector<Issued> in_ring;     // by tag; no request: free
        int num_in_ring = 0;
        bool is_ring_awaited = false;  // somebody sleeps until it has finished something, and takes that
        std::deque<Issued> again;      // for the threads: in flight, and not read whole

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
    void enqueue(const RequestPtr& request);
    bool wait_for(const RequestPtr& request, double timeout_s, const CheckInterrupt& check_interrupt) const;

    // read_pieces.cpp
    RequestPtr make_request(const std::vector<Segment>& segments, bool speculative);
    static void work(State& state);
    static RequestPtr take_piece(State& state, Piece* piece);
    static bool is_last_piece(const Request& request);
    enum class End { kSeen, kLater };  // kLater: nobody looked when it was read
    static void finish_piece(State& state, Request& request, const Piece& piece,
                             std::optional<ReadError> error, End end);
    static Piece issue_next(State& state, std::deque<RequestPtr>& queue);

    // ring_reads.cpp; all called with the lock held.
    void open_ring();
    static void leave_ring(State& state, const std::string& reason);
    static void fill_ring(State& state);
    static bool take_finished(State& state, End end);
    static bool wait_on_ring(State& state, std::unique_lock<std::mutex>& lock, double seconds);
    static bool moves_with_ring(const State& state, const Request& request);
    static void drain_ring(State& state, std::unique_lock<std::mutex>& lock);

    std::unique_ptr<State> state_;  // leaked in a forked child: its mutexes belong to threads that are gone
    const bool direct_;
    const int owner_pid_;
};

inline constexpr const char* kClosedText = "the reader was closed before the read was finished";

// Bytes of the buffers that read_into keeps while a reader is open; part of a budget's workspace.
inline constexpr int64_t kBounceBytes = 8 << 20;

}  // namespace moe
