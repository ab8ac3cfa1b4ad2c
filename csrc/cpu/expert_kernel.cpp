// The fused expert FFN: gate and up rows, activation, down rows (expert_rows.cpp) shared out over the pool.
#include <algorithm>
#include <atomic>

#include "common/errors.h"
#include "cpu/activation_buffer.h"
#include "cpu/expert_step.h"
#include "cpu/isa.h"
#include "cpu/matrix_checks.h"
#include "cpu/thread_pool.h"

namespace moe {

namespace {

constexpr const char* kOp = "ExpertKernel";

// Kept between operations, guarded by ThreadPool::Operation.
ActivationBuffer hidden_inputs, down_inputs;
std::vector<float> intermediate;   // (num_pairs, intermediate_size)
std::vector<float> raw_gate_up;    // (num_pairs, 2 * intermediate_size), of few pairs
std::vector<int32_t> tiles_to_do;  // (num_experts,) row tiles of gate and up that are not computed yet
std::vector<float> pair_rows;      // (num_pairs, hidden_size) of a group of experts, for sum()

std::vector<int32_t> group_offsets;
std::vector<int32_t> wanted_tokens;  // those of a step's pairs, each once
std::vector<bool> is_wanted;         // (num_tokens,)

// Up to so many numbers wait for their activation until all rows of an expert are there.
constexpr int64_t kMaxRawGateUp = int64_t(1) << 20;

constexpr int64_t kTokensPerChunk = 4;  // quantized by a thread at once

constexpr int64_t kPairsPerGroup = 512;  // sum() works on so many pairs at once, or on one expert's
constexpr int64_t kFewPairs = 128;       // sum() reads down in the order of addresses and adds afterwards

int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

float* at_least(std::vector<float>& buffer, int64_t size) {
    if (int64_t(buffer.size()) < size) buffer.resize(size);
    return buffer.data();
}

std::string range_error(const char* array, int64_t index, int64_t end, int64_t got) {
    return std::string(array) + "[" + std::to_string(index) + "] must be in [0, " + std::to_string(end) +
           "), got " + std::to_string(got);
}

// The inputs of a step. Of many tokens, few experts see few: only these are quantized.
Activations prepare_inputs(const float* hidden, int64_t num_tokens, int64_t cols, bool quantized,
                           const ExpertPairs& pairs) {
    if (!quantized || pairs.num_pairs >= num_tokens)
        return hidden_inputs.prepare(kernels(), hidden, num_tokens, cols, quantized);
    wanted_tokens.clear();
    is_wanted.assign(num_tokens, false);
    for (int64_t p = 0; p < pairs.num_pairs; ++p) {
        const int32_t token = pairs.pair_tokens[p];
        if (!is_wanted[token]) wanted_tokens.push_back(token);
        is_wanted[token] = true;
    }
    Activations inputs = hidden_inputs.reserve(hidden, num_tokens, cols, quantized);
    inputs.version = ActivationBuffer::next_version();
    ThreadPool::instance().run(ceil_div(wanted_tokens.size(), kTokensPerChunk), [&](int64_t chunk) {
        const int64_t end = std::min<int64_t>(wanted_tokens.size(), (chunk + 1) * kTokensPerChunk);
        for (int64_t i = chunk * kTokensPerChunk; i < end; ++i)
            ActivationBuffer::quantize_row(kernels(), inputs, wanted_tokens[i]);
    });
    return inputs;
}

// Experts [begin, end) of a step, their pairs counted from 0 in ``offsets``.
ExpertPairs group_of(const ExpertPairs& pairs, int64_t begin, int64_t end, int64_t num_matrices,
                     std::vector<int32_t>& offsets) {
    const int32_t first = pairs.pair_offsets[begin];
    offsets.clear();
    for (int64_t i = begin; i <= end; ++i) offsets.push_back(pairs.pair_offsets[i] - first);
    return {pairs.expert_ids + begin,
            pairs.addresses + begin * num_matrices,
            offsets.data(),
            pairs.pair_tokens + first,
            end - begin,
            offsets.back()};
}

}  // namespace

ExpertKernel::ExpertKernel(std::vector<Matrix> matrices, RowOrder row_order, int64_t num_experts,
                           Activation activation, const float* gate_up_bias, const float* down_bias)
    : matrices_(std::move(matrices)),
      row_order_(row_order),
      num_experts_(num_experts),
      activation_(activation),
      gate_up_bias_(gate_up_bias),
      down_bias_(down_bias) {
    const bool split = row_order == RowOrder::SPLIT;
    check_equal(kOp, "number of matrices", split ? 3 : 2, int64_t(matrices_.size()));
    const char* names[] = {split ? "gate" : "gate_up", split ? "up" : "down", "down"};
    for (size_t i = 0; i < matrices_.size(); ++i) check_matrix(kOp, names[i], matrices_[i]);
    const int64_t rows = (split ? 1 : 2) * intermediate_size();
    for (size_t i = 0; i + 1 < matrices_.size(); ++i) {
        check_equal(kOp, (std::string("rows of ") + names[i]).c_str(), rows, matrices_[i].rows);
        check_equal(kOp, (std::string("columns of ") + names[i]).c_str(), hidden_size(), matrices_[i].cols);
    }
}

void ExpertKernel::check_pairs(const ExpertPairs& pairs, int64_t num_tokens) const {
    for (int64_t i = 0; i < pairs.num_experts; ++i) {
        check(pairs.expert_ids[i] >= 0 && pairs.expert_ids[i] < num_experts_, kOp,
              range_error("expert_ids", i, num_experts_, pairs.expert_ids[i]));
        check(pairs.pair_offsets[i] <= pairs.pair_offsets[i + 1], kOp, "pair_offsets must not decrease");
        for (int64_t m = 0; m < num_matrices(); ++m)
            check(pairs.addresses[i * num_matrices() + m] != 0, kOp,
                  "addresses[" + std::to_string(i) + ", " + std::to_string(m) + "] is null");
    }
    check_equal(kOp, "pair_offsets[0]", 0, pairs.pair_offsets[0]);
    check_equal(kOp, "last of pair_offsets", pairs.num_pairs, pairs.pair_offsets[pairs.num_experts]);
    for (int64_t p = 0; p < pairs.num_pairs; ++p)
        check(pairs.pair_tokens[p] >= 0 && pairs.pair_tokens[p] < num_tokens, kOp,
              range_error("pair_tokens", p, num_tokens, pairs.pair_tokens[p]));
}

void ExpertKernel::rows(const float* hidden, int64_t num_tokens, const ExpertPairs& pairs, float* out) const {
    check_pairs(pairs, num_tokens);
    ThreadPool::Operation operation(ThreadPool::instance());
    const Activations inputs = prepare_inputs(hidden, num_tokens, hidden_size(), quantizes_inputs(), pairs);
    compute_rows(inputs, pairs, out);
}

void ExpertKernel::sum(const float* hidden, int64_t num_tokens, const ExpertPairs& pairs,
                       const float* pair_weights, float* out) const {
    check_pairs(pairs, num_tokens);
    ThreadPool::Operation operation(ThreadPool::instance());
    const Activations inputs = prepare_inputs(hidden, num_tokens, hidden_size(), quantizes_inputs(), pairs);
    for (int64_t begin = 0, end; begin < pairs.num_experts; begin = end) {
        const int32_t first = pairs.pair_offsets[begin];
        for (end = begin + 1; end < pairs.num_experts; ++end)
            if (pairs.pair_offsets[end + 1] - first > kPairsPerGroup) break;
        const ExpertPairs group = group_of(pairs, begin, end, num_matrices(), group_offsets);
        if (group.num_pairs > kFewPairs) {
            sum_many(inputs, group, pair_weights + first, out);
            continue;
        }
        float* rows = at_least(pair_rows, group.num_pairs * hidden_size());
        compute_rows(inputs, group, rows);
        weighted_sum(out, num_tokens, hidden_size(), rows, group.pair_tokens, pair_weights + first,
                     group.num_pairs);
    }
}

bool ExpertKernel::quantizes_inputs() const {
    bool quantized = false;
    for (size_t i = 0; i + 1 < matrices_.size(); ++i) quantized |= !is_float(matrices_[i].type);
    return quantized;
}

// The caller holds the pool.
void ExpertKernel::compute_rows(const Activations& inputs, const ExpertPairs& pairs, float* out) const {
    const Step step = compute_hidden(inputs, pairs);
    const int64_t row_tiles = ceil_div(hidden_size(), kRowTile);
    ThreadPool::instance().run(pairs.num_experts * row_tiles, [&](int64_t chunk) {
        const int64_t expert = chunk / row_tiles, row = chunk % row_tiles * kRowTile;
        const int32_t begin = pairs.pair_offsets[expert], end = pairs.pair_offsets[expert + 1];
        const uint8_t* next = nullptr;
        if (row + kRowTile >= hidden_size() && expert + 1 < pairs.num_experts)
            next = step.weights(expert + 1, num_matrices() - 1, num_matrices());
        down_rows(step, expert, row, begin, end, next, out + begin * hidden_size() + row, hidden_size());
    });
}

// Columns of ``out`` are shared out, so that each element sees its pairs in order.
void ExpertKernel::sum_many(const Activations& inputs, const ExpertPairs& pairs, const float* pair_weights,
                            float* out) const {
    const Step step = compute_hidden(inputs, pairs);
    ThreadPool::instance().run(ceil_div(hidden_size(), kRowTile), [&](int64_t chunk) {
        for (int64_t expert = 0; expert < pairs.num_experts; ++expert)
            add_down_rows(step, expert, chunk * kRowTile, pair_weights, out);
    });
}

// h = act(gate_up(x)) of every pair, and what down reads of it.
ExpertKernel::Step ExpertKernel::compute_hidden(const Activations& inputs, const ExpertPairs& pairs) const {
    ThreadPool& pool = ThreadPool::instance();
    const int64_t num_units = intermediate_size();
    Step step{pairs, inputs, {}, at_least(intermediate, pairs.num_pairs * num_units), nullptr, nullptr};
    const bool down_quantized = !is_float(matrices_.back().type);
    if (pairs.num_pairs * 2 * num_units <= kMaxRawGateUp) {
        step.down_inputs = down_inputs.reserve(step.h, pairs.num_pairs, num_units, down_quantized);
        stream_gate_up(step);
        step.down_inputs.version = ActivationBuffer::next_version();
        return step;
    }
    const int64_t unit_tiles = ceil_div(num_units, kUnitTile);
    pool.run(pairs.num_experts * unit_tiles,
             [&](int64_t chunk) { gate_up_units(step, chunk / unit_tiles, chunk % unit_tiles * kUnitTile); });
    step.down_inputs = down_inputs.prepare(kernels(), step.h, pairs.num_pairs, num_units, down_quantized);
    return step;
}

// Few pairs: the bytes set the pace, and they come fastest in the order of addresses. All of gate, then
// all of up; whoever computes an expert's last row tile goes on to its activation.
void ExpertKernel::stream_gate_up(Step& step) const {
    const int64_t num_experts = step.pairs.num_experts, num_gate_up = num_matrices() - 1;
    const int64_t tiles_of_matrix = ceil_div(matrices_[0].rows, kRowTile);  // gate and up have as many rows
    const int64_t tiles_of_expert = num_gate_up * tiles_of_matrix;
    step.gate_up = at_least(raw_gate_up, step.pairs.num_pairs * 2 * intermediate_size());
    tiles_to_do.assign(num_experts, int32_t(tiles_of_expert));
    step.tiles_to_do = tiles_to_do.data();
    ThreadPool::instance().run(num_experts * tiles_of_expert, [&](int64_t chunk) {
        const int64_t expert = chunk / tiles_of_expert, tile = chunk % tiles_of_expert;
        gate_up_rows(step, expert, tile / tiles_of_matrix, tile % tiles_of_matrix * kRowTile);
        std::atomic_ref<int32_t> left(step.tiles_to_do[expert]);
        if (left.fetch_sub(1, std::memory_order_acq_rel) == 1) activate_expert(step, expert);
    });
}

}  // namespace moe
