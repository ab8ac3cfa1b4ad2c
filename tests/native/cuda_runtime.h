// CUDA's runtime as csrc/cuda uses it, in host memory: with grid_stand_in.h the whole device runs where there
// is no GPU. Streams are as late as they may be (stream_stand_in.h); memory comes poisoned, ends where no
// page follows and is gone when it is freed; what is copied on a stream must be pinned on the host's side and
// may not cross two registered pieces; the system pins 48 MiB.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>

#include "stream_stand_in.h"

using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorNotReady = 600,
    cudaErrorHostMemoryAlreadyRegistered = 712,
    cudaErrorHostMemoryNotRegistered = 713,
    cudaErrorNotSupported = 801,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
enum {
    cudaEventDefault = 0,
    cudaStreamNonBlocking = 1,
    cudaEventBlockingSync = 1,
    cudaEventDisableTiming = 2,
    cudaHostRegisterDefault = 0
};

struct cudaDeviceProp {
    char name[256] = "stand-in";
    int major = 9, minor = 0, multiProcessorCount = 1, l2CacheSize = 1, integrated = 0;
    size_t totalGlobalMem = size_t(1) << 30;
};

namespace stand_in {

inline std::map<const char*, size_t> pinned;                    // registered pieces and allocated ones
inline int64_t pinnable = int64_t(48) << 20;                    // bytes that the system pins
inline std::map<const void*, std::pair<void*, size_t>> mapped;  // of what was allocated: its pages
inline int64_t copies_left = -1;   // so many more are queued, the next fails; -1: none does
inline bool fail_streams = false;  // no stream can be made
inline int64_t num_allocated = 0;  // pieces of the card's memory

// The pinned piece that holds an address, or null.
inline const char* piece_of(const char* address) {
    const auto next = pinned.upper_bound(address);
    if (next == pinned.begin()) return nullptr;
    const auto piece = std::prev(next);
    return address < piece->first + piece->second ? piece->first : nullptr;
}

// Whether a copy on a stream may read or write this memory of the host.
inline bool is_one_piece(const void* memory, size_t num_bytes) {
    const char* begin = static_cast<const char*>(memory);
    const char* piece = piece_of(begin);
    return num_bytes == 0 || (piece && piece == piece_of(begin + num_bytes - 1));
}

constexpr size_t kPage = 4096, kAlignment = 256;  // of what cudaMalloc gives

// Up to a page that may not be touched, and behind one.
inline cudaError_t allocate(void** to, size_t num_bytes) {
    const size_t aligned = (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
    const size_t whole = (aligned + kPage - 1) / kPage * kPage + 2 * kPage;
    void* pages = mmap(nullptr, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (pages == MAP_FAILED) return cudaErrorMemoryAllocation;
    char* begin = static_cast<char*>(pages);
    mprotect(begin + kPage, whole - 2 * kPage, PROT_READ | PROT_WRITE);
    *to = begin + whole - kPage - aligned;
    std::memset(*to, 0xcd, num_bytes);
    mapped[*to] = {pages, whole};
    return cudaSuccess;
}

inline void free(void* data) {
    if (const auto found = mapped.find(data); found != mapped.end()) {
        munmap(found->second.first, found->second.second);
        mapped.erase(found);
    }
}

}  // namespace stand_in

inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of the stand-in";
}
inline cudaError_t cudaSetDevice(int index) {
    return index == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaDeviceSynchronize() {
    return stand_in::wait_for_all(), cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) {
    return *version = 13000, cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
    return *version = 13000, cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
    return *count = 1, cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    return *p = {}, cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    return *free = *total = size_t(1) << 30, cudaSuccess;
}

template <class T>
cudaError_t cudaMalloc(T** to, size_t num_bytes) {
    if (num_bytes > size_t(1) << 30) return cudaErrorMemoryAllocation;
    std::lock_guard lock(stand_in::mutex);
    ++stand_in::num_allocated;
    return stand_in::allocate(reinterpret_cast<void**>(to), num_bytes);
}
template <class T>
cudaError_t cudaMallocHost(T** to, size_t num_bytes) {
    std::lock_guard lock(stand_in::mutex);
    const cudaError_t error = stand_in::allocate(reinterpret_cast<void**>(to), num_bytes);
    if (error == cudaSuccess) stand_in::pinned[reinterpret_cast<const char*>(*to)] = num_bytes;
    return error;
}
inline cudaError_t cudaFree(void* data) {
    std::lock_guard lock(stand_in::mutex);
    stand_in::wait_for_all();
    --stand_in::num_allocated;
    return stand_in::free(data), cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* data) {
    std::lock_guard lock(stand_in::mutex);
    stand_in::pinned.erase(static_cast<const char*>(data));
    return stand_in::free(data), cudaSuccess;
}

inline cudaError_t cudaHostRegister(void* begin, size_t num_bytes, unsigned) {
    std::lock_guard lock(stand_in::mutex);
    if (int64_t(num_bytes) > stand_in::pinnable) return cudaErrorMemoryAllocation;
    stand_in::pinnable -= int64_t(num_bytes);
    stand_in::pinned[static_cast<const char*>(begin)] = num_bytes;
    return cudaSuccess;
}
inline cudaError_t cudaHostUnregister(void* begin) {
    std::lock_guard lock(stand_in::mutex);
    const auto piece = stand_in::pinned.find(static_cast<const char*>(begin));
    if (piece == stand_in::pinned.end()) return cudaErrorHostMemoryNotRegistered;
    stand_in::pinnable += int64_t(piece->second);
    stand_in::pinned.erase(piece);
    return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream) {
    std::lock_guard lock(stand_in::mutex);
    if (kind != cudaMemcpyDeviceToDevice &&
        !stand_in::is_one_piece(kind == cudaMemcpyDeviceToHost ? to : from, num_bytes))
        return cudaErrorInvalidValue;
    if (stand_in::copies_left >= 0 && stand_in::copies_left-- == 0) return cudaErrorInvalidValue;
    return stand_in::put(stream, [=] { std::memcpy(to, from, num_bytes); }), cudaSuccess;
}
// Pageable memory is read at once; it may arrive later.
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t num_bytes, cudaMemcpyKind) {
    const char* begin = static_cast<const char*>(from);
    stand_in::put(nullptr, [to, bytes = std::vector<char>(begin, begin + num_bytes)] {
        std::memcpy(to, bytes.data(), bytes.size());
    });
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int value, size_t num_bytes) {
    return stand_in::put(nullptr, [=] { std::memset(to, value, num_bytes); }), cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    if (stand_in::fail_streams) return cudaErrorMemoryAllocation;
    std::lock_guard lock(stand_in::mutex);
    *stream = new CUstream_st;
    return stand_in::queues.insert((*stream)->queue.get()), cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    std::lock_guard lock(stand_in::mutex);
    stand_in::wait_for(*stream->queue);
    stand_in::queues.erase(stream->queue.get());
    return delete stream, cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    std::lock_guard lock(stand_in::mutex);
    return stand_in::wait_for(*stand_in::queue_of(stream)), cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    std::lock_guard lock(stand_in::mutex);
    stand_in::put(stream, [at = *event] { stand_in::wait_for(*at.queue, at.num_queued); });
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return *event = new CUevent_st, cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    return delete event, cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    std::lock_guard lock(stand_in::mutex);
    event->queue = stand_in::queue_of(stream), event->num_queued = event->queue->num_queued;
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    std::lock_guard lock(stand_in::mutex);
    return stand_in::wait_for(*event->queue, event->num_queued), cudaSuccess;
}
inline cudaError_t cudaEventQuery(cudaEvent_t event) {
    std::lock_guard lock(stand_in::mutex);
    return event->queue->num_done < event->num_queued ? cudaErrorNotReady : cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    if (cudaEventQuery(begin) != cudaSuccess || cudaEventQuery(end) != cudaSuccess) return cudaErrorNotReady;
    return *milliseconds = 1, cudaSuccess;
}
inline cudaError_t cudaDeviceGetPCIBusId(char* out, int size, int) {
    return std::snprintf(out, size_t(size), "0000:00:00.0"), cudaSuccess;
}
using cudaGraph_t = stand_in::Launches*;
using cudaGraphExec_t = stand_in::Launches*;
enum { cudaStreamCaptureModeThreadLocal = 1 };

inline cudaError_t cudaStreamBeginCapture(cudaStream_t, int) {
    return stand_in::capturing = new stand_in::Launches, cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    *graph = stand_in::capturing;
    return stand_in::capturing = nullptr, cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* to, cudaGraph_t graph, unsigned long long) {
    return *to = new stand_in::Launches(*graph), cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    stand_in::put(stream, [launches = *graph] {
        for (const stand_in::Work& launch : launches) launch();
    });
    return ++stand_in::graphs_launched, cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    return delete graph, cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    return delete graph, cudaSuccess;
}
