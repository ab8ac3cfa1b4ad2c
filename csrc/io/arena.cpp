#include "io/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <string>
#include <vector>

#include "io/errors.h"

namespace moe {

namespace {

int64_t page_bytes() {
    return sysconf(_SC_PAGESIZE);
}

#ifndef MADV_COLLAPSE
constexpr int MADV_COLLAPSE = 25;  // Linux 6.1
#endif

// Whether at least three quarters of the pages cost RAM.
bool is_filled(void* address, size_t num_bytes) {
    std::vector<unsigned char> pages(num_bytes / static_cast<size_t>(page_bytes()));
    if (mincore(address, num_bytes, pages.data()) != 0) return false;
    const auto num_there = std::ranges::count_if(pages, [](unsigned char page) { return (page & 1) != 0; });
    return static_cast<size_t>(num_there) >= pages.size() / 4 * 3;
}

}  // namespace

Arena::Arena(int64_t num_bytes) : num_bytes_(num_bytes) {
    if (num_bytes <= 0)
        throw ConfigError("Arena: num_bytes must be positive, got " + std::to_string(num_bytes));
    void* data = mmap(nullptr, static_cast<size_t>(num_bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<std::byte*>(data);
    // A huge page would count 2 MiB in RSS for the first byte touched, and where a host has to find it first
    // would hold up the first prompt: gather() makes them of pages that are there.
    madvise(data, static_cast<size_t>(num_bytes), MADV_NOHUGEPAGE);
}

int64_t Arena::address() const {
    if (data_ == nullptr) throw ConfigError("Arena: it is closed");
    return reinterpret_cast<int64_t>(data_);
}

void Arena::check_range(const char* caller, int64_t offset, int64_t num_bytes) const {
    if (offset >= 0 && num_bytes >= 0 && offset <= num_bytes_ && num_bytes <= num_bytes_ - offset) return;
    throw ConfigError(std::string(caller) + ": " + std::to_string(num_bytes) + " bytes at " +
                      std::to_string(offset) + " are outside of its " + std::to_string(num_bytes_) +
                      " bytes");
}

void Arena::give_back(int64_t offset, int64_t num_bytes) {
    check_range("Arena.give_back", offset, num_bytes);
    const int64_t page = page_bytes();
    const int64_t begin = (offset + page - 1) / page * page;
    const int64_t end = (offset + num_bytes) / page * page;
    if (begin >= end) return;
    void* const first = reinterpret_cast<void*>(address() + begin);
    const size_t given_bytes = static_cast<size_t>(end - begin);
    // A huge page of which a part goes would be kept whole, or made whole again.
    madvise(first, given_bytes, MADV_NOHUGEPAGE);
    madvise(first, given_bytes, MADV_COLD);
    madvise(first, given_bytes, MADV_DONTNEED);
}

int Arena::gather(int64_t offset) {
    check_range("Arena.gather", offset, kHugePageBytes);
    void* const first = reinterpret_cast<void*>(address() + offset);
    const size_t num_bytes = static_cast<size_t>(kHugePageBytes);
    if (!is_filled(first, num_bytes)) return kNotFilled;
    if (madvise(first, num_bytes, MADV_HUGEPAGE) != 0) return errno;
    return madvise(first, num_bytes, MADV_COLLAPSE) == 0 ? 0 : errno;
}

void Arena::close() {
    if (data_ != nullptr) munmap(data_, static_cast<size_t>(num_bytes_));
    data_ = nullptr;
}

}  // namespace moe
