// What csrc/io throws; bindings_io.cpp translates it.
#pragma once

#include <stdexcept>
#include <string>

namespace moe_offload {

// A wrong argument, a closed or forked reader: moe_offload.errors.ConfigError in Python.
struct UsageError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A file that cannot be opened or read: OSError(errno, message) in Python. error_number is 0 where the
// system reported none (a file that ends too early).
struct FileError : std::runtime_error {
    FileError(int error_number, const std::string& message)
        : std::runtime_error(message), error_number(error_number) {}
    int error_number;
};

}  // namespace moe_offload
