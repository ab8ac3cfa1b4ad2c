// A token's norms, rotary, attention, softmax and choice. Sums run in the CPU's order: eight chains by
// element mod 8 and one tree, ranges of 256 cached tokens, one after the other.
#include "common/half.h"
#include "cuda/activations.h"
#include "cuda/dense_kernels.h"
#include "cuda/float_rows.h"

namespace moe::cuda {
namespace {

enum CacheType : int { kF32 = 0, kF16 = 1, kBF16 = 30 };  // ggml's numbers

constexpr float kMinusInfinity = -__builtin_inff();

MOE_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return __builtin_sqrtf(x);
#endif
}

MOE_HD int64_t element_bytes(int type) {
    return type == kF32 ? 4 : 2;
}

MOE_HD void store_element(int type, uint8_t* row, int64_t i, float value) {
    if (type == kF32)
        reinterpret_cast<float*>(row)[i] = value;
    else
        reinterpret_cast<uint16_t*>(row)[i] = type == kF16 ? to_half(value) : to_bfloat16(value);
}

template <int kType>
MOE_HD float load_element(const uint8_t* row, int64_t i) {
    if constexpr (kType == kF32) return reinterpret_cast<const float*>(row)[i];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(row)[i];
    return kType == kF16 ? half_to_float(bits) : as_float(uint32_t(bits) << 16);
}

template <int>
__global__ void __launch_bounds__(kThreads) norm_kernel(const NormLaunch launch) {
    __shared__ float inverse[1];
    float* x = launch.x + blockIdx.x * launch.width;
    if (launch.added) {
        for (int64_t i = threadIdx.x; i < launch.width; i += kThreads) x[i] = x[i] + launch.added[i];
        sync_block();
    }
    if (threadIdx.x < 32) {
        float chain = 0.0f;  // four times the same eight
#pragma unroll 8
        for (int64_t i = threadIdx.x % 8; i < launch.width; i += 8) chain = fma_rn(x[i], x[i], chain);
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

// A block for a head of query, key or value.
template <int>
__global__ void __launch_bounds__(kThreads) place_kernel(const PlaceLaunch launch) {
    const int64_t head_dim = launch.head_dim, half = launch.rotary_dim / 2;
    const int64_t kv_head = int64_t(blockIdx.x) - launch.num_heads, position = launch.token->num_tokens;
    const bool is_query = kv_head < 0, is_value = kv_head >= launch.num_kv_heads;
    const int64_t head = is_query ? blockIdx.x : (is_value ? kv_head - launch.num_kv_heads : kv_head);
    float* x = (is_query ? launch.query : (is_value ? launch.value : launch.key)) + head * head_dim;
    for (int64_t i = threadIdx.x; i < head_dim; i += kThreads) x[i] = clipped(x[i], launch.clip);
    sync_block();
    for (int64_t i = threadIdx.x; !is_value && i < half; i += kThreads) {
        const float a = x[i], b = x[half + i];
        x[i] = a * launch.cos[i] - b * launch.sin[i];
        x[half + i] = b * launch.cos[i] + a * launch.sin[i];
    }
    sync_block();
    const int64_t row_bytes = head_dim * element_bytes(launch.cache_type);
    uint8_t* cached = is_value ? launch.values : launch.keys;
    uint8_t* brought = is_value ? launch.token_value : launch.token_key;
    for (int64_t i = threadIdx.x; i < head_dim; i += kThreads) {
        if (is_query) {
            x[i] = x[i] * launch.scaling;
        } else {
            store_element(launch.cache_type, cached + (head * launch.capacity + position) * row_bytes, i,
                          x[i]);
            store_element(launch.cache_type, brought + head * row_bytes, i, x[i]);
        }
    }
}

// The cached tokens that the token under way sees, itself included, and their ranges, which begin at
// multiples of kRangeTokens (csrc/decode/cached_attention.cpp).
struct Seen {
    int64_t first, end, first_range, ranges;
};

MOE_HD Seen seen_by(const AttendLaunch& launch) {
    const int64_t end = launch.token->num_tokens + 1;
    const int64_t first = launch.window && end > launch.window ? end - launch.window : 0;
    const int64_t first_range = first / kRangeTokens;
    return {first, end, first_range, (end - 1) / kRangeTokens - first_range + 1};
}

// Lane 8 * t + c runs chain c of one token's score.
template <int kType>
MOE_DEVICE void range_scores(const AttendLaunch& launch, const float* query, const uint8_t* keys, int tokens,
                             float* scores) {
    const int c = threadIdx.x % 8;
    for (int first = 0; first < tokens; first += kThreads / 8) {
        const int t = first + int(threadIdx.x) / 8, last = tokens - 1;
        const uint8_t* key = keys + (t < last ? t : last) * launch.head_dim * element_bytes(kType);
        float chain = 0.0f;
#pragma unroll 4
        for (int64_t i = c; i < launch.head_dim; i += 8)
            chain = fma_rn(query[i], load_element<kType>(key, i), chain);
        const float score = tree_of_row(chain);
        if (c == 0 && t < tokens) scores[t] = score;
    }
}

MOE_DEVICE float largest_of(const float* scores, int tokens, float* of_warps) {
    float largest = kMinusInfinity;
    for (int t = threadIdx.x; t < tokens; t += kThreads) largest = scores[t] > largest ? scores[t] : largest;
    for (int step = 16; step > 0; step /= 2) {
        const float other = shuffle_xor(largest, step);
        largest = other > largest ? other : largest;
    }
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
    sync_block();
    for (int w = 0; w < kWarps; ++w) largest = of_warps[w] > largest ? of_warps[w] : largest;
    return largest;
}

// A block for one head's range.
template <int kType>
__global__ void __launch_bounds__(kThreads) attend_kernel(const AttendLaunch launch) {
    __shared__ float scores[kRangeTokens];
    __shared__ float of_warps[kWarps];
    const Seen seen = seen_by(launch);
    const int64_t range = blockIdx.x, head = blockIdx.y, head_dim = launch.head_dim;
    if (range >= seen.ranges) return;  // the whole block
    const int64_t group = launch.num_heads / launch.num_kv_heads, kv_head = head / group;
    const int64_t begin = (seen.first_range + range) * kRangeTokens, seen_eight = seen.first / 8 * 8;
    const int64_t first = begin > seen_eight ? begin : seen_eight;
    const int64_t end = begin + kRangeTokens < seen.end ? begin + kRangeTokens : seen.end;
    const int tokens = int(end - first);
    const int64_t row_bytes = head_dim * element_bytes(kType);
    const int64_t offset = (kv_head * launch.capacity + first) * row_bytes;
    const uint8_t *keys = launch.keys + offset, *values = launch.values + offset;
    range_scores<kType>(launch, launch.query + head * head_dim, keys, tokens, scores);
    sync_block();
    if (first + threadIdx.x < seen.first) scores[threadIdx.x] = kMinusInfinity;  // fewer than eight
    sync_block();
    const float largest = largest_of(scores, tokens, of_warps);
    for (int t = threadIdx.x; t < tokens; t += kThreads) scores[t] = exp_f32(scores[t] - largest);
    sync_block();
    const int64_t part = head * launch.max_ranges + range;
    for (int64_t d = threadIdx.x; d < head_dim; d += kThreads) {
        float chain = 0.0f;
#pragma unroll 8
        for (int t = 0; t < tokens; ++t)
            chain = fma_rn(scores[t], load_element<kType>(values + t * row_bytes, d), chain);
        launch.parts[part * head_dim + d] = chain;
    }
    if (threadIdx.x >= 32) return;
    float chain = 0.0f;  // four times the same eight
    for (int t = threadIdx.x % 8; t < tokens; t += 8) chain = chain + scores[t];
    const float sum = tree_of_row(chain);
    if (threadIdx.x != 0) return;
    launch.max[part] = largest;
    launch.sum[part] = sum;
}

// The ranges of one head become one; a block for a head, a thread for a dimension.
template <int>
__global__ void __launch_bounds__(kThreads) combine_kernel(const AttendLaunch launch) {
    const int64_t head = blockIdx.x, ranges = seen_by(launch).ranges, first = head * launch.max_ranges;
    const float *maxima = launch.max + first, *sums = launch.sum + first;
    for (int64_t i = threadIdx.x; i < launch.head_dim; i += kThreads) {
        float max = launch.sinks ? launch.sinks[head] : kMinusInfinity;
        float sum = launch.sinks ? 1.0f : 0.0f, out = 0.0f;
        for (int64_t r = 0; r < ranges; ++r) {
            const float largest = maxima[r] > max ? maxima[r] : max;
            const float before = exp_f32(max - largest), weight = exp_f32(maxima[r] - largest);
            max = largest;
            sum = before * sum + weight * sums[r];
            out = before * out + weight * launch.parts[(first + r) * launch.head_dim + i];
        }
        launch.out[head * launch.head_dim + i] = out * divide_rn(1.0f, sum);
    }
}

// In place, by one warp; what is beyond n up to a whole eight is not read.
MOE_DEVICE void softmax_by_warp(float* x, int64_t n) {
    float largest = kMinusInfinity;
    for (int64_t i = threadIdx.x; i < n; i += 32) largest = x[i] > largest ? x[i] : largest;
    for (int step = 16; step > 0; step /= 2) {
        const float other = shuffle_xor(largest, step);
        largest = other > largest ? other : largest;
    }
    for (int64_t i = threadIdx.x; i < n; i += 32) x[i] = exp_f32(x[i] - largest);
    sync_warp();
    float chain = 0.0f;
    for (int64_t i = threadIdx.x % 8; i < n; i += 8) chain = chain + x[i];
    const float sum = tree_of_row(chain);
    sync_warp();
    for (int64_t i = threadIdx.x; i < n; i += 32) x[i] = divide_rn(x[i], sum);
    sync_warp();
}

struct Candidate {
    float score;
    int32_t id;
};

MOE_DEVICE bool is_before(const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
}

MOE_DEVICE bool has_nan(const float* scores, int64_t n) {
    int32_t found = 0;
    for (int64_t i = threadIdx.x; i < n; i += 32) found |= scores[i] != scores[i];
    for (int step = 16; step > 0; step /= 2) found |= shuffle_xor(found, step);
    return found != 0;
}

// Where a score is no number there is no order: the CPU's steps, by one thread.
MOE_DEVICE void choose_in_turn(const ChooseLaunch& launch, float* scores, int32_t* ids) {
    int64_t count = 0;
    for (int64_t id = 0; id < launch.num_experts; ++id) {
        const float score = launch.scores[id];
        if (count == launch.top_k && !(score > scores[count - 1])) continue;
        count -= count == launch.top_k;
        int64_t place = count++;
        for (; place > 0 && score > scores[place - 1]; --place)
            scores[place] = scores[place - 1], ids[place] = ids[place - 1];
        scores[place] = score, ids[place] = int32_t(id);
    }
}

// The best of those behind the one chosen before it, top_k times: of equals the smaller id.
MOE_DEVICE void choose_by_warp(const ChooseLaunch& launch, float* scores, int32_t* ids) {
    constexpr int32_t kNobody = 0x7fffffff;
    Candidate last{-kMinusInfinity, -1};
    for (int64_t k = 0; k < launch.top_k; ++k) {
        Candidate best{kMinusInfinity, kNobody};
        for (int64_t id = threadIdx.x; id < launch.num_experts; id += 32) {
            const Candidate one{launch.scores[id], int32_t(id)};
            if (is_before(last, one) && is_before(one, best)) best = one;
        }
        for (int step = 16; step > 0; step /= 2) {
            const Candidate other{shuffle_xor(best.score, step), shuffle_xor(best.id, step)};
            if (is_before(other, best)) best = other;
        }
        if (threadIdx.x == 0) scores[k] = best.score, ids[k] = best.id;
        last = best;
    }
}

// One warp.
template <int>
__global__ void __launch_bounds__(32) choose_kernel(const ChooseLaunch launch) {
    __shared__ float weights[kMostTopK];
    __shared__ int32_t ids[kMostTopK];
    if (!launch.softmax_of_chosen) softmax_by_warp(launch.scores, launch.num_experts);
    if (!has_nan(launch.scores, launch.num_experts))
        choose_by_warp(launch, weights, ids);
    else if (threadIdx.x == 0)
        choose_in_turn(launch, weights, ids);
    sync_warp();
    if (launch.softmax_of_chosen) softmax_by_warp(weights, launch.top_k);
    if (launch.normalize) {
        float sum = 0.0f;
        for (int64_t k = 0; k < launch.top_k; ++k) sum = sum + weights[k];
        sync_warp();
        for (int64_t k = threadIdx.x; k < launch.top_k; k += 32) weights[k] = divide_rn(weights[k], sum);
        sync_warp();
    }
    for (int64_t k = threadIdx.x; k < launch.top_k; k += 32) {
        int place = 0;
        for (int64_t j = 0; j < launch.top_k; ++j) place += ids[j] < ids[k];
        launch.ids[place] = ids[k];
        launch.weights[place] = weights[k];
    }
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
    const dim3 grid(unsigned(launch.num_heads + 2 * launch.num_kv_heads));
    return start(place_kernel<0>, grid, kThreads, stream, launch);
}

int launch_attend(const AttendLaunch& launch, CUstream_st* stream) {
    const dim3 grid(unsigned(launch.max_ranges), unsigned(launch.num_heads));
    const auto kernel = launch.cache_type == kF32
                            ? attend_kernel<kF32>
                            : (launch.cache_type == kF16 ? attend_kernel<kF16> : attend_kernel<kBF16>);
    if (const int error = start(kernel, grid, kThreads, stream, launch)) return error;
    return start(combine_kernel<0>, dim3(unsigned(launch.num_heads)), kThreads, stream, launch);
}

int launch_choose(const ChooseLaunch& launch, CUstream_st* stream) {
    return start(choose_kernel<0>, dim3(1), 32, stream, launch);
}

int launch_add_rows(const AddRowsLaunch& launch, CUstream_st* stream) {
    return start(add_rows_kernel<0>, dim3(blocks_of(launch.width)), kThreads, stream, launch);
}

}  // namespace moe::cuda
