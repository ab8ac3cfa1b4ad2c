// The CUDA device, if its library (moe_offload/_cuda.so) is there.
#pragma once

#include <memory>
#include <string>

#include "device/device.h"

namespace moe {

// Throws ConfigError where the library does not load, DeviceError where the card refuses.
std::unique_ptr<Device> open_cuda_device(const std::string& library, int index, int64_t vram_bytes);

}  // namespace moe
