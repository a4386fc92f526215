"""Registry of published weights, and how to locate, download and verify them.

Weights are looked up on this machine first. The network is only used by `download`: a missing file
is an error that names the command which downloads it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from openpulid.errors import OptionError, WeightsError, suggest

FOLDER_VARIABLE = "PULID_WEIGHTS"
"""Environment variable that names a folder of weights; it is searched before the hub's cache."""

FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf", ".onnx")
"""Suffixes of weights files; a name that ends with one of them is not a name of the hub."""

SHA256_PATTERN = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Weight:
    """A published file, or a complete diffusers pipeline.

    Attributes:
        repo: the repository on the hub; for a file that is not on the hub, its URL.
        file: the file name in the repository; empty for a pipeline.
        license: the short name of the license and what it forbids.
        commercial: whether commercial use is allowed; None if unknown.
        megabytes: approximate size; None if unknown.
    """

    repo: str
    file: str
    license: str
    commercial: bool | None
    megabytes: int | None

    @property
    def name(self) -> str:
        """The name used in messages."""
        return self.file or self.repo

    @property
    def size(self) -> str:
        """The size as it follows the name in messages; empty if unknown."""
        return f" (about {self.megabytes} MB)" if self.megabytes else ""

    @property
    def is_manual(self) -> bool:
        """Whether `repo` is a web page from which the file must be downloaded by hand."""
        return self.repo.startswith("https://") and not self.repo.endswith(self.file)


_PULID = "Apache-2.0; trained with antelopev2, whose terms forbid commercial use"
_INSIGHTFACE = "insightface model license: non-commercial research only"
_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_INSTANTID = "Apache-2.0; uses antelopev2, whose terms forbid commercial use"
_PHOTOMAKER = "Apache-2.0; uses buffalo_l, whose terms forbid commercial use"
_FACEID = "research only, like the insightface models"
_FACEXLIB = "https://github.com/xinntao/facexlib/releases/download"

WEIGHTS: dict[str, Weight] = {
    "pulid-v1": Weight("guozinan/PuLID", "pulid_v1.bin", _PULID, False, 790),
    "pulid-v1.1": Weight("guozinan/PuLID", "pulid_v1.1.safetensors", _PULID, False, 980),
    "pulid-flux-v0.9.0": Weight(
        "guozinan/PuLID", "pulid_flux_v0.9.0.safetensors", _PULID, False, 1140
    ),
    "pulid-flux-v0.9.1": Weight(
        "guozinan/PuLID", "pulid_flux_v0.9.1.safetensors", _PULID, False, 1140
    ),
    "detector": Weight("DIAMONIK7777/antelopev2", "scrfd_10g_bnkps.onnx", _INSIGHTFACE, False, 17),
    "arcface": Weight("DIAMONIK7777/antelopev2", "glintr100.onnx", _INSIGHTFACE, False, 261),
    "eva": Weight("QuanSun/EVA-CLIP", "EVA02_CLIP_L_336_psz14_s6B.pt", "MIT", True, 856),
    "parsing": Weight(
        f"{_FACEXLIB}/v0.2.0/parsing_bisenet.pth", "parsing_bisenet.pth", "MIT", True, 53
    ),
    "arcface-loss": Weight(
        f"{_FACEXLIB}/v0.1.0/recognition_arcface_ir_se50.pth",
        "recognition_arcface_ir_se50.pth",
        "MIT",
        True,
        175,
    ),
    "sdxl-base": Weight(
        "stabilityai/stable-diffusion-xl-base-1.0", "", "CreativeML Open RAIL++-M", True, 6940
    ),
    "lightning-4step": Weight(
        "ByteDance/SDXL-Lightning",
        "sdxl_lightning_4step_unet.safetensors",
        "CreativeML Open RAIL++-M",
        True,
        5140,
    ),
    "juggernaut": Weight("RunDiffusion/Juggernaut-XL-v9", "", "CreativeML Open RAIL-M", True, 6940),
    "flux-dev": Weight(
        "black-forest-labs/FLUX.1-dev", "", "FLUX.1 [dev] non-commercial", False, 33_700
    ),
    "flux-krea-base": Weight(
        "black-forest-labs/FLUX.1-Krea-dev", "", "FLUX.1 [dev] non-commercial", False, 33_700
    ),
    "flux-schnell-base": Weight("black-forest-labs/FLUX.1-schnell", "", "Apache-2.0", True, 33_700),
    "clip-h": Weight("h94/IP-Adapter", "models/image_encoder/model.safetensors", "MIT", True, 2530),
    "ip-adapter": Weight(
        "h94/IP-Adapter", "sdxl_models/ip-adapter_sdxl_vit-h.safetensors", "Apache-2.0", True, 700
    ),
    "ip-adapter-plus": Weight(
        "h94/IP-Adapter",
        "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors",
        "Apache-2.0",
        True,
        850,
    ),
    "ip-adapter-plus-face": Weight(
        "h94/IP-Adapter",
        "sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors",
        "Apache-2.0",
        True,
        850,
    ),
    "buffalo-l": Weight(
        "public-data/insightface", "models/buffalo_l/w600k_r50.onnx", _INSIGHTFACE, False, 174
    ),
    "faceid": Weight("h94/IP-Adapter-FaceID", "ip-adapter-faceid_sdxl.bin", _FACEID, False, 1070),
    "faceid-plus": Weight(
        "h94/IP-Adapter-FaceID", "ip-adapter-faceid-plusv2_sdxl.bin", _FACEID, False, 1490
    ),
    "instantid": Weight("InstantX/InstantID", "ip-adapter.bin", _INSTANTID, False, 1690),
    "identitynet": Weight(
        "InstantX/InstantID",
        "ControlNetModel/diffusion_pytorch_model.safetensors",
        _INSTANTID,
        False,
        2500,
    ),
    "identitynet-config": Weight(
        "InstantX/InstantID", "ControlNetModel/config.json", _INSTANTID, False, 1
    ),
    "photomaker": Weight("TencentARC/PhotoMaker", "photomaker-v1.bin", "Apache-2.0", True, 930),
    "photomaker-v2": Weight(
        "TencentARC/PhotoMaker-V2", "photomaker-v2.bin", _PHOTOMAKER, False, 1800
    ),
    "control-edges": Weight(
        "diffusers/controlnet-canny-sdxl-1.0", "", "CreativeML Open RAIL++-M", True, 2500
    ),
    "control-depth": Weight(
        "diffusers/controlnet-depth-sdxl-1.0", "", "CreativeML Open RAIL++-M", True, 2500
    ),
    "control-pose": Weight("xinsir/controlnet-openpose-sdxl-1.0", "", "Apache-2.0", True, 2500),
    "scorer-recognition": Weight(
        "https://github.com/HuangYG123/CurricularFace",
        "CurricularFace_Backbone.pth",
        "MIT; trained on MS1M, for research",
        False,
        250,
    ),
    "scorer-clip": Weight("openai/clip-vit-large-patch14", "", "MIT", True, 1710),
    "scorer-dino": Weight(
        "timm/vit_small_patch16_224.dino", "model.safetensors", "Apache-2.0", True, 87
    ),
    "scorer-lpips": Weight(
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "alexnet-owt-7be5be79.pth",
        "BSD-3-Clause",
        True,
        233,
    ),
    "scorer-inception": Weight(f"{_FIDELITY}/{_INCEPTION}", _INCEPTION, "Apache-2.0", True, 91),
    "dreamshaper": Weight(
        "Lykon/dreamshaper-xl-lightning", "", "CreativeML Open RAIL++-M", True, 6940
    ),
}
"""Published weights by the short name that presets use. Sizes are rounded from the hub."""

SHA256 = {
    "pulid-flux-v0.9.1": "92c41c3af322b02e58e1b32842e4601e08c8f16ec1fe80089dbe957df510f51d",
    "detector": "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
    "arcface": "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf",
    "eva": "84c3a17a228c567a155259b2245b0b59072bf7da510260a0a02ec54de6d50b05",
    "parsing": "468e13ca13a9b43cc0881a9f99083a430e9c0a38abd935431d1c28ee94b26567",
    "arcface-loss": "a035c768259b98ab1ce0e646312f48b9e1e218197a0f80ac6765e88f8b6ddf28",
    "clip-h": "6ca9667da1ca9e0b0f75e46bb030f7e011f44f86cbfb8d5a36590fcd7507b030",
    "ip-adapter-plus": "3f5062b8400c94b7159665b21ba5c62acdcd7682262743d7f2aefedef00e6581",
    "ip-adapter-plus-face": "677ad8860204f7d0bfba12d29e6c31ded9beefdf3e4bbd102518357d31a292c1",
    "buffalo-l": "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43",
    "faceid": "f455fed24e207c878ec1e0466b34a969d37bab857c5faa4e8d259a0b4ff63d7e",
    "instantid": "02b3618e36d803784166660520098089a81388e61a93ef8002aa79a5b1c546e1",
    "identitynet": "c8127be9f174101ebdafee9964d856b49b634435cf6daa396d3f593cf0bbbb05",
}
"""SHA-256 of single files for which several independent projects state the same value.

For other files of the hub, the hub itself reports the hash when they are downloaded.
"""


def find_weight(name: str) -> Weight:
    """Return the registry entry `name`, or an entry for any pipeline of the hub as OWNER/NAME.

    Raises:
        OptionError: there is no such entry; the message lists all names.
        WeightsError: `name` is a path of a file or folder.
    """
    if name in WEIGHTS:
        return WEIGHTS[name]
    if _is_repo_id(name):
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
    for root in _search_folders(folder):
        if entry.file:
            path = root / entry.file
            is_installed = path.is_file()
        else:
            path = root / entry.repo.split("/")[-1]
            is_installed = _is_complete(path, require_weights)
        if is_installed:
            return path
    cached = _find_in_cache(entry, require_weights)
    if cached is not None:
        return cached
    raise WeightsError(
        f"{entry.name} is not installed; `pulid weights get {name}` downloads it{entry.size}, "
        f"or put it into a folder and set {FOLDER_VARIABLE} to that folder."
    )


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
    from huggingface_hub.errors import GatedRepoError

    entry = find_weight(name)
    with suppress(WeightsError):
        return locate(name, folder)
    if entry.is_manual:
        raise WeightsError(
            f"{entry.file} cannot be downloaded automatically; get it from {entry.repo}, "
            f"put it into a folder and set {FOLDER_VARIABLE} to that folder."
        )
    restriction = "  (not for commercial use)" if entry.commercial is False else ""
    log(f"{entry.name}{entry.size}, license: {entry.license}{restriction}")
    try:
        return _download(entry, None if folder is None else Path(folder), SHA256.get(name))
    except GatedRepoError as error:
        raise WeightsError(
            f"{entry.name} requires accepting its license; accept it at "
            f"https://huggingface.co/{entry.repo}, set HF_TOKEN (or run `hf auth login`), "
            "and run the same command again."
        ) from error
    # The hub's client, requests and the operating system have unrelated exception classes.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{entry.name} could not be downloaded ({reason}); "
            "run the same command again, complete files are kept."
        ) from error


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


def _is_repo_id(name: str) -> bool:
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


def _find_in_cache(entry: Weight, require_weights: bool) -> Path | None:
    """Return the path of a weight in the cache of the hub, or of torch.hub for a URL."""
    from huggingface_hub import try_to_load_from_cache
    from torch.hub import get_dir

    if entry.repo.startswith("https://"):
        path = Path(get_dir()) / "checkpoints" / entry.file
        return path if path.is_file() else None
    names = (entry.file,) if entry.file else ("model_index.json", "config.json")
    for name in names:
        cached = try_to_load_from_cache(entry.repo, name)
        if isinstance(cached, str):
            break
    else:
        return None
    if entry.file:
        return Path(cached)
    folder = Path(cached).parent
    return folder if _is_complete(folder, require_weights) else None


def _is_complete(folder: Path, require_weights: bool) -> bool:
    """Return whether a folder holds a complete pipeline, or a single complete network.

    A pipeline is complete with every component of its index and every shard of their weights. The
    hub's own check also requires files that were not requested, and some repositories hold
    components for other programs.
    """
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        return (folder / "config.json").is_file() and _has_weights(folder)
    index = json.loads(index_file.read_text("utf-8"))
    components = [
        folder / name
        for name, kind in index.items()
        if isinstance(kind, list) and kind[0] is not None
    ]
    if not all(any(component.glob("*config.json")) for component in components):
        return False
    networks = [component for component in components if (component / "config.json").is_file()]
    return not require_weights or all(map(_has_weights, networks))


def _has_weights(component: Path) -> bool:
    """Return whether a folder holds an unsharded weights file, or all shards of an index."""
    names = {file.name for file in component.iterdir() if file.suffix in (".safetensors", ".bin")}
    if any("-of-" not in name for name in names):
        return True
    for index in component.glob("*.index*.json"):
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        if shards <= names:
            return True
    return False


def _download(entry: Weight, folder: Path | None, expected: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    if entry.repo.startswith("https://"):
        return _download_url(entry, folder, expected)
    if entry.file:
        return Path(hf_hub_download(entry.repo, entry.file, local_dir=folder))
    return _download_pipeline(entry, folder)


def _download_url(entry: Weight, folder: Path | None, expected: str | None) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled
    from torch.hub import download_url_to_file, get_dir

    # Offline mode of the hub is taken to forbid all network access.
    if constants.HF_HUB_OFFLINE:
        raise OfflineModeIsEnabled(
            f"Cannot reach {entry.repo}: offline mode is enabled by HF_HUB_OFFLINE"
        )
    path = (folder or Path(get_dir()) / "checkpoints") / entry.file
    path.parent.mkdir(parents=True, exist_ok=True)
    # PyTorch's own files carry the beginning of their hash in their name.
    hash_in_name = re.search(r"-([0-9a-f]{8,})\.pth$", entry.file)
    hash_prefix = expected or (hash_in_name[1] if hash_in_name else None)
    download_url_to_file(entry.repo, str(path), hash_prefix)
    return path


def _download_pipeline(entry: Weight, folder: Path | None) -> Path:
    """Download a pipeline in half precision if it is published so: half the bytes to transfer."""
    from huggingface_hub import list_repo_files, snapshot_download

    has_fp16 = any(name.endswith(".fp16.safetensors") for name in list_repo_files(entry.repo))
    patterns = ["*.json", "*.txt", "*.model", "model.safetensors"]
    if has_fp16:
        patterns.append("*.fp16.safetensors")
    else:
        # The second pattern is for a repository that holds a single network.
        patterns += ["*/*.safetensors", "diffusion_pytorch_model.safetensors"]
    target = folder / entry.repo.split("/")[-1] if folder else None
    return Path(snapshot_download(entry.repo, allow_patterns=patterns, local_dir=target))


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
