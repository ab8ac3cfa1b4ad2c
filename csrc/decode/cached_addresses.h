// Keys and values as Python names them: (address of keys, address of values) by layer.
#pragma once

#include <utility>
#include <vector>

#include "decode/decode_step.h"

namespace moe {

using KeyValueAddresses = std::vector<std::pair<uint64_t, uint64_t>>;

inline std::vector<CachedTokens> cached_tokens(const KeyValueAddresses& addresses, int64_t capacity,
                                               int64_t num_tokens) {
    std::vector<CachedTokens> cached;
    for (const auto& [keys, values] : addresses)
        cached.push_back(
            {reinterpret_cast<uint8_t*>(keys), reinterpret_cast<uint8_t*>(values), capacity, num_tokens});
    return cached;
}

}  // namespace moe
