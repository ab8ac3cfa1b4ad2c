// A trace through caches of one layer each under planning/policies/arc.py's ArcPolicy, which is its oracle.
#pragma once

#include <cstdint>
#include <vector>

namespace moe {

struct ArcCounts {
    std::vector<int64_t> hits;       // (S, L)
    std::vector<int64_t> evictions;  // (S)
};

// experts: (T, L, K), each token's ascending and distinct, below num_experts; sizes: (S) residents of a
// cache.
ArcCounts arc_replay(const uint16_t* experts, int64_t num_tokens, int64_t num_layers, int64_t top_k,
                     int64_t num_experts, const std::vector<int64_t>& sizes);

}  // namespace moe
