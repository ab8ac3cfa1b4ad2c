// Table of contents of moe_offload._native: each group registers the functions that Python sees.
#include <pybind11/pybind11.h>
// One translation unit, as bindings_planning.cpp.
#include "common/bindings_registries.cpp"
#include "cpu/bindings_ops.cpp"
#include "io/bindings_io.cpp"

void register_ops(pybind11::module_& m);           // csrc/cpu/bindings_ops.cpp: arithmetic v1, thread pool
void register_io(pybind11::module_& m);            // csrc/io/bindings_io.cpp: arena, direct reader
void register_decode(pybind11::module_& m);        // csrc/decode/bindings_decode.cpp: the native decode step
void register_gate_chances(pybind11::module_& m);  // csrc/planning/bindings_gate_chances.cpp: next routers
void register_horizon(pybind11::module_& m);       // csrc/planning/bindings_horizon.cpp: the horizon policy
void register_replay(pybind11::module_& m);        // csrc/planning/bindings_replay.cpp: caches of replays
void register_scheduler(pybind11::module_& m);  // csrc/planning/bindings_scheduler.cpp: CPU or GPU, by expert
void register_lookahead(pybind11::module_& m);  // csrc/planning/bindings_lookahead.cpp: what comes next
void register_early_reads(pybind11::module_& m);  // csrc/decode/bindings_early_reads.cpp: and reads it
void register_device(pybind11::module_& m);       // csrc/device/bindings_device.cpp: the emulated accelerator
void register_hybrid(pybind11::module_& m);       // csrc/hybrid/bindings_hybrid.cpp: layers on both at once
void register_registries(pybind11::module_& m);   // csrc/common/bindings_registries.cpp: modules as they were

PYBIND11_MODULE(_native, m) {
    m.doc() =
        "Native parts of moe_offload; moe_offload.ops, .storage, .planning and .runtime are its only "
        "callers.";
    register_ops(m);
    register_io(m);
    register_decode(m);
    register_gate_chances(m);
    register_horizon(m);
    register_replay(m);
    register_scheduler(m);
    register_lookahead(m);
    register_early_reads(m);
    register_device(m);
    register_hybrid(m);
    register_registries(m);
}
