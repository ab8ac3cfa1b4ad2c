#include <algorithm>
#include <cstring>

#include "cuda/cuda_dense.h"
#include "cuda/cuda_device.h"
#include "cuda/library.h"

namespace moe::cuda {

namespace {

constexpr int64_t kTableBytes = 1 << 20;  // of a launch's tables before its calls wait for each other

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

Inputs PackedInputs::inputs(int64_t num_rows, int64_t cols) {
    const int64_t padded = padded_cols(cols);
    auto* d = packed_.at_least<float>(num_rows * packed_input_bytes(cols) / int64_t(sizeof(float)) + 1);
    auto* sums = reinterpret_cast<int16_t*>(d + num_rows * padded / 32);
    return {rows_.at_least<float>(num_rows * cols), reinterpret_cast<int8_t*>(sums + num_rows * padded / 16),
            d, sums, cols};
}

CudaInputs::~CudaInputs() {
    std::lock_guard lock(pool->mutex);
    pool->free.push_back(std::move(buffer));
}

// What the compute thread works with.
struct CudaDevice::Buffers {
    Stream stream;
    GrowingMemory host_tables{true}, tables;
    int64_t used_bytes = 0;  // of both, by calls that may not be finished
    PackedInputs intermediate;
    GrowingMemory gate, up;  // (num_pairs, intermediate_size) where they are of two formats
    GrowingMemory rows;      // (total_pairs, hidden_size)
    GrowingMemory host_rows{true};
    Event computed;
};

// On the device.
struct CudaDevice::Tables {
    const Tile *gate, *up, *down;
    int num_gate, num_up, num_down;
    int gate_at_once, up_at_once, down_at_once;
    const int32_t* pair_tokens;
};

CudaDevice::CudaDevice(int index, int64_t vram_bytes) : index_(index), num_bytes_(vram_bytes) {
    use();
    cudaDeviceProp properties;
    must(cudaGetDeviceProperties(&properties, index), "the GPU");
    name_ = properties.name;
    must(cudaMalloc(&memory_, size_t((vram_bytes + 255) / 256 * 256 + 256)), "memory for slots");
    to_device_ = std::make_shared<CudaLink>(index, Direction::kToDevice, pinned_);
    to_host_ = std::make_shared<CudaLink>(index, Direction::kToHost, pinned_);
    buffers_ = std::make_unique<Buffers>();
}

void CudaDevice::use() const {
    must(cudaSetDevice(index_), "the GPU");
}

bool CudaDevice::has_kernel(const ExpertKernel& kernel) const {
    return std::ranges::all_of(kernel.matrices(),
                               [](const Matrix& m) { return cuda::has_kernel(m.type, m.transposed); });
}

std::unique_ptr<DeviceKernel> CudaDevice::make_kernel(const ExpertKernel& kernel) {
    use();
    auto made = std::make_unique<CudaKernel>(kernel);
    const int64_t gate_up = kernel.gate_up_bias() ? kernel.num_experts() * 2 * kernel.intermediate_size() : 0;
    const int64_t down = kernel.down_bias() ? kernel.num_experts() * kernel.hidden_size() : 0;
    if (gate_up + down == 0) return made;
    float* biases = made->biases.at_least<float>(gate_up + down);
    const auto upload = [](float* to, const float* from, int64_t count) {
        must(cudaMemcpy(to, from, size_t(count) * sizeof(float), cudaMemcpyHostToDevice), "biases");
    };
    if (gate_up) upload(biases, kernel.gate_up_bias(), gate_up);
    if (down) upload(biases + gate_up, kernel.down_bias(), down);
    made->gate_up_bias = gate_up ? biases : nullptr;
    made->down_bias = down ? biases + gate_up : nullptr;
    return made;
}

bool CudaDevice::has_matrix(int ggml_type) const {
    return cuda::has_kernel(ggml_type, false);
}

std::unique_ptr<DenseStep> CudaDevice::make_dense(const DenseParts& parts) {
    return std::make_unique<CudaDense>(index_, parts);
}

std::shared_ptr<DeviceInputs> CudaDevice::upload(const float* hidden, int64_t num_tokens,
                                                 int64_t hidden_size) {
    use();
    std::unique_ptr<UploadBuffer> buffer;
    {
        std::lock_guard lock(uploads_->mutex);
        if (!uploads_->free.empty()) {
            buffer = std::move(uploads_->free.back());
            uploads_->free.pop_back();
        }
    }
    if (!buffer) buffer = std::make_unique<UploadBuffer>();
    buffer->fetched.wait("inputs");
    std::memcpy(buffer->host.at_least<float>(num_tokens * hidden_size), hidden,
                size_t(num_tokens * hidden_size) * sizeof(float));
    buffer->num_rows = num_tokens, buffer->cols = hidden_size;
    buffer->is_fetched = buffer->is_packed = false;
    return std::make_shared<CudaInputs>(uploads_, std::move(buffer));
}

// Brings an upload to the device at its first use, and packs it when packed weights first read it.
Inputs CudaDevice::fetch(UploadBuffer& upload, bool packed) {
    const int64_t count = upload.num_rows * upload.cols;
    if (!upload.is_fetched) {
        float* to = upload.device.reserve(upload.num_rows, upload.cols);
        must(launch_fetch(to, upload.host.at_least<float>(count), count * int64_t(sizeof(float)),
                          buffers_->stream),
             "inputs");
        upload.fetched.record(buffers_->stream);
        upload.is_fetched = true;
    }
    const Inputs inputs = upload.device.inputs(upload.num_rows, upload.cols);
    if (packed && !upload.is_packed) {
        must(launch_quantize(inputs, upload.num_rows, buffers_->stream), "inputs");
        upload.is_packed = true;
    }
    return inputs;
}

CudaDevice::Tables CudaDevice::upload_tables(const CudaKernel& kernel, const ExpertPairs& pairs) {
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
    Buffers& b = *buffers_;
    if (b.used_bytes + num_bytes > b.tables.num_bytes()) {
        must(cudaStreamSynchronize(b.stream), "a launch");
        b.used_bytes = 0;
    }
    const int64_t room = std::max(num_bytes, kTableBytes);
    std::byte* host = b.host_tables.at_least<std::byte>(room) + b.used_bytes;
    std::byte* device = b.tables.at_least<std::byte>(room) + b.used_bytes;
    b.used_bytes += num_bytes;
    std::memcpy(host, tiles.data(), size_t(tile_bytes));
    std::memcpy(host + tile_bytes, pairs.pair_tokens, size_t(pairs.num_pairs) * sizeof(int32_t));
    must(launch_fetch(device, host, num_bytes, b.stream), "a launch's tables");
    t.gate = reinterpret_cast<const Tile*>(device);
    t.up = t.gate + t.num_gate;
    t.down = t.up + t.num_up;
    t.pair_tokens = reinterpret_cast<const int32_t*>(device + tile_bytes);
    return t;
}

void CudaDevice::rows(const DeviceKernel& device_kernel, const DeviceInputs& device_inputs,
                      const ExpertPairs& pairs, int64_t first_pair, int64_t total_pairs) {
    use();
    const auto& kernel = static_cast<const CudaKernel&>(device_kernel);
    const ExpertKernel& of = kernel.of;
    const std::vector<Matrix>& m = of.matrices();
    const int64_t units = of.intermediate_size(), hidden_size = of.hidden_size();
    const bool fused = is_fused(of), packed = !is_float(m[0].type) || !is_float(m[m.size() - 2].type);
    Buffers& b = *buffers_;
    float* out = b.rows.at_least<float>(total_pairs * hidden_size) + first_pair * hidden_size;
    if (pairs.num_pairs == 0) return;
    const Inputs inputs = fetch(*static_cast<const CudaInputs&>(device_inputs).buffer, packed);
    const Tables t = upload_tables(kernel, pairs);
    float* h = b.intermediate.reserve(pairs.num_pairs, units);

    const RowOrder order = RowOrder(int(of.row_order()));
    MatrixLaunch launch{m[0].type, m[0].transposed,   fused,  units,      inputs,        t.pair_tokens, h,
                        order,     activation_of(of), t.gate, t.num_gate, t.gate_at_once};
    if (!fused) launch.out = b.gate.at_least<float>(pairs.num_pairs * units);
    must(launch_rows(launch, b.stream), "gate and up");
    if (!fused) {
        const float* gate = launch.out;
        launch.ggml_type = m[1].type, launch.transposed = m[1].transposed;
        launch.out = b.up.at_least<float>(pairs.num_pairs * units);
        launch.tiles = t.up, launch.num_tiles = t.num_up, launch.tokens_per_tile = t.up_at_once;
        must(launch_rows(launch, b.stream), "up");
        must(launch_activate(launch.activation, gate, launch.out, pairs.num_pairs * units, h, b.stream),
             "activation");
    }
    const Inputs down = b.intermediate.inputs(pairs.num_pairs, units);
    if (!is_float(m.back().type)) must(launch_quantize(down, pairs.num_pairs, b.stream), "intermediate");
    launch = {m.back().type, m.back().transposed, false,  hidden_size, down,          nullptr, out,
              order,         launch.activation,   t.down, t.num_down,  t.down_at_once};
    must(launch_rows(launch, b.stream), "down");
}

double CudaDevice::finish(float* rows, int64_t total_pairs, int64_t hidden_size) {
    use();
    Buffers& b = *buffers_;
    const int64_t num_bytes = total_pairs * hidden_size * int64_t(sizeof(float));
    float* host = b.host_rows.at_least<float>(total_pairs * hidden_size);
    b.computed.record(b.stream);
    const double seconds =
        to_host_->bring(host, b.rows.at_least<float>(total_pairs * hidden_size), num_bytes, b.computed);
    b.used_bytes = 0;
    std::memcpy(rows, host, size_t(num_bytes));
    return seconds;
}

void CudaDevice::close() {
    if (!memory_) return;
    cudaSetDevice(index_);
    cudaDeviceSynchronize();
    to_device_->close();
    to_host_->close();
    pinned_->close();
    buffers_.reset();
    {
        std::lock_guard lock(uploads_->mutex);
        uploads_->free.clear();
    }
    cudaFree(memory_);
    memory_ = nullptr;
}

}  // namespace moe::cuda

extern "C" MOE_EXPORT moe::Device* moe_offload_cuda_open(int index, int64_t vram_bytes, char* error,
                                                         int size) {
    try {
        return new moe::cuda::CudaDevice(index, vram_bytes);
    } catch (const std::exception& failure) {
        const std::string text = failure.what();
        if (size > 0) error[text.copy(error, size_t(size - 1))] = '\0';
        return nullptr;
    }
}

extern "C" MOE_EXPORT int moe_offload_cuda_memory(int index, int64_t* free_bytes, int64_t* total_bytes) {
    size_t free = 0, total = 0;
    int code = cudaSetDevice(index);
    if (code == cudaSuccess) code = cudaMemGetInfo(&free, &total);
    *free_bytes = int64_t(free), *total_bytes = int64_t(total);
    return code;
}
