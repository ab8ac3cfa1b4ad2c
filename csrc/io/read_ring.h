// Direct reads that the system carries out without a thread of ours (io_uring): starting one costs the caller
// some 15 us, where waking a thread that reads costs that and takes a core from whoever computes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace moe {

class ReadRing {
  public:
    struct Completion {
        uint64_t tag;
        int64_t result;  // bytes read, or -errno
    };

    // Null, and why, where the system has no io_uring or does not allow it (containers often do not).
    static std::unique_ptr<ReadRing> open(uint32_t num_entries, std::string* why_not);
    ~ReadRing();
    ReadRing(const ReadRing&) = delete;
    ReadRing& operator=(const ReadRing&) = delete;

    // Starts a read. False: the system takes no more now. One caller at a time, as for pop.
    bool start(int fd, void* buffer, size_t num_bytes, int64_t offset, uint64_t tag);
    // Takes one finished read, if there is one.
    bool pop(Completion* completion);
    // Sleeps until a read has finished that pop has not taken, a signal comes, or the time is over; while
    // others start reads.
    void wait(double seconds);

  private:
    struct Submission;  // the system's structures
    struct Finished;
    struct Map {
        void* address = nullptr;
        size_t num_bytes = 0;
    };

    ReadRing() = default;
    bool map(Map* map, size_t num_bytes, int64_t offset);
    bool has_unposted() const;  // finished reads that the system posts when it is entered

    int fd_ = -1;
    uint32_t num_entries_ = 0;
    Map rings_, submissions_;
    uint32_t *sq_tail_ = nullptr, *sq_flags_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr,
             *cq_tail_ = nullptr;
    uint32_t sq_mask_ = 0, cq_mask_ = 0;
    Finished* finished_ = nullptr;
};

}  // namespace moe
