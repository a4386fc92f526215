"""Training data of the miniature: images, cached captions, latents and features."""

from openpulid.mini.data.cache import ArrayCache, cache_folder
from openpulid.mini.data.captions import Captions, token_ids
from openpulid.mini.data.features import FaceFeatures
from openpulid.mini.data.latents import Latents
from openpulid.mini.data.loading import batches, load_faces
from openpulid.mini.data.negatives import load_photographs
from openpulid.mini.data.pairs import PairDataset

__all__ = [
    "ArrayCache",
    "Captions",
    "FaceFeatures",
    "Latents",
    "PairDataset",
    "batches",
    "cache_folder",
    "load_faces",
    "load_photographs",
    "token_ids",
]
