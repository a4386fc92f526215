"""Which files make a network: one rule for what is downloaded, complete, and opened.

A network of diffusers or transformers is a folder with `config.json` and its weights, as one file
or as shards with an index. A folder may hold them several times, in variants such as "fp16". A
pipeline is a folder with `model_index.json` and one folder per part.

`select_weights` chooses the files among names, of a repository or of a local folder alike. The hub
downloads them, `find_missing_parts` looks for them, and `load_network` opens them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from openpulid.errors import PulidError, WeightsError, first_line, is_out_of_memory
from openpulid.io.checkpoint_kinds import read_header
from openpulid.io.checkpoints import load_in_parts, read_names

logger = logging.getLogger(__name__)

PIPELINE_INDEX = "model_index.json"
CONFIG = "config.json"

LIBRARIES = ("diffusers", "transformers", "openpulid")
"""Packages whose classes a pipeline may name. Any other class would be a stranger's code."""

_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)(\.(?P<variant>[A-Za-z0-9_]+))?"
    r"(-(?P<shard>\d+)-of-(?P<total>\d+))?(?P<suffix>\.safetensors|\.bin)"
)
_INDEX = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)(?P<suffix>\.safetensors|\.bin)"
    r"\.index(\.(?P<variant>[A-Za-z0-9_]+))?\.json"
)
_VARIANTS = ("fp16", "", "bf16", "fp32")
"""Variants in the order in which they are preferred: half precision is half the bytes to read."""

SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
"""Suffixes of the scale of `X.weight` in files with scaled float8 weights."""

_NOT_A_NETWORK = re.compile("Scheduler|Token|Processor|Extractor|Guider")


@dataclass(frozen=True)
class WeightsFiles:
    """The files that hold the weights of one network.

    Attributes:
        names: the weights file, or all shards in order.
        index: the file that lists the shards; None for a single file.
        variant: "fp16" for `model.fp16.safetensors`; None for files without a variant.
    """

    names: tuple[str, ...]
    index: str | None = None
    variant: str | None = None


@dataclass(frozen=True)
class Part:
    """A part of a pipeline, as its index names it.

    Attributes:
        library: the module of its class.
        class_name: the name of its class.
    """

    library: str
    class_name: str

    @property
    def is_network(self) -> bool:
        """Whether it has weights, unlike a scheduler or a tokenizer."""
        return not _NOT_A_NETWORK.search(self.class_name)

    def find_class(self) -> Any:
        """Import the class.

        Raises:
            WeightsError: it is not a class of a known library.
        """
        if self.library.partition(".")[0] in LIBRARIES:
            found = getattr(import_module(self.library), self.class_name, None)
            if found is not None:
                return found
        raise WeightsError(
            f"the class {self.library}.{self.class_name} is not part of diffusers or transformers; "
            "use a pipeline without code of its own, or update diffusers."
        )


SINGLE_NETWORK = Part("", "")
"""The only part of a repository that holds one network instead of a pipeline."""


def select_weights(names: Iterable[str], allow_pickle: bool = True) -> WeightsFiles | None:
    """Select the files that hold a network's weights.

    safetensors files come before pickles, and half precision before other variants. Shards count
    only with their index and if none is missing.

    Args:
        names: of the files in the network's folder.
        allow_pickle: select `.bin` files where there are no safetensors.

    Returns:
        The files, or None if there are no complete weights.
    """
    names = set(names)
    candidates: dict[tuple[str, str, str], list[str]] = {}
    for name in names:
        match = _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name)
        if match:
            key = (match["suffix"], match["variant"] or "", match["stem"])
            candidates.setdefault(key, []).append(name)

    for suffix, variant, stem in sorted(candidates, key=_preference):
        if suffix == ".bin" and not allow_pickle:
            continue
        group = sorted(candidates[suffix, variant, stem])
        indices = [name for name in group if name.endswith(".json")]
        shards = [match for name in group if (match := _WEIGHTS.fullmatch(name)) and match["shard"]]
        single = [name for name in group if name not in indices and "-of-" not in name]
        # diffusers opens the shards wherever there is an index, transformers the single file
        if single and not (indices and stem == "diffusion_pytorch_model"):
            return WeightsFiles((single[0],), variant=variant or None)
        for total in {match["total"] for match in shards}:
            complete = [match.string for match in shards if match["total"] == total]
            if indices and len(complete) == int(total):
                return WeightsFiles(tuple(complete), indices[0], variant or None)
    return None


def _preference(key: tuple[str, str, str]) -> tuple[bool, int, str, str]:
    suffix, variant, stem = key
    rank = _VARIANTS.index(variant) if variant in _VARIANTS else len(_VARIANTS)
    return suffix == ".bin", rank, variant, stem


def read_parts(index: str | bytes) -> dict[str, Part]:
    """Parse the text of a pipeline's index to its parts, without those that are not in use.

    Raises:
        WeightsError: the text is no index of a pipeline.
    """
    try:
        entries = json.loads(index)
        return {
            name: Part(str(entry[0]), str(entry[1]))
            for name, entry in entries.items()
            if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
        }
    except (ValueError, AttributeError) as error:
        raise WeightsError(
            f"the pipeline's {PIPELINE_INDEX} is damaged; download the pipeline again."
        ) from error


def find_missing_parts(
    names: Collection[str],
    parts: Mapping[str, Part],
    require_weights: bool = True,
    allow_pickle: bool = True,
) -> dict[str, str]:
    """Find the parts of a pipeline that are not complete.

    Args:
        names: of all files, relative to the pipeline's folder.
        parts: of the pipeline, or {"": part} for a folder with a single network.
        require_weights: require the weights of networks, not only their configuration.
        allow_pickle: accept `.bin` files where there are no safetensors.

    Returns:
        Name of the part -> what it lacks.
    """
    missing = {}
    for part, kind in parts.items():
        files = list_folder(names, part)
        if require_weights and kind.is_network and not select_weights(files, allow_pickle):
            missing[part] = describe_missing_weights(files, allow_pickle)
        elif not any(name.endswith(CONFIG) for name in files):
            missing[part] = "its configuration"
    return missing


def list_folder(names: Iterable[str], folder: str) -> list[str]:
    """Return the names of the files directly in a folder, without the folder; "" is the root."""
    prefix = f"{folder}/" if folder else ""
    return [
        name[len(prefix) :]
        for name in names
        if name.startswith(prefix) and "/" not in name[len(prefix) :]
    ]


def describe_missing_weights(names: Iterable[str], allow_pickle: bool = True) -> str:
    """Describe what keeps a folder without complete weights from being a network."""
    names = sorted(names)
    shards = [match for name in names if (match := _WEIGHTS.fullmatch(name)) and match["shard"]]
    for match in shards:
        width = len(match["total"])
        for number in range(1, int(match["total"]) + 1):
            start, end = match.start("shard"), match.end("shard")
            digits = str(number).zfill(width if len(match["shard"]) == width else 0)
            name = match.string[:start] + digits + match.string[end:]
            if name not in names:
                return name
    if shards:
        return "the index of its shards"
    has_pickles = any(name.endswith((".bin", ".pt", ".ckpt")) for name in names)
    if has_pickles and not allow_pickle:
        return "weights as safetensors (it has pickles, which can hold code)"
    return "weights as safetensors"


def list_files(folder: Path) -> list[str]:
    """Return the files of a local folder and of its subfolders, one level deep."""
    return [
        path.relative_to(folder).as_posix()
        for path in (*folder.glob("*"), *folder.glob("*/*"))
        if path.is_file()
    ]


def find_weights(folder: Path) -> WeightsFiles:
    """Find the weights of a local network.

    Raises:
        WeightsError: the folder has none, or a shard is missing.
    """
    names = list_folder(list_files(folder), "")
    files = select_weights(names)
    if files is None:
        raise WeightsError(
            f"{folder} lacks {describe_missing_weights(names)}; download or copy it again."
        )
    if files.index is not None:
        try:
            weight_map = json.loads((folder / files.index).read_text("utf-8"))["weight_map"]
            missing = sorted(set(weight_map.values()) - set(names))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"{folder / files.index} is damaged; download or copy it again."
            ) from error
        if missing:
            raise WeightsError(f"{folder} lacks {missing[0]}; download or copy it again.")
    return files


def load_network(cls: Any, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Load a network of diffusers or transformers from a folder, in the variant that it has.

    Args:
        cls: its class.
        folder: with its configuration and weights.
        dtype: of the weights; that of the files by default for transformers, float32 for diffusers.

    Raises:
        WeightsError: the folder holds another network, or tensors are missing or damaged.
    """
    config = read_config(folder)
    stored_class = config.get("_class_name")
    if stored_class is not None and stored_class != cls.__name__:
        raise WeightsError(f"{folder} holds a {stored_class}, not a {cls.__name__}.")
    files = find_weights(folder)
    for name in files.names:
        check_complete(folder / name)
    if dtype is not None and hasattr(cls, "load_config"):
        network = _load_from_one_file(cls, config, [folder / name for name in files.names], dtype)
        if network is not None:
            return network
    options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True}
    if files.variant is not None:
        options["variant"] = files.variant
    if dtype is not None:
        # diffusers takes `dtype`, too, but not in all supported versions
        options["torch_dtype" if hasattr(cls, "load_config") else "dtype"] = dtype
    with describe_load_errors(folder):
        network, info = cls.from_pretrained(folder, **options)
        check_loaded(folder, info.get("missing_keys", ()), info.get("unexpected_keys", ()))
    return network


def _load_from_one_file(
    cls: Any, config: Mapping[str, Any], paths: Sequence[Path], dtype: torch.dtype
) -> Any:
    """Load a network of diffusers whose weights are one file with exactly its tensors.

    diffusers maps such a file as a whole, so that a U-Net of 5 GB takes 10 GB while it is loaded.

    Returns:
        The network; None if the file has other names or is quantized, which diffusers can convert.
    """
    is_plain = "quantization_config" not in config and not getattr(
        cls, "_keep_in_fp32_modules", None
    )
    if len(paths) != 1 or paths[0].suffix != ".safetensors" or not is_plain:
        return None
    with describe_load_errors(paths[0]):
        with init_empty_weights(include_buffers=False):
            network = cls.from_config(config)
        if read_names(paths[0]) != set(network.state_dict()):
            return None
        load_in_parts(network, paths[0], f"{paths[0]} does not fit its {CONFIG}", dtype)
    return network.eval()


def check_loaded(path: Path, missing: Collection[str], unused: Collection[str]) -> None:
    """Check that a network took all its tensors from a file, and the file's tensors are all used.

    Args:
        path: of the file or folder.
        missing: names of the network's tensors that the file does not have.
        unused: names of the file's tensors that the network does not have; a warning names them.

    Raises:
        WeightsError: tensors are missing, or the unused ones are scales of the others.
    """
    if missing:
        raise WeightsError(
            f"{path} cannot be loaded (it lacks {len(missing)} tensors, such as "
            f"{min(missing)}); use weights for this architecture."
        )
    if any(name.endswith(SCALE_SUFFIXES) for name in unused):
        raise WeightsError(
            f"{path} is stored in scaled float8, which is only supported in a single file for "
            "FLUX; use weights in float16, bfloat16 or plain float8."
        )
    if unused:
        logger.warning(
            "%s has %d tensors that are not used, such as %s.", path, len(unused), min(unused)
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a local network.

    Raises:
        WeightsError: there is none, or it is damaged.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise WeightsError(f"{folder} lacks {CONFIG}; pass the folder of a network.")
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise WeightsError(f"{path} is damaged; download or copy it again.")
    return config


def check_complete(path: Path) -> None:
    """Check that a safetensors file is not cut short, without reading its tensors.

    Raises:
        WeightsError: it is, or it is a pointer of Git LFS.
    """
    with open(path, "rb") as file:
        is_pointer = file.read(40).startswith(b"version https://git-lfs")
    if is_pointer:
        raise WeightsError(
            f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull`, "
            "or download it."
        )
    if path.suffix == ".safetensors":
        read_header(path)  # reports a damaged file


@contextmanager
def describe_load_errors(path: Path, fix: str = "copy or build it again") -> Iterator[None]:
    """Turn a library's error about weights into one sentence that names the file.

    Args:
        path: of the file or folder.
        fix: what the user can do if the weights are the reason.
    """
    try:
        yield
    except (PulidError, MemoryError):
        raise
    # diffusers, transformers, safetensors and their optional packages have unrelated classes
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = first_line(error)
        if isinstance(error, (AttributeError, TypeError, AssertionError)):
            import diffusers
            import transformers

            fix = (
                f"diffusers {diffusers.__version__} and transformers {transformers.__version__} "
                "may not fit each other: update both, or install the versions of requirements.lock"
            )
        elif isinstance(error, ImportError):
            fix = "install the package that it needs"
        raise WeightsError(f"{path} cannot be loaded ({reason}); {fix}.") from error
