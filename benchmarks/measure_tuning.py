"""Measure tuned methods on the miniature with other settings than those of their recipes.

    python benchmarks/measure_tuning.py lora lora:steps=100,face_loss_weight=30 -o runs/tuning

A variant is METHOD[:FIELD=VALUE,...][@SCALE], with fields of `TuningRecipe`. The people are not
those of the suite `miniature`, whose prompts are used. The run continues if it is started again.
"""

from __future__ import annotations

import argparse
import ast
from dataclasses import replace
from pathlib import Path

import torch

from openpulid.bench.measurement import append_measurement, describe_measurement
from openpulid.bench.run import run_benchmark, update_report
from openpulid.bench.run_dir import BASE
from openpulid.bench.suite import load_suite
from openpulid.bench.tuned import tuned_preset
from openpulid.mini.evaluation.scorers import MiniScorers
from openpulid.mini.evaluation.subjects import synthetic_subjects
from openpulid.pipelines.presets import Preset, find_preset

FIRST_PERSON = 21_000
METRICS = ("face_sim", "rank1", "clip_t", "clip_i", "outside_face", "attributes", "person_seconds")


def parse_variant(base: Preset, text: str) -> Preset:
    """Return the preset of a variant."""
    spec, _, scale = text.partition("@")
    method, _, fields = spec.partition(":")
    changes = {
        name: ast.literal_eval(value)
        for name, _, value in (field.partition("=") for field in fields.split(",") if field)
    }
    preset = tuned_preset(base, method)
    preset = replace(preset, recipe=replace(preset.recipe, **changes))
    return preset.with_defaults(scale=float(scale)) if scale else preset


def main() -> None:
    """Tune, generate and score all variants, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="+")
    parser.add_argument("-o", "--out", type=Path, required=True, help="run directory")
    parser.add_argument("--people", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to which the table is added")
    options = parser.parse_args()
    suite = replace(load_suite("miniature"), num_people=options.people, first_person=FIRST_PERSON)
    base = find_preset(suite.preset)
    presets = {BASE: base}
    presets |= {variant: parse_variant(base, variant) for variant in options.variants}
    subjects = synthetic_subjects(suite.num_people, suite.first_person)
    scorers = MiniScorers.load()
    run_benchmark(suite, presets, subjects, scorers, options.out)
    table, _ = update_report(options.out, None, write_files=False)
    rows = {row["method"]: {name: row.get(name) for name in METRICS} for row in table["rows"]}
    print("| variant |", " | ".join(METRICS), "|")
    for variant, row in rows.items():
        figures = ("" if value is None else f"{value:.3f}" for value in row.values())
        print("|", variant, "|", " | ".join(figures), "|")
    if options.json is not None:
        configuration = {"people": options.people, "first person": FIRST_PERSON}
        measurement = describe_measurement(configuration, {"rows": rows}, torch.device("cpu"))
        append_measurement(options.json, "settings of the tuned methods", measurement)


if __name__ == "__main__":
    main()
