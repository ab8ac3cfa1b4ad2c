// Hammers a device's copies and launches, for -fsanitize=thread and -fsanitize=address.
// stress_device ROUNDS: exits 0 when every launch saw what its copies brought, abandoned ones left nothing
// behind, and faults came back as such. The device computes one product per element, so that any write that
// is not ordered before a read shows.
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>

#include "device/engine.h"

using namespace moe;

namespace {

constexpr int64_t kSlots = 8, kHidden = 256, kSlotBytes = kHidden * int64_t(sizeof(float));
constexpr double kPatience = 60;  // seconds; a wait ends long before
int failures = 0;

void expect(bool ok, const char* what) {
    if (ok) return;
    std::fprintf(stderr, "failed: %s\n", what);
    ++failures;
}

struct Inputs : DeviceInputs {
    std::vector<float> hidden;
};

class TinyDevice : public Device {
  public:
    TinyDevice(std::shared_ptr<ThrottledLink> to_device, std::shared_ptr<ThrottledLink> to_host)
        : memory_(kSlots * kHidden), to_device_(to_device), to_host_(to_host) {}
    std::string name() const override { return "tiny"; }
    uint64_t address() const override { return uint64_t(memory_.data()); }
    int64_t num_bytes() const override { return kSlots * kSlotBytes; }
    void give_back(int64_t, int64_t) override {}
    std::shared_ptr<Link> link(Direction direction) override {
        return direction == Direction::kToDevice ? to_device_ : to_host_;
    }
    int64_t pin(std::byte*, int64_t num_bytes) override { return num_bytes; }
    void unpin(std::byte*, int64_t) override {}
    bool has_kernel(const ExpertKernel&) const override { return true; }
    std::unique_ptr<DeviceKernel> make_kernel(const ExpertKernel&) override { return nullptr; }
    bool has_matrix(int) const override { return false; }
    std::unique_ptr<DenseStep> make_dense(const DenseParts&) override { return nullptr; }
    std::shared_ptr<DeviceInputs> upload(const float* hidden, int64_t num_tokens,
                                         int64_t hidden_size) override {
        auto inputs = std::make_shared<Inputs>();
        inputs->hidden.assign(hidden, hidden + num_tokens * hidden_size);
        return inputs;
    }
    void rows(const DeviceKernel&, const DeviceInputs& inputs, const ExpertPairs& pairs, int64_t first_pair,
              int64_t total_pairs) override {
        rows_.resize(size_t(total_pairs * kHidden));
        const float* hidden = static_cast<const Inputs&>(inputs).hidden.data();
        for (int64_t e = 0; e < pairs.num_experts; ++e) {
            const float* weights = reinterpret_cast<const float*>(pairs.addresses[e]);
            for (int32_t p = pairs.pair_offsets[e]; p < pairs.pair_offsets[e + 1]; ++p)
                for (int64_t i = 0; i < kHidden; ++i)
                    rows_[size_t((first_pair + p) * kHidden + i)] =
                        weights[i] * hidden[pairs.pair_tokens[p] * kHidden + i];
        }
    }
    double finish(float* rows, int64_t total_pairs, int64_t hidden_size) override {
        return to_host_->copy_pinned(reinterpret_cast<std::byte*>(rows),
                                     reinterpret_cast<const std::byte*>(rows_.data()),
                                     total_pairs * hidden_size * int64_t(sizeof(float)));
    }
    void close() override {}

  private:
    std::vector<float> memory_, rows_;
    std::shared_ptr<ThrottledLink> to_device_, to_host_;
};

class Stress {
  public:
    explicit Stress(unsigned seed) : rng_(seed) {}

    void round() {
        std::vector<float> weights(kSlots * kHidden);
        std::iota(weights.begin(), weights.end(), float(rng_() % 1000));
        const bool fails = rng_() % 8 == 0;
        if (fails) link_->inject(rng_() % kSlots, 1, false);
        std::vector<CopyQueue::Ticket> copies;
        for (int64_t slot = 0; slot < kSlots; ++slot) copies.push_back(copy(weights, slot));
        const bool gives_up = rng_() % 5 == 0;
        const auto launch = engine_.launches().submit(everything(copies));
        if (gives_up)
            engine_.launches().abandon(launch);
        else
            check_rows(launch, weights, fails);
        // Nobody reads or writes the slots from here on: the next round fills them anew.
        for (const auto ticket : copies) {
            expect(engine_.copies().wait(ticket, kPatience, [] {}), "a copy ends");
            expect(engine_.copies().forget(ticket), "a finished copy is forgotten");
        }
        link_->inject(-1, 0, false);
        if (!fails) check_return(weights);
    }

    bool closes_with_work_left() {
        std::vector<float> weights(kSlots * kHidden, 1.0F);
        std::vector<CopyQueue::Ticket> copies;
        for (int64_t slot = 0; slot < kSlots; ++slot) copies.push_back(copy(weights, slot));
        const auto launch = engine_.launches().submit(everything(copies));
        engine_.close();
        return engine_.launches().is_done(launch);
    }

  private:
    CopyQueue::Ticket copy(const std::vector<float>& weights, int64_t slot) {
        auto* to = reinterpret_cast<std::byte*>(engine_.device().address()) + slot * kSlotBytes;
        const auto* from = reinterpret_cast<const std::byte*>(weights.data()) + slot * kSlotBytes;
        const bool speculative = rng_() % 2;
        const auto ticket = engine_.copies().submit({{from, to, kSlotBytes}}, speculative);
        if (speculative && rng_() % 2) engine_.copies().promote(ticket);
        return ticket;
    }

    // A token per slot, pair i is token i of expert i.
    RowsLaunch everything(const std::vector<CopyQueue::Ticket>& copies) {
        RowsLaunch launch;
        launch.kernel = &kernel_;
        launch.inputs = engine_.device().upload(hidden_.data(), kSlots, kHidden);
        launch.hidden_size = kHidden;
        launch.num_matrices = 1;
        for (int64_t slot = 0; slot < kSlots; ++slot) {
            launch.expert_ids.push_back(int32_t(slot));
            launch.addresses.push_back(engine_.device().address() + uint64_t(slot * kSlotBytes));
            launch.pair_offsets.push_back(int32_t(slot));
            launch.pair_tokens.push_back(int32_t(slot));
            launch.after.push_back(engine_.copies().handle(copies[size_t(slot)]));
        }
        launch.pair_offsets.push_back(int32_t(kSlots));
        return launch;
    }

    void check_rows(LaunchQueue::Ticket launch, const std::vector<float>& weights, bool may_fail) {
        std::vector<float> rows(kSlots * kHidden, -1.0F);
        std::vector<int32_t> places(kSlots);
        std::iota(places.begin(), places.end(), 0);
        expect(engine_.launches().wait(launch, kPatience, [] {}), "a launch ends");
        if (const auto failure = engine_.launches().collect(launch, rows.data(), places)) {
            expect(may_fail && failure->second == DeviceFault::kFailed, "only an injected fault fails");
            return;
        }
        bool equal = true;
        for (size_t i = 0; i < rows.size(); ++i) equal &= rows[i] == weights[i] * hidden_[i];
        expect(equal, "a launch saw what its copies brought");
    }

    // Every slot back to the host, some beside each other.
    void check_return(const std::vector<float>& weights) {
        std::vector<float> back(weights.size(), -1.0F);
        const auto* from = reinterpret_cast<const std::byte*>(engine_.device().address());
        std::vector<CopyQueue::Ticket> tickets;
        for (int64_t slot = 0; slot < kSlots; ++slot) {
            const int64_t offset = slot * kSlotBytes;
            auto* to = reinterpret_cast<std::byte*>(back.data()) + offset;
            tickets.push_back(engine_.returns().submit({{from + offset, to, kSlotBytes}}, rng_() % 2));
        }
        for (const auto ticket : tickets) {
            expect(engine_.returns().wait(ticket, kPatience, [] {}), "a return ends");
            expect(engine_.returns().forget(ticket), "a finished return is forgotten");
        }
        expect(back == weights, "what was copied there came back");
    }

    std::mt19937 rng_;
    DeviceKernel kernel_;
    std::vector<float> hidden_ = std::vector<float>(kSlots * kHidden, 2.0F);
    std::shared_ptr<ThrottledLink> link_ = std::make_shared<ThrottledLink>(Direction::kToDevice, 1e9, 1e-5);
    std::shared_ptr<ThrottledLink> back_ = std::make_shared<ThrottledLink>(Direction::kToHost, 1e9, 1e-5);
    DeviceEngine engine_{std::make_unique<TinyDevice>(link_, back_)};
};

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) return 2;
    const int rounds = std::atoi(argv[1]);
    for (unsigned seed = 0; seed < 4; ++seed) {
        Stress stress(seed);
        for (int round = 0; round < rounds; ++round) stress.round();
        expect(stress.closes_with_work_left(), "closing ends what is queued");
    }
    return failures ? 1 : 0;
}
