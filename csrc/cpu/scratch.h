// Memory that a thread keeps between the kernels it runs.
#pragma once

#include <cstdint>

namespace moe {

// At least ``num_bytes`` bytes at a multiple of 64; what the last call for this slot gave may be gone.
uint8_t* thread_scratch(int64_t num_bytes, int slot = 0);
constexpr int kScratchSlots = 2;  // 0: a panel's codes, 1: its tokens

}  // namespace moe
