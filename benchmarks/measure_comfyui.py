"""Run the node pack's tests inside checkouts of ComfyUI, and write what they measured.

COMFYUI_PATH is not needed: each checkout is an argument. Every layer runs in its own process.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from openpulid.bench.measurement import describe_measurement
from openpulid.io.files import write_json

ROOT = Path(__file__).parents[1]
LAYERS = {
    "in process": (
        "test_unet.py",
        "test_transformer.py",
        "test_methods.py",
        "test_after_blocks.py",
    ),
    "over HTTP": ("test_server.py", "test_workflows.py", "test_replacements.py", "test_people.py"),
}


def run_layer(comfyui: Path, files: tuple[str, ...]) -> dict[str, Any]:
    """Run test files inside a checkout of ComfyUI.

    Returns:
        The number of tests by outcome, their duration in seconds, and what they recorded: test ->
        name -> largest value.
    """
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        paths = [str(ROOT / "tests" / "comfyui" / file) for file in files]
        command = [sys.executable, "-m", "pytest", *paths, f"--junitxml={report}"]
        environment = {**os.environ, "COMFYUI_PATH": str(comfyui), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
        suite = ElementTree.parse(report).getroot()[0]
    outcomes: Counter[str] = Counter()
    recorded: dict[str, dict[str, float]] = {}
    for case in suite.iter("testcase"):
        problem = next((child.tag for child in case if child.tag != "properties"), "passed")
        outcomes[problem] += 1
        for entry in case.iter("property"):
            values = recorded.setdefault(case.attrib["name"], {})
            name, value = entry.attrib["name"], float(entry.attrib["value"])
            values[name] = max(value, values.get(name, value))
    return {
        "outcomes": dict(outcomes),
        "seconds": round(float(suite.attrib["time"]), 1),
        "recorded": recorded,
    }


def read_version(comfyui: Path) -> str:
    """Return the version of a checkout."""
    text = (comfyui / "comfyui_version.py").read_text("utf-8")
    match = re.search(r'__version__ = "(.+)"', text)
    assert match is not None
    return match[1]


def main() -> None:
    """Run all layers in all checkouts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs="+", type=Path, help="folders of ComfyUI")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file")
    options = parser.parse_args()
    report = {"about": "The ComfyUI nodes, inside ComfyUI, against diffusers", "measurements": []}
    for comfyui in options.checkouts:
        version = read_version(comfyui)
        figures = {layer: run_layer(comfyui.resolve(), files) for layer, files in LAYERS.items()}
        measurement = describe_measurement({"comfyui": version}, figures, torch.device("cpu"))
        report["measurements"].append({"name": f"ComfyUI {version}", **measurement})
    write_json(options.output, report)


if __name__ == "__main__":
    main()
