#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>

#include "cuda/cached_rows.h"
#include "cuda/dense_kernels.h"
#include "cuda/dense_prompt.h"
#include "cuda/memory_pieces.h"

namespace moe::cuda {

namespace {

constexpr const char* kPrompt = "a prompt's dense layers";
constexpr int64_t kTileTokens = 512;  // moe_offload/planning/prompt_chunks.py
constexpr int64_t kMostLogits = 32;   // as many as the widest tile of a product

}  // namespace

// What a tile needs beside weights, keys and values. Of what crosses, the host has the same parts in pinned
// memory, at the same places behind its beginning.
struct DensePrompt::Memory {
    template <class T>
    struct Both {
        T *there, *here;
    };

    void cut(const DecoderShape& shape, const DenseLayer& layer, int64_t num_tokens, int64_t num_tiles) {
        take(shape, layer, num_tokens, num_tiles);  // to count
        device.reserve(device.used()), host.reserve(host.used());
        take(shape, layer, num_tokens, num_tiles);
    }

    void take(const DecoderShape& s, const DenseLayer& layer, int64_t n, int64_t num_tiles) {
        device.start_over(), host.start_over();
        const int64_t query_size = s.num_heads * s.head_dim, key_size = s.num_kv_heads * s.head_dim;
        const int64_t top_k = layer.router.top_k, angles = n * (s.rotary_dim / 2);
        row_bytes = row_bytes_of(s.cache_type, s.head_dim);
        state = both<TokenState>(1), one = both<float>(1), tiles = both<Tile>(num_tiles);
        cos = both<float>(angles), sin = both<float>(angles);
        residual_begin = device.used();
        residual = both<float>(n * s.hidden_size);
        sent_bytes = device.used();
        normed = both<float>(n * s.hidden_size);
        ids = both<int32_t>(n * top_k), weights = both<float>(n * top_k);
        keys = both<uint8_t>(n * s.num_kv_heads * row_bytes);
        values = both<uint8_t>(n * s.num_kv_heads * row_bytes);
        crossing_bytes = device.used();
        query = device.take<float>(n * query_size), context = device.take<float>(n * query_size);
        key = device.take<float>(n * key_size), value = device.take<float>(n * key_size);
        product = device.take<float>(n * s.hidden_size);
        scores = device.take<float>(top_k ? n * layer.router.gate.matrix.rows : 0);
        packed = device.take<float>(n * packed_input_bytes(std::max(s.hidden_size, query_size)) / 4 + 1);
    }

    void cut_head(const DecoderShape& shape, int64_t vocab_size, int64_t num_tokens, int64_t num_tiles) {
        take_head(shape, vocab_size, num_tokens, num_tiles);  // to count
        device.reserve(device.used()), host.reserve(host.used());
        take_head(shape, vocab_size, num_tokens, num_tiles);
    }

    void take_head(const DecoderShape& s, int64_t vocab_size, int64_t n, int64_t num_tiles) {
        device.start_over(), host.start_over();
        state = both<TokenState>(1);  // where both begin
        tiles = both<Tile>(num_tiles);
        residual = both<float>(n * s.hidden_size);
        sent_bytes = device.used();
        normed.there = device.take<float>(n * s.hidden_size);
        packed = device.take<float>(n * packed_input_bytes(s.hidden_size) / 4 + 1);
        logits = both<float>(n * vocab_size);
    }

    template <class T>
    Both<T> both(int64_t count) {
        return {device.take<T>(count), host.take<T>(count)};
    }
    std::byte* there() const { return reinterpret_cast<std::byte*>(state.there); }
    std::byte* here() const { return reinterpret_cast<std::byte*>(state.here); }

    Pieces device{false}, host{true};
    int64_t residual_begin, sent_bytes, crossing_bytes, row_bytes;
    Both<TokenState> state;
    Both<Tile> tiles;
    Both<float> one, cos, sin, residual, normed, weights, logits;
    Both<int32_t> ids;
    Both<uint8_t> keys, values;  // (tokens, num_kv_heads, head_dim) of the cache's type
    float *query, *context, *key, *value, *product, *scores, *packed;
};

DensePrompt::DensePrompt(const DenseParts& parts, cudaStream_t stream)
    : parts_(parts), stream_(stream), memory_(std::make_unique<Memory>()) {}

DensePrompt::~DensePrompt() = default;

void DensePrompt::launch(const DenseLayer& layer, const PromptTile& tile) {
    const Memory& m = *memory_;
    num_tokens_ = tile.num_tokens, skipped_ = tile.skipped, num_wanted_ = num_tokens_ - skipped_;
    if (tile.cached.num_tokens + num_tokens_ > parts_.capacity)
        throw DeviceError("the device's key/value cache is full", DeviceFault::kFailed);
    const Tables tables = send(layer, tile);
    project(layer, tables);
    if (num_wanted_) attend(layer, tables);
    if (num_wanted_) layer.router.top_k ? choose(layer, tables) : feed_forward(layer);
    const int64_t num_bytes = m.crossing_bytes - m.residual_begin;
    must(launch_fetch(m.here() + m.residual_begin, m.there() + m.residual_begin, num_bytes, stream_),
         kPrompt);
}

void DensePrompt::Cut::add(const Linear& linear, int64_t num_rows, MatrixTiles& to) {
    const int at_once = choose_tile(linear.matrix.type, false, int(num_rows));
    to = {nullptr, 0, at_once};
    begins.emplace_back(&to, tiles.size());
    for (int64_t first = 0; first < num_rows; first += at_once, ++to.num_tiles)
        tiles.push_back({linear.weight, nullptr, linear.bias, nullptr, int32_t(first),
                         int32_t(std::min<int64_t>(at_once, num_rows - first))});
}

void DensePrompt::Cut::place(const Tile* there, Tile* here) const {
    for (const auto& [of, first] : begins) of->tiles = there + first;
    std::copy(tiles.begin(), tiles.end(), here);
}

// Position, tables, angles and states, in one piece.
DensePrompt::Tables DensePrompt::send(const DenseLayer& layer, const PromptTile& tile) {
    const AttentionLayer& a = layer.attention;
    Tables tables{};
    Cut cut;
    cut.add(a.query, num_wanted_, tables.query), cut.add(a.key, num_tokens_, tables.key);
    cut.add(a.value, num_tokens_, tables.value), cut.add(a.out, num_wanted_, tables.out);
    if (layer.router.top_k) cut.add(layer.router.gate, num_wanted_, tables.router);

    Memory& m = *memory_;
    const DecoderShape& s = parts_.shape;
    m.cut(s, layer, num_tokens_, int64_t(cut.tiles.size()));
    cut.place(m.tiles.there, m.tiles.here);
    *m.state.here = {tile.cached.num_tokens, 0};
    *m.one.here = 1.0f;
    const int64_t angles = num_tokens_ * (s.rotary_dim / 2);
    std::copy_n(tile.states.cos, angles, m.cos.here), std::copy_n(tile.states.sin, angles, m.sin.here);
    std::copy_n(tile.states.residual, num_tokens_ * s.hidden_size, m.residual.here);
    must(launch_fetch(m.there(), m.here(), m.sent_bytes, stream_), kPrompt);
    return tables;
}

void DensePrompt::norm(float* x, const float* added, const float* weight, float* y, int64_t rows,
                       int64_t width) {
    must(launch_norm({x, added, weight, y, rows, width, parts_.shape.eps}, stream_), kPrompt);
}

Inputs DensePrompt::quantized(const float* x, int64_t rows, int64_t cols, bool is_packed) {
    const Inputs inputs = packed_inputs(x, memory_->packed, rows, cols);
    if (is_packed) must(launch_quantize(inputs, rows, stream_), kPrompt);
    return inputs;
}

void DensePrompt::multiply(const Linear& linear, const Inputs& inputs, const MatrixTiles& tiles, float* out) {
    must(launch_product(linear.matrix, inputs, tiles, out, stream_), kPrompt);
}

// Keys and values of all tokens into the cache; queries of those that are wanted.
void DensePrompt::project(const DenseLayer& layer, const Tables& tables) {
    const AttentionLayer& a = layer.attention;
    const DecoderShape& s = parts_.shape;
    const Memory& m = *memory_;
    norm(m.residual.there, nullptr, a.norm, m.normed.there, num_tokens_, s.hidden_size);
    const bool packed =
        !is_float(a.query.matrix.type) || !is_float(a.key.matrix.type) || !is_float(a.value.matrix.type);
    const Inputs inputs = quantized(m.normed.there, num_tokens_, s.hidden_size, packed);
    multiply(a.query, rows_from(inputs, skipped_), tables.query, m.query);
    multiply(a.key, inputs, tables.key, m.key);
    multiply(a.value, inputs, tables.value, m.value);
    for (auto [x, weight, heads, tokens] : {std::tuple(m.query, a.q_norm, s.num_heads, num_wanted_),
                                            std::tuple(m.key, a.k_norm, s.num_kv_heads, num_tokens_)}) {
        const int64_t rows = a.norms_heads ? heads : 1;
        if (weight && tokens) norm(x, nullptr, weight, x, tokens * rows, heads * s.head_dim / rows);
    }
    must(launch_place({m.state.there,   m.cos.there, m.sin.there,    m.query,      m.key,
                       m.value,         layer.keys,  layer.values,   m.keys.there, m.values.there,
                       s.cache_type,    s.num_heads, s.num_kv_heads, s.head_dim,   s.rotary_dim,
                       parts_.capacity, a.clip,      s.scaling,      num_tokens_,  skipped_},
                      stream_),
         kPrompt);
}

// Attention, its residual, and what the feed-forward network sees.
void DensePrompt::attend(const DenseLayer& layer, const Tables& tables) {
    const AttentionLayer& a = layer.attention;
    const DecoderShape& s = parts_.shape;
    const Memory& m = *memory_;
    must(launch_attend_prompt(
             {m.state.there, skipped_, num_wanted_, m.query, layer.keys, layer.values, s.cache_type,
              s.num_heads, s.num_kv_heads, s.head_dim, parts_.capacity, a.window, a.sinks, m.context},
             stream_),
         kPrompt);
    const int64_t skipped = skipped_ * s.hidden_size;
    const Inputs context =
        quantized(m.context, num_wanted_, s.num_heads * s.head_dim, !is_float(a.out.matrix.type));
    multiply(a.out, context, tables.out, m.product);
    norm(m.residual.there + skipped, m.product, a.feed_forward_norm, m.normed.there + skipped, num_wanted_,
         s.hidden_size);
}

void DensePrompt::choose(const DenseLayer& layer, const Tables& tables) {
    const Router& router = layer.router;
    const Memory& m = *memory_;
    const int64_t hidden_size = parts_.shape.hidden_size, num_experts = router.gate.matrix.rows;
    const Inputs inputs = quantized(m.normed.there + skipped_ * hidden_size, num_wanted_, hidden_size,
                                    !is_float(router.gate.matrix.type));
    multiply(router.gate, inputs, tables.router, m.scores);
    const int64_t skipped = skipped_ * router.top_k;
    must(launch_choose({m.scores, num_experts, router.top_k, router.softmax_of_chosen, router.normalize,
                        m.ids.there + skipped, m.weights.there + skipped, num_wanted_},
                       stream_),
         kPrompt);
}

// A kernel of one expert that every token goes to; its residual's sum has a weight of 1.
void DensePrompt::feed_forward(const DenseLayer& layer) {
    const Memory& m = *memory_;
    const int64_t hidden_size = parts_.shape.hidden_size, skipped = skipped_ * hidden_size;
    const CudaKernel kernel(*layer.kernel);
    std::vector<int32_t> tokens(static_cast<size_t>(num_wanted_));
    std::iota(tokens.begin(), tokens.end(), 0);
    const int32_t id = 0, offsets[] = {0, int32_t(num_wanted_)};
    const ExpertPairs pairs{&id, layer.addresses.data(), offsets, tokens.data(), 1, num_wanted_};
    const Inputs inputs =
        quantized(m.normed.there + skipped, num_wanted_, hidden_size, kernel.reads_packed());
    network_.compute(kernel, inputs, pairs, m.product);
    const int64_t width = num_wanted_ * hidden_size;
    must(launch_add_rows({m.residual.there + skipped, m.product, m.one.there, 1, width}, stream_), kPrompt);
}

int64_t DensePrompt::logits_at_once() const {
    Memory whole_tile, logits;
    whole_tile.take(parts_.shape, parts_.layers.front(), kTileTokens, 1);
    int64_t at_once = kMostLogits;
    for (; at_once > 1; at_once /= 2) {
        logits.take_head(parts_.shape, parts_.head.matrix.rows, at_once, 1);
        if (logits.device.used() <= whole_tile.device.used() && logits.host.used() <= whole_tile.host.used())
            break;
    }
    return at_once;
}

void DensePrompt::launch_logits(const float* residual, int64_t num_tokens) {
    const Linear& head = parts_.head;
    const int64_t hidden_size = parts_.shape.hidden_size;
    Memory& m = *memory_;
    num_tokens_ = num_tokens;
    MatrixTiles tiles{};
    Cut cut;
    cut.add(head, num_tokens, tiles);
    m.cut_head(parts_.shape, head.matrix.rows, num_tokens, int64_t(cut.tiles.size()));
    cut.place(m.tiles.there, m.tiles.here);
    std::copy_n(residual, num_tokens * hidden_size, m.residual.here);
    must(launch_fetch(m.there(), m.here(), m.sent_bytes, stream_), kPrompt);
    norm(m.residual.there, nullptr, parts_.final_norm, m.normed.there, num_tokens, hidden_size);
    multiply(head, quantized(m.normed.there, num_tokens, hidden_size, !is_float(head.matrix.type)), tiles,
             m.logits.there);
    must(launch_fetch(m.logits.here, m.logits.there, whole_words(4 * num_tokens * head.matrix.rows), stream_),
         kPrompt);
}

void DensePrompt::bring_logits(float* out) {
    std::copy_n(memory_->logits.here, num_tokens_ * parts_.head.matrix.rows, out);
}

void DensePrompt::bring(const DenseLayer& layer, const PromptTile& tile) {
    network_.are_done();
    const Memory& m = *memory_;
    const DecoderShape& s = parts_.shape;
    const int64_t states = num_tokens_ * s.hidden_size, choices = num_tokens_ * layer.router.top_k;
    std::copy_n(m.residual.here, states, tile.states.residual);
    std::copy_n(m.normed.here, states, tile.states.normed);
    std::copy_n(m.ids.here, choices, tile.states.ids);
    std::copy_n(m.weights.here, choices, tile.states.weights);
    for (int64_t row = 0; row < num_tokens_ * s.num_kv_heads; ++row) {
        const int64_t token = row / s.num_kv_heads, head = row % s.num_kv_heads;
        const int64_t place = head * tile.cached.capacity + tile.cached.num_tokens + token;
        std::memcpy(tile.cached.keys + place * m.row_bytes, m.keys.here + row * m.row_bytes,
                    size_t(m.row_bytes));
        std::memcpy(tile.cached.values + place * m.row_bytes, m.values.here + row * m.row_bytes,
                    size_t(m.row_bytes));
    }
}

}  // namespace moe::cuda
