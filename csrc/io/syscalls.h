// open() and pread() with a seam where tests inject faults; one relaxed load when there are none.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace moe {

struct Fault {
    enum class Kind {
        kError,        // pread fails with error_number
        kOpenError,    // open fails with error_number
        kOpenDirect,   // open with O_DIRECT fails with error_number
        kPreadDirect,  // a direct pread fails with error_number
        kShort,        // pread returns at most num_bytes
        kEof,          // the file seems to end at num_bytes
        kDelay,        // pread sleeps delay_s first
        kHang,         // pread returns only after release() or stop()
    };
    Kind kind;
    int64_t after_reads = 0;  // matching calls that pass before it strikes
    int64_t times = -1;       // how often it strikes; -1 = always
    int error_number = 0;
    double delay_s = 0;
    int64_t num_bytes = 0;
    std::string path_substring;  // strikes only paths that contain it
};

class Syscalls {
  public:
    int open(const std::string& path, int flags);
    // As pread(2), EINTR retried; sets errno. ECANCELED after stop().
    ssize_t pread(int fd, const std::string& path, void* buffer, size_t num_bytes, int64_t offset,
                  bool direct);

    void inject(Fault fault);
    void release(int64_t reads);  // let that many hanging (or yet to hang) reads go on
    void stop();                  // every hanging or delayed read, now and later, returns ECANCELED

  private:
    bool strikes(Fault& fault, const std::string& path);
    bool pass_faults(const std::string& path, int64_t offset, bool direct, int64_t* limit);

    std::atomic<bool> armed_{false};
    std::mutex mutex_;  // guards everything below
    std::condition_variable changed_;
    std::vector<Fault> faults_;
    int64_t permits_ = 0;
    bool stopped_ = false;
};

}  // namespace moe
