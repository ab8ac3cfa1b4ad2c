// What Python sees of reads that native code begins; residency/early_reads.py is the only caller.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "common/errors.h"
#include "decode/early_reads.h"
#include "planning/kept_lookahead.h"

namespace py = pybind11;
using moe::EarlyReads;
using moe::KeptLookahead;

namespace {

using SegmentArray = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;  // as for DirectReader
using SlotTable = py::array_t<uint64_t, py::array::c_style>;

constexpr const char* kOp = "EarlyReads";

// Keeps the tables that the native object writes into.
struct KeptEarlyReads : EarlyReads {
    using EarlyReads::EarlyReads;
    std::vector<py::object> kept;
    moe::Choice choice;
};

std::vector<moe::Segment> segments_of(const SegmentArray& array) {
    moe::check(array.ndim() == 2 && array.shape(1) == 4, kOp, "segments must be (n, 4)");
    const auto rows = array.unchecked<2>();
    std::vector<moe::Segment> segments;
    for (py::ssize_t i = 0; i < rows.shape(0); ++i)
        segments.push_back({rows(i, 0), rows(i, 1), rows(i, 2), rows(i, 3)});
    return segments;
}

void add_layer(KeptEarlyReads& self, int64_t layer_idx, const std::vector<SegmentArray>& segments,
               std::vector<std::vector<uint64_t>> first_bytes, int64_t num_bytes, int64_t pool,
               int64_t history_row, const py::array& table) {
    const bool fits = py::isinstance<SlotTable>(table) && table.ndim() == 2 && table.writeable() &&
                      table.shape(0) == py::ssize_t(segments.size());
    moe::check(fits, kOp, "a table (E, n) of uint64 in rows, and segments of E experts");
    const auto has_all = [&](const auto& firsts) { return py::ssize_t(firsts.size()) == table.shape(1); };
    moe::check(first_bytes.size() == segments.size() && std::ranges::all_of(first_bytes, has_all), kOp,
               "the first bytes of all matrices of each expert");
    EarlyReads::Layer layer{{},      std::move(first_bytes), num_bytes, pool, history_row,
                            nullptr, table.shape(1),         {}};
    for (const SegmentArray& array : segments) layer.segments.push_back(segments_of(array));
    layer.table = static_cast<uint64_t*>(const_cast<void*>(table.data()));
    self.add_layer(layer_idx, std::move(layer));
    self.kept.push_back(table);
}

void set(KeptEarlyReads& self, double threshold, int64_t depth, double bytes_per_s, double free_bytes,
         double stall_s) {
    self.set({threshold, depth, bytes_per_s, free_bytes, stall_s});
}

void lend(KeptEarlyReads& self, std::vector<std::vector<int64_t>> slot_addresses) {
    self.lend_nothing();
    for (size_t pool = 0; pool < slot_addresses.size(); ++pool)
        self.lend(static_cast<int64_t>(pool), std::move(slot_addresses[pool]));
}

// hidden: the address of (hidden_size) floats.
void look_ahead(KeptEarlyReads& self, int64_t layer_idx, uintptr_t hidden,
                const std::vector<int32_t>& expert_ids, const std::vector<float>& weights) {
    moe::check(expert_ids.size() == weights.size(), kOp, "a weight for each expert");
    self.choice = {expert_ids, weights};
    self.before_experts(layer_idx, self.choice, reinterpret_cast<const float*>(hidden));
}

// Of experts that are not resident; None where one is not there.
py::object has_arrived(KeptEarlyReads& self, int64_t layer_idx, const std::vector<int32_t>& expert_ids,
                       size_t num_matrices) {
    std::vector<uint64_t> addresses(expert_ids.size() * num_matrices, 0);
    const moe::Choice choice{expert_ids, std::vector<float>(expert_ids.size())};
    if (!self.has_arrived(layer_idx, choice, addresses)) return py::none();
    return py::cast(addresses);
}

py::list events(const KeptEarlyReads& self) {
    py::list out;
    for (const EarlyReads::Event& event : self.events())
        out.append(py::make_tuple(event.is_read, event.layer_idx, event.expert_id, event.slot_address,
                                  event.ticket));
    return out;
}

py::list used(const KeptEarlyReads& self) {
    py::list out;
    for (const EarlyReads::Used& one : self.used()) out.append(py::make_tuple(one.layer_idx, one.expert_id));
    return out;
}

}  // namespace

void register_early_reads(py::module_& m) {
    py::class_<KeptEarlyReads, moe::LayerWatch>(m, "EarlyReads", "Looks ahead and begins reads, natively.")
        .def(py::init([](moe::DirectReader& reader, KeptLookahead& lookahead, moe::LayerPace& pace) {
                 return std::make_unique<KeptEarlyReads>(reader, lookahead.lookahead, pace);
             }),
             py::arg("reader"), py::arg("lookahead"), py::arg("pace"), py::keep_alive<1, 2>(),
             py::keep_alive<1, 3>(), py::keep_alive<1, 4>())
        .def("add_layer", &add_layer, py::arg("layer_idx"), py::arg("segments"), py::arg("first_bytes"),
             py::arg("num_bytes"), py::arg("pool"), py::arg("history_row"), py::arg("table"),
             "Of each expert its segments and its matrices' first bytes, from the slot's start; history_row "
             "-1: none is kept.")
        .def("set", &set, py::arg("threshold"), py::arg("depth"), py::arg("bytes_per_s"),
             py::arg("free_bytes"), py::arg("stall_s"), "What holds until the next call.")
        .def("set_stall_s", &EarlyReads::set_stall_s, py::arg("stall_s"), "Waited for experts, so far.")
        .def(
            "begins",
            [](KeptEarlyReads& self, uintptr_t residual) {
                self.begins(reinterpret_cast<const float*>(residual));
            },
            py::arg("residual"), "Look ahead of the first layers, from a token's embedding by address.")
        .def("has_arrived", &has_arrived, py::arg("layer_idx"), py::arg("expert_ids"),
             py::arg("num_matrices"),
             "Their matrices' addresses, and they are used; None: not all are there.")
        .def("lend", &lend, py::arg("slot_addresses"),
             "By pool, slots that reads may begin into, the last one first; those lent before are not any "
             "more.")
        .def("look_ahead", &look_ahead, py::arg("layer_idx"), py::arg("hidden"), py::arg("expert_ids"),
             py::arg("weights"), "After a layer that stopped a run: what it would have done there.")
        .def("events", &events, "(is_read, layer_idx, expert_id, slot address, ticket), or a read's end.")
        .def("used", &used, "(layer_idx, expert_id) that had arrived and that a run used.")
        .def("clear_events", &EarlyReads::clear_events, "They are booked.");
}
