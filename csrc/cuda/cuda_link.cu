#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "cuda/cuda_link.h"

namespace moe::cuda {

namespace {

// Waking a sleeping thread takes about as long as a chunk of 1 MiB on a fast link, and two chunks are under
// way; where cores are plenty, the end of a chunk is looked for instead of slept for.
constexpr unsigned kCoresToSpare = 8;
constexpr std::chrono::microseconds kSpin{200};

constexpr const char* kCopy = "copy over the link";

constexpr int64_t kPageBytes = 4096;

// The beginning of the page that holds an address.
std::byte* page_at(std::byte* address) {
    return address - reinterpret_cast<uintptr_t>(address) % kPageBytes;
}

}  // namespace

CudaLink::CudaLink(int device, Direction direction, std::shared_ptr<const PinnedMemory> pinned,
                   std::shared_ptr<RowsFence> fence)
    : device_(device), direction_(direction), pinned_(std::move(pinned)), fence_(std::move(fence)) {
    const char* limit = std::getenv("MOE_OFFLOAD_LINK_LIMIT");
    if (limit) limit_bytes_per_s_ = std::max(0.0, std::atof(limit));
}

// The streams wait for each other, the thread does not.
bool CudaLink::pass(int64_t fence) {
    if (!fence_ || fence == 0) return false;
    must(cudaSetDevice(device_), kCopy);
    fence_->hold(stream_, fence);
    return false;
}

void CudaLink::wait_for(const Event& event) const {
    if (std::thread::hardware_concurrency() >= kCoresToSpare) {
        const Clock::time_point give_up = Clock::now() + kSpin;
        while (Clock::now() < give_up)
            if (event.has_passed()) return;
    }
    event.wait(kCopy);
}

// Returns when a link of the limit would have brought the bytes: the seconds that it would take, or 0.
double CudaLink::pace(int64_t num_bytes) {
    if (limit_bytes_per_s_ <= 0) return 0;
    const std::chrono::duration<double> seconds(double(num_bytes) / limit_bytes_per_s_);
    Clock::time_point arrival;
    {
        std::lock_guard lock(mutex_);
        wire_free_at_ =
            std::max(Clock::now(), wire_free_at_) + std::chrono::duration_cast<Clock::duration>(seconds);
        arrival = wire_free_at_;
    }
    std::this_thread::sleep_until(arrival - std::chrono::microseconds(100));
    while (Clock::now() < arrival) std::this_thread::yield();
    return seconds.count();
}

void CudaLink::copy(std::byte* to, const std::byte* from, int64_t num_bytes) {
    must(cudaSetDevice(device_), kCopy);
    std::unique_ptr<Lane> lane = take_lane();
    const auto held = pinned_->hold();
    or_settle([&] { copy_pieces(*lane, to, from, num_bytes); });
    pace(num_bytes);
    std::lock_guard lock(mutex_);
    free_lanes_.push_back(std::move(lane));
}

// What was queued of a copy that fails ends before anyone hears of it: its memory will be used again.
template <class Copies>
void CudaLink::or_settle(const Copies& copies) {
    try {
        copies();
    } catch (const DeviceError&) {
        cudaStreamSynchronize(stream_);
        cudaGetLastError();
        throw;
    }
}

void CudaLink::copy_pieces(Lane& lane, std::byte* to, const std::byte* from, int64_t num_bytes) {
    const bool to_host = direction_ == Direction::kToHost;
    const cudaMemcpyKind kind = to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice;
    while (num_bytes > 0) {
        bool pinned = false;
        int64_t n = pinned_->run(to_host ? to : from, num_bytes, &pinned);
        std::byte* bounce = nullptr;
        if (!pinned) {
            n = std::min(n, kBounceBytes);
            bounce = lane.bounce.at_least<std::byte>(kBounceBytes);
            if (!to_host) std::memcpy(bounce, from, size_t(n));
        }
        std::byte* target = bounce && to_host ? bounce : to;
        const std::byte* source = bounce && !to_host ? bounce : from;
        must(cudaMemcpyAsync(target, source, size_t(n), kind, stream_), kCopy);
        const bool is_last = n == num_bytes;
        if (bounce || is_last) {
            lane.event.record(stream_);
            wait_for(lane.event);  // also before the bounce buffer is used again
            if (bounce && to_host) std::memcpy(to, bounce, size_t(n));
        }
        to += n, from += n, num_bytes -= n;
    }
}

double CudaLink::bring(void* to, const void* from, int64_t num_bytes, cudaEvent_t computed) {
    constexpr const char* kRows = "rows from the GPU";
    or_settle([&] {
        must(cudaStreamWaitEvent(stream_, computed, 0), kRows);
        begin_.record(stream_);
        must(cudaMemcpyAsync(to, from, size_t(num_bytes), cudaMemcpyDeviceToHost, stream_), kRows);
        end_.record(stream_);
        end_.wait(kRows);
    });
    return std::max(end_.seconds_since(begin_), pace(num_bytes));
}

std::unique_ptr<CudaLink::Lane> CudaLink::take_lane() {
    {
        std::lock_guard lock(mutex_);
        if (!free_lanes_.empty()) {
            std::unique_ptr<Lane> lane = std::move(free_lanes_.back());
            free_lanes_.pop_back();
            return lane;
        }
    }
    return std::make_unique<Lane>();
}

void CudaLink::close() {
    cudaSetDevice(device_);
    std::lock_guard lock(mutex_);
    free_lanes_.clear();
}

int64_t PinnedMemory::run(const std::byte* begin, int64_t num_bytes, bool* pinned) const {
    std::lock_guard lock(mutex_);
    const auto next = pieces_.upper_bound(begin);
    if (next != pieces_.begin()) {
        const auto piece = std::prev(next);
        const int64_t left = piece->second - (begin - piece->first);
        if (left > 0) {
            *pinned = true;
            return std::min(num_bytes, left);
        }
    }
    *pinned = false;
    return next == pieces_.end() ? num_bytes : std::min<int64_t>(num_bytes, next->first - begin);
}

bool PinnedMemory::register_piece(std::byte* begin, int64_t num_bytes) {
    if (num_bytes <= 0) return false;
    if (cudaHostRegister(begin, size_t(num_bytes), cudaHostRegisterDefault) != cudaSuccess) {
        cudaGetLastError();
        return false;
    }
    std::lock_guard lock(mutex_);
    pieces_[begin] = num_bytes;
    return true;
}

// Pieces end where pages do, for no page is registered twice; they are small, for what is let go of a piece
// costs registering the rest of it again.
int64_t PinnedMemory::pin(std::byte* begin, int64_t num_bytes) {
    constexpr int64_t kLargest = int64_t(64) << 20, kSmallest = int64_t(16) << 20;
    must(cudaSetDevice(device_), "pin host memory");
    int64_t granted = 0, piece = kLargest;
    while (granted < num_bytes) {
        std::byte* at = begin + granted;
        const int64_t n = std::min(page_at(at + piece) - at, begin + num_bytes - at);
        if (register_piece(at, n))
            granted += n;
        else if (piece <= kSmallest)
            break;
        else
            piece /= 4;
    }
    return granted;
}

void PinnedMemory::unpin(std::byte* begin, int64_t num_bytes) {
    std::byte* end = page_at(begin + num_bytes);
    begin = page_at(begin + kPageBytes - 1);
    if (begin >= end) return;
    must(cudaSetDevice(device_), "let host memory go");
    const std::lock_guard turn(turn_);
    const std::unique_lock nobody_copies(copies_);
    for (std::byte* at = begin; at < end;) {
        bool pinned = false;
        const int64_t n = run(at, end - at, &pinned);
        if (pinned) {
            std::unique_lock lock(mutex_);
            const auto piece = std::prev(pieces_.upper_bound(at));
            std::byte* first = const_cast<std::byte*>(piece->first);
            std::byte* last = first + piece->second;
            cudaHostUnregister(first);
            pieces_.erase(piece);
            lock.unlock();
            register_piece(first, at - first), register_piece(at + n, last - (at + n));
        }
        at += n;
    }
}

void PinnedMemory::close() {
    cudaSetDevice(device_);
    std::lock_guard lock(mutex_);
    for (const auto& [begin, num_bytes] : pieces_) cudaHostUnregister(const_cast<std::byte*>(begin));
    pieces_.clear();
}

}  // namespace moe::cuda
