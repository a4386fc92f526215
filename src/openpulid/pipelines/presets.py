"""Presets: models that belong together, with the options that suit them.

Each preset is a plain function that returns a `Preset`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from openpulid.errors import OptionError, suggest
from openpulid.io.hub import WEIGHTS
from openpulid.pipelines.checks import (
    check_active_steps,
    check_resolved,
    check_supported,
    describe_ineffective,
    reads_weights,
)
from openpulid.pipelines.model_set import ModelSet, WeightSource
from openpulid.pipelines.preset_options import (
    NEGATIVE_PROMPT,
    PULID_CHROMA_OPTIONS,
    PULID_FLUX2_OPTIONS,
    PULID_FLUX_OPTIONS,
    PULID_MINI_FLUX_OPTIONS,
    PULID_SDXL_OPTIONS,
)
from openpulid.pipelines.request import (
    GenerationOptions,
    GenerationRequest,
    IdentityOptions,
    ModelSelection,
)
from openpulid.pipelines.request_fields import RequestError

MINIATURE = Path(__file__).parents[1] / "mini" / "weights"

PULID_MODES = {
    "fidelity": IdentityOptions(projection="ortho_v2", num_zero=8),
    "style": IdentityOptions(projection="ortho", num_zero=16),
    "neutral": IdentityOptions(projection="none", num_zero=0),
}
"""PuLID's modes on SDXL, by the names of its published demo."""


@dataclass(frozen=True)
class Preset:
    """A model set, and the options of a generation with it.

    Attributes:
        selection: how the user selects this preset; it is stored in the images' metadata.
        description: one phrase for the list of presets.
        models: the models.
        options: names of the options that have an effect with these models.
        defaults: values of the options that a request leaves out.
        pose: the identity's start and scale with `pose_from_prompt`.
    """

    selection: ModelSelection
    description: str
    models: ModelSet
    options: frozenset[str]
    defaults: GenerationOptions
    pose: IdentityOptions = field(default_factory=IdentityOptions)

    @property
    def name(self) -> str:
        """The name that selects the preset."""
        return self.selection.preset

    @property
    def label(self) -> str:
        """How messages call the preset."""
        method = self.models.method
        return f"preset {self.name!r}" + ("" if method == "pulid" else f" with {method}")

    @property
    def reads_weights(self) -> bool:
        """Whether the prompt can have weights, and more tokens than a text encoder reads."""
        return reads_weights(self.models)

    @property
    def published(self) -> tuple[str, ...]:
        """The names of the published weights that the preset needs."""
        return tuple(
            source
            for source in self.models.sources
            if isinstance(source, str) and source in WEIGHTS
        )

    def with_models(self, **changes: Any) -> Preset:
        """Return the preset with other fields of its `ModelSet`."""
        return replace(self, models=replace(self.models, **changes))

    def with_defaults(self, **options: Any) -> Preset:
        """Return the preset with other defaults.

        Args:
            options: fields of `GenerationOptions` and of `IdentityOptions` alike.
        """
        changes = GenerationOptions.from_options(**options)
        return replace(self, defaults=changes.fill_from(self.defaults))

    def resolve(
        self, request: GenerationRequest, is_person_shown: bool | None = None
    ) -> GenerationRequest:
        """Check a request against what the preset supports, and fill in its defaults.

        Args:
            request: the request.
            is_person_shown: whether an identity is used; by default whether the request has people.

        Raises:
            RequestError: the request is for other models, or has options that these models do
                not support, or values that do not go together.
        """
        if request.model is not None and not _same_models(request.model, self.selection):
            raise RequestError(
                f"the request selects preset {request.model.preset!r} and its models, but "
                f"{self.label} is loaded; load the models of the request, or leave {{0}} out.",
                "model",
            )
        check_supported(request, self.options, self.label)
        resolved = self._fill(request)
        memory = self.models.memory if "memory" in self.options else None
        selection = self.selection.model_copy(update={"memory": memory})
        resolved = resolved.model_copy(update={"model": selection, "resolved": True})
        check_resolved(resolved, self.models, self.label)
        if is_person_shown is None:
            is_person_shown = bool(request.people)
        if is_person_shown or self.models.has_own_person:
            check_active_steps(resolved, self.models)
        return resolved

    def _fill(self, request: GenerationRequest) -> GenerationRequest:
        changes: dict[str, Any] = {"identity": request.identity.fill_pose(self.pose)}
        if request.style_image is not None and request.style_image.model is None:
            style = request.style_image.model_copy(update={"model": self.models.default_style})
            changes["style_image"] = style
        return request.model_copy(update=changes).fill_from(self.defaults)

    def describe_ineffective(self, request: GenerationRequest, is_person_shown: bool) -> list[str]:
        """Return a note on each option that the user set and that has no effect on the image.

        Args:
            request: the request before `resolve`.
            is_person_shown: whether an identity is used.
        """
        if request.resolved:  # nobody set its options
            return []
        resolved = self._fill(request)
        is_shown = is_person_shown or self.models.has_own_person
        return describe_ineffective(request, resolved, self.models, is_shown)


def _same_models(one: ModelSelection, other: ModelSelection) -> bool:
    """Whether two selections are the same but for where the models are kept."""
    return _normalize(one) == _normalize(other)


def _normalize(selection: ModelSelection) -> ModelSelection:
    """Return a selection without a memory level, with one spelling of each path."""
    adapter = None if selection.adapter is None else str(Path(selection.adapter))
    preset = str(Path(selection.preset))
    return selection.model_copy(update={"memory": None, "adapter": adapter, "preset": preset})


def mini(directory: Path = MINIATURE) -> Preset:
    """Return the miniature: 96 pixels, synthetic people, trained by `pulid mini build`."""
    models = ModelSet(
        family="sdxl",
        pipeline=directory / "pipeline",
        adapter=directory / "pulid-stage3.safetensors",
        extractor="mini",
        detector=directory / "detector.safetensors",
        recognition=directory / "recognition-encoder.safetensors",
        vision_encoder=directory / "vision-encoder.safetensors",
        is_miniature=True,
        native_side=96,
        max_side=160,
        min_area=0.65,
        face_share=0.66,
    )
    defaults = GenerationOptions(
        num_inference_steps=20,
        guidance_scale=3.0,
        identity=IdentityOptions(
            scale=0.85,  # changes less of the image than 1, the scale of the training
            start=0.0,
            end=1.0,
            projection="none",  # as in training
            num_zero=0,
        ),
    )
    return Preset(
        ModelSelection(preset="mini"),
        "The miniature with synthetic people",
        models,
        PULID_SDXL_OPTIONS,
        defaults,
        pose=IdentityOptions(start=0.2, scale=0.85),
    )


def mini_lightning(directory: Path = MINIATURE) -> Preset:
    """Return the miniature with its few-step student: four steps without guidance."""
    preset = mini(directory).with_models(
        unet=directory / "lightning",
        # single first-order steps, as in the student's training
        scheduler={"timestep_spacing": "trailing", "solver_order": 1},
    )
    preset = preset.with_defaults(num_inference_steps=4, guidance_scale=1.0, scale=1.0)
    preset = replace(preset, pose=IdentityOptions(start=0.2, scale=1.0))  # from the second step
    return _rename(preset, "mini-lightning", "The miniature in four steps")


def mini_flux(directory: Path = MINIATURE) -> Preset:
    """Return the miniature with FLUX's architecture: 20 steps, guidance 3 by the empty prompt."""
    preset = mini(directory).with_models(
        family="flux",
        pipeline=directory / "flux" / "pipeline",
        vae=directory / "pipeline" / "vae",
        adapter=directory / "flux" / "pulid-stage3.safetensors",
        guidance_embeds=False,
        size_multiple=16,  # the pipeline packs two by two latents of 8 pixels
        build_command="pulid mini build flux-stage1 flux-stage2 flux-stage3",
    )
    defaults = GenerationOptions(
        num_inference_steps=20,
        width=96,
        height=96,
        negative_prompt="",
        true_cfg_scale=3.0,
        timestep_to_start_cfg=0,
        max_sequence_length=32,
        # guidance amplifies an identity that was trained without it
        identity=IdentityOptions(scale=0.8, start=0.0, end=1.0),
    )
    pose = IdentityOptions(start=0.2, scale=0.8)
    preset = replace(preset, options=PULID_MINI_FLUX_OPTIONS, defaults=defaults, pose=pose)
    return _rename(preset, "mini-flux", "The miniature with FLUX's architecture")


def mini_flux_4step(directory: Path = MINIATURE) -> Preset:
    """Return FLUX's miniature with its few-step LoRA: four steps without guidance."""
    lora = directory / "flux" / "lightning-lora.safetensors"
    preset = mini_flux(directory).with_models(few_step_lora=lora)
    preset = preset.with_defaults(num_inference_steps=4, true_cfg_scale=1.0, scale=1.0)
    preset = replace(preset, pose=IdentityOptions(start=0.2, scale=1.0))
    return _rename(preset, "mini-flux-4step", "FLUX's miniature in four steps")


def sdxl(base: WeightSource = "juggernaut") -> Preset:
    """Return PuLID v1.1 on an SDXL checkpoint: 25 steps, guidance 7."""
    models = ModelSet(
        family="sdxl",
        pipeline=base,
        adapter="pulid-v1.1",
        extractor="photo",
        detector="detector",
        recognition="arcface",
        vision_encoder="eva",
        face_parsing="parsing",
        sampler="dpmpp_2m",
        use_half_precision=True,
    )
    defaults = GenerationOptions(
        num_inference_steps=25,
        guidance_scale=7.0,
        negative_prompt=NEGATIVE_PROMPT,
        width=1024,
        height=1024,
        identity=IdentityOptions(scale=0.8, start=0.0, end=1.0, projection="ortho_v2", num_zero=20),
    )
    return Preset(
        ModelSelection(preset="sdxl"),
        "PuLID v1.1 on SDXL (Juggernaut XL)",
        models,
        PULID_SDXL_OPTIONS | {"memory"},
        defaults,
        # the first step of a few-step model, the first five of 25
        pose=IdentityOptions(start=0.2, scale=0.6),
    )


def sdxl_lightning(base: WeightSource = "dreamshaper") -> Preset:
    """Return PuLID v1.1 on a few-step SDXL checkpoint: 5 steps, guidance 2."""
    preset = sdxl(base).with_models(sampler="dpmpp_sde")
    preset = preset.with_defaults(num_inference_steps=5, guidance_scale=2.0)
    return _rename(preset, "sdxl-lightning", "PuLID v1.1 on DreamShaper XL Lightning")


def sdxl_v1(base: WeightSource = "sdxl-base", mode: str = "fidelity") -> Preset:
    """Return PuLID v1 on SDXL-Lightning's U-Net: 4 steps, guidance 1.2.

    Args:
        base: an SDXL pipeline.
        mode: one of `PULID_MODES`; "style" follows the prompt more and the person less.
    """
    preset = sdxl(base).with_models(
        adapter="pulid-v1",
        unet="lightning-4step",
        sampler="dpm",
        # the published demo's last step ends at the smallest noise level of training, not at zero
        scheduler={"timestep_spacing": "trailing", "final_sigmas_type": "sigma_min"},
    )
    preset = preset.with_defaults(
        num_inference_steps=4,
        guidance_scale=1.2,
        **PULID_MODES[mode].model_dump(exclude_none=True),
    )
    return _rename(preset, "sdxl-v1", "PuLID v1 on SDXL-Lightning")


def flux(base: WeightSource = "flux-dev") -> Preset:
    """Return PuLID for FLUX v0.9.1 on FLUX.1-dev: 28 steps, guidance 4.

    The identity acts from step 0. A `start_step` of 4, as with `pose_from_prompt`, leaves photos
    more freedom of composition.
    """
    models = ModelSet(
        family="flux",
        pipeline=base,
        adapter="pulid-flux-v0.9.1",
        extractor="photo",
        detector="detector",
        recognition="arcface",
        vision_encoder="eva",
        face_parsing="parsing",
        use_half_precision=True,
        size_multiple=16,
        min_area=0.2,
        guidance_embeds=True,
    )
    defaults = GenerationOptions(
        num_inference_steps=28,
        guidance_scale=4.0,
        width=896,
        height=1152,
        true_cfg_scale=1.0,
        timestep_to_start_cfg=1,
        max_sequence_length=128,
        identity=IdentityOptions(scale=1.0, start=0.0, end=1.0),
    )
    return Preset(
        ModelSelection(preset="flux"),
        "PuLID on FLUX.1-dev",
        models,
        PULID_FLUX_OPTIONS,
        defaults,
        pose=IdentityOptions(start=0.14, scale=0.8),  # from step 4 of 28
    )


def flux_krea(base: WeightSource = "flux-krea-base") -> Preset:
    """Return PuLID for FLUX on FLUX.1-Krea-dev: 28 steps, guidance 4.5."""
    preset = flux(base).with_defaults(guidance_scale=4.5)
    return _rename(preset, "flux-krea", "PuLID on FLUX.1-Krea-dev")


def flux_schnell(base: WeightSource = "flux-schnell-base") -> Preset:
    """Return PuLID for FLUX on FLUX.1-schnell: 4 steps; it was distilled without guidance."""
    preset = flux(base).with_models(guidance_embeds=False)
    preset = preset.with_defaults(num_inference_steps=4, max_sequence_length=256)
    defaults = preset.defaults.model_copy(update={"guidance_scale": None})
    options = preset.options - {"guidance_scale"}
    preset = replace(preset, options=options, defaults=defaults)
    return _rename(preset, "flux-schnell", "PuLID on FLUX.1-schnell")


def chroma(base: WeightSource = "chroma-base") -> Preset:
    """Return PuLID for FLUX v0.9.1 on Chroma: 35 steps, guidance 5.

    Steps and guidance are the defaults of diffusers' pipeline. Guidance is classifier-free, with
    two calls per step; the identity is left out of that of the negative prompt.
    """
    preset = flux(base).with_models(family="chroma", guidance_embeds=None)
    defaults = GenerationOptions(
        num_inference_steps=35,
        guidance_scale=5.0,
        width=1024,
        height=1024,
        max_sequence_length=512,
        identity=preset.defaults.identity,
    )
    preset = replace(preset, options=PULID_CHROMA_OPTIONS, defaults=defaults)
    return _rename(preset, "chroma", "PuLID on Chroma1-HD")


def flux2_klein(base: WeightSource = "flux2-klein-distilled") -> Preset:
    """Return FLUX.2 klein 4B, distilled to 4 steps without guidance, for an adapter of one's own.

    Nobody has published a PuLID for FLUX.2. The prompt has as many tokens as in the pipeline and in
    the recipe's training: the transformer attends to its padding too.
    """
    preset = flux(base).with_models(
        family="flux2",
        adapter=None,
        recipe="flux2_klein_stage1",
        guidance_embeds=None,
        is_distilled=True,
    )
    defaults = GenerationOptions(
        num_inference_steps=4,
        width=1024,
        height=1024,
        max_sequence_length=512,
        identity=preset.defaults.identity,
    )
    preset = replace(preset, options=PULID_FLUX2_OPTIONS, defaults=defaults)
    return _rename(preset, "flux2-klein", "PuLID on FLUX.2 klein 4B, with your own adapter")


def _rename(preset: Preset, name: str, description: str) -> Preset:
    return replace(preset, selection=ModelSelection(preset=name), description=description)


PRESETS: dict[str, Callable[[], Preset]] = {
    "mini": mini,
    "mini-lightning": mini_lightning,
    "mini-flux": mini_flux,
    "mini-flux-4step": mini_flux_4step,
    "sdxl": sdxl,
    "sdxl-lightning": sdxl_lightning,
    "sdxl-v1": sdxl_v1,
    "flux": flux,
    "flux-krea": flux_krea,
    "flux-schnell": flux_schnell,
    "chroma": chroma,
    "flux2-klein": flux2_klein,
}


def find_preset(name: str) -> Preset:
    """Return a preset by its name, or for a directory laid out like the miniature's weights.

    Raises:
        OptionError: there is neither.
    """
    if name in PRESETS:
        return PRESETS[name]()
    directory = Path(name)
    if (directory / "pipeline" / "model_index.json").is_file():
        is_flux = (directory / "pipeline" / "transformer").is_dir()
        preset = mini(directory)
        if is_flux:  # the other models are shared with the folder that it is in
            adapter = directory / "pulid-stage3.safetensors"
            preset = mini_flux(directory.parent).with_models(
                pipeline=directory / "pipeline", adapter=adapter
            )
        return _rename(preset, name, "A trained miniature")
    raise OptionError(
        f"there is no preset {name!r}{suggest(name, PRESETS)}; choose one of "
        f"{', '.join(PRESETS)}, or a directory with a trained miniature."
    )


def find_mode(preset: Preset, name: str) -> IdentityOptions:
    """Return the options of one of PuLID's modes.

    Raises:
        RequestError: the preset has no such modes.
    """
    if preset.models.family != "sdxl":
        raise RequestError(
            f"the mode {name} is only available for SDXL presets; with {preset.name} use "
            "{0} (4, or 0 to 1 for styles).",
            "identity.start_step",
        )
    return PULID_MODES[name]
