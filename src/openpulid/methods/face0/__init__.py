"""Face0 (arXiv 2306.06638), a re-implementation from the paper: a face in three text tokens."""

from openpulid.methods.face0.face0 import Face0

__all__ = ["Face0"]
