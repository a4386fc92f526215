"""How many requests an API key may send."""

from __future__ import annotations

import math
import time

from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from openpulid.service.api.problems import Problem
from openpulid.service.config import parse_rate

RETRY_SECONDS = 5
"""When to try again if the queue is full: some images have been generated then."""


class RateLimiter:
    """Counts the requests of each owner, in this process.

    Args:
        rate: such as "60/minute".

    Raises:
        OptionError: the rate is none.
    """

    def __init__(self, rate: str) -> None:
        self._rate = parse_rate(rate)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def count(self, owner: str) -> None:
        """Count a request.

        Raises:
            Problem: there were too many (429).
        """
        if self._limiter.hit(self._rate, owner):
            return
        reset = self._limiter.get_window_stats(self._rate, owner).reset_time
        seconds = max(1, math.ceil(reset - time.time()))
        raise too_many(f"more than {self._rate} requests with this API key", seconds)


def too_many(reason: str, seconds: int = RETRY_SECONDS) -> Problem:
    """Return the problem of a client that must wait.

    Args:
        reason: what there is too much of.
        seconds: when to try again.
    """
    sentence = f"{reason}; try again in {seconds} s."
    return Problem(429, sentence, headers={"Retry-After": str(seconds)})
