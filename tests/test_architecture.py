"""Rules of the code base: import order, sizes, documentation, devices, and the cost of `--help`."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import openpulid

PACKAGE = Path(__file__).parents[1] / "src" / "openpulid"

# A module imports only from packages above its own, and from its own package.
PACKAGES = (
    "errors",
    "device",
    "ray_session",
    "io",
    "diffusion",
    "world",
    "faces",
    "identity",
    "methods",
    "pipelines",
    "doctor",
    "data",
    "training",
    "bench",
    "mini",
    "web",
    "service",
    "cli",
)

MODULES = {
    ".".join(("openpulid", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FUNCTION_LINES = 80
FILE_LINES = 500
MAX_IMPORTED_MODULES = 15


def package_index(module: str) -> int:
    return PACKAGES.index(module.split(".")[1])


@cache
def parse(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text("utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """Return the openpulid modules that a module imports, also in functions and for types."""
    return frozenset(find_imports(module))


def find_imports(module: str) -> Iterator[str]:
    for node in ast.walk(parse(module)):
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


def imports_from_below(module: str) -> Iterator[str]:
    if module == "openpulid":
        return
    for target in sorted(imports(module) - {"openpulid"}):
        if package_index(target) > package_index(module):
            yield f"imports {target}, of a package below its own"


def imports_many_modules(module: str) -> Iterator[str]:
    targets = imports(module) - {module, "openpulid"}
    if module != "openpulid" and len(targets) > MAX_IMPORTED_MODULES:
        yield f"imports {len(targets)} modules"


def lacks_docstrings(module: str) -> Iterator[str]:
    for node in public_functions(parse(module)):
        if ast.get_docstring(node) is None:
            yield f"no docstring in {node.name} (line {node.lineno})"


def is_long(module: str) -> Iterator[str]:
    if len(MODULES[module].read_text("utf-8").splitlines()) >= FILE_LINES:
        yield "has too many lines"
    for node in ast.walk(parse(module)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            lines = (node.end_lineno or 0) - first.lineno + 1
            if lines >= FUNCTION_LINES:
                yield f"{node.name} has {lines} lines"


def names_a_device(module: str) -> Iterator[str]:
    """A device is an argument: its type may be compared, but no tensor goes to a named device."""
    for node in ast.walk(parse(module)):
        lines = [value.lineno for value in assigned_values(node) if is_cuda_string(value)]
        if isinstance(node, ast.Call) and called_name(node) == "cuda":
            lines.append(node.lineno)
        yield from (f"names a device in line {line}" for line in lines)


def draws_noise_on_a_device(module: str) -> Iterator[str]:
    """Generators of other devices draw other numbers, so images would depend on the device.

    The miniature's training on an accelerator draws there, for speed.
    """
    if module.startswith("openpulid.mini.accelerated"):
        return
    for node in ast.walk(parse(module)):
        is_generator = isinstance(node, ast.Call) and called_name(node) == "Generator"
        if is_generator and (node.args or node.keywords):
            yield f"draws noise on a device in line {node.lineno}"


@pytest.mark.parametrize(
    "rule",
    [
        imports_from_below,
        imports_many_modules,
        lacks_docstrings,
        is_long,
        names_a_device,
        draws_noise_on_a_device,
    ],
)
def test_no_module_breaks_a_rule(rule: Callable[[str], Iterator[str]]) -> None:
    problems = [f"{module} {problem}" for module in MODULES for problem in rule(module)]
    assert not problems, "\n".join(problems)


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
    parse.cache_clear()
    assert list(names_a_device("fixed")) == ["names a device in line 1"]


def test_no_import_cycle() -> None:
    graph = {name: imports(name) - {name} for name in MODULES if name != "openpulid"}
    visited: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "cycle: " + " -> ".join((*path[path.index(name) :], name))
        if name not in visited:
            for target in graph.get(name, ()):
                visit(target, (*path, name))
            visited.add(name)

    for name in graph:
        visit(name, ())


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the public functions of a module and the public methods of its public classes."""
    scopes: list[ast.Module | ast.ClassDef] = [tree]
    while scopes:
        for node in scopes.pop().body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if node.name.startswith("_"):
                continue
            if isinstance(node, ast.ClassDef):
                scopes.append(node)
            else:
                yield node


def assigned_values(node: ast.AST) -> list[Any]:
    """Return the values that a call, an assignment or a default gives to a name."""
    if isinstance(node, ast.Call):
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node, ast.arguments):
        return [*node.defaults, *node.kw_defaults]
    return [node.value] if isinstance(node, (ast.Assign, ast.AnnAssign)) else []


def is_cuda_string(value: Any) -> bool:
    return (
        isinstance(value, ast.Constant)
        and isinstance(value.value, str)
        and value.value.split(":")[0] == "cuda"
    )


def called_name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


LIST_PACKAGES = """
import atexit, sys
atexit.register(lambda: print(*{name.partition(".")[0] for name in sys.modules}, file=sys.stderr))
"""

TYPER = (
    LIST_PACKAGES
    + """
import typer
app = typer.Typer()
for name in ("demo", "more"):
    app.command(name)(lambda: None)
app(["--help"])
"""
)

HELP = (
    LIST_PACKAGES
    + """
from openpulid.cli.main import main
sys.argv = ["pulid", "--help"]
main()
"""
)


def run(code: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )


def test_help_is_light() -> None:
    """The help imports no library that typer does not import itself."""
    packages = []
    for code in (HELP, TYPER):
        process = run(code)
        assert process.returncode == 0 and "demo" in process.stdout, process.stderr
        packages.append(set(process.stderr.split()) - sys.stdlib_module_names)
    assert packages[0] - packages[1] == {"openpulid"}


def test_import_of_package_is_light() -> None:
    code = "import sys, openpulid; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    process = run(code)
    assert process.returncode == 0, process.stderr


def test_public_names_exist() -> None:
    for name in openpulid.__all__:
        assert getattr(openpulid, name) is not None
