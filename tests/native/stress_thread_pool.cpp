// Hammers the thread pool from several threads, for -fsanitize=thread.
// stress_thread_pool ROUNDS: exits 0 when every chunk ran once and its plain writes were seen.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "cpu/thread_pool.h"

using moe::Interrupted;
using moe::ThreadPool;

namespace {

constexpr int kCallers = 3;
std::atomic<int> failures{0};
std::atomic<bool> interrupting{false};

void expect(bool ok, const char* what) {
    if (ok) return;
    std::fprintf(stderr, "failed: %s\n", what);
    ++failures;
}

// Chunks write to memory that is not atomic: only the pool orders it before the caller's reads.
void run_once(ThreadPool& pool, std::mt19937& rng) {
    const int64_t num_chunks = rng() % 4 ? rng() % 40 : 2000;
    std::vector<int> runs(static_cast<size_t>(num_chunks), 0);
    std::vector<int64_t> inputs(static_cast<size_t>(num_chunks) + 1, int64_t(rng()));
    std::vector<int64_t> outputs(static_cast<size_t>(num_chunks), -1);
    ThreadPool::Operation operation(pool);
    pool.run(num_chunks, [&](int64_t i) {
        const auto at = static_cast<size_t>(i);
        ++runs[at];
        outputs[at] = inputs[at] + i;
    });
    // A second job of the operation reads what other threads wrote in the first.
    std::vector<int64_t> sums(static_cast<size_t>(num_chunks), -1);
    pool.run(num_chunks, [&](int64_t i) {
        const auto at = static_cast<size_t>(i);
        sums[at] = outputs[at] + outputs[static_cast<size_t>(num_chunks - 1 - i)];
    });
    for (int64_t i = 0; i < num_chunks; ++i) {
        const auto at = static_cast<size_t>(i);
        expect(runs[at] == 1, "a chunk ran once");
        expect(sums[at] == 2 * inputs[at] + num_chunks - 1, "its results were seen");
    }
}

void use(int rounds, unsigned seed) {
    ThreadPool& pool = ThreadPool::instance();
    std::mt19937 rng(seed);
    for (int round = 0; round < rounds; ++round) run_once(pool, rng);
}

// Workers come and go between the operations of others.
void disturb(int rounds) {
    ThreadPool& pool = ThreadPool::instance();
    for (int round = 0; round < rounds / 10; ++round) {
        pool.set_num_threads(1 + round % 4);
        if (round % 5 == 0) pool.shutdown();
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

// An interrupt stops the job, and every worker has let go of it before run() throws.
void interrupt(int rounds) {
    ThreadPool& pool = ThreadPool::instance();
    pool.set_num_threads(3);
    int interrupted = 0;
    for (int round = 0; round < rounds / 50 + 1; ++round) {
        std::vector<int64_t> outputs(100000, 0);
        try {
            interrupting = true;
            ThreadPool::Operation operation(pool);
            pool.run(int64_t(outputs.size()), [&](int64_t i) {
                outputs[static_cast<size_t>(i)] = i;
                if (i % 100 == 0) std::this_thread::sleep_for(std::chrono::microseconds(500));
            });
        } catch (const Interrupted&) {
            ++interrupted;
        }
        interrupting = false;
        outputs.assign(outputs.size(), 1);  // nobody writes any more
    }
    expect(interrupted > 0, "an interrupt stops a job");
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) return 2;
    const int rounds = std::atoi(argv[1]);
    ThreadPool& pool = ThreadPool::instance();
    pool.set_interrupt_check([] { return interrupting.load(); });
    std::vector<std::thread> users;
    for (unsigned seed = 0; seed < kCallers; ++seed) users.emplace_back(use, rounds, seed);
    users.emplace_back(disturb, rounds);
    for (std::thread& user : users) user.join();
    interrupt(rounds);
    pool.shutdown();
    return failures ? 1 : 0;
}
