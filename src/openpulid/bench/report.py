"""What a person looks at: identity against purity, and one HTML page with every method's images side by side."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

from PIL import Image

from openpulid.bench import table
from openpulid.bench.cells import Cell, Folder

PURITY = ("outside_face", "clip_i")
"""The first of these that was measured is the plot's other axis."""
SHOWN_PEOPLE = 8
WIDEST = 900  # pixels of a picture on the page

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #202024; background: #faf9f6; margin: 2rem auto; max-width: 76rem }
body { padding: 0 1rem } table { border-collapse: collapse; font-variant-numeric: tabular-nums } h2 { margin-top: 2.5rem }
th { font-weight: normal; color: #78766f; text-align: left } td, th { padding: .25rem .6rem; vertical-align: top }
.numbers td { border-top: 1px solid #dcd9d0; white-space: nowrap } .wide { overflow-x: auto }
.plot { max-width: 46rem; width: 100%; margin: 1.5rem 0 } .faces img { width: 8rem; display: block } .words { max-width: 14rem }
"""


def write(folder: Folder) -> list[Path]:
    """report.md, report.json, report.png and report.html in the run's folder."""
    made = {"report.md": table.markdown(folder), "report.json": json.dumps(table.as_json(folder), indent=1) + "\n"}
    drawn = plot(folder)
    made["report.html"] = page(folder, drawn)
    for name, text in made.items():
        (folder.path / name).write_text(text, "utf-8")
    if drawn is not None:
        drawn.save(folder.path / "report.png")
    return [folder.path / name for name in (*made, *(["report.png"] if drawn is not None else []))]


def plot(folder: Folder) -> Image.Image | None:
    """Identity against purity, a point for each method with its intervals; up and right is better. None where one of the two
    was not measured."""
    from matplotlib.figure import Figure

    rows = table.rows(folder)
    purity = next((name for name in PURITY if any(name in row.columns for row in rows)), "")
    points = [row for row in rows if purity in row.columns and "face_sim" in row.columns]
    if not points:
        return None
    figure = Figure(figsize=(6.4, 4.4), layout="constrained", dpi=140)
    axes = figure.subplots()
    for row in points:
        x, y = row.columns[purity], row.columns["face_sim"]
        across, along = ([[i.mean - i.low], [i.high - i.mean]] for i in (x, y))
        axes.errorbar(x.mean, y.mean, xerr=across, yerr=along, marker="o", capsize=2)
        axes.annotate(row.method, (x.mean, y.mean), textcoords="offset points", xytext=(6, 6), fontsize=9)
    if not table.HIGHER[purity]:
        axes.invert_xaxis()
    axes.set_xlabel("changed outside the face" if purity == "outside_face" else "CLIP-I, with against without identity")
    axes.set_ylabel("face similarity")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file)


def page(folder: Folder, drawn: Image.Image | None) -> str:
    """One HTML file with everything inside: it can be mailed."""
    facts = folder.facts()
    name = html.escape(facts["suite"]["name"])
    parts = [f"<h1>{name}</h1>", f"<p>{html.escape(table.summary(folder))}</p>", _table(table.told(folder))]
    parts += [f"<p>{html.escape(sentence)}</p>" for sentence in table.missing(folder)]
    if drawn is not None:
        parts.append(f'<img class="plot" alt="identity against purity" src="{_data(drawn)}">')
    for source, lines in table.published(folder).items():
        parts += [f"<h2>Published: {html.escape(source)}</h2>", _table(lines)]
    parts += [_person(folder, person) for person in facts["people"][:SHOWN_PEOPLE]]
    head = f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>'
    return head + "\n" + "\n".join(parts) + "</html>\n"


def _table(lines: table.Lines) -> str:
    heads, rows = lines
    first = "".join(f"<th>{html.escape(head)}</th>" for head in heads)
    rest = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="numbers"><tr>{first}</tr>{rest}</table></div>'


def _person(folder: Folder, person: str) -> str:
    """A row for each prompt, the first seed through every method."""
    facts = folder.facts()
    suite, methods = facts["suite"], facts["methods"]
    heads = "".join(f"<th>{html.escape(text)}</th>" for text in ("prompt", *methods))
    rows = []
    for number, prompt in enumerate(suite["prompts"]):
        cells = [Cell(method, person, number, suite["seeds"][0]) for method in methods]
        rows.append(f'<tr><td class="words">{html.escape(prompt["text"])}</td>{"".join(_image(folder, c) for c in cells)}</tr>')
    portrait = Image.open(folder.path / "people" / f"{person}.png")
    given = f'<p><img style="width: 8rem" alt="the picture given" src="{_data(portrait)}"> the only picture given</p>'
    table_of = f'<div class="wide"><table class="faces"><tr>{heads}</tr>{"".join(rows)}</table></div>'
    return f"<h2>{html.escape(person)}</h2>{given}{table_of}"


def _image(folder: Folder, cell: Cell) -> str:
    if not folder.done(cell):
        return "<td>missing</td>"
    return f'<td><img alt="{html.escape(cell.method)}" src="{_data(Image.open(folder.image(cell)))}"></td>'


def _data(picture: Image.Image) -> str:
    """As text; large pictures smaller, a page must load."""
    picture = picture.convert("RGB")
    picture.thumbnail((WIDEST, WIDEST))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
