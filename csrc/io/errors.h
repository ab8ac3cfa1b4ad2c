// A failed read or open; wrong arguments and misuse are moe::ConfigError (common/errors.h).
#pragma once

#include <stdexcept>
#include <string>

#include "common/errors.h"

namespace moe {

// A file that cannot be opened or read: OSError(errno, message) in Python. error_number is 0 where the
// system reported none (a file that ends too early).
struct FileError : std::runtime_error {
    FileError(int error_number, const std::string& message)
        : std::runtime_error(message), error_number(error_number) {}
    int error_number;
};

}  // namespace moe
