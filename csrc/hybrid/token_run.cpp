#include "hybrid/token_run.h"

#include <algorithm>
#include <numeric>

#include "common/errors.h"
#include "decode/resident_table.h"

namespace moe {

namespace {

constexpr const char* kOp = "TokenRun";
constexpr double kWaitedSeconds = 5e-6;  // less says nothing: the device was done when it was asked
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
    // None where the rows stay on the device.
    std::optional<DeviceFailure> collect(float* out, const std::vector<int32_t>& places) {
        const LaunchQueue::Ticket ticket = std::exchange(ticket_, 0);
        return launches_.collect(ticket, out, places);
    }

  private:
    LaunchQueue& launches_;
    LaunchQueue::Ticket ticket_;
};

// A layer's copies: whatever becomes of the layer, none is under way behind it.
class TokenRun::Copies {
  public:
    explicit Copies(CopyQueue& queue) : queue_(queue) {}
    ~Copies() {
        for (const CopyQueue::Ticket ticket : tickets_) {
            queue_.cancel(ticket);
            queue_.wait(ticket, kWaitSeconds, [] {});
            queue_.forget(ticket);
        }
    }
    Copies(const Copies&) = delete;
    Copies& operator=(const Copies&) = delete;

    void submit(const CopySpan& span) {
        tickets_.push_back(queue_.submit({span}, false));
        handles_.push_back(queue_.handle(tickets_.back()));
    }
    size_t size() const { return tickets_.size(); }
    const std::vector<CopyQueue::Handle>& handles() const { return handles_; }

  private:
    CopyQueue& queue_;
    std::vector<CopyQueue::Ticket> tickets_;
    std::vector<CopyQueue::Handle> handles_;
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

SharedLayer& TokenRun::described(int64_t layer) {
    check(layer >= 0 && layer < int64_t(layers_.size()) && layers_[layer].of, kOp,
          "layer " + std::to_string(layer) + " was not described");
    return layers_[layer];
}

void TokenRun::set_moves(int64_t layer, std::vector<int32_t> moves) {
    described(layer).moves = std::move(moves);
}

void TokenRun::set_copies(int64_t layer, size_t pool, uint64_t first_slot, uint64_t slot_bytes,
                          std::vector<int64_t> matrix_bytes) {
    SharedLayer& shared = described(layer);
    check(slot_bytes > 0, kOp, "slots have bytes");
    check_equal(kOp, "number of matrices", shared.of->num_matrices(), int64_t(matrix_bytes.size()));
    shared.pool = pool, shared.first_slot = first_slot, shared.slot_bytes = slot_bytes;
    shared.matrix_bytes = std::move(matrix_bytes);
}

int64_t TokenRun::run(int64_t first, const std::vector<CachedTokens>& cached,
                      std::vector<std::vector<uint64_t>> free_slots, bool is_attended,
                      const CheckInterrupt& check_interrupt) {
    check_equal(kOp, "number of layers' caches", step_.num_layers(), int64_t(cached.size()));
    layers_.resize(size_t(step_.num_layers()));
    free_slots_ = std::move(free_slots);
    done_.clear();
    wait_s_ = 0, start_s_ = 0, num_starts_ = 0;
    failure_.reset();
    lacks_slots_ = false;
    const double device_s = engine_.launches().counters().busy_seconds;
    const double link_s = engine_.copies().counters().busy_seconds;
    const int64_t stopped = run_layers(first, cached, is_attended, check_interrupt);
    device_s_ = engine_.launches().counters().busy_seconds - device_s;
    link_s_ = engine_.copies().counters().busy_seconds - link_s;
    return stopped;
}

int64_t TokenRun::run_layers(int64_t first, const std::vector<CachedTokens>& cached, bool is_attended,
                             const CheckInterrupt& check_interrupt) {
    for (int64_t layer = first; layer < step_.num_layers(); ++layer) {
        if (layer > first || !is_attended) step_.attend(layer, cached[layer]);
        if (layers_[layer].of && !compute(layer, check_interrupt)) return layer;
    }
    return step_.num_layers();
}

bool TokenRun::compute(int64_t layer, const CheckInterrupt& check_interrupt) {
    const Choice& choice = step_.choice();
    copied_.clear();
    if (!divide(layers_[layer], choice)) return false;
    if (division_.on_device.empty() && division_.copied.empty()) {
        const int64_t begin_ns = EventLog::now_ns();
        step_.experts(layer, cpu_.addresses.data());
        cpu_s_ = seconds_since(begin_ns);
    } else if (!compute_both(layer, check_interrupt)) {
        return false;
    }
    std::vector<int32_t> on_device;
    for (const int32_t position : device_.positions) on_device.push_back(choice.ids[position]);
    done_.push_back({layer, choice, std::move(on_device), copied_, cpu_s_, step_.away() != nullptr});
    return true;
}

// Who computes what; false where an expert has to be read, should be copied and is on its way already, or
// finds no slot for its copy.
bool TokenRun::divide(const SharedLayer& shared, const Choice& choice) {
    const int64_t width = shared.of->num_matrices();
    const size_t count = choice.ids.size();
    const auto row = [&](const uint64_t* table, int32_t position) {
        return table + choice.ids[position] * width;
    };
    device_.clear(), cpu_.clear();
    there_.assign(count, 0), comes_.assign(count, 0), in_ram_.assign(count, 0);
    for (int32_t position = 0; position < int32_t(count); ++position) {
        const uint64_t first = shared.device_table ? *row(shared.device_table, position) : 0;
        comes_[position] = first == kOnItsWay;
        there_[position] = first > kOnItsWay;
        in_ram_[position] = *row(shared.ram_table, position) > kOnItsWay;
    }
    const std::vector<int32_t> none(count + 1, 0);
    divide_token(there_, in_ram_, shared.device_table ? shared.moves : none, division_);
    for (const int32_t position : division_.on_device)
        device_.add(position, row(shared.device_table, position), width);
    num_there_ = division_.on_device.size();
    for (const int32_t position : division_.copied)
        if (comes_[position]) return false;
    for (const std::vector<int32_t>* part : {&division_.copied, &division_.on_cpu})
        for (const int32_t position : *part)
            if (!in_ram_[position]) return false;
    for (const int32_t position : division_.on_cpu)
        cpu_.add(position, row(shared.ram_table, position), width);
    const size_t num_slots = shared.pool < free_slots_.size() ? free_slots_[shared.pool].size() : 0;
    lacks_slots_ = division_.copied.size() > num_slots;
    return !lacks_slots_;
}

// Queues the copies of a layer: an expert's matrices keep their places in the slot.
void TokenRun::copy(const SharedLayer& shared, const Choice& choice, Copies& copies) {
    const int64_t width = shared.of->num_matrices();
    std::vector<uint64_t> there(shared.matrix_bytes.size());
    for (const int32_t position : division_.copied) {
        const uint64_t* here = shared.ram_table + choice.ids[position] * width;
        const uint64_t slot_here = here[0] - (here[0] - shared.first_slot) % shared.slot_bytes;
        const uint64_t slot = free_slots_[shared.pool].back();
        free_slots_[shared.pool].pop_back();
        uint64_t begin = here[0], end = here[0];
        for (int64_t m = 0; m < width; ++m) {
            begin = std::min(begin, here[m]);
            end = std::max(end, here[m] + uint64_t(shared.matrix_bytes[m]));
            there[m] = slot + (here[m] - slot_here);
        }
        copied_.emplace_back(choice.ids[position], slot);
        device_.add(position, there.data(), width);
        copies.submit({reinterpret_cast<const std::byte*>(begin),
                       reinterpret_cast<std::byte*>(slot + (begin - slot_here)), int64_t(end - begin)});
    }
}

void TokenRun::compute_cpu_side(int64_t layer) {
    const int64_t begin_ns = EventLog::now_ns();
    if (!cpu_.positions.empty()) step_.expert_rows(layer, cpu_.positions, cpu_.addresses.data());
    cpu_s_ = seconds_since(begin_ns);
}

// The device's experts from number ``first`` on, each behind the copy that brings it.
RowsLaunch TokenRun::launch_of(int64_t layer, size_t first, const Copies& copies) const {
    const SharedLayer& shared = layers_[layer];
    const int64_t width = shared.of->num_matrices();
    RowsLaunch launch{shared.on_device, nullptr, shared.of->hidden_size(), width, {}, {}, {}, {}, {}};
    for (size_t i = first; i < device_.positions.size(); ++i) {
        launch.expert_ids.push_back(step_.choice().ids[device_.positions[i]]);
        launch.after.push_back(i < num_there_ ? nullptr : copies.handles()[i - num_there_]);
    }
    const size_t count = launch.expert_ids.size();
    launch.addresses.assign(device_.addresses.begin() + int64_t(first) * width, device_.addresses.end());
    launch.pair_offsets.resize(count + 1);
    std::iota(launch.pair_offsets.begin(), launch.pair_offsets.end(), 0);
    launch.pair_tokens.assign(count, 0);
    return launch;
}

// The device's share is under way before the CPU begins with its own; false where the device failed. Behind
// dense layers there the device's rows stay and the CPU's go to them; the host waits for copies at most, and
// for the device when the next layer's router has spoken.
bool TokenRun::compute_both(int64_t layer, const CheckInterrupt& check_interrupt) {
    const SharedLayer& shared = layers_[layer];
    DenseStep* away = step_.away();
    const int64_t begin_ns = EventLog::now_ns();
    const double busy_s = engine_.launches().counters().busy_seconds;
    Copies copies(engine_.copies());
    std::optional<Launch> under_way;
    std::vector<int32_t> waited_for;  // positions
    try {
        copy(shared, step_.choice(), copies);
        const std::vector<int32_t> here(device_.positions.begin(),
                                        device_.positions.begin() + int64_t(num_there_));
        waited_for.assign(device_.positions.begin() + int64_t(away ? num_there_ : 0),
                          device_.positions.end());
        if (away && num_there_) step_.device_rows(*shared.on_device, here, device_.addresses.data());
        if (!waited_for.empty()) {
            RowsLaunch launch = launch_of(layer, away ? num_there_ : 0, copies);
            if (away)
                launch.stays_with = away, launch.first_row = step_.leave_rows(waited_for);
            else
                launch.inputs =
                    engine_.device().upload(step_.router_input().data(), 1, shared.of->hidden_size());
            under_way.emplace(engine_.launches(), std::move(launch));
        }
    } catch (const DeviceError& error) {
        failure_ = {error.what(), error.fault};
    }
    if (!failure_) compute_cpu_side(layer);
    if (under_way) {
        const int64_t waited_ns = EventLog::now_ns();
        under_way->wait(check_interrupt);
        failure_ = under_way->collect(step_.expert_rows_data(), waited_for);
        const double waited_s = seconds_since(waited_ns);
        wait_s_ += waited_s;
        if (!away && copied_.empty() && waited_s > kWaitedSeconds) {
            const double computed_s = engine_.launches().counters().busy_seconds - busy_s;
            start_s_ += std::max(0.0, seconds_since(begin_ns) - computed_s), ++num_starts_;
        }
    }
    if (!failure_) return step_.add_expert_rows(layer), true;
    if (away) step_.bring_rows_home();
    return false;
}

}  // namespace moe
