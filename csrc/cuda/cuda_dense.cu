#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cuda/cuda_dense.h"
#include "cuda/dense_memory.h"

namespace moe::cuda {

namespace {

constexpr const char* kWhat = "dense layers";

bool graphs_are_on() {
    const char* setting = std::getenv("MOE_OFFLOAD_CUDA_GRAPHS");
    return !setting || std::strcmp(setting, "off") != 0;
}

}  // namespace

CudaDense::CudaDense(int device, const DenseParts& parts, std::shared_ptr<RowsFence> fence)
    : device_(device), parts_(parts), fence_(std::move(fence)), may_capture_(graphs_are_on()) {
    use();
    if (parts.shape.max_top_k > kMostTopK)
        throw DeviceError("no kernel chooses more than " + std::to_string(kMostTopK) + " experts",
                          DeviceFault::kFailed);
    if (const int type = parts.shape.cache_type; type != F32 && type != F16 && type != BF16 && type != Q8_0)
        throw DeviceError("no kernel reads keys and values of this type", DeviceFault::kFailed);
    for (const DenseLayer& layer : parts.layers)
        if (!layer.router.top_k && (layer.kernel->gate_up_bias() || layer.kernel->down_bias() ||
                                    layer.kernel->matrices().size() != 3))
            throw DeviceError("no kernel for a dense network with biases or with gate and up in one",
                              DeviceFault::kFailed);
    memory_ = std::make_unique<Memory>(parts);
    make_tiles();
    const float one = 1.0f;
    copy_to_card(memory_->one, &one, sizeof one, kWhat);
    graphs_.resize(parts.layers.size() + 1);
    choice_.ids.resize(size_t(parts.shape.max_top_k));
    choice_.weights.resize(size_t(parts.shape.max_top_k));
}

// Rows may be on their way still, and the first launches of a layer whose later ones failed: both read memory
// that is freed now.
CudaDense::~CudaDense() {
    cudaSetDevice(device_);
    cudaStreamSynchronize(stream_);
    cudaGetLastError();
}

void CudaDense::use() const {
    must(cudaSetDevice(device_), "the GPU");
}

const Tile* CudaDense::tile_of(const uint8_t* weight, const float* bias, const uint8_t* up,
                               const float* up_bias) {
    tiles_.push_back({weight, up, bias, up_bias, 0, 1});
    return memory_->tiles + tiles_.size() - 1;
}

void CudaDense::make_tiles() {
    for (const DenseLayer& layer : parts_.layers) {
        LayerTiles t{};
        const auto of = [&](const Linear& linear) { return tile_of(linear.weight, linear.bias); };
        t.query = of(layer.attention.query), t.key = of(layer.attention.key);
        t.value = of(layer.attention.value), t.out = of(layer.attention.out);
        if (layer.router.top_k) {
            t.router = of(layer.router.gate);
        } else {
            const auto at = [&](int i) {
                return reinterpret_cast<const uint8_t*>(layer.addresses[size_t(i)]);
            };
            t.gate = tile_of(at(0), nullptr), t.up = tile_of(at(1), nullptr),
            t.down = tile_of(at(2), nullptr);
        }
        layers_.push_back(t);
    }
    if (parts_.head.weight) head_ = tile_of(parts_.head.weight, parts_.head.bias);
    copy_to_card(memory_->tiles, tiles_.data(), tiles_.size() * sizeof(Tile), kWhat);
}

void CudaDense::wait() {
    ++num_waits_;
    must(cudaStreamSynchronize(stream_), kWhat);
    experts_.are_done();
    fence_->passed();
    for (size_t i = 0; i < spans_used_; ++i) {
        done_.experts += spans_[i].experts;
        done_.seconds += spans_[i].end.seconds_since(spans_[i].begin);
    }
    spans_used_ = 0;
}

void CudaDense::begin(const float* residual, const float* cos, const float* sin, int64_t num_tokens) {
    use();
    wait();  // a token that was given up may still be computed
    if (num_tokens < 0 || num_tokens >= parts_.capacity)
        throw DeviceError("the device's key/value cache is full", DeviceFault::kFailed);
    const int64_t hidden_size = parts_.shape.hidden_size, half = parts_.shape.rotary_dim / 2;
    const TokenState state{num_tokens, 0};
    std::memcpy(memory_->host_token, &state, sizeof state);
    auto* floats = reinterpret_cast<float*>(memory_->host_token + sizeof state);
    std::copy_n(residual, hidden_size, floats);
    std::copy_n(cos, half, floats + hidden_size);
    std::copy_n(sin, half, floats + hidden_size + half);
    pending_ = Pending::kToken;
}

void CudaDense::rows(const DeviceKernel& device_kernel, const ExpertPairs& pairs, int64_t first_row) {
    use();
    const auto& kernel = static_cast<const CudaKernel&>(device_kernel);
    const int64_t hidden_size = parts_.shape.hidden_size;
    if (spans_used_ == spans_.size()) spans_.emplace_back();
    RowsSpan& span = spans_[spans_used_];
    span.begin.record(stream_);
    experts_.compute(kernel, quantized(memory_->normed, hidden_size, kernel.reads_packed()), pairs,
                     memory_->expert_rows + first_row * hidden_size);
    span.end.record(stream_);
    fence_->queued(stream_);
    span.experts = pairs.num_experts;
    ++spans_used_;
}

void CudaDense::add_rows(const float* rows, const float* weights, const int32_t* sources, int64_t num_rows) {
    // Nobody reads the memory: attend() has waited since.
    const int64_t hidden_size = parts_.shape.hidden_size;
    std::copy_n(weights, num_rows, memory_->host_weights);
    std::copy_n(sources, num_rows, memory_->host_sources);
    for (int64_t i = 0; i < num_rows; ++i)
        if (sources[i] == kAtHome)
            std::copy_n(rows + i * hidden_size, hidden_size, memory_->host_rows + i * hidden_size);
    pending_ = Pending::kRows, pending_rows_ = num_rows;
}

void CudaDense::launch_pending() {
    const Memory& m = *memory_;
    if (pending_ == Pending::kToken) must(launch_fetch(m.token, m.host_token, m.token_bytes, stream_), kWhat);
    if (pending_ == Pending::kRows)
        must(launch_add_rows({m.residual, m.host_rows, m.host_weights, pending_rows_,
                              parts_.shape.hidden_size, m.expert_rows, m.host_sources},
                             stream_),
             kWhat);
}

Attended CudaDense::attend(int64_t layer) {
    use();
    const auto index = size_t(layer - parts_.first_layer);
    const Router& router = parts_.layers.at(index).router;
    Memory& m = *memory_;
    graphs_[index].run(stream_, &may_capture_, [&] { launch_layer(index); });
    pending_ = Pending::kNothing;
    wait();
    const auto there = [&](const void* on_device) {
        return m.host_result + (static_cast<const std::byte*>(on_device) - m.result);
    };
    choice_.ids.resize(size_t(router.top_k)), choice_.weights.resize(size_t(router.top_k));
    std::memcpy(choice_.ids.data(), there(m.ids), choice_.ids.size() * sizeof(int32_t));
    std::memcpy(choice_.weights.data(), there(m.weights), choice_.weights.size() * sizeof(float));
    return {&choice_, reinterpret_cast<const float*>(there(m.normed)),
            reinterpret_cast<const uint8_t*>(there(m.token_key)),
            reinterpret_cast<const uint8_t*>(there(m.token_value))};
}

void CudaDense::norm(float* x, const float* added, const float* weight, float* y, int64_t rows,
                     int64_t width) {
    must(launch_norm({x, added, weight, y, rows, width, parts_.shape.eps}, stream_), kWhat);
}

Inputs CudaDense::quantized(const float* x, int64_t cols, bool is_packed) {
    const Inputs inputs = packed_inputs(x, memory_->packed, 1, cols);
    if (is_packed) must(launch_quantize(inputs, 1, stream_), kWhat);
    return inputs;
}

void CudaDense::multiply(const Linear& linear, const Inputs& inputs, const Tile* tile, float* out) {
    must(launch_product(linear.matrix, inputs, {tile, 1, 1}, out, stream_), kWhat);
}

// All of a layer up to the next wait.
void CudaDense::launch_layer(size_t index) {
    const DenseLayer& layer = parts_.layers[index];
    const AttentionLayer& a = layer.attention;
    const LayerTiles& tiles = layers_[index];
    const DecoderShape& s = parts_.shape;
    const Memory& m = *memory_;
    launch_pending();
    norm(m.residual, nullptr, a.norm, m.normed, 1, s.hidden_size);
    const bool packed =
        !is_float(a.query.matrix.type) || !is_float(a.key.matrix.type) || !is_float(a.value.matrix.type);
    const Inputs inputs = quantized(m.normed, s.hidden_size, packed);
    multiply(a.query, inputs, tiles.query, m.query);
    multiply(a.key, inputs, tiles.key, m.key);
    multiply(a.value, inputs, tiles.value, m.value);
    for (auto [x, weight, heads] :
         {std::tuple(m.query, a.q_norm, s.num_heads), std::tuple(m.key, a.k_norm, s.num_kv_heads)}) {
        const int64_t rows = a.norms_heads ? heads : 1;
        if (weight) norm(x, nullptr, weight, x, rows, heads * s.head_dim / rows);
    }
    must(launch_place({m.token, m.rotary, m.rotary + s.rotary_dim / 2, m.query, m.key, m.value, layer.keys,
                       layer.values, m.token_key, m.token_value, s.cache_type, s.num_heads, s.num_kv_heads,
                       s.head_dim, s.rotary_dim, parts_.capacity, a.clip, s.scaling},
                      stream_),
         kWhat);
    const int64_t seen = a.window ? std::min(a.window, parts_.capacity) : parts_.capacity;
    const int64_t most_ranges = (seen + kRangeTokens - 1) / kRangeTokens + (a.window ? 1 : 0);
    must(launch_attend({m.token, m.query, layer.keys, layer.values, s.cache_type, s.num_heads, s.num_kv_heads,
                        s.head_dim, parts_.capacity, a.window, most_ranges, m.range_max, m.range_sum,
                        m.range_parts, a.sinks, m.context},
                       stream_),
         kWhat);
    multiply(a.out, quantized(m.context, s.num_heads * s.head_dim, !is_float(a.out.matrix.type)), tiles.out,
             m.product);
    norm(m.residual, m.product, a.feed_forward_norm, m.normed, 1, s.hidden_size);
    const Router& router = layer.router;
    if (router.top_k) {
        multiply(router.gate, quantized(m.normed, s.hidden_size, !is_float(router.gate.matrix.type)),
                 tiles.router, m.scores);
        must(launch_choose({m.scores, router.gate.matrix.rows, router.top_k, router.softmax_of_chosen,
                            router.normalize, m.ids, m.weights},
                           stream_),
             kWhat);
    } else {
        launch_dense_network(index);
    }
    must(launch_fetch(m.host_result, m.result, m.result_bytes, stream_), kWhat);
}

// A feed-forward network of gate, up and down; its residual's sum has a weight of 1.
void CudaDense::launch_dense_network(size_t index) {
    const ExpertKernel& kernel = *parts_.layers[index].kernel;
    const std::vector<Matrix>& matrices = kernel.matrices();
    const Memory& m = *memory_;
    const int64_t units = kernel.intermediate_size(), hidden_size = parts_.shape.hidden_size;
    const Inputs inputs =
        quantized(m.normed, hidden_size, !is_float(matrices[0].type) || !is_float(matrices[1].type));
    multiply({matrices[0], nullptr, 0, nullptr}, inputs, layers_[index].gate, m.units_gate);
    multiply({matrices[1], nullptr, 0, nullptr}, inputs, layers_[index].up, m.units_up);
    const moe::Activation& a = kernel.activation();
    const Activation activation{ActivationKind(int(a.kind)), a.alpha, a.limit};
    must(launch_activate(activation, m.units_gate, m.units_up, units, m.intermediate, stream_), kWhat);
    multiply({matrices[2], nullptr, 0, nullptr},
             quantized(m.intermediate, units, !is_float(matrices[2].type)), layers_[index].down, m.product);
    must(launch_add_rows({m.residual, m.product, m.one, 1, hidden_size}, stream_), kWhat);
}

void CudaDense::residual(float* out) {
    use();
    const Memory& m = *memory_;
    const int64_t hidden_size = parts_.shape.hidden_size;
    launch_pending();
    pending_ = Pending::kNothing;
    must(launch_fetch(m.host_logits, m.residual, 4 * hidden_size, stream_), kWhat);
    wait();
    std::copy_n(m.host_logits, hidden_size, out);
}

void CudaDense::launch_head() {
    const Memory& m = *memory_;
    const Linear& head = parts_.head;
    norm(m.residual, nullptr, parts_.final_norm, m.normed, 1, parts_.shape.hidden_size);
    multiply(head, quantized(m.normed, parts_.shape.hidden_size, !is_float(head.matrix.type)), head_,
             m.logits);
    must(launch_fetch(m.host_logits, m.logits, m.logits_bytes, stream_), kWhat);
}

void CudaDense::logits(float* out) {
    use();
    graphs_.back().run(stream_, &may_capture_, [&] {
        launch_pending();
        launch_head();
    });
    pending_ = Pending::kNothing;
    wait();
    std::copy_n(memory_->host_logits, parts_.head.matrix.rows, out);
}

void CudaDense::logits_of(const float* residual, int64_t num_tokens, float* out) {
    use();
    wait();  // nothing reads what is written now
    pending_ = Pending::kNothing;
    const int64_t at_once = prompt_.logits_at_once();
    for (int64_t first = 0; first < num_tokens; first += at_once) {
        const int64_t count = std::min(at_once, num_tokens - first);
        prompt_.launch_logits(residual + first * parts_.shape.hidden_size, count);
        wait();
        prompt_.bring_logits(out + first * parts_.head.matrix.rows);
    }
}

void CudaDense::attend_tile(int64_t layer, const PromptTile& tile) {
    use();
    wait();
    pending_ = Pending::kNothing;
    const DenseLayer& there = parts_.layers.at(size_t(layer - parts_.first_layer));
    prompt_.launch(there, tile);
    wait();
    prompt_.bring(there, tile);
}

}  // namespace moe::cuda
