#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>

#include "common/errors.h"
#include "cpu/amx.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace moe {

Grids grids;

namespace {

#if defined(__x86_64__)
// CPUID leaf 7, subleaf 1, EAX bit 4. The operating system saves the registers wherever it saves AVX2's.
bool cpu_has_avxvnni() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 4 & 1);
}
#endif

std::vector<const Kernels*> available() {
    std::vector<const Kernels*> found = {&kernels_baseline};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
    if (avx2) found.push_back(&kernels_avx2);
    if (avx2 && cpu_has_avxvnni()) found.push_back(&kernels_avxvnni);
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512vnni")) {
        found.push_back(&kernels_avx512vnni);
        if (amx_verdict().runs) found.push_back(&kernels_amx);
    }
#elif defined(__aarch64__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back(&kernels_dotprod);
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

const Kernels& best() {
    const std::vector<const Kernels*> tables = available();
#if defined(__x86_64__)
    if (tables.back() == &kernels_amx && !amx_verdict().faster) return *tables.end()[-2];
#endif
    return *tables.back();
}

const Kernels& choose() {
    const char* wanted = std::getenv("MOE_OFFLOAD_ISA");
    return wanted && *wanted ? named(wanted) : best();
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

std::string amx_state() {
#if defined(__x86_64__)
    for (const Kernels* table : available())
        if (table == &kernels_avx512vnni) return amx_verdict().reason;
    return "this CPU has no AVX-512 VNNI, on which AMX's kernels rest";
#else
    return "AMX is x86's";
#endif
}

void force_isa(const std::string& name) {
    chosen.store(name.empty() ? nullptr : &named(name));
}

}  // namespace moe
