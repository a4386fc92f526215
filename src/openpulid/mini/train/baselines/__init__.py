"""Training of the baselines on the miniature: same images and same budget as PuLID's first stage.

All methods train with the loss weights and timesteps of PuLID's first stage, so that only the
methods differ. The authors of FaceID, InstantID, PhotoMaker, Face0 and InfiniteYou train with
L_diff alone. As its authors do, PhotoMaker restricts the loss to the face in half of the steps
(arXiv 2312.04461, section 4.1). PhotoVerse, FastComposer, ELITE and
W+ Adapter add losses of their authors, see their classes.
"""

from collections.abc import Callable, Mapping, Sequence

from openpulid.mini.train.baselines.base import Baseline, Features, draw_uniform
from openpulid.mini.train.baselines.face_tokens import face0
from openpulid.mini.train.baselines.image_patches import elite
from openpulid.mini.train.baselines.image_words import photoverse
from openpulid.mini.train.baselines.infused_identity import infiniteyou
from openpulid.mini.train.baselines.ip_adapter import faceid, instantid
from openpulid.mini.train.baselines.latent_tokens import w_plus
from openpulid.mini.train.baselines.localized_words import fastcomposer
from openpulid.mini.train.baselines.repeated_words import photomaker

__all__ = ["BASELINES", "FEATURES", "FLUX_NAMES", "NAMES", "Baseline", "Features", "draw_uniform"]

BASELINES: Mapping[str, Callable[..., Baseline]] = {
    "faceid": faceid,
    "instantid": instantid,
    "photomaker": photomaker,
    "face0": face0,
    "photoverse": photoverse,
    "fastcomposer": fastcomposer,
    "elite": elite,
    "w-plus": w_plus,
    "infiniteyou": infiniteyou,
}
"""Name -> creates the untrained method, from the pipeline of its base and the width of the face
embedding, the vision encoder of CLIP, the width of the five levels, or editing directions of the
face latents; see `FEATURES`."""

FEATURES: Mapping[str, Features] = {
    "faceid": "embedding",
    "instantid": "embedding",
    "photomaker": "images",
    "face0": "embedding",
    "photoverse": "levels",
    "fastcomposer": "images",
    "elite": "levels",
    "w-plus": "latents",
    "infiniteyou": "embedding",
}
"""Name -> what the method reads of a person."""

FLUX_NAMES: Sequence[str] = ("infiniteyou",)
"""Methods of the miniature with FLUX's architecture."""

NAMES: Sequence[str] = tuple(name for name in BASELINES if name not in FLUX_NAMES)
"""Methods of the miniature."""
