"""Words of a caption that describe who a person is.

An adapter that is trained with "a freckled woman of 30 named Anna Bell" learns to read the prompt
instead of the identity. Hair, beards, glasses and expressions are no identity: prompts change them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_PERSON = (
    r"(?:man|men|woman|women|girl|girls|boy|boys|lady|ladies|guy|guys|person|people|child|children|"
    r"kid|kids|baby|teen|teenager|adult|actor|actress|singer|model|male|female|face|couple)"
)
_THINGS = r"(?! (?:mask|shield|paint|cream|blanket|bottle|carriage|ring|piercing|of)\b)"
"""A "face mask" and a "nose ring" are things, not parts of a person."""
_ADJECTIVES = r"(?:,? (?!(?:a|an|the|with|in|on|of|at|and|next|near)\b)[\w-]+){0,3}?"
_COLOR = r"(?:light |dark |bright |deep |pale )?(?:blue|green|brown|gray|grey|hazel|amber|black)"
_NUMBER = (
    r"(?:\d+|(?:twen|thir|for|fif|six|seven|eigh|nine)ty|(?:thir|four|fif|six|seven|eigh|nine)teen|"
    r"ten|twelve)"
)
_NAME = r"[A-Z][a-z'’-]+(?: (?:de|van|von|der|bin|al))*(?: [A-Z][a-z'’-]+)+"

_AGE = (
    rf"\b(?:who is |aged |of )?{_NUMBER}(?:[- ]years?[- ]old| years of age)\b",
    rf"\b(?:in|of) (?:his|her|their) (?:early |mid |mid-|late )?(?:{_NUMBER}s|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ties|teens)\b",
    r"\b(?:very )?(?:young|old|older|elderly|middle[- ]aged|teenaged?|aged|youthful)"
    rf"(?={_ADJECTIVES} {_PERSON}\b{_THINGS})",
)
_ORIGIN = (
    r"\b(?:african[- ]american|asian[- ]american|asian|african|caucasian|european|american|chinese|"
    r"japanese|korean|indian|hispanic|latino|latina|arab|arabic|middle[- ]eastern|black|white|"
    rf"(?:dark|light|fair|pale|brown|olive)[- ]skinned)(?={_ADJECTIVES} {_PERSON}\b{_THINGS})",
    r"\bwith (?:dark|light|fair|pale|brown|olive|tanned) skin\b",
)
_LOOKS = (
    r"\b(?:very )?(?:beautiful|handsome|pretty|attractive|gorgeous|ugly|cute|chubby|freckled|"
    rf"wrinkled|(?:blue|green|brown|hazel|gray|grey|dark)[- ]eyed)"
    rf"(?={_ADJECTIVES} {_PERSON}\b{_THINGS})",
)
_MARK = (
    rf"(?:(?!(?:with|and|has|having|{_PERSON})\b)[\w-]+ )?"
    r"(?:freckles|wrinkles(?! (?:his|her|their)\b)|moles?|dimples|cheekbones|jawline|birthmark|"
    r"double chin|scars?)"
    r"(?: on (?:his|her|their|the) \w+)?"
)
_FEATURE = (
    rf"(?:a |an |his |her |their )?(?:{_COLOR} eyes|{_MARK}|"
    rf"(?:big|small|large|long|pointed|crooked) (?:nose|ears|chin|lips)\b{_THINGS}|"
    rf"(?:round|oval|square|narrow|wide|long) face\b{_THINGS})"
)
_PLACES = ("in", "at", "near", "from", "on", "to", "of the", "the")

_CALLED = re.compile(rf"\b(?:named|called|known as) (?:{_NAME}|[A-Z][\w'’-]+)")
_TITLED = re.compile(
    rf"\b(?:Mr|Mrs|Ms|Dr|President|Prince|Princess|Queen|King|Sir)\.? (?:{_NAME}|[A-Z][\w'’-]+)"
)
_FULL_NAME = re.compile(rf"(?P<before>[\w']+ )?\b(?P<name>{_NAME})")
_TITLE_CASE = re.compile(
    r"(?<=\w )(?:A|An|And|At|By|For|From|In|Near|Of|On|The|To|With|Man|Men|Woman|Women|Girl|Boy|"
    r"Child|People|Person)\b|\b(?:[A-Z][a-z'’-]+ ){4}[A-Z]"
)
"""Found in a caption in title case: a capitalized small word, or five capitalized words."""

_REMOVED = [re.compile(p, re.IGNORECASE) for p in (*_AGE, *_ORIGIN, *_LOOKS)]
_FEATURES = [
    re.compile(rf"\b(?P<word>{_FEATURE}),? and ", re.IGNORECASE),
    re.compile(rf",? (?:and|with|has|having) (?P<word>{_FEATURE})\b", re.IGNORECASE),
    re.compile(rf"(?:, |['’]s )?(?<!['’])\b(?P<word>{_FEATURE})\b", re.IGNORECASE),
]

_GAP = "_0_"
"""Marks where words were removed, as a word of its own."""


class CheckedCaption(NamedTuple):
    """A caption without the words that describe who a person is.

    Attributes:
        caption: the rest of the caption.
        words: the removed words.
    """

    caption: str
    words: list[str]


def remove_identity_words(caption: str) -> CheckedCaption:
    """Remove names, age, origin, and features of the face from a caption.

    The words are found by patterns for English. A full name becomes "a person", but stays in a
    caption in title case, where names look like other words.
    """
    words: list[str] = []

    def remove(match: re.Match[str]) -> str:
        words.append(match[0].strip(" ,"))
        return f" {_GAP} "

    def remove_feature(match: re.Match[str]) -> str:
        words.append(match["word"])
        return f" {_GAP} "

    def replace_name(match: re.Match[str]) -> str:
        before = match["before"] or ""
        if before.strip().lower() in _PLACES:
            return match[0]
        words.append(match["name"])
        return f"{before}a person"

    def replace_title(match: re.Match[str]) -> str:
        words.append(match[0])
        return "a person"

    text = _CALLED.sub(remove, caption)
    text = _TITLED.sub(replace_title, text)
    if not _TITLE_CASE.search(caption):
        text = _FULL_NAME.sub(replace_name, text)
    for pattern in _FEATURES:
        text = " ".join(pattern.sub(remove_feature, text).split())
    for pattern in _REMOVED:
        text = " ".join(pattern.sub(remove, text).split())
    words = [word.replace(f"{_GAP} ", "") for word in words if word != _GAP]
    return CheckedCaption(_tidy(text) if words else caption, words)


def _tidy(text: str) -> str:
    """Repair spaces, commas and articles where words were removed."""
    text = re.sub(rf"\b([Aa])n?(?:,? {_GAP})+,? (?=[aeiou])", r"\1n ", text)
    text = re.sub(rf"\b([Aa])n?(?:,? {_GAP})+,? (?=\w)", r"\1 ", text)
    text = " ".join(text.replace(_GAP, "").split())
    text = re.sub(r"\s+([,.;:!?])", r"\1", text)
    text = re.sub(r"([,;])(?:\s*[,;])+", r"\1", text)
    text = re.sub(r"\b(an?),\s+", r"\1 ", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(?:with|and|has|having)(?=\s*(?:[,.;]|$))", "", text).strip()
    return re.sub(r"\s+([,.;:!?])", r"\1", text).strip(" ,;")
