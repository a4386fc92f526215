"""The way through the house: who may import whom, and what a look at the help may cost."""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "openpulid"

# A module imports only from rows above its own, or from its own row.
ROWS = (
    "errors",
    "device",
    "io",
    "diffusion",
    "world",
    "faces",
    "identity",
    "methods",
    "pipelines",
    "training",
    "bench",
    "mini",
    "web",
    "cli",
)

MODULES = {
    ".".join(("openpulid", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FUNCTION_LINES, FILE_LINES = 80, 500


def row(module: str) -> int:
    return ROWS.index(module.split(".")[1])


def imports(module: str) -> Iterator[str]:
    """Modules of this package that `module` imports anywhere: in functions and for types alone, too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            if node.module not in MODULES:
                assert not (node.module or "").startswith("openpulid"), (
                    f"{module}: no module {node.module}"
                )
                continue
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


@pytest.mark.parametrize("module", [name for name in MODULES if name != "openpulid"])
def test_imports_only_from_packages_above(module: str) -> None:
    below = {
        target for target in imports(module) if target != "openpulid" and row(target) > row(module)
    }
    assert not below, f"{module} reaches down to {sorted(below)}"


def test_no_import_cycle() -> None:
    graph = {name: set(imports(name)) - {name} for name in MODULES if name != "openpulid"}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "cycle: " + " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in graph.get(name, ()):
                walk(target, (*path, name))
            done.add(name)

    for name in graph:
        walk(name, ())


@pytest.mark.parametrize("module", MODULES)
def test_functions_and_files_are_small(module: str) -> None:
    text = MODULES[module].read_text("utf-8")
    assert len(text.splitlines()) < FILE_LINES, f"{module} is too long a file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            lines = (node.end_lineno or 0) - first.lineno + 1
            assert lines < FUNCTION_LINES, f"{module}.{node.name} has {lines} lines"


@pytest.mark.parametrize("module", MODULES)
def test_no_device_is_hard_coded(module: str) -> None:
    """A device is an argument; its *type* may be asked for, but no tensor is sent to a device by name."""
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    named = [value.lineno for node in ast.walk(tree) for value in _handed_on(node) if _cuda(value)]
    assert not named, f"{module}: lines {named}"
    assert not [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _called(node) == "cuda"
    ], module


@pytest.mark.parametrize(
    "line",
    [
        'x.to("cuda:1")',
        'f(device="cuda")',
        "x.cuda()",
        'self.device = "cuda"',
        'def f(device="cuda"): ...',
    ],
)
def test_hard_coded_device_is_detected(
    line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "fixed.py").write_text(line)
    monkeypatch.setitem(MODULES, "fixed", tmp_path / "fixed.py")
    with pytest.raises(AssertionError, match="fixed"):
        test_no_device_is_hard_coded("fixed")


@pytest.mark.parametrize("module", MODULES)
def test_noise_is_drawn_on_cpu(module: str) -> None:
    """A generator of another device draws other numbers, so that no two kinds of device would agree on an image."""
    calls = [
        node
        for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8")))
        if isinstance(node, ast.Call)
    ]
    assert not [
        call.lineno
        for call in calls
        if _called(call) == "Generator" and (call.args or call.keywords)
    ], module


def _handed_on(node: ast.AST) -> list[Any]:
    """The values that a call, an assignment or a default gives to a name."""
    if isinstance(node, ast.Call):
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node, ast.arguments):
        return [*node.defaults, *node.kw_defaults]
    return [node.value] if isinstance(node, (ast.Assign, ast.AnnAssign)) else []


def _cuda(value: Any) -> bool:
    return (
        isinstance(value, ast.Constant)
        and isinstance(value.value, str)
        and value.value.split(":")[0] == "cuda"
    )


def _called(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


TYPER = """
import typer
app = typer.Typer()
for name in ("demo", "more"):
    app.command(name)(lambda: None)
app(["--help"])
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


HELP = """
import sys
from openpulid.cli.main import main
sys.argv = ["pulid", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "numpy", "PIL", "diffusers", "transformers", "timm"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_is_light() -> None:
    """No torch, and little more processor time than its own library takes to say as much: the best of several runs each, by
    turns, since other work only adds."""
    seconds: dict[str, list[float]] = {HELP: [], TYPER: []}
    for code in [HELP, TYPER] * 5:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run(code)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "demo" in done.stdout
        seconds[code].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds[HELP]) < 1.6 * min(seconds[TYPER]), seconds


def test_import_of_package_is_light() -> None:
    done = run(
        "import sys, openpulid; bad = {'torch', 'numpy', 'PIL'} & set(sys.modules); assert not bad, bad"
    )
    assert done.returncode == 0, done.stderr


def test_public_names_exist() -> None:
    code = "import openpulid as pulid\nfor name in pulid.__all__: getattr(pulid, name)"
    done = run(code)
    assert done.returncode == 0, done.stderr
