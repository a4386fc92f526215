"""What a service offers: its presets, each with its installed methods."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from openpulid.errors import OptionError, suggest
from openpulid.pipelines.factory import check_models, hash_extractor_models
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.request import GenerationRequest, ModelSelection
from openpulid.pipelines.request_fields import RequestError, quote
from openpulid.pipelines.selection import resolve_preset
from openpulid.pipelines.weights import find_installed_methods
from openpulid.service.usable_weights import find_usable_weights


@dataclass(frozen=True)
class Offer:
    """A preset with one method.

    Attributes:
        preset: the preset.
        weights: names of the installed ControlNets and IP-Adapters for its base model.
    """

    preset: Preset
    weights: tuple[str, ...]

    @cached_property
    def identity_models(self) -> dict[str, str]:
        """Name -> hash of the models that must have produced an identity."""
        return hash_extractor_models(self.preset.models)

    def check_names(self, request: GenerationRequest) -> None:
        """Refuse names of weights that are not installed.

        Raises:
            RequestError: a ControlNet or an IP-Adapter is not installed here, or is a path.
        """
        names = {f"controls.{k}.model": part.model for k, part in enumerate(request.controls)}
        if request.style_image is not None and request.style_image.model is not None:
            names["style_image.model"] = request.style_image.model
        for field, name in names.items():
            if name not in self.weights:
                choices = (
                    f"use one of {', '.join(self.weights)}" if self.weights else "leave it out"
                )
                raise RequestError(
                    f"{{0}} {quote(name)} is not installed on this server"
                    f"{suggest(name, self.weights)}; {choices}.",
                    field,
                )


class Catalog:
    """The presets that a service offers.

    Args:
        models: the presets with their changes, the default one first.

    Raises:
        OptionError: there is no such preset, or a change does not apply to it.
        WeightsError: weights are not installed.
    """

    def __init__(self, models: Sequence[ModelSelection]) -> None:
        self._offers: dict[str, dict[str, Offer]] = {}
        for selection in models:
            preset = resolve_preset(selection)
            check_models(preset)
            weights = find_usable_weights(preset)
            offers = {preset.models.method: Offer(preset, weights)}
            for method in find_installed_methods(preset):
                # settings of the server, such as a memory level, do not fit every method
                if method not in offers:
                    with suppress(OptionError):
                        offers[method] = _with_method(selection, method, weights)
            self._offers[preset.name] = offers

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the presets, the default one first."""
        return tuple(self._offers)

    def methods(self, name: str) -> dict[str, Offer]:
        """Return the methods of a preset, the default one first."""
        return self._offers[name]

    def find(self, name: str | None = None, method: str | None = None) -> Offer:
        """Return a preset with a method.

        Args:
            name: of the preset; the default one if None.
            method: of the preset; the default one if None.

        Raises:
            RequestError: it is not offered.
        """
        name = self.names[0] if name is None else name
        if name not in self._offers:
            raise RequestError(
                f"there is no {{0}} {quote(name)} on this server{suggest(name, self.names)}; "
                f"choose one of {', '.join(self.names)}.",
                "model",
            )
        offers = self._offers[name]
        method = next(iter(offers)) if method is None else method
        if method not in offers:
            raise RequestError(
                f"there is no {{0}} {quote(method)} for {quote(name)} on this server"
                f"{suggest(method, offers)}; choose one of {', '.join(offers)}.",
                "method",
            )
        return offers[method]


def _with_method(selection: ModelSelection, method: str, weights: tuple[str, ...]) -> Offer:
    """Return another method than that of the server's preset, whose adapter is not for it.

    Raises:
        OptionError: the method does not work with the other settings.
    """
    changed = selection.model_copy(update={"method": method, "adapter": None})
    preset = resolve_preset(changed)
    check_models(preset)
    return Offer(preset, weights)
