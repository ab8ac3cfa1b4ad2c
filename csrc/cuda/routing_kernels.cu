// The router's softmax and choice: a token's experts, as csrc/decode/token_parts.cpp chooses them.
#include "cuda/activations.h"
#include "cuda/cached_rows.h"
#include "cuda/float_rows.h"

namespace moe::cuda {
namespace {

// In place, by one warp; what is beyond n up to a whole eight is not read.
MOE_DEVICE void softmax_by_warp(float* x, int64_t n) {
    float largest = kMinusInfinity;
    for (int64_t i = threadIdx.x; i < n; i += 32) largest = x[i] > largest ? x[i] : largest;
    largest = largest_of_warp(largest);
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

// One warp for a token.
template <int>
__global__ void __launch_bounds__(32) choose_kernel(const ChooseLaunch of_all) {
    ChooseLaunch launch = of_all;
    launch.scores += blockIdx.x * launch.num_experts;
    launch.ids += blockIdx.x * launch.top_k, launch.weights += blockIdx.x * launch.top_k;
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

}  // namespace

int launch_choose(const ChooseLaunch& launch, CUstream_st* stream) {
    return start(choose_kernel<0>, dim3(unsigned(launch.num_tokens)), 32, stream, launch);
}

}  // namespace moe::cuda
