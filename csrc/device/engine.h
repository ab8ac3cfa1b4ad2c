// A device at work: its copies and its launches, both asynchronous, and what they did when. The same for
// every implementation of Device. One thread calls, but for close().
#pragma once

#include "device/copy_queue.h"
#include "device/launch_queue.h"

namespace moe {

class DeviceEngine {
  public:
    // As a driver would have it: two chunks per direction in its hands.
    static constexpr int kChunksInHand = 2;

    explicit DeviceEngine(std::unique_ptr<Device> device)
        : device_(std::move(device)),
          copies_(device_->link(Direction::kToDevice), kChunksInHand, events_, Lane::kCopy),
          returns_(device_->link(Direction::kToHost), kChunksInHand, events_, Lane::kCopyToHost),
          launches_(*device_, copies_, events_) {}
    virtual ~DeviceEngine() { close(); }
    DeviceEngine(const DeviceEngine&) = delete;
    DeviceEngine& operator=(const DeviceEngine&) = delete;

    Device& device() { return *device_; }
    CopyQueue& copies() { return copies_; }    // to the device
    CopyQueue& returns() { return returns_; }  // to the host
    LaunchQueue& launches() { return launches_; }
    EventLog& events() { return events_; }

    // Launches and copies under way end first. Idempotent.
    void close() {
        launches_.close();
        copies_.close();
        returns_.close();
        device_->close();
    }

  private:
    std::unique_ptr<Device> device_;
    EventLog events_;
    CopyQueue copies_, returns_;
    LaunchQueue launches_;
};

}  // namespace moe
