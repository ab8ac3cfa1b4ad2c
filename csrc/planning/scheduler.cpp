#include "planning/scheduler.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <tuple>

namespace moe {
namespace {

constexpr double kGridStep = 1.0 / 1024;  // of the upper bound: GPU times nearer than this count as equal
// Up to so many experts are scheduled on that grid. With more its states would take tens of milliseconds (128
// experts of a prompt: 2 to 230), so two of each of kMostCells ranges of GPU time go on (0.2 to 0.5).
constexpr size_t kMostExact = 16, kMostCells = 128;

// A partial choice: what both sides have to do so far.
struct State {
    double gpu_s;
    double cpu_s;
    int copies;
    int32_t parent;
    uint8_t on_gpu;
};

double side_s(double busy_s, double start_s) {
    return busy_s > 0 ? busy_s + start_s : 0;
}

double finish_s(const LayerWork& work, const State& state) {
    return std::max(side_s(state.cpu_s, work.cpu_start_s), side_s(state.gpu_s, work.gpu_start_s));
}

State put(const LayerWork& work, State state, int expert, bool on_gpu, int32_t parent) {
    state.parent = parent;
    state.on_gpu = on_gpu;
    if (!on_gpu) {
        state.cpu_s += work.cpu_s[expert];
    } else if (work.on_gpu[expert]) {
        state.gpu_s += work.gpu_s[expert];
    } else {
        ++state.copies;
        state.gpu_s = std::max(state.gpu_s, state.copies * work.copy_s) + work.gpu_s[expert];
    }
    return state;
}

// Residents first, then misses; each group with the longest GPU time first.
std::vector<int> order_of(const LayerWork& work) {
    std::vector<int> order(work.cpu_s.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
        if (work.on_gpu[a] != work.on_gpu[b]) return work.on_gpu[a] > work.on_gpu[b];
        return work.gpu_s[a] > work.gpu_s[b];
    });
    return order;
}

double finish_in(const LayerWork& work, const std::vector<int>& order, const std::vector<uint8_t>& on_gpu) {
    State state{0, 0, 0, -1, 0};
    for (const int expert : order) state = put(work, state, expert, on_gpu[expert], -1);
    return finish_s(work, state);
}

// Whether every expert costs the same, as in decoding: one token each.
bool all_equal(const LayerWork& work) {
    const auto same = [](const std::vector<double>& times) {
        return std::adjacent_find(times.begin(), times.end(), std::not_equal_to<>()) == times.end();
    };
    return same(work.cpu_s) && same(work.gpu_s);
}

// The GPU's busy time with `residents` experts there and `copies` on their way: the link or the GPU binds.
double gpu_busy_s(const LayerWork& work, int residents, int copies) {
    const double gpu = work.gpu_s.empty() ? 0 : work.gpu_s[0], copy = work.copy_s;
    if (copies == 0) return residents * gpu;
    return std::max({(residents + copies) * gpu, copy + copies * gpu, copies * copy + gpu});
}

// Equal loads, exactly, in one pass. Leaving a resident to the CPU while copying a miss is never better
// than the other way round, so either some misses are copied or some residents are left to the CPU.
Schedule schedule_equal(const LayerWork& work, const std::vector<int>& order) {
    std::vector<int> movable;  // residents that the CPU can take, then misses, in the order of the scan
    int residents = 0;
    for (const int expert : order) {
        residents += work.on_gpu[expert];
        if (work.on_gpu[expert] && work.in_ram[expert]) movable.push_back(expert);
    }
    const int first_miss = static_cast<int>(movable.size());
    for (const int expert : order)
        if (!work.on_gpu[expert]) movable.push_back(expert);
    const int misses = static_cast<int>(movable.size()) - first_miss;
    const double cpu = work.cpu_s.empty() ? 0 : work.cpu_s[0];
    int best = 0;  // > 0: misses to copy, < 0: residents to leave
    double best_s = 1e300;
    for (int copies = -first_miss; copies <= misses; ++copies) {
        const double cpu_busy_s = (misses - copies) * cpu;
        const double gpu_s = gpu_busy_s(work, residents + std::min(copies, 0), std::max(copies, 0));
        const double finish = std::max(side_s(cpu_busy_s, work.cpu_start_s), side_s(gpu_s, work.gpu_start_s));
        if (finish < best_s || (finish == best_s && std::abs(copies) < std::abs(best)))
            best = copies, best_s = finish;
    }
    Schedule schedule{work.on_gpu, best_s};
    for (int i = 0; i < best; ++i) schedule.on_gpu[movable[first_miss + i]] = 1;
    for (int i = 0; i < -best; ++i) schedule.on_gpu[movable[i]] = 0;
    return schedule;
}

// The best of: the m misses with the longest GPU time copied, or the m shortest residents left to the CPU.
Schedule by_threshold(const LayerWork& work, const std::vector<int>& order) {
    Schedule best{work.on_gpu, finish_in(work, order, work.on_gpu)};
    std::vector<uint8_t> choice = work.on_gpu;
    const auto take = [&] {
        const double finish = finish_in(work, order, choice);
        if (finish < best.finish_s) best = {choice, finish};
    };
    for (const int expert : order) {
        if (work.on_gpu[expert]) continue;
        choice[expert] = 1;
        take();
    }
    choice = work.on_gpu;
    for (auto expert = order.rbegin(); expert != order.rend(); ++expert) {
        if (!work.on_gpu[*expert] || !work.in_ram[*expert]) continue;
        choice[*expert] = 0;
        take();
    }
    return best;
}

// Drops states that another one equals or beats on both sides with no more copies.
void keep_best(std::vector<State>& states, double cell_s) {
    const auto cell = [&](const State& state) { return static_cast<int64_t>(state.gpu_s / cell_s); };
    std::sort(states.begin(), states.end(), [&](const State& a, const State& b) {
        const int64_t cell_a = cell(a), cell_b = cell(b);
        if (cell_a != cell_b) return cell_a < cell_b;
        if (a.cpu_s != b.cpu_s) return a.cpu_s < b.cpu_s;
        return a.copies != b.copies ? a.copies < b.copies : a.gpu_s < b.gpu_s;
    });
    std::vector<double> least;  // [c]: CPU time of the best kept state with at most c copies
    size_t kept = 0;
    for (const State& state : states) {
        while (static_cast<int>(least.size()) <= state.copies)
            least.push_back(least.empty() ? 1e300 : least.back());
        if (least[state.copies] <= state.cpu_s) continue;
        for (size_t c = state.copies; c < least.size(); ++c) least[c] = std::min(least[c], state.cpu_s);
        states[kept++] = state;
    }
    states.resize(kept);
}

// Keeps of each range of GPU time the state with the least CPU time, and that with the fewest copies.
void thin(std::vector<State>& states, double most_gpu_s) {
    if (states.size() <= kMostCells) return;
    constexpr int32_t kNone = -1;
    std::vector<int32_t> quickest(kMostCells, kNone), lightest(kMostCells, kNone);
    for (size_t i = 0; i < states.size(); ++i) {
        const State& state = states[i];
        const auto cell = static_cast<size_t>(state.gpu_s / most_gpu_s * kMostCells);
        int32_t& quick = quickest[std::min(cell, kMostCells - 1)];
        int32_t& light = lightest[std::min(cell, kMostCells - 1)];
        if (quick == kNone || state.cpu_s < states[quick].cpu_s) quick = static_cast<int32_t>(i);
        if (light == kNone ||
            std::tie(state.copies, state.cpu_s) < std::tie(states[light].copies, states[light].cpu_s))
            light = static_cast<int32_t>(i);
    }
    std::vector<State> kept;
    for (size_t cell = 0; cell < kMostCells; ++cell) {
        if (quickest[cell] == kNone) continue;
        kept.push_back(states[quickest[cell]]);
        if (lightest[cell] != quickest[cell]) kept.push_back(states[lightest[cell]]);
    }
    states = std::move(kept);
}

// Walks the chain of choices back from the last state.
std::vector<uint8_t> choices(const std::vector<std::vector<State>>& levels, int32_t last,
                             const std::vector<int>& order) {
    std::vector<uint8_t> on_gpu(order.size());
    for (size_t level = order.size(); level > 0; --level) {
        const State& state = levels[level][last];
        on_gpu[order[level - 1]] = state.on_gpu;
        last = state.parent;
    }
    return on_gpu;
}

}  // namespace

double finish_of(const LayerWork& work, const std::vector<uint8_t>& on_gpu) {
    return finish_in(work, order_of(work), on_gpu);
}

Schedule schedule_layer(const LayerWork& work) {
    const std::vector<int> order = order_of(work);
    if (all_equal(work)) return schedule_equal(work, order);
    Schedule best = by_threshold(work, order);
    double rest_s = 0;  // the least that the experts still to be placed cost, wherever they go
    for (const int expert : order) rest_s += std::min(work.cpu_s[expert], work.gpu_s[expert]);
    std::vector<std::vector<State>> levels{{State{0, 0, 0, -1, 0}}};
    for (const int expert : order) {
        rest_s -= std::min(work.cpu_s[expert], work.gpu_s[expert]);
        std::vector<State> next;
        for (size_t i = 0; i < levels.back().size(); ++i) {
            const State& state = levels.back()[i];
            for (const bool on_gpu : {false, true}) {
                if (!on_gpu && !work.in_ram[expert]) continue;
                const State placed = put(work, state, expert, on_gpu, static_cast<int32_t>(i));
                const double least_s = (placed.cpu_s + placed.gpu_s + rest_s) / 2;
                if (std::max(finish_s(work, placed), least_s) < best.finish_s) next.push_back(placed);
            }
        }
        if (order.size() > kMostExact)
            thin(next, best.finish_s);
        else
            keep_best(next, best.finish_s * kGridStep);
        if (next.empty()) return best;  // nothing beats the threshold
        levels.push_back(std::move(next));
    }
    const std::vector<State>& last = levels.back();
    const auto winner = std::min_element(last.begin(), last.end(), [&](const State& a, const State& b) {
        return finish_s(work, a) < finish_s(work, b);
    });
    return {choices(levels, static_cast<int32_t>(winner - last.begin()), order), finish_s(work, *winner)};
}

}  // namespace moe
