"""Which published files a run needs: those of its methods and of its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from openpulid.bench.methods import MethodSpec, Presets, select_presets
from openpulid.bench.scorers import OPTIONAL_WEIGHTS, RECOGNITION_WEIGHTS
from openpulid.bench.suite import Suite
from openpulid.errors import OptionError
from openpulid.methods.registry import METHODS
from openpulid.pipelines.weights import missing_sources
from openpulid.training.tuning import TUNING_METHODS

METRICS = "metrics"
OPTIONAL_METRICS = "metrics, optional"


@dataclass(frozen=True)
class NeededFile:
    """A published file, or pipeline, that a run needs.

    Attributes:
        name: of `io.hub.WEIGHTS`.
        users: the methods that need it, and `METRICS` or `OPTIONAL_METRICS`.
        is_installed: whether it is on this machine.
    """

    name: str
    users: tuple[str, ...]
    is_installed: bool

    @property
    def is_optional(self) -> bool:
        """Whether the run starts without it."""
        return self.users == (OPTIONAL_METRICS,)


def list_needed_files(suite: Suite, presets: Presets) -> list[NeededFile]:
    """List the published files of all methods and metrics of a run.

    The base loads PuLID's files as well, whatever the other methods are.

    Args:
        suite: the suite.
        presets: label -> preset, the base first, as `select_presets` returns them.
    """
    users: dict[str, list[str]] = {}

    def note(name: str, user: str) -> None:
        of_file = users.setdefault(name, [])
        if user not in of_file:
            of_file.append(user)

    for label, preset in presets.items():
        for name in preset.published:
            note(name, label.partition("@")[0])
    if not suite.uses_miniature:
        for name in RECOGNITION_WEIGHTS[suite.recognition]:
            note(name, METRICS)
        for name in OPTIONAL_WEIGHTS:
            note(name, OPTIONAL_METRICS)
    missing = missing_sources(users)
    return [
        NeededFile(name, tuple(of_file), name not in missing) for name, of_file in users.items()
    ]


def select_available(suite: Suite, names: Sequence[str]) -> tuple[Presets, list[str]]:
    """Select the methods that a preset supports; describe the rest in a sentence each.

    Args:
        suite: the suite, whose preset all methods use.
        names: methods in the form `METHOD[:FILE][@SCALE]`.

    Raises:
        OptionError: there is no method of a name.
    """
    selected = dict(select_presets(suite, []))
    problems: dict[str, None] = {}
    for name in names:
        try:
            selected |= select_presets(suite, [name])
        except OptionError as error:
            if MethodSpec.parse(name).method not in (*METHODS, *TUNING_METHODS):
                raise
            problems[str(error)] = None
    return selected, list(problems)
