"""Losses of W+ Adapter (arXiv 2311.17461)."""

from openpulid.training.w_plus.losses import WPlusLoss

__all__ = ["WPlusLoss"]
