"""For whoever runs the service: is it alive, is it ready, what has it done."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from openpulid.service.api.access import Owner
from openpulid.service.api.context import Context
from openpulid.service.api.problems import Problem, document

router = APIRouter(tags=["health"])


class HealthAnswer(BaseModel):
    """The service answers."""

    status: Literal["ok"] = "ok"


@router.get("/healthz", response_model=HealthAnswer)
async def check_health() -> HealthAnswer:
    """Return that the process answers."""
    return HealthAnswer()


@router.get("/readyz", response_model=HealthAnswer, responses=document(503))
async def check_readiness(context: Context) -> HealthAnswer:
    """Return whether the first preset is loaded, and the database answers."""
    if not context.backend.is_ready():
        raise Problem(503, "the models are not loaded yet.", headers={"Retry-After": "5"})
    await run_in_threadpool(context.backend.jobs.count_unfinished)
    return HealthAnswer()


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: {"description": "Prometheus' text format", "content": {CONTENT_TYPE_LATEST: {}}},
        **document(401, 503),
    },
)
async def get_metrics(owner: Owner, context: Context) -> Response:
    """Return figures for Prometheus."""
    waiting = await run_in_threadpool(context.backend.jobs.count_waiting)
    return Response(context.metrics.render(waiting), media_type=CONTENT_TYPE_LATEST)
