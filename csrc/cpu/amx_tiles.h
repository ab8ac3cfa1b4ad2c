// The instructions of AMX-INT8 on numbered tiles. A tile has at most 16 rows of 64 bytes.
//
// tests/native/amx_stand_in.h has the same names in plain C++, for machines without these instructions. Not
// by the compiler's own macros: gcc's say nothing of the memory that they read and write.
#pragma once

#if defined(MOE_AMX_STAND_IN)
#include MOE_AMX_STAND_IN
#else

#include <cstdint>

namespace moe {

// What LDTILECFG reads.
struct alignas(64) AmxShapes {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(AmxShapes) == 64);

namespace amx {

inline void configure(const AmxShapes& shapes) {
    asm volatile("ldtilecfg %0" ::"m"(shapes));
}
inline void release() {
    asm volatile("tilerelease");
}
template <int tile>
inline void clear() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
// Row i from p + i * stride on.
template <int tile>
inline void load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(tile) : "memory");
}
// sums[m][n] += the sum over k and i of a[m][4 k + i] * b[k][4 n + i], signed bytes.
template <int sums, int a, int b>
inline void dot_signed() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sums), "i"(a), "i"(b));
}

}  // namespace amx
}  // namespace moe

#endif
