// Packed weights times one or a few tokens: a warp for two weight rows, lane 4 * c + k on chain c
// (formats.h). The rows' bytes come in aligned 16-byte words, many in flight together, and are unpacked from
// shared memory, where unaligned bytes cost little; quantized inputs come from the cache.
#pragma once

#include "cuda/activations.h"
#include "cuda/formats.h"

namespace moe::cuda {

template <class Format>
constexpr int kSuperblockBytes = 256 / Format::kElements * Format::kBytes;

// Bytes from anywhere, with the 16-byte words around them and the words that load32 reads beyond.
MOE_HD constexpr int staged_bytes(int num_bytes) {
    return (num_bytes + 15 + 15) / 16 * 16 + 16;
}

// Copies bytes to shared memory by ``threads`` threads, of which this is ``thread``; returns where they
// begin.
MOE_DEVICE const uint8_t* stage(const uint8_t* from, int num_bytes, uint8_t* to, int thread, int threads) {
    const int offset = int(reinterpret_cast<uintptr_t>(from) % 16);
    const Word16* words = reinterpret_cast<const Word16*>(from - offset);
    const int num_words = (offset + num_bytes + 15) / 16;
#pragma unroll 4
    for (int i = thread; i < num_words; i += threads) reinterpret_cast<Word16*>(to)[i] = words[i];
    return to + offset;
}

MOE_DEVICE int32_t quad_sum(int32_t value) {
    value += shuffle_xor(value, 1);
    return value + shuffle_xor(value, 2);
}

// ((c0 + c4) + (c2 + c6)) + ((c1 + c5) + (c3 + c7)), chain c in the lanes 4 * c ..
MOE_DEVICE float tree_of_lanes(float chain) {
    chain = chain + shuffle_xor(chain, 16);
    chain = chain + shuffle_xor(chain, 8);
    return chain + shuffle_xor(chain, 4);
}

MOE_DEVICE EightActivations load_eight(const int8_t* q, float d) {
    EightActivations a;
    const int32_t* words = reinterpret_cast<const int32_t*>(q);
    a.q[0] = words[0];
    a.q[1] = words[1];
    a.d = d;
    return a;
}

constexpr int kStageSuperblocks = 8;  // of a row, in flight at once

template <class Format, int kTokens>
MOE_DEVICE void packed_rows(const MatrixLaunch& launch) {
    constexpr int kStaged = staged_bytes(kStageSuperblocks * kSuperblockBytes<Format>);
    __shared__ __align__(16) uint8_t staging[kWarps][2][kStaged];
    const Tile tile = launch.tiles[blockIdx.y];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane / 4, k = lane % 4;
    const int64_t i = int64_t(blockIdx.x) * kWarps + warp;
    const int64_t cols = launch.inputs.cols, padded = padded_cols(cols), blocks = cols / 32;
    const int64_t row_bytes = cols / Format::kElements * Format::kBytes;
    const uint8_t* rows[2];
    for (int r = 0; r < 2; ++r) {
        const RowPlace place = row_of_pair(launch, tile, i, r);
        rows[r] = place.matrix + place.row * row_bytes;
    }
    int64_t inputs[kTokens];
    for (int t = 0; t < kTokens; ++t) inputs[t] = input_row(launch, tile, t);

    Chain chains[2][kTokens];
    for (int64_t first = 0; first < cols; first += kStageSuperblocks * 256) {
        const int64_t left = cols - first;
        const int elements = int(left < kStageSuperblocks * 256 ? left : kStageSuperblocks * 256);
        const int64_t offset = first / Format::kElements * Format::kBytes;
        const int num_bytes = elements / Format::kElements * Format::kBytes;
        const uint8_t* bytes[2];
        sync_warp();
        for (int r = 0; r < 2; ++r) bytes[r] = stage(rows[r] + offset, num_bytes, staging[warp][r], lane, 32);
        sync_warp();
        for (int s = 0; s * 256 < elements; ++s) {
            const int64_t block = first / 32 + s * 8 + c;
            const bool exists = block < blocks;
            Eight w[2] = {{{0, 0}}, {{0, 0}}};
            for (int r = 0; r < 2; ++r)
                if (exists) w[r] = Format::load(bytes[r] + s * kSuperblockBytes<Format>, c, k);
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                const EightActivations a =
                    load_eight(launch.inputs.q + inputs[t] * padded + block * 32 + 8 * k,
                               launch.inputs.d[inputs[t] * (padded / 32) + block]);
                for (int r = 0; r < 2; ++r) {
                    Sums sums = multiply<Format>(w[r], a);
                    sums.sum = quad_sum(sums.sum);
                    if constexpr (Format::kMins) sums.min = quad_sum(sums.min);
                    if (exists) advance<Format>(chains[r][t], sums, w[r], a.d);
                }
            }
        }
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        float y[2];
        for (int r = 0; r < 2; ++r) {
            y[r] = tree_of_lanes(chains[r][t].sum);
            if constexpr (Format::kMins) y[r] = y[r] - tree_of_lanes(chains[r][t].min);
        }
        if (lane == 0) store_pair(launch, tile, i, t, y[0], y[1]);
    }
}

template <class Format, int kTokens>
__global__ void __launch_bounds__(kThreads) packed_rows_kernel(const MatrixLaunch launch) {
    if constexpr (kTokens == 1 || kHasOthers) packed_rows<Format, kTokens>(launch);
}

}  // namespace moe::cuda
