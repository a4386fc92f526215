"""What a person looks at: identity against purity, a picture of faces, and one HTML page with all images side by side."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from openpulid.bench import table
from openpulid.bench.run_dir import RunDir, SampleKey
from openpulid.io.image_grid import labeled_grid

PURITY = ("outside_face", "clip_i")
"""The first of these that was measured is the plot's other axis."""
SHOWN_PEOPLE = 8  # on the page; of the picture of faces the first six
WIDEST = 256  # pixels of a person's picture on the page, which shows it at half of that

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #202024; background: #faf9f6; margin: 2rem auto; max-width: 84rem }
body { padding: 0 1rem } table { border-collapse: collapse; font-variant-numeric: tabular-nums } h2 { margin-top: 2.5rem }
th { font-weight: normal; color: #78766f; text-align: left } td, th { padding: .25rem .6rem; vertical-align: top }
.numbers { font-size: 14px } .numbers td { border-top: 1px solid #dcd9d0 } .numbers td, .numbers th { white-space: nowrap }
.wide { overflow-x: auto } summary { font-size: 1.2em; margin: 1rem 0; cursor: pointer }
.plot { max-width: 46rem; width: 100%; margin: 1.5rem 0 } .faces img { width: 8rem; display: block } .words { max-width: 14rem }
"""


def write(folder: RunDir) -> list[Path]:
    """report.md, report.json, report.png, report.html and faces.jpg in the run's folder."""
    made = {
        "report.md": table.markdown(folder),
        "report.json": json.dumps(table.as_json(folder), indent=1) + "\n",
    }
    drawn = plot(folder)
    made["report.html"] = page(folder, drawn)
    for name, text in made.items():
        (folder.path / name).write_text(text, "utf-8")
    if drawn is not None:
        drawn.save(folder.path / "report.png")
    faces(folder).save(folder.path / "faces.jpg", quality=90)
    return [
        folder.path / name
        for name in (*made, *(["report.png"] if drawn is not None else []), "faces.jpg")
    ]


def plot(folder: RunDir) -> Image.Image | None:
    """Identity against purity, a point for each method with its intervals; up and right is better. None where one of the two
    was not measured."""
    from matplotlib.figure import Figure

    rows = table.rows(folder)
    purity = next((name for name in PURITY if any(name in row.columns for row in rows)), "")
    points = [row for row in rows if purity in row.columns and "face_sim" in row.columns]
    if not points:
        return None
    figure = Figure(figsize=(6.4, 4.4), layout="constrained", dpi=140, facecolor="#faf9f6")
    axes = figure.subplots()
    for curve in _curves(points):
        places = [(row.columns[purity], row.columns["face_sim"]) for row in curve]
        middles = [(x.mean, y.mean) for x, y in places]
        drawn = axes.plot(*zip(*middles, strict=True), marker="o")[0]
        for row, (x, y), middle in zip(curve, places, middles, strict=True):
            across, along = ([[i.mean - i.low], [i.high - i.mean]] for i in (x, y))
            axes.errorbar(
                *middle, xerr=across, yerr=along, color=drawn.get_color(), capsize=2, alpha=0.5
            )
            axes.annotate(row.method, middle, textcoords="offset points", xytext=(6, 6), fontsize=8)
    if not table.HIGHER[purity]:
        axes.invert_xaxis()
    axes.set_xlabel(
        "changed outside the face"
        if purity == "outside_face"
        else "CLIP-I, with against without identity"
    )
    axes.set_ylabel("face similarity")
    axes.set_title("up and right is better", fontsize=9, color="gray")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file)


def _curves(rows: Sequence[table.Row]) -> list[list[table.Row]]:
    """The rows of each method together, METHOD and METHOD@SCALE, from the smallest scale on."""
    curves: dict[str, list[table.Row]] = {}
    for row in sorted(rows, key=lambda row: row.scale):
        curves.setdefault(row.method.partition("@")[0], []).append(row)
    return list(curves.values())


def faces(folder: RunDir, people: int = 6, side: int = 176) -> Image.Image:
    """A person and a prompt in each row: the only picture given, then the same seed through every method at its own scale."""
    facts = folder.facts()
    suite, methods = facts["suite"], [name for name in facts["methods"] if "@" not in name]
    rows = []
    for number, person in enumerate(facts["people"][:people]):
        prompt = number % len(suite["prompts"])
        cells = [SampleKey(method, person, prompt, suite["seeds"][0]) for method in methods]
        images = [
            Image.open(folder.image(c)) if folder.done(c) else Image.new("RGB", (8, 8), "gray")
            for c in cells
        ]
        given = Image.open(folder.path / "people" / f"{person}.png")
        rows.append(
            (suite["prompts"][prompt]["text"], [_square(picture) for picture in (given, *images)])
        )
    return labeled_grid(f"{suite['name']}: one person in each row", ["given", *methods], rows, side)


def _square(picture: Image.Image) -> Image.Image:
    """Its middle."""
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    return picture.crop((left, top, left + side, top + side))


def page(folder: RunDir, drawn: Image.Image | None) -> str:
    """One HTML file with everything inside: it can be mailed."""
    facts = folder.facts()
    name = html.escape(facts["suite"]["name"])
    parts = [
        f"<h1>{name}</h1>",
        f"<p>{html.escape(table.summary(folder))}</p>",
        _table(table.told(folder)),
    ]
    parts += [
        f"<p>{html.escape(sentence)}</p>"
        for sentence in (*table.remarks(folder), *table.missing(folder))
    ]
    if drawn is not None:
        parts.append(f'<img class="plot" alt="identity against purity" src="{_data(drawn)}">')
    if attributes := table.asked(folder):
        parts.append(
            f"<details><summary>{table.ASKED}</summary>{_table(attributes)}</details>"
        )  # long: the images come first
    for source, lines in table.published(folder).items():
        parts += [f"<h2>Published: {html.escape(source)}</h2>", _table(lines)]
    parts += [_person(folder, person) for person in facts["people"][:SHOWN_PEOPLE]]
    head = f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    return head + "\n" + "\n".join(parts) + "</html>\n"


def _table(lines: table.Lines) -> str:
    heads, rows = lines
    first = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    rest = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table class="numbers"><tr>{first}</tr>{rest}</table></div>'


def _person(folder: RunDir, person: str) -> str:
    """A row for each prompt, the first seed through every method."""
    facts = folder.facts()
    suite, methods = facts["suite"], facts["methods"]
    heads = "".join(f"<th>{html.escape(text)}</th>" for text in ("prompt", *methods))
    rows = []
    for number, prompt in enumerate(suite["prompts"]):
        cells = [SampleKey(method, person, number, suite["seeds"][0]) for method in methods]
        rows.append(
            f'<tr><td class="words">{html.escape(prompt["text"])}</td>{"".join(_image(folder, c) for c in cells)}</tr>'
        )
    portrait = Image.open(folder.path / "people" / f"{person}.png")
    given = f'<p><img style="width: 8rem" alt="the picture given" src="{_shown(portrait)}"> the only picture given</p>'
    table_of = (
        f'<div class="wide"><table class="faces"><tr>{heads}</tr>{"".join(rows)}</table></div>'
    )
    return f"<h2>{html.escape(person)}</h2>{given}{table_of}"


def _image(folder: RunDir, cell: SampleKey) -> str:
    if not folder.done(cell):
        return "<td>missing</td>"
    return f'<td><img alt="{html.escape(cell.method)}" src="{_shown(Image.open(folder.image(cell)))}"></td>'


def _shown(picture: Image.Image) -> str:
    """As text; large pictures smaller, a page must load."""
    if max(picture.size) <= WIDEST:
        return _data(picture)
    picture = picture.convert("RGB")
    picture.thumbnail((WIDEST, WIDEST))
    return _data(picture, "jpeg", quality=85)


def _data(picture: Image.Image, kind: str = "png", **options: int) -> str:
    """As text, of its own size."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
