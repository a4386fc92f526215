"""The table of a run: from the records of its cells to JSON and Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from openpulid.bench.metrics import COLUMNS, FID, LIKENESS, Interval, bootstrap
from openpulid.bench.run_dir import BASE, RunDir, SampleKey
from openpulid.bench.score import counts, known_sets, sample_keys

COSTS = {"seconds": False, "steps_per_second": True, "photo_to_image": False, "memory": False}
"""Of an image: seconds; denoising steps in each, reading and decoding counted in; seconds with knowing the person first; GiB at
most, with all methods of the run loaded."""
HIGHER = {**{measure.name: measure.higher for measure in COLUMNS}, **COSTS}
"""The columns in their order, and whether more is better."""

Known = Sequence[tuple[SampleKey, dict[str, Any] | None]]
"""All cells of a method, in the order of every method, with what is known of each."""


@dataclass(frozen=True)
class Row:
    """One method: its columns, and how many of its images there are and are not."""

    method: str
    columns: Mapping[str, Interval]
    made: int
    failed: int
    ratio: float  # of its seconds to the base's
    scale: float  # that the identity was shown with
    errors: Sequence[str]


def rows(folder: RunDir) -> list[Row]:
    """Every method of a run, from the records of its cells."""
    facts = folder.facts()
    sets = known_sets(folder)
    records = {
        m: [(cell, folder.record(cell)) for cell in sample_keys(facts, m)] for m in facts["methods"]
    }
    made = []
    for method, known in records.items():
        columns = {name: _column(facts, known, name) for name in HIGHER}
        whole = {name: value for name, value in sets.get(method, {}).items() if value is not None}
        columns |= {name: Interval(value, math.nan, math.nan) for name, value in whole.items()}
        good = [record for _, record in known if record and record["status"] == "done"]
        errors = sorted(
            {record["error"] for _, record in known if record and record["status"] == "failed"}
        )
        ratio = _ratio(known, records[BASE])
        told = {name: value for name, value in columns.items() if not math.isnan(value.mean)}
        scale = good[0]["configuration"].get("scale", 0.0) if good else math.nan
        made.append(Row(method, told, len(good), len(known) - len(good), ratio, scale, errors))
    return made


def _column(facts: Mapping[str, Any], known: Known, name: str) -> Interval:
    values, people = [], []
    for cell, record in known:
        if (
            record is None
            or record["status"] != "done"
            or not counts(facts, cell.prompt, name in LIKENESS)
        ):
            continue
        value = _cost(record, name) if name in COSTS else record.get("metrics", {}).get(name)
        values.append(math.nan if value is None else value)
        people.append(facts["people"].index(cell.person))
    return bootstrap(torch.tensor(values), torch.tensor(people))


def _cost(record: Mapping[str, Any], name: str) -> float | None:
    seconds: float = record["seconds"]
    if name == "steps_per_second":
        return record["configuration"]["steps"] / seconds
    if name == "photo_to_image":
        return record["identify_seconds"] + seconds
    return seconds if name == "seconds" else record["memory"]


def _ratio(known: Known, base: Known) -> float:
    """Of the seconds of an image to the base's, over those images whose base was made in the same start of the run on the same
    hardware; NaN where there are none. Medians: a machine that was busy for a while does not move them."""
    pairs = [
        (mine["seconds"], plain["seconds"])
        for (_, mine), (_, plain) in zip(known, base, strict=True)
        if mine
        and plain
        and mine["status"] == plain["status"] == "done"
        and _made_in(mine) == _made_in(plain)
    ]
    own, others = ([pair[side] for pair in pairs] for side in (0, 1))
    return statistics.median(own) / statistics.median(others) if pairs else math.nan


def _made_in(record: Mapping[str, Any]) -> tuple[str | None, str]:
    """The start of the run, which records written before do not name, and the hardware."""
    return record.get("start"), record["hardware"]


def as_json(folder: RunDir) -> dict[str, Any]:
    """The table for programs."""
    suite = folder.facts()["suite"]
    table = []
    for row in rows(folder):
        means = {name: round(value.mean, 5) for name, value in row.columns.items()}
        ranges = {
            n: [round(i.low, 5), round(i.high, 5)]
            for n, i in row.columns.items()
            if not math.isnan(i.low)
        }
        facts = {
            "method": row.method,
            "images": row.made,
            "failed": row.failed,
            "ratio": _finite(row.ratio),
        }
        table.append({**facts, **means, "intervals": ranges})
    return {"suite": suite["name"], "rows": table}


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


ASKED = "Share of the images that show what their prompt asks for"

Lines = tuple[list[str], list[list[str]]]
"""Heads and rows of a table in words."""


def told(folder: RunDir) -> Lines:
    """The table in words: a method in each row. Times of a processor are told as ratios alone: it is somebody's own."""
    table, first = rows(folder), _first(folder)
    hidden = COSTS if first is None or first["hardware"].startswith("cpu") else ()
    names = [
        name for name in HIGHER if name not in hidden and any(name in row.columns for row in table)
    ]
    heads = [
        "method",
        "images",
        *(f"{name} {'↑' if HIGHER[name] else '↓'}" for name in names),
        "time to base",
    ]
    lines = []
    for row in table:
        ratio = "" if math.isnan(row.ratio) else f"{row.ratio:.2f}"
        lines.append(
            [row.method, str(row.made), *(_told(row.columns.get(name)) for name in names), ratio]
        )
    return heads, lines


def asked(folder: RunDir) -> Lines | None:
    """What prompts ask for and is seen, a value of an attribute in each row, and how many images of each method were asked
    for it: which of them it is that an identity disturbs. None where nobody read them."""
    facts = folder.facts()
    methods, prompts = facts["methods"], facts["suite"]["prompts"]
    seen: dict[tuple[str, str], dict[str, list[bool]]] = {}
    for method in methods:
        for cell in sample_keys(facts, method):
            for name, told in (folder.record(cell) or {}).get("asked", {}).items():
                value = prompts[cell.prompt]["wanted"][name]
                seen.setdefault((name, value), {}).setdefault(method, []).append(told)
    lines = [
        [
            f"{name}: {value}".replace("_", " "),
            str(max(map(len, known.values()))),
            *(
                f"{statistics.mean(known[method]):.3f}" if method in known else ""
                for method in methods
            ),
        ]
        for (name, value), known in sorted(seen.items())
    ]
    return (["asked for", "images", *methods], lines) if lines else None


def remarks(folder: RunDir) -> list[str]:
    """A sentence for a column whose name alone would mislead."""
    if all(values.get(FID.name) is None for values in known_sets(folder).values()):
        return []
    features = "CLIP" if folder.facts()["suite"]["preset"].startswith("mini") else "Inception"
    return [
        f"fid is the Frechet distance between the images with the person and those without, by features of {features}; "
        "PuLID's published one is against images that are not disclosed, so it is another measure."
    ]


def missing(folder: RunDir) -> list[str]:
    """A sentence for each method that lacks images, with the reasons."""
    return [
        f"{row.method}: {row.failed} images are missing ({'; '.join(row.errors) or 'not made yet'})."
        for row in rows(folder)
        if row.failed
    ]


def published(folder: RunDir) -> dict[str, Lines]:
    """Source -> the numbers that others have published for this suite."""
    found = {}
    for source, methods in folder.facts()["suite"]["published"].items():
        names = list(dict.fromkeys(name for values in methods.values() for name in values))
        lines = [
            [method, *(str(values.get(name, "")) for name in names)]
            for method, values in methods.items()
        ]
        found[source] = (["method", *names], lines)
    return found


def summary(folder: RunDir) -> str:
    """How much was measured, and where."""
    facts = folder.facts()
    suite = facts["suite"]
    first = _first(folder)
    where = f" On {first['hardware']} with {_versions(first['versions'])}." if first else ""
    counted = f"{len(facts['people'])} people, {len(suite['prompts'])} prompts, {len(suite['seeds'])} seeds"
    return (
        f"{suite['about']} {counted}, preset {suite['preset']}; 95% intervals over people.{where}"
    )


def _first(folder: RunDir) -> dict[str, Any] | None:
    """The first record of the base there is."""
    return next(
        (record for cell in sample_keys(folder.facts(), BASE) if (record := folder.record(cell))),
        None,
    )


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def markdown(folder: RunDir) -> str:
    """The table, what is missing, and the published numbers beside it."""
    parts = [f"# {folder.facts()['suite']['name']}", summary(folder), _markdown(told(folder))]
    parts += [*remarks(folder), *missing(folder)]
    if attributes := asked(folder):
        parts += [f"## {ASKED}", _markdown(attributes)]
    for source, lines in published(folder).items():
        parts += [f"## Published: {source}", _markdown(lines)]
    return "\n\n".join(parts) + "\n"


def _markdown(lines: Lines) -> str:
    heads, rows = lines
    every = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in every)


def _told(interval: Interval | None) -> str:
    if interval is None:
        return ""
    digits = 3 if abs(interval.mean) < 10 else 1
    if math.isnan(interval.low):
        return f"{interval.mean:.{digits}f}"
    return f"{interval.mean:.{digits}f} ± {(interval.high - interval.low) / 2:.{digits}f}"
