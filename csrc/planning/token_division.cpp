#include "planning/token_division.h"

#include <algorithm>

#include "common/errors.h"

namespace moe {

void divide_token(std::span<const uint8_t> there, std::span<const uint8_t> in_ram,
                  std::span<const int32_t> moves, TokenDivision& division) {
    constexpr const char* kOp = "divide_token";
    check_equal(kOp, "number of experts", int64_t(there.size()), int64_t(in_ram.size()));
    check_equal(kOp, "number of moves", int64_t(there.size()) + 1, int64_t(moves.size()));
    division.on_device.clear(), division.copied.clear(), division.on_cpu.clear();
    const auto residents = std::ranges::count_if(there, [](uint8_t is_there) { return is_there != 0; });
    int32_t to_copy = std::max(0, moves[size_t(residents)]),
            to_leave = std::max(0, -moves[size_t(residents)]);
    for (size_t position = 0; position < there.size(); ++position) {
        std::vector<int32_t>* part = &division.on_cpu;
        if (there[position] && (to_leave == 0 || !in_ram[position]))
            part = &division.on_device;
        else if (there[position])
            --to_leave;
        else if (to_copy > 0)
            --to_copy, part = &division.copied;
        part->push_back(int32_t(position));
    }
}

}  // namespace moe
