"""Who is answered: keys, hosts, origins; and what watches the service."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from openpulid.errors import OptionError
from openpulid.service.api.access import LOCAL_OWNER, ApiKeys
from openpulid.service.api.rates import RateLimiter
from tests.service.api.conftest import ANNA, BEN, check_problem

ROUTES = (
    ("GET", "/v1/models"),
    ("GET", "/v1/models/mini"),
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/edits"),
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs/x"),
    ("DELETE", "/v1/jobs/x"),
    ("GET", "/v1/jobs/x/events"),
    ("GET", "/v1/jobs/x/images/0"),
    ("POST", "/v1/identities"),
    ("GET", "/v1/identities/x"),
    ("GET", "/v1/identities/x/file"),
    ("DELETE", "/v1/identities/x"),
    ("POST", "/fal-ai/flux-pulid"),
    ("GET", "/metrics"),
)


@pytest.mark.parametrize("key", [None, "wrong", ANNA[:-1], ANNA + "x", "\u00e9"])
def test_every_route_needs_a_key(keyed_url: str, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    for method, path in ROUTES:
        response = httpx.request(method, keyed_url + path, headers=headers)
        check_problem(response, 401, "the API key is missing or not accepted")
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert httpx.get(keyed_url + path).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8100"}, 200),
        ({"Host": "127.0.0.2"}, 200),
        ({"Host": "[::1]:8100"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "192.168.0.7"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "localhost:8100", "Origin": "http://localhost:8100"}, 200),
        ({"Host": "localhost:8100", "Origin": "http://localhost:3000"}, 403),
        ({"Host": "localhost:8100", "Origin": "https://evil.example"}, 403),
        ({"Host": "localhost:8100", "Origin": "null"}, 403),
    ],
)
def test_host_and_origin_without_keys(
    client: httpx.Client, headers: dict[str, str], status: int
) -> None:
    response = client.get("/v1/models", headers=headers)
    if status == 403:
        check_problem(response, 403, "the service only answers this machine")
    else:
        assert response.status_code == status


def test_keys_are_compared_as_hashes(keys: ApiKeys) -> None:
    assert (keys.find_owner(ANNA), keys.find_owner(BEN)) == ("anna", "ben")
    assert keys.find_owner(ANNA.upper()) is None
    assert ANNA not in repr(vars(keys))
    assert ApiKeys().find_owner("anything") == LOCAL_OWNER


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "holds no key"),
        ("anna", "line 1: expected a name and a key"),
        ("anna short", "line 1: the key is shorter than 20 characters"),
        (f"a/b {ANNA}", "line 1: expected a name and a key"),
        (f"anna {ANNA}\nanna {BEN}", "line 2: its name or its key is that of another line"),
        (f"anna {ANNA}\nben {ANNA}", "line 2: its name or its key is that of another line"),
    ],
)
def test_bad_key_files_are_refused_without_a_key(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(OptionError, match=sentence) as caught:
        ApiKeys.read(file)
    assert ANNA not in str(caught.value)
    with pytest.raises(OptionError, match="cannot be read"):
        ApiKeys.read(tmp_path / "missing")


def test_rate_that_is_none() -> None:
    with pytest.raises(OptionError, match="'often' is not a rate; use one such as 60/minute"):
        RateLimiter("often")


def test_figures_name_routes_not_ids(client: httpx.Client) -> None:
    client.get("/v1/jobs/job-secret")
    client.request("BREW", "/v1/models")
    text = client.get("/metrics").text
    assert 'pulid_http_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"}' in text
    assert "pulid_waiting_images 0.0" in text
    assert "secret" not in text
    assert "BREW" not in text
