// What a matrix must be before a kernel sees it.
#pragma once

#include "cpu/ops.h"

namespace moe {

// Known type, positive shape, whole blocks, transposed only for floats, codebook present.
void check_matrix(const char* op, const char* argument, const Matrix& matrix);

int64_t matrix_bytes(const Matrix& matrix);

RowsFn rows_of(const Matrix& matrix);

}  // namespace moe
