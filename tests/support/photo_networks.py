"""Real detectors and photos if available, and small networks with the signatures of real ones."""

from __future__ import annotations

from pathlib import Path

import insightface
import numpy as np
import onnx
import pytest
import torch
from torch import nn

from openpulid.faces.bisenet import TEMPLATE

SHARED = Path(__file__).parents[3] / "shared"
DETECTOR = SHARED / "faces" / "scrfd_2.5g_kps.onnx"
YUNET = SHARED / "faces" / "face_detection_yunet_2026may.onnx"
PHOTOS = SHARED / "photos"
GROUP = Path(insightface.__file__).parent / "data" / "images" / "t1.jpg"
"""A photo of six people."""

needs_detector = pytest.mark.skipif(
    not DETECTOR.exists(), reason="the detector and photos in shared are not available"
)

needs_yunet = pytest.mark.skipif(
    not YUNET.exists(), reason="YuNet's file and photos in shared are not available"
)

NOSE_CELL = 32
"""Width in pixels of the red square that is a nose to `yunet_file`'s network."""


class SmallParser(nn.Module):
    """Labels 0 and 1 of each pixel; BiSeNet itself takes a second for each face."""

    def __init__(self) -> None:
        super().__init__()
        self.labels = nn.Conv2d(3, 2, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.labels(images)


def recognition_file(path: Path, dim: int = 512) -> Path:
    """Write an ONNX network with ArcFace's signature: 112 x 112 pixels in, `dim` numbers out."""
    weights = np.random.default_rng(0).standard_normal((3 * 49, dim)).astype(np.float32)
    nodes = [
        onnx.helper.make_node(
            "AveragePool", ["input.1"], ["small"], kernel_shape=[16, 16], strides=[16, 16]
        ),
        onnx.helper.make_node("Flatten", ["small"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "weights"], ["embedding"]),
    ]
    return save_network(
        path,
        nodes,
        {"input.1": ["None", 3, 112, 112]},
        {"embedding": ["None", dim]},
        {"weights": weights},
    )


def yunet_file(path: Path) -> Path:
    """Write an ONNX network with YuNet's signature, which sees a face around a red square.

    The square is a cell of the grid of 32 pixels, at the nose; the face is 128 x 160 pixels.
    """
    landmarks = np.array(TEMPLATE) @ [[0.5, 0], [0, 0.5]]
    landmarks = (landmarks - landmarks[2]) / NOSE_CELL + 0.5
    values = {"cls": [0.0], "obj": [0.0], "bbox": [0.5, 0.5, np.log(4), np.log(5)]}
    values["kps"] = [float(value) for value in landmarks.flatten()]
    nodes = []
    constants: dict[str, np.ndarray] = {}
    for stride in (8, 16, 32):
        sides = [stride, stride]
        for name, bias in values.items():
            output = f"{name}_{stride}"
            weight = np.zeros((len(bias), 3, stride, stride), np.float32)
            if name in ("cls", "obj") and stride == NOSE_CELL:
                weight[0, 2] = 1 / 255 / stride**2  # BGR: the mean of red
                weight[0, 1] = -weight[0, 2]  # without green
            constants[f"{output}_weight"] = weight
            constants[f"{output}_bias"] = np.array(bias, np.float32)
            constants[f"{output}_shape"] = np.array([1, -1, len(bias)])
            inputs = ["input", f"{output}_weight", f"{output}_bias"]
            nodes += [
                onnx.helper.make_node(
                    "Conv", inputs, [f"{output}_map"], kernel_shape=sides, strides=sides
                ),
                onnx.helper.make_node(
                    "Transpose", [f"{output}_map"], [f"{output}_last"], perm=[0, 2, 3, 1]
                ),
                onnx.helper.make_node("Reshape", [f"{output}_last", f"{output}_shape"], [output]),
            ]
    outputs = {
        f"{name}_{stride}": [1, "anchors", len(bias)]
        for name, bias in values.items()
        for stride in (8, 16, 32)
    }
    return save_network(path, nodes, {"input": [1, 3, "height", "width"]}, outputs, constants)


def selfie_file(path: Path, num_classes: int = 6) -> Path:
    """Write an ONNX network with selfie_multiclass's signature.

    Red is face skin, green is clothes, blue is hair, and black is background.
    """
    weights = np.zeros((3, num_classes), np.float32)
    weights[0, 3] = weights[1, 4] = weights[2, 1] = 1
    bias = np.zeros(num_classes, np.float32)
    bias[0] = 0.5
    nodes = [
        onnx.helper.make_node("MatMul", ["input_29", "weights"], ["colors"]),
        onnx.helper.make_node("Add", ["colors", "bias"], ["Identity"]),
    ]
    return save_network(
        path,
        nodes,
        {"input_29": [1, 256, 256, 3]},
        {"Identity": [1, 256, 256, num_classes]},
        {"weights": weights, "bias": bias},
    )


def save_network(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int | str]],
    outputs: dict[str, list[int | str]],
    constants: dict[str, np.ndarray],
) -> Path:
    """Write an ONNX network of float32; inputs and outputs are name -> shape."""
    values = [
        [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
            for name, shape in shapes.items()
        ]
        for shapes in (inputs, outputs)
    ]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = onnx.helper.make_graph(nodes, "network", *values, tensors)
    opset = [onnx.helper.make_opsetid("", 13)]
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path
