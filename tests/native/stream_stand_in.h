// Streams of CUDA that are as late as they may be: what is queued on one happens when something waits for it,
// in order, and nothing else does. So a result that is read too early, memory that is filled again too early
// and a wait between streams that is missing all show, every time. Whoever waits computes.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

namespace stand_in {

using Work = std::function<void()>;

struct Queue {
    std::deque<Work> work;
    int64_t num_queued = 0, num_done = 0;
};

inline std::recursive_mutex mutex;  // guards all of the stand-in; one thread computes at a time
inline std::set<Queue*> queues;
inline const std::shared_ptr<Queue> default_queue = std::make_shared<Queue>();

// While a stream is being captured: what is launched, to be run by the graph.
using Launches = std::vector<Work>;
inline thread_local Launches* capturing = nullptr;
inline int64_t graphs_launched = 0;

}  // namespace stand_in

struct CUstream_st {
    std::shared_ptr<stand_in::Queue> queue = std::make_shared<stand_in::Queue>();
};

// So much of a queue.
struct CUevent_st {
    std::shared_ptr<stand_in::Queue> queue = stand_in::default_queue;
    int64_t num_queued = 0;
};

namespace stand_in {

inline const std::shared_ptr<Queue>& queue_of(CUstream_st* stream) {
    return stream ? stream->queue : default_queue;
}

inline void put(CUstream_st* stream, Work work) {
    std::lock_guard lock(mutex);
    if (capturing) return capturing->push_back(std::move(work));
    Queue& queue = *queue_of(stream);
    queue.work.push_back(std::move(work));
    ++queue.num_queued;
}

inline void wait_for(Queue& queue, int64_t count) {
    std::lock_guard lock(mutex);
    while (queue.num_done < count) {
        const Work next = std::move(queue.work.front());
        queue.work.pop_front();
        next();
        ++queue.num_done;
    }
}

inline void wait_for(Queue& queue) {
    wait_for(queue, queue.num_queued);
}

inline void wait_for_all() {
    std::lock_guard lock(mutex);
    wait_for(*default_queue);
    for (Queue* queue : queues) wait_for(*queue);
}

}  // namespace stand_in
