"""The miniature as MODEL, CLIP and VAE of a checkpoint loader, and a random ControlNet for it."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from .helpers import describe_loader, load_support

SIDE = 96
"""Of the miniature's images in pixels."""


class TextEncoder:
    """The miniature's text encoders, as ComfyUI calls a CLIP object."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def tokenize(self, text: str, **kwargs: Any) -> str:
        """Return the text itself."""
        return text

    @torch.no_grad()
    def encode_from_tokens_scheduled(self, tokens: str, **kwargs: Any) -> Any:
        """Return ComfyUI's conditioning."""
        text, _, pooled, _ = self.pipe.encode_prompt(
            tokens, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return load_support("comfyui").sdxl_conditioning(text, pooled, SIDE)


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
    """Takes the place of *Load Checkpoint*."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return describe_loader(
            "TestLoadMiniature", io.Model.Output(), io.Clip.Output(), io.Vae.Output()
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Load the pipeline."""
        from openpulid.pipelines.factory import load_pipeline
        from openpulid.pipelines.presets import mini

        with torch.inference_mode(False):
            pipe = load_pipeline(mini(), torch.device("cpu"))
            model = load_support("comfyui").load_miniature(pipe)
        return io.NodeOutput(model, TextEncoder(pipe), Decoder(pipe))


class LoadControlNet(io.ComfyNode):
    """Takes the place of *Load ControlNet Model*, for the miniature."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return describe_loader("TestLoadControlNet", io.ControlNet.Output())

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Create a random ControlNet of ComfyUI's own class."""
        from comfy import cldm, controlnet, model_management

        support = load_support("comfyui")
        with torch.inference_mode(False):
            sizes = support.miniature_sizes()
            sizes.pop("out_channels")
            network = cldm.cldm.ControlNet(hint_channels=3, num_head_channels=32, **sizes)
            support.initialize(network)
        return io.NodeOutput(
            controlnet.ControlNet(network, load_device=model_management.get_torch_device())
        )
