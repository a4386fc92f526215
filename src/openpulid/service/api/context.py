"""What a route gets: who sends the request, and what answers it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from openpulid.io.content_credentials import ContentSigner
from openpulid.service.api.access import Owner
from openpulid.service.api.backend import Backend
from openpulid.service.api.following import Follower
from openpulid.service.api.metrics import Metrics
from openpulid.service.api.rates import RateLimiter
from openpulid.service.api.submission import Submitter


@dataclass(frozen=True)
class ApiContext:
    """The parts of one application.

    Attributes:
        backend: the queue.
        submitter: puts requests into it.
        follower: waits for jobs.
        rates: of the API keys.
        signer: of the images that are delivered, if they are signed.
        metrics: figures for Prometheus.
    """

    backend: Backend
    submitter: Submitter
    follower: Follower
    rates: RateLimiter
    signer: ContentSigner | None = None
    metrics: Metrics = field(default_factory=Metrics)

    @classmethod
    def create(cls, backend: Backend) -> ApiContext:
        """Create the parts of an application.

        Raises:
            OptionError: the rate of the configuration is none, or its signer cannot sign.
        """
        rates = RateLimiter(backend.config.limits.rate)
        files = backend.config.signer_files
        signer = None if files is None else ContentSigner.load(*files)
        return cls(backend, Submitter(backend), Follower(backend.jobs), rates, signer)


def find_context(request: Request) -> ApiContext:
    """Return the parts of the application that serves a request."""
    return request.app.state.context


Context = Annotated[ApiContext, Depends(find_context)]
"""A parameter of a route."""


def count_request(owner: Owner, context: Context) -> str:
    """Return the owner of a request that counts for the rate of its API key.

    Raises:
        Problem: there were too many (429).
    """
    context.rates.count(owner)
    return owner


CountedOwner = Annotated[str, Depends(count_request)]
"""The name of the API key of a request for images or identities: a parameter of a route."""
