#include "decode/early_reads.h"

#include <algorithm>
#include <chrono>

#include "decode/resident_table.h"

namespace moe {

namespace {

// Slots that are lent and not read into: with fewer a run stops at what is missing even where that has
// arrived. New ones are lent then; without, what the next layers need was read on demand (at 12% of the
// experts: half as much again).
constexpr size_t kSlotsToGoOn = 2;

double now_s() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool has(const Choice& choice, int64_t expert_id) {
    return std::binary_search(choice.ids.begin(), choice.ids.end(), static_cast<int32_t>(expert_id));
}

}  // namespace

void EarlyReads::add_layer(int64_t layer_idx, Layer layer) {
    layer.begun.assign(layer.segments.size(), {});
    layers_[layer_idx] = std::move(layer);
}

void EarlyReads::routed(int64_t layer, const Choice& choice, int64_t num_missing) {
    beginning_.clear();
    rests_ = pace_.rests(layer, num_missing);
    lookahead_.chosen(layer, choice.ids);
    const auto found = layers_.find(layer);
    if (found != layers_.end() && found->second.history_row >= 0) {
        const std::vector<int64_t> ids(choice.ids.begin(), choice.ids.end());
        lookahead_.history().observe(found->second.history_row, ids, choice.weights);
    }
    std::erase_if(under_way_, [&](const Read& read) {
        if (read.layer_idx != layer) return false;
        if (has(choice, read.expert_id)) return true;  // a step waits for it from now on
        if (reader_.is_over(read.ticket) || !reader_.cancel(read.ticket)) return false;
        events_.push_back({false, read.layer_idx, read.expert_id, 0, read.ticket});
        return true;
    });
}

void EarlyReads::begins(const float* residual) {
    constexpr int64_t kFirst = -1;
    const float* const end = residual + lookahead_.hidden_size();
    if (std::equal(residual, end, beginning_.begin(), beginning_.end())) return;
    beginning_.clear();
    if (look(kFirst, {}, residual, queued_bytes(kFirst) - settings_.free_bytes))
        beginning_.assign(residual, end);
}

// All or nothing: a layer that somebody else serves is served there as a whole.
bool EarlyReads::has_arrived(int64_t layer, const Choice& choice, std::vector<uint64_t>& addresses) {
    const auto found = layers_.find(layer);
    if (found == layers_.end()) return false;
    const Layer& own = found->second;
    std::vector<int64_t>& lent = lent_[own.pool];
    if (lent.size() < kSlotsToGoOn) return false;
    const auto is_missing = [&](size_t i) { return addresses[i * own.stride] <= kOnItsWay; };
    for (size_t i = 0; i < choice.ids.size(); ++i)
        if (is_missing(i) && !is_there(own, choice.ids[i])) return false;
    for (size_t i = 0; i < choice.ids.size(); ++i) {
        if (!is_missing(i)) continue;
        const int32_t id = choice.ids[i];
        const int64_t slot_address = own.begun[id].slot_address;
        for (int64_t m = 0; m < own.stride; ++m)
            addresses[i * own.stride + m] = own.first_bytes[id][m] + static_cast<uint64_t>(slot_address);
        std::erase(lent, slot_address);  // it may be lent: from now on somebody needs it
        used_.push_back({layer, id});
    }
    return true;
}

// Whether an expert without a resident's place was read here, well, and still has its slot.
bool EarlyReads::is_there(const Layer& layer, int32_t expert_id) const {
    const int64_t ticket = layer.begun[expert_id].ticket;
    if (layer.stride < 2 || ticket == 0) return false;
    const uint64_t* row = layer.table + expert_id * layer.stride;
    return row[0] == kOnItsWay && row[1] == static_cast<uint64_t>(ticket) && reader_.is_read(ticket);
}

void EarlyReads::before_experts(int64_t layer, const Choice& choice, const float* hidden) {
    if (rests_) return;
    const double started = now_s();
    pace_.look(started, settings_.stall_s);
    const double queued = queued_bytes(layer) - settings_.free_bytes;
    if (!is_worth_looking(layer, queued)) return;
    look(layer, choice, hidden, queued);
    pace_.predicted(now_s() - started - submitting_s_);
}

bool EarlyReads::look(int64_t layer, const Choice& choice, const float* hidden, double queued) {
    submitting_s_ = 0.0;
    const double window_bytes = pace_.window_s * settings_.bytes_per_s;
    const std::vector<Guess> likely = guesses(layer, choice, hidden);
    const std::vector<Guess> plan = plan_reads(likely, queued, window_bytes, settings_.threshold);
    return read(plan) && plan.size() == likely.size();
}

// Not where guesses keep the link busy for a window, nor where one saves less than it costs.
bool EarlyReads::is_worth_looking(int64_t layer, double queued_bytes) const {
    if (queued_bytes > pace_.window_s * settings_.bytes_per_s) return false;
    return pace_.is_worth_predicting(layer);
}

// Bytes of guesses that are being read or about to be, for the pool of a layer.
double EarlyReads::queued_bytes(int64_t layer) {
    std::erase_if(under_way_, [&](const Read& read) { return reader_.is_over(read.ticket); });
    const auto found = layers_.find(layer);
    double queued = 0.0;
    for (const Read& read : under_way_) {
        if (found == layers_.end() || read.pool == found->second.pool)
            queued += static_cast<double>(read.num_bytes);
    }
    return queued;
}

std::vector<Guess> EarlyReads::guesses(int64_t layer, const Choice& choice, const float* hidden) {
    const std::vector<int64_t> ids(choice.ids.begin(), choice.ids.end());
    const float threshold = static_cast<float>(settings_.threshold);
    std::vector<Guess> guesses;
    for (const Lookahead::Likely& likely :
         lookahead_.likely(layer, settings_.depth, hidden, ids, choice.weights, threshold)) {
        const auto found = layers_.find(likely.layer_idx);
        if (found == layers_.end()) continue;
        guesses.push_back({likely.windows, likely.layer_idx, likely.expert_id,
                           static_cast<double>(likely.chance), found->second.num_bytes});
    }
    return guesses;
}

bool EarlyReads::read(const std::vector<Guess>& plan) {
    if (plan.empty()) return true;
    const double started = now_s();
    int64_t num_reads = 0;
    for (const Guess& guess : plan) num_reads += begin(guess);
    if (num_reads == 0) return false;
    submitting_s_ = now_s() - started;
    pace_.submitted(submitting_s_, num_reads);
    return num_reads == static_cast<int64_t>(plan.size());
}

// Into a lent slot; false where none is left.
bool EarlyReads::begin(const Guess& guess) {
    Layer& layer = layers_.at(guess.layer_idx);
    const auto lent = lent_.find(layer.pool);
    if (lent == lent_.end() || lent->second.empty()) return false;
    const int64_t slot_address = lent->second.back();
    segments_ = layer.segments[static_cast<size_t>(guess.expert_id)];
    for (Segment& segment : segments_) segment.region += slot_address;
    const int64_t ticket = reader_.submit(segments_, true);
    lent->second.pop_back();
    const auto [before, is_first] = last_in_.try_emplace(slot_address, guess.layer_idx, guess.expert_id);
    if (!is_first) {  // a finished guess gives way
        Begun& gone = layers_.at(before->second.first).begun[before->second.second];
        if (gone.slot_address == slot_address) gone = {};
        before->second = {guess.layer_idx, guess.expert_id};
    }
    uint64_t* row = layer.table + guess.expert_id * layer.stride;
    row[0] = kOnItsWay;
    if (layer.stride > 1) row[1] = static_cast<uint64_t>(ticket);
    layer.begun[guess.expert_id] = {ticket, slot_address};
    events_.push_back({true, guess.layer_idx, guess.expert_id, slot_address, ticket});
    under_way_.push_back({guess.layer_idx, guess.expert_id, ticket, guess.num_bytes, layer.pool});
    return true;
}

}  // namespace moe
