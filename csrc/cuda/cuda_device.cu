#include <algorithm>
#include <cstring>

#include "cuda/cuda_dense.h"
#include "cuda/cuda_device.h"
#include "cuda/library.h"

namespace moe::cuda {

CudaInputs::~CudaInputs() {
    std::lock_guard lock(pool->mutex);
    pool->free.push_back(std::move(buffer));
}

// What the compute thread works with.
struct CudaDevice::Buffers {
    Stream stream;
    ExpertRows experts{stream, 1 << 20};
    GrowingMemory rows;  // (total_pairs, hidden_size)
    GrowingMemory host_rows{true};
    Event computed;
};

CudaDevice::CudaDevice(int index, int64_t vram_bytes) : index_(index), num_bytes_(vram_bytes) {
    use();
    cudaDeviceProp properties;
    must(cudaGetDeviceProperties(&properties, index), "the GPU");
    name_ = properties.name;
    fence_ = std::make_shared<RowsFence>();
    to_device_ = std::make_shared<CudaLink>(index, Direction::kToDevice, pinned_, fence_);
    to_host_ = std::make_shared<CudaLink>(index, Direction::kToHost, pinned_);
    buffers_ = std::make_unique<Buffers>();
    // Last: where anything before it fails, nobody would free it.
    must(cudaMalloc(&memory_, size_t((vram_bytes + 255) / 256 * 256 + 256)), "memory for slots");
}

void CudaDevice::use() const {
    must(cudaSetDevice(index_), "the GPU");
}

bool CudaDevice::has_kernel(const ExpertKernel& kernel) const {
    return std::ranges::all_of(kernel.matrices(),
                               [](const Matrix& m) { return cuda::has_kernel(m.type, m.transposed); });
}

std::unique_ptr<DeviceKernel> CudaDevice::make_kernel(const ExpertKernel& kernel) {
    use();
    auto made = std::make_unique<CudaKernel>(kernel);
    const int64_t gate_up = kernel.gate_up_bias() ? kernel.num_experts() * 2 * kernel.intermediate_size() : 0;
    const int64_t down = kernel.down_bias() ? kernel.num_experts() * kernel.hidden_size() : 0;
    if (gate_up + down == 0) return made;
    float* biases = made->biases.at_least<float>(gate_up + down);
    const auto bring = [](float* to, const float* from, int64_t count) {
        copy_to_card(to, from, size_t(count) * sizeof(float), "biases");
    };
    if (gate_up) bring(biases, kernel.gate_up_bias(), gate_up);
    if (down) bring(biases + gate_up, kernel.down_bias(), down);
    made->gate_up_bias = gate_up ? biases : nullptr;
    made->down_bias = down ? biases + gate_up : nullptr;
    return made;
}

bool CudaDevice::has_matrix(int ggml_type) const {
    return cuda::has_kernel(ggml_type, false);
}

std::unique_ptr<DenseStep> CudaDevice::make_dense(const DenseParts& parts) {
    use();  // its stream is made before its constructor begins
    return std::make_unique<CudaDense>(index_, parts, fence_);
}

std::shared_ptr<DeviceInputs> CudaDevice::upload(const float* hidden, int64_t num_tokens,
                                                 int64_t hidden_size) {
    use();
    std::unique_ptr<UploadBuffer> buffer;
    {
        std::lock_guard lock(uploads_->mutex);
        if (!uploads_->free.empty()) {
            buffer = std::move(uploads_->free.back());
            uploads_->free.pop_back();
        }
    }
    if (!buffer) buffer = std::make_unique<UploadBuffer>();
    buffer->fetched.wait("inputs");
    std::memcpy(buffer->host.at_least<float>(num_tokens * hidden_size), hidden,
                size_t(num_tokens * hidden_size) * sizeof(float));
    buffer->num_rows = num_tokens, buffer->cols = hidden_size;
    buffer->is_fetched = buffer->is_packed = false;
    return std::make_shared<CudaInputs>(uploads_, std::move(buffer));
}

// Brings an upload to the device at its first use, and packs it when packed weights first read it.
Inputs CudaDevice::fetch(UploadBuffer& upload, bool packed) {
    const int64_t count = upload.num_rows * upload.cols;
    if (!upload.is_fetched) {
        float* to = upload.device.reserve(upload.num_rows, upload.cols);
        must(launch_fetch(to, upload.host.at_least<float>(count), count * int64_t(sizeof(float)),
                          buffers_->stream),
             "inputs");
        upload.fetched.record(buffers_->stream);
        upload.is_fetched = true;
    }
    const Inputs inputs = upload.device.inputs(upload.num_rows, upload.cols);
    if (packed && !upload.is_packed) {
        must(launch_quantize(inputs, upload.num_rows, buffers_->stream), "inputs");
        upload.is_packed = true;
    }
    return inputs;
}

void CudaDevice::rows(const DeviceKernel& device_kernel, const DeviceInputs& device_inputs,
                      const ExpertPairs& pairs, int64_t first_pair, int64_t total_pairs) {
    use();
    const auto& kernel = static_cast<const CudaKernel&>(device_kernel);
    const int64_t hidden_size = kernel.of.hidden_size();
    float* out = buffers_->rows.at_least<float>(total_pairs * hidden_size) + first_pair * hidden_size;
    if (pairs.num_pairs == 0) return;
    UploadBuffer& upload = *static_cast<const CudaInputs&>(device_inputs).buffer;
    buffers_->experts.compute(kernel, fetch(upload, kernel.reads_packed()), pairs, out);
}

double CudaDevice::finish(float* rows, int64_t total_pairs, int64_t hidden_size) {
    use();
    Buffers& b = *buffers_;
    const int64_t num_bytes = total_pairs * hidden_size * int64_t(sizeof(float));
    float* host = b.host_rows.at_least<float>(total_pairs * hidden_size);
    b.computed.record(b.stream);
    const double seconds =
        to_host_->bring(host, b.rows.at_least<float>(total_pairs * hidden_size), num_bytes, b.computed);
    b.experts.are_done();
    std::memcpy(rows, host, size_t(num_bytes));
    return seconds;
}

void CudaDevice::close() {
    if (!memory_) return;
    cudaSetDevice(index_);
    cudaDeviceSynchronize();
    to_device_->close();
    to_host_->close();
    pinned_->close();
    buffers_.reset();
    {
        std::lock_guard lock(uploads_->mutex);
        uploads_->free.clear();
    }
    cudaFree(memory_);
    memory_ = nullptr;
}

}  // namespace moe::cuda

extern "C" MOE_EXPORT moe::Device* moe_offload_cuda_open(int index, int64_t vram_bytes, char* error,
                                                         int size) {
    try {
        return new moe::cuda::CudaDevice(index, vram_bytes);
    } catch (const std::exception& failure) {
        const std::string text = failure.what();
        if (size > 0) error[text.copy(error, size_t(size - 1))] = '\0';
        return nullptr;
    }
}

extern "C" MOE_EXPORT int moe_offload_cuda_memory(int index, int64_t* free_bytes, int64_t* total_bytes) {
    size_t free = 0, total = 0;
    int code = cudaSetDevice(index);
    if (code == cudaSuccess) code = cudaMemGetInfo(&free, &total);
    *free_bytes = int64_t(free), *total_bytes = int64_t(total);
    cudaGetLastError();  // the code has told it
    return code;
}
