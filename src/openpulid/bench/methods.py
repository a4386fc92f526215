"""The methods of a run, as named on the command line: `METHOD[:FILE][@SCALE]`."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from openpulid.bench.run_dir import BASE
from openpulid.bench.suite import Suite
from openpulid.bench.tuned import TunedPreset, tuned_preset
from openpulid.errors import OptionError, WeightsError
from openpulid.io.hub import WEIGHTS
from openpulid.methods.registry import TUNED_METHODS, UNPUBLISHED_METHODS
from openpulid.pipelines.factory import check_models, load_adapter, share_extractor
from openpulid.pipelines.loading import load
from openpulid.pipelines.presets import Preset, find_preset
from openpulid.pipelines.selection import with_method
from openpulid.pipelines.studio import Studio
from openpulid.pipelines.weights import missing_weights
from openpulid.training.tuning import TUNING_METHODS

logger = logging.getLogger(__name__)

NUMBER = r"\d*\.?\d+"

Presets = Mapping[str, Preset]
"""Label of each method -> its preset, as `select_presets` returns them."""


@dataclass(frozen=True)
class MethodSpec:
    """A method with its file and scale.

    Attributes:
        method: name of the method.
        file: an adapter file that replaces the preset's, or None.
        scale: an identity scale that replaces the preset's, or None.
    """

    method: str
    file: Path | None = None
    scale: float | None = None

    @classmethod
    def parse(cls, text: str) -> MethodSpec:
        """Parse `METHOD[:FILE][@SCALE]`.

        Raises:
            OptionError: the text has another form.
        """
        match = re.fullmatch(rf"([^:@]+)(?::(.+?))?(?:@({NUMBER}))?", text)
        if match is None:
            raise OptionError(
                f"{text}: expected METHOD, METHOD:FILE, METHOD@SCALE or METHOD:FILE@SCALE, "
                "for example pulid@0.5."
            )
        method, file, scale = match.groups()
        return cls(method, Path(file) if file else None, float(scale) if scale else None)

    @property
    def label(self) -> str:
        """The name of the method's row: the method or the file, and the scale if one is given."""
        name = self.file.stem if self.file else self.method
        return name if self.scale is None else f"{name}@{self.scale:g}"


def parse_scales(text: str) -> list[float]:
    """Parse scales that are separated by commas, each once.

    Raises:
        OptionError: the text has another form.
    """
    scales = [part.strip() for part in text.split(",") if part.strip()]
    if not scales or not all(re.fullmatch(NUMBER, scale) for scale in scales):
        raise OptionError(f"--scales {text}: expected numbers with commas, for example 0.3,0.5,1.")
    return list(dict.fromkeys(map(float, scales)))


def select_presets(
    suite: Suite, names: Sequence[str], scales: Sequence[float] = ()
) -> dict[str, Preset]:
    """Map the label of each method to its preset, the base first.

    Args:
        suite: the suite, whose preset all methods use.
        names: methods in the form `METHOD[:FILE][@SCALE]`.
        scales: each method is selected at these scales as well. A method that has none is not,
            with a log message; neither is a row that would be the same as another one.

    Raises:
        OptionError: a method or file does not exist, a file is of one person, a method has no
            scale, or two methods have the same label.
    """
    presets = {BASE: find_preset(suite.preset)}
    specs = [spec for spec in map(MethodSpec.parse, names) if spec.method != BASE]
    for spec in specs:
        if spec.label in presets:
            raise OptionError(
                f"two methods would both be called {spec.label}; rename one file, or name each "
                "method once."
            )
        preset = _select_preset(presets[BASE], spec)
        presets[spec.label] = preset
        for scale in scales:
            further = replace(spec, scale=scale)
            if "scale" not in preset.options:
                logger.warning("%s has no scale: --scales does not apply to it.", spec.method)
                break
            if further not in specs and preset.defaults.identity.scale != scale:
                presets.setdefault(further.label, preset.with_defaults(scale=scale))
    if "scale" in suite.options and (scales or any(spec.scale is not None for spec in specs)):
        raise OptionError(
            f"suite {suite.name} sets the scale of all methods; remove scale from its options, or "
            "leave out --scales and @SCALE."
        )
    for spec in specs:
        if spec.file is not None and not spec.file.exists():
            raise OptionError(f"{spec.file} does not exist; METHOD:FILE needs an adapter file.")
    return presets


def _select_preset(base: Preset, spec: MethodSpec) -> Preset:
    """Return the preset of a method. Raises as `select_presets`."""
    if spec.file is not None and spec.method in TUNED_METHODS:
        raise OptionError(
            f"{spec.file} shows one person; name {spec.method} without a file, and it is tuned "
            "on each person of the run."
        )
    has_published_weights = (
        spec.method not in UNPUBLISHED_METHODS
        or base.models.is_miniature
        or base.models.family != "sdxl"  # reported as a method of another family
    )
    if spec.method in TUNING_METHODS:
        preset: Preset = tuned_preset(base, spec.method)
    elif spec.file is None and not has_published_weights:
        raise OptionError(
            f"no weights of {spec.method} for SDXL have been published; name a file of your own, "
            f"{spec.method}:FILE, or leave the method out."
        )
    else:
        preset = with_method(base, spec.method, spec.file)
    if spec.scale is None:
        return preset
    if "scale" not in preset.options:
        raise OptionError(f"{spec.method} has no scale; name it without @{spec.scale:g}.")
    return preset.with_defaults(scale=spec.scale)


def check_weights(presets: Mapping[str, Preset]) -> None:
    """Check that the weights of all methods are installed, before anything is loaded or written.

    Raises:
        WeightsError: weights are missing, or of another kind; the message names the fix.
    """
    fixed = [preset for preset in presets.values() if not isinstance(preset, TunedPreset)]
    missing = {name: preset for preset in fixed for name in missing_weights(preset)}
    if downloads := " ".join(name for name in missing if name in WEIGHTS):
        raise WeightsError(
            f"weights of these methods are not installed; download them with `pulid weights get "
            f"{downloads}`, or put them into a folder and set PULID_WEIGHTS to it."
        )
    if missing:
        path, preset = next(iter(missing.items()))
        is_baseline = path in map(str, preset.models.baseline_files)
        option = f" --method {preset.models.method}" if is_baseline else ""
        raise WeightsError(f"{path} does not exist; create it with `pulid mini build{option}`.")
    for preset in fixed:
        check_models(preset)


def load_studios(
    suite: Suite, presets: Mapping[str, Preset], device: str | None
) -> dict[str, Studio]:
    """Load the base model once, and a studio for each method on it.

    Rows of the same weights, which differ in scale, share an adapter and an extractor.

    Args:
        suite: the suite, whose preset names the base model.
        presets: label -> preset, as `select_presets` returns them.
        device: device name, or None for the best one.

    Returns:
        Label -> studio.

    Raises:
        OptionError: an adapter was trained with other face models.
        WeightsError: something is missing or damaged.
    """
    studio = load(suite.preset, device=device)
    studios = {BASE: studio}  # its adapter is not used without an identity
    for label, preset in presets.items():
        if label == BASE:
            continue
        if isinstance(preset, TunedPreset):  # each subject has an adapter of its own
            studios[label] = Studio(studio.pipe, studio.adapter, studio.extractor, preset)
            continue
        loaded = [other for other in studios.values() if other.preset.models == preset.models]
        if loaded:  # with another scale
            studios[label] = Studio(studio.pipe, loaded[0].adapter, loaded[0].extractor, preset)
            continue
        adapter = load_adapter(preset, studio.pipe.device)
        extractor = share_extractor(
            studio.extractor, studio.preset, preset, adapter, studio.pipe.device
        )
        studios[label] = Studio(studio.pipe, adapter, extractor, preset)
    return studios
