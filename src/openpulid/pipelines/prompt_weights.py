r"""Weights in a prompt, in the syntax of AUTOMATIC1111's web UI.

`(word:1.3)` multiplies the weight of a word by 1.3, `((word))` by 1.1 for each pair of brackets,
and `[word]` divides it by 1.1. Weights multiply if they are nested. `\(` is a bracket.

A single pair of round brackets without a number is text, because it may enclose a remark; the web
UI would multiply by 1.1. So are brackets without a partner, and `[a:b:0.5]` and `[a|b]`, which
change the prompt between steps there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

STEP = 1.1
"""Factor of one pair of brackets."""

MAX_WEIGHT = 5.0
"""A larger number after a colon is no weight, as in (aspect 16:9)."""

MAX_DEPTH = 20
"""Brackets inside more brackets than this are text."""

_ESCAPED = re.compile(r"\\([()\[\]\\])")
_SPECIAL = re.compile(r"[()\[\]\\]")
_SIGN = re.compile(r"\\[()\[\]\\]|[()\[\]]|[^\\()\[\]]+|\\", re.DOTALL)
_WEIGHT = re.compile(r":\s*((?:\d+\.?\d*|\.\d+))\s*$")
_SCHEDULE = re.compile(r"[|:]")
_CLOSING = {"(": ")", "[": "]"}


@dataclass(frozen=True)
class Fragment:
    """A part of a prompt, and its weight.

    Attributes:
        text: without marks.
        weight: 1 has no effect.
    """

    text: str
    weight: float = 1.0


@dataclass
class _Group:
    """Text in brackets.

    Attributes:
        bracket: "(" or "["; empty for the whole prompt.
        items: text and groups.
        source: what it encloses, as it was written.
    """

    bracket: str = ""
    items: list[str | _Group] = field(default_factory=list)
    source: str = ""

    def add_text(self, text: str) -> None:
        """Append text, joined with the text before it."""
        if self.items and isinstance(self.items[-1], str):
            self.items[-1] += text
        elif text:
            self.items.append(text)


def parse_weights(prompt: str) -> list[Fragment]:
    """Split a prompt into parts of one weight.

    Returns:
        At least one part. The parts without marks join to the prompt that is read.
    """
    fragments: list[Fragment] = []
    for text, weight in _flatten(_parse(prompt).items, 1.0):
        if fragments and fragments[-1].weight == weight:
            fragments[-1] = Fragment(fragments[-1].text + text, weight)
        elif text:
            fragments.append(Fragment(text, weight))
    return fragments or [Fragment("")]


def find_marks(prompt: str) -> list[str]:
    """Return the outermost marks of a prompt, such as "(word:1.3)", each once."""
    marks = [_quote(group) for group in _find_groups(_parse(prompt).items)]
    return list(dict.fromkeys(marks))


def remove_marks(prompt: str) -> str:
    """Return the prompt without marks, as the text encoders read it."""
    return "".join(fragment.text for fragment in parse_weights(prompt))


def join_fragments(fragments: Iterable[Fragment]) -> str:
    """Write a prompt that has these parts; the inverse of `parse_weights`."""
    texts = []
    for fragment in fragments:
        text = _SPECIAL.sub(r"\\\g<0>", fragment.text)
        texts.append(text if fragment.weight == 1 else f"({text}:{fragment.weight:g})")
    return "".join(texts)


def _parse(prompt: str) -> _Group:
    """Parse brackets; one without a partner becomes text."""
    stack = [_Group()]
    for match in _SIGN.finditer(prompt):
        sign = match.group()
        if sign in _CLOSING and len(stack) <= MAX_DEPTH:
            stack.append(_Group(sign))
            continue
        top = stack[-1]
        if sign in _CLOSING.values() and _CLOSING.get(top.bracket) == sign:
            stack.pop()
            stack[-1].items.append(top)
            stack[-1].source += f"{top.bracket}{top.source}{sign}"
            continue
        top.source += sign
        top.add_text(_ESCAPED.sub(r"\1", sign))
    while len(stack) > 1:  # brackets that are not closed
        top = stack.pop()
        stack[-1].source += top.bracket + top.source
        stack[-1].add_text(top.bracket)
        for item in top.items:
            if isinstance(item, str):
                stack[-1].add_text(item)
            else:
                stack[-1].items.append(item)
    return stack[0]


def _flatten(items: list[str | _Group], weight: float) -> Iterator[tuple[str, float]]:
    """Yield the texts and their weights."""
    for item in items:
        if isinstance(item, str):
            yield item, weight
            continue
        inner, factor = _read_weight(item)
        if factor is None:
            yield item.bracket, weight
            yield from _flatten(inner, weight)
            yield _CLOSING[item.bracket], weight
        else:
            yield from _flatten(inner, round(weight * factor, 6))


def _read_weight(group: _Group) -> tuple[list[str | _Group], float | None]:
    """Return what a group encloses, and its factor; None if its brackets are text."""
    last = group.items[-1] if group.items else ""
    if group.bracket == "[":
        is_schedule = any(isinstance(x, str) and _SCHEDULE.search(x) for x in group.items)
        return group.items, None if is_schedule or not group.items else 1 / STEP
    match = _WEIGHT.search(last) if isinstance(last, str) else None
    if match is not None and float(match[1]) <= MAX_WEIGHT:
        assert isinstance(last, str)
        return [*group.items[:-1], last[: match.start()]], float(match[1])
    doubled = group.items[0] if len(group.items) == 1 else None
    if isinstance(doubled, _Group) and doubled.bracket == "(":
        # the innermost of several pairs is not a single one
        return _unwrap(doubled)
    return group.items, None


def _unwrap(group: _Group) -> tuple[list[str | _Group], float]:
    inner, factor = _read_weight(group)
    return inner, STEP * (STEP if factor is None else factor)


def _find_groups(items: list[str | _Group]) -> Iterator[_Group]:
    """Yield the outermost groups that have a weight."""
    for item in items:
        if isinstance(item, _Group):
            if _read_weight(item)[1] is not None:
                yield item
            else:
                yield from _find_groups(item.items)


def _quote(group: _Group) -> str:
    return f"{group.bracket}{group.source}{_CLOSING[group.bracket]}"
