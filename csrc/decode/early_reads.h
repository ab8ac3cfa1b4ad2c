// Looks ahead while a token's layers run in one call, and starts the reads itself: what residency/prefetch.py
// does layer by layer, without leaving native code.
//
// The cache lends slots before a call and books afterwards what was read into which
// (residency/early_reads.py); in between nobody else reads. A guess is cancelled, when its layer's router
// chose otherwise, as long as nothing of its read was issued. One thread calls.
#pragma once

#include <cstdint>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

#include "decode/layer_watch.h"
#include "io/direct_read.h"
#include "planning/layer_pace.h"
#include "planning/lookahead.h"
#include "planning/prefetch_plan.h"

namespace moe {

class EarlyReads : public LayerWatch {
  public:
    // The last read of an expert that was begun here. It is still the expert's, in that slot, where the
    // second number of its row in the table is the ticket: whoever gives the slot away clears the row.
    struct Begun {
        int64_t ticket = 0, slot_address = 0;
    };
    struct Layer {
        std::vector<std::vector<Segment>> segments;      // by expert; regions count from the slot's start
        std::vector<std::vector<uint64_t>> first_bytes;  // by expert, of its matrices from the slot's start
        int64_t num_bytes;                               // of an expert in the file
        int64_t pool;
        int64_t history_row;  // of the look-ahead; -1: it keeps no history
        uint64_t* table;      // (num_experts, stride): resident_table.h
        int64_t stride;
        std::vector<Begun> begun;  // by expert
    };
    struct Settings {
        double threshold = 1.0;
        int64_t depth = 1;         // layers ahead
        double bytes_per_s = 0.0;  // of the link
        double free_bytes = 0.0;   // of reads under way that hold up nobody
        double stall_s = 0.0;      // waited for experts, so far
    };
    // A read that was begun into a lent slot, or the end of one that nothing of was issued.
    struct Event {
        bool is_read;
        int64_t layer_idx, expert_id;
        int64_t slot_address;
        int64_t ticket;
    };

    struct Used {
        int64_t layer_idx, expert_id;
    };

    EarlyReads(DirectReader& reader, Lookahead& lookahead, LayerPace& pace)
        : reader_(reader), lookahead_(lookahead), pace_(pace) {}

    void add_layer(int64_t layer_idx, Layer layer);
    void set(const Settings& settings) { settings_ = settings; }

    // Slots of a pool that reads may begin into, the last one first, instead of those lent before.
    void lend(int64_t pool, std::vector<int64_t> slot_addresses) { lent_[pool] = std::move(slot_addresses); }
    void lend_nothing() { lent_.clear(); }

    void set_stall_s(double stall_s) { settings_.stall_s = stall_s; }

    // The same beginning twice in a row, expected and then there, is looked at once, unless something was
    // left to read.
    void begins(const float* residual) override;
    void routed(int64_t layer, const Choice& choice, int64_t num_missing) override;
    bool has_arrived(int64_t layer, const Choice& choice, std::vector<uint64_t>& addresses) override;
    void before_experts(int64_t layer, const Choice& choice, const float* hidden) override;

    // What happened since the events were last cleared, in order; and what of it arrived and was used.
    const std::vector<Event>& events() const { return events_; }
    const std::vector<Used>& used() const { return used_; }
    void clear_events() {
        events_.clear();
        used_.clear();
    }

  private:
    struct Read {
        int64_t layer_idx, expert_id, ticket, num_bytes, pool;
    };

    // Both return whether all that is likely is being read now.
    bool look(int64_t layer, const Choice& choice, const float* hidden, double queued);
    bool read(const std::vector<Guess>& plan);
    bool is_worth_looking(int64_t layer, double queued_bytes) const;
    double queued_bytes(int64_t layer);
    std::vector<Guess> guesses(int64_t layer, const Choice& choice, const float* hidden);
    bool begin(const Guess& guess);
    bool is_there(const Layer& layer, int32_t expert_id) const;

    DirectReader& reader_;
    Lookahead& lookahead_;
    LayerPace& pace_;
    Settings settings_;
    std::map<int64_t, Layer> layers_;
    std::map<int64_t, std::vector<int64_t>> lent_;
    std::vector<Read> under_way_;
    std::vector<Event> events_;
    std::vector<Used> used_;
    std::unordered_map<int64_t, std::pair<int64_t, int64_t>> last_in_;  // by slot: layer and expert
    std::vector<Segment> segments_;
    std::vector<float> beginning_;  // that was looked at, until a router speaks
    bool rests_ = false;
    double submitting_s_ = 0.0;  // of the look-ahead under way
};

}  // namespace moe
