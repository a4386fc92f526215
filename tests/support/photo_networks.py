"""A real detector and real photos if available, and a small network with ArcFace's signature."""

from __future__ import annotations

from pathlib import Path

import insightface
import numpy as np
import onnx
import pytest

SHARED = Path(__file__).parents[3] / "shared"
DETECTOR = SHARED / "faces" / "scrfd_2.5g_kps.onnx"
PHOTOS = SHARED / "photos"
GROUP = Path(insightface.__file__).parent / "data" / "images" / "t1.jpg"
"""A photo of six people."""

needs_detector = pytest.mark.skipif(
    not DETECTOR.exists(), reason="the detector and photos in shared are not available"
)


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
    graph = onnx.helper.make_graph(
        nodes,
        "recognition",
        [
            onnx.helper.make_tensor_value_info(
                "input.1", onnx.TensorProto.FLOAT, ["None", 3, 112, 112]
            )
        ],
        [onnx.helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, ["None", dim])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    onnx.save(
        onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8
        ),
        path,
    )
    return path
