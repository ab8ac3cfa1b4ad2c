#include "io/relayout.h"

#include <cstring>
#include <string>
#include <vector>

#include "common/errors.h"

namespace moe {

namespace {

constexpr int64_t kMxfp4Block = 32, kMxfp4CodeBytes = 16;
constexpr int64_t kFp8Block = 128;
constexpr int64_t kMaxSide = int64_t(1) << 31;

// Kept by each reader thread: as large as the scales of the largest matrix.
thread_local std::vector<uint8_t> scale_bytes;
thread_local std::vector<float> row_scales;

int64_t scale_row_bytes(const Relayout& r) {
    if (r.kind == int64_t(RelayoutKind::kMxfp4)) return r.cols / kMxfp4Block;
    return r.cols / kFp8Block * (r.kind == int64_t(RelayoutKind::kFp8ScalesF32) ? 4 : 2);
}

int64_t scale_rows(const Relayout& r) {
    return r.kind == int64_t(RelayoutKind::kMxfp4) ? r.rows : (r.rows + kFp8Block - 1) / kFp8Block;
}

// Codes 2j and 2j + 1 share byte j in the file; ggml puts code k and code k + 16 into byte k.
void mxfp4_block(uint8_t scale, const uint8_t* codes, uint8_t* block) {
    uint8_t in[kMxfp4CodeBytes], out[kMxfp4CodeBytes];
    std::memcpy(in, codes, sizeof in);  // the block may overlap its codes
    for (int j = 0; j < 8; ++j) {
        out[2 * j] = uint8_t((in[j] & 15) | in[j + 8] << 4);
        out[2 * j + 1] = uint8_t(in[j] >> 4 | (in[j + 8] & 0xf0));
    }
    block[0] = scale;
    std::memcpy(block + 1, out, sizeof out);
}

void relayout_mxfp4(const Relayout& r, const uint8_t* codes, uint8_t* block) {
    const int64_t num_blocks = r.rows * (r.cols / kMxfp4Block);
    for (int64_t i = 0; i < num_blocks; ++i)
        mxfp4_block(scale_bytes[size_t(i)], codes + i * kMxfp4CodeBytes, block + i * (1 + kMxfp4CodeBytes));
}

void relayout_fp8(const Relayout& r, const uint8_t* codes, uint8_t* block) {
    const int64_t blocks_per_row = r.cols / kFp8Block;
    const bool wide = r.kind == int64_t(RelayoutKind::kFp8ScalesF32);
    row_scales.resize(size_t(blocks_per_row));
    for (int64_t row = 0; row < r.rows; ++row) {
        if (row % kFp8Block == 0) {
            const uint8_t* scales = scale_bytes.data() + row / kFp8Block * scale_row_bytes(r);
            for (int64_t b = 0; b < blocks_per_row; ++b) {
                uint32_t bits = 0;  // bfloat16 is the upper half of a float32
                std::memcpy(reinterpret_cast<uint8_t*>(&bits) + (wide ? 0 : 2), scales + b * (wide ? 4 : 2),
                            wide ? 4 : 2);
                std::memcpy(&row_scales[size_t(b)], &bits, 4);
            }
        }
        for (int64_t b = 0; b < blocks_per_row; ++b, codes += kFp8Block, block += 4 + kFp8Block) {
            std::memmove(block + 4, codes, kFp8Block);
            std::memcpy(block, &row_scales[size_t(b)], 4);
        }
    }
}

}  // namespace

void check_relayout(const Relayout& r) {
    const bool mxfp4 = r.kind == int64_t(RelayoutKind::kMxfp4);
    check(r.kind >= 1 && r.kind <= 3, "relayout", "unknown kind " + std::to_string(r.kind));
    check(r.rows > 0 && r.cols > 0 && r.rows < kMaxSide && r.cols < kMaxSide, "relayout",
          "rows and columns must be from 1 to 2^31, got " + std::to_string(r.rows) + " x " +
              std::to_string(r.cols));
    const int64_t block = mxfp4 ? kMxfp4Block : kFp8Block;
    check(r.cols % block == 0, "relayout",
          "columns must be in blocks of " + std::to_string(block) + ", got " + std::to_string(r.cols));
    check(r.scales > 0 && r.codes > 0 && r.blocks > 0, "relayout", "an address is null");
}

void run_relayout(const Relayout& r) {
    const auto* scales = reinterpret_cast<const uint8_t*>(r.scales);
    scale_bytes.assign(scales, scales + scale_rows(r) * scale_row_bytes(r));
    const auto* codes = reinterpret_cast<const uint8_t*>(r.codes);
    auto* const blocks = reinterpret_cast<uint8_t*>(r.blocks);
    if (r.kind == int64_t(RelayoutKind::kMxfp4)) {
        relayout_mxfp4(r, codes, blocks);
    } else {
        relayout_fp8(r, codes, blocks);
    }
}

}  // namespace moe
