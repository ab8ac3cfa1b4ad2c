// Rows of packed matrices times a few tokens: a warp per row, lane 4 * c + k on chain c (formats.h).
//
// A block of threads quantizes its tokens' activations into shared memory once, then every warp walks
// its rows: the row's bytes come in aligned words, all of them in flight together, and are unpacked from
// shared memory, where unaligned bytes cost little. Launch bounds and tile sizes are chosen by reasoning;
// bench/gpu.py is where they are to be measured.
#include <cuda_runtime.h>

#include "cuda/formats.h"
#include "cuda/kernels.h"

namespace moe::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRowsPerWarp = 4;       // so that quantizing activations is paid for by 16 rows
constexpr int kStageSuperblocks = 8;  // of a row, in flight at once
constexpr unsigned kFull = 0xffffffffu;

// ggml's numbers (csrc/cpu/kernels.h).
enum GgmlType : int {
    F32 = 0,
    F16 = 1,
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ4_NL = 20,
    BF16 = 30,
    MXFP4 = 39
};

template <class Format>
constexpr int kSuperblockBytes = 256 / Format::kElements * Format::kBytes;

// Activations of up to kTokens tokens in shared memory: int8 codes, then fp32 scales.
template <int kTokens>
struct SharedActivations {
    int8_t* q;  // (kTokens, padded)
    float* d;   // (kTokens, padded / 32)
    int64_t padded;

    __device__ SharedActivations(uint8_t* memory, int64_t cols)
        : q(reinterpret_cast<int8_t*>(memory)), padded((cols + 255) / 256 * 256) {
        d = reinterpret_cast<float*>(memory + kTokens * padded);
    }
    static size_t bytes(int64_t cols) {
        const int64_t padded = (cols + 255) / 256 * 256;
        return kTokens * (padded + padded / 32 * sizeof(float));
    }
};

__device__ const float* row_of_x(const MatrixLaunch& launch, int32_t pair) {
    return launch.x + int64_t(launch.x_rows ? launch.x_rows[pair] : pair) * launch.cols;
}

// One warp quantizes a block of 32: lane i holds element i.
template <int kTokens>
__device__ void quantize_tokens(const MatrixLaunch& launch, int32_t first_pair, int num_tokens,
                                SharedActivations<kTokens>& a) {
    const int lane = threadIdx.x % 32;
    const int64_t blocks = a.padded / 32;
    for (int64_t i = threadIdx.x / 32; i < blocks * num_tokens; i += kWarps) {
        const int token = int(i / blocks);
        const int64_t block = i % blocks, element = block * 32 + lane;
        const float x = element < launch.cols ? row_of_x(launch, first_pair + token)[element] : 0.0f;
        float amax = finite_magnitude(x);
        for (int step = 16; step > 0; step /= 2) amax = fmaxf(amax, __shfl_xor_sync(kFull, amax, step));
        a.q[token * a.padded + element] = quantize_one(x, inverse_of(amax));
        if (lane == 0) a.d[token * blocks + block] = divide_rn(amax, 127.0f);
    }
}

// Copies bytes to shared memory in aligned words; returns where they begin there.
__device__ const uint8_t* stage(const uint8_t* from, int num_bytes, uint32_t* to) {
    const int offset = int(reinterpret_cast<uintptr_t>(from) % 4);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(from - offset);
    const int num_words = (offset + num_bytes + 3) / 4;
    __syncwarp();
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < num_words; i += 32) to[i] = __ldg(words + i);
    __syncwarp();
    return reinterpret_cast<const uint8_t*>(to) + offset;
}

__device__ int32_t quad_sum(int32_t value) {
    value += __shfl_xor_sync(kFull, value, 1);
    return value + __shfl_xor_sync(kFull, value, 2);
}

// ((c0 + c4) + (c2 + c6)) + ((c1 + c5) + (c3 + c7)), chain c in the lanes 4 * c ..
__device__ float tree(float chain) {
    chain = chain + __shfl_xor_sync(kFull, chain, 16);
    chain = chain + __shfl_xor_sync(kFull, chain, 8);
    return chain + __shfl_xor_sync(kFull, chain, 4);
}

// One row times every token of the tile; the result is in all lanes.
template <class Format, int kTokens>
__device__ void multiply_row(const uint8_t* row, int64_t cols, const SharedActivations<kTokens>& a,
                             uint32_t* staging, float (&y)[kTokens]) {
    const int lane = threadIdx.x % 32, c = lane / 4, k = lane % 4;
    const int64_t blocks = cols / 32;
    Chain chains[kTokens];
    for (int64_t first = 0; first < cols; first += kStageSuperblocks * 256) {
        const int64_t elements = min(int64_t(kStageSuperblocks * 256), cols - first);
        const int num_bytes = int(elements / Format::kElements * Format::kBytes);
        const uint8_t* bytes = stage(row + first / Format::kElements * Format::kBytes, num_bytes, staging);
        for (int64_t s = 0; s * 256 < elements; ++s) {
            const int64_t block = first / 32 + s * 8 + c;
            const bool exists = block < blocks;
            const Eight w = exists ? Format::load(bytes + s * kSuperblockBytes<Format>, c, k) : Eight{{0, 0}};
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                const int8_t* q = a.q + t * a.padded + block * 32 + 8 * k;
                EightActivations activations{{0, 0}, 0};
                if (exists) memcpy(activations.q, q, 8);
                Sums sums = multiply<Format>(w, activations);
                sums.sum = quad_sum(sums.sum);
                if constexpr (Format::kMins) sums.min = quad_sum(sums.min);
                if (exists) advance<Format>(chains[t], sums, w, a.d[t * (a.padded / 32) + block]);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        y[t] = tree(chains[t].sum);
        if constexpr (Format::kMins) y[t] = y[t] - tree(chains[t].min);
    }
}

// Where the weight row of an output is; a gate_up launch has two of them.
struct RowPlace {
    const uint8_t* weights;
    const float* bias;
    int64_t row;
};

__device__ RowPlace gate_of(const MatrixLaunch& launch, const Group& group, int64_t row) {
    return {group.weights, group.bias, launch.row_order == RowOrder::INTERLEAVED ? 2 * row : row};
}

__device__ RowPlace up_of(const MatrixLaunch& launch, const Group& group, int64_t row) {
    if (launch.row_order == RowOrder::SPLIT) return {group.up, group.up_bias, row};
    const bool interleaved = launch.row_order == RowOrder::INTERLEAVED;
    return {group.weights, group.bias, interleaved ? 2 * row + 1 : launch.rows + row};
}

template <class Format, int kTokens>
__global__ void __launch_bounds__(kThreads) rows_kernel(const MatrixLaunch launch) {
    extern __shared__ uint8_t memory[];
    __shared__ uint32_t staging[kWarps][kStageSuperblocks * kSuperblockBytes<Format> / 4 + 2];
    const Group group = launch.groups[blockIdx.y];
    const int32_t first = blockIdx.z * kTokens;
    if (first >= group.num_pairs) return;
    const int num_tokens = min(kTokens, group.num_pairs - first);
    SharedActivations<kTokens> a(memory, launch.cols);
    quantize_tokens(launch, group.first_pair + first, num_tokens, a);
    __syncthreads();
    const int warp = threadIdx.x / 32;
    const int64_t row_bytes = launch.cols / Format::kElements * Format::kBytes;
    const auto product = [&](const RowPlace& place, float (&y)[kTokens]) {
        multiply_row<Format, kTokens>(place.weights + place.row * row_bytes, launch.cols, a, staging[warp],
                                      y);
        if (place.bias)
            for (int t = 0; t < kTokens; ++t) y[t] = y[t] + place.bias[place.row];
    };
    for (int i = 0; i < kRowsPerWarp; ++i) {
        const int64_t row = (int64_t(blockIdx.x) * kRowsPerWarp + i) * kWarps + warp;
        if (row >= launch.rows) return;
        float y[kTokens];
        product(gate_of(launch, group, row), y);
        if (launch.is_gate_up) {
            float up[kTokens];
            product(up_of(launch, group, row), up);
            for (int t = 0; t < kTokens; ++t) y[t] = activate(launch.activation, y[t], up[t]);
        }
        if (threadIdx.x % 32 == 0)
            for (int t = 0; t < num_tokens; ++t)
                launch.out[int64_t(group.first_pair + first + t) * launch.rows + row] = y[t];
    }
}

struct WeightF32 {
    static constexpr int kBytes = 4;
    __device__ static float one(const uint8_t* p) { return as_float(load32(p)); }
};
struct WeightF16 {
    static constexpr int kBytes = 2;
    __device__ static float one(const uint8_t* p) { return load_half(p); }
};
struct WeightBF16 {
    static constexpr int kBytes = 2;
    __device__ static float one(const uint8_t* p) { return as_float(uint32_t(load16(p)) << 16); }
};

// Float weights: lane 8 * r + c runs chain c of row r, element after element; four rows to a warp.
template <class Weight, int kTokens>
__global__ void __launch_bounds__(kThreads) float_rows_kernel(const MatrixLaunch launch) {
    const Group group = launch.groups[blockIdx.y];
    const int32_t first = blockIdx.z * kTokens;
    if (first >= group.num_pairs) return;
    const int num_tokens = min(kTokens, group.num_pairs - first);
    const int lane = threadIdx.x % 32, c = lane % 8;
    const int64_t row = (int64_t(blockIdx.x) * kWarps + threadIdx.x / 32) * 4 + lane / 8;
    const bool exists = row < launch.rows;
    const auto product = [&](const RowPlace& place, float (&y)[kTokens]) {
        float chain[kTokens] = {};
        const uint8_t* weights = place.weights + place.row * launch.cols * Weight::kBytes;
        for (int64_t i = c; exists && i < launch.cols; i += 8) {
            const float w = Weight::one(weights + i * Weight::kBytes);
            for (int t = 0; t < num_tokens; ++t)
                chain[t] = fma_rn(w, row_of_x(launch, group.first_pair + first + t)[i], chain[t]);
        }
        for (int t = 0; t < kTokens; ++t) {  // lanes of one row: c by 4, by 2, by 1
            chain[t] = chain[t] + __shfl_xor_sync(kFull, chain[t], 4);
            chain[t] = chain[t] + __shfl_xor_sync(kFull, chain[t], 2);
            y[t] = chain[t] + __shfl_xor_sync(kFull, chain[t], 1);
            if (place.bias && exists) y[t] = y[t] + place.bias[place.row];
        }
    };
    float y[kTokens];
    product(gate_of(launch, group, row), y);
    if (launch.is_gate_up) {
        float up[kTokens];
        product(up_of(launch, group, row), up);
        for (int t = 0; t < kTokens; ++t) y[t] = activate(launch.activation, y[t], up[t]);
    }
    if (c == 0 && exists)
        for (int t = 0; t < num_tokens; ++t)
            launch.out[int64_t(group.first_pair + first + t) * launch.rows + row] = y[t];
}

int most_pairs(const MatrixLaunch& launch) {
    int most = 0;
    for (int g = 0; g < launch.num_groups; ++g) most = max(most, launch.groups[g].num_pairs);
    return most;
}

template <class Format, int kTokens>
int run_quantized(const MatrixLaunch& launch, CUstream_st* stream) {
    const unsigned tiles = unsigned((launch.rows + kWarps * kRowsPerWarp - 1) / (kWarps * kRowsPerWarp));
    const dim3 grid(tiles, launch.num_groups, (most_pairs(launch) + kTokens - 1) / kTokens);
    const size_t shared = SharedActivations<kTokens>::bytes(launch.cols);
    const auto kernel = rows_kernel<Format, kTokens>;
    if (shared > 32 * 1024) {
        const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (error != cudaSuccess) return error;
    }
    kernel<<<grid, kThreads, shared, stream>>>(launch);
    return cudaGetLastError();
}

template <class Weight, int kTokens>
int run_float(const MatrixLaunch& launch, CUstream_st* stream) {
    const dim3 grid(unsigned((launch.rows + kWarps * 4 - 1) / (kWarps * 4)), launch.num_groups,
                    (most_pairs(launch) + kTokens - 1) / kTokens);
    float_rows_kernel<Weight, kTokens><<<grid, kThreads, 0, stream>>>(launch);
    return cudaGetLastError();
}

// One token decodes with one tile; a prompt shares what it unpacks among eight.
template <class Format>
int quantized(const MatrixLaunch& launch, CUstream_st* stream) {
    return most_pairs(launch) == 1 ? run_quantized<Format, 1>(launch, stream)
                                   : run_quantized<Format, 8>(launch, stream);
}

template <class Weight>
int floats(const MatrixLaunch& launch, CUstream_st* stream) {
    return most_pairs(launch) == 1 ? run_float<Weight, 1>(launch, stream)
                                   : run_float<Weight, 8>(launch, stream);
}

// A thread per element of the output walks the pairs in order: two roundings each, no fma.
__global__ void weighted_sum_kernel(const float* rows, const int32_t* pair_tokens, const float* pair_weights,
                                    int32_t num_pairs, int64_t cols, float* out) {
    const int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int32_t token = blockIdx.y;
    if (column >= cols) return;
    float sum = out[token * cols + column];
    for (int32_t p = 0; p < num_pairs; ++p)
        if (pair_tokens[p] == token)
            sum = __fadd_rn(sum, __fmul_rn(pair_weights[p], rows[int64_t(p) * cols + column]));
    out[token * cols + column] = sum;
}

}  // namespace

bool has_kernel(int ggml_type) {
    switch (ggml_type) {
        case F32:
        case F16:
        case BF16:
        case Q4_0:
        case Q4_1:
        case Q5_0:
        case Q5_1:
        case Q8_0:
        case Q4_K:
        case Q5_K:
        case Q6_K:
        case IQ4_NL:
        case MXFP4:
            return true;
        default:
            return false;
    }
}

int launch_rows(const MatrixLaunch& launch, CUstream_st* stream) {
    if (launch.num_groups == 0 || launch.rows == 0) return cudaSuccess;
    switch (launch.ggml_type) {
        case F32:
            return floats<WeightF32>(launch, stream);
        case F16:
            return floats<WeightF16>(launch, stream);
        case BF16:
            return floats<WeightBF16>(launch, stream);
        case Q4_0:
            return quantized<FormatQ4_0>(launch, stream);
        case Q4_1:
            return quantized<FormatQ4_1>(launch, stream);
        case Q5_0:
            return quantized<FormatQ5_0>(launch, stream);
        case Q5_1:
            return quantized<FormatQ5_1>(launch, stream);
        case Q8_0:
            return quantized<FormatQ8_0>(launch, stream);
        case Q4_K:
            return quantized<FormatQ4_K>(launch, stream);
        case Q5_K:
            return quantized<FormatQ5_K>(launch, stream);
        case Q6_K:
            return quantized<FormatQ6_K>(launch, stream);
        case IQ4_NL:
            return quantized<FormatIQ4_NL>(launch, stream);
        case MXFP4:
            return quantized<FormatMXFP4>(launch, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

int launch_weighted_sum(const float* rows, const int32_t* pair_tokens, const float* pair_weights,
                        int32_t num_pairs, int64_t num_tokens, int64_t cols, float* out,
                        CUstream_st* stream) {
    if (num_tokens == 0) return cudaSuccess;
    const dim3 grid(unsigned((cols + kThreads - 1) / kThreads), unsigned(num_tokens));
    weighted_sum_kernel<<<grid, kThreads, 0, stream>>>(rows, pair_tokens, pair_weights, num_pairs, cols, out);
    return cudaGetLastError();
}

}  // namespace moe::cuda
