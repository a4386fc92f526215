"""The probe of facial parameters: it recovers a linear map, and its targets are the subjects'."""

from __future__ import annotations

import torch

from openpulid.mini.evaluation import parameter_probe
from openpulid.mini.evaluation.parameter_probe import ParameterProbe, fit_probe, get_facial_values
from openpulid.mini.train.recognition import FACIAL_COLUMNS
from openpulid.world import Person


def test_probe_recovers_linear_map(monkeypatch) -> None:
    torch.manual_seed(0)
    embeddings = torch.nn.functional.normalize(torch.randn(500, 12), dim=-1)
    parameters = embeddings @ torch.randn(12, 5) + 0.3
    monkeypatch.setattr(parameter_probe, "embed_examples", lambda *_: (embeddings, parameters))
    probe = fit_probe(torch.nn.Identity(), None)  # type: ignore[arg-type]
    # The length of an embedding does not matter.
    assert (probe(7 * embeddings) - parameters).abs().mean() < 0.03
    assert parameter_probe.measure_probe(probe, torch.nn.Identity(), None)["chance"] > 0.5  # type: ignore[arg-type]
    assert isinstance(probe, ParameterProbe) and probe.config == {"dim": 12, "values": 5}


def test_facial_values_are_those_of_subjects() -> None:
    parameters = get_facial_values(["1000003", "1000004"])
    assert parameters.shape == (2, len(FACIAL_COLUMNS))
    assert torch.equal(
        parameters[1], torch.tensor(Person.from_seed(1000004).vector())[FACIAL_COLUMNS]
    )
