"""The adapter alone, under its published names, with the story of its training in the file's metadata."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path

from openpulid import __version__
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.training.pulid.recipes import Recipe
from openpulid.training.trainer import TrainingResult


def save_adapter(
    adapter: PuLID,
    path: str | PathLike[str],
    recipe: Recipe,
    result: TrainingResult,
    facts: Mapping[str, object] | None = None,
) -> Path:
    """One safetensors file that every PuLID loader opens: `id_adapter.*`,
    `id_adapter_attn_layers.N.id_to_{k,v}.weight`.

    The metadata tells recipe (all figures, as JSON), revision of the code, seed, steps, minutes and last
    metrics, and whatever `facts` adds.
    """
    story = {
        "recipe": json.dumps(asdict(recipe)),
        "revision": revision(),
        "seed": recipe.seed,
        "steps": result.steps,
        "minutes": round(result.seconds / 60, 1),
        "metrics": json.dumps(dict(result.metrics)),
    }
    return adapter.save(path, {**story, **(facts or {})})


def revision() -> str:
    """The commit the package runs from, with "+changes" when files differ from it; an installed package's
    version."""
    folder = Path(__file__).parent
    try:
        # an environment may lie inside somebody's repository, whose commits say nothing about this package
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        return f"openpulid {__version__}"
    return commit + ("+changes" if changes else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()
