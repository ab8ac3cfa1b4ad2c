// CUDA's runtime as csrc/cuda uses it, in host memory and at once: with grid_stand_in.h the whole device runs
// where there is no GPU. Memory comes poisoned, copies may not cross two registered pieces, and the
// system pins 48 MiB. It has one queue: it cannot show a missing wait, but before a copy that is made to
// fail (fail_copy), where copies happen when something waits for them.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

#include "graph_stand_in.h"

struct CUstream_st {};
struct CUevent_st {};
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
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

inline std::mutex mutex;  // guards all of it
inline std::map<const char*, size_t> registered;
inline int64_t pinnable = int64_t(48) << 20;  // bytes that the system pins

inline int64_t copies_left = -1;  // so many more happen when something waits, the next fails; -1: none does
inline std::vector<std::function<void()>> queued;
inline bool fail_streams = false;  // no stream can be made
inline int64_t num_allocated = 0;  // pieces of the card's memory

inline cudaError_t wait() {
    std::lock_guard lock(mutex);
    for (const auto& copy : queued) copy();
    return queued.clear(), cudaSuccess;
}

// The registered piece that holds an address, or null.
inline const char* piece_of(const char* address) {
    const auto next = registered.upper_bound(address);
    if (next == registered.begin()) return nullptr;
    const auto piece = std::prev(next);
    return address < piece->first + piece->second ? piece->first : nullptr;
}

inline cudaError_t allocate(void** to, size_t num_bytes) {
    *to = std::aligned_alloc(4096, (num_bytes + 4095) / 4096 * 4096);
    if (!*to) return cudaErrorMemoryAllocation;
    std::memset(*to, 0xcd, num_bytes);
    return cudaSuccess;
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
    return stand_in::wait();
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
    return stand_in::allocate(reinterpret_cast<void**>(to), num_bytes);
}
inline cudaError_t cudaFree(void* data) {
    std::lock_guard lock(stand_in::mutex);
    --stand_in::num_allocated;
    return std::free(data), cudaSuccess;
}
inline cudaError_t cudaFreeHost(void* data) {
    return std::free(data), cudaSuccess;
}

inline cudaError_t cudaHostRegister(void* begin, size_t num_bytes, unsigned) {
    std::lock_guard lock(stand_in::mutex);
    if (int64_t(num_bytes) > stand_in::pinnable) return cudaErrorMemoryAllocation;
    stand_in::pinnable -= int64_t(num_bytes);
    stand_in::registered[static_cast<const char*>(begin)] = num_bytes;
    return cudaSuccess;
}
inline cudaError_t cudaHostUnregister(void* begin) {
    std::lock_guard lock(stand_in::mutex);
    stand_in::pinnable += int64_t(stand_in::registered[static_cast<const char*>(begin)]);
    stand_in::registered.erase(static_cast<const char*>(begin));
    return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t num_bytes, cudaMemcpyKind kind,
                                   cudaStream_t) {
    const char* begin = static_cast<const char*>(kind == cudaMemcpyDeviceToHost ? to : from);
    std::lock_guard lock(stand_in::mutex);
    if (num_bytes && stand_in::piece_of(begin) != stand_in::piece_of(begin + num_bytes - 1))
        return cudaErrorInvalidValue;
    if (stand_in::copies_left-- == 0) return cudaErrorInvalidValue;
    if (stand_in::copies_left >= 0)
        return stand_in::queued.push_back([=] { std::memcpy(to, from, num_bytes); }), cudaSuccess;
    stand_in::copies_left = -1;
    return std::memcpy(to, from, num_bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t num_bytes, cudaMemcpyKind) {
    return std::memcpy(to, from, num_bytes), cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    if (stand_in::fail_streams) return cudaErrorMemoryAllocation;
    return *stream = new CUstream_st, cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    return delete stream, cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
    return stand_in::wait();
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
    return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return *event = new CUevent_st, cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    return delete event, cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) {
    return stand_in::wait();
}
inline cudaError_t cudaEventQuery(cudaEvent_t) {
    return stand_in::wait();
}
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
    return *milliseconds = 1, cudaSuccess;
}
inline cudaError_t cudaDeviceGetPCIBusId(char* out, int size, int) {
    return std::snprintf(out, size_t(size), "0000:00:00.0"), cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int value, size_t num_bytes) {
    return std::memset(to, value, num_bytes), cudaSuccess;
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
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
    for (const auto& launch : *graph) launch();
    return ++stand_in::graphs_launched, cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    return delete graph, cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    return delete graph, cudaSuccess;
}
