#include "io/syscalls.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>

namespace moe {

namespace {

bool concerns_pread(const Fault& fault, bool direct) {
    if (fault.kind == Fault::Kind::kOpenError || fault.kind == Fault::Kind::kOpenDirect) return false;
    return direct || fault.kind != Fault::Kind::kPreadDirect;
}

}  // namespace

bool Syscalls::strikes(Fault& fault, const std::string& path) {
    if (fault.times == 0 || path.find(fault.path_substring) == std::string::npos) return false;
    if (fault.after_reads > 0) {
        --fault.after_reads;
        return false;
    }
    if (fault.times > 0) --fault.times;
    return true;
}

int Syscalls::open(const std::string& path, int flags) {
    if (armed_.load(std::memory_order_relaxed)) {
        std::lock_guard lock(mutex_);
        for (Fault& fault : faults_) {
            const bool concerned = fault.kind == Fault::Kind::kOpenError ||
                                   (fault.kind == Fault::Kind::kOpenDirect && (flags & O_DIRECT));
            if (concerned && strikes(fault, path)) {
                errno = fault.error_number;
                return -1;
            }
        }
    }
    int fd;
    do {
        fd = ::open(path.c_str(), flags);
    } while (fd < 0 && errno == EINTR);
    return fd;
}

// Applies the faults that strike this read: false with errno set, or true with *limit lowered.
bool Syscalls::pass_faults(const std::string& path, int64_t offset, bool direct, int64_t* limit) {
    std::unique_lock lock(mutex_);
    // By index: inject() may grow the vector while a fault here waits.
    for (size_t i = 0; i < faults_.size(); ++i) {
        if (!concerns_pread(faults_[i], direct) || !strikes(faults_[i], path)) continue;
        const Fault fault = faults_[i];
        switch (fault.kind) {
            case Fault::Kind::kShort:
                *limit = std::min(*limit, fault.num_bytes);
                break;
            case Fault::Kind::kEof:
                *limit = std::min(*limit, std::max<int64_t>(0, fault.num_bytes - offset));
                break;
            case Fault::Kind::kDelay:
                changed_.wait_for(lock, std::chrono::duration<double>(fault.delay_s),
                                  [this] { return stopped_; });
                break;
            case Fault::Kind::kHang:
                changed_.wait(lock, [this] { return stopped_ || permits_ > 0; });
                if (!stopped_) --permits_;
                break;
            default:
                errno = fault.error_number;
                return false;
        }
        if (stopped_) {
            errno = ECANCELED;
            return false;
        }
    }
    return true;
}

ssize_t Syscalls::pread(int fd, const std::string& path, void* buffer, size_t num_bytes, int64_t offset,
                        bool direct) {
    int64_t limit = static_cast<int64_t>(num_bytes);
    if (armed_.load(std::memory_order_relaxed) && !pass_faults(path, offset, direct, &limit)) return -1;
    ssize_t got;
    do {
        got = ::pread(fd, buffer, num_bytes, offset);
    } while (got < 0 && errno == EINTR);
    // Direct I/O refuses odd sizes, so a short read is read whole and reported short.
    return std::min<int64_t>(got, limit);
}

void Syscalls::inject(Fault fault) {
    std::lock_guard lock(mutex_);
    faults_.push_back(std::move(fault));
    armed_.store(true, std::memory_order_relaxed);
}

void Syscalls::release(int64_t reads) {
    std::lock_guard lock(mutex_);
    permits_ += reads;
    changed_.notify_all();
}

void Syscalls::stop() {
    std::lock_guard lock(mutex_);
    stopped_ = true;
    changed_.notify_all();
}

}  // namespace moe
