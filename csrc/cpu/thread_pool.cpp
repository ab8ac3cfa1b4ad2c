#include "cpu/thread_pool.h"

#include <unistd.h>

#include <cassert>
#include <chrono>

#include "cpu/usable_cores.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moe {

namespace {

constexpr auto kLongestWait = std::chrono::milliseconds(100);
constexpr int64_t kPollIntervalNs = 50'000'000;
constexpr int64_t kSpinNs = 50'000;  // about the gap between two operations of a layer

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

#if defined(__x86_64__)
uint64_t float_state() {
    return _mm_getcsr();
}
void set_float_state(uint64_t state) {
    _mm_setcsr(uint32_t(state));
}
constexpr uint64_t kDefaultFloatState = 0x1f80;  // every exception masked, nearest, no FTZ, no DAZ
#elif defined(__aarch64__)
uint64_t float_state() {
    uint64_t state;
    asm volatile("mrs %0, fpcr" : "=r"(state));
    return state;
}
void set_float_state(uint64_t state) {
    asm volatile("msr fpcr, %0" ::"r"(state));
}
constexpr uint64_t kDefaultFloatState = 0;
#else
#error "moe_offload supports x86-64 and aarch64"
#endif

// Spins for at most kSpinNs; true when ready() became true.
template <class Ready>
bool spin_until(Ready ready) {
    const int64_t deadline = now_ns() + kSpinNs;
    do {
        for (int i = 0; i < 64; ++i) {
            if (ready()) return true;
            pause();
        }
    } while (now_ns() < deadline);
    return false;
}

}  // namespace

FloatEnvironment::FloatEnvironment() : saved_(float_state()) {
    set_float_state(kDefaultFloatState);
}
FloatEnvironment::~FloatEnvironment() {
    set_float_state(saved_);
}

// Never destroyed: workers may outlive static destructors in a process that skips Python's atexit.
ThreadPool& ThreadPool::instance() {
    static ThreadPool* pool = new ThreadPool;
    return *pool;
}

ThreadPool::Operation::Operation(ThreadPool& pool) : pool_(pool), lock_(pool.operation_, std::defer_lock) {
    if (pool.owner_pid_ != 0 && pool.owner_pid_ != getpid())
        throw ConfigError("moe_offload was used by process " + std::to_string(pool.owner_pid_) +
                          " before it forked this one (" + std::to_string(getpid()) +
                          "); its threads do not survive a fork: use the spawn start method");
    while (!lock_.try_lock_for(kLongestWait))
        if (pool.interrupted_ && pool.interrupted_()) throw Interrupted{};
    if (pool.depth_ == 0) {
        pool.last_poll_ns_ = now_ns();
        pool.start_workers();
    }
    ++pool.depth_;
}

void ThreadPool::set_num_threads(int num_threads) {
    if (num_threads < 1)
        throw ConfigError("set_num_threads: num_threads must be at least 1, got " +
                          std::to_string(num_threads));
    Operation operation(*this);
    if (num_threads == num_threads_) return;
    stop_workers();
    num_threads_ = num_threads;
}

int ThreadPool::num_threads() {
    if (num_threads_ == 0) num_threads_ = usable_cores("/");
    return num_threads_;
}

void ThreadPool::start_workers() {
    if (int(shares_.size()) == num_threads()) return;
    owner_pid_ = getpid();
    stopping_ = false;
    shares_ = std::vector<Share>(num_threads());
    while (int(workers_.size()) < num_threads() - 1) {
        const uint64_t seen = generation_;
        const int participant = int(workers_.size()) + 1;
        workers_.emplace_back([this, participant, seen] { work(participant, seen); });
    }
}

void ThreadPool::stop_workers() {
    {
        std::lock_guard lock(sleep_);
        stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    shares_.clear();
    owner_pid_ = 0;
}

void ThreadPool::shutdown() {
    if (owner_pid_ != getpid()) return;
    std::lock_guard lock(operation_);
    stop_workers();
}

void ThreadPool::run(int64_t num_chunks, const Chunk& chunk) {
    if (num_chunks <= 0) return;
    cancelled_ = false;
    chunk_ = &chunk;
    const bool alone = workers_.empty() || num_chunks == 1;
    share_out(num_chunks, alone ? 1 : int(shares_.size()));
    if (!alone) {
        {
            std::lock_guard lock(sleep_);
            job_open_ = true;
            generation_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
    }
    take_chunks(0);
    if (!alone) finish_job();
    if (cancelled_) throw Interrupted{};
}

void ThreadPool::finish_job() {
    {
        std::lock_guard lock(sleep_);
        job_open_ = false;
    }
    const auto finished = [this] { return active_workers_.load(std::memory_order_acquire) == 0; };
    if (spin_until(finished)) return;
    std::unique_lock lock(sleep_);
    while (!done_.wait_for(lock, kLongestWait, finished)) {
        lock.unlock();
        poll_signals();
        lock.lock();
    }
}

// Neighbouring chunks stay with one thread: their bytes follow each other, and what a kernel prefetches
// beyond its rows is what the same thread reads next.
void ThreadPool::share_out(int64_t num_chunks, int num_shares) {
    assert(num_chunks < int64_t(1) << 32);
    for (int64_t i = 0; i < int64_t(shares_.size()); ++i) {
        const int64_t n = i < num_shares ? num_shares : i;
        const uint64_t begin = i < num_shares ? uint64_t(num_chunks * i / n) : 0;
        const uint64_t end = i < num_shares ? uint64_t(num_chunks * (i + 1) / n) : 0;
        shares_[i].range.store(begin | end << 32, std::memory_order_relaxed);
    }
}

bool ThreadPool::take(int participant, int64_t& chunk) {
    std::atomic<uint64_t>& range = shares_[participant].range;
    uint64_t seen = range.load(std::memory_order_relaxed);
    do {
        chunk = int64_t(seen & 0xffffffff);
        if (uint64_t(chunk) >= seen >> 32) return false;
    } while (!range.compare_exchange_weak(seen, seen + 1, std::memory_order_relaxed));
    return true;
}

// Moves the latter half of somebody's chunks to ``participant``, who has none.
bool ThreadPool::steal(int participant) {
    for (size_t i = 1; i < shares_.size(); ++i) {
        std::atomic<uint64_t>& range = shares_[(participant + i) % shares_.size()].range;
        uint64_t seen = range.load(std::memory_order_relaxed);
        for (;;) {
            const uint64_t begin = seen & 0xffffffff, end = seen >> 32;
            if (begin >= end) break;
            const uint64_t middle = begin + (end - begin) / 2;
            if (!range.compare_exchange_weak(seen, begin | middle << 32, std::memory_order_relaxed)) continue;
            shares_[participant].range.store(middle | end << 32, std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}

void ThreadPool::take_chunks(int participant) {
    int64_t chunk;
    do {
        while (!cancelled_.load(std::memory_order_relaxed) && take(participant, chunk)) {
            (*chunk_)(chunk);
            if (participant == 0) poll_signals();
        }
    } while (!cancelled_.load(std::memory_order_relaxed) && steal(participant));
}

void ThreadPool::poll_signals() {
    const int64_t now = now_ns();
    if (now - last_poll_ns_ < kPollIntervalNs) return;
    last_poll_ns_ = now;
    if (interrupted_ && !cancelled_ && interrupted_()) cancelled_ = true;
}

bool ThreadPool::join_job() {
    std::lock_guard lock(sleep_);
    if (job_open_) active_workers_.fetch_add(1, std::memory_order_relaxed);
    return job_open_;
}

void ThreadPool::leave_job() {
    if (active_workers_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    std::lock_guard lock(sleep_);
    done_.notify_all();
}

// ``seen`` is the last job that this worker knows of.
void ThreadPool::work(int participant, uint64_t seen) {
    FloatEnvironment environment;
    for (;;) {
        const auto ready = [this, seen] {
            return generation_.load(std::memory_order_acquire) != seen ||
                   stopping_.load(std::memory_order_relaxed);
        };
        if (!spin_until(ready)) {
            std::unique_lock lock(sleep_);
            wake_.wait(lock, ready);
        }
        if (stopping_) return;
        seen = generation_.load(std::memory_order_acquire);
        if (!join_job()) continue;
        take_chunks(participant);
        leave_job();
    }
}

}  // namespace moe
