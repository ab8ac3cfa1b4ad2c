// The door of moe_offload/_cuda.so. It is opened by name at run time, so these are C names.
#pragma once

#include <cstdint>

#define MOE_EXPORT __attribute__((visibility("default")))

extern "C" {

// Writes at most `size` bytes of a JSON object (runtime, driver, error, devices); returns its length.
int moe_offload_cuda_info(char* out, int size);
}
