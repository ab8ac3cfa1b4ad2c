// The door of moe_offload/_cuda.so. It is opened by name at run time, so these are C names.
#pragma once

#include <cstdint>

namespace moe {
class Device;
}

#define MOE_EXPORT __attribute__((visibility("default")))

extern "C" {

// Writes at most `size` bytes of a JSON object (runtime, driver, error, devices); returns its length.
int moe_offload_cuda_info(char* out, int size);

// A device with `vram_bytes` for slots, owned by the caller; or null, and why, in at most `size` bytes.
moe::Device* moe_offload_cuda_open(int index, int64_t vram_bytes, char* error, int size);

// A launch of `num_experts` matrices of rows x cols (twice as many rows for gate and up), `pairs_per_expert`
// tokens each, one behind the other over `num_sets` sets of weights; the median of `times`.
struct MatrixMeasurement {
    int32_t ggml_type, is_gate_up, num_experts, pairs_per_expert, num_sets, times;
    int64_t rows, cols, row_bytes;
};

// Seconds, or -1 where the card refuses: of a launch; of a copy within the card's memory; of one from pinned
// host memory.
double moe_offload_cuda_matrix_seconds(int device, const MatrixMeasurement* what);
double moe_offload_cuda_memory_seconds(int device, int64_t num_bytes);
double moe_offload_cuda_link_seconds(int device, int64_t num_bytes);

// Where the card is on its bus ("0000:01:00.0"), by which the driver's other libraries know it: they count
// without regard to CUDA_VISIBLE_DEVICES. Makes no context. Returns the CUDA error.
int moe_offload_cuda_pci_bus_id(int index, char* out, int size);

// What the card has free now; makes a context. Returns the CUDA error.
int moe_offload_cuda_memory(int index, int64_t* free_bytes, int64_t* total_bytes);
}
