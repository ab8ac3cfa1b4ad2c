// Where a layer's experts are, for native code: (num_experts, number of matrices) addresses of those that are
// resident, or staged and shown (SlotPool.show_arrived); the first of them kOnItsWay where an expert has a
// slot and may not be used from it yet, 0 for all others. The second is then the ticket of the read where
// EarlyReads began it, and 0 or an address where somebody else did. moe_offload/residency/slot_reads.py keeps
// it up to date.
#pragma once

#include <cstdint>

namespace moe {

constexpr uint64_t kOnItsWay = 1;

}  // namespace moe
