// Who leaves a cache: of the residents those of the lowest scores.
#pragma once

#include <cstdint>
#include <vector>

namespace moe {

// Positions of the `count` residents of the lowest scores, lowest first, of all where there are fewer; ties
// go to the smaller position. scores, resident: [width]; no score is a NaN.
std::vector<int64_t> lowest_residents(const double* scores, const bool* resident, int64_t width,
                                      int64_t count);

}  // namespace moe
