"""The application: routes, errors, and what every request passes."""

from __future__ import annotations

from fastapi import FastAPI

from openpulid import __version__
from openpulid.io.serving import SameOriginMiddleware, is_loopback
from openpulid.service.api.access import ApiKeys
from openpulid.service.api.backend import Backend
from openpulid.service.api.context import ApiContext
from openpulid.service.api.guards import BodyLimit, Observer
from openpulid.service.api.openapi import publish_schema
from openpulid.service.api.problems import Problem, handle_errors
from openpulid.service.api.routes import fal, health, identities, images, jobs, models

FOREIGN = (
    "without API keys the service only answers this machine; use http://127.0.0.1 or "
    "http://localhost, or start it with --api-keys."
)


def create_app(backend: Backend, keys: ApiKeys | None = None) -> FastAPI:
    """Create the application.

    Args:
        backend: the queue.
        keys: the API keys; without any, only requests to a loopback address are answered, and
            none from other websites.

    Raises:
        OptionError: the rate of the configuration is none.
    """
    app = FastAPI(
        title="openpulid",
        summary="Images of a person from reference images.",
        version=__version__,
        # the interactive pages load scripts from another server
        docs_url=None,
        redoc_url=None,
    )
    context = ApiContext.create(backend)
    app.state.context = context
    app.state.keys = keys or ApiKeys()
    for module in (images, identities, jobs, models, health, fal):
        app.include_router(module.router)
    handle_errors(app)
    publish_schema(app)
    # the last one is the first that a request passes
    app.add_middleware(BodyLimit, max_bytes=backend.config.limits.body_bytes)
    if not app.state.keys.are_required:
        refusal = Problem(403, FOREIGN).to_response()
        app.add_middleware(SameOriginMiddleware, is_own_host=is_loopback, refusal=refusal)
    app.add_middleware(Observer, metrics=context.metrics)
    return app
