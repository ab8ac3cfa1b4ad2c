// One translation unit, as bindings_planning.cpp.
#include "decode/bindings_decode.cpp"
#include "decode/bindings_early_reads.cpp"
#include "device/bindings_device.cpp"
#include "hybrid/bindings_hybrid.cpp"
