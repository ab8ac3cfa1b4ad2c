#include "device/cuda_library.h"

#include <dlfcn.h>

#include "common/errors.h"

namespace moe {

std::unique_ptr<Device> open_cuda_device(const std::string& library, int index, int64_t vram_bytes) {
    // Never closed: a driver's threads may outlive the device.
    void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) throw ConfigError("the CUDA library does not load: " + std::string(dlerror()));
    using Open = Device* (*)(int, int64_t, char*, int);
    const auto open = reinterpret_cast<Open>(dlsym(handle, "moe_offload_cuda_open"));
    check(open != nullptr, "CudaDevice", library + " is not of this build");
    char error[512] = "";
    std::unique_ptr<Device> device(open(index, vram_bytes, error, sizeof error));
    if (!device)
        throw DeviceError("GPU " + std::to_string(index) + " with " + std::to_string(vram_bytes) +
                              " bytes for experts: " + error,
                          DeviceFault::kNoMemory);
    return device;
}

}  // namespace moe
