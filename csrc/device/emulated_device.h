// An accelerator without the hardware: a bounded arena for its memory and a throttled link, so that
// cache, transfers and scheduling run with real concurrency where there is no GPU. It proves order and
// safety; its speed is an arithmetic of bandwidth and latency and no GPU's.
#pragma once

#include "device/copy_queue.h"
#include "io/arena.h"

namespace moe {

class EmulatedDevice {
  public:
    // As a driver would have it: two chunks per direction in its hands.
    static constexpr int kChunksInHand = 2;

    EmulatedDevice(int64_t vram_bytes, double link_bytes_per_s, double latency_s)
        : memory_(vram_bytes),
          link_(std::make_shared<ThrottledLink>(link_bytes_per_s, latency_s)),
          to_device_(link_, kChunksInHand) {}
    ~EmulatedDevice() { close(); }

    Arena& memory() { return memory_; }
    ThrottledLink& link() { return *link_; }
    CopyQueue& to_device() { return to_device_; }

    // Copies in flight end first. Idempotent.
    void close() {
        to_device_.close();
        memory_.close();
    }

  private:
    Arena memory_;
    std::shared_ptr<ThrottledLink> link_;
    CopyQueue to_device_;
};

}  // namespace moe
