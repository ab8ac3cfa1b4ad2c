// Norms, rotary and the cache's rows, and sums of experts' rows. Sums run in the CPU's order: eight chains by
// element mod 8 and one tree.
#include "cuda/cached_rows.h"
#include "cuda/dense_kernels.h"
#include "cuda/float_rows.h"

namespace moe::cuda {
namespace {

MOE_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return __builtin_sqrtf(x);
#endif
}

constexpr int kStagedNumbers = 2048;  // of a row

// The eight chains read shared memory: from the device's they would wait for each few numbers anew, which
// for a row of 2,048 is most of the kernel.
template <int>
__global__ void __launch_bounds__(kThreads) norm_kernel(const NormLaunch launch) {
    __shared__ float staged[kStagedNumbers];
    __shared__ float inverse[1];
    float* x = launch.x + blockIdx.x * launch.width;
    const float* added = launch.added ? launch.added + blockIdx.x * launch.width : nullptr;
    float chain = 0.0f;  // of the first warp: four times the same eight
    for (int64_t first = 0; first < launch.width; first += kStagedNumbers) {
        const int64_t left = launch.width - first;
        const int count = int(left < kStagedNumbers ? left : kStagedNumbers);
        for (int i = threadIdx.x; i < count; i += kThreads) {
            float value = x[first + i];
            if (added) x[first + i] = value = value + added[first + i];
            staged[i] = value;
        }
        sync_block();
        if (threadIdx.x < 32) {
#pragma unroll 8
            for (int i = threadIdx.x % 8; i < count; i += 8) chain = fma_rn(staged[i], staged[i], chain);
        }
        sync_block();
    }
    if (threadIdx.x < 32) {
        const float sum = tree_of_row(chain);
        if (threadIdx.x == 0)
            inverse[0] = divide_rn(1.0f, square_root(divide_rn(sum, float(launch.width)) + launch.eps));
    }
    sync_block();
    float* y = launch.y + blockIdx.x * launch.width;
    for (int64_t i = threadIdx.x; i < launch.width; i += kThreads)
        y[i] = x[i] * inverse[0] * launch.weight[i];
}

MOE_HD float clipped(float value, float limit) {
    if (!(limit > 0.0f)) return value;
    return value > limit ? limit : (value < -limit ? -limit : value);
}

// By a block's threads.
MOE_DEVICE void store_row(int type, const float* x, int64_t head_dim, uint8_t* row) {
    for (int64_t i = threadIdx.x; i < head_dim; i += kThreads)  // whole warps where rows are blocks
        if (type == kQ8_0)
            store_block(x[i], row + i / kBlockNumbers * kBlockBytes);
        else
            store_element(type, row, i, x[i]);
}

// A block for a head of query, key or value of a token.
template <int>
__global__ void __launch_bounds__(kThreads) place_kernel(const PlaceLaunch launch) {
    const int64_t head_dim = launch.head_dim, half = launch.rotary_dim / 2, token = blockIdx.y;
    const int64_t kv_head = int64_t(blockIdx.x) - launch.num_heads;
    const int64_t position = launch.token->num_tokens + token, query = token - launch.first_query;
    const bool is_query = kv_head < 0, is_value = kv_head >= launch.num_kv_heads;
    if (is_query && query < 0) return;  // the whole block
    const int64_t head = is_query ? blockIdx.x : (is_value ? kv_head - launch.num_kv_heads : kv_head);
    const int64_t row = token * launch.num_kv_heads + head;  // of key and value
    float* x = is_query ? launch.query + (query * launch.num_heads + head) * head_dim
                        : (is_value ? launch.value : launch.key) + row * head_dim;
    const float *cos = launch.cos + token * half, *sin = launch.sin + token * half;
    for (int64_t i = threadIdx.x; i < head_dim; i += kThreads) x[i] = clipped(x[i], launch.clip);
    sync_block();
    for (int64_t i = threadIdx.x; !is_value && i < half; i += kThreads) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cos[i] - b * sin[i];
        x[half + i] = b * cos[i] + a * sin[i];
    }
    sync_block();
    if (is_query) {
        for (int64_t i = threadIdx.x; i < head_dim; i += kThreads) x[i] = x[i] * launch.scaling;
        return;
    }
    const int64_t row_bytes = row_bytes_of(launch.cache_type, head_dim);
    uint8_t* cached =
        (is_value ? launch.values : launch.keys) + (head * launch.capacity + position) * row_bytes;
    uint8_t* brought = (is_value ? launch.token_value : launch.token_key) + row * row_bytes;
    store_row(launch.cache_type, x, head_dim, cached);
    store_row(launch.cache_type, x, head_dim, brought);
}

template <int>
__global__ void __launch_bounds__(kThreads) add_rows_kernel(const AddRowsLaunch launch) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= launch.width) return;
    float sum = launch.residual[i];
    for (int64_t p = 0; p < launch.num_rows; ++p) {
        const bool is_there = launch.sources && launch.sources[p] >= 0;
        const float* row =
            is_there ? launch.there + launch.sources[p] * launch.width : launch.rows + p * launch.width;
        sum = sum + launch.weights[p] * row[i];
    }
    launch.residual[i] = sum;
}

unsigned blocks_of(int64_t threads) {
    return unsigned((threads + kThreads - 1) / kThreads);
}

}  // namespace

int launch_norm(const NormLaunch& launch, CUstream_st* stream) {
    return start(norm_kernel<0>, dim3(unsigned(launch.rows)), kThreads, stream, launch);
}

int launch_place(const PlaceLaunch& launch, CUstream_st* stream) {
    const dim3 grid(unsigned(launch.num_heads + 2 * launch.num_kv_heads), unsigned(launch.num_tokens));
    return start(place_kernel<0>, grid, kThreads, stream, launch);
}

int launch_add_rows(const AddRowsLaunch& launch, CUstream_st* stream) {
    return start(add_rows_kernel<0>, dim3(blocks_of(launch.width)), kThreads, stream, launch);
}

}  // namespace moe::cuda
