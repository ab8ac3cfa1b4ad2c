#include "io/read_ring.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>

namespace moe {

// The system's interface, written down here: headers are often older than the system that runs.
struct ReadRing::Submission {
    uint8_t opcode, flags;
    uint16_t priority;
    int32_t fd;
    uint64_t offset, address;
    uint32_t num_bytes, read_flags;
    uint64_t tag, unused[3];
};
struct ReadRing::Finished {
    uint64_t tag;
    int32_t result;
    uint32_t flags;
};

namespace {

struct SqOffsets {
    uint32_t head, tail, ring_mask, ring_entries, flags, dropped, array, unused;
    uint64_t address;
};
struct CqOffsets {
    uint32_t head, tail, ring_mask, ring_entries, overflow, cqes, flags, unused;
    uint64_t address;
};
struct Parameters {
    uint32_t sq_entries, cq_entries, flags, cpu, idle, features, wq_fd, unused[3];
    SqOffsets sq;
    CqOffsets cq;
};
struct WaitArgument {
    uint64_t signal_mask;
    uint32_t signal_mask_bytes, unused;
    uint64_t timeout;
};
struct Timeout {
    int64_t seconds, nanoseconds;
};
static_assert(sizeof(Parameters) == 120);

constexpr long kSetup = 425, kEnter = 426;  // system calls, the same on x86-64 and aarch64
constexpr int64_t kRingsAt = 0, kSubmissionsAt = 0x10000000;
constexpr uint8_t kRead = 22;
constexpr uint32_t kSingleMap = 1 << 0, kWaitArgument = 1 << 8;      // features
constexpr uint32_t kNoInterrupt = 1 << 8, kTellUnposted = 1 << 9;    // of the setup
constexpr uint32_t kUnposted = 1 << 2;                               // in the flags of the submissions
constexpr uint32_t kGetEvents = 1 << 0, kWithWaitArgument = 1 << 3;  // of an enter

template <class T>
T* at(void* base, uint32_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
}

}  // namespace

std::unique_ptr<ReadRing> ReadRing::open(uint32_t num_entries, std::string* why_not) {
    static_assert(sizeof(Submission) == 64 && sizeof(Finished) == 16);
    std::unique_ptr<ReadRing> ring(new ReadRing);
    Parameters parameters{};
    // Without interrupting a thread that computes: it posts what has finished when it next asks.
    parameters.flags = kNoInterrupt | kTellUnposted;
    ring->fd_ = static_cast<int>(syscall(kSetup, num_entries, &parameters));
    if (ring->fd_ < 0) {
        *why_not = std::string("io_uring: ") + std::strerror(errno);
        return nullptr;
    }
    if (!(parameters.features & kSingleMap) || !(parameters.features & kWaitArgument)) {
        *why_not = "io_uring: the system's is too old";
        return nullptr;
    }
    const SqOffsets& sq = parameters.sq;
    const CqOffsets& cq = parameters.cq;
    const size_t ring_bytes = std::max<size_t>(sq.array + parameters.sq_entries * sizeof(uint32_t),
                                               cq.cqes + parameters.cq_entries * sizeof(Finished));
    if (!ring->map(&ring->rings_, ring_bytes, kRingsAt) ||
        !ring->map(&ring->submissions_, parameters.sq_entries * sizeof(Submission), kSubmissionsAt)) {
        *why_not = std::string("io_uring: mmap: ") + std::strerror(errno);
        return nullptr;
    }
    void* const rings = ring->rings_.address;
    ring->num_entries_ = parameters.sq_entries;
    ring->sq_tail_ = at<uint32_t>(rings, sq.tail);
    ring->sq_flags_ = at<uint32_t>(rings, sq.flags);
    ring->sq_array_ = at<uint32_t>(rings, sq.array);
    ring->sq_mask_ = *at<uint32_t>(rings, sq.ring_mask);
    ring->cq_head_ = at<uint32_t>(rings, cq.head);
    ring->cq_tail_ = at<uint32_t>(rings, cq.tail);
    ring->cq_mask_ = *at<uint32_t>(rings, cq.ring_mask);
    ring->finished_ = at<Finished>(rings, cq.cqes);
    return ring;
}

bool ReadRing::map(Map* map, size_t num_bytes, int64_t offset) {
    void* const address =
        mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd_, offset);
    if (address == MAP_FAILED) return false;
    *map = {address, num_bytes};
    return true;
}

ReadRing::~ReadRing() {
    for (const Map& map : {rings_, submissions_}) {
        if (map.address != nullptr) munmap(map.address, map.num_bytes);
    }
    if (fd_ >= 0) ::close(fd_);
}

bool ReadRing::start(int fd, void* buffer, size_t num_bytes, int64_t offset, uint64_t tag) {
    const uint32_t tail = *sq_tail_, place = tail & sq_mask_;
    Submission& submission = static_cast<Submission*>(submissions_.address)[place];
    submission = {};
    submission.opcode = kRead;
    submission.fd = fd;
    submission.address = reinterpret_cast<uint64_t>(buffer);
    submission.num_bytes = static_cast<uint32_t>(num_bytes);
    submission.offset = static_cast<uint64_t>(offset);
    submission.tag = tag;
    sq_array_[place] = place;
    __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
    long taken;
    do {
        taken = syscall(kEnter, fd_, 1, 0, 0, nullptr, 0);
    } while (taken < 0 && errno == EINTR);
    if (taken == 1) return true;
    __atomic_store_n(sq_tail_, tail, __ATOMIC_RELEASE);  // the system has not seen it
    return false;
}

bool ReadRing::has_unposted() const {
    return (__atomic_load_n(sq_flags_, __ATOMIC_RELAXED) & kUnposted) != 0;
}

bool ReadRing::pop(Completion* completion) {
    uint32_t head = *cq_head_;
    if (head == __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) {
        if (!has_unposted()) return false;
        syscall(kEnter, fd_, 0, 0, kGetEvents, nullptr, 0);
        if (head == __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) return false;
    }
    const Finished& finished = finished_[head & cq_mask_];
    *completion = {finished.tag, finished.result};
    __atomic_store_n(cq_head_, head + 1, __ATOMIC_RELEASE);
    return true;
}

void ReadRing::wait(double seconds) {
    const auto whole = static_cast<int64_t>(seconds);
    const Timeout timeout{whole, static_cast<int64_t>((seconds - static_cast<double>(whole)) * 1e9)};
    const WaitArgument argument{0, 0, 0, reinterpret_cast<uint64_t>(&timeout)};
    syscall(kEnter, fd_, 0, 1, kGetEvents | kWithWaitArgument, &argument, sizeof(argument));
}

}  // namespace moe
