#include "hybrid/token_run.h"

#include <numeric>

#include "common/errors.h"
#include "decode/resident_table.h"

namespace moe {

namespace {

constexpr const char* kOp = "TokenRun";
constexpr double kWaitSeconds = 3600.0;  // at a time; interrupts are looked for meanwhile

double seconds_since(int64_t begin_ns) {
    return double(EventLog::now_ns() - begin_ns) * 1e-9;
}

}  // namespace

// A launch under way: given up where it is not collected.
class TokenRun::Launch {
  public:
    Launch(LaunchQueue& launches, RowsLaunch launch)
        : launches_(launches), ticket_(launches.submit(std::move(launch))) {}
    ~Launch() {
        if (ticket_) launches_.abandon(ticket_);
    }
    Launch(const Launch&) = delete;
    Launch& operator=(const Launch&) = delete;

    void wait(const CheckInterrupt& check_interrupt) const {
        while (!launches_.wait(ticket_, kWaitSeconds, check_interrupt)) {
        }
    }
    std::optional<DeviceFailure> collect(float* out, const std::vector<int32_t>& places) {
        const LaunchQueue::Ticket ticket = std::exchange(ticket_, 0);
        return launches_.collect(ticket, out, places);
    }

  private:
    LaunchQueue& launches_;
    LaunchQueue::Ticket ticket_;
};

void TokenRun::Side::add(int32_t position, const uint64_t* expert, int64_t width) {
    positions.push_back(position);
    addresses.insert(addresses.end(), expert, expert + width);
}

void TokenRun::set_layer(int64_t layer, SharedLayer shared) {
    check(layer >= 0 && layer < step_.num_layers(), kOp, "there is no layer " + std::to_string(layer));
    check(shared.of && shared.ram_table && !shared.on_device == !shared.device_table, kOp,
          "a layer has experts, where they are in RAM, and a kernel on the device where they may be there");
    check_equal(kOp, "number of matrices", step_.num_matrices(layer), shared.of->num_matrices());
    layers_.resize(size_t(step_.num_layers()));
    layers_[layer] = std::move(shared);
}

void TokenRun::set_moves(int64_t layer, std::vector<int32_t> moves) {
    check(layer >= 0 && layer < int64_t(layers_.size()) && layers_[layer].of, kOp,
          "layer " + std::to_string(layer) + " was not described");
    layers_[layer].moves = std::move(moves);
}

int64_t TokenRun::run(int64_t first, const std::vector<CachedTokens>& cached, bool keeps_residents,
                      const CheckInterrupt& check_interrupt) {
    check_equal(kOp, "number of layers' caches", step_.num_layers(), int64_t(cached.size()));
    layers_.resize(size_t(step_.num_layers()));
    done_.clear();
    wait_s_ = 0;
    failure_.reset();
    for (int64_t layer = first; layer < step_.num_layers(); ++layer) {
        step_.attend(layer, cached[layer]);
        if (layers_[layer].of && !compute(layer, keeps_residents, check_interrupt)) return layer;
    }
    return step_.num_layers();
}

bool TokenRun::compute(int64_t layer, bool keeps_residents, const CheckInterrupt& check_interrupt) {
    const Choice& choice = step_.choice();
    if (!divide(layers_[layer], choice, keeps_residents)) return false;
    if (device_.positions.empty()) {
        const int64_t begin_ns = EventLog::now_ns();
        step_.experts(layer, cpu_.addresses.data());
        cpu_s_ = seconds_since(begin_ns);
    } else if (step_.away() ? !compute_away(layer) : !compute_both(layer, check_interrupt)) {
        return false;
    }
    std::vector<int32_t> on_device;
    for (const int32_t position : device_.positions) on_device.push_back(choice.ids[position]);
    done_.push_back({layer, choice, std::move(on_device), cpu_s_, step_.away() != nullptr});
    return true;
}

// Who computes what; false where an expert has to be read or copied.
bool TokenRun::divide(const SharedLayer& shared, const Choice& choice, bool keeps_residents) {
    const int64_t width = shared.of->num_matrices();
    const auto row = [&](const uint64_t* table, int32_t position) {
        return table + choice.ids[position] * width;
    };
    const int32_t count = int32_t(choice.ids.size());
    device_.clear(), cpu_.clear(), residents_.clear();
    for (int32_t position = 0; shared.device_table && position < count; ++position) {
        const uint64_t first = *row(shared.device_table, position);
        if (first == kOnItsWay && !keeps_residents) return false;
        if (first > kOnItsWay) residents_.push_back(position);
    }
    int32_t to_leave = 0;
    if (shared.device_table) {
        check_equal(kOp, "number of moves", count + 1, int64_t(shared.moves.size()));
        const int32_t moves = shared.moves[residents_.size()];
        if (moves > 0) return false;
        to_leave = -moves;
    }
    auto resident = residents_.begin();
    for (int32_t position = 0; position < count; ++position) {
        const uint64_t* in_ram = row(shared.ram_table, position);
        const bool on_device = resident != residents_.end() && *resident == position;
        resident += on_device;
        if (on_device && (to_leave == 0 || *in_ram <= kOnItsWay)) {
            device_.add(position, row(shared.device_table, position), width);
            continue;
        }
        if (*in_ram <= kOnItsWay) return false;
        to_leave -= on_device;
        cpu_.add(position, in_ram, width);
    }
    return true;
}

void TokenRun::compute_cpu_side(int64_t layer) {
    const int64_t begin_ns = EventLog::now_ns();
    if (!cpu_.positions.empty()) step_.expert_rows(layer, cpu_.positions, cpu_.addresses.data());
    cpu_s_ = seconds_since(begin_ns);
}

// Behind dense layers there: the device's rows stay, the CPU's go to them, and nobody waits before the next
// layer's router has spoken. False where the device failed.
bool TokenRun::compute_away(int64_t layer) {
    try {
        step_.device_rows(*layers_[layer].on_device, device_.positions, device_.addresses.data());
    } catch (const DeviceError& error) {
        step_.bring_rows_home();
        failure_ = {error.what(), error.fault};
        return false;
    }
    compute_cpu_side(layer);
    step_.add_expert_rows(layer);
    return true;
}

// The device's share is launched before the CPU begins with its own; false where the device failed.
bool TokenRun::compute_both(int64_t layer, const CheckInterrupt& check_interrupt) {
    const SharedLayer& shared = layers_[layer];
    const std::vector<int32_t>& ids = step_.choice().ids;
    const int64_t hidden_size = shared.of->hidden_size();
    RowsLaunch launch{shared.on_device, nullptr, hidden_size, shared.of->num_matrices(), {}, {}, {}, {}, {}};
    for (const int32_t position : device_.positions) launch.expert_ids.push_back(ids[position]);
    const size_t count = launch.expert_ids.size();
    launch.addresses = device_.addresses;
    launch.pair_offsets.resize(count + 1);
    std::iota(launch.pair_offsets.begin(), launch.pair_offsets.end(), 0);
    launch.pair_tokens.assign(count, 0);
    launch.after.assign(count, nullptr);
    try {
        launch.inputs = engine_.device().upload(step_.router_input().data(), 1, hidden_size);
    } catch (const DeviceError& error) {
        failure_ = {error.what(), error.fault};
        return false;
    }
    Launch under_way(engine_.launches(), std::move(launch));
    compute_cpu_side(layer);
    const int64_t waited_ns = EventLog::now_ns();
    under_way.wait(check_interrupt);
    failure_ = under_way.collect(step_.expert_rows_data(), device_.positions);
    wait_s_ += seconds_since(waited_ns);
    if (failure_) return false;
    step_.add_expert_rows(layer);
    return true;
}

}  // namespace moe
