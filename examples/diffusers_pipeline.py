"""Use PuLID in your own diffusers pipeline.

    python examples/diffusers_pipeline.py --out out

This is the miniature's pipeline. At full size, load any SDXL pipeline and the published adapter:

    pipe = StableDiffusionXLPipeline.from_pretrained(...)
    adapter = pulid.PuLID.from_pretrained("guozinan/PuLID", variant="v1.1")
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

import openpulid as pulid
import openpulid.diffusion.patch_vae
from openpulid.io.metadata import save_image
from openpulid.pipelines.presets import MINIATURE

ANNA = Path(__file__).with_name("anna.png")


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    anna = pulid.load("mini").identify(ANNA)

    pipe = StableDiffusionXLPipeline.from_pretrained(MINIATURE / "pipeline").to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    adapter = pulid.PuLID.load(MINIATURE / "pulid-stage3.safetensors")
    adapter.attach(pipe)

    def generate() -> torch.Tensor:
        generator = torch.Generator().manual_seed(7)
        prompt = "portrait, pencil sketch, smiling"
        steps = {"num_inference_steps": 8, "guidance_scale": 3.0}
        return pipe(prompt, generator=generator, output_type="pt", **steps).images[0]

    base = generate()
    with adapter.use(anna, scale=0.7, projection="none"):
        with_identity = generate()

    # Outside of `use`, the pipeline is bit for bit what it was.
    assert torch.equal(base, generate())

    side_by_side = torch.cat([base, with_identity], dim=2)
    pixels = pipe.image_processor.pt_to_numpy(side_by_side[None])
    [image] = pipe.image_processor.numpy_to_pil(pixels)
    save_image(image, out / "pipeline.png")  # marked as generated


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    main(parser.parse_args().out)
