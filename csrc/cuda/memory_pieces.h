// What a stream works with, cut out of few allocations.
#pragma once

#include "common/ggml_types.h"
#include "cuda/runtime.h"

namespace moe::cuda {

// One piece of memory, cut into parts that begin at 256 bytes.
class Pieces {
  public:
    explicit Pieces(bool on_host) : memory_(on_host) {}
    void reserve(int64_t num_bytes) { begin_ = memory_.at_least<std::byte>(num_bytes); }
    template <class T>
    T* take(int64_t count) {
        T* part = reinterpret_cast<T*>(begin_ + used_);  // of nothing yet, while sizes are counted
        used_ += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
        return part;
    }
    int64_t used() const { return used_; }
    void start_over() { used_ = 0; }

  private:
    GrowingMemory memory_;
    std::byte* begin_ = nullptr;
    int64_t used_ = 0;
};

inline int64_t whole_words(int64_t num_bytes) {
    return (num_bytes + 15) / 16 * 16;
}

}  // namespace moe::cuda
