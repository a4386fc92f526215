"""A node pack for tests: the miniature as MODEL, CLIP and VAE of a checkpoint loader."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import ComfyExtension, io

ROOT = Path(__file__).resolve().parents[3]


class TextEncoder:
    """The miniature's text encoders, as ComfyUI calls a CLIP object."""

    def __init__(self, pipe: Any, side: int) -> None:
        self.pipe = pipe
        self.side = side

    def tokenize(self, text: str, **kwargs: Any) -> str:
        """Return the text itself."""
        return text

    @torch.no_grad()
    def encode_from_tokens_scheduled(self, tokens: str, **kwargs: Any) -> Any:
        """Return ComfyUI's conditioning."""
        text, _, pooled, _ = self.pipe.encode_prompt(
            tokens, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        size = {"width": self.side, "height": self.side}
        return [[text, {"pooled_output": pooled, **size}]]


class Decoder:
    """The miniature's autoencoder, as ComfyUI calls a VAE object."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return images (B, H, W, 3) in [0, 1]."""
        images = self.pipe.vae.decode(latents.float()).sample
        return (images / 2 + 0.5).clamp(0, 1).movedim(1, -1)


class LoadMiniature(io.ComfyNode):
    """Loads the miniature's pipeline."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return io.Schema(
            node_id="TestLoadMiniature",
            inputs=[],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Load the pipeline."""
        if str(ROOT) not in sys.path:
            sys.path.append(str(ROOT))
        module = load_support()
        from openpulid.pipelines.factory import load_pipeline
        from openpulid.pipelines.presets import mini

        with torch.inference_mode(False):
            pipe = load_pipeline(mini(), torch.device("cpu"))
            model = module.load_miniature(pipe)
        return io.NodeOutput(model, TextEncoder(pipe, 96), Decoder(pipe))


def load_support() -> Any:
    """Import the tests' helper by its path: ComfyUI has a package `tests` of its own."""
    import importlib.util

    path = ROOT / "tests" / "support" / "comfyui.py"
    spec = importlib.util.spec_from_file_location("openpulid_test_support", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestExtension(ComfyExtension):
    """The node of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the node class."""
        return [LoadMiniature]


async def comfy_entrypoint() -> TestExtension:
    """Return the extension to ComfyUI."""
    return TestExtension()
