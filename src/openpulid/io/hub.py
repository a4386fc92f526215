"""Locate, download and verify published weights.

Weights are looked up on this machine first. The network is only used by `download`: a missing file
is an error that names the command which downloads it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from glob import escape
from pathlib import Path
from urllib.error import URLError

from openpulid.errors import OptionError, PulidError, WeightsError, first_line, suggest
from openpulid.io.loggers import silence_warnings
from openpulid.io.lora_files import select_lora_file
from openpulid.io.networks import (
    PIPELINE_INDEX,
    SINGLE_NETWORK,
    Part,
    find_missing_parts,
    list_files,
    list_folder,
    read_parts,
    select_weights,
)
from openpulid.io.registry import SHA256, WEIGHTS, Weight

FOLDER_VARIABLE = "PULID_WEIGHTS"
"""Environment variable that names a folder of weights; it is searched before the hub's cache."""

FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf", ".onnx")
"""Suffixes of weights files; a name that ends with one of them is not a name of the hub."""

AURAFACE = "auraface"
"""Face recognition model of `--faces open`. Its file has the name of antelopev2's."""

TIMEOUT = 10
"""Seconds to wait for the first answer of the hub."""

SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")


def find_weight(name: str) -> Weight:
    """Return the registry entry `name`, or an entry for any pipeline of the hub as OWNER/NAME.

    Raises:
        OptionError: there is no such entry; the message lists all names.
        WeightsError: `name` is a path of a file or folder.
    """
    if name in WEIGHTS:
        return WEIGHTS[name]
    if is_repo_id(name):
        return Weight(name, "", "see its page on the hub", None, None)
    path = Path(name)
    if name.startswith((".", "~")) or len(path.parts) > 1 or path.suffix.lower() in FILES:
        problem = "is no published weight" if path.exists() else "does not exist"
        raise WeightsError(
            f"{name} {problem}; "
            "name an existing file or folder, or a pipeline of the hub as OWNER/NAME."
        )
    raise OptionError(
        f"there are no weights called {name!r}{suggest(name, WEIGHTS)}; "
        f"the known names are {', '.join(WEIGHTS)}."
    )


def locate(
    name: str, folder: str | os.PathLike[str] | None = None, require_weights: bool = True
) -> Path:
    """Return the path of a weight on this machine, without using the network.

    Args:
        name: a name of the registry, or OWNER/NAME.
        folder: searched first; then the folder in PULID_WEIGHTS, then the hub's cache.
        require_weights: for a pipeline, require the weights of all its components. False if their
            configuration is enough.

    Raises:
        OptionError: there is no such entry.
        WeightsError: it is not installed; the message says how to get it.
    """
    entry = find_weight(name)
    lacking = ""
    subfolder = f"a folder {entry.folder} in " if entry.folder else ""
    for path in _find_candidates(entry, folder):
        if entry.file:
            if path.is_file():
                known = identify_file(path)
                if known in (None, name):
                    return path
                lacking = f" ({path} is the file of {known})"
            continue
        missing = _find_missing(path, require_weights)
        if not missing:
            return path
        if path.is_dir() and not lacking:
            part, reason = next(iter(missing.items()))
            lacking = f" ({path} lacks {reason}{f' of {part}' if part else ''})"
    raise WeightsError(
        f"{entry.name} is not installed{lacking}; `pulid weights get {name}` downloads it"
        f"{entry.size}, or put it into {subfolder}a folder and set {FOLDER_VARIABLE} to that "
        "folder."
    )


def identify_file(path: Path) -> str | None:
    """Return which published file a file is, if several have its name: AuraFace's, or antelopev2's.

    They are told apart by their SHA-256. None for another file, and for one whose name is unique.
    """
    names = [name for name, entry in WEIGHTS.items() if Path(entry.file).name == path.name]
    hashes = {SHA256[name]: name for name in names if name in SHA256}
    if len(hashes) < 2:
        return None
    if path.is_symlink() and path.resolve().name in hashes:
        return hashes[path.resolve().name]  # in the hub's cache, files are called by their hash
    status = path.stat()
    return hashes.get(_hash_file(path, status.st_size, status.st_mtime_ns))


@lru_cache
def _hash_file(path: Path, size: int, modified: int) -> str:
    """Return the SHA-256 of a file; it is read again when its size or time changes."""
    from openpulid.io.checkpoints import sha256

    return sha256(path)


def download(
    name: str, folder: str | os.PathLike[str] | None = None, log: Callable[[str], None] = print
) -> Path:
    """Return the path of a weight and download it first if it is not installed.

    An interrupted download from the hub is resumed; a file that is not on the hub starts again. The
    hub's own environment variables apply: HF_ENDPOINT (mirror), HF_TOKEN (gated repositories) and
    HF_HUB_OFFLINE (no network).

    Args:
        name: a name of the registry, or OWNER/NAME.
        folder: the target folder; the hub's cache by default.
        log: receives the license before the download starts.

    Raises:
        OptionError: there is no such entry.
        WeightsError: the download failed.
    """
    entry = find_weight(name)
    with suppress(WeightsError):
        return locate(name, folder)
    if entry.is_manual:
        raise WeightsError(
            f"{entry.file} cannot be downloaded automatically; get it from {entry.repo}, "
            f"put it into a folder and set {FOLDER_VARIABLE} to that folder."
        )
    restriction = "  (not for commercial use)" if entry.commercial is False else ""
    with _describe_download_errors(entry), silence_warnings("huggingface_hub"):
        names = _check_connection(entry)
        log(f"{entry.name}{entry.size}, license: {entry.license}{restriction}")
        target = None if folder is None else Path(folder) / entry.folder
        return _download(entry, names, target, SHA256.get(name))


def find_download_folder(name: str) -> Path:
    """Return the cache into which `download` puts a weight by default.

    Raises:
        OptionError: there is no such entry.
    """
    from huggingface_hub import constants

    if find_weight(name).repo.startswith("https://"):
        return _torch_cache()
    return Path(constants.HF_HUB_CACHE)


def _torch_cache() -> Path:
    from torch.hub import get_dir

    return Path(get_dir()) / "checkpoints"


@contextmanager
def _describe_download_errors(entry: Weight) -> Iterator[None]:
    """Turn an error of a download into one sentence."""
    from httpx import TransportError
    from huggingface_hub.errors import GatedRepoError

    try:
        yield
    except PulidError:
        raise
    except GatedRepoError as error:
        raise WeightsError(
            f"{entry.name} requires accepting its license; accept it at "
            f"https://huggingface.co/{entry.repo}, set HF_TOKEN (or run `hf auth login`), "
            "and run the same command again."
        ) from error
    # The hub's client, requests and the operating system have unrelated exception classes.
    except Exception as error:
        reason = first_line(error)
        advice = "run the same command again, complete files are kept"
        if isinstance(error, (TransportError, URLError)):
            reason = f"no connection: {reason}"
            advice = f"check the network and its proxy, and {advice}"
        raise WeightsError(f"{entry.name} could not be downloaded ({reason}); {advice}.") from error


def verify_weights(name: str, folder: str | os.PathLike[str] | None = None) -> str:
    """Hash a weight and compare it with `SHA256`, or with the hash that the hub reported.

    Returns:
        "verified", or "installed, but no hash is known" if there is nothing to compare with.

    Raises:
        WeightsError: it is not installed, or its hash differs.
    """
    from openpulid.io.checkpoints import sha256

    path = locate(name, folder)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    num_verified = 0
    for file in files:
        expected = SHA256.get(name) or _expected_hash(file)
        if expected is None:
            continue
        num_verified += 1
        if sha256(file) != expected:
            raise WeightsError(
                f"{file} is damaged: its SHA-256 is not {expected}; download it again."
            )
    return "verified" if num_verified else "installed, but no hash is known"


def _search_folders(folder: str | os.PathLike[str] | None) -> Sequence[Path]:
    candidates = (folder, os.environ.get(FOLDER_VARIABLE))
    return [Path(candidate).expanduser() for candidate in candidates if candidate]


def is_repo_id(name: str) -> bool:
    """Return whether a name is a valid OWNER/NAME of the hub and not a file name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name.count("/") != 1 or Path(name).suffix.lower() in FILES:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _find_candidates(entry: Weight, folder: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Yield the paths where a weight may be: in the folders, then in the caches."""
    for root in _search_folders(folder):
        path = entry.file or entry.repo_folder or entry.repo.split("/")[-1]
        yield root / entry.folder / path
    if entry.repo.startswith("https://"):
        yield _torch_cache() / entry.file
        return
    for snapshot in _find_snapshots(entry.repo):
        yield snapshot / (entry.file or entry.repo_folder)


def _find_snapshots(repo: str) -> list[Path]:
    """Return the snapshots of a repository in the hub's cache, the current one first.

    A cache that was copied from another machine may lack `refs`, and the current snapshot may be
    the beginning of an update: then the newest of the others is used.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    root = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    try:
        snapshots = [path for path in (root / "snapshots").iterdir() if path.is_dir()]
        snapshots.sort(key=lambda path: (-path.stat().st_mtime, path.name))
    except OSError:
        return []
    with suppress(OSError):
        commit = (root / "refs" / "main").read_text("utf-8").strip()
        snapshots.sort(key=lambda path: path.name != commit)
    return snapshots


def _find_missing(folder: Path, require_weights: bool) -> dict[str, str]:
    """Return what a folder lacks of a pipeline, a single network or a LoRA: part -> reason.

    A pipeline is complete with every part of its index. The hub's own check also requires files
    that were not requested, and some repositories hold components for other programs.
    """
    names = list_files(folder)
    if PIPELINE_INDEX in names:
        parts = read_parts((folder / PIPELINE_INDEX).read_bytes())
    elif select_lora_file(names):
        return {}
    else:
        parts = {"": SINGLE_NETWORK}
        require_weights = True
    return find_missing_parts(names, parts, require_weights)


def _check_connection(entry: Weight) -> list[str]:
    """Ask the hub for a weight once, without the retries of its client.

    Returns:
        The names of all files, for a pipeline.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, model_info

    if entry.repo.startswith("https://"):
        return []
    if entry.file:
        get_hf_file_metadata(hf_hub_url(entry.repo, entry.file), timeout=TIMEOUT)
        return []
    siblings = model_info(entry.repo, timeout=TIMEOUT).siblings or []
    return [sibling.rfilename for sibling in siblings]


def _download(
    entry: Weight, names: Sequence[str], folder: Path | None, expected: str | None
) -> Path:
    from huggingface_hub import hf_hub_download

    if entry.repo.startswith("https://"):
        return _download_url(entry, folder, expected)
    if entry.file:
        return Path(hf_hub_download(entry.repo, entry.file, local_dir=folder))
    if entry.repo_folder:
        return _download_network(entry, names, folder)
    return _download_pipeline(entry, names, folder)


def _download_url(entry: Weight, folder: Path | None, expected: str | None) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled
    from torch.hub import download_url_to_file

    # Offline mode of the hub is taken to forbid all network access.
    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled(
            f"Cannot reach {entry.repo}: offline mode is enabled by HF_HUB_OFFLINE"
        )
    path = (folder or _torch_cache()) / entry.file
    path.parent.mkdir(parents=True, exist_ok=True)
    # PyTorch's own files carry the beginning of their hash in their name.
    hash_in_name = re.search(r"-([0-9a-f]{8,})\.pth$", entry.file)
    hash_prefix = expected or (hash_in_name[1] if hash_in_name else None)
    download_url_to_file(entry.repo, str(path), hash_prefix)
    return path


def _download_pipeline(entry: Weight, names: Sequence[str], folder: Path | None) -> Path:
    """Download the configuration of a pipeline, and the weights that its loader opens; or a LoRA.

    Args:
        entry: of the pipeline, of a single network, or of a LoRA.
        names: of all files in the repository.
        folder: the target folder; the hub's cache by default.

    Raises:
        WeightsError: a part has no safetensors weights.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    target = folder / entry.repo.split("/")[-1] if folder else None
    parts = {"": SINGLE_NETWORK}
    if PIPELINE_INDEX in names:
        index = Path(hf_hub_download(entry.repo, PIPELINE_INDEX, local_dir=target))
        parts = read_parts(index.read_bytes())
    elif lora := select_lora_file(names):
        return Path(snapshot_download(entry.repo, allow_patterns=[escape(lora)], local_dir=target))
    patterns = ["*.json", "*.jinja", "*.txt", "*.model"]
    patterns += _list_weights(entry, names, parts)
    return Path(snapshot_download(entry.repo, allow_patterns=patterns, local_dir=target))


def _download_network(entry: Weight, names: Sequence[str], folder: Path | None) -> Path:
    """Download the network in a folder of a repository, to the same place as in the repository.

    So it comes to be next to single files of the repository.

    Raises:
        WeightsError: it has no safetensors weights.
    """
    from huggingface_hub import snapshot_download

    part = entry.repo_folder
    patterns = [f"{escape(part)}/*.json", *_list_weights(entry, names, {part: SINGLE_NETWORK})]
    snapshot = snapshot_download(entry.repo, allow_patterns=patterns, local_dir=folder)
    return Path(snapshot) / part


def _list_weights(entry: Weight, names: Sequence[str], parts: Mapping[str, Part]) -> list[str]:
    """Return the patterns of the weights of all networks of a repository.

    Args:
        entry: of the registry.
        names: of all files in the repository.
        parts: the networks, and what else a pipeline has.

    Raises:
        WeightsError: a part has no safetensors weights.
    """
    missing = find_missing_parts(names, parts, allow_pickle=False)
    if missing:
        raise _incomplete_repository(entry, names, missing)
    patterns = []
    for part, kind in parts.items():
        weights = select_weights(list_folder(names, part), allow_pickle=False)
        if kind.is_network and weights is not None:
            prefix = f"{part}/" if part else ""
            patterns += [escape(prefix + name) for name in weights.names]
    return patterns


def _incomplete_repository(
    entry: Weight, names: Sequence[str], missing: Mapping[str, str]
) -> WeightsError:
    """Create the error for a repository that lacks parts of a pipeline."""
    described = " and ".join(f"{part} {reason}".strip() for part, reason in missing.items())
    single_files = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    fix = "choose another repository"
    if single_files:
        fix = f"download its file {min(single_files)} and pass that with --base or --lora"
    return WeightsError(f"{entry.repo} is no complete pipeline, it lacks {described}; {fix}.")


def _expected_hash(file: Path) -> str | None:
    """Return the SHA-256 that the hub reported when a file was downloaded.

    In the hub's cache this is the name of the symlink's target. In a folder it is in the download's
    metadata.
    """
    if file.is_symlink():
        target = file.resolve().name
        return target if SHA256_PATTERN.fullmatch(target) else None
    for root in file.parents:
        name = f"{file.relative_to(root)}.metadata"
        metadata = root / ".cache" / "huggingface" / "download" / name
        if metadata.is_file():
            lines = metadata.read_text("utf-8").splitlines()
            return lines[1] if len(lines) > 1 and SHA256_PATTERN.fullmatch(lines[1]) else None
    return None
