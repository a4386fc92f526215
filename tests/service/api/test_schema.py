"""What the service publishes about itself is what it does: random requests for every route."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from openpulid.service.api.backend import Backend
from tests.service.api.conftest import limited

schemathesis = pytest.importorskip("schemathesis")

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
EXAMPLES = 15


@pytest.fixture(scope="module")
def api_url(backend: Backend) -> Iterator[str]:
    """Address of a service whose valid requests take little time."""
    with limited(backend, steps=2, images=1, side=96) as client:
        yield str(client.base_url)


def with_known_words(url: str) -> dict[str, Any]:
    """Return the schema with a prompt and steps that the miniature accepts."""
    schema = httpx.get(url).json()
    for name, body in schema["components"]["schemas"].items():
        properties = body.get("properties", {})
        if "prompt" in properties and name != "FalAnswer":
            properties["prompt"] = {"enum": ["portrait"]}
            properties["num_inference_steps"] = {"enum": [1, 2]}
            body["required"] = ["prompt", "num_inference_steps"]
            for other in ("people", "init_image", "controls", "style_image", "loras", "embeddings"):
                properties.pop(other, None)  # random files are no images
    return schema


def test_every_response_is_documented(api_url: str) -> None:
    schema = schemathesis.openapi.from_dict(with_known_words(f"{api_url}/openapi.json"))
    checks = [schemathesis.checks.CHECKS.get_one(name) for name in CHECKS]
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == 17
    for operation in operations:
        strategy = operation.as_strategy() | operation.as_strategy(
            generation_mode=schemathesis.GenerationMode.NEGATIVE
        )

        @given(case=strategy)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def check(case: Any) -> None:
            case.call_and_validate(base_url=api_url, checks=checks, timeout=30)

        check()
