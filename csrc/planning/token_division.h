// Which of one token's experts run where: moe_offload/planning/token_moves.divide, for native code.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace moe {

// Positions among the chosen experts, ascending.
struct TokenDivision {
    std::vector<int32_t> on_device;  // where they are
    std::vector<int32_t> copied;     // there first
    std::vector<int32_t> on_cpu;
    bool operator==(const TokenDivision&) const = default;
};

// moves[r]: where the device has r of them, so many more are copied there; or, below zero, left to the CPU.
void divide_token(std::span<const uint8_t> there, std::span<const uint8_t> in_ram,
                  std::span<const int32_t> moves, TokenDivision& division);

}  // namespace moe
