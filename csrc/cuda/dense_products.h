// Products with one matrix: what dense layers launch for a token and for many.
#pragma once

#include "cpu/ops.h"
#include "cuda/kernels.h"

namespace moe::cuda {

// The tiles of a matrix, on the device; all of its inputs' rows are in one of them.
struct MatrixTiles {
    const Tile* tiles;
    int num_tiles, tokens_per_tile;
};

// out (rows of the inputs, rows of the matrix), its bias added.
inline int launch_product(const Matrix& matrix, const Inputs& inputs, const MatrixTiles& of, float* out,
                          CUstream_st* stream) {
    return launch_rows({matrix.type,
                        matrix.transposed,
                        false,
                        matrix.rows,
                        inputs,
                        nullptr,
                        out,
                        RowOrder::GATE_UP,
                        {ActivationKind::SILU, 0, 0},
                        of.tiles,
                        of.num_tiles,
                        of.tokens_per_tile},
                       stream);
}

}  // namespace moe::cuda
