"""The report of a run: its tables, plot and sample images, and an HTML page with all of them."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

from PIL import Image

from openpulid.bench.plot import draw_plot
from openpulid.bench.run_dir import Run, SampleKey
from openpulid.bench.table import (
    ATTRIBUTES_TITLE,
    EQUAL_SIMILARITY_TITLE,
    ResultTable,
    TextTable,
)
from openpulid.io.files import write_bytes
from openpulid.io.image_grid import labeled_grid
from openpulid.io.images import open_image
from openpulid.io.metadata import encode_image, save_image
from openpulid.io.xmp import DigitalSourceType

PAGE_PEOPLE = 4  # number of subjects on the page, which has all images in it
GRID_PEOPLE = 6  # number of subjects in faces.jpg
MAX_IMAGE_SIDE = 256  # pixels of an image on the page, which is displayed at half this size

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #202024; background: #faf9f6; }
body { margin: 2rem auto; max-width: 84rem; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } h2 { margin-top: 2.5rem }
th { font-weight: normal; color: #78766f; text-align: left }
td, th { padding: .25rem .6rem; vertical-align: top }
.numbers { font-size: 14px } .numbers td { border-top: 1px solid #dcd9d0 }
.numbers td, .numbers th { white-space: nowrap }
.wide { overflow-x: auto } summary { font-size: 1.2em; margin: 1rem 0; cursor: pointer }
.plot { max-width: 46rem; width: 100%; margin: 1.5rem 0 }
.faces img { width: 8rem; display: block } .prompt { max-width: 14rem }
"""


def write_report(run: Run) -> list[Path]:
    """Write report.md, report.json, report.html, report.png and faces.jpg into the run directory.

    Returns:
        The paths of the files. There is no report.png without the metrics of the plot.
    """
    table = ResultTable(run)
    plot = draw_plot(table.rows)
    texts = {
        "report.md": table.to_markdown(),
        "report.json": json.dumps(table.to_json(), indent=1) + "\n",
        "report.html": format_page(table, plot),
    }
    for name, text in texts.items():
        write_bytes(run.path / name, text.encode("utf-8", "backslashreplace"))
    names = list(texts)
    if plot is not None:
        save_image(plot, run.path / "report.png", source_type=None)
        names.append("report.png")
    save_image(draw_faces(run), run.path / "faces.jpg", source_type=DigitalSourceType.EDITED)
    names.append("faces.jpg")
    return [run.path / name for name in names]


def draw_faces(run: Run, side: int = 176) -> Image.Image:
    """Draw one subject per row: its reference image and the image of every method.

    All methods of a row have the same prompt and seed; methods at an extra scale are left out.
    """
    suite = run.suite
    methods = _list_methods(run)
    rows = []
    for index, person in enumerate(run.people[:GRID_PEOPLE]):
        prompts = suite.prompts_of(person)
        prompt = prompts[index % len(prompts)]
        images: list[Image.Image] = [open_image(run.portrait(person))]
        for method in methods:
            path = run.images.get(SampleKey(method, person, prompt, run.seeds(person)[0]))
            images.append(open_image(path) if path else Image.new("RGB", (8, 8), "gray"))
        rows.append((suite.prompts[prompt].text, [_crop_square(image) for image in images]))
    title = f"{suite.name}: one subject per row"
    return labeled_grid(title, ["reference", *methods], rows, side)


def _list_methods(run: Run) -> list[str]:
    """Return the methods of a run without their rows at extra scales."""
    return [name for name in run.methods if "@" not in name]


def _crop_square(image: Image.Image) -> Image.Image:
    """Crop the center square."""
    side = min(image.size)
    left = (image.width - side) // 2
    top = (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def format_page(table: ResultTable, plot: Image.Image | None) -> str:
    """Format one HTML page with all images embedded."""
    run = table.run
    name = html.escape(run.suite.name)
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">',
        f"<title>{name}</title><style>{STYLE}</style>",
        f"<h1>{name}</h1>",
        f"<p>{html.escape(table.summary())}</p>",
        _format_table(table.overview()),
    ]
    parts += [f"<p>{html.escape(note)}</p>" for note in table.notes()]
    if plot is not None:
        parts.append(
            f'<img class="plot" alt="identity against preservation" src="{_data_url(plot, None)}">'
        )
    if table.comparison is not None:
        parts.append(f"<h2>{EQUAL_SIMILARITY_TITLE}</h2>")
        if differences := table.differences():
            parts.append(f"<p>{html.escape(table.describe_differences())}</p>")
            parts.append(_format_table(differences))
        parts += [f"<p>{html.escape(note)}</p>" for note in table.comparison.notes]
    if attributes := table.attributes():  # a long table; collapsed, so that the images come first
        parts.append(
            f"<details><summary>{ATTRIBUTES_TITLE}</summary>{_format_table(attributes)}</details>"
        )
    for source, published in table.published().items():
        parts += [f"<h2>Published: {html.escape(source)}</h2>", _format_table(published)]
    parts += [_format_person(run, person) for person in run.people[:PAGE_PEOPLE]]
    return "\n".join(parts) + "</html>\n"


def _format_table(table: TextTable) -> str:
    header = "".join(f"<th>{html.escape(title)}</th>" for title in table.header)
    rows = [f"<tr>{header}</tr>"]
    for row in table.rows:
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="wide"><table class="numbers">{"".join(rows)}</table></div>'


def _format_person(run: Run, person: str) -> str:
    """Format the images of a subject: one row per prompt, first seed, one column per method.

    Methods at an extra scale are left out.
    """
    methods = _list_methods(run)
    header = "".join(f"<th>{html.escape(title)}</th>" for title in ("prompt", *methods))
    rows = [f"<tr>{header}</tr>"]
    for index in run.suite.prompts_of(person):
        cells = [f'<td class="prompt">{html.escape(run.suite.prompts[index].text)}</td>']
        for method in methods:
            key = SampleKey(method, person, index, run.seeds(person)[0])
            cells.append(_format_image(run, key))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    portrait = _embed(open_image(run.portrait(person)), None)
    return (
        f"<h2>{html.escape(person)}</h2>"
        f'<p><img style="width: 8rem" alt="reference image" src="{portrait}"> reference image</p>'
        f'<div class="wide"><table class="faces">{"".join(rows)}</table></div>'
    )


def _format_image(run: Run, key: SampleKey) -> str:
    path = run.images.get(key)
    if path is None:
        return "<td>missing</td>"
    source = _embed(open_image(path), DigitalSourceType.GENERATED)
    return f'<td><img alt="{html.escape(key.method)}" src="{source}"></td>'


def _embed(image: Image.Image, source_type: DigitalSourceType | None) -> str:
    """Return an image as a data URL; large images are shrunk, to keep the page small."""
    if max(image.size) <= MAX_IMAGE_SIDE:
        return _data_url(image, source_type)
    image = image.convert("RGB")
    image.thumbnail((MAX_IMAGE_SIDE, MAX_IMAGE_SIDE))
    return _data_url(image, source_type, "jpeg")


def _data_url(image: Image.Image, source_type: DigitalSourceType | None, kind: str = "png") -> str:
    content = encode_image(image.convert("RGB"), f".{kind}", source_type=source_type)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
