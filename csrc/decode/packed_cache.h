// Keys and values as ggml's Q8_0 blocks: 32 numbers as signed bytes and one half-precision scale.
#pragma once

#include <cstdint>

namespace moe {

// Bytes of one head's cached row of ``head_dim`` numbers, of any type that a cache may have.
int64_t cached_row_bytes(int type, int64_t head_dim);

// Rounds ``count`` (a multiple of 32) numbers to blocks, as storage of moe_offload/runtime/packed_kv.py:
// scale = amax / 127 rounded to half, code = round to even of x * (127 / amax). Not a number: code 0.
void store_q8_0(const float* from, int64_t count, uint8_t* to);

}  // namespace moe
