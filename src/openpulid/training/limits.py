"""Limits of the numbers in a training's settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openpulid.errors import OptionError

LARGEST_INT = 2**63 - 1


@dataclass(frozen=True)
class Limit:
    """What a number may be.

    Attributes:
        low: the smallest value.
        high: the largest value.
        is_whole: whether it must be a whole number.
    """

    low: float = 0
    high: float = math.inf
    is_whole: bool = False

    def allows(self, value: object) -> bool:
        """Return whether a value is a finite number within the limits."""
        if isinstance(value, bool) or not isinstance(value, int if self.is_whole else (int, float)):
            return False
        # comparisons with NaN are false
        return self.low <= value <= self.high and value != math.inf

    def __str__(self) -> str:
        kind = "a whole number" if self.is_whole else "a number"
        bound = f" to {self.high:g}" if self.high < LARGEST_INT else ""
        return f"{kind} from {self.low:g}{bound}"


FRACTION = Limit(high=1)
COUNT = Limit(low=1, high=LARGEST_INT, is_whole=True)
INDEX = Limit(high=LARGEST_INT, is_whole=True)


def check_limits(settings: Any, limits: Mapping[str, Limit]) -> None:
    """Check the numbers of a settings object; None is allowed where it is the default.

    Raises:
        OptionError: a field is not a number, or out of its limits.
    """
    defaults = {name: field.default for name, field in settings.__dataclass_fields__.items()}
    for name, limit in limits.items():
        value = getattr(settings, name)
        if value is None and defaults[name] is None:
            continue
        if not limit.allows(value):
            raise OptionError(f"{name} must be {limit}, got {value!r}.")
