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

    # Image k uses the seed 7 + k. Each PNG stores its request; no existing file is replaced.
    prompt = "portrait, film noir, smiling"
    result = studio.generate(prompt, identity=anna, seed=7, num_images=3)
    print(*result.save(out), sep="\n")

    # The same seed without the identity, to compare.
    studio.generate(prompt, seed=7).save(out / "base")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    main(parser.parse_args().out)
