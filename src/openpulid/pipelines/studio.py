"""Prompt + Identity -> images: the whole story.

studio = load("mini")
anna = studio.identify("anna.png")
studio.generate("portrait, film noir", identity=anna, seed=7, num_images=4).images
"""

from __future__ import annotations

import difflib
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from openpulid.device import best_device
from openpulid.errors import FaceError, OptionError, PromptError
from openpulid.faces.face import Face
from openpulid.faces.insightface_pack import find_pack
from openpulid.faces.scrfd import LONGEST
from openpulid.faces.select import select_face, sort_faces
from openpulid.faces.visualize import draw_faces
from openpulid.identity.extractor import IdentityExtractor
from openpulid.identity.identity import Identity, fuse_identities
from openpulid.io.image_grid import to_tensor
from openpulid.io.images import limit_size, open_image
from openpulid.methods.pulid.flux import guided_from
from openpulid.methods.pulid.masks import People, normalize_people
from openpulid.methods.pulid.projection import Projection
from openpulid.methods.registry import Method
from openpulid.pipelines import presets
from openpulid.pipelines.factory import load_adapter, load_extractor, load_pipeline
from openpulid.pipelines.flux_memory import find_level
from openpulid.pipelines.presets import Preset

Place = str | os.PathLike[str]
Picture = Place | Image.Image
Named = Place | Preset
"""A preset, or its name, or a folder of weights."""


@dataclass(frozen=True)
class GenerationResult:
    """Images, the seeds that make each of them again, alone, and the preset with all options as they were."""

    images: list[Image.Image]
    seeds: list[int]
    preset: Preset


class Studio:
    """A base model, what reads faces for it, and an adapter, ready to use; threads that share it make images in turn.

    Args:
        pipe: a StableDiffusionXLPipeline or FluxPipeline; None where only faces are read.
        features: picture -> identity; None where only the prompt is used.
        adapter: attached to `pipe` here; None where only the prompt is used.
        preset: defaults of a generation.
    """

    def __init__(
        self, pipe: Any, features: IdentityExtractor | None, adapter: Method | None, preset: Preset
    ) -> None:
        self.pipe, self.features, self.adapter, self.preset = pipe, features, adapter, preset
        self._making = (
            threading.Lock()
        )  # an identity in use, and a pipeline's own guidance, are the network's for that while
        if adapter is not None:
            adapter.attach(pipe)

    def identify(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        face: int | None = None,
        order: str = "large-small",
        fusion: str = "concat",
        weights: Sequence[float] | None = None,
    ) -> Identity:
        """One person from one or several photos: paths or PIL images.

        Args:
            face: which face of a picture with several, counted from 0 in the order; the first where it is None.
            order: one of `faces.choose.ORDERS`.
            fusion, weights: of several photos, see `identity.fused`.

        Raises:
            PictureError: a file that is no picture.
            FaceError: a picture without a face that this preset knows, or without so many.
        """
        found = self.faces(pictures)
        picked = [select_face(faces, face, order, label) for label, faces in found]
        assert self.features is not None
        return fuse_identities(self.features.identities(picked), fusion, weights)

    def show(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        face: int | None = None,
        order: str = "large-small",
    ) -> Image.Image:
        """What `identify` sees in each picture, one below the other: every face with its number, and what is read of the
        chosen one. Raises as `identify`."""
        rows = []
        for label, faces in self.faces(pictures):
            line = sort_faces(faces, order)
            picked = select_face(line, face or 0, order, label)
            assert self.features is not None
            rows.append(draw_faces(line, picked, self.features.shown(picked)))
        sheet = Image.new(
            "RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white"
        )
        top = 0
        for row in rows:
            sheet.paste(row, (0, top))
            top += row.height
        return sheet

    def faces(self, pictures: Picture | Sequence[Picture]) -> list[tuple[str, list[Face]]]:
        """What each picture is called, and all the faces in it: at least one. Raises as `identify`."""
        if self.features is None:
            raise OptionError("this studio was made without what reads faces; load a preset.")
        one = isinstance(pictures, (str, os.PathLike, Image.Image))
        photos: list[Any] = [pictures] if one else list(pictures)  # type: ignore[arg-type]
        if not photos:
            raise OptionError("an identity needs at least one picture.")
        opened = [
            (open_image(photo), _label(photo)) for photo in photos
        ]  # a bad file is known before any is read
        found = []
        for image, label in opened:
            # photographs alone: the miniature's finder fits pictures itself
            seen = image if self.preset.parser is None else limit_size(image, LONGEST)
            scale = max(image.size) / max(seen.size)
            found.append(
                (
                    label,
                    [
                        replace(face, scale=scale)
                        for face in self.features.detect(to_tensor([seen])[0])
                    ],
                )
            )
            if not found[-1][1]:
                way_out = (
                    self.preset.no_face
                    or "take a picture in which one face is large and seen from the front."
                )
                search = self.features.search_description
                width, height = image.size
                said = f"{label}: no face was found in its {width} x {height} pixels ({search}); {way_out}"
                raise FaceError(said, label, image.size, search)
        return found

    def generate(
        self,
        prompt: str,
        identity: People | None = None,
        *,
        seed: int = 0,
        num_images: int = 1,
        negative: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        scale: float | None = None,
        start: float | None = None,
        end: float | None = None,
        projection: Projection | None = None,
        num_zero: int | None = None,
        size: tuple[int, int] | None = None,
        start_step: int | None = None,
        true_cfg: float | None = None,
        timestep_to_start_cfg: int | None = None,
        text_tokens: int | None = None,
        batch: int = 1,
    ) -> GenerationResult:
        """Images of a prompt, with or without somebody in them. What is None is the preset's.

        Args:
            prompt: what to show; the identity is never in the words.
            identity: who; or several people with masks, as `PuLID.use` takes them.
            seed: image k is made from a generator of its own with the seed `seed + k`, on the CPU.
            negative: what not to show.
            steps, guidance: of the sampler.
            scale, start, end, projection, num_zero: of the identity, see `PuLID.use`.
            size: width and height in pixels.
            start_step, true_cfg, timestep_to_start_cfg: FLUX only: from which step the identity acts; guidance by the
                negative prompt, and from which step.
            text_tokens: FLUX only: how long a prompt may be, up to 512 of T5's tokens.
            batch: images made at once. With 1, image k is bit for bit what the seed + k makes alone; more
                may be faster, and equal up to rounding.

        Raises:
            PromptError: words that the model does not know, or too many.
            IdentityError: an identity that other models made.
            OptionError: a number outside its range, or an option that would change nothing with this preset.
        """
        given: dict[str, Any] = {
            "steps": steps,
            "guidance": guidance,
            "scale": scale,
            "start": start,
            "end": end,
        }
        given |= {
            "projection": projection,
            "num_zero": num_zero,
            "negative": negative,
            "size": size,
        }
        given |= {
            "start_step": start_step,
            "true_cfg": true_cfg,
            "timestep_to_start_cfg": timestep_to_start_cfg,
        }
        chosen = presets.with_options(self.preset, **given, text_tokens=text_tokens)
        if min(num_images, chosen.steps, batch) < 1 or seed < 0:
            raise OptionError(
                "num_images, steps and batch are at least 1, and a seed is at least 0."
            )
        check_options(self.pipe, chosen)
        seeds = [seed + k for k in range(num_images)]
        parts = [seeds[first : first + batch] for first in range(0, num_images, batch)]
        with self._making:
            for text in (prompt, negative or ""):  # the preset's own negative words may be cut
                check_prompt(*_reader(self.pipe, chosen), text)
            with self._showing(identity, chosen):
                images = [image for part in parts for image in self._run(prompt, part, chosen)]
        return GenerationResult(images, seeds, chosen)

    def _showing(self, identity: People | None, chosen: Preset) -> Any:
        if chosen.true_cfg <= 1:  # nothing is guided so, and nothing waits for its step
            chosen = replace(chosen, timestep_to_start_cfg=0)
        if identity is None:
            return guided_from(self.pipe, chosen.timestep_to_start_cfg)
        if self.adapter is None:
            raise OptionError(
                "this studio was made without an adapter; load a preset that has one."
            )
        if not isinstance(identity, Identity) and self.preset.method != "pulid":
            raise OptionError(
                f"several people with masks in one image are PuLID's; {self.preset.method} shows one."
            )
        for person, _ in chain(*normalize_people(identity)):
            if self.features is not None:
                person.require(self.features.models)
        return self.adapter.use(identity, **chosen.identity_options(), pipe=self.pipe)

    def _run(self, prompt: str, seeds: Sequence[int], chosen: Preset) -> list[Image.Image]:
        count = len(seeds)
        width, height = chosen.size or (None, None)
        options: dict[str, Any] = {
            "guidance_scale": chosen.guidance,
            "width": width,
            "height": height,
        }
        if chosen.family == "flux":
            options |= {
                "true_cfg_scale": chosen.true_cfg,
                "max_sequence_length": chosen.text_tokens,
            }
        images: list[Image.Image] = self.pipe(
            prompt=[prompt] * count,
            # none given: what the pipeline takes for no words at all
            negative_prompt=[chosen.negative] * count if chosen.negative else None,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=chosen.steps,
            **options,
        ).images
        return images


def load(
    preset: Named = "mini",
    device: str | torch.device | None = None,
    base: Place | None = None,
    memory: str | None = None,
    method: str | None = None,
    faces: Place | None = None,
    adapter: Place | None = None,
) -> Studio:
    """A studio from a preset's name, a folder of weights, or a `Preset`. No network is asked.

    Args:
        faces: folder of another insightface pack, whose detector and recogniser read photographs; the adapter must have
            learned with that recogniser.
        method: another than PuLID on the preset's base, see `methods.base.METHODS`.
        adapter: another file of the method, such as one that `pulid train` has written.
        device: where to compute; the accelerator if there is one, else the CPU.
        base: another checkpoint than the preset's: a folder, a single file, or OWNER/NAME in the hub's cache; see
            `presets.on_base`.
        memory: FLUX only, one of `memory.LEVELS`: full, 24gb, 16gb, 12gb.

    Raises:
        OptionError: no such preset.
        WeightsError: weights that are missing or damaged.
    """
    preset = resolve_preset(preset, base, memory, method, faces, adapter)
    chosen = torch.device(device) if device is not None else best_device()
    shows = load_adapter(preset, chosen)
    return Studio(
        load_pipeline(preset, chosen), load_extractor(preset, chosen, shows), shows, preset
    )


def load_reader(
    preset: Named = "mini",
    device: str | torch.device | None = None,
    method: str | None = None,
    faces: Place | None = None,
) -> Studio:
    """As `load`, a studio that reads faces and makes no images: only what reads is opened, and need be there."""
    preset = resolve_preset(preset, method=method, faces=faces)
    chosen = torch.device(device) if device is not None else best_device()
    own_tower = preset.vision is None and preset.view not in ("", "none")
    return Studio(
        None,
        load_extractor(preset, chosen, load_adapter(preset, chosen) if own_tower else None),
        None,
        preset,
    )


def resolve_preset(
    preset: Named,
    base: Place | None = None,
    memory: str | None = None,
    method: str | None = None,
    faces: Place | None = None,
    adapter: Place | None = None,
) -> Preset:
    """The preset that `load` loads, from its arguments. Raises OptionError as it does; nothing large is opened."""
    if not isinstance(preset, Preset):
        preset = presets.find_preset(os.fspath(preset))
    if base is not None:
        preset = presets.on_base(preset, os.fspath(base))
    if memory is not None:
        find_level(memory)
        if preset.family != "flux":
            raise OptionError(
                f"{preset.name} has one way of lying in memory; the levels are FLUX's."
            )
        preset = replace(preset, memory=memory)
    if adapter is not None and not Path(adapter).exists():
        raise OptionError(
            f"{os.fspath(adapter)} is not there; name the file of an adapter, or leave it out."
        )
    if method is not None or adapter is not None:
        preset = presets.with_method(
            preset, method or preset.method, None if adapter is None else Path(adapter)
        )
    if faces is not None:
        if preset.parser is None:
            raise OptionError(
                f"{preset.name} reads its own drawn people; a pack is for photographs, with a preset of full size."
            )
        detector, recogniser = find_pack(faces)
        preset = replace(preset, finder=detector, recogniser=preset.recogniser and recogniser)
    return preset


def _reader(pipe: Any, preset: Preset) -> tuple[Any, int]:
    """The tokenizer that decides how long a prompt may be, and how long."""
    if preset.family == "flux":
        return pipe.tokenizer_2, preset.text_tokens
    return pipe.tokenizer, pipe.tokenizer.model_max_length


def check_options(pipe: Any, chosen: Preset) -> None:
    """Refuses what a pipeline would silently change or leave out.

    Raises:
        OptionError: a size that it has no latents for; FLUX's true guidance without a negative prompt, or the reverse; more
            words than T5 reads.
    """
    if pipe is None:
        raise OptionError("this studio only reads faces; load a preset to make images.")
    flux = chosen.family == "flux"
    pixels = pipe.vae_scale_factor * (2 if flux else 1)  # FLUX's tokens are two latents wide
    if chosen.size and any(side % pixels or side < pixels for side in chosen.size):
        near = "x".join(str(max(round(side / pixels), 1) * pixels) for side in chosen.size)
        width, height = chosen.size
        raise OptionError(
            f"{width}x{height}: width and height are multiples of {pixels}, such as {near}."
        )
    if flux and (chosen.true_cfg > 1) != bool(chosen.negative):
        raise OptionError(
            "on FLUX true_cfg above 1 guides away from what negative says; give both, or neither."
        )
    if flux and not 1 <= chosen.text_tokens <= 512:
        raise OptionError(
            f"text_tokens is how many tokens T5 reads, from 1 to 512; it is {chosen.text_tokens}."
        )


def check_prompt(tokenizer: Any, limit: int, prompt: str) -> None:
    """Refuses what a text encoder would silently drop: words it does not know, and all that is past its length.

    Raises:
        PromptError: names the words, with those that come near, or the length.
    """
    words = dict.fromkeys(re.findall(r"\w+(?:['-]\w+)*|[^\w\s]", prompt))
    unknown = [
        word
        for word in words
        if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids
    ]
    if unknown:
        known = [
            token.removesuffix("</w>") for token in tokenizer.get_vocab() if re.match(r"\w", token)
        ]
        near = {word: difflib.get_close_matches(word.lower(), known, 2, 0.6) for word in unknown}
        named = [
            f"{word!r}" + (f" (near: {', '.join(near[word])})" if near[word] else "")
            for word in unknown
        ]
        raise PromptError(
            f"the model does not know {' and '.join(named)}; use its own words.", unknown
        )
    length = len(tokenizer(prompt, truncation=False).input_ids)
    if length > limit:
        raise PromptError(
            f"the prompt has {length} tokens and the model reads {limit}; shorten it."
        )


def _label(picture: Picture) -> str:
    if isinstance(picture, Image.Image):
        return str(getattr(picture, "filename", "") or "picture")
    return str(Path(picture))
