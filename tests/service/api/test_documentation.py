"""The examples of the documentation run as they are printed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.service.api.conftest import PORTRAIT

PAGE = Path(__file__).parents[3] / "docs" / "service.md"
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8100"

EXAMPLES = [
    (language, textwrap.dedent(code))
    for _, language, code in FENCE.findall(PAGE.read_text("utf-8"))
    if ADDRESS in code
]


@pytest.mark.parametrize(("language", "code"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(
    language: str, code: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(PORTRAIT, "anna.png")
    code = code.replace(ADDRESS, url)
    if language == "python":
        exec(compile(code, "service.md", "exec"), {})
    elif language == "js":
        if shutil.which("node") is None:
            pytest.skip("node is not installed")
        subprocess.run(["node", "--input-type=module", "-e", code], check=True, timeout=60)
        assert (tmp_path / "anna-js.png").read_bytes()[:4] == b"\x89PNG"
    else:
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        process = subprocess.run(["sh", "-c", code], check=True, timeout=60, capture_output=True)
        answer = json.loads(process.stdout)
        assert "data" in answer or answer == json.loads(printed_answer())


def printed_answer() -> str:
    return next(code for _, language, code in FENCE.findall(PAGE.read_text()) if language == "json")
