// What bench/gpu.py asks of a card: the ceilings (memory, link), and the time of matrix launches by events.
#include <algorithm>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/library.h"
#include "cuda/runtime.h"

namespace moe::cuda {
namespace {

// Median seconds of `run` on a stream, after two that are not counted.
template <class Run>
double median_seconds(int times, const Run& run) {
    Stream stream;
    Event begin(cudaEventDefault), end(cudaEventDefault);
    std::vector<double> seconds;
    for (int i = 0; i < times + 2; ++i) {
        begin.record(stream);
        run(static_cast<cudaStream_t>(stream), i);
        end.record(stream);
        end.wait("a measurement");
        if (i >= 2) seconds.push_back(end.seconds_since(begin));
    }
    std::nth_element(seconds.begin(), seconds.begin() + times / 2, seconds.end());
    return seconds[times / 2];
}

// Experts' matrices one after the other, in sets that together are larger than the cache.
double matrix_seconds(const MatrixMeasurement& what) {
    const int64_t experts = what.num_experts, pairs = experts * what.pairs_per_expert;
    const int64_t weight_bytes = what.row_bytes * what.rows * (what.is_gate_up ? 2 : 1);
    const int64_t stride = (weight_bytes + 255) / 256 * 256 + 256;
    GrowingMemory weights, x, packed, out, tables;
    auto* w = weights.at_least<uint8_t>(what.num_sets * experts * stride);
    // Bytes 0x11 are finite scales and codes other than zero in every format.
    must(cudaMemset(w, 0x11, size_t(what.num_sets * experts * stride)), "weights");
    auto* inputs = x.at_least<float>(pairs * what.cols);
    std::vector<float> values(size_t(pairs * what.cols));
    for (size_t i = 0; i < values.size(); ++i)
        values[i] = float(int(i * 2654435761u >> 20) % 1000 - 500) * 1e-3f;
    must(cudaMemcpy(inputs, values.data(), values.size() * sizeof(float), cudaMemcpyHostToDevice), "inputs");
    auto* d = packed.at_least<float>(pairs * packed_input_bytes(what.cols) / 4 + 1);
    auto* sums = reinterpret_cast<int16_t*>(d + pairs * padded_cols(what.cols) / 32);
    auto* q = reinterpret_cast<int8_t*>(sums + pairs * padded_cols(what.cols) / 16);
    const Inputs in{inputs, q, d, sums, what.cols};
    const int at_once = choose_tile(what.ggml_type, false, what.pairs_per_expert);
    std::vector<Tile> tiles;
    for (int64_t i = 0; i < what.num_sets * experts; ++i)
        for (int first = 0; first < what.pairs_per_expert; first += at_once)
            tiles.push_back({w + i * stride, nullptr, nullptr, nullptr,
                             int32_t(i % experts * what.pairs_per_expert + first),
                             std::min(at_once, what.pairs_per_expert - first)});
    auto* table = tables.at_least<Tile>(int64_t(tiles.size()));
    must(cudaMemcpy(table, tiles.data(), tiles.size() * sizeof(Tile), cudaMemcpyHostToDevice), "tables");
    const int per_set = int(tiles.size()) / what.num_sets;
    MatrixLaunch launch{what.ggml_type,
                        false,
                        what.is_gate_up != 0,
                        what.rows,
                        in,
                        nullptr,
                        out.at_least<float>(pairs * what.rows),
                        RowOrder::GATE_UP,
                        {ActivationKind::SILU, 0, 0},
                        table,
                        per_set,
                        at_once};
    must(launch_quantize(in, pairs, nullptr), "inputs");
    must(cudaDeviceSynchronize(), "inputs");
    // All sets between two events: one launch can be shorter than what events and its beginning take.
    const double seconds = median_seconds(what.times, [&](cudaStream_t stream, int) {
        for (int set = 0; set < what.num_sets; ++set) {
            launch.tiles = table + set * per_set;
            must(launch_rows(launch, stream), "a launch");
        }
    });
    return seconds / what.num_sets;
}

double memory_seconds(int64_t num_bytes) {
    GrowingMemory from, to;
    const auto *a = from.at_least<std::byte>(num_bytes), *b = to.at_least<std::byte>(num_bytes);
    return median_seconds(9, [&](cudaStream_t stream, int) {
        must(cudaMemcpyAsync(const_cast<std::byte*>(b), a, size_t(num_bytes), cudaMemcpyDeviceToDevice,
                             stream),
             "a copy");
    });
}

double link_seconds(int64_t num_bytes) {
    GrowingMemory from(true), to;
    const auto* a = from.at_least<std::byte>(num_bytes);
    auto* b = to.at_least<std::byte>(num_bytes);
    return median_seconds(9, [&](cudaStream_t stream, int) {
        must(cudaMemcpyAsync(b, a, size_t(num_bytes), cudaMemcpyHostToDevice, stream), "a copy");
    });
}

template <class Measure>
double or_minus_one(int device, const Measure& measure) {
    try {
        must(cudaSetDevice(device), "the GPU");
        return measure();
    } catch (const std::exception&) {
        return -1;
    }
}

}  // namespace
}  // namespace moe::cuda

extern "C" MOE_EXPORT double moe_offload_cuda_matrix_seconds(int device, const MatrixMeasurement* what) {
    return moe::cuda::or_minus_one(device, [&] { return moe::cuda::matrix_seconds(*what); });
}

extern "C" MOE_EXPORT double moe_offload_cuda_memory_seconds(int device, int64_t num_bytes) {
    return moe::cuda::or_minus_one(device, [&] { return moe::cuda::memory_seconds(num_bytes); });
}

extern "C" MOE_EXPORT double moe_offload_cuda_link_seconds(int device, int64_t num_bytes) {
    return moe::cuda::or_minus_one(device, [&] { return moe::cuda::link_seconds(num_bytes); });
}
