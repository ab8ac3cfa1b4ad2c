"""A small network on the hybrid's features, trained from a trace, run by onnxruntime.

One graph a layer: features -> linear part + a hidden layer of SiLU units -> scores of all later layers.
The network lives in an ONNX file's bytes, so that another runtime can run it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_offload.errors import CheckpointError, ConfigError
from moe_offload.planning.prediction import Forecast, Predictor, used_by_any
from moe_offload.predictors.fitted import Features, Pair
from moe_offload.predictors.history import Float32Array
from moe_offload.predictors.routers import DEFAULT_CURVE, Curve, probabilities

OPSET, IR_VERSION = 17, 8
INPUT, OUTPUT = "features", "scores"


class Learned(Features):  # type: ignore[misc]
    """Forecast with one onnxruntime session a layer, on one thread that does not spin.

    Args:
        graphs: by layer, an ONNX model of the features of all its later layers, [router input (H), choice
            (E), 1, then previous weights (E) and frequencies (E) of each later layer], to their scores.
        first: asked before any router has spoken; None: nothing is said then.
        curves: by (layer, later layer).

    Raises:
        ConfigError: onnxruntime is not installed.
        CheckpointError: a graph that it does not read.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_experts: int,
        hidden_size: int,
        graphs: Mapping[int, bytes],
        *,
        top_k: int,
        depth: int = 1,
        first: Predictor | None = None,
        curves: Mapping[Pair, Curve] | None = None,
    ) -> None:
        super().__init__(layers, num_experts, hidden_size, top_k=top_k, depth=depth)
        self._sessions = {layer_idx: open_session(graph) for layer_idx, graph in graphs.items()}
        self._first, self._curves = first, dict(curves or {})

    def new_sequence(self) -> None:
        """Forget the last token."""
        super().new_sequence()
        if self._first is not None:
            self._first.new_sequence()

    def begin_step(self, token_ids: NDArray[np.int64] | None) -> Sequence[Forecast]:
        """Return what ``first`` says."""
        return () if self._first is None else self._first.begin_step(token_ids)

    def observe(self, layer_idx: int, expert_ids: NDArray[np.int64], expert_weights: Float32Array) -> None:
        """Keep a layer's choice."""
        super().observe(layer_idx, expert_ids, expert_weights)
        if self._first is not None:
            self._first.observe(layer_idx, expert_ids, expert_weights)

    def predict(
        self,
        layer_idx: int,
        router_input: Any,
        expert_ids: NDArray[np.int64],
        expert_weights: Float32Array,
    ) -> Sequence[Forecast]:
        """Return forecasts of the next layers."""
        later_layers = self.order.after(layer_idx)
        if not later_layers:
            return ()
        seen = self.seen_here(router_input, expert_ids, expert_weights)
        features = with_past(seen, [self.past_of(later) for later in later_layers])
        (scores,) = self._sessions[layer_idx].run([OUTPUT], {INPUT: features})
        forecasts = []
        for position, later in enumerate(later_layers):
            part = scores[:, position * self.num_experts : (position + 1) * self.num_experts]
            curve = self._curves.get((layer_idx, later), DEFAULT_CURVE)
            forecasts.append(Forecast(later, used_by_any(probabilities(part, self._top_k, curve))))
        return forecasts


def with_past(seen: Float32Array, pasts: Sequence[Float32Array]) -> Float32Array:
    """Append the (2 E,) past of each later layer to every row of (T, H + E + 1)."""
    past = np.concatenate(pasts)
    features = np.empty((len(seen), seen.shape[1] + len(past)), np.float32)
    features[:, : seen.shape[1]] = seen
    features[:, seen.shape[1] :] = past
    return features


def is_available() -> bool:
    """Whether onnxruntime is installed."""
    return find_spec("onnxruntime") is not None


def open_session(graph: bytes) -> Any:
    """Return an onnxruntime session: one thread, no spinning, no memory kept for larger calls."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            "predictor='learned' runs its network with onnxruntime, which is not installed: "
            "pip install 'moe_offload[learned]', or choose predictor='hybrid'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes share no base but Exception
        raise CheckpointError(f"a fitted predictor's network cannot be read: {error}") from error


def export_onnx(
    linear: Float32Array, hidden: Float32Array, output: Float32Array, *, num_features: int
) -> bytes:
    """Return the ONNX model of scores = x L + silu(x W) V.

    Args:
        linear: L (F, n E).
        hidden: W (F, M).
        output: V (M, n E).
        num_features: F, checked.

    Raises:
        ConfigError: onnx is not installed.
    """
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise ConfigError(
            "the learned predictor is stored as ONNX, and onnx is not installed: pip install "
            "'moe_offload[learned]', or fit without it: --no-network"
        ) from error
    assert linear.shape[0] == hidden.shape[0] == num_features, "features of the parts differ"
    constants = {"linear": linear, "hidden": hidden, "output": output}
    nodes = [
        helper.make_node("MatMul", [INPUT, "linear"], ["straight"]),
        helper.make_node("MatMul", [INPUT, "hidden"], ["inner"]),
        helper.make_node("Sigmoid", ["inner"], ["gate"]),
        helper.make_node("Mul", ["inner", "gate"], ["units"]),
        helper.make_node("MatMul", ["units", "output"], ["bent"]),
        helper.make_node("Add", ["straight", "bent"], [OUTPUT]),
    ]
    graph = helper.make_graph(
        nodes,
        "router_scores",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["T", num_features])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["T", linear.shape[1]])],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    serialized: bytes = model.SerializeToString()
    return serialized
