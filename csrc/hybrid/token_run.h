// One token's layers on CPU and device at once, without coming back to Python, as long as the experts that a
// router chose are at hand: on the device, or in RAM, from where some are copied to free slots there.
//
// Nothing is decided here. A token's experts cost the same, so the scheduler's answer depends on how many of
// them the device has, and moe_offload/planning/token_moves.py has written it down for each such number;
// planning/token_division.h says which ones. Who leaves when no slot is free is Python's to say. The bits are
// those of runtime/hybrid_step.py: rows from both sides, summed by ascending expert id.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "decode/decode_step.h"
#include "device/engine.h"
#include "planning/token_division.h"

namespace moe {

// A layer's experts on both sides; `of` null: a layer without experts.
struct SharedLayer {
    const ExpertKernel* of = nullptr;
    const DeviceKernel* on_device = nullptr;  // null: the CPU computes the layer alone
    const uint64_t* device_table = nullptr;   // decode/resident_table.h; null with on_device
    const uint64_t* ram_table = nullptr;
    // (top_k + 1,) by how many of a token's experts the device has: so many more are copied there, or, below
    // zero, left to the CPU.
    std::vector<int32_t> moves;
    // For copies: which of run()'s lists has free slots for them; RAM's slots, at whose places in a slot an
    // expert's matrices are on the device, too; the matrices' bytes.
    size_t pool = 0;
    uint64_t first_slot = 0, slot_bytes = 1;
    std::vector<int64_t> matrix_bytes;
};

// What became of a layer.
struct SharedLayerDone {
    int64_t layer;
    Choice choice;
    std::vector<int32_t> on_device;                    // experts
    std::vector<std::pair<int32_t, uint64_t>> copied;  // of these: expert and slot
    double cpu_s;                                      // of the CPU's share
    bool stayed;                                       // the device's rows did, behind its dense layers
};

class TokenRun {
  public:
    using CheckInterrupt = CopyQueue::CheckInterrupt;

    TokenRun(DecodeStep& step, DeviceEngine& engine) : step_(step), engine_(engine) {}

    void set_layer(int64_t layer, SharedLayer shared);
    void set_moves(int64_t layer, std::vector<int32_t> moves);

    void set_copies(int64_t layer, size_t pool, uint64_t first_slot, uint64_t slot_bytes,
                    std::vector<int64_t> matrix_bytes);

    // Attention and experts of the layers from ``first`` on. Returns the layer whose router has spoken and
    // whose experts are still to be computed, since one has to be read, no slot is free for a copy or the
    // device failed; or the number of layers. What Python decides and what is on its way then decides the
    // layer; what is on its way and is left to the CPU counts as absent. `free_slots`: addresses by pool,
    // used from the ends. `is_attended`: run() returned ``first`` before, and the token is still there.
    int64_t run(int64_t first, const std::vector<CachedTokens>& cached,
                std::vector<std::vector<uint64_t>> free_slots, bool is_attended,
                const CheckInterrupt& check_interrupt);

    // Of the last run: the layers with experts that it computed; seconds in which the host waited; and why
    // the device failed at the layer where the run stopped.
    const std::vector<SharedLayerDone>& done() const { return done_; }
    double wait_s() const { return wait_s_; }
    // What layers took beside the device's computing, of those that the host waited for and nothing was
    // copied for: inputs, launch, waking and waiting; and how many those were.
    double start_s() const { return start_s_; }
    int64_t num_starts() const { return num_starts_; }
    double device_s() const { return device_s_; }      // in which it computed rows that came home
    double link_s() const { return link_s_; }          // in which the link to it was busy
    bool lacks_slots() const { return lacks_slots_; }  // that is why it stopped
    const std::optional<DeviceFailure>& failure() const { return failure_; }

  private:
    // Some of the chosen experts, by position in the choice.
    struct Side {
        std::vector<int32_t> positions;
        std::vector<uint64_t> addresses;  // (positions, number of matrices)
        void clear() { positions.clear(), addresses.clear(); }
        void add(int32_t position, const uint64_t* expert, int64_t width);
    };
    class Launch;
    class Copies;

    SharedLayer& described(int64_t layer);
    int64_t run_layers(int64_t first, const std::vector<CachedTokens>& cached, bool is_attended,
                       const CheckInterrupt& check_interrupt);

    bool compute(int64_t layer, const CheckInterrupt& check_interrupt);
    bool divide(const SharedLayer& shared, const Choice& choice);
    void copy(const SharedLayer& shared, const Choice& choice, Copies& copies);
    bool compute_both(int64_t layer, const CheckInterrupt& check_interrupt);
    RowsLaunch launch_of(int64_t layer, size_t first, const Copies& copies) const;
    void compute_cpu_side(int64_t layer);

    DecodeStep& step_;
    DeviceEngine& engine_;
    std::vector<SharedLayer> layers_;
    Side device_, cpu_;  // of the device, first what is there, then what is copied
    size_t num_there_ = 0;
    TokenDivision division_;
    std::vector<uint8_t> there_, comes_, in_ram_;  // by position
    std::vector<std::vector<uint64_t>> free_slots_;
    std::vector<std::pair<int32_t, uint64_t>> copied_;  // of the layer under way: expert and slot
    bool lacks_slots_ = false;
    std::vector<SharedLayerDone> done_;
    double wait_s_ = 0, cpu_s_ = 0, device_s_ = 0, link_s_ = 0, start_s_ = 0;
    int64_t num_starts_ = 0;
    std::optional<DeviceFailure> failure_;
};

}  // namespace moe
