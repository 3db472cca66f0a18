"""A ResNet as a graph of ONNX, opset 17: batch, height and width are dynamic."""

from __future__ import annotations

from typing import Any

import numpy as np

from selfsup_jax.evaluation.encoder import FrozenEncoder
from selfsup_jax.models import encoders
from selfsup_jax.models.resnet import STAGES

OPSET, _IR_VERSION = 17, 8  # of ONNX 1.12: ONNX Runtime 1.12 and newer read them


def model(frozen: FrozenEncoder) -> Any:
    """`images` [N, 3, H, W] normalised -> `features` [N, D] and `maps` [N, D, h, w]."""
    import onnx  # an extra of this package

    graph = _Graph(onnx.helper, frozen)
    last = graph.maps("images")
    pooled = graph.node("GlobalAveragePool", [last])
    graph.node("Flatten", [pooled], output="features")
    graph.node("Identity", [last], output="maps")
    value = onnx.helper.make_tensor_value_info
    module: Any = encoders.make_encoder(frozen.config["encoder"])
    kind, size = onnx.TensorProto.FLOAT, module.num_features
    proto = onnx.helper.make_graph(
        graph.nodes,
        "encoder",
        [value("images", kind, ["batch", 3, "height", "width"])],
        [
            value("features", kind, ["batch", size]),
            value("maps", kind, ["batch", size, "map_height", "map_width"]),
        ],
        [onnx.numpy_helper.from_array(array, name) for name, array in graph.weights.items()],
    )
    opset = onnx.helper.make_opsetid("", OPSET)
    made = onnx.helper.make_model(
        proto, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="selfsup-jax"
    )
    onnx.checker.check_model(made)
    return made


class _Graph:
    """Nodes and weights, added in the order of `ResNet.__call__`."""

    def __init__(self, helper: Any, frozen: FrozenEncoder):
        self._helper, self._variables = helper, frozen.variables
        self._fields = frozen.config["encoder"]
        self.nodes: list[Any] = []
        self.weights: dict[str, np.ndarray] = {}

    def node(self, kind: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(self._helper.make_node(kind, inputs, [output], **attributes))
        return output

    def maps(self, x: str) -> str:
        """The maps before the pooling."""
        blocks, bottleneck = STAGES[self._fields["depth"]]
        imagenet = self._fields["stem"] == "imagenet"
        x = self.node("Relu", [self._conv(x, "stem", 2 if imagenet else 1)])
        if imagenet:
            symmetric = self._fields["padding"] == "torch"
            x = self.node("MaxPool", [x], kernel_shape=[3, 3], **_window(3, 2, symmetric))
        for stage, count in enumerate(blocks):
            for index in range(count):
                name = f"stage{stage + 1}_block{index + 1}"
                x = self._block(x, name, 2 if stage > 0 and index == 0 else 1, bottleneck)
        return x

    def _block(self, x: str, name: str, stride: int, bottleneck: bool) -> str:
        shortcut = x
        if f"{name}_shortcut" in self._variables["params"]:
            shortcut = self._conv(x, f"{name}_shortcut", stride)
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        for i, conv_stride in enumerate(strides, start=1):
            x = self._conv(x, f"{name}_conv{i}", conv_stride)
            if i < len(strides):
                x = self.node("Relu", [x])
        return self.node("Relu", [self.node("Add", [x, shortcut])])

    def _conv(self, x: str, name: str, stride: int) -> str:
        """A convolution and its batch norm."""
        kernel = np.asarray(self._variables["params"][name]["kernel"], np.float32)
        kernel = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        window = _window(kernel.shape[-1], stride, self._fields["padding"] != "same")
        weight = self._weight(f"{name}.kernel", kernel)
        x = self.node("Conv", [x, weight], kernel_shape=list(kernel.shape[2:]), **window)
        norm = {
            **self._variables["params"][f"{name}_bn"],
            **self._variables["batch_stats"][f"{name}_bn"],
        }
        parts = [self._weight(f"{name}.{k}", norm[k]) for k in ("scale", "bias", "mean", "var")]
        epsilon = float(self._fields["bn_epsilon"])
        return self.node("BatchNormalization", [x, *parts], epsilon=epsilon)

    def _weight(self, name: str, array: Any) -> str:
        self.weights[name] = np.asarray(array, np.float32)
        return name


def _window(size: int, stride: int, symmetric: bool) -> dict[str, Any]:
    """How a window of odd size moves, and what is added around the image."""
    around = {"pads": [(size - 1) // 2] * 4} if symmetric else {"auto_pad": "SAME_UPPER"}
    return {"strides": [stride, stride], **around}
