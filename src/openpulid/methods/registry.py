"""Names of the methods and the classes that implement them.

`openpulid.methods.adapter` describes how to add a method.
"""

from __future__ import annotations

from importlib import import_module

from openpulid.errors import OptionError, suggest
from openpulid.methods.adapter import Adapter

METHODS = {
    "custom-diffusion": "openpulid.methods.tuned.custom_diffusion:CustomDiffusion",
    "dreambooth": "openpulid.methods.tuned.dreambooth:DreamBooth",
    "elite": "openpulid.methods.elite.elite:ELITE",
    "face0": "openpulid.methods.face0.face0:Face0",
    "faceid": "openpulid.methods.ip_adapter.faceid:FaceID",
    "faceid-plus": "openpulid.methods.ip_adapter.faceid:FaceIDPlus",
    "fastcomposer": "openpulid.methods.fastcomposer.fastcomposer:FastComposer",
    "infiniteyou": "openpulid.methods.infiniteyou.flux:InfiniteYou",
    "infiniteyou-sim": "openpulid.methods.infiniteyou.flux:InfiniteYou",
    "instantid": "openpulid.methods.ip_adapter.instantid:InstantID",
    "ip-adapter": "openpulid.methods.ip_adapter.ip_adapter:IPAdapter",
    "ip-adapter-plus": "openpulid.methods.ip_adapter.ip_adapter:IPAdapter",
    "ip-adapter-plus-face": "openpulid.methods.ip_adapter.ip_adapter:IPAdapter",
    "lora": "openpulid.methods.tuned.lora:TunedLora",
    "photomaker": "openpulid.methods.photomaker.photomaker:PhotoMaker",
    "photomaker-v2": "openpulid.methods.photomaker.photomaker:PhotoMaker",
    "photoverse": "openpulid.methods.photoverse.photoverse:PhotoVerse",
    "pulid": "openpulid.methods.pulid.sdxl:PuLID",
    "textual-inversion": "openpulid.methods.tuned.textual_inversion:TextualInversion",
    "w-plus": "openpulid.methods.w_plus.w_plus:WPlusAdapter",
}
"""Name -> module:class. A module is imported when its method is first used."""


TUNED_METHODS = ("custom-diffusion", "dreambooth", "lora", "textual-inversion")
"""Methods that `pulid tune` trains on images of one person, who is then in the adapter's file."""

UNPUBLISHED_METHODS = ("elite", "face0", "fastcomposer", "photoverse", "w-plus")
"""Methods without published weights for SDXL; the user passes a file."""


def find_method(name: str) -> type[Adapter]:
    """Return the class of a method.

    Raises:
        OptionError: There is no method of this name.
    """
    if name not in METHODS:
        methods = ", ".join(sorted(METHODS))
        raise OptionError(f"no method {name!r}{suggest(name, METHODS)}; choose one of {methods}.")
    module, _, attribute = METHODS[name].partition(":")
    method: type[Adapter] = getattr(import_module(module), attribute)
    return method
