"""Generate images of a person from one reference image.

    python examples/generate.py --out out

With `pulid.load("sdxl")` the same code works on photographs, once its weights are installed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import openpulid as pulid

ANNA = Path(__file__).with_name("anna.png")


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    studio = pulid.load("mini-lightning")

    # The identity is computed once. The file works with every later run.
    anna = studio.identify(ANNA)
    anna.save(out / "anna.safetensors")

    # Image k uses the seed 7 + k.
    prompt = "portrait, film noir, smiling"
    result = studio.generate(prompt, identity=anna, seed=7, num_images=3)
    for image, seed in zip(result.images, result.seeds, strict=True):
        image.save(out / f"film-noir-{seed}.png")

    # The same seed without the identity, to compare.
    studio.generate(prompt, seed=7).images[0].save(out / "film-noir-7-base.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    main(parser.parse_args().out)
