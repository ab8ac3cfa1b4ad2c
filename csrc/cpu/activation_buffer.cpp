#include "cpu/activation_buffer.h"

#include <algorithm>

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

Activations ActivationBuffer::prepare(const Kernels& kernels, const float* x, int64_t num_tokens,
                                      int64_t cols, bool quantized) {
    Activations a;
    a.x = x;
    a.cols = cols;
    if (!quantized) return a;
    const int64_t padded = (cols + kSuperblock - 1) / kSuperblock * kSuperblock;
    int16_t* q = at_least(q_, num_tokens * padded);
    float* d = at_least(d_, num_tokens * (padded / kBlock));
    int16_t* sums = at_least(sums_, num_tokens * (padded / 16));
    ActivationTile* tiles = at_least(tiles_, num_tokens * (padded / kSuperblock));
    const int64_t tokens_per_chunk = padded >= kElementsPerChunk ? 1 : kElementsPerChunk / padded;
    const int64_t num_chunks = (num_tokens + tokens_per_chunk - 1) / tokens_per_chunk;
    ThreadPool::instance().run(num_chunks, [&](int64_t chunk) {
        const int64_t end = std::min(num_tokens, (chunk + 1) * tokens_per_chunk);
        for (int64_t t = chunk * tokens_per_chunk; t < end; ++t)
            kernels.quantize(x + t * cols, cols, padded, q + t * padded, d + t * (padded / kBlock),
                             sums + t * (padded / 16), tiles + t * (padded / kSuperblock));
    });
    a.q = q;
    a.d = d;
    a.sums = sums;
    a.tiles = tiles;
    a.padded_cols = padded;
    return a;
}

}  // namespace moe
