"""The documentation is true: its code runs, its commands, options, names, files and links exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import openpulid as pulid
from openpulid.cli.main import app
from openpulid.methods.registry import METHODS
from openpulid.pipelines.presets import PRESETS
from openpulid.pipelines.provenance import Provenance

ROOT = Path(__file__).parents[1]
MODEL_CARD = ROOT / "src" / "openpulid" / "mini" / "weights" / "README.md"
PAGES = sorted(
    [*ROOT.glob("*.md"), MODEL_CARD, *(ROOT / "docs").rglob("*.md"), *ROOT.glob("benchmarks/*.md")]
)
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

GENERATED_PAGE = "benchmarks/gpu-h200.md"

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s#]+)(?:#[^)]*)?\)")
REPOSITORY_FILE = re.compile(r"(?:src|tests|docs|examples|benchmarks|openpulid)/[\w./-]+")
DOTTED_NAME = re.compile(r"(?:openpulid|pulid)(?:\.\w+)+")


def read(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def code_blocks(name: str, language: str) -> list[str]:
    return [
        textwrap.dedent(code)  # of a tab
        for _, found, code in FENCE.findall(read(name))
        if found == language
    ]


def inline_code(name: str) -> list[str]:
    text = FENCE.sub("", read(name))
    return [" ".join(code.split()) for code in INLINE_CODE.findall(text)]


def shell_lines(name: str) -> Iterator[str]:
    """Yield every command of the page: of its shell blocks, and in inline code."""
    for block in code_blocks(name, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from line.split("&&")
    yield from inline_code(name)


def pulid_commands(name: str) -> Iterator[list[str]]:
    for line in shell_lines(name):
        words = shlex.split(line, comments=True)
        if "pulid" in words[:4]:  # also after `accelerate launch --no_python`
            yield words[words.index("pulid") + 1 :]


@cache
def root_command() -> Any:
    return typer.main.get_command(app)


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """Return the command that these words call, and its arguments."""
    command = root_command()
    while words and hasattr(command, "commands"):
        if words[0].isupper():  # a placeholder, as in `pulid COMMAND --help`
            return None, []
        assert words[0] in command.commands, f"there is no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def option_names(command: Any) -> set[str]:
    names = {"--help"}
    for parameter in command.params:
        names.update([*parameter.opts, *parameter.secondary_opts])
    return names


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_options_exist(name: str) -> None:
    normalize = app.info.context_settings["token_normalize_func"]
    for words in pulid_commands(name):
        command, arguments = find_command(words)
        if command is None:
            continue
        names = option_names(command)
        for argument in arguments:
            if re.match(r"--?[a-z]", argument):
                option = argument.split("=")[0]
                if option.startswith("--"):
                    option = "--" + normalize(option[2:])
                assert option in names, f"pulid {' '.join(words)}: no option {option}"


@pytest.mark.parametrize("name", NAMES)
def test_linked_files_exist(name: str) -> None:
    for target in LINK.findall(FENCE.sub("", read(name))):
        if "://" in target or target.startswith("mailto:"):
            continue
        if name.startswith("docs/reference/") or target.startswith("reference/"):
            continue  # generated when the site is built, which checks them
        assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"


@pytest.mark.parametrize("name", NAMES)
def test_named_files_exist(name: str) -> None:
    if name == "CHANGELOG.md":
        return  # about the past as well
    for code in inline_code(name):
        if not REPOSITORY_FILE.fullmatch(code) or "NAME" in code:
            continue
        path = code.removeprefix("src/")
        candidates = [ROOT / code, ROOT / "src" / path]
        assert any(candidate.exists() for candidate in candidates), f"{name} names {code}"


@pytest.mark.parametrize("name", NAMES)
def test_named_objects_exist(name: str) -> None:
    for code in inline_code(name):
        if DOTTED_NAME.fullmatch(code) and not code.endswith((".md", ".py", ".png")):
            resolve("open" + code.removeprefix("open"))


def resolve(dotted: str) -> Any:
    """Return the module or the object with this dotted name."""
    parts = dotted.split(".")
    for k in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:k]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[k:]:
            value = getattr(value, attribute)
        return value
    raise AssertionError(f"{dotted} does not exist")


@pytest.mark.parametrize("name", NAMES)
def test_python_code_is_valid_and_its_imports_exist(name: str) -> None:
    for code in code_blocks(name, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("openpulid"):
                for alias in node.names:
                    resolve(f"{node.module}.{alias.name}")
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pulid":
                assert node.attr in pulid.__all__, f"pulid.{node.attr}"


def test_quickstart_of_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = code_blocks("README.md", "python")[0]
    shutil.copy(ROOT / "examples" / "anna.png", tmp_path)
    monkeypatch.chdir(tmp_path)

    exec(compile(code, "README.md", "exec"), {})

    images = sorted((tmp_path / "out").iterdir())
    assert len(images) == 2
    for image, seed in zip(images, (7, 8), strict=True):
        assert Provenance.read(image).request.seed == seed
    assert (tmp_path / "anna.safetensors").stat().st_mode & 0o777 == 0o600


def test_readme_is_a_front_page() -> None:
    lines = read("README.md").splitlines()
    assert len(lines) <= 170
    assert max(map(len, lines)) <= 100
    # one picture of images, and one plot
    assert read("README.md").count("![") == 2


@pytest.mark.parametrize("name", NAMES)
def test_prose_has_at_most_100_columns(name: str) -> None:
    """Tables, code, pictures and generated pages are as wide as they need to be."""
    lines = [] if name == GENERATED_PAGE else FENCE.sub("", read(name)).splitlines()
    prose = [line for line in lines if not line.startswith(("|", "    ", "!["))]
    assert [line for line in prose if len(line) > 100] == []


def test_tables_of_readme_are_complete() -> None:
    rows = [line for line in read("README.md").splitlines() if line.startswith("| `")]
    first_cells = [row.split("|")[1] for row in rows]
    names = set(re.findall(r"`([^`]+)`", " ".join(first_cells)))
    assert names == set(PRESETS) | set(METHODS)


def test_every_preset_and_method_has_documentation() -> None:
    concepts = read("docs/concepts.md")
    methods = read("docs/methods/index.md")
    assert all(f"| `{name}` |" in concepts for name in PRESETS)
    assert all(f"`{name}`" in methods for name in METHODS)


def load_hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_reference_is_generated_from_code() -> None:
    hooks = load_hooks()
    page = hooks.cli_reference()
    for name, command in hooks.commands("pulid", root_command()):
        assert f"## {name}\n" in page
        for parameter in command.params:
            assert parameter.help, f"{name}: {parameter.name} has no help"
    assert "`--seed`" in page


def test_api_reference_covers_every_package() -> None:
    hooks = load_hooks()
    packages = {path.parent.name for path in hooks.SOURCE.glob("*/__init__.py")}
    assert packages - set(hooks.API_PACKAGES) == {"cli", "mini", "service", "web"}
    assert "::: openpulid.pipelines.request" in hooks.api_page("pipelines", "")


def test_versions_agree() -> None:
    assert f"\nversion: {pulid.__version__}\n" in read("CITATION.cff")
    assert f"\n## [{pulid.__version__}]" in read("CHANGELOG.md")


def test_truth_of_the_ablation_is_in_its_json_file() -> None:
    lines = read("benchmarks/mini-ablation.md").splitlines()
    header = next(line for line in lines if line.startswith("| model | network |"))
    truth = next(line for line in lines if line.startswith("| truth |"))
    names = [name.strip().replace(" ", "_") for name in header.split("|")[3:-1]]
    page = dict(zip(names, map(float, truth.split("|")[3:-1]), strict=True))
    measurements = json.loads(read("benchmarks/mini-ablation.json"))["measurements"]
    rows = [row for entry in measurements for row in entry["figures"].get("rows", [])]
    assert any(page.items() <= row.items() for row in rows if row.get("model") == "truth")
