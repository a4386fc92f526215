"""W+ Adapter (arXiv 2311.17461): a StyleGAN2 latent as four tokens of a second attention."""

from openpulid.methods.w_plus.w_plus import WPlusAdapter

__all__ = ["WPlusAdapter"]
