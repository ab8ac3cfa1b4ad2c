// moe_offload/_cuda.so without CUDA: the same sources over stand-ins for the runtime and the grid. And its
// kernels one by one: tests/test_cuda_kernels.py holds their rows to csrc/cpu's bits.
#include <cstdint>
#include <vector>

#include "cuda/attention_kernels.cu"
#include "cuda/block_kernels.cu"
#include "cuda/cuda_dense.cu"
#include "cuda/cuda_device.cu"
#include "cuda/cuda_link.cu"
#include "cuda/dense_kernels.cu"
#include "cuda/dense_prompt.cu"
#include "cuda/expert_rows.cu"
#include "cuda/float_kernels.cu"
#include "cuda/kernels.cu"
#include "cuda/library.cu"
#include "cuda/measure.cu"
#include "cuda/routing_kernels.cu"
#include "cuda/superblock_kernels.cu"

using namespace moe::cuda;

namespace {

struct Packed {
    std::vector<int8_t> q;
    std::vector<float> d;
    std::vector<int16_t> sums;
};

Inputs quantized(const float* x, int64_t num_rows, int64_t cols, Packed& to) {
    const int64_t padded = padded_cols(cols);
    to.q.assign(num_rows * padded, 99);  // what a kernel forgets to write shows
    to.d.assign(num_rows * padded / 32, 1e9f);
    to.sums.assign(num_rows * padded / 16, 9999);
    const Inputs inputs{x, to.q.data(), to.d.data(), to.sums.data(), cols};
    launch_quantize(inputs, num_rows, nullptr);
    return inputs;
}

}  // namespace

// out (num_pairs, rows) of one matrix, or of gate and up; pair p reads row input_rows[p] of x. Returns the
// error of the launch, or -1 for a type without a kernel.
extern "C" __attribute__((visibility("default"))) int cuda_rows(
    int type, int transposed, const uint8_t* weights, const uint8_t* up, const float* bias,
    const float* up_bias, const float* x, int64_t num_inputs, const int32_t* input_rows, int32_t num_pairs,
    int64_t rows, int64_t cols, int is_gate_up, int row_order, int activation, float alpha, float limit,
    int with_tensor_cores, float* out) {
    tiles_on = with_tensor_cores != 0;
    if (!has_kernel(type, transposed != 0)) return -1;
    Packed packed;
    const int at_once = choose_tile(type, transposed != 0, num_pairs);
    std::vector<Tile> tiles;
    for (int32_t first = 0; first < num_pairs; first += at_once)
        tiles.push_back({weights, up, bias, up_bias, first, std::min(at_once, num_pairs - first)});
    const MatrixLaunch launch{type,
                              transposed != 0,
                              is_gate_up != 0,
                              rows,
                              quantized(x, num_inputs, cols, packed),
                              input_rows,
                              out,
                              RowOrder(row_order),
                              {ActivationKind(activation), alpha, limit},
                              tiles.data(),
                              int(tiles.size()),
                              at_once};
    const int error = launch_rows(launch, nullptr);
    cudaStreamSynchronize(nullptr);
    return error;
}

extern "C" __attribute__((visibility("default"))) int64_t cuda_graphs_launched() {
    return stand_in::graphs_launched;
}

// The copy behind ``after`` others fails.
extern "C" __attribute__((visibility("default"))) void cuda_fail_copy(int64_t after) {
    stand_in::copies_left = after;
}

// Whether streams can be made; returns how many pieces of the card's memory are held.
extern "C" __attribute__((visibility("default"))) int64_t cuda_fail_streams(int fail) {
    stand_in::fail_streams = fail != 0;
    return stand_in::num_allocated;
}
