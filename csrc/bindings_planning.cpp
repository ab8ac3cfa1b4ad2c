// One translation unit: more than half of what a file of pybind11 costs to compile is the same for each.
#include "planning/bindings_gate_chances.cpp"
#include "planning/bindings_horizon.cpp"
#include "planning/bindings_lookahead.cpp"
#include "planning/bindings_replay.cpp"
#include "planning/bindings_scheduler.cpp"
