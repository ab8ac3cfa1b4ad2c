#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>

#include "common/errors.h"

namespace moe {

Grids grids;

namespace {

std::vector<const Kernels*> available() {
    std::vector<const Kernels*> found = {&kernels_baseline};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    if (avx2) found.push_back(&kernels_avx2);
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni"))
        found.push_back(&kernels_avx512);
#endif
    return found;
}

const Kernels& named(const std::string& name) {
    std::string offered;
    for (const Kernels* table : available()) {
        if (name == table->name) return *table;
        offered += offered.empty() ? table->name : std::string(", ") + table->name;
    }
    throw ConfigError("MOE_OFFLOAD_ISA=" + name +
                      " is not one of the instruction sets that this CPU offers: " + offered);
}

const Kernels& choose() {
    const char* wanted = std::getenv("MOE_OFFLOAD_ISA");
    return wanted && *wanted ? named(wanted) : *available().back();
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Kernels* table : available()) names.emplace_back(table->name);
    return names;
}

const Kernels& kernels() {
    const Kernels* table = chosen.load(std::memory_order_acquire);
    if (!table) {
        table = &choose();
        chosen.store(table, std::memory_order_release);
    }
    return *table;
}

void force_isa(const std::string& name) {
    chosen.store(name.empty() ? nullptr : &named(name));
}

}  // namespace moe
