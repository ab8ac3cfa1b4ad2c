// Everything but weights, keys and values that one token's dense layers need on a card.
#pragma once

#include <algorithm>

#include "cuda/cached_rows.h"
#include "cuda/cuda_dense.h"
#include "cuda/memory_pieces.h"

namespace moe::cuda {

struct CudaDense::Memory {
    explicit Memory(const DenseParts& parts) {
        cut(parts);  // to count
        device.reserve(device.used()), host.reserve(host.used());
        cut(parts);
    }

    void cut(const DenseParts& parts) {
        device.start_over(), host.start_over();
        const DecoderShape& s = parts.shape;
        const int64_t query_size = s.num_heads * s.head_dim, kv_size = s.num_kv_heads * s.head_dim;
        int64_t widest = std::max(s.hidden_size, query_size), units = 1, experts = 1;
        for (const DenseLayer& layer : parts.layers) {
            experts = std::max(experts, layer.router.gate.matrix.rows);
            if (!layer.router.top_k) units = std::max(units, layer.kernel->intermediate_size());
        }
        widest = std::max(widest, units);
        const int64_t top_k = std::max<int64_t>(1, s.max_top_k);

        token_bytes = whole_words(sizeof(TokenState) + 4 * (s.hidden_size + s.rotary_dim));
        host_token = host.take<std::byte>(token_bytes);
        token = device.take<TokenState>(token_bytes / int64_t(sizeof(TokenState)) + 1);
        residual = reinterpret_cast<float*>(token + 1);
        rotary = residual + s.hidden_size;

        result_bytes = whole_words(4 * (2 * top_k + s.hidden_size));
        const int64_t row_bytes = whole_words(s.num_kv_heads * row_bytes_of(s.cache_type, s.head_dim));
        host_result = host.take<std::byte>(result_bytes + 2 * row_bytes);
        result = device.take<std::byte>(result_bytes + 2 * row_bytes);
        normed = reinterpret_cast<float*>(result);
        weights = normed + s.hidden_size;
        ids = reinterpret_cast<int32_t*>(weights + top_k);
        token_key = reinterpret_cast<uint8_t*>(result + result_bytes);
        token_value = token_key + row_bytes;
        result_bytes += 2 * row_bytes;

        host_weights = host.take<float>(top_k), host_sources = host.take<int32_t>(top_k);
        host_rows = host.take<float>(top_k * s.hidden_size);
        expert_rows = device.take<float>(top_k * s.hidden_size);
        query = device.take<float>(query_size);
        key = device.take<float>(kv_size), value = device.take<float>(kv_size);
        context = device.take<float>(query_size);
        product = device.take<float>(s.hidden_size);
        scores = device.take<float>((experts + 7) / 8 * 8);
        units_gate = device.take<float>(units), units_up = device.take<float>(units);
        intermediate = device.take<float>(units);
        one = device.take<float>(1);
        packed = device.take<float>(packed_input_bytes(widest) / 4 + 1);
        max_ranges = (parts.capacity + kRangeTokens - 1) / kRangeTokens + 1;
        range_max = device.take<float>(s.num_heads * max_ranges);
        range_sum = device.take<float>(s.num_heads * max_ranges);
        range_parts = device.take<float>(s.num_heads * max_ranges * s.head_dim);
        logits_bytes = parts.head.weight ? whole_words(4 * parts.head.matrix.rows) : 0;
        logits = device.take<float>(std::max(logits_bytes, 4 * s.hidden_size) / 4);
        host_logits = host.take<float>(std::max(logits_bytes, 4 * whole_words(s.hidden_size)) / 4);
        tiles = device.take<Tile>(int64_t(parts.layers.size()) * 8 + 1);
    }

    Pieces device{false}, host{true};
    int64_t token_bytes, result_bytes, logits_bytes, max_ranges;
    std::byte *host_token, *host_result, *result;
    TokenState* token;
    float *residual, *rotary, *normed, *weights, *host_weights, *host_rows, *expert_rows, *query, *key,
        *value, *context, *product, *scores;
    float *units_gate, *units_up, *intermediate, *one, *packed, *range_max, *range_sum, *range_parts, *logits;
    float* host_logits;
    int32_t *ids, *host_sources;
    uint8_t *token_key, *token_value;
    Tile* tiles;
};

}  // namespace moe::cuda
