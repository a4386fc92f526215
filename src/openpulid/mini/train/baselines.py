"""PuLID's rivals on the miniature: trained on the same pictures, with the budget of PuLID's first stage.

All three authors train with L_diff alone. Here it has the weights and times of PuLID's first stage for all of them, so that
what is compared are the methods; PhotoMaker, as its authors do, counts the face alone in half of the steps (arXiv 2312.04461,
section 4.1) and always has somebody.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from openpulid.identity.identity import Identity
from openpulid.methods.ip_adapter.base import IPAdapterBase
from openpulid.methods.ip_adapter.export import published_parts, trained_layers
from openpulid.methods.ip_adapter.faceid import FaceID
from openpulid.methods.ip_adapter.instantid import InstantID
from openpulid.methods.photomaker.adapter import PhotoMaker
from openpulid.methods.photomaker.encoder import PhotoMakerEncoder
from openpulid.mini.train.autoencoder import batches
from openpulid.mini.train.clip import clip_pixels
from openpulid.mini.train.recognition import faces_of
from openpulid.training.pulid.batch import (
    Batch,
    BatchSource,
    drop_identity,
    loss_weight_map,
    swap_identities,
)
from openpulid.training.pulid.branches import diffusion_branch
from openpulid.training.pulid.losses import DiffusionLoss
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.pulid.recipes import Recipe
from openpulid.training.pulid.task import HELD_OUT_BATCHES
from openpulid.training.rng import StepRNG
from openpulid.world.dataset import WorldDataset

TOKENS, RANK = 4, 8
RESAMPLED = 4  # tokens of InstantID's Resampler, a quarter of the published sixteen
HEAD = 64  # width of its head, the only one that diffusers builds
TOWER = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("patch_size", "image_size", "hidden_act"),
)
"""What a CLIP picture tower is told by."""
CLASSES = 64  # of PhotoMaker's first projection; the second has the rest of the text's width


class Baseline:
    """A method under training.

    Attributes:
        method: attached by `BaselineTask`.
        learned: everything that trains.
        half_faces: whether half of the steps count the face alone.
    """

    half_faces = False

    def __init__(self, method: Any, learned: nn.Module) -> None:
        self.method, self.learned = method, learned

    def people(self, batch: Batch) -> list[Identity]:
        """The batch as the method reads people."""
        marks = batch.landmarks
        assert marks is not None
        return [
            Identity(row[None, None], (), landmarks=mark[None, None])
            for row, mark in zip(batch.id_cond, marks, strict=True)
        ]

    def showing(self, batch: Batch, pipe: Any) -> AbstractContextManager[Any]:
        """The method with these people in use."""
        return self.method.use(self.people(batch), scale=1.0, start=0.0, pipe=pipe)

    def save(self, place: Path, pipe: Any) -> Path:
        """Writes the published layout in half precision; the file or folder that it made."""
        raise NotImplementedError


class IPAdapterBaseline(Baseline):
    """FaceID."""

    method: IPAdapterBase

    def save(self, place: Path, pipe: Any) -> Path:
        return published_parts(self.method, pipe, place.with_suffix(".safetensors"))


class InstantIDBaseline(Baseline):
    """InstantID: a folder, with IdentityNet beside the adapter."""

    method: InstantID

    def save(self, place: Path, pipe: Any) -> Path:
        place.mkdir(parents=True, exist_ok=True)
        published_parts(self.method, pipe, place / "ip-adapter.safetensors")
        net = ControlNetModel.from_config(self.method.identity_net.config)
        net.load_state_dict(self.method.identity_net.state_dict())
        net.to(torch.bfloat16).save_pretrained(place / "ControlNetModel")
        return place


class PhotoMakerBaseline(Baseline):
    """PhotoMaker v1: the class token of CLIP's last states is all that it reads of a photo."""

    half_faces = True
    method: PhotoMaker

    def people(self, batch: Batch) -> list[Identity]:
        rows = zip(batch.id_cond, batch.hidden[0], strict=True)
        return [Identity(row[None, None], (state[None], state[None])) for row, state in rows]

    def save(self, place: Path, pipe: Any) -> Path:
        lora: dict[str, Tensor] = {}
        for name, (down, up) in self.method.lora.items():
            lora |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        parts = {"id_encoder": self.method.encoder.state_dict(), "lora_weights": lora}
        flat = {
            f"{part}.{name}": x.detach().half()
            for part, tensors in parts.items()
            for name, x in tensors.items()
        }
        config = self.method.encoder.config
        tower = json.dumps({name: getattr(config, name) for name in (*TOWER, "projection_dim")})
        kept = {name: x.cpu().contiguous() for name, x in flat.items()}
        file = place.with_suffix(".safetensors")
        save_file(kept, file, metadata={"tower": tower})
        return file


def faceid(pipe: Any, face: int) -> Baseline:
    """IP-Adapter-FaceID: a small MLP, keys and values that begin at zero, and a LoRA of all attention."""
    unet, cross = pipe.unet, pipe.unet.config.cross_attention_dim
    projection = (
        linear("proj.0", 2 * face, face)
        | linear("proj.2", TOKENS * cross, 2 * face)
        | norm("norm", cross)
    )
    layers: dict[str, Tensor] = {}
    for place, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for q, module in (
            ("q", attention.to_q),
            ("k", attention.to_k),
            ("v", attention.to_v),
            ("out", attention.to_out[0]),
        ):
            layers[f"{place}.to_{q}_lora.down.weight"] = random(RANK, module.in_features)
            layers[f"{place}.to_{q}_lora.up.weight"] = torch.zeros(module.out_features, RANK)
    method = FaceID({"image_proj": projection, "ip_adapter": layers | keys_and_values(unet)})
    return IPAdapterBaseline(method, trained_layers(method, pipe))


def instantid(pipe: Any, face: int) -> Baseline:
    """InstantID: a Resampler of four layers, and IdentityNet, the U-Net's encoder once more; its middle has no attention, or
    the whole would not fit into eight megabytes."""
    unet, cross = pipe.unet, pipe.unet.config.cross_attention_dim
    names = {"latents": random(1, RESAMPLED, HEAD), **linear("proj_in", HEAD, face)}
    names |= linear("proj_out", cross, HEAD) | norm("norm_out", cross)
    for depth in range(4):
        layer = f"layers.{depth}"
        names |= (
            norm(f"{layer}.0.norm1", HEAD)
            | norm(f"{layer}.0.norm2", HEAD)
            | norm(f"{layer}.1.0", HEAD)
        )
        names |= {
            f"{layer}.0.to_q.weight": random(HEAD, HEAD),
            f"{layer}.0.to_kv.weight": random(2 * HEAD, HEAD),
        }
        names |= {f"{layer}.0.to_out.weight": random(HEAD, HEAD)}
        names |= {
            f"{layer}.1.1.weight": random(4 * HEAD, HEAD),
            f"{layer}.1.3.weight": random(HEAD, 4 * HEAD),
        }
    copied = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16, 32))
    net = ControlNetModel.from_config({**copied.config, "mid_block_type": "UNetMidBlock2D"})
    net.load_state_dict(copied.state_dict(), strict=False)
    method = InstantID({"image_proj": names, "ip_adapter": keys_and_values(unet)}, net)
    net.requires_grad_(True)
    learned = nn.ModuleList([trained_layers(method, pipe), net])
    return InstantIDBaseline(method, learned)


def photomaker(pipe: Any, tower: CLIPVisionModelWithProjection) -> Baseline:
    """PhotoMaker v1 on the miniature's CLIP, whose tower stays as it is."""
    width = pipe.unet.config.cross_attention_dim
    known = {name: getattr(tower.config, name) for name in TOWER}
    config = CLIPVisionConfig(**known, projection_dim=CLASSES)
    encoder = PhotoMakerEncoder(config, width)
    encoder.vision_model.load_state_dict(tower.vision_model.state_dict())
    encoder.requires_grad_(True).vision_model.requires_grad_(False)
    lora: dict[str, Tensor] = {}
    for name in pipe.unet.attn_processors:
        place = name.removesuffix(".processor")
        attention = pipe.unet.get_submodule(place)
        for q in ("to_q", "to_k", "to_v", "to_out.0"):
            module = attention.get_submodule(q)
            lora[f"unet.{place}.{q}.lora_A.weight"] = random(RANK, module.in_features)
            lora[f"unet.{place}.{q}.lora_B.weight"] = torch.zeros(module.out_features, RANK)
    method = PhotoMaker(encoder, lora)
    method.lora = {
        name: (nn.Parameter(down), nn.Parameter(up)) for name, (down, up) in method.lora.items()
    }
    pairs = nn.ParameterList([x for pair in method.lora.values() for x in pair])
    trained = nn.ModuleList(
        [encoder.visual_projection, encoder.visual_projection_2, encoder.fuse_module, pairs]
    )
    return PhotoMakerBaseline(method, trained)


class BaselineTask:
    """Trains what a rival learns by L_diff; a `training.loop.Task`.

    Args:
        recipe: PuLID's first stage: batch, times, weight of the face, share of pictures without their person.
        base: of a pipeline that is never run, so that nothing of it is guided.
        picture: makes the contact sheet.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: SDXLModel,
        rival: Baseline,
        data: BatchSource,
        held_out: BatchSource | None = None,
        picture: Callable[[], Image.Image] | None = None,
    ) -> None:
        self.recipe, self.base, self.rival = recipe, base, rival
        self.data, self.held_out, self.picture = data, held_out, picture
        self.everywhere, self.inside = (
            DiffusionLoss(base.schedule, recipe.min_snr_gamma, w)
            for w in (recipe.face_loss_weight, 1e3)
        )
        rival.method.attach(base.pipe)

    def modules(self) -> Mapping[str, nn.Module]:
        return {"rival": self.rival.learned}

    def losses(self, draw: StepRNG) -> Mapping[str, Tensor]:
        batch = self.data.batch(draw).to(self.base.device)
        dropped = draw.rand(batch.latents.shape[:1], "drop") < self.recipe.drop_identity
        loss = self.everywhere
        if self.rival.half_faces:  # a person melted into a word cannot be left out of it
            dropped = torch.zeros_like(dropped)
            loss = self.inside if torch.rand((), generator=draw.generator("inside")) < 0.5 else loss
        return {
            "diffusion": self._loss(
                draw, batch, drop_identity(batch, dropped), self.recipe.timestep_bias, loss
            )
        }

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """As PuLID's: L_diff on held-out people with their own identity, another's, none; PhotoMaker never learned what none
        is. The landmarks that InstantID is told are the picture's own every time."""
        if self.held_out is None:
            return {}
        sums = dict.fromkeys(("own", "other", *(() if self.rival.half_faces else ("none",))), 0.0)
        for step in range(HELD_OUT_BATCHES):
            batch = self.held_out.batch(StepRNG(self.recipe.seed, step)).to(self.base.device)
            nobody = drop_identity(batch, torch.ones(len(batch.latents), dtype=torch.bool))
            people = {"own": batch, "other": swap_identities(batch), "none": nobody}
            for name in sums:
                draw = StepRNG(self.recipe.seed, step)
                sums[name] += (
                    self._loss(draw, batch, people[name], 0.0, self.everywhere).item()
                    / HELD_OUT_BATCHES
                )
        return {f"held_out_{name}": value for name, value in sums.items()}

    def sheet(self) -> Image.Image | None:
        return self.picture() if self.picture else None

    def _loss(
        self, draw: StepRNG, batch: Batch, people: Batch, late: float, loss: DiffusionLoss
    ) -> Tensor:
        with self.rival.showing(people, self.base.pipe):
            text = self.base.encode_text(batch.prompts)  # in here: PhotoMaker listens
            step = diffusion_branch(self.base, draw, batch.latents, text, late)
        return loss(step, loss_weight_map(batch, self.recipe.landmark_loss_weight))


class ClassTokens:
    """What PhotoMaker reads of pictures: the tower's last class token; rows as `FaceFeatures` gives them."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    @classmethod
    @torch.no_grad()
    def of(cls, tower: CLIPVisionModelWithProjection, data: WorldDataset) -> ClassTokens:
        seen = []
        for rows in batches(len(data), len(data)):
            pixels = clip_pixels(faces_of(data, rows, tower.device)[0])
            seen.append(
                tower(pixel_values=pixels, output_hidden_states=True)
                .hidden_states[-1][:, 0]
                .half()
                .cpu()
            )
        return cls(torch.cat(seen))

    def rows(
        self, rows: np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, list[Tensor]]:
        """Nothing (B, 1), and (B, 1, S)."""
        tokens = self.tokens[torch.from_numpy(rows)].float().to(device)
        return tokens[:, :1] * 0 + 1, [tokens[:, None]]


def random(*shape: int) -> Tensor:
    return torch.randn(shape) / shape[-1] ** 0.5


def linear(name: str, out: int, into: int) -> dict[str, Tensor]:
    return {f"{name}.weight": random(out, into), f"{name}.bias": torch.zeros(out)}


def norm(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


def keys_and_values(unet: Any) -> dict[str, Tensor]:
    """Of every cross-attention; values from zero, so that nothing is disturbed at first."""
    found: dict[str, Tensor] = {}
    for place, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            attention = unet.get_submodule(name.removesuffix(".processor"))
            found[f"{place}.to_k_ip.weight"] = random(
                attention.to_k.out_features, attention.to_k.in_features
            )
            found[f"{place}.to_v_ip.weight"] = torch.zeros(
                attention.to_v.out_features, attention.to_v.in_features
            )
    return found


BASELINES: Mapping[str, Callable[..., Baseline]] = {
    "faceid": faceid,
    "instantid": instantid,
    "photomaker": photomaker,
}
NAMES: Sequence[str] = tuple(BASELINES)
