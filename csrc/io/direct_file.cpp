#include "io/direct_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "io/errors.h"

namespace moe {

namespace {

std::string error_text(int error_number) {
    return std::strerror(error_number);
}

// What a file system or device answers when it cannot read around the page cache.
bool refuses_direct(int error_number) {
    return error_number == EINVAL || error_number == EOPNOTSUPP;
}

}  // namespace

DirectFile::DirectFile(Syscalls& syscalls, std::string path, bool direct)
    : syscalls_(syscalls),
      path_(std::move(path)),
      direct_(direct),
      reason_(direct ? "O_DIRECT accepted" : "asked to") {
    const int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;  // O_NONBLOCK: a named pipe must not hang here
    fd_ = syscalls_.open(path_, direct ? flags | O_DIRECT : flags);
    if (fd_ < 0 && direct && refuses_direct(errno)) {
        fall_back("open with O_DIRECT: " + error_text(errno));
        fd_ = syscalls_.open(path_, flags);
    }
    if (fd_ < 0) throw FileError(errno, "cannot be opened: " + error_text(errno));
    struct stat status;
    const int error_number = fstat(fd_, &status) < 0 ? errno : S_ISDIR(status.st_mode) ? EISDIR : 0;
    if (error_number != 0 || !S_ISREG(status.st_mode)) {
        ::close(fd_);
        throw FileError(error_number ? error_number : EINVAL, "is not a regular file");
    }
    num_bytes_ = status.st_size;
    if (is_direct() && !supports_direct_alignment())
        fall_back("the device needs another alignment than 4096 bytes");
    // Read-ahead would fill the page cache with experts that nobody asked for.
    if (!is_direct()) posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);
}

void DirectFile::close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
}

std::string DirectFile::mode_reason() const {
    std::lock_guard lock(reason_mutex_);
    return reason_;
}

// True where the kernel says that 4096-byte alignment will do, or does not say anything.
bool DirectFile::supports_direct_alignment() {
#ifdef STATX_DIOALIGN
    struct statx status;
    if (statx(fd_, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 && (status.stx_mask & STATX_DIOALIGN)) {
        const int64_t memory = status.stx_dio_mem_align, offset = status.stx_dio_offset_align;
        return memory > 0 && offset > 0 && kAlignment % memory == 0 && kAlignment % offset == 0;
    }
#endif
    return true;
}

void DirectFile::fall_back(const std::string& reason) {
    std::lock_guard lock(reason_mutex_);
    if (!is_direct()) return;  // another thread was first
    reason_ = reason;
    if (fd_ >= 0) {
        fcntl(fd_, F_SETFL, fcntl(fd_, F_GETFL) & ~O_DIRECT);
        posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);
    }
    direct_.store(false);  // last: a buffered read of odd size must not meet O_DIRECT
}

int64_t DirectFile::read(const Window& window, int64_t* requests) {
    if (window.begin >= window.end) return 0;
    return is_direct() ? read_direct(window, requests) : read_buffered(window, requests);
}

int64_t DirectFile::read_direct(const Window& window, int64_t* requests) {
    const int64_t begin = floor_aligned(window.begin), end = ceil_aligned(window.end);
    int64_t position = begin, disk_bytes = 0;
    while (position < window.end) {
        ++*requests;
        const ssize_t got = syscalls_.pread(fd_, path_, window.window + (position - begin),
                                            static_cast<size_t>(end - position), position, /*direct=*/true);
        if (got < 0) {
            if (!refuses_direct(errno)) fail_read(position, errno);
            fall_back("pread with O_DIRECT: " + error_text(errno));
            return disk_bytes + read_buffered(window, requests);
        }
        disk_bytes += got;
        if (position + got >= window.end) break;
        // Short: at the end of the file, or cut by the system; the next direct read must start on a page.
        const int64_t next = floor_aligned(position + got);
        if (next == position) {
            if (size_now() <= position + got) fail_end_of_file(window, position + got);
            fall_back("pread with O_DIRECT stopped after " + std::to_string(got) + " bytes");
            return disk_bytes + read_buffered(window, requests);
        }
        position = next;
    }
    return disk_bytes;
}

int64_t DirectFile::read_buffered(const Window& window, int64_t* requests) {
    std::byte* const out = window.window + window.begin % kAlignment;
    int64_t position = window.begin;
    while (position < window.end) {
        ++*requests;
        const ssize_t got =
            syscalls_.pread(fd_, path_, out + (position - window.begin),
                            static_cast<size_t>(window.end - position), position, /*direct=*/false);
        if (got < 0) fail_read(position, errno);
        if (got == 0) fail_end_of_file(window, position);
        position += got;
    }
    // The pages are in a slot now; a second copy in the page cache would fight for the same memory.
    const int64_t begin = floor_aligned(window.begin);
    posix_fadvise(fd_, begin, ceil_aligned(window.end) - begin, POSIX_FADV_DONTNEED);
    return window.end - window.begin;
}

int64_t DirectFile::size_now() const {
    struct stat status;
    return fstat(fd_, &status) == 0 ? status.st_size : num_bytes_;
}

void DirectFile::fail_read(int64_t position, int error_number) const {
    if (error_number == ECANCELED) throw FileError(error_number, "the reader was closed during the read");
    throw FileError(error_number,
                    "read at offset " + std::to_string(position) + " failed: " + error_text(error_number));
}

void DirectFile::fail_end_of_file(const Window& window, int64_t found_end) const {
    throw FileError(0, "read at offset " + std::to_string(window.begin) + " wanted " +
                           std::to_string(window.end - window.begin) + " bytes, found " +
                           std::to_string(std::max<int64_t>(0, found_end - window.begin)) +
                           ": the file ends at " + std::to_string(found_end) + ", it had " +
                           std::to_string(num_bytes_) + " bytes when it was opened");
}

}  // namespace moe
