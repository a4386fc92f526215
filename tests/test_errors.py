"""Errors of libraries in one sentence, and suggestions for misspelled names."""

from __future__ import annotations

import errno
import importlib
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from openpulid.errors import (
    OptionError,
    WeightsError,
    explain_missing_library,
    explain_out_of_memory,
    first_line,
    is_out_of_memory,
    suggest,
)
from openpulid.io import checkpoints
from openpulid.pipelines.base_models import describe_load_errors

MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17.00 GB)."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    RuntimeError("Invalid buffer size: 16.00 GB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("Unable to find an engine to execute this computation"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    MemoryError(),
    # not in the list of reports
    RuntimeError("HIP error: hipErrorOutOfMemory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    Exception("Failed to allocate memory for requested buffer of size 16"),  # ONNX Runtime
]


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=repr)
def test_out_of_memory_is_explained(error: Exception) -> None:
    message = r"too little memory; .*a lower --memory"
    with pytest.raises(OptionError, match=message), explain_out_of_memory():
        raise error
    with pytest.raises(type(error)), describe_load_errors(Path("model")):  # not "is damaged"
        raise error
    wrapped = WeightsError("the file is damaged.")
    wrapped.__cause__ = error
    assert is_out_of_memory(wrapped) and not is_out_of_memory(WeightsError("out of memory"))


def test_other_errors_pass() -> None:
    for error in (RuntimeError("negative dimension"), OSError(errno.ENOENT, "x"), KeyError("x")):
        with pytest.raises(type(error)), explain_out_of_memory():
            raise error


def test_weights_without_memory_are_not_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory (os error 12)")

    monkeypatch.setattr(checkpoints, "safe_open", fail)
    with pytest.raises(OptionError, match="too little memory"), explain_out_of_memory():
        checkpoints.read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("library", "package"),
    [
        ("libGL.so.1", "libgl1"),
        ("libgthread-2.0.so.0", "libglib2.0-0"),
        ("libSM.so.6", "libsm6"),
        ("libfoo.so.3", "the package that contains it"),
    ],
)
def test_missing_system_library_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: str, package: str
) -> None:
    message = f"{library}: cannot open shared object file: No such file or directory"
    (tmp_path / "cv2.py").write_text(f"raise ImportError({message!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cv2", raising=False)
    with pytest.raises(OptionError) as error, explain_missing_library():
        importlib.import_module("cv2")
    assert f"{library} is missing; install" in str(error.value) and package in str(error.value)


def test_photo_models_without_libgl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """OpenCV is also imported by insightface and facexlib."""
    from openpulid.faces.arcface import load_arcface_ir_se50
    from openpulid.faces.bisenet import FaceParser
    from openpulid.faces.insightface_pack import load_onnx_model
    from openpulid.methods.control_maps.edges import canny_edges

    message = "libGL.so.1: cannot open shared object file: No such file or directory"
    (tmp_path / "cv2.py").write_text(f"raise ImportError({message!r})")
    monkeypatch.syspath_prepend(tmp_path)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("cv2", "insightface", "facexlib"):
            monkeypatch.delitem(sys.modules, name)
    for load in (
        lambda: load_onnx_model(tmp_path / "x.onnx", "cpu", "get_feat"),
        lambda: FaceParser.load(tmp_path / "x.pth"),
        lambda: load_arcface_ir_se50(tmp_path / "x.pth"),
        lambda: canny_edges(Image.new("RGB", (8, 8))),
    ):
        with pytest.raises(OptionError, match="apt install libgl1"):
            load()


def test_other_import_errors_pass() -> None:
    with pytest.raises(ModuleNotFoundError), explain_missing_library():
        importlib.import_module("no_such_module")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("", "ValueError"),
        (" \n", "ValueError"),
        ("...", "ValueError"),
        ("is cut short.", "is cut short"),
        ("\n is cut short.\r\nat byte 7.", "is cut short"),
    ],
)
def test_first_line_of_an_error(message: str, line: str) -> None:
    assert first_line(ValueError(message)) == line


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("minii", " (did you mean 'mini'?)"),
        ("MINI", " (did you mean 'mini'?)"),
        ("mini_lightning", " (did you mean 'mini-lightning'?)"),
        ("instantID", " (did you mean 'instantid'?)"),
        ("zebra", ""),
        ("", ""),
    ],
)
def test_similar_names_are_suggested(name: str, suggestion: str) -> None:
    assert suggest(name, ["sdxl", "mini", "mini-lightning", "instantid"]) == suggestion
