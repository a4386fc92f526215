"""Marks of tests that older versions of PyTorch do not pass.

`make test-lowest` runs them with the oldest one; what lies between is not tested.
"""

import pytest
import torch

HAS_OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12)

same_noise_in_every_precision = pytest.mark.skipif(
    HAS_OLD_TORCH, reason="in PyTorch 2.6, a seed gives other noise in each precision"
)
one_compilation_for_all_blocks = pytest.mark.skipif(
    HAS_OLD_TORCH, reason="PyTorch 2.6 compiles every block with a hook anew"
)
