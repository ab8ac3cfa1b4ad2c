// Attention over cached rows: of one token, whose ranges of 256 cached tokens are blocks of their own, and of
// a prompt's tokens, a block each. Sums run in the CPU's order (csrc/decode/cached_attention.cpp): eight
// chains by element mod 8 and one tree, ranges one after the other.
#include "cuda/activations.h"
#include "cuda/cached_rows.h"
#include "cuda/float_rows.h"

namespace moe::cuda {
namespace {

// The cached tokens that a token sees, itself included, and their ranges, which begin at multiples of
// kRangeTokens.
struct Seen {
    int64_t first, end, first_range, ranges;
};

MOE_HD Seen seen_from(int64_t position, int64_t window) {
    const int64_t end = position + 1, first = window && end > window ? end - window : 0;
    const int64_t first_range = first / kRangeTokens;
    return {first, end, first_range, (end - 1) / kRangeTokens - first_range + 1};
}

// The cached tokens of a range that are read, from a multiple of eight on; fewer than eight are not seen.
struct Range {
    int64_t first;
    int tokens, unseen;
};

MOE_HD Range range_of(const Seen& seen, int64_t range) {
    const int64_t begin = (seen.first_range + range) * kRangeTokens, seen_eight = seen.first / 8 * 8;
    const int64_t first = begin > seen_eight ? begin : seen_eight;
    const int64_t end = begin + kRangeTokens < seen.end ? begin + kRangeTokens : seen.end;
    return {first, int(end - first), first < seen.first ? int(seen.first - first) : 0};
}

// Lane 8 * t + c runs chain c of one token's scores, of `heads` heads that share its key.
template <int kType, int kHeads>
MOE_DEVICE void range_scores(const float* query, int heads, int64_t head_dim, const uint8_t* keys, int tokens,
                             float (*scores)[kRangeTokens]) {
    // What is asked for at once: many heads leave less room for it.
    constexpr int kAhead = kHeads == 1 ? 16 : 4, kBlocksAhead = kHeads == 1 ? 2 : 1;
    const int c = threadIdx.x % 8;
    const float* queries[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) queries[h] = query + (h < heads ? h : 0) * head_dim;
    for (int first = 0; first < tokens; first += kThreads / 8) {
        const int t = first + int(threadIdx.x) / 8, last = tokens - 1;
        const uint8_t* key = keys + (t < last ? t : last) * row_bytes_of(kType, head_dim);
        float chains[kHeads] = {};
        if constexpr (kType == kQ8_0) {
#pragma unroll kBlocksAhead
            for (int i = c; i < head_dim; i += kBlockNumbers, key += kBlockBytes) {
                const float scale = aligned_half(key);
#pragma unroll
                for (int j = 0; j < kBlockNumbers; j += 8) {
                    const float k = scale * float(int8_t(key[2 + c + j]));
#pragma unroll
                    for (int h = 0; h < kHeads; ++h) chains[h] = fma_rn(queries[h][i + j], k, chains[h]);
                }
            }
        } else {
#pragma unroll kAhead
            for (int64_t i = c; i < head_dim; i += 8) {
                const float k = load_element<kType>(key, i);
#pragma unroll
                for (int h = 0; h < kHeads; ++h) chains[h] = fma_rn(queries[h][i], k, chains[h]);
            }
        }
#pragma unroll
        for (int h = 0; h < kHeads; ++h) {
            const float score = tree_of_row(chains[h]);
            if (c == 0 && t < tokens) scores[h][t] = score;
        }
    }
}

// Of the scores of a range, by one warp: what is not seen weighs nothing; returns the largest.
MOE_DEVICE float largest_score(float* scores, const Range& range) {
    const int lane = threadIdx.x % 32;
    if (lane < range.unseen) scores[lane] = kMinusInfinity;
    sync_warp();
    float largest = kMinusInfinity;
    for (int t = lane; t < range.tokens; t += 32) largest = scores[t] > largest ? scores[t] : largest;
    return largest_of_warp(largest);
}

// The sum of a range's weights, by one warp, in every lane.
MOE_DEVICE float sum_of_weights(const float* weights, int tokens) {
    float chain = 0.0f;  // four times the same eight
    for (int t = threadIdx.x % 8; t < tokens; t += 8) chain = chain + weights[t];
    return tree_of_row(chain);
}

// A block for one head's range.
template <int kType>
__global__ void __launch_bounds__(kThreads) attend_kernel(const AttendLaunch launch) {
    constexpr int kAhead = kType == kQ8_0 ? 8 : 16;  // values asked for at once
    __shared__ float scores[1][kRangeTokens];
    __shared__ float maximum[1];
    const Seen seen = seen_from(launch.token->num_tokens, launch.window);
    const int64_t head = blockIdx.y, head_dim = launch.head_dim;
    if (blockIdx.x >= seen.ranges) return;  // the whole block
    const Range range = range_of(seen, blockIdx.x);
    const int64_t group = launch.num_heads / launch.num_kv_heads, kv_head = head / group;
    const int64_t row_bytes = row_bytes_of(kType, head_dim);
    const int64_t offset = (kv_head * launch.capacity + range.first) * row_bytes;
    const uint8_t *keys = launch.keys + offset, *values = launch.values + offset;
    range_scores<kType, 1>(launch.query + head * head_dim, 1, head_dim, keys, range.tokens, scores);
    sync_block();
    if (threadIdx.x < 32) {
        const float largest = largest_score(scores[0], range);
        if (threadIdx.x == 0) maximum[0] = largest;
    }
    sync_block();
    const float largest = maximum[0];
    for (int t = threadIdx.x; t < range.tokens; t += kThreads) scores[0][t] = exp_f32(scores[0][t] - largest);
    sync_block();
    const int64_t part = head * launch.max_ranges + blockIdx.x;
    for (int64_t d = threadIdx.x; d < head_dim; d += kThreads) {
        float chain = 0.0f;
#pragma unroll kAhead
        for (int t = 0; t < range.tokens; ++t)
            chain = fma_rn(scores[0][t], load_element<kType>(values + t * row_bytes, d), chain);
        launch.parts[part * head_dim + d] = chain;
    }
    if (threadIdx.x >= 32) return;
    const float sum = sum_of_weights(scores[0], range.tokens);
    if (threadIdx.x != 0) return;
    launch.max[part] = largest;
    launch.sum[part] = sum;
}

// What the ranges of a head have come to, and how that and the next one count against each other.
struct Running {
    float max, sum, before, weight;
};

MOE_DEVICE Running begin_ranges(const float* sinks, int64_t head) {
    return {sinks ? sinks[head] : kMinusInfinity, sinks ? 1.0f : 0.0f, 0.0f, 0.0f};
}

MOE_DEVICE void take_in(float max, float sum, Running& running) {
    const float largest = max > running.max ? max : running.max;
    running.before = exp_f32(running.max - largest), running.weight = exp_f32(max - largest);
    running.max = largest;
    running.sum = running.before * running.sum + running.weight * sum;
}

// The ranges of one head become one; a block for a head, a thread for a dimension.
template <int>
__global__ void __launch_bounds__(kThreads) combine_kernel(const AttendLaunch launch) {
    const int64_t head = blockIdx.x, ranges = seen_from(launch.token->num_tokens, launch.window).ranges;
    const int64_t first = head * launch.max_ranges;
    for (int64_t i = threadIdx.x; i < launch.head_dim; i += kThreads) {
        Running running = begin_ranges(launch.sinks, head);
        float out = 0.0f;
        for (int64_t r = 0; r < ranges; ++r) {
            take_in(launch.max[first + r], launch.sum[first + r], running);
            out = running.before * out + running.weight * launch.parts[(first + r) * launch.head_dim + i];
        }
        launch.out[head * launch.head_dim + i] = out * divide_rn(1.0f, running.sum);
    }
}

// A block for a token and up to kHeads heads of a key/value head, which share its rows; range after range.
template <int kType, int kHeads>
__global__ void __launch_bounds__(kThreads) attend_prompt_kernel(const AttendPromptLaunch launch) {
    __shared__ float scores[kHeads][kRangeTokens];
    __shared__ Running running[kHeads];
    const int64_t head_dim = launch.head_dim, group = launch.num_heads / launch.num_kv_heads;
    const int64_t parts = (group + kHeads - 1) / kHeads, kv_head = blockIdx.y / parts;
    const int64_t skipped = blockIdx.y % parts * kHeads, head = kv_head * group + skipped;
    const int heads = int(group - skipped < kHeads ? group - skipped : kHeads);
    const int64_t first_row = (blockIdx.x * launch.num_heads + head) * head_dim;
    const int64_t row_bytes = row_bytes_of(kType, head_dim);
    float* out = launch.out + first_row;
    const Seen seen = seen_from(launch.token->num_tokens + launch.first_query + blockIdx.x, launch.window);
    if (int(threadIdx.x) < heads) running[threadIdx.x] = begin_ranges(launch.sinks, head + threadIdx.x);
    for (int64_t i = threadIdx.x; i < heads * head_dim; i += kThreads) out[i] = 0.0f;
    sync_block();
    for (int64_t r = 0; r < seen.ranges; ++r) {
        const Range range = range_of(seen, r);
        const int64_t offset = (kv_head * launch.capacity + range.first) * row_bytes;
        const uint8_t *keys = launch.keys + offset, *values = launch.values + offset;
        range_scores<kType, kHeads>(launch.query + first_row, heads, head_dim, keys, range.tokens, scores);
        sync_block();
        for (int h = int(threadIdx.x) / 32; h < heads; h += kWarps) {
            const float largest = largest_score(scores[h], range);
            for (int t = threadIdx.x % 32; t < range.tokens; t += 32)
                scores[h][t] = exp_f32(scores[h][t] - largest);
            sync_warp();
            const float sum = sum_of_weights(scores[h], range.tokens);
            if (threadIdx.x % 32 == 0) take_in(largest, sum, running[h]);
        }
        sync_block();
        for (int64_t d = threadIdx.x; d < head_dim; d += kThreads) {
            float chains[kHeads] = {};
#pragma unroll 4
            for (int t = 0; t < range.tokens; ++t) {
                const float v = load_element<kType>(values + t * row_bytes, d);
#pragma unroll
                for (int h = 0; h < kHeads; ++h) chains[h] = fma_rn(scores[h][t], v, chains[h]);
            }
#pragma unroll
            for (int h = 0; h < kHeads; ++h) {
                if (h >= heads) continue;
                float& to = out[h * head_dim + d];
                to = running[h].before * to + running[h].weight * chains[h];
            }
        }
        sync_block();
    }
    for (int64_t i = threadIdx.x; i < heads * head_dim; i += kThreads)
        out[i] = out[i] * divide_rn(1.0f, running[i / head_dim].sum);
}

template <int kType>
auto prompt_kernel_of(int64_t group) {
    return group == 1  ? attend_prompt_kernel<kType, 1>
           : group < 5 ? attend_prompt_kernel<kType, 4>
                       : attend_prompt_kernel<kType, 8>;
}

template <int kType>
struct OfType {
    static constexpr int kCached = kType;
};

// What `choose` says of the cache's type.
template <class Choose>
auto for_type(int type, const Choose& choose) {
    return type == kF32    ? choose(OfType<kF32>{})
           : type == kF16  ? choose(OfType<kF16>{})
           : type == kQ8_0 ? choose(OfType<kQ8_0>{})
                           : choose(OfType<kBF16>{});
}

}  // namespace

int launch_attend(const AttendLaunch& launch, CUstream_st* stream) {
    const dim3 grid(unsigned(launch.max_ranges), unsigned(launch.num_heads));
    const auto kernel =
        for_type(launch.cache_type, [](auto type) { return attend_kernel<decltype(type)::kCached>; });
    if (const int error = start(kernel, grid, kThreads, stream, launch)) return error;
    return start(combine_kernel<0>, dim3(unsigned(launch.num_heads)), kThreads, stream, launch);
}

int launch_attend_prompt(const AttendPromptLaunch& launch, CUstream_st* stream) {
    const int64_t group = launch.num_heads / launch.num_kv_heads,
                  at_once = group == 1 ? 1 : (group < 5 ? 4 : 8);
    const int64_t parts = (group + at_once - 1) / at_once;
    const dim3 grid(unsigned(launch.num_queries), unsigned(launch.num_kv_heads * parts));
    const auto kernel = for_type(
        launch.cache_type, [group](auto type) { return prompt_kernel_of<decltype(type)::kCached>(group); });
    return launch.num_queries == 0 ? 0 : start(kernel, grid, kThreads, stream, launch);
}

}  // namespace moe::cuda
