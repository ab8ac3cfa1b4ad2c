// The residents of replays, moe_offload/replay_layers.py: one cache a layer, several sizes side by side.
#pragma once

#include <cstdint>
#include <vector>

namespace moe {

// S sizes, L layers, E experts of a layer.
class LayerCaches {
  public:
    LayerCaches(int64_t num_layers, int64_t num_experts, std::vector<int64_t> sizes);

    // A token's experts ids[L][K], distinct and below E in a layer: counts the hits, brings in what misses.
    // Returns whether a cache holds more than its size.
    bool serve(const int64_t* ids, int64_t top_k);

    // Evicts what is too many, the lowest of scores[L][E], or of scores[S][L][E] if `by_size`.
    void evict(const double* scores, bool by_size);

    int64_t num_sizes() const { return static_cast<int64_t>(sizes_.size()); }
    int64_t num_layers() const { return num_layers_; }
    int64_t num_experts() const { return num_experts_; }
    const std::vector<int64_t>& hits() const { return hits_; }            // (S, L)
    const std::vector<int64_t>& evictions() const { return evictions_; }  // (S)
    const std::vector<uint8_t>& was_new() const { return was_new_; }      // (S, L, K) of the last token

  private:
    bool* residents(int64_t cache) {
        return reinterpret_cast<bool*>(resident_.data()) + cache * num_experts_;
    }

    int64_t num_layers_, num_experts_;
    std::vector<int64_t> sizes_;
    std::vector<uint8_t> resident_;          // (S, L, E)
    std::vector<int64_t> counts_;            // (S, L) residents
    std::vector<int64_t> hits_, evictions_;  // (S, L), (S)
    std::vector<uint8_t> was_new_;
};

}  // namespace moe
