// Page-aligned anonymous memory for slots: costs RAM only where it was touched.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe {

// With base pages of 4 KiB; with others gather() does nothing.
inline constexpr int64_t kHugePageBytes = 2 << 20;
inline constexpr int kNotFilled = -1;

class Arena {
  public:
    // Reserves num_bytes, rounded up to whole pages. Throws ConfigError, std::bad_alloc.
    explicit Arena(int64_t num_bytes);
    ~Arena() { close(); }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    int64_t address() const;  // throws ConfigError once closed
    int64_t num_bytes() const { return num_bytes_; }

    // Returns the whole pages inside [offset, offset + num_bytes) to the system; they read as zeros
    // afterwards and cost RAM again when touched.
    void give_back(int64_t offset, int64_t num_bytes);

    // Puts the pages of [offset, offset + kHugePageBytes), whose address is a multiple of that, into one huge
    // page, to which a disk reads in one piece. Not where less than three quarters of them cost RAM. Bytes
    // stay, readers of them wait. Returns 0, kNotFilled, or what the system answers: EAGAIN (a read is under
    // way there), ENOMEM or EBUSY (it has no huge page), EINVAL (it makes none).
    int gather(int64_t offset);

    // Unmaps. The caller has made sure that no read into the arena is in flight.
    void close();

  private:
    void check_range(const char* caller, int64_t offset, int64_t num_bytes) const;

    int64_t num_bytes_;
    std::byte* data_ = nullptr;
};

}  // namespace moe
