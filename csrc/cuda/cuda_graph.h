// Launches that are always the same, captured once.
#pragma once

#include "cuda/runtime.h"

namespace moe::cuda {

class Graph {
  public:
    Graph() = default;
    Graph(Graph&& other) noexcept : graph_(std::exchange(other.graph_, nullptr)) {}
    ~Graph() {
        if (graph_) cudaGraphExecDestroy(graph_);
    }
    // Runs `launches` on the stream: the second time it captures them, if the driver does that. The first
    // time each kernel is loaded, for which a stream under capture is no place.
    template <class Launches>
    void run(cudaStream_t stream, bool* may_capture, const Launches& launches) {
        if (!graph_ && has_run_ && *may_capture && !capture(stream, launches)) *may_capture = false;
        has_run_ = true;
        if (graph_)
            must(cudaGraphLaunch(graph_, stream), "dense layers");
        else
            launches();
    }

  private:
    template <class Launches>
    bool capture(cudaStream_t stream, const Launches& launches) {
        cudaGraph_t captured = nullptr;
        if (cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal) != cudaSuccess) {
            cudaGetLastError();
            return false;
        }
        try {
            launches();
        } catch (const DeviceError&) {  // of which the launches one by one will tell
            cudaStreamEndCapture(stream, &captured);
            if (captured) cudaGraphDestroy(captured);
            cudaGetLastError();
            return false;
        }
        bool done = cudaStreamEndCapture(stream, &captured) == cudaSuccess && captured;
        done = done && cudaGraphInstantiate(&graph_, captured, 0) == cudaSuccess;
        if (captured) cudaGraphDestroy(captured);
        if (!done) cudaGetLastError(), graph_ = nullptr;
        return done;
    }

    cudaGraphExec_t graph_ = nullptr;
    bool has_run_ = false;
};

}  // namespace moe::cuda
