r"""Weights in prompts: the syntax of AUTOMATIC1111's web UI."""

from __future__ import annotations

import pytest

from openpulid.pipelines.prompt_weights import (
    Fragment,
    find_marks,
    parse_weights,
    remove_marks,
)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red hat", [("a red hat", 1)]),
        ("", [("", 1)]),
        ("a (red:1.3) hat", [("a ", 1), ("red", 1.3), (" hat", 1)]),
        ("a (red: 1.3 ) hat", [("a ", 1), ("red", 1.3), (" hat", 1)]),
        ("(red:.5)(blue:2)", [("red", 0.5), ("blue", 2)]),
        ("((red)) hat", [("red", 1.21), (" hat", 1)]),
        ("(((red)))", [("red", 1.331)]),
        ("[red] hat", [("red", 0.909091), (" hat", 1)]),
        ("[[red]]", [("red", 0.826446)]),
        ("(a [red] hat:1.5)", [("a ", 1.5), ("red", 1.363636), (" hat", 1.5)]),
        ("((red:1.5))", [("red", 1.65)]),
        ("(a (red:2) hat:0.5)", [("a ", 0.5), ("red", 1), (" hat", 0.5)]),
        # text
        ("a hat (a remark)", [("a hat (a remark)", 1)]),
        ("(a (red) hat:1.5)", [("a (red) hat", 1.5)]),
        ("((red) hat)", [("((red) hat)", 1)]),
        (r"hat \(red\)", [("hat (red)", 1)]),
        (r"hat \(red:1.3\)", [("hat (red:1.3)", 1)]),
        (r"(hat \(red\):1.3)", [("hat (red)", 1.3)]),
        (r"\[red\] C:\hat", [(r"[red] C:\hat", 1)]),
        ("(16:9)", [("(16:9)", 1)]),
        ("(red:-1)", [("(red:-1)", 1)]),
        ("smile :) (red:1.2)", [("smile :) ", 1), ("red", 1.2)]),
        ("(red", [("(red", 1)]),
        ("red) [hat", [("red) [hat", 1)]),
        ("(a [red) hat:1.3)", [("(a [red) hat:1.3)", 1)]),
        ("[red:blue:0.5] [a|b] []", [("[red:blue:0.5] [a|b] []", 1)]),
        ("((", [("((", 1)]),
        ("(:1.3)", [("", 1)]),
    ],
)
def test_parts_and_weights(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert parse_weights(prompt) == [Fragment(*pair) for pair in expected]
    assert remove_marks(prompt) == "".join(text for text, _ in expected)


def test_marks_are_named_as_they_were_written() -> None:
    prompt = r"a (red:1.3) and ((blue)) [hat], (a remark (very: 1.2)), \(x:1.1\), (red:1.3) ("
    assert find_marks(prompt) == ["(red:1.3)", "((blue))", "[hat]", "(very: 1.2)"]
    assert find_marks("a hat (a remark)") == []


def test_long_and_deep_prompts_are_parsed() -> None:
    assert parse_weights("(" * 3000)[0].text == "(" * 3000
    assert "a" in remove_marks("(" * 3000 + "a" + ")" * 3000)
    assert len(parse_weights("(a:1.1) b " * 900)) == 1800
