// Who is told of layers while a token's layers run in one call (DecodeStep::run).
#pragma once

#include <cstdint>
#include <vector>

#include "decode/token_parts.h"

namespace moe {

class LayerWatch {
  public:
    virtual ~LayerWatch() = default;

    // A token's layers begin; residual: its embedding, (hidden_size,).
    virtual void begins(const float* residual) = 0;

    // A layer's router has chosen, of which ``num_missing`` experts are not resident.
    virtual void routed(int64_t layer, const Choice& choice, int64_t num_missing) = 0;

    // Whether what is missing has arrived all the same; then it is used, and ``addresses``, of the chosen
    // experts' matrices one after the other, says where it is.
    virtual bool has_arrived(int64_t layer, const Choice& choice, std::vector<uint64_t>& addresses) = 0;

    // All that it chose is at hand and about to be computed; hidden: what its router saw.
    virtual void before_experts(int64_t layer, const Choice& choice, const float* hidden) = 0;
};

}  // namespace moe
