"""Versions of the packages, whether they can be imported, and which of them conflict."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement
from packaging.version import Version

from openpulid import __version__
from openpulid.doctor.report import Section, describe_error
from openpulid.errors import explain_missing_library

OWN_NAME = "openpulid"

DEVELOPMENT = ("dev", "docs")
"""Extras that only developers need."""

ALTERNATIVES = {
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"),
    "opencv-python": (
        "opencv-python-headless",
        "opencv-contrib-python",
        "opencv-contrib-python-headless",
    ),
}
"""Packages that provide the same module as a requirement. They replace one another's files."""

MODULES = {
    "onnxruntime": "onnxruntime",
    "opencv-python": "cv2",
    "pillow": "PIL",
    "flash-attn": "flash_attn",
}
"""Modules with another name than their package."""

KERNELS = ("xformers", "flash-attn")
"""Optional packages that diffusers imports if they are installed. Each is built for one torch."""

FIRST_FOR_NUMPY_2 = {"onnxruntime": "1.19", "opencv-python": "4.10.0.84"}
"""First versions that are compiled for NumPy 2, of packages whose metadata do not say so."""


def check() -> Section:
    """List the packages and find conflicts between them."""
    rows = [
        (OWN_NAME, __version__, "", "works"),
        ("Python", platform.python_version(), metadata(OWN_NAME)["Requires-Python"], "works"),
    ]
    problems = [*find_duplicates(), *find_old_binaries()]
    for requirement, extra in list_requirements():
        state, problem = check_requirement(requirement, extra)
        installed = find_installed(requirement.name)
        name, release = installed[0] if installed else (requirement.name, "-")
        rows.append((name, release, str(requirement.specifier), state))
        problems += [problem] if problem else []
        problems += find_mismatches(name)
    for name in KERNELS:
        if find_installed(name):
            state, problem = check_kernel(name)
            rows.append((name, version(name), "optional", state))
            problems += [problem] if problem else []
    columns = ("package", "version", "required", "state")
    return Section(columns, tuple(rows), tuple(dict.fromkeys(problems)))


def list_requirements() -> Iterator[tuple[Requirement, str]]:
    """Yield what openpulid requires, and the extra that requires it, "" for none.

    Raises:
        PackageNotFoundError: openpulid is not installed, but only on the path.
    """
    requirements = [Requirement(text) for text in requires(OWN_NAME) or ()]
    extras = metadata(OWN_NAME).get_all("Provides-Extra") or []
    names: set[str] = set()
    for extra in ("", *(extra for extra in extras if extra not in DEVELOPMENT)):
        for requirement in requirements:
            is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            if is_needed and requirement.name not in names:
                names.add(requirement.name)
                yield requirement, extra


def find_installed(name: str) -> list[tuple[str, str]]:
    """Return name and version of a package, and of all that provide the same module."""
    installed = []
    for candidate in (name, *ALTERNATIVES.get(name, ())):
        try:
            installed.append((candidate, version(candidate)))
        except PackageNotFoundError:
            continue
    return installed


def check_requirement(requirement: Requirement, extra: str) -> tuple[str, str]:
    """Check the version of a package, and import it unless it is of an extra.

    Returns:
        Its state in one phrase, and the problem as a sentence, or "".
    """
    installed = find_installed(requirement.name)
    name = requirement.name
    if not installed:
        if extra:
            return f"not installed (extra {extra})", ""
        return "not installed", f"{name} is not installed; pip install '{requirement}'."
    name, release = installed[0]
    if not requirement.specifier.contains(release, prereleases=True):
        fix = f"pip install '{name}{requirement.specifier}'"
        problem = (
            f"openpulid needs {name}{requirement.specifier}, but {release} is installed; {fix}."
        )
        return "wrong version", problem
    if extra:
        return "installed", ""  # importing Gradio or Ray takes seconds
    if reason := find_import_error(MODULES.get(requirement.name, name.replace("-", "_"))):
        fix = f"install it again: pip install --force-reinstall '{name}=={release}'"
        return f"cannot be imported: {reason}", f"{name} cannot be imported: {reason[:-1]}; {fix}."
    return "works", ""


def find_import_error(module: str) -> str:
    """Import a module.

    Returns:
        Why that fails, as a sentence, or "".
    """
    try:
        with explain_missing_library():
            import_module(module)
    # A broken package can raise anything, and an OSError for a missing library.
    except Exception as error:
        return describe_error(error)
    return ""


def find_duplicates() -> Iterator[str]:
    """Yield a sentence on packages that provide the same module and are all installed."""
    for name in ALTERNATIVES:
        installed = [release for release, _ in find_installed(name)]
        if len(installed) > 1:
            names = " and ".join(installed)
            yield (
                f"{names} are installed and overwrite one another's files; keep one: "
                f"pip uninstall {' '.join(installed)}, then pip install the one you need."
            )


def find_old_binaries() -> Iterator[str]:
    """Yield a sentence on each package that was compiled for NumPy 1, next to NumPy 2."""
    numpy = find_installed("numpy")
    if not numpy or Version(numpy[0][1]) < Version("2"):
        return
    for requirement, first in FIRST_FOR_NUMPY_2.items():
        for name, release in find_installed(requirement):
            if Version(release) < Version(first):
                yield (
                    f"{name} {release} was compiled for NumPy 1, but NumPy {numpy[0][1]} is "
                    f"installed; pip install '{name}>={first}'."
                )


def find_mismatches(name: str) -> Iterator[str]:
    """Yield a sentence on each requirement of a package that another version is installed of."""
    try:
        texts = requires(name) or ()
    except PackageNotFoundError:
        return
    for requirement in map(Requirement, texts):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        for other, release in find_installed(requirement.name)[:1]:
            if not requirement.specifier.contains(release, prereleases=True):
                yield (
                    f"{name} {version(name)} needs {other}{requirement.specifier}, but {release} "
                    f"is installed; pip install '{other}{requirement.specifier}', or another "
                    f"version of {name}."
                )


def check_kernel(name: str) -> tuple[str, str]:
    """Check an optional package that is built for one version of torch.

    Returns:
        Its state in one phrase, and the problem as a sentence, or "".
    """
    mismatches = list(find_mismatches(name))
    reason = find_import_error(MODULES.get(name, name))
    if not reason and not mismatches:
        return "works", ""
    cause = mismatches[0].split(";")[0] if mismatches else f"{name} cannot be imported: {reason}"
    state = f"cannot be imported: {reason}" if reason else "wrong version"
    cause = cause.rstrip(".")
    return state, f"{cause}; openpulid does not need it: pip uninstall {name}."
