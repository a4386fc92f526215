"""`pulid data`: datasets for training."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from openpulid.cli.options import AsJson, command_group, print_json, print_nothing, print_status

data = command_group("Datasets for training: from folders of images to filtered shards.")


class PeopleSource(str, Enum):
    """Who an image shows."""

    faces = "faces"
    folders = "folders"
    none = "none"


class IdentityWords(str, Enum):
    """What happens to words that describe who a person is."""

    remove = "remove"
    flag = "flag"
    keep = "keep"


@data.command()
def prepare(
    sources: Annotated[
        list[Path],
        typer.Argument(help="Folders, tar archives (.tar) or parquet files of images."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the dataset.")],
    faces: Annotated[
        str,
        typer.Option(
            help="Face models: `open`, the directory of an insightface pack, or `mini` for "
            "synthetic people (default: antelopev2)."
        ),
    ] = "",
    min_face: Annotated[
        int | None, typer.Option(help="Smallest face in pixels (default: 112; mini: 32).")
    ] = None,
    max_faces: Annotated[int | None, typer.Option(help="Most faces (default: 1).")] = None,
    min_score: Annotated[
        float | None, typer.Option(help="Least confidence of the face detector (default: 0.6).")
    ] = None,
    min_sharpness: Annotated[
        float | None, typer.Option(help="Least sharpness of the face (default: 0.01).")
    ] = None,
    max_yaw: Annotated[
        float | None, typer.Option(help="Head turned to a side, in degrees (default: 60).")
    ] = None,
    max_pitch: Annotated[
        float | None, typer.Option(help="Head turned up or down, in degrees (default: 45).")
    ] = None,
    max_roll: Annotated[
        float | None, typer.Option(help="Head tilted, in degrees (default: 40).")
    ] = None,
    max_occlusion: Annotated[
        float | None,
        typer.Option(help="Hidden part of the face; 1 skips its parsing (default: 0.5)."),
    ] = None,
    min_side: Annotated[
        int | None,
        typer.Option(help="Shorter side of the crop in pixels (default: 512; mini: 96)."),
    ] = None,
    max_aspect: Annotated[
        float | None, typer.Option(help="Longer over shorter side of the image (default: 3).")
    ] = None,
    duplicate_bits: Annotated[
        int | None, typer.Option(help="Different bits of the hashes of duplicates (default: 4).")
    ] = None,
    duplicate_similarity: Annotated[
        float | None, typer.Option(help="Face similarity of duplicates (default: 0.95).")
    ] = None,
    people: Annotated[
        PeopleSource | None,
        typer.Option(help="Find people by their faces, or take the folder (default: faces)."),
    ] = None,
    person_similarity: Annotated[
        float | None, typer.Option(help="Mean face similarity of a person (default: 0.4).")
    ] = None,
    captioner: Annotated[
        str | None,
        typer.Option(
            help="Vision-language model for images without a caption; '' drops them "
            "(default: blip2)."
        ),
    ] = None,
    caption_prompt: Annotated[
        str | None,
        typer.Option(help="Text that the captioner continues, or question to a chat model."),
    ] = None,
    replace_captions: Annotated[
        bool | None, typer.Option("--replace-captions", help="Ignore the given captions.")
    ] = None,
    identity_words: Annotated[
        IdentityWords | None,
        typer.Option(help="Names, age and features in captions (default: remove)."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Largest shorter side of a crop in pixels (default: 1024).")
    ] = None,
    context: Annotated[
        float | None, typer.Option(help="Largest shorter side of a crop in faces (default: 5).")
    ] = None,
    quality: Annotated[int | None, typer.Option(help="JPEG quality (default: 95).")] = None,
    held_out: Annotated[
        float | None, typer.Option(help="Part of the people held out of training (default: 0.02).")
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option(help="Images per shard (default: 1000).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of split and order (default: 0).")] = None,
    batch: Annotated[int | None, typer.Option(help="Images per batch (default: 32).")] = None,
    ray: Annotated[str, typer.Option(help="Ray cluster: local, auto or HOST:PORT.")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Local processes (default: one per processor).")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete an existing dataset, and start again.")
    ] = False,
    keep_work: Annotated[
        bool,
        typer.Option("--keep-work", help="Keep intermediate results, to add sources later."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Filter, caption, group and crop images, and write shards with an index.

    An interrupted command continues when it is run again.
    """
    passed: dict[str, Any] = {
        name: value.value if isinstance(value, Enum) else value
        for name, value in locals().items()
        if value is not None
    }
    from dataclasses import asdict

    from openpulid.data.prepare import Resources, prepare_dataset
    from openpulid.errors import OptionError

    if ray != "local" and workers is not None:
        raise OptionError("--workers is for this machine: leave it out with --ray.")
    summary = prepare_dataset(
        sources,
        out,
        _choose_options(passed),
        Resources(ray, workers),
        is_fresh=fresh,
        keep_work=keep_work,
        log=print_nothing if as_json else print_status,
    )
    print_json(asdict(summary))


@data.command()
def report(
    dataset: Annotated[Path, typer.Argument(help="Directory of the dataset.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Page to write (default: in DATASET).")
    ] = None,
) -> None:
    """Write a page with counts, histograms, examples of what was dropped, captions and people."""
    from openpulid.cli.options import print_path
    from openpulid.data.report import write_report

    print_path(write_report(dataset, out or dataset / "report.html"))


def _choose_options(passed: dict[str, Any]) -> Any:
    """Return the options of a dataset from those of the command line."""
    from dataclasses import fields, replace

    from openpulid.data.options import MINI_FACES, MINI_OPTIONS, Filters, PrepareOptions

    options = MINI_OPTIONS if passed["faces"] == MINI_FACES else PrepareOptions()
    names = {field.name for field in fields(Filters)}
    filters = replace(options.filters, **{name: passed[name] for name in names & passed.keys()})
    others = {field.name for field in fields(PrepareOptions)} - {"filters"}
    return replace(
        options, filters=filters, **{name: passed[name] for name in others & passed.keys()}
    )
