// A grid of threads on one thread of a CPU, so that the kernels' own source (indices, shuffles, barriers,
// shared memory) can be tested where there is no GPU: each thread of a block is a fiber that runs until a
// barrier and gives way there. Blocks run one after the other, the threads of every other one from the last
// to the first, so that most forgotten barriers show. It says nothing of speed.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "stream_stand_in.h"

#define MOE_DEVICE inline
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct CUstream_st;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    explicit dim3(unsigned width = 1, unsigned height = 1) : x(width), y(height) {}
};

inline dim3 threadIdx(0, 0), blockIdx(0, 0);

namespace moe::cuda {

// Threads of a block, and what the lanes of a warp put up for each other.
class StandInBlock {
  public:
    explicit StandInBlock(unsigned num_threads) : threads_(num_threads) { current = this; }

    void run(const std::function<void()>& body) {
        body_ = &body;
        for (Thread& thread : threads_) {
            const size_t i = size_t(&thread - threads_.data());
            while (stacks.size() <= i) stacks.push_back(std::make_unique<char[]>(kStackBytes));
            getcontext(&thread.context);
            thread.context.uc_stack.ss_sp = stacks[i].get();
            thread.context.uc_stack.ss_size = kStackBytes;
            makecontext(&thread.context, &StandInBlock::enter, 0);
        }
        const unsigned flip = is_backwards ? unsigned(threads_.size()) - 1 : 0;
        is_backwards = !is_backwards;
        for (size_t left = threads_.size(); left > 0;)
            for (unsigned i = 0; i < threads_.size(); ++i) {
                running_ = flip ? flip - i : i;
                if (can_run(threads_[running_])) {
                    resume(threads_[running_]);
                    left -= threads_[running_].done;
                }
            }
    }

    unsigned lane() const { return running_ % 32; }
    void sync_warp() { barrier(&Thread::warp_barriers, running_ / 32 * 32, 32); }
    void sync_block() { barrier(&Thread::block_barriers, 0, unsigned(threads_.size())); }

    // Puts a value up for the other lanes; what they put up stays until the next sync_warp.
    template <class T>
    void offer(const T& value) {
        static_assert(sizeof(T) <= sizeof(Thread::offered));
        memcpy(threads_[running_].offered, &value, sizeof(T));
        sync_warp();
    }
    template <class T>
    T offered_by(unsigned lane) const {
        T value;
        memcpy(&value, threads_[running_ / 32 * 32 + lane].offered, sizeof(T));
        return value;
    }

    static inline StandInBlock* current = nullptr;
    static inline bool is_backwards = false;                    // the next block
    static inline std::vector<std::unique_ptr<char[]>> stacks;  // used again by the next block

  private:
    static constexpr size_t kStackBytes = 64 << 10;
    struct Thread {
        ucontext_t context;  // to begin with
        jmp_buf jump;        // to go on with: no system call
        bool started = false, done = false;
        unsigned warp_barriers = 0, block_barriers = 0;  // how often it came to one
        unsigned Thread::* waits_for = nullptr;
        unsigned first = 0, count = 0;  // of the threads that it waits for
        unsigned char offered[32];
    };

    bool can_run(const Thread& thread) const {
        if (thread.done) return false;
        if (!thread.waits_for) return true;
        for (unsigned i = thread.first; i < thread.first + thread.count; ++i)
            if (!threads_[i].done && threads_[i].*thread.waits_for < thread.*thread.waits_for) return false;
        return true;
    }

    void resume(Thread& thread) {
        ::threadIdx.x = running_;
        if (_setjmp(main_) != 0) return;
        if (thread.started) _longjmp(thread.jump, 1);
        thread.started = true;
        setcontext(&thread.context);
    }

    // Waits until the living threads [first, first + count) have come as often as this one.
    void barrier(unsigned Thread::* times, unsigned first, unsigned count) {
        Thread& thread = threads_[running_];
        ++(thread.*times);
        thread.waits_for = times, thread.first = first, thread.count = count;
        if (_setjmp(thread.jump) == 0) _longjmp(main_, 1);
        thread.waits_for = nullptr;
    }

    static void enter() {
        (*current->body_)();
        current->threads_[current->running_].done = true;
        _longjmp(current->main_, 1);
    }

    std::vector<Thread> threads_;
    unsigned running_ = 0;
    const std::function<void()>* body_ = nullptr;
    jmp_buf main_;
};

template <class T>
T shuffle_xor(T value, int lanes) {
    StandInBlock& block = *StandInBlock::current;
    block.offer(value);
    const T other = block.offered_by<T>(block.lane() ^ unsigned(lanes));
    block.sync_warp();
    return other;
}

inline void sync_warp() {
    StandInBlock::current->sync_warp();
}

inline void sync_block() {
    StandInBlock::current->sync_block();
}

// mma.m16n8k32 by its definition: which lane holds which place is in NVIDIA's PTX documentation.
inline void multiply_tiles(int32_t (&c)[4], const int32_t (&a)[4], const int32_t (&b)[2]) {
    struct Operands {
        int32_t a[4], b[2];
    } own;
    std::copy_n(a, 4, own.a);
    std::copy_n(b, 2, own.b);
    StandInBlock& block = *StandInBlock::current;
    block.offer(own);
    const unsigned lane = block.lane(), g = lane / 4, t = lane % 4;
    int8_t rows[2][32], columns[2][32];  // g and g + 8 of a; 2 t and 2 t + 1 of b
    for (unsigned k = 0; k < 32; ++k)
        for (unsigned i = 0; i < 2; ++i) {
            const auto of_a = block.offered_by<Operands>(g * 4 + k % 16 / 4);
            rows[i][k] = int8_t(of_a.a[i + k / 16 * 2] >> (k % 4 * 8));
            const auto of_b = block.offered_by<Operands>((2 * t + i) * 4 + k % 16 / 4);
            columns[i][k] = int8_t(of_b.b[k / 16] >> (k % 4 * 8));
        }
    block.sync_warp();
    for (unsigned i = 0; i < 4; ++i)
        for (unsigned k = 0; k < 32; ++k) c[i] += rows[i / 2][k] * columns[i % 2][k];
}

template <class Launch>
int start(void (*kernel)(Launch), dim3 grid, unsigned threads, CUstream_st* stream, const Launch& launch) {
    stand_in::put(stream, [=] {
        const std::function<void()> body = [&] { kernel(launch); };
        for (unsigned i = 0; i < grid.x * grid.y; ++i) {
            ::blockIdx.x = i % grid.x, ::blockIdx.y = i / grid.x;
            StandInBlock(threads).run(body);
        }
    });
    return 0;
}

constexpr bool kHasTiles = true, kHasOthers = true;
inline bool tiles_on = true;  // tests run both paths

template <class Launch>
bool has_tiles(void (*)(Launch)) {
    return tiles_on;
}

}  // namespace moe::cuda
