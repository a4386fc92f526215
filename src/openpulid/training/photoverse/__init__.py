"""Random fusion and losses of PhotoVerse (arXiv 2309.05793)."""

from openpulid.training.photoverse.losses import PhotoVerseLoss, draw_fusion, mean_size

__all__ = ["PhotoVerseLoss", "draw_fusion", "mean_size"]
