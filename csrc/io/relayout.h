// Puts a matrix whose scales a file keeps apart into blocks with their scales, without changing a number.
//
// Codes and scales may lie in the memory that the blocks will take: block i is written only where codes of
// earlier blocks were, if the codes end where the blocks end or later; scales are copied away first.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe {

enum class RelayoutKind : int64_t {
    // gpt-oss: e8m0 scales (rows, cols / 32), codes two to a byte in order -> ggml's MXFP4 blocks of 17
    // bytes.
    kMxfp4 = 1,
    // e4m3 codes (rows, cols), a scale for 128 x 128 of them -> blocks of a float32 and 128 codes.
    kFp8ScalesF32 = 2,
    kFp8ScalesBf16 = 3,
};

// Addresses are of first bytes, aligned to nothing.
struct Relayout {
    int64_t kind;
    int64_t scales, codes, blocks;
    int64_t rows, cols;
};

void check_relayout(const Relayout& relayout);  // throws ConfigError
void run_relayout(const Relayout& relayout);

}  // namespace moe
