"""The files of options that can be repeated, next to `--from`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

REPEATED_FILES = {
    "person": "people.0.images",
    "mask": "people.0.mask",
    "control": "controls.0.model",
    "control_image": "controls.0.image",
    "lora": "loras.0.model",
    "embedding": "embeddings.0.file",
}
"""Parameters that name several files, and a field of the request for messages."""


def name_repeated_files(
    required: Iterable[str], repeated: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Assign files to the fields of a request that need them, in order.

    Args:
        required: fields of the request that need a file.
        repeated: parameter of `REPEATED_FILES` -> its files.

    Returns:
        Field -> file. A file too many has a field that is not required.
    """
    fields: dict[str, list[str]] = {name: [] for name in REPEATED_FILES}
    for field in required:
        if name := _find_parameter(field):
            fields[name].append(field)
    named: dict[str, str] = {}
    for name, paths in repeated.items():
        count = len(fields[name])
        extra = [f"{REPEATED_FILES[name]}.{number}" for number in range(count, len(paths))]
        named |= dict(zip([*fields[name], *extra], paths, strict=False))
    return named


def _find_parameter(field: str) -> str | None:
    """Return the parameter that names the file of a field; None for other parameters."""
    if field.startswith("people."):
        return "mask" if field.endswith(".mask") else "person"
    if field.startswith("controls."):
        return "control" if field.endswith(".model") else "control_image"
    return {"loras": "lora", "embeddings": "embedding"}.get(field.partition(".")[0])
