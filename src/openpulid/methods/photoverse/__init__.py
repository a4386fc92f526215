"""PhotoVerse (arXiv 2309.05793), a re-implementation from the paper: words and visual tokens."""

from openpulid.methods.photoverse.photoverse import PhotoVerse

__all__ = ["PhotoVerse"]
