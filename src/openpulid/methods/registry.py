"""What every method of showing an identity looks like, and where each is found."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

from openpulid.errors import OptionError


@runtime_checkable
class Method(Protocol):
    """The face that all methods share.

    `attach` names the pipelines a method serves and changes nothing in them. `use` opens and closes the
    change; while it is closed the pipeline gives bit for bit what it gave before. `detach` forgets the
    pipeline.
    """

    def attach(self, pipe: Any) -> None: ...

    def use(self, people: Any, /, *args: Any, **options: Any) -> AbstractContextManager[Any]: ...

    def detach(self, pipe: Any = None) -> None: ...


METHODS = {
    "faceid": "openpulid.methods.ip_adapter.faceid:FaceID",
    "faceid-plus": "openpulid.methods.ip_adapter.faceid:FaceIDPlus",
    "instantid": "openpulid.methods.ip_adapter.instantid:InstantID",
    "ip-adapter": "openpulid.methods.ip_adapter.ip_adapter:IPAdapter",
    "ip-adapter-plus": "openpulid.methods.ip_adapter.ip_adapter:IPAdapter",
    "ip-adapter-plus-face": "openpulid.methods.ip_adapter.ip_adapter:IPAdapter",
    "photomaker": "openpulid.methods.photomaker.adapter:PhotoMaker",
    "photomaker-v2": "openpulid.methods.photomaker.adapter:PhotoMaker",
    "pulid": "openpulid.methods.pulid.sdxl:PuLID",
}
"""Name -> module:class. Nothing is imported before it is asked for."""


def find_method(name: str) -> type:
    """The class of the method called `name`.

    Raises:
        OptionError: there is no such method.
    """
    if name not in METHODS:
        raise OptionError(
            f"there is no method {name!r}; the known ones are {', '.join(sorted(METHODS))}."
        )
    module, _, attribute = METHODS[name].partition(":")
    found: type = getattr(import_module(module), attribute)
    return found
