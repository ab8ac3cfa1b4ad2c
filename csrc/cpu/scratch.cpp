#include "cpu/scratch.h"

#include <memory>
#include <new>

namespace moe {

namespace {

constexpr std::align_val_t kLine{64};

struct Release {
    void operator()(uint8_t* p) const { ::operator delete(p, kLine); }
};

struct Scratch {
    std::unique_ptr<uint8_t, Release> bytes;
    int64_t size = 0;
};

}  // namespace

uint8_t* thread_scratch(int64_t num_bytes, int slot) {
    static thread_local Scratch slots[kScratchSlots];
    Scratch& scratch = slots[slot];
    if (scratch.size < num_bytes) {
        scratch.bytes.reset(static_cast<uint8_t*>(::operator new(size_t(num_bytes), kLine)));
        scratch.size = num_bytes;
    }
    return scratch.bytes.get();
}

}  // namespace moe
