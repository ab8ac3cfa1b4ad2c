#include "cpu/matrix_checks.h"

#include "common/errors.h"
#include "cpu/isa.h"

namespace moe {

namespace {

constexpr int64_t kMaxSide = int64_t(1) << 31;  // keeps every product of a shape inside int64

bool needs_grid(int type) {
    switch (type) {
        case IQ2_XXS:
        case IQ2_XS:
        case IQ2_S:
        case IQ3_XXS:
        case IQ3_S:
        case IQ1_S:
        case IQ1_M:
            return true;
        default:
            return false;
    }
}

}  // namespace

void check_matrix(const char* op, const char* argument, const Matrix& matrix) {
    const std::string name = argument;
    const std::string type = std::to_string(matrix.type);
    const bool known = matrix.type >= 0 && matrix.type < kNumTypes && kernels().rows[matrix.type];
    check(known, op, name + " has ggml type " + type + ", which has no kernel");
    check(matrix.rows > 0 && matrix.cols > 0 && matrix.rows < kMaxSide && matrix.cols < kMaxSide, op,
          name + " must have between 1 and 2^31 rows and columns, got " + std::to_string(matrix.rows) +
              " x " + std::to_string(matrix.cols));
    const int elements = kernels().block_elements[matrix.type];
    check(matrix.cols % elements == 0, op,
          name + " of ggml type " + type + " must have columns in blocks of " + std::to_string(elements) +
              ", got " + std::to_string(matrix.cols));
    check(!matrix.transposed || kernels().rows_transposed[matrix.type], op,
          name + " of ggml type " + type + " cannot be transposed: only F32, F16 and BF16 can");
    check(!needs_grid(matrix.type) || grids.of[matrix.type], op,
          name + " of ggml type " + type + " needs its codebook: call set_grid first");
}

int64_t matrix_bytes(const Matrix& matrix) {
    const Kernels& table = kernels();
    return matrix.rows * (matrix.cols / table.block_elements[matrix.type] * table.block_bytes[matrix.type]);
}

RowsFn rows_of(const Matrix& matrix) {
    return matrix.transposed ? kernels().rows_transposed[matrix.type] : kernels().rows[matrix.type];
}

}  // namespace moe
