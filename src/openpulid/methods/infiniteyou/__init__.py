"""InfiniteYou (arXiv 2503.16418): a ControlNet of FLUX that reads an identity, not the prompt."""

from openpulid.methods.infiniteyou.flux import InfiniteYou

__all__ = ["InfiniteYou"]
