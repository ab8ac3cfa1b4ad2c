// Table of contents of moe_offload._native: each group registers the functions that Python sees.
#include <pybind11/pybind11.h>

void register_ops(pybind11::module_& m);        // csrc/cpu/bindings_ops.cpp: arithmetic v1, thread pool
void register_io(pybind11::module_& m);         // csrc/io/bindings_io.cpp: arena, direct reader
void register_decode(pybind11::module_& m);     // csrc/decode/bindings_decode.cpp: the native decode step
void register_planning(pybind11::module_& m);   // csrc/planning/bindings_planning.cpp: the horizon policy
void register_scheduler(pybind11::module_& m);  // csrc/planning/bindings_scheduler.cpp: CPU or GPU, by expert
void register_lookahead(pybind11::module_& m);  // csrc/planning/bindings_lookahead.cpp: what comes next
void register_early_reads(pybind11::module_& m);  // csrc/decode/bindings_early_reads.cpp: and reads it
void register_device(pybind11::module_& m);       // csrc/device/bindings_device.cpp: the emulated accelerator
void register_hybrid(pybind11::module_& m);       // csrc/hybrid/bindings_hybrid.cpp: layers on both at once

PYBIND11_MODULE(_native, m) {
    m.doc() =
        "Native parts of moe_offload; moe_offload.ops, .storage, .planning and .runtime are its only "
        "callers.";
    register_ops(m);
    register_io(m);
    register_decode(m);
    register_planning(m);
    register_scheduler(m);
    register_lookahead(m);
    register_early_reads(m);
    register_device(m);
    register_hybrid(m);
}
