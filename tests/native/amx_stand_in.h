// AMX-INT8's tiles in plain C++, with the names of csrc/cpu/amx_tiles.h. What a processor would refuse, a
// tile that is not configured or a product of shapes that do not fit, is counted in amx::errors.
#pragma once

#include <cstdint>
#include <cstring>

namespace moe {

struct alignas(64) AmxShapes {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

namespace amx {

constexpr int kTiles = 8;

struct Tile {
    int rows, row_bytes;  // 0: not configured
    int8_t bytes[16][64];
};
inline thread_local Tile tiles[kTiles];
inline int errors = 0, configured = 0;
inline int spoiled_bit = -1;  // of every product's first number

inline void refuse(bool wrong) {
    errors += wrong;
}
inline void configure(const AmxShapes& shapes) {
    refuse(shapes.palette != 1 || shapes.first_row != 0);
    for (int i = 0; i < 16; ++i) {
        refuse(i >= kTiles && (shapes.rows[i] || shapes.row_bytes[i]));
        refuse(shapes.rows[i] > 16 || shapes.row_bytes[i] > 64 || !shapes.rows[i] != !shapes.row_bytes[i]);
        if (i < kTiles) tiles[i] = {shapes.rows[i], shapes.row_bytes[i], {}};
    }
    ++configured;
}
inline void release() {
    for (Tile& tile : tiles) tile = {};
    --configured;
}
template <int n>
inline void clear() {
    refuse(tiles[n].rows == 0);
    std::memset(tiles[n].bytes, 0, sizeof tiles[n].bytes);
}
template <int n>
inline void load(const void* p, int64_t stride) {
    refuse(tiles[n].rows == 0);
    for (int i = 0; i < tiles[n].rows; ++i)
        std::memcpy(tiles[n].bytes[i], static_cast<const int8_t*>(p) + i * stride, tiles[n].row_bytes);
}
template <int n>
inline void store(void* p, int64_t stride) {
    refuse(tiles[n].rows == 0);
    for (int i = 0; i < tiles[n].rows; ++i)
        std::memcpy(static_cast<int8_t*>(p) + i * stride, tiles[n].bytes[i], tiles[n].row_bytes);
}
template <int c, int a, int b>
inline void dot_signed() {
    Tile& sums = tiles[c];
    refuse(sums.rows != tiles[a].rows || tiles[a].row_bytes != 4 * tiles[b].rows ||
           sums.row_bytes != tiles[b].row_bytes);
    for (int m = 0; m < sums.rows; ++m)
        for (int n = 0; n < sums.row_bytes / 4; ++n) {
            int32_t sum;
            std::memcpy(&sum, &sums.bytes[m][4 * n], 4);
            for (int k = 0; k < tiles[b].rows; ++k)
                for (int i = 0; i < 4; ++i)
                    sum += tiles[a].bytes[m][4 * k + i] * tiles[b].bytes[k][4 * n + i];
            if (spoiled_bit >= 0 && m == 0 && n == 0) sum ^= 1 << spoiled_bit;
            std::memcpy(&sums.bytes[m][4 * n], &sum, 4);
        }
}

}  // namespace amx
}  // namespace moe
