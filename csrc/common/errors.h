// Errors that cross into Python. Checks name the operation, the argument, what was wanted and what came.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace moe {

// Becomes moe_offload.ConfigError.
struct ConfigError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The caller's interrupt check found a Python exception, which is already set.
struct Interrupted : std::exception {};

inline void check(bool ok, const char* op, const std::string& message) {
    if (!ok) throw ConfigError(std::string(op) + ": " + message);
}

inline void check_equal(const char* op, const char* argument, int64_t wanted, int64_t got) {
    if (wanted != got)
        throw ConfigError(std::string(op) + ": " + argument + " must be " + std::to_string(wanted) +
                          ", got " + std::to_string(got));
}

}  // namespace moe
