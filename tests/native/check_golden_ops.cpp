// Checks golden vectors on every instruction set of this CPU, without Python: usage check_golden_ops FILE
//
// The file is int32 numbers and raw arrays, as tests/test_other_architectures.py writes them: the number of
// cases; per case the ggml type, rows, columns, tokens, bytes of its codebook (0: none), the codebook,
// packed weights, activations and the expected results.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <vector>

#include "cpu/isa.h"
#include "cpu/matrix_checks.h"
#include "cpu/ops.h"
#include "cpu/thread_pool.h"

using namespace moe;

template <class T>
static std::vector<T> read(std::ifstream& file, int64_t count) {
    std::vector<T> values(count);
    file.read(reinterpret_cast<char*>(values.data()), count * sizeof(T));
    return values;
}

static int count_differences(const std::vector<float>& got, const std::vector<float>& wanted) {
    int count = 0;
    for (size_t i = 0; i < got.size(); ++i) count += std::memcmp(&got[i], &wanted[i], sizeof(float)) != 0;
    return count;
}

// Returns how many results differ, over all instruction sets and one and two threads.
static int check_case(std::ifstream& file) {
    const auto head = read<int32_t>(file, 5);
    const Matrix matrix{head[0], head[1], head[2], false};
    const int64_t num_tokens = head[3];
    const auto grid = read<int8_t>(file, head[4]);
    if (!grid.empty()) grids.of[matrix.type] = grid.data();
    const auto packed = read<uint8_t>(file, matrix_bytes(matrix));
    const auto x = read<float>(file, num_tokens * matrix.cols);
    const auto y = read<float>(file, num_tokens * matrix.rows);
    int differences = 0;
    for (const std::string& isa : available_isas())
        for (int num_threads = 1; num_threads <= 2; ++num_threads) {
            force_isa(isa);
            ThreadPool::instance().set_num_threads(num_threads);
            std::vector<float> out(y.size());
            const auto run = [&](int64_t first, int64_t count) {
                linear(x.data() + first * matrix.cols, count, packed.data(), int64_t(packed.size()), matrix,
                       nullptr, out.data() + first * matrix.rows);
                return count_differences(out, y);
            };
            int different = run(0, num_tokens);
            out.assign(out.size(), 0.0f);
            for (int64_t t = 0; t + 1 < num_tokens; ++t) run(t, 1);  // the kernels of one token
            different += run(num_tokens - 1, 1);
            if (different)
                std::printf("ggml type %d on %s: %d differ\n", matrix.type, isa.c_str(), different);
            differences += different;
        }
    grids.of[matrix.type] = nullptr;
    return differences;
}

int main(int argc, char** argv) {
    if (argc != 2) return 2;
    std::ifstream file(argv[1], std::ios::binary);
    const int32_t num_cases = read<int32_t>(file, 1)[0];
    int differences = 0;
    for (int32_t i = 0; i < num_cases; ++i) differences += check_case(file);
    std::printf("%d cases on", num_cases);
    for (const std::string& isa : available_isas()) std::printf(" %s", isa.c_str());
    std::printf(": %d differ\n", differences);
    ThreadPool::instance().shutdown();
    return file && differences == 0 ? 0 : 1;
}
