// Page-aligned anonymous memory for slots: costs RAM only where it was touched.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe {

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

    // Unmaps. The caller has made sure that no read into the arena is in flight.
    void close();

  private:
    int64_t num_bytes_;
    std::byte* data_ = nullptr;
};

}  // namespace moe
