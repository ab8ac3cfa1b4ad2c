// One checkpoint file: opened around the page cache where the system allows it, read in aligned windows.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

#include "io/syscalls.h"

namespace moe {

inline constexpr int64_t kAlignment = 4096;  // of regions, and of offsets in direct reads

inline int64_t floor_aligned(int64_t value) {
    return value / kAlignment * kAlignment;
}
inline int64_t ceil_aligned(int64_t value) {
    return floor_aligned(value + kAlignment - 1);
}

// Bytes [begin, end) of a file are wanted; byte p goes to window + (p - floor_aligned(begin)), window
// aligned. A direct read also writes the rest of the pages that hold them.
struct Window {
    int64_t begin;
    int64_t end;
    std::byte* window;
};

class DirectFile {
  public:
    // direct: try O_DIRECT first. Throws FileError: cannot be opened, not a regular file.
    DirectFile(Syscalls& syscalls, std::string path, bool direct);
    ~DirectFile() { close(); }
    DirectFile(const DirectFile&) = delete;
    DirectFile& operator=(const DirectFile&) = delete;

    const std::string& path() const { return path_; }
    int64_t num_bytes() const { return num_bytes_; }  // when it was opened
    int descriptor() const { return fd_; }
    bool is_direct() const { return direct_.load(std::memory_order_relaxed); }
    std::string mode_reason() const;  // why it is read as it is

    // Reads the window; thread safe. Returns the bytes that preads brought, padding included, and adds
    // the number of preads to *requests. Throws FileError.
    int64_t read(const Window& window, int64_t* requests);
    void close();  // no read may be in flight

  private:
    int64_t read_direct(const Window& window, int64_t* requests);
    int64_t read_buffered(const Window& window, int64_t* requests);
    int64_t size_now() const;
    bool supports_direct_alignment();
    void fall_back(const std::string& reason);
    [[noreturn]] void fail_read(int64_t position, int error_number) const;
    [[noreturn]] void fail_end_of_file(const Window& window, int64_t found_end) const;

    Syscalls& syscalls_;
    const std::string path_;
    int fd_ = -1;
    int64_t num_bytes_ = 0;
    std::atomic<bool> direct_;
    mutable std::mutex reason_mutex_;
    std::string reason_;
};

}  // namespace moe
