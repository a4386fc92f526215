"""Image-to-image and inpainting, in pipelines of diffusers built from the loaded components."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_tensor

from openpulid.pipelines.mask_ratio import crop_mask
from openpulid.pipelines.model_set import ModelSet
from openpulid.pipelines.request_fields import RequestError, ResizeMode

PADDING = (127, 127, 127)
"""Color around an image that is padded, in the middle of what the autoencoder knows."""


@dataclass(frozen=True, eq=False)
class InitImageInput:
    """The files of an `InitImage`.

    Attributes:
        image: RGB.
        mask: gray, white where the image is repainted, of the image's ratio; None for
            image-to-image.
    """

    image: Image.Image
    mask: Image.Image | None

    def choose_size(self, models: ModelSet) -> tuple[int, int]:
        """Return the width and height that keep the ratio, with the number of pixels of training.

        Args:
            models: the models that run it.
        """
        scale = models.native_side / (self.image.width * self.image.height) ** 0.5
        multiple = models.size_multiple
        low = -(-models.min_side // multiple) * multiple
        high = models.max_side // multiple * multiple

        def fit(side: int) -> int:
            return max(low, min(high, multiple * round(side * scale / multiple)))

        return fit(self.image.width), fit(self.image.height)

    def resize(self, width: int, height: int, mode: ResizeMode) -> InitImageInput:
        """Bring image and mask to the size of the generated image.

        Args:
            width: in pixels.
            height: in pixels.
            mode: "crop" cuts off sides evenly; "pad" adds gray sides, which are painted if there is
                a mask; "stretch" changes the ratio.
        """
        image = _resize(self.image, (width, height), mode, PADDING)
        if self.mask is None:
            return InitImageInput(image, None)
        mask = self.mask.resize(self.image.size)  # cropped or padded like the image
        return InitImageInput(image, _resize(mask, (width, height), mode, 255))

    def build_pipeline(self, pipe: Any) -> Any:
        """Build the pipeline that starts from an image; it shares all components with another one.

        `from_pipe` would convert all components to one precision.

        Args:
            pipe: a StableDiffusionXLPipeline, FluxPipeline or ChromaPipeline.
        """
        from diffusers import (
            ChromaImg2ImgPipeline,
            ChromaInpaintPipeline,
            FluxImg2ImgPipeline,
            FluxInpaintPipeline,
            StableDiffusionXLImg2ImgPipeline,
        )
        from diffusers.image_processor import VaeImageProcessor

        derived: Any
        if _is_sdxl(pipe):  # `KeepOutside` adds inpainting
            derived = StableDiffusionXLImg2ImgPipeline(
                **pipe.components,
                force_zeros_for_empty_prompt=pipe.config.force_zeros_for_empty_prompt,
                add_watermarker=False,
            )
        else:
            classes: tuple[Any, Any] = (FluxImg2ImgPipeline, FluxInpaintPipeline)
            if type(pipe).__name__.startswith("Chroma"):
                classes = (ChromaImg2ImgPipeline, ChromaInpaintPipeline)
                # diffusers' inpainting reads the entry, which Chroma's configuration lacks
                pipe.transformer.register_to_config(guidance_embeds=False)
            derived = classes[self.mask is not None](**pipe.components)
            if self.mask is not None:
                # its own one rounds gray to black and white
                derived.mask_processor = VaeImageProcessor.from_config(
                    derived.mask_processor.config, do_binarize=False
                )
        derived.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        return derived

    def prepare(self, pipe: Any, strength: float, seeds: Sequence[int]) -> Edit:
        """Prepare one call of the pipeline, at the size of this image.

        Args:
            pipe: of `build_pipeline`.
            strength: see `InitImage`.
            seeds: of the images of the call.
        """
        # one for each: FLUX would encode a single image with the first generator alone
        edit = Edit({"image": [self.image] * len(seeds), "strength": strength})
        if not _is_sdxl(pipe):
            edit.options |= {"width": self.image.width, "height": self.image.height}
        if self.mask is None:
            return edit
        edit.outside = (self.image, self.mask)
        if _is_sdxl(pipe):
            edit.after_step = KeepOutside(pipe, self.image, self.mask, seeds)
        else:
            edit.options["mask_image"] = self.mask
        return edit


@dataclass
class Edit:
    """One call of a pipeline that starts from an image.

    Attributes:
        options: arguments of the call.
        after_step: see `run_pipeline`.
        outside: the image and the mask outside of which it must not change.
    """

    options: dict[str, Any]
    after_step: Callable[[Any, int, Tensor], Tensor] | None = None
    outside: tuple[Image.Image, Image.Image] | None = None

    def finish(self, images: Sequence[Image.Image]) -> list[Image.Image]:
        """Restore what is outside the mask: the autoencoder changes every pixel a little."""
        if self.outside is None:
            return list(images)
        original, mask = self.outside
        return [Image.composite(image, original, mask) for image in images]


class KeepOutside:
    """Keeps the latents outside a mask those of the image, as diffusers' inpainting does.

    diffusers' own pipeline for SDXL accepts latents of 4 channels alone; the miniature's have 20.

    Args:
        pipe: the image-to-image pipeline.
        image: the image at the size of the generated one.
        mask: gray, white where it is repainted.
        seeds: of the images of a call.
    """

    def __init__(
        self, pipe: Any, image: Image.Image, mask: Image.Image, seeds: Sequence[int]
    ) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        dtype, device = pipe.unet.dtype, pipe._execution_device
        # the same numbers in the same order as in the pipeline's own call
        self.latents = pipe.prepare_latents(
            pipe.image_processor.preprocess(image),
            None,
            len(seeds),
            1,
            dtype,
            device,
            generators,
            add_noise=False,
        )
        self.noise = randn_tensor(self.latents.shape, generators, device, dtype)
        area = interpolate(to_tensor(mask)[None], self.latents.shape[-2:], mode="area")
        self.mask = area.to(device, dtype)

    def __call__(self, pipe: Any, step: int, latents: Tensor) -> Tensor:
        """Return the latents after a step."""
        original = self.latents
        timesteps = pipe.scheduler.timesteps[-pipe.num_timesteps :]
        if step + 1 < len(timesteps):
            original = pipe.scheduler.add_noise(
                original, self.noise, timesteps[step + 1 : step + 2]
            )
        return (1 - self.mask) * original.to(latents) + self.mask * latents


def _is_sdxl(pipe: Any) -> bool:
    return getattr(pipe, "unet", None) is not None


def fit_inpaint_mask(mask: Image.Image, image: Image.Image) -> Image.Image:
    """Crop a mask to the ratio of the initial image, see `crop_mask`.

    Args:
        mask: gray, white where the image is repainted.
        image: the initial image.

    Raises:
        RequestError: the mask leaves the whole image as it is.
    """
    mask = crop_mask(mask, image.size, "inpaint mask")
    if mask.getbbox() is None:
        raise RequestError(
            "{0} is black everywhere, so that the image would not change; make it white where the "
            "image is to be repainted.",
            "init_image.mask",
        )
    return mask


def _resize(image: Image.Image, size: tuple[int, int], mode: ResizeMode, color: Any) -> Image.Image:
    if image.size == size:
        return image
    if mode == "crop":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    if mode == "pad":
        return ImageOps.pad(image, size, Image.Resampling.LANCZOS, color)
    return image.resize(size, Image.Resampling.LANCZOS)
