// Runs native work without the GIL and turns an interrupt on the way into the exception that is set.
#pragma once

#include <pybind11/pybind11.h>

#include "common/errors.h"

namespace moe {

template <class Body>
void without_gil(Body body) {
    try {
        pybind11::gil_scoped_release release;
        body();
    } catch (const Interrupted&) {
        throw pybind11::error_already_set();
    }
}

}  // namespace moe
