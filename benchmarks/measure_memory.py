"""Measure the peak memory of `pulid generate` at full size, with random weights.

    python benchmarks/measure_memory.py WEIGHTS --detector scrfd.onnx -o memory.json

WEIGHTS is a directory of about 9 GB. Files of the published names and shapes are created in it,
unless they are there already. The detector must be a real one, since it has to find a face. Not a
test: it takes minutes and about 10 GB of memory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import skimage.data
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from facexlib.parsing.bisenet import BiSeNet
from PIL import Image
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import openpulid
from openpulid.bench.perf.random_models import SDXL_UNET, SDXL_VAE
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.io.hub import FOLDER_VARIABLE, WEIGHTS
from openpulid.methods.pulid import IDFormer, PuLID
from openpulid.mini.models import build_tokenizer

CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
"""Configurations of SDXL's text encoders."""

CLIP_TEXT_PARAMETERS = 124_000_000
"""Parameters of EVA-CLIP's text encoder, which is in the same file as the vision encoder."""

ARCFACE_HIDDEN = 22_000
"""Width that gives the replacement of the 100-layer ArcFace its 65 million parameters."""

CHUNK = 1 << 24
"""Random numbers that are drawn; a file repeats them."""


def main() -> None:
    """Create the weights, run the command, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("--detector", type=Path, required=True)
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("-o", "--out", type=Path)
    arguments = parser.parse_args()
    create_weights(arguments.weights, arguments.detector)
    with tempfile.TemporaryDirectory() as directory:
        photo = Path(directory) / "photo.png"
        identity = Path(directory) / "identity.safetensors"
        Image.fromarray(skimage.data.astronaut()).save(photo)
        options = ["--preset", "sdxl", "--size", arguments.size, "--steps", str(arguments.steps)]
        commands = {
            "identify": ["identify", str(photo), "--preset", "sdxl", "-o", str(identity)],
            "generate, photo": ["generate", "portrait", "--id", str(photo), *options],
            "generate, identity file": ["generate", "portrait", "--id", str(identity), *options],
        }
        rows = []
        for name, words in commands.items():
            rows.append({"name": name, **run(words, arguments.weights, Path(directory))})
            print(json.dumps(rows[-1]), flush=True)
    report = {
        "size": arguments.size,
        "steps": arguments.steps,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "diffusers", "transformers", "onnxruntime")
        },
        "rows": rows,
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def run(words: list[str], weights: Path, directory: Path) -> dict[str, float]:
    """Run `pulid` in a process of its own, and sample its memory.

    Returns:
        Peaks in GiB: all resident memory, as the kernel counts it, and the part that
        is not mapped from files; and the seconds.
    """
    command = [sys.executable, "-c", "from openpulid.cli.main import main; main()", *words]
    # the process runs elsewhere: a relative PYTHONPATH would find another installation
    source = str(Path(openpulid.__file__).parents[1])
    environment = {**os.environ, FOLDER_VARIABLE: str(weights.resolve()), "PYTHONPATH": source}
    start = time.monotonic()
    process = subprocess.Popen(command, env=environment, cwd=directory, stdout=subprocess.DEVNULL)
    anonymous = 0
    while (finished := os.wait4(process.pid, os.WNOHANG))[0] == 0:
        anonymous = max(anonymous, read_anonymous(process.pid))
        time.sleep(0.05)
    _, status, usage = finished
    if status:
        raise SystemExit(f"{' '.join(words)} failed")
    return {
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
        "peak_without_files_gib": round(anonymous / 2**30, 2),
        "seconds": round(time.monotonic() - start, 1),
    }


def read_anonymous(pid: int) -> int:
    """Return the bytes of a process's resident memory that are not mapped from files."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # the process has just ended
        return 0
    values = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return int(values[0]) * 1024 if values else 0


def create_weights(directory: Path, detector: Path) -> None:
    """Create what the preset `sdxl` needs."""
    directory.mkdir(parents=True, exist_ok=True)
    create_pipeline(directory / WEIGHTS["juggernaut"].repo.split("/")[-1])
    shutil.copyfile(detector, directory / WEIGHTS["detector"].file)
    if not (path := directory / WEIGHTS["pulid-v1.1"].file).exists():
        with init_empty_weights():
            adapter = PuLID.for_unet(UNet2DConditionModel(**SDXL_UNET), IDFormer())
        write_random_weights(path, adapter)
    if not (path := directory / WEIGHTS["eva"].file).exists():
        visual = VisionEncoder().visual.half().state_dict()
        state = {f"visual.{name}": value for name, value in visual.items()}
        state["text.weight"] = torch.randn(CLIP_TEXT_PARAMETERS).half()
        torch.save(state, path)
    if not (path := directory / WEIGHTS["parsing"].file).exists():
        torch.save(BiSeNet(num_class=19).state_dict(), path)
    if not (path := directory / WEIGHTS["arcface"].file).exists():
        create_recognition(path)


def create_pipeline(directory: Path) -> None:
    """Create an SDXL pipeline in float16."""
    if (directory / "model_index.json").exists():
        return
    with init_empty_weights():
        networks: dict[str, Any] = {
            "unet": UNet2DConditionModel(**SDXL_UNET),
            "vae": AutoencoderKL(**SDXL_VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(num_attention_heads=12, **CLIP_L)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G)),
        }
    index: dict[str, Any] = {"_class_name": "StableDiffusionXLPipeline"}
    for name, network in networks.items():
        library = "transformers" if "text" in name else "diffusers"
        stem = "model" if library == "transformers" else "diffusion_pytorch_model"
        index[name] = [library, type(network).__name__]
        write_random_weights(directory / name / f"{stem}.fp16.safetensors", network)
        if library == "transformers":
            network.config.save_pretrained(directory / name)
        else:
            network.save_config(directory / name)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = build_tokenizer()
        index[name] = ["transformers", type(tokenizer).__name__]
        tokenizer.save_pretrained(directory / name)
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).save_pretrained(directory / "scheduler")
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (directory / "model_index.json").write_text(json.dumps(index, indent=1))


def write_random_weights(path: Path, network: nn.Module) -> None:
    """Write random float16 weights of a network's names and shapes, without holding them.

    A safetensors file is the length of its header, the header as JSON, and the numbers.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    shapes: Mapping[str, torch.Tensor] = network.state_dict()
    end = 0
    for name, tensor in shapes.items():
        start, end = end, end + 2 * math.prod(tensor.shape)
        header[name] = {
            "dtype": "F16",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = (0.02 * torch.randn(CHUNK)).half().numpy().tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end > 0:
            file.write(numbers[:end])
            end -= len(numbers)


def create_recognition(path: Path) -> None:
    """Create an ONNX network with the input, the output and the size of the 100-layer ArcFace."""
    random = np.random.default_rng(0)
    shapes = {"first": (3 * 28 * 28, ARCFACE_HIDDEN), "second": (ARCFACE_HIDDEN, 512)}
    weights = [
        onnx.numpy_helper.from_array(
            random.standard_normal(shape, np.float32) / np.float32(shape[0] ** 0.5), name
        )
        for name, shape in shapes.items()
    ]
    nodes = [
        onnx.helper.make_node(
            "AveragePool", ["input.1"], ["small"], kernel_shape=[4, 4], strides=[4, 4]
        ),
        onnx.helper.make_node("Flatten", ["small"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "first"], ["hidden"]),
        onnx.helper.make_node("MatMul", ["hidden", "second"], ["embedding"]),
    ]
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "recognition",
        [onnx.helper.make_tensor_value_info("input.1", float32, ["None", 3, 112, 112])],
        [onnx.helper.make_tensor_value_info("embedding", float32, ["None", 512])],
        weights,
    )
    opset = [onnx.helper.make_opsetid("", 13)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), path)


if __name__ == "__main__":
    main()
