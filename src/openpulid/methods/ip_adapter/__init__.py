"""IP-Adapter and the methods that share its layers: FaceID and InstantID."""

from openpulid.methods.ip_adapter.base import IPAdapterBase, read_parts
from openpulid.methods.ip_adapter.export import export_adapter, trainable_layers
from openpulid.methods.ip_adapter.faceid import FaceID
from openpulid.methods.ip_adapter.instantid import InstantID

__all__ = [
    "FaceID",
    "IPAdapterBase",
    "InstantID",
    "export_adapter",
    "read_parts",
    "trainable_layers",
]
