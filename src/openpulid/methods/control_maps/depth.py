"""The depth of an image: Depth Anything V2 (arXiv 2406.09414), in transformers' implementation."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from openpulid.io.networks import describe_load_errors, load_network


@torch.inference_mode()
def estimate_depth(image: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    """Estimate the depth of an image as ControlNets for depth were trained: what is near is white.

    Args:
        image: RGB.
        path: directory of the network, with its image processor.

    Returns:
        A gray image of the same size, in RGB. The nearest point is white, the farthest is black.

    Raises:
        WeightsError: the directory has no such network, or its files are damaged.
    """
    # transformers loads the module of every model that is named, which takes seconds
    from transformers import AutoImageProcessor, DepthAnythingForDepthEstimation

    folder = Path(path)
    network = load_network(DepthAnythingForDepthEstimation, folder, torch.float32).eval()
    with describe_load_errors(folder):
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    outputs = network(**processor(images=image, return_tensors="pt"))
    sizes = [(image.height, image.width)]
    (result,) = processor.post_process_depth_estimation(outputs, target_sizes=sizes)
    nearness = result["predicted_depth"].float()
    nearness = nearness - nearness.min()
    pixels = (255 * nearness / nearness.max().clamp(min=1e-6)).round().to(torch.uint8)
    return Image.fromarray(np.asarray(pixels)).convert("RGB")
