// Which kernel computes what. Tile sizes and launch bounds are chosen by reasoning; bench/gpu.py measures.
#include <algorithm>

#include "cuda/activations.h"
#include "cuda/kernel_table.h"
#include "cuda/tile_rows.h"

namespace moe::cuda {
namespace {

constexpr int kUnknownType = 1;  // cudaErrorInvalidValue
constexpr int kMaxTiles = 65535;

Kernels kernels_of(int ggml_type) {
    for (const auto family : {block_kernels, superblock_kernels, float_kernels})
        if (const Kernels kernels = family(ggml_type); kernels.one) return kernels;
    return {};
}

unsigned ceil_div(int64_t a, int64_t b) {
    return unsigned((a + b - 1) / b);
}

}  // namespace

bool has_kernel(int ggml_type, bool transposed) {
    const Kernels kernels = kernels_of(ggml_type);
    return (transposed ? kernels.transposed : kernels.one) != nullptr;
}

int choose_tile(int ggml_type, bool transposed, int most_pairs) {
    if (transposed || most_pairs <= 1) return 1;
    const Kernels kernels = kernels_of(ggml_type);
    const bool tiles = kernels.many_tiles && has_tiles(kernels.many_tiles);
    return tiles && most_pairs > kFewTokens ? kManyTokens : kFewTokens;
}

int launch_quantize(const Inputs& inputs, int64_t num_rows, CUstream_st* stream) {
    const QuantizeLaunch launch{inputs, num_rows};
    const int64_t blocks = padded_cols(inputs.cols) / 32 * num_rows;
    if (blocks == 0) return 0;
    return start(quantize_kernel<0>, dim3(ceil_div(blocks, kWarps)), kThreads, stream, launch);
}

int launch_activate(const Activation& activation, const float* gate, const float* up, int64_t n, float* out,
                    CUstream_st* stream) {
    const ActivateLaunch launch{activation, gate, up, n, out};
    return n == 0 ? 0 : start(activate_kernel<0>, dim3(ceil_div(n, kThreads)), kThreads, stream, launch);
}

int launch_fetch(void* to, const void* from, int64_t num_bytes, CUstream_st* stream) {
    const int64_t words = (num_bytes + 15) / 16;
    const FetchLaunch launch{static_cast<Word16*>(to), static_cast<const Word16*>(from), words};
    return words == 0 ? 0 : start(fetch_kernel<0>, dim3(ceil_div(words, kThreads)), kThreads, stream, launch);
}

int launch_rows(const MatrixLaunch& launch, CUstream_st* stream) {
    if (launch.num_tiles == 0 || launch.rows == 0) return 0;
    const Kernels kernels = kernels_of(launch.ggml_type);
    if (!has_kernel(launch.ggml_type, launch.transposed)) return kUnknownType;
    const int64_t pairs = launch.is_gate_up ? launch.rows : (launch.rows + 1) / 2;
    const auto run = [&](Kernel kernel, int64_t pairs_per_block) {
        MatrixLaunch part = launch;  // a grid has so many tiles at most
        for (int begin = 0; begin < launch.num_tiles; begin += kMaxTiles) {
            part.tiles = launch.tiles + begin;
            const dim3 grid(ceil_div(pairs, pairs_per_block), std::min(kMaxTiles, launch.num_tiles - begin));
            if (const int error = start(kernel, grid, kThreads, stream, part)) return error;
        }
        return 0;
    };
    if (launch.transposed) return run(kernels.transposed, kThreads);
    const bool is_float = kernels.many_tiles == nullptr;
    if (is_float) return run(launch.tokens_per_tile == 1 ? kernels.one : kernels.few, 2 * kWarps);
    if (launch.tokens_per_tile == 1) return run(kernels.one, kWarps);
    if (launch.tokens_per_tile == kManyTokens) return run(kernels.many_tiles, kTileRows / 2);
    return has_tiles(kernels.few_tiles) ? run(kernels.few_tiles, kTileRows / 2) : run(kernels.few, kWarps);
}

}  // namespace moe::cuda
