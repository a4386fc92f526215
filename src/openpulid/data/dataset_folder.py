"""The files of a dataset, and whether a folder holds one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openpulid.data.examples import EXAMPLES
from openpulid.data.index import INDEX_FILE, DatasetInfo, is_dataset, read_info
from openpulid.data.shards import HELD_OUT, TRAIN
from openpulid.data.work_folder import WorkFolder
from openpulid.errors import OptionError
from openpulid.io.files import write_json

WORK = ".work"
SETTINGS = "settings.json"
NOT_COMPARED = ("filters", "batch")
"""Options that may differ: filters are compared one by one, and batches do not change a dataset."""


@dataclass(frozen=True)
class DatasetFolder:
    """The folder of a dataset that is being prepared, or is complete.

    Attributes:
        path: absolute, since workers have another working directory.
    """

    path: Path

    @property
    def work(self) -> WorkFolder:
        """The intermediate results."""
        return WorkFolder(self.path / WORK)

    @property
    def settings(self) -> Path:
        """The options of a dataset that is not complete."""
        return self.path / WORK / SETTINGS

    def check(self) -> None:
        """Check that nothing of the user is in the way.

        Raises:
            OptionError: the folder holds something else.
        """
        if is_dataset(self.path) or self.settings.is_file():
            return
        for name in (TRAIN, HELD_OUT, EXAMPLES):
            if (self.path / name).exists():
                raise OptionError(
                    f"{self.path / name} exists and is not of `pulid data prepare`; choose another "
                    "folder with -o."
                )

    def delete(self) -> None:
        """Delete the dataset, and nothing else in the folder."""
        (self.path / INDEX_FILE).unlink(missing_ok=True)  # first: without it, it is not complete
        for name in (TRAIN, HELD_OUT, EXAMPLES, WORK):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def check_complete(self, info: DatasetInfo) -> None:
        """Check that a complete dataset is the one that is asked for.

        Raises:
            OptionError: it has other options, sources or face models.
            TrainingError: its index is damaged.
        """
        existing = read_info(self.path)
        self._check_options(existing.options.to_json(), info.options.to_json())
        self._check_models(existing.face_models, info.face_models)
        if existing.sources != info.sources:
            raise OptionError(
                f"the sources have changed since {self.path} was prepared: prepare it again with "
                "--fresh, or choose another folder with -o."
            )

    def start(self, info: DatasetInfo) -> None:
        """Create the folder of intermediate results, or check that the existing one fits.

        Raises:
            OptionError: it has other options or face models.
            OutputError: it cannot be created.
        """
        options = info.options.to_json()
        if self.settings.is_file():
            existing = json.loads(self.settings.read_bytes())
            self._check_options(existing["options"], options)
            self._check_models(existing["face_models"], info.face_models)
        self.work.create()
        write_json(self.settings, {"options": options, "face_models": dict(info.face_models)})

    def _check_options(self, existing: dict[str, Any], wanted: dict[str, Any]) -> None:
        """Raise OptionError if options differ; the message names the first."""
        for name, value in {**wanted, **wanted["filters"]}.items():
            before = existing.get(name, existing["filters"].get(name))
            if name not in NOT_COMPARED and before != value:
                raise OptionError(
                    f"{self.path} was prepared with --{name.replace('_', '-')} {before}, not "
                    f"{value}: use that, start again with --fresh, or choose another folder with "
                    "-o."
                )

    def _check_models(self, existing: Mapping[str, str], wanted: Mapping[str, str]) -> None:
        if dict(existing) != dict(wanted):
            raise OptionError(
                f"{self.path} was prepared with other face models: use them, or start again with "
                "--fresh."
            )
