// What Python sees of the native decode step; moe_offload/runtime/native_decoder.py is the only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>

#include "common/without_gil.h"
#include "cpu/thread_pool.h"
#include "decode/cached_addresses.h"
#include "decode/decode_step.h"
#include "decode/prompt_attention.h"
#include "decode/prompt_step.h"
#include "device/engine.h"

namespace py = pybind11;
using namespace moe;

namespace {

// (ggml type, rows, cols, address, bytes, address of the bias or 0)
using LinearTuple = std::tuple<int, int64_t, int64_t, uint64_t, int64_t, uint64_t>;
using Addresses = std::vector<uint64_t>;

const float* floats(uint64_t address) {
    return reinterpret_cast<const float*>(address);
}

Linear linear_of(const LinearTuple& t) {
    const auto& [type, rows, cols, weight, bytes, bias] = t;
    return {{type, rows, cols, false}, reinterpret_cast<const uint8_t*>(weight), bytes, floats(bias)};
}

AttentionLayer attention_of(const py::dict& d) {
    const auto linear = [&](const char* name) { return linear_of(d[name].cast<LinearTuple>()); };
    const auto vector = [&](const char* name) { return floats(d[name].cast<uint64_t>()); };
    return {vector("norm"),          linear("query"),
            linear("key"),           linear("value"),
            linear("out"),           vector("q_norm"),
            vector("k_norm"),        d["norms_heads"].cast<bool>(),
            d["clip"].cast<float>(), d["window"].cast<int64_t>(),
            vector("sinks"),         vector("feed_forward_norm")};
}

DecoderShape shape_of(const py::dict& shape) {
    const auto integer = [&](const char* name) { return shape[name].cast<int64_t>(); };
    return {integer("hidden_size"),
            integer("num_heads"),
            integer("num_kv_heads"),
            integer("head_dim"),
            integer("rotary_dim"),
            shape["eps"].cast<float>(),
            shape["scaling"].cast<float>(),
            shape["cache_type"].cast<int>(),
            integer("max_top_k")};
}

std::unique_ptr<DecodeStep> make_decode_step(const py::dict& shape, const LinearTuple& embedding,
                                             uint64_t final_norm, const LinearTuple& head) {
    return std::make_unique<DecodeStep>(shape_of(shape), linear_of(embedding), floats(final_norm),
                                        linear_of(head));
}

Router router_of(const py::tuple& router) {
    const auto& [gate, top_k, softmax_of_chosen, normalize] =
        router.cast<std::tuple<LinearTuple, int64_t, bool, bool>>();
    return {linear_of(gate), top_k, softmax_of_chosen, normalize};
}

// Of each layer: attention, router (or an empty tuple), kernel, addresses of a dense network's matrices,
// and where its keys and values begin.
DenseLayer dense_layer_of(const py::tuple& layer) {
    const auto router = layer[1].cast<py::tuple>();
    const auto address = [&](int i) { return reinterpret_cast<uint8_t*>(layer[i].cast<uint64_t>()); };
    return {attention_of(layer[0].cast<py::dict>()),
            router.empty() ? Router{} : router_of(router),
            layer[2].cast<const ExpertKernel*>(),
            layer[3].cast<Addresses>(),
            address(4),
            address(5)};
}

std::unique_ptr<DenseStep> make_dense_step(DeviceEngine& engine, const py::dict& shape, int64_t first_layer,
                                           int64_t capacity, const py::list& layers, uint64_t final_norm,
                                           const std::optional<LinearTuple>& head) {
    DenseParts parts{shape_of(shape), first_layer, capacity, {}, floats(final_norm), {}};
    for (const py::handle layer : layers) parts.layers.push_back(dense_layer_of(layer.cast<py::tuple>()));
    if (head) parts.head = linear_of(*head);
    return engine.device().make_dense(parts);
}

void add_moe_layer(DecodeStep& step, const py::dict& attention, const LinearTuple& gate, int64_t top_k,
                   bool softmax_of_chosen, bool normalize, const ExpertKernel* kernel) {
    step.decoder().add_moe_layer(attention_of(attention),
                                 {linear_of(gate), top_k, softmax_of_chosen, normalize}, kernel);
}

void add_dense_layer(DecodeStep& step, const py::dict& attention, const ExpertKernel* kernel,
                     std::vector<uint64_t> addresses) {
    step.decoder().add_dense_layer(attention_of(attention), kernel, std::move(addresses));
}

void begin(DecodeStep& step, int64_t token_id, uint64_t cos, uint64_t sin) {
    without_gil([&] { step.begin(token_id, floats(cos), floats(sin)); });
}

void attend(DecodeStep& step, int64_t layer, uint64_t keys, uint64_t values, int64_t capacity,
            int64_t num_tokens) {
    const CachedTokens cached{reinterpret_cast<uint8_t*>(keys), reinterpret_cast<uint8_t*>(values), capacity,
                              num_tokens};
    without_gil([&] { step.attend(layer, cached); });
}

void check_addresses(const DecodeStep& step, int64_t layer, size_t num_experts, const Addresses& addresses) {
    check_equal("DecodeStep", "number of addresses", int64_t(num_experts) * step.num_matrices(layer),
                int64_t(addresses.size()));
}

void experts(DecodeStep& step, int64_t layer, const Addresses& addresses) {
    check_addresses(step, layer, step.choice().ids.size(), addresses);
    without_gil([&] { step.experts(layer, addresses.data()); });
}

void expert_rows(DecodeStep& step, int64_t layer, const std::vector<int32_t>& positions,
                 const Addresses& addresses) {
    check_addresses(step, layer, positions.size(), addresses);
    without_gil([&] { step.expert_rows(layer, positions, addresses.data()); });
}

void device_rows(DecodeStep& step, const DeviceKernel& kernel, const std::vector<int32_t>& positions,
                 const Addresses& addresses) {
    without_gil([&] { step.device_rows(kernel, positions, addresses.data()); });
}

void add_expert_rows(DecodeStep& step, int64_t layer) {
    without_gil([&] { step.add_expert_rows(layer); });
}

// (key address, value address) by layer; tables by layer, 0 where there are no experts.
int64_t run(DecodeStep& step, int64_t first, const KeyValueAddresses& keys_values, int64_t capacity,
            int64_t num_tokens, const std::vector<uint64_t>& tables, moe::LayerWatch* watch) {
    const std::vector<CachedTokens> cached = cached_tokens(keys_values, capacity, num_tokens);
    std::vector<const uint64_t*> addresses;
    for (uint64_t table : tables) addresses.push_back(reinterpret_cast<const uint64_t*>(table));
    int64_t stopped = 0;
    without_gil([&] { stopped = step.run(first, cached, addresses, watch); });
    return stopped;
}

py::list choices(const DecodeStep& step, int64_t first, int64_t end) {
    check(0 <= first && first <= end && end <= int64_t(step.choices().size()), "DecodeStep.choices",
          "run() has not come to these layers");
    py::list list;
    for (int64_t layer = first; layer < end; ++layer) {
        const Choice& choice = step.choices()[layer];
        if (!choice.ids.empty()) list.append(py::make_tuple(layer, choice.ids, choice.weights));
    }
    return list;
}

void logits(DecodeStep& step, uint64_t out) {
    without_gil([&] { step.logits(reinterpret_cast<float*>(out)); });
}

int64_t expect_next(DecodeStep& step, uint64_t logits, moe::LayerWatch* watch) {
    int64_t token_id = 0;
    without_gil([&] { token_id = step.expect_next(floats(logits), watch); });
    return token_id;
}

void begin_prompt(PromptStep& step, uint64_t token_ids, int64_t num_tokens,
                  const std::array<uint64_t, 6>& states) {
    const auto [residual, normed, ids, weights, cos, sin] = states;
    const auto address = [](uint64_t at) { return reinterpret_cast<float*>(at); };
    without_gil([&] {
        step.begin(reinterpret_cast<const int64_t*>(token_ids), num_tokens,
                   {address(residual), address(normed), reinterpret_cast<int32_t*>(ids), address(weights),
                    address(cos), address(sin)});
    });
}

void attend_prompt_layer(PromptStep& step, int64_t layer, uint64_t keys, uint64_t values, int64_t capacity,
                         int64_t past_tokens, int64_t first, int64_t num_tokens, int64_t wanted) {
    const CachedTokens cached{reinterpret_cast<uint8_t*>(keys), reinterpret_cast<uint8_t*>(values), capacity,
                              past_tokens};
    without_gil([&] { step.attend(layer, cached, first, num_tokens, wanted); });
}

// A prompt from its beginning, apart from what is around attention: for those who time it.
void attend_prompt_alone(int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int cache_type,
                         uint64_t keys, uint64_t values, int64_t num_tokens, uint64_t query,
                         uint64_t context) {
    DecoderShape shape{};
    shape.num_heads = num_heads;
    shape.num_kv_heads = num_kv_heads;
    shape.head_dim = head_dim;
    shape.cache_type = cache_type;
    const CachedTokens cached{reinterpret_cast<uint8_t*>(keys), reinterpret_cast<uint8_t*>(values),
                              num_tokens, 0};
    without_gil([&] {
        ThreadPool::Operation operation(ThreadPool::instance());
        attend_prompt(shape, AttentionLayer{}, cached, num_tokens, floats(query),
                      reinterpret_cast<float*>(context));
    });
}

void prompt_logits(PromptStep& step, int64_t first, uint64_t out) {
    without_gil([&] { step.logits(first, reinterpret_cast<float*>(out)); });
}

}  // namespace

void register_decode(py::module_& m) {
    py::class_<moe::LayerWatch>(m, "LayerWatch", "Who is told of layers that run in one call.");
    py::class_<DenseStep>(m, "DenseStep", "The dense part of decode steps on a device")
        .def(py::init(&make_dense_step), py::arg("device"), py::arg("shape"), py::arg("first_layer"),
             py::arg("capacity"), py::arg("layers"), py::arg("final_norm"), py::arg("head"),
             py::keep_alive<1, 2>(), py::keep_alive<1, 6>())
        .def(
            "take_rows_done",
            [](DenseStep& step) {
                const RowsDone done = step.take_rows_done();
                return std::pair(done.experts, done.seconds);
            },
            "Experts whose rows were computed there and waited for, and the seconds that it took")
        .def_property_readonly("num_waits", &DenseStep::num_waits);
    py::class_<DecodeStep>(m, "DecodeStep", "One token through a decoder, layer by layer")
        .def(py::init(&make_decode_step))
        .def("add_moe_layer", add_moe_layer, py::keep_alive<1, 7>())
        .def("add_dense_layer", add_dense_layer, py::keep_alive<1, 3>())
        .def("use_device", &DecodeStep::use_device, py::arg("device").none(true), py::arg("first_layer"),
             py::arg("has_head"), py::keep_alive<1, 2>(), "Run the last layers, and the head, there")
        .def("begin", begin, "Embed a token")
        .def("attend", attend, "Attention and the router's choice, or a whole dense layer")
        .def(
            "choice", [](const DecodeStep& s) { return std::pair(s.choice().ids, s.choice().weights); },
            "The chosen experts' ids, ascending, and their weights")
        .def_property_readonly(
            "rows_address", [](DecodeStep& s) { return reinterpret_cast<uint64_t>(s.expert_rows_data()); },
            "Address of the chosen experts' rows (top_k, hidden_size), for who computes some of them "
            "elsewhere")
        .def_property_readonly(
            "router_input",
            [](const DecodeStep& s) { return reinterpret_cast<uint64_t>(s.router_input().data()); },
            "Address of what the last router saw, (hidden_size,) float32")
        .def("experts", experts, "Add the chosen experts")
        .def("expert_rows", expert_rows, "Compute some of them")
        .def("add_expert_rows", add_expert_rows, "Add all of them, once computed")
        .def_property_readonly(
            "away", [](const DecodeStep& s) { return s.away(); }, py::return_value_policy::reference,
            "Who has the residual, and keeps experts' rows: the device, or None")
        .def("leave_rows", &DecodeStep::leave_rows, py::arg("positions"),
             "Take some of the experts' rows from the device when they are added; returns their first row "
             "there")
        .def("device_rows", device_rows, py::arg("kernel"), py::arg("positions"), py::arg("addresses"),
             "Compute some of them there, and leave them")
        .def("run", run, py::arg("first"), py::arg("keys_values"), py::arg("capacity"), py::arg("num_tokens"),
             py::arg("tables"), py::arg("watch") = nullptr,
             "The layers from one on, up to one that chose what is not in memory")
        .def("choices", choices, py::arg("first"), py::arg("end"),
             "What run() chose in those of some layers that have experts, (layer, ids, weights)")
        .def("logits", logits, "The token's logits")
        .def("expect_next", expect_next, py::arg("logits"), py::arg("watch") = nullptr,
             "The most likely next token by the logits; who watches hears of it as if its layers began");
    py::class_<PromptStep>(m, "PromptStep", "Many tokens through the decoder of a DecodeStep")
        .def(py::init([](DecodeStep& step) { return std::make_unique<PromptStep>(step.decoder()); }),
             py::keep_alive<1, 2>())
        .def("use_device", &PromptStep::use_device, py::arg("device").none(true), py::arg("first_layer"),
             py::arg("has_head"), py::keep_alive<1, 2>(), "Run the last layers, and the head, there")
        .def("begin", begin_prompt,
             "Embed tokens; states: addresses of residual, normed, ids, weights, cos, sin")
        .def("attend", attend_prompt_layer, py::arg("layer"), py::arg("keys"), py::arg("values"),
             py::arg("capacity"), py::arg("past_tokens"), py::arg("first"), py::arg("num_tokens"),
             py::arg("wanted") = 0,
             "Attention and the router's choices of some of the chunk's tokens, or a whole dense layer; of "
             "tokens before ``wanted`` keys and values only")
        .def("logits", prompt_logits, "Logits of the tokens from one on");
    m.def("attend_prompt", attend_prompt_alone,
          "Causal attention of a prompt's scaled queries (num_tokens, num_heads, head_dim) over keys and "
          "values "
          "(num_kv_heads, num_tokens, head_dim), all by address");
}
