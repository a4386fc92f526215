"""Draw the documentation's pictures with the miniature.

    python docs/make_pictures.py
    python docs/make_pictures.py people lora -o pictures

All people are held out of training. `demo.jpg` is the second sheet of `pulid demo`; `faces.jpg` is
made by `benchmarks/measure_refinement.py`; `web.jpg` and `comfyui.jpg` are photos of a browser.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageOps

import openpulid as pulid
from openpulid.identity.reference import ReferenceImage
from openpulid.io.image_grid import labeled_grid, to_pil
from openpulid.mini.evaluation import demo
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import InitImage, Lora, Person, StyleImage
from openpulid.pipelines.studio import Studio
from openpulid.training.tuning.session import tune_person
from openpulid.world import HELD_OUT_PEOPLE, Scene, render
from openpulid.world import Person as DrawnPerson
from openpulid.world.gallery import render_portrait

ANNA, BEN = HELD_OUT_PEOPLE + 3, HELD_OUT_PEOPLE + 11
"""Seeds of the two people of the pictures."""
SIDE = 192
"""Width and height of a drawn image in pixels."""
WIDE = (160, 96)
"""Size of an image with two people; the miniature draws them side by side."""
STYLE_SCALE = 0.6
"""Weight of an image of the style."""
LORA_IMAGES = 24
"""Images in two colors that the LoRA of the picture is tuned on."""


def draw_demo(studio: Studio, folder: Path) -> Image.Image:
    """Draw the second sheet of the demo."""
    return Image.open(demo.run(folder).people)


def draw_people(studio: Studio, folder: Path) -> Image.Image:
    """Draw two people in one image, each in a box."""
    references = [folder / "anna.png", folder / "ben.png"]
    boxes = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]
    people = [
        Person(images=[str(file)], box=box) for file, box in zip(references, boxes, strict=True)
    ]
    prompts = {
        "portrait, photo, front view, blue background": 2,
        "portrait, pencil sketch, front view": 4,
        "portrait, film noir, front view, smiling": 6,
    }
    pairs = []
    for prompt, seed in prompts.items():
        request = GenerationRequest(prompt, seed=seed, width=WIDE[0], height=WIDE[1])
        shown = request.model_copy(update={"people": people})
        pairs.append([studio.generate(r).images[0] for r in (request, shown)])
    sheet = join_rows([[Image.open(file) for file in references]], SIDE)
    wide = join_rows([[pair[k] for pair in pairs] for k in (0, 1)], SIDE)
    page = Image.new("RGB", (max(sheet.width, wide.width), sheet.height + wide.height), "white")
    page.paste(sheet, ((page.width - sheet.width) // 2, 0))
    page.paste(wide, (0, sheet.height))
    return page


def draw_edit(studio: Studio, folder: Path) -> Image.Image:
    """Draw inpainting and image-to-image of two images."""
    mask = Image.new("L", (96, 96))
    mask.paste(255, (0, 0, 96, 36))
    mask.save(folder / "mask.png")
    rows = []
    for seed in (3, 11):
        start = studio.generate("portrait, photo, smiling, teal background", seed=seed).images[0]
        start.save(folder / f"start-{seed}.png")
        init = InitImage(str(folder / f"start-{seed}.png"), strength=0.6)
        painted = init.model_copy(update={"mask": str(folder / "mask.png"), "strength": 0.9})
        person = [Person(images=[str(folder / "anna.png")])]
        images = [
            studio.generate(GenerationRequest(prompt, seed=seed, people=people, init_image=value))
            for prompt, people, value in (
                ("portrait, photo, wearing a red beanie", [], painted),
                ("portrait, film noir", person, init),
            )
        ]
        rows.append((f"seed {seed}", [start, mask, *(result.images[0] for result in images)]))
    labels = ["initial image", "inpaint mask", "with the mask", "image-to-image"]
    title = "A red beanie, strength 0.9; film noir of another person, 0.6"
    return labeled_grid(title, labels, rows, SIDE)


def draw_prompts(studio: Studio, folder: Path) -> Image.Image:
    """Draw a word of three weights."""
    prompts = ["sunglasses", "[[[[sunglasses]]]]", "(sunglasses:0.4)"]
    anna = studio.identify(folder / "anna.png")
    images = [
        studio.generate(f"portrait, {word}, red background", anna, seed=8).images[0]
        for word in prompts
    ]
    return labeled_grid("portrait, ..., red background", prompts, [("", images)], 240)


def draw_lora(studio: Studio, folder: Path) -> Image.Image:
    """Tune a LoRA on images in two colors, and draw it with an identity."""
    generator = torch.Generator().manual_seed(0)
    people = [DrawnPerson.sample(generator) for _ in range(LORA_IMAGES)]
    scenes = [Scene.sample(generator) for _ in people]
    references = []
    for number, image in enumerate(to_pil(render(people, scenes).image)):
        colored = ImageOps.colorize(image.convert("L"), "#2b0a4f", "#ffe9a8", mid="#e0526a")
        references.append(ReferenceImage(f"image {number}", colored))
    file = folder / "dusk.safetensors"
    tune_person("lora", studio.preset, references, file)
    prompts = {
        "portrait, photo, smiling": 3,
        "portrait, photo, long blond hair, laughing": 5,
        "portrait, photo, wearing a green beanie": 8,
    }
    rows = []
    for scale in (0.0, 0.25, 0.5):
        images = []
        for prompt, seed in prompts.items():
            request = GenerationRequest(
                prompt,
                seed=seed,
                people=[Person(images=[str(folder / "anna.png")])],
                loras=[Lora(str(file), scale=scale)] if scale else [],
            )
            images.append(studio.generate(request).images[0])
        rows.append((f"scale {scale}" if scale else "without the LoRA", images))
    return labeled_grid("A LoRA next to an identity", list(prompts), rows, SIDE)


def draw_style(studio: Studio, folder: Path) -> Image.Image:
    """Draw an identity in the styles of images of another person."""
    styles = [
        Scene(style="pencil", pose="right", hair_length="long"),
        Scene(style="noir", light="right", background="black"),
        Scene(style="poster", background="yellow", pattern="dots", clothing="purple"),
    ]
    other = DrawnPerson.from_seed(BEN)
    examples = to_pil(render([other] * len(styles), styles).image)
    person = [Person(images=[str(folder / "anna.png")])]
    plain = GenerationRequest("portrait, smiling, long hair", seed=8, people=person)
    images = []
    for number, example in enumerate(examples):
        example.save(folder / f"style-{number}.png")
        style = StyleImage(str(folder / f"style-{number}.png"), scale=STYLE_SCALE)
        request = plain.model_copy(update={"style_image": style})
        images.append(studio.generate(request).images[0])
    rows = [
        ("image of the style", [None, *examples]),
        ("with the identity", [studio.generate(plain).images[0], *images]),
    ]
    columns = ["without a style", "pencil", "film noir", "poster"]
    return labeled_grid("portrait, smiling, long hair", columns, rows, SIDE)


def join_rows(rows: list[list[Image.Image]], height: int, gap: int = 8) -> Image.Image:
    """Join images of the same height, and of any width, on white."""
    scaled = [
        [image.resize((image.width * height // image.height, height)) for image in row]
        for row in rows
    ]
    width = max(sum(image.width + gap for image in row) + gap for row in scaled)
    page = Image.new("RGB", (width, len(rows) * (height + gap) + gap), "white")
    for number, row in enumerate(scaled):
        x = gap
        for image in row:
            page.paste(image, (x, gap + number * (height + gap)))
            x += image.width + gap
    return page


PICTURES: dict[str, Callable[[Studio, Path], Image.Image]] = {
    "demo": draw_demo,
    "people": draw_people,
    "edit": draw_edit,
    "prompts": draw_prompts,
    "lora": draw_lora,
    "style": draw_style,
}


def main() -> None:
    """Draw the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    unknown = set(options.names) - set(PICTURES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(PICTURES)}")
    studio = pulid.load("mini")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, seed in (("anna.png", ANNA), ("ben.png", BEN)):
            render_portrait(seed).save(folder / file)
        for picture in options.names or PICTURES:
            target = options.out / f"{picture}.jpg"
            PICTURES[picture](studio, folder).convert("RGB").save(target, quality=90)
            print(target)


if __name__ == "__main__":
    main()
