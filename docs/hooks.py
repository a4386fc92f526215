"""mkdocs hooks: generate the command-line and API reference, and bring in pages of the repository.

Every generated page exists at build time only:

- `reference/cli.md`: all commands and options, read from the Typer application.
- `reference/api/*.md`: one page per package, with one mkdocstrings directive per module.
- `benchmarks/*`, `contributing.md`, `changelog.md`, `model-card.md`: files that have their place
  elsewhere in the repository. Links to them work on GitHub as well as on the site.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "openpulid"

# Package of openpulid -> first sentence of its API page.
API_PACKAGES = {
    "pipelines": "Presets, requests and the studio: from a prompt and an identity to images.",
    "identity": "The identity file, and the extractors that compute identities from faces.",
    "faces": "Face detection, alignment, recognition and parsing.",
    "methods": "PuLID and the other methods: adapters that attach to a diffusers pipeline.",
    "diffusion": "Samplers, schedulers and noise schedules.",
    "doctor": "Checks of an installation: packages, devices, weights, the miniature.",
    "data": "Datasets for training: sources, filters, people, captions and shards.",
    "training": "The trainer, the PuLID objective and its recipes.",
    "bench": "Suites, runs, scores and metrics of the benchmark.",
    "world": "Synthetic people and scenes, the data of the miniature.",
    "io": "Images, checkpoints, image metadata and the table of published weights.",
}

# Page of the site -> file of the repository.
REPOSITORY_PAGES = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "model-card.md": "src/openpulid/mini/weights/README.md",
}

LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)(#[^)\s]*)?(\))")
REPOSITORY_URL = "https://github.com/openpulid/openpulid/blob/main/"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add a page for every measurement to the navigation."""
    pages = sorted((ROOT / "benchmarks").glob("*.md"), key=lambda path: path.stem != "README")
    assert config.nav is not None
    config.nav.append({"Measurements": [f"benchmarks/{path.name}" for path in pages]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the pages of the repository."""
    generated = {"reference/cli.md": cli_reference()}
    for package, summary in API_PACKAGES.items():
        generated[f"reference/api/{package}.md"] = api_page(package, summary)
    for uri, content in generated.items():
        files.append(File.generated(config, uri, content=content))

    for uri, path in site_pages().items():
        if path.parent == ROOT / "docs" or path.is_relative_to(ROOT / "docs"):
            continue
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links between repository files into links between pages of the site."""
    source = repository_path(page.file.src_uri)
    if source is None:
        return markdown
    if page.file.src_uri == "index.md":
        page.meta["hide"] = ["navigation", "toc"]
    pages = {path: uri for uri, path in site_pages().items()}
    here = PurePosixPath(page.file.src_uri).parent

    def rewrite(match: re.Match[str]) -> str:
        opening, target, anchor, closing = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match.group(0)
        path = Path(os.path.normpath(source.parent / target))
        if (path / "index.md") in pages:
            path = path / "index.md"
        if path in pages:
            target = os.path.relpath(pages[path], here)
        elif path.exists() and not path.is_relative_to(ROOT / "docs"):
            target = REPOSITORY_URL + path.relative_to(ROOT).as_posix()
        return f"{opening}{target}{anchor or ''}{closing}"

    return LINK.sub(rewrite, markdown)


def site_pages() -> dict[str, Path]:
    """Return the file behind every page that is not generated, by its address on the site."""
    pages = {
        path.relative_to(ROOT / "docs").as_posix(): path for path in (ROOT / "docs").rglob("*.*")
    }
    pages |= {uri: ROOT / name for uri, name in REPOSITORY_PAGES.items()}
    for path in sorted((ROOT / "benchmarks").rglob("*.*")):
        pages[f"benchmarks/{path.relative_to(ROOT / 'benchmarks').as_posix()}"] = path
    return pages


def repository_path(uri: str) -> Path | None:
    """Return the file behind a page of the site, or None for a generated page."""
    return site_pages().get(uri)


def api_page(package: str, summary: str) -> str:
    """Return the Markdown of an API page: a mkdocstrings directive for every public module."""
    lines = [f"# openpulid.{package}", "", summary, ""]
    for path in sorted((SOURCE / package).rglob("*.py")):
        parts = ("openpulid", *path.relative_to(SOURCE).with_suffix("").parts)
        if parts[-1] == "__init__" or any(part.startswith("_") for part in parts):
            continue
        lines += [f"::: {'.'.join(parts)}", ""]
    return "\n".join(lines)


def cli_reference() -> str:
    """Return the Markdown of the command-line reference, read from the Typer application."""
    sys.path.insert(0, str(SOURCE.parent))
    try:
        import typer

        from openpulid.cli.main import app
    finally:
        sys.path.pop(0)
    lines = [
        "# Command line",
        "",
        "This page is generated from the code. `pulid COMMAND --help` prints the same text.",
        "",
    ]
    for name, command in commands("pulid", typer.main.get_command(app)):
        lines += command_section(name, command)
    return "\n".join(lines)


def commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield every command below `command` with its full name; groups come last."""
    subcommands = getattr(command, "commands", None)
    if subcommands is None:
        yield name, command
        return
    for subname in sorted(
        subcommands, key=lambda key: (hasattr(subcommands[key], "commands"), key)
    ):
        yield from commands(f"{name} {subname}", subcommands[subname])


def command_section(name: str, command: Any) -> list[str]:
    """Return the lines of one command: heading, help, usage and a table of its parameters."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = [name, *(argument_usage(argument) for argument in arguments)]
    lines = [
        f"## {name}",
        "",
        clean(command.help),
        "",
        "```",
        " ".join(usage) + " [OPTIONS]",
        "```",
        "",
    ]
    if arguments or options:
        lines += ["| parameter | meaning | default |", "|---|---|---|"]
    for argument in arguments:
        lines.append(f"| `{argument.name.upper()}` | {cell(argument.help)} | {default(argument)} |")
    for option in options:
        names = ", ".join(f"`{opt}`" for opt in [*option.opts, *option.secondary_opts])
        lines.append(f"| {names} | {cell(option.help)} | {default(option)} |")
    return [*lines, ""]


def argument_usage(argument: Any) -> str:
    """Return an argument as a usage line shows it, for example `[PROMPT]` or `NAMES...`."""
    label = argument.name.upper() + ("..." if argument.nargs == -1 else "")
    return label if argument.required else f"[{label}]"


def default(parameter: Any) -> str:
    """Return the default value of a parameter as a table cell."""
    value = parameter.default
    if parameter.required:
        return "required"
    if (
        value is None
        or callable(value)
        or value in ((), [], "")
        or "Sentinel" in type(value).__name__
    ):
        return ""
    if isinstance(value, bool):
        if parameter.secondary_opts:
            return f"`{(parameter.opts if value else parameter.secondary_opts)[0]}`"
        return "`on`" if value else ""
    return f"`{value}`"


def clean(text: str | None) -> str:
    """Remove the line breaks of a docstring's paragraphs."""
    paragraphs = re.split(r"\n\s*\n", (text or "").strip())
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def cell(text: str | None) -> str:
    """Return help text as a table cell."""
    return clean(text).replace("\n\n", " ").replace("|", "\\|")
