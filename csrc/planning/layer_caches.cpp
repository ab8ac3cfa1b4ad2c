#include "planning/layer_caches.h"

#include <utility>

#include "planning/lowest_residents.h"

namespace moe {

LayerCaches::LayerCaches(int64_t num_layers, int64_t num_experts, std::vector<int64_t> sizes)
    : num_layers_(num_layers),
      num_experts_(num_experts),
      sizes_(std::move(sizes)),
      resident_(sizes_.size() * num_layers * num_experts, 0),
      counts_(sizes_.size() * num_layers, 0),
      hits_(sizes_.size() * num_layers, 0),
      evictions_(sizes_.size(), 0) {}

bool LayerCaches::serve(const int64_t* ids, int64_t top_k) {
    const int64_t num_caches = num_sizes() * num_layers_;
    was_new_.resize(num_caches * top_k);
    bool is_over = false;
    for (int64_t cache = 0; cache < num_caches; ++cache) {
        const int64_t* wanted = ids + cache % num_layers_ * top_k;
        bool* resident = residents(cache);
        for (int64_t k = 0; k < top_k; ++k) {
            const bool is_new = !resident[wanted[k]];
            was_new_[cache * top_k + k] = is_new;
            hits_[cache] += !is_new;
            counts_[cache] += is_new;
            resident[wanted[k]] = true;
        }
        is_over |= counts_[cache] > sizes_[cache / num_layers_];
    }
    return is_over;
}

void LayerCaches::evict(const double* scores, bool by_size) {
    const int64_t num_caches = num_sizes() * num_layers_;
    for (int64_t cache = 0; cache < num_caches; ++cache) {
        const int64_t size = cache / num_layers_, excess = counts_[cache] - sizes_[size];
        if (excess <= 0) continue;
        const double* row = scores + (by_size ? cache : cache % num_layers_) * num_experts_;
        for (const int64_t expert_id : lowest_residents(row, residents(cache), num_experts_, excess)) {
            residents(cache)[expert_id] = false;
        }
        counts_[cache] -= excess;
        evictions_[size] += excess;
    }
}

}  // namespace moe
