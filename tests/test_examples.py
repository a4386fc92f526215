"""The examples run, on the miniature, and produce what they promise."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import nbclient
import nbformat
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested_and_listed() -> None:
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    tests = Path(__file__).read_text("utf-8")
    page = (ROOT / "docs" / "examples.md").read_text("utf-8")
    for name in names:
        assert f'load_example("{Path(name).stem}")' in tests
        assert f"`{name}`" in page


def test_generate_writes_identity_and_images(tmp_path: Path) -> None:
    load_example("generate").main(tmp_path)

    assert (tmp_path / "anna.safetensors").stat().st_mode & 0o777 == 0o600
    names = [f"portrait-film-noir-smiling-{seed}.png" for seed in (7, 8, 9)]
    paths = [*(tmp_path / name for name in names), tmp_path / "base" / names[0]]
    assert len({Image.open(path).tobytes() for path in paths}) == 4, "every image differs"


def test_request_runs_from_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_example("request").main(tmp_path)

    request = json.loads((tmp_path / "request.json").read_text("utf-8"))
    assert request["seed"] == 7
    assert request["identity"]["scale"] == 0.8
    name = "portrait-photo-long-blond-hair-sunset-light"
    names = [f"{name}-7.png", f"{name}-8.png"]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == names
    out = capsys.readouterr().out
    assert "{'people.0.images.0': 'anna.png'}" in out
    assert "num_inference_steps must be at least 1" in out


def test_adapter_leaves_own_pipeline_unchanged(tmp_path: Path) -> None:
    load_example("diffusers_pipeline").main(tmp_path)

    sheet = Image.open(tmp_path / "pipeline.png")
    assert sheet.size == (192, 96)
    base = sheet.crop((0, 0, 96, 96)).tobytes()
    with_identity = sheet.crop((96, 0, 192, 96)).tobytes()
    assert base != with_identity


def test_methods_are_compared_side_by_side(tmp_path: Path) -> None:
    example = load_example("compare_methods")
    example.main(tmp_path)

    sheet = Image.open(tmp_path / "methods.png")
    assert sheet.size == (96 * (1 + len(example.METHODS)), 96)


def test_custom_metric_is_measured_with_built_in_ones() -> None:
    values = load_example("custom_metric").main()

    assert set(values) == {"face_sim", "outside_face", "sharpness"}
    assert 0.1 < values["face_sim"] < 1
    assert values["sharpness"] > 0


def test_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "store no outputs"

    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["IPYTHONDIR"] = str(tmp_path)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": EXAMPLES}}
    )
    client.execute(env=environment)

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("FaceError" in output.get("text", "") for output in outputs)
