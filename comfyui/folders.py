"""Folders of ComfyUI in which the nodes look for files."""

from __future__ import annotations

from pathlib import Path

import folder_paths

ADAPTERS = "pulid"
METHOD_FOLDERS = ("instantid", "ipadapter", "photomaker")
IDENTITIES = "pulid_identities"
MINIATURE = "miniature (synthetic people)"
"""The option of the loaders for the small models that are part of openpulid."""

DEFAULT_PACK = "antelopev2"
"""The face models with which the published adapters were trained; `pulid weights get` installs
them."""

OPEN_PACK = "open, for commercial use"
"""The face models of `pulid train --faces open`."""


def register_folders() -> None:
    """Add the folders of adapters and identities in models, and output/identities."""
    models = Path(folder_paths.models_dir)
    for name in (ADAPTERS, *METHOD_FOLDERS):
        folder_paths.add_model_folder_path(name, str(models / name))
    folder_paths.add_model_folder_path(IDENTITIES, str(models / IDENTITIES))
    folder_paths.add_model_folder_path(IDENTITIES, str(identity_output_folder()))


def identity_output_folder() -> Path:
    """Return the folder in which identities are saved."""
    return Path(folder_paths.get_output_directory()) / "identities"


def list_adapters() -> list[str]:
    """List the adapter files, and the miniature's."""
    return [*_list_files(ADAPTERS), MINIATURE]


def list_method_files() -> list[str]:
    """List the adapter files of other methods as FOLDER/FILE, and the miniature's."""
    files = [f"{folder}/{file}" for folder in METHOD_FOLDERS for file in _list_files(folder)]
    return [*files, MINIATURE]


def find_method_file(name: str) -> Path:
    """Return the path of one of `list_method_files`."""
    folder, _, file = name.partition("/")
    return Path(folder_paths.get_full_path_or_raise(folder, file))


def list_identities() -> list[str]:
    """List the identity files."""
    return _list_files(IDENTITIES)


def list_face_packs(is_photo: bool = False) -> list[str]:
    """List the insightface packs in models/insightface/models, and the face models of the package.

    Args:
        is_photo: list those in the folder alone.
    """
    folder = Path(folder_paths.models_dir) / "insightface" / "models"
    found = sorted(path.name for path in folder.glob("*") if path.is_dir())
    if is_photo:
        return found
    return list(dict.fromkeys([DEFAULT_PACK, *found, OPEN_PACK, MINIATURE]))


def find_face_pack(name: str) -> Path | None:
    """Return the folder of an insightface pack; None if it is not in ComfyUI's folder."""
    folder = Path(folder_paths.models_dir) / "insightface" / "models" / Path(name).name
    return folder if folder.is_dir() else None


def _list_files(folder: str) -> list[str]:
    if folder not in folder_paths.folder_names_and_paths:
        return []
    return list(folder_paths.get_filename_list(folder))
