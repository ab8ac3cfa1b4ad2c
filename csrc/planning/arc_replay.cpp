#include "planning/arc_replay.h"

#include <algorithm>

namespace moe {

namespace {

enum List : uint8_t { NONE, T1, T2, B1, B2, NUM_LISTS };  // used once, used again; what left them lately

// One cache. An expert is in one list at most, so that lists are links between experts.
class ArcCache {
  public:
    ArcCache(int64_t num_experts, int64_t size)
        : most_residents_(size), list_(num_experts, NONE), before_(num_experts), after_(num_experts) {}

    // Serves a token's experts, ascending; returns how many were resident.
    int64_t step(const uint16_t* expert_ids, int64_t count) {
        new_.clear();
        for (int64_t i = 0; i < count; ++i) {
            if (!is_resident(expert_ids[i])) new_.push_back(expert_ids[i]);
        }
        const auto hits = count - static_cast<int64_t>(new_.size());
        for (const int32_t expert_id : new_) insert(expert_id);
        for (int64_t i = 0; i < count; ++i) {  // an insertion is a first use, not a second one
            if (!std::binary_search(new_.begin(), new_.end(), expert_ids[i])) move(expert_ids[i], T2);
        }
        evict(size_[T1] + size_[T2] - most_residents_);
        return hits;
    }

    int64_t evictions() const { return evictions_; }

  private:
    bool is_resident(int32_t expert_id) const { return list_[expert_id] == T1 || list_[expert_id] == T2; }

    void insert(int32_t expert_id) {
        if (list_[expert_id] == B1) {
            const double step =
                std::max(1.0, static_cast<double>(size_[B2]) / static_cast<double>(size_[B1]));
            target_ = std::min(static_cast<double>(capacity_), target_ + step);
            move(expert_id, T2);
        } else if (list_[expert_id] == B2) {
            const double step =
                std::max(1.0, static_cast<double>(size_[B1]) / static_cast<double>(size_[B2]));
            target_ = std::max(0.0, target_ - step);
            move(expert_id, T2);
        } else {
            move(expert_id, T1);
        }
    }

    // Chooses all victims before the first one goes, as a cache asks a policy.
    void evict(int64_t count) {
        victims_.clear();
        int32_t once = first_[T1], again = first_[T2];
        int64_t left_once = size_[T1];
        for (int64_t i = 0; i < count; ++i) {
            const bool from_once = once >= 0 && (static_cast<double>(left_once) > target_ || again < 0);
            int32_t& next = from_once ? once : again;
            left_once -= from_once;
            victims_.push_back(next);
            next = after_[next];
        }
        for (const int32_t expert_id : victims_) forget(expert_id);
        evictions_ += static_cast<int64_t>(victims_.size());
    }

    void forget(int32_t expert_id) {
        move(expert_id, list_[expert_id] == T1 ? B1 : B2);
        capacity_ = std::max(capacity_, size_[T1] + size_[T2]);
        while (size_[T1] + size_[B1] > capacity_ && size_[B1] > 0) take(first_[B1]);
        while (size_[B1] + size_[B2] > capacity_ && size_[B2] > 0) take(first_[B2]);
    }

    // To the most recent end of a list, out of the one it was in.
    void move(int32_t expert_id, List list) {
        take(expert_id);
        list_[expert_id] = list;
        before_[expert_id] = last_[list];
        after_[expert_id] = -1;
        (last_[list] >= 0 ? after_[last_[list]] : first_[list]) = expert_id;
        last_[list] = expert_id;
        ++size_[list];
    }

    void take(int32_t expert_id) {
        const List list = list_[expert_id];
        if (list == NONE) return;
        const int32_t before = before_[expert_id], after = after_[expert_id];
        (before >= 0 ? after_[before] : first_[list]) = after;
        (after >= 0 ? before_[after] : last_[list]) = before;
        list_[expert_id] = NONE;
        --size_[list];
    }

    int64_t most_residents_, capacity_ = 0, evictions_ = 0;
    double target_ = 0.0;  // of T1's size
    std::vector<List> list_;
    std::vector<int32_t> before_, after_;  // in its list, least recent first; -1: none
    int32_t first_[NUM_LISTS] = {-1, -1, -1, -1, -1}, last_[NUM_LISTS] = {-1, -1, -1, -1, -1};
    int64_t size_[NUM_LISTS] = {};
    std::vector<int32_t> new_, victims_;
};

}  // namespace

ArcCounts arc_replay(const uint16_t* experts, int64_t num_tokens, int64_t num_layers, int64_t top_k,
                     int64_t num_experts, const std::vector<int64_t>& sizes) {
    ArcCounts counts;
    for (const int64_t size : sizes) {
        int64_t evictions = 0;
        for (int64_t layer = 0; layer < num_layers; ++layer) {
            ArcCache cache(num_experts, size);
            int64_t hits = 0;
            for (int64_t token = 0; token < num_tokens; ++token) {
                hits += cache.step(experts + (token * num_layers + layer) * top_k, top_k);
            }
            counts.hits.push_back(hits);
            evictions += cache.evictions();
        }
        counts.evictions.push_back(evictions);
    }
    return counts;
}

}  // namespace moe
