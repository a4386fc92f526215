"""The command `pulid tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from openpulid.cli.options import (
    Base,
    Device,
    Overwrite,
    Preset,
    check_new_output,
    check_output,
    make_directory,
    name_options,
    print_path,
)
from openpulid.errors import OptionError

USED_BY = {
    "--rank": {"lora"},
    "--text-encoders": {"lora"},
    "--vectors": {"word"},
    # prompts of class images do not contain the word
    "--class-images": {"lora", "unet", "cross-attention"},
}
"""Options that have an effect on some trained parts alone."""


def tune(
    method: Annotated[
        str,
        typer.Argument(
            help="textual-inversion, lora, dreambooth-lora, dreambooth or custom-diffusion."
        ),
    ],
    image: Annotated[list[str], typer.Argument(help="One or several images of one person.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File to write, such as anna-lora.safetensors.")
    ],
    preset: Preset = "mini",
    base: Base = None,
    class_word: Annotated[
        str, typer.Option(help="What the person is: person, woman, man.")
    ] = "person",
    word: Annotated[
        str | None,
        typer.Option(
            help="Word for the person: one token that the model hardly knows (default: sks)."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Number of steps (default: the method's).")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images per step (default: the method's).")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(min=0, help="Learning rate (default: the method's).")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of a LoRA (default: 4).")] = None,
    vectors: Annotated[
        int | None,
        typer.Option(min=1, help="Textual Inversion: embeddings of the word (default: 4)."),
    ] = None,
    class_images: Annotated[
        int | None,
        typer.Option(
            min=0, help="Images of the class word to preserve; 0 for none (default: the method's)."
        ),
    ] = None,
    face_weight: Annotated[
        float | None,
        typer.Option(
            min=0.01, help="Weight of the face in the loss; the background has 1 (default: 1)."
        ),
    ] = None,
    crops: Annotated[
        int | None, typer.Option(min=1, help="Crops of each image (default: 1, the whole).")
    ] = None,
    text_encoders: Annotated[
        bool, typer.Option("--text-encoders", help="LoRA: tune the text encoders as well.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the tuning.")] = 0,
    resume: Annotated[
        bool,
        typer.Option("--resume/--fresh", help="Continue an interrupted run, or start again."),
    ] = True,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Tune a method on images of one person. The file is of that person alone.

    `pulid generate --method lora --adapter FILE` uses it; LoRAs and embeddings are also opened by
    other programs.
    """
    if out.suffix != ".safetensors":
        raise OptionError(f"-o must name a file such as {out.stem}.safetensors.")
    from openpulid.training.tuning import find_tuning_recipe

    options = {
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "rank": rank,
        "num_vectors": vectors,
        "num_class_images": class_images,
        "face_loss_weight": face_weight,
        "num_crops": crops,
        "with_text_encoders": text_encoders or None,
        "gradient_checkpointing": gradient_checkpointing or None,
        "seed": seed,
    }
    _check_options(
        find_tuning_recipe(method).trained,
        method,
        {
            "--rank": rank,
            "--vectors": vectors,
            "--text-encoders": text_encoders,
            "--class-images": class_images,
        },
    )
    from openpulid.identity.reference import open_references

    references = open_references(image)
    check_output(out, image)
    check_new_output(out, overwrite)
    make_directory(out.parent)
    from openpulid.pipelines.selection import resolve_preset
    from openpulid.training.tuning.session import tune_person

    with name_options():
        resolved = resolve_preset(preset, base)
    changes: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    tune_person(
        method,
        resolved,
        references,
        out,
        class_word=class_word,
        word=word,
        changes=changes,
        is_fresh=not resume,
        device=device,
    )
    print_path(out)


def _check_options(trained: str, method: str, options: dict[str, object]) -> None:
    """Raise OptionError if an option is set that has no effect on what is trained."""
    for name, value in options.items():
        if value and trained not in USED_BY[name]:
            raise OptionError(f"{name} has no effect with {method}; leave it out.")
