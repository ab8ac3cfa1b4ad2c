// Copies to the card and from it: a stream per direction, an event per copy. Order, cancelling and how many
// copies are under way are device/copy_queue.h's, the same code as the emulated link's.
#pragma once

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include "cuda/runtime.h"

namespace moe::cuda {

// Host memory that is registered with the driver, in pieces.
class PinnedMemory {
  public:
    explicit PinnedMemory(int device) : device_(device) {}

    // Registers what the system grants; returns how much from `begin` on that is.
    int64_t pin(std::byte* begin, int64_t num_bytes);
    // Lets go of whole pages, once no copy holds the pieces.
    void unpin(std::byte* begin, int64_t num_bytes);
    // While a copy is under way: what is pinned stays so.
    std::shared_lock<std::shared_mutex> hold() const {
        const std::lock_guard turn(turn_);
        return std::shared_lock(copies_);
    }
    // How many bytes from `begin` on lie in one piece (a copy may not cross two), or in none.
    int64_t run(const std::byte* begin, int64_t num_bytes, bool* pinned) const;
    // Unregisters; no copy is under way.
    void close();

  private:
    bool register_piece(std::byte* begin, int64_t num_bytes);

    const int device_;
    mutable std::mutex turn_;           // whoever unpins waits for copies under way, the next copies for it
    mutable std::shared_mutex copies_;  // shared by those under way
    mutable std::mutex mutex_;          // guards the pieces
    std::map<const std::byte*, int64_t> pieces_;  // begin, bytes
};

// How far the experts' rows that stay on the card have been queued, and how far the host has waited for them.
class RowsFence {
  public:
    // They were queued on the stream.
    void queued(cudaStream_t stream) {
        std::lock_guard lock(mutex_);
        event_.record(stream);
        ++num_queued_;
    }
    // All of them have been waited for.
    void passed() { num_passed_ = num_queued_.load(); }
    int64_t num_queued() const { return num_queued_; }
    // What the stream is given from now on waits for the first ``fence`` of them.
    void hold(cudaStream_t stream, int64_t fence) {
        if (fence <= num_passed_) return;
        std::lock_guard lock(mutex_);
        must(cudaStreamWaitEvent(stream, event_, 0), "copy over the link");
    }

  private:
    std::mutex mutex_;  // guards the event
    Event event_;
    std::atomic<int64_t> num_queued_{0}, num_passed_{0};
};

class CudaLink : public Link {
  public:
    // MOE_OFFLOAD_LINK_LIMIT (bytes per second, for bench/gpu.py) makes it as slow as a laptop's.
    CudaLink(int device, Direction direction, std::shared_ptr<const PinnedMemory> pinned,
             std::shared_ptr<RowsFence> fence = nullptr);

    int64_t fence() const override { return fence_ ? fence_->num_queued() : 0; }
    bool pass(int64_t fence) override;
    void copy(std::byte* to, const std::byte* from, int64_t num_bytes) override;

    // To the host: brings what another stream has computed by `computed` to memory that cudaMallocHost gave;
    // the streams wait for each other, the host once. Returns the seconds on the link.
    double bring(void* to, const void* from, int64_t num_bytes, cudaEvent_t computed);

    // Frees the lanes; no copy is under way.
    void close();

  private:
    static constexpr int64_t kBounceBytes = 1 << 20;
    // What one copy under way needs; there are as many as callers at once.
    struct Lane {
        Event event{cudaEventDisableTiming | cudaEventBlockingSync};
        GrowingMemory bounce{true};
    };

    std::unique_ptr<Lane> take_lane();
    void copy_pieces(Lane& lane, std::byte* to, const std::byte* from, int64_t num_bytes);
    template <class Copies>
    void or_settle(const Copies& copies);
    void wait_for(const Event& event) const;
    double pace(int64_t num_bytes);

    using Clock = std::chrono::steady_clock;

    const int device_;
    const Direction direction_;
    const std::shared_ptr<const PinnedMemory> pinned_;
    const std::shared_ptr<RowsFence> fence_;
    double limit_bytes_per_s_ = 0;  // 0: none
    Stream stream_;
    Event begin_{cudaEventDefault}, end_{cudaEventDefault};  // of bring(), which one thread calls
    std::mutex mutex_;                                       // guards everything below
    std::vector<std::unique_ptr<Lane>> free_lanes_;
    Clock::time_point wire_free_at_{};  // of a limited link
};

}  // namespace moe::cuda
