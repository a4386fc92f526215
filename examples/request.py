"""Describe a generation completely, as an object and as JSON, and run it.

    python examples/request.py --out out

A request is frozen and validated. The command line, the page, the benchmark and the metadata of
generated images use the same object.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import openpulid as pulid
from openpulid.errors import OptionError
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest, IdentityOptions
from openpulid.pipelines.request_inputs import Person

ANNA = Path(__file__).with_name("anna.png")


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    request = GenerationRequest(
        prompt="portrait, photo, long blond hair, sunset light",
        seed=7,
        num_images=2,
        people=[Person(images=[ANNA])],
        identity=IdentityOptions(scale=0.8, end=0.9),
    )

    # Requests are JSON. Fields that are not set take the defaults of the preset.
    path = out / "request.json"
    path.write_text(request.model_dump_json(indent=2, exclude_defaults=True), "utf-8")
    request = GenerationRequest.model_validate_json(path.read_text("utf-8"))

    studio = pulid.load("mini-lightning")
    result = studio.generate(request)
    paths = result.save(out)

    # Each image has a resolved request: all defaults are filled in, and it regenerates that image.
    last = result.requests[-1]
    print(last.seed, last.num_inference_steps, last.identity.start)

    # The PNG stores it, and names its input files without folders: they are passed again.
    stored = Provenance.read(paths[-1])
    print(stored.required_files())
    again = stored.restore({"people.0.images.0": ANNA})
    assert studio.generate(again).images[0].tobytes() == result.images[-1].tobytes()

    # Invalid values are rejected, with the name of the field.
    try:
        GenerationRequest(prompt="portrait", num_inference_steps=0)
    except OptionError as error:
        print(error)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    main(parser.parse_args().out)
