// How many threads are worth having: affinity, cgroup quota and physical cores, whichever is least.
#pragma once

#include <string>

namespace moe {

// ``root`` is "/"; a test passes a folder with its own proc/ and sys/. At least 1.
int usable_cores(const std::string& root);

}  // namespace moe
