#include "io/arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <string>

#include "io/errors.h"

namespace moe {

namespace {

int64_t page_bytes() {
    return sysconf(_SC_PAGESIZE);
}

}  // namespace

Arena::Arena(int64_t num_bytes) : num_bytes_(num_bytes) {
    if (num_bytes <= 0)
        throw ConfigError("Arena: num_bytes must be positive, got " + std::to_string(num_bytes));
    void* data = mmap(nullptr, static_cast<size_t>(num_bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<std::byte*>(data);
    // A huge page would count 2 MiB in RSS for the first byte touched: the budget counts slots.
    madvise(data, static_cast<size_t>(num_bytes), MADV_NOHUGEPAGE);
}

int64_t Arena::address() const {
    if (data_ == nullptr) throw ConfigError("Arena: it is closed");
    return reinterpret_cast<int64_t>(data_);
}

void Arena::give_back(int64_t offset, int64_t num_bytes) {
    if (offset < 0 || num_bytes < 0 || offset > num_bytes_ || num_bytes > num_bytes_ - offset) {
        throw ConfigError("Arena.give_back: " + std::to_string(num_bytes) + " bytes at " +
                          std::to_string(offset) + " are outside of its " + std::to_string(num_bytes_) +
                          " bytes");
    }
    const int64_t page = page_bytes();
    const int64_t begin = (offset + page - 1) / page * page;
    const int64_t end = (offset + num_bytes) / page * page;
    if (begin < end)
        madvise(reinterpret_cast<void*>(address() + begin), static_cast<size_t>(end - begin), MADV_DONTNEED);
}

void Arena::close() {
    if (data_ != nullptr) munmap(data_, static_cast<size_t>(num_bytes_));
    data_ = nullptr;
}

}  // namespace moe
