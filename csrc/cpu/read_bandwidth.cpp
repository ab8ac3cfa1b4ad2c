// How fast this process reads memory: what kernels are measured against.
#include <atomic>
#include <chrono>
#include <cstring>

#include "common/errors.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"

namespace moe {

namespace {

constexpr int64_t kBytesPerChunk = int64_t(1) << 20;
typedef uint64_t Line __attribute__((vector_size(64)));

// Reads every byte; the returned number keeps the compiler from leaving reads out.
uint64_t read_lines(const uint8_t* p, int64_t num_bytes) {
    Line sums[4] = {};
    for (int64_t i = 0; i + int64_t(sizeof sums) <= num_bytes; i += sizeof sums) {
        for (int k = 0; k < 4; ++k) {
            __builtin_prefetch(p + i + 8192 + k * sizeof(Line), 0, 2);  // faster than hardware's guess alone
            Line line;
            std::memcpy(&line, p + i + k * sizeof line, sizeof line);
            sums[k] ^= line;
        }
    }
    const Line all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    return all[0] ^ all[1] ^ all[2] ^ all[3] ^ all[4] ^ all[5] ^ all[6] ^ all[7];
}

std::atomic<uint64_t> seen{0};

}  // namespace

double read_bandwidth(const uint8_t* data, int64_t num_bytes) {
    check(data && num_bytes >= kBytesPerChunk, "read_bandwidth", "needs at least 1 MiB to read");
    ThreadPool& pool = ThreadPool::instance();
    ThreadPool::Operation operation(pool);
    const int64_t num_chunks = num_bytes / kBytesPerChunk;
    const auto start = std::chrono::steady_clock::now();
    pool.run(num_chunks,
             [&](int64_t chunk) { seen ^= read_lines(data + chunk * kBytesPerChunk, kBytesPerChunk); });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    return double(num_chunks * kBytesPerChunk) / elapsed.count();
}

}  // namespace moe
