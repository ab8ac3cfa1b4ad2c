#include "cpu/amx.h"

#if defined(__x86_64__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

namespace moe {

namespace {

// CPUID leaf 7: AMX-TILE and AMX-INT8.
bool cpu_has_amx() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 24 & 1) && (edx >> 25 & 1);
}

// XCR0: the system saves the tiles' configuration and data.
bool system_saves_tiles() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx >> 27 & 1)) return false;
    asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (eax >> 17 & 3) == 3;
}

// For the whole process, threads that run already included (Linux 5.16 and later).
bool system_grants_tiles() {
    constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr int kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct TestType {
    GgmlType type;
    int64_t block_bytes, block_elements;
    std::vector<int> halves;  // where a block has fp16 numbers
};

// A format of each kind: plain, with minimums, with scales per 16.
const TestType kTestTypes[] = {{Q4_0, 18, 32, {0}}, {Q4_K, 144, 256, {0, 2}}, {Q6_K, 210, 256, {208}}};

// The same small product on different tables.
class TestProduct {
  public:
    TestProduct(const TestType& type, int rows, int64_t cols, int num_tokens)
        : type_(type.type), rows_(rows), cols_(cols), num_tokens_(num_tokens) {
        const int64_t num_blocks = rows * cols / type.block_elements;
        for (int64_t i = 0; i < num_blocks * type.block_bytes; ++i) weights_.push_back(uint8_t(random()));
        for (int64_t b = 0; b < num_blocks; ++b)
            for (const int place : type.halves)  // finite, about 1
                weights_[b * type.block_bytes + place + 1] = uint8_t(0x38 | (random() & 0x83));
        const int64_t numbers = num_tokens * cols;
        q_.resize(numbers), d_.resize(numbers / kBlock), sums_.resize(numbers / 16);
        tiles_.resize(numbers / kSuperblock), x_.resize(cols);
        for (int t = 0; t < num_tokens; ++t) {
            for (float& x : x_) x = float(int(random()) - 128) / 32.0f;
            kernels_avx512vnni.quantize(x_.data(), cols, cols, q_.data() + t * cols,
                                        d_.data() + t * cols / kBlock, sums_.data() + t * cols / 16,
                                        tiles_.data() + t * cols / kSuperblock);
            tokens_.push_back(t);
        }
    }

    std::vector<float> run(const Kernels& table) const {
        std::vector<float> out(size_t(num_tokens_) * rows_);
        Activations a;
        a.q = q_.data(), a.d = d_.data(), a.sums = sums_.data(), a.tiles = tiles_.data();
        a.cols = a.padded_cols = cols_;
        table.rows[type_](
            {weights_.data(), rows_, cols_, 0, rows_, &a, tokens_.data(), num_tokens_, out.data(), rows_});
        return out;
    }

    // Seconds, the best of several.
    double time(const Kernels& table) const {
        double best = 1.0;
        for (int i = 0; i < 8; ++i) {
            const auto start = std::chrono::steady_clock::now();
            run(table);
            const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
            best = elapsed.count() < best ? elapsed.count() : best;
        }
        return best;
    }

  private:
    uint32_t random() { return (state_ = state_ * 1664525u + 1013904223u) >> 24; }

    uint32_t state_ = 1;
    int type_;
    int64_t rows_, cols_;
    int num_tokens_;
    std::vector<uint8_t> weights_;
    std::vector<float> x_, d_;
    std::vector<int16_t> q_, sums_;
    std::vector<ActivationTile> tiles_;
    std::vector<int32_t> tokens_;
};

bool same_bits() {
    for (const TestType& type : kTestTypes) {
        const TestProduct product(type, 29, 768, 19);
        const std::vector<float> got = product.run(kernels_amx), wanted = product.run(kernels_avx512vnni);
        if (std::memcmp(got.data(), wanted.data(), got.size() * sizeof(float)) != 0) return false;
    }
    return true;
}

// AVX-512's time over AMX's.
double speed_up() {
    double amx = 0.0, avx512 = 0.0;
    for (const TestType& type : kTestTypes) {
        const TestProduct product(type, kRowTile, 2048, 64);
        amx += product.time(kernels_amx);
        avx512 += product.time(kernels_avx512vnni);
    }
    return avx512 / amx;
}

AmxVerdict look() {
    if (!cpu_has_amx()) return {false, false, "this CPU has no AMX-INT8"};
    if (!system_saves_tiles()) return {false, false, "the system does not save AMX's tiles"};
    if (!system_grants_tiles()) return {false, false, "the system does not grant AMX's tiles (arch_prctl)"};
    if (!same_bits()) return {false, false, "its bits are not AVX-512's on a test product"};
    const double ratio = speed_up();
    char reason[80];
    std::snprintf(reason, sizeof reason, "%.2f times AVX-512's speed on a test product", ratio);
    return {true, ratio > 1.0, reason};
}

}  // namespace

const AmxVerdict& amx_verdict() {
    static const AmxVerdict verdict = look();
    return verdict;
}

}  // namespace moe
#endif
