"""Selection of one face of several, by a named order and with a warning."""

from __future__ import annotations

import pytest
import torch

from openpulid.errors import FaceError, OptionError
from openpulid.faces.face import ORDERS, Face, select_face, sort_faces


def face(x: float, y: float, side: float) -> Face:
    return Face(
        torch.zeros(3, 100, 100), torch.tensor([x, y, x + side, y + side]), torch.zeros(5, 2), 0.9
    )


SMALL_LEFT, LARGE_MIDDLE, TOP_RIGHT = face(0, 60, 10), face(30, 40, 30), face(80, 0, 20)
FACES = [SMALL_LEFT, TOP_RIGHT, LARGE_MIDDLE]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("large-small", [LARGE_MIDDLE, TOP_RIGHT, SMALL_LEFT]),
        ("small-large", [SMALL_LEFT, TOP_RIGHT, LARGE_MIDDLE]),
        ("left-right", [SMALL_LEFT, LARGE_MIDDLE, TOP_RIGHT]),
        ("right-left", [TOP_RIGHT, LARGE_MIDDLE, SMALL_LEFT]),
        ("top-bottom", [TOP_RIGHT, LARGE_MIDDLE, SMALL_LEFT]),
        ("bottom-top", [SMALL_LEFT, LARGE_MIDDLE, TOP_RIGHT]),
    ],
)
def test_face_orders(order: str, expected: list[Face]) -> None:
    assert [id(x) for x in sort_faces(FACES, order)] == [id(x) for x in expected]
    assert select_face(FACES, 2, order) is expected[2]


def test_unknown_order_is_rejected() -> None:
    assert len(ORDERS) == 6
    with pytest.raises(OptionError, match="large-small, small-large"):
        sort_faces(FACES, "best")


def test_warning_names_selected_face(caplog) -> None:
    assert select_face(FACES, label="group.jpg") is LARGE_MIDDLE
    assert caplog.messages == [
        "group.jpg: the image has 3 faces; using face 0 at 30,40 to 60,70 (order large-small)"
    ]
    caplog.clear()
    select_face(FACES, 0), select_face([SMALL_LEFT])
    assert not caplog.messages


def test_missing_face_index_is_rejected() -> None:
    with pytest.raises(
        FaceError,
        match=r"^group\.jpg: there is no face 3; the image has 3 faces, counted from 0",
    ):
        select_face(FACES, 3, label="group.jpg")
    with pytest.raises(FaceError, match="no face -1"):
        select_face(FACES, -1)
