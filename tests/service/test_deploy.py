"""The sample configuration of a cluster, checked by Ray's own schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

pytest.importorskip("ray.serve", reason="ray[serve] is not installed", exc_type=ImportError)

from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from openpulid.io.serving import is_loopback
from openpulid.service.cluster.application import ClusterOptions, build

FILE = Path(__file__).parents[2] / "deploy" / "serve.yaml"


@pytest.fixture
def sample() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text("utf-8"))


def test_ray_accepts_the_sample(sample: dict[str, Any]) -> None:
    schema = ServeDeploySchema.model_validate(sample)
    assert schema.model_fields_set == sample.keys()  # Ray ignores unknown fields
    assert schema.http_options.model_fields_set == sample["http_options"].keys()
    [application] = schema.applications
    assert application.model_fields_set == sample["applications"][0].keys()
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    assert is_loopback(schema.http_options.host)


def test_the_application_accepts_the_arguments_of_the_sample(sample: dict[str, Any]) -> None:
    arguments = sample["applications"][0]["args"]
    assert isinstance(build(arguments), Application)
    options = ClusterOptions.model_validate(arguments)
    assert [models.preset for models in options.service.models] == ["sdxl", "flux"]
    limits = options.service.limits
    assert limits.rate == "600/minute"
    assert limits.file_bytes == limits.body_bytes == 64 * 2**20  # as `pulid serve`


@pytest.mark.parametrize("parts", [(), ("service",), ("service", "limits")])
def test_a_misspelled_argument_is_refused(sample: dict[str, Any], parts: tuple[str, ...]) -> None:
    arguments = sample["applications"][0]["args"]
    part = arguments
    for name in parts:
        part = part[name]
    part["max_replicsa"] = 2
    with pytest.raises(ValidationError, match="max_replicsa"):
        build(arguments)
