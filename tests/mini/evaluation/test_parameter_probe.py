"""The reader of facial values: least squares finds what is linear, and the truth is the sitters' own."""

from __future__ import annotations

import torch

from openpulid.mini.evaluation import parameter_probe as values
from openpulid.mini.evaluation.parameter_probe import ParameterProbe, fit_probe, get_facial_values
from openpulid.mini.train.recognition import FACIAL_COLUMNS
from openpulid.world import Person


def test_probe_recovers_linear_map(monkeypatch) -> None:
    torch.manual_seed(0)
    seen = torch.nn.functional.normalize(torch.randn(500, 12), dim=-1)
    known = seen @ torch.randn(12, 5) + 0.3
    monkeypatch.setattr(values, "embed_examples", lambda *_: (seen, known))
    reader = fit_probe(torch.nn.Identity(), None)  # type: ignore[arg-type]
    assert (reader(7 * seen) - known).abs().mean() < 0.03  # the length of an embedding says nothing
    assert values.measure_probe(reader, torch.nn.Identity(), None)["chance"] > 0.5  # type: ignore[arg-type]
    assert isinstance(reader, ParameterProbe) and reader.config == {"dim": 12, "values": 5}


def test_facial_values_are_those_of_subjects() -> None:
    known = get_facial_values(["1000003", "1000004"])
    assert known.shape == (2, len(FACIAL_COLUMNS))
    assert torch.equal(known[1], torch.tensor(Person.from_seed(1000004).vector())[FACIAL_COLUMNS])
