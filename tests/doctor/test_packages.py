"""Packages and their conflicts, read from the metadata of a small installation of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from openpulid.doctor import packages

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install packages: `install("torch", "2.6", requires=["numpy"], code="...")`.

    Only they are installed while the test runs, since only their folder is on the path.
    """
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def add(name: str, version: str, requires: list[str] | None = None, code: str = "") -> None:
        module = name.replace("-", "_")
        folder = tmp_path / f"{module}-{version}.dist-info"
        folder.mkdir()
        extras = ("train", "dev") if name == "openpulid" else ()
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires or ()]
        lines += [f"Provides-Extra: {extra}" for extra in extras]
        lines += ["Requires-Python: >=3.10"]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.delitem(sys.modules, module, raising=False)

    yield add
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]  # the real one comes back with monkeypatch's other changes


def test_complete_installation_has_no_problem(install: Install) -> None:
    requires = ["alpha>=2", 'beta>=1; extra == "train"', 'gamma; extra == "dev"']
    install("openpulid", "0.2.0", requires)
    install("alpha", "2.1+cu128")
    section = packages.check()
    assert section.problems == ()
    assert section.rows[2:] == (
        ("alpha", "2.1+cu128", ">=2", "works"),
        ("beta", "-", ">=1", "not installed (extra train)"),
    )


def test_missing_package_and_wrong_version_are_problems(install: Install) -> None:
    install("openpulid", "0.2.0", ["alpha>=2", "beta<3", 'delta>=4; extra == "train"'])
    install("beta", "3.1")
    install("delta", "3")
    section = packages.check()
    assert section.problems == (
        "alpha is not installed; pip install 'alpha>=2'.",
        "openpulid needs beta<3, but 3.1 is installed; pip install 'beta<3'.",
        "openpulid needs delta>=4, but 3 is installed; pip install 'delta>=4'.",
    )
    states = [row[3] for row in section.rows[2:]]
    assert states == ["not installed", "wrong version", "wrong version"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ImportError('libcudart.so.12: no such file\\nmore')", "libcudart.so.12: no such"),
        ("import libmissing", "No module named 'libmissing'"),
        ("raise OSError", "OSError"),
        ("raise ImportError('libGL.so.1: cannot open shared object file')", "apt install libgl1"),
    ],
)
def test_broken_package_has_its_reason(install: Install, code: str, reason: str) -> None:
    install("openpulid", "0.2.0", ["alpha"])
    install("alpha", "2", code=code)
    section = packages.check()
    assert section.rows[2][3].startswith("cannot be imported: ") and reason in section.rows[2][3]
    assert len(section.problems) == 1 and reason in section.problems[0]
    assert "pip install --force-reinstall 'alpha==2'" in section.problems[0]
    assert "\n" not in section.problems[0]


@pytest.mark.parametrize(
    ("names", "module"),
    [
        (("onnxruntime", "onnxruntime-gpu"), "onnxruntime"),
        (("opencv-python", "opencv-python-headless"), "cv2"),
    ],
)
def test_packages_with_the_same_module_conflict(
    install: Install,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, str],
    module: str,
) -> None:
    install("openpulid", "0.2.0", [names[0]])
    (tmp_path / f"{module}.py").touch()
    monkeypatch.delitem(sys.modules, module, raising=False)
    install(names[1], "5")
    section = packages.check()
    assert section.problems == () and section.rows[2] == (names[1], "5", "", "works")
    install(names[0], "5")
    (problem,) = packages.check().problems
    assert problem.startswith(f"{names[0]} and {names[1]} are installed and overwrite")
    assert f"pip uninstall {names[0]} {names[1]}" in problem


@pytest.mark.parametrize(
    ("numpy", "onnxruntime", "is_conflict"),
    [("2.0.0", "1.18.1", True), ("1.26.4", "1.18.1", False), ("2.2.6", "1.19.0", False)],
)
def test_numpy_2_needs_packages_compiled_for_it(
    install: Install, numpy: str, onnxruntime: str, is_conflict: bool
) -> None:
    install("numpy", numpy)
    install("onnxruntime-gpu", onnxruntime)
    problems = list(packages.find_old_binaries())
    assert bool(problems) == is_conflict
    if is_conflict:
        assert problems[0].endswith("pip install 'onnxruntime-gpu>=1.19'.")


def test_requirements_of_a_package_are_compared(install: Install) -> None:
    install("openpulid", "0.2.0", ["torchvision", "torch"])
    other_system = 'torch==1.0; platform_system == "Other"'
    install("torchvision", "0.21", ["torch==2.6.0", other_system, 'torch==3; extra == "more"'])
    install("torch", "2.7.0")
    (problem,) = packages.check().problems
    assert problem.startswith("torchvision 0.21 needs torch==2.6.0, but 2.7.0 is installed;")


@pytest.mark.parametrize("name", packages.KERNELS)
def test_kernel_for_another_torch_is_a_problem(install: Install, name: str) -> None:
    install("openpulid", "0.2.0", [])
    install("torch", "2.7.0")
    install(name, "1.0", code="raise ImportError('undefined symbol: _ZN3c10')")
    (problem,) = packages.check().problems
    assert "undefined symbol" in problem and problem.endswith(f"pip uninstall {name}.")


def test_kernel_names_the_torch_it_needs(install: Install) -> None:
    install("openpulid", "0.2.0", [])
    install("torch", "2.7.0")
    install("xformers", "0.0.29", ["torch==2.6.0"])
    (problem,) = packages.check().problems
    assert problem == (
        "xformers 0.0.29 needs torch==2.6.0, but 2.7.0 is installed; openpulid does not need it: "
        "pip uninstall xformers."
    )
