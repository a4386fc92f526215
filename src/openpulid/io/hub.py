"""The table of published weights: what there is, under which licence, where it lies; this machine first, the hub second.

Nothing here is asked of a network unless `get` is called: a missing file is an error that names the command which gets it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from openpulid.errors import OptionError, WeightsError

FOLDER_VARIABLE = "PULID_WEIGHTS"
"""The environment's variable that names a folder of weights; the hub's cache comes after it."""

FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf", ".onnx")
"""How files of weights end; what ends so is no name of the hub."""


@dataclass(frozen=True)
class Weight:
    """One published file, or a whole diffusers pipeline.

    Attributes:
        repo: on the hub; or the address of the single file, where it is on no hub.
        file: its name in there; empty for a whole pipeline.
        licence: its short name; what it forbids stands beside it.
        commercial: whether it may be used for money; None where that is not known here.
        megabytes: about; None where that is not known here.
    """

    repo: str
    file: str
    licence: str
    commercial: bool | None
    megabytes: int | None

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.file or self.repo

    @property
    def size(self) -> str:
        """What follows its name in messages; nothing where it is not known."""
        return f" (about {self.megabytes} MB)" if self.megabytes else ""

    @property
    def by_hand(self) -> bool:
        """Whether its address is a page, on which the file is found."""
        return self.repo.startswith("https://") and not self.repo.endswith(self.file)


_PULID = "Apache-2.0; learned with antelopev2, whose terms forbid commercial use"
_INSIGHTFACE = "insightface model licence: non-commercial research only"
_FIDELITY = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0"
_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_INSTANTID = "Apache-2.0; reads antelopev2, whose terms forbid commercial use"
_PHOTOMAKER = "Apache-2.0; reads buffalo_l, whose terms forbid commercial use"
_FACEID = "research only, as insightface's models"
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
    "judge-recogniser": Weight(
        "https://github.com/HuangYG123/CurricularFace",
        "CurricularFace_Backbone.pth",
        "MIT; trained on MS1M, for research",
        False,
        250,
    ),
    "judge-clip": Weight("openai/clip-vit-large-patch14", "", "MIT", True, 1710),
    "judge-dino": Weight(
        "timm/vit_small_patch16_224.dino", "model.safetensors", "Apache-2.0", True, 87
    ),
    "judge-lpips": Weight(
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "alexnet-owt-7be5be79.pth",
        "BSD-3-Clause",
        True,
        233,
    ),
    "judge-inception": Weight(f"{_FIDELITY}/{_INCEPTION}", _INCEPTION, "Apache-2.0", True, 91),
    "dreamshaper": Weight(
        "Lykon/dreamshaper-xl-lightning", "", "CreativeML Open RAIL++-M", True, 6940
    ),
}
"""By the short name that presets use. Sizes are what the hub shows, rounded."""

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
"""Of single files, where several independent projects state the same. Of the others the hub itself says it at the download."""


def find_weight(name: str) -> Weight:
    """The entry called `name`, or any pipeline of the hub by OWNER/NAME.

    Raises:
        OptionError: no such name; it lists what there is.
        WeightsError: it names a file or a folder, and those are not for here.
    """
    if name in WEIGHTS:
        return WEIGHTS[name]
    if _is_repo_id(name):
        return Weight(name, "", "its own; read its page", None, None)
    if (
        name.startswith((".", "~"))
        or len(Path(name).parts) > 1
        or Path(name).suffix.lower() in FILES
    ):
        what = "is no published weight" if Path(name).exists() else "does not exist"
        raise WeightsError(
            f"{name} {what}; name a file or a folder that is here, or a pipeline of the hub as OWNER/NAME."
        )
    raise OptionError(
        f"there are no weights called {name!r}; the known ones are {', '.join(WEIGHTS)}."
    )


def locate(name: str, folder: str | os.PathLike[str] | None = None, weighted: bool = True) -> Path:
    """Where a weight lies on this machine; no network is asked.

    Args:
        folder: looked into first; then the folder that PULID_WEIGHTS names, then the hub's cache.
        weighted: of a pipeline all its weights, too; False where the description of its parts is enough.

    Raises:
        OptionError: no such name.
        WeightsError: it is not here; the message says how to get it.
    """
    entry = find_weight(name)
    for place in _search_folders(folder):
        path = place / entry.file if entry.file else place / entry.repo.split("/")[-1]
        if path.is_file() if entry.file else _is_complete(path, weighted):
            return path
    if (cached := _find_in_cache(entry, weighted)) is not None:
        return cached
    raise WeightsError(
        f"{entry.name} is not on this machine; `pulid weights get {name}` downloads it{entry.size}, "
        f"or put it into a folder and set {FOLDER_VARIABLE} to it."
    )


def download(
    name: str, folder: str | os.PathLike[str] | None = None, say: Callable[[str], None] = print
) -> Path:
    """Where a weight lies, downloaded if it is nowhere yet. From the hub a connection that breaks is taken up where it was; a
    file that is on no hub begins again.

    The hub's own variables hold: HF_ENDPOINT for a mirror of it, HF_TOKEN for what needs one, and HF_HUB_OFFLINE for no
    network at all.

    Args:
        folder: where to put it; the hub's cache by default.
        say: told the licence before the first byte.

    Raises:
        OptionError: no such name.
        WeightsError: it could not be had.
    """
    from huggingface_hub.errors import GatedRepoError

    entry = find_weight(name)
    with suppress(WeightsError):
        return locate(name, folder)
    forbids = "  (not for commercial use)" if entry.commercial is False else ""
    if entry.by_hand:
        raise WeightsError(
            f"{entry.file} is on no hub; get it from {entry.repo} and put it into a folder, {FOLDER_VARIABLE}."
        )
    say(f"{entry.name}{entry.size}, licence: {entry.licence}{forbids}")
    try:
        return _download(entry, None if folder is None else Path(folder), SHA256.get(name))
    except GatedRepoError as error:
        raise WeightsError(
            f"{entry.name} is for those who accept its licence: do so at https://huggingface.co/{entry.repo}, set HF_TOKEN (or "
            "`hf auth login`), and run the same command again."
        ) from error
    except (
        Exception
    ) as error:  # the hub's client, requests and the operating system each have their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"{entry.name} could not be downloaded ({reason}); run the same command again, files that are whole are kept."
        ) from error


def verify_weights(name: str, folder: str | os.PathLike[str] | None = None) -> str:
    """Reads a weight from end to end and compares its SHA-256 with `SHA256`, or with what the hub said at the download.

    Returns:
        "whole", or "here, and there is nothing to compare it with".

    Raises:
        WeightsError: it is not here, or differs.
    """
    from openpulid.io.checkpoints import sha256

    path = locate(name, folder)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    known = 0
    for file in files:
        expected = SHA256.get(name) or _expected_hash(file)
        if expected is None:
            continue
        known += 1
        if sha256(file) != expected:
            raise WeightsError(
                f"{file} is damaged: its SHA-256 is not {expected}; delete it and get it again."
            )
    return "whole" if known else "here, and there is nothing to compare it with"


def _search_folders(folder: str | os.PathLike[str] | None) -> Sequence[Path]:
    named = os.environ.get(FOLDER_VARIABLE)
    return [Path(place).expanduser() for place in (folder, named) if place]


def _is_repo_id(name: str) -> bool:
    """Whether it is OWNER/NAME as the hub has them, and no file's name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if name.count("/") != 1 or Path(name).suffix.lower() in FILES:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _find_in_cache(entry: Weight, weighted: bool) -> Path | None:
    """In the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from torch.hub import get_dir

    if entry.repo.startswith("https://"):
        path = Path(get_dir()) / "checkpoints" / entry.file
        return path if path.is_file() else None
    wanted = (entry.file,) if entry.file else ("model_index.json", "config.json")
    found = next(
        (x for name in wanted if isinstance(x := try_to_load_from_cache(entry.repo, name), str)),
        None,
    )
    if found is None:
        return None
    if entry.file:
        return Path(found)
    return Path(found).parent if _is_complete(Path(found).parent, weighted) else None


def _is_complete(folder: Path, weighted: bool) -> bool:
    """Whether all of a pipeline is in a folder: every part that it names, and every shard of a part's weights; or of a network
    alone. The hub's own check wants the files that nobody asked for, too, and some folders hold other programs' parts."""
    if not (folder / "model_index.json").is_file():
        return (folder / "config.json").is_file() and _has_weights(folder)
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    parts = [
        folder / name
        for name, kind in index.items()
        if isinstance(kind, list) and kind[0] is not None
    ]
    networks = [part for part in parts if (part / "config.json").is_file()]
    described = all(any(part.glob("*config.json")) for part in parts)
    return described and (not weighted or all(map(_has_weights, networks)))


def _has_weights(part: Path) -> bool:
    here = {file.name for file in part.iterdir() if file.suffix in (".safetensors", ".bin")}
    sharded = [
        set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        for index in part.glob("*.index*.json")
    ]
    return any("-of-" not in name for name in here) or any(shards <= here for shards in sharded)


def _download(entry: Weight, folder: Path | None, expected: str | None) -> Path:
    from huggingface_hub import constants, hf_hub_download, list_repo_files, snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled
    from torch.hub import download_url_to_file, get_dir

    if entry.repo.startswith("https://"):
        if constants.HF_HUB_OFFLINE:  # who forbids the hub means every network
            raise OfflineModeIsEnabled(
                f"Cannot reach {entry.repo}: offline mode is enabled by HF_HUB_OFFLINE"
            )
        path = (folder or Path(get_dir()) / "checkpoints") / entry.file
        path.parent.mkdir(parents=True, exist_ok=True)
        in_name = re.search(r"-([0-9a-f]{8,})\.pth$", entry.file)  # as PyTorch names its own
        download_url_to_file(entry.repo, str(path), expected or (in_name[1] if in_name else None))
        return path
    if entry.file:
        return Path(hf_hub_download(entry.repo, entry.file, local_dir=folder))
    place = folder / entry.repo.split("/")[-1] if folder else None
    # half precision is what one computes in, and half the bytes
    half = any(name.endswith(".fp16.safetensors") for name in list_repo_files(entry.repo))
    patterns = [
        "*.json",
        "*.txt",
        "*.model",
        "*.fp16.safetensors" if half else "*/*.safetensors",
        "model.safetensors",
    ]
    patterns += [] if half else ["diffusion_pytorch_model.safetensors"]  # a network alone
    return Path(snapshot_download(entry.repo, allow_patterns=patterns, local_dir=place))


def _expected_hash(file: Path) -> str | None:
    """The SHA-256 that the hub promises: in its cache the name of the file behind the link, in a folder what stands in the
    download's own notes."""
    if file.is_symlink():
        target = file.resolve().name
        return target if re.fullmatch(r"[0-9a-f]{64}", target) else None
    for above in file.parents:
        notes = (
            above / ".cache" / "huggingface" / "download" / f"{file.relative_to(above)}.metadata"
        )
        if notes.is_file():
            lines = notes.read_text("utf-8").splitlines()
            return lines[1] if len(lines) > 1 and re.fullmatch(r"[0-9a-f]{64}", lines[1]) else None
    return None
