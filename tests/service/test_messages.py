"""Errors on their way from a replica to the ingress."""

from __future__ import annotations

import pickle

import pytest

from openpulid.errors import ImageError, OptionError, PulidError, StoreError, explain_out_of_memory
from openpulid.service.cluster.messages import name_sources


def test_kind_of_an_error_stays_and_files_have_the_names_of_the_sender() -> None:
    with pytest.raises(OptionError) as memory, explain_out_of_memory():
        raise RuntimeError("CUDA out of memory")
    for error, kind in (
        (ImageError("/replica/0/face.png", "is damaged."), PulidError),
        (StoreError("/replica/0/face.png: is damaged."), StoreError),
        (memory.value, StoreError),
    ):
        named = name_sources(error, {"/jobs/face.png": "/replica/0/face.png"})
        sent = pickle.loads(pickle.dumps(named))
        assert type(sent) is kind
        assert str(sent) == str(error).replace("/replica/0/", "/jobs/")
