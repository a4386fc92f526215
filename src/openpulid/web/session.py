"""What the page works with: one studio, the last that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpulid.errors import OptionError
from openpulid.io.metadata import image_name, save_image
from openpulid.pipelines.controlnet import use_controlnet
from openpulid.pipelines.request import parse_size, request_of

if TYPE_CHECKING:
    from openpulid.identity.identity import Identity
    from openpulid.pipelines.presets import Preset
    from openpulid.pipelines.studio import Studio


class WebSession:
    """What the page works with: the studio of the preset and method that were asked for last, one at a time.

    Args:
        folder: images are put here for the browser to fetch.
        device: where to compute.
        preset: the one chosen at first.
        given: what `studio.resolved` shall change in that one: base, memory, faces, adapter; None changes nothing.
    """

    def __init__(
        self, folder: Path, device: str | None = None, preset: str = "mini", **given: Any
    ) -> None:
        self.folder, self.device, self.preset, self.given = folder, device, preset, given
        self._asked: tuple[str, str] | None = None
        self._studio: Studio | None = None
        self._resolved: dict[tuple[str, str], Preset] = {}

    def studio(self, preset: str, method: str) -> Studio:
        """Loaded when it is another than before; the former goes first, two would not fit everywhere."""
        from openpulid.pipelines.studio import load

        if self._studio is None or self._asked != (preset, method):
            self._studio = None
            self._studio = load(self.resolved(preset, method), device=self.device)
            self._asked = preset, method
        return self._studio

    def resolved(self, preset: str, method: str = "pulid") -> Preset:
        """A preset with a method on it; an adapter that was given is PuLID's."""
        from openpulid.pipelines.studio import resolve_preset

        if (
            preset,
            method,
        ) not in self._resolved:  # an insightface pack is opened to see what is in it
            self._resolved[preset, method] = resolve_preset(
                preset, method=method, **self._given(preset, method)
            )
        return self._resolved[preset, method]

    def _given(self, preset: str, method: str) -> dict[str, Any]:
        given = self.given if preset == self.preset else {}
        return {
            name: value for name, value in given.items() if name != "adapter" or method == "pulid"
        }

    def generate(
        self,
        photos: Sequence[tuple[str, str | None]] | None,
        identity_file: str | None,
        face: int | None,
        prompt: str,
        preset: str,
        method: str,
        scale: float,
        images: int,
        seed: int,
        alone: bool,
        negative: str | None,
        steps: int | None,
        guidance: float | None,
        size: str | None,
        start: float,
        end: float,
        control: str | None = None,
        control_picture: str | None = None,
        control_scale: float = 1.0,
    ) -> list[tuple[str, str]]:
        """Images and what stands below each. `alone` makes every image without the person too, from the same noise."""
        studio = self.studio(preset, method)
        pictures = [path for path, _ in photos or ()]
        who = self._who(studio, pictures, identity_file, face)
        options: dict[str, Any] = {
            "steps": steps or None,
            "guidance": guidance or None,
            "negative": negative or None,
        }
        wide = (size or "").strip() or None
        chosen = parse_size(wide, 16 if studio.preset.family == "flux" else 8)
        named = (
            ", ".join(Path(path).name for path in ([identity_file] if identity_file else pictures))
            or None
        )
        given = {
            name: str(value)
            for name, value in self._given(preset, method).items()
            if value is not None
        }
        request: dict[str, Any] = {
            "prompt": prompt,
            "id": named,
            "face": face or None,
            "preset": preset,
            "method": method,
        }
        request |= {"size": wide, **given, **options}
        joined = {"scale": scale, "start": start, "end": end}
        beside = (
            (control or None, control_picture, control_scale)
            if control or control_picture
            else (None, None, None)
        )
        if control:
            shown = control_picture and Path(control_picture).name
            request |= {
                "control": control,
                "control_picture": shown,
                "control_scale": control_scale,
            }
        with use_controlnet(studio, *beside):
            made = self._made(
                studio,
                prompt,
                who,
                {**options, **joined, "size": chosen},
                images,
                seed,
                {**request, **joined},
            )
            if who is not None and alone:
                plain = {**options, "size": chosen}
                without = self._made(
                    studio, prompt, None, plain, images, seed, {**request, "id": None, "face": None}
                )
                made = [one for pair in zip(made, without, strict=True) for one in pair]
        return made

    def faces(
        self,
        photos: Sequence[tuple[str, str | None]] | None,
        identity_file: str | None,
        face: int | None,
        preset: str,
        method: str,
    ) -> Any:
        """A picture of what is read of the photos."""
        if identity_file or not photos:
            raise OptionError(
                "give photos: what is read of them is shown; an identity file holds none."
            )
        return self.studio(preset, method).show([path for path, _ in photos], face=face)

    def _who(
        self, studio: Studio, photos: Sequence[str], identity_file: str | None, face: int | None
    ) -> Identity | None:
        from openpulid.identity.identity import Identity

        if identity_file and photos:
            raise OptionError("photos and an identity file are two people; take one of them away.")
        if identity_file and face:
            raise OptionError(
                "an identity file has its face already; leave the number of a face at 0."
            )
        if identity_file:
            return Identity.load(identity_file)
        return studio.identify(photos, face=face) if photos else None

    def _made(
        self,
        studio: Studio,
        prompt: str,
        who: Identity | None,
        options: dict[str, Any],
        images: int,
        seed: int,
        request: dict[str, Any],
    ) -> list[tuple[str, str]]:
        from tempfile import mkdtemp

        if not (prompt or "").strip():
            raise OptionError("say in the prompt what to show.")
        result = studio.generate(prompt, who, seed=int(seed), num_images=int(images), **options)
        place = Path(mkdtemp(dir=self.folder))
        kept = []
        for image, number in zip(result.images, result.seeds, strict=True):
            file = place / image_name(prompt, number)
            save_image(image, file, request_of(request, result, image, number))
            kept.append((str(file), f"seed {number}" + ("" if who is not None else ", nobody")))
        return kept


def installed_presets() -> list[str]:
    """The presets whose files are all on this machine."""
    from openpulid.pipelines.factory import missing_weights
    from openpulid.pipelines.presets import PRESETS

    return [name for name, make in PRESETS.items() if not missing_weights(make())]


def installed_controls() -> list[str]:
    """The published ControlNets that are on this machine."""
    from openpulid.errors import WeightsError
    from openpulid.io.hub import WEIGHTS, locate

    found = []
    for name in WEIGHTS:
        if name.startswith("control-"):
            with suppress(WeightsError):
                locate(name)
                found.append(name)
    return found
