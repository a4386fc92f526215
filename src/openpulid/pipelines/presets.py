"""Which weights go together, and the figures they work best with: plain functions that return a `Preset`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from openpulid.errors import OptionError
from openpulid.io.hub import WEIGHTS
from openpulid.methods.pulid.projection import Projection

MINIATURE = Path(__file__).parents[1] / "mini" / "weights"


Place = Path | str
"""A path, or a name of `published.WEIGHTS`, which is looked for when the preset is loaded."""

NEGATIVE = (
    "flaws in the eyes, flaws in the face, flaws, lowres, non-HDRi, low quality, worst quality, artifacts noise, text, "
    "watermark, glitch, deformed, mutated, ugly, disfigured, hands, low resolution, partially rendered objects, "
    "deformed or partially rendered eyes, deformed, deformed eyeballs, cross-eyed, blurry"
)
"""What the published demo of SDXL does not want to see."""


@dataclass(frozen=True)
class Preset:
    """A base model, what finds and reads faces for it, the adapter, and the defaults of a generation.

    Attributes:
        pipeline: folder, single file, hub name or published name of a StableDiffusionXLPipeline.
        finder, recogniser, vision: what reads faces; with a `parser` they are those of photographs.
        unet, transformer: a U-Net, in FLUX a transformer, that replaces the pipeline's.
        sampler: "dpmpp_2m" or "dpmpp_sde" on Karras sigmas, "dpm" for diffusers' multistep solver, or the pipeline's own.
        scheduler: settings of it that differ from the pipeline's.
        size: width and height in pixels; the base's own where it is None.
        half: networks in bfloat16.
        family: what kind of base it is.
        memory: one of `memory.LEVELS`; FLUX only.
        start_step, true_cfg, timestep_to_start_cfg, text_tokens: FLUX only: the step from which the identity acts (instead
            of `start`), guidance by a negative prompt and the step from which it counts, the longest prompt.
        no_face: what to do when a picture shows no face that it knows.
        method: one of `methods.base.METHODS`; `adapter` is its file.
        view: what a CLIP tower is shown for it, "picture", "face" or "none"; the tower is `vision`, or the method's own
            where that is None. Empty where people are read as PuLID reads them.
    """

    name: str
    pipeline: Place
    finder: Place
    recogniser: Place | None
    vision: Place | None
    adapter: Place
    parser: Place | None = None
    unet: Place | None = None
    transformer: Place | None = None
    sampler: Literal["", "dpm", "dpmpp_2m", "dpmpp_sde"] = ""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 20
    guidance: float = 3.0
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    projection: Projection = "ortho_v2"
    num_zero: int = 0
    negative: str = ""
    size: tuple[int, int] | None = None
    half: bool = False
    no_face: str = ""
    family: Literal["sdxl", "flux"] = "sdxl"
    memory: str = "full"
    start_step: int | None = None
    true_cfg: float = 1.0
    timestep_to_start_cfg: int = 1
    text_tokens: int = 512
    method: str = "pulid"
    view: Literal["", "picture", "face", "none"] = ""

    def identity_options(self) -> dict[str, Any]:
        """What this preset says to the adapter's `use`."""
        shared: dict[str, Any] = {"scale": self.scale, "start": self.start, "end": self.end}
        if self.method != "pulid":
            return shared
        if self.family == "flux":
            return {
                **shared,
                "start_step": self.start_step,
                "timestep_to_start_cfg": self.timestep_to_start_cfg,
            }
        return {**shared, "projection": self.projection, "num_zero": self.num_zero}

    @property
    def published(self) -> tuple[str, ...]:
        """The names of the published weights that it needs."""
        places = (
            self.pipeline,
            self.unet,
            self.adapter,
            self.finder,
            self.recogniser,
            self.parser,
            self.vision,
        )
        named = (
            *places,
            *(COMPANION_WEIGHTS.get(self.method, ()) if isinstance(self.adapter, str) else ()),
        )
        return tuple(place for place in named if isinstance(place, str) and place in WEIGHTS)


def mini(folder: Path = MINIATURE) -> Preset:
    """The miniature: 96 pixels, its own procedural people, trained by `pulid mini build`."""
    return Preset(
        name="mini",
        pipeline=folder / "pipeline",
        finder=folder / "detector.safetensors",
        recogniser=folder / "recognition-encoder.safetensors",
        vision=folder / "vision-encoder.safetensors",
        adapter=folder / "pulid-stage3.safetensors",
        scale=0.7,  # guidance strengthens an identity that was learned without it
        projection="none",  # as it was trained
        no_face="the preset mini knows only its own drawn people (`pulid world person` draws one), "
        "no photographs; those are for a preset of full size.",
    )


def mini_lightning(folder: Path = MINIATURE) -> Preset:
    """The miniature's student: four steps without guidance."""
    single = {
        "timestep_spacing": "trailing",
        "solver_order": 1,
    }  # single first-order steps, as it was taught
    return replace(
        mini(folder),
        name="mini-lightning",
        unet=folder / "lightning",
        scheduler=single,
        steps=4,
        guidance=1.0,
        scale=1.0,
    )


def sdxl(base: Place = "juggernaut") -> Preset:
    """PuLID v1.1 on any SDXL checkpoint (Juggernaut XL, RealVisXL ...): 25 steps, guidance 7."""
    return Preset(
        name="sdxl",
        pipeline=base,
        finder="detector",
        recogniser="arcface",
        vision="eva",
        parser="parsing",
        adapter="pulid-v1.1",
        sampler="dpmpp_2m",
        steps=25,
        guidance=7.0,
        scale=0.8,
        num_zero=20,
        negative=NEGATIVE,
        size=(1024, 1024),
        half=True,
    )


def sdxl_lightning(base: Place = "dreamshaper") -> Preset:
    """PuLID v1.1 on a distilled SDXL checkpoint (DreamShaper XL Lightning): 5 steps, guidance 2."""
    return replace(sdxl(base), name="sdxl-lightning", sampler="dpmpp_sde", steps=5, guidance=2.0)


def sdxl_v1(base: Place = "sdxl-base", style: bool = False) -> Preset:
    """PuLID v1 on SDXL-Lightning's U-Net: 4 steps, guidance 1.2. `style` leaves the prompt more room than the likeness."""
    return replace(
        sdxl(base),
        name="sdxl-v1",
        adapter="pulid-v1",
        unet="lightning-4step",
        sampler="dpm",
        scheduler={"timestep_spacing": "trailing"},
        steps=4,
        guidance=1.2,
        projection="ortho" if style else "ortho_v2",
        num_zero=16 if style else 8,
    )


def flux(base: Place = "flux-dev") -> Preset:
    """PuLID for FLUX v0.9.1 on FLUX.1-dev: 20 steps, guidance 4. The identity acts from step 0; 4 leaves photographs more
    freedom of composition.
    """
    return replace(
        sdxl(base),
        name="flux",
        family="flux",
        adapter="pulid-flux-v0.9.1",
        sampler="",
        steps=20,
        guidance=4.0,
        scale=1.0,
        num_zero=0,
        negative="",
        size=(896, 1152),
        text_tokens=128,
    )


def flux_krea(base: Place = "flux-krea-base") -> Preset:
    """The same on FLUX.1-Krea-dev."""
    return replace(flux(base), name="flux-krea", guidance=4.5, steps=28)


def flux_schnell(base: Place = "flux-schnell-base") -> Preset:
    """The same on FLUX.1-schnell, in four steps; it was distilled without a guidance to choose."""
    return replace(flux(base), name="flux-schnell", guidance=0.0, steps=4, text_tokens=256)


PRESETS: dict[str, Callable[[], Preset]] = {
    "mini": mini,
    "mini-lightning": mini_lightning,
    "sdxl": sdxl,
    "sdxl-lightning": sdxl_lightning,
    "sdxl-v1": sdxl_v1,
    "flux": flux,
    "flux-krea": flux_krea,
    "flux-schnell": flux_schnell,
}


BASELINES: dict[str, dict[str, Any]] = {
    "faceid": {"recogniser": "buffalo-l", "vision": None, "view": "none", "scale": 1.0},
    "faceid-plus": {"recogniser": "buffalo-l", "vision": "clip-h", "view": "face", "scale": 1.0},
    "instantid": {"scale": 0.8},
    "ip-adapter": {"recogniser": None, "vision": "clip-h", "view": "picture", "scale": 0.6},
    "ip-adapter-plus": {"recogniser": None, "vision": "clip-h", "view": "picture", "scale": 0.6},
    "ip-adapter-plus-face": {"recogniser": None, "vision": "clip-h", "view": "face", "scale": 0.6},
    "photomaker": {
        "recogniser": None,
        "vision": None,
        "view": "picture",
        "start": 0.2,
        "scale": 1.0,
    },
    "photomaker-v2": {
        "recogniser": "buffalo-l",
        "vision": None,
        "view": "picture",
        "start": 0.2,
        "scale": 1.0,
    },
}
"""What differs from PuLID on SDXL for each other method, whose published weight has its name; figures are their authors'."""

COMPANION_WEIGHTS = {"instantid": ("identitynet", "identitynet-config")}
"""Published weights that a method's own file needs beside it."""

MINI_BASELINES: dict[str, dict[str, Any]] = {
    "faceid": {"scale": 1.0},
    "instantid": {"scale": 1.0, "adapter": "instantid"},
    "photomaker": {"vision": None, "view": "picture", "start": 0.2, "scale": 1.0},
}
"""The same for the miniature, whose own networks read people for all of them but PhotoMaker."""


def with_method(preset: Preset, method: str, adapter: Place | None = None) -> Preset:
    """The preset with another method on the same base: its file, and what reads people for it.

    Args:
        adapter: another file of the method.

    Raises:
        OptionError: no such method, or a base that it does not serve.
    """
    if method == "pulid":
        return replace(preset, adapter=adapter or preset.adapter)
    if method not in BASELINES:
        raise OptionError(
            f"there is no method {method!r}; the known ones are pulid, {', '.join(BASELINES)}."
        )
    if preset.family != "sdxl":
        raise OptionError(
            f"{method} is for SDXL and {preset.name} is FLUX; choose another preset, or PuLID."
        )
    named = {"name": f"{preset.name}, {method}", "method": method, "adapter": method}
    changes = {**named, "start": 0.0, "end": 1.0, **BASELINES[method]}
    if preset.parser is None and isinstance(
        preset.finder, Path
    ):  # the miniature; its adapter may be somebody's own
        if method not in MINI_BASELINES:
            raise OptionError(
                f"the miniature has no {method}; it has pulid, {', '.join(MINI_BASELINES)}."
            )
        known = ("recogniser", "vision", "view", "scale")
        changes |= {name: getattr(preset, name) for name in known} | MINI_BASELINES[method]
        changes["adapter"] = preset.finder.with_name(
            MINI_BASELINES[method].get("adapter", f"{method}.safetensors")
        )
    return replace(preset, **changes | ({"adapter": adapter} if adapter else {}))


def on_base(preset: Preset, base: Place) -> Preset:
    """The preset on another base: a pipeline, whose own network is taken and not the one that the preset brings; for FLUX a
    single file or a folder of a transformer alone, too, to which the preset's own pipeline gives the rest.
    """
    if preset.family == "flux" and (Path(base).is_file() or (Path(base) / "config.json").is_file()):
        return replace(preset, transformer=base)
    return replace(preset, pipeline=base, unet=None, transformer=None)


def options_of(preset: Preset) -> dict[str, Any]:
    """Those options of `Studio.generate` that act with a preset, and its values of them."""
    names = [
        "steps",
        "negative",
        "size",
        *(("true_cfg", "text_tokens") if preset.family == "flux" else ()),
    ]
    if preset.family != "flux" or preset.guidance:  # schnell reads none
        names.append("guidance")
    return {name: getattr(preset, name) for name in names} | preset.identity_options()


def with_options(preset: Preset, **given: Any) -> Preset:
    """The preset with what is given in place of its own; None is the preset's.

    Raises:
        OptionError: an option that would change nothing with it.
    """
    chosen = {name: value for name, value in given.items() if value is not None}
    if idle := [name for name in chosen if name not in options_of(preset)]:
        raise OptionError(
            f"with {preset.name} nothing would change by {' and '.join(idle)}; leave that out."
        )
    return replace(preset, **chosen)


def find_preset(name: str) -> Preset:
    """A preset by its name, or a folder that is laid out as the miniature's weights are.

    Raises:
        OptionError: neither.
    """
    if name in PRESETS:
        return PRESETS[name]()
    folder = Path(name)
    if (folder / "pipeline" / "model_index.json").is_file():
        return replace(mini(folder), name=str(folder))
    raise OptionError(
        f"{name!r} is neither a preset ({', '.join(PRESETS)}) nor a folder with a pipeline in it; name one of these."
    )
