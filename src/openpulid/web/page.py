"""The web page: reference images and a prompt in, images out.

It is served to this machine alone by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from openpulid.errors import OptionError, require_libraries
from openpulid.pipelines.request import ModelSelection
from openpulid.web.folders import open_session
from openpulid.web.network import without_proxy

if TYPE_CHECKING:
    from openpulid.io.content_credentials import ContentSigner


@contextmanager
def open_app(
    preset: str = "mini",
    device: str | None = None,
    has_history: bool = False,
    allow_paths: bool = False,
    signer: ContentSigner | None = None,
    **changes: str | None,
) -> Iterator[Any]:
    """Build the page, with a directory for its images that is deleted at the end.

    Args:
        preset: the preset that is selected first.
        device: where to compute.
        has_history: whether visitors can see again what they have generated.
        allow_paths: whether visitors may name folders and files of this machine as weights.
        signer: adds signed content credentials (C2PA) to generated images.
        changes: what is changed in the preset: fields of `ModelSelection`.

    Raises:
        OptionError: Gradio is not installed, or there is no such preset, or a change does not
            apply to it, or its files are not installed.
        WeightsError: the base model is not installed.
    """
    require_libraries("the page", ["gradio"], extra="web")
    from openpulid.pipelines.factory import check_models
    from openpulid.pipelines.weights import find_installed_presets, missing_weights

    models = ModelSelection.model_validate({"preset": preset, **changes})
    options = {"has_history": has_history, "allow_paths": allow_paths, "signer": signer}
    with without_proxy(), open_session(device, models, **options) as session:
        resolved = session.preset(models)
        resolved.models.require_adapter()
        if missing := missing_weights(resolved):
            raise OptionError(
                f"preset {preset!r} is not installed, it lacks {', '.join(missing)}; installed: "
                f"{', '.join(find_installed_presets())}. `pulid weights get {preset}` downloads it."
            )
        check_models(resolved)  # fail before the page opens
        from openpulid.web.events import build_page

        yield build_page(session)
