"""Folders of ComfyUI in which the nodes look for files."""

from __future__ import annotations

from pathlib import Path

import folder_paths

ADAPTERS = "pulid"
IDENTITIES = "pulid_identities"
MINIATURE = "miniature (synthetic people)"
"""The option of the loaders for the small models that are part of openpulid."""

DEFAULT_PACK = "antelopev2"
"""The face models with which the published adapters were trained; `pulid weights get` installs
them."""


def register_folders() -> None:
    """Add models/pulid, models/pulid_identities and output/identities to ComfyUI's folders."""
    models = Path(folder_paths.models_dir)
    folder_paths.add_model_folder_path(ADAPTERS, str(models / ADAPTERS))
    folder_paths.add_model_folder_path(IDENTITIES, str(models / IDENTITIES))
    folder_paths.add_model_folder_path(IDENTITIES, str(identity_output_folder()))


def identity_output_folder() -> Path:
    """Return the folder in which identities are saved."""
    return Path(folder_paths.get_output_directory()) / "identities"


def list_adapters() -> list[str]:
    """List the adapter files, and the miniature's."""
    return [*_list_files(ADAPTERS), MINIATURE]


def list_identities() -> list[str]:
    """List the identity files."""
    return _list_files(IDENTITIES)


def list_face_packs() -> list[str]:
    """List the insightface packs in models/insightface/models, and the miniature's face models."""
    folder = Path(folder_paths.models_dir) / "insightface" / "models"
    found = sorted(path.name for path in folder.glob("*") if path.is_dir())
    return list(dict.fromkeys([DEFAULT_PACK, *found, MINIATURE]))


def find_face_pack(name: str) -> Path | None:
    """Return the folder of an insightface pack; None if it is not in ComfyUI's folder."""
    folder = Path(folder_paths.models_dir) / "insightface" / "models" / Path(name).name
    return folder if folder.is_dir() else None


def _list_files(folder: str) -> list[str]:
    if folder not in folder_paths.folder_names_and_paths:
        return []
    return list(folder_paths.get_filename_list(folder))
