"""Tiny random FLUX and Chroma models of ComfyUI's own classes, and an adapter for both."""

from __future__ import annotations

import sys
import zlib
from typing import Any

import torch
from comfy_api.latest import io

from .helpers import describe_loader, load_support


def create_transformer() -> Any:
    """Create the transformer whose sizes all models of this module have."""
    torch.manual_seed(0)
    return load_support("tiny_flux").tiny_transformer(in_channels=64).eval()


class TextEncoder:
    """Random text embeddings that depend on the text, as ComfyUI calls a CLIP object."""

    def tokenize(self, text: str, **kwargs: Any) -> str:
        """Return the text itself."""
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **kwargs: Any) -> Any:
        """Return ComfyUI's conditioning."""
        generator = torch.Generator().manual_seed(zlib.crc32(tokens.encode()))
        text = torch.randn(1, 7, 24, generator=generator)
        return [[text, {"pooled_output": torch.randn(1, 20, generator=generator)}]]


class LoadFlux(io.ComfyNode):
    """Takes the place of *Load Diffusion Model*."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return describe_loader("TestLoadFlux", io.Model.Output())

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Create the model."""
        with torch.inference_mode(False):
            return io.NodeOutput(load_support("comfyui").flux_patcher(create_transformer()))


class LoadChroma(io.ComfyNode):
    """Takes the place of *Load Diffusion Model*."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return describe_loader("TestLoadChroma", io.Model.Output())

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Create the model."""
        with torch.inference_mode(False):
            return io.NodeOutput(load_support("comfyui").chroma_patcher(create_transformer()))


class LoadTextEncoder(io.ComfyNode):
    """Takes the place of *DualCLIPLoader*."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return describe_loader("TestLoadTextEncoder", io.Clip.Output())

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Create the text encoder."""
        return io.NodeOutput(TextEncoder())


class LoadAutoencoder(io.ComfyNode):
    """Takes the place of *Load VAE*."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return describe_loader("TestLoadAutoencoder", io.Vae.Output())

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Create a random TAESD for the 16 channels of FLUX."""
        import comfy.sd
        from comfy.taesd.taesd import TAESD

        with torch.inference_mode(False):
            autoencoder = TAESD(latent_channels=16)
            load_support("comfyui").initialize(autoencoder)
            return io.NodeOutput(comfy.sd.VAE(sd=autoencoder.state_dict()))


class LoadFluxPulid(io.ComfyNode):
    """Takes the place of *Load PuLID*: a random adapter that reads the miniature's identities."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        adapter = io.Custom("OPENPULID_ADAPTER")
        return describe_loader("TestLoadFluxAdapter", adapter.Output())

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Create the adapter, and wrap it as *Load PuLID* does."""
        from nodes import NODE_CLASS_MAPPINGS

        from openpulid.methods.pulid import PuLID, PuLIDFlux
        from openpulid.methods.pulid.encoders import IDFormer
        from openpulid.pipelines.presets import mini

        pack = NODE_CLASS_MAPPINGS["OpenPulidLoad"].__module__.rpartition(".")[0]
        adapters = sys.modules[f"{pack}.adapters"]
        with torch.inference_mode(False):
            config = PuLID.load(str(mini().models.adapter)).encoder.config
            transformer = create_transformer()
            sizes = {**load_support("tiny_flux").SMALL, "output_dim": 16, "hidden_dim": 16}
            sizes.update(width=config["width"], vit_dim=config["vit_dim"])
            encoder = IDFormer(**sizes)
            adapter = PuLIDFlux.for_transformer(transformer, encoder, dim_head=8, heads=2).eval()
            for layer in adapter.layers:
                torch.nn.init.normal_(layer.to_out.weight, std=0.5)
            loaded = adapters.LoadedAdapter(adapters.wrap_adapter(adapter), "tiny")
        return io.NodeOutput(loaded)
