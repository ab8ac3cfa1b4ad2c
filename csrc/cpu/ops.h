// The operations that Python sees, on raw pointers; each holds the thread pool while it runs. A native
// caller of several holds a ThreadPool::Operation around them.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace moe {

struct Matrix {
    int type;  // GgmlType
    int64_t rows, cols;
    bool transposed;  // stored (cols, rows); float types only
};

// out[t] = weight @ x[t] + bias
void linear(const float* x,  // (num_tokens, cols)
            int64_t num_tokens,
            const uint8_t* weight,  // rows * row_bytes bytes, aligned to nothing
            int64_t weight_bytes, const Matrix& matrix,
            const float* bias,  // (rows,) or nullptr
            float* out);        // (num_tokens, rows)

// One of several matrices that multiply the same activations.
struct LinearPart {
    const uint8_t* weight;
    int64_t weight_bytes;
    Matrix matrix;
    const float* bias;  // (rows,) or nullptr
    float* out;         // (num_tokens, rows)
};

// linear() of each part; the activations are quantized once and the pool starts once.
void linears(const float* x,  // (num_tokens, cols), the same cols for every part
             int64_t num_tokens, const LinearPart* parts, int64_t num_parts);

// out[i] = dequantized row ids[i]; the bits are gguf-py's
void embedding_rows(const int64_t* ids, int64_t num_ids, const uint8_t* weight, int64_t weight_bytes,
                    const Matrix& matrix,
                    float* out);  // (num_ids, cols)

// out[pair_tokens[p]] += weights[p] * rows[p], p ascending, two roundings
void weighted_sum(float* out, int64_t num_tokens, int64_t hidden_size,  // (num_tokens, hidden_size)
                  const float* rows,                                    // (num_pairs, hidden_size)
                  const int32_t* pair_tokens, const float* pair_weights, int64_t num_pairs);

// Bytes per second that the pool's threads read together, in whole MiB of ``data``
double read_bandwidth(const uint8_t* data, int64_t num_bytes);

enum class RowOrder : int { GATE_UP = 0, INTERLEAVED = 1, SPLIT = 2 };

// The (token, expert) pairs of a step, grouped by expert.
struct ExpertPairs {
    const int32_t* expert_ids;    // (num_experts,)
    const uint64_t* addresses;    // (num_experts, num_matrices)
    const int32_t* pair_offsets;  // (num_experts + 1,): pairs of expert i are [i], [i + 1]
    const int32_t* pair_tokens;   // (num_pairs,)
    int64_t num_experts, num_pairs;
};

// down(act(gate x) * up x) of one layer's experts.
class ExpertKernel {
  public:
    ExpertKernel(std::vector<Matrix> matrices,  // gate_up | gate, up; then down
                 RowOrder row_order, int64_t num_experts, Activation activation,
                 const float* gate_up_bias,  // (num_experts, 2 * intermediate) in stored order, or nullptr
                 const float* down_bias);    // (num_experts, hidden_size), or nullptr

    void rows(const float* hidden, int64_t num_tokens,  // (num_tokens, hidden_size)
              const ExpertPairs& pairs,
              float* out) const;  // (num_pairs, hidden_size)

    // out[pair_tokens[p]] += pair_weights[p] * row of pair p, p ascending, two roundings: the bits of
    // rows() and weighted_sum(). Experts in the order given, which the caller makes ascending.
    void sum(const float* hidden, int64_t num_tokens, const ExpertPairs& pairs,
             const float* pair_weights,  // (num_pairs,)
             float* out) const;          // (num_tokens, hidden_size)

    const std::vector<Matrix>& matrices() const { return matrices_; }
    RowOrder row_order() const { return row_order_; }
    const Activation& activation() const { return activation_; }
    const float* gate_up_bias() const { return gate_up_bias_; }
    const float* down_bias() const { return down_bias_; }
    int64_t num_experts() const { return num_experts_; }
    int64_t num_matrices() const { return int64_t(matrices_.size()); }
    int64_t hidden_size() const { return matrices_.back().rows; }
    int64_t intermediate_size() const { return matrices_.back().cols; }

  private:
    struct Step;
    void check_pairs(const ExpertPairs& pairs, int64_t num_tokens) const;
    bool quantizes_inputs() const;
    void compute_rows(const Activations& inputs, const ExpertPairs& pairs, float* out) const;
    void sum_many(const Activations& inputs, const ExpertPairs& pairs, const float* pair_weights,
                  float* out) const;
    Step compute_hidden(const Activations& inputs, const ExpertPairs& pairs) const;
    void stream_gate_up(Step& step) const;
    void gate_up_rows(const Step& step, int64_t expert, int64_t m, int64_t first_row) const;
    void activate_expert(const Step& step, int64_t expert) const;
    void gate_up_units(const Step& step, int64_t expert, int64_t first_unit) const;
    void down_rows(const Step& step, int64_t expert, int64_t first_row, int32_t begin, int32_t end,
                   const uint8_t* next, float* out, int64_t out_stride) const;
    void add_down_rows(const Step& step, int64_t expert, int64_t first_row, const float* pair_weights,
                       float* out) const;

    std::vector<Matrix> matrices_;
    RowOrder row_order_;
    int64_t num_experts_;
    Activation activation_;
    const float *gate_up_bias_, *down_bias_;
};

}  // namespace moe
