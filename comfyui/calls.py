"""What the patches know about the call of the network in which they run.

A wrapper around the network puts it into that call's transformer options, once per call. So sigma
is copied from the device once, and blocks that get no latents know the size of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

WRAPPER = "diffusion_model"
"""The value of `comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL`."""

KEY = "openpulid"

NEGATIVE = 1
"""The index of the negative prompt in ComfyUI's `cond_or_uncond`."""


@dataclass
class NetworkCall:
    """One call of the network.

    Attributes:
        sigma: noise level.
        height, width: size of the latents.
        patch_size: side of a transformer's image token in latents.
        num_text_tokens: of a transformer; its double blocks update it.
        num_frames: of video models' latents; Qwen-Image-Layered has one per layer of the image.
    """

    sigma: float
    height: int
    width: int
    patch_size: int
    num_text_tokens: int
    num_frames: int = 1

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> NetworkCall:
        """Return the call from the transformer options that a patch receives."""
        call: NetworkCall = options[KEY]
        return call

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of a transformer's image tokens."""
        return ceil(self.height / self.patch_size), ceil(self.width / self.patch_size)


def watch_calls(model: Any) -> None:
    """Add the wrapper to a `ModelPatcher`, unless it has it already."""
    if not model.get_wrappers(WRAPPER, KEY):
        model.add_wrapper_with_key(WRAPPER, KEY, describe_call)


def describe_call(network: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the network with a `NetworkCall` in a copy of its transformer options.

    Args:
        network: ComfyUI's executor of the next wrapper or the network itself.
        args: of the network: latents, timestep, text tokens, ...
        kwargs: further arguments.
    """
    options = kwargs.get("transformer_options")
    if options is None:
        options = next(value for value in reversed(args) if isinstance(value, dict))
    latents = args[0]
    context = args[2] if len(args) > 2 else kwargs["context"]
    height, width = latents.shape[-2:]
    call = NetworkCall(
        float(options["sigmas"][0]),
        height,
        width,
        getattr(network.class_obj, "patch_size", 1),
        context.shape[1],
        num_frames=latents.shape[2] if latents.ndim == 5 else 1,
    )
    described = {**options, KEY: call}
    if "transformer_options" in kwargs:
        return network(*args, **{**kwargs, "transformer_options": described})
    return network(*(described if value is options else value for value in args), **kwargs)


def find_negative_rows(options: Mapping[str, Any], num_rows: int) -> tuple[bool, ...]:
    """Return for each row of the batch whether it is of the negative prompt.

    The rows are in equal groups, one per entry of `cond_or_uncond`: [1, 0] with guidance, [0]
    without, [1, 0, 0] with two positive prompts. Each group has all images of the batch.
    """
    num_images = count_images(options, num_rows)
    return tuple(
        group == NEGATIVE for group in options["cond_or_uncond"] for _ in range(num_images)
    )


def count_images(options: Mapping[str, Any], num_rows: int) -> int:
    """Return the number of images in the batch, see `find_negative_rows`."""
    return num_rows // len(options["cond_or_uncond"])
