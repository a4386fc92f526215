"""IP-Adapter and the methods that share its layers: FaceID and InstantID."""

from openpulid.methods.ip_adapter.base import IPAdapterBase
from openpulid.methods.ip_adapter.export import (
    export_adapter,
    projection_state,
    trainable_layers,
)
from openpulid.methods.ip_adapter.faceid import FaceID
from openpulid.methods.ip_adapter.instantid import InstantID
from openpulid.methods.ip_adapter.resampler import build_resampler

__all__ = [
    "FaceID",
    "IPAdapterBase",
    "InstantID",
    "build_resampler",
    "export_adapter",
    "projection_state",
    "trainable_layers",
]
