#include "cpu/usable_cores.h"

#include <sched.h>

#include <algorithm>
#include <climits>
#include <fstream>
#include <set>
#include <sstream>
#include <vector>

namespace moe {

namespace {

std::vector<int> allowed_cpus() {
    std::vector<int> cpus;
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) != 0) return {0};
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
        if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
    return cpus;
}

std::string first_line(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

// Hardware threads of one core list the same siblings; without sysfs each CPU counts as a core.
int physical_cores(const std::string& root, const std::vector<int>& cpus) {
    std::set<std::string> cores;
    for (int cpu : cpus) {
        const std::string id = std::to_string(cpu);
        const std::string siblings =
            first_line(root + "/sys/devices/system/cpu/cpu" + id + "/topology/thread_siblings_list");
        cores.insert(siblings.empty() ? "cpu" + id : siblings);
    }
    return int(cores.size());
}

// Whole CPUs that a quota pays for; INT_MAX without a quota.
int cpus_of_quota(double quota_us, double period_us) {
    if (quota_us <= 0 || period_us <= 0) return INT_MAX;
    return std::max(1, int(quota_us / period_us + 0.5));
}

int quota_v2(const std::string& folder) {
    std::istringstream line(first_line(folder + "/cpu.max"));
    double quota_us = 0, period_us = 0;
    return line >> quota_us >> period_us ? cpus_of_quota(quota_us, period_us) : INT_MAX;  // "max ..." fails
}

int quota_v1(const std::string& folder) {
    std::istringstream quota(first_line(folder + "/cpu.cfs_quota_us")),
        period(first_line(folder + "/cpu.cfs_period_us"));
    double quota_us = 0, period_us = 0;
    return quota >> quota_us && period >> period_us ? cpus_of_quota(quota_us, period_us) : INT_MAX;
}

// The least quota from the process's own group up to the root of the hierarchy.
template <class Quota>
int least_quota(const std::string& mount, std::string group, Quota quota) {
    int least = quota(mount);
    while (group.size() > 1) {
        least = std::min(least, quota(mount + group));
        group.erase(group.find_last_of('/'));
    }
    return least;
}

bool has_cpu_controller(const std::string& controllers) {
    std::istringstream names(controllers);
    for (std::string name; std::getline(names, name, ',');)
        if (name == "cpu") return true;
    return false;
}

int cgroup_quota(const std::string& root) {
    std::ifstream file(root + "/proc/self/cgroup");  // lines "id:controllers:/path"
    int least = INT_MAX;
    for (std::string line; std::getline(file, line);) {
        const size_t first = line.find(':'), second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        const std::string group = line.substr(second + 1);
        if (controllers.empty())
            least = std::min(least, least_quota(root + "/sys/fs/cgroup", group, quota_v2));
        if (has_cpu_controller(controllers))
            for (const char* mount : {"/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"})
                least = std::min(least, least_quota(root + mount, group, quota_v1));
    }
    return least;
}

}  // namespace

int usable_cores(const std::string& root) {
    const int cores = physical_cores(root, allowed_cpus());
    return std::max(1, std::min(cores, cgroup_quota(root)));
}

}  // namespace moe
