// What moe_offload/replay_layers.py and planning/policies/table.py see of csrc/planning.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "planning/arc_replay.h"
#include "planning/layer_caches.h"
#include "planning/lowest_residents.h"

namespace py = pybind11;
using moe::LayerCaches;

namespace {

using Scores = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Residents = py::array_t<bool, py::array::c_style>;

// experts: (T, L, K) uint16; returns hits (S, L) and evictions (S).
py::tuple arc_replay(const py::array_t<uint16_t, py::array::c_style>& experts, int64_t num_experts,
                     const std::vector<int64_t>& sizes) {
    if (experts.ndim() != 3) throw py::value_error("arc_replay: experts (T, L, K) wanted");
    const int64_t tokens = experts.shape(0), layers = experts.shape(1), top_k = experts.shape(2);
    const uint16_t* ids = experts.data();
    for (int64_t i = 0; i < experts.size(); ++i) {
        const bool ascends = i % top_k == 0 || ids[i - 1] < ids[i];
        if (!ascends || ids[i] >= num_experts) {
            throw py::value_error("arc_replay: a token's ids must ascend and be below num_experts");
        }
    }
    if (sizes.empty() || *std::min_element(sizes.begin(), sizes.end()) < 1) {
        throw py::value_error("arc_replay: sizes of at least one expert wanted");
    }
    moe::ArcCounts counts;
    {
        py::gil_scoped_release release;
        counts = moe::arc_replay(ids, tokens, layers, top_k, num_experts, sizes);
    }
    py::array_t<int64_t> hits({static_cast<int64_t>(sizes.size()), layers});
    std::copy(counts.hits.begin(), counts.hits.end(), hits.mutable_data());
    return py::make_tuple(hits, counts.evictions);
}

// scores, resident: of one shape; returns positions in the flat arrays.
std::vector<int64_t> lowest_residents(const Scores& scores, const Residents& resident, int64_t count) {
    if (scores.size() != resident.size()) {
        throw py::value_error("lowest_residents: scores and resident of one shape wanted");
    }
    return moe::lowest_residents(scores.data(), resident.data(), scores.size(), count);
}

LayerCaches make_layer_caches(int64_t num_layers, int64_t num_experts, const std::vector<int64_t>& sizes) {
    if (num_layers < 1 || num_experts < 1 || sizes.empty() ||
        *std::min_element(sizes.begin(), sizes.end()) < 1) {
        throw py::value_error("LayerCaches: layers, experts and sizes of at least one wanted");
    }
    return LayerCaches(num_layers, num_experts, sizes);
}

bool serve(LayerCaches& caches, const py::array_t<int64_t, py::array::c_style>& ids) {
    if (ids.ndim() != 2 || ids.shape(0) != caches.num_layers()) {
        throw py::value_error("LayerCaches.serve: ids (L, K) wanted");
    }
    for (int64_t i = 0; i < ids.size(); ++i) {
        if (ids.data()[i] < 0 || ids.data()[i] >= caches.num_experts()) {
            throw py::value_error("LayerCaches.serve: an expert id is out of range");
        }
    }
    return caches.serve(ids.data(), ids.shape(1));
}

void evict(LayerCaches& caches, const Scores& scores) {
    const bool by_size = scores.ndim() == 3;
    const bool fits = (by_size || scores.ndim() == 2) &&
                      (!by_size || scores.shape(0) == caches.num_sizes()) &&
                      scores.shape(scores.ndim() - 2) == caches.num_layers() &&
                      scores.shape(scores.ndim() - 1) == caches.num_experts();
    if (!fits) throw py::value_error("LayerCaches.evict: scores (L, E) or (S, L, E) wanted");
    caches.evict(scores.data(), by_size);
}

py::array_t<bool> was_new(const LayerCaches& caches) {
    const int64_t cells = caches.num_sizes() * caches.num_layers();
    py::array_t<bool> out(
        {caches.num_sizes(), caches.num_layers(), static_cast<int64_t>(caches.was_new().size()) / cells});
    std::copy(caches.was_new().begin(), caches.was_new().end(), out.mutable_data());
    return out;
}

py::array_t<int64_t> hits(const LayerCaches& caches) {
    py::array_t<int64_t> out({caches.num_sizes(), caches.num_layers()});
    std::copy(caches.hits().begin(), caches.hits().end(), out.mutable_data());
    return out;
}

}  // namespace

void register_replay(py::module_& m) {
    m.def("arc_replay", &arc_replay, py::arg("experts").noconvert(), py::arg("num_experts"), py::arg("sizes"),
          "Hits (S, L) and evictions (S) of a decode trace in caches of one layer each, under ARC.");
    m.def("lowest_residents", &lowest_residents, py::arg("scores"), py::arg("resident"), py::arg("count"),
          "Flat positions of the residents of the lowest scores, lowest first; ties to the smaller one.");
    py::class_<LayerCaches>(m, "LayerCaches")
        .def(py::init(&make_layer_caches), py::arg("num_layers"), py::arg("num_experts"), py::arg("sizes"))
        .def("serve", &serve, py::arg("ids"))
        .def("evict", &evict, py::arg("scores"))
        .def("was_new", &was_new)
        .def("hits", &hits)
        .def("evictions", &LayerCaches::evictions);
}
