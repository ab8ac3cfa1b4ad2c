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

}  // namespace

CudaLink::CudaLink(int device) : device_(device) {
    const char* limit = std::getenv("MOE_OFFLOAD_LINK_LIMIT");
    if (limit) limit_bytes_per_s_ = std::max(0.0, std::atof(limit));
}

void CudaLink::wait_for(const Event& event) const {
    if (std::thread::hardware_concurrency() >= kCoresToSpare) {
        const Clock::time_point give_up = Clock::now() + kSpin;
        while (Clock::now() < give_up)
            if (event.has_passed()) return;
    }
    event.wait("copy to the GPU");
}

// Returns when a link of the limit would have brought the bytes.
void CudaLink::pace(int64_t num_bytes) {
    if (limit_bytes_per_s_ <= 0) return;
    Clock::time_point arrival;
    {
        std::lock_guard lock(mutex_);
        const std::chrono::duration<double> seconds(double(num_bytes) / limit_bytes_per_s_);
        wire_free_at_ =
            std::max(Clock::now(), wire_free_at_) + std::chrono::duration_cast<Clock::duration>(seconds);
        arrival = wire_free_at_;
    }
    std::this_thread::sleep_until(arrival - std::chrono::microseconds(100));
    while (Clock::now() < arrival) std::this_thread::yield();
}

void CudaLink::copy(std::byte* to, const std::byte* from, int64_t num_bytes) {
    must(cudaSetDevice(device_), "copy to the GPU");
    std::unique_ptr<Lane> lane = take_lane();
    const int64_t total = num_bytes;
    while (num_bytes > 0) {
        bool pinned = false;
        int64_t n = pinned_run(from, num_bytes, &pinned);
        const std::byte* source = from;
        if (!pinned) {
            n = std::min(n, kBounceBytes);
            auto* bounce = lane->bounce.at_least<std::byte>(kBounceBytes);
            std::memcpy(bounce, from, size_t(n));
            source = bounce;
        }
        must(cudaMemcpyAsync(to, source, size_t(n), cudaMemcpyHostToDevice, stream_), "copy to the GPU");
        to += n, from += n, num_bytes -= n;
        if (pinned && num_bytes > 0) continue;
        lane->event.record(stream_);
        wait_for(lane->event);  // also before the bounce buffer is filled again
    }
    pace(total);
    std::lock_guard lock(mutex_);
    free_lanes_.push_back(std::move(lane));
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

// How many bytes from `from` on lie in one registered piece (a copy may not cross two), or in none.
int64_t CudaLink::pinned_run(const std::byte* from, int64_t num_bytes, bool* pinned) const {
    std::lock_guard lock(mutex_);
    const auto next = pieces_.upper_bound(from);
    if (next != pieces_.begin()) {
        const auto piece = std::prev(next);
        const int64_t left = piece->second - (from - piece->first);
        if (left > 0) {
            *pinned = true;
            return std::min(num_bytes, left);
        }
    }
    *pinned = false;
    return next == pieces_.end() ? num_bytes : std::min<int64_t>(num_bytes, next->first - from);
}

int64_t CudaLink::pin(std::byte* begin, int64_t num_bytes) {
    constexpr int64_t kLargest = int64_t(1) << 30, kSmallest = int64_t(16) << 20;
    must(cudaSetDevice(device_), "pin host memory");
    int64_t granted = 0, piece = kLargest;
    while (granted < num_bytes) {
        const int64_t n = std::min(piece, num_bytes - granted);
        if (cudaHostRegister(begin + granted, size_t(n), cudaHostRegisterDefault) == cudaSuccess) {
            std::lock_guard lock(mutex_);
            pieces_[begin + granted] = n;
            granted += n;
        } else {
            cudaGetLastError();
            if (piece <= kSmallest) break;
            piece /= 4;
        }
    }
    return granted;
}

void CudaLink::close() {
    cudaSetDevice(device_);
    std::lock_guard lock(mutex_);
    free_lanes_.clear();
    for (const auto& [begin, num_bytes] : pieces_) cudaHostUnregister(const_cast<std::byte*>(begin));
    pieces_.clear();
}

}  // namespace moe::cuda
