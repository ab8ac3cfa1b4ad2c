// What moe_offload/_cuda.so exports besides the device: what it was built with and what it finds here.
#include <cuda_runtime.h>

#include <string>

#include "cuda/library.h"

namespace {

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (const char c : text)
        if (c == '"' || c == '\\')
            out += std::string("\\") + c;
        else
            out += c < ' ' ? ' ' : c;
    return out + "\"";
}

// Properties only: a context would take hundreds of MiB of the card's memory.
std::string device_json(int index) {
    cudaDeviceProp p;
    const cudaError_t error = cudaGetDeviceProperties(&p, index);
    if (error != cudaSuccess) return "{\"error\": " + quoted(cudaGetErrorString(error)) + "}";
    return "{\"name\": " + quoted(p.name) + ", \"sm\": " + std::to_string(p.major * 10 + p.minor) +
           ", \"memory_bytes\": " + std::to_string(p.totalGlobalMem) +
           ", \"multiprocessors\": " + std::to_string(p.multiProcessorCount) +
           ", \"l2_bytes\": " + std::to_string(p.l2CacheSize) +
           ", \"unified_memory\": " + (p.integrated ? "true" : "false") + "}";
}

}  // namespace

extern "C" MOE_EXPORT int moe_offload_cuda_info(char* out, int size) {
    int driver = 0, runtime = 0, count = 0;
    cudaDriverGetVersion(&driver);  // 0 where no driver is installed
    cudaRuntimeGetVersion(&runtime);
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) count = 0;
    std::string json =
        "{\"runtime\": " + std::to_string(runtime) + ", \"driver\": " + std::to_string(driver) +
        ", \"error\": " + quoted(error == cudaSuccess ? "" : cudaGetErrorString(error)) + ", \"devices\": [";
    for (int i = 0; i < count; ++i) json += (i ? ", " : "") + device_json(i);
    json += "]}";
    cudaGetLastError();  // the text has told it
    if (out && size > 0) json.copy(out, static_cast<size_t>(size));
    return static_cast<int>(json.size());
}

extern "C" MOE_EXPORT int moe_offload_cuda_pci_bus_id(int index, char* out, int size) {
    const cudaError_t error = cudaDeviceGetPCIBusId(out, size, index);
    cudaGetLastError();  // the code has told it
    return error;
}
