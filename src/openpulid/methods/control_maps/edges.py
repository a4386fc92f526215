"""The edges of an image."""

from __future__ import annotations

import numpy as np
from PIL import Image

from openpulid.errors import explain_missing_library
from openpulid.io.images import open_image


def canny_edges(image: Image.Image, low: int = 100, high: int = 200) -> Image.Image:
    """Draw the edges of an image, white on black, as ControlNets for edges were trained.

    Canny 1986, in OpenCV's implementation.

    Args:
        image: any image.
        low: lower threshold of the gradient, 0 to 255 and above.
        high: upper threshold.
    """
    with explain_missing_library():
        import cv2

    edges = cv2.Canny(np.array(open_image(image, min_side=1)), low, high)
    return Image.fromarray(edges).convert("RGB")
