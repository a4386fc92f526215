"""Losses of W+ Adapter, and the disturbed latents that one of them needs (arXiv 2311.17461)."""

from openpulid.training.w_plus.disturbance import disturb_latents
from openpulid.training.w_plus.losses import WPlusLoss

__all__ = ["WPlusLoss", "disturb_latents"]
