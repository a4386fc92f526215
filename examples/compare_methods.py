"""Compare methods: the same person, prompt and seed.

    python examples/compare_methods.py --out out

For tables and plots over many people and prompts, use `pulid bench run`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

import openpulid as pulid
from openpulid.io.metadata import save_image

ANNA = Path(__file__).with_name("anna.png")
METHODS = ("pulid", "faceid", "instantid")


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    images = [Image.open(ANNA)]
    for method in METHODS:
        studio = pulid.load("mini", method=method)
        anna = studio.identify(ANNA)  # each method computes the features that it needs
        result = studio.generate("portrait, poster art, laughing", identity=anna, seed=7)
        images += result.images

    # The reference image, then one image per method.
    width, height = images[-1].size
    sheet = Image.new("RGB", (width * len(images), height))
    for k, image in enumerate(images):
        sheet.paste(image.resize((width, height)), (k * width, 0))
    save_image(sheet, out / "methods.png")
    print("reference,", ", ".join(METHODS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    main(parser.parse_args().out)
