#include "cpu/activation_buffer.h"

#include <algorithm>
#include <atomic>

#include "cpu/thread_pool.h"

namespace moe {

namespace {

constexpr int64_t kElementsPerChunk = 16384;  // about 10 microseconds: worth a thread

template <class T>
T* at_least(std::vector<T>& buffer, int64_t size) {
    if (int64_t(buffer.size()) < size) buffer.resize(size);
    return buffer.data();
}

}  // namespace

Activations ActivationBuffer::reserve(const float* x, int64_t num_tokens, int64_t cols, bool quantized) {
    Activations a;
    a.x = x;
    a.cols = cols;
    if (!quantized) return a;
    a.padded_cols = (cols + kSuperblock - 1) / kSuperblock * kSuperblock;
    a.q = at_least(q_, num_tokens * a.padded_cols);
    a.d = at_least(d_, num_tokens * (a.padded_cols / kBlock));
    a.sums = at_least(sums_, num_tokens * (a.padded_cols / 16));
    a.tiles = at_least(tiles_, num_tokens * (a.padded_cols / kSuperblock));
    return a;
}

uint64_t ActivationBuffer::next_version() {
    static std::atomic<uint64_t> last{0};
    return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

void ActivationBuffer::quantize_row(const Kernels& kernels, const Activations& a, int64_t token) {
    const int64_t padded = a.padded_cols;
    kernels.quantize(a.x + token * a.cols, a.cols, padded, const_cast<int16_t*>(a.q) + token * padded,
                     const_cast<float*>(a.d) + token * (padded / kBlock),
                     const_cast<int16_t*>(a.sums) + token * (padded / 16),
                     const_cast<ActivationTile*>(a.tiles) + token * (padded / kSuperblock));
}

Activations ActivationBuffer::prepare(const Kernels& kernels, const float* x, int64_t num_tokens,
                                      int64_t cols, bool quantized) {
    Activations a = reserve(x, num_tokens, cols, quantized);
    if (!quantized) return a;
    a.version = next_version();
    const int64_t tokens_per_chunk = std::max<int64_t>(1, kElementsPerChunk / a.padded_cols);
    ThreadPool::instance().run((num_tokens + tokens_per_chunk - 1) / tokens_per_chunk, [&](int64_t chunk) {
        const int64_t end = std::min(num_tokens, (chunk + 1) * tokens_per_chunk);
        for (int64_t t = chunk * tokens_per_chunk; t < end; ++t) quantize_row(kernels, a, t);
    });
    return a;
}

}  // namespace moe
