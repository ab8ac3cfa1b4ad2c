#include <algorithm>
#include <cstring>

#include "cuda/expert_rows.h"

namespace moe::cuda {

namespace {

Activation activation_of(const ExpertKernel& kernel) {
    const moe::Activation& a = kernel.activation();
    return {ActivationKind(int(a.kind)), a.alpha, a.limit};
}

// Whether gate and up are computed, and combined, by one launch.
bool is_fused(const ExpertKernel& kernel) {
    const std::vector<Matrix>& m = kernel.matrices();
    return m.size() == 2 || (m[0].type == m[1].type && m[0].transposed == m[1].transposed);
}

// The tiles of a matrix: `bias` and `up_bias` begin with expert 0's, which have `bias_rows` each.
struct TileSource {
    int64_t matrix, up;  // which of an expert's addresses; up: -1 for none
    const float *bias, *up_bias;
    int64_t bias_rows;
};

void append_tiles(const TileSource& source, const ExpertPairs& pairs, int64_t num_matrices, int at_once,
                  std::vector<Tile>& tiles) {
    for (int64_t e = 0; e < pairs.num_experts; ++e) {
        const uint64_t* addresses = pairs.addresses + e * num_matrices;
        const int64_t skip = pairs.expert_ids[e] * source.bias_rows;
        Tile tile{reinterpret_cast<const uint8_t*>(addresses[source.matrix]),
                  source.up < 0 ? nullptr : reinterpret_cast<const uint8_t*>(addresses[source.up]),
                  source.bias ? source.bias + skip : nullptr,
                  source.up_bias ? source.up_bias + skip : nullptr,
                  0,
                  0};
        for (int32_t first = pairs.pair_offsets[e]; first < pairs.pair_offsets[e + 1]; first += at_once) {
            tile.first_pair = first;
            tile.num_pairs = std::min(at_once, pairs.pair_offsets[e + 1] - first);
            tiles.push_back(tile);
        }
    }
}

}  // namespace

bool CudaKernel::reads_packed() const {
    const std::vector<Matrix>& m = of.matrices();
    return !is_float(m[0].type) || !is_float(m[m.size() - 2].type);
}

Inputs PackedInputs::inputs(int64_t num_rows, int64_t cols) {
    auto* packed = packed_.at_least<float>(num_rows * packed_input_bytes(cols) / int64_t(sizeof(float)) + 1);
    return packed_inputs(rows_.at_least<float>(num_rows * cols), packed, num_rows, cols);
}

// On the device.
struct ExpertRows::Tables {
    const Tile *gate, *up, *down;
    int num_gate, num_up, num_down;
    int gate_at_once, up_at_once, down_at_once;
    const int32_t* pair_tokens;
};

ExpertRows::Tables ExpertRows::upload_tables(const CudaKernel& kernel, const ExpertPairs& pairs) {
    const ExpertKernel& of = kernel.of;
    const std::vector<Matrix>& m = of.matrices();
    const int64_t num_matrices = of.num_matrices(), units = of.intermediate_size();
    const bool fused = is_fused(of), split = num_matrices == 3;
    const float* gate_bias = kernel.gate_up_bias;
    const float* up_bias = gate_bias ? gate_bias + units : nullptr;
    int most = 0;
    for (int64_t e = 0; e < pairs.num_experts; ++e)
        most = std::max(most, pairs.pair_offsets[e + 1] - pairs.pair_offsets[e]);
    const auto at_once = [&](const Matrix& matrix) {
        return choose_tile(matrix.type, matrix.transposed, most);
    };
    Tables t{};
    t.gate_at_once = at_once(m[0]), t.up_at_once = at_once(m[split ? 1 : 0]),
    t.down_at_once = at_once(m.back());
    std::vector<Tile> tiles;
    append_tiles({0, fused && split ? 1 : -1, gate_bias, up_bias, 2 * units}, pairs, num_matrices,
                 t.gate_at_once, tiles);
    t.num_gate = int(tiles.size());
    if (!fused) append_tiles({1, -1, up_bias, nullptr, 2 * units}, pairs, num_matrices, t.up_at_once, tiles);
    t.num_up = int(tiles.size()) - t.num_gate;
    append_tiles({num_matrices - 1, -1, kernel.down_bias, nullptr, of.hidden_size()}, pairs, num_matrices,
                 t.down_at_once, tiles);
    t.num_down = int(tiles.size()) - t.num_gate - t.num_up;

    const int64_t tile_bytes = int64_t(tiles.size() * sizeof(Tile));
    const int64_t num_bytes = (tile_bytes + pairs.num_pairs * int64_t(sizeof(int32_t)) + 15) / 16 * 16;
    if (used_bytes_ + num_bytes > tables_.num_bytes()) {
        must(cudaStreamSynchronize(stream_), "a launch");
        used_bytes_ = 0;
    }
    const int64_t room = std::max(num_bytes, table_bytes_);
    std::byte* host = host_tables_.at_least<std::byte>(room) + used_bytes_;
    std::byte* device = tables_.at_least<std::byte>(room) + used_bytes_;
    used_bytes_ += num_bytes;
    std::memcpy(host, tiles.data(), size_t(tile_bytes));
    std::memcpy(host + tile_bytes, pairs.pair_tokens, size_t(pairs.num_pairs) * sizeof(int32_t));
    must(launch_fetch(device, host, num_bytes, stream_), "a launch's tables");
    t.gate = reinterpret_cast<const Tile*>(device);
    t.up = t.gate + t.num_gate;
    t.down = t.up + t.num_up;
    t.pair_tokens = reinterpret_cast<const int32_t*>(device + tile_bytes);
    return t;
}

void ExpertRows::compute(const CudaKernel& kernel, const Inputs& inputs, const ExpertPairs& pairs,
                         float* out) {
    const ExpertKernel& of = kernel.of;
    const std::vector<Matrix>& m = of.matrices();
    const int64_t units = of.intermediate_size(), hidden_size = of.hidden_size();
    const bool fused = is_fused(of);
    const Tables t = upload_tables(kernel, pairs);
    float* h = intermediate_.reserve(pairs.num_pairs, units);

    const RowOrder order = RowOrder(int(of.row_order()));
    MatrixLaunch launch{m[0].type, m[0].transposed,   fused,  units,      inputs,        t.pair_tokens, h,
                        order,     activation_of(of), t.gate, t.num_gate, t.gate_at_once};
    if (!fused) launch.out = gate_.at_least<float>(pairs.num_pairs * units);
    must(launch_rows(launch, stream_), "gate and up");
    if (!fused) {
        const float* gate = launch.out;
        launch.ggml_type = m[1].type, launch.transposed = m[1].transposed;
        launch.out = up_.at_least<float>(pairs.num_pairs * units);
        launch.tiles = t.up, launch.num_tiles = t.num_up, launch.tokens_per_tile = t.up_at_once;
        must(launch_rows(launch, stream_), "up");
        must(launch_activate(launch.activation, gate, launch.out, pairs.num_pairs * units, h, stream_),
             "activation");
    }
    const Inputs down = intermediate_.inputs(pairs.num_pairs, units);
    if (!is_float(m.back().type)) must(launch_quantize(down, pairs.num_pairs, stream_), "intermediate");
    launch = {m.back().type, m.back().transposed, false,  hidden_size, down,          nullptr, out,
              order,         launch.activation,   t.down, t.num_down,  t.down_at_once};
    must(launch_rows(launch, stream_), "down");
}

}  // namespace moe::cuda
