// What kernels need of a grid: CUDA's words, or for a machine without a GPU a stand-in that runs a block's
// threads in turns (tests/native/grid_stand_in.h), so that indices, shuffles and shared memory are tested.
#pragma once

#include "cuda/portable.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#define MOE_DEVICE __device__ __forceinline__

namespace moe::cuda {

constexpr unsigned kFull = 0xffffffffu;

// Whether code for this card has int8 tensor cores. Of the two kernels for a few tokens each card runs one
// (has_tiles); the other is compiled to nothing, which halves the time that building takes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
constexpr bool kHasTiles = true, kHasOthers = false;
#elif defined(__CUDA_ARCH__)
constexpr bool kHasTiles = false, kHasOthers = true;
#else
constexpr bool kHasTiles = true, kHasOthers = true;
#endif

template <class T>
MOE_DEVICE T shuffle_xor(T value, int lanes) {
    return __shfl_xor_sync(kFull, value, lanes);
}

MOE_DEVICE void sync_warp() {
    __syncwarp();
}

MOE_DEVICE void sync_block() {
    __syncthreads();
}

// c (16, 8) += a (16, 32) b (32, 8), int8 to int32: lane 4 * g + t has of a four places of rows g, g + 8, g,
// g + 8, of b two places of column g, of c columns 2 t and 2 t + 1 of rows g, g, g + 8, g + 8.
MOE_DEVICE void multiply_tiles(int32_t (&c)[4], const int32_t (&a)[4], const int32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    (void)c, (void)a, (void)b;  // never launched below sm_80 (has_tiles)
    __trap();
#endif
}

// Starts a kernel; returns the CUDA error, 0 for success. It is the launch's own: after <<<>>> one would ask
// for the thread's last error, which another library's call may have left.
template <class Launch>
int start(void (*kernel)(Launch), dim3 grid, unsigned threads, CUstream_st* stream, Launch launch) {
    void* arguments[] = {&launch};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, dim3(threads), arguments, 0, stream);
}

// Whether the code that this card runs of a kernel was compiled for tensor cores' int8.
template <class Launch>
bool has_tiles(void (*kernel)(Launch)) {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)) == cudaSuccess &&
           attributes.ptxVersion >= 80;
}

}  // namespace moe::cuda
#else
#include "grid_stand_in.h"
#endif
