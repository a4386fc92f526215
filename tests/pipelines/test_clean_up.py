"""After an error or a stop, the next image is that of a new pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from PIL import Image

from openpulid.errors import Stopped
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import InitImage
from tests.support.studios import flux_studio, sdxl_studio
from tests.support.tiny_flux import tiny_pipe


@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_autoencoder_is_in_its_precision_again(
    tiny_pipeline: Any, tmp_path: Path, part: str
) -> None:
    """diffusers computes it in float32, and an error would leave it there."""
    Image.new("RGB", (32, 32), "gray").save(tmp_path / "room.png")
    init = InitImage(tmp_path / "room.png", strength=0.5) if part == "encoder" else None
    request = GenerationRequest(prompt="portrait", seed=1, init_image=init)
    pipe = tiny_pipeline().to(torch.float16)
    studio = sdxl_studio(pipe)
    pipe.vae.register_to_config(force_upcast=True)
    (expected,) = studio.generate(request).images

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError

    hook = getattr(pipe.vae, part).register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        studio.generate(request)
    hook.remove()
    assert pipe.vae.dtype == torch.float16
    assert studio.generate(request).images[0].tobytes() == expected.tobytes()


def test_stopped_generation_leaves_nothing_in_a_cache() -> None:
    studio = flux_studio(tiny_pipe(num_single_layers=6))
    studio.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=100.0))
    request = GenerationRequest(prompt="portrait", seed=1)

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise Stopped

    images = []
    for callback in (None, stop, None):
        images += studio.generate(request, callback=callback).images
    first, last = map(np.asarray, images)
    assert np.array_equal(first, last)
