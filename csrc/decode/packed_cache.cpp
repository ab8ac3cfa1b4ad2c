#include "decode/packed_cache.h"

#include <cmath>
#include <cstring>

#include "common/half.h"
#include "cpu/ops.h"

namespace moe {

namespace {

constexpr int64_t kBlockBytes = 34;  // of kBlock numbers

int8_t code(float scaled) {
    const float rounded = std::nearbyint(scaled);
    if (!(rounded >= -127.0f)) return rounded < -127.0f ? -127 : 0;
    return rounded > 127.0f ? 127 : int8_t(rounded);
}

}  // namespace

int64_t cached_row_bytes(int type, int64_t head_dim) {
    if (type == Q8_0) return head_dim / kBlock * kBlockBytes;
    return head_dim * (type == F32 ? 4 : 2);
}

void store_q8_0(const float* from, int64_t count, uint8_t* to) {
    for (; count > 0; count -= kBlock, from += kBlock, to += kBlockBytes) {
        float amax = 0.0f;
        for (int64_t i = 0; i < kBlock; ++i) {
            const float magnitude = std::fabs(from[i]);
            if (magnitude > amax || std::isnan(magnitude)) amax = magnitude;  // NaN stays
        }
        const float inverse = amax > 0.0f ? 127.0f / amax : 0.0f;
        const uint16_t scale = to_half(amax / 127.0f);
        std::memcpy(to, &scale, sizeof scale);
        for (int64_t i = 0; i < kBlock; ++i) to[sizeof scale + i] = uint8_t(code(from[i] * inverse));
    }
}

}  // namespace moe
