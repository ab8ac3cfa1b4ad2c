#include "planning/lowest_residents.h"

namespace moe {

std::vector<int64_t> lowest_residents(const double* scores, const bool* resident, int64_t width,
                                      int64_t count) {
    std::vector<int64_t> lowest;  // ascending
    if (count <= 0) return lowest;
    for (int64_t position = 0; position < width; ++position) {
        if (!resident[position]) continue;
        const bool is_full = static_cast<int64_t>(lowest.size()) == count;
        if (is_full && !(scores[position] < scores[lowest.back()])) continue;
        if (is_full) lowest.pop_back();
        auto place = lowest.end();  // before the first that is higher; few are looked for
        while (place != lowest.begin() && scores[position] < scores[*(place - 1)]) --place;
        lowest.insert(place, position);
    }
    return lowest;
}

}  // namespace moe
