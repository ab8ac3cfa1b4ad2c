// Launches noted instead of run, while a stream is being captured (cuda_runtime.h), to be run by the graph.
#pragma once

#include <functional>
#include <vector>

namespace stand_in {

using Launches = std::vector<std::function<void()>>;
inline thread_local Launches* capturing = nullptr;
inline int64_t graphs_launched = 0;

}  // namespace stand_in
