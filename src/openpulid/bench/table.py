"""The result table of a run, as JSON and as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from openpulid.bench.equal_similarity import (
    PRESERVATION,
    PairedDifference,
    compare_at_equal_similarity,
    has_scale,
)
from openpulid.bench.metrics import COLUMNS, FID, IDENTITY_METRICS, Interval, bootstrap
from openpulid.bench.run_dir import BASE, Record, Run, SampleKey

COSTS = {"seconds": False, "steps_per_second": True, "photo_to_image": False, "memory": False}
"""Cost of an image -> whether more is better.

seconds; denoising steps per second, text encoding and decoding included; seconds including the
extraction of the identity; peak GiB with all methods of the run loaded.
"""
TIME_COSTS = ("seconds", "steps_per_second", "photo_to_image")
"""Costs that are compared with those of the base, so only images that are timed with it count."""
PERSON_COSTS = {"person_seconds": False, "person_kb": False}
"""Cost of a person -> whether more is better.

Median seconds to extract the identity, or to tune the method, of people whose images are timed with
the base; kilobytes that are stored of the person.
"""
ALL_COSTS = {**COSTS, **PERSON_COSTS}

HIGHER_IS_BETTER = {**{metric.name: metric.higher_is_better for metric in COLUMNS}, **ALL_COSTS}
"""All columns in their order, and whether more is better."""

EQUAL_SIMILARITY_TITLE = "At equal identity similarity"
ATTRIBUTES_TITLE = "Share of images that show a requested attribute"


@dataclass(frozen=True)
class Row:
    """The results of one method.

    Attributes:
        method: its name.
        columns: column -> mean over subjects, with interval.
        num_images: number of images.
        num_missing: number of images that failed or were not tried.
        time_ratio: generation time relative to the base; NaN if unknown.
        scale: identity scale; NaN without images, and for the base and methods that have none.
        errors: reasons of the failures.
    """

    method: str
    columns: Mapping[str, Interval]
    num_images: int = 0
    num_missing: int = 0
    time_ratio: float = math.nan
    scale: float = math.nan
    errors: Sequence[str] = ()


@dataclass(frozen=True)
class TextTable:
    """A table as text.

    Attributes:
        header: titles of the columns.
        rows: cells of each row.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON data."""
        return {"header": list(self.header), "rows": [list(row) for row in self.rows]}

    def to_markdown(self) -> str:
        """Format the table as Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def build_row(run: Run, method: str) -> Row:
    """Compute the results of a method from its records."""
    keys = run.keys(method)
    records = [record for key in keys if (record := run.records.get(key))]
    done = [record for record in records if record.is_done]
    timed = [record for record, _ in _timed_with_base(run, keys)]
    columns = {
        name: _aggregate(run, timed if name in TIME_COSTS else done, name)
        for name in HIGHER_IS_BETTER
        if name != "person_seconds"
    }
    columns["person_seconds"] = Interval(_person_seconds(timed))
    for name, value in run.method_metrics.get(method, {}).items():
        if value is not None:
            columns[name] = Interval(value)
    is_scaled = method != BASE and has_scale(method.partition("@")[0])
    return Row(
        method,
        {name: column for name, column in columns.items() if not math.isnan(column.mean)},
        num_images=len(done),
        num_missing=len(keys) - len(done),
        time_ratio=_time_ratio(run, keys),
        scale=done[0].configuration.get("scale", 0.0) if done and is_scaled else math.nan,
        errors=sorted({record.error for record in records if record.error}),
    )


def _aggregate(run: Run, records: Sequence[Record], name: str) -> Interval:
    """Compute the mean of a metric or cost over the subjects."""
    values = []
    subjects = []
    for record in records:
        if run.suite.is_scored(record.sample.prompt, identity=name in IDENTITY_METRICS):
            value = _cost(record, name) if name in ALL_COSTS else record.metrics.get(name)
            values.append(math.nan if value is None else value)
            subjects.append(run.people.index(record.sample.person))
    return bootstrap(torch.tensor(values), torch.tensor(subjects))


def _cost(record: Record, name: str) -> float | None:
    assert record.seconds is not None, "an image that was generated has a time"
    if not record.seconds:  # rounded to zero
        return None
    if name == "seconds":
        return record.seconds
    if name == "person_kb":
        return record.identity_bytes / 1000 if record.identity_bytes else None
    if name == "steps_per_second":
        steps: int = record.configuration["num_inference_steps"]
        return steps / record.seconds
    if name == "photo_to_image":
        return (record.identify_seconds or 0) + record.seconds
    return record.memory


def _person_seconds(records: Sequence[Record]) -> float:
    """Compute the median over people of the seconds that a person takes; NaN for the base."""
    seconds: dict[str, list[float]] = {}
    for record in records:
        if record.identify_seconds:
            seconds.setdefault(record.sample.person, []).append(record.identify_seconds)
    if not seconds:
        return math.nan
    return statistics.median(map(statistics.median, seconds.values()))


def _time_ratio(run: Run, keys: Sequence[SampleKey]) -> float:
    """Compute the ratio of a method's median seconds to the base's.

    Medians are not affected by a machine that is busy for a while.
    """
    pairs = _timed_with_base(run, keys)
    if not pairs:
        return math.nan
    seconds, base_seconds = zip(*((one.seconds, base.seconds) for one, base in pairs), strict=True)
    return statistics.median(seconds) / statistics.median(base_seconds)


def _timed_with_base(run: Run, keys: Sequence[SampleKey]) -> list[tuple[Record, Record]]:
    """Select the images of a method whose times are comparable, each with its base image.

    Both were generated in the same start of the command on the same hardware.
    """
    pairs = []
    for key in keys:
        record = run.records.get(key)
        base = run.records.get(key.with_method(BASE))
        if record is None or base is None or not record.seconds or not base.seconds:
            continue
        if (record.start, record.hardware) == (base.start, base.hardware):
            pairs.append((record, base))
    return pairs


class ResultTable:
    """The results of a run.

    Args:
        run: the run, whose records are aggregated once.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows = [build_row(run, method) for method in run.methods]
        self.comparison = compare_at_equal_similarity(run)

    def to_json(self) -> dict[str, Any]:
        """Return the table as JSON data."""
        rows = []
        for row in self.rows:
            means = {name: round(column.mean, 5) for name, column in row.columns.items()}
            intervals = {
                name: [round(column.low, 5), round(column.high, 5)]
                for name, column in row.columns.items()
                if not math.isnan(column.low)
            }
            rows.append(
                {
                    "method": row.method,
                    "scale": None if math.isnan(row.scale) else row.scale,
                    "images": row.num_images,
                    "failed": row.num_missing,
                    "ratio": None if math.isnan(row.time_ratio) else round(row.time_ratio, 4),
                    **means,
                    "intervals": intervals,
                }
            )
        attributes = self.attributes()
        return {
            "suite": self.run.suite.name,
            "rows": rows,
            "attributes": attributes and attributes.to_json(),
            "equal_similarity": self._comparison_to_json(),
        }

    def _comparison_to_json(self) -> dict[str, Any] | None:
        if self.comparison is None:
            return None
        rows = []
        for match in self.comparison.matches:
            differences = {}
            for name, difference in match.differences.items():
                interval = difference.interval
                differences[name] = {
                    "mean": round(interval.mean, 5),
                    "interval": None
                    if math.isnan(interval.low)
                    else [round(interval.low, 5), round(interval.high, 5)],
                    "better": difference.num_better,
                    "people": difference.num_people,
                }
            rows.append(
                {
                    "method": match.method,
                    "face_sim": round(match.face_sim, 5),
                    "scale": round(match.scale, 5),
                    "differences": differences,
                }
            )
        return {
            "reference": self.comparison.reference,
            "rows": rows,
            "notes": list(self.comparison.notes),
        }

    def overview(self) -> TextTable:
        """Return the table as text, one row per method.

        Times on a CPU are shown as ratios only: they say little about other machines.
        """
        base = self._first_base_record()
        is_cpu = base is None or base.hardware.startswith("cpu")
        names = [
            name
            for name in HIGHER_IS_BETTER
            if any(name in row.columns for row in self.rows) and not (is_cpu and name in COSTS)
        ]
        titles = [f"{name} {'↑' if HIGHER_IS_BETTER[name] else '↓'}" for name in names]
        rows = []
        for row in self.rows:
            cells = [_format_interval(row.columns.get(name)) for name in names]
            ratio = "" if math.isnan(row.time_ratio) else f"{row.time_ratio:.2f}"
            scale = "" if math.isnan(row.scale) else f"{row.scale:g}"
            rows.append([row.method, scale, str(row.num_images), *cells, ratio])
        return TextTable(["method", "scale", "images", *titles, "time to base"], rows)

    def differences(self) -> TextTable | None:
        """Return the comparison at equal similarity as text; None without a comparable row."""
        if self.comparison is None or not self.comparison.matches:
            return None
        matches = self.comparison.matches
        names = [
            name for name in PRESERVATION if any(name in match.differences for match in matches)
        ]
        rows = []
        for match in matches:
            cells = [_format_difference(match.differences.get(name)) for name in names]
            rows.append([match.method, f"{match.face_sim:.3f}", f"{match.scale:.2f}", *cells])
        titles = [f"{name} {'↑' if PRESERVATION[name] else '↓'}" for name in names]
        header = ["method", "face_sim", f"scale of {self.comparison.reference}", *titles]
        return TextTable(header, rows)

    def describe_differences(self) -> str:
        """Describe in one paragraph what the comparison at equal similarity shows."""
        assert self.comparison is not None
        reference = self.comparison.reference
        return (
            f"{reference} minus each method, at the scale where the mean face_sim of {reference} "
            "equals that of the method (linear between neighboring scales): the mean of the paired "
            f"differences per person, with 95% intervals over people, and for how many people "
            f"{reference} is better."
        )

    def attributes(self) -> TextTable | None:
        """Return, for each requested attribute value, the share of images that show it.

        None if no attributes were checked.
        """
        checks: dict[tuple[str, str], dict[str, list[bool]]] = {}
        for key, record in self.run.records.items():
            requested = self.run.suite.prompts[key.prompt].attributes
            for name, is_shown in (record.attributes or {}).items():
                if name not in requested:
                    continue
                by_method = checks.setdefault((name, requested[name]), {})
                by_method.setdefault(key.method, []).append(is_shown)
        if not checks:
            return None
        rows = []
        for (name, value), by_method in sorted(checks.items()):
            shares = [
                f"{statistics.mean(by_method[method]):.3f}" if method in by_method else ""
                for method in self.run.methods
            ]
            num_images = max(len(values) for values in by_method.values())
            rows.append([f"{name}: {value}".replace("_", " "), str(num_images), *shares])
        return TextTable(["attribute", "images", *self.run.methods], rows)

    def published(self) -> dict[str, TextTable]:
        """Return source -> published values for the suite."""
        tables = {}
        for source, methods in self.run.suite.published.items():
            names = list(dict.fromkeys(name for values in methods.values() for name in values))
            rows = []
            for method, values in methods.items():
                rows.append([method, *(str(values.get(name, "")) for name in names)])
            tables[source] = TextTable(["method", *names], rows)
        return tables

    def summary(self) -> str:
        """Describe in one paragraph what was measured, and where."""
        suite = self.run.suite
        counts = {"prompt": len(suite.prompts), "seed": len(suite.seeds)}
        scenes = ", ".join(f"{n} {name}{'s' if n != 1 else ''}" for name, n in counts.items())
        text = (
            f"{suite.about} {len(self.run.people)} people, {scenes} each, preset {suite.preset}; "
            "95% intervals over people."
        )
        if base := self._first_base_record():
            versions = ", ".join(f"{name} {number}" for name, number in base.versions.items())
            text += f" On {base.hardware} with {versions}."
        return text

    def notes(self) -> list[str]:
        """Return notes on columns that could be misread, and on missing images."""
        notes = []
        fids = [values.get(FID.name) for values in self.run.method_metrics.values()]
        if any(value is not None for value in fids):
            features = "CLIP" if self.run.suite.uses_miniature else "Inception"
            notes.append(
                "fid is the Frechet distance between the images with and without the identity, on "
                f"{features} features. PuLID's published FID uses an undisclosed set of reference "
                "images and cannot be compared with it."
            )
        if others := self._methods_of_other_bases():
            notes.append(
                f"{', '.join(others)}: some images are from other weights of the base model than "
                "the base's images that they are compared with; run the same `pulid bench run` "
                "with all methods again."
            )
        for row in self.rows:
            if row.num_missing:
                reasons = "; ".join(row.errors) or "not generated yet"
                notes.append(f"{row.method}: {row.num_missing} images are missing ({reasons}).")
        return notes

    def to_markdown(self) -> str:
        """Format all tables and notes as Markdown."""
        parts = [f"# {self.run.suite.name}", self.summary(), self.overview().to_markdown()]
        parts += self.notes()
        if self.comparison is not None:
            parts.append(f"## {EQUAL_SIMILARITY_TITLE}")
            if differences := self.differences():
                parts += [self.describe_differences(), differences.to_markdown()]
            parts += self.comparison.notes
        if attributes := self.attributes():
            parts += [f"## {ATTRIBUTES_TITLE}", attributes.to_markdown()]
        for source, table in self.published().items():
            parts += [f"## Published: {source}", table.to_markdown()]
        return "\n\n".join(parts) + "\n"

    def _methods_of_other_bases(self) -> list[str]:
        """Return the methods with an image whose base model has other weights than the base's."""
        records = self.run.records
        methods: dict[str, None] = {}
        for key, record in records.items():
            base = records.get(key.with_method(BASE))
            if base is None or not (record.is_done and base.is_done):
                continue
            weights = record.configuration.get("weights", {})
            base_weights: Mapping[str, Any] = base.configuration.get("weights", {})
            if any(weights.get(part) != hashes for part, hashes in base_weights.items()):
                methods[key.method] = None
        return list(methods)

    def _first_base_record(self) -> Record | None:
        records = (self.run.records.get(key) for key in self.run.keys(BASE))
        return next((record for record in records if record), None)


def _format_interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    digits = 3 if abs(interval.mean) < 10 else 1
    return f"{interval.mean:.{digits}f}{_format_margin(interval, digits)}"


def _format_margin(interval: Interval, digits: int) -> str:
    if math.isnan(interval.low):
        return ""
    return f" ± {(interval.high - interval.low) / 2:.{digits}f}"


def _format_difference(difference: PairedDifference | None) -> str:
    if difference is None:
        return ""
    margin = _format_margin(difference.interval, 3)
    share = f"{difference.num_better} of {difference.num_people}"
    return f"{difference.interval.mean:+.3f}{margin} ({share})"
