"""A page about a dataset: what was dropped and why, histograms, captions and people."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from openpulid.data.examples import list_examples
from openpulid.data.index import DatasetInfo, read_index, read_info
from openpulid.data.records import DECISIONS, DUPLICATE, KEPT, ImageRecord
from openpulid.errors import TrainingError
from openpulid.io.files import write_bytes
from openpulid.io.tar_members import TarMember

SIDE = 144
"""Longer side of the images on the page in pixels."""
NUM_CAPTIONS = 24
NUM_PEOPLE = 12
NUM_IMAGES = 10
"""Images of a person on the page."""

HISTOGRAMS = {
    "face_size": "face in pixels",
    "score": "confidence of the detector",
    "sharpness": "sharpness",
    "yaw": "yaw in degrees",
    "pitch": "pitch in degrees",
    "roll": "roll in degrees",
    "occlusion": "hidden part of the face",
    "side": "shorter side of the image in pixels",
}
LIMITS = {
    "face_size": "min_face",
    "score": "min_score",
    "sharpness": "min_sharpness",
    "yaw": "max_yaw",
    "pitch": "max_pitch",
    "roll": "max_roll",
    "occlusion": "max_occlusion",
}
"""Thresholds that are drawn into a histogram."""

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
h2 { margin-top: 2.5rem } h3 { margin-bottom: .3rem; font-weight: 600 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 15px }
th { font-weight: normal; opacity: .65; text-align: left }
td, th { padding: .2rem .7rem .2rem 0; vertical-align: top } td.number { text-align: right }
.bar { background: #4a7fb5; height: .8rem; min-width: 1px; margin-top: .35rem }
.wide { overflow-x: auto } .plot { width: 100%; max-width: 70rem; background: #fff }
.images { display: flex; flex-wrap: wrap; gap: .4rem } .images img { height: 7rem; display: block }
.pair { display: flex; margin-right: 1rem }
.captions { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem }
.captions div { display: flex; gap: .7rem; font-size: 14px; line-height: 1.35 }
.captions img { height: 7rem } .note { opacity: .65 } mark { padding: 0 .15em }
"""


def write_report(dataset: Path, path: Path) -> Path:
    """Write the page.

    Raises:
        TrainingError: the folder is no complete dataset, or a shard is missing.
        OutputError: the file cannot be written.
    """
    records, info = read_index(dataset), read_info(dataset)
    return write_bytes(path, format_page(dataset, records, info).encode("utf-8", "replace"))


def format_page(dataset: Path, records: Sequence[ImageRecord], info: DatasetInfo) -> str:
    """Format one HTML page with all images embedded."""
    kept = [record for record in records if record.is_kept]
    people: dict[str, list[ImageRecord]] = {}
    for record in kept:
        people.setdefault(record.person, []).append(record)
    splits = Counter(record.split for record in kept)
    name = html.escape(dataset.resolve().name)
    summary = (
        f"{len(kept):,} of {len(records):,} images are kept. They show {len(people):,} people: "
        + ", ".join(f"{count:,} images in {split}" for split, count in sorted(splits.items()))
        + f", in {len({record.file for record in kept}):,} shards."
    )
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{name}</title><style>{STYLE}</style><h1>{name}</h1><p>{summary}</p>",
        "<h2>Decisions</h2>",
        _format_decisions(records),
        "<h2>Measurements</h2>",
        _format_histograms(records, info),
        "<h2>Dropped images</h2>",
        _format_dropped(dataset, records),
        "<h2>Captions</h2>",
        _format_captions(dataset, kept, info),
        "<h2>People</h2>",
        _format_people(dataset, people),
        "<h2>Options</h2>",
        _format_options(info),
    ]
    return "\n".join(parts) + "</html>\n"


def _format_decisions(records: Sequence[ImageRecord]) -> str:
    counts = Counter(record.decision for record in records)
    rows = []
    for decision, meaning in DECISIONS.items():
        count = counts[decision]
        share = count / max(len(records), 1)
        bar = f'<div class="bar" style="width: {20 * share:.2f}rem"></div>'
        rows.append(
            f'<tr><td>{decision}</td><td>{meaning}</td><td class="number">{count:,}</td>'
            f'<td class="number">{share:.1%}</td>'
            f"<td>{bar if count else ''}</td></tr>"
        )
    return (
        '<div class="wide"><table><tr><th>decision</th><th>meaning</th><th>images</th>'
        f"<th>part</th><th></th></tr>{''.join(rows)}</table></div>"
        '<p class="note">The checks run in this order; an image counts for the first that it '
        "does not pass.</p>"
    )


def _format_histograms(records: Sequence[ImageRecord], info: DatasetInfo) -> str:
    """Plot the measurements of kept and of dropped images, with the thresholds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained", dpi=110)
    for axes, (name, title) in zip(figure.subplots(2, 4).flat, HISTOGRAMS.items(), strict=True):
        limit = LIMITS.get(name)
        threshold = None if limit is None else getattr(info.options.filters, limit)
        _draw_histogram(axes, records, name, threshold)
        axes.set_title(title, fontsize=10)
        axes.tick_params(labelsize=8)
    content = BytesIO()
    figure.savefig(content)
    return (
        f'<div class="wide"><img class="plot" alt="histograms" src="{_data_url(content, "png")}">'
        '</div><p class="note">Blue: kept. Orange: dropped. Red lines are the thresholds. The '
        "last bin also holds the largest hundredth.</p>"
    )


def _draw_histogram(
    axes: Any, records: Sequence[ImageRecord], name: str, threshold: float | None
) -> None:
    """Draw the histogram of a measurement with its threshold, for angles on both sides of zero."""
    kept, dropped = (
        np.array(
            [
                value
                for record in records
                if record.is_kept == is_kept and (value := _measure(record, name)) is not None
            ],
            float,
        )
        for is_kept in (True, False)
    )
    values = np.concatenate([kept, dropped])
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = float(values.min()), float(np.quantile(values, 0.99))
    if high <= low:
        low, high = low - 0.5, low + 0.5
    bins = np.linspace(low, high, 31)
    clipped = [group[np.isfinite(group)].clip(low, bins[-1]) for group in (kept, dropped)]
    axes.hist(clipped, bins, stacked=True, color=["#4a7fb5", "#e0a458"])
    if threshold is not None:
        for value in (threshold, -threshold):
            if low <= value <= bins[-1]:
                axes.axvline(value, color="#b03030", linewidth=1)


def _measure(record: ImageRecord, name: str) -> float | None:
    if name == "side":
        return min(record.width, record.height) or None
    value: float | None = getattr(record, name)
    return value


def _format_dropped(dataset: Path, records: Sequence[ImageRecord]) -> str:
    parts = []
    counts = Counter(record.decision for record in records)
    by_key = {record.key: record for record in records}
    by_name = {record.name: record for record in records if record.is_kept}
    for decision, meaning in DECISIONS.items():
        if decision == KEPT or not counts[decision]:
            continue
        parts.append(f"<h3>{decision}: {meaning} ({counts[decision]:,})</h3>")
        images = []
        for path in list_examples(dataset, decision):
            record = by_key.get(path.stem)
            if record is None:
                continue
            images.append(_format_image(Image.open(path), _describe(record)))
            if decision == DUPLICATE and record.duplicate_of in by_name:
                original = by_name[record.duplicate_of]
                images.append(
                    _format_image(_open_crop(dataset, original), "the image that is kept")
                )
        if images:
            parts.append(f'<div class="images">{"".join(images)}</div>')
        else:
            errors = Counter(record.error for record in records if record.decision == decision)
            lines = [f"<li>{html.escape(text)}: {n:,}</li>" for text, n in errors.most_common(8)]
            parts.append(f"<ul>{''.join(lines)}</ul>")
    return "".join(parts) or "<p>No image was dropped.</p>"


def _describe(record: ImageRecord) -> str:
    """Describe an image for its tooltip."""
    values = [
        f"{name} {getattr(record, name):.3g}"
        for name in ("face_size", "score", "sharpness", "yaw", "pitch", "roll", "occlusion")
        if getattr(record, name) is not None
    ]
    return ", ".join([record.name, f"{record.width} x {record.height}", *values])


def _format_captions(dataset: Path, kept: Sequence[ImageRecord], info: DatasetInfo) -> str:
    sources = Counter(record.captioner or "given" for record in kept)
    words = Counter(word.lower() for record in kept for word in record.identity_words)
    lengths = [len(record.caption.split()) for record in kept] or [0]
    text = ", ".join(f"{count:,} {name}" for name, count in sources.most_common())
    head = [f"<p>{html.escape(text)}; median length {np.median(lengths):.0f} words.</p>"]
    if words:
        listed = ", ".join(f"{word} ({count:,})" for word, count in words.most_common(30))
        verb = "removed" if info.options.identity_words == "remove" else "flagged"
        head.append(f"<p>Identity words, {verb}: {html.escape(listed)}.</p>")
    cells = []
    chosen = np.random.default_rng(0).permutation(len(kept))[:NUM_CAPTIONS]
    for index in chosen:
        record = kept[index]
        image = _format_image(_open_crop(dataset, record), record.name)
        marks = "".join(f" <mark>{html.escape(word)}</mark>" for word in record.identity_words)
        cells.append(f"<div>{image}<span>{html.escape(record.caption)}{marks}</span></div>")
    return f'{"".join(head)}<div class="captions">{"".join(cells)}</div>'


def _format_people(dataset: Path, people: dict[str, list[ImageRecord]]) -> str:
    sizes = Counter(len(group) for group in people.values())
    rows = "".join(
        f'<tr><td class="number">{size}</td><td class="number">{count:,}</td></tr>'
        for size, count in sorted(sizes.items())[:20]
    )
    parts = [
        f"<table><tr><th>images of a person</th><th>people</th></tr>{rows}</table>"
        f'<p class="note">At most {max(sizes, default=0)} images of one person.</p>'
    ]
    several = sorted(person for person, group in people.items() if len(group) > 1)
    for index in np.random.default_rng(0).permutation(len(several))[:NUM_PEOPLE]:
        group = people[several[index]]
        images = [
            _format_image(_open_crop(dataset, record), record.name) for record in group[:NUM_IMAGES]
        ]
        title = f"{several[index]}, {group[0].split}, {len(group)} images"
        parts.append(f'<h3>{title}</h3><div class="images">{"".join(images)}</div>')
    return "".join(parts)


def _format_options(info: DatasetInfo) -> str:
    data = info.options.to_json()
    filters = data.pop("filters")
    rows = [
        f"<tr><td>{name}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in {**filters, **data, "openpulid": info.version}.items()
    ]
    return f"<table>{''.join(rows)}</table>"


def _open_crop(dataset: Path, record: ImageRecord) -> Image.Image:
    try:
        content = TarMember(dataset / record.file, record.offset, record.size).read()
    except OSError as error:
        raise TrainingError(
            f"{dataset / record.file} cannot be read ({error}); prepare the dataset again."
        ) from None
    return Image.open(BytesIO(content))


def _format_image(image: Image.Image, title: str) -> str:
    image = image.convert("RGB")
    image.thumbnail((2 * SIDE, 2 * SIDE))
    content = BytesIO()
    image.save(content, "JPEG", quality=85)
    text = html.escape(title, quote=True)
    return f'<img alt="" title="{text}" src="{_data_url(content, "jpeg")}">'


def _data_url(content: BytesIO, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
