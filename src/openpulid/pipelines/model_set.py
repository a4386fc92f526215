"""The models of a preset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from openpulid.io.checkpoint_kinds import (
    CHROMA,
    FLUX,
    FLUX2,
    QWEN_IMAGE,
    SDXL,
    Z_IMAGE,
    CheckpointKind,
)
from openpulid.methods.registry import TUNED_METHODS
from openpulid.pipelines.request_fields import RequestError

WeightSource = Path | str
"""A path, or a name of `io.hub.WEIGHTS`, which is looked up when the preset is loaded."""

ExtractorKind = Literal["mini", "mini-latents", "mini-embedding", "photo", "clip", "e4e"]

Family = Literal["sdxl", "flux", "chroma", "flux2", "z-image", "qwen-image"]
"""Architecture of a base model. Chroma is FLUX.1 pruned: the same blocks, adapter and autoencoder,
without CLIP and without distilled guidance. FLUX.2 is FLUX.2 klein, for which no adapter is
published. Z-Image and Qwen-Image are for training."""


@dataclass(frozen=True)
class FamilyFacts:
    """How the base models of a family are named and stored.

    Attributes:
        name: how messages call the architecture.
        pipeline_class: diffusers' class of the pipeline.
        class_pattern: matches the beginning of the class names of all its pipelines.
        network_class: diffusers' class of the U-Net or transformer.
        file_kind: what a single file is: a whole base model for SDXL, a transformer for others.
        text_parts: text encoders and tokenizers of a pipeline.
        text_encoders: how messages call the text encoders.
        advice: what to do with such a pipeline if a preset is for another family.
    """

    name: str
    pipeline_class: str
    class_pattern: str
    network_class: str
    file_kind: CheckpointKind
    text_parts: tuple[str, ...]
    text_encoders: str
    advice: str


FAMILIES: dict[Family, FamilyFacts] = {
    "sdxl": FamilyFacts(
        name="SDXL",
        pipeline_class="StableDiffusionXLPipeline",
        class_pattern="StableDiffusionXL",
        network_class="UNet2DConditionModel",
        file_kind=SDXL,
        text_parts=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        text_encoders="both encoders of CLIP",
        advice="use --preset sdxl",
    ),
    "flux": FamilyFacts(
        name="FLUX.1",
        pipeline_class="FluxPipeline",
        class_pattern="Flux(?!2)",
        network_class="FluxTransformer2DModel",
        file_kind=FLUX,
        text_parts=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        text_encoders="CLIP and T5",
        advice="use --preset flux",
    ),
    "chroma": FamilyFacts(
        name="Chroma",
        pipeline_class="ChromaPipeline",
        class_pattern="Chroma",
        network_class="ChromaTransformer2DModel",
        file_kind=CHROMA,
        text_parts=("text_encoder", "tokenizer"),
        text_encoders="T5",
        advice="use --preset chroma",
    ),
    "flux2": FamilyFacts(
        name="FLUX.2",
        pipeline_class="Flux2KleinPipeline",
        class_pattern="Flux2Klein",
        network_class="Flux2Transformer2DModel",
        file_kind=FLUX2,
        text_parts=("text_encoder", "tokenizer"),
        text_encoders="Qwen3",
        advice="use --preset flux2-klein",
    ),
    "z-image": FamilyFacts(
        name="Z-Image",
        pipeline_class="ZImagePipeline",
        class_pattern="ZImage",
        network_class="ZImageTransformer2DModel",
        file_kind=Z_IMAGE,
        text_parts=("text_encoder", "tokenizer"),
        text_encoders="Qwen3",
        advice="no adapter for it is published: train one with `pulid train z_image_stage1`",
    ),
    "qwen-image": FamilyFacts(
        name="Qwen-Image",
        pipeline_class="QwenImagePipeline",
        class_pattern="QwenImage",
        network_class="QwenImageTransformer2DModel",
        file_kind=QWEN_IMAGE,
        text_parts=("text_encoder", "tokenizer"),
        text_encoders="Qwen2.5-VL",
        advice="no adapter for it is published: train one with `pulid train qwen_image_stage1`",
    ),
}
"""What loaders and messages need to know of each family."""

MINI_ADAPTERS = {
    "elite": "elite.safetensors",
    "face0": "face0.safetensors",
    "faceid": "faceid.safetensors",
    "fastcomposer": "fastcomposer.safetensors",
    "instantid": "instantid",
    "photomaker": "photomaker.safetensors",
    "photoverse": "photoverse.safetensors",
    "w-plus": "w-plus.safetensors",
}
"""Adapters of the miniature's baselines, in the directory of its weights."""

MINI_FLUX_ADAPTERS = {"infiniteyou": "flux/infiniteyou"}
"""Those of the miniature with FLUX's architecture."""

MINI_LATENT_ENCODER = "face-latents.safetensors"
"""Encoder of the miniature's W+ Adapter, in the directory of its weights."""

DEFAULT_STYLES: dict[Family, str] = {"sdxl": "ip-adapter", "flux": "ip-adapter-flux"}
"""The published IP-Adapter of a style image, where a request names none."""

COMPANION_WEIGHTS = {
    "instantid": ("identitynet", "identitynet-config"),
    "infiniteyou": ("infusenet",),
    "infiniteyou-sim": ("infusenet-sim",),
}
"""Published weights that a method needs in addition to its adapter."""

NETWORK_FOLDERS = {
    "instantid": "ControlNetModel",
    "infiniteyou": "InfuseNetModel",
    "infiniteyou-sim": "InfuseNetModel",
}
"""Folder of the network that a method opens next to its adapter."""

PROMPT_METHODS = ("elite", "fastcomposer", "photomaker", "photomaker-v2", "photoverse")
"""Methods that change words of the prompt, which "img" can mark, from the step after `start`."""

MASKED_METHODS = ("pulid", "infiniteyou", "infiniteyou-sim")
"""Methods that restrict a person to a part of the image, and show several people."""

WORD_METHODS = ("fastcomposer",)
"""Methods that show several people by the words for them in the prompt, without masks."""


class StyleFiles(NamedTuple):
    """An IP-Adapter for a style image, and the folder of its vision encoder."""

    adapter: Path
    vision_encoder: Path


@dataclass(frozen=True)
class ModelSet:
    """Models that belong together.

    Attributes:
        family: architecture of the base model.
        pipeline: directory, single file, OWNER/NAME or published name of a diffusers pipeline.
        adapter: file of the method; None if nobody has published one, and the user passes none.
        recipe: of `pulid train`, for an adapter that nobody has published; None for others.
        extractor: which identity extractor the method needs.
        detector: face detector.
        recognition: face recognition model; None if the method uses none.
        vision_encoder: vision encoder; None if the method uses none or brings its own.
        face_parsing: face parsing model of the "photo" extractor.
        clip_input: what the "clip" extractor passes to its vision encoder: the whole image or the
            aligned face; None without a vision encoder.
        adapter_has_vision_encoder: the vision encoder is part of the adapter's file.
        method: name of the method, see `methods.registry.METHODS`.
        unet, transformer: network that replaces the pipeline's.
        vae: autoencoder of a pipeline with a transformer whose folder has none.
        few_step_lora: LoRA with which a transformer needs few steps; merged with its weights.
        sampler: sampler on Karras sigmas ("dpmpp_2m", "dpmpp_sde"), diffusers' multistep solver
            ("dpm"), or None for the pipeline's own.
        scheduler: settings that differ from those of the pipeline's scheduler.
        use_half_precision: run the networks in reduced precision.
        is_miniature: the models know only the miniature's synthetic people.
        size_multiple: width and height must be multiples of this number of pixels.
        native_side: side of a square image with as many pixels as those of the training.
        min_side, max_side: limits of width and height in pixels.
        min_area: smallest share of the native number of pixels that gives good images, and its
            inverse the largest.
        face_share: longer side of a face over the side of the crop in which it is refined; that of
            the portraits in the training.
        memory: memory level, see `memory_levels.LEVELS`.
        guidance_embeds: FLUX: whether the preset is for transformers with a guidance embedding,
            such as dev, or without, such as schnell; None for both.
        is_distilled: FLUX.2: whether the preset is for pipelines that were distilled to a few steps
            without guidance; None for both.
        build_command: command that trains the models; None if they are shipped or published.
    """

    family: Family
    pipeline: WeightSource
    adapter: WeightSource | None
    extractor: ExtractorKind
    detector: WeightSource
    recognition: WeightSource | None = None
    vision_encoder: WeightSource | None = None
    face_parsing: WeightSource | None = None
    clip_input: Literal["image", "face"] | None = None
    adapter_has_vision_encoder: bool = False
    method: str = "pulid"
    unet: WeightSource | None = None
    transformer: WeightSource | None = None
    vae: WeightSource | None = None
    few_step_lora: WeightSource | None = None
    sampler: Literal["dpm", "dpmpp_2m", "dpmpp_sde"] | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    use_half_precision: bool = False
    is_miniature: bool = False
    size_multiple: int = 8
    native_side: int = 1024
    min_side: int = 16
    max_side: int = 2048
    min_area: float = 0.4
    face_share: float = 0.5
    memory: str = "full"
    guidance_embeds: bool | None = None
    is_distilled: bool | None = None
    recipe: str | None = None
    build_command: str | None = None

    @property
    def base_name(self) -> str:
        """How messages call the architecture of the base model."""
        if self.is_miniature:
            return "the miniature"
        return FAMILIES[self.family].name

    def require_adapter(self) -> WeightSource:
        """Return the source of the adapter.

        Raises:
            RequestError: nobody has published an adapter for the base, and the user passes none.
        """
        if self.adapter is None:
            raise RequestError(
                f"nobody has published a PuLID for {self.base_name}; train one with "
                f"`pulid train {self.recipe}`, and pass its file with {{0}}.",
                "model.adapter",
            )
        return self.adapter

    @property
    def edits_images(self) -> bool:
        """Whether images can start from another one, and small faces can be refined.

        diffusers has no image-to-image pipeline for FLUX.2, and its inpainting pipeline shows the
        transformer the whole initial image as a reference.
        """
        return self.family != "flux2"

    @property
    def style_files(self) -> StyleFiles | None:
        """The miniature's own IP-Adapter, which need not exist; None for other models."""
        if not self.is_miniature or self.has_transformer:
            return None
        weights = Path(self.detector).parent
        return StyleFiles(weights / "style.safetensors", weights / "clip")

    @property
    def default_style(self) -> str | None:
        """The published IP-Adapter of a style image by default; None for the miniature's own."""
        return None if self.is_miniature else DEFAULT_STYLES.get(self.family)

    @property
    def supports_masks(self) -> bool:
        """Whether the method restricts a person to a part of the image."""
        return self.method in MASKED_METHODS

    @property
    def shows_people_by_words(self) -> bool:
        """Whether the method shows several people by the words for them in the prompt."""
        return self.method in WORD_METHODS

    @property
    def has_transformer(self) -> bool:
        """Whether the network is a transformer of FLUX's kind, and not SDXL's U-Net."""
        return self.family != "sdxl"

    @property
    def has_own_person(self) -> bool:
        """Whether the person is in the adapter's file, so that nobody has to be identified."""
        return self.method in TUNED_METHODS

    @property
    def is_trained_baseline(self) -> bool:
        """Whether `pulid mini build` trains the adapter as one of the miniature's baselines."""
        return self.is_miniature and self.method in MINI_ADAPTERS | MINI_FLUX_ADAPTERS

    @property
    def baseline_files(self) -> tuple[WeightSource | None, ...]:
        """What `pulid mini build --method` trains for the miniature's baseline."""
        if not self.is_trained_baseline:
            return ()
        has_encoder = self.extractor == "mini-latents"
        return (self.adapter, self.vision_encoder) if has_encoder else (self.adapter,)

    @property
    def sources(self) -> tuple[WeightSource, ...]:
        """All files and published names that are needed to generate with these models."""
        sources = [self.pipeline, self.unet, self.transformer, self.few_step_lora, self.adapter]
        if not self.has_own_person:
            sources += [self.detector, self.recognition, self.face_parsing, self.vision_encoder]
        companions = (
            () if isinstance(self.adapter, Path) else COMPANION_WEIGHTS.get(self.method, ())
        )
        return (*(source for source in sources if source is not None), *companions)
