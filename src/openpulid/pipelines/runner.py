"""Run requests on a pipeline: the people, the other inputs, and batches of seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image

from openpulid.methods.pulid import People, delay_guidance, normalize_people
from openpulid.pipelines.finite import clean_up_failure, run_pipeline
from openpulid.pipelines.inputs import RequestInputs
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.progress import Progress
from openpulid.pipelines.prompt_embeddings import (
    PromptOptions,
    encode_prompts,
    join_prompts,
    prompt_layout,
)
from openpulid.pipelines.refinement import FaceRefiner
from openpulid.pipelines.request import GenerationRequest


class PipelineRunner:
    """Runs resolved requests; one with an initial image on a pipeline that shares all components.

    Args:
        pipe: a StableDiffusionXLPipeline, FluxPipeline or ChromaPipeline.
        adapter: the method; it is attached to every pipeline.
        preset: which options have an effect.
    """

    def __init__(self, pipe: Any, adapter: Any, preset: Preset) -> None:
        self.pipe = pipe
        self.adapter = adapter
        self.preset = preset
        self._edit_pipelines: dict[bool, Any] = {}
        adapter.attach(pipe)

    def run(
        self,
        request: GenerationRequest,
        people: People | None,
        inputs: RequestInputs,
        progress: Progress,
        batch_size: int = 1,
    ) -> Iterator[tuple[int, Image.Image]]:
        """Generate the images of a request, and yield each with its seed.

        Small faces are refined before an image is yielded.

        Args:
            request: the resolved request.
            people: its people, as the adapter accepts them.
            inputs: its other input files.
            progress: is told of every step.
            batch_size: images computed at once.
        """
        if request.refine_faces is None:
            yield from self._generate(request, people, inputs, progress, batch_size)
            return
        refiner = FaceRefiner(request, people, inputs, self.preset.models)
        for seeds in _batches(request, batch_size):
            part = request.model_copy(update={"seed": seeds[0], "num_images": len(seeds)})
            # the identity is one at a time: the passes on faces begin after the whole images
            images = list(self._generate(part, people, inputs, progress, batch_size))
            for seed, image in images:
                yield seed, self._refine(refiner, seed, image, progress)

    def run_together(
        self,
        requests: Sequence[GenerationRequest],
        people: Sequence[People | None],
        progress: Progress,
    ) -> list[Image.Image]:
        """Generate one image of each of several requests at once.

        Prompts that CLIP reads in different numbers of chunks are run one number after another.

        Args:
            requests: resolved requests of equal `batch_key`.
            people: the people of each. If one request has none, all have none.
            progress: is told of every step.
        """
        prompts = [
            self._encode_prompts(self.pipe, *row) for row in zip(requests, people, strict=True)
        ]
        groups: dict[object, list[int]] = {}
        for k, options in enumerate(prompts):
            groups.setdefault(prompt_layout(options), []).append(k)
        images: dict[int, Image.Image] = {}
        for group in groups.values():
            first = requests[group[0]]
            shown = [people[k] for k in group] if first.people else None
            with self._use_identity(shown, first, self.pipe):
                progress.start_run(first, group)
                joined = join_prompts([prompts[k] for k in group])
                seeds = [requests[k].seed for k in group]
                batch = self._run_batch(first, joined, seeds, self.pipe, RequestInputs(), progress)
            images.update(zip(group, batch, strict=True))
        return [images[k] for k in range(len(requests))]

    def _refine(
        self, refiner: FaceRefiner, seed: int, image: Image.Image, progress: Progress
    ) -> Image.Image:
        """Refine the small faces of a generated image."""
        faces = refiner.find_faces(image, seed)
        for face in faces:
            progress.extend(face.request)
        for face in faces:
            files = replace(face.cut(image), add_ons=refiner.inputs.add_ons)
            for _, crop in self._generate(face.request, face.identity, files, progress):
                image = face.paste(image, crop)
        return image

    def _generate(
        self,
        request: GenerationRequest,
        people: People | None,
        inputs: RequestInputs,
        progress: Progress,
        batch_size: int = 1,
    ) -> Iterator[tuple[int, Image.Image]]:
        """Generate images without refining them."""
        pipe = self._select_pipeline(inputs)
        with inputs.use(pipe, self.preset.models) as style:
            prompts = {**self._encode_prompts(pipe, request, people), **style}
            with self._use_identity(people, request, pipe):
                for seeds in _batches(request, batch_size):
                    progress.start_run(request)
                    joined = join_prompts([prompts] * len(seeds))
                    images = self._run_batch(request, joined, seeds, pipe, inputs, progress)
                    yield from zip(seeds, images, strict=True)

    def _select_pipeline(self, inputs: RequestInputs) -> Any:
        """Return the pipeline that runs the inputs; one that starts from an image is kept."""
        if inputs.init_image is None:
            return self.pipe
        is_inpainting = inputs.init_image.mask is not None
        pipe = self._edit_pipelines.get(is_inpainting)
        if pipe is not None and not _shares_components(pipe, self.pipe):
            self.adapter.detach(pipe)
            pipe = None
        if pipe is None:
            pipe = inputs.init_image.build_pipeline(self.pipe)
            self.adapter.attach(pipe)
            self._edit_pipelines[is_inpainting] = pipe
        return pipe

    def _encode_prompts(
        self, pipe: Any, request: GenerationRequest, people: People | None
    ) -> PromptOptions:
        prompts = [] if people is None else normalize_people(people)
        num_people = max(map(len, prompts), default=0)
        return encode_prompts(pipe, request, self.preset, self.adapter.insert_trigger, num_people)

    def _use_identity(
        self, people: People | None, request: GenerationRequest, pipe: Any
    ) -> AbstractContextManager[Any]:
        is_flux = "true_cfg_scale" in self.preset.options
        # without guidance by a negative prompt there is no step to wait for
        is_guided = is_flux and (request.true_cfg_scale or 1) > 1
        first_guided_step = (request.timestep_to_start_cfg or 0) if is_guided else 0
        if people is None and not self.preset.models.has_own_person:
            return delay_guidance(pipe, first_guided_step) if is_flux else nullcontext()
        options = {
            name: value
            for name, value in request.identity.adapter_options.items()
            if name in self.preset.options and value is not None
        }
        if request.people:
            # the masks hold what is less than the largest scale
            options["scale"] = max(request.identity_scales)
        if is_flux:
            options["timestep_to_start_cfg"] = first_guided_step
        return self.adapter.use(people, **options, pipe=pipe)

    def _run_batch(
        self,
        request: GenerationRequest,
        prompts: Mapping[str, Any],
        seeds: Sequence[int],
        pipe: Any,
        inputs: RequestInputs,
        progress: Progress,
    ) -> list[Image.Image]:
        options: dict[str, Any] = {
            name: getattr(request, name)
            for name in ("true_cfg_scale", "max_sequence_length")
            if name in self.preset.options
        }
        size = request.image_size(self.preset.models.native_side)
        with clean_up_failure(self.pipe):
            edit = inputs.prepare_edit(request, pipe, seeds)
            if edit is None:
                options |= {"width": request.width, "height": request.height}
            else:
                options |= {**edit.options, "after_step": edit.after_step}
            images = run_pipeline(
                pipe,
                on_step=partial(progress.report, pipe, size=size),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale or 0.0,  # FLUX.1-schnell has none
                **prompts,
                **options,
            )
        return images if edit is None else edit.finish(images)


def _shares_components(pipe: Any, base: Any) -> bool:
    """Return whether a pipeline has the components of another; a user can exchange these."""
    return all(
        component is base.components[name]
        for name, component in pipe.components.items()
        if name in base.components
    )


def _batches(request: GenerationRequest, size: int) -> Iterator[list[int]]:
    """Yield the seeds of a request, `size` at a time."""
    seeds = [request.seed + k for k in range(request.num_images)]
    for first in range(0, len(seeds), size):
        yield seeds[first : first + size]
