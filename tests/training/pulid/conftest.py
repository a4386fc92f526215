"""Fixtures of the tests of PuLID's training."""

from __future__ import annotations

import pytest

from openpulid.training import logger


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Draw no losses.png: it takes longer than these trainings, and test_trainer.py checks it."""
    monkeypatch.setattr(logger, "draw_curves", lambda history, path: None)
