"""Run a pipeline, and report NaN and infinity instead of returning a black image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from openpulid.errors import NonFiniteError


def run_pipeline(
    pipe: Any,
    after_step: Callable[[Any, int, Tensor], Tensor] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    **options: Any,
) -> list[Image.Image]:
    """Run a pipeline and return its images, the same as with the output type "pil".

    Args:
        pipe: a pipeline of SDXL or FLUX.
        after_step: pipeline, step and its latents -> the latents of the next step.
        on_step: receives each step and its latents. It may decode a preview.
        options: arguments of the call.

    Raises:
        NonFiniteError: a step or the autoencoder gave NaN or infinity.
    """
    is_preview = False
    network = "U-Net" if getattr(pipe, "unet", None) is not None else "transformer"

    def watch_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if not bool(tensors["latents"].isfinite().all()):
            raise NonFiniteError(
                f"the {network} gave NaN or infinity in step {step + 1}, so there is no image; "
                "its weights, the adapter's or the identity are damaged, or too large for "
                "float16; try another base model or identity, or the device cpu."
            )
        if after_step is not None:
            tensors["latents"] = after_step(pipe, step, tensors["latents"])
        if on_step is not None:
            nonlocal is_preview
            is_preview = True
            on_step(step, tensors["latents"])
            is_preview = False
        return tensors

    def check_decoded(_: nn.Module, args: Any, decoded: Tensor) -> None:
        if not is_preview and not bool(decoded.isfinite().all()):
            raise decoder_error()

    decoder = getattr(pipe.vae, "decoder", None)
    # the pipeline clamps infinity
    hook = decoder.register_forward_hook(check_decoded) if decoder is not None else None
    try:
        output = pipe(**options, output_type="np", callback_on_step_end=watch_step)
    finally:
        if hook is not None:
            hook.remove()
    pixels = np.asarray(output.images)
    if not np.isfinite(pixels).all():
        raise decoder_error()
    images: list[Image.Image] = pipe.image_processor.numpy_to_pil(pixels)
    return images


@contextmanager
def clean_up_failure(pipe: Any) -> Iterator[None]:
    """Leave a pipeline as after a complete call, also if a call fails or is stopped.

    diffusers computes a float16 VAE of SDXL in float32, and empties block caches and offloads
    networks at the end of a call.

    Args:
        pipe: the pipeline that runs, or the one whose components it shares.
    """
    vae_dtype = pipe.vae.dtype
    try:
        yield
    except BaseException:
        if pipe.vae.dtype != vae_dtype:
            pipe.vae.to(vae_dtype)
        pipe.maybe_free_model_hooks()
        raise


def decoder_error() -> NonFiniteError:
    """Create the error for an autoencoder that gives NaN or infinity."""
    return NonFiniteError(
        "the autoencoder gave NaN or infinity, so there is no image; its weights are damaged, or "
        "too large for float16; try another base model, or the device cpu."
    )
